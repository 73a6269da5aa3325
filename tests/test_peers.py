"""What each of the newer optimizers computes, against two others: a twin of a few lines, written from the paper, and the best known
implementation elsewhere, where it is installed (`pip install fastxtend[peers]`).

A hundred steps in float64, with a constant and with a changing learning rate, with and without weight decay, on a convolution, a matrix,
a vector, a scalar and an empty parameter."""
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from common import *

@pytest.fixture(autouse=True)
def one_thread():
    with threads(1): yield

@pytest.fixture(autouse=True)
def in_double():
    "PyTorch's own optimizers keep their counters in the default type"
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)

STEPS, LR = 100, .01

def lr_at(t, changing):
    "Warm-up, then down to a hundredth"
    return LR*(min((t+1)/20, 1.)*(1 - .99*t/STEPS) if changing else 1.)

def start(): return make_params(SMALL, torch.float64), make_grads(tuple(SMALL.values()), torch.float64, STEPS)

def rms(x): return float(x.square().mean().sqrt()) if x.numel() else 0.

# Twins: from one parameter, its gradient, its state, the step from 1, and hyperparameters by name, to the new parameter. Plain tensors,
# one formula after the other, as in the paper; weight decay is always decoupled

def averages(g, s, t, mom, sqr_mom):
    "Adam's averages, corrected for their bias"
    s['m'] = mom*s.get('m', 0*g) + (1 - mom)*g
    s['v'] = sqr_mom*s.get('v', 0*g) + (1 - sqr_mom)*g**2
    return s['m']/(1 - mom**t), s['v']/(1 - sqr_mom**t)

def lion(p, g, s, t, lr, mom, avg_mom, wd):
    m = s.get('m', 0*g)
    s['m'] = avg_mom*m + (1 - avg_mom)*g
    return (1 - lr*wd)*p - lr*torch.sign(mom*m + (1 - mom)*g)

def nadam(p, g, s, t, lr, mom, sqr_mom, eps, wd, mom_decay):
    def mu(t): return mom*(1 - .5*.96**(t*mom_decay))
    _, v = averages(g, s, t, mom, sqr_mom)
    s['product'] = s.get('product', 1.)*mu(t)
    ahead = mu(t+1)*s['m']/(1 - s['product']*mu(t+1)) + (1 - mu(t))*g/(1 - s['product'])
    return (1 - lr*wd)*p - lr*ahead/(v.sqrt() + eps)

def stableadam(p, g, s, t, lr, mom, sqr_mom, eps, wd):
    m, v = averages(g, s, t, mom, sqr_mom)
    lr = lr/max(1., rms(g/v.clamp(min=eps**2).sqrt()))
    return (1 - lr*wd)*p - lr*m/(v.sqrt() + eps)

def adan(p, g, s, t, lr, mom, diff_mom, sqr_mom, eps, wd):
    diff = g - s.get('last', g)
    s['last'] = g
    s['d'] = diff_mom*s.get('d', 0*g) + (1 - diff_mom)*diff
    s['m'] = mom*s.get('m', 0*g) + (1 - mom)*g
    s['n'] = sqr_mom*s.get('n', 0*g) + (1 - sqr_mom)*(g + diff_mom*diff)**2
    m, d, n = s['m']/(1 - mom**t), s['d']/(1 - diff_mom**t), s['n']/(1 - sqr_mom**t)
    return (p - lr*(m + diff_mom*d)/(n.sqrt() + eps))/(1 + lr*wd)

def adopt(p, g, s, t, lr, mom, sqr_mom, eps, wd, clip_exp):
    p = (1 - lr*wd)*p
    if t == 1:
        s['v'], s['m'] = g**2, 0*g
        return p
    direction = g/s['v'].sqrt().clamp(min=eps)
    s['m'] = mom*s['m'] + (1 - mom)*direction.clamp(-(t-1)**clip_exp, (t-1)**clip_exp)
    s['v'] = sqr_mom*s['v'] + (1 - sqr_mom)*g**2
    return p - lr*s['m']

def ademamix(p, g, s, t, lr, mom, sqr_mom, slow_mom, slow_factor, slow_warmup, eps, wd):
    def half_life(mom): return math.log(.5)/math.log(mom) - 1
    a = min(t/slow_warmup, 1.) if slow_warmup else 1.
    slow_mom = .5**(1/((1 - a)*half_life(mom) + a*half_life(slow_mom) + 1))
    m, v = averages(g, s, t, mom, sqr_mom)
    s['slow'] = slow_mom*s.get('slow', 0*g) + (1 - slow_mom)*g
    return (1 - lr*wd)*p - lr*(m + a*slow_factor*s['slow'])/(v.sqrt() + eps)

def adabelief(p, g, s, t, lr, mom, sqr_mom, eps, wd):
    s['m'] = mom*s.get('m', 0*g) + (1 - mom)*g
    s['v'] = sqr_mom*s.get('v', 0*g) + (1 - sqr_mom)*(g - s['m'])**2 + eps
    return (1 - lr*wd)*p - lr*s['m']/(1 - mom**t)/((s['v']/(1 - sqr_mom**t)).sqrt() + eps)

def laprop(p, g, s, t, lr, mom, sqr_mom, eps, wd):
    s['v'] = sqr_mom*s.get('v', 0*g) + (1 - sqr_mom)*g**2
    s['m'] = mom*s.get('m', 0*g) + (1 - mom)*g/((s['v']/(1 - sqr_mom**t)).sqrt() + eps)
    return (1 - lr*wd)*p - lr*s['m']/(1 - mom**t)

def mars(p, g, s, t, lr, mom, sqr_mom, gamma, eps, wd, mom_1d, sqr_mom_1d, lr_1d, vectors):
    if vectors or p.ndim > 1:
        c = g + gamma*mom/(1 - mom)*(g - s.get('last', 0*g))
        s['last'] = g
        if c.norm() > 1: c = c/c.norm()
    else: c, lr, mom, sqr_mom = g, lr*lr_1d, mom_1d, sqr_mom_1d
    m, v = averages(c, s, t, mom, sqr_mom)
    return (1 - lr*wd)*p - lr*m/(v.sqrt() + eps)

def schedulefree(p, u, s, t, lr, mom, wd, warmup, lr_power, step_power):
    lr = lr*min(t/warmup, 1.) if warmup else lr
    s['lr_max'] = max(lr, s.get('lr_max', 0.))
    weight = t**step_power*s['lr_max']**lr_power
    s['sum'] = s.get('sum', 0.) + weight
    c, z = weight/s['sum'], s.get('z', p) - lr*(u + wd*p)
    s['x'], s['z'] = (1 - c)*s.get('x', p) + c*z, z
    return (1 - mom)*z + mom*s['x']

def schedulefreesgd(p, g, s, t, **hypers): return schedulefree(p, g, s, t, **hypers)

def schedulefreeadam(p, g, s, t, sqr_mom, eps, **hypers):
    s['v'] = sqr_mom*s.get('v', 0*g) + (1 - sqr_mom)*g**2
    return schedulefree(p, g/((s['v']/(1 - sqr_mom**t)).sqrt() + eps), s, t, **hypers)

def prodigy(params, grads, states, model, t, lr, mom, sqr_mom, estimate_mom, eps, wd, first_estimate, coef, growth, correct_bias, safeguard):
    "All parameters at once, for there are sums over them, with an `lr` for each; `model` keeps what there is one of"
    d, greatest, r = model.get('d', first_estimate), model.get('greatest', first_estimate), model.get('r', 0.)
    fade, bias = estimate_mom or sqr_mom**.5, (1 - sqr_mom**t)**.5/(1 - mom**t) if correct_bias else 1.
    length, size = 0., [d*x*bias for x in lr]
    r = fade*r
    for p,g,s,x in zip(params, grads, states, size):
        r += d/first_estimate*x*float((g*(s.setdefault('start', p) - p)).sum())
        s['m'] = mom*s.get('m', 0*g) + (1 - mom)*d*g
        s['v'] = sqr_mom*s.get('v', 0*g) + (1 - sqr_mom)*(d*g)**2
        s['s'] = fade*s.get('s', 0*g) + d/first_estimate*(d if safeguard else x)*g
        length += float(s['s'].abs().sum())
    measured = coef*r/length
    greatest = max(greatest, measured)
    model.update(d=min(greatest, growth*(max(d, measured) if d == first_estimate else d)), greatest=greatest, r=r)
    return [(1 - x*wd)*p - x*s['m']/(s['v'].sqrt() + model['d']*eps) for p,s,x in zip(params, states, size)]

def muon(p, g, s, t, lr, mom, wd, adam_lr, adam_mom, adam_sqr_mom, adam_eps, nesterov=True, scale='original'):
    if p.ndim < 2:
        m, v = averages(g, s, t, adam_mom, adam_sqr_mom)
        return (1 - lr*adam_lr*wd)*p - lr*adam_lr*m/(v.sqrt() + adam_eps)
    s['m'] = mom*s.get('m', 0*g) + (1 - mom)*g
    x = (mom*s['m'] + (1 - mom)*g if nesterov else s['m']).flatten(1)
    rows, cols = x.shape
    x = x/x.square().sum().sqrt()
    for _ in range(5): x = 3.4445*x - 4.775*(x @ x.T @ x) + 2.0315*(x @ x.T @ x @ x.T @ x)
    size = max(1., rows/cols)**.5 if scale == 'original' else .2*max(rows, cols)**.5
    return (1 - lr*wd)*p - lr*size*x.view(p.shape)

TWINS = {f.__name__: f for f in (muon, prodigy, schedulefreesgd, schedulefreeadam, lion, nadam, stableadam, adan, adopt, ademamix, adabelief, laprop, mars)}

def twin_step(name, params, grads, states, model, t, lr, **hypers):
    "Parameters after a step of a twin; `model` is a dict for what there is one of"
    if name.lower() == 'prodigy': return prodigy(params, grads, states, model, t, lr=[lr]*len(params), **hypers)
    return [TWINS[name.lower()](p, g, s, t, lr=lr, **hypers) for p,g,s in zip(params, grads, states)]

# Hyperparameters that a test of an optimizer needs, beside its defaults
SETTINGS = dict(AdEMAMix=[dict(slow_warmup=0), dict(slow_warmup=60)], MARS=[dict(vectors=False), dict(vectors=True), dict(mom_1d=.8, sqr_mom_1d=.9, lr_1d=.5)],
                Prodigy=[dict(first_estimate=.1), dict(first_estimate=.01, coef=2., growth=1.1, estimate_mom=.99, correct_bias=True, safeguard=True)],
                Muon=[{}, dict(nesterov=False, scale='match_rms_adamw', adam_lr=.1, adam_mom=.8)], NAdam=[{}, dict(mom_decay=.2)], StableAdam=[{}, dict(sqr_mom=.9)], ADOPT=[{}, dict(sqr_mom=.9)],
                **{n: [{}, dict(warmup=30, step_power=.5, mom=.98)] for n in ('ScheduleFreeAdam', 'ScheduleFreeSGD')})
NEWER = [n for n in NAMES if OPTIMIZERS[n].native is None]
CASES = [(name, wd, changing, settings) for name in NEWER for settings in SETTINGS.get(name, [{}]) for wd in (0., .1) for changing in (False, True)]

def case_id(c): return f"{c[0]}-wd{c[1]}-{'changing' if c[2] else 'constant'}{'-' if c[3] else ''}{show(c[3])}"

def show(kwargs): return ','.join(f'{k}={v}' for k,v in kwargs.items())

def ours(name, wd, changing, way='fused', **kwargs):
    "Our parameters after a hundred steps"
    params, grads = start()
    opt = build(name, params, way, lr=LR, wd=wd, **kwargs)
    for t,gs in enumerate(grads):
        opt.set_hyper('lr', lr_at(t, changing))
        step_with(opt, params, gs)
    return params

def farthest(expected, got):
    "Greatest difference in a tensor, relative to its greatest element"
    assert all(b.isfinite().all() for b in got)
    return max(float((a - b).abs().max()/a.abs().max()) for a,b in zip(expected, got) if a.numel())

def test_every_newer_optimizer_has_a_twin(): assert {n.lower() for n in NEWER} == set(TWINS)

@pytest.mark.parametrize('name,wd,changing,settings', CASES, ids=map(case_id, CASES))
def test_twin(name, wd, changing, settings):
    "The paper's formulas, one after the other"
    params, grads = start()
    states, hypers, model = [{} for _ in params], {**OPTIMIZERS[name].hypers, 'wd': wd, **settings}, {}
    for t,gs in enumerate(grads):
        params = twin_step(name, params, gs, states, model, t+1, lr=lr_at(t, changing), **hypers)
    assert farthest(params, ours(name, wd, changing, **settings)) < 1e-10

@dataclass(frozen=True)
class Peer:
    "An implementation elsewhere"
    name:str # Of our optimizer
    where:str # Module and class
    hypers:Callable # From our hyperparameters to the arguments of its class
    ours:dict = field(default_factory=dict) # Hyperparameters of ours that differ from the defaults
    tolerance:Callable = lambda wd, changing: 1e-10 # Relative; greater ones say why
    patch:Callable = noop # What of it has to be changed first, by a `monkeypatch`

    def __str__(self): return f"{self.name}-{self.where}{'-' if self.ours else ''}{show(self.ours)}"

def adams(h, **more): return dict(betas=(h['mom'], h['sqr_mom']), eps=h['eps'], weight_decay=h['wd'], **more)

def without_1e_15(monkeypatch):
    "pytorch_optimizer adds 1e-15 to some averages of squares, which is 1e-7 of a step where gradients are small"
    from pytorch_optimizer.base.optimizer import BaseOptimizer
    for f in (BaseOptimizer.apply_ams_bound, BaseOptimizer.apply_ams_bound_foreach): monkeypatch.setattr(f, '__defaults__', (0.,))

DECAYS_LATER, LAGS = 2e-4, 2e-2

PEERS = [
    Peer('Lion', 'lion_pytorch.Lion', lambda h: dict(betas=(h['mom'], h['avg_mom']), weight_decay=h['wd'])),
    Peer('Lion', 'pytorch_optimizer.Lion', lambda h: dict(betas=(h['mom'], h['avg_mom']), weight_decay=h['wd'], weight_decouple=True)),
    Peer('NAdam', 'torch.optim.NAdam', lambda h: adams(h, momentum_decay=h['mom_decay'], decoupled_weight_decay=True)),
    Peer('StableAdam', 'optimi.StableAdamW', lambda h: adams(h, triton=False)),
    Peer('StableAdam', 'pytorch_optimizer.StableAdamW', adams),
    Peer('Adan', 'pytorch_optimizer.Adan', lambda h: dict(betas=(h['mom'], h['diff_mom'], h['sqr_mom']), eps=h['eps'], weight_decay=h['wd'])),
    Peer('Adan', 'optimi.Adan', lambda h: dict(betas=(h['mom'], h['diff_mom'], h['sqr_mom']), eps=h['eps'], weight_decay=h['wd'])),
    # it counts the step that only begins the average, and so has another bound: it is given the paper's
    Peer('ADOPT', 'pytorch_optimizer.ADOPT', lambda h: adams(h, weight_decouple=True, clip_lambda=lambda t: (t - 1)**h['clip_exp'])),
    *[Peer('AdEMAMix', 'pytorch_optimizer.AdEMAMix', lambda h: dict(betas=(h['mom'], h['sqr_mom'], h['slow_mom']), alpha=h['slow_factor'], weight_decouple=True,
           t_alpha_beta3=h['slow_warmup'] or None, eps=h['eps'], weight_decay=h['wd']), dict(slow_warmup=w)) for w in (0, 60)],
    Peer('AdaBelief', 'pytorch_optimizer.AdaBelief', lambda h: adams(h, weight_decouple=True)),
    # it decays after the step, and puts the learning rate into the average, which under a schedule lags behind: that is how far they are apart
    Peer('LaProp', 'pytorch_optimizer.LaProp', lambda h: adams(h, weight_decouple=True, foreach=False), patch=without_1e_15,
         tolerance=lambda wd, changing: LAGS if changing else DECAYS_LATER if wd else 1e-10),
    # it adds eps to what is not yet corrected for bias, so eps is next to nothing here
    *[Peer('MARS', 'pytorch_optimizer.MARS', lambda h: dict(betas=(h['mom'], h['sqr_mom']), betas_1d=(h['mom_1d'], h['sqr_mom_1d']), gamma=h['gamma'], eps=h['eps'],
           weight_decay=h['wd'], weight_decay_1d=h['wd'], weight_decouple=True, lr_1d_factor=h['lr_1d'], optimize_1d=h['vectors']), o, patch=without_1e_15)
      for o in (dict(vectors=False, lr_1d=.5, eps=1e-20), dict(vectors=True, eps=1e-20))],
]

for o in SETTINGS['Prodigy']:
    PEERS.append(Peer('Prodigy', 'prodigyopt.Prodigy', lambda h: adams(h, beta3=h['estimate_mom'] or None, d0=h['first_estimate'], d_coef=h['coef'], growth_rate=h['growth'],
                      use_bias_correction=h['correct_bias'], safeguard_warmup=h['safeguard']), o))

def averaging(h, **more): return dict(weight_decay=h['wd'], warmup_steps=h['warmup'], r=h['step_power'], weight_lr_power=h['lr_power'], **more)

for o in ({}, dict(warmup=30, step_power=.5, mom=.98)):
    PEERS += [Peer('ScheduleFreeAdam', 'schedulefree.AdamWScheduleFree', lambda h: averaging(h, betas=(h['mom'], h['sqr_mom']), eps=h['eps']), o),
              Peer('ScheduleFreeSGD', 'schedulefree.SGDScheduleFree', lambda h: averaging(h, momentum=h['mom']), o)]

def made(where): 
    module, cls = where.rsplit('.', 1)
    return getattr(pytest.importorskip(module, reason=f'{module} is not installed: pip install fastxtend[peers]'), cls)

PEER_CASES = [(peer, wd, changing) for peer in PEERS for wd in (0., .1) for changing in (False, True)]

@pytest.mark.parametrize('peer,wd,changing', PEER_CASES, ids=[f"{p}-wd{wd}-{'changing' if c else 'constant'}" for p,wd,c in PEER_CASES])
def test_peer(peer, wd, changing, monkeypatch):
    params, grads = start()
    hypers = {**OPTIMIZERS[peer.name].hypers, 'wd': wd, **peer.ours}
    cls = made(peer.where)
    peer.patch(monkeypatch)
    opt = cls(params, lr=LR, **peer.hypers(hypers))
    if hasattr(opt, 'train'): opt.train()
    for t,gs in enumerate(grads):
        for group in opt.param_groups: group['lr'] = lr_at(t, changing)
        set_grads(params, gs)
        opt.step()
    assert farthest(params, ours(peer.name, wd, changing, **peer.ours)) < peer.tolerance(wd, changing)

@pytest.mark.parametrize('way', ways('Prodigy'))
@pytest.mark.parametrize('safeguard', (False, True))
def test_prodigy_with_several_lr(way, safeguard):
    "One estimate, which the learning rate of each group multiplies; the authors' code refuses that"
    (params, grads), lrs, hypers = start(), [1., .1, .01], dict(first_estimate=1e-3, wd=.1, safeguard=safeguard)
    states, model, of_group = [{} for _ in params], {}, [lr for lr,ps in zip(lrs, split(list(range(len(params))), 3)) for _ in ps]
    groups = split([p.clone() for p in params], 3)
    opt = build('Prodigy', groups, way, lr=lrs, **hypers)
    for t,gs in enumerate(grads):
        params = prodigy(params, gs, states, model, t+1, lr=of_group, **{**OPTIMIZERS['Prodigy'].hypers, **hypers})
        step_with(opt, [p for pg in groups for p in pg], gs)
    assert farthest(params, [p for pg in groups for p in pg]) < 1e-10
    assert abs(opt.state_dict()['carried']['estimate']/model['d'] - 1) < 1e-10
    assert model['d'] > 2e-3 # it has grown
