"What fastai's own page tells and tests of its optimizers, for native and for every backend"
import pytest
from common import *
from fastai.optimizer import Optimizer, OptimWrapper
from torch import nn
from torch.nn import functional as F

each_name = pytest.mark.parametrize('name', NAMES)
each_way = pytest.mark.parametrize('way', WAYS)

def leaf(value, grad=None):
    "A parameter of one or more numbers and its gradient, by default a tenth of it"
    p = torch.tensor([value]).float()
    p.grad = p/10 if grad is None else torch.tensor([grad]).float()
    return p

def four(): return [leaf(float(i)) for i in range(4)]

def close(got, expected, eps=1e-5):
    got = torch.stack([p.detach().squeeze() for p in got]) if isinstance(got, list) else got
    torch.testing.assert_close(got, torch.as_tensor(expected, dtype=got.dtype).view_as(got), rtol=0., atol=eps)

def same(a, b): return all(x is y for x,y in zip(a, b)) and len(a) == len(b)

# Parameter groups: what is given, and how many parameters each group has
GROUPS = {
    'a list': (lambda ps: ps, [4]),
    'a generator': (lambda ps: (p for p in ps), [4]),
    'an L': (lambda ps: L(ps), [4]),
    'lists': (lambda ps: [ps[:3], ps[3:]], [3, 1]),
    'a generator of lists': (lambda ps: (ps[i:i+2] for i in (0, 2)), [2, 2]),
    'Ls': (lambda ps: [L(ps[:1]), L(ps[1:])], [1, 3]),
    'an L of Ls': (lambda ps: L(L(ps[:1]), L(ps[1:])), [1, 3]),
    'one tensor': (lambda ps: ps[0], [1]),
}

@each_name
@each_way
@pytest.mark.parametrize('what', GROUPS)
def test_parameter_groups(name, way, what):
    make, sizes = GROUPS[what]
    params = four()
    opt = build(name, make(params), way)
    assert isinstance(opt, Optimizer)
    assert list(map(len, opt.param_lists)) == sizes == [len(pg['params']) for pg in opt.param_groups]
    assert same([p for pg in opt.param_lists for p in pg], params[:sum(sizes)])
    assert len(opt.hypers) == len(sizes)

# Values of a hyperparameter for three groups, and what each group gets
HYPERS = [
    (.1, [.1, .1, .1]),
    ([.1, .2, .3], [.1, .2, .3]),
    ((.1, .2, .3), [.1, .2, .3]),
    (np.array([.1, .2, .3]), [.1, .2, .3]),
    (slice(1e-2), [1e-3, 1e-3, 1e-2]),
    (slice(1e-4, 1e-2), [1e-4, 1e-3, 1e-2]),
    ([.5], [.5, .5, .5]),
]

@each_name
@each_way
@pytest.mark.parametrize('value,expected', HYPERS, ids=[str(v) for v,_ in HYPERS])
def test_hypers(name, way, value, expected):
    "At construction, by `set_hyper` and by `set_hypers`"
    def lrs(opt): return [h['lr'] for h in opt.hypers]
    params = [[leaf(1.), leaf(2.)], [leaf(3.)], [leaf(4.)]]
    opt = build(name, params, way, lr=value)
    assert lrs(opt) == pytest.approx(expected)
    others = [{k: v for k,v in h.items() if k != 'lr'} for h in opt.hypers]
    for change in (lambda o: o.set_hyper('lr', value), lambda o: o.set_hypers(lr=value)):
        opt = build(name, params, way, lr=1.)
        change(opt)
        assert lrs(opt) == [pg['lr'] for pg in opt.param_groups] == pytest.approx(expected)
        assert [{k: v for k,v in h.items() if k != 'lr'} for h in opt.hypers] == others

@each_name
@each_way
def test_hypers_are_not_shared(name, way):
    opt = build(name, [[leaf(1.)], [leaf(2.)]], way)
    opt.hypers[0]['lr'] = 7.
    assert opt.hypers[1]['lr'] != 7.

@each_name
@each_way
def test_param_groups(name, way):
    "What third-party code reads and writes: parameters and hyperparameters of each group, the latter can be set"
    params = [[leaf(1.), leaf(2.)], [leaf(3.)]]
    opt = build(name, params, way)
    groups = opt.param_groups
    assert [set(g) for g in groups] == [{'params', *h} for h in opt.hypers]
    opt.param_groups = [{**g, 'lr': lr} for g,lr in zip(groups, (.5, .25))]
    assert [h['lr'] for h in opt.hypers] == [.5, .25]
    norm = nn.utils.clip_grad_norm_([p for g in opt.param_groups for p in g['params']], .1)
    assert norm > .1 and all(same(g['params'], pg) for g,pg in zip(groups, params))

@each_name
@each_way
def test_wrong_number_of_values(name, way):
    with pytest.raises(AssertionError): build(name, [[leaf(1.), leaf(2.)], [leaf(3.)], [leaf(4.)]], way, lr=np.array([.1, .2]))

@each_way
def test_sgd_steps(way):
    params = four()
    opt = build('SGD', params, way, lr=.1)
    opt.step()
    close(params, [i*.99 for i in range(4)])
    params = four()
    build('SGD', params, way, lr=.1, wd=.1).step()
    close(params, [i*.98 for i in range(4)])

@each_way
def test_without_a_gradient(way):
    params = four()
    opt = build('SGD', params, way, lr=.1)
    params[-1].grad = None
    opt.step()
    close(params, [0., .99, 1.98, 3.])
    assert same([o[0] for o in opt.all_params(with_grad=True)], params[:3]) and len(opt.all_params()) == 4
    assert not opt.state[params[-1]]

@each_way
def test_learning_rates_of_groups(way):
    params = four()
    opt = build('SGD', [params[:2], params[2:]], way, lr=.1)
    opt.hypers[0]['lr'] = .01
    opt.step()
    close(params, [0., .999, 1.98, 2.97])

@each_name
@each_way
def test_zero_grad(name, way):
    params = four()
    grads = [p.grad for p in params]
    build(name, params, way).zero_grad()
    assert all(p.grad is g and not g.any() for p,g in zip(params, grads))

@each_name
@each_way
def test_freezing(name, way):
    groups = [four(), four(), four()]
    opt = build(name, groups, way)
    def needs(i): return [p.requires_grad for p in groups[i]]
    opt.freeze_to(1)
    assert [needs(i) for i in range(3)] == [[False]*4, [True]*4, [True]*4] and opt.frozen_idx == 1
    opt.unfreeze()
    assert [needs(i) for i in range(3)] == [[True]*4]*3 and opt.frozen_idx == 0
    opt.freeze_to(-2)
    assert [needs(i) for i in range(3)] == [[False]*4, [True]*4, [True]*4]
    for p in groups[1][1::2]: opt.state[p] = {'force_train': True}
    opt.freeze()
    assert [needs(i) for i in range(3)] == [[False]*4, [False, True]*2, [True]*4]
    with pytest.warns(UserWarning, match='whole model is frozen'): opt.freeze_to(3)

@each_way
def test_state_dict(way):
    p = leaf([1., 2., 3.], [4., 5., 6.])
    opt = build('SGD', p, way, lr=.1, mom=.9)
    opt.step()
    close(opt.state[opt.param_lists[0][0]]['grad_avg'], [4., 5., 6.])
    q = leaf([10., 20., 30.], [40., 50., 60.])
    other = build('SGD', q, way, lr=.1, mom=.99)
    assert other.hypers[0]['mom'] == .99 and other.state == {}
    other.load_state_dict(opt.state_dict())
    assert other.hypers[0]['mom'] == .9
    close(other.state[other.param_lists[0][0]]['grad_avg'], [4., 5., 6.])

@each_name
@each_way
def test_clear_state(name, way):
    params = four()
    opt = build(name, params, way, mom=.9)
    opt.state[params[0]] = {'force_train': True}
    opt.state[params[1]] = {'do_wd': False}
    opt.step()
    assert len(opt.state[params[0]]) > 1
    opt.clear_state()
    assert [opt.state[p] for p in params] == [{'force_train': True}, {'do_wd': False}, {}, {}]

def rectification(t, sqr_mom=.99):
    "RAdam's degrees of freedom after `t` steps, and its factor"
    r_inf = 2/(1-sqr_mom) - 1
    r = r_inf - 2*t*sqr_mom**t/(1-sqr_mom**t)
    return r, math.sqrt(((r-4)*(r-2)*r_inf)/((r_inf-4)*(r_inf-2)*r)) if r > 5 else 0.

def root(t): return math.sqrt(sum(.01*.99**i for i in range(t))*.01) + 1e-8 # of RMSProp's average of equal gradients of .1

ONE_TO_THREE = torch.tensor([[1., 2., 3.]])
RECTIFIED = rectification(6)[1]

# Optimizer, hyperparameters, gradients of (1, 2, 3), how far it is after how many steps, and to what precision
WORKED = {
    'sgd': ('SGD', {}, [.1, .2, .3], {1: -.1*np.array([.1, .2, .3]), 2: -.2*np.array([.1, .2, .3])}, 1e-5),
    'sgd with momentum': ('SGD', dict(mom=.9), [.1, .2, .3], {1: -.1*np.array([.1, .2, .3]), 2: -.29*np.array([.1, .2, .3])}, 1e-5),
    'sgd with momentum and weight decay': ('SGD', dict(mom=.9, wd=.1), [.1, .2, .3], {1: -.02*np.array([1, 2, 3])}, 1e-5),
    'sgd with momentum and L2': ('SGD', dict(mom=.9, wd=.1, decouple_wd=False), [.1, .2, .3], {1: -.1*np.array([.2, .4, .6])}, 1e-5),
    'rmsprop': ('RMSProp', {}, [.1, .2, .3], {1: -1., 2: -1 - .01/root(2)}, 1e-4),
    'rmsprop with momentum': ('RMSProp', dict(mom=.9), [.1, .2, .3], {1: -1., 2: -1 - .1*.19/root(2)}, 1e-4),
    'adam': ('Adam', dict(wd=0.), [.1, .2, .3], {1: -.1, 2: -.2, 10: -1.}, 1e-3),
    'radam': ('RAdam', {}, [.1, .2, .3], {5: -.5*np.array([.1, .2, .3]), 6: -.5*np.array([.1, .2, .3]) - .1*RECTIFIED}, 1e-5),
    'qhadam': ('QHAdam', {}, [.1, .2, .3], {1: -.1, 2: -.2}, 1e-3),
    'larc': ('Larc', {}, [.1, .2, .3], {1: -.2*np.array([.01, .02, .03])}, 1e-5),
    'larc, clipped': ('Larc', {}, [.01, .02, .03], {1: -.1*np.array([.01, .02, .03])}, 1e-5),
    'lars': ('Larc', dict(clip=False), [.01, .02, .03], {1: -.2*np.array([.01, .02, .03])}, 1e-5),
    'lamb': ('Lamb', dict(wd=0.), [.1, .2, .3], {1: -.216}, 1e-3),
    'ranger': ('Ranger', dict(wd=0.), [.1, .2, .3], {5: -.5*np.array([.1, .2, .3]), 6: .5*(-.5*np.array([.1, .2, .3]) - .1*RECTIFIED)}, 1e-4),
}

@pytest.mark.parametrize('example', WORKED)
@each_way
def test_worked_example(example, way):
    name, kwargs, grad, moves, eps = WORKED[example]
    p = leaf([1., 2., 3.])
    opt = build(name, [p], way, lr=.1, **kwargs)
    for t in range(1, max(moves)+1):
        p.grad = torch.tensor([grad])
        opt.step()
        if t in moves: close(p, ONE_TO_THREE + torch.as_tensor(moves[t]), eps)

def test_radam_is_rectified_at_the_sixth_step(): assert [rectification(t)[0] > 5 for t in (1, 5, 6)] == [False, False, True]

@each_way
def test_momentum_in_state(way):
    params = four()
    opt = build('SGD', params, way, lr=.1, mom=.9)
    opt.step()
    opt.step()
    close(params, [i*(1 - .1*(.1 + .1*1.9)) for i in range(4)])
    close([opt.state[p]['grad_avg'] for p in params], [i*.19 for i in range(4)])

@each_way
def test_local_lr_in_state(way):
    "Of LARC: the first layer's is below `lr`, the second's is clipped; LARS does not clip"
    for clip,expected in ((True, [.02, .1]), (False, [.02, .2])):
        params = [leaf([1., 2., 3.], [.1, .2, .3]), leaf([1., 2., 3.], [.01, .02, .03])]
        opt = build('Larc', params, way, lr=.1, clip=clip)
        opt.step()
        assert [float(opt.state[p]['local_lr']) for p in params] == pytest.approx(expected, abs=1e-5)

@each_name
@each_way
def test_step_counts(name, way):
    params = four()
    opt = build(name, params, way)
    for _ in range(6): opt.step()
    assert [opt.state[p].get('step') for p in params] == ([6]*4 if OPTIMIZERS[name].counts_steps else [None]*4)

@each_way
def test_lookahead(way):
    "Slow weights are copied at the first step, and meet the fast ones at every `k`th"
    p = leaf([1., 2., 3.])
    opt = build('Ranger', [p], way, lr=.1, k=2, alpha=.25, wd=0.)
    assert opt.slow_weights is None and opt.count == 0
    opt.step()
    close(opt.slow_weights[0][0], ONE_TO_THREE)
    fast = p.clone()
    opt.step()
    close(opt.slow_weights[0][0], p)
    close(p, ONE_TO_THREE + .25*(fast - .1*.1*ONE_TO_THREE - ONE_TO_THREE))
    assert opt.count == 2
    opt.clear_state()
    assert opt.slow_weights is None and opt.count == 0

PYTORCH = [('Adam', torch.optim.AdamW, dict(wd=1e-2), dict(betas=(.9, .99), eps=1e-5, weight_decay=1e-2)),
           ('Adam', torch.optim.Adam, dict(wd=1e-2, decouple_wd=False), dict(betas=(.9, .99), eps=1e-5, weight_decay=1e-2)),
           ('SGD', torch.optim.SGD, dict(mom=.9, wd=1e-2, decouple_wd=False), dict(momentum=.9, weight_decay=1e-2)),
           ('RMSProp', torch.optim.RMSprop, {}, dict(alpha=.99, eps=1e-8)),
           ('RAdam', torch.optim.RAdam, dict(eps=1e-8), dict(betas=(.9, .99), eps=1e-8))]

@each_way
@pytest.mark.parametrize('name,torchs,kwargs,torch_kwargs', PYTORCH, ids=[f'{n}-{t.__name__}' for n,t,*_ in PYTORCH])
def test_as_in_pytorch(way, name, torchs, kwargs, torch_kwargs):
    "Training a layer with PyTorch's optimizer in fastai's `OptimWrapper` gives the same weights"
    torch.manual_seed(0)
    model, x, y = nn.Linear(4, 5), torch.randn(100, 3, 4), torch.randn(100, 3, 5)
    def trained(make):
        m = deepcopy(model)
        opt = make(m)
        for i in range(0, 100, 25):
            F.mse_loss(m(x[i:i+25]), y[i:i+25]).backward()
            opt.step()
            opt.zero_grad()
        return torch.cat([p.detach().flatten() for p in m.parameters()])
    theirs = trained(lambda m: OptimWrapper(opt=torchs(m.parameters(), lr=1e-3, **torch_kwargs)))
    close(trained(lambda m: build(name, m.parameters(), way, lr=1e-3, **kwargs)), theirs, 1e-6)

@each_way
def test_like_an_optim_wrapper(way):
    "The same groups and hyperparameters as fastai's wrapper around PyTorch's"
    params = [[torch.tensor([1., 2., 3.])], [torch.tensor([4., 5., 6.])]]
    opt = build('SGD', params, way, lr=[1e-3, 1e-2], mom=.9, wd=1e-2)
    wrapped = OptimWrapper(opt=torch.optim.SGD([dict(params=pg, lr=lr) for pg,lr in zip(params, (1e-3, 1e-2))], momentum=.9, weight_decay=1e-2))
    assert all(same(a, b) for a,b in zip(opt.param_lists, wrapped.param_lists))
    assert [{k: h[k] for k in opt.hypers[0]} for h in wrapped.hypers] == list(map(dict, opt.hypers))
    for o in (opt, wrapped): o.set_hyper('lr', [1e-4, 1e-3]), o.set_hyper('mom', .95)
    assert [{k: h[k] for k in opt.hypers[0]} for h in wrapped.hypers] == list(map(dict, opt.hypers))
