"""Names of a ``_target_``'s arguments, read from its source: a typo is reported before torch is imported."""

import ast
import importlib
import importlib.util
import inspect
from pathlib import Path
from typing import Any

from evosweep.core.errors import SettingError

PARSES = 3  # times that a source is parsed before its module is imported instead


def parameters(target: Any, path: str) -> list[str] | None:
    """Return the argument names of a class or function; None if it takes any.

    Args:
        target: Its dotted path.
        path: Where the configuration names it, for the error.

    Raises:
        SettingError: There is no such class or function.
    """
    if isinstance(target, str) and target.startswith("evosweep."):
        found = _static(target)
        if found is not None:
            return found
    return _imported(target, path)


def _imported(target: Any, path: str) -> list[str] | None:
    try:
        module, _, name = target.rpartition(".")
        signature = inspect.signature(getattr(importlib.import_module(module), name))
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise SettingError(f"{path}._target_", allowed="an importable class or function", got=target) from error
    kinds = signature.parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in kinds):
        return None
    return [parameter.name for parameter in kinds]


def _static(target: str) -> list[str] | None:
    """Return the argument names without importing the module; None where those are not in its source."""
    module, _, name = target.rpartition(".")
    tree = _parsed(module)
    if tree is None:
        return None
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return _arguments(node, skip=0)
        if isinstance(node, ast.ClassDef) and node.name == name:
            return _of_class(node, tree, module)
    return None


def _of_class(node: ast.ClassDef, tree: ast.Module, module: str) -> list[str] | None:
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name == "__init__":
            own = _arguments(item, skip=1)
            if own is None or item.args.kwarg is None:
                return own
            handed_on = _inherited(node, tree, module) if node.bases else None
            return None if handed_on is None else [*own, *handed_on]
    inherited = _inherited(node, tree, module)
    if inherited is None:
        return None
    if not any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
        return inherited
    fields = [
        item.target.id
        for item in node.body
        if isinstance(item, ast.AnnAssign)
        and isinstance(item.target, ast.Name)
        and "ClassVar" not in ast.unparse(item.annotation)
    ]
    return list(dict.fromkeys([*inherited, *fields]))


def _inherited(node: ast.ClassDef, tree: ast.Module, module: str) -> list[str] | None:
    """Return the argument names of a class's bases; None where they are not in the source."""
    inherited: list[str] = []
    for base in node.bases:
        if not isinstance(base, ast.Name):
            return None
        found = _static(f"{_home(base.id, tree, module)}.{base.id}")
        if found is None:
            return None
        inherited += found
    return inherited


def _home(name: str, tree: ast.Module, module: str) -> str:
    """Return the module that a base class comes from."""
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and any(alias.name == name for alias in node.names):
            return node.module or module
    return module


def _arguments(node: ast.FunctionDef, *, skip: int) -> list[str] | None:
    if node.args.vararg is not None or (node.args.kwarg is not None and not skip):
        return None
    return [argument.arg for argument in [*node.args.posonlyargs, *node.args.args][skip:] + node.args.kwonlyargs]


def _parsed(module: str) -> ast.Module | None:
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return None
    text = Path(spec.origin).read_text(encoding="utf-8")
    for _ in range(PARSES):
        try:
            return ast.parse(text)
        except SystemError:  # python/cpython#106905: another thread parsed at the same time
            continue
    return None
