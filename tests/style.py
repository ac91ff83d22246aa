"""Measures the style that the code shall have; what still departs from it is counted in ``style_allowed.json``.

``python -m tests.style`` lists every departure with its file and line and lowers the counts in ``style_allowed.json``
to what is left; ``--accept`` also raises them, which only a renamed or moved file needs.
"""

import ast
import functools
import io
import json
import re
import sys
import tokenize
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

import evosweep

ROOT = Path(evosweep.__file__).parent
ALLOWED = Path(__file__).with_name("style_allowed.json")
MODULE_LINES = 400
FUNCTION_LINES = 60
FUNCTION_LINES_P90 = 25
SHARED_NAMES = {"__init__", "__main__", "base"}

# Words that only those who wrote the code understood. A docstring's first line says what is returned or done.
WORDS = re.compile(
    r"\b(told|tells?|hears?|heard|wears?|said|what is there|have a say|has a say|lives?|travels?|"
    r"who asks|the like|all told|in its place|somebody|someone|whoever)\b",
    re.I,
)
NAMES = {"each", "place", "places", "told", "said", "heard", "like"}

Finding = tuple[Path, int, str]  # file, line, what


def modules() -> dict[Path, ast.Module]:
    """Return the syntax tree of every module of the package."""
    return _parsed(ROOT)


@functools.cache
def _parsed(root: Path) -> dict[Path, ast.Module]:
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(root.rglob("*.py"))}


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Yield all functions and methods."""
    yield from (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def docstring_words() -> Iterator[Finding]:
    """Yield words of our own in the first lines of docstrings."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for path, tree in modules().items():
        for node in ast.walk(tree):
            first = (ast.get_docstring(node) or "").partition("\n")[0] if isinstance(node, documented) else ""
            for match in WORDS.finditer(first):
                yield path, getattr(node, "lineno", 1), f"{match[0]!r} in: {first}"


def comment_words() -> Iterator[Finding]:
    """Yield words of our own in comments."""
    for path in modules():
        readline = io.StringIO(path.read_text(encoding="utf-8")).readline
        for token in tokenize.generate_tokens(readline):
            if token.type == tokenize.COMMENT:
                for match in WORDS.finditer(token.string):
                    yield path, token.start[0], f"{match[0]!r} in: {token.string}"


def names() -> Iterator[Finding]:
    """Yield variables and parameters with names of our own."""
    for path, tree in modules().items():
        for node in ast.walk(tree):
            name = node.arg if isinstance(node, ast.arg) else ""
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                name = node.id
            if name in NAMES:
                yield path, node.lineno, name


def missing_args() -> Iterator[Finding]:
    """Yield public functions of three or more parameters, and classes built from as many, without ``Args:``.

    Fixtures are left out: pytest calls them, with other fixtures.
    """
    for path, tree in modules().items():
        owners = {method: node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) for method in node.body}
        for function in functions(tree):
            owner = owners.get(function)
            built = function.name == "__init__" and isinstance(owner, ast.ClassDef)
            public = built or not function.name.startswith(("_", "test_"))
            fixture = any("fixture" in ast.unparse(decorator) for decorator in function.decorator_list)
            if fixture or not public or (isinstance(owner, ast.ClassDef) and owner.name.startswith("_")):
                continue
            parameters = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
            count = sum(parameter.arg not in {"self", "cls"} for parameter in parameters)
            documented = [ast.get_docstring(function) or "", ast.get_docstring(owner) or "" if built and owner else ""]
            if count >= 3 and not any("Args:" in text for text in documented):
                yield path, function.lineno, f"{function.name} has {count} parameters and no Args:"


def double_assignments() -> Iterator[Finding]:
    """Yield ``a, b = x, y`` where two lines would do: no swap, nothing on the right is assigned on the left."""
    for path, tree in modules().items():
        for node in ast.walk(tree):
            if not (isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple)):
                continue
            target = node.targets[0]
            if isinstance(target, ast.Tuple) and len(target.elts) > 1:
                left = {ast.unparse(item) for item in target.elts}
                if not left & {ast.unparse(item) for item in ast.walk(node.value) if isinstance(item, ast.expr)}:
                    yield path, node.lineno, ast.unparse(node)


def long_functions() -> Iterator[Finding]:
    """Yield functions over the hard limit."""
    for path, tree in modules().items():
        for function in functions(tree):
            lines = (function.end_lineno or 0) - function.lineno + 1
            if lines > FUNCTION_LINES:
                yield path, function.lineno, f"{function.name} has {lines} lines"


def long_modules() -> Iterator[Finding]:
    """Yield modules of too many lines."""
    for path in modules():
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > MODULE_LINES:
            yield path, lines, f"{lines} lines"


def repeated_names() -> Iterator[Finding]:
    """Yield modules that share their name with another."""
    count = Counter(path.stem for path in modules())
    for path in modules():
        if count[path.stem] > 1 and path.stem not in SHARED_NAMES:
            yield path, 1, f"{count[path.stem]} modules are called {path.stem}"


def library_names() -> Iterator[Finding]:
    """Yield modules that are called as a library that they import."""
    for path, tree in modules().items():
        for node in ast.walk(tree):
            imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            imported += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if path.stem in {name.partition(".")[0] for name in imported}:
                yield path, node.lineno, f"imports {path.stem}"
                break


def import_circles() -> Iterator[Finding]:
    """Yield modules that import each other, directly or through others, inside of functions too."""
    trees = modules()
    numbers = {_dotted(path): number for number, path in enumerate(trees)}
    edges = [
        (numbers[_dotted(path)], numbers[name])
        for path, tree in trees.items()
        for name in _imports(tree, set(numbers))
        if name != _dotted(path)
    ]
    ones = np.ones(len(edges))
    graph = coo_array((ones, tuple(zip(*edges, strict=True))), shape=(len(numbers), len(numbers)))
    _, component = connected_components(graph, connection="strong")
    for path, label in zip(trees, component, strict=True):
        members = [name for name, number in numbers.items() if component[number] == label]
        if len(members) > 1:
            yield path, 1, f"in a circle: {', '.join(members)}"


def function_lines() -> list[int]:
    """Return the number of lines of every function, decorators left out."""
    return [(f.end_lineno or 0) - f.lineno + 1 for tree in modules().values() for f in functions(tree)]


def _dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")


def _imports(tree: ast.Module, known: set[str]) -> set[str]:
    """Return the modules of the package that a module names in an import."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            inside = {f"{node.module}.{alias.name}" for alias in node.names} & known
            found |= inside or {node.module or ""}
    return found & known


RULES: dict[str, Callable[[], Iterator[Finding]]] = {
    rule.__name__: rule
    for rule in (
        docstring_words,
        comment_words,
        names,
        missing_args,
        double_assignments,
        long_functions,
        long_modules,
        repeated_names,
        library_names,
        import_circles,
    )
}


def allowed(rule: str) -> dict[str, int]:
    """Return how many departures from a rule a file may have for now, by its path in the package."""
    return json.loads(ALLOWED.read_text(encoding="utf-8")).get(rule, {}) if ALLOWED.exists() else {}


def excess(rule: str) -> list[str]:
    """Return the departures, as ``file:line: what``, in files that have more of them than they may."""
    found = list(RULES[rule]())
    count = Counter(path.relative_to(ROOT).as_posix() for path, _, _ in found)
    over = {name for name, number in count.items() if number > allowed(rule).get(name, 0)}
    return [f"{path}:{line}: {what}" for path, line, what in found if path.relative_to(ROOT).as_posix() in over]


def main() -> None:
    """List departures and lower the counts."""
    kept = {}
    for name, rule in RULES.items():
        found = list(rule())
        for path, line, what in found:
            print(f"{name}: {path.relative_to(ROOT.parent)}:{line}: {what}")  # noqa: T201
        count = Counter(path.relative_to(ROOT).as_posix() for path, _, _ in found)
        before = allowed(name)
        accept = "--accept" in sys.argv
        kept[name] = {file: n if accept else min(n, before.get(file, 0)) for file, n in sorted(count.items())}
        kept[name] = {file: n for file, n in kept[name].items() if n}
    ALLOWED.write_text(json.dumps({name: files for name, files in kept.items() if files}, indent=1) + "\n")


if __name__ == "__main__":
    main()
