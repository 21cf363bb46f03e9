"""Small faults of a module: changes of its syntax tree that its tests ought to notice.

A fault is a swapped comparison or operator, a number one higher, another string, a condition
negated, a value not returned, a statement, decorator or call such as `.strip()` left out.
Messages for people (strings with a space), docstrings and annotations are left alone.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass

SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    **{ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt},
    **{ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is},
    **{ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And},
    **{ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult},
    **{ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult, ast.Pow: ast.Mult, ast.BitOr: ast.BitAnd},
    **{ast.BitAnd: ast.BitOr, ast.LShift: ast.RShift, ast.RShift: ast.LShift},
    **{ast.Break: ast.Continue, ast.Continue: ast.Break},
}


@dataclass
class Fault:
    """One change of a syntax tree: `parent.field` (or its item `place`) becomes `new`."""

    parent: ast.AST
    field: str
    place: int | None
    new: ast.AST | None  # None: the item is left out
    lines: range  # of the statement around it
    name: str  # line: before -> after

    def plant(self) -> None:
        """Change the tree."""
        if self.place is None:
            setattr(self.parent, self.field, self.new)
        elif self.new is None:
            del getattr(self.parent, self.field)[self.place]
        else:
            getattr(self.parent, self.field)[self.place] = self.new


def faults(tree: ast.Module) -> list[Fault]:
    """Return every fault of a module, in the order of its lines."""
    return list(_below(tree, range(0)))


def _below(node: ast.AST, lines: range) -> Iterator[Fault]:
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "type_comment", "ctx") or _is_overload(node):
            continue
        for place, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if not isinstance(child, ast.AST) or _is_text(node, child):
                continue
            around = _lines(child) if isinstance(child, ast.stmt) else lines
            for new in _replacements(node, field, child):
                before = deepcopy(child)
                yield Fault(node, field, place, new, around, _name(node, before, new))
            yield from _below(child, around)


def _replacements(parent: ast.AST, field: str, node: ast.AST) -> Iterator[ast.AST | None]:
    if type(node) in SWAPS:
        yield SWAPS[type(node)]()
    if isinstance(node, ast.Constant):
        if isinstance(node.value, bool):
            yield ast.Constant(not node.value)
        elif isinstance(node.value, int | float):
            yield ast.Constant(node.value + 1)
        elif isinstance(node.value, str):
            yield ast.Constant(node.value + "x")
    if isinstance(node, ast.UnaryOp):
        yield node.operand
    match node:  # x.strip() -> x
        case ast.Call(func=ast.Attribute(value=value), args=[], keywords=[]):
            if not isinstance(parent, ast.Expr):
                yield value
    is_condition = field == "test" or (isinstance(parent, ast.comprehension) and field == "ifs")
    is_negated = isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not)
    if is_condition and isinstance(node, ast.expr) and not is_negated:
        yield ast.UnaryOp(ast.Not(), node)
    if isinstance(parent, ast.Return) and not isinstance(node, ast.Constant):
        yield ast.Constant(None)
    is_stored = isinstance(node, ast.Assign) and not isinstance(node.targets[0], ast.Name)
    if is_stored or isinstance(node, ast.Expr | ast.AugAssign | ast.Raise):
        yield ast.Pass()
    if field == "decorator_list":
        yield None


def _is_text(parent: ast.AST, node: ast.AST) -> bool:
    """Say whether a node is a docstring or what a person reads."""
    if not isinstance(node, ast.Constant) and not isinstance(node, ast.Expr):
        return False
    constant = node.value if isinstance(node, ast.Expr) else node
    if not isinstance(constant, ast.Constant) or not isinstance(constant.value, str):
        return isinstance(constant, ast.Constant) and constant.value is ...
    return isinstance(parent, ast.JoinedStr) or isinstance(node, ast.Expr) or " " in constant.value


def _is_overload(node: ast.AST) -> bool:
    return any(isinstance(x, ast.Name) and x.id == "overload" for x in _decorators(node))


def _decorators(node: ast.AST) -> list[ast.expr]:
    return list(getattr(node, "decorator_list", ()))


def _lines(statement: ast.stmt) -> range:
    """Return the lines of a simple statement, or of the head of a compound one."""
    first = min([statement.lineno, *(x.lineno for x in _decorators(statement))])
    body: list[ast.stmt] = getattr(statement, "body", [])
    end = body[0].lineno - 1 if body else statement.end_lineno or first
    return range(first, max(first, end) + 1)


def _name(parent: ast.AST, old: ast.AST, new: ast.AST | None) -> str:
    line = getattr(old, "lineno", getattr(parent, "lineno", 0))
    before, after = (
        f"{type(node).__name__} of {ast.unparse(parent)[:60]}"
        if isinstance(node, ast.operator | ast.cmpop | ast.boolop)
        else "nothing"
        if node is None
        else ast.unparse(node)[:60]
        for node in (old, new)
    )
    return f"{line}: {before} -> {after.split(' of ')[0]}"
