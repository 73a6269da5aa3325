"""Collect in `wheels` what a machine needs for examples/gpu_check.py that has PyTorch, Numba, timm, transformers and no package index:
fastai and what it imports, in the versions that are installed here, and fastxtend itself"""
import re, subprocess, sys
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement

# What comes with PyTorch, Numba, timm and transformers, or with what they are used with. (spaCy is needed for text only.)
THERE = {'torch', 'torchvision', 'triton', 'numba', 'numpy', 'timm', 'transformers', 'pandas', 'matplotlib', 'pillow', 'scipy', 'scikit-learn',
         'requests', 'pyyaml', 'packaging', 'rich', 'typing-extensions', 'python-dateutil', 'spacy'}

def name_of(name): return re.sub('[-_.]+', '-', name).lower()

def needed(package, python='3.12'):
    "`package` and all it requires, but for what is there"
    todo, found = [package], {}
    while todo:
        name = name_of(todo.pop())
        if name in THERE or name in found: continue
        try: found[name] = version(name)
        except PackageNotFoundError: continue
        for r in map(Requirement, requires(name) or []):
            if not r.marker or r.marker.evaluate({'extra': '', 'python_version': python, 'python_full_version': f'{python}.0'}): todo.append(r.name)
    return found

def main(folder='wheels', python='3.12'):
    Path(folder).mkdir(exist_ok=True)
    for old in Path(folder).glob('*.whl'): old.unlink() # two versions of one package stop the installation
    names = [f'{n}=={v}' for n,v in needed('fastai', python).items()]
    pip = [sys.executable, '-m', 'pip', '--quiet', '--disable-pip-version-check']
    subprocess.run([*pip, 'download', '--no-deps', '--only-binary=:all:', '--python-version', python, '-d', folder, *names], check=True)
    subprocess.run([*pip, 'wheel', '--no-deps', '--no-build-isolation', '-w', folder, '.'], check=True)
    files = sorted(Path(folder).glob('*.whl'))
    print('\n'.join(f.name for f in files))
    print(f"{len(files)} wheels, {sum(f.stat().st_size for f in files)/2**20:.1f} MB, in {folder}. There: python -m pip install --no-index --no-deps --target site {folder}/*.whl")

if __name__ == '__main__': main(*sys.argv[1:])
