"Averages of the weights: torch's numbers, what is in the model when, and training that does not notice"
from __future__ import annotations

import io, warnings
from copy import deepcopy
from functools import partial

import numpy as np, pytest, torch
from fastai.basics import (Callback, CancelFitException, CancelStepException, CrossEntropyLossFlat, DataLoader, DataLoaders,
                           Learner, OptimWrapper, accuracy, set_seed)
from fastai.callback.all import GradientAccumulation, SaveModelCallback
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn as torch_update_bn

from fastxtend.callback.averaging import EMACallback, SWACallback, update_bn
from fastxtend.optimizer.all import adam, ranger

both = pytest.mark.parametrize('make', [partial(EMACallback, .8), SWACallback], ids=['ema', 'swa'])

def rows(n, seed):
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=gen)
    return list(zip(x, (x[:, :2] + torch.randn(n, 2, generator=gen)).argmax(1)))

def learner(opt_func=None, dtype=torch.float32, **kwargs):
    set_seed(0)
    cast = lambda items: [(x.to(dtype), y) for x,y in items]
    dls = DataLoaders(DataLoader(cast(rows(48, 1)), bs=8, shuffle=True), DataLoader(cast(rows(16, 2)), bs=8), device='cpu')
    dls.train.rng.seed(5)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(.2), nn.Linear(8, 2)).to(dtype)
    kwargs = {**dict(opt_func=opt_func or adam(foreach=True), lr=.05, splitter=lambda m: [list(m[:2].parameters()), list(m[4].parameters())]), **kwargs}
    return Learner(dls, model, CrossEntropyLossFlat(), **kwargs)

def fit(learn, n_epoch=4, **kwargs):
    with learn.no_bar(), learn.no_logging(): learn.fit(n_epoch, **kwargs)
    return learn

def params(model): return [p.detach().clone() for p in model.parameters()]

def state(model): return {k: v.clone() for k,v in model.state_dict().items()}

def assert_same(a, b, **tol):
    a, b = (list(x.values()) if isinstance(x, dict) else x for x in (a, b))
    assert len(a) == len(b)
    for x,y in zip(a, b): torch.testing.assert_close(x, y, **(tol or dict(rtol=0, atol=0)))

class Torch(Callback):
    "torch's average, after each `event` from an epoch on"
    order = 56
    def __init__(self, event='after_step', start_epoch=0, every=1, **kwargs):
        self.start, self.every, self.kwargs, self.averaged = start_epoch, every, kwargs, None
        setattr(self, event, self.take)
    def take(self):
        if self.epoch < self.start or (self.epoch - self.start + 1) % self.every: return
        if self.averaged is None: self.averaged = AveragedModel(self.model, **self.kwargs)
        self.averaged.update_parameters(self.model)

class Spy(Callback):
    "The parameters seen after validation and in each training batch"
    order = 70
    def __init__(self): self.valid, self.train, self.after = [], [], []
    def after_validate(self): self.valid.append(params(self.model))
    def after_epoch(self): self.after.append(params(self.model))
    def before_batch(self):
        if self.learn.training: self.train.append(params(self.model))

@pytest.mark.parametrize('start', [0, 2])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_ema_is_torch_s(start, dtype):
    ref = Torch(start_epoch=start, multi_avg_fn=get_ema_multi_avg_fn(.8))
    learn = fit(learner(dtype=dtype), cbs=[EMACallback(.8, start_epoch=start), ref])
    assert_same(params(learn.model), params(ref.averaged.module))

@pytest.mark.parametrize('start,every', [(0, 1), (1, 1), (1, 2)])
def test_swa_is_torch_s(start, every):
    ref = Torch('after_train', start, every)
    learn = fit(learner(), 5, cbs=[SWACallback(start, every), ref])
    assert_same(params(learn.model), params(ref.averaged.module), rtol=1e-6, atol=1e-7)

def test_buffers():
    ref = Torch(multi_avg_fn=get_ema_multi_avg_fn(.8), use_buffers=True)
    learn = fit(learner(), cbs=[EMACallback(.8, use_buffers=True), ref])
    for name,b in ref.averaged.module.named_buffers():
        if b.is_floating_point(): assert torch.equal(learn.model.get_buffer(name), b)
    plain = fit(learner(), cbs=EMACallback(.8))
    assert not torch.equal(plain.model[1].running_mean, learn.model[1].running_mean)

@both
@pytest.mark.parametrize('opt_func', [adam(), ranger(foreach=True), adam(fused=True), partial(OptimWrapper, opt=torch.optim.SGD)])
def test_training_does_not_notice(make, opt_func):
    "Weights, statistics, and the order of the data are those of a training without the callback"
    learn = fit(learner(opt_func), cbs=make(replace_weights=False))
    assert_same(state(learn.model), state(fit(learner(opt_func)).model))

@both
def test_what_is_in_the_model_when(make):
    spy, plain, ref = Spy(), Spy(), Torch(multi_avg_fn=get_ema_multi_avg_fn(.8)) if make is not SWACallback else Torch('after_train')
    cb = make()
    learn = fit(learner(), cbs=[cb, spy, ref])
    fit(learner(), cbs=plain)
    for a,b in zip(spy.train, plain.train, strict=True): assert_same(a, b)
    assert_same(spy.valid[-1], params(ref.averaged.module), rtol=1e-6, atol=1e-7)
    for a,b in zip(spy.valid, spy.after, strict=True): assert_same(a, b)
    assert_same(params(learn.model), spy.valid[-1])
    assert_same([cb.state_dict()['trained'][n] for n,_ in learn.model.named_parameters()], plain.valid[-1])

@both
def test_without_validation_on_the_average(make):
    spy, plain = Spy(), Spy()
    learn = fit(learner(), cbs=[make(validate_average=False), spy])
    fit(learner(), cbs=plain)
    for a,b in zip(spy.valid, plain.valid, strict=True): assert_same(a, b)
    assert not torch.equal(learn.model[0].weight, plain.valid[-1][0])

@both
def test_storage_stays(make):
    learn = learner()
    before = [p.data_ptr() for p in learn.model.parameters()]
    fit(learn, cbs=make())
    assert [p.data_ptr() for p in learn.model.parameters()] == before

@both
def test_before_the_first_average(make):
    "Nothing is replaced until there is an average"
    assert_same(state(fit(learner(), 2, cbs=make(start_epoch=2)).model), state(fit(learner(), 2).model))

@both
def test_resume_from_file(make, tmp_path):
    "Stopped after two epochs, in a new process as it were, equals never stopped"
    whole = learner()
    ref = make()
    fit(whole, cbs=ref)
    class Stop(Callback):
        order = 80
        def after_epoch(self):
            if self.epoch == 1: raise CancelFitException
    learn, cb, file = learner(path=tmp_path), make(), io.BytesIO()
    fit(learn, cbs=[cb, Stop()])
    learn.save('stopped')
    torch.save(cb.state_dict(), file)
    states = deepcopy((torch.get_rng_state(), learn.dls.train.rng.getstate()))
    again, cb = learner(path=tmp_path), make()
    again.create_opt()
    again.load('stopped')
    cb.load_state_dict(torch.load(io.BytesIO(file.getvalue())))
    torch.set_rng_state(states[0]); again.dls.train.rng.setstate(states[1])
    fit(again, 4, cbs=cb, start_epoch=2)
    assert_same(state(again.model), state(whole.model))
    for k in ('average', 'trained'): assert_same(cb.state_dict()[k], ref.state_dict()[k])
    assert cb.n_averaged == ref.n_averaged

@both
@pytest.mark.parametrize('replace', [False, True])
def test_resume_in_place(make, replace):
    "Two fits with `resume` equal one"
    learn, cb = learner(), make(resume=True, replace_weights=replace)
    fit(learn, 2, cbs=cb)
    fit(learn, 2, cbs=cb)
    ref = make(replace_weights=replace)
    assert_same(state(learn.model), state(fit(learner(), 4, cbs=ref).model))
    assert cb.n_averaged == ref.n_averaged

def test_anew_with_each_fit():
    learn, cb = learner(), EMACallback(.8)
    fit(learn, 2, cbs=cb)
    fit(learn, 1, cbs=cb)
    assert cb.n_averaged == 6

def test_frozen_parameters():
    learn, cb, every = learner(), EMACallback(.8), EMACallback(.8, all_parameters=True)
    learn.create_opt()
    learn.freeze()
    fit(learn, 2, cbs=[cb])
    # fastai trains batch norm in frozen groups too
    assert set(cb.average) == {'1.weight', '1.bias', '4.weight', '4.bias'}
    fit(learn, 1, cbs=[every])
    assert len(every.average) == 6
    cb.resume = True
    learn.unfreeze()
    with pytest.raises(ValueError, match='all_parameters=True'): fit(learn, 1, cbs=cb)

def test_nothing_to_average():
    learn = learner(train_bn=False)
    learn.create_opt()
    for p in learn.model.parameters(): p.requires_grad_(False)
    with pytest.raises(ValueError, match='nothing to average'): learn.add_cb(EMACallback()); learn.ema.before_train()

def test_validate_and_predict_leave_it_alone():
    cb = EMACallback(.8)
    learn = learner(cbs=cb)
    fit(learn, 2)
    average, weights = cb.state_dict(), state(learn.model)
    with learn.no_bar(), learn.no_logging():
        learn.validate()
        learn.get_preds()
        learn.lr_find(num_it=6, show_plot=False)
    assert_same(state(learn.model), weights)
    for k in ('average', 'trained'): assert_same(cb.state_dict()[k], average[k])
    assert cb.n_averaged == 12

def test_skipped_steps():
    cb = EMACallback(.8)
    fit(learner(), 2, cbs=[cb, GradientAccumulation(16)])
    assert cb.n_averaged == 6
    class Skip(Callback):
        def before_step(self):
            if self.train_iter % 3 == 0: raise CancelStepException
    fit(learner(), 1, cbs=[cb, Skip()])
    assert cb.n_averaged == 4
    class Late(Callback):
        order = 99
        def before_step(self): raise CancelStepException
    fit(learner(), 1, cbs=[cb, Late()])
    assert cb.n_averaged == 0

def test_saved_model_is_the_validated_one(tmp_path):
    learn, spy = learner(path=tmp_path, metrics=accuracy), Spy()
    fit(learn, 4, cbs=[EMACallback(.8), spy, SaveModelCallback(every_epoch=1)])
    for epoch in range(4):
        learn.load(f'model_{epoch}')
        assert_same(params(learn.model), spy.valid[epoch])

def test_best_model_is_loaded_at_the_end(tmp_path):
    learn, spy = learner(path=tmp_path), Spy()
    with learn.no_bar(), learn.no_logging(): learn.fit(4, cbs=[EMACallback(.8), spy, SaveModelCallback()])
    best = int(np.argmin([v[1] for v in learn.recorder.values]))
    assert_same(params(learn.model), spy.valid[best])

def test_update_bn_is_torch_s():
    learn = fit(learner(), 2)
    learn.dls.loaders[0] = learn.dls.train.new(shuffle=False)
    learn.model[3].p = 0.
    ref = deepcopy(learn.model)
    torch_update_bn(learn.dls.train.new(), ref)
    training = [m.training for m in learn.model.modules()]
    update_bn(learn)
    assert_same(state(learn.model), state(ref), rtol=1e-5, atol=1e-6)
    assert learn.model[1].momentum == .1 and [m.training for m in learn.model.modules()] == training

def test_swa_has_its_own_statistics():
    mine, none = fit(learner(), cbs=SWACallback()), fit(learner(), cbs=SWACallback(update_bn=False))
    assert_same(params(mine.model), params(none.model))
    assert torch.equal(none.model[1].running_mean, fit(learner()).model[1].running_mean)
    assert not torch.equal(mine.model[1].running_mean, none.model[1].running_mean)

def test_warns_of_an_average_of_first_weights():
    with pytest.warns(UserWarning, match='36% of the average is still'): fit(learner(), 4, cbs=EMACallback(1 - 1/23))
    with warnings.catch_warnings():
        warnings.filterwarnings('error', message='.*of the average')
        fit(learner(), 4, cbs=EMACallback(.85))
        fit(learner(), 1, cbs=EMACallback(.999, replace_weights=False))
        fit(learner(), 1, cbs=EMACallback(.999, start_epoch=1))

@pytest.mark.parametrize('decay', [1, 1.5, -.1, float('nan'), '.9', True])
def test_bad_decay(decay):
    with pytest.raises(ValueError, match='less than 1'): EMACallback(decay)

@pytest.mark.parametrize('kwargs', [dict(start_epoch=-1), dict(start_epoch=.5), dict(cycle_len=0), dict(cycle_len=True)])
def test_bad_counts(kwargs):
    with pytest.raises(ValueError, match='is an integer of at least'): SWACallback(**kwargs)

def test_bad_state():
    with pytest.raises(ValueError, match="no average and no trained"): EMACallback().load_state_dict(dict(n_averaged=1))
    cb = EMACallback()
    fit(learner(), 1, cbs=cb)
    sd = cb.state_dict()
    sd['average']['4.bias'] = torch.zeros(3)
    cb.load_state_dict(sd)
    with pytest.raises(ValueError, match="other parameters.*'4.bias'"): fit(learner(), 1, cbs=cb)
