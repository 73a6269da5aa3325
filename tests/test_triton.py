"""The CUDA kernels on a machine without a GPU: run by Triton's interpreter on CPU tensors, launched with a driver that only writes
down what it is told, and compiled ahead of time for three generations of GPUs"""
import re
from collections import Counter
from typing import NamedTuple

import pytest

from common import *

if not has_triton(): pytest.skip("the kernels need Triton 3.5 or later", allow_module_level=True)

from test_parity import VARIANTS, WD, rounded, show
from triton import language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import interpreter

from torch import nn

from fastxtend.optimizer import cuda, kernels, plan
from fastxtend.optimizer.attach import (Attachment, average_weights, clear_gradients, clip_gradients, look_at_gradients, scale_gradients, sums_only)
from fastxtend.optimizer.cuda import compile_ahead, constants, step_kernel, sums_kernel
from fastxtend.optimizer.steppers import compose, picked

# The first test runs the interpreted ones in a process of their own.
interpreted = pytest.mark.skipif(not INTERPRETS, reason="run by test_interpreted_tests")
compiled = pytest.mark.skipif(INTERPRETS, reason="needs Triton's compiler")

@compiled
@pytest.mark.slow
def test_interpreted_tests():
    assert int(re.search(r'(\d+) passed', run_interpreted(__file__))[1]) > 100

pytestmark = pytest.mark.usefixtures('on_cpu_tensors')

# --- Interpreted: the same numbers as fastai's own optimizers

def to_bfloat16(x, src, dst, mode, convert=interpreter._convert_float):
    "Round to nearest, as GPUs do: the interpreter cuts off"
    if (src, dst) != (tl.float32, tl.bfloat16): return convert(x, src, dst, mode)
    return torch.from_numpy(np.ascontiguousarray(x)).bfloat16().view(torch.int16).numpy().view(np.uint16)

@pytest.fixture
def launches(monkeypatch):
    "Counts kernel launches of the interpreter"
    count, call = Counter(), interpreter.GridExecutor.__call__
    def counted(self, *args, **kwargs):
        count[self.fn.__name__] += 1
        return call(self, *args, **kwargs)
    monkeypatch.setattr(interpreter.GridExecutor, '__call__', counted)
    monkeypatch.setattr(interpreter, '_convert_float', to_bfloat16)
    return count

SIZES = {**SMALL, 'block': (2, 512), 'tail': (33, 32)} # whole blocks of 1,024 or 512 elements, and a last one that is not whole

class Config(NamedTuple):
    name:str # Of the optimizer
    mom:float # At construction
    dtype:torch.dtype
    wd:str # A key of `WD`
    groups:int # If more than one, with discriminative learning rates, and without weight decay for vectors, scalars and what has a tail

    def __str__(self): return f"{self.name}-mom{self.mom}-{str(self.dtype)[6:]}-{self.wd}-{self.groups}group{'s'*(self.groups>1)}"

def make(c, way):
    params = make_params(SIZES, c.dtype)
    if way == 'native' and c.dtype.itemsize == 2: params = [p.float() for p in params]
    opt = build(c.name, split(params, c.groups), way, lr=.01 if c.groups == 1 else slice(1e-3, 1e-1), mom=c.mom, **{'wd': 0., **WD[c.wd]})
    if c.groups > 1:
        for k,p in zip(SIZES, params):
            if k in ('vector', 'scalar', 'tail'): opt.state[p]['do_wd'] = False
    return opt, params

def configs(*rest): return [Config(name, mom, *c) for name in NAMES for mom in moms(name) for c in rest]

WIDE = configs((torch.float32, 'no_wd', 1), (torch.float32, 'true_wd', 1), (torch.float32, 'true_wd', 3), (torch.float32, 'l2', 3), (torch.float64, 'l2', 3))
HALF = configs((torch.bfloat16, 'true_wd', 3), (torch.float16, 'l2', 1))

def steps_of(name): return 7 if OPTIMIZERS[name].has_lookahead else 4 # the sixth synchronises

def grads_of(c): return make_grads(tuple(SIZES.values()), c.dtype, steps_of(c.name))

@interpreted
@pytest.mark.parametrize('c', WIDE, ids=str)
def test_parity(c, launches):
    "Parameters, slots, step counts and hyperparameters after a short one-cycle schedule, as on the CPU"
    def run(way): return snapshot_without_grads(lambda opt, params: train(opt, params, grads_of(c), one_cycle(opt)), *make(c, way))
    assert_same(run('native'), run('fused'), TOLERANCE['fused'])
    assert launches == launches_of(c.name, steps_of(c.name))

def launches_of(name, steps, shapes=SIZES):
    kernels, sums = kernels_of(name, shapes)
    return dict(step_kernel=kernels*steps, **(dict(sums_kernel=sums*steps) if sums else {}))

@interpreted
@pytest.mark.parametrize('c', HALF, ids=str)
def test_parity_in_16_bits(c, launches):
    "A step is native's step in float32, rounded once: from the same state, not more than 1 in 200 go to the other of two neighbours"
    (ref, ref_params), (opt, params) = make(c, 'native'), make(c, 'fused')
    total = moved = 0
    for gs in grads_of(c):
        step_with(ref, ref_params, [g.float() for g in gs])
        step_with(opt, params, gs)
        for a,b in zip(rounded(ref, ref_params, c.dtype), rounded(opt, params, c.dtype)):
            assert b.dtype == c.dtype
            if not a.numel(): continue
            info = torch.finfo(c.dtype)
            near = info.eps*a.abs().clamp(min=info.smallest_normal) + torch.finfo(torch.float32).eps*a.abs().max()
            assert ((a - b.float()).abs() <= near).all()
            total, moved = total + a.numel(), moved + int((a != b.float()).sum())
            b.data.copy_(a)
    assert 0 < total and moved <= total/200
    assert launches == launches_of(c.name, steps_of(c.name))

def assert_same_after(name, steps, shapes=SMALL, n_groups=1, **kwargs):
    "The same parameters and state on native and here after `steps(opt, params)`"
    def run(way):
        params = make_params(shapes)
        return snapshot_without_grads(steps, build(name, split(params, n_groups), way, **kwargs), params)
    assert_same(run('native'), run('fused'), 2*TOLERANCE['fused'])

@interpreted
@pytest.mark.parametrize('name,kwargs', [pytest.param(name, kwargs, id=f'{name}-{show(kwargs)}') for name,kwargs,ways in VARIANTS if 'fused' in ways])
def test_variant(name, kwargs, launches):
    "Hyperparameters and settings away from their defaults, with a parameter that misses steps and zeros, where norms vanish"
    grads = [[None if i == 1 and t%2 else g*0 if i == 4 else g for i,g in enumerate(gs)] for t,gs in enumerate(make_grads(tuple(SMALL.values()), steps=4))]
    def steps(opt, params):
        with torch.no_grad(): params[0].zero_()
        train(opt, params, grads)
    assert_same_after(name, steps, **kwargs)

@interpreted
@pytest.mark.parametrize('name', NAMES)
def test_launches_for_any_number_of_groups(name, launches):
    "One launch a step, and one more for norms, with 1, 3 and 10 groups"
    shapes = [(3,)]*10
    for n_groups in (1, 3, 10):
        launches.clear()
        assert_same_after(name, lambda opt, params: train(opt, params, make_grads(tuple(shapes), steps=2)), shapes, n_groups)
        assert launches == launches_of(name, 2, shapes)

def view_of(p, offset, order=None):
    "`p` at a place `offset` elements into its memory, where `order` is the layout of its dimensions there"
    order = order or range(p.ndim)
    memory = torch.zeros(p.numel() + offset, dtype=p.dtype)[offset:].view([p.shape[d] for d in order])
    return memory.permute([order.index(d) for d in range(p.ndim)]).copy_(p)

@interpreted
@pytest.mark.parametrize('name', ('Adam', 'Lamb'))
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=['float32', 'bfloat16'])
@pytest.mark.parametrize('tensor', ['param', 'grad', 'sqr_avg'])
def test_unaligned_and_permuted(name, dtype, tensor, launches):
    "Tensors that start anywhere, alone or together with others, and layouts like channels_last"
    shapes = [(32, 40), (4, 8, 8, 8)]
    def run(place):
        params = make_params(shapes, dtype)
        layouts = [(p, None, None) if not place else (p, 1, None) if p.ndim == 2 else (p, 3, (0, 2, 3, 1)) for p in params]
        def moved(t, i): return view_of(t, *layouts[i][1:]) if place else t
        def like(t, i): return t if not place or t.ndim == 2 else view_of(t, 0, (0, 2, 3, 1))
        params = [(moved if tensor == 'param' else like)(p, i) for i,p in enumerate(params)]
        opt = build(name, params, 'fused', lr=.1, wd=.1)
        for t,gs in enumerate(make_grads(tuple(shapes), dtype, 2)):
            for i,(p,g) in enumerate(zip(params, gs)): p.grad = (moved if tensor == 'grad' else like)(g.clone(), i)
            opt.step()
            if t == 0 and tensor == 'sqr_avg':
                for i,p in enumerate(params): opt.state[p]['sqr_avg'] = moved(opt.state[p]['sqr_avg'], i)
        return snapshot(opt, params)
    before = run(False)
    steps = dict(launches)
    after = run(True)
    assert launches == {k: 2*v for k,v in steps.items()}
    assert_same(before, after, TOLERANCE['fused'] if name == 'Lamb' and dtype == torch.float32 else 2.) # permuted elements are summed in another order

@interpreted
@pytest.mark.parametrize('name', ('Larc', 'Lamb'))
def test_chunks_of_several_blocks(name, launches, monkeypatch):
    "A large parameter has at most `MOST` chunks, which are then several blocks; here at most 2"
    monkeypatch.setattr(cuda, 'MOST', 2)
    monkeypatch.setattr(cuda, 'constants', cuda.constants.__wrapped__)
    shapes = dict(large=(41, 125), vector=(10,), two=(2048,)) # 5 blocks and 5 elements: one chunk of three blocks, and one of less
    assert_same_after(name, lambda opt, params: train(opt, params, make_grads(tuple(shapes.values()), steps=2)), shapes)

@interpreted
@pytest.mark.parametrize('name', NAMES)
def test_mixed_dtypes(name, launches):
    "Each dtype is a launch of its own"
    def run(way):
        params = [p.to(dtype) for p,dtype in zip(make_params([(5, 7)]*4), (torch.float32, torch.float64)*2)]
        opt = build(name, split(params, 2), way)
        def steps(opt, params):
            for gs in make_grads(((5, 7),)*4, torch.float64, 2): step_with(opt, params, [g.to(p.dtype) for g,p in zip(gs, params)])
        return snapshot_without_grads(steps, opt, params)
    assert_same(run('native'), run('fused'), TOLERANCE['fused'])
    assert launches == {k: 2*v for k,v in launches_of(name, 2).items()}

def attach(opt, params, average):
    "Clip, average and clear in the next step"
    opt.attached.update(clip=Attachment((clip_gradients,), scalars=dict(clip_norm=.5), over=params), clear=Attachment(last=(clear_gradients,)),
                        average=Attachment(last=(average_weights,), scalars=dict(average_weight=.1), lend=dict(average=lambda ps: average)))

@interpreted
@pytest.mark.parametrize('most', [512, 2], ids=['few_chunks', 'many_chunks'])
@pytest.mark.parametrize('name', NAMES)
def test_attached(name, most, launches, monkeypatch):
    "The norm of all gradients, the step, the average and cleared gradients: one launch more than without, whatever the groups"
    monkeypatch.setattr(cuda, 'MOST', most)
    monkeypatch.setattr(cuda, 'constants', cuda.constants.__wrapped__)
    shapes, steps = dict(SMALL, large=(41, 125), two=(2048,)), steps_of(name)
    def run(way, n_groups):
        launches.clear()
        params = make_params(shapes)
        opt, average = build(name, split(params, n_groups), way), make_params(shapes, seed=3)
        for gs in make_grads(tuple(shapes.values()), steps=steps):
            set_grads(params, gs)
            if way == 'fused': attach(opt, params, average)
            else: norm = nn.utils.clip_grad_norm_(params, .5)
            opt.step()
            if way == 'fused': assert all((p.grad == 0).all() for p in params)
            else: torch._foreach_lerp_(average, params, .1)
        if way == 'fused': norm = torch.tensor(opt.grad_norm)
        return dict(average=average, norm=norm, **{k: v for k,v in snapshot(opt, params).items() if k not in ('grads', 'hypers')})
    for n_groups in (1, 3):
        assert_same(run('native', n_groups), run('fused', n_groups), 4*TOLERANCE['fused'])
        kernels, sums = kernels_of(name, shapes, (clip_gradients,))
        assert launches == dict(step_kernel=kernels*steps, sums_kernel=sums*steps)
        if name == 'Adam': assert kernels + sums == 2

@interpreted
def test_attached_to_mixed_dtypes(launches):
    "The norm is of all gradients, whatever their types: each type is launched by itself"
    def run(way):
        params = [p.to(dtype) for p,dtype in zip(make_params([(5, 7)]*4), (torch.float32, torch.float64)*2)]
        opt, average = build('Adam', params, way), [p.clone() for p in params]
        for gs in make_grads(((5, 7),)*4, torch.float64, 3):
            set_grads(params, [g.to(p.dtype) for g,p in zip(gs, params)])
            if way == 'fused': attach(opt, params, average)
            else: nn.utils.clip_grad_norm_(params, .5)
            opt.step()
            if way != 'fused':
                for a,p in zip(average, params): a.lerp_(p, .1)
        return dict(params=params, average=average)
    native, fused = run('native'), run('fused')
    assert launches == dict(step_kernel=6, sums_kernel=6)
    for k in native:
        for a,b in zip(native[k], fused[k]): torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)

class Graph:
    "A CUDA graph of the interpreter: while it captures, launches are kept for later"
    def __init__(self, monkeypatch):
        self.launches, self.on, call = [], False, interpreter.GridExecutor.__call__
        def keep(executor, *args, **kwargs):
            if self.on: self.launches.append(lambda: call(executor, *args, **kwargs))
            else: call(executor, *args, **kwargs)
        monkeypatch.setattr(interpreter.GridExecutor, '__call__', keep)
        monkeypatch.setattr(cuda.Tables, 'capturing', property(lambda tables: self.on))
        monkeypatch.setattr(kernels, '_capturing', lambda: self.on)

    def __enter__(self): self.on = True
    def __exit__(self, *args): self.on = False

    def replay(self):
        for launch in self.launches: launch()

@interpreted
@pytest.mark.parametrize('name', [n for n in NAMES if not OPTIMIZERS[n].has_lookahead and not takes_whole(n)]) # slow weights are synchronised in some steps only, and products are no kernels
def test_captured_and_replayed(name, monkeypatch):
    "A replayed step has the learning rate, momentum and step counts of its own time, not those of the capture"
    shapes, graph = [(5, 7), (7, 5), (10,), ()], Graph(monkeypatch)
    (ref, ref_params), (opt, params) = ((build(name, split(ps, 2), way), ps) for way in ('native', 'fused') for ps in [make_params(shapes)])
    ref_anneal, anneal = one_cycle(ref), one_cycle(opt)
    for t,gs in enumerate(make_grads(tuple(shapes), steps=5)):
        ref_anneal(t/5)
        step_with(ref, ref_params, gs)
        anneal(t/5)
        if t == 0:
            set_grads(params, gs)
            with graph, pytest.raises(RuntimeError, match='after at least one step'): opt.step()
            opt.step()
            with pytest.raises(RuntimeError, match='was captured with other'): opt.refresh()
            before = snapshot(opt, params)
            with graph: opt.step()
            assert_same(before, snapshot(opt, params)) # a capture changes and counts nothing
            continue
        for p,g in zip(params, gs): p.grad.copy_(g)
        opt.refresh()
        graph.replay()
    assert_same(snapshot(ref, ref_params)['params'], snapshot(opt, params)['params'], TOLERANCE['fused'])
    assert_same(states(ref, ref_params), states(opt, params), TOLERANCE['fused'])
    rows = len(opt.gather()[0].rows)
    opt.state[params[1]]['do_wd'] = False
    if len(opt.gather()[0].rows) == rows: return # each parameter has a row of its own, which is uploaded
    with pytest.raises(RuntimeError, match='was captured with other'): opt.refresh()

@interpreted
def test_replayed_after_loading(monkeypatch):
    "Another state may be loaded between replays: its addresses are uploaded like everything else"
    shapes, graph = [(5, 7), (10,), ()], Graph(monkeypatch)
    (ref, ref_params), (opt, params) = ((build('Adam', ps, way), ps) for way in ('native', 'fused') for ps in [make_params(shapes)])
    for t,gs in enumerate(make_grads(tuple(shapes), steps=6)):
        step_with(ref, ref_params, gs)
        if t == 0: set_grads(params, gs)
        for p,g in zip(params, gs): p.grad.copy_(g)
        if t < 1: opt.step()
        elif t < 2:
            with graph: opt.step()
        if t > 0:
            opt.refresh()
            graph.replay()
        if t == 3:
            saved = opt.state_dict()
            for s in saved['state']: s['grad_avg'] = torch.zeros_like(s['grad_avg'])
            ref.load_state_dict(saved_and_loaded(saved, False))
            opt.load_state_dict(saved)
            with torch.no_grad():
                for p,q in zip(ref_params, params): p.copy_(q)
    assert_same(snapshot(ref, ref_params)['params'], snapshot(opt, params)['params'], TOLERANCE['fused'])

@interpreted
def test_what_cannot_be_captured(monkeypatch):
    "Lookahead, and parameters that no kernel takes: refused, and nothing is changed or counted"
    graph = Graph(monkeypatch)
    for name,params in (('Ranger', make_params([(3,)])), ('Adam', [torch.ones(4, 8)[:, ::2]])):
        opt = build(name, params, 'fused')
        set_grads(params, [torch.ones_like(p) for p in params])
        opt.step()
        before = snapshot(opt, params)
        with graph, pytest.raises(RuntimeError, match='can be captured in a CUDA graph'): opt.step()
        assert_same(before, snapshot(opt, params))

# --- Launched: what a GPU would be told

class Driver:
    "Stands in for the driver of a GPU: compiles for it, and writes down the launches"
    def __init__(self): self.launches, self.utils = [], self
    def get_current_target(self): return GPUTarget('cuda', 90, 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0
    def get_device_properties(self, device): return dict(max_shared_mem=2**17)
    def load_binary(self, *args): return object(), None, 0, 0, 1024
    def unload_module(self, module): pass
    def launcher_cls(self, src, metadata):
        def launch(x, y, z, *args): self.launches.append((src.fn.__name__, (x, y, z), args[6:]))
        return launch

@pytest.fixture
def driver(monkeypatch):
    from triton.runtime import driver as active
    res = Driver()
    monkeypatch.setattr(active, '_active', res)
    for k in (step_kernel, sums_kernel): monkeypatch.setattr(k, 'device_caches', type(k.device_caches)(k.create_binder))
    return res

def variants(): return sum(len(k.device_caches[0][0]) for k in (step_kernel, sums_kernel))

@compiled
@pytest.mark.parametrize('name', NAMES)
def test_launched_once_and_compiled_once(name, driver):
    "The same machine code whatever the sizes, groups, step counts and alignment, and one launch a step (one more for each stage that adds up)"
    compiled = sum(kernels_of(name, SIZES)) + OPTIMIZERS[name].has_lookahead
    for n_groups,offset in ((1, 0), (3, 1)):
        params = [view_of(p, offset) for p in make_params(SIZES)]
        opt = build(name, split(params, n_groups), 'fused')
        train(opt, params, make_grads(tuple(SIZES.values()), steps=6))
        assert Counter(o[0] for o in driver.launches) == launches_of(name, 6)
        assert variants() == compiled
        params, owners = driver.launches[-1][2][:2]
        assert owners.tolist() == sorted(owners.tolist()) and all(o[1] == (len(owners), 1, 1) for o in driver.launches)
        driver.launches.clear()

@compiled
@pytest.mark.parametrize('name', NAMES)
def test_only_what_changed_is_uploaded(name, driver, monkeypatch):
    "Addresses and chunks in the first step, and then only rows, in one copy; nothing if nothing changed"
    uploads = []
    def upload(src, dst):
        uploads.append(len(src))
        dst.copy_(torch.from_numpy(src))
    monkeypatch.setattr(cuda, 'upload', upload)
    params = make_params([(3,)]*50)
    opt = build(name, split(params, 2), 'fused')
    set_grads(params, make_params([(3,)]*50))
    steps = []
    for t in range(4):
        uploads.clear()
        opt.set_hyper('lr', .1/(t+1))
        opt.step()
        steps.append(list(uploads))
    assert len(steps[0]) == 2 and steps[0][1] > 50*7*8
    for uploads in steps[1:]: assert len(uploads) == 1 and uploads[0] <= 2*20*4
    if not opt.spec.counts_steps:
        uploads.clear()
        opt.step()
        assert not uploads

@compiled
@pytest.mark.parametrize('name', ('SGD', 'Lamb'))
def test_nothing_is_compared_that_did_not_move(name, driver, monkeypatch):
    "Where nothing has moved, addresses are neither collected nor compared; if gradients have, they are uploaded, and nothing is cut anew"
    params = make_params([(3,)]*50)
    opt, sent, cuts = build(name, split(params, 2), 'fused'), [], []
    send, make_chunks = cuda.Tables.send, cuda.make_chunks
    monkeypatch.setattr(cuda.Tables, 'send', lambda self, start, data: (sent.append((start, len(data))), send(self, start, data)))
    monkeypatch.setattr(cuda, 'make_chunks', lambda *args: (cuts.append(args), make_chunks(*args))[1])
    grads = make_grads(((3,),)*50, steps=3)
    set_grads(params, grads[0])
    for _ in range(3): opt.step()
    entries = 50*8*(7 + len(opt.slot_names))
    assert [start for start,_ in sent] == [0, entries, entries]
    sent.clear()
    set_grads(params, grads[1])
    opt.step()
    assert sent[0][0] == 0 and len(cuts) == 1

@compiled
def test_nothing_changes_if_a_kernel_cannot_be_compiled(driver, monkeypatch):
    "All kernels of a step are compiled before the first is launched, and steps are counted afterwards"
    monkeypatch.setattr(sums_kernel, 'device_caches', type(sums_kernel.device_caches)(sums_kernel.create_binder))
    def broken(*args, **kwargs): raise RuntimeError('Failed to find C compiler')
    params = [torch.ones(3), torch.ones(3, dtype=torch.float64)] # a kernel for each
    opt = build('Lamb', params, 'fused')
    set_grads(params, [torch.ones_like(p) for p in params])
    with monkeypatch.context() as m:
        m.setattr(step_kernel, 'warmup', broken)
        with pytest.raises(RuntimeError, match='compiler'): opt.step()
    assert not driver.launches and opt.state[params[0]].get('step', 0) == 0
    opt.step()
    assert Counter(o[0] for o in driver.launches) == {k: 2*v for k,v in launches_of('Lamb', 1).items()} and opt.state[params[0]]['step'] == 1

@compiled
@pytest.mark.parametrize('name', NAMES)
def test_attached_waits_for_nothing(name, driver, monkeypatch):
    "Clipping, averaging and clearing: two launches a step of AdamW, compiled once, and no number of a tensor is ever asked for"
    shapes = [(3,)]*20 + [(2048,)]*600 # more chunks than programs add up a sum over the model
    params = make_params(shapes)
    opt, average, grads = build(name, split(params, 3), 'fused'), make_params(shapes), make_params(shapes)
    stages = compose([clip_gradients, *picked(OPTIMIZERS[name].steppers(), frozenset())]).stages
    def wait(*args, **kwargs): raise AssertionError("waits for a number")
    for what in ('item', 'tolist', 'cpu', '__float__', '__bool__', '__int__', 'numpy'): monkeypatch.setattr(Tensor, what, wait)
    for _ in range(3):
        for p,g in zip(params, grads): p.grad = g
        attach(opt, params, average)
        opt.step()
        opt.zero_grad()
    assert Counter(o[0] for o in driver.launches) == dict(step_kernel=3, sums_kernel=3*(len(stages) - 1))
    sums, step = (next(o[1] for o in driver.launches if o[0] == k) for k in ('sums_kernel', 'step_kernel'))
    assert sums == (cuda.MOST, 1, 1) and step[0] > 600

# --- Compiled ahead of time

def every_stage():
    "All that may be compiled for an optimizer: with and without momentum, and whatever is switched on"
    for spec in OPTIMIZERS.values():
        for mom in moms(spec.name):
            for on in dict.fromkeys(((), spec.switches())):
                composition = spec.composition(on, **(dict(mom=mom) if 'mom' in spec.hypers else {}))
                for stage in composition.kernels: yield '-'.join((stage.name, f'mom{mom}', *on)), (composition, composition.stages.index(stage))
    for spec in OPTIMIZERS.values():
        composition = compose([clip_gradients, *picked(spec.steppers(), frozenset()), average_weights, clear_gradients], name=spec.name)
        for at,stage in enumerate(composition.stages): yield f'{stage.name}-attached', (composition, at)
    yield 'look', (sums_only(scale_gradients, look_at_gradients), 0)

EVERY = dict(every_stage())

AHEAD = [(75, torch.float32), (80, torch.float32), (90, torch.float32), (75, torch.float16), (80, torch.bfloat16), (90, torch.bfloat16), (90, torch.float64)]

@compiled
@pytest.mark.parametrize('arch,dtype', AHEAD, ids=lambda o: str(o).replace('torch.', ''))
@pytest.mark.parametrize('kernel', EVERY)
def test_machine_code(kernel, arch, dtype):
    "No registers spilled; on the main path all loads and stores are of 16 bytes, and each tensor is read once and written once, if the stage takes or gives it"
    composition, at = EVERY[kernel]
    adds, known = bool(composition.stages[at].sums), constants(composition, at, dtype)
    code = compile_ahead(sums_kernel if adds else step_kernel, known, arch)
    assert code.spilled <= (16 if dtype == torch.float64 else 0) # sixteen bytes of a thread for RMSProp in float64
    if not kernel.endswith('attached'): assert code.registers <= (112 if dtype == torch.float64 else 96) # so that five programs fit on a multiprocessor
    else: assert 65536//(code.registers*32*cuda.WARPS)*len(composition.stages[at].tensors)*known['BLOCK']*dtype.itemsize >= 20*1024 # bytes under way
    fills = not adds and composition.stages[at] is not composition.step # what it writes, it does not read
    read = len(composition.stages[at].tensors) - fills
    written = 0 if adds else len(composition.stages[at].gives) + known['clear']
    wide = 'v2.b64' if dtype == torch.float64 else 'v4.b32'
    per_thread = known['BLOCK']*dtype.itemsize//(32*cuda.WARPS*16)
    found = [len(re.findall(rf'{op}\.global\.{re.escape(wide)}', code.ptx)) for op in ('ld', 'st')]
    assert found == [read*per_thread, written*per_thread]
    if dtype == torch.bfloat16 and written: assert re.search(r'cvt\.rn\S*\.bf16', code.ptx) # rounded to nearest
