"The script for a GPU runs from its first line to its last, with Triton's interpreter in the place of a GPU"
import csv, os, re, subprocess, sys
from pathlib import Path

import pytest

from common import has_triton

if not has_triton(): pytest.skip("the kernels need Triton 3.5 or later", allow_module_level=True)

script = Path(__file__).parent.parent/'examples/gpu_check.py'

def run(tmp_path, *args):
    return subprocess.run([sys.executable, script, '--out', tmp_path, *args], capture_output=True, text=True, timeout=600,
                          env={**os.environ, 'OMP_NUM_THREADS': '1', 'MPLBACKEND': 'agg', 'PYTHONPATH': os.pathsep.join(filter(None, sys.path))})

@pytest.mark.slow
def test_every_section(tmp_path):
    done = run(tmp_path, '--interpret', '--optimizers', 'Adam')
    print(done.stdout[-20_000:], done.stderr[-5_000:])
    assert done.returncode == 0
    text = (tmp_path/'gpu.md').read_text()
    sections = re.findall(r'^## (.*)\n\n.*\n\n(.*) \(', text, re.M)
    assert len(sections) == 16 and all(state == 'as it should be' for _,state in sections), sections
    rows = list(csv.DictReader((tmp_path/'gpu.csv').open()))
    assert {r['backend'] for r in rows} == {'native', 'fused'} and all(float(r['device_ms']) > 0 for r in rows)

def test_what_failed_and_what_was_left_out_is_told(tmp_path):
    "Nothing stops the rest: what is known is written, also when the time is over"
    done = run(tmp_path, '--interpret', '--optimizers', 'Adam', '--sections', 'versions,launches,tools', '--budget', '0.01')
    assert done.returncode == 0, done.stderr
    assert (tmp_path/'gpu.md').read_text().count('left out: The time is over') >= 2

def test_without_a_gpu(tmp_path):
    import torch
    if torch.cuda.is_available(): pytest.skip('there is a GPU')
    done = run(tmp_path)
    assert done.returncode == 1 and 'needs a CUDA GPU' in done.stderr and not list(tmp_path.iterdir())
