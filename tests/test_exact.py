"""`weights='exact'`: bfloat16 parameters and the bits that they lose are, together, the float32 weights of a training in float32, bit for bit.
`weights='near'` and `weights='stochastic'`: the same weights, rounded after each step"""

import pytest

from common import *

from fastxtend.optimizer.attach import Attachment, average_weights, clear_gradients, clip_gradients
from fastxtend.optimizer.formats import BLOCK, EXACT, LOST, STAMPS, WEIGHTS
from fastxtend.optimizer.modifiers import cautious, cautious_decay, lookahead

on_cpu = pytest.mark.skipif(INTERPRETS, reason="of the kernels for CPUs")
pytestmark = pytest.mark.skipif(not hasattr(Tensor, 'grad_dtype'), reason="float32 parameters have no bfloat16 gradients in this PyTorch, and what to compare with needs them")
LAID = {**SMALL, 'many': (30, 37)}

def rounded(shapes=LAID, seed=0): return [p.bfloat16() for p in make_params(shapes, seed=seed)]

def pair(name, shapes=LAID, weights='exact', **kwargs):
    "The optimizer on bfloat16 parameters with lost bits, and on float32 ones"
    params = rounded(shapes)
    make = name if callable(name) else constructor(name)
    full = [p.float() for p in params]
    for q in full: q.grad_dtype = torch.bfloat16 # which product of two is part of a fused multiply-add depends on the dtypes
    return make(params, lr=.01, fused=True, weights=weights, **kwargs), params, make(full, lr=.01, fused=True, **kwargs), full

def grads(steps, shapes=LAID): return [[g.bfloat16() for g in gs] for gs in make_grads(tuple(shapes.values()), steps=steps)]

def step_both(opt, params, other, full, gs):
    step_with(opt, params, gs); step_with(other, full, gs)

def assert_equal(opt, params, other, full):
    for p,q in zip(params, full):
        assert p.dtype == torch.bfloat16 and torch.equal(opt.weights_of(p), q)
        assert ((p.float() - q).abs() <= torch.finfo(torch.bfloat16).eps/2*q.abs()).all() # rounded to nearest
        for k,v in other.state[q].items(): assert torch.equal(opt.state[p][k], v) if isinstance(v, Tensor) else opt.state[p][k] == v, k
    if getattr(other, 'slow_weights', None): assert all(torch.equal(a, b) for xs,ys in zip(opt.slow_weights, other.slow_weights) for a,b in zip(xs, ys))

def backends(opt): return {o.backend for o in opt.backend_report()}

@on_cpu
@pytest.mark.parametrize('name', NAMES if SOAK else ('SGD', 'Adam', 'Lamb', 'Ranger', 'Lion', 'ADOPT', 'ScheduleFreeAdam'))
def test_equals_float32(name):
    "A thousand steps with a schedule; the state too"
    both = opt, params, other, full = pair(name, wd=.1)
    few, anneals = grads(100), [one_cycle(o) for o in (opt, other)]
    for t in range(1000):
        for anneal in anneals: anneal(t/1000)
        for p,q,g in zip(params, full, few[t % 100]): p.grad = q.grad = g
        opt.step(); other.step()
    assert_equal(*both)
    assert backends(opt) == {'numba'}
    assert any((opt.state[p][LOST] != 0).any() for p in params)

class Rounding:
    "What `weights` does to float32 weights after each step, in plain PyTorch"
    def __init__(self, weights, params): self.fmt, self.params, self.kept = WEIGHTS[weights], deepcopy(params), [WEIGHTS[weights].start(p) for p in params]
    def __call__(self, full):
        for q,p,kept in zip(full, self.params, self.kept):
            self.fmt.split(q.detach(), p, *kept)
            q.data.copy_(self.fmt.join(p, *kept))

def assert_rounded(opt, params, other, full, rounding):
    for p,q,r,kept in zip(params, full, rounding.params, rounding.kept):
        assert torch.equal(p, r) and torch.equal(opt.weights_of(p), q)
        for n,t in zip(rounding.fmt.names('p'), kept): assert torch.equal(opt.state[p][n], t), n
        for k,v in other.state[q].items(): assert torch.equal(opt.state[p][k], v) if isinstance(v, Tensor) else opt.state[p][k] == v, k

@on_cpu
@pytest.mark.parametrize('weights', ('near', 'stochastic'))
@pytest.mark.parametrize('name', NAMES if SOAK else ('SGD', 'Lamb', 'Ranger', 'Lion', 'ScheduleFreeAdam'))
def test_equals_float32_that_is_rounded(name, weights):
    both = opt, params, other, full = pair(name, weights=weights, wd=.1)
    rounding = Rounding(weights, params)
    for gs in grads(20):
        step_both(*both, gs)
        rounding(full)
    assert_rounded(*both, rounding)
    assert backends(opt) == {'numba'}

@on_cpu
def test_steps_that_bfloat16_cannot_hold():
    "They come to what they should on average, again and again in the same way; rounded to nearest, nothing moves"
    def moved(**kwargs):
        p = torch.ones(200*BLOCK, dtype=torch.bfloat16)
        opt = constructor('SGD')([p], 1e-4, mom=0., fused=True, **kwargs)
        for _ in range(100): step_with(opt, [p], [torch.ones_like(p)])
        return p
    p = moved(weights='stochastic')
    assert abs(float((1 - p.float()).mean()) - .01) < 2e-4 and p.unique().numel() > 3
    assert torch.equal(p, moved(weights='stochastic')) and torch.equal(moved(), torch.ones_like(p))

@on_cpu
@pytest.mark.parametrize('modify', [cautious, cautious_decay, lookahead], ids=lambda f: f.__name__)
def test_modifiers(modify):
    both = pair(lambda params, lr, **flags: modify(helper('Adam')(**flags))(params, lr=lr))
    for gs in grads(14): step_both(*both, gs)
    assert_equal(*both)

@on_cpu
def test_state_in_bfloat16_too():
    both = pair('Adam', state='bfloat16')
    for gs in grads(14): step_both(*both, gs)
    assert_equal(*both)

@on_cpu
def test_attachments():
    "Clip, average and clear in the same step"
    both = opt, params, other, full = pair('Adam')
    averages = [torch.zeros_like(q) for q in full], [torch.zeros_like(q) for q in full]
    for gs in grads(5):
        set_grads(params, gs); set_grads(full, gs)
        for o,ps,average in zip((opt, other), (params, full), averages):
            o.attached.update(clip=Attachment((clip_gradients,), scalars=dict(clip_norm=.5), over=ps), clear=Attachment(last=(clear_gradients,)),
                              average=Attachment(last=(average_weights,), scalars=dict(average_weight=.1), lend=dict(average=lambda _, a=average: a)))
            o.step()
            assert all((p.grad == 0).all() for p in ps) and backends(o) == {'numba'}
    assert_equal(*both)
    for a,b in zip(*averages): assert torch.equal(a, b)

@on_cpu
@pytest.mark.parametrize('name', ('ScheduleFreeAdam', 'ScheduleFreeSGD'))
def test_schedule_free_goes_to_its_average_and_back(name):
    both = opt, params, other, full = pair(name)
    for gs in grads(6):
        step_both(*both, gs)
        for go in ('eval', 'train'):
            for o in (opt, other): getattr(o, go)()
            assert_equal(*both)

@on_cpu
def test_lookahead_of_parameters_without_gradients():
    both = opt, params, other, full = pair('Ranger')
    for gs in grads(13):
        for p,q,g in zip(params[1:], full[1:], gs[1:]): p.grad = q.grad = g
        opt.step(); other.step()
    assert_equal(*both)

# --- Others write weights

def _load(p): torch.nn.ParameterList([p]).load_state_dict({'0': torch.randn(p.shape)})
def _swap(p): p.data, p.average = torch.randn_like(p), p.data
WRITES = dict(load=_load, swap=_swap, copy_data=lambda p: p.data.copy_(torch.randn(p.shape)), zero=lambda p: p.data.zero_(), prune=lambda p: p.data.mul_(torch.rand(p.shape) < .5),
              flip=lambda p: p.data.copy_(p.data.flip(-1)), ulp=lambda p: p.data.view(torch.int16).add_(1), through_numpy=lambda p: p.data.view(torch.int16).numpy().fill(7),
              negate=lambda p: p.data.neg_())

@on_cpu
@pytest.mark.parametrize('write', WRITES)
def test_what_others_write_has_lost_nothing(write):
    "Kernel and plain code agree that these weights are what they are"
    shapes = dict(matrix=(40, 13), blocks=(3, BLOCK), small=(5,))
    opt, params, _, _ = pair('Adam', shapes)
    for gs in grads(5, shapes): step_with(opt, params, gs)
    for p in params: p.requires_grad_(False); WRITES[write](p); p.requires_grad_()
    fresh = [p.detach().float() for p in params]
    for p,q in zip(params, fresh): assert torch.equal(opt.weights_of(p), q)
    for q in fresh: q.grad_dtype = torch.bfloat16
    other = constructor('Adam')(fresh, .01, fused=True)
    for p,q in zip(params, fresh): other.state[q] = {k: deepcopy(v) for k,v in opt.state[p].items() if k not in EXACT.beside}
    for gs in grads(3, shapes): step_both(opt, params, other, fresh, gs)
    assert_equal(opt, params, other, fresh)

@on_cpu
def test_a_write_concerns_its_block_only():
    p = torch.randn(5*BLOCK + 9).bfloat16()
    opt = constructor('SGD')([p], .01, fused=True, weights='exact')
    for gs in grads(3, dict(p=p.shape)): step_with(opt, [p], gs)
    before = opt.weights_of(p)
    p[2*BLOCK + 5] = 0.
    changed = opt.weights_of(p) != before
    assert changed[2*BLOCK:3*BLOCK].any() and not changed[:2*BLOCK].any() and not changed[3*BLOCK:].any()

def test_every_number_comes_back():
    "All float32 numbers at the edges of all upper halves; NaN stays NaN, and is one for the model too"
    upper = torch.arange(2**16, dtype=torch.int64)
    for lower in (0, 1, 0x7fff, 0x8000, 0x8001, 0xffff):
        x = ((upper << 16) + lower).to(torch.int32).view(torch.float32)
        p = torch.empty(2**16, dtype=torch.bfloat16)
        kept = EXACT.start(p)
        EXACT.split(x, p, *kept)
        y = EXACT.join(p, *kept)
        finite = ~x.isnan()
        assert torch.equal(y[finite].view(torch.int32), x[finite].view(torch.int32)) and y[~finite].isnan().all() and p[~finite].isnan().all()
        if lower != 0x8000: assert torch.equal(p[finite], x[finite].bfloat16())

# --- Layouts, other engines, other parameters

@on_cpu
def test_what_no_kernel_takes():
    "ForEach keeps the lost bits as well"
    both = opt, params, other, full = pair('Adam', dict(matrix=(24, 16)))
    for gs in grads(4, dict(matrix=(16, 24))): step_both(*both, [g.t() for g in gs])
    assert backends(opt) == backends(other) == {'foreach'}
    assert_equal(*both)

@on_cpu
def test_layout_changes():
    "Weights that are laid out anew keep what they lost"
    shapes = dict(conv=(8, 6, 3, 3))
    both = opt, params, other, full = pair('Adam', shapes)
    for t,gs in enumerate(grads(8, shapes)):
        if t in (3, 6):
            for p in (*params, *full): p.data = p.data.contiguous(memory_format=torch.channels_last if t == 3 else torch.contiguous_format)
        laid = [g.contiguous(memory_format=torch.channels_last) if 3 <= t < 6 else g for g in gs]
        step_both(*both, laid)
        assert backends(opt) == {'numba'}
    assert_equal(*both)

@on_cpu
def test_among_float32_parameters():
    "Norms may stay in float32: they have no lost bits, and step in the same optimizer"
    p, q = rounded(dict(a=(9, 20)))[0], torch.ones(20)
    opt = constructor('Adam')([p, q], .01, fused=True, weights='exact')
    for gs in grads(4, dict(a=(9, 20), b=(20,))): step_with(opt, [p, q], [gs[0], gs[1].float()])
    assert backends(opt) == {'numba'} and set(EXACT.beside) <= set(opt.state[p]) and not set(EXACT.beside) & set(opt.state[q])
    assert q.dtype == torch.float32 and opt.weights_of(q) is q

@on_cpu
def test_twice_in_a_list_and_tied():
    both = opt, params, other, full = pair('Adam', dict(a=(9, 20)))
    for o,ps in ((opt, params), (other, full)): o.param_lists[0] = L([*ps, *ps])
    for gs in grads(4, dict(a=(9, 20))): step_both(*both, gs)
    assert_equal(*both)

@on_cpu
@pytest.mark.parametrize('name,weights,expected', [('SGD', 'exact', 6), ('Adam', 'exact', 14), ('AdEMAMix', 'exact', 18), ('Adam', 'near', 13), ('Adam', 'stochastic', 12)])
def test_bytes_of_a_parameter(name, weights, expected):
    "Weights, gradients, lost bits, state; and a stamp or count a block"
    opt, params, _, _ = pair(name, dict(a=(40, 128), b=(3*BLOCK,)), weights)
    for p in params: p.grad = torch.ones_like(p)
    opt.step()
    n = sum(p.numel() for p in params)
    total = sum(t.nbytes for p in params for t in (p, p.grad, *opt.state[p].values()) if isinstance(t, Tensor))
    assert total == expected*n + 4*n//BLOCK

# --- Checkpoints

@on_cpu
@pytest.mark.parametrize('name,weights', [('Adam', 'exact'), ('Ranger', 'exact'), ('ScheduleFreeAdam', 'exact'), ('Adam', 'near'), ('Adam', 'stochastic')])
def test_resumes_bit_for_bit(name, weights):
    "In either order of weights and state; of other weights, nothing is taken to be lost"
    opt, params, _, _ = pair(name, weights=weights)
    for gs in grads(9)[:4]: step_with(opt, params, gs)
    sd, saved = saved_and_loaded(opt.state_dict()), saved_and_loaded([p.detach() for p in params])
    fresh = [torch.zeros_like(p) for p in params]
    again = constructor(name)(fresh, .01, fused=True, weights=weights)
    again.load_state_dict(sd)
    for p in fresh: assert torch.equal(again.weights_of(p), p.float()) # they are others
    for p,w in zip(fresh, saved): p.data.copy_(w)
    for p,q in zip(params, fresh): assert torch.equal(opt.weights_of(p), again.weights_of(q))
    for gs in grads(9)[4:]:
        for o,ps in ((opt, params), (again, fresh)): step_with(o, ps, gs)
    for p,q in zip(params, fresh): assert torch.equal(opt.weights_of(p), again.weights_of(q))
    opt.clear_state()
    for p,q in zip(params, fresh): assert torch.equal(opt.weights_of(p), again.weights_of(q)) # belongs to the weights

@on_cpu
@pytest.mark.parametrize('other', [dict(), dict(foreach=True), dict(fused=True), dict(fused=True, state='bfloat16')], ids=['native', 'foreach', 'fused', 'bfloat16'])
def test_checkpoints_both_ways(other):
    "Other formats leave lost bits where they are, and the way back begins with none"
    opt, params, _, _ = pair('Adam')
    for gs in grads(4): step_with(opt, params, gs)
    full = [opt.weights_of(p).clone() for p in params]
    wide = constructor('Adam')(full, .01, **other)
    wide.load_state_dict(saved_and_loaded(opt.state_dict()))
    step_with(wide, full, [g.float() for g in grads(4)[0]])
    if 'fused' in other or 'foreach' in other: assert not any(set(EXACT.beside) & set(wide.state[q]) for q in full)
    back = constructor('Adam')([q.bfloat16() for q in full], .01, fused=True, weights='exact')
    back.load_state_dict(saved_and_loaded(wide.state_dict()))
    ps = list(back.all_params(with_grad=False).itemgot(0))
    for p in ps: assert torch.equal(back.weights_of(p), p.float())
    step_with(back, ps, grads(4)[1])

@on_cpu
def test_checkpoints_between_weights():
    "What belongs to weights in another format is left where it is"
    for a,b in [(a, b) for a in WEIGHTS for b in WEIGHTS if a != b]:
        opt, params, _, _ = pair('Adam', weights=a)
        for gs in grads(3): step_with(opt, params, gs)
        again = constructor('Adam')([p.clone() for p in params], .01, fused=True, weights=b)
        again.load_state_dict(saved_and_loaded(opt.state_dict()))
        ps = list(again.all_params(with_grad=False).itemgot(0))
        for p,q in zip(params, ps): assert torch.equal(again.weights_of(q), p.float()) and torch.equal(again.state[q]['grad_avg'], opt.state[p]['grad_avg'])
        step_with(again, ps, grads(1)[0])

@on_cpu
def test_lost_bits_of_another_model():
    opt, params, _, _ = pair('Adam')
    step_with(opt, params, grads(1)[0])
    for n,t in ((LOST, torch.zeros(3, dtype=torch.int16)), (LOST, torch.zeros(LAID['conv'])), (STAMPS, torch.zeros(9, dtype=torch.int32)), (STAMPS, None)):
        sd = opt.state_dict()
        sd['state'][0] = {**sd['state'][0], n: t}
        with pytest.raises(ValueError, match=f"'{n}'.*another model"): opt.load_state_dict(sd)

@pytest.mark.parametrize('kwargs,error', [(dict(weights='exact'), 'use `fused=True`'), (dict(weights='exact', foreach=True), 'use `fused=True`'), (dict(weights='half', fused=True), "'exact'"),
    (dict(weights=True, fused=True), "'exact'")])
def test_refused(kwargs, error):
    with pytest.raises(ValueError, match=error): helper('Adam')(**kwargs)

@on_cpu
def test_float16_has_no_lower_half():
    with pytest.raises(ValueError, match='bfloat16'): constructor('Adam')([torch.ones(3).half()], .01, fused=True, weights='exact')

@on_cpu
@pytest.mark.parametrize('formats', [dict(weights='exact'), dict(state='int8')], ids=['exact', 'int8'])
def test_sharded_parameters_are_refused(formats):
    "Before anything is changed"
    p = torch.ones(5000).bfloat16()
    opt = constructor('Adam')([p], .01, fused=True, **formats)
    p.full_tensor, p.grad = lambda: p, torch.ones_like(p) # what a `DTensor` is known by
    with pytest.raises(NotImplementedError, match='sharded'): opt.step()
    assert not opt.state[p] and torch.equal(p, torch.ones_like(p))

# --- In Triton's interpreter

@on_cpu
def test_interpreted():
    if not has_triton(): pytest.skip("the kernels need Triton 3.5 or later")
    assert '5 passed' in run_interpreted(__file__, '-k', 'on_gpus')

@pytest.mark.skipif(not INTERPRETS, reason="run by test_interpreted")
@pytest.mark.parametrize('name', ('Adam', 'Lamb', 'Ranger'))
def test_on_gpus(name, on_cpu_tensors):
    shapes = dict(matrix=(5, 7), scalar=(), empty=(0,), many=(33, 40), whole=(2048,))
    both = opt, params, other, full = pair(name, shapes)
    for t,gs in enumerate(grads(7, shapes)):
        if t == 4: # one block of one parameter is written
            with torch.no_grad(): params[3].view(-1)[200] = 0.
            full[3].data.copy_(opt.weights_of(params[3]))
        step_both(*both, gs)
        if t < 6 or name != 'Ranger': assert_equal(*both)
    assert backends(opt) == {'triton'}

@pytest.mark.skipif(not INTERPRETS, reason="run by test_interpreted")
@pytest.mark.parametrize('weights', ('near', 'stochastic'))
def test_rounded_on_gpus(weights, on_cpu_tensors):
    shapes = dict(matrix=(5, 7), empty=(0,), many=(33, 40), whole=(2048,))
    both = opt, params, other, full = pair('Adam', shapes, weights)
    rounding = Rounding(weights, params)
    for gs in grads(5, shapes):
        step_both(*both, gs)
        rounding(full)
    assert_rounded(*both, rounding)
    assert backends(opt) == {'triton'}
