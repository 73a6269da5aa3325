"Training that is killed at any moment and resumed from its last save gives the same weights, bit for bit; a damaged file changes nothing"
import io, multiprocessing, os, pickle, random, signal, sys, time, zipfile
from pathlib import Path

import pytest
from common import *
from fastai.basics import Callback, CrossEntropyLossFlat, DataLoader, DataLoaders
from fastai.callback.schedule import Learner
from torch import nn

each_way = pytest.mark.parametrize('way', BACKENDS)
each_name = pytest.mark.parametrize('name', NAMES)

EPOCHS, BATCHES = 12, 8
KILLS_EACH = int(os.environ.get('FASTXTEND_KILLS', 7)) # with each backend; 20 for a real test
KILLS = dict(loop=KILLS_EACH - KILLS_EACH//2, learner=KILLS_EACH//2)
DEADLINE = 120 # Seconds that no process takes

class Killed(io.FileIO):
    "A file whose process is killed after some bytes are written"
    def __init__(self, path, room): super().__init__(path, 'w'); self.room = room
    def write(self, data):
        data = memoryview(data).cast('B')
        super().write(data[:self.room])
        if len(data) >= self.room: os.kill(os.getpid(), signal.SIGKILL)
        self.room -= len(data)
        return len(data)

def save(state, path, room=None):
    "Write a new file, and only when it is complete put it in the place of the old one"
    part = path.with_suffix('.part')
    with open(part, 'wb') if room is None else Killed(part, room) as f: torch.save(state, f)
    os.replace(part, path)

def load(path): return torch.load(path, weights_only=True)

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.ReLU(), nn.Dropout(.2), nn.Linear(16, 3))

def batch_of(n):
    x = torch.randn(n, 6)
    return x, x[:, :3].argmax(1)

def fit_loop(way, path, room):
    "A plain loop, in which all optimizers train a model of their own"
    runs = {name: net() for name in NAMES if way in ways(name)}
    opts = {name: build(name, list(m.parameters()), way) for name,m in runs.items()}
    anneals, first, loss_func = [one_cycle(o) for o in opts.values()], 0, CrossEntropyLossFlat()
    if path.exists():
        saved = load(path)
        first = saved['epoch']
        for name in runs:
            runs[name].load_state_dict(saved['models'][name])
            opts[name].load_state_dict(saved['opts'][name])
    for epoch in range(first, EPOCHS):
        torch.manual_seed(epoch)
        for t in range(epoch*BATCHES, (epoch+1)*BATCHES):
            for anneal in anneals: anneal(t/(EPOCHS*BATCHES))
            x, y = batch_of(16)
            for name,model in runs.items():
                loss_func(model(x), y).backward()
                opts[name].step()
                opts[name].zero_grad()
        state = dict(epoch=epoch+1, models={n: m.state_dict() for n,m in runs.items()}, opts={n: o.state_dict() for n,o in opts.items()})
        save(state, path, room if epoch > first else None)

class SaveEachEpoch(Callback):
    "Save model, optimizer and epoch, and let the data depend on the epoch alone"
    order = 99
    def __init__(self, path, first, room): self.path, self.first, self.room = path, first, room
    def before_epoch(self):
        torch.manual_seed(self.epoch)
        self.dls.train.rng = random.Random(self.epoch)
    def after_epoch(self):
        if self.epoch < self.first: return
        save(dict(epoch=self.epoch+1, model=self.model.state_dict(), opt=self.opt.state_dict()), self.path, self.room if self.epoch > self.first else None)

def fit_learner(way, path, room, name='Ranger'):
    "`Learner`, resumed with `start_epoch`"
    torch.manual_seed(42)
    x, y = batch_of(64)
    dl = DataLoader(list(zip(x, y)), bs=16, shuffle=True)
    learn = Learner(DataLoaders(dl, dl, device='cpu'), net(), CrossEntropyLossFlat(), opt_func=helper(name)(**flags(way)))
    learn.create_opt()
    first = 0
    if path.exists():
        saved = load(path)
        first = saved['epoch']
        learn.model.load_state_dict(saved['model'])
        learn.opt.load_state_dict(saved['opt'])
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(EPOCHS, 1e-2, start_epoch=first, cbs=SaveEachEpoch(path, first, room))

FITS = dict(loop=fit_loop, learner=fit_learner)

def work(fit, way, path, room, ready):
    "What a process does"
    torch.set_num_threads(1)
    ready.set()
    FITS[fit](way, path, room)

def run(fit, way, path, room=None, patience=DEADLINE):
    "Train in a process of its own, which is killed after `patience` seconds, or on writing `room` bytes: was it, and how many seconds did it train?"
    ready = processes().Event()
    process = processes().Process(target=work, args=(fit, way, path, room, ready))
    process.start()
    try:
        assert ready.wait(DEADLINE)
        start = time.monotonic()
        process.join(patience)
        duration = time.monotonic() - start
    finally: process.kill()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL), "the process failed by itself"
    return process.exitcode != 0, duration

@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, 'SIGKILL') or 'forkserver' not in multiprocessing.get_all_start_methods(), reason="needs SIGKILL and forks")
@pytest.mark.parametrize('fit', FITS)
@each_way
def test_killed_and_resumed(fit, way, tmp_path):
    "Killed at random moments, and every second time while a file is written"
    whole, path = tmp_path/'whole.pth', tmp_path/'model.pth'
    killed, duration = run(fit, way, whole)
    assert not killed
    size = whole.stat().st_size
    rng, kills = random.Random(f'{fit} {way}'), 0
    for attempt in range(20*KILLS[fit]):
        if kills == KILLS[fit]: break
        if path.exists() and load(path)['epoch'] >= EPOCHS-1: path.unlink() # too little left to be killed in
        if kills % 2: killed, _ = run(fit, way, path, room=rng.randrange(1, size - 1000))
        else: killed, _ = run(fit, way, path, patience=rng.uniform(0, duration/2))
        kills += killed
        if killed and kills % 2 == 0: assert path.with_suffix('.part').exists()
    assert kills == KILLS[fit]
    assert not run(fit, way, path)[0]
    expected, got = map(load, (whole, path))
    assert got['epoch'] == EPOCHS
    assert_same(expected, got)

def trained(name, way):
    params = make_params(SMALL)
    opt = build(name, split(params, 2), way)
    train(opt, params, make_grads(tuple(SMALL.values()), steps=8))
    return opt, params

def file_of(name, way):
    opt, params = trained(name, way)
    f = io.BytesIO()
    torch.save(opt.state_dict(), f)
    return f.getvalue(), opt, params

def read_and_load(opt, data): opt.load_state_dict(torch.load(io.BytesIO(data), weights_only=True))

@each_name
@each_way
def test_truncated_files(name, way):
    "Wherever a file ends too early, reading it fails and nothing is changed"
    data, opt, params = file_of(name, way)
    before = snapshot(opt, params)
    rng, powers = random.Random(name + way), [2**i for i in range(len(data).bit_length()) if 2**i < len(data)]
    for end in [0, *powers, *rng.sample(range(2, len(data)), 10), len(data)-1]:
        with pytest.raises((RuntimeError, EOFError, ValueError, pickle.UnpicklingError)): read_and_load(opt, data[:end])
        assert_same(before, snapshot(opt, params))
    read_and_load(opt, data)
    assert_same(before, snapshot(opt, params))

def intact(data):
    "Do the checksums hold that `torch.save` puts into a file, and `torch.load` does not look at?"
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as f: return f.testzip() is None
    except Exception: return False

@each_name
@each_way
def test_flipped_bits(name, way):
    """With one bit of a file another one, reading and loading it fails and nothing is changed, or what is loaded is right. Numbers may be
    wrong too if nobody looks at the checksums, but even then all of a file is loaded or nothing"""
    data, opt, params = file_of(name, way)
    sd, before, rng = opt.state_dict(), snapshot(opt, params), random.Random(name + way)
    fresh = build(name, split(params, 2), way).state_dict()
    found = dict(failed=0, right=0, wrong=0)
    for i in rng.sample(range(8*len(data)), 60):
        flipped = bytearray(data)
        flipped[i//8] ^= 1 << i%8
        opt.load_state_dict(fresh)
        empty = snapshot(opt, params)
        try: read_and_load(opt, bytes(flipped))
        except Exception:
            assert_same(empty, snapshot(opt, params))
            found['failed'] += 1
            continue
        try: assert_same(sd, opt.state_dict())
        except (AssertionError, TypeError):
            assert not intact(flipped)
            found['wrong'] += 1
        else: found['right'] += 1
    assert all(found.values())
    read_and_load(opt, data)
    assert_same(before, snapshot(opt, params))

@each_way
def test_plain_numbers_of_one_group(way):
    "A file written after a schedule is read by `weights_only=True`"
    params = make_params(SMALL)
    opt = build('Adam', params, way)
    one_cycle(opt)(.5)
    saved_and_loaded(opt.state_dict())

def places(x, path=()):
    "Paths to everything in a nest of dicts and lists"
    for k,v in x.items() if isinstance(x, dict) else enumerate(x) if isinstance(x, list) else ():
        yield (*path, k)
        yield from places(v, (*path, k))

def replaced(x, path, f):
    "A copy of `x` with `f` of what is at `path` there"
    x = deepcopy(x)
    *path, last = path
    at = x
    for k in path: at = at[k]
    at[last] = f(at[last])
    return x

SLOTS_AND_STEP = {"step", "grad_avg", "sqr_avg"}

DAMAGES = dict(
    none      = lambda x: None,
    text      = lambda x: 'damaged',
    shape     = lambda x: torch.zeros(3, 1, 4),
    shortened = lambda x: x[:-1] if isinstance(x, list) else x[:-1] if isinstance(x, Tensor) and x.ndim and len(x) else None,
)

@each_name
@each_way
@pytest.mark.parametrize('damage', DAMAGES)
def test_damaged_structure(name, way, damage):
    "If anything in a state dict has another type or shape, loading it fails and nothing is changed"
    opt, params = trained(name, way)
    sd = opt.state_dict()
    twin, twin_params = trained(name, way)
    before, changed = snapshot(twin, twin_params), 0
    for path in places(sd):
        if damage == 'none' and path == ('slow_weights',): continue # as before the first step
        if len(path) > 2 and path[-1] not in SLOTS_AND_STEP: continue # settings, for which `set_hyper` takes any value
        with pytest.raises(Exception) as e: twin.load_state_dict(replaced(sd, path, DAMAGES[damage]))
        assert not isinstance(e.value, AssertionError), path
        assert_same(before, snapshot(twin, twin_params))
        changed += 1
    assert changed > len(params)

@each_name
@each_way
def test_another_optimizers_file(name, way):
    "The state of every optimizer with other state is refused, with a message that says so"
    opt, params = trained(name, way)
    before = snapshot(opt, params)
    for other in [n for n in NAMES if way in ways(n)]:
        sd = trained(other, way)[0].state_dict()
        if set(opt.state_dict()) <= set(sd) and set(sd['hypers'][0]) == set(opt.state_dict()['hypers'][0]): continue # Ranger is RAdam with Lookahead
        with pytest.raises(ValueError, match='another optimizer|without Lookahead'): opt.load_state_dict(sd)
        assert_same(before, snapshot(opt, params))
