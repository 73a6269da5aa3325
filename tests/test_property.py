"""Whatever the parameters look like and whatever happens to them: a fused step does what fastai's native one does, and writes nothing else.

`PROPERTY_EXAMPLES=50000 pytest tests/test_property.py` looks longer than the default."""
import os
from dataclasses import dataclass

from common import *
from hypothesis import HealthCheck, event, given, settings, strategies as st

GUARD, ROOM = -77., 19  # an odd number of elements, so that data is not aligned to more than an element
DTYPES = (torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16)
LAYOUTS = ('contiguous', 'transposed', 'channels_last', 'sliced')
# In units of eps. With 16 bits, a result that is nearly a tie may be rounded to either side
TOLERANCE = {torch.float32: 40, torch.float64: 40, torch.bfloat16: 4, torch.float16: 6}

# L2 regularization may cancel a gradient but for its rounding error, which adaptive optimizers then divide by itself. With a power of two the
# product `wd*p` is exact, so that the sum is rounded once everywhere, fused multiply-add or not
WD = .125

# Of a layer's learning rate. PyTorch's float32 norms are sums in float32: 2e-5 off for 21,000 equal elements, and 1.6e-4 if they are
# expanded from one, which ForEach steps. The kernel's are not
LR_TOLERANCE = {torch.float32: 3e-4, torch.float64: 1e-12, torch.bfloat16: 1e-2, torch.float16: 1e-2}

class Guarded:
    "Tensors in memory of their own, with guards around and in the gaps"
    def __init__(self): self.buffers = []

    def alloc(self,
        value:Tensor, # What is in it
        layout:str, # One of `LAYOUTS`, or 'expanded'
    ) -> Tensor:
        "A copy of `value` in the given layout, inside a larger buffer"
        if layout == 'expanded': return self.alloc(value.flatten()[:1].clone(), 'contiguous').squeeze(0).expand(value.shape) if value.numel() else value.clone()
        dims = list(range(value.ndim))
        if layout == 'transposed': dims = dims[::-1]
        if layout == 'channels_last' and value.ndim > 2: dims = [0, *dims[2:], 1]
        gaps = 2 if layout == 'sliced' else 1
        buffer = value.new_full((value.numel()*gaps + 2*ROOM,), GUARD)
        inside = buffer[ROOM:ROOM + value.numel()*gaps]
        t = inside.view(*(value.shape[d] for d in dims), gaps).select(-1, 0)
        t = t.permute([dims.index(d) for d in range(value.ndim)]).copy_(value)
        outside = torch.ones_like(buffer, dtype=torch.bool)
        outside[ROOM:ROOM + value.numel()*gaps:gaps] = False
        self.buffers.append((buffer, outside))
        return t

    def check(self):
        for buffer,outside in self.buffers: assert (buffer[outside] == GUARD).all(), "a guard was overwritten"

@dataclass
class Step:
    "What happens before and in one step"
    lr:float
    mom:float
    frozen_to:int # Argument of `freeze_to`
    missing:list # Positions of parameters without a gradient
    event:str # Something that moves memory
    leftover:bool # Do frozen parameters keep their gradient?

@st.composite
def scenarios(draw):
    name, n = draw(st.sampled_from(NAMES)), draw(st.integers(1, 4))
    shape = st.lists(st.integers(0, 6), max_size=4).map(tuple) | st.sampled_from([(3, 4, 5, 5), (70, 300), (2**14+3,), ()])
    hypers = dict(mom=draw(st.sampled_from(moms(name))), wd=draw(st.sampled_from([0., WD])), decouple_wd=draw(st.booleans()))
    if name == 'RAdam': hypers['beta'] = draw(st.sampled_from([0., 0., 20.]))
    if name == 'Larc': hypers['clip'] = draw(st.booleans())
    if name == 'Ranger': hypers['k'] = draw(st.integers(1, 4))
    groups = draw(st.integers(1, n))
    step = st.builds(Step, st.floats(1e-4, .1), st.floats(0., .99), st.integers(0, groups-1) if groups > 1 else st.just(0),
                     st.lists(st.integers(0, n-1), max_size=2), st.sampled_from(['none']*4 + ['move', 'layout', 'slot', 'reload', 'no grads', 'clear']), st.booleans())
    per_param = lambda s: draw(st.lists(s, min_size=n, max_size=n))
    return dict(name=name, hypers=hypers, dtype=draw(st.sampled_from(DTYPES)), shapes=per_param(shape), layouts=per_param(st.sampled_from(LAYOUTS)),
                grad_layouts=per_param(st.sampled_from(['same']*3 + [*LAYOUTS, 'expanded'])), groups=groups, do_wd=per_param(st.booleans()),
                steps=draw(st.lists(step, min_size=1, max_size=5)), seed=draw(st.integers(0, 2**20)))

class Distance:
    "How far a tensor is from native's, in units of eps of the greatest value it has had: sums may cancel"
    def __init__(self): self.greatest = {}

    def __call__(self, key, expected, got):
        assert expected.shape == got.shape
        if not got.numel(): return 0.
        a, b = expected.double(), got.detach().double()
        self.has_been(key, float(a.abs().max()))
        return float((a - b).abs().max())/self.greatest[key]/torch.finfo(got.dtype).eps

    def has_been(self, key, x): self.greatest[key] = max(self.greatest.get(key, torch.finfo(torch.float32).tiny), x)

@lru_cache(None)
def cancels(name):
    "Is a gradient compared with the average, as AdaBelief does? Of two equal numbers nothing but rounding is left, and a step is divided by its root"
    return any({*f.__code__.co_varnames[:f.__code__.co_argcount]} == {'g', 'grad_avg'} for s in OPTIMIZERS[name].composition().stages for f in s.functions.values())

def greatest(t): return float(t.detach().abs().max()) if t.numel() else 0.

def added(opt, p, g, mom, wd, sqr_mom=0., **_):
    "What a step adds to the averages at most: a sum with L2 regularization may cancel"
    c = greatest(g) + (0. if opt.decouple_wd else wd*greatest(p))
    return dict(grad_avg=c*(1-mom if 'damp' in opt.spec.composition().row else 1), sqr_avg=c**2*(1-sqr_mom))

class Native:
    "fastai's own optimizer, in float32 or float64 and rounded to the dtype once a step"
    def __init__(self, values, groups, dtype, name, **hypers):
        self.dtype, self.compute = dtype, torch.promote_types(dtype, torch.float32)
        self.params = [v.to(self.compute, copy=True) for v in values]
        self.opt = build(name, split(self.params, groups), lr=.01, **hypers)

    def step(self, grads, frozen):
        slow = [s for pg in getattr(self.opt, 'slow_weights', None) or [] for s in pg]
        kept = [(t, t.clone()) for i in frozen for t in (self.params[i], *slow[i:i+1])]
        for i,(p,g) in enumerate(zip(self.params, grads)): p.grad = None if g is None or i in frozen else g.to(self.compute, copy=True)
        self.opt.step()
        for t,old in kept: t.copy_(old)  # Lookahead moves parameters that are frozen, and ours does not
        slots = [t for p in self.params for k,t in self.opt.state[p].items() if isinstance(t, Tensor) and k not in KEPT]
        for t in [*self.params, *slots, *(s for pg in getattr(self.opt, 'slow_weights', None) or [] for s in pg)]: t.copy_(t.to(self.dtype))

def happen(what, opt, params, memory, rebuild):
    "Move memory under the optimizer; the optimizer to go on with"
    if what == 'move':
        for p in params: p.data = p.data.clone()
    if what == 'layout':
        for p in params: p.data = memory.alloc(p.data, 'channels_last' if p.is_contiguous() else 'contiguous')
    if what == 'slot':
        for p in params:
            for k,t in opt.state[p].items():
                if isinstance(t, Tensor) and k not in KEPT: opt.state[p][k] = memory.alloc(t, 'sliced' if t.is_contiguous() else 'transposed')
    if what == 'clear': opt.clear_state()
    if what == 'no grads': opt.step()
    if what == 'reload':
        sd, opt = opt.state_dict(), rebuild()
        opt.load_state_dict(sd)
    return opt

@given(scenarios())
@settings(max_examples=int(os.environ.get('PROPERTY_EXAMPLES', 2000)), deadline=None, database=None,
          suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example])
def test_fused_is_native_and_writes_nothing_else(case):
    name, dtype, hypers, gen = case['name'], case['dtype'], case['hypers'], torch.Generator().manual_seed(case['seed'])
    def values(): return [torch.randn(s, generator=gen).to(dtype) for s in case['shapes']]
    event(f'{name}'); event(f'{dtype}')
    start, memory, apart = values(), Guarded(), Distance()
    native = Native(start, case['groups'], dtype, name, **hypers)
    for i,v in enumerate(start): apart.has_been((i, 'p'), greatest(v))
    params = [memory.alloc(v, layout).requires_grad_() for v,layout in zip(start, case['layouts'])]
    def rebuild(): return build(name, split(params, case['groups']), 'fused', lr=.01, **hypers)
    opt = rebuild()
    for p,q,do_wd in zip(params, native.params, case['do_wd']):
        if not do_wd: opt.state[p]['do_wd'] = native.opt.state[q]['do_wd'] = False
    for step in case['steps']:
        event(step.event)
        for p in params: p.grad = None
        opt = happen(step.event, opt, params, memory, rebuild)
        if step.event == 'clear': native.opt.clear_state()
        if step.event == 'no grads': native.step([None]*len(params), [i for i,p in enumerate(params) if not p.requires_grad])
        opt.freeze_to(step.frozen_to)
        for o in (opt, native.opt): o.set_hypers(lr=step.lr, mom=step.mom)
        frozen = [i for i,p in enumerate(params) if not p.requires_grad]
        grads = [None if i in step.missing else g for i,g in enumerate(values())]
        for i,(p,g,layout) in enumerate(zip(params, grads, case['grad_layouts'])):
            if g is None or (i in frozen and not step.leftover): continue
            if layout == 'expanded' and g.numel(): g.fill_(g.flatten()[0])
            p.grad = torch.empty_like(p).copy_(g) if layout == 'same' else memory.alloc(g, layout)
        kept = [p.grad if p.grad is None else p.grad.clone() for p in params]
        for i,(p,g) in enumerate(zip(params, kept)):
            if g is None or i in frozen: continue
            for k,x in added(opt, p, g, **opt.hypers[0]).items(): apart.has_been((i, k), x)
        opt.step()
        native.step(grads, frozen)
        for p,g in zip(params, kept): assert g is None or torch.equal(p.grad, g), "a gradient was modified"
        memory.check()
        for i,(p,q) in enumerate(zip(params, native.params)):
            assert apart((i, 'p'), q, p) <= TOLERANCE[dtype]*(10 if cancels(name) else 1)
            a, b = native.opt.state[q], opt.state[p]
            assert set(a) == set(b), (a.keys(), b.keys())
            for k in a:
                if k in KEPT: assert math.isclose(float(a[k]), float(b[k]), rel_tol=LR_TOLERANCE[dtype], abs_tol=1e-30)
                elif isinstance(a[k], Tensor): assert apart((i, k), a[k], b[k]) <= TOLERANCE[dtype]*(10 if cancels(name) else 1), k
                else: assert a[k] == b[k]
        stepped = [i for i,p in enumerate(params) if p.grad is not None and p.requires_grad]
        if stepped: assert len(opt.backend_report()) == len(stepped)
