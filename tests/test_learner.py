"Training with `Learner`: the same losses, metrics and weights as with fastai's own optimizers"
import pickle, random, warnings

import pytest
from common import *
from fastai.basics import (Callback, CrossEntropyLossFlat, DataLoader, DataLoaders, Learner, accuracy, load_learner, params as params_of,
                           set_seed)
from fastai.callback.all import (GradientAccumulation, GradientClip, MixedPrecision, ModelResetter, ParamScheduler, ProgressCallback,
                                 SchedCos, SchedLin)
from torch import nn

from fastxtend.optimizer import cpu

each_name = pytest.mark.parametrize('name', NAMES)
each_way = pytest.mark.parametrize('way', BACKENDS)

# Of losses, metrics and weights, relative to native's or absolute where those are below 1. Measured: 2.8e-6 and 2.2e-16
LEARNER_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-15}

class Rows(list):
    "A data set that can be exported"
    def new_empty(self): return Rows()

@lru_cache(2)
def data(dtype):
    "Three noisy classes"
    gen = torch.Generator().manual_seed(3)
    x = torch.randn(96, 6, generator=gen, dtype=torch.float64)
    y = (x[:, :3] + torch.randn(96, 3, generator=gen, dtype=torch.float64)).argmax(1)
    items = list(zip(x.to(dtype), y))
    return Rows(items[:64]), Rows(items[64:])

class Model(nn.Sequential):
    """Three parts with norm layers of both kinds; `reset` is what `ModelResetter` calls.
    A bias before batch norm would have gradients of rounding errors alone, which Adam and its kin blow up"""
    def __init__(self):
        super().__init__(nn.Sequential(nn.Linear(6, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU()), nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.ReLU()),
                         nn.Linear(16, 3))
        self.resets = 0
    def reset(self): self.resets += 1

def thirds(model): return [list(part.parameters()) for part in model]
def halves(model): return [list(model[0].parameters()), [*model[1].parameters(), *model[2].parameters()]]

def learner(name, way, dtype=torch.float32, path='.', **kwargs):
    set_seed(0, True)
    train_ds, valid_ds = data(dtype)
    dls = DataLoaders(DataLoader(train_ds, bs=16, shuffle=True), DataLoader(valid_ds, bs=16), device='cpu')
    opt_func = partial(helper(name)(**flags(way)), **kwargs.pop('opt_kwargs', {}))
    return Learner(dls, Model().to(dtype), CrossEntropyLossFlat(), **{**dict(opt_func=opt_func, lr=1e-2, splitter=thirds, metrics=accuracy, path=path), **kwargs})

def change_head(learn):
    learn.fit(1)
    learn.model[2] = nn.Linear(16, 3)
    learn.create_opt()
    learn.fit(1)

def change_split(learn):
    learn.fit(1)
    learn.splitter = halves
    learn.create_opt()
    learn.fit_one_cycle(1, slice(1e-3, 1e-2))

def gradually(learn):
    for n in (-1, -2, 0):
        learn.freeze_to(n)
        learn.fit(1, slice(1e-3, 1e-2))

def find_lr(learn):
    learn.lr_find(num_it=10, end_lr=.1, show_plot=False)
    learn.fit(1)

def twice(learn):
    learn.fit_one_cycle(1)
    learn.validate()
    learn.fit_one_cycle(1, 1e-3)
    learn.fit(1, reset_opt=True)

def scheduled(learn):
    learn.fit(2, cbs=ParamScheduler(dict(lr=SchedLin(1e-2, 1e-3), wd=SchedCos(0., .1))))

def resumed(learn):
    learn.fit_one_cycle(2, start_epoch=1)

def summarized(learn):
    learn.summary()
    learn.fit(1)

def with_resets(learn):
    learn.fit(1)
    assert learn.model.resets > 0

class ThirdParty(Callback):
    "Reads parameters and hyperparameters of groups, and sets the latter, as code that knows PyTorch's optimizers does"
    def before_step(self):
        for group in self.opt.param_groups: nn.utils.clip_grad_norm_(group['params'], 10*group['lr'])
        self.opt.param_groups = [{**group, 'lr': group['lr']*.99} for group in self.opt.param_groups]
    def after_step(self): assert all(p.grad is not None for group in self.opt.param_groups for p in group['params'])

SCENARIOS = dict(
    fit_one_cycle = dict(run=lambda learn: learn.fit_one_cycle(3, slice(1e-3, 1e-2), wd=.1)),
    l2            = dict(run=lambda learn: learn.fit_one_cycle(2, 1e-2, wd=.1), opt_kwargs=dict(decouple_wd=False)),
    fit_flat_cos  = dict(run=lambda learn: learn.fit_flat_cos(2, 1e-2)),
    fine_tune     = dict(run=lambda learn: learn.fine_tune(2, 1e-2)),
    gradual       = dict(run=gradually),
    lr_find       = dict(run=find_lr),
    accumulation  = dict(run=lambda learn: learn.fit(2), cbs=GradientAccumulation(32)),
    clip          = dict(run=lambda learn: learn.fit(2), cbs=GradientClip(.1)),
    bf16          = dict(run=lambda learn: learn.to_bf16().fit(1)),
    fp16          = dict(run=lambda learn: learn.to_fp16().fit(1)),
    wd_bn_bias    = dict(run=lambda learn: learn.fit(2, wd=.1), wd_bn_bias=True),
    no_train_bn   = dict(run=lambda learn: learn.fine_tune(1, 1e-2), train_bn=False),
    twice         = dict(run=twice),
    scheduled     = dict(run=scheduled),
    start_epoch   = dict(run=resumed),
    resetter      = dict(run=with_resets, cbs=ModelResetter),
    third_party   = dict(run=lambda learn: learn.fit(2, slice(1e-3, 1e-2)), cbs=ThirdParty),
    summary       = dict(run=summarized),
    new_head      = dict(run=change_head),
    other_split   = dict(run=change_split),
    moms          = dict(run=lambda learn: learn.fit_one_cycle(2, moms=(.9, .8, .9))),
)

@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    "No progress bars, tables or warnings of mixed precision without a GPU, and no more threads than so small a model can use"
    create = Learner.__init__
    def silent(self, *args, **kwargs):
        create(self, *args, **kwargs)
        self.remove_cb(ProgressCallback)
        self.logger = noop
    monkeypatch.setattr(Learner, '__init__', silent)
    with threads(1), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        yield

class Losses(Callback):
    "Every training loss as it is"
    def __init__(self): self.values = []
    def after_loss(self):
        if self.training: self.values.append(float(self.loss))

def results(learn, run):
    "Losses of all batches, the recorder's table, and all weights and buffers"
    losses = Losses()
    with learn.added_cbs(losses): run(learn)
    flat = torch.cat([v.detach().double().flatten() for v in learn.model.state_dict().values()])
    return dict(losses=torch.tensor(losses.values, dtype=torch.float64), record=torch.tensor(learn.recorder.values, dtype=torch.float64), weights=flat)

def run_scenario(scenario, name, way, dtype=torch.float32, path='.'):
    kwargs = dict(SCENARIOS[scenario])
    run = kwargs.pop('run')
    if isinstance(kwargs.get('cbs'), Callback): kwargs['cbs'] = deepcopy(kwargs['cbs'])
    return results(learner(name, way, dtype, path, **kwargs), run)

@lru_cache(8)
def native_results(scenario, name, dtype=torch.float32, path='.'): return run_scenario(scenario, name, 'native', dtype, path)

def assert_agree(expected, got, tolerance):
    assert expected['losses'].numel() and expected['losses'].isfinite().all()
    for k in expected: torch.testing.assert_close(got[k], expected[k], rtol=tolerance, atol=tolerance, msg=lambda m: f'{k}: {m}')

def cast(scenario):
    "The optimizers a scenario is run with: all in the first, then three at a time in turn"
    i = list(SCENARIOS).index(scenario)
    return NAMES if i == 0 else [NAMES[(i + j*3)%len(NAMES)] for j in range(3)]

@pytest.mark.parametrize('scenario,name,way', [pytest.param(s, n, w, id=f'{s}-{n}-{w}') for s in SCENARIOS for n in cast(s) for w in BACKENDS])
def test_same_training(scenario, name, way, tmp_path_factory):
    path = tmp_path_factory.getbasetemp()
    assert_agree(native_results(scenario, name, path=path), run_scenario(scenario, name, way, path=path), LEARNER_TOLERANCE[torch.float32])

@each_name
@each_way
def test_same_training_in_float64(name, way):
    "Where there is no doubt that differences are rounding"
    expected, got = (run_scenario('fit_one_cycle', name, w, torch.float64) for w in ('native', way))
    assert_agree(expected, got, LEARNER_TOLERANCE[torch.float64])

PAIRS = [(NAMES[(2*i + j)%len(NAMES)], source, target) for i,source in enumerate(WAYS) for j,target in enumerate(WAYS)]

def go_on(learn):
    learn.dls.train.rng = random.Random(1)
    learn.fit_one_cycle(1, slice(1e-3, 1e-2))

@pytest.mark.parametrize('name,source,target', PAIRS, ids=map('-'.join, PAIRS))
def test_save_and_load(name, source, target, tmp_path):
    "`learn.save` and `learn.load` with the optimizer's state, between all ways"
    warnings.filterwarnings('error', message='Could not load the optimizer state')
    learn, other = (learner(name, way, path=tmp_path) for way in (source, target))
    learn.fit_one_cycle(2, slice(1e-3, 1e-2), wd=.1)
    learn.save('checkpoint')
    other.load('checkpoint')
    assert {k: v for h in other.opt.hypers for k,v in h.items()} == {k: v for h in learn.opt.hypers for k,v in h.items()}
    expected, got = results(learn, go_on), results(other, go_on)
    assert_agree(expected, got, 0. if source == target else LEARNER_TOLERANCE[torch.float32])

@each_name
@each_way
def test_export(name, way, tmp_path):
    "`learn.export` leaves the state as it is, and the loaded `Learner` has the same optimizer"
    learn = learner(name, way, path=tmp_path, opt_kwargs=dict(wd=.05))
    learn.fit(1)
    state = deepcopy(learn.opt.state_dict())
    learn.export()
    assert_same(state, learn.opt.state_dict())
    loaded = load_learner(tmp_path/'export.pkl')
    x = torch.randn(4, 6)
    assert torch.equal(loaded.model.eval()(x), learn.model.eval()(x))
    loaded.dls = learn.dls
    loaded.create_opt()
    assert type(loaded.opt) is type(learn.opt) and loaded.opt.hypers[0]['wd'] == .05
    loaded.fit(1)

@each_name
@each_way
@pytest.mark.parametrize('copied', [deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=['deepcopy', 'pickle'])
def test_copies_of_a_learner(name, way, copied):
    learn = learner(name, way)
    learn.fit(1)
    twin = copied(learn)
    expected, got = results(learn, go_on), results(twin, go_on)
    assert_agree(expected, got, 0.)

@each_name
@pytest.mark.parametrize('way', WAYS)
def test_pickled_helpers(name, way):
    "What `Learner` keeps as `opt_func`"
    opt_func = pickle.loads(pickle.dumps(helper(name)(wd=.05, **flags(way))))
    opt = opt_func(make_params(SMALL), lr=.1)
    assert opt.hypers[0]['wd'] == .05 and opt.hypers[0]['lr'] == .1
    assert type(opt) is type(build(name, make_params(SMALL), way))

class CPUMixedPrecision(MixedPrecision):
    "fastai's own is for CUDA only. Starting with a scale so great that the first steps are skipped"
    def before_fit(self):
        self.autocast, self.scales = torch.autocast('cpu', dtype=torch.float16), L()
        self.learn.scaler = torch.amp.GradScaler('cpu', init_scale=2.**30)
    def after_fit(self): self.autocast, self.learn.scaler = None, None

@each_name
@each_way
def test_skipped_steps(name, way):
    "In float16 with a `GradScaler` that finds infinite gradients at first"
    def run(way):
        learn = learner(name, way, cbs=CPUMixedPrecision())
        res = results(learn, lambda learn: learn.fit(4, 1e-3))
        skipped = len(res['losses']) - len(learn.cpu_mixed_precision.scales)
        assert 0 < skipped < len(res['losses'])
        return res
    assert_agree(run('native'), run(way), .02) # float16's eps is .001

@each_way
@pytest.mark.parametrize('name', ['Adam', 'Ranger'])
def test_compiled_model(name, way):
    def run(way):
        learn = learner(name, way)
        learn.model = torch.compile(learn.model, backend='eager')
        learn.splitter = lambda model: thirds(model._orig_mod)
        return results(learn, lambda learn: learn.fit_one_cycle(1))
    assert_agree(run('native'), run(way), LEARNER_TOLERANCE[torch.float32])

@each_name
@each_way
def test_flags_of_learner(name, way):
    "`do_wd` and `force_train`, which it sets after building the optimizer"
    def flagged(way):
        learn = learner(name, way)
        learn.create_opt()
        learn.freeze()
        return [(n, learn.opt.state[p], p.requires_grad) for n,p in learn.model.named_parameters()]
    assert flagged(way) == flagged('native')
    assert any(s.get('do_wd') is False for _,s,_ in flagged(way)) and any(s.get('force_train') for _,s,_ in flagged(way))

@each_name
def test_a_fit_compiles_one_kernel_a_stage(name):
    "Whatever the groups, the batches and the schedules; and one more where Lookahead's every k-th step is another"
    cpu.compiled.cache_clear()
    learn = learner(name, 'fused')
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(2, slice(1e-3, 1e-2))
    assert cpu.compiled.cache_info().misses == sum(len(c.kernels) for c in OPTIMIZERS[name].compositions()) + OPTIMIZERS[name].has_lookahead
