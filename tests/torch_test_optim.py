"""PyTorch's own tests of optimizers, on those of `fastxtend.optim`:

    python tests/torch_test_optim.py pytorch/test/test_optim.py [-k PART_OF_A_NAME ...]

The file belongs to PyTorch's repository, not to its wheel: take it from the tag of the installed version. Needs `expecttest`. `OptimizerInfo`s are
written from the declarations; of what `torch.optim` has too, from PyTorch's own. What is left out, and why:

- `differentiable`, `capturable`, complex and sparse parameters: refused here, as `supported_impls`, `supports_complex`, `supports_sparse` say
- errors of `foreach=True` with tensors for `lr` or `betas`: taken here
- `TestDifferentiableOptimizer`, `TestLRScheduler`, `TestSWAUtils` of its folder `optim`: they test classes of `torch.optim` and no others"""
import importlib.util, sys, types, unittest
from collections import Counter

import torch
from fastxtend import optim as ours
from torch.testing._internal import common_optimizers as co
from torch.testing._internal.common_device_type import tol, toleranceOverride

HALF = {dt: tol(atol=5e-3, rtol=5e-3) for dt in (torch.bfloat16, torch.float16)} # as for PyTorch's fused ones: a step that is not fused rounds after each operation
ELSEWHERE = dict(test_optim='TestDifferentiableOptimizer', test_lrscheduler='TestLRScheduler', test_swa_utils='TestSWAUtils')

def inputs_of(
    cls:type, # An optimizer that `torch.optim` does not have
):
    "From a device and a dtype to constructor arguments: defaults, and each option in turn"
    defaults = cls.column.defaults
    flags = [n for n,v in defaults.items() if isinstance(v, bool) and n not in ('maximize', 'decoupled_weight_decay')]
    def inputs(device=None, dtype=None):
        more = dict(eps=.1) if dtype == torch.float16 and 'eps' in defaults else {}
        lr = defaults['lr']
        options = dict(default={}, lr=dict(lr=lr/2 if lr == 1. else 10*lr), decay=dict(weight_decay=.1), maximize=dict(weight_decay=.1, maximize=True), l2=dict(weight_decay=.1, decoupled_weight_decay=False),
                       **{n: {n: not defaults[n]} for n in flags})
        if 'momentum' in defaults: options['momentum'] = dict(momentum=0. if defaults['momentum'] else .9)
        return [co.OptimizerInput(params=None, kwargs={'lr': lr, 'weight_decay': 0., **more, **o}, desc=n) for n,o in options.items()]
    return inputs

def errors_of(
    cls:type, # An optimizer that `torch.optim` does not have
):
    "From a device and a dtype to what is refused"
    wrong = dict(lr=(-1., 'Invalid learning rate: -1'), weight_decay=(-1., 'Invalid weight_decay value: -1'), eps=(-1., 'Invalid epsilon value: -1'),
                 betas=((1., *cls.column.defaults.get('betas', (0.,))[1:]), 'Invalid beta parameter at index 0: 1.0'), k=(0, 'which cannot be 0'))
    def errors(device, dtype):
        own = [co.ErrorOptimizerInput(co.OptimizerInput(params=None, kwargs={n: x}, desc=n), error_type=ValueError, error_regex=m) for n,(x,m) in wrong.items() if n in cls.column.defaults]
        return co.get_error_inputs_for_all_optims(device, dtype) + (own if co._get_device_type(device) == 'cpu' else [])
    return errors

def _is_taken(error):
    "Is it no error here?"
    kwargs = error.optimizer_error_input.kwargs
    return bool(kwargs.get('foreach')) and any(isinstance(x, torch.Tensor) for v in kwargs.values() for x in (v if isinstance(v, tuple) else (v,)))

def info_of(
    cls:type, # An optimizer
    theirs:dict, # Class of `torch.optim` to its `OptimizerInfo`
) -> co.OptimizerInfo:
    "What PyTorch's tests want to know of it"
    like, rest = theirs.get(cls.column.like), {}
    if like:
        def inputs(device=None, dtype=None): return [i for i in like.optim_inputs_func(device=device, dtype=dtype) if not i.kwargs.get('capturable')]
        def errors(device, dtype): return [e for e in like.optim_error_inputs_func(device=device, dtype=dtype) if not _is_taken(e)]
        rest = dict(scheduler_inputs=like.scheduler_inputs)
    else: inputs, errors = inputs_of(cls), errors_of(cls)
    half = co.DecorateInfo(toleranceOverride(HALF), 'TestOptimRenewed', 'test_fused_matches_forloop')
    return co.OptimizerInfo(cls, optim_inputs_func=inputs, optim_error_inputs_func=errors, supported_impls=('foreach', 'fused'), supports_fused_on=('cpu', 'cuda'),
                            not_og_supported_flags=('maximize', 'differentiable', 'capturable', *ours.WAYS), supports_complex=False, decorators=(half,), **rest)

def module_from(
    path:str, # To PyTorch's `test_optim.py`
) -> types.ModuleType:
    "The tests in it, for ours in place of those of `torch.optim`"
    theirs = {i.optim_cls: i for i in co.optim_db}
    co.optim_db[:] = [info_of(getattr(ours, n), theirs) for n in ours.__all__]
    sys.modules['optim'] = types.ModuleType('optim')
    for name,cls in ELSEWHERE.items(): sys.modules[f'optim.{name}'] = vars(sys.modules['optim'])[name] = types.ModuleType(name)
    for name,cls in ELSEWHERE.items(): setattr(sys.modules[f'optim.{name}'], cls, type(cls, (), {}))
    spec = importlib.util.spec_from_file_location('torch_tests', path)
    module = sys.modules['torch_tests'] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

class Result(unittest.TextTestResult):
    "A result that names what was skipped once it is through"
    def reasons(self): return Counter(reason for _,reason in self.skipped)

def main(path, *args):
    "Run them; the exit status tells whether all passed"
    module, loader = module_from(path), unittest.TestLoader()
    if args: loader.testNamePatterns = [f'*{a}*' for a in args if a != '-k']
    result = unittest.TextTestRunner(verbosity=0, resultclass=Result, warnings='ignore').run(loader.loadTestsFromModule(module))
    n, failed, skipped = result.testsRun, len(result.failures) + len(result.errors), len(result.skipped)
    print(f"{len(ours.__all__)} optimizers: {n} tests, {n - failed - skipped} passed, {skipped} skipped, {failed} failed (torch {torch.__version__})")
    for reason,k in result.reasons().most_common(): print(f"  skipped {k}: {reason}")
    return int(failed > 0 or n == 0)

if __name__ == '__main__': sys.exit(main(*sys.argv[1:]))
