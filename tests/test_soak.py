"Many steps with random freezing, changes of groups and reloads of state: memory does not grow, and no backend drifts away from native"
import ctypes, gc, os, random, sys

import pytest
from common import *

STEPS = int(os.environ.get('FASTXTEND_SOAK_STEPS', 200)) # of each optimizer on each backend; 12500 make 100,000 of each backend
WARM = STEPS//2 # Caches are full by then
GROWTH = 2 # MiB of resident memory that may be added after that; one tensor kept each step would be more in a real soak
DRIFT = 1e-4 # Difference of weights from native, relative to the greatest in each. Native's own from native in float64 is up to 2e-5

SHAPES = ((40, 30), (40,), (16, 8, 3, 3), (16,), (10, 16), (10,))

def resident():
    "MiB of memory this process really uses, after everything that can be given back has been"
    gc.collect()
    try: ctypes.CDLL('libc.so.6').malloc_trim(0)
    except OSError: pass
    with open('/proc/self/statm') as f: return int(f.read().split()[1])*os.sysconf('SC_PAGE_SIZE')/2**20

def tensors():
    "How many tensors are alive, but for the numbers that ForEach keeps the last few thousand of"
    gc.collect()
    return sum(issubclass(type(o), Tensor) and o.ndim > 0 for o in gc.get_objects())

def gradient(p, t, i, target):
    "Of a quadratic bowl whose centre is `target`, with noise: errors of rounding are damped, and do not add up as in chaos"
    return (p.detach() - target)*.1 + make_grads(SHAPES, steps=97)[t%97][i]

class Soak:
    "One optimizer, and events that depend on the step alone"
    def __init__(self, name, way):
        self.name, self.way = name, way
        self.params, self.targets = make_params(SHAPES), make_params(SHAPES, seed=5)
        self.opt = self.new(lr=1e-3)

    def new(self, lr):
        return build(self.name, [self.params[:2], self.params[2:4], self.params[4:]], self.way, lr=lr)

    def event(self, t):
        rng = random.Random(t)
        if rng.random() < .05 and self.name != 'Ranger': self.opt.freeze_to(rng.randrange(3)) # native's Lookahead moves what is frozen
        if rng.random() < .05: self.opt.unfreeze()
        if rng.random() < .1: self.opt.set_hyper('lr', slice(rng.uniform(1e-4, 1e-3), 1e-3))
        if rng.random() < .1: self.opt.set_hyper('mom', rng.uniform(.8, .95))
        if rng.random() < .02:
            sd = deepcopy(self.opt.state_dict())
            self.opt = self.new(lr=1.)
            self.opt.load_state_dict(sd)
        if rng.random() < .01: self.opt.clear_state()

    def step(self, t):
        self.event(t)
        rng = random.Random(-t)
        for i,(p,target) in enumerate(zip(self.params, self.targets)):
            p.grad = None if rng.random() < .05 or not p.requires_grad else gradient(p, t, i, target)
        self.opt.step()

@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith('linux'), reason="reads /proc")
@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('way', BACKENDS)
def test_soak(name, way):
    with threads(1):
        native, fast, drift = Soak(name, 'native'), Soak(name, way), 0.
        for t in range(STEPS):
            if t == WARM: before, alive = resident(), tensors()
            if t == STEPS//2 or t == STEPS-1: native.opt.unfreeze(), fast.opt.unfreeze()
            native.step(t)
            fast.step(t)
            if t % 100 == 0 or t == STEPS-1:
                drift = max(drift, *(float((a-b).detach().abs().max()/a.detach().abs().max()) for a,b in zip(native.params, fast.params)))
                assert drift <= DRIFT, f"{drift:.1e} after {t+1} steps"
        growth, more = resident() - before, tensors() - alive
    print(f"{name} {way}: {STEPS} steps, {growth:+.2f} MiB, {more:+d} tensors, drift {drift:.1e}")
    assert growth <= GROWTH
    assert more <= 6*4 # a reload or a missing state may fall on either side
