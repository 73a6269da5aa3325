"""Write what `make coverage` has found into `benchmarks/coverage.md`, where the page on reliability has it from: of each module, how many statements
no test and no notebook has run"""
import json, subprocess, sys
from pathlib import Path

from fastxtend.benchmark.report import machine, preface
from fastxtend.callback.profiler import markdown_table

root = Path(__file__).resolve().parent.parent

def covered(found):
    "A table from what `coverage json` writes, the modules with most that was not run first"
    def row(name, o): return [name, o['num_statements'], o['missing_lines'], f"{o['percent_covered']:.1f}%"]
    files = sorted(found['files'].items(), key=lambda o: -o[1]['summary']['missing_lines'])
    rows = [row(f"`{name.removeprefix('fastxtend/')}`", o['summary']) for name,o in files if o['summary']['missing_lines']]
    return markdown_table([row('all', found['totals']), *rows], ['module', 'statements', 'not run', 'run'])

if __name__ == '__main__':
    done = subprocess.run([sys.executable, '-m', 'coverage', 'json', '--quiet', '-o', '/dev/stdout'], cwd=root, capture_output=True, text=True, check=True)
    facts = {**machine(), 'Command': '`make coverage`'}
    method = "All notebooks, and some cases of each test. Modules of which everything was run are not listed."
    (root/'benchmarks/coverage.md').write_text('\n'.join([*preface('Lines that run', facts, method), covered(json.loads(done.stdout)), '']), encoding='utf-8')
