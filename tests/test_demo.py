"The demo on a small folder of images: what it prints, that it notices a backend that is wrong, and bad input"
import re, runpy, sys
from pathlib import Path

import numpy as np, pytest
from fastai.vision.all import ResBlock, XResNet
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent/'examples'))
import demo

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "Bright and dark images, and one that is none"
    path, rng = tmp_path_factory.mktemp('images'), np.random.default_rng(0)
    for label,level in dict(bright=180, dark=80).items():
        (path/label).mkdir()
        for i in range(24): Image.fromarray(rng.normal(level, 40, (12, 10, 3)).clip(0, 255).astype(np.uint8)).save(path/label/f'{i}.png')
    (path/'dark/broken.png').write_text('not an image')
    return path

@pytest.fixture
def small(monkeypatch):
    "A smaller network, for time"
    monkeypatch.setattr(demo, 'xresnet18', lambda c_in, n_out: XResNet(ResBlock, 1, [1, 1, 1, 1], c_in=c_in, n_out=n_out, widen=.25))

def run(folder, tmp_path, **kwargs): demo.main(data=str(folder), out=str(tmp_path), **{**dict(epochs=1, bs=8, size=16), **kwargs})

def rows(out):
    "Columns of the table, by name"
    return {m[1]: m[2].split() for m in re.finditer(r'^(native, nudged|\w+) +(\d+\.\d{4} .*)$', out, re.M)}

@pytest.mark.parametrize('optimizer', ['adam', 'lamb', 'ranger'])
def test_all_backends_agree(folder, tmp_path, small, capsys, optimizer):
    run(folder, tmp_path, optimizer=optimizer)
    out = capsys.readouterr().out
    assert 'Left out 1 files' in out and 'All backends agree' in out
    assert set(rows(out)) == {*demo.BACKENDS, demo.NUDGED}
    for name in ('foreach', 'jit', 'fused'):
        valid_loss, accuracy, ms, _, speed_up, single, double = rows(out)[name]
        assert float(single) < 1e-2 and float(double) < 1e-11
        assert float(valid_loss) == pytest.approx(float(rows(out)['native'][0]), abs=1e-2)
        assert float(ms) > 0 and speed_up.endswith('x')
    assert Image.open(tmp_path/f'{optimizer}.png').size[0] > 1000

@pytest.mark.parametrize('mistake', [dict(eps=1.01e-5), dict(wd=.0101), dict(sqr_mom=.9901), dict(decouple_wd=False)], ids=str)
def test_a_wrong_backend_is_noticed(folder, tmp_path, small, monkeypatch, capsys, mistake):
    "A hyperparameter that is wrong by a hundredth is not rounding"
    monkeypatch.setattr(demo, 'BACKENDS', dict(native={}, foreach=dict(foreach=True, **mistake)))
    with pytest.raises(SystemExit) as e: run(folder, tmp_path)
    assert e.value.code and 'foreach: not the same as native' in str(e.value.code)

def test_not_a_number_is_noticed():
    diffs = {demo.NUDGED: 1e-3, 'foreach': float('nan'), 'jit': 2e-3, 'fused': 1.}
    assert demo.disagreeing(diffs) == demo.disagreeing(diffs, .01) == ['foreach', 'fused']

def test_a_missing_backend_is_left_out(folder, tmp_path, small, monkeypatch, capsys):
    def no_numba(params): raise ImportError("no Numba here")
    monkeypatch.setattr('fastxtend.optimizer.kernels.check_numba', no_numba)
    run(folder, tmp_path)
    out = capsys.readouterr().out
    assert 'Left out: no Numba here' in out and set(rows(out)) == {'native', 'foreach', 'jit', demo.NUDGED}

def test_digits():
    "All of them, as they are in scikit-learn"
    block, items, c_in = demo.digits_block(8)
    dls = block.dataloaders(items, bs=64, num_workers=0)
    x, y = dls.one_batch()
    assert len(items) == 1797 and c_in == 1 and dls.c == 10 and x.shape == (64, 1, 8, 8)
    image, label = dls.train_ds[0]
    i = block.splitter(items)[0][0]
    digits = demo.load_digits()
    assert int(label) == digits.target[i] and np.array_equal(np.array(image), (digits.images[i]*255/16).astype(np.uint8))

def make(path, *names):
    for name in names:
        (path/name).parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (8, 8)).save(path/name)

@pytest.mark.parametrize('names, message', [
    (None, 'There is no folder'), ([], 'There are no images'), ([f'a/{i}.png' for i in range(30)], 'of one class'),
    (['a/1.png', 'b/1.png'], 'too few')])
def test_bad_folder(tmp_path, names, message):
    path = tmp_path/'images'
    if names is not None: path.mkdir()
    make(path, *(names or []))
    with pytest.raises(SystemExit) as e: run(path, tmp_path/'out')
    assert message in str(e.value.code) and str(path) in str(e.value.code)
    assert not (tmp_path/'out').exists()

def test_unknown_optimizer(folder, tmp_path):
    with pytest.raises(SystemExit, match='There is no optimizer adamw: use one of sgd, '): run(folder, tmp_path, optimizer='adamw')

def test_help_and_exit_status(tmp_path, monkeypatch, capsys):
    def code_of(*args):
        monkeypatch.setattr(sys, 'argv', [demo.__file__, *args])
        with pytest.raises(SystemExit) as e: runpy.run_path(demo.__file__, run_name='__main__')
        return e.value.code
    assert not code_of('--help')
    out = capsys.readouterr().out
    assert '--data' in out and 'subfolder' in out
    assert code_of('--data', str(tmp_path/'none')).startswith('There is no folder')
