"""Muon against Adam, each with the best of some learning rates, on two small trainings: handwritten digits with a ViT, and the text of Python modules
with a character model. `python examples/muon.py tune` tries rates on one seed, `python examples/muon.py` trains on three others with the best of each
and writes benchmarks/muon_training.csv, .md and .png. `python examples/muon.py rate` measures how fast Muon's products are, for benchmarks/muon_rate.md."""
import argparse, csv, importlib.util, warnings
from pathlib import Path
from statistics import median
from time import perf_counter

with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    from fastai.basics import *
    from fastai.callback.all import *
    from sklearn.datasets import load_digits
from torch.utils.flop_counter import FlopCounterMode

from fastxtend.benchmark.models import model_shapes
from fastxtend.benchmark.report import machine, preface
from fastxtend.optimizer.all import adam, muon
from fastxtend.optimizer.muon import coefficients_of, dtype_of_products, is_matrix, orthogonalise

OUT = Path(__file__).parent.parent/'benchmarks'
RATES = dict(adam=(1e-3, 3e-3, 1e-2, 3e-2, 1e-1), muon=(3e-3, 1e-2, 3e-2, 1e-1, 3e-1))
OPTS = dict(adam=adam(wd=.01, fused=True), muon=muon(wd=.01, adam_lr=.1, fused=True)) # what Muon leaves to Adam has a tenth of its rate
SEEDS, TUNING_SEED = (1, 2, 3), 0

class Block(Module):
    "A layer of a transformer"
    def __init__(self, dim, heads, causal):
        self.heads, self.causal = heads, causal
        self.norm1, self.qkv, self.out = nn.LayerNorm(dim), nn.Linear(dim, 3*dim), nn.Linear(dim, dim)
        self.norm2, self.mlp = nn.LayerNorm(dim), nn.Sequential(nn.Linear(dim, 4*dim), nn.GELU(), nn.Linear(4*dim, dim))

    def forward(self, x):
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))

class ViT(Module):
    "A small one: 8 x 8 pixels in 16 patches"
    def __init__(self, dim=64, depth=4):
        self.patches, self.place = nn.Conv2d(1, dim, 2, 2), nn.Parameter(torch.randn(1, 16, dim)*.02)
        self.blocks, self.norm, self.head = nn.Sequential(*(Block(dim, 4, False) for _ in range(depth))), nn.LayerNorm(dim), nn.Linear(dim, 10)
    def forward(self, x): return self.head(self.norm(self.blocks(self.patches(x).flatten(2).mT + self.place).mean(1)))

class CharModel(Module):
    "The next of 96 characters from the last 64"
    def __init__(self, dim=64, depth=3):
        self.chars, self.place = nn.Embedding(96, dim), nn.Parameter(torch.randn(1, 64, dim)*.02)
        self.blocks, self.norm, self.head = nn.Sequential(*(Block(dim, 4, True) for _ in range(depth))), nn.LayerNorm(dim), nn.Linear(dim, 96)
    def forward(self, x): return self.head(self.norm(self.blocks(self.chars(x) + self.place)))

def digits():
    "Images and labels; every fifth is for validation"
    data = load_digits()
    items = list(zip(torch.tensor(data.images, dtype=torch.float32)[:, None]/8 - 1, torch.tensor(data.target)))
    return [o for i,o in enumerate(items) if i % 5], items[::5], 10

def chars():
    "Pieces of the source of Python modules, and each shifted by a character"
    text = ''.join(Path(importlib.util.find_spec(m).origin).read_text(encoding='utf-8') for m in ('argparse', 'ast', 'inspect', 'typing'))
    codes = torch.tensor([min(max(ord(c) - 31, 0), 95) for c in text])
    pieces = codes[:len(codes)//65*65].view(-1, 65)
    items = [(p[:-1], p[1:]) for p in pieces]
    return [o for i,o in enumerate(items) if i % 10], items[::10], 2

TASKS = dict(digits=(digits, ViT), characters=(chars, CharModel))

class Record(Callback):
    "Seconds and loss after each step; validation does not count"
    def before_fit(self): self.rows, self.spent = [], 0.
    def before_train(self): self.start = perf_counter()
    def after_batch(self):
        if self.training: self.rows.append((self.spent + perf_counter() - self.start, self.loss.item()))
    def after_train(self): self.spent += perf_counter() - self.start

def train(task, name, lr, seed, epochs=None):
    "Seconds and losses of steps, and the loss of validation at the end"
    (data, model), record = TASKS[task], Record()
    train_ds, valid_ds, usual = data()
    set_seed(seed)
    dls = DataLoaders.from_dsets(train_ds, valid_ds, bs=64, num_workers=0, device='cpu')
    learn = Learner(dls, model(), loss_func=CrossEntropyLossFlat(), opt_func=OPTS[name], cbs=record)
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(epochs or usual, lr)
        return record.rows, learn.validate()[0]

def tune():
    "The best rate of each, by the loss of validation on one seed"
    best = {}
    for task in TASKS:
        for name,rates in RATES.items():
            losses = {lr: train(task, name, lr, TUNING_SEED)[1] for lr in rates}
            best[task, name] = min(losses, key=losses.get)
            print(task, name, {lr: round(x, 4) for lr,x in losses.items()}, flush=True)
    with open(OUT/'muon_rates.csv', 'w', newline='') as f: csv.writer(f).writerows([('task', 'optimizer', 'lr'), *((*k, lr) for k,lr in best.items())])

def smooth(xs, beta=.95):
    "A moving average without bias"
    res, avg = [], 0.
    for i,x in enumerate(xs, 1): avg = beta*avg + (1 - beta)*x; res.append(avg/(1 - beta**i))
    return res

def rate(models=('ViT-S/16', 'XResNet50', '160x64x64'), rounds=7):
    "Arithmetic of the products of a step in a second, beside that of one large product in the same dtype, in turns"
    lines = []
    for model in models:
        matrices = [m for m in map(torch.randn, model_shapes(model)) if is_matrix(m)]
        products = partial(orthogonalise, matrices, coefficients=coefficients_of('standard', 5))
        a, = torch.randn(1, 2048, 2048).to(dtype_of_products(max(matrices, key=torch.numel)))
        with FlopCounterMode(display=False) as counter: products()
        contest, times = dict(products=(products, counter.get_total_flops()), large=(partial(torch.mm, a, a), 2*2048**3)), dict(products=[], large=[])
        for _ in range(rounds):
            for name,(f,_) in contest.items():
                start = perf_counter()
                f()
                times[name].append(perf_counter() - start)
        ms, (ours, large) = median(times['products'])*1e3, (contest[n][1]/median(ts)/1e9 for n,ts in times.items())
        lines.append(f"| {model} | {str(a.dtype)[6:]} | {contest['products'][1]/1e9:.1f} | {ms:.0f} ms | {ours:.0f} | {large:.0f} | {ours/large:.0%} |")
        print(lines[-1], flush=True)
    (OUT/'muon_rate.md').write_text('\n'.join([*preface("How fast Muon's products are", {**machine(), 'Command': '`python examples/muon.py rate`'},
        "All products of a step, with what is around them (norms, copies to batches and back), and one product of 2048 x 2048 matrices, in turns; medians."),
        "| model | dtype | 10^9 operations | time | 10^9 a second | large product | share |", "| :-- | :-- | --: | --: | --: | --: | --: |", *lines, ""]))

def main():
    "Train with the best rates, in turns, and write results"
    rates = {(r['task'], r['optimizer']): float(r['lr']) for r in csv.DictReader(open(OUT/'muon_rates.csv'))}
    rows, finals = [], {}
    for name in OPTS: train('digits', name, 0., 0, epochs=1) # compiles kernels
    for seed in SEEDS:
        for (task, name),lr in rates.items():
            steps, valid = train(task, name, lr, seed)
            finals.setdefault((task, name), []).append((valid, steps[-1][0]))
            losses = smooth([loss for _,loss in steps])
            rows += [(task, name, lr, seed, i + 1, round(steps[i][0], 4), round(losses[i], 5)) for i in range(len(steps)) if (i + 1) % 5 == 0]
            print(task, name, seed, round(valid, 4), round(steps[-1][0], 2), flush=True)
    with open(OUT/'muon_training.csv', 'w', newline='') as f: csv.writer(f).writerows([('task', 'optimizer', 'lr', 'seed', 'step', 'seconds', 'loss'), *rows])
    table = [f"| {task} | {name} | {rates[task, name]:g} | {' / '.join(f'{v:.4f}' for v,_ in o)} | {' / '.join(f'{s:.1f} s' for _,s in o)} |" for (task, name),o in finals.items()]
    (OUT/'muon_training.md').write_text('\n'.join([
        *preface("Muon and Adam in training", {**machine(), 'Command': '`python examples/muon.py tune`, then `python examples/muon.py`'},
        "Of learning rates a factor of three apart each has the best, by the loss of validation on another seed; then three seeds. Time is of training alone, with `fused=True`."),
        "| training | optimizer | lr | valid loss of three seeds | seconds |", "| :-- | :-- | --: | --: | --: |", *table, ""]))
    plot(rows)

def plot(rows):
    "Losses against steps and against time"
    import matplotlib.pyplot as plt
    fig, axs = plt.subplots(2, 2, figsize=(8, 5.5), layout='constrained', sharey='row')
    for row,task in zip(axs, TASKS):
        for ax,x in zip(row, (4, 5)):
            for name,color in dict(adam='#9a9a9a', muon='#2ca02c').items():
                for seed in SEEDS:
                    curve = [(r[x], r[6]) for r in rows if (r[0], r[1], r[3]) == (task, name, seed)]
                    ax.plot(*zip(*curve), color=color, lw=1, alpha=.8, label=name if seed == SEEDS[0] else None)
            ax.set(yscale='log', xlabel='step' if x == 4 else 'seconds', title=task if x == 4 else None)
        row[0].set_ylabel('training loss'); row[0].legend()
    fig.savefig(OUT/'muon_training.png', dpi=110)

if __name__ == '__main__':
    warnings.simplefilter('ignore')
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('what', nargs='?', choices=['tune', 'rate'])
    {'tune': tune, 'rate': rate, None: main}[parser.parse_args().what]()
