"Nothing drifts where state is kept in 16 or 8 bits: the measurement of examples/drift.py, in short; all of it with `SOAK`"
import sys
from pathlib import Path

import pytest

from common import *

sys.path.insert(0, str(Path(__file__).resolve().parent.parent/'examples'))
import drift

CASES = drift.CASES if SOAK else [('Adam', dict(sqr_mom=.999)), ('SGD', {})]

@pytest.mark.skipif(INTERPRETS, reason="of the kernels for CPUs")
@pytest.mark.parametrize('case', CASES, ids=lambda c: '-'.join([c[0], *c[1]]))
def test_final_loss_is_within_the_noise_of_seeds(case):
    name, hypers = case
    steps = drift.STEPS if SOAK else 2000
    own, *others = (drift.drift(name, flags, steps, **hypers) for flags in drift.WAYS.values())
    for x in others: assert abs(x.mean() - own.mean()) < own.std(ddof=1)/4
