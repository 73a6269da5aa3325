"""Build wheel and sdist, look at what is in them, install the wheel into a new environment, and run README's first example there

`python .ci/dist.py` asks pip for everything (some 7 GB with PyTorch). `--over FOLDER` takes what fastxtend needs from that `site-packages`:
quicker, but blind to a requirement that is missing from settings.ini."""
import argparse, json, re, subprocess, sys, tarfile, tempfile, venv, zipfile
from pathlib import Path

root = Path(__file__).resolve().parent.parent

def run(*cmd, **kwargs):
    "Run `cmd`, show it, and stop if it fails"
    print('+', *cmd, flush=True)
    return subprocess.run([str(o) for o in cmd], check=True, **kwargs)

def build(dist):
    "sdist and wheel in `dist`; the wheel is built from the sdist, so that has all that building takes"
    run(sys.executable, '-m', 'build', '--outdir', dist, root)
    (sdist,), (wheel,) = dist.glob('*.tar.gz'), dist.glob('*.whl')
    return sdist, wheel

def check_files(sdist, wheel):
    "Everything to build with is in the sdist; the wheel has all modules, and nothing but them"
    with tarfile.open(sdist) as tar: sources = {o.partition('/')[2] for o in tar.getnames()}
    missing = {'settings.ini', 'setup.py', 'pyproject.toml', 'README.md', 'LICENSE', 'MANIFEST.in'} - sources
    assert not missing, f'not in the sdist: {missing}'
    files = set(zipfile.ZipFile(wheel).namelist())
    foreign = {o for o in files if not re.match(r'fastxtend(-[\w.]+\.dist-info)?/', o)}
    assert not foreign, f'foreign to the wheel: {foreign}'
    modules = {o.relative_to(root).as_posix() for o in (root/'fastxtend').rglob('*.py')}
    assert modules == {o for o in files if o.endswith('.py')}, f'modules that differ: {modules ^ {o for o in files if o.endswith(".py")}}'
    assert any(o.endswith('/licenses/LICENSE') for o in files), 'no license in the wheel'
    assert 'fastxtend/py.typed' in files, 'no py.typed in the wheel'

def install(wheel, env, over):
    "New environment `env` with the wheel, its `fused` extra and a Jupyter kernel. Returns the folder of its programs"
    venv.create(env, with_pip=True, clear=True)
    bin = env/('Scripts' if sys.platform == 'win32' else 'bin')
    if over:
        packages, = env.glob('lib/python*/site-packages')
        (packages/'over.pth').write_text(f'{Path(over).resolve()}\n')
        run(bin/'python', '-m', 'pip', 'install', '--quiet', '--no-deps', '--ignore-installed', wheel)
    else: run(bin/'python', '-m', 'pip', 'install', '--quiet', f'{wheel}[fused]', '-c', root/'constraints.txt')
    run(bin/'python', '-m', 'pip', 'install', '--quiet', 'nbclient', 'ipykernel')
    return bin

def first_example():
    "The first Python code in README.md"
    return re.search(r'```python\n(.*?)```', (root/'README.md').read_text(encoding='utf-8'), re.S)[1]

def try_out(bin, folder):
    "Run the example as a program and as the only cell of a notebook, and list the models of the benchmark, all in the empty `folder`"
    where = run(bin/'python', '-c', 'import fastxtend; print(fastxtend.__file__)', cwd=folder, capture_output=True, text=True).stdout
    assert Path(where.strip()).resolve().is_relative_to(bin.parent.resolve()), f'fastxtend comes from {where}'
    (folder/'example.py').write_text(first_example(), encoding='utf-8')
    run(bin/'python', 'example.py', cwd=folder)
    cell = dict(cell_type='code', source=first_example(), metadata={}, outputs=[], execution_count=None, id='example')
    nb = dict(cells=[cell], nbformat=4, nbformat_minor=5, metadata=dict(kernelspec=dict(name='python3', display_name='Python 3')))
    (folder/'example.ipynb').write_text(json.dumps(nb), encoding='utf-8')
    run(bin/'python', '-c', 'import nbformat, nbclient; nbclient.NotebookClient(nbformat.read("example.ipynb", 4), timeout=600).execute()', cwd=folder)
    run(bin/'fastxtend-bench', '--list', cwd=folder)

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--over', help="take requirements from this folder of packages")
    parser.add_argument('--dist', type=Path, default=root/'dist', help="where wheel and sdist go (default: dist)")
    args = parser.parse_args()
    for o in [*args.dist.glob('*.whl'), *args.dist.glob('*.tar.gz')]: o.unlink()
    sdist, wheel = build(args.dist)
    check_files(sdist, wheel)
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)/'empty'
        folder.mkdir()
        try_out(install(wheel, Path(tmp)/'env', args.over), folder)
    print(f'{sdist.name} and {wheel.name}: built, installed and tried')
