"The CPU kernels beside everything else: caches, threads, forks, shared memory, and devices that have no kernel"
import os, re, subprocess, sys, textwrap, threading, warnings

import pytest
from common import *
from fastxtend.optimizer import cpu, plan
from fastxtend.optimizer.steppers import average_grad, compose, slot, stepper
from fastxtend.optimizer.probe import REASONS

STEP = '''
import warnings; warnings.filterwarnings('ignore')
import torch
from fastxtend.optimizer.all import *
from fastxtend.optimizer import cpu
from fastxtend.optimizer.table import OPTIMIZERS
p = torch.nn.Parameter(torch.ones(300, 300)); p.grad = torch.ones_like(p)
opt = Lamb([p], lr=.1, wd=0., fused=True)
opt.step()
float32, names = cpu.CODECS[torch.float32], ('p', 'g', 'grad_avg', 'sqr_avg')
composition = OPTIMIZERS['Lamb'].composition()
hits = [cpu.compiled(s, (float32,)*4, names, composition.row + tuple(n for n in s.scalars if n not in composition.row)).cache_hits for s in composition.stages]
'''

def python(code, before='', **env):
    "What `code` prints in a process of its own after a step, and `before` before it"
    res = subprocess.run([sys.executable, '-c', before + STEP + textwrap.dedent(code)], capture_output=True, text=True, env={**os.environ, **env})
    assert res.returncode == 0, res.stderr
    return res.stdout.split()

REPORT = "print(float(p[0, 0]), sum(hits)//2, sum(cpu.driver(True).stats.cache_hits.values()))"

def ones_like(params): return list(map(torch.ones_like, params))

def test_second_process_does_not_compile(tmp_path):
    first, second = (python(REPORT, NUMBA_CACHE_DIR=str(tmp_path)) for _ in range(2))
    assert first[1:] == ['0', '0'] and second[1:] == ['1', '1']
    assert first[0] == second[0]

def test_serial_driver_is_not_taken_for_the_parallel_one(tmp_path):
    "Numba's cache does not know them apart by their options"
    threads = dict(OMP_NUM_THREADS='2', NUMBA_NUM_THREADS='2')
    serial = 'from fastxtend.optimizer import cpu; cpu.driver(False);'
    python('', before=serial, NUMBA_CACHE_DIR=str(tmp_path/'a'), **threads)
    for name,before in (('a', ''), ('b', serial)):
        hits = python(REPORT, before=before, NUMBA_CACHE_DIR=str(tmp_path/name), **threads)[2]
        assert hits == ('1' if name == 'a' else '0')

@pytest.mark.parametrize('broken', ['CacheImpl._locator_classes = []', 'IndexDataCacheFile.save = lambda *_: open("/dev/null/x", "w")'])
def test_cache_that_cannot_be_written(tmp_path, broken):
    "With no place for it, or where a place refuses, the kernels are compiled in each process"
    before = f"from numba.core.caching import *; from numba.core import caching; caching.{broken}"
    assert python(REPORT, before, NUMBA_CACHE_DIR=str(tmp_path))[1:] == ['0', '0']

def test_cache_that_is_damaged(tmp_path):
    good = python(REPORT, NUMBA_CACHE_DIR=str(tmp_path))
    files = [f for f in tmp_path.rglob('*') if f.suffix in ('.nbi', '.nbc')]
    assert files
    for f in files: f.write_bytes(f.read_bytes()[:40])
    assert python(REPORT, NUMBA_CACHE_DIR=str(tmp_path))[0] == good[0]

def test_cache_knows_a_stepper_by_its_arithmetic():
    "Two steppers of one name do not share machine code"
    def address():
        stage = compose([move]).step
        return cpu.compiled(stage, (cpu.CODECS[torch.float32],)*2, ('p', 'g'), ('lr',)).address
    @stepper('p')
    def move(p, g, lr): return p - lr*g
    first = address()
    @stepper('p')
    def move(p, g, lr): return p + lr*g
    assert address() != first

def test_step_in_a_forked_process():
    "Threads do not survive a fork, and a step after one runs on a single thread"
    code = '''
    import os
    result, done = os.pipe()
    if os.fork() == 0:
        opt.step()
        os.write(done, repr(float(p[0, 0])).encode())
        os._exit(0)
    other = float(os.read(result, 99))
    os.wait()
    opt.step()
    print(other == float(p[0, 0]))
    '''
    assert python(code) == ['True']

def test_workers_of_a_dataloader():
    "Worker processes that fork between steps"
    code = '''
    data = torch.utils.data.DataLoader(torch.arange(64.), batch_size=8, num_workers=2)
    for epoch in range(2):
        for x in data: opt.step()
    print(opt.state[p]['step'])
    '''
    assert python(code) == ['17']

@pytest.fixture
def runs(monkeypatch):
    "Which drivers were asked for"
    asked, driver = [], cpu.driver
    monkeypatch.setattr(cpu, 'driver', lambda parallel: (asked.append(parallel), driver(parallel))[1])
    return asked

@pytest.mark.parametrize('threads,size,parallel', [(1, 2**18, False), (2, 2**18, True), (2, 100, False)])
def test_threads_are_those_of_torch(runs, threads, size, parallel):
    before = torch.get_num_threads()
    params = make_params([(size,)])
    opt = build('Adam', params, 'fused')
    try:
        torch.set_num_threads(threads)
        step_with(opt, params, ones_like(params))
    finally: torch.set_num_threads(before)
    assert runs == [parallel]

def test_number_of_numba_threads_is_put_back():
    import numba
    before = numba.get_num_threads()
    params = make_params([(2**18,)])
    step_with(build('Adam', params, 'fused'), params, ones_like(params))
    assert numba.get_num_threads() == before

def test_steps_in_several_threads():
    "Optimizers of different threads do not disturb each other"
    def run(seed):
        params = make_params([(2**17,), (50, 50)], seed=seed)
        opt = build('Adam', params, 'fused')
        train(opt, params, [make_params([(2**17,), (50, 50)], seed=seed + 100 + t) for t in range(10)])
        return params
    expected, got = [run(i) for i in range(4)], [None]*4
    def work(i): got[i] = run(i)
    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads: t.start()
    for t in threads: t.join()
    for a,b in zip(expected, got): assert all(map(torch.equal, a, b))

def tied(): p = torch.randn(6, generator=torch.Generator().manual_seed(0)); return [p, p]
def views(): p = torch.randn(12, generator=torch.Generator().manual_seed(0)); return [p[:8], torch.ones(3), p[4:]]
def twins(): p = torch.randn(12, generator=torch.Generator().manual_seed(0)); return [p.view(3, 4), p.view(4, 3)]

@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('make', [tied, views, twins])
def test_shared_memory(name, make):
    "Parameters that share memory step one after the other, as in fastai"
    def run(way):
        params = make()
        opt = build(name, params, way)
        train(opt, params, [[torch.full_like(p, t - 2.5) for p in params] for t in range(8)])
        return opt, params
    (_, expected), (opt, got) = run('native'), run('fused')
    for a,b in zip(expected, got): assert distance(a, b) <= TOLERANCE['fused']
    shared = [o for o in opt.backend_report() if 'shares memory' in o.reason]
    assert len(shared) == 2 and all(o.backend == 'foreach' for o in shared)

def test_slot_that_is_the_parameter():
    params = make_params([(7,), (7,)])
    opt = build('Adam', params, 'fused')
    step_with(opt, params, ones_like(params))
    opt.state[params[0]]['grad_avg'] = params[1].view(7)
    step_with(opt, params, [torch.ones(7)]*2)
    assert [o.backend for o in opt.backend_report()] == ['foreach', 'foreach']

def test_report_tells_where_and_why():
    params = [torch.ones(4, 4), torch.ones(4, 8)[:, ::2], torch.ones(4, 4)]
    opt = build('SGD', [params[:1], params[1:]], 'fused')
    expected = opt.backend_report()
    assert [o.backend for o in expected] == ['numba', 'foreach', 'numba'] and 'not stepped yet' in str(expected)
    step_with(opt, params, [torch.ones(4, 4), torch.ones(4, 4), torch.ones(1, 1).expand(4, 4)])
    report = opt.backend_report()
    assert [(o.group, o.index, o.backend) for o in report] == [(0, 0, 'numba'), (1, 0, 'foreach'), (1, 1, 'numba')]
    assert report[0].param == '(4, 4) float32 on cpu' and 'layout' in report[1].reason

def test_host_without_a_kernel(monkeypatch):
    "ForEach does it, and that is said once"
    monkeypatch.setattr(plan, 'ENGINES', {})
    plan.kernels_for.cache_clear(); plan.warn_once.cache_clear()
    try:
        params, expected = make_params(SMALL), make_params(SMALL)
        opt, native = build('Adam', params, 'fused'), build('Adam', expected)
        grads = make_grads(tuple(SMALL.values()), steps=5)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter('always')
            train(opt, params, grads)
        train(native, expected, grads)
        assert len([w for w in said if 'no kernel for cpu' in str(w.message)]) == 1
        assert {o.backend for o in opt.backend_report()} == {'foreach'}
        for a,b in zip(expected, params): assert distance(a, b) <= TOLERANCE['foreach']
    finally: plan.kernels_for.cache_clear(); plan.warn_once.cache_clear()

def test_nothing_keeps_gradients_alive():
    import gc, weakref
    params = make_params(SMALL)
    opt = build('Adam', params, 'fused')
    step_with(opt, params, ones_like(params))
    grads = [weakref.ref(p.grad) for p in params]
    for p in params: p.grad = None
    gc.collect()
    assert not any(g() is not None for g in grads)

def test_functions_are_told_apart_by_name():
    "In Numba's cache, and when what comes from it is linked: two that are not the same have different names"
    codecs = set(cpu.CODECS.values())
    functions = [*(f for c in codecs for f in (c.load, c.save, c.begin, c.end, c.close, *cpu._in(c, np.float64)) if f), *(f for real in (np.float32, np.float64) for f in cpu.math_in(real).values())]
    functions = [f.py_func for f in functions if hasattr(f, 'py_func')]
    made = {f.__qualname__: f for f in functions}
    for f in functions: assert (made[f.__qualname__].__code__, made[f.__qualname__].__closure__) == (f.__code__, f.__closure__)

def test_slots_may_have_any_name():
    "Also one that the loops over elements use themselves"
    def source(stage, **dtypes): return cpu.chunk_source(stage, cpu.codecs_of(dict(p=torch.float32, g=torch.float32, **dtypes)), ('p', 'g', *dtypes), stage.scalars)
    own = set()
    for stage in OPTIMIZERS['Lamb'].composition().kernels:
        for dtypes in (dict(grad_avg=torch.float32, sqr_avg=torch.float32), dict(grad_avg=torch.int8, sqr_avg=torch.uint8, grad_avg_scales=torch.float32, sqr_avg_scales=torch.float32)):
            own |= {n for n in re.findall(r'\b_([a-z_]+)\b', source(stage, **dtypes)) if not n.startswith(('p_', 'g_', 'grad_avg', 'sqr_avg', 'update', 'p_sqr'))}
    assert {'start', 'n', 'at', 'i', 'piece', 'block'} <= own
    step = compose([partial(average_grad, grad_avg=n) for n in sorted(own)], name='names').step
    x, g, slots = torch.zeros(100), torch.arange(100.), {n: torch.ones(100) for n in sorted(own)}
    tensors = dict(p=x, g=g, **slots)
    run = cpu.compiled(step, cpu.codecs_of({n: t.dtype for n,t in tensors.items()}), tuple(tensors), step.scalars).ctypes
    at, row = np.array([t.data_ptr() for t in tensors.values()]), np.array([dict(mom=.5, damp=1.).get(n) for n in step.scalars], np.float32)
    run(at.ctypes.data, 0, 100, row.ctypes.data, 0)
    for n,t in slots.items(): torch.testing.assert_close(t, .5 + g)
