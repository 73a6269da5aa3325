"What a step does when something it would like to have is missing, and what it does not do again when nothing has changed"
import gc, warnings
from collections import Counter

import pytest

from common import *

from fastxtend.optimizer import core, plan, probe
from fastxtend.optimizer.all import Adam

MIXED = [(5, 7), (10,), (), (0,), (8, 3, 3, 3)]

COMPILED = plan.compiled

def spy(monkeypatch, module, name):
    "Counts the calls of a function"
    f, calls = getattr(module, name), []
    def counted(*args, **kwargs):
        calls.append(args)
        return f(*args, **kwargs)
    monkeypatch.setattr(module, name, counted)
    return calls

@pytest.fixture
def looks(monkeypatch):
    "Calls of the slow look at all tensors, where there is no compiled one"
    monkeypatch.setattr(plan, 'compiled', lambda: None)
    return spy(monkeypatch, plan, 'probe')

# --- A look in Python

@pytest.mark.parametrize('name', NAMES)
def test_python_looks_once(name, looks, monkeypatch):
    "As long as only addresses are new, nothing is asked again; and the numbers are those of the compiled look"
    def run():
        params, counts = make_params(MIXED), []
        opt = build(name, split(params, 2), 'fused')
        for gs in make_grads(tuple(MIXED), steps=8): # made anew for each step
            step_with(opt, params, gs)
            counts.append(len(looks))
        return snapshot(opt, params), counts
    slow, counts = run()
    assert 0 < counts[0] <= 2 # before and after slots are made
    assert counts[-1] - counts[0] == OPTIMIZERS[name].has_lookahead # which has two kinds of steps
    monkeypatch.setattr(plan, 'compiled', COMPILED)
    assert_same(slow, run()[0])

CHANGES = dict(
    moved=(0, lambda p: p.data.clone()), transposed=(1, lambda p: p.data.t().contiguous().t()), double=(1, lambda p: p.data.double()),
    expanded=(1, lambda p: p.data[:1].expand(5, 7)))

@pytest.mark.parametrize('what', CHANGES)
def test_python_looks_again(what, looks):
    "Whatever else changes is seen: what is found is what a fresh look finds"
    expected, change = CHANGES[what]
    params = make_params(MIXED)
    opt = build('Adam', params, 'fused')
    train(opt, params, make_grads(tuple(MIXED), steps=2))
    before = len(looks)
    params[0].data = change(params[0])
    set_grads(params, [torch.ones_like(p) for p in params])
    batch = opt.gather()
    last = opt._plans[batch.composition].seen
    with torch.no_grad(): seen = plan.look(batch, last)
    assert (len(looks) > before) == bool(expected)
    assert (seen.table == probe.probe(*batch.tensors()).table).all()
    if not expected: assert (seen.table != last.table).any()

def test_python_looks_at_strange_tensors(looks):
    "What the check cannot take is looked at each time"
    params = [torch.ones(3), torch.ones(3)]
    opt = build('SGD', params, 'fused', mom=0.)
    for t in range(3):
        params[0].grad, params[1].grad = torch.ones(3), torch._neg_view(torch.ones(3))
        opt.step()
    assert len(looks) >= 3
    assert torch.equal(params[0], torch.full((3,), .97)) and torch.equal(params[1], torch.full((3,), 1.03))
