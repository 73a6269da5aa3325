"Optimizer checkpoints that were written at commit e414a42, before optimizers were lists of steppers: they load into every backend, and training goes on as it would have"
from pathlib import Path

import pytest
from common import *

FILE = Path(__file__).parent/'checkpoints'/'e414a42.pt' # seven steps, and where seven more led
SAVED = torch.load(FILE, weights_only=True)

@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('key', SAVED)
def test_goes_on(key, way):
    name, written_by = key.split('-')
    was = SAVED[key]
    params = [p.clone() for p in was['params']]
    opt = build(name, split(params, 2), way, mom=.9, wd=.1)
    opt.load_state_dict(deepcopy(was['saved']))
    train(opt, params, make_grads(tuple(SMALL.values()), steps=7, seed=2))
    for p,expected in zip(params, was['after']): assert distance(expected, p) <= max(TOLERANCE[way], TOLERANCE[written_by], 1) # norms of PyTorch's versions differ by less
