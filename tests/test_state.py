"State goes from any backend to any other, and training goes on as if nothing had happened"
import itertools, pickle

import pytest
from common import *

each_name = pytest.mark.parametrize('name', NAMES)
each_way = pytest.mark.parametrize('way', WAYS)

KWARGS = dict(lr=slice(1e-3, 1e-2), mom=.9, wd=.1) # other values than those a state is loaded into
STEPS, MORE = 10, 10 # past RAdam's rectification, and not where Lookahead synchronises

def grads(): return make_grads(tuple(SMALL.values()), steps=STEPS+MORE)

def start(name, way, **kwargs):
    "An optimizer with three groups, some of it without weight decay, as `Learner` would set it up"
    params = make_params(SMALL)
    opt = build(name, split(params, 3), way, **{**KWARGS, **kwargs})
    for p in params[1:3]: opt.state[p].update(do_wd=False, force_train=True)
    return opt, params

def interrupted(name, way):
    "An optimizer after `STEPS` steps"
    opt, params = start(name, way)
    train(opt, params, grads()[:STEPS])
    return opt, params

def resume(name, way, sd, params):
    "Another optimizer on copies of `params`, with the state `sd`, after `MORE` steps"
    params = [p.clone() for p in params]
    opt = build(name, split(params, 3), way, lr=1., mom=.5, wd=0.)
    opt.load_state_dict(sd)
    train(opt, params, grads()[STEPS:])
    return snapshot_without_grads(noop_steps, opt, params)

def noop_steps(opt, params): pass

@lru_cache(None)
def uninterrupted(name, way='native'): return snapshot_without_grads(lambda o, p: train(o, p, grads()), *start(name, way))

@each_name
@pytest.mark.parametrize('source,target', list(itertools.product(WAYS, WAYS)), ids='-to-'.join)
def test_saved_by_one_and_loaded_by_another(name, source, target):
    opt, params = interrupted(name, source)
    sd = saved_and_loaded(opt.state_dict(), weights_only=source != 'native') # native keeps an `L` in its state
    got = resume(name, target, sd, params)
    assert_same(uninterrupted(name), got, max(TOLERANCE[source], TOLERANCE[target]))
    if source == target: assert_same(uninterrupted(name, source), got)

@each_name
@pytest.mark.parametrize('source,target', list(itertools.product(WAYS, BACKENDS)), ids='-to-'.join)
def test_loading_leaves_the_callers_dict_alone(name, source, target):
    "It is not changed by loading, nor by the steps that follow, nor does it keep the old optimizer's tensors"
    opt, params = interrupted(name, source)
    sd = opt.state_dict()
    before = deepcopy(sd)
    resume(name, target, sd, params)
    assert_same(before, sd)
    assert_same(before, opt.state_dict())

@each_name
@each_way
def test_the_same_keys_as_native(name, way):
    def shape(x):
        if isinstance(x, dict): return {k: shape(v) for k,v in x.items()}
        if isinstance(x, (list, L)): return [shape(o) for o in x]
        return (x.shape, x.dtype) if isinstance(x, Tensor) and x.ndim else type(x) if isinstance(x, int) else None
    native, own = (shape(interrupted(name, w)[0].state_dict()) for w in ('native', way))
    assert native == own

@each_name
@pytest.mark.parametrize('way', BACKENDS)
def test_plain_containers(name, way):
    "What `torch.load(weights_only=True)` takes, and `torch.save` gives back unchanged"
    opt, params = interrupted(name, way)
    one_cycle(opt)(.1) # writes NumPy's numbers
    sd = opt.state_dict()
    def check(x):
        assert type(x) in (dict, list, int, float, bool, type(None), Tensor), type(x)
        for o in x.values() if isinstance(x, dict) else x if isinstance(x, list) else (): check(o)
    check(sd)
    assert_same(sd, saved_and_loaded(sd))

@each_name
@pytest.mark.parametrize('way', BACKENDS)
@pytest.mark.parametrize('copied', [deepcopy, lambda o: pickle.loads(pickle.dumps(o)), lambda o: saved_and_loaded(o, weights_only=False)],
                         ids=['deepcopy', 'pickle', 'torch.save'])
def test_copies(name, way, copied):
    "A copy of an optimizer with its parameters trains on as the original does, and apart from it"
    opt, params = interrupted(name, way)
    before = snapshot(opt, params)
    twin, twin_params = copied((opt, params))
    train(twin, twin_params, grads()[STEPS:])
    assert_same(before, snapshot(opt, params))
    assert_same(uninterrupted(name, way), snapshot_without_grads(noop_steps, twin, twin_params))

@each_name
@pytest.mark.parametrize('way', BACKENDS)
def test_copies_of_new_optimizers(name, way):
    "Also of one that never stepped"
    twin, params = deepcopy(start(name, way))
    train(twin, params, grads())
    assert_same(uninterrupted(name, way), snapshot_without_grads(noop_steps, twin, params))

@each_name
@each_way
def test_clear_state(name, way):
    "It keeps what `Learner` noted, and training starts anew"
    opt, params = interrupted(name, way)
    opt.clear_state()
    assert states(opt, params) == [dict(do_wd=False, force_train=True) if i in (1, 2) else {} for i in range(len(params))]
    fresh, fresh_params = start(name, 'native')
    for p,q in zip(fresh_params, params): p.copy_(q)
    train(opt, params, grads()), train(fresh, fresh_params, grads())
    assert_same(*(snapshot_without_grads(noop_steps, *o) for o in ((fresh, fresh_params), (opt, params))), TOLERANCE[way])

@each_name
@pytest.mark.parametrize('way', BACKENDS)
def test_state_of_another_dtype_and_layout(name, way):
    "A checkpoint of a float32 model in a float64 one, and of a contiguous model in one that is channels last"
    opt, params = interrupted(name, 'native')
    params = [p.double().to(memory_format=torch.channels_last) if p.ndim == 4 else p.double() for p in params]
    twin = build(name, split(params, 3), way, **KWARGS)
    twin.load_state_dict(opt.state_dict())
    for p in params:
        slots = [s for s in twin.state[p].values() if isinstance(s, Tensor) and s.ndim]
        assert all(s.dtype == p.dtype and s.stride() == p.stride() for s in slots)
    train(twin, params, [[g.double() for g in gs] for gs in grads()[STEPS:]])
    for a,b in zip(uninterrupted(name)['params'], params): torch.testing.assert_close(a, b.float().contiguous(), rtol=1e-4, atol=1e-5)

@each_name
@pytest.mark.parametrize('way', BACKENDS)
def test_parameters_that_never_stepped(name, way):
    "They have no state to save, and may have some later"
    opt, params = start(name, way)
    train(opt, params[:3], [gs[:3] for gs in grads()[:STEPS]])
    sd = saved_and_loaded(opt.state_dict())
    assert sd['state'][3:] == [{}, {}]
    got = resume(name, way, sd, params)
    def steps(opt, params):
        train(opt, params[:3], [gs[:3] for gs in grads()[:STEPS]])
        train(opt, params, grads()[STEPS:])
    assert_same(snapshot_without_grads(steps, *start(name, 'native')), got, TOLERANCE[way])

@each_name
@pytest.mark.parametrize('way', BACKENDS)
def test_groups_may_be_split_differently(name, way):
    "Loading into as many groups of another division puts state to parameters in their order, as native does"
    opt, params = interrupted(name, way)
    def resumed(way):
        copies = [p.clone() for p in params]
        other = build(name, [copies[:1], copies[1:2], copies[2:]], way, lr=1., mom=.5)
        other.load_state_dict(deepcopy(opt.state_dict()))
        return other, copies
    if name == 'Ranger': # its slow weights are kept by group
        with pytest.raises(ValueError, match='another model'): resumed(way)
        return
    def steps(opt, params): train(opt, params, grads()[STEPS:])
    assert_same(*(snapshot_without_grads(steps, *resumed(w)) for w in ('native', way)), TOLERANCE[way])
