"""A package imports only lower ranks."""

import ast
from pathlib import Path

import evosweep

ROOT = Path(evosweep.__file__).parent
RANK = {
    "core": 0,
    "assets": 1,
    "parallel": 1,  # a module of its own, not a package
    "search": 2,
    "allocators": 2,
    "data": 1.5,  # models are given the images of its windows
    "models": 2,
    "compressors": 2,
    "fitness": 3,
    "store": 3,
    "samplers": 3,
    "tracking": 4,
    "evaluate": 4,
    "exporters": 5,
    "workbench": 5,
    "testing": 6,
    "finish": 6,
    "task": 7,
    "task_checks": 8,
    "result_row": 8,
    "shared_search": 8,
    "pipeline": 9,
    "budget_list": 10,
    "quality_target": 11,
    "api": 12,
    "cli": 12,
}
FREE_OF = {
    "core": {"torch", "optuna", "mlflow", "hydra", "transformers"},
    "search": {"torch", "optuna", "mlflow", "hydra", "transformers", "scipy"},
    "allocators": {"torch", "optuna", "mlflow", "hydra", "transformers"},
    "samplers": {"torch", "mlflow", "hydra", "transformers"},
    "evaluate": {"optuna", "mlflow", "hydra"},
    "workbench": {"hydra", "omegaconf", "mlflow", "rich", "optuna"},
    "pipeline": {"hydra", "omegaconf", "mlflow", "rich", "optuna"},
    "budget_list": {"hydra", "omegaconf", "mlflow", "rich", "optuna"},
    "quality_target": {"hydra", "omegaconf", "mlflow", "rich", "optuna"},
    "api": {"hydra", "omegaconf", "mlflow", "rich", "optuna"},
    "store": {"optuna", "mlflow", "hydra"},
    "tracking": {"torch", "hydra", "transformers"},
}


def modules(package: str) -> list[Path]:
    """Return the files of a package, or the one of a module that lies beside the packages."""
    return [ROOT / f"{package}.py"] if (ROOT / f"{package}.py").is_file() else list((ROOT / package).rglob("*.py"))


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative imports hide ranks"
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_every_package_has_a_rank() -> None:
    packages = {path.name for path in ROOT.iterdir() if (path / "__init__.py").exists() and path.name != "conf"}
    beside = {path.stem for path in ROOT.glob("*.py")} - {"__init__", "__main__"}
    assert packages | beside == set(RANK)


def test_packages_import_only_lower_ranks() -> None:
    wrong = []
    for package, rank in RANK.items():
        for path in modules(package):
            for name in imports(path):
                parts = name.split(".")
                if parts[0] != "evosweep" or len(parts) == 1 or parts[1] in (package, "__version__"):
                    continue
                if RANK.get(parts[1], 99) >= rank:
                    wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong, wrong


def test_pure_packages_stay_free_of_frameworks() -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for package, banned in FREE_OF.items()
        for path in modules(package)
        for name in imports(path)
        if name.split(".")[0] in banned
    ]
    assert not wrong, wrong
