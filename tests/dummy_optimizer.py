"""An optimizer that nobody needs, declared as a new one would be: a stepper and a constructor, and fastai's way of it to compare with.
`pytest -p dummy_optimizer` puts it through all tests that the table drives."""
from functools import partial

from fastai import optimizer as fai
from fastxtend.optimizer.declare import helper, optimizer
from fastxtend.optimizer.steppers import apply, average_grad, decay, sqrt, stepper

def native_step(p, lr, eps, grad_avg, **kwargs):
    p.data.addcdiv_(grad_avg, grad_avg.square().add_(eps).sqrt_(), value=-lr)

def native(params, lr, mom, eps, wd, decouple_wd):
    cbs = [fai.weight_decay if decouple_wd else fai.l2_reg, partial(fai.average_grad, dampening=True), native_step]
    return fai.Optimizer(params, cbs, lr=lr, mom=mom, eps=eps, wd=wd)

@stepper('update', role='update')
def softsign_step(grad_avg, lr, eps):
    "A smooth sign of the averaged gradient"
    return lr*grad_avg/sqrt(grad_avg*grad_avg + eps)

@optimizer(native=native)
def Softsign(params, lr, mom:float=.9, eps:float=1e-2, wd:float=0., decouple_wd:bool=True):
    "The dummy"
    return [decay(decouple_wd), average_grad, softsign_step, apply]

softsign = helper(Softsign)
