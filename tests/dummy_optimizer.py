"""An optimizer that nobody needs, entered into the table as a new one would be: a row, a rule, two step functions, a constructor.
`pytest -p dummy_optimizer` puts it through all tests that the table drives."""
from __future__ import annotations

from functools import partial, partialmethod
from typing import List

import torch
from fastai.optimizer import Optimizer, average_grad, l2_reg, weight_decay
from fastxtend.optimizer import foreach as foreach_module, fused as fused_module
from fastxtend.optimizer.core import OPTIMIZERS, OptimizerSpec
from fastxtend.optimizer.foreach import ForEachOptimizer
from fastxtend.optimizer.torchscript import script
from torch import Tensor

def native_step(p, lr, eps, grad_avg, **kwargs):
    p.data.addcdiv_(grad_avg, grad_avg.square().add_(eps).sqrt_(), value=-lr)

def native(params, lr, mom, eps, wd, decouple_wd):
    cbs = [weight_decay if decouple_wd else l2_reg, partial(average_grad, dampening=True), native_step]
    return Optimizer(params, cbs, lr=lr, mom=mom, eps=eps, wd=wd)

def softsign(p, g, grad_avg, decay, l2, mom, damp, lr, eps):
    "A smooth sign of the averaged gradient"
    p, g = weight_decay(p, g, decay, l2)
    grad_avg = mom*grad_avg + damp*g
    return p - lr*grad_avg/sqrt(grad_avg*grad_avg + eps), grad_avg

def softsign_foreach_step(p, g, grad_avg, decay, l2, mom, damp, lr, eps):
    torch._foreach_mul_(p, decay)
    g = torch._foreach_add(torch._foreach_mul(p, l2), g)
    torch._foreach_mul_(grad_avg, mom)
    torch._foreach_add_(grad_avg, torch._foreach_mul(g, damp))
    denom = torch._foreach_mul(grad_avg, grad_avg)
    torch._foreach_add_(denom, eps)
    torch._foreach_sqrt_(denom)
    torch._foreach_addcdiv_(p, grad_avg, denom, [-x for x in lr] if isinstance(lr, list) else -lr)

@script
def softsign_jit_step(p:List[Tensor], g:List[Tensor], grad_avg:List[Tensor], decay:List[float], l2:List[float], mom:List[float],
                      damp:List[float], lr:List[float], eps:List[float]):
    for i in range(len(p)):
        p[i].mul_(decay[i])
        grad_avg[i].mul_(mom[i]).add_(g[i].add(p[i], alpha=l2[i]), alpha=damp[i])
        p[i].addcdiv_(grad_avg[i], grad_avg[i].square().add_(eps[i]).sqrt_(), value=-lr[i])

class SoftsignForEachOptimizer(ForEachOptimizer):
    __init__ = partialmethod(ForEachOptimizer.__init__, opt_step=softsign_foreach_step)

def Softsign(params, lr, mom:float=.9, eps:float=1e-2, wd:float=0., decouple_wd:bool=True, foreach:bool=False, jit:bool=False, fused:bool=False):
    "The dummy"
    return fused_module._build('Softsign', **locals())

OPTIMIZERS['Softsign'] = OptimizerSpec('Softsign', native, softsign, steps=dict(foreach=softsign_foreach_step, jit=softsign_jit_step))
foreach_module.SoftsignForEachOptimizer = SoftsignForEachOptimizer
fused_module.Softsign, fused_module.softsign = Softsign, fused_module._helper(Softsign)
