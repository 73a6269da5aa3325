"Optimizers of torch.optim in fastai: against plain torch with the groups written out, and against fastai's own"
from __future__ import annotations

import io
from copy import deepcopy
from functools import partial

import pytest, torch
from fastai import optimizer as fai
from fastai.basics import DataLoader, DataLoaders, Learner, MSELossFlat, OptimWrapper, set_seed
from fastai.callback.all import GradientClip, ReduceLROnPlateau
from torch import nn, optim

import fastxtend.schedulers
from fastxtend.callback.averaging import EMACallback
from fastxtend.optimizer.wrapper import TorchOptimizer, hyper_names, torch_opt

MAKERS = dict(
    SGD=partial(optim.SGD, momentum=.9, nesterov=True), plain=optim.SGD, Adam=optim.Adam, AdamW=optim.AdamW, fused=partial(optim.AdamW, fused=True),
    foreach=partial(optim.AdamW, foreach=True), single=partial(optim.AdamW, foreach=False), amsgrad=partial(optim.AdamW, amsgrad=True),
    NAdam=partial(optim.NAdam, decoupled_weight_decay=True), RAdam=optim.RAdam, Adamax=optim.Adamax, Adagrad=optim.Adagrad,
    Adadelta=optim.Adadelta, ASGD=optim.ASGD, RMSprop=partial(optim.RMSprop, momentum=.5, centered=True))
if hasattr(optim, 'Adafactor'): MAKERS['Adafactor'] = optim.Adafactor
each = pytest.mark.parametrize('name', MAKERS)
SHAPES, STEPS = [(6, 5), (5,), (5, 4), (4,)], 12

def make_params(seed=0, shapes=SHAPES):
    gen = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=gen).requires_grad_() for s in shapes]

def set_grads(params, t):
    gen = torch.Generator().manual_seed(100+t)
    for p in params: p.grad = torch.randn(p.shape, generator=gen)

def halves(params): return [params[:2], params[2:]]

def mom_key(group):
    "Where the optimizer keeps its momentum, if it was built with one"
    if 'betas' in group: return 'betas'
    return 'momentum' if group.get('momentum') else None

def assert_equal(a, b):
    for x,y in zip(a, b, strict=True): assert torch.equal(x.detach(), y.detach()), (x - y).abs().max()

def schedule(t): return [1e-3*(t+1), 1e-2*(t+1)], [.3, .1 + .01*t], .9 - .02*t

def train(opt, params, steps=range(STEPS)):
    for t in steps:
        lr, wd, mom = schedule(t)
        opt.set_hypers(lr=lr, mom=mom, **(dict(wd=wd) if 'wd' in opt.hypers[0] else {}))
        set_grads(params, t)
        opt.step()

def biases(opt, params):
    for p in params:
        if p.ndim == 1: opt.state[p]['do_wd'] = False

def build(name, params=None):
    params = params or make_params()
    opt = TorchOptimizer(halves(params), opt=MAKERS[name], lr=1e-2, weight_decay=.1)
    biases(opt, params)
    return opt, params

@each
def test_is_plain_torch(name):
    "Four groups, each with a rate and weight decay of its own, written out by hand: bit for bit"
    ref = make_params()
    plain = MAKERS[name]([dict(params=[p]) for p in ref], lr=1e-2)
    for t in range(STEPS):
        lr, wd, mom = schedule(t)
        for i,(p,group) in enumerate(zip(ref, plain.param_groups)):
            group.update(lr=lr[i//2], weight_decay=wd[i//2] if p.ndim > 1 else 0.)
            key = mom_key(group)
            if key == 'betas': group['betas'] = mom, group['betas'][1]
            elif key: group['momentum'] = mom
        set_grads(ref, t)
        plain.step()
    opt, params = build(name)
    train(opt, params)
    assert_equal(params, ref)

@pytest.mark.parametrize('maker,native', [
    (partial(optim.AdamW, betas=(.9, .99), eps=1e-5), fai.Adam), (partial(optim.SGD, momentum=.9), partial(fai.SGD, mom=.9, decouple_wd=False)),
    (optim.SGD, partial(fai.SGD, decouple_wd=False))])
def test_is_fastai_s_own(maker, native):
    runs = []
    for make in (partial(TorchOptimizer, opt=maker), native):
        params = make_params()
        opt = make(halves(params), lr=1e-2)
        biases(opt, params)
        train(opt, params)
        runs.append(params)
    for x,y in zip(*runs): torch.testing.assert_close(x, y, rtol=2e-5, atol=1e-6)

def test_optim_wrapper_ignores_do_wd():
    "The reason for all this: if fastai changes it, this test tells"
    params = make_params()
    opt = OptimWrapper(halves(params), opt=optim.SGD, lr=.1, weight_decay=.5)
    biases(opt, params)
    before = [p.detach().clone() for p in params]
    for p in params: p.grad = torch.zeros_like(p)
    opt.step()
    assert all(not torch.equal(a, b) for a,b in zip(before, params))

def test_do_wd_may_change():
    opt, params = build('plain')
    before = [p.detach().clone() for p in params]
    for p in params: p.grad = torch.zeros_like(p)
    opt.step()
    assert [torch.equal(a, b) for a,b in zip(before, params)] == [False, True, False, True]
    before = [p.detach().clone() for p in params]
    for p in params: opt.state[p]['do_wd'] = p.ndim == 1
    opt.step()
    assert [torch.equal(a, b) for a,b in zip(before, params)] == [True, False, True, False]

def test_frozen_parameters_stay():
    opt, params = build('SGD')
    train(opt, params, range(3))
    opt.freeze()
    before = [p.detach().clone() for p in params]
    set_grads(params, 3)
    opt.step()
    assert [torch.equal(a, b) for a,b in zip(before, params)] == [True, True, False, False]
    opt.zero_grad()
    assert all(p.grad is None for p in params)
    opt.step()
    opt.unfreeze()
    set_grads(params, 4)
    opt.step()
    assert not torch.equal(before[0], params[0])

def test_no_momentum_stays_without():
    opt, params = build('plain')
    train(opt, params)
    assert not any(s.get('momentum_buffer') is not None for s in opt.opt.state.values())
    assert opt.hypers[0]['mom'] == schedule(STEPS-1)[2]

def test_groups_are_fastai_s_between_steps():
    opt, params = build('AdamW')
    train(opt, params, range(2))
    assert [len(pg) for pg in opt.param_lists] == [2, 2] and len(opt.opt.param_groups) == len(opt.hypers) == 2
    opt.opt.step, step = lambda: 1/0, opt.opt.step
    with pytest.raises(ZeroDivisionError): opt.step()
    assert [len(pg) for pg in opt.param_lists] == [2, 2]

@each
def test_checkpoint(name):
    "Saved in the middle, loaded into a new optimizer from a file, equals one that went on"
    opt, params = build(name)
    train(opt, params, range(5))
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    again = [p.detach().clone().requires_grad_() for p in params]
    loaded = TorchOptimizer(halves(again), opt=MAKERS[name], lr=5., weight_decay=.7)
    sd = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    kept = deepcopy(sd['state'])
    loaded.load_state_dict(sd)
    assert [h['lr'] for h in loaded.hypers] == [h['lr'] for h in opt.hypers]
    for o,ps in ((opt, params), (loaded, again)): train(o, ps, range(5, STEPS))
    assert_equal(params, again)
    for i,s in kept.items():
        for k,v in s.items():
            if torch.is_tensor(v): assert torch.equal(v, sd['state'][i][k]), f"the caller's {k} was changed"

@pytest.mark.parametrize('make', [lambda gs: optim.AdamW([dict(params=g) for g in gs]), lambda gs: OptimWrapper(gs, opt=optim.AdamW)], ids=['torch', 'OptimWrapper'])
def test_checkpoints_are_torch_s(make):
    "To and from a plain torch optimizer"
    opt, params = build('AdamW')
    train(opt, params, range(5))
    other = make(halves([p.detach().clone().requires_grad_() for p in params]))
    sd = opt.state_dict()
    sd.pop('flags')
    other.load_state_dict(sd)
    back, _ = build('AdamW')
    back.load_state_dict(other.state_dict())
    for a,b in zip(opt.opt.state.values(), back.opt.state.values(), strict=True):
        for k in a: assert torch.equal(a[k], b[k])
    assert back.state[back.param_lists[0][1]]['do_wd'] is False

def test_bad_checkpoints():
    opt, params = build('AdamW')
    train(opt, params, range(2))
    before = deepcopy(opt.state_dict())
    other = TorchOptimizer(halves(make_params()), opt=optim.SGD)
    with pytest.raises(ValueError, match='another optimizer than AdamW.*amsgrad'): opt.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match='no param_groups and no state'): opt.load_state_dict({})
    with pytest.raises(ValueError, match='parameter groups'): opt.load_state_dict(TorchOptimizer([make_params()], opt=optim.AdamW).state_dict())
    after = opt.state_dict()
    assert after['param_groups'] == before['param_groups'] and after['flags'] == before['flags']

def test_clear_state():
    opt, params = build('AdamW')
    train(opt, params, range(2))
    opt.clear_state()
    assert not opt.opt.state and opt.state[params[1]]['do_wd'] is False
    train(opt, params, range(1))
    assert opt.opt.state[params[0]]['step'] == 1

def learner(opt_func, **kwargs):
    set_seed(0)
    rows = [(torch.randn(3), torch.randn(2)) for _ in range(24)]
    dls = DataLoaders(DataLoader(rows, bs=8), DataLoader(rows, bs=8), device='cpu')
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    return Learner(dls, model, MSELossFlat(), opt_func=opt_func, splitter=lambda m: [list(m[:2].parameters()), list(m[3].parameters())], **kwargs)

def quiet(learn, method, *args, **kwargs):
    with learn.no_bar(), learn.no_logging(): getattr(learn, method)(*args, **kwargs)
    return [p.detach() for p in learn.model.parameters()]

@each
def test_learner(name):
    learn = learner(torch_opt(MAKERS[name]))
    quiet(learn, 'fit_one_cycle', 1, slice(1e-4, 1e-2), wd=.1)
    quiet(learn, 'fine_tune', 1)
    quiet(learn, 'fit_flat_varied', 4, next_lr=1e-3, change_by=2)
    quiet(learn, 'fit', 1, cbs=[EMACallback(.9), GradientClip(.1)])
    assert all(p.isfinite().all() for p in learn.model.parameters())

def test_adagrad_starts_anew():
    "Its state is made with it, and not in the first step"
    opt = TorchOptimizer([p := torch.ones(3)], opt=partial(optim.Adagrad, initial_accumulator_value=.5), lr=.1)
    fresh = deepcopy(dict(opt.opt.state[p]))
    p.grad = torch.ones(3)
    opt.step()
    opt.clear_state()
    assert {k: v.tolist() for k,v in opt.opt.state[p].items()} == {k: v.tolist() for k,v in fresh.items()}
    opt.step()

@pytest.mark.parametrize('wd_bn_bias', [False, True])
def test_learner_is_fastai_s(wd_bn_bias):
    a = quiet(learner(torch_opt(optim.AdamW, betas=(.9, .99), eps=1e-5, weight_decay=0.), wd_bn_bias=wd_bn_bias), 'fit_one_cycle', 4, slice(1e-3, 3e-2), wd=.5)
    b = quiet(learner(fai.Adam, wd_bn_bias=wd_bn_bias), 'fit_one_cycle', 4, slice(1e-3, 3e-2), wd=.5)
    # the first bias is before batch norm: its gradient is nothing but rounding
    for i,(x,y) in enumerate(zip(a, b)):
        if i != 1: torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)

def test_save_and_load(tmp_path):
    learn = learner(torch_opt(optim.NAdam), path=tmp_path)
    quiet(learn, 'fit', 2)
    learn.save('half')
    again = learner(torch_opt(optim.NAdam), path=tmp_path)
    again.create_opt()
    again.load('half')
    assert_equal(quiet(learn, 'fit', 1), quiet(again, 'fit', 1))

def test_reduce_on_plateau():
    "It writes into `hypers`, which `OptimWrapper` ignores"
    learn = learner(torch_opt(optim.AdamW), lr=1e-2)
    quiet(learn, 'fit', 3, cbs=ReduceLROnPlateau(patience=1, min_delta=100.))
    assert learn.opt.opt.param_groups[0]['lr'] == pytest.approx(1e-3)

def test_built_optimizer():
    params = make_params()
    opt = TorchOptimizer(opt=optim.AdamW([dict(params=g) for g in halves(params)], lr=1e-2))
    biases(opt, params)
    ref, ref_params = build('AdamW')
    train(opt, params); train(ref, ref_params)
    assert_equal(params, ref_params)

@pytest.mark.skipif(not hasattr(optim, 'Muon'), reason="this PyTorch has no Muon")
def test_muon():
    "It takes matrices only"
    runs = []
    for make in (partial(TorchOptimizer, opt=optim.Muon), lambda groups, **kw: optim.Muon([dict(params=g) for g in groups], **kw)):
        params = make_params(shapes=[(6, 5), (5, 4)])
        opt = make([params[:1], params[1:]], lr=1e-2, weight_decay=.3)
        if isinstance(opt, TorchOptimizer): opt.state[params[1]]['do_wd'] = False
        else: opt.param_groups[1]['weight_decay'] = 0.
        for t in range(STEPS):
            if isinstance(opt, TorchOptimizer): opt.set_hyper('mom', .9 - .02*t)
            else:
                for g in opt.param_groups: g['momentum'] = .9 - .02*t
            set_grads(params, t)
            opt.step()
        runs.append(params)
    assert_equal(*runs)
    with pytest.raises(ValueError, match='2D'): TorchOptimizer(make_params(), opt=optim.Muon)

def test_names():
    assert hyper_names(optim.RMSprop)['alpha'] == 'sqr_mom' and 'alpha' not in hyper_names(optim.ASGD)
    opt = TorchOptimizer(make_params(), opt=optim.Adadelta)
    opt.set_hyper('sqr_mom', .5)
    opt.write_hypers()
    assert opt.opt.param_groups[0]['rho'] == .5

def test_refuses():
    with pytest.raises(TypeError, match='closure'): TorchOptimizer(make_params(), opt=optim.LBFGS)
    with pytest.raises(ValueError, match='empty list'): TorchOptimizer([], opt=optim.SGD)
    with pytest.raises(ValueError, match='`opt` is missing'): TorchOptimizer(make_params())
    with pytest.raises(TypeError, match='constructor'): torch_opt(optim.SGD(make_params()))
    with pytest.raises(TypeError, match='constructor'): torch_opt('AdamW')
    opt = TorchOptimizer(make_params(), opt=optim.AdamW)
    with pytest.raises(ValueError, match="AdamW has no 'learning_rate'"): opt.set_hyper('learning_rate', 1.)
    with pytest.raises(NotImplementedError): opt.step(lambda: 0)
    sparse = TorchOptimizer(make_params(), opt=optim.SparseAdam)
    with pytest.raises(ValueError, match="SparseAdam has no 'wd'"): sparse.set_hyper('wd', .1)
    sparse.set_hyper('wd', 0.)
