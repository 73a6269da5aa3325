"""Run notebooks, each in a process of its own: `python .ci/nbtest.py 2 nbs/*.ipynb` runs two at a time.

Importing fastai takes longer than most notebooks do. So it is imported once, and each notebook gets a copy of this process, which has imported
nothing of ours. A copy is only as good as new where no threads were started, which on Linux no import does"""
import os, sys
from importlib import import_module

def run(notebook):
    "Run `notebook` in a copy of this process; its number"
    sys.stdout.flush()
    if pid := os.fork(): return pid
    code = 1
    try:
        nbdev_test(notebook, n_workers=0, do_print=True)
        code = 0
    except SystemExit as e: code = e.code
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

if __name__ == '__main__':
    from nbdev.test import nbdev_test
    if sys.platform == 'linux':
        for module in ('fastai.vision.all', 'fastai.tabular.all', 'numba'): import_module(module)
    jobs, notebooks = int(sys.argv[1]), sys.argv[:1:-1]
    running, failed = {}, []
    while notebooks or running:
        while notebooks and len(running) < jobs:
            notebook = notebooks.pop()
            running[run(notebook)] = notebook
        pid, status = os.wait()
        notebook = running.pop(pid)
        if status: failed.append(notebook)
    sys.exit(f"Failed: {' '.join(failed)}" if failed else 0)
