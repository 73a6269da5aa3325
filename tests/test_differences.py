"Where we differ from fastai's optimizers on purpose. Each test shows fastai's behaviour as well: should it change, we want to know"
import pytest
from common import *
from fastai import optimizer as fai

each_name = pytest.mark.parametrize('name', [n for n in NAMES if OPTIMIZERS[n].native]) # what fastai does not have cannot differ from it
each_way = pytest.mark.parametrize('way', BACKENDS)

KWARGS = dict(lr=1e-2, mom=.9, wd=.1)

def grads(steps=20): return make_grads(tuple(SMALL.values()), steps=steps)

def start(name, way, **kwargs):
    params = make_params(SMALL)
    return build(name, split(params, 3), way, **{**KWARGS, **kwargs}), params

def frozen_for_a_while(name, way):
    "The first group, of a convolution, trains for 3 steps and is frozen with its last gradients zeroed, as `Learner` leaves them, for 10 more"
    opt, params = start(name, way)
    train(opt, params, grads(3))
    opt.zero_grad()
    opt.freeze_to(1)
    before = deepcopy((params[0].detach(), dict(opt.state[params[0]])))
    for gs in grads(10):
        set_grads(params[1:], gs[1:])
        opt.step()
    return opt, params, before

@each_name
@each_way
def test_frozen_parameters_do_not_move(name, way):
    "In fastai they go on decaying and moving by their momentum as long as they have a gradient, though it be zero"
    _, (p, *_), (before, _) = frozen_for_a_while(name, 'native')
    assert not torch.equal(p, before)
    opt, (p, *others), (before, state) = frozen_for_a_while(name, way)
    assert torch.equal(p, before)
    assert_same(state, dict(opt.state[p]))
    assert all(opt.state[q] for q in others)

@each_name
@each_way
def test_frozen_parameters_that_are_forced_to_train(name, way):
    "Such as batch norm's: they move as in fastai"
    def run(way):
        opt, params = start(name, way)
        opt.state[params[0]]['force_train'] = True
        opt.freeze_to(1)
        train(opt, params, grads())
        return {'params': [p.detach() for p in params], 'states': states(opt, params)}
    assert_same(run('native'), run(way), TOLERANCE[way])

@each_name
@each_way
def test_unfrozen_late(name, way):
    """Parameters are bias-corrected by the steps they took: frozen first, though they had a gradient, they train as in a new optimizer.
    In fastai the steps they were frozen count, and averages of zeros are corrected as if they were averages of gradients"""
    def late(way):
        opt, params = start(name, way, k=1) if name == 'Ranger' else start(name, way)
        opt.freeze_to(1)
        for p in params: p.grad = torch.zeros_like(p)
        for gs in grads(10):
            for p,g in zip(params[1:], gs[1:]): p.grad.copy_(g)
            opt.step()
        opt.unfreeze()
        with torch.no_grad(): params[0].copy_(make_params(SMALL)[0]) # fastai decayed it
        train(opt, params, grads())
        return params[0].detach(), opt.state[params[0]].get('step')
    def new(way):
        opt, params = start(name, way, k=1) if name == 'Ranger' else start(name, way)
        train(opt, params, grads())
        return params[0].detach(), opt.state[params[0]].get('step')
    assert distance(new('native')[0], late(way)[0]) <= TOLERANCE[way]
    if OPTIMIZERS[name].counts_steps:
        assert late(way)[1] == new('native')[1] == 20 and late('native')[1] == 30
        assert distance(late('native')[0], late(way)[0]) > 1000

@pytest.mark.parametrize('way', WAYS)
def test_eps_of_rmsprop(way):
    "fastai's constructor takes `eps` and does not pass it on. Ours does, also without a backend"
    assert fai.RMSProp([torch.ones(3)], lr=.1, eps=.5).hypers[0]['eps'] == 1e-8
    p = torch.ones(3)
    p.grad = torch.tensor([.1, 1., 10.])
    opt = build('RMSProp', [p], way, lr=.1, eps=.5)
    opt.step()
    assert opt.hypers[0]['eps'] == .5
    torch.testing.assert_close(p, 1 - .1*p.grad/(.1*p.grad + .5))

@each_name
@each_way
def test_gradients_are_read_only(name, way):
    "fastai adds L2 regularization to the gradients themselves"
    def modified(way):
        opt, params = start(name, way, decouple_wd=False)
        set_grads(params, grads()[0])
        opt.step()
        return [not torch.equal(p.grad, g) for p,g in zip(params, grads()[0]) if p.numel()]
    assert all(modified('native')) and not any(modified(way))

@each_name
@each_way
def test_listed_twice_with_l2(name, way):
    "fastai's second step of a parameter finds the regularization of the first in its gradient; ours is what two steps of fastai are with a gradient of their own"
    def run(way, lists, steps):
        params = make_params(SMALL)
        opt = build(name, lists(params), way, **{**KWARGS, 'decouple_wd': False})
        for gs in grads(2): # before Lookahead synchronises, which counts calls
            for _ in range(steps): step_with(opt, params, gs)
        return dict(params=[p.detach() for p in params], states=states(opt, params))
    def twice(params): return [params, params]
    expected = run('native', noop, 2)
    assert_same(expected, run(way, twice, 1), TOLERANCE[way])
    with pytest.raises(AssertionError): assert_same(expected, run('native', twice, 1), TOLERANCE[way])

@each_name
@each_way
def test_a_state_dict_stays_the_callers(name, way):
    "fastai's `load_state_dict` trains on the tensors it is given, and Lookahead's takes items out of the dict"
    def resumed(way):
        opt, params = start(name, 'native')
        train(opt, params, grads(3))
        sd = opt.state_dict()
        before = deepcopy(sd)
        twin, twin_params = start(name, way)
        twin.load_state_dict(sd)
        train(twin, twin_params, grads(3))
        return before, sd
    before, sd = resumed('native')
    with pytest.raises(AssertionError): assert_same(before, sd)
    assert_same(*resumed(way))

@each_name
@each_way
def test_infinite_gradients(name, way):
    "Of ForEach and TorchScript, an exponential average may be NaN where fastai's is infinite; the parameter is lost in both"
    def run(way):
        opt, params = start(name, way)
        for gs in grads(3):
            gs = [g.clone() for g in gs]
            gs[1][0] = math.inf
            step_with(opt, params, gs)
        return params[1]
    native, own = run('native'), run(way)
    assert torch.equal(native.isfinite(), own.isfinite()) and not own.isfinite()[0]

def test_default_weight_decay_of_lamb():
    "The paper's, not fastai's"
    assert defaults('Lamb')['wd'] == .01 and inspect.signature(fai.Lamb).parameters['wd'].default == 0.

def test_lowercase_ranger():
    "fastai's builds an optimizer, ours is a `partial` as all lowercase names are"
    assert isinstance(fai.ranger([torch.ones(3)], lr=.1), fai.Lookahead)
    opt_func = helper('Ranger')(wd=.05)
    assert isinstance(opt_func, partial) and isinstance(opt_func([torch.ones(3)], lr=.1), fai.Lookahead)
