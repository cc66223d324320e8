"""Analyses tests: which functions of the program they call, and whether plain data can pass between tests and program.

Only the text of the tests counts. If the program mattered, it could return an object of its own class, and its sample would be
left out instead of failed.
"""

from __future__ import annotations

import ast
import builtins
import symtable
from collections.abc import Iterator, Sequence

_PLAIN = (int, float, complex, str, bytes, list, tuple, dict, set, frozenset, type(None), type(iter([])))
_ATTRIBUTES = {name for kind in _PLAIN for name in dir(kind)}
_TAKE_FUNCTIONS = {"map", "filter", "callable"}


def called(tests: Sequence[str]) -> list[str]:
    """Return the names of the program's functions that the tests call.

    Raises:
        ValueError: the tests are not Python, call no function of the program, or need more than plain data.
    """
    text = "\n".join(tests)
    try:
        tree = ast.parse(text)
        bound, free = _names(symtable.symtable(text, "tests", "exec"))
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"the tests are not Python: {error}") from error
    if not free:  # the tests may call a function named like a builtin, such as `sum`
        calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
        free = {f.id for f in calls if isinstance(f, ast.Name)} - bound
        if len(free) != 1:
            raise ValueError("the tests call no function of the program")
    if reason := next(_objects(tree, bound, free), None):
        raise ValueError(reason)
    return sorted(free)


def _names(top: symtable.SymbolTable) -> tuple[set[str], set[str]]:
    """Return (names that the tests define at module level, names that they read but neither they nor Python define)."""
    tables = [top]
    for table in tables:
        tables.extend(table.get_children())
    symbols = [(table, symbol) for table in tables for symbol in table.get_symbols()]
    defined = [(t, s) for t, s in symbols if s.is_assigned() or s.is_imported()]
    bound = {s.get_name() for t, s in defined if t is top or s.is_declared_global()}
    read = {s.get_name() for t, s in symbols if s.is_referenced() and (t is top or s.is_global())}
    return bound, read - bound - set(dir(builtins))


def _objects(tree: ast.AST, bound: set[str], free: set[str]) -> Iterator[str]:
    """Yield the reasons why the tests need objects of the program's own classes."""
    parent = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    results: set[str] = set()  # variables that hold return values of the program

    def is_call(node: ast.AST | None) -> bool:
        return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in free

    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in free and isinstance(node.ctx, ast.Load):
            above = parent[node]
            if isinstance(above, ast.keyword) or (isinstance(above, ast.Call) and above.func is node):
                continue
            taker = above.func if isinstance(above, ast.Call) else None
            if not isinstance(taker, ast.Attribute) and getattr(taker, "id", "") not in bound | _TAKE_FUNCTIONS:
                yield f"they use the program's `{node.id}` without calling it"
        elif is_call(node):
            assert isinstance(node, ast.Call)
            above, name = parent[node], ast.unparse(node.func)
            is_class = name[0].isupper()
            if isinstance(above, ast.Attribute) and (is_class or above.attr not in _ATTRIBUTES):
                yield f"they use `.{above.attr}` of the result of `{name}`"
            elif (isinstance(above, ast.Call) and above.func is node) or isinstance(above, ast.withitem | ast.Await):
                yield f"they call, enter or await the result of `{name}`"
            elif isinstance(above, ast.Expr) and any(isinstance(arg, ast.Name) for arg in node.args):
                yield f"they inspect arguments that `{name}` changes in place, but it gets copies"
            elif isinstance(above, ast.Assign | ast.AnnAssign | ast.NamedExpr):
                if is_class:
                    yield f"they keep an instance of `{name}`"
                targets = above.targets if isinstance(above, ast.Assign) else [above.target]
                results |= {target.id for target in targets if isinstance(target, ast.Name)}
            elif is_class:
                while isinstance(above, ast.List | ast.Tuple | ast.keyword | ast.Starred):
                    above = parent[above]
                if is_call(above):
                    yield f"they pass an instance of `{name}`"
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Attribute)
            and node.attr not in _ATTRIBUTES
            and getattr(node.value, "id", "") in results
        ):
            yield f"they use `.{node.attr}` of a result of the program"
