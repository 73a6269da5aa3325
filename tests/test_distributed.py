"Two processes on CPUs: DDP trains as one process does on the whole batch, and so does FSDP2"
import os, socket, subprocess, sys
from types import SimpleNamespace
from unittest.mock import patch

import pytest
from common import *

from fastai.basics import CrossEntropyLossFlat, DataLoader, DataLoaders
from fastai.callback.schedule import Learner
from fastxtend.callback.clip import GradientClip
from fastxtend.optimizer import plan
from fastxtend.optimizer.plan import SHARDED
from torch import distributed as dist, nn

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs torch.distributed with gloo")]

WORLD, STEPS, BATCH = 2, 12, 8

# How far weights may be from those of one process, relative to the greatest element of a tensor, after `STEPS` steps in float64: the gradient
# of a half batch and the mean of two are rounded differently, and adaptive optimizers magnify that (in float32 to 3e-5). Measured: 1.1e-15, and 5.3e-14 where
# a parameter has a million elements
CLOSE = 1e-12

def net():
    "Rows that cannot be split evenly, and a parameter of one element, of which only one process can have a part"
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 5), nn.PReLU(), nn.Linear(5, 3)).double()

def wide_net():
    "One parameter is larger than a block"
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 600), nn.Tanh(), nn.Linear(600, BLOCK//600 + 1), nn.Tanh(), nn.Linear(BLOCK//600 + 1, 3)).double()

def items(n, seed):
    x = torch.randn(n, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x, x[:, :3].argmax(1)

@lru_cache(None)
def batches(): return [items(BATCH, seed) for seed in range(STEPS)]

def own_part(t):
    "What this process sees of a batch"
    return t[dist.get_rank()::WORLD]

def train_on(model, opt, batches, part=own_part):
    for x,y in batches:
        nn.functional.cross_entropy(model(part(x)), part(y)).backward()
        opt.step()
        opt.zero_grad()

def optimizer(name, way, model):
    params = list(model.parameters())
    return build(name, [params[:2], params[2:]], way, lr=slice(1e-3, 1e-2))

@lru_cache(None)
def alone(name, make=net, steps=STEPS):
    "Weights and state after fastai's own optimizer trained on whole batches"
    model = make()
    opt = optimizer(name, 'native', model)
    train_on(model, opt, batches()[:steps], part=noop)
    return model, opt

def weights(model): return [p.detach() for p in model.parameters()]

def whole(t): return t.full_tensor() if hasattr(t, 'full_tensor') else t

def check_close(expected, got):
    "Two lists of tensors are equal but for rounding; the greatest difference, relative to the greatest element of each"
    d = max(float((a - whole(b)).abs().max()/a.abs().max()) for a,b in zip(expected, got))
    assert d <= CLOSE, f"{d} is more than {CLOSE}"
    return f'{d:.1e}'

def check_equal(expected, got):
    for a,b in zip(expected, got): assert torch.equal(whole(a), whole(b)), "resumed training differs"

def check_same_everywhere(params):
    "The weights of all processes are the same bits"
    for p in params:
        others = [torch.empty_like(p) for _ in range(WORLD)]
        dist.all_gather(others, p.contiguous())
        for o in others: assert torch.equal(p, o), "the processes have different weights"

def save_by_rank_0(state, path='resume.pth'):
    "What all processes read of a file that rank 0 wrote"
    dist.barrier()
    if dist.get_rank() == 0: torch.save(state, path)
    dist.barrier()
    return torch.load(path, weights_only=True)

def ddp(name, way):
    "Half of the training, saved by rank 0 and resumed by all, the other half; beside that, training without a break"
    def start():
        model = net()
        return nn.parallel.DistributedDataParallel(model), optimizer(name, way, model)
    model, opt = start()
    train_on(model, opt, batches()[:STEPS//2])
    sd = save_by_rank_0(dict(model=model.module.state_dict(), opt=opt.state_dict()))
    resumed, resumed_opt = start()
    resumed.module.load_state_dict(sd['model'])
    resumed_opt.load_state_dict(sd['opt'])
    for m,o in ((model, opt), (resumed, resumed_opt)): train_on(m, o, batches()[STEPS//2:])
    check_same_everywhere(weights(model))
    check_equal(weights(model), weights(resumed))
    return check_close(weights(alone(name)[0]), weights(model))

def broadcast(self, t, rank):
    "`DistributedDL._broadcast`, which sends the order of the items by way of a GPU, for CPUs"
    t = torch.tensor(t)
    dist.broadcast(t, rank)
    return t.tolist()

def learner(name, way, x, bs):
    data = list(zip(x, x[:, :3].argmax(1)))
    dls = DataLoaders(DataLoader(data, bs=bs), DataLoader(data, bs=BATCH), device='cpu')
    return Learner(dls, net(), CrossEntropyLossFlat(), opt_func=helper(name)(**flags(way)), splitter=lambda m: [list(part.parameters()) for part in (m[:1], m[1:])])

def fit(learn):
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(1, 1e-2)

@lru_cache(None)
def alone_with_fastai(name):
    "On the same batches, of which `distrib_ctx` gives each process consecutive items"
    learn = learner(name, 'native', items(64, seed=2)[0].view(WORLD, -1, BATCH//WORLD, 6).transpose(0, 1).reshape(-1, 6), BATCH)
    fit(learn), fit(learn)
    return weights(learn.model)

def distrib_ctx(name, way):
    "`fit_one_cycle` in `distrib_ctx`; saved by rank 0, loaded by all, and trained on"
    from fastai.distributed import DistributedDL
    DistributedDL._broadcast = broadcast
    both, resumed = (learner(name, way, items(64, seed=2)[0], BATCH//WORLD) for _ in range(2))
    with both.distrib_ctx(sync_bn=False):
        fit(both)
        both.save(f'{os.getcwd()}/learner')
        dist.barrier()
        fit(both)
    with resumed.distrib_ctx(sync_bn=False): fit(resumed.load(f'{os.getcwd()}/learner'))
    dist.barrier()
    check_same_everywhere(weights(both.model))
    check_equal(weights(both.model), weights(resumed.model))
    return check_close(alone_with_fastai(name), weights(both.model))

def shard(model, layers=slice(None)):
    "`fully_shard` as is usual: each layer, then all; or only some layers"
    from torch.distributed.fsdp import fully_shard
    mesh = dist.init_device_mesh('cpu', (WORLD,))
    for layer in model[layers]:
        if any(True for _ in layer.parameters()): fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh) if layers == slice(None) else model

def check_report(opt, way, sharded):
    "Kernels step the shards, unless norms or whole matrices are needed"
    if way != 'fused': return
    for p,ran,is_sharded in zip(opt.all_params().itemgot(0), opt.backend_report(), sharded):
        assert (ran.backend, ran.reason) == (('foreach', SHARDED) if is_sharded and not opt.composition((), opt.flags_of(p)).is_local else ('numba', '')), ran

def fsdp(name, way, make=net, steps=STEPS):
    "Each process resumes from its own file, and from the state of training alone"
    model = shard(make())
    if way == 'jit' and norms_of(name):
        with pytest.raises(NotImplementedError, match='foreach=True'): optimizer(name, way, model)
        return 'is refused'
    opt = optimizer(name, way, model)
    train_on(model, opt, batches()[:steps//2])
    torch.save(dict(model=model.state_dict(), opt=opt.state_dict()), f'rank{dist.get_rank()}.pth')
    sd = torch.load(f'rank{dist.get_rank()}.pth', weights_only=True)
    resumed = shard(make())
    resumed_opt = optimizer(name, way, resumed)
    resumed.load_state_dict(sd['model'])
    resumed_opt.load_state_dict(sd['opt'])
    before, before_opt = alone(name, make, steps//2)
    joined = shard(deepcopy(before))
    joined_opt = optimizer(name, way, joined)
    joined_opt.load_state_dict(deepcopy(before_opt.state_dict()))
    for m,o in ((model, opt), (resumed, resumed_opt), (joined, joined_opt)): train_on(m, o, batches()[steps//2:steps])
    check_report(opt, way, [True]*7)
    check_equal(weights(model), weights(resumed))
    expected = weights(alone(name, make, steps)[0])
    check_close(expected, weights(joined))
    return check_close(expected, weights(model))

def wide(name, way): return fsdp(name, way, wide_net, steps=4)

def partly(name, way):
    "Only the first layer is sharded; the others see the whole batch of both"
    if way == 'jit' and norms_of(name): return 'is refused'
    model = shard(net(), slice(1))
    opt = optimizer(name, way, model)
    train_on(model, opt, batches(), part=noop)
    check_report(opt, way, [True]*2 + [False]*5)
    return check_close(weights(alone(name)[0]), weights(model))

def twice(name, way):
    "A parameter that is in both groups is stepped twice, also where this process has no part of it"
    def trained(model, way, part=own_part):
        params = list(model.parameters())
        opt = build(name, [params[:2], [params[0], params[4], *params[2:]]], way, lr=slice(1e-3, 1e-2))
        train_on(model, opt, batches()[:4], part)
        return weights(model)
    if way == 'jit' and norms_of(name): return 'is refused'
    return check_close(trained(net(), 'native', noop), trained(shard(net()), way))

def clipped(name, way):
    "The norm is that of whole parameters, in all processes: it is not one for the step, so gradients are clipped before it"
    def trained(model, way, part):
        opt, cb = optimizer(name, way, model), GradientClip(.1)
        cb.learn, norms = SimpleNamespace(opt=opt, cbs=[cb], parameters=model.parameters), []
        for x,y in batches()[:4]:
            nn.functional.cross_entropy(model(part(x)), part(y)).backward()
            cb.before_step()
            opt.step()
            norms.append(float(cb.norm))
            opt.zero_grad()
        return [*weights(model), torch.tensor(norms, dtype=torch.float64)]
    return check_close(trained(net(), 'native', noop), trained(shard(net()), way, own_part))

def interpreted(name, way):
    "Shards in the CUDA kernels, which Triton's interpreter runs on CPUs"
    if way != 'fused': return 'has no kernel'
    model = shard(net())
    opt = optimizer(name, way, model)
    with patch.dict(plan.ENGINES, {1: 'cuda'}):
        plan.kernels_for.cache_clear()
        train_on(model, opt, batches()[:2])
        assert set(opt.backend_report().attrgot('backend')) == {'triton'}
    plan.kernels_for.cache_clear()
    return check_close(weights(alone(name, net, 2)[0]), weights(model))

TASKS = {f.__name__: f for f in (ddp, distrib_ctx, fsdp, wide, partly, twice, clipped, interpreted)}

def launch(folder, **tasks):
    "Run the tasks for some optimizers with each backend in `WORLD` processes"
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    env = {**os.environ, 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(port), 'WORLD_SIZE': str(WORLD), 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': '',
           'PYTHONPATH': os.pathsep.join(filter(None, sys.path)), 'ACCELERATE_USE_CPU': 'true', 'TRITON_INTERPRET': '1'}
    args = [sys.executable, __file__, *(f"{task}:{','.join(names)}" for task,names in tasks.items())]
    procs = [subprocess.Popen(args, env={**env, 'RANK': str(r), 'LOCAL_RANK': str(r)}, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
             for r in range(WORLD)]
    try: outs = [p.communicate(timeout=150)[0] for p in procs]
    finally:
        for p in procs: p.kill()
    print(outs[0])
    assert [p.returncode for p in procs] == [0]*WORLD, '\n'.join(outs)
    done = [tuple(line.split()[:3]) for line in outs[0].splitlines()]
    assert {(task, n, w) for task,names in tasks.items() for n in names for w in ways(n, BACKENDS)} <= set(done)

def test_two_processes(tmp_path):
    with_triton = dict(interpreted=['Adam', 'Ranger']) if has_triton() else {}
    launch(tmp_path, ddp=WITH_ORACLE, fsdp=[*WITH_ORACLE, 'Muon'], wide=['Adam', 'Lamb'], partly=WITH_ORACLE, twice=WITH_ORACLE, clipped=['Adam'], **with_triton)

def test_distrib_ctx(tmp_path):
    pytest.importorskip('accelerate')
    launch(tmp_path, distrib_ctx=WITH_ORACLE)

if __name__ == '__main__':
    torch.set_num_threads(1)
    dist.init_process_group('gloo')
    for task,names in (arg.split(':') for arg in sys.argv[1:]):
        for name in names.split(','):
            for way in ways(name, BACKENDS): print(task, name, way, TASKS[task](name, way), flush=True)
    dist.destroy_process_group()
