"`fit_flat_varied`: the learning rate of every batch, and what it refuses"
from __future__ import annotations

from functools import partial

import numpy as np, pytest, torch
from fastai.basics import Callback, DataLoader, DataLoaders, Learner, MSELossFlat, OptimWrapper, set_seed
from fastai.callback.all import SchedCos, SchedExp, SchedLin, SchedPoly
from torch import nn

import fastxtend.schedulers
from fastxtend.optimizer.all import adam, ranger
from fastxtend.schedulers import phased

N_BATCHES = 5

def learner(n_groups=1, opt_func=None, **kwargs):
    set_seed(0)
    rows = [(torch.randn(3), torch.randn(2)) for _ in range(4*N_BATCHES)]
    dls = DataLoaders(DataLoader(rows, bs=4), DataLoader(rows, bs=4), device='cpu')
    model = nn.Sequential(*[nn.Linear(3, 3) for _ in range(n_groups-1)], nn.Linear(3, 2))
    splitter = lambda m: [list(layer.parameters()) for layer in m]
    return Learner(dls, model, MSELossFlat(), opt_func=opt_func or adam(), lr=1e-2, splitter=splitter, **kwargs)

class Record(Callback):
    "The rates that the optimizer steps with"
    order = 100
    def __init__(self): self.seen = []
    def before_step(self): self.seen.append([h['lr'] for h in self.opt.hypers])

def fit(n_epoch, *args, learn=None, **kwargs):
    learn, rec = learn or learner(), Record()
    with learn.no_bar(), learn.no_logging(): learn.fit_flat_varied(n_epoch, *args, cbs=rec, **kwargs)
    return np.array(rec.seen)

def cos(a, b, x): return a + (b-a)*(1 - np.cos(np.pi*x))/2

def test_without_changes_it_is_fit_flat_cos():
    learn, rec = learner(), Record()
    with learn.no_bar(), learn.no_logging(): learn.fit_flat_cos(8, 3e-3, div_final=100, pct_start=.5, cbs=rec)
    np.testing.assert_allclose(fit(8, 3e-3, div_final=100, pct_start=.5), rec.seen, rtol=1e-5)

def test_every_batch():
    "Against the definition, written out for each batch"
    lrs, t = fit(8, 1e-2, next_lr=[2e-2, 4e-3], change_by=[2, .625], change_time=[1, .25], change_sched=[SchedLin, None]), np.arange(8*N_BATCHES)/N_BATCHES
    want = np.select([t < 1, t < 2, t < 3, t < 5, t < 6],
                     [1e-2, 1e-2 + 1e-2*(t-1), 2e-2, cos(2e-2, 4e-3, (t-3)/2), 4e-3], cos(4e-3, 4e-8, (t-6)/2))
    np.testing.assert_allclose(lrs[:, 0], want, rtol=1e-6)

@pytest.mark.parametrize('by', [1, 3, .125, .375, .7, .2, .225]) # fastai's sum falls short of the last two
def test_at_once(by):
    "The first batch after the change has the new rate, whatever rounding does to the share of training"
    lrs, first = fit(8, 1e-2, next_lr=1e-3, change_by=by, change_time=0)[:, 0], round(by*N_BATCHES*(1 if isinstance(by, int) else 8))
    assert (lrs[:first] == 1e-2).all() and (lrs[first:6*N_BATCHES] == 1e-3).all()

@pytest.mark.parametrize('sched,half', [(SchedLin, 5.5e-3), (SchedCos, 5.5e-3), (SchedExp, 10**-2.5), (partial(SchedPoly, power=2), 7.75e-3)])
def test_shapes(sched, half):
    lrs = fit(8, 1e-2, next_lr=1e-3, change_by=4, change_time=2, change_sched=sched)[:, 0]
    assert lrs[3*N_BATCHES] == pytest.approx(half)

def test_discriminative_rates():
    lrs = fit(4, slice(1e-4, 1e-2), learn=learner(3), next_lr=[slice(1e-3), [3e-3, 2e-3, 1e-3]], change_by=[1, 2], change_time=0)
    for epoch,want in enumerate([[1e-4, 1e-3, 1e-2], [1e-4, 1e-4, 1e-3], [3e-3, 2e-3, 1e-3]]): np.testing.assert_allclose(lrs[epoch*N_BATCHES], want)
    np.testing.assert_allclose(lrs[-1]/lrs[-1][0], [1, 2/3, 1/3])

def test_one_array_for_one_change_in_a_list():
    np.testing.assert_allclose(fit(4, 1e-2, learn=learner(2), next_lr=[[1e-3, 2e-3]], change_by=[1], change_time=0)[N_BATCHES], [1e-3, 2e-3])

@pytest.mark.parametrize('flags', [{}, dict(foreach=True), dict(fused=True)])
def test_ranger(flags):
    assert len(fit(4, learn=learner(2, ranger(**flags)), next_lr=1e-3, change_by=2)) == 4*N_BATCHES

def test_torch_optimizer():
    learn = learner(2, partial(OptimWrapper, opt=torch.optim.SGD))
    np.testing.assert_allclose(fit(4, 1e-2, learn=learn, next_lr=1e-3, change_by=2)[2*N_BATCHES], 1e-3)

def test_resume():
    whole, learn = fit(8, 1e-2, next_lr=2e-3, change_by=5, change_time=2), learner()
    np.testing.assert_allclose(fit(8, 1e-2, learn=learn, next_lr=2e-3, change_by=5, change_time=2, start_epoch=4), whole[4*N_BATCHES:], rtol=1e-9)

def test_default_rate_and_wd():
    learn = learner()
    assert fit(2, learn=learn, wd=.25)[0, 0] == 1e-2 and learn.opt.hypers[0]['wd'] == .25

def test_records_rates():
    learn = learner()
    lrs = fit(4, 1e-2, learn=learn, next_lr=1e-3, change_by=2)
    np.testing.assert_array_equal(learn.recorder.hps['lr'], lrs[:, 0])

def test_new_optimizer():
    learn = learner()
    fit(1, learn=learn)
    before = learn.opt
    fit(1, learn=learn)
    assert learn.opt is before
    fit(1, learn=learn, reset_opt=True)
    assert learn.opt is not before

@pytest.mark.parametrize('error,message,kwargs', [
    (ValueError, 'belong together', dict(next_lr=1e-3)),
    (ValueError, 'belong together', dict(change_by=1)),
    (ValueError, "2 changes in `change_by`, but 3 values in `next_lr`", dict(next_lr=[1e-3]*3, change_by=[1, 2])),
    (ValueError, "1 changes in `change_by`, but 2 values in `change_time`", dict(next_lr=1e-3, change_by=2, change_time=[1, 1])),
    (ValueError, "not an epoch of a training of 8", dict(next_lr=1e-3, change_by=9)),
    (ValueError, "not an epoch of a training of 8", dict(next_lr=1e-3, change_by=-1)),
    (ValueError, "for epochs use an integer", dict(next_lr=1e-3, change_by=2.)),
    (ValueError, "not a share of training", dict(next_lr=1e-3, change_by=float('nan'))),
    (TypeError, "`change_by` is a number of epochs", dict(next_lr=1e-3, change_by='2')),
    (TypeError, "`change_time` is a number of epochs", dict(next_lr=1e-3, change_by=2, change_time=True)),
    (ValueError, "before training", dict(next_lr=1e-3, change_by=1, change_time=2)),
    (ValueError, "before the one ahead of it is complete", dict(next_lr=[1e-3, 2e-3], change_by=[3, 4], change_time=[1, 2])),
    (ValueError, "before the one ahead of it is complete", dict(next_lr=[1e-3, 2e-3], change_by=[4, 2])),
    (ValueError, "after the final cosine has begun", dict(next_lr=1e-3, change_by=7)),
    (TypeError, "`change_sched` is a function", dict(next_lr=1e-3, change_by=2, change_sched='lin')),
    (ValueError, "`pct_start` is a share", dict(pct_start=75)),
    (ValueError, "`div_final` is a positive number", dict(div_final=0)),
    (ValueError, "not negative", dict(next_lr=-1e-3, change_by=2)),
    (ValueError, "not negative", dict(start_lr=float('nan'))),
])
def test_refuses(error, message, kwargs):
    learn = learner()
    before = learn.model[0].weight.clone()
    with pytest.raises(error, match=message): fit(8, learn=learn, **kwargs)
    assert torch.equal(learn.model[0].weight, before)

@pytest.mark.parametrize('n', [0, -1, 2.5, True])
def test_refuses_epochs(n):
    with pytest.raises(ValueError, match='positive integer'): fit(n)

def test_phases_without_length_are_skipped():
    f = phased([0., .5, .5, 1.], [lambda _: 1, lambda _: 2, lambda _: 3, lambda _: 4])
    assert [f(o) for o in (0, .499, .5, 1)] == [2, 2, 4, 4]
