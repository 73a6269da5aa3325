"The package metadata is written in two places, and both have to say the same"
import ast, json, os, re, shutil, subprocess, sys
from configparser import ConfigParser
from pathlib import Path

import pytest

root = Path(__file__).parent.parent
sys.path.insert(0, str(root/'.ci'))

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
    assert 'urls' in project['dynamic'] and 'urls' not in project
    assert nbdev['update_pyproject'] is False

def test_version_agrees(settings):
    tree = ast.parse((root/'fastxtend/__init__.py').read_text(encoding='utf-8'))
    versions = [o.value.value for o in tree.body if isinstance(o, ast.Assign) and o.targets[0].id == '__version__']
    assert versions == [settings['version']]
    citation = (root/'CITATION.cff').read_text(encoding='utf-8')
    assert re.findall('^version: (.*)$', citation, re.M) == [settings['version']]
    assert re.findall('^## ([0-9.]+)$', (root/'CHANGELOG.md').read_text(encoding='utf-8'), re.M)[0] == settings['version']

def test_no_placeholders():
    "What a template leaves to be filled in"
    for name in ('LICENSE', 'CONTRIBUTING.md', 'SECURITY.md', 'CITATION.cff', 'README.md'):
        assert not re.search(r'\[yyyy\]|\[name of|FILL.?IN|TODO|XXX', (root/name).read_text(encoding='utf-8')), name

def test_links_in_the_repository():
    "Files that Markdown in the root links to are there, and so are their headings in Markdown"
    def anchors(text): return {re.sub(r'[^\w -]', '', o).strip().lower().replace(' ', '-') for o in re.findall('^#+ (.*)$', text, re.M)}
    for file in sorted(root.glob('*.md')):
        text = file.read_text(encoding='utf-8')
        for target in re.findall(r'\]\((?!https?:)([^)]+)\)', text):
            name, _, anchor = target.partition('#')
            path = root/name if name else file
            assert path.is_file(), f'{file.name}: {target}'
            if anchor and path.suffix == '.md': assert anchor in anchors(path.read_text(encoding='utf-8')), f'{file.name}: {target}'

@pytest.mark.parametrize('file', sorted([*(root/'.github').rglob('*.yml'), root/'.pre-commit-config.yaml', root/'CITATION.cff']), ids=lambda o: o.name)
def test_yaml_is_read(file):
    yaml = pytest.importorskip('yaml')
    content = yaml.safe_load(file.read_text(encoding='utf-8'))
    assert isinstance(content, dict)
    if file.parent.name == 'workflows': assert content['jobs'] and all('runs-on' in o and 'steps' in o for o in content['jobs'].values())
    if file.parent.name == 'ISSUE_TEMPLATE' and file.name != 'config.yml': assert {'name', 'description', 'body'} <= content.keys()

def test_targets_of_make_exist():
    "What workflows and CONTRIBUTING.md run with make"
    targets = {*re.findall('^([a-z-]+):', (root/'Makefile').read_text(encoding='utf-8'), re.M)}
    files = [*(root/'.github/workflows').glob('*.yml'), root/'CONTRIBUTING.md', root/'README.md']
    asked = {o for f in files for line in re.findall(r'^(?:.*[:`] )?`?make ([a-z -]+?)(?:  |`|$| [A-Z])', f.read_text(encoding='utf-8'), re.M) for o in line.split()}
    assert {'docs', 'oldest', 'coverage', 'test', 'demo', 'setup'} <= asked <= targets

def test_ruff_is_quiet():
    "as in `make lint`"
    ruff = shutil.which('ruff', path=str(Path(sys.executable).parent)) or shutil.which('ruff')
    if not ruff: pytest.skip("ruff is not installed")
    res = subprocess.run([ruff, 'check', 'fastxtend', 'tests', 'examples', '.ci', 'setup.py', '--no-cache'], cwd=root, capture_output=True, text=True)
    assert res.returncode == 0, res.stdout

def built(source, tmp):
    "What setup.py and pyproject.toml in the folder `source` make of it together: fields of the package's metadata, and its entry points"
    subprocess.run([sys.executable, 'setup.py', '-q', 'egg_info', '--egg-base', tmp], cwd=source, check=True, capture_output=True)
    info = next(tmp.glob('*.egg-info'))
    entries = ConfigParser(delimiters=['='])
    entries.read(info/'entry_points.txt', encoding='utf-8')
    return (info/'PKG-INFO').read_text(encoding='utf-8').split('\n\n')[0], (info/'requires.txt').read_text(encoding='utf-8').split(), entries

@pytest.fixture(scope='module')
def metadata(tmp_path_factory): return built(root, tmp_path_factory.mktemp('egg'))

def test_the_earlier_project_is_older(settings):
    "PyPI's fastxtend, another project, ended with 0.1.7: what is ours has to sort above it"
    assert [*map(int, settings['version'].split('.'))] >= [0, 2, 0]

@pytest.mark.parametrize('url', ['', 'https://example.com/some/where'])
def test_one_address(settings, tmp_path, url):
    "The repository's address stands in settings.ini, and metadata and site have it from there, or go without"
    source, egg = tmp_path/'source', tmp_path/'egg'
    egg.mkdir()
    shutil.copytree(root/'fastxtend', source/'fastxtend', ignore=shutil.ignore_patterns('__pycache__'))
    for name in ('setup.py', 'pyproject.toml', 'README.md', 'LICENSE'): shutil.copy(root/name, source/name)
    (source/'settings.ini').write_text(re.sub('(?m)^git_url =.*$', f'git_url = {url}', (root/'settings.ini').read_text(encoding='utf-8')), encoding='utf-8')
    urls = dict(o.split(', ') for o in re.findall('^Project-URL: (.*)$', built(source, egg)[0], re.M))
    assert urls == ({k: url + v for k,v in dict(Repository='', Issues='/issues', Changelog='/blob/main/CHANGELOG.md').items()} if url else {})
    pytest.importorskip('yaml')
    import docs
    config = docs.site_config((root/'nbs/_quarto.yml').read_text(encoding='utf-8'), url)
    assert (url in config and 'repo-url' in config) if url else 'repo-url' not in config

def test_no_address_is_invented(settings):
    "No file has an address of a repository of ours but settings.ini"
    files = subprocess.run(['git', 'ls-files', '-z'], cwd=root, capture_output=True, text=True)
    if files.returncode: pytest.skip("not a git repository")
    found = [o for o in files.stdout.split('\0') if Path(o).suffix not in ('', '.png', '.csv', '.ini', '.pt')
             and re.search(r'git(hub|lab)\.(com|io)/[\w.-]*fastxtend|fastxtend\.github\.io', (root/o).read_text(encoding='utf-8'))]
    assert found == []

def test_what_is_built(settings, metadata):
    fields, required, entries = metadata
    for field in (f"Name: {settings['lib_name']}", f"Version: {settings['version']}", f"Summary: {settings['description']}",
                  f"Requires-Python: >={settings['min_python']}", 'License: Apache-2.0'):
        assert re.search(f'^{re.escape(field)}$', fields.replace('License-Expression', 'License'), re.M), field
    assert set(re.findall('^Provides-Extra: (.*)$', fields, re.M)) == {'fused', 'bench', 'docs', 'peers', 'test', 'dev', 'all'}
    assert required[:len(settings['requirements'].split())] == settings['requirements'].split()
    assert dict(entries['nbdev']) == {'fastxtend': 'fastxtend._modidx:d'}
    scripts = dict(o.split('=') for o in settings['console_scripts'].split())
    assert (dict(entries['console_scripts']) if scripts else {}) == scripts

def test_types_are_published():
    "`py.typed` tells type checkers to read the annotations, in which what can be called is a `Callable`: `callable` is a function"
    assert (root/'fastxtend/py.typed').is_file()
    for path in (root/'fastxtend').rglob('*.py'):
        nodes = [*ast.walk(ast.parse(path.read_text(encoding='utf-8')))]
        annotations = [a for o in nodes for a in (getattr(o, 'annotation', None), getattr(o, 'returns', None)) if a]
        assert not any(getattr(o, 'id', None) == 'callable' for a in annotations for o in ast.walk(a)), path

def test_stubs_are_built(tmp_path):
    "They are in the wheel, beside their modules, and each has all names of a wildcard import"
    subprocess.run([sys.executable, 'setup.py', '-q', 'egg_info', '--egg-base', tmp_path, 'build_py', '--build-lib', tmp_path], cwd=root, check=True, capture_output=True)
    stubs = {p.relative_to(root) for p in (root/'fastxtend').rglob('*.pyi')}
    assert Path('fastxtend/vision/all.pyi') in stubs and all((tmp_path/p).is_file() for p in stubs) and (tmp_path/'fastxtend/py.typed').is_file()
    for p in stubs:
        tree = ast.parse((root/p).read_text(encoding='utf-8')).body
        defined = {n for o in tree for n in ([a.asname or a.name for a in o.names] if isinstance(o, ast.ImportFrom) else [getattr(o, 'name', None) or getattr(getattr(o, 'target', None), 'id', None)])}
        (names,) = [ast.literal_eval(o.value) for o in tree if isinstance(o, ast.Assign)]
        assert set(names) <= defined, p

def test_console_scripts_exist(settings):
    for script in settings['console_scripts'].split():
        module, name = script.split('=')[1].split(':')
        tree = ast.parse((root/f"{module.replace('.', '/')}.py").read_text(encoding='utf-8'))
        assert name in {getattr(o, 'name', None) for o in tree.body}, script

def test_every_requirement_is_pinned(settings):
    "`constraints.txt` says which versions of what we ask for are tested; peers are pinned where they are asked for"
    pinned = {l.split('==')[0].lower() for l in (root/'constraints.txt').read_text().splitlines() if '==' in l}
    asked = ' '.join(settings[k] for k in settings if k.endswith('requirements') and not k.startswith(('docs', 'peers'))).split()
    missing = {re.split('[<>=!]', o)[0].lower() for o in asked} - pinned
    assert not missing

def test_oldest_are_the_lower_bounds(settings):
    "`.ci/oldest.txt` pins what the package declares as lowest"
    oldest = dict(l.split('==') for l in (root/'.ci/oldest.txt').read_text().splitlines() if '==' in l)
    for requirement in (settings['requirements'] + ' ' + settings['fused_requirements']).split():
        if '>=' not in requirement: continue # it only leaves out versions that do not work
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
    for name in ('pyproject.toml', '.ci/sync', '.ci/readme.py', '.ci/stubs.py', '.ci/outputs.py', 'nbs/index.ipynb', 'nbs/changelog.ipynb', 'nbs/callback.clip.ipynb', 'fastxtend/__init__.py'):
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
    assert sync(CI='true') == (0, 'sync: modules, stubs, README.md, CHANGELOG.md and notebooks agree\n')

    module, readme, changelog, page = path/'fastxtend/callback/clip.py', path/'README.md', path/'CHANGELOG.md', path/'nbs/callback.clip.ipynb'
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
    assert code == 1 and 'fastxtend/callback/clip.py' in out and module.read_text() == good

    commit()
    (path/'fastxtend/gone.py').write_text(good)
    (path/'fastxtend/gone.pyi').write_text('# Written by .ci/stubs.py: change the notebook, then run `make export`\n')
    (path/'fastxtend/hand.py').write_text('# written by hand\n')
    commit()
    code, out = sync()
    assert code == 1 and 'fastxtend/gone.py' in out and 'fastxtend/gone.pyi' in out and 'hand.py' not in out

    run('git', 'rm', '-q', '--cached', 'fastxtend/gone.py', 'fastxtend/gone.pyi')
    readme.write_text(readme.read_text() + 'by hand\n')
    commit()
    code, out = sync()
    assert code == 1 and 'README.md' in out

    commit()
    changelog.write_text('# Changelog\n\nby hand\n')
    commit()
    code, out = sync()
    assert code == 1 and 'CHANGELOG.md' in out and 'by hand' not in changelog.read_text()

    commit()
    change(source=['#| export\n', 'changed = 1'])
    code, out = sync()
    assert code == 1 and 'fastxtend/callback/clip.py' in out

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

def test_coverage_as_a_table():
    "What most is missing of comes first, and what everything is run of not at all"
    import covered
    def file(n, missing): return dict(num_statements=n, missing_lines=missing, percent_covered=100*(n - missing)/n)
    found = dict(files={f'fastxtend/{n}.py': dict(summary=file(10, m)) for n,m in dict(a=0, b=1, c=3).items()}, totals=file(30, 4))
    assert re.findall(r'^\| (\S+) \| \d+ \| (\d+) \| (\S+) \|$', covered.covered(found), re.M) == [('all', '4', '86.7%'), ('`c.py`', '3', '70.0%'), ('`b.py`', '1', '90.0%')]
