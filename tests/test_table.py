"The table of optimizers, what is derived from it, and that it drives the tests"
import os, pydoc, re, subprocess, sys
from pathlib import Path

import pytest
from common import *

from fastxtend.optimizer import all as public

HERE = Path(__file__).parent

# Constructors as they have been published, without annotations. `foreach` came later to RMSProp, QHAdam and Larc, and `fused` to all
PUBLISHED = dict(
    SGD     = 'params, lr, mom=0.0, wd=0.0, decouple_wd=True, foreach=False, jit=False',
    RMSProp = 'params, lr, mom=0.0, sqr_mom=0.99, eps=1e-08, wd=0.0, decouple_wd=True, jit=False',
    Adam    = 'params, lr, mom=0.9, sqr_mom=0.99, eps=1e-05, wd=0.01, decouple_wd=True, foreach=False, jit=False',
    RAdam   = 'params, lr, mom=0.9, sqr_mom=0.99, eps=1e-05, wd=0.0, beta=0.0, decouple_wd=True, foreach=False, jit=False',
    QHAdam  = 'params, lr, mom=0.999, sqr_mom=0.999, nu_1=0.7, nu_2=1.0, eps=1e-08, wd=0.0, decouple_wd=True, jit=False',
    Larc    = 'params, lr, mom=0.9, clip=True, trust_coeff=0.02, eps=1e-08, wd=0.0, decouple_wd=True, jit=False',
    Lamb    = 'params, lr, mom=0.9, sqr_mom=0.99, eps=1e-05, wd=0.01, decouple_wd=True, foreach=False, jit=False',
    Ranger  = 'params, lr, mom=0.95, sqr_mom=0.99, eps=1e-06, wd=0.01, k=6, alpha=0.5, decouple_wd=True, foreach=False, jit=False',
)

def arguments(f, without=()):
    "Names and default values as they are written"
    return ', '.join(re.sub(r':[^=]*', '', str(p)).replace(' ', '') if p.default is p.empty else f'{n}={p.default!r}'
                     for n,p in inspect.signature(f).parameters.items() if n not in without)

@pytest.mark.parametrize('name', PUBLISHED)
def test_constructors_as_published(name):
    f = constructor(name)
    assert arguments(f, without=('fused', 'state', 'weights', *(() if 'foreach=' in PUBLISHED[name] else ('foreach',)))) == PUBLISHED[name]
    assert list(inspect.signature(f).parameters)[-len(FLAGS):] == list(FLAGS)
    assert f.__module__ == 'fastxtend.optimizer.fused' and f.__doc__
    assert all(f'{n}: ' in pydoc.render_doc(f) for n in inspect.signature(f).parameters)

@pytest.mark.parametrize('name', NAMES)
def test_helpers_are_derived(name):
    "The constructor without `params` and `lr`, that returns a `partial` of it"
    f, made = helper(name), helper(name)(wd=.05)
    assert arguments(f) == arguments(constructor(name), without=('params', 'lr'))
    assert inspect.signature(f).return_annotation is partial
    assert isinstance(made, partial) and made.func is constructor(name) and {k: v for k,v in made.keywords.items() if k != 'lr'} == dict(wd=.05)
    assert made.keywords.get('lr') == OPTIMIZERS[name].lr # a learning rate of its own, if it is not fastai's
    assert f.__name__.replace('_', '') == name.lower() and f.__module__ == constructor(name).__module__ and name in f.__doc__

@pytest.mark.parametrize('name', NAMES)
def test_positional_arguments(name):
    "In the order of the signature, for the helper as for the constructor"
    values = list(defaults(name).values())
    a, b = constructor(name)(make_params(SMALL), .1, *values), helper(name)(*values)(make_params(SMALL), lr=.1)
    assert [dict(h) for h in a.hypers] == [dict(h) for h in b.hypers] == [dict(h) for h in build(name, make_params(SMALL), lr=.1).hypers]

@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('way', WAYS)
def test_defaults_reach_the_optimizer(name, way):
    opt = build(name, make_params(SMALL), way, lr=.125)
    assert all(h['lr'] == .125 for h in opt.hypers)
    for k,v in defaults(name).items():
        if k in opt.hypers[0]: assert opt.hypers[0][k] == v
        elif k in ('k', 'alpha'): assert getattr(opt, k) == v
        else: assert k == 'decouple_wd' or opt.options[k] == v if not is_native(opt) else k in ('clip', 'decouple_wd')
    assert set(opt.hypers[0]) == set(build(name, make_params(SMALL), 'native').hypers[0])

@pytest.mark.parametrize('name', NAMES)
def test_no_flag_is_fastai(name):
    assert is_native(build(name, make_params(SMALL))) == (OPTIMIZERS[name].native is not None)
    assert not any(is_native(build(name, make_params(SMALL), way)) for way in ways(name, BACKENDS))

@pytest.mark.parametrize('name', NAMES)
def test_the_rows_slots(name):
    "The slots that the table tells are those that native keeps"
    for mom in moms(name):
        params = make_params(SMALL)
        opt = build(name, params, mom=mom)
        train(opt, params, make_grads(tuple(SMALL.values()), steps=1))
        if not is_native(opt): assert all({k for k,x in opt.state[p].items() if isinstance(x, Tensor)} == set(opt.slots_of(p)) for p in params)
        state, composition = opt.state[params[1]], OPTIMIZERS[name].composition(mom=mom) # of a vector
        numbers = {*composition.counters, *composition.kept} # `local_lr` of fastai is a tensor of no dimensions
        assert set(state) - numbers == set(OPTIMIZERS[name].slots(mom=mom))
        assert numbers <= set(state)
        assert ('step' in state) == OPTIMIZERS[name].counts_steps

@pytest.mark.parametrize('name', PUBLISHED)
def test_public_names(name):
    assert getattr(public, name) is constructor(name) and getattr(public, name.lower()) is helper(name)
    assert {name, name.lower()} <= set(public.__all__)

def run_pytest(*args, timeout=600):
    env = {**os.environ, 'PYTHONPATH': os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get('PYTHONPATH', '')])}
    return subprocess.run([sys.executable, '-m', 'pytest', '-p', 'dummy_optimizer', '-p', 'no:cacheprovider', '-q', *args], cwd=HERE.parent, env=env,
                          capture_output=True, text=True, timeout=timeout)

MATRICES = ('parity', 'state', 'calls', 'learner', 'bad_input', 'conformance', 'differences', 'table')
FILES = [str(HERE/f'test_{o}.py') for o in MATRICES]

@pytest.mark.skipif('dummy_optimizer' in sys.modules, reason='this is its own run')
def test_a_new_optimizer_goes_through_every_matrix():
    "Every test that is run for each optimizer is run for the dummy as well"
    res = run_pytest('--collect-only', *FILES)
    found = {}
    for function,ident in re.findall(r'::(\w+)\[(.*)\]$', res.stdout, re.M): found.setdefault(function, []).append(ident)
    def has(ids, name): return any(re.search(rf'(^|[-,]){name}($|[-,])', i) for i in ids)
    matrices = [f for f,ids in found.items() if all(has(ids, n) for n in PUBLISHED)]
    driven = [f for f in matrices if has(found[f], 'Softsign')]
    by_hand = {'test_variant', 'test_constructors_as_published', 'test_public_names', 'test_save_and_load', 'test_worked_example'}
    assert set(matrices) - set(driven) <= by_hand
    assert len(driven) >= 30

@pytest.mark.skipif('dummy_optimizer' in sys.modules, reason='this is its own run')
def test_a_new_optimizer_passes():
    res = run_pytest('-k', 'Softsign', *(f for f in FILES if 'learner' not in f))
    assert res.returncode == 0, res.stdout[-5000:]
    assert int(re.search(r'(\d+) passed', res.stdout)[1]) > 200
