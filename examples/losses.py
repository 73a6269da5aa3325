"""Does training end where it ends with fastai's own optimizer, or with an implementation elsewhere? Every optimizer but Muon trains a small
convolutional network on handwritten digits, a tabular model, and a recurrent network on characters of the help texts that come with Python:

    pip install -e ".[fused,peers]" scikit-learn
    python examples/losses.py                        # some ten minutes on two cores; the figures go into benchmarks/
    python examples/losses.py --optimizers Adam,Lion --tasks digits --out .

Each optimizer has the learning rate, of four, whose worst of three seeds is best with `fused=True`, and keeps it with every `way` it is run:
by its oracle, fused, and fused with state in 16 or 8 bits. Where two ways spread over three seeds by as much as they differ, they agree."""
import math, shlex, sys
from contextlib import suppress

import numpy as np, pandas as pd
from fastai.basics import *
from fastcore.script import call_parse
from fastxtend.benchmark.models import look_up
from fastxtend.benchmark.report import machine, preface
from fastxtend.benchmark.steps import CONTESTANTS, Lacking, hypers_of, optimizer_name
from fastxtend.callback.profiler import markdown_table
from fastxtend.optimizer.table import OPTIMIZERS

STEPS, SEEDS, RATES = 300, 3, (1, 5, 20, 100)

# Tasks: from a seed to a model, a loss, what to train on and what to validate on

def split(xs, y, n_valid):
    "Tensors for training and for validation, the same for all seeds"
    idxs = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    return [tuple(x[i] for x in (*xs, y)) for i in (idxs[n_valid:], idxs[:n_valid])]

def digits():
    from sklearn.datasets import load_digits
    x, y = load_digits(return_X_y=True)
    def layer(ni, nf, stride): return nn.Sequential(nn.Conv2d(ni, nf, 3, stride, 1, bias=False), nn.BatchNorm2d(nf), nn.ReLU())
    model = nn.Sequential(layer(1, 12, 2), layer(12, 24, 1), layer(24, 48, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 10))
    return model, F.cross_entropy, *split([torch.from_numpy(x).float().view(-1, 1, 8, 8)/16], torch.from_numpy(y), 400)

def tabular():
    from fastai.tabular.model import TabularModel
    gen = torch.Generator().manual_seed(0)
    cats, conts = torch.randint(0, 50, (6000, 2), generator=gen), torch.randn(6000, 8, generator=gen)
    effects = torch.randn(50, generator=gen)
    y = conts.sum(1, keepdim=True)/2 + conts[:, :1]*effects[cats[:, 0], None] + effects[cats[:, 1], None] + .1*torch.randn(6000, 1, generator=gen)
    return TabularModel([(50, 12), (50, 12)], 8, 1, [128, 64]), F.mse_loss, *split([cats, conts], y, 1000)

class Characters(nn.Module):
    "The next character, from those before it"
    def __init__(self, n, hidden=64):
        super().__init__()
        self.emb, self.rnn, self.out = nn.Embedding(n, 32), nn.GRU(32, hidden, batch_first=True), nn.Linear(hidden, n)
    def forward(self, x): return self.out(self.rnn(self.emb(x))[0]).transpose(1, 2)

def characters(length=16):
    from pydoc_data.topics import topics
    text = '\n'.join(topics[k] for k in sorted(topics))[:100_000]
    vocab = {c: i for i,c in enumerate(sorted({*text}))}
    idxs = torch.tensor([vocab[c] for c in text])
    n = (len(idxs) - 1)//length*length
    return Characters(len(vocab)), F.cross_entropy, *split([idxs[:n].view(-1, length)], idxs[1:n+1].view(-1, length), 300)

TASKS = dict(digits=digits, tabular=tabular, characters=characters)

# Ways: from an optimizer's name, parameters and hyperparameters to an optimizer

def fused(name, params, hypers, **flags): return OPTIMIZERS[name].constructor(params, lr=1., **hypers, fused=True, **flags)

def oracle(name, params, hypers):
    "fastai's optimizer, or else the first implementation elsewhere that is installed"
    if OPTIMIZERS[name].native: return CONTESTANTS['native'].build(name, [params], hypers)
    for contestant in CONTESTANTS.values():
        if contestant.package == 'fastai': continue
        with suppress(Lacking, ImportError, ValueError): return contestant.build(name, [params], hypers)
    raise Lacking(f"No implementation of {name} elsewhere is installed")

WAYS = dict(oracle=oracle, fused=fused, bfloat16=partial(fused, state='bfloat16'), int8=partial(fused, state='int8'))

def schedule(t): return min((t + 1)/(STEPS/10), 1.)*(1 + math.cos(math.pi*t/STEPS))/2

def set_lr(opt, lr):
    if hasattr(opt, 'set_hyper'): opt.set_hyper('lr', lr)
    else:
        for group in opt.param_groups: group['lr'] = lr

def train(
    task:str, # One of `TASKS`
    name:str, # Optimizer
    way:str, # One of `WAYS`
    seed:int, # Of initial weights, batches and dropout
    lr:float, # Greatest learning rate; constant where the optimizer does without a schedule
) -> float: # Loss on what was not trained on
    "One training"
    torch.manual_seed(seed)
    model, loss_func, data, valid = TASKS[task]()
    opt, averages = WAYS[way](name, list(model.parameters()), hypers_of(name)), 'lr_power' in OPTIMIZERS[name].hypers
    gen = torch.Generator().manual_seed(seed)
    for t in range(STEPS):
        idxs = torch.randint(len(data[-1]), (32,), generator=gen)
        *xs, y = (o[idxs] for o in data)
        set_lr(opt, lr if averages else lr*schedule(t))
        loss_func(model(*xs), y).backward()
        opt.step()
        opt.zero_grad()
    if averages:
        opt.eval()
        model(*data[:-1]) # statistics of batch norm at the average
    model.eval()
    with torch.no_grad(): return loss_func(model(*valid[:-1]), valid[-1]).item()

def job(todo):
    "All trainings of an optimizer on a task"
    task, name, ways = todo
    torch.set_num_threads(1)
    natural = OPTIMIZERS[name].lr or 1e-3
    def losses(way, lr): return [train(task, name, way, seed, lr) for seed in range(SEEDS)]
    fused = {natural*r: losses('fused', natural*r) for r in RATES}
    lr = min(fused, key=lambda lr: max(x if math.isfinite(x) else math.inf for x in fused[lr]))
    res = []
    for way in ways:
        with suppress(Lacking):
            found = fused[lr] if way == 'fused' else losses(way, lr)
            res += [dict(task=task, optimizer=name, way=way, lr=lr, seed=seed, loss=loss) for seed,loss in enumerate(found)]
    return res

# Report

METHOD = (f"{STEPS} steps of 32 samples, a warm-up and a cosine schedule (none for Schedule-Free), that of four learning rates whose worst seed is best "
          f"with `fused=True`. Means over {SEEDS} seeds of the loss on samples that were not trained on, and the greatest difference from the mean. Bold: "
          "the losses of this way and those of the oracle do not overlap.")

def apart(a, b): return min(a) > max(b) or min(b) > max(a)

def cell(losses, expected):
    "Mean of some losses and how far they spread"
    mean = np.mean(losses)
    text = f'{mean:.4f} ± {np.abs(np.array(losses) - mean).max():.4f}'
    return f'**{text}**' if expected and apart(losses, expected) else text

def line(name, part, ways):
    "Of one optimizer"
    losses = {w: p.loss.tolist() for w,p in part.groupby('way')}
    return [name, f'{part.lr.iloc[0]:.2g}', *(cell(losses[w], losses.get('oracle')) if w in losses else '' for w in ways)]

def table(df, ways):
    "A line for each optimizer"
    return markdown_table([line(n, part, ways) for n,part in df.groupby('optimizer', sort=False)], ['optimizer', 'lr', *ways])

COLORS = dict(oracle='0.6', fused='tab:blue', bfloat16='tab:green', int8='tab:red')

def plot(df, ways):
    "A dot for each training"
    import matplotlib.pyplot as plt
    tasks, names = df.task.unique(), [*df.optimizer.unique()]
    fig, axs = plt.subplots(len(tasks), 1, figsize=(9, 2.6*len(tasks)), sharex=True, layout='constrained', squeeze=False)
    for ax,task in zip(axs.flat, tasks):
        for i,way in enumerate(ways):
            part = df[(df.task == task) & (df.way == way)]
            x = part.optimizer.map(names.index) + (i - (len(ways) - 1)/2)*.18
            ax.scatter(x, part.loss, s=14, color=COLORS[way], label=way)
        ax.set(ylabel=f'{task}: loss', yscale='log', xticks=range(len(names)))
        ax.grid(axis='x', color='0.92')
        ax.set_axisbelow(True)
        ax.spines[['top', 'right']].set_visible(False)
    axs[-1, 0].set_xticklabels(names, rotation=40, ha='right')
    fig.legend(*axs[0, 0].get_legend_handles_labels(), loc='outside upper center', ncols=len(ways), frameon=False)
    return fig

@call_parse
def main(
    tasks:str=','.join(TASKS), # Tasks, separated by commas
    optimizers:str=','.join(n for n,s in OPTIMIZERS.items() if not s.flags), # Optimizers; Muon is compared by examples/muon.py
    ways:str=','.join(WAYS), # Ways to run them
    jobs:int=2, # Processes
    out:str='benchmarks', # Folder for losses.csv, losses.md and losses.png
):
    "Losses at the end of training, by optimizer and way"
    tasks, optimizers, ways = ([look(o) for o in names.split(',')] for names,look in (
        (tasks, partial(look_up, 'task', known=[*TASKS])), (optimizers, optimizer_name), (ways, partial(look_up, 'way', known=[*WAYS]))))
    results = parallel(job, [(t, o, ways) for o in optimizers for t in tasks], n_workers=jobs, method='spawn', progress=True)
    df, out = pd.DataFrame(results.concat()), Path(out)
    df.to_csv(out/'losses.csv', index=False, float_format='%.6g')
    sections = [f'## {task}\n\n{table(part, ways)}\n' for task,part in df.groupby('task', sort=False)]
    text = '\n'.join([*preface('Where training ends', {**machine('cpu'), 'Command': f'`python examples/losses.py {shlex.join(sys.argv[1:])}`'}, METHOD), *sections])
    (out/'losses.md').write_text(text, encoding='utf-8')
    plot(df, ways).savefig(out/'losses.png', dpi=110)
    print(text)
