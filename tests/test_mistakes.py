"The mistakes that everybody makes once, with the messages that the guide promises"
import json, math, pickle, re, warnings
from pathlib import Path

import pytest
from common import *
from fastai.basics import DataLoader, DataLoaders, Learner, nn
from fastai.callback.hook import layer_info # adds `Learner.summary`

from fastxtend.basics import *
from fastxtend.basics import adam, lion
from fastxtend.optimizer import declare, formats, report

GUIDE = Path(__file__).parent.parent/'nbs'/'guides.hypers.ipynb'

def table():
    "Rows of the guide: what is written, and what comes of it"
    source = '\n'.join(''.join(c['source']) for c in json.loads(GUIDE.read_text(encoding='utf-8'))['cells'])
    return re.findall(r'^\| `([^|]+)` \| (.+) \|$', source[source.index('| written |'):], re.M)

def scope():
    model = nn.Linear(2, 2)
    dl = DataLoader([(torch.ones(2), torch.ones(2))]*4, bs=2)
    return dict(globals(), model=model, opt=optimizers.Adam(model.parameters(), .1, foreach=True), dls=DataLoaders(dl, dl, device='cpu'))

@pytest.mark.parametrize('written,comes', table())
def test_mistake(written, comes):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        try: eval(written, scope())
        except (TypeError, ValueError) as e: assert str(e) == comes
        else: assert comes.startswith('works') or comes in [str(w.message) for w in caught]

def test_there_are_ten(): assert len(table()) >= 10

@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('way', WAYS)
def test_helpers_build(name, way):
    "A helper with parameters is its constructor, and what it returns takes a learning rate by position"
    if way not in ways(name): return
    def params(): return [torch.ones(3, requires_grad=True)]
    for opt in (helper(name)(params(), .02, **flags(way)), helper(name)(params=params(), lr=.02, **flags(way)), helper(name)(**flags(way))(params(), .02)):
        assert type(opt) is type(build(name, params(), way)) and opt.hypers[0]['lr'] == .02

def test_opt_func_prints_as_written():
    assert repr(adam(fused=True)) == 'adam(fused=True)' == repr(pickle.loads(pickle.dumps(adam(fused=True))))
    assert repr(lion(wd=.2)) == 'lion(wd=0.2)' and lion().keywords == dict(lr=1e-4)
    learn = Learner(scope()['dls'], nn.Linear(2, 2), nn.MSELoss(), opt_func=cautious(lion(fused=True)))
    assert 'Optimizer used: cautious(lion(fused=True))' in str(learn.summary())

@pytest.mark.parametrize('opt_func', [torch.optim.AdamW, partial(torch.optim.AdamW, weight_decay=.1), None])
def test_torch_optimizers_train(opt_func):
    "A class of `torch.optim`, a `partial` of it, or an optimizer: with a warning"
    model = nn.Linear(2, 2)
    before = model.weight.detach().clone()
    learn = Learner(scope()['dls'], model, nn.MSELoss(), opt_func=opt_func or torch.optim.AdamW(model.parameters()))
    learn.remove_cbs([c for c in learn.cbs if type(c).__name__ == 'ProgressCallback'])
    learn.logger = noop
    with pytest.warns(UserWarning, match='torch_opt|TorchOptimizer'): learn.fit(1, 1e-2)
    assert type(learn.opt) is TorchOptimizer and not torch.equal(before, model.weight)

@pytest.mark.parametrize('way', BACKENDS)
def test_an_optimizer_prints_what_it_is(way):
    params = [torch.ones(3, requires_grad=True), torch.ones(2, requires_grad=True)]
    opt = build('Adam', [params[:1], params[1:]], way, lr=[.1, .2])
    assert 'not stepped yet' in repr(opt) and '0 bytes of state' in repr(opt) and not opt.state
    for p in params: p.grad = torch.ones_like(p)
    opt.step()
    assert '2 tensors of 5 elements, 40 bytes of state' in repr(opt) and 'group 1: 1 tensors, lr=0.2' in repr(opt) and 'last step: 2 in ' in repr(opt)

def odd_params():
    "Plain ones, another dtype, gaps, and two that share memory"
    shared = torch.ones(4)
    return [torch.ones(3, 2), torch.ones(3, dtype=torch.bfloat16), torch.ones(3, dtype=torch.float64), torch.ones(4, 4)[:, ::2], shared, shared.view(2, 2)]

@pytest.mark.parametrize('name', ['Lamb', 'Ranger'])
@pytest.mark.parametrize('way', BACKENDS)
def test_report_expects_what_happens(name, way):
    "Before the first step the same report as after it, on every backend: where, why, formats and bytes"
    if way not in ways(name): return
    params = odd_params()
    opt = build(name, [params[:3], params[3:]], way, lr=.1)
    before = opt.backend_report()
    assert not opt.state and 'not stepped yet' in str(before) and '0 bytes of state' in repr(opt)
    for p in params: p.grad = torch.ones_like(p)
    opt.step()
    assert list(before) == list(opt.backend_report()) and 'last step' in repr(opt)
    nbytes = sum(o.nbytes for o in before) + (sum(p.nbytes for p in params) if name == 'Ranger' else 0) # slow weights stand apart
    assert f'{nbytes:,} bytes of state' in repr(opt)
    assert {o.reason for o in before if not o.reason.startswith('shares memory')} - {''} == set() or way == 'fused'

@pytest.mark.parametrize('state', [None, *declare.STATES])
@pytest.mark.parametrize('weights', [None, *declare.WEIGHTS])
def test_reports_of_formats(state, weights):
    "Whatever formats there are show, with their bytes, and as they were expected"
    params = [torch.ones(5000), torch.ones(70, 70, dtype=torch.bfloat16), torch.ones(5), torch.tensor(1.)]
    opt = optimizers.Adam(params, .1, fused=True, state=state, weights=weights)
    before, shown = opt.backend_report(), repr(opt)
    for p in params: p.grad = torch.ones_like(p)
    opt.step()
    assert list(before) == list(opt.backend_report())
    for row,p in zip(before, params):
        assert row.state == {n: str(t.dtype)[6:] for n,t in opt.state[p].items() if isinstance(t, Tensor)}
        assert row.nbytes == sum(t.nbytes for t in opt.state[p].values() if isinstance(t, Tensor)) and f'{row.weights}; {report.formats(row.state)}' in shown
    beside = declare.WEIGHTS[weights].beside if weights else {}
    assert {n for n in formats.BESIDE_WEIGHTS if n in repr(opt)} == set(beside) and ('uint8' in repr(opt)) == (state == 'int8')

def test_every_optimizer_has_a_report():
    "Also fastai's own, which a constructor without flags makes, and those of `torch.optim`"
    def params(): return [torch.ones(3, requires_grad=True)]
    for opt, says in ((optimizers.Adam(params(), .1), 'adam_step'), (optimizers.Ranger(params(), .1), 'Lookahead of fastai'), (optimizers.Lion(params(), .1), 'steppers'),
                      (TorchOptimizer(params(), torch.optim.AdamW, fused=True), 'AdamW with fused=True'), (optimizers.Lion(params(), .1, foreach=True), 'foreach')):
        (row,) = opt.backend_report()
        assert says in str(opt.backend_report()) and row.param == '(3,) float32 on cpu' and len(opt.backend_report().details().splitlines()) == 2

def test_report_of_what_steps():
    "Frozen parameters are in no report, and a list of other things is a plain one"
    params = [torch.ones(3, requires_grad=True), torch.ones(2, requires_grad=True)]
    opt = optimizers.SGD([params[:1], params[1:]], .1, foreach=True)
    params[0].requires_grad_(False)
    opt.freeze_to(1)
    report = opt.backend_report()
    assert report.attrgot('group') == [1] and type(report.filter(lambda o: o.group)) is type(report) and 'float32' in repr(report.attrgot('weights'))
