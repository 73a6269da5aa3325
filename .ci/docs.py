"""Build the site in `_docs` from the notebooks: run them, let nbdev document what they export, and render the pages with smalldocs

A page is built again only if its notebook, the package, a measurement or this file changed. `--prepare` stops before rendering, so that
Quarto can do that where it is installed: `python .ci/docs.py --prepare && quarto render _proc`."""
import argparse, hashlib, json, os, re, shutil, subprocess, sys
from concurrent.futures import ThreadPoolExecutor
from configparser import ConfigParser
from itertools import groupby
from pathlib import Path

root = Path(__file__).resolve().parent.parent
nbs, proc, out = root/'nbs', root/'_proc', root/'_docs'
katex = root/'.ci/node_modules/katex/dist'

def git_url():
    "Address of the repository, or nothing if settings.ini has none"
    config = ConfigParser(delimiters=['='])
    config.read(root/'settings.ini', encoding='utf-8')
    return config['DEFAULT']['git_url']

def site_config(text, url):
    "The settings of the site, from the `text` of `_quarto.yml`, with links to the repository at `url` if there is one"
    import yaml
    config = yaml.safe_load(text)
    if url:
        config['website'].update({'repo-url': url, 'repo-branch': 'main', 'repo-subdir': 'nbs', 'repo-actions': ['issue']})
        config['website']['navbar']['right'] = [dict(text='GitHub', icon='github', href=url)]
    return yaml.safe_dump(config, sort_keys=False)

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

def as_on_a_terminal(text):
    "What remains of `text` after all carriage returns: of a progress bar, nothing"
    lines = [o.rpartition('\r')[2] for o in text.splitlines(keepends=True)]
    return ''.join(o for o in lines if o.isspace() or not re.fullmatch(r'\s*(█|Epoch \d+/\d+ :)*\s*', o))

_link, _code = re.compile(r'(!?\[[^\]]*\]\([^)]*\))'), re.compile(r'`([A-Za-z_][\w.]*)(\([^`]*\))?`')

def link_line(line, url_of):
    "`line` of Markdown with each `name` or `name(arguments)` linked to `url_of` it, if that is something; what is a link already stays as it is"
    def linked(m): return f'[{m[0]}]({url_of(m[1])})' if url_of(m[1]) else m[0]
    return ''.join(o if i % 2 else _code.sub(linked, o) for i,o in enumerate(_link.split(line)))

def mend_sources(text, url):
    "Links in Markdown from a function to its source: at `url`, or none if the repository has no address"
    return re.sub(r'\[source\]\((?:https?://[^)]*?)?/?(blob/[^)#]*)(#L\d+)?[^)]*\)(\{[^}]*\})?\n*', rf'[source]({url}/\1\2)\3\n\n' if url else '', text)

def lookup():
    "nbdev's table of names, in which those of the public interface come before those of internals, and methods of `Learner` need no class"
    from nbdev.doclinks import NbdevLookup
    from fastxtend import basics
    class Lookup(NbdevLookup):
        def __init__(self):
            super().__init__()
            for name in basics.__all__:
                module = getattr(basics, name).__module__
                page = f"{module.removeprefix('fastxtend.')}.html#{name.lower()}"
                self.syms = {**self.syms, name: self.syms.get(f'{module}.{name}', (page, '', ''))}

        def doc(self, sym):
            found = super().doc(re.sub('^learn[.]', 'Learner.', sym)) or super().doc(f'Learner.{sym}')
            return found and found.removeprefix('/')
        def link_line(self, line): return link_line(line, self.doc)
    return Lookup()

def processors():
    "nbdev's processors, with one that runs all cells in place of the one that runs what `show_doc` needs, and links of our own"
    from fastcore.nbio import does_cell_eval, mk_cell
    from nbdev.config import get_config
    from nbdev.process import Processor
    from nbdev.processors import FilterDefaults, add_links, add_show_docs, exec_show_docs
    skip = set(get_config().tst_flags.split())
    table = lookup()

    def link(cell):
        "nbdev links a name in backticks also where it is the text of a link, which then is none"
        if cell.cell_type == 'markdown': cell.source = table.linkify(cell.source)
        for o in cell.get('outputs', []):
            if 'text/markdown' in o.get('data', {}): o['data']['text/markdown'] = mend_sources(table.linkify(''.join(o['data']['text/markdown'])), git_url())

    class TitleApart(Processor):
        "`FrontmatterProc` drops the cell with the title: what stands below title and description becomes a cell of its own"
        def begin(self):
            first = self.nb.cells[0]
            head, text = re.match(r'((?:(?:# |> |- [\w-]+: )[^\n]*|\s)*)(.*)', first.source, re.S).groups()
            if first.cell_type == 'markdown' and head.startswith('# ') and text:
                first.source = head
                self.nb.cells.insert(1, mk_cell(text, 'markdown'))

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
            for o in cell.outputs:
                if 'text' in o: o['text'] = as_on_a_terminal(''.join(o['text']))
            is_plot = any(k.startswith('image/') for o in cell.outputs for k in o.get('data', ()))
            if is_plot and 'fig-alt' not in cell.source: cell.source = f'#| fig-alt: {json.dumps(self.section)}\n{cell.source}'

    class Site(FilterDefaults):
        def base_procs(self):
            ours = {add_show_docs: [add_show_docs, InOrder], exec_show_docs: [Run], add_links: [link]}
            return [TitleApart, *(p for o in super().base_procs() for p in ours.get(o, [o]))]
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

def build_apart(nb, threads):
    "`build_page` in a process of its own, as notebooks change what they import. Returns whether that worked"
    env = {**os.environ, 'OMP_NUM_THREADS': str(threads)}
    res = subprocess.run([sys.executable, __file__, '--page', nb], env=env, capture_output=True, text=True)
    print(f'built {nb.name}' if res.returncode == 0 else res.stderr, flush=True)
    return res.returncode == 0

def prepare(workers):
    "All pages in `_proc`, and what the renderer needs beside them"
    proc.mkdir(exist_ok=True)
    sources = sorted(nbs.glob('[!_.]*.ipynb'))
    for o in proc.glob('*.ipynb'):
        if not (nbs/o.name).exists(): o.unlink()
    (proc/'_quarto.yml').write_text(site_config((nbs/'_quarto.yml').read_text(encoding='utf-8'), git_url()), encoding='utf-8')
    shutil.copy(nbs/'styles.css', proc/'styles.css')
    shutil.copytree(nbs/'images', proc/'images', dirs_exist_ok=True)
    todo = [nb for nb in sources if not is_built(nb, depends_on(nb))]
    threads = max(1, os.cpu_count() // workers)
    with ThreadPoolExecutor(workers) as pool: built = [*pool.map(lambda nb: build_apart(nb, threads), todo)]
    if not all(built): sys.exit(f'{built.count(False)} notebooks failed')

def mend_cells(text):
    "A number in a table stays on a line with its unit"
    return re.sub(r'(<t[dh][^>]*>)(.*?)(?=</t[dh]>)', lambda m: m[1] + re.sub(r'(?<=\d) (?=(ms|s|MB|GB/s|million)\b)', '\N{NO-BREAK SPACE}', m[2]), text, flags=re.S)

def rank_search(folder, internals):
    "What users look for comes before internals, which are found by their names only"
    path = folder/'search.json'
    entries = json.loads(path.read_text(encoding='utf-8'))
    def is_internal(o): return o['href'].partition('#')[0] in internals
    for o in filter(is_internal, entries): o['text'] = ''
    path.write_text(json.dumps(sorted(entries, key=is_internal), ensure_ascii=False), encoding='utf-8')

def internal_pages(config):
    "Pages in the last section of the sidebar, from the settings of the site"
    return {Path(o if isinstance(o, str) else o['href']).with_suffix('.html').name for o in config['website']['sidebar']['contents'][-1]['contents']}

def mend_links(folder):
    """nbdev links every name in backticks that the package defines, also those that no page describes under a heading of their own: a method
    to its class then, and all else to its page"""
    pages = {o.name: o.read_text(encoding='utf-8') for o in folder.glob('*.html')}
    ids = {name: {*re.findall(r'\bid="([^"]+)"', text)} for name, text in pages.items()}
    def mended(match):
        page, anchor = match[1], match[2]
        known = [o for o in (anchor, anchor.partition('.')[0]) if o in ids.get(page, {anchor})]
        return f'href="{page}{"#" + known[0] if known else ""}"><code>'
    for name, text in pages.items():
        (folder/name).write_text(re.sub(r'href="([\w.]+\.html)#([^"]+)"><code>', mended, mend_cells(text)), encoding='utf-8')

def render():
    "The site in `_docs`, with KaTeX in it instead of links to a server. Returns what smalldocs complained about"
    import yaml
    from smalldocs import config, layout, site
    layout.KATEX = 'site_libs/katex'
    docs = site.Site(config.load(proc))
    docs.out = out
    docs.build()
    mend_links(out)
    rank_search(out, internal_pages(yaml.safe_load((nbs/'_quarto.yml').read_text(encoding='utf-8'))))
    shutil.copytree(katex, out/'site_libs/katex', ignore=shutil.ignore_patterns('*.mjs', '*.ttf', '*.woff', 'README.md'))
    (out/'.nojekyll').touch()
    for_quarto = 'output-file is not read by smalldocs', 'html-math-method is ignored'
    return [o for o in docs.warnings if not o.endswith(for_quarto)]

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--prepare', action='store_true', help="do not render")
    parser.add_argument('--page', type=Path, help="only this notebook")
    parser.add_argument('--workers', type=int, default=min(os.cpu_count(), 4), help="notebooks that run at a time (default: %(default)s)")
    args = parser.parse_args()
    if args.page: sys.exit(build_page(args.page, depends_on(args.page)))
    prepare(args.workers)
    if args.prepare: sys.exit()
    warnings = render()
    print(*(f'warning: {o}' for o in warnings), f'{len(list(out.glob("*.html")))} pages in {out.relative_to(root)}', sep='\n')
    sys.exit(bool(warnings))
