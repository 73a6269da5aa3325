"""Run pages, and keep in the repository what their cells show, so that plots and tables can be seen where it is browsed

`python .ci/outputs.py` runs all of `PAGES`, `python .ci/outputs.py optimizers` one of them. `--check` runs nothing and tells whether each page has
outputs, and nothing but what belongs into a repository: that is part of `make sync`. Pages that show times of a machine are not among them."""
import argparse, base64, io, json, os, re, subprocess, sys
from pathlib import Path

root = Path(__file__).resolve().parent.parent
nbs = root/'nbs'
PAGES = ('optimizers', 'optimizer.fused', 'optimizer.steppers', 'optimizer.declare', 'guides.memory', 'guides.own_optimizer', 'performance', 'schedulers', 'callback.averaging',
         'reliability', 'showdoc')
DPI, WIDTH, COLORS, LIMIT = 64, 800, 96, 300_000 # of plots: dots an inch, most pixels, colors; bytes of the outputs of a page
KEPT = ('text/plain', 'text/markdown', 'image/png')

def small(png):
    "The image `png`, in base64, with few colors and not too wide"
    from PIL import Image
    image = Image.open(io.BytesIO(base64.b64decode(png))).convert('RGB')
    if image.width > WIDTH: image = image.resize((WIDTH, round(image.height*WIDTH/image.width)))
    file = io.BytesIO()
    image.quantize(COLORS, Image.Quantize.MAXCOVERAGE).save(file, 'PNG', optimize=True)
    return base64.b64encode(file.getvalue()).decode()

def kept(output):
    "What is kept of an output of a cell, or `None`: no messages, no HTML of progress bars, no numbers of executions, or of lines in a module"
    from docs import as_on_a_terminal
    if output['output_type'] == 'stream':
        text = as_on_a_terminal(''.join(output['text']))
        return dict(name='stdout', output_type='stream', text=text.splitlines(True)) if output['name'] == 'stdout' and text.strip() else None
    data = output.get('data', {})
    data = {k: ''.join(v) for k,v in data.items() if k in KEPT} if 'text/html' not in data or 'text/markdown' in data else {}
    if 'image/png' in data: data = {'image/png': small(data['image/png'])}
    if 'text/markdown' in data: data = {'text/markdown': re.sub(r'^(---\s+)?\[source\]\(.*\n\s*', '', data['text/markdown'], flags=re.M)}
    if not data: return
    lines = {k: v if k.startswith('image') else v.splitlines(True) for k,v in data.items()}
    return dict(output_type='display_data', data=lines, metadata={})

def run_page(name):
    "Run the page and write its outputs into the notebook"
    from execnb.shell import CaptureShell
    from fastcore.nbio import read_nb
    from nbdev.config import get_config
    os.environ['IN_TEST'] = '1'
    os.chdir(nbs)
    sys.path[:0] = [str(root), str(root/'.ci')]
    path, skip = nbs/f'{name}.ipynb', set(get_config().tst_flags.split())
    shell = CaptureShell()
    shell.run('import matplotlib.pyplot as plt, warnings', f"plt.rcParams['figure.dpi'] = {DPI}", "warnings.simplefilter('ignore')")
    page = json.loads(path.read_text(encoding='utf-8'))
    for raw, cell in zip(page['cells'], read_nb(path).cells):
        if cell.cell_type != 'code': continue
        source = ''.join(raw['source'])
        if 'nbdev_export()' in source or any(f'#| {o}' in source for o in skip): continue
        shell.cell(cell)
        if shell.exc: raise RuntimeError(f'{name}: {shell.prettytb()}')
        raw['outputs'] = [o for o in map(kept, cell.outputs) if o] if '#| hide' not in source else []
    path.write_text(json.dumps(page, indent=1, ensure_ascii=False, sort_keys=True) + '\n', encoding='utf-8')

def problems(path):
    "What is wrong with the outputs of a page"
    outputs = [o for c in json.loads(path.read_text(encoding='utf-8'))['cells'] for o in c.get('outputs', ())]
    if not outputs: yield 'shows nothing'
    if (size := len(json.dumps(outputs))) > LIMIT: yield f'has outputs of {size} bytes, and {LIMIT} are the limit'
    if any(o.get('name') == 'stderr' or o['output_type'] == 'error' for o in outputs): yield 'shows messages or errors'
    if any(o.get('execution_count') for o in outputs): yield 'has numbers of executions'

def check():
    found = [f'{p}.ipynb {what}' for p in PAGES if (nbs/f'{p}.ipynb').exists() for what in problems(nbs/f'{p}.ipynb')]
    if found: sys.exit('\n'.join([*found, "Run 'make outputs', and commit the result"]))

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('pages', nargs='*', default=PAGES, help='which to run')
    parser.add_argument('--check', action='store_true', help='run nothing')
    parser.add_argument('--here', action='store_true', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.check: check()
    elif args.here: run_page(args.pages[0])
    else:
        for name in args.pages: # each in a process of its own, as notebooks change what they import
            if subprocess.run([sys.executable, '-W', 'ignore', __file__, '--here', name]).returncode: sys.exit(f'{name} failed')
            print(f'{name}.ipynb', flush=True)
        check()
