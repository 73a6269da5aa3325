"The site: its sidebar, the check of its links, and how notebooks become pages (what needs a browser is in `make docs-test`)"
import importlib, re, sys
from pathlib import Path

import pytest

root = Path(__file__).parent.parent
sys.path.insert(0, str(root/'.ci'))
import dist, docs_check

def test_every_page_is_in_the_sidebar():
    yaml = pytest.importorskip('yaml')
    def pages(entry):
        if isinstance(entry, str): return [entry]
        return [entry['href']] if 'href' in entry else [p for o in entry['contents'] for p in pages(o)]
    config = yaml.safe_load((root/'nbs/_quarto.yml').read_text(encoding='utf-8'))
    listed = pages(config['website']['sidebar'])
    assert sorted(listed) == sorted(o.name for o in (root/'nbs').glob('*.ipynb'))

GOOD = '<html><head><link rel="stylesheet" href="a.css"></head><body><h1 id="top">A</h1><a href="b.html#there">b</a><a href="#top">up</a></body></html>'

@pytest.fixture
def site(tmp_path):
    "A site of two pages without faults"
    (tmp_path/'index.html').write_text(GOOD)
    (tmp_path/'b.html').write_text('<p id="there"><img src="p.png" alt="a plot"><a href="https://example.com">out</a></p>')
    (tmp_path/'a.css').write_text('p {color: red}')
    (tmp_path/'p.png').write_bytes(b'')
    (tmp_path/'search.json').write_text('[{"href": "b.html#there"}]')
    return tmp_path

def test_a_good_site(site): assert list(docs_check.check(site)) == []

@pytest.mark.parametrize('text', ['<pre>**kwargs `x` ](y)</pre>', '<code>f(**kwargs)</code>', '<pre><code><span>a</span> = `b`</code></pre>',
                                  r'<span class="math inline">\(a**b\)</span>', '<script>a = `b`</script>'])
def test_code_may_look_like_markdown(site, text):
    (site/'b.html').write_text('<p id="there"></p>' + text)
    assert list(docs_check.check(site)) == []
    (site/'b.html').write_text(f'<p id="there"></p>{text}<p>`raw`</p>')
    assert len(list(docs_check.check(site))) == 1, "what comes after it is looked at"

@pytest.mark.parametrize('file,old,new,problem', [
    ('index.html', 'b.html#there', 'c.html', 'c.html leads nowhere'),
    ('index.html', 'b.html#there', 'b.html#here', 'b.html#here has no such anchor'),
    ('index.html', '#top', '#bottom', '#bottom has no such anchor'),
    ('index.html', 'b.html#there', '../b.html', '../b.html leads out of the site'),
    ('index.html', 'a.css', 'https://example.com/a.css', 'https://example.com/a.css is loaded from another server'),
    ('index.html', '<h1 id="top">', '<h1 id="top"><b id="top">', 'id top is there 2 times'),
    ('index.html', '>A<', '>[ <code>SGD</code> ](#sgd)<', 'shows Markdown as it was written: ](#sgd)'),
    ('index.html', '>A<', '>a **bold** word<', 'shows Markdown as it was written: **b'),
    ('index.html', '>A<', '>`code`<', 'shows Markdown as it was written: `'),
    ('index.html', '>A<', '>| a | b |\n|---|--:|<', 'shows Markdown as it was written: |---'),
    ('index.html', '>A<', '>## A heading<', 'shows Markdown as it was written: ## A'),
    ('b.html', ' alt="a plot"', '', '1 images have no alternative text'),
    ('b.html', 'p.png', 'q.png', 'q.png leads nowhere'),
    ('a.css', 'p {', '@import url(https://example.com/f.css); p {', 'imports from another server'),
    ('search.json', 'there', 'here', 'b.html#here has no such anchor'),
])
def test_a_bad_site(site, file, old, new, problem):
    text = (site/file).read_text()
    assert old in text
    (site/file).write_text(text.replace(old, new))
    problems = list(docs_check.check(site))
    assert [o[0] for o in problems] == [file] and problems[0][1].startswith(problem)

def test_everything_exported_can_be_documented():
    "`show_doc` resolves annotations, and fails on those with a name that is not imported"
    showdoc = pytest.importorskip('nbdev.showdoc')
    from fastxtend._modidx import d
    failed = []
    for name, symbols in d['syms'].items():
        try: module = importlib.import_module(name)
        except ModuleNotFoundError: continue # Numba or Triton are not installed
        for symbol in {o.removeprefix(f'{name}.') for o in symbols} & {*module.__all__}:
            try: showdoc.show_doc(getattr(module, symbol))._repr_markdown_()
            except Exception as e: failed.append(f'{name}.{symbol}: {e!r}')
    assert not failed

def test_readme_begins_with_the_example_of_the_index():
    "What `make dist-test` takes from README.md is a cell of the notebook, which `make nbtest` runs"
    import json
    cells = json.loads((root/'nbs/index.ipynb').read_text(encoding='utf-8'))['cells']
    code = [''.join(o['source']) for o in cells if o['cell_type'] == 'code']
    assert dist.first_example().strip() == code[0].strip() and 'fused=True' in code[0]

def test_readme_states_the_versions():
    "The bounds in settings.ini are those in README.md"
    settings = (root/'settings.ini').read_text(encoding='utf-8')
    rows = dict(re.findall(r'^\| (Python|PyTorch|fastai|Numba) \| ([\d.]+) ', (root/'README.md').read_text(encoding='utf-8'), re.M))
    bounds = dict(re.findall(r'\b(fastai|torch|numba)>=([\d.]+)', settings))
    lowest, = re.findall(r'^min_python = (.*)$', settings, re.M)
    assert rows == dict(Python=lowest, PyTorch=bounds['torch'], fastai=bounds['fastai'], Numba=bounds['numba'])

def test_readme_states_what_was_measured():
    "Each line of its table of times is in a report"
    reports = '\n'.join((root/'benchmarks'/f'{n}.md').read_text() for n in ('cpu', 'cpu_deberta'))
    readme = (root/'README.md').read_text(encoding='utf-8')
    lines = re.findall(r'^\| ([\w-]+) \| ([\d.]+ ms \| .*) \| ([\d.]+) \| (\d+) \|$', readme, re.M)
    assert len(lines) == 6 and '| native | `fused` | `torch.optim` | `foreach` | `jit` | million | tensors |' in readme
    for model,cells,million,tensors in lines:
        size, adam = re.search(rf'### {model}\n\n(.*?)\n.*?\| Adam \| ([^\n]*) \|\n', reports, re.S).groups()
        native, foreach, jit, fused, _, torch_fused = adam.split(' | ')
        assert cells.split(' | ') == [native, fused, torch_fused, foreach, jit]
        assert size == f'{tensors} tensors, {million} million parameters'

def test_readme_states_what_training_gains():
    "Its first sentence has two figures of each of the two trainings, for steps and epochs"
    report = (root/'benchmarks/training.md').read_text(encoding='utf-8')
    fused = re.findall(r'\| Adam \| fused \| .*?\*\*([\d.]+)x\*\*.*?\*\*([\d.]+)x\*\*', report)
    readme = (root/'README.md').read_text(encoding='utf-8')
    told = re.search(r'a step of Adam is ([\d.]+) times .* epoch ([\d.]+) times .* it is ([\d.]+) and ([\d.]+) times', readme).groups()
    assert told == tuple(o for epoch,step in fused for o in (step, epoch))

def test_docs_requirements_are_pinned():
    pinned = {o.split('==')[0] for o in (root/'constraints.txt').read_text().splitlines()}
    asked, = re.findall(r'^docs_requirements = (.*)$', (root/'settings.ini').read_text(encoding='utf-8'), re.M)
    assert {re.split('[<>=]', o)[0] for o in asked.split()} <= pinned

def test_progress_bars_leave_no_trace():
    pytest.importorskip('nbdev')
    import docs
    bar = 'epoch  loss\n█\r\n\rEpoch 1/2 : |--| 0.00%\rEpoch 1/2 : |██| 100.00%\r                 \rEpoch 1/2 : \r0      0.5\n█\n'
    assert docs.as_on_a_terminal(bar).split() == ['epoch', 'loss', '0', '0.5']

def test_what_readers_see_of_a_notebook(tmp_path, monkeypatch):
    "Cells are run, with the tables of what they define after them in their order; what is hidden is run but not shown"
    pytest.importorskip('nbdev')
    import docs
    from fastcore.nbio import mk_cell, new_nb, read_nb, write_nb
    nb = new_nb([mk_cell('# Title\n\n> what it is\n\n- search: false\n\nText under it', 'markdown'), mk_cell('#| export\ndef f(a:int=1): "One"\ndef g(b:int=2): "Two"'),
                 mk_cell('#| hide\nhidden = 6'), mk_cell('## Times', 'markdown'), mk_cell('hidden*7'), mk_cell('#| slow\n1/0'),
                 mk_cell('from IPython.display import Image'),
                 mk_cell('Image(data=b"\\x89PNG\\r\\n\\x1a\\n" + b"\\0"*30, format="png")')])
    path = tmp_path/'page.ipynb'
    write_nb(nb, path)
    monkeypatch.chdir(root/'nbs')
    monkeypatch.setenv('IN_TEST', '1')
    page = read_nb(path)
    docs.processors()(page)
    assert page.frontmatter_ == {'title': 'Title', 'description': 'what it is', 'search': False, 'output-file': 'page.html'}
    assert [o.source for o in page.cells if o.source == 'Text under it'], 'text in the cell of the title is lost'
    shown = [''.join(o.source) for o in page.cells if o.cell_type == 'code']
    assert [re.findall(r'show_doc\((\w)\)', o) for o in shown[:2]] == [['f'], ['g']]
    assert not any('hidden = 6' in o for o in shown)
    run, = (o for o in page.cells if o.source == 'hidden*7')
    assert run.outputs[0]['data']['text/plain'] == ['42']
    assert '#| fig-alt: "Times"' in shown[-1]

@pytest.mark.parametrize('line,linked', [
    ('`Adam` and `adam(lr=1, **kwargs)`, not `lr=1` or `Other`', '[`Adam`](a.html#adam) and [`adam(lr=1, **kwargs)`](a.html#adam), not `lr=1` or `Other`'),
    ('| [`Adam`](#adam) | `Adam` |', '| [`Adam`](#adam) | [`Adam`](a.html#adam) |'),
    ('![`Adam`](plot.png) [see `Adam` there](b.html) `Adam()`', '![`Adam`](plot.png) [see `Adam` there](b.html) [`Adam()`](a.html#adam)')])
def test_names_are_linked_but_not_within_links(line, linked):
    import docs
    assert docs.link_line(line, {'Adam': 'a.html#adam', 'adam': 'a.html#adam'}.get) == linked

def test_public_names_come_before_internals():
    "`sgd` is the helper for users, and not the rule of the same name"
    pytest.importorskip('nbdev')
    import docs
    table = docs.lookup()
    assert table.doc('sgd') == table.doc('SGD') == 'optimizer.fused.html#sgd'
    assert table.doc('learn.profile') == table.doc('Learner.profile') == 'callback.profiler.html#learner.profile'
    assert table.doc('fit_flat_varied') == table.doc('Learner.fit_flat_varied') == 'schedulers.html#learner.fit_flat_varied'
    assert table.doc('no_such_name') is None and table.doc('no_such_name.step') is None
    cell = dict(cell_type='markdown', source='[`SGD`](#sgd) and `sgd`')
    assert table.linkify(cell['source']) == '[`SGD`](#sgd) and [`sgd`](optimizer.fused.html#sgd)'

def test_numbers_stay_with_their_units():
    import docs
    page = '<p>2.35 ms</p><table><tr><th>1 ms</th><td style="x">2.35 ms <strong>3.35x</strong></td><td>2.9 or later 11.2 million</td></tr></table>'
    assert docs.mend_cells(page) == page.replace('1 ms', '1\xa0ms').replace('<td style="x">2.35 ms', '<td style="x">2.35\xa0ms').replace('11.2 m', '11.2\xa0m')

def test_links_to_the_source():
    import docs
    page = '---\n\n[source](/blob/main/fastxtend/a.py#L{}){{target="_blank"}}\n\n### f\n\n[source](b.ipynb)'
    assert docs.mend_sources(page.format(3), 'https://example.com/x') == page.format(3).replace('/blob', 'https://example.com/x/blob')
    assert docs.mend_sources(page.format('None'), 'https://example.com/x') == page.replace('#L{}', '').replace('/blob', 'https://example.com/x/blob').replace('{{', '{').replace('}}', '}')
    assert docs.mend_sources(page.format(3), '') == '---\n\n### f\n\n[source](b.ipynb)'

def test_internals_come_last_in_the_search(tmp_path):
    import docs, json
    entries = [dict(href='core.html#a', text='adam'), dict(href='a.html', text='adam'), dict(href='core.html', text='x'), dict(href='b.html#c', text='y')]
    (tmp_path/'search.json').write_text(json.dumps(entries))
    docs.rank_search(tmp_path, {'core.html'})
    assert json.loads((tmp_path/'search.json').read_text()) == [entries[1], entries[3], dict(href='core.html#a', text=''), dict(href='core.html', text='')]
    config = pytest.importorskip('yaml').safe_load((root/'nbs/_quarto.yml').read_text(encoding='utf-8'))
    assert config['website']['sidebar']['contents'][-1]['section'] == 'Internals' and 'optimizer.core.html' in docs.internal_pages(config)

def test_links_to_names_without_a_heading(tmp_path):
    "A method leads to its class, what is not described at all to the page, and all others where they led"
    import docs
    (tmp_path/'a.html').write_text('<h3 id="adam">Adam</h3><h3 id="adam.step">step</h3>')
    links = {'a.html#adam.step': 'a.html#adam.step', 'a.html#adam.other': 'a.html#adam', 'a.html#_hidden': 'a.html', 'gone.html#x': 'gone.html#x'}
    (tmp_path/'b.html').write_text('\n'.join(f'<a href="{o}"><code>name</code></a>' for o in links) + '<a href="a.html#typo">text</a>')
    docs.mend_links(tmp_path)
    text = (tmp_path/'b.html').read_text()
    assert re.findall('href="([^"]+)"><code>', text) == [*links.values()]
    assert 'a.html#typo' in text, "what people write is for docs_check to find"
