"Scalars of the whole model that are carried from step to step, as Prodigy's estimate is: one for all groups, the same on all backends, in checkpoints"
import pickle, warnings

import pytest
from common import *
from common import helper as helper_named
from fastai.vision.all import Learner, DataLoaders, DataLoader
from torch import nn

from fastxtend import optim

HYPERS = dict(first_estimate=1e-3, wd=.01)
WAYS_OF_PRODIGY = ways('Prodigy')

# The numerator is made of how far weights went, in which a rounding error of a weight is many of the way it went, and all else follows the
# estimate. Measured: 48
BETWEEN = 4*TOLERANCE['fused']

@pytest.fixture(autouse=True)
def one_thread():
    with threads(1): yield

def start(dtype=torch.float32, steps=12):
    "Gradients that agree on where to go, so that the estimate grows"
    return make_params(SMALL, dtype), [[g + .5 for g in gs] for gs in make_grads(tuple(SMALL.values()), dtype, steps)]

def make(params, way='fused', n_groups=3, **kwargs): return build('Prodigy', split(params, n_groups), way, lr=1., **{**HYPERS, **kwargs})

def estimate(opt): return opt.state_dict()['carried']['estimate']

@pytest.mark.parametrize('n_groups', (1, 3))
def test_one_for_all_groups_and_backends(n_groups):
    def run(way):
        params, grads = start()
        opt = make(params, way, n_groups)
        train(opt, params, grads)
        return snapshot(opt, params)
    expected = run('native')
    assert expected['carried']['estimate'] > 2*HYPERS['first_estimate']
    for way in WAYS_OF_PRODIGY[1:]: assert_same(expected, run(way), BETWEEN)

def test_parameters_of_several_dtypes():
    "Several parts of a step have one estimate"
    def run(way):
        (params, grads), (wide, wide_grads) = start(), start(torch.float64)
        params, grads = params + wide, [a + b for a,b in zip(grads, wide_grads)]
        opt = make(params, way)
        train(opt, params, grads)
        return snapshot(opt, params)
    assert_same(run('native'), run('fused'), TOLERANCE['fused']*1e9) # float64 follows an estimate with the error of float32 sums

@pytest.mark.parametrize('first', WAYS_OF_PRODIGY)
@pytest.mark.parametrize('then', WAYS_OF_PRODIGY)
def test_checkpoints(first, then):
    "Half the steps, a file, and the other half on another backend, as without a break"
    params, grads = start()
    whole = make(params, first)
    train(whole, params, grads)
    other, _ = start()
    opt = make(other, first)
    train(opt, other, grads[:6])
    sd = saved_and_loaded(opt.state_dict())
    assert set(sd['carried']) == {'estimate', 'numerator', 'greatest'} and all(type(x) is float for x in sd['carried'].values())
    resumed = make(other, then)
    resumed.load_state_dict(sd)
    train(resumed, other, grads[6:])
    assert_same(snapshot(whole, params), snapshot(resumed, other), BETWEEN if then != first else 0.)

@pytest.mark.parametrize('copied', (deepcopy, lambda o: pickle.loads(pickle.dumps(o))), ids=('deepcopy', 'pickle'))
def test_copies_go_on(copied):
    params, grads = start()
    opt = make(params)
    train(opt, params, grads[:6])
    other = copied(opt)
    others = [p for pg in other.param_lists for p in pg]
    train(opt, params, grads[6:])
    train(other, others, grads[6:])
    assert_same(snapshot(opt, params), snapshot(other, others))

def test_begins_anew():
    params, grads = start()
    opt = make(params)
    train(opt, params, grads)
    opt.clear_state()
    assert opt.carried == {} and opt.state_dict()['carried'] == {}
    again = make(fresh := [p.clone() for p in params])
    train(opt, params, grads)
    train(again, fresh, grads)
    assert_same(snapshot(again, fresh), snapshot(opt, params))

@pytest.mark.parametrize('carried', (None, dict(estimate=1.)), ids=('none', 'one of three'))
def test_what_does_not_fit_is_refused(carried):
    params, grads = start()
    opt = make(params)
    train(opt, params, grads)
    sd, before = deepcopy(opt.state_dict()), snapshot(opt, params)
    del sd['carried']
    with pytest.raises(ValueError, match='carried'): opt.load_state_dict({**sd, **(dict(carried=carried) if carried else {})})
    adam = build('Adam', params, 'fused')
    with pytest.raises(ValueError, match='another optimizer'): adam.load_state_dict(opt.state_dict())
    assert_same(before, snapshot(opt, params))

@pytest.mark.parametrize('way', WAYS_OF_PRODIGY)
def test_late_unfreezing(way):
    "The estimate goes on; what is unfrozen starts where it is"
    params, grads = start()
    for p in params: p.requires_grad_()
    opt = make(params, way)
    opt.freeze_to(-1)
    with torch.no_grad(): train(opt, params, grads[:6])
    before = estimate(opt)
    assert before > HYPERS['first_estimate'] and 'grad_sum' not in opt.state[params[0]]
    opt.unfreeze()
    with torch.no_grad():
        at = params[0].clone()
        train(opt, params, grads[6:])
    assert estimate(opt) >= before and torch.equal(opt.state[params[0]]['first_weights'], at) and opt.state[params[0]]['step'] == 6

@pytest.mark.parametrize('way', WAYS_OF_PRODIGY)
@pytest.mark.parametrize('name', ('sqr_mom', 'coef', 'growth', 'first_estimate', 'estimate_mom'))
def test_what_belongs_to_all_groups(name, way):
    "Refused, and nothing changes, if it differs between them"
    params, grads = start()
    opt = make(params, way)
    train(opt, params, grads)
    before = snapshot(opt, params)
    opt.set_hyper(name, [.9, .9, .8])
    with pytest.raises(ValueError, match=f'`{name}` has to be the same'): opt.step()
    opt.hypers = L(dict(h) for h in before['hypers'])
    assert_same(before, snapshot(opt, params))

def test_no_gradient_no_estimate():
    "Zeros go nowhere"
    params, grads = start()
    before = [p.clone() for p in params]
    for way in WAYS_OF_PRODIGY:
        opt = make(params, way, wd=0.)
        step_with(opt, params, [torch.zeros_like(p) for p in params])
        assert estimate(opt) == HYPERS['first_estimate'] and all(map(torch.equal, before, params))

def test_nan():
    "The estimate stays where it is, and never shrinks"
    for way in WAYS_OF_PRODIGY:
        params, grads = start()
        opt = make(params, way)
        train(opt, params, grads[:6])
        before = estimate(opt)
        step_with(opt, params, [torch.full_like(p, math.nan) for p in params])
        assert estimate(opt) == before

@pytest.mark.parametrize('fused', (False, None), ids=('steppers', 'fused'))
def test_as_torch_optimizer(fused):
    "The same numbers; `carried` is in the first group, and in its checkpoint"
    (params, grads), (other, _) = start(), start()
    opt = make(params, n_groups=1)
    train(opt, params, grads)
    def made(): return optim.Prodigy(other, foreach=fused, first_estimate=1e-3, weight_decay=.01)
    torch_opt = made()
    train(torch_opt, other, grads[:6])
    sd = saved_and_loaded(torch_opt.state_dict())
    torch_opt = made()
    torch_opt.load_state_dict(sd)
    train(torch_opt, other, grads[6:])
    for a,b in zip(params, other): assert distance(a, b) <= TOLERANCE['fused']
    assert torch_opt.state_dict()['param_groups'][0]['carried']['estimate'] == pytest.approx(estimate(opt), rel=1e-5)

def test_learning_rate():
    "1 by itself; far below 1 warns once, and what the schedules of fastai begin with does not"
    data = DataLoaders(*[DataLoader([(torch.randn(3), torch.randn(1)) for _ in range(8)], bs=4) for _ in range(2)])
    learn = Learner(data, nn.Linear(3, 1), loss_func=nn.MSELoss(), opt_func=helper_named('Prodigy')(fused=True))
    learn.create_opt()
    assert learn.opt.hypers[0]['lr'] == 1.
    assert repr(helper_named('Prodigy')(fused=True)) == 'prodigy(fused=True)'
    def warned(f):
        with warnings.catch_warnings(record=True) as ws:
            warnings.simplefilter('always')
            with learn.no_bar(), learn.no_logging(): f()
        return [w for w in ws if 'Prodigy finds its own' in str(w.message)]
    assert not warned(lambda: learn.fit_one_cycle(1))
    learn.create_opt()
    assert not warned(lambda: learn.fit_flat_cos(1))
    learn.create_opt()
    assert len(warned(lambda: learn.fit(2, lr=1e-3))) == 1
