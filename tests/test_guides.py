"Whoever follows the guides gets what they promise"
import os, re, subprocess, sys
from pathlib import Path

import pytest
from common import printed
from notebooks import as_script

HERE = Path(__file__).parent

@pytest.mark.parametrize('guide', sorted((HERE.parent/'nbs').glob('guides.*.ipynb')), ids=lambda o: o.stem)
def test_runs_as_it_reads(guide, tmp_path):
    "What a guide shows is a program: no line of it needs what is hidden"
    script = tmp_path/'guide.py'
    script.write_text(code := as_script(guide, hidden=True), encoding='utf-8')
    if 'IPython' in code: pytest.importorskip('IPython') # in a notebook it is there
    run = "import os, runpy, sys; os.chdir(sys.argv[2]); runpy.run_path(sys.argv[1], run_name='__main__'); print('done')"
    assert printed(run, str(script), str(guide.parent)) == 'done'

def run_pytest(*args, **env):
    "Run tests with the optimizer of the guide in the table; the number of those that passed"
    env = {**os.environ, 'PYTHONPATH': os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get('PYTHONPATH', '')]), **env}
    res = subprocess.run([sys.executable, '-m', 'pytest', '-p', 'guide_optimizer', '-p', 'no:cacheprovider', '-q', '-k', 'CalmAdam', *args],
                         cwd=HERE.parent, env=env, capture_output=True, text=True, timeout=600)
    assert res.returncode == 0, res.stdout[-5000:] + res.stderr[-2000:]
    assert 'failed' not in res.stdout
    return int(re.search(r'(\d+) passed', res.stdout)[1])

@pytest.mark.slow
def test_own_optimizer():
    "The optimizer of the guide goes through the same comparisons, on all its backends, as those of the library"
    assert run_pytest(*(str(HERE/f'test_{o}.py') for o in ('parity', 'state', 'calls', 'table', 'bad_input', 'conformance'))) > 150

@pytest.mark.slow
def test_own_optimizer_on_cuda():
    "and its steppers through Triton's interpreter"
    try: import fastxtend.optimizer.cuda
    except ImportError as e: pytest.skip(str(e))
    assert run_pytest(str(HERE/'test_triton.py'), TRITON_INTERPRET='1') >= 5
