"The profiler: its numbers add up, training is as without it, and it leaves nothing behind"
import inspect, pickle

import pandas as pd, pytest, torch
from fastai.callback.core import (Callback, CancelBatchException, CancelEpochException, CancelFitException, CancelStepException,
                                  CancelTrainException)
from fastai.callback.schedule import *
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.learner import Learner, defaults
from fastai.losses import MSELossFlat
from fastai.test_utils import RegModel, synth_dbunch
from fastai.torch_core import no_random
from fastcore.test import equals

from fastxtend.callback import profiler
from fastxtend.callback.profiler import LastInLineCallback, SimpleProfilerCallback
from fastxtend.optimizer.fused import adam

STEPS = ['forward', 'loss', 'backward', 'opt_step', 'zero_grad']

class Ticks:
    "A clock that moves by one at each look: all times are known"
    now = 0.
    def __call__(self):
        self.now += 1
        return self.now

class Wait(Callback):
    "Another callback that takes `seconds` of a fake clock at each event of the batch"
    def __init__(self, clock, seconds): self.clock, self.seconds = clock, seconds
    def before_batch(self): self.clock.now += self.seconds
    after_pred = after_loss = before_backward = after_backward = before_step = after_step = after_batch = before_batch

class Raise(Callback):
    "Raise `error` at `at` in the given batch"
    def __init__(self, error, at='after_pred', batch=2): self.error, self.at, self.batch = error, at, batch
    def __call__(self, event_name):
        if event_name == self.at and self.training and self.iter == self.batch: raise self.error

def learner(**kwargs):
    with no_random(): return Learner(synth_dbunch(bs=8, n_train=4), RegModel(), loss_func=MSELossFlat(), **kwargs)

def left_behind(learn):
    "What the profiler could leave in a learner"
    return [cb for cb in learn.cbs if isinstance(cb, (SimpleProfilerCallback, LastInLineCallback))] + [k for k in vars(learn) if k in
           ('fit', 'simple_profiler', 'last_in_line')]

def profiled(learn, fit, **kwargs):
    "The figures of `fit(learn)`"
    fit(learn.profile(report='none', **kwargs))
    assert not left_behind(learn)
    return learn.last_profile.set_index(['part', 'phase'])

def state(learn):
    "All that training leaves"
    opt = learn.opt.state_dict()
    return [list(learn.model.state_dict().values()), learn.recorder.losses, [list(v) for v in learn.recorder.values], opt['hypers'],
            [s.get('sqr_avg') for s in opt['state']], torch.get_rng_state()]

@pytest.mark.parametrize('fit', [lambda l: l.fit(2), lambda l: l.fit_one_cycle(2, .01), lambda l: l.fine_tune(1)])
def test_numbers_add_up(fit):
    df = profiled(learner(cbs=GradientClip(1.)), fit)
    total = df.total_s
    assert total['', 'fit'] >= total['', 'epoch'] >= total['', 'train'] + total['', 'valid']
    for part,inner in (('train', STEPS), ('valid', STEPS[:2])):
        assert total['', part] >= total[part, 'draw'] + total[part, 'batch']
        assert total[part, 'batch'] >= sum(total[part, o] for o in inner) > 0
        assert df.loc[part].calls.nunique() == 1 and list(df.loc[part].index) == ['draw', 'batch', *inner, *(['optimizer'] if part == 'train' else [])]
    assert (df.mean_ms*df.calls/1000 - df.total_s).abs().max() < 1e-9
    assert df.share['', 'fit'] == 1 and (df.share <= 1).all() and (df.share*total['', 'fit'] - total).abs().max() < 1e-9

def test_calls_and_samples():
    learn = learner()
    df = profiled(learn, lambda l: l.fit(3))
    n = {p: sum(len(b[0]) for b in dl) for p,dl in zip(('train', 'valid'), learn.dls)}
    assert df.calls['', 'epoch'] == 3 and df.calls['train', 'batch'] == 3*len(learn.dls.train) and df.calls['valid', 'draw'] == 3*len(learn.dls.valid)
    for part in n: assert df.samples_s[part, 'forward'] == pytest.approx(3*n[part]/df.total_s[part, 'forward'])

def test_other_callbacks_are_not_counted():
    clock = Ticks()
    df = profiled(learner(cbs=Wait(clock, 1000)), lambda l: l.fit(1), clock=clock)
    for phase in STEPS: assert df.mean_ms['train', phase] == 1000, phase
    assert (df.std_ms.loc['train'] == 0).all() and df.mean_ms['train', 'batch'] > 8*1000*1000

@pytest.mark.parametrize('kwargs', [{}, dict(opt_func=adam(foreach=True)), dict(cbs=[GradientClip(.1), GradientAccumulation(16)])])
def test_training_is_the_same(kwargs):
    def run(prepare):
        with no_random():
            learn = prepare(learner(**kwargs))
            learn.fit_one_cycle(2, .01)
            learn.fit(1, 1e-3)
            return state(learn)
    assert equals(run(lambda l: l), run(lambda l: l.profile(report='none', sync=True)))

def test_lr_find_is_the_same():
    def run(prepare):
        with no_random():
            learn = learner()
            res = prepare(learn).lr_find(num_it=20, show_plot=False)
            return res, state(learn)
    learn = learner()
    df = profiled(learn, lambda l: l.lr_find(num_it=20, show_plot=False, stop_div=False))
    assert df.calls['train', 'forward'] == df.calls['train', 'batch'] == 20
    assert equals(run(lambda l: l), run(lambda l: l.profile(report='none')))

@pytest.mark.parametrize('at', ['before_batch', 'after_pred', 'before_step', 'after_step', 'after_batch'])
@pytest.mark.parametrize('error', [ValueError('boom'), KeyboardInterrupt()])
def test_leaves_nothing_when_training_fails(error, at):
    learn = learner(cbs=Raise(error, at))
    with pytest.raises(type(error)): learn.profile(report='none').fit(2)
    assert not left_behind(learn)
    df = learn.last_profile.set_index(['part', 'phase'])
    assert df.calls['train', 'draw'] == 3 and df.total_s['', 'fit'] >= df.total_s['', 'train'] > 0
    learn.remove_cb(Raise)
    assert profiled(learn, lambda l: l.fit(1)).calls['', 'epoch'] == 1

@pytest.mark.parametrize('error,batches', [(CancelBatchException, 8), (CancelTrainException, 6), (CancelEpochException, 6), (CancelFitException, 3),
                                           (CancelStepException, 8)])
def test_cancelled(error, batches):
    "A cancelled part ends what it is in, and phases that were not finished do not count"
    at = 'before_step' if error is CancelStepException else 'after_pred'
    class Once(Raise):
        def __call__(self, event_name):
            if event_name == at and self.training and self.iter == 2: raise error
    df = profiled(learner(cbs=Once(error)), lambda l: l.fit(2))
    assert df.calls['train', 'batch'] == df.calls['train', 'forward'] == batches
    if error is CancelStepException: assert df.calls['train', 'opt_step'] == 6 and df.calls['train', 'zero_grad'] == 8
    else: assert df.calls['train', 'loss'] == batches - (1 if error is CancelFitException else 2)
    assert df.total_s['', 'train'] >= df.total_s['train', 'draw'] + df.total_s['train', 'batch']

def test_optimizer_is_all_around_the_step():
    "Callbacks before and after the step count, those of other events do not, and batches without a step have none"
    clock = Ticks()
    df = profiled(learner(cbs=Wait(clock, 1000)), lambda l: l.fit(1), clock=clock)
    train = df.loc['train'].mean_ms
    assert train['optimizer'] > 2*1000*1000 + train['opt_step'] + train['zero_grad'] and train['optimizer'] < 3*1000*1000
    df = profiled(learner(cbs=GradientAccumulation(16)), lambda l: l.fit(2))
    assert df.calls['train', 'optimizer'] == df.calls['train', 'opt_step'] == 4 and df.calls['train', 'batch'] == 8

def test_the_first_call_is_apart():
    phases = profiler.Phases(clock := Ticks())
    phases.start('fit'); phases.start('train')
    for seconds in (50, 1, 3, 2):
        phases.start('batch'); clock.now += seconds - 1; phases.stop('batch')
    row = phases.frame().iloc[-1]
    assert (row.first_ms, row.median_ms, row.mean_ms) == (50_000, 2_000, 14_000)

def test_only_the_next_fit():
    learn = learner()
    learn.profile(report='none').fit(1)
    first = learn.last_profile
    learn.fit(1)
    assert learn.last_profile is first

@pytest.mark.parametrize('give', [lambda l, cb: l.fit(1, cbs=cb), lambda l, cb: l.add_cb(cb).fit(1)])
def test_as_a_callback(give):
    learn = learner()
    give(learn, SimpleProfilerCallback(report='none'))
    assert not left_behind(learn) and len(learn.last_profile)

def test_as_a_callback_of_a_learner():
    "It times one fit; if that fails, the next"
    learn = learner(cbs=[SimpleProfilerCallback(report='none'), Raise(ValueError('boom'))])
    with pytest.raises(ValueError): learn.fit(1)
    learn.remove_cb(Raise)
    learn.fit(1)
    assert not left_behind(learn)
    assert set(learn.last_profile.set_index('part').loc['train'].calls) == {4}

def test_validation():
    "fastai's `validate` is a `fit` of nothing but validation"
    learn = learner(cbs=SimpleProfilerCallback(report='none'))
    learn.validate()
    assert list(learn.last_profile.part.unique()) == ['', 'valid'] and 'train' not in set(learn.last_profile.phase)
    assert not left_behind(learn)

@pytest.mark.parametrize('prepare', [lambda l: l.fit(1), lambda l: l.profile(report='none'), lambda l: l.add_cb(SimpleProfilerCallback(report='none'))])
def test_pickle(prepare):
    learn = learner()
    prepare(learn)
    copy = pickle.loads(pickle.dumps(learn))
    copy.fit(1)
    assert not left_behind(copy)

@pytest.mark.parametrize('kind,text', [('plain', 'opt_step'), ('markdown', '| train | opt_step |'), ('none', '')])
def test_reports(kind, text, capsys):
    learn = learner()
    with learn.no_logging(), learn.no_bar(): learn.profile(report=kind).fit(1)
    out = capsys.readouterr().out
    assert text in out and (out == '') == (kind == 'none')

def test_csv(tmp_path):
    learn = learner()
    learn.profile(report='none', csv=tmp_path/'profile.csv').fit(1)
    saved = pd.read_csv(tmp_path/'profile.csv', keep_default_na=False, na_values={'samples_s': ['']})
    pd.testing.assert_frame_equal(saved, learn.last_profile, check_dtype=False)

def test_syncs_only_when_asked(monkeypatch):
    waits = []
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'synchronize', lambda *_: waits.append(1))
    def fit(**kwargs): SimpleProfilerCallback(report='none', **kwargs)._mark('before_fit', profiler._FIRST)
    fit()
    assert not waits
    fit(sync=True)
    assert len(waits) == 1

def test_arguments():
    with pytest.raises(ValueError, match='plain, notebook, markdown'): learner().profile(report='pdf')
    assert list(inspect.signature(Learner.profile).parameters) == ['self', *inspect.signature(SimpleProfilerCallback).parameters]

def test_importing_changes_nothing():
    "The module adds one method to `Learner`, and no default callback"
    learn = learner()
    assert not left_behind(learn) and 'profile' in vars(Learner) and Learner.fit.__module__ == 'fastai.learner'
    assert not any(cb is SimpleProfilerCallback for cb in defaults.callbacks)
