"""Is fastxtend right and fast on this machine's GPU? One run of at most ten minutes: what is most important comes first, each part stands
on its own, and what is known so far is always written (Markdown, CSV, PNG). Nothing but public calls is used.

It needs PyTorch 2.9 or later with its Triton, Numba and pandas, and timm and transformers for the models. Where there is no package index:

    make gpu-wheels                                                       # where there is one
    python -m pip install --no-index --no-deps --target site wheels/*.whl # and here
    PYTHONPATH=site python examples/gpu_check.py

With `--interpret` Triton's interpreter takes the place of a GPU, on tiny shapes: that checks this script, and measures nothing."""
import os, sys

INTERPRET = '--interpret' in sys.argv
if INTERPRET: os.environ['TRITON_INTERPRET'] = '1' # Triton asks when it is imported

import math, shutil, signal, subprocess, tempfile, time, traceback, warnings
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np, torch, triton
from fastcore.script import call_parse
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from fastxtend.benchmark.phase import PhaseContest, phase_row
from fastxtend.benchmark.report import frame, machine, markdown_table, number, save_plots
from fastxtend.benchmark.steps import Contest, choose, hypers_of, optimizer_name
from fastxtend.optimizer import cuda, kernels, muon, plan
from fastxtend.optimizer.table import OPTIMIZERS

FIRST = ('Adam', 'SGD', 'Lamb', 'Lion')
PEERS = ('native', 'foreach', 'fused', 'torch_foreach', 'torch_fused')
DTYPES = dict(float32=torch.float32, bfloat16=torch.bfloat16)

# --- What a GPU does, and what stands in for it

class Cuda:
    "The GPU"
    name, device, shapes = 'triton', torch.device('cuda'), [(64, 3, 7, 7), (64,), (), (0,), (33, 77), (1000, 1025), (5,)]
    models, rest, seconds, queued = ('DeBERTa-base', 'XResNet18'), ('XResNet50', 'ViT-S/16', 'ConvNeXt-Tiny', 'tiny'), 2., 50
    turn = .005 # Least seconds of what is timed at once
    def sync(self): torch.cuda.synchronize()

    def launches(self, step):
        "Kernels and copies of a call, as the device saw them"
        self.sync()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as prof:
            step()
            self.sync()
        names = [e.name for e in prof.events() if e.device_type == DeviceType.CUDA]
        copies = sum(n.startswith('Memcpy') for n in names)
        return sum(not n.startswith(('Memcpy', 'Memset')) for n in names), copies

    @contextmanager
    def no_waiting(self):
        "PyTorch's own account: an error where the host waits"
        torch.cuda.set_sync_debug_mode('error')
        try: yield
        finally: torch.cuda.set_sync_debug_mode('default')

    def capture(self, step):
        "A CUDA graph of a step"
        graph = torch.cuda.CUDAGraph()
        self.sync()
        with torch.cuda.graph(graph): step()
        return graph

    @contextmanager
    def side_stream(self):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream): yield
        torch.cuda.current_stream().wait_stream(stream)

    def timed(self, step, n=10):
        "Milliseconds a call takes on the host, which does not wait for it, and on the device, with the host ahead"
        host, device = [], []
        for _ in range(n):
            self.sync()
            before = time.perf_counter()
            step()
            host.append(time.perf_counter() - before)
        for _ in range(n):
            self.sync()
            torch.cuda._sleep(40_000_000) # the device is busy for some 20 ms, in which the host can hand over a step
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            step()
            end.record()
            self.sync()
            device.append(start.elapsed_time(end))
        return float(np.median(host))*1e3, float(np.median(device))

class Interpreted(Cuda):
    "Triton's interpreter on tensors of the CPU: checks that the script runs"
    device, shapes, seconds, queued = torch.device('cpu'), [(8, 3, 3, 3), (5,), (), (0,), (33, 40)], 0., 3
    turn = 1e-4
    models, rest = ('2x40',), ('1x10',)
    def __init__(self):
        from triton.runtime.interpreter import GridExecutor
        self.recorded, self.count, self.capturing, call = [], 0, False, GridExecutor.__call__
        def launch(executor, *args, **kwargs):
            self.count += 1
            if self.capturing: self.recorded.append(lambda: call(executor, *args, **kwargs))
            else: call(executor, *args, **kwargs)
        GridExecutor.__call__ = launch
        plan.ENGINES[1] = 'cuda'
        cuda.Tables.capturing = property(lambda tables: self.capturing)
        kernels._capturing = lambda: self.capturing

    def sync(self): pass
    def launches(self, step):
        before = self.count
        step()
        return self.count - before, 0

    no_waiting = side_stream = staticmethod(nullcontext)
    def capture(self, step):
        self.recorded, self.capturing = [], True
        try: step()
        finally: self.capturing = False
        return self

    def replay(self):
        for launch in self.recorded: launch()

    def timed(self, step, n=2):
        before = time.perf_counter()
        for _ in range(n): step()
        return ((time.perf_counter() - before)/n*1e3,)*2

gpu = None # one of the two

# --- Optimizers, parameters, gradients

def build(name, params, backend='native', **kwargs):
    "The optimizer `name` of fastai (or its steppers one by one, where fastai has none), or ours"
    flags = {} if backend == 'native' else {backend: True}
    return OPTIMIZERS[name].constructor(params, **{'lr': .01, **hypers_of(name), **kwargs, **flags})

def at_odd_place(p):
    "`p` one element into larger memory"
    return torch.empty(p.numel() + 1, dtype=p.dtype, device=p.device)[1:].view(p.shape).copy_(p)

def make_params(dtype=torch.float32, shapes=None):
    "Weights of convolutions are channels_last, and every fifth parameter starts at an odd address"
    gen, params = torch.Generator().manual_seed(0), []
    for i,s in enumerate(shapes or gpu.shapes):
        p = torch.randn(s, generator=gen).to(gpu.device, dtype)
        params.append(p.to(memory_format=torch.channels_last) if p.ndim == 4 else at_odd_place(p) if i%5 == 4 else p)
    return params

def in_groups(params, n): return [params[i::n] for i in range(n)] if n > 1 else params

def grads_of(params, t):
    "Laid out like their parameters; the second parameter has none in every other step"
    gen = torch.Generator().manual_seed(t+1)
    grads = [torch.empty_like(p).copy_(torch.randn(p.shape, generator=gen)*10**(-t%3 - 1)) for p in params]
    return [None if i == 1 and t%2 else g for i,g in enumerate(grads)]

def set_grads(params, grads):
    for p,g in zip(params, grads): p.grad = g

def tensors_of(opt, params, slots): return [*params, *(opt.state[p][n] for p in params for n in slots if n in opt.state[p])]

def distance(a, b):
    "Greatest difference in units of eps of the dtype of `b`, relative to the greatest element"
    if not a.numel() or torch.equal(a.double(), b.double()): return 0.
    if not (a.isfinite().all() and b.isfinite().all()): return math.inf
    return float((a.double() - b.double()).abs().max()/a.double().abs().max().clamp(min=1e-30)/torch.finfo(b.dtype).eps)

def pair(name, backend, n_groups=1, shapes=None, dtype=torch.float32, **kwargs):
    "Native and another backend, each with its own parameters"
    return [(build(name, in_groups(ps, n_groups), b, **kwargs), ps) for b in ('native', backend) for ps in [make_params(dtype, shapes)]]

def all_on_gpu(opt): return {r.backend for r in opt.backend_report()} == {gpu.name}

class Failed(Exception):
    "A check whose answer is no"

def check(ok, what):
    if not ok: raise Failed(what)

# --- Sections: each yields rows or lines while it works, and raises `Failed` in the end if something is not as it should be

def versions(names):
    "What is here, and does one step work?"
    for k,v in machine(gpu.device.type).items(): yield f'- **{k}**: {v}'
    yield f"- **Triton**: {triton.__version__}; compiled look: {'yes' if plan.compiled() else '**no**'}"
    (ref, ref_params), (opt, params) = pair('Adam', 'fused')
    start = time.perf_counter()
    for o,ps in ((ref, ref_params), (opt, params)): set_grads(ps, grads_of(ps, 0)); o.step()
    gpu.sync()
    yield f"- **First step**, compiled before it ran: {number(time.perf_counter() - start)} s, {number(max(map(distance, ref_params, params)))} eps from native"
    for r in opt.backend_report(): yield f'    - {r.param}: {r.backend} {r.reason}'
    check(all_on_gpu(opt), 'Not all parameters went to the kernel')

@torch.no_grad()
def one_parity(name, backend, dtype, n_groups, steps, **wd):
    """Greatest distance from native in any parameter or slot. In 16 bits, native runs in float32, its results are rounded after each step,
    and each step starts from these"""
    wide, slots = torch.float32 if dtype.itemsize == 2 else dtype, OPTIMIZERS[name].slots(**hypers_of(name))
    ref_params, params = make_params(wide), make_params(dtype)
    for p,q in zip(ref_params, params): p.copy_(q)
    lr = .01 if n_groups == 1 else slice(1e-3, 1e-1)
    ref, opt = (build(name, in_groups(ps, n_groups), b, lr=lr, **wd) for ps,b in ((ref_params, 'native'), (params, backend)))
    worst = 0.
    for t in range(steps):
        for o in (ref, opt):
            if 'mom' in o.hypers[0]: o.set_hyper('mom', .95 - .01*(t%10))
        grads = grads_of(params, t)
        set_grads(params, grads)
        set_grads(ref_params, [g if g is None else torch.empty_like(p).copy_(g) for p,g in zip(ref_params, grads)])
        ref.step(); opt.step()
        expected, got = tensors_of(ref, ref_params, slots), tensors_of(opt, params, slots)
        if dtype.itemsize == 2: expected = [p.copy_(p.to(dtype)) for p in expected]
        worst = max(worst, *(distance(a, b) for a,b in zip(expected, got, strict=True)))
        if dtype.itemsize == 2:
            for a,b in zip(expected, got): b.copy_(a)
    if backend == 'fused': check(all_on_gpu(opt), f'{name}: not all parameters went to the kernel')
    return worst

def parity(names):
    """Distance from native in units of eps after 20 steps with decay, in one group and in three: channels_last, odd addresses, more than
    512 blocks, missing gradients. Allowed are 100 in float32 and float64, and one rounding in 16 bits"""
    wrong = []
    dtypes = (torch.float32, torch.bfloat16) if INTERPRET else (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    for name in names:
        for dtype in dtypes:
            backends = ('fused',) if INTERPRET or dtype.itemsize == 2 else ('foreach', 'fused')
            with patch.object(muon, 'NARROW', math.inf): # no products in bfloat16
                cells = [max(one_parity(name, b, dtype, n, 3 if INTERPRET else 20, wd=.1) for n in (1, 3)) for b in backends]
            if not all(c <= (100 if dtype.itemsize > 2 else 1) for c in cells): wrong.append(f'{name} {dtype}')
            yield dict(optimizer=name, dtype=str(dtype)[6:], **{b: number(c) for b,c in zip(backends, cells)})
    check(not wrong or INTERPRET and all('bfloat16' in w for w in wrong), f"Too far from native: {', '.join(wrong)}") # the interpreter does not round

def takes_whole(name): return any(c.filled for c in OPTIMIZERS[name].compositions()) # products of matrices are PyTorch's

def stages_of(name): return len(OPTIMIZERS[name].composition(**hypers_of(name)).stages)

def launched(names):
    "Kernels that the device saw in a step: one, and one more for each stage that adds up, for any number of groups; copies: at most one"
    wrong = []
    for name in [n for n in names if not takes_whole(n)]:
        for n in (1, 10):
            shapes = [(16, 16)]*10 if INTERPRET else [(64, 64)]*100
            params = make_params(shapes=shapes)
            opt = build(name, in_groups(params, n), 'fused')
            for t in range(3): set_grads(params, [torch.ones_like(p) for p in params]); opt.step()
            found, copies = gpu.launches(opt.step)
            row = dict(optimizer=name, groups=n, kernels=found, copies=copies)
            if not INTERPRET:
                native = build(name, in_groups(params, n))
                native.step()
                row['native'] = gpu.launches(native.step)[0]
            if found != stages_of(name) or copies > 1: wrong.append(f'{name}, {n} groups')
            yield row
    check(not wrong, f"Too many launches: {', '.join(wrong)}")

def no_waits(names):
    "With new gradients, new learning rates, missing gradients: the host waits for nothing, by PyTorch's own account"
    for name in names:
        params = make_params()
        opt, grads = build(name, in_groups(params, 2), 'fused'), [grads_of(params, t) for t in range(4)]
        for t,gs in enumerate(grads):
            set_grads(params, gs)
            opt.set_hyper('lr', .01/(t+1))
            with gpu.no_waiting() if t > 1 else nullcontext(): opt.step() # both sets of gradients have been seen
        yield f'- {name}: no'

def graphs(names):
    """A step captured once and replayed gives native's numbers, with learning rates and step counts of its own time, also after
    `load_state_dict`; one with other parameters is refused. Distance in eps"""
    wrong = []
    for name in names:
        if OPTIMIZERS[name].has_lookahead or takes_whole(name): continue
        shapes = [s for s in gpu.shapes if s]
        (ref, ref_params), (opt, params) = pair(name, 'fused', 2, shapes)
        for p in params: p.grad = torch.zeros_like(p)
        graph = None
        for t in range(6):
            for o in (ref, opt): o.set_hyper('lr', .01/(t+1))
            for p,q in zip(ref_params, params):
                p.grad = torch.empty_like(p).normal_(generator=torch.Generator(gpu.device).manual_seed(t))
                q.grad.copy_(p.grad)
            ref.step()
            if t == 0: opt.step()
            else:
                if graph is None: graph = gpu.capture(opt.step)
                opt.refresh()
                graph.replay()
            if t == 3: opt.load_state_dict(opt.state_dict())
        worst = max(map(distance, ref_params, params))
        params[0].grad = None
        try: opt.refresh()
        except RuntimeError: refused = True
        else: refused = False
        if not refused or worst > 100: wrong.append(name)
        yield dict(optimizer=name, distance=number(worst), refused='yes' if refused else '**no**')
    check(not wrong, f"Replays are not as native: {', '.join(wrong)}")

def after_steps(name, backend, step_in=nullcontext, sync=False, steps=None):
    "Parameters after some steps with learning rates of their own"
    params = make_params()
    opt, grads = build(name, params, backend), grads_of(params, 0)
    gpu.sync()
    with step_in():
        for t in range(steps or gpu.queued):
            set_grads(params, grads)
            opt.set_hyper('lr', .01/(t+1))
            opt.step()
            if sync: gpu.sync()
    gpu.sync()
    return params

def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 1)).to(gpu.device)

def batches(n=6):
    gen = torch.Generator().manual_seed(0)
    return [(x, x[:, :1].sin()) for _ in range(n) for x in [torch.randn(16, 20, generator=gen).to(gpu.device)]]

def queued(names):
    "Steps that are queued end where steps end that are waited for, bit by bit; also on a side stream"
    for name in names:
        a, b, c = after_steps(name, 'fused'), after_steps(name, 'fused', sync=True), after_steps(name, 'fused', gpu.side_stream)
        check(all(map(torch.equal, a, b)), f'{name}: queued steps end elsewhere')
        check(all(map(torch.equal, a, c)), f'{name}: steps on a side stream end elsewhere')
        yield f'- {name}: {gpu.queued} queued steps, and on a side stream: equal'

def from_hooks(names):
    "An optimizer for each parameter that steps as soon as its gradient is there, from a hook in the backward pass"
    def train(backend):
        model = mlp()
        for p in model.parameters():
            opt = build('Adam', [p], backend)
            p.register_post_accumulate_grad_hook(lambda p, opt=opt: opt.step() or opt.zero_grad())
        for x,y in batches(): (model(x) - y).square().mean().backward()
        return list(model.parameters())
    worst = max(map(distance, train('native'), train('fused')))
    yield f'- {number(worst)} eps from native'
    check(worst <= 200, 'Steps from hooks end elsewhere')

def distributed(names):
    "DDP of one process, with gradients of their own and as views of its buckets, which start anywhere"
    import torch.distributed as dist
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group('gloo' if INTERPRET else 'nccl', init_method=f'file://{folder}/meet', rank=0, world_size=1)
        try:
            for view in (False, True):
                def train(backend):
                    model = nn.parallel.DistributedDataParallel(mlp(), gradient_as_bucket_view=view)
                    opt = build('Adam', list(model.parameters()), backend)
                    for x,y in batches():
                        (model(x) - y).square().mean().backward()
                        opt.step()
                        model.zero_grad(set_to_none=False) # that of fastai's optimizers detaches gradients, which views cannot be
                    return opt, list(model.parameters())
                (_, a), (opt, b) = train('native'), train('fused')
                worst = max(map(distance, a, b))
                yield f"- {'views of buckets' if view else 'own gradients'}: {number(worst)} eps from native, {'all' if all_on_gpu(opt) else '**not all**'} in the kernel"
                check(worst <= 200 and all_on_gpu(opt), 'DDP ends elsewhere, or not in the kernel')
        finally: dist.destroy_process_group()

class Scaled:
    "What PyTorch's `GradScaler` wants to see of an optimizer"
    def __init__(self, opt, params): self.step, self.param_groups = opt.step, [dict(params=params)]

def half_precision(names):
    "float16 with a scale that is too large at first: the same steps are skipped"
    def train(backend):
        model = mlp()
        params = list(model.parameters())
        opt, scaler, scales = build('Adam', params, backend), torch.amp.GradScaler(gpu.device.type, init_scale=2.**24 if INTERPRET else 2.**40), []
        scaled = Scaled(opt, params)
        for x,y in batches(12 if INTERPRET else 60):
            with torch.autocast(gpu.device.type, torch.float16): loss = (model(x) - y).square().mean()
            scaler.scale(loss).backward()
            scaler.step(scaled); scaler.update(); opt.zero_grad()
            scales.append(scaler.get_scale())
        return params, scales, opt.state[params[0]].get('step', 0)
    (a, scales, steps), (b, scales_2, steps_2) = train('native'), train('fused')
    yield f'- {len(scales)} batches, {steps} steps, {len(scales) - steps} skipped; {number(max(map(distance, a, b)))} eps from native'
    check((scales, steps) == (scales_2, steps_2) and all(torch.allclose(p, q, rtol=1e-2, atol=1e-3) for p,q in zip(a, b)), 'Other steps are skipped, or it ends elsewhere')

# --- Time

class Kept(Contest):
    "A contest whose contestants can be asked again"
    def build(self):
        self.steppers = super().build()
        return self.steppers

TIMES = [] # `Result`s with `host_ms` and `device_ms`

@contextmanager
def without_compiled_look():
    look, plan.compiled = plan.compiled, lambda: None
    try: yield
    finally: plan.compiled = look

def time_one(model, optimizer, dtype, peers=PEERS, seconds=None, groups=1):
    "Race all contestants, then ask each what a step costs the host and the device"
    peers = [p for p in peers if not INTERPRET or p in ('native', 'fused')]
    contest = Kept(model, optimizer, peers, groups, str(gpu.device), dtype, turn=gpu.turn)
    results = contest.run(gpu.seconds if seconds is None else seconds)
    for r in results: r.host_ms, r.device_ms = gpu.timed(contest.steppers[r.backend])
    if 'fused' in contest.steppers:
        fused = next(r for r in results if r.backend == 'fused')
        with without_compiled_look():
            for _ in range(2): contest.steppers['fused']()
            fused.python_ms = gpu.timed(contest.steppers['fused'])[0]
    TIMES.extend(results)
    for r in results:
        yield dict(model=r.model, dtype=r.dtype, optimizer=r.optimizer, groups=r.groups, backend=r.backend, ms=number(r.ms), device=number(r.device_ms), host=number(r.host_ms),
                   host_python=number(r.python_ms) if hasattr(r, 'python_ms') else '', share=f'{r.share:.0%}', kernels=r.calls, times=number(r.speedup))

def timing(names):
    """Milliseconds of a step: in a loop, on the device alone (the host is ahead), on the host alone (it does not wait; and without the compiled
    look); share of the bandwidth of `a.add_(b)`; kernels; times as fast as native"""
    for model in gpu.models:
        for dtype in DTYPES.values():
            for name in names: yield from time_one(model, name, dtype)

def groups_cost(names):
    "Adam in ten groups, and in one"
    for n in (1, 2 if INTERPRET else 10): yield from time_one(gpu.models[-1], 'Adam', torch.float32, ('fused',), groups=n)

def one_pass(names):
    """Clip, step, average and clear gradients in the step: two kernels (the norm, then all the rest), and no wait. Milliseconds of fastai's way,
    of a fused step with the rest apart, of one pass, of a step alone, and of clearing gradients in fastai's way and in ours"""
    contest = PhaseContest(gpu.models[-1], 'Adam', str(gpu.device), turn=gpu.turn)
    step = contest.ways()['one_pass']
    for _ in range(3): step()
    found, copies = gpu.launches(step)
    with gpu.no_waiting(): step()
    yield f'- {found} kernels, {copies} copies'
    for model in gpu.models:
        for name in names: yield {k: number(v) if isinstance(v, float) else v for k,v in phase_row(model, name, PhaseContest(model, name, str(gpu.device), turn=gpu.turn).run(gpu.seconds)).items()}
    check(found == 2 and copies <= 1, 'Clipping, averaging and clearing take further launches')

def sweep(names):
    "Milliseconds on the device with other blocks and warps. Those in use are marked"
    base, used = dict(cuda.OPTIONS), dict(cuda.PRECISIONS)
    try:
        for dtype in DTYPES.values():
            for block in (512, 1024, 2048, 4096)[:2 if INTERPRET else None]:
                for warps in (4, 8)[:1 if INTERPRET else None]:
                    cuda.PRECISIONS[dtype], cuda.OPTIONS['num_warps'] = replace(used[dtype], block=block), warps
                    cuda.constants.cache_clear()
                    contest = Kept(gpu.models[0], 'Adam', ['fused'], device=str(gpu.device), dtype=dtype)
                    step = contest.build()['fused']
                    for _ in range(3): step()
                    mark = '*' if (block, warps) == (used[dtype].block, base['num_warps']) else ''
                    yield dict(dtype=str(dtype)[6:], block=block, warps=warps, device=number(gpu.timed(step)[1]) + mark)
    finally:
        cuda.OPTIONS.update(base); cuda.PRECISIONS.update(used)
        cuda.constants.cache_clear()

def rest_parity(names):
    "As above"
    yield from parity([n for n in OPTIMIZERS if n not in names][:1 if INTERPRET else None])

def rest_timing(names):
    "The other optimizers on the first models, then the first optimizers on the other models"
    others = [n for n in OPTIMIZERS if n not in names][:1 if INTERPRET else None]
    for name in others: yield from time_one(gpu.models[-1], name, torch.float32, seconds=gpu.seconds/2)
    for model in gpu.rest:
        for name in names: yield from time_one(model, name, torch.float32, seconds=gpu.seconds/2)

def tools(names):
    "NVIDIA's own tools, where they are installed"
    one = [sys.executable, __file__, '--one_step', *(['--interpret'] if INTERPRET else [])]
    commands = dict(memcheck=['compute-sanitizer', '--tool', 'memcheck', '--error-exitcode', '9'], racecheck=['compute-sanitizer', '--tool', 'racecheck', '--error-exitcode', '9'],
                    ncu=['ncu', '--clock-control', 'none', '-k', 'regex:step_kernel', '-c', '2', '--metrics',
                         'dram__throughput.avg.pct_of_peak_sustained_elapsed,sm__warps_active.avg.pct_of_peak_sustained_active,launch__registers_per_thread'])
    wrong = []
    for name,command in commands.items():
        if not shutil.which(command[0]):
            yield f'- {name}: {command[0]} is not installed'
            continue
        done = subprocess.run([*command, *one], capture_output=True, text=True, timeout=max(left(), 1))
        if done.returncode: wrong.append(name)
        yield f'- {name}: exit status {done.returncode}\n\n```\n{(done.stdout + done.stderr)[-1500:]}\n```\n'
    check(not wrong, f"Errors of {', '.join(wrong)}")

def one_step():
    "Steps of two optimizers, for NVIDIA's tools"
    for name in ('Adam', 'Lamb'): after_steps(name, 'fused', steps=2)

SECTIONS = {'Versions': versions, 'As fastai native': parity, 'Launches': launched, 'Waiting': no_waits, 'CUDA graphs': graphs,
            'Queued steps and side streams': queued, 'Steps from hooks': from_hooks, 'DDP': distributed, 'float16 with a scaler': half_precision, 'Time': timing,
            'Ten groups': groups_cost, 'One pass': one_pass, 'Blocks and warps': sweep, 'As fastai native: the others': rest_parity, 'Time: the others': rest_timing,
            'Tools': tools}

# --- Goals

def goals():
    "What is to be reached, and what was"
    found = {(r.model, r.dtype, r.optimizer, r.groups, r.backend): r for r in TIMES}
    def of(model, backend, groups=1): return found.get((model, 'float32', 'Adam', groups, backend))
    rows = []
    def add(what, a, b, goal, f=lambda a, b: a.ms/b.ms, most=False):
        if a is None or b is None: return
        x = f(a, b)
        rows.append([what, number(x), number(goal), 'yes' if (x <= goal if most else x >= goal) else '**no**'])
    big = 'DeBERTa-base'
    add(f'Share of the bandwidth of `a.add_(b)`, {big}', of(big, 'fused'), of(big, 'fused'), .85, lambda a, b: a.share)
    add(f'native / fused, {big}', of(big, 'native'), of(big, 'fused'), 10)
    for model,goal in ((big, 1.), ('XResNet18', 1.3), ('tiny', 1.3)): add(f'AdamW(fused=True) / fused, {model}', of(model, 'torch_fused'), of(model, 'fused'), goal)
    add('Ten groups / one, XResNet18', of('XResNet18', 'fused', 10), of('XResNet18', 'fused'), 1.03, most=True)
    return markdown_table(rows, ['Adam in float32', 'measured', 'goal', 'reached']) if rows else ''

# --- The run

END = math.inf
def left(): return END - time.monotonic()

class OutOfTime(BaseException):
    "The budget is spent"

def _alarm(*args): raise OutOfTime('The time is over')

def table(rows):
    "Rows as a Markdown table, lines as they are"
    lines, dicts = [r for r in rows if isinstance(r, str)], [r for r in rows if isinstance(r, dict)]
    header = list(dict.fromkeys(k for r in dicts for k in r))
    return '\n\n'.join(filter(None, ['\n'.join(lines), markdown_table([[r.get(k, '') for k in header] for r in dicts], header) if dicts else '']))

def run_section(section, names):
    "What a section found, how it ended, and how long it took"
    rows, start = [], time.monotonic()
    try:
        if left() < 1: raise OutOfTime('The time is over')
        for row in section(names): rows.append(row)
        state = 'as it should be'
    except OutOfTime as e: state = f'left out: {e}' if not rows else f'not finished: {e}'
    except Failed as e: state = f'**FAILED**: {e}'
    except Exception as e:
        state = f'**FAILED**: {type(e).__name__}: {e}'
        rows.append(f'\n```\n{traceback.format_exc()[-3000:]}\n```\n')
    return rows, state, time.monotonic() - start

def write(out, parts):
    "All that is known so far"
    (out/'gpu.md').write_text('\n'.join([f"# {'An interpreter, checked: no time here is that of a GPU' if INTERPRET else 'A GPU, checked and measured'}\n", *parts, *(['## Goals\n', goals(), ''] if goals() else [])]))
    if TIMES: frame(TIMES).to_csv(out/'gpu.csv', index=False, float_format='%.6g')

@call_parse
def main(
    out:str='bench_out', # Folder for the results
    budget:float=570., # Seconds after which it ends
    optimizers:str=','.join(FIRST), # Optimizers that come first
    sections:str='', # Words of the titles of sections to run, separated by commas (default: all)
    interpret:bool=False, # Triton's interpreter on tiny shapes, without a GPU: checks this script
    one_step:bool=False, # Only take two steps, for other tools
):
    "Check and time all backends on a CUDA GPU"
    global gpu, END
    if not interpret and not torch.cuda.is_available(): sys.exit("gpu_check needs a CUDA GPU, and PyTorch sees none here: nothing was checked and nothing was measured")
    warnings.filterwarnings('ignore')
    gpu, END = Interpreted() if interpret else Cuda(), time.monotonic() + budget
    if one_step: return globals()['one_step']()
    names = choose(optimizers, optimizer_name)
    words = [w.strip().lower() for w in sections.split(',') if w.strip()]
    out, parts, failed = Path(out), [], []
    out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGALRM, _alarm)
    signal.setitimer(signal.ITIMER_REAL, max(budget, 1))
    for title,section in SECTIONS.items():
        if words and not any(w in title.lower() for w in words): continue
        rows, state, seconds = run_section(section, names)
        if 'FAILED' in state: failed.append(title)
        text = f'## {title}\n\n{" ".join((section.__doc__ or "").split())}\n\n{state} ({seconds:.1f} s)\n\n{table(rows)}\n'
        print(text, flush=True)
        parts.append(text)
        write(out, parts)
    signal.setitimer(signal.ITIMER_REAL, 0)
    if TIMES and not interpret: save_plots(frame([r for r in TIMES if r.dtype == 'float32']), out, 'gpu')
    print(f"{goals()}\n\nSaved {out/'gpu.md'}")
    if failed: sys.exit(f"FAILED: {', '.join(failed)}")
