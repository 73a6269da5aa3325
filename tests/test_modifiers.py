"Modifiers around every optimizer, on every backend that steppers have, against formulas and against each other"
import itertools, pickle

import pytest
from common import *
from test_peers import TWINS, twin_step

from fastxtend.optimizer.all import cautious, cautious_decay, lookahead
from fastxtend.optimizer.modifiers import MODIFIERS, modified_spec

@pytest.fixture(autouse=True)
def one_thread():
    with threads(1): yield

WAYS_OF_STEPPERS = ('native', 'foreach', 'fused')
WRAP = dict(cautious=cautious, cautious_decay=cautious_decay, lookahead=lookahead)
NESTED = [('cautious',), ('cautious_decay',), ('lookahead',), tuple(MODIFIERS)]

def averages(name): return 'base_weights' in slots_of(name)

def fits(name, modifiers):
    "Lookahead needs weights that nobody else averages, and decay is masked where it is taken from the parameter"
    return not ('lookahead' in modifiers and (OPTIMIZERS[name].has_lookahead or averages(name)) or 'cautious_decay' in modifiers and averages(name))

CASES = [(name, modifiers) for name in NAMES for modifiers in NESTED if fits(name, modifiers)]
each_case = pytest.mark.parametrize('name,modifiers', CASES, ids=[f"{n}-{'+'.join(m)}" for n,m in CASES])

def wrapped(name, modifiers, way='fused', **kwargs):
    opt_func = partial(constructor(name), **flags(way), **kwargs)
    for m in modifiers: opt_func = WRAP[m](opt_func)
    return opt_func

# Hyperparameters with which an optimizer gets anywhere in a few steps, where the defaults do not
AT_ONCE = dict(Prodigy=dict(first_estimate=1.))

def grads(steps=40, dtype=torch.float32): return make_grads(tuple(SMALL.values()), dtype, steps)

def trained(opt_func, steps=40, dtype=torch.float32, groups=3):
    params = make_params(SMALL, dtype)
    opt = opt_func(split(params, groups), lr=slice(1e-4, 1e-2) if groups > 1 else 1e-2)
    opt.state[params[1]]['do_wd'] = False
    train(opt, params, grads(steps, dtype))
    return opt, params

def after(opt_func, **kwargs): return snapshot_without_grads(lambda *_: None, *trained(opt_func, **kwargs))

@each_case
@pytest.mark.parametrize('way', ['foreach', 'fused'])
def test_every_way(name, modifiers, way):
    "Parameters, state and slow weights, as by the steppers on whole tensors"
    assert_same(after(wrapped(name, modifiers, 'native', wd=.1)), after(wrapped(name, modifiers, way, wd=.1)), TOLERANCE[way])

@each_case
def test_a_modifier_makes_a_difference(name, modifiers):
    plain, modified = (trained(wrapped(name, m, wd=.1, mom=.9, **AT_ONCE.get(name, {})))[1] for m in ((), modifiers))
    same = max(distance(a, b) for a,b in zip(plain, modified)) < 1000
    assert same == (modifiers == ('cautious',) and 'grad_avg' not in slots_of(name)) # without an average, updates go with the gradient

@pytest.mark.parametrize('name', [n for n in NAMES if fits(n, MODIFIERS)])
@pytest.mark.parametrize('order', list(itertools.permutations(MODIFIERS)), ids='+'.join)
def test_the_order_of_nesting_does_not_matter(name, order):
    a, b = wrapped(name, order), wrapped(name, tuple(MODIFIERS))
    assert a.keywords == b.keywords
    assert_same(after(a, steps=13), after(b, steps=13))

def cautious_update(update, g):
    agree = (update*g > 0).double()
    return update*agree/max(float(agree.mean()), 1e-3) if g.numel() else update

@pytest.mark.parametrize('name', [n for n in TWINS if not n.startswith('schedulefree')])
def test_cautious_as_in_the_paper(name):
    "The twin's own update, masked and rescaled. Where an optimizer steps by a part of the update, for reasons of its own, masks come first, to the same effect"
    spec = next(s for n,s in OPTIMIZERS.items() if n.lower() == name)
    given = AT_ONCE.get(spec.name, {})
    params, hypers, states, model = make_params(SMALL, torch.float64), {**spec.hypers, 'wd': 0., **given}, [{} for _ in SMALL], {}
    for t,gs in enumerate(grads(30, torch.float64)):
        plain = twin_step(name, params, gs, states, model, t+1, lr=.01, **hypers)
        params = [p - cautious_update(p - q, g) for p,q,g in zip(params, plain, gs)]
    got = trained(wrapped(spec.name, ['cautious'], wd=0., **given), 30, torch.float64, groups=1)[1]
    for a,b in zip(params, got): assert not a.numel() or float((a - b).abs().max()/a.abs().max()) < 1e-10

@pytest.mark.parametrize('name', sorted({'lion', 'nadam', 'adabelief'}))
def test_cautious_decay_as_in_the_paper(name):
    spec = next(s for n,s in OPTIMIZERS.items() if n.lower() == name)
    params, hypers, states = make_params(SMALL, torch.float64), {**spec.hypers, 'wd': 0.}, [{} for _ in SMALL]
    for t,gs in enumerate(grads(30, torch.float64)):
        for i,(p,g) in enumerate(zip(params, gs)):
            update = p - TWINS[name](p, g, states[i], t+1, lr=.01, **hypers)
            params[i] = p - update - .01*(0. if i == 1 else .5)*(update*p >= 0).double()*p
    got = trained(wrapped(spec.name, ['cautious_decay'], wd=.5), 30, torch.float64, groups=1)[1]
    for a,b in zip(params, got): assert not a.numel() or float((a - b).abs().max()/a.abs().max()) < 1e-10

@pytest.mark.parametrize('k,alpha', [(1, .5), (3, .8), (6, 0.), (6, 1.)])
@pytest.mark.parametrize('name', ['Adam', 'Lion', 'SGD'])
def test_lookahead_as_in_the_paper(name, k, alpha):
    "The plain optimizer, whose weights are put back by hand"
    params = make_params(SMALL)
    opt, slow = constructor(name)(params, 1e-2, fused=True), [p.clone() for p in params]
    for t,gs in enumerate(grads()):
        step_with(opt, params, gs)
        if (t+1) % k == 0:
            for p,s in zip(params, slow): p.copy_(s.lerp_(p, alpha))
    got = make_params(SMALL)
    train(lookahead(partial(constructor(name), fused=True), k=k, alpha=alpha)(got, lr=1e-2), got, grads())
    for a,b in zip(params, got): assert distance(a, b) <= TOLERANCE['fused']

@pytest.mark.parametrize('way', WAYS_OF_STEPPERS)
def test_ranger_is_lookahead_around_radam(way):
    ranger, radam = helper('Ranger'), helper('RAdam')
    a = after(ranger(**flags(way)))
    b = after(lookahead(radam(mom=.95, eps=1e-6, wd=.01, **flags(way))))
    if way == 'native': a['states'] = [{k: v for k,v in s.items() if k in ('do_wd', 'step', 'grad_avg', 'sqr_avg')} for s in a['states']]
    assert_same(a, b, TOLERANCE[way] or TOLERANCE['foreach'])

@pytest.mark.parametrize('name', NAMES)
def test_launches(name):
    "With `cautious` a sum more in the longest chain of sums, and that only if the update follows from sums; nothing more with the other two"
    def stages(*modifiers): return len(modified_spec(name, modifiers).composition().stages)
    plain = stages()
    if fits(name, ['cautious_decay']): assert stages('cautious_decay') == plain
    assert stages('cautious') == max(2, plain) or plain > 1 and stages('cautious') == plain + 1

@each_case
def test_checkpoints(name, modifiers):
    "From one backend to another, and back through a copy of the optimizer"
    opt_func = wrapped(name, modifiers, 'fused', wd=.1)
    opt, params = trained(opt_func, 10)
    other = [p.clone() for p in params]
    loaded = wrapped(name, modifiers, 'foreach', wd=.1)(split(other, 3), lr=1.)
    loaded.load_state_dict(saved_and_loaded(opt.state_dict()))
    copy = pickle.loads(pickle.dumps(opt))
    assert copy.spec is opt.spec and copy.slot_names == opt.slot_names
    for o,ps in ((opt, params), (loaded, other)): train(o, ps, grads()[10:])
    assert_same(*(snapshot_without_grads(lambda *_: None, o, ps) for o,ps in ((opt, params), (loaded, other))), TOLERANCE['foreach'] + TOLERANCE['fused'])

@pytest.mark.parametrize('name', NAMES)
def test_opt_func_can_be_exported(name):
    for m in MODIFIERS:
        if not fits(name, [m]): continue
        f = WRAP[m](helper(name)(fused=True))
        assert pickle.loads(pickle.dumps(f)).keywords == f.keywords

def test_refused():
    adam, ranger = helper('Adam'), helper('Ranger')
    for m,f in WRAP.items():
        with pytest.raises(ValueError, match='already'): f(f(adam()))
        with pytest.raises(TypeError, match='such as `adam'): f(torch.optim.Adam)
        with pytest.raises(TypeError, match='such as `adam'): f(adam)
        with pytest.raises(NotImplementedError): f(adam(jit=True))([torch.ones(2)], lr=.1)
        with pytest.raises(ValueError, match='not both'): f(adam())([torch.ones(2)], lr=.1, foreach=True, fused=True)
        with pytest.raises(TypeError): f(adam())([torch.ones(2)], lr=.1, nonsense=1.)
    with pytest.raises(ValueError, match='already'): lookahead(ranger())
    with pytest.raises(ValueError, match='true weight decay'): cautious_decay(adam(decouple_wd=False))([torch.ones(2)], lr=.1)

@pytest.mark.parametrize('name', NAMES)
def test_a_learning_rate_of_its_own(name):
    "Goes from the helper through modifiers into a `Learner`"
    from fastai.learner import Learner
    from fastai.data.core import DataLoaders
    own = OPTIMIZERS[name].lr
    for f in (helper(name)(fused=True), cautious(helper(name)(fused=True))):
        assert f.keywords.get('lr') == own
        learn = Learner(DataLoaders([], []), torch.nn.Linear(2, 2), loss_func=torch.nn.functional.mse_loss, opt_func=f)
        learn.create_opt()
        assert learn.lr == learn.opt.hypers[0]['lr'] == (own or 1e-3)
