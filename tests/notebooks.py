"Notebooks as programs"
import json

def as_script(notebook, hidden=False):
    "What readers see of the code in a notebook, as one program. What is `hidden` may run too, where it defines nothing for the rest"
    cells = json.loads(notebook.read_text(encoding='utf-8'))['cells']
    sources = [''.join(c['source']) for c in cells if c['cell_type'] == 'code']
    def is_shown(source): return not source.startswith(('#| hide', '#| echo: false'))
    if not hidden: return '\n\n'.join(filter(is_shown, sources))
    return '\n\n'.join(['apart = {}', *(o if is_shown(o) else f'exec({o!r}, apart := {{**apart, **globals()}})' for o in sources)])
