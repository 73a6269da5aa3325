"What the tests of the optimizers share: the table's rows, parameters, gradients, schedules and tolerances"
from __future__ import annotations

import inspect, io, itertools, math, multiprocessing, os, subprocess, sys, threading, warnings
from contextlib import contextmanager
from copy import deepcopy
from functools import lru_cache, partial
from importlib.metadata import version
from importlib.util import find_spec
from textwrap import dedent
from unittest.mock import patch

import numpy as np, torch
from fastcore.all import L, noop
from torch import Tensor

from fastxtend.optimizer import all as optimizers
from fastxtend.optimizer.core import flags_on
from fastxtend.optimizer.declare import BACKENDS, FLAGS, helper_of
from fastxtend.optimizer.lists import BLOCK
from fastxtend.optimizer.steppers import compose, picked
from fastxtend.optimizer.table import OPTIMIZERS, known_slots

WAYS = ('native', *BACKENDS)
NAMES = tuple(OPTIMIZERS)
SOAK = bool(os.environ.get('SOAK')) # All combinations of everything, for `make soak`
WITH_ORACLE = tuple(n for n in NAMES if SOAK or OPTIMIZERS[n].native is not None) # fastai's eight; all of them in a soak test

SMALL = dict(conv=(8, 3, 3, 3), vector=(10,), scalar=(), empty=(0,), matrix=(5, 7))
SHAPES = {**SMALL, 'big': (BLOCK//400 + 30, 400)}  # its last block is a partial one

# How far parameters and state may be from native after 100 steps, in units of `torch.finfo(dtype).eps`: the greatest difference in a
# tensor relative to its greatest element. ForEach rounds almost as native does. TorchScript averages squares by interpolation, and a fused
# kernel keeps intermediate results in registers (fused multiply-adds): both round otherwise. Measured: 10.6, 10.4 and 17.
# (In float64, 40 eps are 9e-15.)
TOLERANCE = dict(native=0, foreach=15, jit=25, fused=40) # ForEach multiplies and adds in one call where native makes two

def constructor(name): return OPTIMIZERS[name].constructor

def helper(name): return helper_of(constructor(name))

def ways(name, of=WAYS):
    "The backends that an optimizer has: `jit` needs a script"
    return tuple(w for w in of if w != 'jit' or OPTIMIZERS[name].jit is not None)

def slots_of(name, mom=.9): return OPTIMIZERS[name].slots(**(dict(mom=mom) if 'mom' in OPTIMIZERS[name].hypers else {}))

@lru_cache(None)
def norms_of(name): return bool(OPTIMIZERS[name].composition().sums)

def takes_whole(name): return any(c.filled for c in OPTIMIZERS[name].compositions())

def compositions(name, shapes, first=(), last=(), **arguments):
    "What parameters of these shapes are stepped with, between `first` and `last`"
    spec = OPTIMIZERS[name]
    flags = dict.fromkeys(flags_on(spec.flags, p, {}) for p in make_params(shapes))
    return [compose([*first, *picked(spec.steppers(**arguments), frozenset(on)), *last], name=name) for on in flags]

def kernels_of(name, shapes, first=(), last=()):
    "How many kernels step parameters of these shapes, and how many only add up"
    stages = [s for c in compositions(name, shapes, first, last) for s in c.kernels]
    return sum(not s.sums for s in stages), sum(bool(s.sums) for s in stages)

# PyTorch's norms of float32 are sums in float32, and of a million elements they are off by some 1e-5. Steppers on whole tensors, and kernels,
# add up otherwise; fastai's own optimizers have the same norms as ForEach. Measured, of a square: 210
NORMS_OF_MANY = 400

def tolerance(name, way, many=False):
    "`TOLERANCE`, or more if norms of `many` elements are compared with those of another function"
    return max(TOLERANCE[way], NORMS_OF_MANY if many and way == 'foreach' and norms_of(name) and OPTIMIZERS[name].native is None else 0)

# Where a step takes a sign, an element may turn round by a rounding error: of a million elements in a hundred steps, two were seen to
TURNED = 1e-5

def turns(name):
    "The share of elements that may be anywhere: none, unless a stepper takes a sign"
    return TURNED if any('sign' in f.__code__.co_names for s in OPTIMIZERS[name].composition().stages for f in s.functions.values()) else 0.

def flags(way): return {} if way == 'native' else {way: True}

def build(name, params, way='native', lr=.01, **kwargs):
    "The optimizer `name` as one of `WAYS`"
    return constructor(name)(params, lr, **flags(way), **kwargs)

def defaults(name):
    "Default values of the hyperparameters and settings of an optimizer"
    params = inspect.signature(constructor(name)).parameters
    return {k: v.default for k,v in params.items() if k not in ('params', 'lr', *FLAGS)}

def moms(name):
    "The values of `mom` that make a different optimizer: none is as good as any unless it keeps less state"
    return (0., .9) if slots_of(name, 0.) != slots_of(name) else (.9,)

def combinations(name, *axes):
    """Combinations of values, one from each axis: all of them for fastai's eight, whose oracle is fastai itself, and in a soak test;
    else few, in which every pair of values occurs"""
    every = list(itertools.product(*axes))
    if name in WITH_ORACLE: return every
    def pairs(c): return {(i, c[i], j, c[j]) for j in range(len(c)) for i in range(j)}
    chosen, todo = [], set().union(*map(pairs, every))
    while todo:
        chosen.append(max(every, key=lambda c: len(pairs(c) & todo)))
        todo -= pairs(chosen[-1])
    return chosen

def make_params(shapes, dtype=torch.float32, seed=0):
    "Leaves of the given shapes, which are values of a dict or a list"
    gen = torch.Generator().manual_seed(seed)
    shapes = shapes.values() if isinstance(shapes, dict) else shapes
    return [torch.randn(s, generator=gen, dtype=torch.float64).to(dtype) for s in shapes]

def split(params, n_groups):
    "`params` as a list of parameter groups, or as it is"
    if n_groups == 1: return params
    cuts = np.linspace(0, len(params), n_groups+1).astype(int)
    return [params[a:b] for a,b in zip(cuts, cuts[1:])]

@lru_cache(8)
def make_grads(shapes, dtype=torch.float32, steps=100, seed=1):
    "A list of gradients for each step, that change in sign, direction and size; not to be written"
    gen = torch.Generator().manual_seed(seed)
    def grad(t, s): return (torch.randn(s, generator=gen, dtype=torch.float64)*10**(-t%3 - 1)).to(dtype)
    return [[grad(t, s) for s in shapes] for t in range(steps)]

def one_cycle(opt):
    "What `fit_one_cycle` writes into the hyperparameters of `opt` in each batch, as a function of the part of training done"
    from fastai.callback.schedule import combined_cos # brings all of fastai, which takes seconds
    lr = np.array([h['lr'] for h in opt.hypers])
    scheds = dict(lr=combined_cos(.25, lr/25, lr, lr/1e5), mom=combined_cos(.25, .95, .85, .95))
    def anneal(pct):
        for k,f in scheds.items(): opt.set_hyper(k, f(pct))
    return anneal

def set_grads(params, grads):
    for p,g in zip(params, grads): p.grad = None if g is None else g.clone()

def step_with(opt, params, grads):
    "One step on copies of `grads`, which all but native leave as they are"
    set_grads(params, grads)
    opt.step()
    if is_native(opt): return
    for p,g in zip(params, grads): assert g is None or torch.equal(p.grad.nan_to_num(), g.nan_to_num()), "a gradient was modified"

def train(opt, params, grads, anneal=noop):
    for t,gs in enumerate(grads):
        anneal(t/len(grads))
        step_with(opt, params, gs)

@contextmanager
def threads(n):
    "PyTorch with `n` threads: for tensors this small, one is fastest, above all where other processes are busy"
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try: yield
    finally: torch.set_num_threads(before)

def is_native(opt): return type(opt).__module__ == 'fastai.optimizer'

def states(opt, params): return [dict(opt.state[p]) for p in params]

def snapshot(opt, params):
    "A copy of everything that a step may change, and of the gradients"
    return deepcopy(dict(params=[p.detach() for p in params], grads=[p.grad if p.grad is None else p.grad.detach() for p in params], states=states(opt, params),
                         hypers=[dict(h) for h in opt.hypers], **carried(opt), **lookahead(opt)))

def carried(opt):
    "What is carried from step to step, if there is anything. What starts at 0 is a sum, which may come close to it by cancellation: `distance` knows lone numbers"
    values = getattr(opt, 'carried', None)
    if not values: return {}
    carries = opt.composition().carried
    return dict(carried={n: torch.tensor(float(x) if carries[n].start == 0 else [float(x)], dtype=torch.float32) for n,x in values.items()})

def lookahead(opt):
    "`count` and `slow_weights`, if there are any"
    if getattr(opt, 'count', None) is None: return {}
    return dict(count=opt.count, slow_weights=[list(pg) for pg in opt.slow_weights or []])

def distance(a, b, leave_out=0.):
    """Greatest difference between two tensors in units of eps, relative to the greatest element; infinite if only one has a NaN somewhere.
    A lone number may come close to zero by cancellation: it is taken for at least .1. The share `leave_out` of elements may differ more"""
    a, b = a.detach(), b.detach()
    assert a.shape == b.shape and a.dtype == b.dtype, (a.shape, b.shape, a.dtype, b.dtype)
    assert a.layout == b.layout and a.device == b.device, (a.layout, b.layout, a.device, b.device)
    if a.layout is not torch.strided: a, b = a.to_dense(), b.to_dense()
    if not a.numel() or a.is_meta or torch.equal(a, b): return 0.
    if not torch.equal(a.isfinite(), b.isfinite()) or not torch.equal(a[~a.isfinite()].nan_to_num(), b[~b.isfinite()].nan_to_num()): return math.inf
    floor, eps = .1 if a.ndim == 0 else torch.finfo(torch.float32).tiny, torch.finfo(a.dtype).eps
    a, b = (x[x.isfinite()].double() for x in (a, b))
    if not a.numel(): return 0.
    return float((a - b).abs().sort().values[-1 - int(leave_out*a.numel())])/max(float(a.abs().max()), floor)/eps

KEPT = {n for spec in OPTIMIZERS.values() for n in spec.kept} # Scalars that are left in the state: learning rates of layers

def compare(a, b, path='', leave_out=0.):
    "Pairs of a path and a distance, of all tensors in two snapshots; everything else has to be equal"
    if isinstance(a, dict):
        assert set(a) == set(b), f"{path}: {sorted(a)} and {sorted(b)}"
        for k in a: yield from compare(a[k], b[k], f'{path}.{k}', leave_out=leave_out)
    elif isinstance(a, (list, L)):
        assert len(a) == len(b), path
        for i,(x,y) in enumerate(zip(a, b)): yield from compare(x, y, f'{path}[{i}]', leave_out=leave_out)
    elif path.rpartition('.')[2] in KEPT: # native keeps a number or a tensor, as the case may be
        yield path, distance(*(torch.tensor([float(x)]) for x in (a, b)))
    elif isinstance(a, Tensor): yield path, distance(a, b, leave_out)
    elif isinstance(a, np.ndarray): assert np.array_equal(a, b), path
    else: assert a == b or (a != a and b != b), f"{path}: {a} and {b}"

def assert_same(expected, got, tolerance=0., leave_out=0.):
    "Two snapshots are equal but for `tolerance` units of eps in each tensor; the greatest distance"
    worst = max(compare(expected, got, leave_out=leave_out), key=lambda o: o[1], default=('', 0.))
    assert worst[1] <= tolerance, f"{worst[0]} is {worst[1]:.1f} eps away, and {tolerance} are allowed"
    return worst[1]

def snapshot_without_grads(steps, opt, params):
    steps(opt, params)
    snap = snapshot(opt, params)
    del snap['grads']  # native adds L2 regularization to them
    return snap

def has_triton():
    "Is there a Triton that the CUDA kernels can use?"
    if find_spec('triton') is None: return False
    return tuple(map(int, version('triton').split('.')[:2])) >= (3, 5)

@lru_cache(None)
def processes():
    """Makes processes from one that has imported fastai, which takes seconds, and has neither Numba nor threads. Allocators give back what is freed:
    limits of memory mean what they say"""
    from multiprocessing import forkserver
    ctx = multiprocessing.get_context('forkserver')
    ctx.set_forkserver_preload(['common', 'fastai.callback.schedule', 'pytest'])
    path = os.pathsep.join(dict.fromkeys([os.path.dirname(__file__), *filter(None, sys.path)]))
    with patch.dict(os.environ, PYTHONPATH=path, OMP_NUM_THREADS='1', MALLOC_ARENA_MAX='1', MALLOC_MMAP_THRESHOLD_='65536'): forkserver.ensure_running()
    return ctx

def _execute(out, code, args, env):
    assert 'numba' not in sys.modules
    for fd in (1, 2): os.dup2(out.fileno(), fd)
    os.environ.update(env)
    sys.argv[1:] = args
    torch.set_num_threads(1)
    warnings.simplefilter('ignore')
    exec(compile(dedent(code), '<code>', 'exec'), {'__name__': '__main__'})

def printed(code, *args, timeout=600, **env):
    "Run `code` on one thread, in a process of its own that has to end well within `timeout` seconds; the last line that it prints"
    read, write = processes().Pipe(duplex=False)
    process = processes().Process(target=_execute, args=(write, code, args, env))
    process.start()
    write.close()
    clock = threading.Timer(timeout, process.kill)
    clock.start()
    with open(read.fileno(), closefd=False, errors='replace') as f: out = f.read()
    process.join()
    clock.cancel()
    assert process.exitcode == 0, f'{process.exitcode}\n{out[-8000:]}'
    return out.splitlines()[-1]

INTERPRETS = os.environ.get('TRITON_INTERPRET') == '1' # Triton decides when it is imported whether it interprets

def run_interpreted(file, *args):
    "Run the tests of `file` with Triton's interpreter, in a process of their own; what pytest says"
    done = subprocess.run([sys.executable, '-m', 'pytest', '-q', '-n', '0', '-p', 'no:cacheprovider', *args, file],
                          env={**os.environ, 'TRITON_INTERPRET': '1'}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-5_000:]
    return done.stdout

def saved_and_loaded(sd, weights_only=True):
    "`sd` after a way through a file"
    f = io.BytesIO()
    torch.save(sd, f)
    f.seek(0)
    return torch.load(f, weights_only=weights_only)
