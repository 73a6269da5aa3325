"Every optimizer on every backend does what fastai's own does"
import itertools
from typing import NamedTuple

import pytest
from common import *

WD = dict(no_wd={}, true_wd=dict(wd=.1, decouple_wd=True), l2=dict(wd=.1, decouple_wd=False))

@pytest.fixture(autouse=True)
def one_thread():
    with threads(1): yield

class Config(NamedTuple):
    name:str # Of the optimizer
    dtype:torch.dtype
    wd:str # A key of `WD`
    groups:int # Parameter groups; if more than one, with discriminative learning rates
    do_wd:str # 'all', or 'some' if norm layers and biases are exempt
    mom:float # At construction

    @property
    def has_big(self):
        "Is there a tensor of more than one block? Where most differs between parameters, and not everywhere, for it takes time"
        return self.groups > 1 and self.do_wd == 'some' and self.dtype == torch.float32

    def __str__(self): return f"{self.name}-{str(self.dtype)[6:]}-{self.wd}-{self.groups}group{'s'*(self.groups>1)}-{self.do_wd}-mom{self.mom}"

CONFIGS = [Config(name, *c) for name in NAMES
           for c in combinations(name, (torch.float32, torch.float64), tuple(WD), (1, 3), ('all', 'some'), moms(name))]

def make(c, way):
    shapes = SHAPES if c.has_big else SMALL
    params = make_params(shapes, c.dtype)
    opt = build(c.name, split(params, c.groups), way, lr=.01 if c.groups == 1 else slice(1e-4, 1e-2), mom=c.mom, **{'wd': 0., **WD[c.wd]})
    if c.do_wd == 'some':
        for k,p in zip(shapes, params):
            if k in ('vector', 'scalar', 'big'): opt.state[p]['do_wd'] = False
    return opt, params

def run(c, way):
    opt, params = make(c, way)
    grads = make_grads(tuple(map(tuple, map(Tensor.size, params))), c.dtype)
    with threads(2 if c.has_big and way == 'fused' else 1):
        return snapshot_without_grads(lambda opt, params: train(opt, params, grads, one_cycle(opt)), opt, params)

@lru_cache(4)
def run_native(c): return run(c, 'native')

@pytest.mark.parametrize('c,way', [pytest.param(c, way, id=f'{c}-{way}') for c in CONFIGS for way in BACKENDS])
def test_hundred_steps_of_one_cycle(c, way):
    "Parameters, slots, step counts and hyperparameters after 100 steps, and gradients after each"
    got = run(c, way)
    assert_same(run_native(c), got, tolerance(c.name, way, c.has_big), turns(c.name))
    assert all(torch.isfinite(p).all() for p in got['params'])

VARIANTS = [ # optimizer, what differs from the defaults, the backends that have it
    ('SGD',     dict(mom=.99, wd=.5), BACKENDS),
    ('RMSProp', dict(sqr_mom=.9, eps=1e-3, wd=.5), BACKENDS),
    ('Adam',    dict(mom=0., sqr_mom=.999, eps=1e-8), BACKENDS),
    ('Adam',    dict(sqr_mom=0.), BACKENDS),
    ('RAdam',   dict(sqr_mom=.999, eps=1e-8), BACKENDS),
    ('RAdam',   dict(eps=0.), BACKENDS),
    ('RAdam',   dict(sqr_mom=.5), BACKENDS), # never rectified
    ('RAdam',   dict(beta=50.), BACKENDS),
    ('RAdam',   dict(beta=1., wd=.1, decouple_wd=False), BACKENDS),
    ('QHAdam',  dict(nu_1=0.), BACKENDS),
    ('QHAdam',  dict(nu_1=1.), BACKENDS),
    ('QHAdam',  dict(nu_2=.5, mom=.9), BACKENDS),
    ('Larc',    dict(clip=False), BACKENDS),
    ('Larc',    dict(clip=False, mom=0., trust_coeff=1e-3, wd=.1, decouple_wd=False), BACKENDS),
    ('Lamb',    dict(wd=.5), BACKENDS),
    ('Ranger',  dict(k=1), BACKENDS),
    ('Ranger',  dict(k=3, alpha=.8, mom=.9), BACKENDS),
    ('Ranger',  dict(alpha=0.), BACKENDS),
    ('Ranger',  dict(alpha=1.), BACKENDS),
]

def show(kwargs): return ','.join(f'{k}={v}' for k,v in kwargs.items())

def assert_same_after(name, way, steps, shapes=SMALL, n_groups=1, **kwargs):
    "The same parameters and state on native and on `way` after `steps(opt, params)`"
    def run(way):
        params = make_params(shapes)
        return snapshot_without_grads(steps, build(name, split(params, n_groups), way, **kwargs), params)
    assert_same(run('native'), run(way), TOLERANCE[way])

def small_grads(steps=100): return make_grads(tuple(SMALL.values()), steps=steps)

@pytest.mark.parametrize('name,kwargs,way', [pytest.param(name, kwargs, way, id=f'{name}-{show(kwargs)}-{way}')
                                             for name,kwargs,ways in VARIANTS for way in ways])
def test_variant(name, kwargs, way):
    "Hyperparameters and settings away from their defaults, and constant"
    assert_same_after(name, way, lambda opt, params: train(opt, params, small_grads()), **kwargs)

each_name = pytest.mark.parametrize('name', NAMES)
each_way = pytest.mark.parametrize('way', BACKENDS)

@each_name
@each_way
def test_every_hyper_of_each_group(name, way):
    "All hyperparameters differ between groups, but those of what is estimated for all groups together"
    common = OPTIMIZERS[name].composition().common
    def steps(opt, params):
        for k,v in opt.hypers[0].items(): opt.set_hyper(k, [v*f for f in ((1., .9, .7) if k not in common else (1., 1., 1.))])
        train(opt, params, small_grads())
    assert_same_after(name, way, steps, n_groups=3)

@each_name
@each_way
def test_gradients_that_come_and_go(name, way):
    "Each parameter misses other steps, one starts late and one has none: bias corrections are each parameter's own"
    grads = [[None if i == 4 or (t+i)%(i+2) == 0 or (i == 0 and t < 20) else g for i,g in enumerate(gs)] for t,gs in enumerate(small_grads())]
    assert_same_after(name, way, lambda opt, params: train(opt, params, grads), n_groups=3)

@each_name
@each_way
def test_zeros(name, way):
    "Parameters of zeros, gradients of zeros, and both: where norms vanish"
    def steps(opt, params):
        with torch.no_grad(): params[0].zero_(); params[1].zero_()
        train(opt, params, [[g*0 if i in (1, 2) else g for i,g in enumerate(gs)] for gs in small_grads(10)])
    assert_same_after(name, way, steps)

@each_name
@each_way
@pytest.mark.parametrize('value', [math.nan, math.inf, -math.inf])
def test_gradients_that_are_not_finite(name, way, value):
    "They spread as far as in native, and no further; only that an average may be NaN where native's is infinite"
    grads = [[g.clone() for g in gs] for gs in small_grads(10)]
    grads[4][0][2, 1] = value
    def run(way):
        params = make_params(SMALL)
        snap = snapshot_without_grads(lambda opt, params: train(opt, params, grads), build(name, params, way), params)
        for ts in (snap['params'], *(s.values() for s in snap['states'])):
            for t in ts:
                if isinstance(t, Tensor): t[~t.isfinite()] = math.nan
        return snap
    expected = run('native')
    assert any(t.isnan().any() for t in (expected['params'][0], *expected['states'][0].values()) if isinstance(t, Tensor))
    assert_same(expected, run(way), TOLERANCE[way])

@each_name
@each_way
def test_switched_while_training(name, way):
    "`do_wd` and `wd` change between steps"
    def steps(opt, params):
        for t,gs in enumerate(small_grads(30)):
            opt.state[params[t%3]]['do_wd'] = t%2 == 0
            opt.set_hyper('wd', .1*(t%4))
            step_with(opt, params, gs)
    assert_same_after(name, way, steps)

@each_name
@each_way
def test_mixed_dtypes(name, way):
    "float32 and float64 parameters in one group"
    dtypes = [torch.float32, torch.float64]*3
    def run(way):
        params = [p.to(d) for p,d in zip(make_params(SMALL), dtypes)]
        grads = [[g.to(d) for g,d in zip(gs, dtypes)] for gs in small_grads()]
        return snapshot_without_grads(lambda opt, params: train(opt, params, grads), build(name, params, way), params)
    assert_same(run('native'), run(way), TOLERANCE[way])

# Parameters that are not each in its own memory: functions that return them, and how to set their gradients
def listed_twice():
    p, q = make_params([(5, 7), (10,)])
    return [p, q, p]

def views():
    "Two parameters of one storage, that do not overlap, and one that overlaps with the second"
    whole = make_params([(30,)])[0]
    return [whole[:10].detach(), whole[10:25].detach(), whole[20:].detach()]

def strided():
    "Not dense, transposed, and in channels last"
    a, b, c = make_params([(6, 8), (5, 7), (4, 3, 2, 2)])
    return [a[::2, ::3].detach(), b.t().detach(), c.to(memory_format=torch.channels_last)]

@each_name
@each_way
@pytest.mark.parametrize('make', [listed_twice, views, strided])
def test_memory(name, way, make):
    "In the order of the list where parameters share memory, as native does"
    def run(way):
        params = make()
        grads = make_grads(tuple(tuple(p.shape) for p in params), steps=20)
        opt = build(name, params, way)
        for gs in grads:
            set_grads(params, gs)
            opt.step()
        return {k: v for k,v in snapshot(opt, params).items() if k != 'grads'}
    assert_same(run('native'), run(way), TOLERANCE[way])

def rounded(opt, params, dtype):
    "Everything a 16-bit optimizer would have stored, as float32"
    slow = [s for pg in lookahead(opt).get('slow_weights', []) for s in pg]
    ts = [*params, *slow, *(v for s in states(opt, params) for k,v in s.items() if isinstance(v, Tensor) and k in known_slots())]
    for t in ts: t.data.copy_(t.to(dtype))
    return ts

@each_name
@pytest.mark.parametrize('wd', WD)
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=['bfloat16', 'float16'])
def test_fused_in_16_bits(name, dtype, wd):
    """A step is computed in float32 and rounded once, so it is a step of native in float32, rounded.
    Every step starts from the same state; a few results, not more than 1 in 200, may be rounded to the other of two neighbours"""
    def start(way, dtype):
        params = [p.to(dtype) for p in make_params(SMALL, torch.bfloat16)]
        return build(name, split(params, 3), way, lr=slice(1e-3, 1e-1), **{'wd': 0., **WD[wd]}), params
    (ref, ref_params), (opt, params) = start('native', torch.float32), start('fused', dtype)
    total = moved = 0
    for gs in make_grads(tuple(SMALL.values()), dtype, steps=30):
        step_with(ref, ref_params, [g.float() for g in gs])
        step_with(opt, params, gs)
        expected, got = rounded(ref, ref_params, dtype), rounded(opt, params, dtype)
        for a,b in zip(expected, got):
            assert b.dtype == dtype
            if not a.numel(): continue
            ulp = torch.finfo(dtype).eps*a.abs().clamp(min=torch.finfo(dtype).smallest_normal)
            assert ((a - b.float()).abs() <= ulp + torch.finfo(torch.float32).eps*a.abs().max()).all()
            total, moved = total + a.numel(), moved + int((a != b.float()).sum())
            b.data.copy_(a)
    assert moved <= total/200
    assert all(s.get('step') == r.get('step') for s,r in zip(states(opt, params), states(ref, ref_params)))

@each_name
@pytest.mark.parametrize('way', ['foreach', 'jit'])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=['bfloat16', 'float16'])
def test_16_bits_as_good_as_native(name, way, dtype):
    "Step by step in 16 bits, as native does, with errors no greater than three times native's"
    def run(way, dtype):
        params = [p.to(dtype) for p in make_params(SMALL, torch.bfloat16)]
        train(build(name, params, way), params, [[g.to(dtype) for g in gs] for gs in make_grads(tuple(SMALL.values()), dtype, steps=30)])
        return torch.cat([p.flatten() for p in params]).double()
    exact = run('native', torch.float64)
    def error(way): return float((run(way, dtype) - exact).norm())
    assert error(way) <= 3*error('native')
