"What an import of fastxtend does to others: nothing, and what it needs: little. Each test has an interpreter of its own"
import ast, importlib.util, subprocess, sys
from graphlib import TopologicalSorter
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

def imports_of(name):
    "Modules of ours that a module imports, in functions too"
    path = root.joinpath(*name.split('.'))
    path = path/'__init__.py' if path.is_dir() else path.with_suffix('.py')
    package = name if path.name == '__init__.py' else name.rpartition('.')[0]
    for o in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if not isinstance(o, ast.ImportFrom): continue
        source = importlib.util.resolve_name('.'*o.level + (o.module or ''), package)
        for found in ([f'{source}.{a.name}' for a in o.names] if source in ('fastxtend', *{m.rpartition('.')[0] for m in modules}) else [source]):
            if found in modules: yield found

def test_no_import_runs_backwards():
    "Modules import what stands below them: there is no circle, none that is closed in a function either, and optimizers know nothing of what is built around them"
    graph = {name: set(imports_of(name)) for name in modules}
    assert len(list(TopologicalSorter(graph).static_order())) == len(modules) and sum(map(len, graph.values())) > 100
    around = {(name, o) for name,found in graph.items() if name.startswith('fastxtend.optimizer.') for o in found if not o.startswith('fastxtend.optimizer.')}
    assert not around

REPLACED = {'SGD', 'RMSProp', 'Adam', 'RAdam', 'QHAdam', 'Larc', 'Lamb', 'ranger'}
ADDED = {'Ranger', 'sgd', 'rmsprop', 'adam', 'radam', 'qhadam', 'larc', 'lamb', 'FusedOptimizer', 'FusedLookahead', 'JitOptimizer', 'JitLookahead',
         'ForEachOptimizer', *(f'{o}ForEachOptimizer' for o in ('SGD', 'RMSProp', 'Adam', 'RAdam', 'QHAdam', 'Larc', 'Lamb', 'Ranger'))}
ADDED |= {'StepperOptimizer', 'StepperLookahead', 'ForEachLookahead', 'cautious', 'cautious_decay', 'lookahead'}
ADDED |= {n for spec in OPTIMIZERS.values() if spec.native is None for n in (spec.name, spec.constructor.helper.__name__)}
ADDED_BASICS = ADDED | {'ClearGradients', 'TorchOptimizer', 'torch_opt', 'EMACallback', 'SWACallback', 'SimpleProfilerCallback'}

WILDCARDS = [
    ('fastai.vision.all', 'fastxtend.optimizer.all', ADDED),
    ('fastai.tabular.all', 'fastxtend.basics', ADDED_BASICS),
    ('fastai.vision.all', 'fastxtend.vision.all', ADDED_BASICS)]

def test_wildcard_import():
    "Only fastai's optimizers and `GradientClip` are replaced, and only what is listed here is new"
    out = python(f'''
        import warnings
        warnings.simplefilter('ignore')
        def names(*modules):
            found = {{}}
            for m in modules: exec(f'from {{m}} import *', found)
            return {{n: o for n,o in found.items() if n != '__builtins__'}}
        pairs = {[pair for *pair,_ in WILDCARDS]}
        alone = [names(first) for first,_ in pairs]
        for before,pair in zip(alone, pairs):
            after = names(*pair)
            print({{n for n in before if after[n] is not before[n]}})
            print(set(after) - set(before))
    ''')
    found = [*map(eval, out.splitlines())]
    assert found[1::2] == [added for *_,added in WILDCARDS]
    assert found[::2] == [REPLACED | ({'GradientClip'} if 'EMACallback' in added else set()) for *_,added in WILDCARDS]

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

SNAPSHOT = '''
    import sys, warnings
    warnings.simplefilter('ignore')
    import fastai.vision.all, fastai.tabular.all, fastai.callback.all, torch.optim

    def attributes():
        "Name of each attribute of a class, and of each function, of the libraries that we build on"
        found = {}
        for name,module in list(sys.modules.items()):
            if module is None or name.partition('.')[0] not in ('fastai', 'fastcore', 'torch'): continue
            for n,o in list(vars(module).items()):
                if isinstance(o, type): found.update({(o.__module__, o.__qualname__, k): v for k,v in list(vars(o).items())})
                elif callable(o): found[name, n] = o
        return found

    def changed(before):
        "What is new or another, but for the copies that fastcore's `patch` keeps"
        modules = {k[0] for k in before}
        return {'.'.join(k[1:]) for k,o in attributes().items() if k[0] in modules and before.get(k) is not o and not k[-1].startswith('_orig_')}

    before = attributes()
'''

def test_what_is_changed_in_fastai():
    "The attributes in the table of the guide, and nothing else"
    import json, re
    guide = json.loads((root/'nbs/guides.migrate.ipynb').read_text(encoding='utf-8'))
    table = re.findall(r'^\| `([\w.]+)` \| `([\w.]+)` \|', '\n'.join(''.join(c['source']) for c in guide['cells']), re.M)
    listed = {ours: {what for what,by in table if by in (ours, 'fastxtend.optimizer.all')} for ours in ('fastxtend.optimizer.all', 'fastxtend.basics')}
    out = python(dedent(SNAPSHOT) + dedent('''
        import fastxtend.optimizer.all, fastxtend.optim
        print(changed(before))
        import fastxtend.vision.all
        print(changed(before))
    '''))
    assert [*map(eval, out.splitlines())] == [*listed.values()] and len(table) > 5

PLAIN = '''
    import warnings
    warnings.simplefilter('ignore')
    import torch
    from fastai.basics import *
    from fastai.callback.training import GradientClip
    from fastai.optimizer import Adam, Optimizer, ranger
    if {ours}: import fastxtend.vision.all
    items = TfmdLists([(torch.ones(2), torch.ones(2))]*4, [noop])
    for opt_func in (Adam, ranger):
        torch.manual_seed(0)
        learn = Learner(DataLoaders.from_dsets(items, items, bs=2, device='cpu'), nn.Linear(2, 2), nn.MSELoss(), opt_func=opt_func, cbs=GradientClip(.1), path='{path}')
        learn.remove_cbs([cb for cb in learn.cbs if type(cb).__name__ == 'ProgressCallback'])
        learn.logger = noop
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            learn.create_opt()
        assert type(learn.opt).__module__ == 'fastai.optimizer'
        learn.fit(2, 1e-2)
        print([type(cb).__name__ for cb in learn.cbs], [p.tolist() for p in learn.model.parameters()])
        learn.export(f'{{opt_func.__name__}}.pkl')
'''

def test_a_learner_without_us(tmp_path):
    "Where nothing of ours is used, a `Learner` does the same after our import, and what it exports loads without us"
    without, with_us = (python(PLAIN.format(ours=ours, path=tmp_path)) for ours in (False, True))
    assert with_us == without and 'GradientClip' in with_us
    out = python(blocking({'fastxtend'}, f'''
        from fastai.basics import *
        for name in ('Adam', 'ranger'):
            learn = load_learner('{tmp_path}/' + name + '.pkl')
            print(type(learn.opt or learn.opt_func).__name__, len([n for n in sys.modules if n.startswith('fastxtend')]))
    '''))
    assert len(out.splitlines()) == 2 and all(line.endswith(' 1') for line in out.splitlines()) # the one that is blocked
