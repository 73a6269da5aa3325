"""Write stubs (`.pyi`) for type checkers and editors, where a module is not what its source says: where a decorator of ours makes constructors
from declarations, where methods are patched in, and where names are computed. What is in them is read from the modules, never written down here.

`python .ci/stubs.py` writes them beside the modules; `.ci/sync` compares them with what is committed."""
import ast, builtins, inspect, math, sys, types, warnings
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, fields, is_dataclass
from functools import cached_property, partial, partialmethod
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, overload

root = Path(__file__).resolve().parent.parent
HEAD = '# Written by .ci/stubs.py: change the notebook, then run `make export`'

def is_made_by(function, name):
    "Is it decorated with `name`?"
    return any(getattr(getattr(o, 'func', o), 'id', None) == name for o in function.decorator_list)

def needs_stub(path):
    "Does the source of a module not say what is in it?"
    nodes = ast.parse(path.read_text(encoding='utf-8')).body
    classes = {o.name for o in nodes if isinstance(o, ast.ClassDef)}
    for o in nodes:
        if isinstance(o, ast.Assign) and any(getattr(t, 'id', None) == '__all__' for t in o.targets):
            if not isinstance(o.value, ast.List) or not all(isinstance(x, ast.Constant) for x in o.value.elts): return True
        if not isinstance(o, ast.FunctionDef): continue
        if is_made_by(o, 'optimizer') or getattr(o.returns, 'id', None) == 'partial' and not o.name.startswith('_'): return True
        own = o.args.args[0].annotation if o.args.args else None
        if is_made_by(o, 'patch') and isinstance(own, ast.Name) and own.id in classes: return True
    return False

class Stub:
    "The text of one stub"
    def __init__(self, module): self.module, self.imports, self.lines, self.own = module, {}, [], []

    def take(self, module, name, text=None): self.imports.setdefault(name, (module, text or name)) # one of each name

    def use(self, o, name=None):
        "The name of the class or function `o`, imported if it is of another module"
        if o is None or o is type(None): return 'None'
        if o is Ellipsis: return '...'
        own = getattr(o, '__module__', None)
        if isinstance(o, types.ModuleType):
            self.take('', name, o.__name__ + (f' as {name}' if name != o.__name__ else ''))
            return name
        if own is None or not hasattr(o, '__qualname__') or '<' in o.__qualname__: return self.use(Any)
        if own == self.module.__name__: self.own.append(o.__qualname__.partition('.')[0])
        elif own != 'builtins': self.take(own, o.__qualname__.partition('.')[0])
        return o.__qualname__

    def text(self, annotation, scope):
        "An annotation as text whose names are all there"
        if isinstance(annotation, str):
            try: tree = ast.parse(annotation, mode='eval')
            except SyntaxError: return self.use(Any)
            for o in ast.walk(tree):
                if not isinstance(o, ast.Name): continue
                found = scope.get(o.id, getattr(builtins, o.id, None))
                if found is None and o.id != 'None': return self.use(Any)
                known = isinstance(found, types.ModuleType) or hasattr(found, '__qualname__')
                if o.id != 'None': o.id = self.use(found, o.id) if known else self.text(found, scope)
            return ast.unparse(tree)
        if annotation is inspect.Parameter.empty: return ''
        origin, args = getattr(annotation, '__origin__', None), getattr(annotation, '__args__', ())
        if isinstance(annotation, types.UnionType) or str(origin) == 'typing.Union': return ' | '.join(dict.fromkeys(self.text(o, scope) for o in args))
        if origin is not None and args: return f"{self.use(origin)}[{', '.join(self.text(o, scope) for o in args)}]"
        return self.use(annotation)

    def parameters(self, sig, scope, widen=lambda name, text: text, but=()):
        "The parameters of a signature as text: defaults of few words as they are"
        res, kinds, last = [], inspect.Parameter, None
        params = [p for n,p in sig.parameters.items() if n not in but]
        for i,p in enumerate(params):
            if p.kind == kinds.KEYWORD_ONLY and last not in (kinds.KEYWORD_ONLY, kinds.VAR_POSITIONAL): res.append('*')
            last, text = p.kind, widen(p.name, self.text(p.annotation, scope))
            if p.name == 'self': text = ''
            star = {kinds.VAR_POSITIONAL: '*', kinds.VAR_KEYWORD: '**'}.get(p.kind, '')
            plain = p.default is None or isinstance(p.default, (bool, int, float, str)) and p.default not in (math.inf, -math.inf) or p.default == ()
            default = '' if p.default is kinds.empty else repr(p.default) if plain else '...'
            if default == 'None' and text and 'None' not in text and text != 'Any': text += ' | None'
            res.append(star + p.name + (f': {text}' if text else '') + (f' = {default}' if default and text else default and f'={default}'))
            if p.kind == kinds.POSITIONAL_ONLY and (i + 1 == len(params) or params[i+1].kind != p.kind): res.append('/')
        return res

    def function(self, name, f, indent='', returns=None):
        sig, scope = inspect.signature(f), getattr(inspect.unwrap(f), '__globals__', vars(self.module))
        back = returns or self.text(sig.return_annotation, scope) or self.use(Any)
        if back == 'partial': back = self.use(Any) # goes to `Learner`, which says that it takes optimizers where it takes what makes them
        self.lines.append(f"{indent}def {name}({', '.join(self.parameters(sig, scope))}) -> {back}: ...")

    def member(self, name, o, cls):
        "A method or an attribute of a class, as it is in its `__dict__`"
        if isinstance(o, (classmethod, staticmethod)):
            self.lines.append(f'    @{type(o).__name__}')
            self.function(name, o.__func__, '    ')
        elif isinstance(o, (property, cached_property)):
            get = o.fget if isinstance(o, property) else o.func
            self.lines.append('    @property')
            self.function(name, get, '    ')
            if getattr(o, 'fset', None): self.lines.append(f"    @{name}.setter\n    def {name}(self, v) -> None: ...")
        elif isinstance(o, partialmethod): self.lines.append(f"    def {name}(self, *args: {self.use(Any)}, **kwargs: {self.use(Any)}) -> None: ...")
        elif isinstance(o, types.FunctionType): self.function(name, o, '    ', 'None' if name == '__init__' else None)
        elif not isinstance(o, type): self.lines.append(f"    {name}: {self.use(Any) if o is None or isinstance(o, (dict, list, tuple)) else self.use(type(o))}")

    def cls(self, name, o):
        names = fields(o) if is_dataclass(o) else ()
        if names:
            self.take('dataclasses', 'dataclass')
            p = o.__dataclass_params__
            self.lines.append(f"@dataclass(eq={p.eq}, frozen={p.frozen})")
        bases = ', '.join(self.use(b) for b in o.__bases__ if b is not object)
        self.lines.append(f'class {name}({bases}):' if bases else f'class {name}:')
        start = len(self.lines)
        for f in names:
            default = '' if f.default is MISSING and f.default_factory is MISSING else ' = ...'
            self.lines.append(f"    {f.name}: {self.text(f.type, vars(sys.modules[o.__module__]))}{default}")
        skip = {f.name for f in names} | ({'__init__'} if names else set())
        if '__signature__' in vars(o):
            sig = inspect.signature(o)
            def plain(name, text): return text or self.from_default(sig.parameters[name], name)
            own = getattr(getattr(o, 'column', None), 'like', None) or o
            self.lines.append(f"    def __init__(self, {', '.join(self.parameters(sig, vars(sys.modules[own.__module__]), plain))}) -> None: ...")
        for n,x in vars(o).items():
            if n not in skip and (not n.startswith('_') or n in ('__init__', '__call__', '__len__', '__getitem__')): self.member(n, x, o)
        if len(self.lines) == start: self.lines[-1] += ' ...'

    def from_default(self, p, name):
        "A type for an argument that has none"
        if name == 'params': return self.text(inspect.signature(import_module('torch').optim.SGD).parameters['params'].annotation, {})
        if isinstance(p.default, tuple): return f"tuple[{', '.join(type(x).__name__ for x in p.default)}]"
        return 'bool' if p.default is None else type(p.default).__name__

    def constructor(self, spec):
        "Overloads: what is built follows from the flags"
        from fastxtend.optimizer.declare import BACKENDS, FLAGS
        import torch
        f, scope = spec.constructor, inspect.unwrap(spec.constructor).__globals__
        sig = inspect.signature(f)
        wide = f"{self.use(Sequence)}[float]"
        tensor = self.use(torch.Tensor)
        some = self.use(Iterable)
        given = f'{tensor} | {some}[{tensor}] | {some}[{some}[{tensor}]]'
        def widen(name, text):
            if name == 'params': return given
            if name == 'lr': return f'float | slice | {wide}'
            return f'{text} | {wide}' if name in spec.hypers and text == 'float' else text
        def made(backend): return self.use(type(f([torch.zeros(1)], .1, **({backend: True} if backend else {}))))
        classes = {None: made(None), **{b: made(b) for b in BACKENDS if b != 'jit' or spec.jit}}
        literal = self.use(Literal)
        own = self.parameters(sig, scope, widen, FLAGS)
        others = [n for n in FLAGS if n not in BACKENDS]
        def flags(backend):
            off = [f"{b}: {literal}[False] = False" for b in BACKENDS if b != backend]
            free = self.parameters(sig, scope, widen, [n for n in sig.parameters if n not in others]) if backend == 'fused' else [f'{n}: None = None' for n in others]
            return ['*', f'{backend}: {literal}[True]', *off, *free] if backend else [*off, *free]
        every = self.parameters(sig, scope, widen, [n for n in sig.parameters if n not in FLAGS])
        union = ' | '.join(dict.fromkeys(classes.values()))
        rows = [(flags(b), c) for b,c in classes.items()] + [([*(f'{b}: bool = False' for b in BACKENDS), *(f'{n}: None = None' for n in others)], union)]
        self.use(overload)
        for fl,c in rows: self.lines.append(f"@overload\ndef {f.__name__}({', '.join([*own, *fl])}) -> {c}: ...")
        self.helper(spec, own[2:], every, own[:2], rows)

    def helper(self, spec, own, every, first, rows):
        "Overloads: `Any` where it returns a `partial`, as in `function`"
        from fastxtend.optimizer.declare import helper_of
        name = helper_of(spec.constructor).__name__
        self.lines.append(f"@overload\ndef {name}({', '.join([*own, *every])}) -> {self.use(Any)}: ...")
        for fl,c in rows: self.lines.append(f"@overload\ndef {name}({', '.join([*first, *own, *fl])}) -> {c}: ...")

    def written(self):
        from fastxtend.optimizer.table import OPTIMIZERS
        m = self.module
        specs = {s.name: s for s in OPTIMIZERS.values()}
        helpers = {s.constructor.helper.__name__: s for s in OPTIMIZERS.values() if hasattr(s.constructor, 'helper')}
        names = list(dict.fromkeys(m.__all__))
        todo, done = list(names), set()
        while todo: # and what these need
            n = todo.pop(0)
            if n in done: continue
            done.add(n)
            o, home = getattr(m, n), getattr(getattr(m, n), '__module__', None)
            if home is not None and home != m.__name__ and home.startswith('fastxtend') and not isinstance(o, partial): self.take(home, n, f'{n} as {n}')
            elif n in specs and o is specs[n].constructor: self.constructor(specs[n])
            elif n in helpers: pass # with its constructor
            elif isinstance(o, type): self.cls(n, o)
            elif isinstance(inspect.unwrap(o) if callable(o) else o, types.FunctionType): self.function(n, inspect.unwrap(o))
            else: self.lines.append(f'{n}: {self.use(Any) if not isinstance(o, (bool, int, float, str)) else type(o).__name__}')
            todo += self.own
            self.own = []
        modules = sorted({module for module,_ in self.imports.values()})
        texts = {module: ', '.join(sorted(text for of,text in self.imports.values() if of == module)) for module in modules}
        imports = [f'from {module} import {text}' if module else f'import {text}' for module,text in texts.items()]
        return '\n'.join([HEAD, *imports, '', f"__all__ = [{', '.join(map(repr, names))}]", '', *self.lines]).rstrip() + '\n'

def module_name(path): return '.'.join(path.relative_to(root).with_suffix('').parts)

if __name__ == '__main__':
    paths = [p for p in sorted((root/'fastxtend').rglob('*.py')) if p.name != '_modidx.py' and needs_stub(p)]
    for old in (root/'fastxtend').rglob('*.pyi'):
        if old.with_suffix('.py') not in paths and old.read_text(encoding='utf-8').startswith(HEAD): old.unlink()
    if paths:
        sys.path.append(str(root)) # what is installed comes first
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            for name in ('fastxtend.vision.all', 'fastxtend.optim'): import_module(name)
            for p in paths: p.with_suffix('.pyi').write_text(Stub(import_module(module_name(p))).written(), encoding='utf-8')
