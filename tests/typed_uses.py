"""Typical uses, for type checkers: `make types` looks at it, and nothing runs it. A checker has to complain about the lines with `pyright: ignore`, and about no others"""
from functools import partial

import torch
from fastai.basics import DataLoaders, Learner
from torch import Tensor, nn
from typing_extensions import assert_type

from fastxtend import optim
from fastxtend.basics import EMACallback, FusedLookahead, FusedOptimizer, GradientClip, Larc, Lion, Ranger, SGDForEachOptimizer, TorchOptimizer
from fastxtend.basics import adam, cautious, lion, lookahead, ranger, torch_opt
from fastxtend.optimizer.all import SGD, Adam
from fastxtend.optimizer.report import Report
from fastxtend.vision.all import Adam as Adam_

def train(dls: DataLoaders, model: nn.Module):
    "What goes to `Learner`"
    Learner(dls, model, opt_func=adam(fused=True), cbs=[GradientClip(1.), EMACallback()])
    Learner(dls, model, opt_func=ranger(mom=.95, foreach=True))
    Learner(dls, model, opt_func=cautious(lookahead(lion(wd=.2, fused=True), k=5)))
    Learner(dls, model, opt_func=torch_opt(torch.optim.AdamW, fused=True))
    Learner(dls, model, opt_func=partial(Adam, fused=True)) # pyright: ignore[reportArgumentType] (every `partial` in fastai, which asks for optimizers here)
    learn = Learner(dls, model, opt_func=adam(fused=True, state='bfloat16'))
    learn.fit_one_cycle(1, 1e-3)

def build(model: nn.Module, head: nn.Module):
    "What is built follows from the flags"
    opt = Adam(model.parameters(), lr=1e-3, wd=.1, fused=True, state='bfloat16')
    assert_type(opt, FusedOptimizer)
    assert_type(opt.backend_report(), Report)
    assert_type(opt.grad_norm, float | None)
    print(opt.backend_report().details())
    opt.step()
    opt.zero_grad()
    opt.load_state_dict(opt.state_dict())
    groups = [list(model.parameters()), list(head.parameters())]
    assert_type(SGD(groups, [1e-3, 1e-2], mom=[.9, .95], foreach=True), SGDForEachOptimizer)
    assert_type(Ranger(groups, slice(1e-4, 1e-2), k=5, fused=True), FusedLookahead)
    assert_type(Adam_(groups, lr=[1e-3, 1e-2], fused=True), FusedOptimizer)
    assert_type(adam(model.parameters(), 1e-3, fused=True), FusedOptimizer)
    Larc(model.parameters(), 1e-2, trust_coeff=.01, jit=True).set_hyper('mom', .8)
    TorchOptimizer(model.parameters(), torch.optim.NAdam).step()

def outside_fastai(model: nn.Module, x: Tensor):
    "As `torch.optim.Optimizer`s"
    opt = optim.Lion(model.parameters(), lr=1e-4, betas=(.9, .98), weight_decay=.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 10)
    model(x).sum().backward()
    opt.step()
    scheduler.step()
    optim.AdamW(model.parameters(), 1e-3, amsgrad=True, fused=True)

def mistakes(model: nn.Module):
    "What a checker finds"
    Adam(model.parameters(), 1e-3, betas=(.9, .99)) # pyright: ignore[reportCallIssue]
    Adam(model, 1e-3) # pyright: ignore[reportCallIssue, reportArgumentType]
    Adam(model.parameters(), 1e-3, foreach=True, state='bfloat16') # pyright: ignore[reportCallIssue, reportArgumentType]
    Lion(model.parameters(), 1e-4, wd='a lot') # pyright: ignore[reportCallIssue, reportArgumentType]
    adam(weight_decay=.1) # pyright: ignore[reportCallIssue]
    optim.Lion(model.parameters(), beta=.9) # pyright: ignore[reportCallIssue]
