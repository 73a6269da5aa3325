"""Build the site in `_docs` from the notebooks: run them, let nbdev document what they export, and render the pages with smalldocs

A page is built again only if its notebook, the package, a measurement or this file changed. `--prepare` stops before rendering, so that
Quarto can do that where it is installed: `python .ci/docs.py --prepare && quarto render _proc`."""
import argparse, hashlib, json, os, re, shutil, sys
from concurrent.futures import ProcessPoolExecutor
from itertools import groupby
from multiprocessing import get_context
from pathlib import Path

root = Path(__file__).resolve().parent.parent
nbs, proc, out = root/'nbs', root/'_proc', root/'_docs'
katex = root/'.ci/node_modules/katex/dist'

def depends_on(nb):
    "Hash of all that the page of `nb` is made from"
    files = [nb, Path(__file__), root/'pyproject.toml', *sorted(root.glob('fastxtend/**/*.py')), *sorted(o for o in root.glob('benchmarks/**/*') if o.is_file())]
    digest = hashlib.sha256()
    for o in files: digest.update(o.read_bytes())
    return digest.hexdigest()

def is_built(nb, key):
    "Is the page of `nb` there, and made from what hashes to `key`?"
    page = proc/nb.name
    return page.exists() and json.loads(page.read_text(encoding='utf-8'))['metadata'].get('depends_on') == key

def processors():
    "nbdev's processors, with one that runs all cells in place of the one that runs what `show_doc` needs"
    from fastcore.nbio import does_cell_eval
    from nbdev.config import get_config
    from nbdev.process import Processor
    from nbdev.processors import FilterDefaults, add_show_docs, exec_show_docs
    skip = set(get_config().tst_flags.split())

    class InOrder(Processor):
        "`add_show_docs` puts what one cell defines in reverse order: turn it round"
        def begin(self):
            groups = groupby(self.nb.cells, key=lambda o: getattr(o, 'has_sd', False))
            self.nb.cells = [o for is_doc, cells in groups for o in (reversed([*cells]) if is_doc else cells)]

    class Run(exec_show_docs):
        "Run the cells as `nbdev-test` does and keep what they show, but not what they write to stderr. Plots are named after their section"
        def begin(self):
            super().begin()
            self.section = 'Plot'

        def __call__(self, cell):
            if cell.cell_type == 'markdown': self.section = [self.section, *re.findall('^#+ (.*)', cell.source, re.M)][-1]
            if cell.cell_type != 'code' or skip & cell.directives_.keys() or not does_cell_eval(cell, True): return
            self.k.cell(cell)
            if self.k.exc: raise RuntimeError(self.k.prettytb(self.nb.path_))
            cell.outputs = [o for o in cell.outputs if o.get('name') != 'stderr']
            is_plot = any(k.startswith('image/') for o in cell.outputs for k in o.get('data', ()))
            if is_plot and 'fig-alt' not in cell.source: cell.source = f'#| fig-alt: {json.dumps(self.section)}\n{cell.source}'

    class Site(FilterDefaults):
        def base_procs(self):
            ours = {add_show_docs: [add_show_docs, InOrder], exec_show_docs: [Run]}
            return [p for o in super().base_procs() for p in ours.get(o, [o])]
    return Site()

def build_page(nb, key):
    "Run and process the notebook `nb`; leave the result in `_proc`"
    from fastcore.nbio import read_nb, write_nb
    os.environ['IN_TEST'] = '1'
    os.chdir(nbs)
    sys.path.insert(0, str(root))
    page = read_nb(nb)
    processors()(page)
    page.metadata['depends_on'] = key
    write_nb(page, proc/nb.name)
    return nb.name

def prepare(workers):
    "All pages in `_proc`, and what the renderer needs beside them"
    proc.mkdir(exist_ok=True)
    sources = sorted(nbs.glob('[!_.]*.ipynb'))
    for o in proc.glob('*.ipynb'):
        if not (nbs/o.name).exists(): o.unlink()
    for name in ('_quarto.yml', 'styles.css'): shutil.copy(nbs/name, proc/name)
    todo = {nb: key for nb in sources if not is_built(nb, key := depends_on(nb))}
    os.environ['OMP_NUM_THREADS'] = str(max(1, os.cpu_count() // workers))
    with ProcessPoolExecutor(workers, mp_context=get_context('spawn'), max_tasks_per_child=1) as pool:
        for name in pool.map(build_page, todo, todo.values()): print(f'built {name}', flush=True)

def render():
    "The site in `_docs`, with KaTeX in it instead of links to a server. Returns what smalldocs complained about"
    from smalldocs import config, layout, site
    layout.KATEX = 'site_libs/katex'
    docs = site.Site(config.load(proc))
    docs.out = out
    docs.build()
    shutil.copytree(katex, out/'site_libs/katex', ignore=shutil.ignore_patterns('*.mjs', '*.ttf', '*.woff', 'README.md'))
    (out/'.nojekyll').touch()
    return docs.warnings

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--prepare', action='store_true', help="do not render")
    parser.add_argument('--workers', type=int, default=min(os.cpu_count(), 4), help="notebooks that run at a time (default: %(default)s)")
    args = parser.parse_args()
    prepare(args.workers)
    if args.prepare: sys.exit()
    warnings = render()
    print(*(f'warning: {o}' for o in warnings), f'{len(list(out.glob("*.html")))} pages in {out.relative_to(root)}', sep='\n')
    sys.exit(bool(warnings))
