"What a step does when something it would like to have is missing, and what it does not do again when nothing has changed"
import ctypes, random
from collections import Counter

import pytest
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from common import *
from test_parity import VARIANTS, show

from fastxtend.optimizer import core, plan, probe
from fastxtend.optimizer.all import Adam

MIXED = [(5, 7), (10,), (), (0,), (8, 3, 3, 3)]

COMPILED = plan.compiled

def spy(monkeypatch, module, name):
    "Counts the calls of a function"
    f, calls = getattr(module, name), []
    def counted(*args, **kwargs):
        calls.append(args)
        return f(*args, **kwargs)
    monkeypatch.setattr(module, name, counted)
    return calls

@pytest.fixture
def looks(monkeypatch):
    "Calls of the slow look at all tensors, where there is no compiled one"
    monkeypatch.setattr(plan, 'compiled', lambda: None)
    return spy(monkeypatch, plan, 'probe')

# --- A look in Python

@pytest.mark.parametrize('name', NAMES)
def test_python_looks_once(name, looks, monkeypatch):
    "As long as only addresses are new, nothing is asked again; and the numbers are those of the compiled look"
    def run():
        params, counts = make_params(MIXED), []
        opt = build(name, split(params, 2), 'fused')
        for gs in make_grads(tuple(MIXED), steps=8): # made anew for each step
            step_with(opt, params, gs)
            counts.append(len(looks))
        return snapshot(opt, params), counts
    slow, counts = run()
    assert 0 < counts[0] <= 2*len(OPTIMIZERS[name].compositions()) # before and after slots are made
    assert counts[-1] - counts[0] == OPTIMIZERS[name].has_lookahead # which has two kinds of steps
    monkeypatch.setattr(plan, 'compiled', COMPILED)
    assert_same(slow, run()[0])

CHANGES = dict(
    moved=(0, lambda p: p.data.clone()), transposed=(1, lambda p: p.data.t().contiguous().t()), double=(1, lambda p: p.data.double()),
    expanded=(1, lambda p: p.data[:1].expand(5, 7)))

@pytest.mark.parametrize('what', CHANGES)
def test_python_looks_again(what, looks):
    "Whatever else changes is seen: what is found is what a fresh look finds"
    expected, change = CHANGES[what]
    params = make_params(MIXED)
    opt = build('Adam', params, 'fused')
    train(opt, params, make_grads(tuple(MIXED), steps=2))
    before = len(looks)
    params[0].data = change(params[0])
    set_grads(params, [torch.ones_like(p) for p in params])
    batch, = opt.gather()
    last = opt._plans[batch.composition].seen
    with torch.no_grad(): seen = plan.look(batch, last)
    assert (len(looks) > before) == bool(expected)
    assert (seen.table == probe.probe(*batch.tensors()).table).all()
    if not expected: assert (seen.table != last.table).any()

def test_python_looks_at_strange_tensors(looks):
    "What the check cannot take is looked at each time"
    params = [torch.ones(3), torch.ones(3)]
    opt = build('SGD', params, 'fused', mom=0.)
    for t in range(3):
        params[0].grad, params[1].grad = torch.ones(3), torch._neg_view(torch.ones(3))
        opt.step()
    assert len(looks) >= 3
    assert torch.equal(params[0], torch.full((3,), .97)) and torch.equal(params[1], torch.full((3,), 1.03))

# --- A compiled look

@pytest.fixture
def described(monkeypatch):
    "Addresses of the tensors that PyTorch was asked to describe, by a compiled look that is made anew"
    looking, asked = pytest.importorskip('fastxtend.optimizer.looking'), []
    if COMPILED() is None: pytest.skip('no compiled look')
    signature = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
    describe = signature(looking._describer())
    def counted(obj, info):
        asked.append(obj)
        return describe(obj, info)
    called = signature(counted) # as long as the test runs
    monkeypatch.setattr(looking, '_describer', lambda: looking._address(called))
    fast = looking.compiled_probe()
    monkeypatch.setattr(plan, 'compiled', lambda: fast)
    return asked

@pytest.mark.parametrize('name', NAMES)
def test_only_what_is_new_is_described(name, described):
    "Nothing in a step whose tensors are where they were; gradients that are made anew, and nothing else"
    params = make_params(MIXED)
    opt = build(name, params, 'fused')
    set_grads(params, make_grads(tuple(MIXED), steps=1)[0])
    kept = [p.grad for p in params]
    for _ in range(6): opt.step() # all kinds of steps that there are
    ours = {id(t) for p in params for t in (p, *opt.state[p].values())}
    for _ in range(6):
        described.clear()
        opt.step()
        assert not {*ours, *map(id, kept)} & set(described) # there may be room for whole tensors, which is new in each step
    described.clear()
    set_grads(params, kept)
    opt.step()
    assert not ours & set(described) and {id(p.grad) for p in params} <= set(described)

def _six(*size): return torch.randn(2, 1, *size, 1, 1)

HAPPENS = dict(
    nothing=lambda t: None, written=lambda t: t.add_(1), moved=lambda t: setattr(t, 'data', t.data.clone()), transposed=lambda t: t.transpose_(0, -1), turned=lambda t: setattr(t, 'data', t.data.transpose(0, -1)),
    double=lambda t: setattr(t, 'data', t.data.double()), single=lambda t: setattr(t, 'data', t.data.float()), longer=lambda t: t.resize_(40, 3), back=lambda t: t.resize_(3, 4), six=lambda t: setattr(t, 'data', _six(3, 4)),
    strided=lambda t: t.as_strided_((3, 4), (1, 3)), set=lambda t: t.set_(torch.randn(3, 4)), view=lambda t: t.set_(torch.randn(5, 4)[1:4]), shifted=lambda t: t.set_(t.untyped_storage(), 0, (2, 4), (4, 1)),
    storage=lambda t: t.untyped_storage().resize_(4096), grows=lambda t: t.requires_grad_(), stops=lambda t: t.requires_grad_(False), expanded=lambda t: setattr(t, 'data', t.data[:1].expand(3, *t.shape[1:])),
    squeezed=lambda t: t.unsqueeze_(0), narrow=lambda t: setattr(t, 'data', t.data[:, :2]), subclass=lambda t: setattr(t, '__class__', Other), plain=lambda t: setattr(t, '__class__', torch.Tensor))
REPLACES = dict(
    new=lambda: torch.randn(3, 4), six=lambda: _six(3, 4), negated=lambda: torch._neg_view(torch.randn(3, 4)), sparse=lambda: torch.randn(3, 4).to_sparse(), meta=lambda: torch.empty(3, 4, device='meta'), none=lambda: None,
    parameter=lambda: torch.nn.Parameter(torch.randn(3, 4)), half=lambda: torch.randn(3, 4).half(), whole=lambda: torch.ones(3, 4, dtype=torch.int64), zeros=lambda: torch._efficientzerotensor(3, 4), scalar=lambda: torch.randn(()), empty=lambda: torch.randn(0, 4))

class Other(torch.Tensor): pass

@pytest.mark.parametrize('seed', range(8 if not SOAK else 400))
def test_a_look_that_goes_on_sees_everything(seed):
    "Whatever happens to tensors, in whatever order, the compiled look that remembers finds what Python finds without"
    if COMPILED() is None: pytest.skip('no compiled look')
    rng = random.Random(seed)
    lists = [[torch.randn(3, 4) for _ in range(6)] for _ in range(3)]
    seen, same = None, Counter()
    for _ in range(300):
        for _ in range(rng.choice((0, 1, 1, 2, 5))):
            ts, i, what = rng.choice(lists), rng.randrange(6), rng.choice([*HAPPENS, *REPLACES, *['all']*8])
            if what == 'all': # which kernels take again
                for other in lists: other[:] = [torch.randn(3, 4) for _ in other]
            elif what in REPLACES: ts[i] = REPLACES[what]()
            elif ts[i] is not None and ts[i].layout is torch.strided and not (ts[i].is_meta or ts[i]._is_zerotensor()):
                try:
                    with torch.no_grad(): HAPPENS[what](ts[i])
                except Exception: pass # not every tensor can be treated like that
        expected = probe.probe(*lists)
        last, seen = seen, COMPILED()(*lists, last=seen)
        assert np.array_equal(seen.table, expected.table)
        same[seen is last] += 1
        if last is not None: assert np.array_equal(COMPILED()(*lists, last=last).table, expected.table) # one that others have gone on from
    assert same[True] and same[False]

# --- Sets of parameters with gradients that change

@pytest.mark.parametrize('way', ('foreach', 'fused'))
def test_sets_that_take_turns(way, monkeypatch):
    "Of two heads that are trained in turns, layout and plan are made once each; and the numbers are native's"
    layouts = spy(monkeypatch, core.Layout, 'of')
    def run(way, steps=12):
        params, counts = make_params(MIXED*2), []
        opt = build('Adam', split(params, 2), way)
        for t,gs in enumerate(make_grads(tuple(MIXED*2), steps=steps)):
            step_with(opt, params, [g if (i < 5) == t%2 else None for i,g in enumerate(gs)])
            counts.append((len(layouts), len({id(part.prepared) for plan in plans_of(opt) for part in plan.parts})))
        return snapshot_without_grads(lambda opt, params: None, opt, params), counts
    got, counts = run(way)
    assert counts[3:] == [counts[3]]*len(counts[3:])
    assert_same(run('native')[0], got, TOLERANCE[way])

def plans_of(opt): return [plan for _,plans in getattr(opt, '_layouts', {}).values() for plan in plans.values()]

def test_many_sets_are_forgotten():
    "Only the last few are kept"
    params = make_params([(3,)]*20)
    opt = build('SGD', params, 'fused', mom=0.)
    for i in range(20):
        set_grads(params, [torch.ones(3) if j == i else None for j in range(20)])
        opt.step()
    assert len(opt._layouts) == core.SETS

# --- Layouts in memory that change

@pytest.mark.parametrize('name', NAMES)
def test_slots_are_laid_out_anew(name, monkeypatch):
    "A model that goes to `channels_last` in the middle of training stays with the kernels, its slots are the same tensors, and the numbers are native's"
    shapes, copies = [(8, 3, 3, 3), (4,)], spy(monkeypatch, core, 'lay_out')
    def run(way):
        params = make_params(shapes)
        opt = build(name, params, way)
        for t,gs in enumerate(make_grads(tuple(shapes), steps=8)):
            if t == 3:
                before = [id(x) for x in opt.state[params[0]].values() if torch.is_tensor(x)]
                params[0].data = params[0].data.to(memory_format=torch.channels_last)
            for p,g in zip(params, gs): p.grad = torch.empty_like(p).copy_(g)
            opt.step()
        if way == 'fused':
            names = [n for n,x in opt.state[params[0]].items() if torch.is_tensor(x) and x.ndim]
            assert all(opt.state[params[0]][n].stride() == params[0].stride() for n in names)
            assert set(before) == {id(x) for x in opt.state[params[0]].values() if torch.is_tensor(x)}
            assert {r.backend for r in opt.backend_report()} == {'numba'}
        for p in params: # sums, and what is kept of them, are added up in another order
            for n in opt.state[p].keys() & set(OPTIMIZERS[name].composition().kept): del opt.state[p][n]
        return snapshot_without_grads(lambda opt, params: None, opt, params)
    fused = run('fused')
    assert len(copies) <= 4 # when slots are made, when the layout changes, and as often for slow weights
    assert_same(run('native'), fused, TOLERANCE['fused'])

def test_gradients_are_not_laid_out_anew():
    "PyTorch makes gradients in the layout of their parameter, however they are cleared; one that is not goes to ForEach, is not changed, and is reported"
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten(), torch.nn.Linear(8*36, 2))
    params = list(model.parameters())
    opt = build('Adam', params, 'fused')
    for t,none in enumerate((False, True, False, True)):
        if t == 1: model.to(memory_format=torch.channels_last)
        model(torch.randn(2, 3, 8, 8)).sum().backward()
        assert all(p.grad.stride() == p.stride() for p in params)
        opt.step()
        assert {r.backend for r in opt.backend_report()} == {'numba'}
        model.zero_grad(set_to_none=none)
    grad = params[0].grad = torch.randn(8, 3, 3, 3)
    opt.step()
    assert params[0].grad is grad and grad.is_contiguous()
    (odd,) = [r for r in opt.backend_report() if r.backend == 'foreach']
    assert 'layout' in odd.reason

# --- Autograd

@pytest.mark.parametrize('name,way', [(name, way) for name in NAMES for way in ways(name)])
def test_graph_survives_a_step(name, way):
    "A step between two backward passes of one graph: all go on as native does, with the new weights, also in the step in which Lookahead synchronises"
    def run(way):
        torch.manual_seed(0)
        x, params = torch.randn(4, 5), [p.requires_grad_() for p in make_params([(5, 6), (6, 3)])]
        opt = build(name, params, way, lr=.1)
        for _ in range(7):
            loss = ((x @ params[0]).tanh() @ params[1]).square().mean()
            loss.backward(retain_graph=True)
            versions = [p._version for p in params]
            opt.step()
            assert [p._version for p in params] == versions
            loss.backward()
            opt.step()
            opt.zero_grad()
        return snapshot_without_grads(lambda opt, params: None, opt, params)
    assert_same(run('native'), run(way), 20*TOLERANCE[way])

# --- No compiler

def test_without_a_compiler(monkeypatch):
    "Triton needs a C compiler: without one, parameters go to ForEach, once it is said what to install, and the numbers and step counts are native's"
    if not has_triton(): pytest.skip('the kernels need Triton 3.5 or later')
    def engine(): raise RuntimeError('Failed to find C compiler')
    from fastxtend.optimizer import cuda
    monkeypatch.setattr(cuda, 'engine', engine)
    monkeypatch.setitem(plan.ENGINES, 1, 'cuda')
    for f in (plan.kernels_for, plan.warn_once): f.cache_clear()
    grads = make_grads(tuple(MIXED), steps=3)
    try:
        (ref, ref_params), (opt, params) = ((build('Adam', ps, way), ps) for way in ('native', 'fused') for ps in [make_params(MIXED)])
        train(ref, ref_params, grads)
        with pytest.warns(UserWarning) as said: train(opt, params, grads)
        (text,) = [str(o.message) for o in said if 'no kernel' in str(o.message)]
        assert 'gcc python3-dev' in text and 'Failed to find C compiler' in text
        assert {r.backend for r in opt.backend_report()} == {'foreach'}
        assert_same(snapshot(ref, ref_params)['params'], snapshot(opt, params)['params'], TOLERANCE['foreach'])
        assert_same(states(ref, ref_params), states(opt, params), TOLERANCE['foreach'])
    finally:
        for f in (plan.kernels_for, plan.warn_once): f.cache_clear()

def test_the_compiler_is_tried(monkeypatch):
    "The engine for GPUs makes Triton compile what it needs at once"
    if not has_triton(): pytest.skip('the kernels need Triton 3.5 or later')
    import triton
    from fastxtend.optimizer import cuda
    class Broken:
        @property
        def utils(self): raise RuntimeError('Failed to find C compiler')
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(triton.runtime.driver, '_active', Broken())
    if triton.knobs.runtime.interpret: return
    with pytest.raises(RuntimeError, match='compiler'): cuda.engine.__wrapped__()

# --- ForEach on a GPU that is not there

class Transfers(TorchDispatchMode):
    "Counts operations that take or give a tensor on the CPU: each is an upload, or waits for the GPU"
    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        res = func(*args, **(kwargs or {}))
        if any(torch.is_tensor(t) and t.device.type == 'cpu' for t in tree_leaves((args, kwargs, res))): self.seen[str(func)] += 1
        return res

@lru_cache(None)
def copies_without_data():
    "Does PyTorch copy tensors without data on CUDA where there is no driver? Its oldest versions do not"
    with FakeTensorMode():
        try: torch.empty(1, device='cuda').copy_(torch.empty(1, device='cuda'))
        except RuntimeError: return False
    return True

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=['float32', 'bfloat16'])
@pytest.mark.parametrize('name,kwargs', [pytest.param(n, {}, id=n) for n in NAMES] + [pytest.param(n, k, id=f'{n}-{show(k)}') for n,k,ways in VARIANTS if 'foreach' in ways])
def test_foreach_waits_once_on_a_gpu(name, kwargs, dtype, monkeypatch):
    "On CUDA nothing is uploaded, scalars that differ neither, and the norms of all parameters are read at once (shown on tensors without data)"
    if not copies_without_data(): pytest.skip('no copies without a driver')
    waits = []
    def tolist(t):
        waits.append(t.shape)
        return [[1.]*t.shape[1]]*t.shape[0]
    monkeypatch.setattr(FakeTensor, 'tolist', tolist)
    monkeypatch.setattr(plan, 'find_tangled', lambda *args: []) # all of them have the address 0
    with FakeTensorMode():
        params = [torch.empty(s, device='cuda', dtype=dtype) for s in ((5, 7), (10,), (), (3, 3))]
        opt = build(name, split(params, 2), 'foreach', **{'lr': slice(1e-3, 1e-1), **kwargs})
        opt.state[params[0]]['do_wd'] = False
        for p in params: p.grad = torch.empty_like(p)
        opt.step()
        for _ in range(6): # the slow weights of Lookahead are made in the first step, and meet the others in the sixth
            waits.clear()
            with Transfers() as transfers: opt.step()
            assert not transfers.seen and len(waits) == len(opt.composition().stages) - 1
