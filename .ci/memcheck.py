"""Steps of all optimizers under Valgrind, which sees every read and write of a compiled kernel: is each within its tensor, and of what was written before?
AddressSanitizer would not do: it sees only code that was compiled with it, and none that Numba makes"""
import ctypes, os, re, subprocess, sys, tempfile
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

root = Path(__file__).parent.parent
# Valgrind knows no AVX-512; kernels come from Numba's cache, for it would take hours to compile in there
CPU = dict(NUMBA_CPU_NAME='haswell', NUMBA_CPU_FEATURES='+avx2,+fma,+f16c,+bmi,+bmi2', ATEN_CPU_CAPABILITY='avx2', OMP_NUM_THREADS='2', OMP_WAIT_POLICY='passive',
           PYTHONMALLOC='malloc', PYTHONPATH=f"{root}:{root/'tests'}")
VALGRIND = ['valgrind', '--smc-check=all-non-file', '--redzone-size=128', '--error-limit=no', '--num-callers=6', '--undef-value-errors=yes', '--xml=yes']
SIZES = [(), (1,), (3,), (5, 7), (8, 3, 3, 3), (33,), (4097,), (2**14 + 1,), (0,)]

def steps(names):
    "Three steps of each optimizer, in each dtype, and with state in half the bytes"
    from common import NAMES, build, make_grads, make_params, split, torch, train
    n = 0
    for name in names or NAMES:
        for dtype,kwargs in [(torch.float32, {}), (torch.float64, {}), (torch.bfloat16, {}), (torch.float16, {}), (torch.float32, dict(state='bfloat16'))]:
            torch.set_num_threads(1 + n % 2)
            params = make_params(SIZES, dtype)
            opt = build(name, split(params, 2), 'fused', wd=.1, **kwargs)
            train(opt, params, make_grads(tuple(SIZES), dtype, steps=3))
            assert {r.backend for r in opt.backend_report()} == {'numba'}, opt.backend_report()
            n += 1
    print(n, 'runs')

def too_far():
    "A step of a parameter that claims one element more than its memory has"
    from common import build, torch
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    p = torch.frombuffer((ctypes.c_char*4*1000).from_address(libc.malloc(4*999)), dtype=torch.float32)
    opt = build('SGD', [p], 'fused')
    p.grad = torch.ones(1000)
    opt.step()

def run(what, names, log, under=()):
    command = [*under, sys.executable, '-W', 'ignore', __file__, what, *names]
    res = subprocess.run(command, env={**os.environ, **CPU, 'NUMBA_CACHE_DIR': str(log.parent/'cache')}, capture_output=True, text=True)
    if res.returncode: sys.exit(f'{what} ended with {res.returncode}\n{res.stdout[-2000:]}{res.stderr[-4000:]}')
    return res.stdout.strip()

def errors(log):
    "What Valgrind found: in a compiled kernel, and elsewhere"
    found = dict(kernels=Counter(), elsewhere=Counter())
    for e in ET.parse(log).getroot().iter('error'):
        what, frames = e.findtext('what') or e.findtext('xwhat/text'), list(e.find('stack'))
        if (e.findtext('kind') or '').startswith('Leak'): continue
        found['kernels' if frames[0].find('obj') is None else 'elsewhere'][re.sub('0x[0-9A-F]+', 'an address', what)] += 1
    return found

def main(names):
    with tempfile.TemporaryDirectory() as tmp:
        found = {}
        for what in ('too_far', 'steps'):
            log = Path(tmp)/f'{what}.xml'
            run(what, names, log) # into the cache
            out = run(what, names, log, [*VALGRIND, f'--xml-file={log}'])
            found[what] = errors(log)
            print(what, out, *(f'{k}: {dict(v)}' for k,v in found[what].items()), sep='\n  ', flush=True)
    seen = found['too_far']['kernels']
    if not all(any(o.startswith(f'Invalid {k} of size') for o in seen) for k in ('read', 'write')): sys.exit('Valgrind did not see a kernel that goes too far')
    if found['steps']['kernels']: sys.exit('A kernel reads or writes what is not its own, or what nobody wrote')

if __name__ == '__main__':
    if sys.argv[1:2] == ['steps']: steps(sys.argv[2:])
    elif sys.argv[1:2] == ['too_far']: too_far()
    else: main(sys.argv[1:])
