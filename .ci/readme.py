"""Write README.md: the text and the visible code of nbs/index.ipynb, and the tables of its cells with `#| echo: false`, which are run for
that. It stands in for `nbdev-readme`, which needs Quarto"""
import ast, json, re, sys, warnings
from pathlib import Path

root = Path(__file__).parent.parent
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

def text(cell):
    "Markdown of a cell, or nothing"
    source = ''.join(cell['source']).strip()
    if cell['cell_type'] == 'markdown': return source
    if cell['cell_type'] != 'code' or hidden.search(source): return ''
    return shown(source) if table.search(source) else f'```python\n{source}\n```'

if __name__ == '__main__':
    sys.path.append(str(root)) # what is installed comes first
    cells = json.loads((root/'nbs/index.ipynb').read_text(encoding='utf-8'))['cells']
    note = '<!-- Written by .ci/readme.py from nbs/index.ipynb: edit the notebook, then run `make readme` -->'
    (root/'README.md').write_text('\n\n'.join(filter(None, [note, *map(text, cells)])) + '\n', encoding='utf-8')
