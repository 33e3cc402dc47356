"""Canonical form of source code, without comments, layout, docstrings and texts of exceptions."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

PACKAGE = __package__.partition(".")[0]
EXCEPTIONS = ("Error", "Exception", "Exit", "Interrupt")
"""Name endings of exception classes; the sources' own classes are recognised by their bases."""
SETTING = (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.NamedExpr, ast.Return)
TEXT_CALLS = frozenset(("str", "repr", "ascii"))
TEXT_METHODS = frozenset(("join", "format", "strip", "removeprefix", "removesuffix", "replace"))


def _is_text(node: ast.AST | None) -> bool:
    """Return whether an expression evaluates to a string, judged by its syntax."""
    match node:
        case ast.JoinedStr() | ast.Constant(value=str()):
            return True
        case ast.BinOp(left, ast.Add() | ast.Mod(), right):
            return _is_text(left) or _is_text(right)
        case ast.IfExp(_, body, other):
            return _is_text(body) or _is_text(other)
        case ast.BoolOp(_, values):
            return any(map(_is_text, values))
        case ast.Call(ast.Attribute(value, method)):
            return method in TEXT_METHODS and _is_text(value)
        case ast.Call(ast.Name(name)):
            return name in TEXT_CALLS
    return False


def _loads(nodes: Iterable[ast.AST]) -> dict[str, set[int]]:
    """Return ids of the nodes that use a variable, function or attribute, by its name."""
    found: dict[str, set[int]] = defaultdict(set)
    for node in nodes:
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            found[node.id].add(id(node))
        elif isinstance(node, ast.Attribute):
            found[node.attr].add(id(node))
        elif isinstance(node, ast.Global | ast.Nonlocal):
            for name in node.names:
                found[name].add(id(node))
    return found


@dataclass(slots=True)
class _Function:
    """A function, with the parts of it that the analysis needs."""

    name: str
    parameters: list[str]
    """Positional parameters without `self`, then keyword-only ones."""
    loads: dict[str, set[int]]
    values: list[tuple[str | None, ast.expr]]
    """(variable, assigned expression); the variable is None for a returned expression."""
    said: set[str] = field(default_factory=set)
    """Variables and parameters that are used only in texts of exceptions."""


def _function(node: ast.FunctionDef | ast.AsyncFunctionDef) -> _Function:
    positional = [a.arg for a in (*node.args.posonlyargs, *node.args.args)]
    own = positional[:1] in (["self"], ["cls"])
    parameters = [*positional[own:], *(a.arg for a in node.args.kwonlyargs)]
    inner = list(ast.walk(node))
    setting = (n for n in inner if isinstance(n, SETTING))
    return _Function(node.name, parameters, _loads(inner), [*_values(setting)])


def _values(nodes: Iterable[ast.AST]) -> Iterator[tuple[str | None, ast.expr]]:
    for node in nodes:
        match node:
            case ast.Return(value=ast.expr() as value):
                yield None, value
            case ast.Assign([ast.Tuple(targets)], ast.Tuple(values)) if len(targets) == len(values):
                for target, value in zip(targets, values, strict=True):
                    if isinstance(target, ast.Name):
                        yield target.id, value
            case (
                ast.Assign([ast.Name(name)], value)
                | ast.AnnAssign(target=ast.Name(name), value=ast.expr() as value)
                | ast.AugAssign(target=ast.Name(name), value=value)
                | ast.NamedExpr(target=ast.Name(name), value=value)
            ):
                yield name, value


@dataclass(slots=True)
class _Module:
    """A source file, with the parts of it that the analysis needs."""

    tree: ast.Module
    classes: list[ast.ClassDef]
    speaking: list[ast.AST]
    """Nodes that may contain a text of an exception: calls, `raise` and `assert`."""
    loads: dict[str, set[int]]
    functions: list[_Function]
    known: set[str]
    """Names of functions defined here or imported from this package."""


def _module(source: str) -> _Module:
    tree = ast.parse(source)
    nodes = list(ast.walk(tree))
    functions = [
        _function(n) for n in nodes if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    known = {function.name for function in functions}
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and (node.level or _of_package(node.module)):
            known |= {alias.name for alias in node.names if alias.asname is None}
    classes = [node for node in nodes if isinstance(node, ast.ClassDef)]
    speaking = [node for node in nodes if isinstance(node, ast.Assert | ast.Raise | ast.Call)]
    return _Module(tree, classes, speaking, _loads(nodes), functions, known)


def _of_package(name: str | None) -> bool:
    return name is not None and name.partition(".")[0] == PACKAGE


@dataclass(slots=True)
class _MessageTexts:
    """Finds texts that are used only in exceptions. Starts from the arguments of exceptions, and
    follows them back to variables, parameters and helper functions until a fixed point."""

    modules: list[_Module]
    texts: set[int] = field(default_factory=set)
    """Ids of string expressions that are used only in exceptions."""
    uses: set[int] = field(default_factory=set)
    """Ids of names that occur in a text of an exception."""
    helpers: set[str] = field(default_factory=set)
    """Functions whose results are used only in texts of exceptions."""
    exceptions: set[str] = field(default_factory=set)
    functions: dict[str, list[_Function]] = field(default_factory=lambda: defaultdict(list))

    def follow(self) -> None:
        self._find_exceptions()
        loads: dict[str, set[int]] = defaultdict(set)
        for module in self.modules:
            for function in module.functions:
                self.functions[function.name].append(function)
            for name, places in module.loads.items():
                loads[name] |= places
        before = -1
        while before != (before := len(self.texts) + len(self.uses)):
            for module in self.modules:
                for expression in self._message_expressions(module):
                    self._cover(expression)
                for function in module.functions:
                    function.said = {n for n, at in function.loads.items() if at <= self.uses}
            self.helpers = {n for n in self.functions if n in loads and loads[n] <= self.uses}

    def _find_exceptions(self) -> None:
        classes = [c for module in self.modules for c in module.classes]
        before = -1
        while before != (before := len(self.exceptions)):
            self.exceptions |= {c.name for c in classes if any(map(self._is_exception, c.bases))}

    def _is_exception(self, node: ast.expr) -> bool:
        name = getattr(node, "attr", getattr(node, "id", ""))
        return name.endswith(EXCEPTIONS) or name in self.exceptions

    def _called(self, call: ast.Call, module: _Module) -> list[_Function]:
        """Return the package's functions that a call may refer to."""
        match call.func:
            case ast.Name(name) | ast.Attribute(ast.Name("self" | "cls"), name):
                return self.functions.get(name, []) if name in module.known else []
        return []

    def _message_expressions(self, module: _Module) -> Iterator[ast.expr]:
        """Yield the expressions that become part of an exception's message."""
        for node in module.speaking:
            match node:
                case ast.Assert(msg=ast.expr() as message):
                    yield message
                case ast.Raise(exc=ast.Call() as call) if not self._called(call, module):
                    yield from call.args
                case ast.Call() if self._is_exception(node.func):
                    yield from node.args
                case ast.Call():
                    yield from self._arguments(node, self._called(node, module))
        for definition in module.classes:
            for inner in ast.walk(definition) if definition.name in self.exceptions else ():
                match inner:
                    case ast.Call(ast.Attribute(ast.Call(ast.Name("super")), "__init__")):
                        yield from inner.args
        for function in module.functions:
            for name, value in function.values:
                if name in function.said or (name is None and function.name in self.helpers):
                    yield value

    def _arguments(self, call: ast.Call, functions: list[_Function]) -> Iterator[ast.expr]:
        """Yield arguments that all functions the call may refer to use only in texts of
        exceptions."""
        if not functions or any(isinstance(argument, ast.Starred) for argument in call.args):
            return
        for place, argument in enumerate(call.args):
            if all(f.said.intersection(f.parameters[place : place + 1]) for f in functions):
                yield argument
        for keyword in call.keywords:
            if all(keyword.arg in f.said and keyword.arg in f.parameters for f in functions):
                yield keyword.value

    def _cover(self, node: ast.expr) -> None:
        """Mark the texts in an expression that is used only in exceptions."""
        if id(node) in self.texts:
            return
        if _is_text(node):
            self.texts.add(id(node))
            self.uses |= {id(inner) for inner in ast.walk(node)}
            return
        match node:
            case ast.Name():
                self.uses.add(id(node))
            case ast.Call(ast.Name() | ast.Attribute(ast.Name("self" | "cls")) as function):
                self.uses.add(id(function))
            case ast.List(elements) | ast.Tuple(elements) | ast.Set(elements):
                for element in elements:
                    self._cover(element)
            case ast.ListComp(element) | ast.GeneratorExp(element) | ast.Starred(element):
                self._cover(element)


def _dump(node: object, texts: frozenset[int] | set[int] = frozenset()) -> str:
    """Return the tree as text, without empty fields, whose number differs between Python
    versions."""
    if isinstance(node, list):
        return f"[{','.join(_dump(item, texts) for item in node if not _says_nothing(item))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    if id(node) in texts:
        return "Text()"
    fields = (
        f"{name}={_dump(value, texts)}"
        for name, value in ast.iter_fields(node)
        if value not in (None, [])
    )
    kept = "=None" if isinstance(node, ast.Constant) and node.value is None else ""
    return f"{type(node).__name__}{kept}({','.join(fields)})"


def _says_nothing(node: object) -> bool:
    """Return whether a statement is a docstring or `pass`."""
    match node:
        case ast.Pass() | ast.Expr(ast.Constant(value=str())):
            return True
    return False


def meanings(sources: Mapping[str, str]) -> dict[str, str]:
    """Return canonical text of each source, by name, independent of the Python version; the sources
    may import one another.

    Omits comments, layout, docstrings, and texts used only in exceptions: arguments of exceptions,
    also through a variable, a parameter (`require(ok, "...")`) or a helper function. The type of an
    exception and its condition count, and so does a text with any other use.
    """
    modules = {name: _module(source) for name, source in sources.items()}
    found = _MessageTexts([*modules.values()])
    found.follow()
    return {name: _dump(module.tree, found.texts) for name, module in modules.items()}
