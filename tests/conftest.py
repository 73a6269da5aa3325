"Settings of all tests: nothing random from run to run, and no window for a plot"
import gc, os, zlib
from collections import Counter

os.environ.setdefault('MPLBACKEND', 'agg')

import pytest
from hypothesis import settings

settings.register_profile('fastxtend', derandomize=True, deadline=None, print_blob=True)
settings.load_profile('fastxtend')

# Products of optimizers and storage formats, options or GPUs, by module or by test: a sample of them in `make test`, all of them in `make soak`
PRODUCTS = {'test_exact', 'test_int8', 'test_formats', 'test_optim', 'test_modifiers', 'test_machine_code'}
ONE_IN = 4

def name_of(item):
    "The optimizer that a case is about, if it is about one"
    params = getattr(getattr(item, 'callspec', None), 'params', {})
    return params.get('name') or getattr(params.get('c'), 'name', None)

def few_of_each(items, n):
    "At most `n` cases of each test, chosen by a hash of their names"
    seen = Counter()
    def is_early(item):
        seen[item.path, item.originalname] += 1
        return seen[item.path, item.originalname] <= n
    chosen = {*filter(is_early, sorted(items, key=lambda i: zlib.crc32(i.nodeid.encode())))}
    return [i for i in items if i in chosen]

def pytest_collection_modifyitems(config, items):
    """`jit` is for optimizers that have a script: the table tells which. All cases of fastai's eight are run; of others, and of products, one in
    `ONE_IN`, chosen by a hash of the name of the case, unless `SOAK` is set or `-k` or a name asks for them. `make coverage` runs `CASES` of each"""
    from fastxtend.optimizer.all import OPTIMIZERS
    everything = os.environ.get('SOAK') or config.getoption('keyword') or any('::' in a for a in config.args)
    def runs(item):
        params, name = getattr(getattr(item, 'callspec', None), 'params', {}), name_of(item)
        if 'jit' in [params.get(k) for k in ('way', 'source', 'target')] and name in OPTIMIZERS and OPTIMIZERS[name].jit is None: return False
        sampled = bool(PRODUCTS & {item.module.__name__, item.originalname}) or name in OPTIMIZERS and OPTIMIZERS[name].native is None
        return everything or not params or not sampled or zlib.crc32(item.nodeid.encode()) % ONE_IN == 0
    few = int(os.environ.pop('CASES', len(items))) # not for what the tests start
    kept = few_of_each([*filter(runs, items)], len(items) if everything else few)
    if dropped := {*items} - {*kept}: config.hook.pytest_deselected(items=dropped)
    items[:] = kept

def pytest_collection_finish(session):
    "What is there before the first test stays to the end: the garbage collector need not look at it time and again"
    gc.collect()
    gc.freeze()

def pytest_sessionfinish(session): gc.unfreeze()

@pytest.fixture(autouse=True)
def products_in_float32(monkeypatch):
    "Muon's products are rounded to bfloat16 where there is hardware for it: what is compared to units of eps is not"
    from fastxtend.optimizer import muon
    monkeypatch.setattr(muon, '_has_bfloat16', lambda device: False)

@pytest.fixture
def on_cpu_tensors(monkeypatch):
    "Step CPU tensors with the CUDA kernels"
    from fastxtend.optimizer import plan
    monkeypatch.setitem(plan.ENGINES, 1, 'cuda')
    plan.kernels_for.cache_clear()
    yield
    plan.kernels_for.cache_clear()
