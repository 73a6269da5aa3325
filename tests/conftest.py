"Settings of all tests: nothing random from run to run, and no window for a plot"
import os

os.environ.setdefault('MPLBACKEND', 'agg')

from hypothesis import settings

settings.register_profile('fastxtend', derandomize=True, deadline=None, print_blob=True)
settings.load_profile('fastxtend')

def pytest_collection_modifyitems(config, items):
    "`jit` is for optimizers that have a script: the table tells which"
    from fastxtend.optimizer.all import OPTIMIZERS
    def runs(item):
        params = getattr(getattr(item, 'callspec', None), 'params', {})
        name = params.get('name') or getattr(params.get('c'), 'name', None)
        return 'jit' not in [params.get(k) for k in ('way', 'source', 'target')] or name not in OPTIMIZERS or OPTIMIZERS[name].jit is not None
    dropped = [i for i in items if not runs(i)]
    if dropped: config.hook.pytest_deselected(items=dropped)
    items[:] = [i for i in items if runs(i)]
