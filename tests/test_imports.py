"What an import of fastxtend does to others: nothing, and what it needs: little. Each test has an interpreter of its own"
import importlib.util, subprocess, sys
from pathlib import Path
from textwrap import dedent

import pytest
from common import has_triton
from fastxtend.optimizer.all import OPTIMIZERS

root = Path(__file__).parent.parent

# `fastxtend.showdoc` needs nbdev, and `cuda` a Triton, which users may not have
needs = {'fastxtend.showdoc': 'nbdev', 'fastxtend.optimizer.cuda': 'triton', 'fastxtend.optimizer.cpu': 'numba'}
modules = sorted('.'.join(p.relative_to(root).with_suffix('').parts).removesuffix('.__init__') for p in (root/'fastxtend').rglob('*.py')
                 if p.name not in ('_modidx.py', '__main__.py'))

def usable(name):
    "Is there what a module needs?"
    return name not in needs or (has_triton() if needs[name] == 'triton' else importlib.util.find_spec(needs[name]) is not None)

def python(code, *args):
    "Run `code`, which has to end well; what it prints"
    res = subprocess.run([sys.executable, *args, '-c', dedent(code)], cwd=root, capture_output=True, text=True)
    assert res.returncode == 0, res.stdout + res.stderr
    return res.stdout

def test_import_is_silent():
    "fastai and others warn when they are imported, and we do not"
    out = python(f'''
        import importlib, importlib.util, warnings
        others = [o for o in ('nbdev.showdoc', 'numba', 'triton') if importlib.util.find_spec(o.split('.')[0])]
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            for name in ['fastai.vision.all', *others]: importlib.import_module(name)
        warnings.simplefilter('error')
        for name in {list(filter(usable, modules))}: importlib.import_module(name)
        print('imported')
    ''')
    assert out == 'imported\n'

BLOCK = '''
    import sys, warnings
    warnings.simplefilter('ignore')
    sys.modules.update(dict.fromkeys({blocked}))
'''

def blocking(blocked, code): return dedent(BLOCK.format(blocked=blocked)) + dedent(code)

STEPS = '''
    import torch
    from fastxtend.optimizer.all import *
    assert not any(sys.modules.get(o) for o in ('torchvision', 'numba', 'triton'))

    def stepped(helper, **kwargs):
        torch.manual_seed(0)
        params = [torch.randn(4, 3), torch.randn(7), torch.tensor(1.)]
        for p in params: p.grad = torch.randn_like(p)
        opt = helper(**kwargs)([params[:1], params[1:]], lr=.1)
        for _ in range(8): opt.step()
        return params

    for helper in (sgd, rmsprop, adam, radam, qhadam, larc, lamb, ranger):
        native = stepped(helper)
        for backend in ('foreach', 'jit'):
            for a,b in zip(native, stepped(helper, **{backend: True})): torch.testing.assert_close(a, b)
'''

def test_works_without_torchvision_numba_and_triton():
    "and `fused=True` says what it needs"
    out = python(blocking({'torchvision', 'numba', 'llvmlite', 'triton'}, STEPS + '''
    try: stepped(adam, fused=True)
    except ImportError as e: print(e)
    '''))
    assert 'pip install numba' in out and 'foreach=True' in out

def test_blocking_blocks():
    "The test above is of no use if it does not"
    out = python(blocking({'torchvision'}, '''
        from importlib.util import find_spec
        try: import torchvision
        except ImportError: print('not imported')
        print(find_spec('torchvision'))
    '''))
    assert out == 'not imported\nNone\n'

REPLACED = {'SGD', 'RMSProp', 'Adam', 'RAdam', 'QHAdam', 'Larc', 'Lamb', 'ranger'}
ADDED = {'Ranger', 'sgd', 'rmsprop', 'adam', 'radam', 'qhadam', 'larc', 'lamb', 'FusedOptimizer', 'FusedLookahead', 'JitOptimizer', 'JitLookahead',
         'ForEachOptimizer', *(f'{o}ForEachOptimizer' for o in ('SGD', 'RMSProp', 'Adam', 'RAdam', 'QHAdam', 'Larc', 'Lamb', 'Ranger'))}
ADDED |= {'StepperOptimizer', 'StepperLookahead', 'ForEachLookahead', 'cautious', 'cautious_decay', 'lookahead'}
ADDED |= {n for spec in OPTIMIZERS.values() if spec.native is None for n in (spec.name, spec.constructor.helper.__name__)}
ADDED_BASICS = ADDED | {'ClearGradients', 'TorchOptimizer', 'torch_opt', 'EMACallback', 'SWACallback', 'SimpleProfilerCallback'}

@pytest.mark.parametrize('first, ours, added', [
    ('fastai.vision.all', 'fastxtend.vision.all', ADDED_BASICS),
    ('fastai.tabular.all', 'fastxtend.basics', ADDED_BASICS),
    ('fastai.vision.all', 'fastxtend.optimizer.all', ADDED)])
def test_wildcard_import(first, ours, added):
    "Only fastai's optimizers and `GradientClip` are replaced, and only what is listed here is new"
    out = python(f'''
        import warnings
        warnings.simplefilter('ignore')
        before, after = {{}}, {{}}
        exec('from {first} import *', before)
        exec('from {first} import *; from {ours} import *', after)
        print({{n for n in before if n != '__builtins__' and after[n] is not before[n]}})
        print(set(after) - set(before))
    ''')
    replaced, new = map(eval, out.splitlines())
    assert replaced == REPLACED | ({'GradientClip'} if 'EMACallback' in added else set())
    assert new == added

@pytest.mark.parametrize('ours', ['fastxtend.optimizer.all', 'fastxtend.optim'])
def test_needs_no_learner(ours):
    "`Learner` imports pandas' and scikit-learn's users; who comes without it does not wait for it, and may bring it later"
    out = python(f'''
        import sys, {ours}
        assert not {{'fastai.learner', 'sklearn', 'numba', 'triton', 'timm', 'torchvision'}} & set(sys.modules)
        from fastai.learner import Learner
        print(Learner.create_opt.__module__, len([f for f in sys.meta_path if type(f).__module__.startswith('fastxtend')]))
    ''')
    assert out == 'fastxtend.callback.schedulefree 0\n'
