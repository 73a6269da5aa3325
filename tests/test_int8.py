"`state='int8'`: a step is one in float64 whose results are a code away at most, and nothing drifts"

import pytest

from common import *

from fastxtend.optimizer.attach import Attachment, average_weights, clear_gradients, clip_gradients
from fastxtend.optimizer.core import COARSE
from fastxtend.optimizer.formats import BLOCK, ROOTS, SCALES, SMALLEST, WEIGHTS, top_of
from fastxtend.optimizer.modifiers import cautious, cautious_decay, lookahead
from fastxtend.optimizer.steppers import compose, slot, stepper
from test_formats import as_double, params_of, twin_of

on_cpu = pytest.mark.skipif(INTERPRETS, reason="of the kernels for CPUs")
LARGE = dict(matrix=(70, 61), conv=(16, 33, 3, 3), many=(COARSE + 1,), small=(9, 7))

def codes(opt, p): return {k: t for k,t in opt.state[p].items() if isinstance(t, Tensor) and t.dtype in ROOTS}
def numbers(opt, p):
    "State in full"
    return {k: ROOTS[t.dtype].join(t, opt.state[p][f'{k}_{SCALES}']) if k in codes(opt, p) else t for k,t in opt.state[p].items() if not k.endswith(SCALES)}

def by_block(t): return torch.nn.functional.pad(t.flatten(), (0, -t.numel() % BLOCK)).view(-1, BLOCK)

def assert_a_code_away(exact, t, scales):
    "Codes are those below or above; of the greatest in each block, exact ones"
    top, exact = top_of(t.dtype), by_block(exact.double())
    greatest = exact.abs().amax(1)
    torch.testing.assert_close(scales.double(), greatest.clamp(min=SMALLEST), rtol=1e-5, atol=1e-4*float(greatest.max()))
    want = (exact.abs()/scales.double()[:, None]).sqrt()*top
    got = by_block(t).double()
    assert ((got.abs() - want).abs() <= 1.01 + .02*(t.dtype == torch.int8)).all()
    clear = want > 1.1
    if t.dtype == torch.int8: assert (got.sign() == exact.sign())[clear].all()
    else: assert (got > 0)[exact > 0].all()

def follow(twin, opt, params):
    for q,p in zip(params_of(twin), params):
        q.data.copy_(p)
        twin.state[q] = {k: as_double(v) if isinstance(v, Tensor) else v for k,v in numbers(opt, p).items()}
    if getattr(opt, 'slow_weights', None) is not None: twin.slow_weights = [list(map(as_double, pg)) for pg in opt.slow_weights]
    return params_of(twin)

def assert_follows(opt, params, shapes, steps):
    twin = twin_of(opt, params)
    for gs in make_grads(tuple(shapes.values()), steps=steps):
        qs = follow(twin, opt, params)
        step_with(opt, params, gs); step_with(twin, qs, [g.double() for g in gs])
        for p,q in zip(params, qs):
            torch.testing.assert_close(p.detach().double(), q.detach(), rtol=1e-5, atol=1e-5)
            for k,t in codes(opt, p).items(): assert_a_code_away(twin.state[q][k], t, opt.state[p][f'{k}_{SCALES}'])

@on_cpu
@pytest.mark.parametrize('name', NAMES if SOAK else ('SGD', 'Adam', 'Lamb', 'Ranger', 'Adan', 'AdEMAMix'))
def test_each_step_is_a_code_away(name):
    params = make_params(LARGE)
    opt = build(name, params, 'fused', state='int8', **(dict(mom=.9) if name in ('SGD', 'RMSProp') else {}))
    assert_follows(opt, params, LARGE, 8)
    assert {o.backend for o in opt.backend_report()} == {'numba'}
    slots, fine = opt.own_slots, OPTIMIZERS[name].fine
    for n,p in zip(LARGE, params):
        assert {k: t.dtype for k,t in codes(opt, p).items()} == {k: torch.int8 if s.signed else torch.uint8 for k,s in slots.items() if n != 'small' and s.start != 'p' and k not in fine}

@stepper('m', m=slot())
def to_slot(g): return g
@stepper('p', m=slot())
def from_slot(m): return m

def run_stage(f, **tensors):
    "A kernel that only copies"
    import numpy as np
    from fastxtend.optimizer.cpu import codecs_of, compiled
    codecs, at = codecs_of({n: t.dtype for n,t in tensors.items()}), np.array([t.data_ptr() for t in tensors.values()])
    compiled(compose([f], name='copy').step, codecs, tuple(tensors), ()).ctypes(at.ctypes.data, 0, tensors['p'].numel(), 0, 0)

@pytest.mark.parametrize('dtype', ROOTS)
def test_adversarial_blocks(dtype):
    "One huge element, all zero, denormals, equal ones; NaN and infinity stay where they are"
    blocks = dict(huge=torch.cat([torch.tensor([1e30]), torch.full((BLOCK-1,), 1e-10)]), zero=torch.zeros(BLOCK), denormal=torch.full((BLOCK,), 1e-40), equal=torch.full((BLOCK,), .3),
                  random=torch.rand(BLOCK), greatest=torch.full((BLOCK,), torch.finfo(torch.float32).max), one=torch.eye(1, BLOCK)[0], nan=torch.rand(BLOCK), inf=torch.rand(BLOCK), last=torch.rand(5))
    blocks['nan'][7], blocks['inf'][9] = math.nan, math.inf
    x = torch.cat(list(blocks.values()))
    for way in ('plain', *(() if INTERPRETS else ('kernel',))):
        t, y = torch.empty(len(x), dtype=dtype), torch.empty(len(x))
        scales, = ROOTS[dtype].start(t)
        if way == 'plain': ROOTS[dtype].split(x, t, scales); y = ROOTS[dtype].join(t, scales)
        else:
            for f in (to_slot, from_slot): run_stage(f, p=y, g=x, m=t, m_scales=scales)
        for (n,a),b in zip(blocks.items(), y.split(BLOCK)):
            if n in ('nan', 'inf'): assert not b.isfinite().any()
            elif n in ('zero', 'denormal'): assert (b <= SMALLEST).all() and (n != 'zero' or (b == 0).all())
            else:
                torch.testing.assert_close(b.max(), a.max(), rtol=1e-5, atol=0)
                assert ((b/a.max()).sqrt() - (a/a.max()).sqrt()).abs().max() <= 1.01/top_of(dtype)

@on_cpu
def test_rounding_is_right_on_average():
    "An average that changes by a hundredth of a code a step gets where it has to"
    p = torch.zeros(COARSE)
    opt = constructor('Adam')([p], 0., fused=True, state='int8', sqr_mom=.99, wd=0.)
    g = torch.linspace(.05, 1., COARSE).view(BLOCK, -1).t().flatten() # all sizes in each block
    for _ in range(600): step_with(opt, [p], [g])
    for k,want in (('grad_avg', g), ('sqr_avg', g*g)):
        got = numbers(opt, p)[k]
        torch.testing.assert_close(got.mean(), want.mean(), rtol=.02, atol=0)
        assert ((got - want).abs() < .15*want + .02).all()

@on_cpu
@pytest.mark.parametrize('dtype,kwargs,most', [(torch.float32, {}, 10.3), (torch.bfloat16, dict(weights='exact'), 8.3), (torch.bfloat16, {}, 6.3)])
def test_bytes_of_a_parameter(dtype, kwargs, most):
    params = make_params(dict(a=(64, 128), b=(COARSE,)), dtype)
    opt = constructor('Adam')(params, .01, fused=True, state='int8', **kwargs)
    step_with(opt, params, [torch.ones_like(p) for p in params])
    total = sum(t.nbytes for p in params for t in (p, p.grad, *opt.state[p].values()) if isinstance(t, Tensor))
    assert most - .3 < total/sum(p.numel() for p in params) <= most

@on_cpu
@pytest.mark.parametrize('other', [dict(), dict(foreach=True), dict(fused=True), dict(fused=True, state='bfloat16')], ids=['native', 'foreach', 'fused', 'bfloat16'])
def test_checkpoints_both_ways(other):
    "Dequantized where it is loaded, and back without a change"
    def trained(**flags):
        params = make_params(LARGE)
        opt = constructor('Adam')(params, .01, **flags)
        for gs in make_grads(tuple(LARGE.values()), steps=3): step_with(opt, params, gs)
        return opt, params
    (opt, params), (wide, wide_params) = trained(fused=True, state='int8'), trained(**other)
    wide.load_state_dict(saved_and_loaded(opt.state_dict() if other else opt.state_dict(full=True)))
    for p,q in zip(params, wide_params):
        assert not any(k.endswith(SCALES) for k in wide.state[q])
        for k,t in numbers(opt, p).items():
            if isinstance(t, Tensor): torch.testing.assert_close(wide.state[q][k], t.to(wide.state[q][k].dtype))
    fresh = constructor('Adam')([p.detach().clone() for p in params], .01, fused=True, state='int8')
    fresh.load_state_dict(saved_and_loaded(wide.state_dict()))
    for a,b in zip(params, params_of(fresh)):
        for k,t in codes(opt, a).items():
            assert fresh.state[b][k].dtype == t.dtype and (fresh.state[b][k].int() - t.int()).abs().max() <= (1 if other.get('state') is None else 2)
    step_with(wide, wide_params, make_grads(tuple(LARGE.values()), steps=1)[0])
    assert all(q.isfinite().all() for q in wide_params)

@on_cpu
@pytest.mark.parametrize('kwargs', [{}, dict(weights='exact')], ids=['float32', 'exact'])
@pytest.mark.parametrize('name', ('Adam', 'Ranger'))
def test_resumes_bit_for_bit(name, kwargs):
    params = make_params(LARGE, torch.bfloat16 if kwargs else torch.float32)
    opt, grads = constructor(name)(params, .01, fused=True, state='int8', **kwargs), [[g.to(params[0].dtype) for g in gs] for gs in make_grads(tuple(LARGE.values()), steps=8)]
    for gs in grads[:4]: step_with(opt, params, gs)
    fresh = [p.detach().clone() for p in params]
    again = constructor(name)(fresh, .01, fused=True, state='int8', **kwargs)
    again.load_state_dict(saved_and_loaded(opt.state_dict()))
    for gs in grads[4:]:
        for o,ps in ((opt, params), (again, fresh)): step_with(o, ps, gs)
    for p,q in zip(params, fresh):
        assert torch.equal(opt.weights_of(p), again.weights_of(q))
        for k,t in opt.state[p].items(): assert torch.equal(t, again.state[q][k]) if isinstance(t, Tensor) else t == again.state[q][k]

@on_cpu
@pytest.mark.parametrize('modify', [cautious, cautious_decay, lookahead], ids=lambda f: f.__name__)
def test_modifiers(modify):
    params = make_params(LARGE)
    opt = modify(helper('Adam')(fused=True, state='int8'))(params, lr=.01)
    assert_follows(opt, params, LARGE, 7)
    assert {o.backend for o in opt.backend_report()} == {'numba'}

@on_cpu
def test_attachments():
    "Clip, average and clear in the same step"
    params, average = make_params(LARGE), make_params(LARGE, seed=3)
    opt = constructor('Lamb')(params, .01, fused=True, state='int8')
    before, gs = deepcopy(average), make_grads(tuple(LARGE.values()), steps=1)[0]
    set_grads(params, gs)
    opt.attached.update(clip=Attachment((clip_gradients,), scalars=dict(clip_norm=.5), over=params), clear=Attachment(last=(clear_gradients,)),
                        average=Attachment(last=(average_weights,), scalars=dict(average_weight=.1), lend=dict(average=lambda ps: average)))
    opt.step()
    assert all((p.grad == 0).all() for p in params) and {o.backend for o in opt.backend_report()} == {'numba'}
    for a,b,p in zip(before, average, params): torch.testing.assert_close(b, a.lerp(p.detach(), .1))

@on_cpu
def test_other_layouts_and_engines():
    "A parameter that is laid out anew takes its state along, and ForEach steps what no kernel takes"
    p, = make_params(dict(conv=(16, 33, 3, 3)))
    opt = constructor('Adam')([p], .01, fused=True, state='int8')
    gs = make_grads(((16, 33, 3, 3),), steps=4)
    step_with(opt, [p], gs[0])
    before = numbers(opt, p)
    opt.state[p] = dict(opt.state[p])
    p.data = p.data.contiguous(memory_format=torch.channels_last)
    step_with(opt, [p], [torch.zeros_like(p)])
    assert [o.backend for o in opt.backend_report()] == ['numba'] and opt.state[p]['grad_avg'].stride() == p.stride()
    after = numbers(opt, p)
    assert (after['grad_avg'] - .9*before['grad_avg']).abs().max() < .05*before['grad_avg'].abs().max()
    step_with(opt, [p], gs[2]) # contiguous
    assert [o.backend for o in opt.backend_report()] == ['foreach'] and set(codes(opt, p)) == {'grad_avg', 'sqr_avg'}
    want = .9*after['grad_avg'] + .1*gs[2][0]
    assert (numbers(opt, p)['grad_avg'] - want).abs().max() < .05*want.abs().max()

@on_cpu
def test_damaged_checkpoints_are_refused():
    params = make_params(LARGE)
    opt = constructor('Adam')(params, .01, fused=True, state='int8')
    step_with(opt, params, make_grads(tuple(LARGE.values()), steps=1)[0])
    for n,t in (('sqr_avg', torch.zeros(3, dtype=torch.uint8)), ('sqr_avg_scales', torch.zeros(3)), ('sqr_avg_scales', None)):
        sd = opt.state_dict()
        sd['state'][0] = {**sd['state'][0], n: t}
        with pytest.raises(ValueError, match='another model'): opt.load_state_dict(sd)

# --- In Triton's interpreter, and compiled ahead of time

@on_cpu
def test_interpreted():
    if not has_triton(): pytest.skip("the kernels need Triton 3.5 or later")
    assert '3 passed' in run_interpreted(__file__, '-k', 'on_gpus')

@pytest.mark.skipif(not INTERPRETS, reason="run by test_interpreted")
@pytest.mark.parametrize('name', ('Adam', 'Lamb', 'Lion'))
def test_on_gpus(name, on_cpu_tensors):
    shapes = dict(many=(COARSE + 77,), small=(5, 7))
    params = make_params(shapes)
    opt = build(name, params, 'fused', state='int8')
    assert_follows(opt, params, shapes, 3)
    assert {o.backend for o in opt.backend_report()} == {'triton'} and codes(opt, params[0])

@on_cpu
@pytest.mark.parametrize('way', ('bfloat16', 'int8', *WEIGHTS, 'exact and int8'))
def test_machine_code(way):
    "Ahead of time: nothing is spilled, and all that is loaded and stored for each element is as wide as can be"
    if not has_triton(): pytest.skip("the kernels need Triton 3.5 or later")
    from fastxtend.optimizer import cuda
    composition = OPTIMIZERS['Adam'].composition()
    weights, coarse = WEIGHTS.get(way.split()[0]), 'int8' in way
    slots = (torch.int8, torch.uint8) if coarse else (torch.bfloat16,)*2 if way == 'bfloat16' else (torch.float32,)*2
    beside = {**(weights.beside if weights else {}), **({f'{n}_scales': torch.float32 for n in ('grad_avg', 'sqr_avg')} if coarse else {})}
    dtypes, others = (*(torch.bfloat16 if weights else torch.float32,)*2, *slots, *beside.values()), tuple(beside)
    code = cuda.compile_ahead(cuda.step_kernel, cuda.constants(composition, 0, dtypes, others), 90)
    assert code.spilled == 0 and code.registers <= 128
