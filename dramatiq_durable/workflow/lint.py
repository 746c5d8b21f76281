"""Finds in source code what workflows cannot do, without running or importing it.

It starts from the functions that are declared as workflows, and follows calls of functions of the same module.  What
a workflow hands to ``durable.local`` or ``durable.side_effect`` runs outside of it, and is not looked at.  A line with
the comment ``# durable: allow`` is left alone.
"""

from __future__ import annotations

import ast
import builtins
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from .lint_rules import ANYWHERE, CALLS, FAMILIES, METHODS, SET_CONSUMERS, Rule

_ALLOW = re.compile(r"#\s*durable:\s*allow\b")
_SKIPPED = {"__pycache__", "node_modules", "site-packages", "venv", "build", "dist"}
_OUTSIDE = ("local", "side_effect")
_SENDING = {"send", "send_with_options", "asend", "asend_with_options"}
_SEND = Rule("sends a message", "call it with `await {name}.execute(...)`")
_CALL = Rule("calls an actor's own function", "call it with `await {name}.execute(...)`")
_SETS = Rule("iterates over a set, whose order differs in every process", "iterate over `sorted(...)`, or use a list")

Function = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda


@dataclass(frozen=True, order=True, slots=True)
class Finding:
    """Something that a workflow cannot do.

    Attributes:
      path(str), line(int), column(int): where; lines and columns count from 1.
      workflow(str): the workflow that comes there.
      what(str): what the code does there.
      instead(str): what to do instead.
    """

    path: str
    line: int
    column: int
    workflow: str
    what: str
    instead: str


@dataclass(slots=True)
class _Scope:
    """What the names of a module, a class's or a function's body stand for, whatever the order of its statements.

    A name stands for something that was imported (its full name), for a function or class (its node, and the scope in
    which that was defined), or for a set.
    """

    outer: _Scope | None = None
    known: dict[str, object] = field(default_factory=dict)

    def find(self, name: str) -> object:
        scope: _Scope | None = self
        while scope is not None:
            if name in scope.known:
                return scope.known[name]
            scope = scope.outer
        return f"builtins.{name}" if hasattr(builtins, name) else None


@dataclass(frozen=True, slots=True)
class _Defined:
    node: Function | ast.ClassDef
    scope: _Scope
    kind: str = "function"  # or actor, workflow, class


@dataclass(frozen=True, slots=True)
class _Instance:
    of: _Defined


_SET = object()
_OTHER = object()


def lint_paths(paths: Iterable[Path]) -> list[Finding]:
    """Look at files, and at all of Python's in directories.

    Returns:
      What was found, in the order of the files and lines.
    """
    findings: set[Finding] = set()
    for file in _files(paths):
        try:
            source = file.read_bytes().decode()
            tree = ast.parse(source, str(file))
        except (SyntaxError, ValueError) as e:
            line = getattr(e, "lineno", None) or 1
            findings.add(Finding(str(file), line, 1, "", f"cannot be read: {e}", "correct the file"))
            continue
        findings.update(_Linter(str(file), source).check(tree))
    return sorted(findings)


def _files(paths: Iterable[Path]) -> Iterator[Path]:
    for path in paths:
        if not path.is_dir():
            yield path
            continue
        for file in sorted(path.rglob("*.py")):
            parts = file.relative_to(path).parts[:-1]
            if not any(part.startswith(".") or part in _SKIPPED for part in parts):
                yield file


class _Linter:
    """Looks at one file."""

    def __init__(self, path: str, source: str) -> None:
        self.path = path
        self.allowed = {n for n, line in enumerate(source.splitlines(), 1) if _ALLOW.search(line)}
        self.findings: list[Finding] = []
        self.workflow = ""
        self.seen: set[tuple[str, int]] = set()
        self.roots: list[_Defined] = []

    def check(self, tree: ast.Module) -> list[Finding]:
        self._bind(_Scope(), tree.body, everywhere=True)
        for root in self.roots:
            self.workflow = getattr(root.node, "name", "")
            self._enter(root)
        return self.findings

    # --- names -------------------------------------------------------------------------------------------

    def _bind(self, scope: _Scope, body: list[ast.stmt], *, everywhere: bool = False) -> None:
        """Learn what the names of a body stand for; ``everywhere``: look for workflows in all that is inside, too."""
        for node in _statements(body):
            match node:
                case ast.Import(names=names):
                    for alias in names:
                        scope.known[alias.asname or alias.name.partition(".")[0]] = (
                            alias.name if alias.asname else alias.name.partition(".")[0]
                        )
                case ast.ImportFrom(module=module, names=names):
                    for alias in names:
                        scope.known[alias.asname or alias.name] = f"{module or ''}.{alias.name}"
                case ast.FunctionDef() | ast.AsyncFunctionDef():
                    defined = _Defined(node, scope, self._kind(node, scope))
                    scope.known[node.name] = defined
                    if everywhere:
                        self._find_roots(defined)
                case ast.ClassDef():
                    inner = _Scope(scope)
                    scope.known[node.name] = _Defined(node, inner, "class")
                    self._bind(inner, node.body, everywhere=everywhere)
                case ast.Assign(targets=[ast.Name(id=name)], value=value):
                    self._bind_value(scope, name, value, everywhere)
                case ast.AnnAssign(target=ast.Name(id=name), annotation=annotation, value=value):
                    if _is_set_type(annotation):
                        scope.known[name] = _SET
                    elif value is not None:
                        self._bind_value(scope, name, value, everywhere)

    def _bind_value(self, scope: _Scope, name: str, value: ast.expr, everywhere: bool) -> None:
        if self._is_set(value, scope):
            scope.known[name] = _SET
            return
        found = self._resolve(value, scope)
        if isinstance(value, ast.Call):
            called = self._resolve(value.func, scope)
            if isinstance(called, _Defined) and called.kind == "class":
                found = _Instance(called)
            elif len(value.args) == 1 and isinstance(inside := self._resolve(value.args[0], scope), _Defined):
                # charge = durable.activity(charge), order = durable.workflow(order)
                kind = _declared(called)
                if kind:
                    found = _Defined(inside.node, inside.scope, kind)
                    if kind == "workflow" and everywhere:
                        self.roots.append(found)
        scope.known[name] = _OTHER if found is None or (isinstance(found, str) and found.endswith(")")) else found

    def _kind(self, node: ast.FunctionDef | ast.AsyncFunctionDef, scope: _Scope) -> str:
        for decorator in node.decorator_list:
            called = decorator.func if isinstance(decorator, ast.Call) else decorator
            kind = _declared(self._resolve(called, scope))
            if kind:
                return kind
        return "function"

    def _find_roots(self, defined: _Defined) -> None:
        if defined.kind == "workflow":
            self.roots.append(defined)
        node = defined.node
        if not isinstance(node, (ast.ClassDef, ast.Lambda)):
            self._bind(_Scope(defined.scope), node.body, everywhere=True)

    def _resolve(self, node: ast.expr, scope: _Scope) -> object:
        """What an expression stands for: a full name such as ``datetime.datetime.now``, something defined here, or
        None."""
        match node:
            case ast.Name(id=name):
                return scope.find(name)
            case ast.Attribute(value=value, attr=attr):
                owner = self._resolve(value, scope)
                if isinstance(owner, str):
                    return f"{owner}.{attr}"
                if isinstance(owner, _Instance):
                    owner = owner.of
                if isinstance(owner, _Defined) and owner.kind == "class":
                    found = owner.scope.known.get(attr)
                    return found if isinstance(found, _Defined) else None
            case ast.Call(func=func):
                called = self._resolve(func, scope)
                if isinstance(called, str):
                    return f"{called}()"
                if isinstance(called, _Defined) and called.kind == "class":
                    return _Instance(called)
            case ast.Await(value=value):
                return self._resolve(value, scope)
        return None

    def _is_set(self, node: ast.expr, scope: _Scope) -> bool:
        match node:
            case ast.Set() | ast.SetComp():
                return True
            case ast.Name(id=name):
                return scope.find(name) is _SET
            case ast.Call(func=ast.Attribute(value=value, attr=attr)):
                return attr in _SET_METHODS and self._is_set(value, scope)
            case ast.Call(func=func):
                return self._resolve(func, scope) in ("builtins.set", "builtins.frozenset")
            case ast.BinOp(left=left, op=ast.BitOr() | ast.BitAnd() | ast.Sub() | ast.BitXor(), right=right):
                return self._is_set(left, scope) or self._is_set(right, scope)
        return False

    # --- looking -----------------------------------------------------------------------------------------

    def _enter(self, defined: _Defined) -> None:
        """Look into a function, once for each workflow."""
        node = defined.node
        if isinstance(node, ast.ClassDef):
            for name in ("__init__", "__post_init__", "__new__"):
                method = defined.scope.known.get(name)
                if isinstance(method, _Defined):
                    self._enter(method)
            return
        if (self.workflow, id(node)) in self.seen:
            return
        self.seen.add((self.workflow, id(node)))
        scope = _Scope(defined.scope)
        arguments = node.args
        for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
            scope.known[argument.arg] = _SET if _is_set_type(argument.annotation) else _OTHER
        first = (*arguments.posonlyargs, *arguments.args)[:1]
        owner = defined.scope
        if first and first[0].arg in ("self", "cls") and owner.outer is not None:
            holder = next((d for d in owner.outer.known.values() if isinstance(d, _Defined) and d.scope is owner), None)
            if holder is not None:
                scope.known[first[0].arg] = _Instance(holder)
        if isinstance(node, ast.Lambda):
            self._look(node.body, scope)
            return
        self._bind(scope, node.body)
        for statement in node.body:
            self._look(statement, scope)

    def _look(self, node: ast.AST, scope: _Scope) -> None:
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                for decorator in node.decorator_list:
                    self._look(decorator, scope)
                if node.decorator_list and self._kind(node, scope) == "function":
                    self._enter(_Defined(node, scope))  # a handler of signals, queries or updates
                return
            case ast.ClassDef():
                return
            case ast.Lambda():
                self._enter(_Defined(node, scope))
                return
            case ast.AnnAssign(value=value):
                if value is not None:
                    self._look(value, scope)
                return
            case ast.Call():
                if self._look_at_call(node, scope):
                    return
            case ast.For(iter=iterated) | ast.AsyncFor(iter=iterated) | ast.comprehension(iter=iterated):
                self._look_at_iteration(iterated, scope)
            case ast.Starred(value=value):
                self._look_at_iteration(value, scope)
            case ast.Name(ctx=ast.Load()) | ast.Attribute(ctx=ast.Load()):
                self._look_at_name(node, scope)
                found = self._resolve(node, scope)
                if isinstance(node, ast.Name) or (isinstance(found, str) and "(" not in found):
                    return
        for child in ast.iter_child_nodes(node):
            self._look(child, scope)

    def _look_at_call(self, node: ast.Call, scope: _Scope) -> bool:
        """Look at what is called; answers whether there is nothing more to look at inside."""
        func = node.func
        called = self._resolve(func, scope)
        if isinstance(called, str):
            package, _, last = called.rpartition(".")
            if package.partition(".")[0] == "dramatiq_durable" and last in _OUTSIDE:
                for argument in node.args[1:]:
                    self._look(argument, scope)
                return True
            rule = CALLS.get(called) or _family(called)
            if rule is not None:
                self._report(node, rule, called)
            elif called in SET_CONSUMERS:
                for argument in node.args:
                    self._look_at_iteration(argument, scope)
        elif isinstance(called, _Defined) and called.kind == "actor" and isinstance(func, ast.Name):
            self._report(node, _CALL, ast.unparse(func))
        if isinstance(func, ast.Attribute):
            receiver = self._resolve(func.value, scope)
            if func.attr in METHODS and not isinstance(receiver, _Defined):
                self._report(node, METHODS[func.attr], f".{func.attr}")
            elif func.attr in _SENDING and _may_send(receiver):
                self._report(node, _SEND, ast.unparse(func.value))
            elif func.attr == "pop" and not node.args and self._is_set(func.value, scope):
                self._report(node, _SETS, ast.unparse(func.value))
        return False

    def _look_at_iteration(self, node: ast.expr, scope: _Scope) -> None:
        if self._is_set(node, scope):
            self._report(node, _SETS, ast.unparse(node))

    def _look_at_name(self, node: ast.Name | ast.Attribute, scope: _Scope) -> None:
        found = self._resolve(node, scope)
        if isinstance(found, str):
            rule = ANYWHERE.get(found)
            if rule is not None:
                self._report(node, rule, found)
        elif isinstance(found, _Defined) and found.kind in ("function", "class"):
            self._enter(found)

    def _report(self, node: ast.expr, rule: Rule, name: str) -> None:
        if not self.allowed.isdisjoint({node.lineno, node.end_lineno or node.lineno}):
            return
        shown = name.removeprefix("builtins.").replace("()", "(...)")
        self.findings.append(
            Finding(
                self.path,
                node.lineno,
                node.col_offset + 1,
                self.workflow,
                f"`{shown}` {rule.what}",
                rule.instead.format(name=shown),
            )
        )


_SET_METHODS = {"union", "intersection", "difference", "symmetric_difference", "copy"}


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """All statements of a body, those inside of `if`, `for`, `try` and the like as well, but not of functions."""
    for statement in body:
        yield statement
        if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            continue
        for name in ("body", "orelse", "finalbody"):
            yield from _statements(getattr(statement, name, []))
        for handler in (*getattr(statement, "handlers", ()), *getattr(statement, "cases", ())):
            yield from _statements(handler.body)


def _declared(decorator: object) -> str | None:
    """What a decorator makes of a function."""
    if not isinstance(decorator, str):
        return None
    package, name = decorator.partition(".")[0], decorator.rpartition(".")[2]
    if package == "dramatiq_durable" and name in ("workflow", "activity"):
        return "workflow" if name == "workflow" else "actor"
    return "actor" if decorator == "dramatiq.actor" else None


def _family(called: str) -> Rule | None:
    parts = called.split(".")
    for length in range(len(parts) - 1, 0, -1):
        rule = FAMILIES.get(".".join(parts[:length]))
        if rule is not None:
            # Exceptions and other types are no I/O.
            return None if parts[-1].endswith(("Error", "Exception", "Timeout", "Warning")) else rule
    return None


def _may_send(receiver: object) -> bool:
    """Whether it may be an actor: one that is declared here, or something that was imported."""
    if isinstance(receiver, _Defined):
        return receiver.kind in ("actor", "workflow")
    return isinstance(receiver, str) and "." in receiver and not receiver.endswith(")")


def _is_set_type(annotation: ast.expr | None) -> bool:
    if isinstance(annotation, ast.Subscript):
        annotation = annotation.value
    name = getattr(annotation, "id", None) or getattr(annotation, "attr", None)
    return name in ("set", "frozenset", "Set", "FrozenSet", "AbstractSet", "MutableSet")
