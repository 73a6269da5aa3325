"""Is fastxtend right and fast on this machine's GPU? Checks all optimizers and backends against fastai's own, counts what a step
launches and how often the host waits, and times them on the models of the tables in the documentation. Writes Markdown, CSV and PNG."""
import sys, warnings
from collections import Counter
from itertools import product

import torch
from fastai.basics import *
from fastai.callback.fp16 import *
from fastai.callback.schedule import *
from fastcore.script import call_parse
from torch.profiler import ProfilerActivity, profile

from fastxtend.benchmark.report import PUBLISHED, frame, machine, markdown_table, number, save_plots, step_report
from fastxtend.benchmark.steps import Benchmark, hypers_of
from fastxtend.optimizer import fused
from fastxtend.optimizer.core import OPTIMIZERS
from fastxtend.optimizer.rules import SLOTS

BACKENDS = ('foreach', 'jit', 'fused')
CONTESTANTS = ('native', *BACKENDS, 'torch_foreach', 'torch_fused', 'torch_compiled')
SHAPES = [(64, 3, 7, 7), (64,), (), (0,), (33, 77), (1000, 1025), (5,)]

def build(name, params, backend='native', **kwargs):
    flags = {} if backend == 'native' else {backend: True}
    return getattr(fused, name)(params, **{'lr': .01, **hypers_of(name), **kwargs, **flags})

def make_params(shapes=SHAPES, dtype=torch.float32, channels_last=True):
    gen = torch.Generator('cuda').manual_seed(0)
    params = [torch.randn(s, generator=gen, device='cuda').to(dtype) for s in shapes]
    return [p.to(memory_format=torch.channels_last) if channels_last and p.ndim == 4 else p for p in params]

def in_groups(params, n): return [params[i::n] for i in range(n)]

def random_grads(params, t):
    gen = torch.Generator('cuda').manual_seed(t+1)
    return [(torch.randn(p.shape, generator=gen, device='cuda')*10**(-t%3 - 1)).to(p.dtype) for p in params]

def state_of(opt, params): return [opt.state[p][k] for p in params for k in SLOTS if k in opt.state[p]]

def distance(a, b):
    "Greatest difference in units of eps of the dtype of `b`, relative to the greatest element"
    if not a.numel(): return 0.
    return float((a.double() - b.double()).abs().max()/a.double().abs().max().clamp(min=1e-30)/torch.finfo(b.dtype).eps)

# --- Parity

def parity(name, backend, dtype, wd, n_groups, steps=20):
    """Greatest distance from native in any parameter or state. In 16 bits, native runs in float32, its results are rounded after each step,
    and each step starts from these"""
    wide = torch.float32 if dtype.itemsize == 2 else dtype
    ref_params, params = make_params(dtype=wide), make_params(dtype=dtype)
    for p,q in zip(ref_params, params): p.copy_(q)
    ref, opt = (build(name, in_groups(ps, n_groups), b, lr=.01 if n_groups == 1 else slice(1e-3, 1e-1), **wd)
                for ps,b in ((ref_params, 'native'), (params, backend)))
    worst = 0.
    for t in range(steps):
        for o in (ref, opt): o.set_hyper('mom', .95 - .01*(t%10))
        for p,q,g in zip(ref_params, params, random_grads(params, t)): p.grad, q.grad = g.to(wide, copy=True), g
        ref.step(); opt.step()
        expected, got = [*ref_params, *state_of(ref, ref_params)], [*params, *state_of(opt, params)]
        if dtype.itemsize == 2: expected = [p.copy_(p.to(dtype)) for p in expected]
        worst = max(worst, *(distance(a, b) for a,b in zip(expected, got, strict=True)))
        if dtype.itemsize == 2:
            for a,b in zip(expected, got): b.copy_(a)
    return worst

@torch.no_grad()
def check_parity():
    "All optimizers on all backends. Allowed: 40 eps after 20 steps in float32 and float64, and one rounding in 16 bits"
    rows, wds = [], dict(no_wd=dict(wd=0.), true_wd=dict(wd=.1, decouple_wd=True), l2=dict(wd=.1, decouple_wd=False))
    for name in OPTIMIZERS:
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            backends = BACKENDS if dtype.itemsize > 2 else ('fused',)
            worst = {b: max(parity(name, b, dtype, wd, n) for wd,n in product(wds.values(), (1, 3))) for b in backends}
            allowed = 40. if dtype.itemsize > 2 else 1.
            rows.append([name, str(dtype)[6:], *(number(worst[b]) if b in worst else '' for b in BACKENDS), all(v <= allowed for v in worst.values())])
    return markdown_table([[*r[:-1], 'yes' if r[-1] else '**NO**'] for r in rows], ['optimizer', 'dtype', *BACKENDS, 'as native'], 2), all(r[-1] for r in rows)

# --- Launches and waiting

def watch(step):
    "Kernel launches, copies and host synchronisations of one call"
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as prof: step()
    names = Counter(e.name for e in prof.events())
    def count(*parts): return sum(n for name,n in names.items() if any(p in name for p in parts))
    return count('LaunchKernel'), count('cudaMemcpyAsync', 'cuMemcpy'), count('StreamSynchronize', 'EventSynchronize')

def check_launches():
    "One launch a step with `fused`, two with norms, whatever the number of groups; and no waiting"
    rows, right = [], True
    for name,n_groups in product(OPTIMIZERS, (1, 2, 10)):
        cells = []
        for b in ('native', *BACKENDS):
            params = make_params([(64, 64)]*50)
            opt = build(name, in_groups(params, n_groups), b)
            for p,g in zip(params, random_grads(params, 0)): p.grad = g
            for _ in range(7): opt.step()
            torch.cuda.synchronize()
            launches, copies, waits = watch(opt.step)
            cells.append(f'{launches}, {copies}, {waits}')
            if b == 'fused': right &= launches == 1 + (OPTIMIZERS[name].norms is not None) and copies <= 1 and waits == 0
        rows.append([name, n_groups, *cells])
    return markdown_table(rows, ['optimizer', 'groups', 'native', *BACKENDS], 1), right

def check_sync():
    "`fused` never makes the host wait, by PyTorch's own account"
    for name in OPTIMIZERS:
        params = make_params()
        opt = build(name, in_groups(params, 2), 'fused')
        for t in range(3):
            for p,g in zip(params, random_grads(params, t)): p.grad = g
            if t: torch.cuda.set_sync_debug_mode('error')
            try: opt.step()
            except RuntimeError as e: return f'{name}: {e}', False
            finally: torch.cuda.set_sync_debug_mode('default')
    return 'No step of any optimizer made the host wait.', True

# --- CUDA graphs

@torch.no_grad()
def replayed(name, steps=6):
    "Distance from native after replays of one captured step"
    from fastxtend.optimizer.cuda import Tables, step_kernels
    from fastxtend.optimizer.probe import probe
    (ref, ref_params), (opt, params) = ((build(name, in_groups(ps, 2), b), ps) for b in ('native', 'fused') for ps in [make_params()])
    tables = Tables(params[0].device, np.array([p.numel() for pg in opt.param_lists for p in pg]), np.arange(len(params)))
    def step(**kwargs):
        batch = opt.gather()
        opt.init_slots(batch)
        table, row_ids = probe(*batch.tensors()).table, np.array(batch.row_ids)
        step_kernels(opt.rule(batch), opt.spec.norms, opt.spec.trust, torch.float32, table, tables, batch.rows, row_ids, **kwargs)
        return batch
    for p in params: p.grad = torch.zeros_like(p)
    graph = torch.cuda.CUDAGraph()
    for t in range(steps):
        for o in (ref, opt): o.set_hyper('lr', .01/(t+1))
        for p,q,g in zip(ref_params, params, random_grads(params, t)):
            q.grad.copy_(g)
            p.grad = g
        ref.step()
        opt.count_step(step(launch=t == 0))
        if t: graph.replay()
        else:
            torch.cuda.synchronize()
            with torch.cuda.graph(graph): step()
    return max(map(distance, ref_params, params))

def check_graph():
    "A step that is captured once and replayed with other learning rates and step counts gives native's numbers, within 40 eps"
    worst = {name: replayed(name) for name in OPTIMIZERS if name != 'Ranger'}
    return markdown_table([[k, number(v)] for k,v in worst.items()], ['optimizer', 'distance in eps']), max(worst.values()) <= 40

# --- Mixed precision

class Scales(Callback):
    "Keeps the scale after each batch of training"
    order = MixedPrecision.order + 1
    def __init__(self): self.seen = []
    def after_batch(self):
        if self.training: self.seen.append(self.learn.scaler.get_scale())

def trained(backend):
    "Parameters, scales and number of steps after a training in mixed precision whose first batches overflow"
    set_seed(0)
    x = torch.randn(256, 20)
    dsets = [list(zip(o, o[:, :1].sin())) for o in (x, x[:64])]
    dls = DataLoaders.from_dsets(*dsets, bs=16, shuffle=False, num_workers=0, device='cuda')
    model, flags = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 1)), {} if backend == 'native' else {backend: True}
    learn, scales = Learner(dls, model, loss_func=MSELossFlat(), opt_func=fused.adam(**flags), cbs=MixedPrecision(init_scale=2.**40)), Scales()
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(2, 1e-2, cbs=scales)
    params = list(model.parameters())
    return [p.detach() for p in params], scales.seen, learn.opt.state[params[0]]['step']

def check_fp16():
    "`to_fp16` skips the same steps, and ends with the same parameters"
    (params, scales, steps), *others = (trained(b) for b in ('native', *BACKENDS))
    same = all(s == scales and n == steps and all(map(partial(torch.allclose, rtol=1e-2, atol=1e-3), params, ps)) for ps,s,n in others)
    return f"{len(scales)} batches, {steps} steps, {len(scales) - steps} skipped{'' if same else ' by native, and something else by another backend'}.", same

# --- Time

def time_steps(models, backends, seconds):
    "All optimizers on the models of both tables, with their numbers of groups"
    results, skipped = [], {}
    for model,groups in dict.fromkeys((*PUBLISHED[1], *PUBLISHED[2])):
        if models and model not in models: continue
        bench = Benchmark([model], [*OPTIMIZERS], backends, [groups], device='cuda')
        results += bench.run(seconds)
        skipped.update(bench.skipped)
        if bench.interrupted: break
    return frame(results), skipped

def targets(df):
    "What is to be reached, and what was"
    def of(model, backend, groups=1):
        found = df[(df.model == model) & (df.backend == backend) & (df.groups == groups) & (df.optimizer == 'Adam')]
        return found.iloc[0] if len(found) else None
    def ratio(model, a, b, g_a=1, g_b=1):
        x, y = of(model, a, g_a), of(model, b, g_b)
        return math.nan if x is None or y is None else x.ms/y.ms
    big, rows = 'DeBERTa-base', []
    def add(what, value, goal, most=False):
        if math.isfinite(value): rows.append([what, number(value), number(goal), 'yes' if (value <= goal if most else value >= goal) else '**no**'])
    if of(big, 'fused') is not None: add(f'Adam fused, share of the copy bandwidth, {big}', of(big, 'fused').share, .85)
    add(f'Adam native / fused, {big}', ratio(big, 'native', 'fused'), 10)
    for model,_ in PUBLISHED[1]:
        add(f'AdamW(fused=True) / Adam fused, {model}', ratio(model, 'torch_fused', 'fused'), 1.1)
        add(f'AdamW(foreach=True) / Adam foreach, {model}', ratio(model, 'torch_foreach', 'foreach'), 1.2)
    for model,groups in PUBLISHED[2]: add(f'Adam fused, {groups} groups / one, {model}', ratio(model, 'fused', 'fused', groups, 1), 1.03, most=True)
    return markdown_table(rows, ['what', 'measured', 'goal', 'reached'])

CHECKS = {'As fastai native': check_parity, 'Kernel launches, copies and waits of a step': check_launches, 'No waiting': check_sync, 'CUDA graphs': check_graph,
          'Mixed precision': check_fp16}

@call_parse
def main(
    out:str='bench_out', # Folder for the results
    seconds:float=2., # Time for measuring each optimizer on each model
    models:str='', # Models to time, separated by commas (default: all of the tables)
    backends:str=','.join(CONTESTANTS), # Backends and peers to time (torch_compiled takes a minute for each optimizer on each model)
    no_timing:bool=False, # Only check
):
    "Check and time all backends on a CUDA GPU"
    if not torch.cuda.is_available(): sys.exit("gpu_check needs a CUDA GPU, and PyTorch sees none here: nothing was checked and nothing was measured")
    warnings.filterwarnings('ignore')
    out, parts, failed = Path(out), [], []
    out.mkdir(parents=True, exist_ok=True)
    for title,check in CHECKS.items():
        text, ok = check()
        parts += [f'## {title}\n', check.__doc__ + '.\n', text, '']
        print('\n'.join(parts[-4:]))
        if not ok: failed.append(title)
    if not no_timing:
        df, skipped = time_steps(models.split(',') if models else None, backends.split(','), seconds)
        df.to_csv(out/'gpu.csv', index=False, float_format='%.6g')
        parts += ['## Goals\n', targets(df), '', step_report(df, machine('cuda'), skipped)]
        save_plots(df, out, 'gpu')
    (out/'gpu.md').write_text('\n'.join(parts))
    print(f"Saved {out/'gpu.md'}")
    if failed: sys.exit(f"FAILED: {', '.join(failed)}")
