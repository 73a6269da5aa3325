"Schedule-Free: which weights are where, outside of a `Learner` and in one"
import pytest
from common import *
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.progress import ProgressCallback
from fastai.callback.schedule import Learner
from fastai.callback.tracker import SaveModelCallback
from fastai.data.core import DataLoaders
from fastai.learner import load_learner
from torch import nn
from torch.nn import functional as F

from fastxtend.callback.schedulefree import ScheduleFreeCallback

FREE = [n for n in NAMES if 'base_weights' in slots_of(n)]
each_name = pytest.mark.parametrize('name', FREE)
each_way = pytest.mark.parametrize('way', ('native', 'foreach', 'fused'))

def grads(steps=30): return make_grads(tuple(SMALL.values()), torch.float64, steps)

def averages(opt, params):
    "From the weights of training and the state"
    return [p if 'base_weights' not in opt.state[p] else (p - .1*opt.state[p]['base_weights'])/.9 for p in params]

@each_name
@each_way
def test_there_and_back(name, way):
    params = make_params(SMALL, torch.float64)
    opt = build(name, split(params, 2), way)
    train(opt, params, grads())
    before, average = [p.clone() for p in params], averages(opt, params)
    for _ in range(2): opt.eval()
    for p,x in zip(params, average): torch.testing.assert_close(p, x)
    for _ in range(2): opt.train()
    for p,y in zip(params, before): torch.testing.assert_close(p, y)

@each_name
@each_way
def test_a_step_at_the_average_is_refused(name, way):
    params = make_params(SMALL, torch.float64)
    opt = build(name, params, way)
    train(opt, params, grads())
    opt.eval()
    before = snapshot(opt, params)
    with pytest.raises(RuntimeError, match='Call `opt.train'): opt.step()
    assert_same(before, snapshot(opt, params))

@each_name
@pytest.mark.parametrize('at_average', [False, True])
def test_resumes_exactly(name, at_average):
    def start():
        params = make_params(SMALL, torch.float64)
        return build(name, split(params, 2), 'fused', warmup=10), params
    opt, params = start()
    train(opt, params, grads()[:15])
    if at_average: opt.eval()
    other, others = start()
    for p,q in zip(params, others): q.copy_(p)
    other.load_state_dict(saved_and_loaded(opt.state_dict()))
    for o,ps in ((opt, params), (other, others)):
        o.train()
        train(o, ps, grads()[15:])
        o.eval()
    assert_same(snapshot(opt, params), snapshot(other, others))

@each_name
def test_a_schedule_of_momentum_changes_nothing(name):
    def run(moms):
        params = make_params(SMALL, torch.float64)
        opt = build(name, params, 'fused', mom=.9)
        for mom,gs in zip(moms, grads()):
            opt.set_hypers(mom=mom)
            step_with(opt, params, gs)
        assert opt.hypers[0]['mom'] == .9
        return params
    for a,b in zip(run([.9]*30), run(np.linspace(.95, .85, 30))): assert torch.equal(a, b)

@pytest.mark.parametrize('name', [n for n in NAMES if n not in FREE and n != 'Ranger'])
def test_others_have_no_other_weights(name):
    params = make_params(SMALL)
    opt = build(name, params, 'fused')
    train(opt, params, make_grads(tuple(SMALL.values()), steps=3))
    before = snapshot(opt, params)
    opt.eval(); opt.train()
    assert_same(before, snapshot(opt, params))

class Watch(Callback):
    "Where the weights are in each event"
    order = 200
    def __init__(self, stop_at=None, error=CancelFitException): self.seen, self.stop_at, self.error = [], stop_at, error
    def at_average(self): return all('at_average' in self.opt.state[p] for p in self.model.parameters())
    def before_batch(self): self.seen.append((self.training, self.at_average()))
    def after_batch(self):
        if self.training and len(self.seen) == self.stop_at: raise self.error

def learner(opt_func, tmp_path, **kwargs):
    torch.manual_seed(0)
    x = torch.randn(64, 3)
    dl = [(x[i:i+8], x[i:i+8].sum(1, keepdim=True)) for i in range(0, 64, 8)]
    learn = Learner(DataLoaders(dl, dl), nn.Linear(3, 1), loss_func=F.mse_loss, opt_func=opt_func, path=tmp_path, **kwargs)
    return learn.remove_cb(ProgressCallback)

def all_at_average(learn): return all('at_average' in learn.opt.state[p] for p in learn.model.parameters())

@each_name
def test_trains_and_validates(name, tmp_path):
    watch = Watch()
    learn = learner(partial(constructor(name), fused=True), tmp_path, cbs=[watch, SaveModelCallback(monitor='train_loss', every_epoch=True)])
    with learn.no_logging():
        learn.fit(2, .1)
        learn.fit_one_cycle(1, .1)
    assert set(watch.seen) == {(True, False), (False, True)} and all_at_average(learn)
    assert sum(isinstance(cb, ScheduleFreeCallback) for cb in learn.cbs) == 1
    weights = [p.detach().clone() for p in learn.model.parameters()]
    learn.load('model_0', with_opt=False)
    for p,w in zip(learn.model.parameters(), weights): assert torch.equal(p, w)

@each_name
def test_cancelled_and_interrupted(name, tmp_path):
    learn = learner(partial(constructor(name), fused=True), tmp_path, cbs=Watch(stop_at=5))
    with learn.no_logging(): learn.fit(2, .1)
    assert all_at_average(learn)
    learn = learner(partial(constructor(name), fused=True), tmp_path, cbs=Watch(stop_at=5, error=KeyboardInterrupt))
    with learn.no_logging(), pytest.raises(KeyboardInterrupt): learn.fit(2, .1)
    assert not all_at_average(learn)
    learn.remove_cb(Watch)
    learn.validate()
    assert all_at_average(learn)
    with learn.no_logging(): learn.fit(1, .1)

@each_name
def test_exported(name, tmp_path):
    "With averaged weights, and loaded as any other"
    from test_learner import learner as with_data
    learn = with_data(name, 'fused', path=tmp_path)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert all_at_average(learn)
    learn.export()
    for p,q in zip(learn.model.parameters(), load_learner(tmp_path/'export.pkl').model.parameters()): assert torch.equal(p, q)

def trained(learn):
    "A learner in the middle of its training"
    learn.add_cb(watch := Watch(stop_at=3, error=KeyboardInterrupt))
    with learn.no_logging(), pytest.raises(KeyboardInterrupt): learn.fit(1, .1)
    learn.remove_cb(watch)
    assert not all_at_average(learn)
    return learn

def weights(model): return [p.detach().clone() for p in model.parameters()]

def average_of(learn): return averages(learn.opt, list(learn.model.parameters()))

def assert_close(xs, ys):
    for x,y in zip(xs, ys, strict=True): torch.testing.assert_close(x, y)

@each_name
@pytest.mark.parametrize('before', (False, True), ids=('at first', 'after an epoch'))
def test_lr_find_leaves_no_trace(name, before, tmp_path):
    learn = learner(partial(constructor(name), fused=True), tmp_path)
    with learn.no_bar(), learn.no_logging():
        if before: learn.fit(1, .1)
        else: learn.create_opt()
        was, state = weights(learn.model), deepcopy(learn.opt.state_dict()['state'])
        learn.lr_find(num_it=10, show_plot=False)
        for p,w in zip(learn.model.parameters(), was): assert torch.equal(p, w)
        assert_same(dict(state=state), dict(state=learn.opt.state_dict()['state']))
        learn.fit(1, .1)
    assert all_at_average(learn)

@each_name
def test_interrupted_and_saved(name, tmp_path):
    "What is saved is the average, and training goes on from where it was"
    learn = trained(learner(partial(constructor(name), fused=True), tmp_path))
    y, x = weights(learn.model), [a.detach() for a in average_of(learn)]
    learn.save('interrupted')
    assert not all_at_average(learn)
    assert_close(weights(learn.model), y)
    other = learner(partial(constructor(name), fused=True), tmp_path)
    other.create_opt()
    other.load('interrupted', with_opt=True)
    assert all_at_average(other)
    assert_close(weights(other.model), x)
    other.opt.train()
    assert_close(weights(other.model), y)
    assert_close([learn.opt.state[p]['base_weights'] for p in learn.model.parameters()], [other.opt.state[p]['base_weights'] for p in other.model.parameters()])

@each_name
def test_interrupted_and_predicted(name, tmp_path):
    learn = trained(learner(partial(constructor(name), fused=True), tmp_path))
    (w, b), (xs, ys) = [a.detach() for a in average_of(learn)], map(torch.cat, zip(*learn.dls.valid))
    with learn.no_bar(), learn.no_logging(): preds, targs = learn.get_preds(dl=Plain(learn.dls.valid))
    assert all_at_average(learn)
    torch.testing.assert_close(preds, xs @ w.T + b)
    assert torch.equal(targs, ys)

@each_name
def test_interrupted_and_exported(name, tmp_path):
    from test_learner import learner as with_data
    learn = trained(with_data(name, 'fused', path=tmp_path))
    y = weights(learn.model)
    learn.export()
    exported = load_learner(tmp_path/'export.pkl').model
    assert_close(weights(learn.model), y)
    learn.opt.eval()
    assert_close(weights(learn.model), weights(exported))

class SaveInTraining(Callback):
    def after_batch(self):
        if self.training and self.iter == 3: self.learn.save('in_training')

@each_name
def test_saved_in_the_middle_of_an_epoch(name, tmp_path):
    "Training is the same, but for rounding on the way to the average and back"
    def run(*cbs):
        learn = learner(partial(constructor(name), fused=True), tmp_path, cbs=cbs)
        with learn.no_logging(): learn.fit(2, .1)
        return weights(learn.model)
    plain = run()
    for a,b in zip(plain, run(SaveInTraining())): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    other = learner(partial(constructor(name), fused=True), tmp_path)
    other.create_opt()
    other.load('in_training', with_opt=True)
    assert all_at_average(other)

@each_name
def test_the_best_model_is_an_average(name, tmp_path):
    "`SaveModelCallback` with the optimizer, which is loaded again after training, and training afterwards"
    learn = learner(partial(constructor(name), fused=True), tmp_path, cbs=SaveModelCallback(with_opt=True))
    with learn.no_bar(), learn.no_logging(): learn.fit(3, .1)
    assert all_at_average(learn)
    best = min(v[1] for v in learn.recorder.values)
    learn.remove_cb(SaveModelCallback)
    assert learn.validate()[0] == pytest.approx(best, rel=1e-5)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, .01)
    assert all_at_average(learn)

class Plain(list):
    "Batches"
    bs, device = 8, None
    def new(self, **kwargs): return self

@each_name
@pytest.mark.parametrize('asked', (False, True))
def test_statistics_of_batch_norm(name, asked, tmp_path):
    "Those of the average where they are asked for: PyTorch's function finds the same"
    from torch.optim.swa_utils import update_bn
    learn = learner(partial(constructor(name), fused=True), tmp_path, cbs=ScheduleFreeCallback(update_bn=asked))
    learn.model, dl = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)), Plain(learn.dls.train)
    learn.dls = DataLoaders(dl, dl)
    with learn.no_bar(), learn.no_logging(): learn.fit(2, .1)
    expected = deepcopy(learn.model)
    update_bn(dl, expected)
    same = torch.allclose(expected[1].running_mean, learn.model[1].running_mean, atol=1e-6) and torch.allclose(expected[1].running_var, learn.model[1].running_var, rtol=1e-5)
    assert same == asked
    learn.lr_find(num_it=4, show_plot=False)
    learn.get_preds()

def test_other_learners_are_left_alone(tmp_path):
    learn = learner(helper('Adam')(fused=True), tmp_path)
    with learn.no_logging(): learn.fit(1, .1)
    assert not any(isinstance(cb, ScheduleFreeCallback) for cb in learn.cbs)
