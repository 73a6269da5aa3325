"""Does state in 16 or 8 bits drift? Every optimizer takes 20,000 steps on a noisy quadratic, eight times at once, with state in float32 and in
the other formats, from the same weights and with the same noise:

    pip install -e ".[fused]"
    python examples/drift.py                        # about ten minutes on two cores; the figures go into benchmarks/
    python examples/drift.py --optimizers Adam,Lion --steps 2000 --out /tmp
"""
import numpy as np, pandas as pd
from fastai.basics import *
from fastcore.script import call_parse
from fastxtend.benchmark.report import machine, preface
from fastxtend.benchmark.steps import hypers_of, optimizer_name
from fastxtend.callback.profiler import markdown_table
from fastxtend.optimizer.table import OPTIMIZERS

WAYS = {'float32': {}, 'bfloat16': dict(state='bfloat16'), 'int8': dict(state='int8')}
SIZE, SEEDS, STEPS = 4096, 8, 20_000 # Elements of a quadratic, the fewest that int8 is for; how many there are; steps

def drift(
    name:str, # Optimizer
    flags:dict, # How its state is kept
    steps:int, # How many
    **hypers, # Instead of its defaults
) -> np.ndarray: # (seeds,): the mean loss of the last tenth of the steps
    "One training. Curvatures go from 1 to 1/1000, and a gradient has noise of the size of a weight"
    torch.manual_seed(0)
    curvature = torch.logspace(0, -3, SIZE)[torch.randperm(SIZE)]
    params = [torch.randn(SIZE) for _ in range(SEEDS)]
    for p in params: p.grad = torch.empty_like(p)
    weights, grads = torch.empty(SEEDS, SIZE), torch.empty(SEEDS, SIZE)
    for i,p in enumerate(params): weights[i], p.data, p.grad = p, weights[i], grads[i]
    lr, averages = (OPTIMIZERS[name].lr or 1e-3)*LRS.get(name, 5), 'lr_power' in OPTIMIZERS[name].hypers
    opt = OPTIMIZERS[name].constructor(params, lr, **{**hypers_of(name), 'wd': 0., **hypers}, fused=True, **flags)
    found = []
    for t in range(steps):
        if not averages: opt.set_hyper('lr', lr*(1 - t/steps))
        torch.addcmul(torch.randn(SEEDS, SIZE), weights, curvature, out=grads)
        opt.step()
        if t >= .9*steps and t % 10 == 0:
            if averages: opt.eval()
            found.append((weights.square()*curvature).sum(1)/2)
            if averages: opt.train()
    return torch.stack(found).mean(0).double().numpy()

LRS = dict(SGD=10, RMSProp=1, Larc=200, Prodigy=1) # Times the natural learning rate

CASES = [*((n, {}) for n in OPTIMIZERS), ('Adam', dict(sqr_mom=.999))]

def job(todo):
    "A case in all formats"
    (name, hypers), steps = todo
    torch.set_num_threads(1)
    title = ', '.join([name, *(f'{k}={v}' for k,v in hypers.items())])
    return [dict(optimizer=title, state=way, seed=i, loss=loss) for way,flags in WAYS.items() for i,loss in enumerate(drift(name, flags, steps, **hypers))]

METHOD = (f"A quadratic of {SIZE:,} elements with curvatures from 1 to 1/1000, and gradients with normal noise; a learning rate that falls to zero. Mean loss of the last "
          f"tenth of the steps over {SEEDS} seeds, and the standard deviation between seeds; behind it, how far the mean is from that of float32, in standard deviations between seeds. "
          "Weights, gradients and noise are float32 and the same for all formats.")

def line(name, part):
    "Of one case"
    losses = {w: p.loss.to_numpy() for w,p in part.groupby('state', sort=False)}
    own = losses['float32']
    cells = [f'{x.mean():.4g}' + (f' ± {x.std(ddof=1):.2g}' if w == 'float32' else f' ({(x.mean() - own.mean())/own.std(ddof=1):+.2f})') for w,x in losses.items()]
    return [name, *cells]

def plot(df):
    "Losses as shares of the mean in float32"
    import matplotlib.pyplot as plt
    names, fig = [*df.optimizer.unique()], plt.figure(figsize=(9, 3.6), layout='constrained')
    ax = fig.gca()
    mean = df[df.state == 'float32'].groupby('optimizer').loss.mean()
    for i,(way,color) in enumerate(zip(WAYS, ('0.6', 'tab:green', 'tab:red'))):
        part = df[df.state == way]
        ax.scatter(part.optimizer.map(names.index) + (i - 1)*.2, part.loss/part.optimizer.map(mean), s=9, color=color, label=way)
    ax.set(ylabel='final loss / float32', xticks=range(len(names)))
    ax.set_xticklabels(names, rotation=40, ha='right')
    ax.grid(axis='x', color='0.92')
    ax.set_axisbelow(True)
    ax.spines[['top', 'right']].set_visible(False)
    fig.legend(loc='outside upper center', ncols=len(WAYS), frameon=False)
    return fig

@call_parse
def main(
    optimizers:str='', # Optimizers, separated by commas; all if not given
    steps:int=STEPS, # Of each training
    jobs:int=2, # Processes
    out:str='benchmarks', # Folder for drift.csv, drift.md and drift.png
):
    "Final losses with state in float32, bfloat16 and int8"
    names = [optimizer_name(o) for o in optimizers.split(',') if o]
    cases = [c for c in CASES if not names or c[0] in names]
    df, out = pd.DataFrame(parallel(job, [(c, steps) for c in cases], n_workers=jobs, method='spawn', progress=True).concat()), Path(out)
    df.to_csv(out/'drift.csv', index=False, float_format='%.6g')
    table = markdown_table([line(n, part) for n,part in df.groupby('optimizer', sort=False)], ['optimizer', *WAYS])
    text = '\n'.join([*preface('Does state in fewer bits drift?', {**machine('cpu'), 'Steps': f'{steps:,}', 'Command': '`python examples/drift.py`'}, METHOD), table, ''])
    (out/'drift.md').write_text(text, encoding='utf-8')
    plot(df).savefig(out/'drift.png', dpi=110)
    print(text)
