"""The folder for OptunaHub: what it exports works, and its README has the sections that the hub asks for."""

import importlib.util
import re
from pathlib import Path

import optuna

FOLDER = Path(__file__).parents[2] / "package" / "samplers" / "evopress"


def test_the_readmes_example_runs_and_finds_something() -> None:
    spec = importlib.util.spec_from_file_location("hub_evopress", FOLDER / "__init__.py")
    hub = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hub)
    code = re.search(r"## Example\n\n```python\n(.*?)```", (FOLDER / "README.md").read_text(), re.S).group(1)
    code = code.replace("import optunahub\n", "").replace('optunahub.load_module("samplers/evopress")', "hub")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    names = {"hub": hub}
    exec(code.replace("hub = hub\n", ""), names)
    assert names["study"].best_value < names["study"].trials[0].value
    assert len(names["study"].trials) == 200


def test_the_folder_has_what_the_hub_asks_for() -> None:
    text = (FOLDER / "README.md").read_text()
    assert all(f"\n## {section}\n" in text for section in ("Abstract", "APIs", "Installation", "Example"))
    assert {"LICENSE", "README.md", "__init__.py", "example.py"} <= {path.name for path in FOLDER.iterdir()}
    compile((FOLDER / "example.py").read_text(), "example.py", "exec")
