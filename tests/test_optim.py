"`fastxtend.optim` against `torch.optim`: numbers, checkpoints, and what training loops do to an optimizer"
import copy, io, pickle, pydoc, subprocess, sys
from itertools import product
from unittest import mock

import pytest, torch
from common import SOAK
from fastxtend import optim as ours
from fastxtend.optim import COLUMNS, WAYS
from fastxtend.optimizer.declare import STATES
from torch.optim import lr_scheduler as sched
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

SHAPES = (4, 3), (5,), (1,), (2, 3, 2)
LISTED = [n for n in ours.__all__ if n not in COLUMNS]
FLAGS = dict(fused=True), dict(foreach=True), dict(foreach=False)

def parameters(seed=0, dtype=torch.float64):
    gen = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=gen, dtype=torch.float64).to(dtype).requires_grad_() for s in SHAPES]

def set_grads(ps, step):
    gen = torch.Generator().manual_seed(1000 + step)
    for p in ps: p.grad = (p.detach()*.3).add_(torch.randn(p.shape, generator=gen, dtype=torch.float64).to(p.dtype))

def run(opt, ps, steps=20, start=0):
    for i in range(start, start + steps):
        set_grads(ps, i)
        opt.step()

def assert_close(a, b, tol=1e-10):
    for x,y in zip(a, b, strict=True): torch.testing.assert_close(x.detach(), y.detach(), rtol=tol, atol=tol)

def torch_opt(name, ps, **kwargs): return getattr(torch.optim, name)(ps, foreach=False, **kwargs)

OPTIONS = dict(
    SGD=[dict(momentum=m, dampening=d, nesterov=n) for m,d,n in product((0, .9), (0, .5), (False, True)) if not n or (m and not d)],
    RMSprop=[dict(momentum=m, centered=c, alpha=.9) for m,c in product((0, .9), (False, True))],
    Adam=[dict(amsgrad=a, decoupled_weight_decay=d, eps=1e-3) for a,d in product((False, True), repeat=2)],
    AdamW=[dict(amsgrad=a, betas=(.8, .95)) for a in (False, True)],
    NAdam=[dict(decoupled_weight_decay=d, momentum_decay=.01) for d in (False, True)],
    RAdam=[dict(decoupled_weight_decay=d, eps=1e-4) for d in (False, True)])

def all_options(name, lr=1e-2):
    "Ours, and those of PyTorch's own tests; in a soak test every combination of the values that are in them"
    pytest.importorskip('expecttest') # which PyTorch's tests need
    with mock.patch.object(torch.backends, 'disable_global_flags'): # which would forbid fastai, from here on, to set a flag
        from torch.testing._internal.common_optimizers import optim_db
    theirs = next(o for o in optim_db if o.optim_cls.__name__ == name).optim_inputs_func(device='cpu')
    listed = [*(dict(lr=lr, weight_decay=wd, maximize=m, **o) for o,wd,m in product(OPTIONS[name], (0, .1), (False, True))), *(o.kwargs for o in theirs)]
    if not SOAK: return listed
    default = torch_opt(name, parameters()).defaults
    values = {k: {repr(o[k]): o[k] for o in (default, *listed) if k in o} for o in listed for k in o}
    return [dict(zip(values, vs)) for vs in product(*(o.values() for o in values.values()))]

def is_taken(name, options):
    "Does `torch.optim` take it? It has no Nesterov step without momentum"
    try: torch_opt(name, parameters(), **options)
    except ValueError: return False
    return True

def trained(make, dtype):
    ps = parameters(dtype=dtype)
    run(make(ps), ps, 100)
    return ps

def farthest(ps, exact): return max((p.detach() - e.detach()).abs().max().item() for p,e in zip(ps, exact))

@pytest.fixture(params=[torch.float64, torch.float32])
def dtype(request):
    "Of parameters, and of what PyTorch keeps in the default dtype: a product of NAdam's momenta"
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(torch.float32)

@pytest.mark.parametrize('name', COLUMNS)
def test_numbers(name, dtype):
    """100 steps, for all options and ways to step: in float64 to the last digits; in float32 within what PyTorch allows its own, or, where errors
    have grown beyond that, about as near to float64 as PyTorch is"""
    for options in all_options(name, 1e-2 if dtype == torch.float64 else 1e-3):
        if not is_taken(name, options): continue
        def theirs(ps): return torch_opt(name, ps, **options)
        expected = trained(theirs, dtype)
        for flags in FLAGS:
            ps = trained(lambda ps: getattr(ours, name)(ps, **options, **flags), dtype)
            if dtype == torch.float64: assert_close(ps, expected)
            elif not all(torch.allclose(p, e, rtol=1.3e-6, atol=1e-5) for p,e in zip(ps, expected)):
                exact = trained(theirs, torch.float64)
                assert farthest(ps, exact) < 1.5*farthest(expected, exact) < 1e-4

@pytest.mark.parametrize('name', COLUMNS)
def test_defaults(name):
    "Arguments, defaults and keys of groups are PyTorch's"
    opt, other = getattr(ours, name)(parameters()), getattr(torch.optim, name)(parameters())
    assert {k: opt.defaults[k] for k in other.defaults} == other.defaults
    assert {k: v for k,v in opt.defaults.items() if k not in other.defaults} == {k: None for k in WAYS if k not in other.defaults} # ours to choose
    with pytest.raises(ValueError): getattr(ours, name)(parameters(), lr=-1)
    with pytest.raises(TypeError): getattr(ours, name)(parameters(), nothing=1)

@pytest.mark.parametrize('name', ours.__all__)
def test_ways_agree(name):
    "Every optimizer: one kernel, lists, and one parameter after the other; maximising is minimising what is negated"
    cls = getattr(ours, name)
    finals = []
    for flags in (*FLAGS, dict(fused=True, maximize=True)):
        ps = parameters()
        opt = cls(ps, lr=1e-2, weight_decay=.01, **flags)
        for i in range(13):
            set_grads(ps, i)
            if 'maximize' in flags: [p.grad.neg_() for p in ps]
            opt.step()
        finals.append(ps)
    assert all(not torch.equal(p, q) for p,q in zip(parameters(), finals[0]))
    for o in finals[1:]: assert_close(o, finals[0])

@pytest.mark.parametrize('name', COLUMNS)
def test_checkpoints_of_torch(name):
    "What PyTorch saved goes on here, and the other way round"
    for options in OPTIONS[name]:
        kwargs = dict(lr=1e-2, weight_decay=.1, **options)
        expected = parameters()
        run(torch_opt(name, expected, **kwargs), expected, 20)
        for first,second in ((torch_opt, lambda n, ps, **k: getattr(ours, n)(ps, **k)), (lambda n, ps, **k: getattr(ours, n)(ps, **k), torch_opt)):
            ps = parameters()
            opt = first(name, ps, **kwargs)
            run(opt, ps, 10)
            file = io.BytesIO()
            torch.save(opt.state_dict(), file)
            file.seek(0)
            opt2 = second(name, ps, lr=1.)
            opt2.load_state_dict(torch.load(file, weights_only=True))
            run(opt2, ps, 10, 10)
            assert_close(ps, expected)
        a, b = parameters(), parameters()
        opt, other = getattr(ours, name)(a, **kwargs), torch_opt(name, b, **kwargs)
        run(opt, a, 1), run(other, b, 1)
        assert [set(s) for s in opt.state_dict()['state'].values()] == [{k for k,v in s.items() if v is not None} for s in other.state_dict()['state'].values()]

@pytest.mark.parametrize('name', ours.__all__)
def test_copies(name):
    "A copy, a pickle and a state dict go on like the original"
    ps = parameters()
    opt = getattr(ours, name)(ps, lr=1e-2)
    run(opt, ps, 5)
    qs, copied = copy.deepcopy((ps, opt))
    rs, pickled = pickle.loads(pickle.dumps((ps, opt)))
    ts = [p.detach().clone().requires_grad_() for p in ps]
    loaded = getattr(ours, name)(ts, lr=1.)
    loaded.load_state_dict(copy.deepcopy(opt.state_dict()))
    for o,xs in ((opt, ps), (copied, qs), (pickled, rs), (loaded, ts)): run(o, xs, 5, 5)
    for xs in (qs, rs, ts): assert_close(xs, ps, 0)

@pytest.mark.parametrize('name', COLUMNS)
def test_groups(name):
    "Groups with options of their own, some of which take other steppers; a group that comes later; options that change"
    first = {'SGD': dict(momentum=.9), 'RMSprop': dict(momentum=.9), 'Adam': dict(amsgrad=True), 'AdamW': dict(amsgrad=True)}.get(name, dict(decoupled_weight_decay=True))
    finals = []
    for make in (lambda *a, **k: torch_opt(name, *a, **k), getattr(ours, name)):
        ps = parameters()
        opt = make([dict(params=ps[:1], lr=.02, **first), dict(params=ps[1:2], weight_decay=.2)], lr=.01)
        run(opt, ps, 10)
        opt.add_param_group(dict(params=ps[2:], lr=.005))
        run(opt, ps, 10)
        opt.param_groups[0]['lr'], opt.param_groups[1]['maximize'] = .1, True
        run(opt, ps, 10)
        finals.append(ps)
    assert_close(*finals, 1e-8 if name == 'NAdam' else 1e-10) # PyTorch keeps the product of NAdam's momenta in float32

SCHEDULERS = dict(
    step=lambda o: sched.StepLR(o, 3), multi=lambda o: sched.MultiStepLR(o, [2, 5]), exp=lambda o: sched.ExponentialLR(o, .9), lam=lambda o: sched.LambdaLR(o, lambda e: .9**e),
    mul=lambda o: sched.MultiplicativeLR(o, lambda e: .9), const=lambda o: sched.ConstantLR(o), linear=lambda o: sched.LinearLR(o), poly=lambda o: sched.PolynomialLR(o, 20),
    cosine=lambda o: sched.CosineAnnealingLR(o, 10), warm=lambda o: sched.CosineAnnealingWarmRestarts(o, 5), cyclic=lambda o: sched.CyclicLR(o, 1e-3, 1e-2, 4),
    one=lambda o: sched.OneCycleLR(o, 1e-2, 20), seq=lambda o: sched.SequentialLR(o, [sched.ConstantLR(o), sched.ExponentialLR(o, .9)], [5]),
    chained=lambda o: sched.ChainedScheduler([sched.ConstantLR(o), sched.ExponentialLR(o, .9)]), swa=lambda o: torch.optim.swa_utils.SWALR(o, 1e-3))

@pytest.mark.parametrize('name', ['SGD', 'AdamW'])
@pytest.mark.parametrize('tensor_lr', [False, True])
def test_schedulers(name, tensor_lr):
    "Learning rates and momentum that schedulers write, and a learning rate that is a tensor"
    kwargs = dict(momentum=.9) if name == 'SGD' else {}
    for make in [*SCHEDULERS.values(), lambda o: sched.ReduceLROnPlateau(o, patience=2)]:
        finals = []
        for cls in (lambda *a, **k: torch_opt(name, *a, **k), getattr(ours, name)):
            ps = parameters()
            opt = cls(ps, lr=torch.tensor(.01, dtype=torch.float64) if tensor_lr else .01, **kwargs)
            s = make(opt)
            for i in range(15):
                run(opt, ps, 1, i)
                s.step(*([1.] if isinstance(s, sched.ReduceLROnPlateau) else []))
            finals.append(ps)
        assert_close(*finals)

def test_closure_and_hooks():
    "The loss of a closure comes back, and hooks are called around the step"
    ps, calls = parameters(), []
    opt = ours.SGD(ps, lr=.1)
    opt.register_step_pre_hook(lambda *a: calls.append('before'))
    opt.register_step_post_hook(lambda *a: calls.append('after'))
    opt.register_state_dict_post_hook(lambda o, sd: calls.append('saved'))
    opt.register_load_state_dict_pre_hook(lambda o, sd: calls.append('loading'))
    def closure():
        opt.zero_grad()
        loss = sum((p**2).sum() for p in ps)
        loss.backward()
        return loss
    assert opt.step(closure) > opt.step(closure) > 0
    opt.load_state_dict(opt.state_dict())
    assert calls == ['before', 'after']*2 + ['saved', 'loading']
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as prof: opt.step()
    assert any('Optimizer.step#SGD.step' in e.key for e in prof.key_averages())

def test_some_gradients():
    "Parameters without gradients are left alone, and counted on their own"
    finals = []
    for cls in (lambda ps: torch_opt('AdamW', ps), ours.AdamW):
        ps = parameters()
        opt = cls(ps)
        for i in range(12):
            set_grads(ps, i)
            if i % 3: ps[1].grad = None
            opt.step()
        finals.append(ps)
    assert_close(*finals)

def test_scaler():
    "Steps whose gradients overflow are left out"
    ps = parameters(dtype=torch.float32)
    opt, scaler = ours.AdamW(ps), torch.amp.GradScaler('cpu', init_scale=4.)
    before = [p.detach().clone() for p in ps]
    scaler.scale(sum((p**2).sum() for p in ps)*float('inf')).backward()
    scaler.step(opt), scaler.update()
    assert_close(ps, before, 0)
    qs = [p.clone() for p in before]
    opt.zero_grad()
    scaler.scale(sum((p**2).sum() for p in ps)).backward()
    scaler.step(opt), scaler.update()
    for q,p in zip(qs, before): q.requires_grad_().grad = 2*p
    torch_opt('AdamW', qs).step()
    assert_close(ps, qs, 1e-6)

def test_refused():
    "What cannot be stepped is refused when it is said"
    for cls in (ours.Adam, ours.Lion):
        with pytest.raises(TypeError): cls([torch.zeros(2, dtype=torch.complex64, requires_grad=True)])
        with pytest.raises(ValueError): cls([])
        with pytest.raises(RuntimeError): cls(parameters(), foreach=True, fused=True)
    for flag in ('differentiable', 'capturable'):
        with pytest.raises(NotImplementedError, match=flag): ours.Adam(parameters(), **{flag: True})
        opt = ours.Adam(parameters())
        opt.param_groups[0][flag] = True
        with pytest.raises(NotImplementedError, match=flag): run(opt, opt.param_groups[0]['params'], 1)
    opt = ours.AdamW(parameters())
    with pytest.raises(TypeError): opt.add_param_group(dict(params=[torch.zeros(2, dtype=torch.complex64, requires_grad=True)]))
    assert len(opt.param_groups) == 1
    p = torch.zeros(3, 2, requires_grad=True)
    p.grad = torch.eye(3, 2).to_sparse()
    with pytest.raises(RuntimeError, match='layout'): ours.SGD([p]).step()
    for name in LISTED:
        with pytest.raises(ValueError): getattr(ours, name)(parameters(), lr=-1.)
        with pytest.raises(ValueError): getattr(ours, name)(parameters(), weight_decay=-1.)

def test_schedule_free():
    "`eval` and `train` take weights to their average and back"
    ps = parameters()
    opt = ours.ScheduleFreeAdam(ps, lr=.1)
    run(opt, ps, 5)
    before = [p.detach().clone() for p in ps]
    opt.eval()
    assert not torch.equal(ps[0], before[0])
    opt.train()
    assert_close(ps, before, 1e-12)

def test_import():
    "It needs nothing of fastai.vision and compiles nothing"
    code = "import sys, fastxtend.optim; print([m for m in sys.modules if m.startswith(('fastai.vision', 'fastai.text', 'timm', 'numba.core', 'triton.runtime'))])"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == '[]'

def test_nothing_half_stepped():
    "If a group of another kind is refused, none has stepped, and the next step goes on"
    a, b = parameters(), parameters()
    opt, other = (cls([dict(params=ps[:2]), dict(params=ps[2:], amsgrad=True)]) for cls,ps in ((ours.Adam, a), (lambda g: torch_opt('Adam', g), b)))
    for i in range(4):
        set_grads(a, i), set_grads(b, i)
        if i in (0, 2):
            before, right = [p.detach().clone() for p in a], a[3].grad
            a[3].grad = right.to_sparse()
            with pytest.raises(RuntimeError): opt.step()
            assert_close(a, before, 0)
            a[3].grad = right
        opt.step(), other.step()
    assert_close(a, b)

def test_load_is_checked():
    "State of another optimizer, of other parameters, or with options that are refused: an error that says so, and nothing has changed"
    def state_of(cls, shapes=SHAPES, **kwargs):
        ps = [torch.ones(s, requires_grad=True) for s in shapes]
        opt = cls(ps, **kwargs)
        run(opt, ps, 2)
        return opt.state_dict()
    for name,sd,message in [('Adam', state_of(ours.Lion), "has no 'exp_avg_sq'"), ('Lion', state_of(ours.Adam), "has 'exp_avg_sq'"), ('SGD', state_of(torch.optim.RMSprop), 'square_avg'),
                            ('NAdam', state_of(torch.optim.Adam), 'mu_product'), ('Adam', state_of(ours.Adam, [(2, 2)]*4), 'another model'), ('Adam', state_of(ours.Adam, SHAPES[:2]), "doesn't match")]:
        ps = parameters(dtype=torch.float32)
        opt = getattr(ours, name)(ps, lr=.5)
        run(opt, ps, 1)
        before = copy.deepcopy(opt.state_dict())
        with pytest.raises(ValueError, match=message): opt.load_state_dict(sd)
        assert str(before) == str(opt.state_dict())
        run(opt, ps, 1)
    sd = state_of(torch.optim.Adam)
    sd['param_groups'][0]['capturable'] = True
    with pytest.raises(NotImplementedError, match='capturable'): ours.Adam(parameters(dtype=torch.float32)).load_state_dict(sd)

@pytest.mark.parametrize('flags', FLAGS)
def test_grad_scale(flags):
    "`grad_scale` divides gradients, and `found_inf` leaves the step out, as in the fused optimizers of PyTorch; with two kinds of groups, too"
    def groups(ps): return [dict(params=ps[:2]), dict(params=ps[2:], amsgrad=True)]
    a, b = parameters(dtype=torch.float32), parameters(dtype=torch.float32)
    opt, other = ours.Adam(groups(a), **flags), torch.optim.Adam(groups(b), fused=True)
    for i in range(4):
        for o,ps in ((opt, a), (other, b)):
            set_grads(ps, i)
            for p in ps: p.grad.mul_(128.)
            o.grad_scale, o.found_inf = torch.tensor(128.), torch.tensor(float(i == 2))
            o.step()
            del o.grad_scale, o.found_inf
    assert_close(a, b, 1e-6)
    assert [float(s['step']) for s in opt.state.values()] == [float(s['step']) for s in other.state.values()] == [3.]*4

@pytest.mark.parametrize('name', ['AdamW', 'SGD', 'NAdam'])
def test_state_is_pytorchs(name):
    "Who looks at `state` finds tensors; what is written there counts"
    a, b = parameters(), parameters()
    opt, other = getattr(ours, name)(a), torch_opt(name, b)
    run(opt, a, 3), run(other, b, 3)
    assert [set(s) for s in opt.state.values()] == [set(s) for s in other.state.values() if s.get('step', 1) is not None and any(v is not None for v in s.values())]
    for o in (opt, other):
        for s in o.state.values():
            if 'step' in s:
                assert torch.is_tensor(s['step']) and s['step'].dtype is torch.float32
                s['step'] += 2
    run(opt, a, 3, 3), run(other, b, 3, 3)
    assert_close(a, b, 1e-7 if name == 'NAdam' else 1e-10)

def test_compiled_model():
    "A step in a function that `torch.compile` took, model and all"
    finals = []
    for make in (ours.AdamW, lambda ps: torch_opt('AdamW', ps)):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).double()
        opt = make(model.parameters())
        def train(x):
            opt.zero_grad()
            model(x).square().sum().backward()
            opt.step()
        if make is ours.AdamW: train = torch.compile(train, backend='eager')
        for i in range(4): train(torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(i)))
        finals.append(list(model.parameters()))
    assert_close(*finals)

def test_averaged_model():
    "Stochastic weight averaging around a step"
    finals = []
    for make in (ours.SGD, lambda ps, **k: torch_opt('SGD', ps, **k)):
        model = torch.nn.Linear(3, 2).double()
        for p in model.parameters(): p.data.fill_(.5)
        swa = torch.optim.swa_utils.AveragedModel(model)
        opt = make(model.parameters(), lr=.1)
        schedule = torch.optim.swa_utils.SWALR(opt, swa_lr=.05, anneal_epochs=3)
        for i in range(6):
            set_grads(list(model.parameters()), i)
            opt.step(), swa.update_parameters(model), schedule.step()
        finals.append(list(swa.parameters()))
    assert_close(*finals)

@pytest.mark.parametrize('name', ['AdamW', 'Lion'])
@pytest.mark.parametrize('state', STATES)
def test_state_formats(name, state):
    "How state is kept is an argument as on the side of fastai; checkpoints have it in full, so that PyTorch's optimizers can load it"
    ps = [torch.randn(64, 128, generator=torch.Generator().manual_seed(0)).requires_grad_()]
    def go_on(opt, ps, i):
        ps[0].grad = torch.randn(64, 128, generator=torch.Generator().manual_seed(i))
        opt.step()
    opt = getattr(ours, name)(ps, state=state)
    for i in range(2): go_on(opt, ps, i)
    kept = opt.state[ps[0]]['exp_avg'].dtype
    assert kept is STATES[state]
    sd = copy.deepcopy(opt.state_dict())
    assert set(sd['state'][0]) <= {'step', 'exp_avg', 'exp_avg_sq'} and all(v.is_floating_point() for v in sd['state'][0].values())
    qs = [ps[0].detach().clone().requires_grad_()]
    loaded = getattr(ours, name)(qs, state=state)
    loaded.load_state_dict(sd)
    loaded.engines() # what stores it
    for n,t in opt.state[ps[0]].items(): # codes are the same, scales but for the last bit
        torch.testing.assert_close(loaded.state[qs[0]][n], t, rtol=3e-7 if n.endswith('scales') else 0, atol=0)
    for i in range(2, 4): go_on(opt, ps, i), go_on(loaded, qs, i)
    assert_close(ps, qs, 5e-4 if state == 'int8' else 0) # and with the last bit of a scale, it is another draw of how a number is rounded
    with pytest.raises(ValueError, match='fused=True'): getattr(ours, name)(ps, state=state, foreach=True)

@pytest.mark.parametrize('name', ['AdamW', 'SGD', 'Lion'])
def test_exact_weights(name, tmp_path):
    "A training with exact weights that is saved and loaded goes on bit for bit; without the option, the same checkpoint is refused"
    def go_on(opt, p, start):
        for i in range(start, start + 3):
            p.grad = torch.randn(70, 128, generator=torch.Generator().manual_seed(i)).bfloat16()
            opt.step()
    p = torch.randn(70, 128, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    opt = getattr(ours, name)([p], weights='exact', lr=1e-3)
    go_on(opt, p, 1)
    torch.save(dict(weights=p.detach(), opt=opt.state_dict()), tmp_path/'file')
    saved = torch.load(tmp_path/'file', weights_only=True)
    q = saved['weights'].requires_grad_()
    loaded = getattr(ours, name)([q], weights='exact')
    loaded.load_state_dict(saved['opt'])
    for o,x in ((opt, p), (loaded, q)): go_on(o, x, 4)
    assert set(loaded.state[q]) == set(opt.state[p]) and opt.state[p]['lost_bits'].any()
    assert_close([q, *loaded.state[q].values()], [p, *(opt.state[p][n] for n in loaded.state[q])], 0)
    saved['opt']['param_groups'][0]['weights'] = None
    with pytest.raises(ValueError, match='lost_bits'): loaded.load_state_dict(saved['opt'])

@pytest.mark.parametrize('flags, backend', [({}, 'numba'), (dict(foreach=True), 'foreach'), (dict(foreach=False), 'steppers')])
def test_report(flags, backend):
    "Each parameter is told at its place, whatever steps it"
    ps = parameters()
    opt = ours.Adam([dict(params=ps[2:]), dict(params=ps[:2], amsgrad=True)], **flags)
    for when in 'expected', 'last step':
        report = opt.backend_report()
        assert when in report.title and [(o.group, o.index, o.numel, o.backend) for o in report] == [(0, 0, 1, backend), (0, 1, 12, backend), (1, 0, 12, backend), (1, 1, 5, backend)]
        assert 'max_exp_avg_sq' in report[2].state and 'max_exp_avg_sq' not in report[0].state
        run(opt, ps, 1)

def test_help():
    "What is told of a class has a line for each argument, and none is empty"
    for name in ours.__all__:
        cls = getattr(ours, name)
        told = dict(l.strip().split(': ', 1) for l in cls.__doc__.partition('Args:\n')[2].splitlines())
        assert list(told) == list(cls.__signature__.parameters) and all(told.values())
    assert '(β1)' in pydoc.render_doc(ours.AdamW)

def test_unheard():
    "PyTorch's wrapper of a step is left out only where nobody listens: it calls the hooks of this optimizer, and those of all"
    ps = parameters()
    opt, heard = ours.AdamW(ps), []
    for register in (opt.register_step_pre_hook, register_optimizer_step_pre_hook, opt.register_step_post_hook, register_optimizer_step_post_hook):
        run(opt, ps, 1)
        handle = register(lambda *a: heard.append(register))
        try: run(opt, ps, 1)
        finally: handle.remove()
        assert heard.pop() is register and not heard

def test_runner(tmp_path):
    "The runner of PyTorch's own tests, on a file that begins as PyTorch's does"
    pytest.importorskip('expecttest')
    file = tmp_path/'test_optim.py'
    file.write_text("""
from optim.test_lrscheduler import TestLRScheduler
from optim.test_optim import TestDifferentiableOptimizer
from optim.test_swa_utils import TestSWAUtils
import torch
from torch.testing._internal.common_device_type import instantiate_device_type_tests
from torch.testing._internal.common_optimizers import optim_db, optims
from torch.testing._internal.common_utils import TestCase
class TestOptimRenewed(TestCase):
    @optims(optim_db, dtypes=[torch.float32])
    def test_it(self, device, dtype, optim_info):
        self.assertEqual(optim_info.optim_cls.__module__, 'fastxtend.optim')
        for o in optim_info.optim_inputs_func(device=device, dtype=dtype): optim_info.optim_cls([torch.zeros(2, requires_grad=True)], **o.kwargs)
instantiate_device_type_tests(TestOptimRenewed, globals(), allow_mps=True)
""")
    out = subprocess.run([sys.executable, 'tests/torch_test_optim.py', str(file), '-k', 'cpu'], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert f"{len(ours.__all__)} tests, {len(ours.__all__)} passed" in out.stdout

@pytest.mark.parametrize('name', ours.__all__)
def test_what_pytorch_tests(name):
    "What PyTorch's own tests look at, in short: odd layouts, gradients of zeros, printing, names, older checkpoints, steps that are numbers, parameters on `meta`"
    cls, zero = getattr(ours, name), dict(lr=1e-2, weight_decay=0.)
    gen = torch.Generator().manual_seed(0)
    wide = torch.randn(5, 4, 2, generator=gen, dtype=torch.float64)
    odd, even = wide.clone()[..., 0].requires_grad_(), wide[..., 0].clone().contiguous().requires_grad_()
    first, second = cls([odd], **zero), cls([even], **zero)
    for i in range(4):
        g = torch.randn(5, 4, generator=gen, dtype=torch.float64)
        odd.grad, even.grad = g.clone(), g.t().contiguous().t()
        first.step(), second.step()
    assert_close([odd], [even])
    assert all(len(s) for s in first.state.values()) and name in repr(first)

    still = torch.ones(3, requires_grad=True)
    still.grad = torch.zeros(3)
    cls([still], **zero).step()
    assert torch.equal(still, torch.ones(3))

    named = cls([('weight', even.detach().clone().requires_grad_())], **zero)
    sd = copy.deepcopy(second.state_dict())
    for n in (*WAYS, 'maximize'): sd['param_groups'][0].pop(n) # as older versions saved it
    for s in sd['state'].values():
        if 'step' in s: s['step'] = s['step'].item()
    named.load_state_dict(sd)
    p = named.param_groups[0]['params'][0]
    for o,q in ((second, even), (named, p)): run(o, [q], 2)
    assert_close([p], [even], 0)
    assert named.state_dict()['param_groups'][0]['param_names'] == ['weight']

    nowhere = torch.empty(2, 3, device='meta', requires_grad=True)
    opt = cls([nowhere], fused=True)
    opt.step()
    nowhere.grad = torch.empty_like(nowhere)
    with pytest.raises(RuntimeError, match='meta'): cls([nowhere], fused=True).step()
