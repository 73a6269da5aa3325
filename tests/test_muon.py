"Muon: what is orthogonal, what goes which way, how much work it is, and what PyTorch's own does"
from collections import Counter

import pytest
from common import *
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastxtend import optim as ours
from fastxtend.benchmark.models import model_shapes
from fastxtend.benchmark.steps import CONTESTANTS, LR, Watcher, hypers_of
from fastxtend.callback.muon import outer_params
from fastxtend.optimizer import muon
from fastxtend.optimizer.attach import Attachment, average_weights
from fastxtend.optimizer.muon import COEFFICIENTS, Muon, coefficients_of, is_matrix, newton_schulz, orthogonalise
from fastxtend.optimizer.steppers import CompositionError, apply, compose, folded, slot, stepper, summed

ALL_WAYS = ways('Muon')
WIDTHS = [(40, 40), (24, 96), (96, 24), (16, 17), (8, 120)]

@pytest.fixture(autouse=True)
def one_thread():
    with threads(1): yield

def randn(*shape, seed=0, dtype=torch.float64): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)

def orthogonal(x, which='standard', steps=5):
    x = x.clone()
    orthogonalise([x], coefficients=coefficients_of(which, steps))
    return x

# --- Orthogonal matrices

def bounds(which, least):
    "Where five iterations bring a number from `least` to 1, and the most they make of a smaller one"
    x = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    small = x < least
    for a,b,c in coefficients_of(which, 5): x = a*x + b*x**3 + c*x**5
    return x[~small].min(), x.max()

@pytest.mark.parametrize('which,least,low,high', [('standard', .03, .68, 1.21), ('polar_express', .01, .7, 1.13)])
def test_bounds(which, least, low, high):
    "Those that are known: 0.7 to 1.2 for the standard ones (Jordan)"
    found = bounds(which, least)
    assert low < found[0] and found[1] < high

@pytest.mark.parametrize('which', COEFFICIENTS)
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize('shape', WIDTHS, ids=str)
def test_singular_values(shape, dtype, which, monkeypatch):
    "Of random matrices, of some of low rank, of tiny ones; those of nothing stay nothing. bfloat16 is what float32 is multiplied in where there is hardware for it"
    slack, least = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: .1}[dtype], .03
    if dtype == torch.bfloat16:
        monkeypatch.setattr(muon, 'dtype_of_products', lambda t: torch.bfloat16)
        dtype = torch.float32
    low, high = bounds(which, least)
    x = randn(*shape, dtype=dtype)
    low_rank = randn(shape[0], 3, dtype=dtype) @ randn(3, shape[1], seed=1, dtype=dtype)
    for a in (x, low_rank, 1e-5*x, 1e4*x):
        before, after = (torch.linalg.svdvals(o.double()) for o in (a, orthogonal(a, which)))
        n = int((before > least*before.norm()).sum())
        assert n >= 3 and low - slack < after[:n].min() and after.max() < high + slack
    u, _, v = torch.linalg.svd(x.double(), full_matrices=False)
    if least*before.norm() < before.min(): assert (orthogonal(x, which).double() - u @ v).norm() < .35*(u @ v).norm() # and nothing is turned
    assert torch.equal(orthogonal(0*x, which), 0*x)
    assert orthogonal(1e-9*x, which).isfinite().all()

@pytest.mark.parametrize('which,steps', [('standard', 5), ('polar_express', 5), ('standard', 1), ('polar_express', 12), ((1.5, -.5, 0.), 8)], ids=str)
@pytest.mark.parametrize('shape', [(3, 10, 40), (2, 30, 31)], ids=str)
def test_gram_form_is_exact(shape, which, steps, monkeypatch):
    "Products of rows with rows instead of long ones: the same to 1e-10, also where singular values are small"
    x, coefs = randn(*shape), coefficients_of(which, steps)
    x[:, -1] = x[:, 0]*(1 + 1e-6)
    results = []
    for long in (0., math.inf):
        monkeypatch.setattr(muon, 'LONG', long)
        results.append(newton_schulz([x.clone()], coefs)[0])
    torch.testing.assert_close(*results, rtol=0., atol=1e-10)

def test_a_batch_is_its_matrices(monkeypatch):
    "Whatever the shapes, and in whatever pieces a large batch is iterated; convolutions are matrices, in whatever order they are in memory"
    xs = [randn(*s, seed=i) for i,s in enumerate([(8, 12), (6, 30), (8, 12), (8, 3, 2, 2), (12, 8), (8, 12), (5,), (1, 1), (0, 7)])] + [torch.ones((), dtype=torch.float64)]
    xs.append(xs[3].to(memory_format=torch.channels_last))
    xs.append(xs[0].t().contiguous().t())
    expected = [orthogonal(x) if x.numel() else x.clone() for x in xs]
    for most in (2**24, 200, 1):
        monkeypatch.setattr(muon, 'BATCH', most)
        got = [x.clone() for x in xs]
        orthogonalise(got, coefficients=coefficients_of('standard', 5))
        for a,b in zip(expected, got): torch.testing.assert_close(b, a, rtol=0., atol=1e-10)
    torch.testing.assert_close(expected[3].flatten(1), orthogonal(xs[3].flatten(1)), rtol=0., atol=1e-10)
    torch.testing.assert_close(got[10], got[3], rtol=0., atol=1e-10)

def test_nothing_leaks_from_one_matrix_into_another():
    xs = [randn(6, 9, seed=i) for i in range(3)]
    expected = orthogonal(xs[2])
    xs[1][0, 0] = math.nan
    orthogonalise(xs, coefficients=coefficients_of('standard', 5))
    assert xs[1].isnan().any() and torch.allclose(xs[2], expected, atol=1e-12) and xs[0].isfinite().all()

@pytest.mark.parametrize('wrong', [dict(coefficients='newton'), dict(coefficients=(1., 2.)), dict(ns_steps=0), dict(ns_steps=100), dict(scale='adam')], ids=str)
def test_wrong_options(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))): Muon([randn(4, 4)], .1, **wrong)

# --- As PyTorch does it

torchs_muon = pytest.mark.skipif(not hasattr(torch.optim, 'Muon'), reason="PyTorch 2.9 or later has Muon")

@torchs_muon
@pytest.mark.parametrize('way', ALL_WAYS)
@pytest.mark.parametrize('adjust', [None, 'original', 'match_rms_adamw', 'spectral_unclamped'])
def test_as_torch(adjust, way, monkeypatch):
    "The same weights to 1e-10, as soon as PyTorch's is made to iterate in float64; and the same defaults"
    def trained(make):
        params = [randn(*s, seed=i) for i,s in enumerate(WIDTHS)]
        opt = make(params)
        for t in range(20):
            for i,p in enumerate(params): p.grad = randn(*p.shape, seed=100*t + i)*10**(-t%3)
            opt.step()
        return params
    with monkeypatch.context() as m:
        m.setattr(torch, 'bfloat16', torch.float64)
        expected = [trained(lambda ps: torch.optim.Muon(ps, lr=.02, adjust_lr_fn=adjust, **kw)) for kw in ({}, dict(nesterov=False, momentum=.8, weight_decay=0., ns_steps=3))]
    scale = dict(scale=adjust) if adjust else {}
    got = [trained(lambda ps: build('Muon', ps, way, lr=.02, **scale, **kw)) for kw in ({}, dict(nesterov=False, mom=.8, wd=0., ns_steps=3))]
    named = [trained(lambda ps: ours.Muon(ps, lr=.02, adjust_lr_fn=adjust, **kw)) for kw in ({}, dict(nesterov=False, momentum=.8, weight_decay=0., ns_steps=3))]
    for a,b,c in zip(expected, got, named):
        for x,y,z in zip(a, b, c): torch.testing.assert_close(y, x, rtol=0., atol=1e-10); torch.testing.assert_close(z, x, rtol=0., atol=1e-10)

@torchs_muon
def test_torchs_arguments():
    "All that PyTorch's has, with its defaults; and a checkpoint of it goes on here"
    theirs, own = (inspect.signature(c).parameters for c in (torch.optim.Muon, ours.Muon))
    assert {n: p.default for n,p in theirs.items()} == {n: own[n].default for n in theirs}
    x = randn(6, 9)
    theirs = torch.optim.Muon([x.clone()], lr=.1)
    theirs.param_groups[0]['params'][0].grad = randn(6, 9, seed=1)
    theirs.step()
    mine = ours.Muon([x.clone()], lr=.5)
    mine.load_state_dict(theirs.state_dict())
    assert mine.param_groups[0]['lr'] == .1 and torch.equal(next(iter(mine.state.values()))['momentum_buffer'], next(iter(theirs.state.values()))['momentum_buffer'])

@torchs_muon
def test_contestant_steps_new_gradients():
    "PyTorch's Muon takes matrices only: in the benchmark convolutions are flattened, with the gradient of each step"
    (p, g), (q, h) = ((randn(8, 3, 2, 2), randn(8, 3, 2, 2, seed=i)) for i in (1, 2))
    p.grad = g
    opt = CONTESTANTS['torch_fused'].build('Muon', [[p]], hypers_of('Muon'))
    p.grad, q = h, q.flatten(1)
    q.grad = h.flatten(1)
    opt.step()
    torch.optim.Muon([q], lr=LR, weight_decay=hypers_of('Muon')['wd']).step()
    assert torch.equal(p.flatten(1), q)

def test_a_group_may_say_which_way():
    a, b, c = (randn(8, 8, seed=i) for i in range(3))
    opt = ours.Muon([dict(params=[a]), dict(params=[b], use_muon=False), dict(params=[c], use_muon=True)], lr=.1)
    for p in (a, b, c): p.grad = randn(8, 8)
    opt.step()
    assert [set(opt.state[p]) for p in (a, b, c)] == [{'momentum_buffer'}, {'exp_avg', 'exp_avg_sq', 'step'}, {'momentum_buffer'}]

# --- Which way

SHAPES_OF = {(4, 4): True, (3, 9): False, (512, 4): True, (513, 4): False, (8, 3, 3, 3): True, (384, 1, 3, 3): True, (1, 197, 384): False, (7,): False, (): False, (0, 8): False}

def test_shapes_decide(): assert {s: is_matrix(torch.empty(s)) for s in SHAPES_OF} == SHAPES_OF

@pytest.mark.parametrize('way', ALL_WAYS)
def test_the_rest_is_adam(way):
    "The numbers of `Adam` to the bit, with a factor of the learning rate; and `do_muon` in the state of a parameter counts more than its shape"
    shapes, kwargs = [(10,), (), (6, 6)], dict(mom=.8, sqr_mom=.95, eps=1e-6)
    (a, adam), (b, both) = ((ps, make(ps)) for make in (lambda ps: build('Adam', ps, 'fused' if way == 'fused' else 'foreach', lr=.01, wd=.1, **kwargs),
                            lambda ps: build('Muon', ps, way, lr=.02, wd=.1, adam_lr=.5, **{f'adam_{n}': v for n,v in kwargs.items()})) for ps in [make_params(shapes)])
    both.state[b[2]]['do_muon'] = False
    for gs in make_grads(tuple(shapes), steps=12):
        step_with(adam, a, gs), step_with(both, b, gs)
    for x,y in zip(a, b): assert distance(x, y) <= TOLERANCE['foreach']
    assert set(both.state[b[2]]) == {'do_muon', 'grad_avg', 'sqr_avg', 'step'} and set(both.slots_of(b[2])) == {'grad_avg', 'sqr_avg'}

@pytest.mark.parametrize('way', ALL_WAYS)
def test_another_way_while_training(way):
    "The average of gradients goes on; `clear_state` and checkpoints keep the flag"
    p, = params = make_params([(6, 6)])
    opt = build('Muon', params, way)
    for flag in (None, False, True):
        if flag is not None: opt.state[p]['do_muon'] = flag
        step_with(opt, params, [torch.ones(6, 6)])
    torch.testing.assert_close(opt.state[p]['grad_avg'], torch.full((6, 6), 1 - .95*.95*.9))
    other = build('Muon', make_params([(6, 6)]), way)
    other.load_state_dict(saved_and_loaded(opt.state_dict()))
    assert other.backend_report().attrgot('flags') == ['do_muon'] and other.state[other.param_lists[0][0]]['do_muon'] is True
    opt.state[p]['do_muon'] = False
    opt.clear_state()
    assert opt.state[p] == {'do_muon': False} and opt.backend_report().attrgot('flags') == ['do_muon'] # of the last step

def test_report():
    params = make_params([(8, 3, 3, 3), (8,), (8, 8), (1, 1, 8)])
    opt = Muon(split(params, 2), .1, fused=True)
    expected = opt.backend_report()
    train(opt, params, make_grads(tuple(tuple(p.shape) for p in params), steps=1))
    report = opt.backend_report()
    assert report.attrgot('flags') == expected.attrgot('flags') == ['do_muon', '', 'do_muon', '']
    assert [set(o.state) for o in report] == [set(o.state) for o in expected] == [{'grad_avg'}, {'grad_avg', 'sqr_avg'}]*2
    assert report.attrgot('index') == [0, 1, 0, 1] and 'do_muon' in repr(report) and 'flags' not in repr(build('Adam', params, 'fused').backend_report())

class Tied(nn.Module):
    "A small language model"
    def __init__(self):
        super().__init__()
        self.embed, self.layer = nn.Embedding(30, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 30)
        self.head.weight = self.embed.weight

def test_outer_layers():
    "Embeddings, and the last layer: by the types of modules"
    def names(m): return [n for n,p in m.named_parameters() if any(p is q for q in outer_params(m))]
    assert names(Tied()) == ['embed.weight', 'head.bias']
    assert names(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 10), nn.BatchNorm1d(10))) == ['4.weight', '4.bias']
    assert names(nn.LayerNorm(8)) == []
    assert names(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))) == ['1.weight', '1.bias']

# --- How much work

class Products(TorchDispatchMode):
    "Counts products, and adds up the elements of what is alive"
    def __init__(self):
        super().__init__()
        self.calls = Counter()
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))

@pytest.mark.parametrize('bfloat16', [True, False])
@pytest.mark.parametrize('model', ['ViT-S/16', 'XResNet50'])
def test_products_of_a_step(model, bfloat16, monkeypatch):
    "Three a shape and iteration, at most: the Gram form has more, but shapes of equal rows share all but two or four of them"
    if model == 'ViT-S/16': pytest.importorskip('timm')
    monkeypatch.setattr(muon, '_has_bfloat16', lambda device: bfloat16)
    xs = [x for x in (torch.empty(s, device='meta') for s in model_shapes(model)) if is_matrix(x)]
    with Products() as count: orthogonalise(xs, coefficients=coefficients_of('standard', 5))
    assert not {'mm', 'addmm', 'matmul'} & set(count.calls)
    assert 0 < count.calls['bmm'] + count.calls['baddbmm'] <= 3*5*len(set(map(muon.matrix_shape, xs)))

@pytest.mark.parametrize('way', ALL_WAYS)
def test_kernels_of_a_step(way):
    "Two of matrices and one of the rest"
    params = make_params(SMALL)
    opt = build('Muon', params, way)
    set_grads(params, params)
    assert kernels_of('Muon', SMALL) == (3, 0)
    assert len(opt.gather()) == 2 and [len(b) for b in opt.gather()] == [2, 3]

@pytest.mark.parametrize('shape,dtype', [((64, 192), torch.float32), ((96, 96), torch.float64)], ids=str)
def test_room(shape, dtype):
    "What a step needs for the time being: a float32 for each element of matrices (float64 if they are), and four times what is iterated together"
    params, one, size = [randn(*shape, dtype=dtype) for _ in range(6)] + [randn(48, 48, dtype=dtype)], math.prod(shape), dtype.itemsize
    opt = Muon(params, .1, fused=True)
    set_grads(params, params)
    opt.step()
    def peak():
        with Watcher() as w: opt.step()
        return w.peak
    matrices = size*sum(map(Tensor.numel, params))
    whole = peak()
    muon.BATCH, before = 2*one, muon.BATCH
    try: pieces = peak()
    finally: muon.BATCH = before
    assert matrices < pieces < matrices + 4*size*2*one + 1000 < whole < matrices + 4*size*6*one + 1000

# --- Together with others

@pytest.mark.parametrize('way', ['foreach', 'fused'])
def test_memory_shared_between_both_ways(way):
    "A matrix and a vector in one piece of memory: an average that is attached is done apart, as it would not see the last weights"
    memory = torch.ones(36)
    params, average = [memory.view(6, 6), memory[:6]], [torch.zeros(6, 6), torch.zeros(6)]
    opt = build('Muon', params, way)
    attached = Attachment(last=(average_weights,), scalars=dict(average_weight=1.), lend=dict(average=lambda ps: average))
    opt.attached['average'] = attached
    step_with(opt, params, [torch.ones(6, 6), torch.ones(6)])
    assert not attached.taken and not average[0].any()
    apart = [torch.ones(6, 6), torch.ones(6)]
    opt = build('Muon', apart, way)
    opt.attached['average'] = attached
    if way == 'fused':
        step_with(opt, apart, [torch.ones(6, 6), torch.ones(6)])
        assert attached.taken and all(torch.equal(p, a) for p,a in zip(apart, average))

@pytest.mark.parametrize('way', ALL_WAYS)
def test_nothing_is_changed_if_memory_runs_out(way, monkeypatch):
    "Products need room: where there is none, neither weights, nor averages, nor step counts have changed"
    params = make_params(SMALL)
    opt = build('Muon', params, way)
    train(opt, params, make_grads(tuple(SMALL.values()), steps=2))
    set_grads(params, make_grads(tuple(SMALL.values()), steps=3)[2])
    before = snapshot(opt, params)
    def none(*args): raise torch.OutOfMemoryError("no room")
    monkeypatch.setattr(muon, 'newton_schulz', none)
    with pytest.raises(torch.OutOfMemoryError): opt.step()
    assert_same(before, snapshot(opt, params))

# --- Steppers on whole tensors

@stepper('turned', whole=True, turned=slot(lent=True))
def turn_round(direction, times=1):
    for t in direction: t.copy_(t.flip(0) if times % 2 else t)

def _scale(size_sqr): return 1/(1 + size_sqr)

@stepper('update', role='update', size_sqr=summed('turned*turned'), inverse=folded(_scale))
def shorten(turned, inverse, lr): return lr*inverse*turned

@pytest.mark.parametrize('first,stages', [([], ['fill', 'whole', 'sums', 'step']), ([partial(turn_round, turned='once')], ['fill', 'whole', 'fill', 'whole', 'sums', 'step'])])
def test_stages(first, stages):
    "Tensors are filled, overwritten, and what follows is another kernel; sums of what was written are another stage"
    steppers = [partial(turn_round, direction='g', turned='once') if first else None, partial(turn_round, direction='once' if first else 'g', times=3), shorten, apply]
    composition = compose(steppers, ('lr',))
    assert [s.name.split('_')[1] if '_' in s.name else 'step' for s in composition.stages] == stages
    assert composition.step.gives == ('p',) and not composition.is_local
    with pytest.raises(CompositionError, match='whole tensors'): compose([partial(turn_round, direction='lr'), shorten, apply], ('lr',))

@pytest.mark.parametrize('way', ['native', 'foreach', 'fused'])
def test_refused_before_state_is_made(way):
    "A gradient that a vector cannot have: matrices, which are planned first, have no state afterwards"
    params = [torch.ones(4, 5).requires_grad_(), torch.ones(3).requires_grad_()]
    opt = build('Muon', params, way)
    params[0].grad, params[1].grad = torch.ones(4, 5), torch.ones(3).to_sparse()
    with pytest.raises(RuntimeError, match='sparse'): opt.step()
    assert not any(opt.state[p] for p in params)
