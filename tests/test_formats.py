"State tensors in bfloat16, and tensors of different dtypes in one parameter: a step is one in float64 whose results are rounded once"
import io

import pytest

from common import *

from fastxtend.optimizer.attach import Attachment, average_weights, clear_gradients, clip_gradients
from fastxtend.optimizer.declare import StepperLookahead, StepperOptimizer
from fastxtend.optimizer.modifiers import cautious, cautious_decay, lookahead
from fastxtend.optimizer.plan import compiled
from fastxtend.optimizer.probe import probe

on_cpu = pytest.mark.skipif(INTERPRETS, reason="of the kernels for CPUs")
STEPS, FLOATS = 30, (torch.float32, torch.bfloat16, torch.float16, torch.float64)

def tensors_of(opt, p): return {k: v for k,v in opt.state[p].items() if isinstance(v, Tensor) and v.shape == p.shape and k in opt.slot_names}

def params_of(opt): return list(opt.all_params(with_grad=False).itemgot(0))

def as_double(t): return t.detach().to(torch.float64, copy=True)

def twin_of(opt, params):
    "The steppers one by one on float64 tensors, with the settings that `opt` has"
    cls = StepperLookahead if opt.spec.has_lookahead else StepperOptimizer
    own = dict(k=opt.k, alpha=opt.alpha) if cls is StepperLookahead else {}
    return cls([as_double(p).requires_grad_() for p in params], opt.spec, decouple_wd=opt.decouple_wd, options=opt.options, **own, **opt.hypers[0])

def follow(twin, opt, params):
    "Give `twin` weights and state of `opt`"
    for q,p in zip(params_of(twin), params):
        q.data.copy_(p)
        twin.state[q] = {k: as_double(v) if isinstance(v, Tensor) else v for k,v in opt.state[p].items()}
    if getattr(opt, 'slow_weights', None) is not None: twin.slow_weights = [list(map(as_double, pg)) for pg in opt.slow_weights]
    return params_of(twin)

def assert_rounded_once(exact, t):
    "`t` is `exact` in its dtype, or a neighbour of the nearest where float32 arithmetic took it there. Returns the number of those"
    eps = torch.finfo(t.dtype).eps
    noise = TOLERANCE['fused']*torch.finfo(torch.float32).eps*(exact.abs().max() if exact.numel() else 0.)
    assert ((t.double() - exact).abs() <= eps*exact.abs() + noise).all()
    return 0 if eps < 1e-3 else int(((t.double() - exact).abs() > (eps/2)*exact.abs() + noise).sum())

def assert_follows(opt, params, shapes, steps=STEPS):
    "Each step of `opt` is the twin's, from the same state, rounded once"
    twin = twin_of(opt, params)
    for gs in make_grads(shapes, steps=steps):
        qs = follow(twin, opt, params)
        step_with(opt, params, [g.to(p.dtype) for g,p in zip(gs, params)])
        step_with(twin, qs, [p.grad.double() for p in params])
        for p,q in zip(params, qs):
            assert_rounded_once(q.detach(), p.detach())
            for k,t in tensors_of(opt, p).items(): # by chance, in fewer bits than their parameter has
                assert assert_rounded_once(twin.state[q][k], t) <= (t.numel() if t.dtype == torch.bfloat16 != p.dtype else max(1, t.numel()//200)), k

@on_cpu
@pytest.mark.parametrize('wd', [0., .1])
@pytest.mark.parametrize('name', NAMES)
def test_each_step_is_rounded_once(name, wd):
    params = make_params(SMALL)
    opt = build(name, params, 'fused', wd=wd, state='bfloat16')
    assert_follows(opt, params, tuple(SMALL.values()))
    assert {o.backend for o in opt.backend_report()} == {'numba'}
    slots = opt.spec.composition().slots
    for p in params:
        for k,t in tensors_of(opt, p).items(): assert t.dtype == (torch.float32 if slots[k].start == 'p' else torch.bfloat16)

@on_cpu
@pytest.mark.parametrize('engine', ('numba', 'foreach'))
def test_rounding_is_right_on_average(engine):
    "An average that changes by an eighth of what bfloat16 resolves gets where it has to, and with gradients that are always the same"
    p, steps = torch.ones(64, 64), 1500 if engine == 'numba' else 400
    opt = constructor('Adam')([p], 1e-6, fused=True, state='bfloat16', mom=.99, sqr_mom=.999, wd=0.)
    g = torch.linspace(.05, 1., 64*64).view(64, 64)
    for _ in range(steps): step_with(opt, [p], [g if engine == 'numba' else g.t().contiguous().t()])
    assert {o.backend for o in opt.backend_report()} == {engine}
    for k,want in (('grad_avg', (1 - .99**steps)*g), ('sqr_avg', (1 - .999**steps)*g*g)):
        got = opt.state[p][k].float()
        torch.testing.assert_close(got.mean(), want.mean(), rtol=.02, atol=0)
        assert ((got - want).abs() < .35*want).all()

@on_cpu
@pytest.mark.parametrize('grad', FLOATS[:2])
@pytest.mark.parametrize('slots', FLOATS)
@pytest.mark.parametrize('dtype', FLOATS)
def test_every_mixture(dtype, slots, grad):
    "Parameter, gradient and slots in dtypes of their own are taken by kernels"
    if not hasattr(Tensor, 'grad_dtype'): pytest.skip("PyTorch has gradients of one dtype only")
    p = make_params([(9, 7)], dtype)[0]
    p.grad_dtype = grad
    opt = build('Adam', [p], 'fused')
    opt.state[p].update({k: torch.zeros_like(p, dtype=d, requires_grad=False) for k,d in (('grad_avg', slots), ('sqr_avg', torch.bfloat16))})
    twin = twin_of(opt, [p])
    for g, in make_grads(((9, 7),), steps=3):
        q, = follow(twin, opt, [p])
        step_with(opt, [p], [g.to(grad)]); step_with(twin, [q], [g.to(grad).double()])
        assert_rounded_once(q.detach(), p.detach())
        for k,t in tensors_of(opt, p).items(): assert_rounded_once(twin.state[q][k], t)
    assert [o.backend for o in opt.backend_report()] == ['numba'] and opt.state[p]['grad_avg'].dtype == slots

@pytest.mark.parametrize('dtypes', [(a, b, c) for a in FLOATS for b in FLOATS for c in (torch.float32, torch.int32)], ids=lambda ds: '-'.join(str(d)[6:] for d in ds))
def test_both_looks_agree(dtypes):
    if compiled() is None: pytest.skip("there is no compiled look here")
    tensors = [[torch.ones(3, 4, dtype=d)] for d in dtypes]
    assert np.array_equal(compiled()(*tensors).kinds, probe(*tensors).kinds)

@on_cpu
@pytest.mark.parametrize('name,dtype,state,expected', [('Adam', torch.float32, None, 16), ('Adam', torch.float32, 'bfloat16', 12), ('Larc', torch.float32, 'bfloat16', 10),
    ('AdEMAMix', torch.float32, 'bfloat16', 14), ('ScheduleFreeAdam', torch.float32, 'bfloat16', 14), ('Adam', torch.bfloat16, 'bfloat16', 8), ('Adam', torch.float64, 'bfloat16', 20)])
def test_bytes_of_a_parameter(name, dtype, state, expected):
    "Weights, gradients and state, counted from tensors"
    params = make_params(SMALL, dtype)
    opt = build(name, params, 'fused', state=state)
    step_with(opt, params, [torch.ones_like(p) for p in params])
    assert sum(t.nbytes for p in params for t in (p, p.grad, *tensors_of(opt, p).values())) == expected*sum(p.numel() for p in params)

def through_file(sd):
    file = io.BytesIO()
    torch.save(sd, file)
    file.seek(0)
    return torch.load(file, weights_only=True)

@on_cpu
@pytest.mark.parametrize('other', [dict(), dict(foreach=True), dict(fused=True)], ids=['native', 'foreach', 'fused'])
@pytest.mark.parametrize('name', NAMES)
def test_checkpoints_both_ways(name, other):
    "A checkpoint loads into any backend, in the dtype of its parameters, and back without a loss"
    shapes = tuple(SMALL.values())
    def trained(**flags):
        params = make_params(SMALL)
        opt = constructor(name)(params, .01, **flags)
        for gs in make_grads(shapes, steps=3): step_with(opt, params, gs)
        return opt, params
    (opt, params), (wide, wide_params) = trained(fused=True, state='bfloat16'), trained(**other)
    wide.load_state_dict(through_file(opt.state_dict()))
    for p,q in zip(params, wide_params):
        for k,t in tensors_of(opt, p).items():
            assert torch.equal(wide.state[q][k].float(), t.float())
            if other: assert wide.state[q][k].dtype == torch.float32 # fastai's own keep what they get
    fresh = constructor(name)([p.detach().clone().requires_grad_() for p in params], .01, fused=True, state='bfloat16')
    fresh.load_state_dict(through_file(wide.state_dict()))
    for a,b in zip(params, params_of(fresh)):
        for k,t in tensors_of(opt, a).items(): assert fresh.state[b][k].dtype == t.dtype and torch.equal(fresh.state[b][k], t)
    step_with(wide, wide_params, make_grads(shapes, steps=1)[0])
    assert all(q.isfinite().all() for q in wide_params)
    for gs in make_grads(shapes, steps=8)[3:]: # bit for bit
        for o in (opt, fresh): step_with(o, params_of(o), gs)
    for a,b in zip(params, params_of(fresh)): assert torch.equal(a, b)

@on_cpu
@pytest.mark.parametrize('modify', [cautious, cautious_decay, lookahead], ids=lambda f: f.__name__)
def test_modifiers(modify):
    params = make_params(SMALL)
    opt = modify(helper('Adam')(fused=True, state='bfloat16'))(params, lr=.01)
    for gs in make_grads(tuple(SMALL.values()), steps=7): step_with(opt, params, gs)
    assert {t.dtype for p in params for t in tensors_of(opt, p).values()} == {torch.bfloat16}
    assert {o.backend for o in opt.backend_report()} == {'numba'}

@on_cpu
@pytest.mark.parametrize('name', ('Adam', 'Lamb'))
def test_attachments(name):
    "Clip, average and clear in the same step: as if it was done apart"
    def run(attached):
        params, average = make_params(SMALL), make_params(SMALL, torch.bfloat16, seed=3)
        opt = build(name, params, 'fused', state='bfloat16')
        for gs in make_grads(tuple(SMALL.values()), steps=5):
            set_grads(params, gs)
            if attached: opt.attached.update(clip=Attachment((clip_gradients,), scalars=dict(clip_norm=.5), over=params), clear=Attachment(last=(clear_gradients,)),
                                             average=Attachment(last=(average_weights,), scalars=dict(average_weight=.1), lend=dict(average=lambda ps: average)))
            else: torch.nn.utils.clip_grad_norm_(params, .5)
            opt.step()
            if attached: assert all((p.grad == 0).all() for p in params) and {o.backend for o in opt.backend_report()} == {'numba'}
            else:
                for a,p in zip(average, params): a.data.copy_(a.float().lerp(p, .1))
        return params, average
    for (a,b),tol in zip(zip(run(False), run(True)), (1e-4, 1e-2)):
        for x,y in zip(a, b): torch.testing.assert_close(x, y, rtol=tol, atol=tol/10)

@on_cpu
def test_what_no_kernel_takes_keeps_its_dtype():
    "ForEach takes slots in bfloat16 too, and a slot that is laid out anew is still one"
    p = make_params([(6, 4)])[0]
    opt = build('Adam', [p], 'fused', state='bfloat16')
    step_with(opt, [p], [torch.ones(6, 4)])
    opt.state[p]['grad_avg'] = opt.state[p]['grad_avg'].t().contiguous().t()
    step_with(opt, [p], [torch.ones(6, 4)])
    assert opt.state[p]['grad_avg'].dtype == torch.bfloat16 and opt.state[p]['grad_avg'].is_contiguous()
    assert [o.backend for o in opt.backend_report()] == ['numba']
    step_with(opt, [p], [torch.ones(4, 6).t()])
    assert [o.backend for o in opt.backend_report()] == ['foreach'] and opt.state[p]['grad_avg'].dtype == torch.bfloat16

@on_cpu
def test_interpreted():
    "The kernels for GPUs, in Triton's interpreter"
    if not has_triton(): pytest.skip("the kernels need Triton 3.5 or later")
    assert '2 passed' in run_interpreted(__file__, '-k', 'on_gpus')

@pytest.mark.skipif(not INTERPRETS, reason="run by test_interpreted")
@pytest.mark.parametrize('name', ('Adam', 'Lamb'))
def test_on_gpus(name, on_cpu_tensors):
    params = make_params(SMALL)
    opt = build(name, params, 'fused', state='bfloat16')
    assert_follows(opt, params, tuple(SMALL.values()), 4)
    assert {o.backend for o in opt.backend_report()} == {'triton'}
