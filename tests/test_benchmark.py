"The benchmark: its arithmetic on a fake clock, its names and errors, and the command"
import math, os, runpy, signal, subprocess, sys, time, warnings
from functools import partial

import pandas as pd, pytest, torch
from torch import nn

from fastxtend.benchmark import models, steps, training
from fastxtend.benchmark.__main__ import command, main
from fastxtend.benchmark.models import CliError, NotInstalled, UnknownName, model_shapes, shapes_of
from fastxtend.benchmark.report import PUBLISHED, frame, machine, noisy, pivot, published_table, step_report, step_summary, time_cell, verdict
from fastxtend.benchmark.steps import (HEAVYBALL, LION, LR, OPTIMI, OURS, PRODIGY, PYTORCH_OPTIMIZER, SCHEDULEFREE, TIMM, TORCH, WARM_UP, Benchmark, Contest,
                                       Contestant, Stopwatch, Watcher, bytes_per_parameter, choose_backends, device_name, group_lrs, hypers_of, race,
                                       recommend, tensors_per_parameter)
from fastxtend.optimizer.plan import error_of
from fastxtend.optimizer.table import OPTIMIZERS

class FakeClock:
    "A clock that moves when it is told to"
    now = 0.
    def __call__(self): return self.now
    def wait(self, seconds): self.now += seconds

class Stub:
    "An optimizer whose steps take given seconds of a fake clock, in turn, the warm-up included"
    def __init__(self, clock, seconds): self.clock, self.seconds, self.steps = clock, seconds, 0
    def step(self):
        self.clock.wait(self.seconds[self.steps % len(self.seconds)])
        self.steps += 1

@pytest.fixture
def stubs(monkeypatch):
    "Contestants with known times: a function of the fake clock and seconds by name"
    def make(clock, **seconds):
        made = {n: Stub(clock, s) for n,s in seconds.items()}
        table = {n: Contestant(n, lambda *args, stub=stub: stub) for n,stub in made.items()}
        monkeypatch.setattr(steps, 'CONTESTANTS', table)
        monkeypatch.setattr(Contest, 'copy', lambda self: lambda: clock.wait(2**-10))
        return made
    return make

# Arithmetic

def test_known_times(stubs):
    clock = FakeClock()
    made = stubs(clock, native=[.75], fused=[.125])  # exact in binary, as is the 2**-10 of the copy
    native, fused = Contest('m', 'Adam', ['native', 'fused'], shapes=[(1000, 1000), (500,)], clock=clock).run(20)
    assert (native.ms, native.speedup) == (750, 1) and (fused.ms, fused.ms_p10, fused.ms_p90, fused.speedup) == (125, 125, 125, 6)
    assert fused.tensors == 2 and fused.elements == 1_000_500
    assert fused.gb_s == pytest.approx(28*1_000_500/.125/1e9)
    assert fused.copy_gb_s == pytest.approx(3*4*(4*1_000_500//2)*2**10/1e9)
    assert fused.share == pytest.approx(fused.gb_s/fused.copy_gb_s)
    assert native.rounds == math.ceil(20/(.875 + 2**-10))
    assert made['fused'].steps == WARM_UP + fused.rounds + 1  # one more to count its operations

def test_median_and_percentiles(stubs):
    clock = FakeClock()
    stubs(clock, native=[1.]*WARM_UP + [2., 1., 3., 5., 4., 0.])
    res, = Contest('m', 'Adam', ['native'], shapes=[(3,)], clock=clock).run(0)
    assert (res.rounds, res.ms, res.ms_p10, res.ms_p90) == (5, pytest.approx(3000), pytest.approx(1400), pytest.approx(4600))

def test_lookahead_is_measured_by_k_steps(stubs):
    clock, k = FakeClock(), hypers_of('Ranger')['k']
    stubs(clock, native=[1.]*(k-1) + [7.])
    res, = Contest('m', 'Ranger', ['native'], shapes=[(3,)], clock=clock).run(0)
    assert res.ms == pytest.approx(1000*(k - 1 + 7)/k) and res.ms_p10 == res.ms_p90

def test_a_turn_takes_its_time(stubs):
    "Fast contestants take more steps a turn, and times are of one step all the same"
    clock = FakeClock()
    made = stubs(clock, native=[.5], fused=[.125])
    native, fused = Contest('m', 'Adam', ['native', 'fused'], shapes=[(3,)], clock=clock, turn=.75).run(0)
    assert (native.steps, fused.steps) == (2, 6) and (native.ms, fused.ms, fused.speedup) == (500, 125, 4)
    assert made['fused'].steps == WARM_UP + 5*6 + 1
    stubs(clock, native=[2**-20])
    assert Contest('m', 'Adam', ['native'], shapes=[(3,)], clock=clock, turn=0).run(0)[0].steps == 1

def test_without_native_there_is_no_speedup(stubs):
    clock = FakeClock()
    stubs(clock, fused=[.1])
    res, = Contest('m', 'SGD', ['fused'], shapes=[(3,)], clock=clock).run(0)
    assert math.isnan(res.speedup) and 'x**' not in step_report(frame([res]), {})

def test_race_takes_turns():
    "Each takes part once a round, in an order that changes"
    clock, order = FakeClock(), []
    def runner(name): return lambda: (order.append(name), clock.wait(1))
    times = {n: [] for n in 'abc'}
    race({n: runner(n) for n in 'abc'}, 30, Stopwatch(clock=clock), times)
    rounds = [''.join(order[i:i+3]) for i in range(0, len(order), 3)]
    assert len(rounds) == 10 and all(sorted(r) == list('abc') for r in rounds) and len(set(rounds)) > 2
    assert times == {n: [1]*10 for n in 'abc'}

def test_race_has_bounds():
    clock = FakeClock()
    for seconds,rounds in ((0, 5), (1e9, 8)):
        times = dict(a=[])
        race(dict(a=lambda: clock.wait(1)), seconds, Stopwatch(clock=clock), times, rounds=(5, 8))
        assert len(times['a']) == rounds

@pytest.mark.parametrize('name,moved', [('SGD', 5), ('RMSProp', 5), ('Adam', 7), ('RAdam', 7), ('QHAdam', 7), ('Larc', 5 + 2), ('Lamb', 7 + 4),
                                        ('Ranger', 7 + 2/6)])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float32, torch.float64])
def test_bytes(name, moved, dtype): assert bytes_per_parameter(name, dtype) == pytest.approx(moved*dtype.itemsize)

@pytest.mark.skipif(error_of('cpu') is not None, reason="of kernels for CPUs")
@pytest.mark.parametrize('name,formats,moved', [('Adam', dict(state='bfloat16'), 12 + 4*2), ('Adam', dict(state='int8'), 12 + 4*(1 + 4/128)), ('Adam', dict(weights='exact'), 2 + 2*(4 + 4/128) + 4*4), ('Adam', dict(weights='near'), 2 + 2*(3 + 4/128) + 4*4), ('Adam', dict(weights='stochastic'), 2 + 2*(2 + 4/128) + 4*4),
                                                ('Lamb', dict(state='int8'), 12 + 4*(1 + 4/128) + 8 + 2*(1 + 4/128)), ('AdEMAMix', dict(state='int8'), 12 + 2*4 + 4*(1 + 4/128))])
def test_bytes_of_formats(name, formats, moved):
    assert bytes_per_parameter(name, torch.bfloat16 if 'weights' in formats else torch.float32, **formats) == pytest.approx(moved)

@pytest.mark.skipif(error_of('cpu') is not None, reason="of kernels for CPUs")
def test_formats_are_contestants():
    "Each in its own dtype, from the same weights"
    contest = Contest('3x5000', 'Adam', ['fused', *(f'fused_{n}' for n in steps.FORMATS)])
    built = {n: step.__self__ for n,step in contest.build().items()}
    ps = {n: o.param_lists[0][0] for n,o in built.items()}
    assert {n: p.dtype for n,p in ps.items()} == {n: torch.bfloat16 if 'weights' in steps.CONTESTANTS[n].formats else torch.float32 for n in ps}
    assert torch.equal(ps['fused_exact'], ps['fused'].bfloat16()) and torch.equal(ps['fused_exact'].grad, ps['fused'].grad.bfloat16())
    for r in contest.run(0): assert r.gb_s == pytest.approx(bytes_per_parameter('Adam', getattr(torch, r.dtype), **steps.CONTESTANTS[r.backend].formats)*15000/r.ms/1e6)

@pytest.mark.parametrize('name', OPTIMIZERS)
def test_state_is_what_the_optimizer_keeps(name):
    contest = Contest('3x7', name, ['foreach'])
    step = contest.build()['foreach']
    contest.warm_up(step)
    opt = step.__self__
    p = opt.param_lists[0][0]
    kept = [k for k,v in opt.state[p].items() if torch.is_tensor(v) and v.shape == p.shape] + (['slow_weights'] if hasattr(opt, 'slow_weights') else [])
    assert tensors_per_parameter(name) == 2 + len(kept)

def test_watcher_sees_temporaries_while_they_live():
    x = torch.ones(1000)
    def f():
        a = x + 1
        a = a + 1   # two alive
        a = x.view(10, 100)  # none alive, and a view is none
        x.mul_(2)
    with Watcher() as w: f()
    assert (w.calls, w.peak) == (4, 8000)

def test_calls_and_memory_of_backends():
    res = {r.backend: r for r in Contest('50x10', 'Adam', ['native', 'foreach', 'fused']).run(0)}
    assert res['native'].calls > 50*5 > 20 > res['foreach'].calls > res['fused'].calls
    assert res['fused'].extra_mb == 0 and res['foreach'].extra_mb > 0

# Contestants

PEERS = dict(torch_loop=TORCH, torch_foreach=TORCH, torch_fused=('SGD', 'Adam'), optimi=OPTIMI, timm=TIMM,
             lion_pytorch=LION, pytorch_optimizer=PYTORCH_OPTIMIZER, schedulefree=SCHEDULEFREE, prodigyopt=PRODIGY, heavyball=HEAVYBALL)

@pytest.mark.parametrize('backend,name', [(b, n) for b in OURS[1:] for n,o in OPTIMIZERS.items() if b != 'jit' or o.jit] + [(b, n) for b,names in PEERS.items() for n in names])
def test_contestants_step_alike(backend, name):
    "All contestants move parameters in the same direction as native, by about as much"
    if backend in PEERS and not backend.startswith('torch'): pytest.importorskip(backend)
    moved = {}
    for b in ('native', backend):
        step = Contest('4x30', name, [b], groups=1 if backend == 'prodigyopt' else 2).build()[b]
        opt = step.__self__
        params = [p for g in (opt.param_lists if hasattr(opt, 'param_lists') else [g['params'] for g in opt.param_groups]) for p in g]
        before = [p.detach().clone() for p in params]
        for _ in range(8): step()
        moved[b] = torch.cat([p.detach() - q for p,q in zip(params, before)])
    native, other = moved.values()
    assert torch.cosine_similarity(native, other, 0) > .95 and .5 < other.norm()/native.norm() < 2

def test_groups_have_discriminative_learning_rates():
    assert group_lrs(1) == [LR] and group_lrs(3) == pytest.approx([LR/10, LR/10**.5, LR])
    opt = Contest('9x2', 'SGD', ['fused'], groups=3).build()['fused'].__self__
    assert [len(pg) for pg in opt.param_lists] == [3, 3, 3] and [h['lr'] for h in opt.hypers] == pytest.approx(group_lrs(3))

def test_a_new_optimizer_needs_no_new_code(monkeypatch):
    from fastxtend.optimizer import fused
    monkeypatch.setitem(OPTIMIZERS, 'Mine', OPTIMIZERS['Adam'])
    monkeypatch.setattr(fused, 'Mine', fused.Adam, raising=False)
    assert {r.backend for r in Contest('3x5', 'mine', ['native', 'foreach', 'fused']).run(0)} == {'native', 'foreach', 'fused'}

def test_missing_packages_are_skipped_by_name(monkeypatch):
    find_spec = models.importlib.util.find_spec
    monkeypatch.setattr(models.importlib.util, 'find_spec', lambda n: None if n == 'timm' else find_spec(n))
    model_shapes.cache_clear()
    with pytest.raises(NotInstalled, match="'timm'.*pip install timm"): model_shapes('ViT-S/16')
    monkeypatch.setitem(sys.modules, 'optimi', None)
    bench = Benchmark(['ViT-S/16', '3x5'], ['SGD'], ['native', 'optimi'])
    assert [(r.model, r.backend) for r in bench.run(0)] == [('3x5', 'native')]
    assert set(bench.skipped) == {'ViT-S/16', 'optimi (SGD)'} and 'optimi' in bench.skipped['optimi (SGD)']

# Names

@pytest.mark.parametrize('call,known', [
    (lambda: Contest('nothing', 'Adam', ['native']), 'XResNet50'), (lambda: Contest('3x5', 'Adagrad', ['native']), 'Adam, RAdam'),
    (lambda: choose_backends('apex'), 'torch_foreach'), (lambda: device_name('abacus'), 'cpu'), (lambda: main(dtype='int8'), 'bfloat16'),
    (lambda: main(train='chess'), 'digits'), (lambda: main(train='digits', backends='optimi'), 'native, foreach, jit, fused')])
def test_unknown_names_list_the_known(call, known):
    with pytest.raises(UnknownName, match='Unknown .* Known: ') as e: call()
    assert known in str(e.value)

def my_model(): return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
def my_shapes(): return [(2, 3), ()]
def my_mistake(): raise RuntimeError('not my day')

def test_models_of_the_user():
    assert model_shapes(f'{__name__}:my_model') == ((4, 3), (4,), (4,), (4,)) and model_shapes(f'{__name__}:my_shapes') == ((2, 3), ())
    for name in (f'{__name__}:nothing', 'no_such_module:f'):
        with pytest.raises(UnknownName, match=name): model_shapes(name)
    with pytest.raises(RuntimeError, match='not my day'): model_shapes(f'{__name__}:my_mistake')

def test_frozen_parameters_are_not_measured():
    model = my_model()
    model[0].weight.requires_grad_(False)
    assert shapes_of(model) == [(4,)]*3

# Interruption, recommendation and training

def test_interrupted_contests_keep_what_was_measured(stubs):
    clock = FakeClock()
    made = stubs(clock, native=[1.], fused=[.5])
    plain = made['fused'].step
    def step():
        if made['fused'].steps == (WARM_UP + 5 + 1) + WARM_UP + 2: raise KeyboardInterrupt
        plain()
    made['fused'].step = step
    bench = Benchmark(['3x5', '4x5'], ['Adam'], ['native'], clock=clock)
    bench.backends = ['native', 'fused']
    done = []
    res = bench.run(0, after=lambda b: done.append(len(b.results)))
    assert bench.interrupted and done == [2]
    assert [(r.model, r.backend) for r in res] == [('3x5', 'native'), ('3x5', 'fused'), ('4x5', 'native'), ('4x5', 'fused')]
    assert res[0].rounds == 5 and 1 <= res[3].rounds <= 5 and res[3].ms == pytest.approx(500)

def test_recommends_the_fastest(stubs, monkeypatch):
    clock = FakeClock()
    stubs(clock, native=[1.], foreach=[.5], jit=[.25], fused=[.75])
    monkeypatch.setattr(steps, 'Stopwatch', lambda device, _: Stopwatch(device, clock))
    best = recommend(my_model(), seconds=0)
    assert best.backend == 'jit' and [r.backend for r in best.results] == ['jit', 'foreach', 'fused', 'native']
    assert best.opt_func.keywords == dict(jit=True) and 'adam(jit=True)' in str(best)

@pytest.mark.parametrize('around', [False, True])
def test_training_is_the_same_by_all_backends(around, monkeypatch):
    monkeypatch.setitem(training.TASKS, 'tabular', partial(training.tabular, bs=64, n=1024 + 64*3))
    bench = training.TrainingBenchmark(['tabular'], ['SGD'], around=around)
    res = bench.run(1)
    assert [r.backend for r in res] == ['native', 'foreach', 'jit', 'fused'] and not bench.skipped
    for r in res:
        assert r.valid_loss == pytest.approx(res[0].valid_loss, rel=1e-3)
        assert r.epoch_speedup == pytest.approx(res[0].epoch_s/r.epoch_s) and 0 < r.step_share < 1

# Reports

def test_report_names_machine_and_command():
    res = Contest('3x5', 'SGD', ['native', 'foreach']).run(0)
    text = step_report(frame(res), {**machine(), 'Command': command(dict(models='3x5'))}, {'timm': 'is missing'})
    for part in (torch.__version__.split('+')[0], 'threads', 'fastxtend-bench --models 3x5', '- timm: is missing', '3 tensors'): assert part in text, part

def test_pivot_leaves_gaps():
    df = pd.DataFrame([dict(optimizer='SGD', backend='native', ms=2., speedup=1.), dict(optimizer='Lamb', backend='fused', ms=1., speedup=4.)])
    assert pivot(df, ['optimizer'], time_cell).splitlines()[2:] == ['| SGD | 2.00 ms |  |', '| Lamb |  | 1.00 ms **4.00x** |']

@pytest.mark.parametrize('table', [1, 2])
def test_published_tables(table):
    "Every published row can be measured, and stands beside what was measured"
    assert {m for m,_ in PUBLISHED[table]} <= set(models.MODELS)
    rows = [dict(model=m, groups=g, optimizer='Adam', backend=b, ms=ms) for m,g in PUBLISHED[table]
            for b,ms in dict(native=30., foreach=20., jit=25., fused=10.).items()]
    lines = published_table(pd.DataFrame(rows), table).splitlines()[2:]
    assert len(lines) == 2*len(PUBLISHED[table]) and all('50%' in l and '20%' in l and '200%' in l for l in lines[1::2])

def results(**times):
    "Results of Adam on one model, from 10th percentile, median and 90th percentile of each backend"
    native = times['native'][1] if 'native' in times else math.nan
    return pd.DataFrame([dict(model='m', groups=1, optimizer='Adam', backend=b, ms_p10=lo, ms=ms, ms_p90=hi, speedup=native/ms, tensors=1, elements=10**6)
                         for b,(lo,ms,hi) in times.items()])

CASE = ['model', 'groups', 'optimizer']

@pytest.mark.parametrize('fused,is_noisy', [((1, 2, 2.9), False), ((1, 2, 3.1), True), ((6.1, 7, 8), False), ((5.9, 7, 8), True), ((3, 3.9, 6), False)])
def test_noisy_is_what_spreads_by_more_than_it_differs(fused, is_noisy):
    "Faster or slower; less than 5% apart claims nothing"
    df = results(native=(3, 4, 6), fused=fused)
    assert noisy(df, CASE, 'ms') == [False, is_noisy]
    text = step_summary(df)
    assert ('x** noisy |' in text) == is_noisy == ('Noisy, run again: 1 of 2' in text)

def test_verdict():
    df = pd.concat([results(native=(4, 4, 4), jit=(2, 2, 2), fused=(1, 1, 1)), results(native=(4, 4, 4), jit=(2, 2, 2), fused=(2.1, 2.1, 2.1)).assign(model='n'),
                    results(native=(4, 4, 4), jit=(2, 2, 2), fused=(.5, .5, .5)).assign(model='o')])
    assert verdict(df, CASE, 'ms') == 'fused is the fastest in 2 of 3 cases: 1.90 to 8.00 times as fast as fastai native.'
    assert verdict(results(native=(1, 1, 1), jit=(2, 2, 2)), CASE, 'ms') == 'native is the fastest in 1 of 1 cases.'
    assert verdict(results(fused=(1, 1, 1)), CASE, 'ms') == 'fused is the fastest in 1 of 1 cases.', "nothing to compare with"
    assert step_summary(df, {'timm': 'is missing'}).endswith(verdict(df, CASE, 'ms')) and verdict(df, CASE, 'ms') in step_report(df.assign(
        share=1., gb_s=1., calls=1, extra_mb=0.), {})

# The command

@pytest.mark.parametrize('message,kwargs', [
    ("--seconds is a number of at least 0, not nan", dict(seconds=math.nan)), ("--seconds .* not -1", dict(seconds=-1.)),
    ("--seconds .* not inf", dict(seconds=math.inf)), ("--turn .* not -5", dict(turn=-5.)), ("--turn .* not nan", dict(turn=math.nan)),
    ("--threads .* not -1", dict(threads=-1)), ("--epochs is a number of at least 1, not 0", dict(train='digits', epochs=0)),
    ("--name '../../x' is no beginning", dict(name='../../x')), ("--name 'a/b'", dict(name='a/b')), (r"--name 'a\\b'", dict(name='a\\b')),
    ("--name '..'", dict(name='..')),
    ("--optimizers ',' names nothing", dict(optimizers=',')), ("--models ',' names nothing", dict(models=',')), ("--backends", dict(backends=',')),
    ("Unknown optimizer 'adagrad'", dict(optimizers='adagrad', quick=True)), ("Unknown optimizer 'adagrad'", dict(optimizers='adagrad', recommend=True)),
    ("Unknown optimizer 'adagrad'", dict(optimizers='adagrad', train='digits')), ("Unknown optimizer 'adagrad'", dict(optimizers='sgd,adagrad')),
    ("Unknown model ':'", dict(models=':')), ("Unknown model '10x0'", dict(models='10x0')), ("Unknown model '0x10'", dict(models='0x10')),
    ("'os:getpid' returns neither a model", dict(models='os:getpid')), ("'os:sep' is no function", dict(models='os:sep')),
    ("Unknown model '.x:y'", dict(models='.x:y')),
    ("--models, --seconds: not for --train", dict(train='digits', models='tiny', seconds=2.)), ("--epochs: only for --train", dict(epochs=3)),
    ("--backends, --name: not for --recommend", dict(recommend=True, backends='fused', name='x')),
    ("--recommend takes one number of groups", dict(recommend=True, groups='1,2')),
    ("--device cuda: .* no CUDA GPU", dict(device='cuda')), ("--device CUDA:1: .* no CUDA GPU", dict(device='CUDA:1'))])
def test_what_makes_no_sense_is_refused(message, kwargs, tmp_path, monkeypatch):
    "before anything is measured or written"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with pytest.raises(CliError, match=message): main(**kwargs)
    assert not list(tmp_path.iterdir())

@pytest.mark.parametrize('place', ['a_file', 'a_file/in_it', 'null\0'])
def test_out_that_cannot_be_written(place, tmp_path):
    (tmp_path/'a_file').write_text('mine')
    with pytest.raises(CliError, match="Cannot write to --out"): main(models='3x3', out=str(tmp_path/place))
    assert (tmp_path/'a_file').read_text() == 'mine'

def test_results_that_cannot_be_written(tmp_path):
    (tmp_path/'steps.csv').mkdir()
    with pytest.raises(CliError, match="Cannot write .*steps.csv"): main(models='3x3', optimizers='SGD', backends='native', seconds=0., out=str(tmp_path))

@pytest.mark.parametrize('given,measured', [
    ({}, dict(models=['tiny', 'XResNet18'], optimizers=['SGD', 'Adam', 'Lamb'], seconds=1.)),
    (dict(models='3x3', optimizers='radam', seconds=3.), dict(models=['3x3'], optimizers=['RAdam'], seconds=3.)),
    (dict(optimizers='all'), dict(models=['tiny', 'XResNet18'], optimizers=[*OPTIMIZERS], seconds=1.))])
def test_quick_heeds_what_is_given(given, measured, tmp_path, monkeypatch):
    "also what is the default without it, as 3 seconds are"
    def run(self, seconds, *args):
        assert dict(models=self.models, optimizers=self.optimizers, seconds=seconds) == measured
        raise InterruptedError
    monkeypatch.setattr(Benchmark, 'run', run)
    with pytest.raises(InterruptedError): main(quick=True, out=str(tmp_path), **given)

def test_quick_training(tmp_path, monkeypatch):
    def run(self, epochs, *args):
        assert epochs == 1 and self.optimizers == ['Adam']
        raise InterruptedError
    monkeypatch.setattr(training.TrainingBenchmark, 'run', run)
    with pytest.raises(InterruptedError): main(quick=True, train='digits', out=str(tmp_path))

def test_recommendation_says_when_it_is_noise(stubs, monkeypatch, capsys):
    "Steps of fused and jit take much longer or less long than they differ"
    clock = FakeClock()
    monkeypatch.setattr(steps, 'Stopwatch', lambda device, _: Stopwatch(device, clock))
    for jit,again in (([1., 3., 2.2, 1.1, 3.5, 2.], 'noisy, run again: fused and jit spread'), ([2.], None)):
        stubs(clock, native=[9.], foreach=[8.], jit=jit, fused=[1., 1.5, 2.5, 1.2, 1.4, 3.1] if again else [1.])
        main(models='3x3', recommend=True, seconds=0.)
        out = capsys.readouterr().out
        assert 'adam(fused=True)' in out and (again in out if again else 'noisy' not in out)

def test_tables_fit_the_terminal(monkeypatch):
    "Columns are aligned, and no name is cut, however narrow the terminal"
    from io import StringIO
    from rich.console import Console
    from fastxtend.benchmark import __main__ as bench
    df = results(**{b: (1, 2, 3) for b in ('native', 'foreach', 'jit', 'fused', 'torch_foreach', 'torch_fused')})
    for width in (60, 80, 120):
        out = StringIO()
        monkeypatch.setattr(bench, 'Console', lambda **kwargs: Console(file=out, width=width))
        bench.show(step_summary(df))
        lines = out.getvalue().splitlines()
        assert max(map(len, lines)) <= width and '…' not in out.getvalue() and '|' not in out.getvalue()
        assert sum('2.00 ms' in o for o in lines) <= 1 and 'Verdict' in out.getvalue()

# The command, from a shell

def run_command(*args, **kwargs):
    return subprocess.run([sys.executable, '-m', 'fastxtend.benchmark', *args], capture_output=True, text=True, **kwargs)

def test_command(tmp_path):
    res = run_command('--models', '30x100,300x100', '--optimizers', 'Adam', '--backends', 'native,foreach', '--groups', '1,3', '--seconds', '.05',
                      '--out', str(tmp_path), '--name', 'cpu')
    assert res.returncode == 0, res.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ['cpu.csv', 'cpu.md'] + [f'cpu_{k}.png' for k in ('groups', 'roofline', 'speedup', 'tensors')]
    df = pd.read_csv(tmp_path/'cpu.csv')
    assert len(df) == 2*2*2 and (df.ms > 0).all() and set(df.groups) == {1, 3}
    assert '300x100, 3 groups' in (tmp_path/'cpu.md').read_text() and '| optimizer |' in (tmp_path/'cpu.md').read_text()
    assert '300x100, 3 groups' in res.stdout and '|' not in res.stdout.split('Time of a step')[1], "Markdown is for the file"
    assert res.stdout.index('Verdict') > res.stdout.rindex(' ms') and 'is the fastest in' in res.stdout

@pytest.fixture
def refused(monkeypatch):
    "What the command says when it ends because of its arguments; in this process, as an import takes seconds"
    def run(*args):
        monkeypatch.setattr(sys, 'argv', ['fastxtend-bench', *args])
        monkeypatch.setattr(sys, 'path', [*sys.path])
        monkeypatch.delitem(sys.modules, 'fastxtend.benchmark.__main__')
        with warnings.catch_warnings(), pytest.raises(SystemExit) as e: runpy.run_module('fastxtend.benchmark', run_name='__main__')
        return e.value.code
    return run

@pytest.mark.parametrize('args', [['--models', 'nothing'], ['--optimizers', 'Adagrad'], ['--backends', 'apex'], ['--device', 'abacus']])
def test_command_explains_errors(args, refused): assert 'Known: ' in refused(*args)

@pytest.mark.parametrize('args', [['--name', '../x'], ['--models', 'os:getpid'], ['--models', ':'], ['--seconds', 'nan'], ['--out', __file__]])
def test_command_refuses(args, refused):
    "What makes no sense, or would write where it should not"
    assert args[1] in refused(*args).splitlines()[-1]

def test_errors_with_the_oldest_fastcore():
    "which has no `CliError`: ours ends the command with its message as well"
    code = '''
import runpy, sys, types
import fastai.torch_basics, fastcore.script
script = sys.modules['fastcore.script'] = types.ModuleType('fastcore.script')
script.call_parse = fastcore.script.call_parse
sys.argv[1:] = ['--models', ':']
runpy.run_module('fastxtend.benchmark', run_name='__main__')'''
    res = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True)
    assert res.returncode == 1 and res.stderr.startswith("Unknown model ':'"), res.stderr

def test_command_recommends_for_a_model_in_the_current_folder(tmp_path):
    "also when it is started by the script that pip installs, for which Python does not look there"
    (tmp_path/'mymod.py').write_text('import torch\ndef net(): return torch.nn.Linear(30, 4)\n')
    (tmp_path/'bin').mkdir()
    script = tmp_path/'bin/fastxtend-bench'
    script.write_text("import sys\nfrom fastxtend.benchmark.__main__ import main\nif __name__ == '__main__': sys.exit(main())\n")
    path = os.pathsep.join([os.getcwd(), os.environ.get('PYTHONPATH', '')])
    res = subprocess.run([sys.executable, script, '--recommend', '--models', 'mymod:net', '--seconds', '.05'], cwd=tmp_path, capture_output=True, text=True,
                         env={**os.environ, 'PYTHONPATH': path})
    assert res.returncode == 0 and res.stdout.count('opt_func=adam(') == 1 and 'Fastest on mymod:net' in res.stdout, res.stderr

def test_command_keeps_results_on_ctrl_c(tmp_path):
    proc = subprocess.Popen([sys.executable, '-m', 'fastxtend.benchmark', '--models', 'tiny,XResNet50', '--optimizers', 'SGD', '--backends', 'native',
                             '--seconds', '600', '--out', str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # a job in the background inherits it ignored
    seen = ''
    while '[0/2' not in seen:
        seen += proc.stdout.read(1)
        assert proc.poll() is None, seen
    time.sleep(5)
    os.kill(proc.pid, signal.SIGINT)
    out, _ = proc.communicate(timeout=120)
    assert proc.returncode == 0 and 'Interrupted' in out
    assert list(pd.read_csv(tmp_path/'steps.csv').backend) == ['native']
