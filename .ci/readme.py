"""Write README.md and CHANGELOG.md: the text and the visible code of two notebooks, and the tables of their cells with `#| echo: false`, which
are run for that. It stands in for `nbdev-readme`, which needs Quarto"""
import ast, json, re, sys, warnings
from pathlib import Path

root = Path(__file__).parent.parent
pages = {'README.md': 'index', 'CHANGELOG.md': 'changelog'}
hidden = re.compile(r'^#\|\s*(hide|default_exp|eval)', re.M)
table = re.compile(r'^#\|\s*echo: *false', re.M)

def shown(source):
    "Markdown of what the last line of a cell is"
    *body, last = ast.parse(source).body
    scope = {}
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        exec(compile(ast.Module(body, []), '<cell>', 'exec'), scope)
        return eval(compile(ast.Expression(last.value), '<cell>', 'eval'), scope)._repr_markdown_()

def linked(source):
    "Markdown with links to where pages and images are in the repository, and to files in its root that the site has not"
    source = re.sub(r'(?<=\]\()(?:index\.ipynb(#)|([\w.]+\.ipynb|images/))', lambda o: 'README.md#' if o[1] else f'nbs/{o[2]}', source)
    return re.sub(r'`((CONTRIBUTING|SECURITY|CHANGELOG)\.md)`', r'[`\1`](\1)', source)

def text(cell):
    "Markdown of a cell, or nothing"
    source = ''.join(cell['source']).strip()
    if cell['cell_type'] == 'markdown': return linked(source)
    if cell['cell_type'] != 'code' or hidden.search(source): return ''
    return linked(shown(source)) if table.search(source) else f'```python\n{source}\n```'

def write(name, notebook):
    "The file `name` in the root, from `notebook`"
    cells = json.loads((root/f'nbs/{notebook}.ipynb').read_text(encoding='utf-8'))['cells']
    note = f'<!-- Written by .ci/readme.py from nbs/{notebook}.ipynb: edit the notebook, then run `make readme` -->'
    (root/name).write_text('\n\n'.join(filter(None, [note, *map(text, cells)])) + '\n', encoding='utf-8')

if __name__ == '__main__':
    sys.path.append(str(root)) # what is installed comes first
    for name, notebook in pages.items(): write(name, notebook)
