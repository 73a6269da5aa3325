"""The optimizer of the guide `nbs/guides.own_optimizer.ipynb`, made by running all its code cells in order.
`pytest -p guide_optimizer` puts it through all tests that the table of optimizers drives."""
import importlib.util, sys, tempfile
from pathlib import Path

from notebooks import as_script
from fastxtend.optimizer.table import OPTIMIZERS

GUIDE = Path(__file__).parent.parent/'nbs/guides.own_optimizer.ipynb'
FOLDER = tempfile.TemporaryDirectory() # as long as the process lives: compilers read the source of what they compile

def follow(notebook, name='guide'):
    "Run a notebook as the module `name`"
    path = Path(FOLDER.name)/f'{name}.py'
    path.write_text(as_script(notebook), encoding='utf-8')
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

before = set(OPTIMIZERS)
guide = follow(GUIDE)
NAME, = set(OPTIMIZERS) - before
