"""Train on handwritten digits, or on your own images, with all backends of an optimizer, and compare: losses, step times, weights."""
import sys, warnings
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter

with warnings.catch_warnings():
    warnings.simplefilter('ignore')  # fastai and its dependencies warn of each other when they are imported
    from fastai.vision.all import *
    from fastcore.script import call_parse
    from sklearn.datasets import load_digits
from fastxtend.optimizer import fused as optimizers
from fastxtend.optimizer.table import OPTIMIZERS

BACKENDS = dict(native={}, foreach=dict(foreach=True), jit=dict(jit=True), fused=dict(fused=True))
COLORS = dict(native='#9a9a9a', foreach='#1f77b4', jit='#ff7f0e', fused='#2ca02c')

# Training amplifies differences in rounding: in single precision from 1e-7 to some 1e-2 within three epochs. How far it takes them is measured:
# native training is repeated from initial weights that are one unit in the last place away (`NUDGED`), and no backend may end more than
# `MARGIN` times as far from native, or as far as a step of `lr`: it takes one ReLU that is on in one training and off in the other to make
# such a step differ. Single precision would let small mistakes pass, so the first batches are also trained in double
# precision. There nudged weights end 6e-15 away and the backends 3e-15 to 4e-15 (Adam), but with a weight decay of 0.01001 for 0.01 it is 5e-7.
NUDGED, MARGIN, CHECK_BATCHES = 'native, nudged', 10, 10

# Data -------------------------------------------------------------------------------------------------------------------------

def digits_block(size):
    "scikit-learn's 1,797 handwritten digits, their `DataBlock` and the number of channels"
    digits = load_digits()
    images = (digits.images*(255/16)).astype(np.uint8)
    block = DataBlock((ImageBlock(PILImageBW), CategoryBlock(vocab=list(range(10)))), get_x=images.__getitem__,
                      get_y=lambda i: int(digits.target[i]), splitter=RandomSplitter(seed=42), item_tfms=Resize(size))
    return block, range(len(images)), 1

def folder_block(path, size):
    "The images in the subfolders of `path`, each of which is a class, their `DataBlock` and the number of channels"
    path = Path(path)
    if not path.is_dir(): sys.exit(f"There is no folder {path}")
    files = get_image_files(path)
    classes = sorted({f.parent.name for f in files})
    if not files: sys.exit(f"There are no images in {path}: put them into one subfolder for each class")
    if len(classes) < 2: sys.exit(f"All images in {path} are of one class, '{classes[0]}': put them into one subfolder for each class, two or more")
    broken = verify_images(files)
    if broken: print(f"Left out {len(broken)} files that cannot be read as images, such as {broken[0]}")
    files = [f for f in files if f not in set(broken)]
    if len(files) < 20: sys.exit(f"There are {len(files)} readable images in {path}, too few to train and validate on: take 20 or more")
    block = DataBlock((ImageBlock, CategoryBlock(vocab=classes)), get_y=parent_label, splitter=RandomSplitter(seed=42), item_tfms=Resize(size))
    return block, files, 3

# Training ---------------------------------------------------------------------------------------------------------------------

class StepTimes(Callback):
    "Seconds that each optimizer step takes"
    def before_fit(self): self.times = []
    def before_step(self): self.start = self.now()
    def after_step(self): self.times.append(self.now() - self.start)
    def now(self):
        if self.dls.device.type == 'cuda': torch.cuda.synchronize()
        return perf_counter()

class DoubleInput(Callback):
    "Images in double precision"
    def before_batch(self): self.learn.xb = tuple(x.double() for x in self.xb)

class StopAfter(Callback):
    "End training after `n` batches"
    def __init__(self, n): self.n = n
    def after_batch(self):
        if self.training and self.learn.train_iter >= self.n: raise CancelFitException()

def nudge(model):
    "Move each weight by one unit in the last place, up or down at random; zeros stay zero"
    gen = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters(): p.mul_(1 + torch.finfo(p.dtype).eps*(2.*torch.randint(0, 2, p.shape, generator=gen, dtype=p.dtype) - 1))

@dataclass
class Run:
    "What is left of a training"
    params:list # Final weights
    losses:list # Smoothed training loss of each batch
    valid_loss:float # After the last epoch
    accuracy:float # After the last epoch
    step_ms:float # Median time of an optimizer step

def learner(data, opt_func, bs, seed, nudged=False, double=False):
    "The same `Learner` each time, but for what the arguments say"
    block, items, c_in = data
    set_seed(seed, reproducible=True)
    dls = block.dataloaders(items, bs=bs, num_workers=0)
    model = xresnet18(c_in=c_in, n_out=dls.c)
    if double: model.double()
    if nudged: nudge(model)
    return Learner(dls, model, loss_func=CrossEntropyLossFlat(), metrics=accuracy, opt_func=opt_func, cbs=[StepTimes(), *([DoubleInput()]*double)])

def final_params(learn): return [p.detach().cpu() for p in learn.model.parameters()]

def train(learn, epochs, lr):
    "Train with fastai's progress bar, or a line for each epoch if this is no terminal"
    with nullcontext() if sys.stdout.isatty() else learn.no_bar(): learn.fit_one_cycle(epochs, lr)
    valid_loss, acc = learn.recorder.values[-1][-2:]
    return Run(final_params(learn), [float(o) for o in learn.recorder.losses], valid_loss, acc, median(learn.step_times.times)*1e3)

def first_batches(learn, epochs, lr):
    "Weights after `CHECK_BATCHES` batches of the same training"
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs, lr, cbs=StopAfter(CHECK_BATCHES))
    return final_params(learn)

# Comparison -------------------------------------------------------------------------------------------------------------------

def difference(a, b): return max(float((x - y).abs().max()) for x,y in zip(a, b))

def differences(params):
    "Greatest difference of a weight from native's in each of the runs"
    return {name: difference(params['native'], ps) for name,ps in params.items() if name != 'native'}

def disagreeing(diffs, least=0.):
    "Backends that are farther from native than rounding can explain"
    return [n for n,d in diffs.items() if n != NUDGED and not d <= MARGIN*max(diffs[NUDGED], least)]  # also if `d` is NaN

def table(runs, single, double):
    "All figures as lines of text"
    yield f"{'':15}{'valid loss':>12}{'accuracy':>10}{'step':>10}{'speed-up':>10}{'difference':>13}{'in double':>12}"
    for name,run in runs.items():
        own = ['', ''] if name == NUDGED else [f'{run.step_ms:.1f} ms', f"{runs['native'].step_ms/run.step_ms:.2f}x"]
        diffs = ['', ''] if name == 'native' else [f'{single[name]:.1e}', f'{double[name]:.1e}']
        yield f"{name:15}{run.valid_loss:12.4f}{run.accuracy:10.1%}{own[0]:>10}{own[1]:>10}{diffs[0]:>13}{diffs[1]:>12}"

def plot(runs, title, file):
    "Loss curves and step times"
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout='constrained', width_ratios=(3, 2))
    for i,(name,run) in enumerate(runs.items()):  # the curves lie on each other: wide ones below, narrow ones above
        left.plot(run.losses, color=COLORS[name], lw=9 - 2.5*i, label=name, solid_capstyle='round')
    left.set(xlabel='batch', ylabel='training loss (smoothed)', ylim=(0, None), title='The same training')
    left.legend(frameon=False)
    times = [run.step_ms for run in runs.values()]
    bars = right.barh(list(runs), times, color=[COLORS[n] for n in runs])
    right.bar_label(bars, [f' {t:.1f} ms ({times[0]/t:.1f}x)' for t in times])
    right.set(xlabel='optimizer step (median, ms)', xlim=(0, 1.35*max(times)), title='Less time for the optimizer')
    right.invert_yaxis()
    for ax in (left, right): ax.spines[['top', 'right']].set_visible(False)
    fig.suptitle(title)
    fig.savefig(file, dpi=120)

# The demo ---------------------------------------------------------------------------------------------------------------------

@call_parse
def main(
    data:str=None, # Folder of images with a subfolder for each class, instead of the digits
    optimizer:str='adam', # sgd, rmsprop, adam, radam, qhadam, larc, lamb or ranger
    epochs:int=3, # Number of epochs
    lr:float=3e-3, # Highest learning rate of the one-cycle schedule
    bs:int=64, # Batch size
    size:int=None, # Images are resized to this many pixels a side: 16 for the digits, 64 for a folder
    seed:int=42, # Of weights and batches
    out:str='demo_out', # Folder for the plot
):
    "Train a small XResNet with all backends of an optimizer, and compare them. Exits with 1 if one differs from native by more than rounding"
    if optimizer not in map(str.lower, OPTIMIZERS): sys.exit(f"There is no optimizer {optimizer}: use one of {', '.join(OPTIMIZERS).lower()}")
    source = folder_block(data, size or 64) if data else digits_block(size or 16)
    helper = getattr(optimizers, optimizer)
    opt_funcs = {name: helper(**flags) for name,flags in BACKENDS.items()}
    runs, checks = {}, {}
    for name,opt_func in {**opt_funcs, NUDGED: opt_funcs['native']}.items():
        build = partial(learner, source, opt_func, min(bs, len(source[1])//4), seed, nudged=name == NUDGED)
        print(f'\n{optimizer}, {name}')
        try: runs[name] = train(build(), epochs, lr)
        except (ImportError, NotImplementedError) as e: print(f'Left out: {e}')
        else: checks[name] = first_batches(build(double=True), epochs, lr)
    single, double = differences({n: r.params for n,r in runs.items()}), differences(checks)
    print('', *table(runs, single, double), '', sep='\n')
    print(f'difference: the greatest of all weights, between a training and native\'s; in double: after {CHECK_BATCHES} batches in double precision\n'
          f'{NUDGED}: from initial weights that are one unit in the last place away, which shows what rounding alone does')
    Path(out).mkdir(parents=True, exist_ok=True)
    file = Path(out)/f'{optimizer}.png'
    plot({n: r for n,r in runs.items() if n != NUDGED}, f'{optimizer} on {Path(data).name if data else "handwritten digits"}, xresnet18', file)
    print(f'Plot: {file}')
    wrong = sorted({*disagreeing(single, lr), *disagreeing(double)})
    if wrong: sys.exit(f"{', '.join(wrong)}: not the same as native, by more than {MARGIN} times what rounding does")
    print(f"All backends agree with native: within {MARGIN} times what rounding does")
