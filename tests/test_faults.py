"Memory that may not be touched, memory that there is not, and a disk that is full. Each test has a process of its own"
import sys

import pytest
from common import *

pytestmark = pytest.mark.skipif(not sys.platform.startswith('linux'), reason="needs mprotect, and limits of resources")

each_name = pytest.mark.parametrize('name', NAMES)
each_way = pytest.mark.parametrize('way', BACKENDS)

# Memory that begins or ends where a page begins that nobody may read or write
GUARDED = '''
    import ctypes, mmap, sys
    from common import *
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype, libc.mmap.argtypes = ctypes.c_void_p, (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
    libc.mprotect.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    libc.munmap.argtypes = ctypes.c_void_p, ctypes.c_size_t
    PAGE, NOTHING, READ, BOTH = mmap.PAGESIZE, 0, 1, 3
    regions = []

    def guarded(t, at_end):
        "A copy of `t` in the same layout between two pages that may not be touched, at the end or the beginning of what is between them"
        size = t.numel()*t.element_size()
        room = -(-max(size, 1)//PAGE)*PAGE
        start = libc.mmap(None, room + 2*PAGE, BOTH, 34, -1, 0)
        for page in (start, start+PAGE+room): assert libc.mprotect(page, PAGE, NOTHING) == 0
        address = start + PAGE + (room - size if at_end else 0)
        if not size: return t.clone()
        memory = torch.frombuffer((ctypes.c_char*size).from_address(address), dtype=t.dtype)
        res = memory.as_strided(t.shape, t.stride()).copy_(t)
        regions.append((start, room, res))
        return res

    def free():
        for start,room,_ in regions: libc.munmap(start, room + 2*PAGE)
        regions.clear()

    def read_only(t):
        "Let gradients be read and not written"
        for start,room,r in regions:
            if r is t: libc.mprotect(start + PAGE, room, READ)
'''

STEPS_BETWEEN_GUARDS = GUARDED + '''
    from fastxtend.optimizer.plan import compiled
    from fastxtend.optimizer.probe import OK, probe
    if compiled() is not None: probe = compiled()
    name = sys.argv[1]
    SIZES = [(), (1,), (3,), (17,), (5, 7), (8, 3, 3, 3), (2**14-1,), (2**14+1,), (2**16+3,), (0,)]

    def move(opt, params, at_end):
        "All tensors of the step between guards; those of `params` that have been there stay"
        for p in params: p.data = guarded(p.data, at_end)
        for p in params:
            for k,t in opt.state[p].items():
                if isinstance(t, Tensor) and k != 'local_lr': opt.state[p][k] = guarded(t, at_end)
        for pg in getattr(opt, 'slow_weights', None) or []: pg[:] = [guarded(s, at_end) for s in pg]

    def run(way, dtype, at_end, mom, threads, decouple_wd):
        torch.set_num_threads(threads)
        params = make_params(SIZES, dtype)
        params[5] = params[5].to(memory_format=torch.channels_last)
        opt = build(name, split(params, 2), way, mom=mom, wd=.1, decouple_wd=decouple_wd)
        grads = make_grads(tuple(SIZES), dtype, steps=7)
        for t,gs in enumerate(grads):
            gs = [torch.empty_like(p).copy_(g) for p,g in zip(params, gs)]
            if t == 1 and way != 'native': move(opt, params, at_end)
            for p,g in zip(params, gs):
                p.grad = g.clone() if way == 'native' else guarded(g, at_end)
                if way != 'native': read_only(p.grad)
            opt.step()
        if way == 'fused': assert {r.backend for r in opt.backend_report()} == {'numba'}, opt.backend_report()
        res = {k: v for k,v in snapshot(opt, params).items() if k != 'grads'}
        del opt, params, gs, p, g
        free()
        return res

    n = 0
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        for mom in moms(name):
            for decouple_wd in (True, False):
                expected = run('native', dtype, True, mom, 1, decouple_wd) if dtype.itemsize >= 4 else None
                for at_end in (True, False):
                    got = run('fused', dtype, at_end, mom, 1 + at_end, decouple_wd)
                    n += 1
                    if expected is not None: assert_same(expected, got, 2*TOLERANCE['fused'])
    print(n, 'runs')
'''

@pytest.mark.slow
@each_name
def test_kernels_touch_nothing_else(name):
    "Parameters, gradients and state between guard pages, gradients read-only: reading or writing one byte too much ends the process"
    assert printed(STEPS_BETWEEN_GUARDS, name).endswith(' runs')

PROBE_BETWEEN_GUARDS = GUARDED + '''
    from fastxtend.optimizer.plan import compiled
    from fastxtend.optimizer.probe import OK, probe
    if compiled() is not None: probe = compiled()
    assert compiled() is not None or sys.argv[1] == 'any'
    for at_end in (True, False):
        ts = [guarded(torch.randn(n), at_end) for n in (1, 3, 1000, 5000)]
        for start,room,_ in regions: libc.mprotect(start, room + 2*PAGE, NOTHING)
        res = probe(ts, ts, ts)
        assert (res.reasons == OK).all() and res.sizes.tolist() == [1, 3, 1000, 5000]
        assert res.addresses[:, 0].tolist() == [t.data_ptr() for t in ts]
    strange = [torch.ones(3).to_sparse(), torch.ones(3, device='meta'), torch.ones(4)[::2], torch.ones(()).expand(3), torch.ones(3, dtype=torch.int64), torch.empty(0),
               torch.ones(2, 0, 3), torch._neg_view(torch.ones(3)), torch._efficientzerotensor(3), torch.ones(3, dtype=torch.complex64), torch.ones(3).requires_grad_()]
    for a in strange:
        for b in strange: probe([a], [b], [a])
    print('read none')
'''

def test_the_look_reads_no_data():
    "Looking at all tensors of a step asks where they are, and reads nothing there"
    assert printed(PROBE_BETWEEN_GUARDS, 'any') == 'read none'

def test_the_look_finds_its_way_within_tensors(monkeypatch):
    "Where PyTorch keeps a tensor's dispatch keys and its data is found by reading the memory of tensors and storages, and none besides"
    looking = pytest.importorskip('fastxtend.optimizer.looking')
    room, stored, read = 8*looking._MOST, 8*looking._MOST_OF_STORAGE, []
    monkeypatch.setattr(looking, '_word', lambda address, word=looking._word: read.append(address) or word(address))
    made, raw = [], looking._raw
    dispatch_keys = torch._C._dispatch_keys
    monkeypatch.setattr(looking, '_tell_all', lambda keys: True) # reads what is before the keys of a tensor of its own
    monkeypatch.setattr(torch._C, '_dispatch_keys', lambda t: made.append(t) or dispatch_keys(t))
    at, keys, _, storage, data = looking.where_in_tensors()
    with_data = [t for t in made if not t._is_zerotensor()]
    assert read and all(any(0 <= a - id(t) < Tensor.__basicsize__ or 0 <= a - t._cdata < room for t in made) or any(0 <= a - t.untyped_storage()._cdata < stored for t in with_data) for a in read)
    for t in made: assert looking._word(id(t) + at) == t._cdata and looking._word(t._cdata + keys) == raw(dispatch_keys(t))
    for t in with_data: assert looking._word(looking._word(t._cdata + storage) + data) == t.data_ptr()

def test_no_look_where_memory_does_not_tell(monkeypatch):
    "The compiled look needs all that a description tells to be in the words that it keeps, and it sees if it is not"
    looking = pytest.importorskip('fastxtend.optimizer.looking')
    assert looking._tell_all(looking.where_in_tensors()[1]) and not looking._tell_all(looking.where_in_tensors()[3])
    monkeypatch.setattr(looking, '_tell_all', lambda keys: False)
    assert looking.where_in_tensors() is None and looking.compiled_probe() is None

# Memory that there is not

NO_MEMORY = '''
    import gc, resource, sys
    from common import *
    way, when, spare = sys.argv[1], sys.argv[2], float(sys.argv[3])
    SHAPES = ((500, 500), (7,), (750, 500), (600, 500), (3,))
    SMALLER = ((3,), (5,))
    limits = resource.getrlimit(resource.RLIMIT_AS)

    def make(name, way):
        params = make_params(SHAPES)
        return build(name, split(params, 2), way, mom=.9, wd=.1, **(dict(k=2) if name == 'Ranger' else {})), params

    def result(opt, params): return {k: v for k,v in snapshot(opt, params).items() if k != 'grads'}

    def with_limit(step):
        "The error of `step` with not much more memory than there is now"
        gc.collect()
        with open('/proc/self/statm') as f: size = int(f.read().split()[0])*resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + int(spare*2**20), limits[1]))
        try: step()
        except (RuntimeError, MemoryError) as e: return type(e)
        finally: resource.setrlimit(resource.RLIMIT_AS, limits)

    def run(name):
        small = make_params(SMALLER)
        train(build(name, small, way, mom=.9, wd=.1), small, make_grads(SMALLER, steps=8)) # all is compiled
        (native, native_params), (opt, params) = both = make(name, 'native'), make(name, way)
        early = int(when == 'later')
        for o,ps in both:
            train(o, ps, make_grads(SHAPES, steps=2)[:early])
            set_grads(ps, make_grads(SHAPES, steps=2)[early])
        before = snapshot(opt, params)
        error = with_limit(opt.step)
        if error is not None:
            assert_same(before, snapshot(opt, params))
            opt.step()
        native.step()
        # where matrices are multiplied in bfloat16, what is a rounding apart before may be rounded to another neighbour (84 were seen)
        assert_same(result(native, native_params), result(opt, params), (4 if takes_whole(name) else 2)*TOLERANCE[way])
        return 'refused' if error else 'stepped'

    wrong, found = [], []
    for name in NAMES:
        try: found.append(run(name))
        except Exception as e: wrong.append(f'{name}: {e}')
    print('; '.join(wrong) or ', '.join(sorted({*found})))
'''

@pytest.mark.slow
@pytest.mark.parametrize('way', ['fused']) # ForEach and TorchScript need memory for intermediate results, and may stop halfway
@pytest.mark.parametrize('when,spare', [('first', .5), ('first', 2.5), ('later', .5)]) # MiB: less than the first tensor of the state, and two of them
def test_out_of_memory(way, when, spare):
    "In the first step, which makes the state, or a later one: an error, and nothing has changed; or it needed none"
    found = printed(NO_MEMORY, way, when, str(spare))
    assert found in ('refused, stepped', 'refused') if when == 'first' else found in ('stepped', 'refused, stepped', 'refused'), found

# A disk that is full

FULL = '''
    import resource, signal, sys
    from common import *
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if sys.argv[1] != 'no limit': resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),)*2)
    def run(name, way):
        params = make_params(SMALL)
        opt = build(name, params, way, mom=.9)
        train(opt, params, make_grads(tuple(SMALL.values()), steps=3))
        if way == 'fused': assert {r.backend for r in opt.backend_report()} == {'numba'}
        return {k: v for k,v in snapshot(opt, params).items() if k != 'grads'}
    for name in NAMES[:1]: assert_same(run(name, 'native'), run(name, 'fused'), TOLERANCE['fused'])
    print('stepped')
'''

@pytest.mark.slow
@pytest.mark.parametrize('limit', [0, 2000, 20_000])
def test_disk_full_while_compiling(limit, tmp_path):
    "Files of the cache cannot be written, or end too early: the kernel works without, and the next process with what is there"
    for size in (str(limit), 'no limit'): assert printed(FULL, size, NUMBA_CACHE_DIR=str(tmp_path)) == 'stepped'
