"The package metadata is written in two places, and both have to say the same"
import ast, json, os, re, shutil, subprocess, sys
from configparser import ConfigParser
from pathlib import Path

import pytest

root = Path(__file__).parent.parent

@pytest.fixture(scope='module')
def settings():
    config = ConfigParser(delimiters=['='])
    config.read(root/'settings.ini', encoding='utf-8')
    return config['DEFAULT']

@pytest.fixture(scope='module')
def pyproject():
    tomllib = pytest.importorskip('tomllib', reason="Python 3.10 cannot read pyproject.toml")
    return tomllib.loads((root/'pyproject.toml').read_text(encoding='utf-8'))

def test_settings_and_pyproject_agree(settings, pyproject):
    project, nbdev = pyproject['project'], pyproject['tool']['nbdev']
    assert project['name'] == nbdev['lib_path'] == settings['lib_name']
    assert project['description'] == settings['description']
    assert project['requires-python'] == f">={settings['min_python']}"
    assert project['keywords'] == settings['keywords'].split()
    assert [a['name'] for a in project['authors']] == [settings['author']]
    assert project['urls']['Repository'] == settings['git_url']
    assert nbdev['update_pyproject'] is False

def test_version_agrees(settings):
    tree = ast.parse((root/'fastxtend/__init__.py').read_text(encoding='utf-8'))
    versions = [o.value.value for o in tree.body if isinstance(o, ast.Assign) and o.targets[0].id == '__version__']
    assert versions == [settings['version']]

@pytest.fixture(scope='module')
def metadata(tmp_path_factory):
    "What setup.py and pyproject.toml make of it together: fields of the package's metadata, and its entry points"
    tmp = tmp_path_factory.mktemp('egg')
    subprocess.run([sys.executable, 'setup.py', '-q', 'egg_info', '--egg-base', tmp], cwd=root, check=True, capture_output=True)
    info = next(tmp.glob('*.egg-info'))
    entries = ConfigParser(delimiters=['='])
    entries.read(info/'entry_points.txt', encoding='utf-8')
    return (info/'PKG-INFO').read_text(encoding='utf-8').split('\n\n')[0], entries

def test_what_is_built(settings, metadata):
    fields, entries = metadata
    for field in (f"Name: {settings['lib_name']}", f"Version: {settings['version']}", f"Summary: {settings['description']}",
                  f"Requires-Python: >={settings['min_python']}", 'License: Apache-2.0'):
        assert re.search(f'^{re.escape(field)}$', fields.replace('License-Expression', 'License'), re.M), field
    assert set(re.findall('^Provides-Extra: (.*)$', fields, re.M)) == {'fused', 'bench', 'docs', 'test', 'dev', 'all'}
    for requirement in settings['requirements'].split(): assert requirement in fields
    assert dict(entries['nbdev']) == {'fastxtend': 'fastxtend._modidx:d'}
    scripts = dict(o.split('=') for o in settings['console_scripts'].split())
    assert (dict(entries['console_scripts']) if scripts else {}) == scripts

def test_console_scripts_exist(settings):
    for script in settings['console_scripts'].split():
        module, name = script.split('=')[1].split(':')
        tree = ast.parse((root/f"{module.replace('.', '/')}.py").read_text(encoding='utf-8'))
        assert name in {getattr(o, 'name', None) for o in tree.body}, script

def test_every_requirement_is_pinned(settings):
    "`constraints.txt` says which versions of what we ask for are tested"
    pinned = {l.split('==')[0].lower() for l in (root/'constraints.txt').read_text().splitlines() if '==' in l}
    asked = ' '.join(settings[k] for k in settings if k.endswith('requirements') and not k.startswith('docs')).split()
    missing = {re.split('[<>=]', o)[0].lower() for o in asked} - pinned
    assert not missing

def test_oldest_are_the_lower_bounds(settings):
    "`.ci/oldest.txt` pins what the package declares as lowest"
    oldest = dict(l.split('==') for l in (root/'.ci/oldest.txt').read_text().splitlines() if '==' in l)
    for requirement in (settings['requirements'] + ' ' + settings['fused_requirements']).split():
        name, bound = requirement.split('>=')
        assert oldest[name].startswith(bound), requirement

@pytest.mark.parametrize('nb', sorted((root/'nbs').glob('*.ipynb')), ids=lambda o: o.name)
def test_notebook_names(nb):
    "Modules and notebooks have the same names"
    cells = json.loads(nb.read_text(encoding='utf-8'))['cells']
    exports = re.findall(r'^#\|\s*default_exp\s+(\S+)', '\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'code'), re.M)
    if exports: assert exports in ([nb.stem], [f'{nb.stem}.__init__'], [f'{nb.stem}.__main__'])
    assert not nb.name[0].isdigit()

def run_in(tmp, *cmd, **env):
    "Run `cmd` in the folder `tmp`"
    return subprocess.run(cmd, cwd=tmp, capture_output=True, text=True, env={**os.environ, **env})

@pytest.fixture
def project(tmp_path):
    "A small nbdev project in git with our sync check"
    pytest.importorskip('nbdev')
    for name in ('pyproject.toml', '.ci/sync', '.ci/readme.py', '.ci/outputs.py', 'nbs/index.ipynb', 'nbs/basics.ipynb', 'fastxtend/__init__.py'):
        (tmp_path/name).parent.mkdir(exist_ok=True)
        shutil.copy(root/name, tmp_path/name)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    def run(*cmd, CI=''): return run_in(tmp_path, *cmd, PATH=path, CI=CI, PYTHONDONTWRITEBYTECODE='1', IN_TEST='')
    def commit():
        assert run('git', 'add', '-A').returncode == 0
        assert run('git', '-c', 'user.name=t', '-c', 'user.email=t@t', 'commit', '-qm', 'all').returncode == 0
    run('git', 'init', '-q')
    run('nbdev-clean')
    run('nbdev-export')
    run('python', '.ci/readme.py')
    commit()
    return tmp_path, run, commit

def test_sync(project):
    path, run, commit = project
    def sync(**env):
        res = run('bash', '.ci/sync', **env)
        return res.returncode, res.stdout + res.stderr
    assert sync(CI='true') == (0, 'sync: modules, README.md and notebooks agree\n')

    module, readme, page = path/'fastxtend/basics.py', path/'README.md', path/'nbs/basics.ipynb'
    def change(**cell):
        nb = json.loads(page.read_text())
        code = next(c for c in nb['cells'] if '#| export' in ''.join(c['source']))
        code.update(cell)
        page.write_text(json.dumps(nb, indent=1, ensure_ascii=False, sort_keys=True) + '\n')
        commit()
    change(outputs=[dict(data={'text/plain': ['1']}, metadata={}, output_type='display_data')])
    assert sync(CI='true')[0] == 0 # outputs are no difference

    good = module.read_text()
    module.write_text(good + '# by hand\n')
    code, out = sync()
    assert code == 0 and 'uncommitted' in out and module.read_text().endswith('# by hand\n')
    code, out = sync(CI='true')
    assert code == 1 and 'uncommitted' in out

    commit()
    code, out = sync()
    assert code == 1 and 'fastxtend/basics.py' in out and module.read_text() == good

    commit()
    (path/'fastxtend/gone.py').write_text(good)
    (path/'fastxtend/hand.py').write_text('# written by hand\n')
    commit()
    code, out = sync()
    assert code == 1 and 'fastxtend/gone.py' in out and 'hand.py' not in out

    run('git', 'rm', '-q', '--cached', 'fastxtend/gone.py')
    readme.write_text(readme.read_text() + 'by hand\n')
    commit()
    code, out = sync()
    assert code == 1 and 'README.md' in out

    commit()
    change(source=['#| export\n', 'changed = 1'])
    code, out = sync()
    assert code == 1 and 'fastxtend/basics.py' in out

@pytest.mark.parametrize('output,problem', [
    (None, 'shows nothing'),
    (dict(output_type='stream', name='stderr', text=['a warning']), 'messages'),
    (dict(output_type='execute_result', execution_count=3, data={}, metadata={}), 'numbers of executions'),
    (dict(output_type='display_data', data={'image/png': 'a'*400_000}, metadata={}), 'bytes'),
    (dict(output_type='display_data', data={'text/plain': ['1']}, metadata={}), None)])
def test_outputs_that_do_not_belong_into_a_repository(tmp_path, output, problem):
    sys.path.insert(0, str(root/'.ci'))
    import outputs
    page = tmp_path/'page.ipynb'
    page.write_text(json.dumps(dict(cells=[dict(cell_type='code', source=[], outputs=[output] if output else [])])))
    found = list(outputs.problems(page))
    assert len(found) == (problem is not None) and all(problem in o for o in found)
