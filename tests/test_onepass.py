"Clipping, unscaling, averaging and clearing in the step: the numbers of fastai's own callbacks, and fastai's way wherever somebody could see a difference"
import pickle, warnings
from functools import partial

import pytest
from common import *
from fastai.basics import (Callback, CancelFitException, CancelStepException, CrossEntropyLossFlat, DataLoader, DataLoaders, Learner, OptimWrapper, set_seed)
from fastai.callback.all import GradientAccumulation
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.training import GradientClip as NativeClip
from torch import nn
from torch.amp import GradScaler

from fastxtend.callback.attach import ClearGradients
from fastxtend.callback.averaging import EMACallback
from fastxtend.callback.clip import GradientClip
from fastxtend.callback.fp16 import read_together
from fastxtend.optimizer.all import Adam, adam, larc, ranger
from fastxtend.optimizer.attach import Attachment, average_weights, clear_gradients, clip_gradients

def make_model(): return nn.Sequential(nn.Linear(4, 16, bias=False), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 2))

def halves(m): return [list(m[:2].parameters()), list(m[2:].parameters())]

def learner(opt_func, cbs=(), dtype=torch.float64, n_batches=20, splitter=halves, **kwargs):
    set_seed(0)
    x = torch.randn(8*n_batches, 4, dtype=dtype)
    items = list(zip(x, (x[:, :2] + torch.randn(8*n_batches, 2, dtype=dtype)).argmax(1)))
    dls = DataLoaders(DataLoader(items, bs=8, shuffle=True), DataLoader(items[:16], bs=8), device='cpu')
    dls.train.rng.seed(5)
    return Learner(dls, make_model().to(dtype), CrossEntropyLossFlat(), opt_func=opt_func, splitter=splitter, cbs=list(cbs), **kwargs)

def fit(learn, n_epoch=5, lr=.01, **kwargs):
    with learn.no_bar(), learn.no_logging(), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn.fit_one_cycle(n_epoch, lr, **kwargs)
    return learn

def params(learn): return list(learn.model.parameters())

class Taken(Callback):
    "Which attachments were part of each step"
    order, watches_step = 100, False
    def __init__(self): self.seen, self.now = [], {}
    def before_step(self): self.now = dict(getattr(self.opt, 'attached', {}))
    def after_step(self):
        self.seen.append({n for n,a in self.now.items() if a.taken})
        self.now = {}

class Skips(Callback):
    "Some steps are cancelled before anything else has happened"
    order, watches_step = 5, False
    def before_step(self):
        if self.train_iter in (3, 11): raise CancelStepException

def assert_close(a, b, eps):
    "Two learners, their optimizers and averages"
    ps = params(a), params(b)
    worst = assert_same(dict(params=[p.detach() for p in ps[0]], states=states(a.opt, ps[0])), dict(params=[p.detach() for p in ps[1]], states=states(b.opt, ps[1])), eps)
    if hasattr(a, 'ema'):
        assert a.ema.n_averaged == b.ema.n_averaged and list(a.ema.average) == list(b.ema.average)
        worst = max(worst, assert_same(a.ema.average, b.ema.average, eps))
    return worst

# Training is a loop: what is rounded otherwise in one step is a little different in the next. Measured: 5e-15 and 3e-6.
WITHIN = {torch.float64: 1e-10, torch.float32: 2e-5}

@pytest.mark.parametrize('dtype', WITHIN, ids=['float64', 'float32'])
@pytest.mark.parametrize('name', NAMES)
def test_training(name, dtype):
    "100 steps of one cycle after 20 frozen ones, with clipping now and then, accumulation and skipped steps"
    def run(way, clip):
        learn = learner(partial(constructor(name), **flags(way)), dtype=dtype)
        learn.create_opt()
        learn.freeze()
        taken = Taken()
        more = [ClearGradients(), taken] if way == 'fused' else []
        fit(learn, 1, cbs=[clip(.6), EMACallback(.9), *more])
        learn.unfreeze()
        fit(learn, 3, cbs=[clip(.6), Skips(), *more])
        learn.add_cb(EMACallback(.9, replace_weights=False))
        return fit(learn, 2, cbs=[clip(.6), GradientAccumulation(16), *more]), taken
    native, fused = run('native', NativeClip)[0], run('fused', GradientClip)
    # batch norm of the frozen group trains: all that has a gradient steps, and from the second step on there is an average
    assert fused[1].seen.count({'clip', 'clear'}) == 1 + 58 + 1 and fused[1].seen.count({'clip', 'average', 'clear'}) == 19 + 19
    assert fused[1].seen.count(set()) == 2
    assert_close(native, fused[0], WITHIN[dtype]/torch.finfo(dtype).eps)

# --- Mixed precision

class Scaled(Callback):
    "PyTorch's scaler on a CPU, and infinite or undefined gradients at some steps"
    order, watches_step = MixedPrecision.order - 1, False
    def __init__(self, bad=(2, 7, 8), value=math.inf, **kwargs): self.bad, self.value, self.kwargs, self.scales = bad, value, dict(init_scale=2.**14, growth_interval=5, **kwargs), []
    def before_train(self):
        if not self.scales: self.scaler_now = self.learn.scaler = GradScaler('cpu', **self.kwargs)
    def before_step(self):
        self.scales.append(self.learn.scaler.get_scale())
        if self.train_iter in self.bad: params(self.learn)[2].grad[3] = self.value

def scaled(opt_func, cbs=(), scaled=None, n_epoch=2, **kwargs):
    cb = scaled or Scaled()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # there is no CUDA
        learn = learner(opt_func, **kwargs).to_fp16()
    return fit(learn, n_epoch, cbs=[cb, *cbs]), cb.scales

@pytest.mark.parametrize('clip', [None, .6], ids=['free', 'clipped'])
@pytest.mark.parametrize('name', NAMES)
def test_mixed_precision(name, clip):
    "The same weights, counts, averages, scales and skipped steps"
    def run(way, Clip, more=()):
        return scaled(partial(constructor(name), **flags(way)), [*([Clip(clip)] if clip else []), EMACallback(.9, replace_weights=False), *more])
    taken = Taken()
    (native, scales), (fused, fused_scales) = run('native', NativeClip), run('fused', GradientClip, [taken])
    assert scales == fused_scales and len(set(scales)) > 3
    every = {'unscale'} | ({'clip'} if clip else set())
    assert taken.seen.count(set()) == 3 and taken.seen.count(every) == 1 and taken.seen.count(every | {'average'}) == 36
    for a,b in zip(params(native), params(fused)): assert distance(a, b)*torch.finfo(a.dtype).eps < 1e-10
    assert_same(states(native.opt, params(native)), states(fused.opt, params(fused)), 1e-10/torch.finfo(torch.float64).eps)

@pytest.mark.parametrize('value', [math.inf, -math.inf, math.nan, 1e20, 1e30])
def test_what_is_not_finite(value):
    "The verdict is about gradients: a finite one whose square is not is clipped to zero, and not skipped"
    cb = Scaled((1,), value*(2.**14 if math.isfinite(value) else 1))
    fused, fused_scales = scaled(adam(fused=True), [GradientClip(.5)], cb, 1, dtype=torch.float32)
    native, scales = scaled(adam(), [NativeClip(.5)], Scaled(cb.bad, cb.value), 1, dtype=torch.float32)
    assert scales == fused_scales and (scales[2] < scales[1]) == (not math.isfinite(value))
    for a,b in zip(params(native), params(fused)): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)

def test_one_wait_with_a_scaler(monkeypatch):
    "The scale is read by itself once, and then together with the verdict and the norm"
    asked = []
    get = GradScaler.get_scale
    monkeypatch.setattr(GradScaler, 'get_scale', lambda self: asked.append(1) or get(self))
    class Quiet(Scaled):
        def before_step(self): pass
    scaled(adam(fused=True), [GradientClip(.5)], Quiet(), 1)
    assert len(asked) == 1
    asked.clear()
    scaled(adam(), [NativeClip(.5)], Quiet(), 1)
    assert len(asked) == 20

def test_read_together():
    assert read_together(1., 2) == [1., 2]
    assert read_together(torch.tensor([1., 2.]), 5., torch.tensor(4.)) == [3., 5., 4.]

def test_float16_parameters_are_refused_as_by_torch():
    learn = learner(adam(fused=True), dtype=torch.float32)
    learn.model.half()
    cb = MixedPrecision()
    with pytest.raises(ValueError, match='FP16'):
        learn.create_opt(); learn.add_cb(cb)
        learn.scaler, cb.scales = GradScaler('cpu'), []
        learn.scaler.scale(torch.ones(()))
        for p in params(learn): p.grad = torch.ones_like(p)
        cb.before_step()
