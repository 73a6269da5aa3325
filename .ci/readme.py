"Write README.md: the text and the visible code of nbs/index.ipynb. It stands in for `nbdev-readme`, which needs Quarto"
import json, re
from pathlib import Path

root = Path(__file__).parent.parent
hidden = re.compile(r'^#\|\s*(hide|default_exp|eval|echo: *false)', re.M)

def text(cell):
    "Markdown of a cell, or nothing"
    source = ''.join(cell['source']).strip()
    if cell['cell_type'] == 'markdown': return re.sub(r'\]\(([\w.]+\.ipynb)', r'](nbs/\1', source)
    if cell['cell_type'] != 'code' or hidden.search(source): return ''
    return f'```python\n{source}\n```'

if __name__ == '__main__':
    cells = json.loads((root/'nbs/index.ipynb').read_text(encoding='utf-8'))['cells']
    note = '<!-- Written by .ci/readme.py from nbs/index.ipynb: edit the notebook, then run `make readme` -->'
    (root/'README.md').write_text('\n\n'.join(filter(None, [note, *map(text, cells)])) + '\n', encoding='utf-8')
