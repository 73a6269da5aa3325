"Two processes on CPUs: DDP trains as one process does on the whole batch, and so does FSDP2 where it is possible"
import os, socket, subprocess, sys
from pathlib import Path

import pytest
from common import *
from fastai.basics import Callback, CrossEntropyLossFlat, DataLoader, DataLoaders, Learner
from torch import distributed as dist, nn

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs torch.distributed with gloo")]

WORLD, STEPS, BATCH = 2, 16, 8

# How far weights may be from those of one process, relative to the greatest element of a tensor, after `STEPS` steps: the gradient of a half
# batch and the mean of two are rounded differently. Measured: 5.1e-7, and 8e-6 for
# Adam on a wide layer
CLOSE = 2e-5

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 5), nn.Tanh(), nn.Linear(5, 3))

@lru_cache(None)
def batches():
    gen = torch.Generator().manual_seed(1)
    xs = torch.randn(STEPS, BATCH, 6, generator=gen)
    return [(x, x[:, :3].argmax(1)) for x in xs]

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

def whole(t): return t.full_tensor() if hasattr(t, 'full_tensor') else t

def relative(expected, got):
    "The greatest difference between two lists of tensors, relative to the greatest element of each"
    return max(float((a - whole(b).detach()).abs().max()/a.abs().max()) for a,b in zip(expected, got))

@lru_cache(None)
def alone(name, make=net):
    "The weights after fastai's own optimizer trained on whole batches"
    model = make()
    train_on(model, optimizer(name, 'native', model), batches(), part=noop)
    return [p.detach() for p in model.parameters()]

def all_equal(params):
    "Are the weights of all processes the same bits?"
    for p in params:
        others = [torch.empty_like(p) for _ in range(WORLD)]
        dist.all_gather(others, p.detach().contiguous())
        if not all(torch.equal(p, o) for o in others): return False
    return True

def run_ddp(name, way):
    "Half of the training, state saved by rank 0 and resumed by all, the other half; beside that, training without a break"
    def start():
        model = net()
        return nn.parallel.DistributedDataParallel(model), optimizer(name, way, model)
    model, opt = start()
    train_on(model, opt, batches()[:STEPS//2])
    if dist.get_rank() == 0: torch.save(dict(model=model.module.state_dict(), opt=opt.state_dict()), 'resume.pth')
    dist.barrier()
    resumed, resumed_opt = start()
    sd = torch.load('resume.pth', weights_only=True)
    resumed.module.load_state_dict(sd['model'])
    resumed_opt.load_state_dict(saved_and_loaded(sd['opt']))
    dist.barrier()
    for m,o in ((model, opt), (resumed, resumed_opt)): train_on(m, o, batches()[STEPS//2:])
    params, again = (list(m.parameters()) for m in (model, resumed))
    assert all_equal(params), f"{name}: the processes have different weights"
    assert all(map(torch.equal, params, again)), f"{name}: resumed training differs"
    report(name, way, alone(name), params)

def run_fastai(name, way):
    "`fit_one_cycle` in `distrib_ctx`, which gives each process its part of each batch, without shuffling"
    from fastai.distributed import DistributedDL
    DistributedDL._broadcast = lambda self, t, rank: t # fastai sends the order of the items through CUDA, and here all processes have the same
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(2))
    def learner(way, x):
        items = list(zip(x, x[:, :3].argmax(1)))
        dls = DataLoaders(DataLoader(items, bs=BATCH), DataLoader(items, bs=BATCH), device='cpu')
        return Learner(dls, net(), CrossEntropyLossFlat(), opt_func=helper(name)(**flags(way)), splitter=lambda m: [list(l.parameters()) for l in m[::2]])
    part = BATCH//WORLD
    together = x.view(WORLD, -1, part, 6).transpose(0, 1).reshape(-1, 6) # fastai gives each process consecutive items
    one, both = learner('native', together), learner(way, x)
    with one.no_bar(), one.no_logging(): one.fit_one_cycle(2, 1e-2)
    both.dls[0].bs = part
    with both.no_bar(), both.no_logging(), both.distrib_ctx(sync_bn=False): both.fit_one_cycle(2, 1e-2)
    report(name, way, [p.detach() for p in one.model.parameters()], list(both.model.parameters()))

def shard(model):
    "`fully_shard` as is usual: each layer, then all"
    from torch.distributed.fsdp import fully_shard
    mesh = dist.init_device_mesh('cpu', (WORLD,))
    for layer in model:
        if any(True for _ in layer.parameters()): fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)

def wide_net():
    "One parameter is larger than a block"
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 600), nn.Tanh(), nn.Linear(600, BLOCK//600 + 1), nn.Tanh(), nn.Linear(BLOCK//600 + 1, 3))

def run_fsdp(name, way, make=net):
    "Rows are split unevenly, and some processes have none of a parameter"
    model = shard(make())
    train_on(model, optimizer(name, way, model), batches())
    report(name, way, alone(name, make), list(model.parameters()))

def run_wide(name, way): run_fsdp(name, way, wide_net)

def report(name, way, expected, got):
    d = relative(expected, got)
    print(f'{name} {way} {d:.1e}', flush=True)
    assert d <= CLOSE, f"{name} {way}: {d} is more than {CLOSE}"

def launch(task, names, ways, folder):
    "Run `task` for all `names` and `ways` in `WORLD` processes"
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    env = {**os.environ, 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(port), 'WORLD_SIZE': str(WORLD), 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': '',
           'PYTHONPATH': os.pathsep.join(filter(None, sys.path)), 'ACCELERATE_USE_CPU': 'true'}
    procs = [subprocess.Popen([sys.executable, __file__, task, ','.join(names), ','.join(ways)], env={**env, 'RANK': str(r), 'LOCAL_RANK': str(r)}, cwd=folder,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for r in range(WORLD)]
    try: outs = [p.communicate(timeout=150)[0] for p in procs]
    finally:
        for p in procs: p.kill()
    print(outs[0])
    assert [p.returncode for p in procs] == [0]*WORLD, '\n'.join(outs)
    done = [line.split()[:2] for line in outs[0].splitlines()]
    assert all([n, w] in done for n in names for w in ways)

WITH_NORMS = [n for n in NAMES if OPTIMIZERS[n].norms]
ELEMENTWISE = [n for n in NAMES if n not in WITH_NORMS]

def test_ddp(tmp_path): launch('ddp', NAMES, BACKENDS, tmp_path)

def test_distrib_ctx(tmp_path):
    pytest.importorskip('accelerate')
    launch('fastai', NAMES, BACKENDS, tmp_path)

def test_fsdp(tmp_path): launch('fsdp', ELEMENTWISE, WAYS, tmp_path)

def test_fsdp_norms(tmp_path): launch('fsdp', WITH_NORMS, ('foreach', 'fused'), tmp_path)

def test_fsdp_of_a_large_parameter(tmp_path): launch('wide', ['SGD', 'Adam'], ('foreach', 'fused'), tmp_path)

if __name__ == '__main__':
    torch.set_num_threads(1)
    dist.init_process_group('gloo')
    task = dict(ddp=run_ddp, fastai=run_fastai, fsdp=run_fsdp, wide=run_wide)[sys.argv[1]]
    for name in sys.argv[2].split(','):
        for way in sys.argv[3].split(','): task(name, way)
    dist.destroy_process_group()
