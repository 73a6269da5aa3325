"""The optimizer of the guide `nbs/guides.own_optimizer.ipynb`, made by running all its code cells in order.
`pytest -p guide_optimizer` puts it through all tests that the table of optimizers drives."""
import importlib.util, json, sys, tempfile
from pathlib import Path

from fastxtend.optimizer.table import OPTIMIZERS

GUIDE = Path(__file__).parent.parent/'nbs/guides.own_optimizer.ipynb'
FOLDER = tempfile.TemporaryDirectory() # as long as the process lives: compilers read the source of what they compile

def code(notebook):
    "The code cells of a notebook that its readers see, as one module"
    cells = json.loads(notebook.read_text(encoding='utf-8'))['cells']
    return '\n\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'code' and '#| hide\n' not in c['source'])

def follow(notebook, name='guide'):
    "Run a notebook as the module `name`"
    path = Path(FOLDER.name)/f'{name}.py'
    path.write_text(code(notebook), encoding='utf-8')
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

before = set(OPTIMIZERS)
guide = follow(GUIDE)
NAME, = set(OPTIMIZERS) - before
