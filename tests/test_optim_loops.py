"`fastxtend.optim` in the loops of others: Accelerate, Hugging Face's Trainer, fastai"
import pytest, torch
from fastxtend import optim as ours
from torch import nn

def data():
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(64, 4, generator=gen)
    return x, x.sin().sum(1, keepdim=True)

def new_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))

BOTH = dict(ours=lambda ps: ours.AdamW(ps, lr=1e-2, weight_decay=.1), theirs=lambda ps: torch.optim.AdamW(ps, lr=1e-2, weight_decay=.1))

def agree(train):
    "Does training end where it does with PyTorch's?"
    a, b = (list(train(make)) for make in BOTH.values())
    assert a and any(not torch.equal(p, q) for p,q in zip(a, new_model().parameters()))
    for p,q in zip(a, b, strict=True): torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)

def test_accelerate(tmp_path):
    "Prepared, scheduled, clipped, accumulated, saved and loaded"
    accelerate = pytest.importorskip('accelerate')
    def train(make):
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = new_model()
        opt = make(model.parameters())
        dl = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data()), batch_size=8)
        model, opt, dl, sched = accelerator.prepare(model, opt, dl, torch.optim.lr_scheduler.StepLR(opt, 2))
        def epoch():
            for x,y in dl:
                with accelerator.accumulate(model):
                    accelerator.backward((model(x) - y).square().mean())
                    if accelerator.sync_gradients: accelerator.clip_grad_norm_(model.parameters(), 1.)
                    opt.step(), sched.step(), opt.zero_grad()
        epoch()
        accelerator.save_state(str(tmp_path/'state'))
        epoch()
        after = [p.detach().clone() for p in model.parameters()]
        accelerator.load_state(str(tmp_path/'state'))
        epoch()
        for p,q in zip(model.parameters(), after): torch.testing.assert_close(p.detach(), q, rtol=0, atol=0)
        return model.parameters()
    agree(train)

class Loss(nn.Module):
    "A model as `Trainer` wants it"
    def __init__(self):
        super().__init__()
        self.model = new_model()
    def forward(self, x, labels):
        out = self.model(x)
        return dict(loss=(out - labels).square().mean(), logits=out)

def test_trainer(tmp_path):
    "With a schedule; stopped and resumed"
    pytest.importorskip('accelerate')
    transformers = pytest.importorskip('transformers')
    ds = [dict(x=x, labels=y) for x,y in zip(*data())]
    def train(make):
        def trainer(model, steps):
            opt = make(model.parameters())
            args = transformers.TrainingArguments(str(tmp_path/opt.__module__), max_steps=steps, per_device_train_batch_size=8, use_cpu=True, report_to=[], save_steps=4, disable_tqdm=True)
            return transformers.Trainer(model, args, train_dataset=ds, optimizers=(opt, torch.optim.lr_scheduler.LinearLR(opt, 1., .1, 8)))
        trainer(Loss(), 4).train()
        resumed, whole = Loss(), Loss()
        trainer(resumed, 8).train(resume_from_checkpoint=True)
        trainer(whole, 8).train()
        for p,q in zip(resumed.parameters(), whole.parameters()): torch.testing.assert_close(p, q)
        return resumed.model.parameters()
    agree(train)

def test_fastai():
    "With discriminative learning rates, freezing, no decay for some, and a schedule"
    from fastai.basics import DataLoader, DataLoaders, Learner, MSELossFlat
    import fastai.callback.schedule
    from fastxtend.optimizer.wrapper import torch_opt
    def train(make):
        cls = type(make([nn.Parameter(torch.zeros(1))]))
        x, y = data()
        dl = DataLoader(list(zip(x, y)), bs=16)
        learn = Learner(DataLoaders(dl, dl), new_model(), MSELossFlat(), opt_func=torch_opt(cls, weight_decay=.1), splitter=lambda m: [list(m[0].parameters()), list(m[2].parameters())], wd_bn_bias=True)
        with learn.no_bar(), learn.no_logging():
            learn.freeze()
            learn.fit_one_cycle(1, 1e-2)
            learn.unfreeze()
            learn.fit_one_cycle(2, slice(1e-3, 1e-2))
        return learn.model.parameters()
    agree(train)
