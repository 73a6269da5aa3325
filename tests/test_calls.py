"How many operations a step asks of PyTorch, and how often it waits for their results"
from collections import Counter

import pytest
from common import *
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# The most calls of `torch._foreach_*` that a step may take, whatever the number of parameters and groups
MOST_CALLS = dict(SGD=5, RMSProp=8, Adam=7, RAdam=8, QHAdam=12, Lion=8, LaProp=9, AdaBelief=10, NAdam=11, ADOPT=12, AdEMAMix=13, Adan=16, ScheduleFreeSGD=8, ScheduleFreeAdam=14)
HOST_READS = {'_local_scalar_dense', 'is_nonzero', 'equal'}
PYTHON_READS = {'tolist', 'item', 'numpy', 'cpu', '__float__', '__int__', '__bool__', '__array__'} # of CPU tensors, they call no operation

WHOLE = {'empty_like', 'view', '_unsafe_view', 'alias'} # Room for a matrix, and views of it, where steppers take whole tensors

class Count(TorchDispatchMode):
    "Counts operations by name"
    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        is_number = name in ('lift_fresh', 'detach_', 'to') and args[0].ndim == 0 # a Python number becomes a tensor, which asks for no work
        if not is_number: self.calls[name] += 1
        return func(*args, **(kwargs or {}))

    @property
    def foreach(self): return sum(n for k,n in self.calls.items() if k.startswith('_foreach'))
    @property
    def host_reads(self): return sum(self.calls[k] for k in HOST_READS)

class CountReads(TorchFunctionMode):
    "Counts the methods of tensors by which Python waits for a result"
    def __init__(self):
        super().__init__()
        self.n = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.n += getattr(func, '__name__', '') in PYTHON_READS
        return func(*args, **(kwargs or {}))

def start(name, way, groups, device, **kwargs):
    "Groups of a matrix, a vector and a scalar with different learning rates, the vectors without weight decay"
    params = [torch.ones(s, device=device) for _ in range(groups) for s in ((5, 7), (10,), ())]
    opt = build(name, [params[i:i+3] for i in range(0, len(params), 3)], way, lr=slice(1e-4, 1e-2), mom=.9, wd=.1, **kwargs)
    for p in params[1::3]: opt.state[p]['do_wd'] = False
    for p in params: p.grad = torch.ones_like(p)
    return opt

def count_step(opt, warm_up):
    "What the step after `warm_up` steps does"
    for _ in range(warm_up): opt.step()
    with Count() as count: opt.step()
    return count

def count_reads(opt, warm_up):
    "How often the step after `warm_up` steps waits"
    for _ in range(warm_up): opt.step()
    with CountReads() as python: opt.step()
    return python.n + count_step(opt, 0).host_reads

each_elementwise = pytest.mark.parametrize('name', [n for n in NAMES if not norms_of(n)])
each_of_norms = pytest.mark.parametrize('name', [n for n in NAMES if norms_of(n)])

@pytest.mark.parametrize('name', MOST_CALLS)
@pytest.mark.parametrize('groups', [3, 10])
def test_foreach_calls(name, groups):
    "Also while all parameters decay in the same way, and while RAdam is not rectified"
    for warm_up in (1, 6): assert 0 < count_step(start(name, 'foreach', groups, 'meta'), warm_up).foreach <= MOST_CALLS[name]
    l2 = count_step(start(name, 'foreach', groups, 'meta', decouple_wd=False), 6).foreach
    assert 0 < l2 <= MOST_CALLS[name] + 2 # the sum of gradient and decay, in new memory

def sums(name): return [o.of for o in OPTIMIZERS[name].composition().sums.values()]

@pytest.mark.parametrize('name', NAMES)
def test_foreach_calls_do_not_grow_with_groups(name):
    "Nor do any other calls, but for scalar products: there is a ForEach function for norms only"
    other = [o for o in sums(name) if not o.startswith('abs(') and o.replace(' ', '') != '*'.join([o.replace(' ', '').partition('*')[0]]*2)]
    assert other == [] or name == 'Prodigy'
    for warm_up in range(1, 8):
        few, many = (count_step(start(name, 'foreach', groups, 'cpu'), warm_up).calls for groups in (3, 10))
        assert [c.pop('dot', 0) for c in (few, many)] == [len(other)*9, len(other)*30]
        for c in (few, many) if other else (): del c['view']
        if takes_whole(name): few, many = ({k: n for k,n in c.items() if k not in WHOLE} for c in (few, many))
        assert few == many

@each_elementwise
@pytest.mark.parametrize('way', BACKENDS)
def test_a_step_on_meta_tensors(name, way):
    "There is nothing to read in them, so it runs only if it does not read"
    opt = start(name, way, 3, 'meta')
    for _ in range(7): opt.step()
    assert all(t.is_meta for p in opt.all_params().itemgot(0) for t in (p, *opt.state[p].values()) if isinstance(t, Tensor))

@each_elementwise
@pytest.mark.parametrize('way', BACKENDS)
def test_no_host_reads(name, way):
    "While its averages are young, rectified, and where Lookahead synchronises"
    for warm_up in range(7): assert count_reads(start(name, way, 3, 'cpu'), warm_up) == 0

@each_of_norms
@pytest.mark.parametrize('groups', [1, 3, 10])
def test_one_host_read(name, groups):
    "The norms of all parameters at once"
    for warm_up in range(3): assert count_reads(start(name, 'foreach', groups, 'cpu'), warm_up) == 1

@pytest.mark.parametrize('name', [n for n in NAMES if not takes_whole(n)])
def test_fused_calls_nothing(name):
    "A kernel reads and writes memory; PyTorch is not asked for anything, unless to keep the learning rates that Larc reports"
    calls = count_step(start(name, 'fused', 3, 'cpu'), 6).calls
    assert not {k for k in calls if k.startswith('_foreach') or k.endswith('_') or k in HOST_READS}
    assert sum(calls.values()) <= (4 if OPTIMIZERS[name].kept else 0)

@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('way', BACKENDS)
def test_nothing_moves(name, way):
    "Parameters, gradients and slots stay where they are from step to step"
    opt = start(name, way, 3, 'cpu')
    params = list(opt.all_params().itemgot(0))
    def addresses():
        slots = [s for p in params for k,s in opt.state[p].items() if isinstance(s, Tensor) and k not in KEPT]
        slow = [s for pg in lookahead(opt).get('slow_weights', []) for s in pg]
        return [t.data_ptr() for t in (*params, *(p.grad for p in params), *slots, *slow)]
    opt.step()
    before = addresses()
    for _ in range(7): opt.step()
    assert addresses() == before
