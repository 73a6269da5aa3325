"Wrong uses get a clear error, and nothing is half done"
from typing import NamedTuple

import pytest
from common import *
from torch import nn

class Wrong(NamedTuple):
    "A wrong use, and the error it gives"
    what:str # The wrong use
    do:callable # See the tables
    error:type
    match:str # A part of the message
    names:tuple = NAMES # Optimizers it is possible with
    ways:tuple = BACKENDS

WITH_SQR_AVG = tuple(n for n in NAMES if 'sqr_avg' in slots_of(n))
COUNTING = tuple(n for n in NAMES if OPTIMIZERS[n].counts_steps)
LOOKAHEAD = tuple(n for n in NAMES if 'k' in defaults(n))

def leaf(*shape): return torch.ones(shape or (3,), requires_grad=True)

# Functions of a constructor with its backend, which is wrongly called
BUILD = [
    Wrong('an empty list',                   lambda f: f([], .1), ValueError, 'empty list of parameters'),
    Wrong('an empty generator',              lambda f: f((p for p in []), .1), ValueError, 'empty list of parameters'),
    Wrong('empty groups',                    lambda f: f([[], []], .1), ValueError, 'empty list of parameters'),
    Wrong('None for parameters',             lambda f: f(None, .1), ValueError, 'empty list of parameters'),
    Wrong('a module without parameters',     lambda f: f(nn.ReLU().parameters(), .1), ValueError, 'empty list of parameters'),
    Wrong('numbers',                         lambda f: f([1., 2.], .1), TypeError, 'float: 1.0'),
    Wrong('one number',                      lambda f: f(3, .1), TypeError, 'int: 3'),
    Wrong('a name',                          lambda f: f('weight', .1), TypeError, "str: 'weight'"),
    Wrong('a module',                        lambda f: f(nn.Linear(2, 2), .1), TypeError, 'Linear'),
    Wrong('named_parameters()',              lambda f: f(nn.Linear(2, 2).named_parameters(), .1), TypeError, 'tuple'),
    Wrong('a state dict of a model',         lambda f: f(nn.Linear(2, 2).state_dict(), .1), TypeError, "str: 'weight'|OrderedDict"),
    Wrong('groups of torch.optim',           lambda f: f([dict(params=[leaf()])], .1), TypeError, 'dict'),
    Wrong('None among parameters',           lambda f: f([leaf(), None], .1), TypeError, 'NoneType'),
    Wrong('an array',                        lambda f: f([np.ones(3)], .1), TypeError, 'ndarray'),
    Wrong('integers',                        lambda f: f([torch.ones(3, dtype=torch.int64)], .1), TypeError, r'\(3,\) int64 on cpu.*`.float\(\)`'),
    Wrong('bytes, in the second group',      lambda f: f([[leaf()], [torch.ones(3, dtype=torch.uint8)]], .1), TypeError, 'uint8'),
    Wrong('booleans',                        lambda f: f([torch.ones(3, dtype=torch.bool)], .1), TypeError, r'\(3,\) bool on cpu'),
    Wrong('complex numbers',                 lambda f: f([torch.ones(3, dtype=torch.complex64)], .1), TypeError, 'complex64 on cpu'),
    Wrong('no leaf',                         lambda f: f([leaf()*2], .1), ValueError, 'not a leaf'),
    Wrong('a view of a parameter',           lambda f: f([leaf()[1:]], .1), ValueError, 'not a leaf'),
    Wrong('no leaf, in the second group',    lambda f: f([[leaf()], [leaf()*2]], .1), ValueError, 'not a leaf'),
    Wrong('no lr',                           lambda f: f([leaf()]), TypeError, 'lr'),
    Wrong('None for lr',                     lambda f: f([leaf()], None), AssertionError, 'Trying to set 0 values for lr'),
    Wrong('too few lrs',                     lambda f: f([[leaf()], [leaf()], [leaf()]], [.1, .2]), AssertionError, 'Trying to set 2 values for lr'),
    Wrong('too many lrs',                    lambda f: f([[leaf()], [leaf()]], np.array([.1, .2, .3])), AssertionError, 'Trying to set 3 values for lr'),
    Wrong('lrs and no groups',               lambda f: f([leaf(), leaf()], [.1, .2]), AssertionError, 'Trying to set 2 values for lr but there are 1'),
    Wrong('no lrs',                          lambda f: f([leaf()], []), AssertionError, 'Trying to set 0 values for lr'),
    Wrong('too many wds',                    lambda f: f([leaf()], .1, wd=[.1, .2]), AssertionError, 'Trying to set 2 values for wd'),
    Wrong('too few moms',                    lambda f: f([[leaf()], [leaf()], [leaf()]], .1, mom=[.9, .8]), AssertionError, 'Trying to set 2 values for mom'),
    Wrong('a misspelt flag',                 lambda f: f([leaf()], .1, forech=True), TypeError, 'forech'),
    Wrong('betas',                           lambda f: f([leaf()], .1, betas=(.9, .99)), TypeError, 'betas'),
    Wrong('lr twice',                        lambda f: f([leaf()], .1, lr=.1), TypeError, 'lr'),
    Wrong('too many arguments',              lambda f: f([leaf()], *[.1]*20), TypeError, 'positional|multiple values'),
    Wrong('a second backend',                lambda f: f([leaf()], .1, **{b: True for b in BACKENDS}), ValueError, 'Use one of'),
    Wrong('k of 0',                          lambda f: f([leaf()], .1, k=0), ValueError, 'cannot be 0', LOOKAHEAD),
    Wrong('state without kernels',           lambda f: f([leaf()], .1, fused=False, state='bfloat16'), ValueError, 'use `fused=True`'),
    Wrong('state in an unknown form',        lambda f: f([leaf()], .1, state='float11'), ValueError, "'bfloat16'.*'float11'"),
    Wrong('a negative k',                    lambda f: f([leaf()], .1, k=-6), ValueError, 'cannot be -6', LOOKAHEAD),
    Wrong('freezing the only group',         lambda f: f([leaf()], .1).freeze(), AssertionError, ''),
]

# Functions of a lowercase helper and the flags of its backend, which is wrongly called
HELPER = [
    Wrong('a misspelt flag',                 lambda f, flags: f(forech=True, **flags), TypeError, 'forech'),
    Wrong('lr, which Learner sets',          lambda f, flags: f(lr=.1, **flags), TypeError, 'lr'),
    Wrong('params, which Learner sets',      lambda f, flags: f(params=[leaf()], **flags), TypeError, 'params'),
    Wrong('too many arguments',              lambda f, flags: f(*[.1]*20, **flags), TypeError, 'positional|multiple values'),
    Wrong('a second backend',                lambda f, flags: f(**{b: True for b in BACKENDS}), ValueError, 'Use one of'),
    Wrong('state in an unknown form',        lambda f, flags: f(**flags, state='float11'), ValueError, "'bfloat16'.*'float11'"),
    Wrong('a backend twice',                 lambda f, flags: f(**flags)([leaf()], lr=.1, **{b: True for b in BACKENDS if b not in flags}), ValueError, 'Use one of'),
]

def grad_is(change):
    def prepare(opt, params):
        params[1].grad = change(params[1].grad)
        return opt.step
    return prepare

def data_is(change):
    "With a gradient of what it was before"
    def prepare(opt, params):
        params[1].data = change(params[1].data)
        return opt.step
    return prepare

def slot_is(change, name=None):
    def prepare(opt, params):
        state = opt.state[params[1]]
        slot = name or next(k for k,v in state.items() if isinstance(v, Tensor) and k not in KEPT)
        state[slot] = change(state[slot])
        return opt.step
    return prepare

def hyper_is(name, value):
    def prepare(opt, params):
        opt.hypers[1][name] = value
        return opt.step
    return prepare

def no_hyper(name):
    def prepare(opt, params):
        del opt.hypers[1][name]
        return opt.step
    return prepare

def slow_is(change):
    def prepare(opt, params):
        opt.step(), opt.step(), opt.step()
        opt.slow_weights[1][-1] = change(opt.slow_weights[1][-1])
        return opt.step
    return prepare

def call(f): return lambda opt, params: lambda: f(opt, params)

# Functions of an optimizer with two groups after two steps and its parameters: they prepare something, and return what goes wrong
USE = [
    Wrong('a closure',                       call(lambda opt, params: opt.step(lambda: 0.)), NotImplementedError, 'do not support closure'),
    Wrong('a closure by name',               call(lambda opt, params: opt.step(closure=lambda: 0.)), NotImplementedError, 'do not support closure'),
    Wrong('a closure that is no function',   call(lambda opt, params: opt.step(0)), NotImplementedError, 'do not support closure'),
    Wrong('two arguments of step',           call(lambda opt, params: opt.step(None, None)), TypeError, 'positional'),
    Wrong('a sparse gradient',               grad_is(lambda g: g.to_sparse()), RuntimeError, r'gradient of .*\(10,\) float32 on cpu.*sparse=False'),
    Wrong('a parameter of another shape',    data_is(lambda d: d[:4].clone()), RuntimeError, r'gradient of a parameter of \(4,\).* is of \(10,\)'),
    Wrong('a parameter of another dtype',    data_is(lambda d: d.double()), RuntimeError, 'float64 on cpu is of .*float32.*zero_grad'),
    Wrong('a slot of another shape',         slot_is(lambda s: s[:4].clone()), RuntimeError, r"state '\w+' of a parameter of \(10,\).*must agree"),
    Wrong('a slot that would broadcast',     slot_is(lambda s: s[:1].clone()), RuntimeError, r"state '\w+' of a parameter of \(10,\).*must agree"),
    Wrong('a slot on another device',        slot_is(lambda s: s.to('meta')), RuntimeError, 'on meta, and they must agree'),
    Wrong('a sparse slot',                   slot_is(lambda s: s.to_sparse()), RuntimeError, 'layout torch.sparse_coo'),
    Wrong('a number for a slot',             slot_is(lambda s: 0.), RuntimeError, 'is 0.0, not a tensor'),
    Wrong('an array for a slot',             slot_is(lambda s: s.numpy()), RuntimeError, 'not a tensor'),
    Wrong('a list for a second slot',        slot_is(lambda s: s.tolist(), 'sqr_avg'), RuntimeError, 'not a tensor', WITH_SQR_AVG),
    Wrong('a step that is no number',        slot_is(lambda s: 'two', 'step'), TypeError, 'step|str', COUNTING),
    Wrong('a name for lr',                   hyper_is('lr', 'fast'), TypeError, "`lr` has to be a number, and is 'fast'"),
    Wrong('None for lr',                     hyper_is('lr', None), TypeError, '`lr` has to be a number, and is None'),
    Wrong('a list for wd',                   hyper_is('wd', [.1, .2]), TypeError, '`wd` has to be a number'),
    Wrong('None for mom',                    hyper_is('mom', None), TypeError, ''),
    Wrong('a complex number for lr',         hyper_is('lr', .1j), TypeError, '`lr` has to be a number, and is 0.1j'),
    Wrong('an array of two for lr',          hyper_is('lr', np.ones(2)), TypeError, '`lr` has to be a number, and is array'),
    Wrong('a tensor of two for wd',          hyper_is('wd', torch.ones(2)), TypeError, '`wd` has to be a number, and is tensor'),
    Wrong('a name for beta',                 hyper_is('beta', 'sharp'), TypeError, "`beta` has to be a number, and is 'sharp'", ('RAdam', 'Ranger')),
    Wrong('no lr',                           no_hyper('lr'), (KeyError, TypeError), 'lr'),
    Wrong('no mom',                          no_hyper('mom'), (KeyError, TypeError), 'mom', tuple(n for n in COUNTING)),
    Wrong('slow weights of another shape',   slow_is(lambda s: s[:2].clone()), RuntimeError, 'slow_weights', LOOKAHEAD),
    Wrong('too many lrs',                    call(lambda opt, params: opt.set_hyper('lr', [.1, .2, .3])), AssertionError, 'Trying to set 3 values for lr'),
    Wrong('no lrs',                          call(lambda opt, params: opt.set_hyper('lr', [])), AssertionError, 'Trying to set 0 values for lr'),
    Wrong('a negative lr',                   call(lambda opt, params: opt.set_hyper('lr', -.01)), ValueError, '`lr` has to be a number of at least 0, and is -0.01'),
    Wrong('an lr of NaN',                    call(lambda opt, params: opt.set_hyper('lr', [.1, math.nan])), ValueError, '`lr` .* and is nan'),
    Wrong('a word for lr',                   call(lambda opt, params: opt.set_hyper('lr', 'fast')), TypeError, "`lr` has to be a number, and is 'fast'"),
    Wrong('a name of torch.optim',           call(lambda opt, params: opt.set_hyper('weight_decay', .5)), ValueError, 'has no `weight_decay`: it is `wd` here'),
    Wrong('an unknown hyperparameter',       call(lambda opt, params: opt.set_hyper('nesterov', True)), ValueError, 'has no `nesterov`: there are'),
    Wrong('too many moms',                   call(lambda opt, params: opt.set_hypers(mom=[.1, .2, .3])), AssertionError, 'Trying to set 3 values for mom'),
    Wrong('a group for torch.optim',         call(lambda opt, params: opt.add_param_group(dict(params=[leaf()]))), AttributeError, 'add_param_group'),
]

def without(key): return lambda sd: {k: v for k,v in sd.items() if k != key}

def each_state(change): return lambda sd: {**sd, 'state': [change(s) for s in sd['state']]}

def each_slot(change):
    "One slot of each parameter"
    def changed(state):
        slot = next(k for k,v in state.items() if isinstance(v, Tensor) and k not in KEPT)
        return {**state, slot: change(state[slot])}
    return each_state(changed)

def each_hyper(change): return lambda sd: {**sd, 'hypers': [change(h) for h in sd['hypers']]}

def of_torch(sd):
    p = leaf()
    opt = torch.optim.AdamW([p])
    p.sum().backward()
    opt.step()
    return opt.state_dict()

def of_another(sd):
    "Of Adam, or of SGD for those that have Adam's hyperparameters and slots"
    other = build('SGD' if 'nu_1' not in sd['hypers'][0] and 'eps' in sd['hypers'][0] else 'Adam', split(make_params([(3,)]*2), 2))
    return other.state_dict()

def last_slow(change): return lambda sd: {**sd, 'slow_weights': [[change(s) for s in pg] for pg in sd['slow_weights']]}

# Functions of the state dict of the same optimizer, which return what is wrongly loaded
LOAD = [
    Wrong('None',                            lambda sd: None, (TypeError, ValueError), ''),
    Wrong('an empty dict',                   lambda sd: {}, ValueError, "no hypers and no state|Lookahead"),
    Wrong('a list',                          lambda sd: list(sd.values()), (TypeError, ValueError), ''),
    Wrong('the state dict of a model',       lambda sd: nn.Linear(2, 2).state_dict(), ValueError, 'no hypers|Lookahead'),
    Wrong('of torch.optim',                  of_torch, ValueError, 'no hypers|Lookahead'),
    Wrong('of another optimizer',            of_another, ValueError, 'of another optimizer|Lookahead|other|parameters'),
    Wrong('no state',                        without('state'), ValueError, 'no state'),
    Wrong('no hypers',                       without('hypers'), ValueError, 'no hypers'),
    Wrong('None for state',                  lambda sd: {**sd, 'state': None}, (TypeError, ValueError), ''),
    Wrong('None for hypers',                 lambda sd: {**sd, 'hypers': None}, (TypeError, ValueError), ''),
    Wrong('too few groups',                  lambda sd: {**sd, 'hypers': sd['hypers'][:1]}, ValueError, '1 parameter groups, and this one has 2'),
    Wrong('too many groups',                 lambda sd: {**sd, 'hypers': [*sd['hypers']]*2}, ValueError, '4 parameter groups, and this one has 2'),
    Wrong('too few parameters',              lambda sd: {**sd, 'state': sd['state'][:-1]}, ValueError, '4 parameters, and this one has 5'),
    Wrong('too many parameters',             lambda sd: {**sd, 'state': [*sd['state'], {}]}, ValueError, '6 parameters, and this one has 5'),
    Wrong('parameters in another order',     lambda sd: {**sd, 'state': sd['state'][::-1]}, ValueError, 'another model'),
    Wrong('a list for a state',              each_state(lambda s: list(s)), (TypeError, ValueError, AttributeError), ''),
    Wrong('None for a state',                each_state(lambda s: None), (TypeError, ValueError, AttributeError), ''),
    Wrong('an additional hyper',             each_hyper(lambda h: {**h, 'nesterov': True}), ValueError, 'of another optimizer.*nesterov'),
    Wrong('a hyper is missing',              each_hyper(lambda h: {k: v for k,v in h.items() if k != 'lr'}), ValueError, 'of another optimizer'),
    Wrong('a hyper whose name is none',      each_hyper(lambda h: {**h, (1, 2): 3.}), ValueError, 'of another optimizer'),
    Wrong('a list for hypers',               each_hyper(list), (TypeError, ValueError), ''),
    Wrong('a slot of another shape',         each_slot(lambda s: s.new_zeros(3, 3)), ValueError, 'another model'),
    Wrong('a slot that would broadcast',     each_slot(lambda s: s.new_zeros(1)), ValueError, 'another model'),
    Wrong('a number for a slot',             each_slot(lambda s: 0.), ValueError, 'is 0.0'),
    Wrong('None for a slot',                 each_slot(lambda s: None), ValueError, 'is None'),
    Wrong('an array for a slot',             each_slot(lambda s: s.numpy()), ValueError, 'another model'),
    Wrong('a slot it does not keep',         each_state(lambda s: {**s, 'slow_weights': torch.zeros(3)}), ValueError, "'slow_weights', which"),
    Wrong('a step that is no number',        each_state(lambda s: {**s, 'step': 'ten'}), (TypeError, ValueError), '', COUNTING),
    Wrong('None for step',                   each_state(lambda s: {**s, 'step': None}), (TypeError, ValueError), '', COUNTING),
    Wrong('a step that is NaN',              each_state(lambda s: {**s, 'step': math.nan}), ValueError, '', COUNTING),
    Wrong('no count',                        without('count'), ValueError, "without Lookahead", LOOKAHEAD),
    Wrong('no slow weights',                 without('slow_weights'), ValueError, "without Lookahead", LOOKAHEAD),
    Wrong('a count that is no number',       lambda sd: {**sd, 'count': 'ten'}, (TypeError, ValueError), '', LOOKAHEAD),
    Wrong('None for count',                  lambda sd: {**sd, 'count': None}, (TypeError, ValueError), '', LOOKAHEAD),
    Wrong('too few slow weights',            lambda sd: {**sd, 'slow_weights': [pg[:1] for pg in sd['slow_weights']]}, ValueError, 'another model', LOOKAHEAD),
    Wrong('slow weights of one group',       lambda sd: {**sd, 'slow_weights': sd['slow_weights'][:1]}, ValueError, 'another model', LOOKAHEAD),
    Wrong('slow weights of another shape',   last_slow(lambda s: s[..., None]), ValueError, "'slow_weights'", LOOKAHEAD),
    Wrong('no tensors for slow weights',     last_slow(lambda s: None), ValueError, "'slow_weights'", LOOKAHEAD),
]

def cases(table):
    "Each wrong use with each backend that it is possible with"
    return pytest.mark.parametrize('wrong,way', [pytest.param(w, way, id=f'{w.what}-{way}') for w in table for way in w.ways])

def have(way, names=NAMES):
    "Those of `names` that have a backend"
    return [n for n in names if way in ways(n)]

def start(name, way, **kwargs):
    params = make_params(SMALL)
    opt = build(name, split(params, 2), way, mom=.9, wd=.1, **kwargs)
    opt.state[params[1]]['do_wd'] = False
    train(opt, params, make_grads(tuple(SMALL.values()), steps=2))
    return opt, params

def assert_refused(wrong, thunk, opt, params):
    before = snapshot(opt, params)
    with pytest.raises(wrong.error, match=f'(?s){wrong.match}'): thunk()
    assert_same(before, snapshot(opt, params))

def test_there_are_enough(): assert sum(map(len, (BUILD, HELPER, USE, LOAD))) >= 100

@cases(BUILD)
def test_building(wrong, way):
    for name in have(way, wrong.names):
        with pytest.raises(wrong.error, match=wrong.match): wrong.do(partial(constructor(name), **flags(way)))

@cases(HELPER)
def test_helpers(wrong, way):
    for name in have(way, wrong.names):
        with pytest.raises(wrong.error, match=wrong.match): wrong.do(helper(name), flags(way))

@cases(USE)
def test_using(wrong, way):
    for name in have(way, wrong.names):
        opt, params = start(name, way)
        assert_refused(wrong, wrong.do(opt, params), opt, params)

@cases(LOAD)
def test_loading(wrong, way):
    for name in have(way, wrong.names):
        opt, params = start(name, way)
        sd = wrong.do(start(name, 'native')[0].state_dict())
        kept = deepcopy(sd)
        assert_refused(wrong, lambda: opt.load_state_dict(sd), opt, params)
        assert repr(sd) == repr(kept)

# What looks wrong and is not: functions of an optimizer with two groups and its parameters, after which native and ours agree
FINE = {
    'no gradients at all': lambda opt, params: set_none(params),
    'no gradients in a group': lambda opt, params: set_none(params[:2]),
    'no gradients in the last group': lambda opt, params: set_none(params[2:]),
    'one gradient': lambda opt, params: set_none(params[1:]),
    'gradients of zeros': lambda opt, params: opt.zero_grad(),
    'NaN in a gradient': lambda opt, params: params[1].grad.fill_(math.nan),
    'lr of 0': lambda opt, params: opt.set_hyper('lr', 0.),
    'an lr that is an integer': lambda opt, params: opt.set_hyper('lr', 2),
    'an lr of NumPy': lambda opt, params: opt.set_hyper('lr', np.array([np.float32(.5), np.float32(.25)])),
    'an lr that is a tensor': lambda opt, params: opt.hypers[1].update(lr=torch.tensor(.25)),
    'a wd of NumPy': lambda opt, params: opt.hypers[1].update(wd=np.float64(.25)),
    'a wd that is an integer': lambda opt, params: opt.set_hyper('wd', 1),
    'mom of 0': lambda opt, params: opt.set_hyper('mom', 0),
    'mom, which schedules set of every optimizer': lambda opt, params: opt.set_hyper('sqr_mom', opt.hypers[0].get('sqr_mom', .9)),
    'an unknown item of state': lambda opt, params: opt.state[params[1]].update(note='mine'),
    'do_wd that is a number': lambda opt, params: opt.state[params[1]].update(do_wd=0),
    'clear_state': lambda opt, params: opt.clear_state(),
    'an expanded gradient': lambda opt, params: setattr(params[1], 'grad', torch.ones(()).expand(10)),
    'a transposed gradient': lambda opt, params: setattr(params[4], 'grad', torch.ones(7, 5).t()),
    'a gradient of a gradient': lambda opt, params: setattr(params[1], 'grad', (leaf(10)*2)),
    'requires_grad off': lambda opt, params: params[1].requires_grad_(False),
    'data replaced': lambda opt, params: setattr(params[4], 'data', params[4].data.t().contiguous().t()),
}

def set_none(params):
    for p in params: p.grad = None

# What Prodigy carries is made of how far weights went, and in two steps a rounding error of a weight is much of that: it is not compared,
# and what follows from it only roughly
CARRIED = 10_000

@pytest.mark.parametrize('way', BACKENDS)
@pytest.mark.parametrize('what', FINE)
def test_what_looks_wrong_and_is_not(what, way):
    def run(name, way):
        opt, params = start(name, way)
        FINE[what](opt, params)
        for _ in range(2): opt.step()
        return {k: v for k,v in snapshot(opt, params).items() if k not in ('grads', 'carried')}
    for name in have(way): assert_same(run(name, 'native'), run(name, way), CARRIED if OPTIMIZERS[name].composition().carried else TOLERANCE[way])

@pytest.mark.parametrize('way', BACKENDS)
@pytest.mark.parametrize('name,when', [('RAdam', 'built'), ('RAdam', 'set later'), ('Ranger', 'set later')])
def test_sadam_has_every_backend(name, when, way):
    "`beta` in one group of two, from the first step on or after some steps of RAdam"
    def run(way):
        opt, params = start(name, way, **(dict(beta=[0., 50.]) if when == 'built' else {}))
        if when != 'built': opt.hypers[1]['beta'] = 50.
        for _ in range(7): opt.step()
        return {k: v for k,v in snapshot(opt, params).items() if k != 'grads'}
    assert_same(run('native'), run(way), TOLERANCE[way])

@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('make', [iter, tuple, L, lambda ps: (p for p in ps), lambda ps: [list(ps[:2]), list(ps[2:])], lambda ps: (L(g) for g in (ps[:2], ps[2:])),
                                  lambda ps: [L(ps)]], ids=['iterator', 'tuple', 'L', 'generator', 'lists', 'generator of Ls', 'one L in a list'])
def test_ways_to_give_parameters(name, way, make):
    params = make_params(SMALL)
    opt = build(name, make(params), way)
    assert all(p is q for p,q in zip(params, opt.all_params().itemgot(0)))
    train(opt, params, make_grads(tuple(SMALL.values()), steps=2))

@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('way', BACKENDS)
def test_freezing_too_much_warns(name, way):
    opt, _ = start(name, way)
    with pytest.warns(UserWarning, match='whole model is frozen'): opt.freeze_to(2)
