"""README's commands, as they stand: run on the tiny model and small sizes, or, where they need more, composed."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from mlflow import MlflowClient

from evosweep.cli.main import SUBCOMMANDS
from evosweep.core.events import Silent
from evosweep.core.results import read_result
from evosweep.models.load import Random
from evosweep.testing.tiny import tiny_config
from tests.cli import TINY, evosweep, workplace, write_corpus
from tests.test_docs import PAGES, ROOT, blocks

README = ROOT / "README.md"
RUN = "runs/evosweep/2026-01-31_12-00-00"  # stands for a run's folder
PREFIX = "python -m evosweep "

# Composed, not run: what they need, and why.
COMPOSED = {
    "torchrun": "several processes with a GPU each",
    "mlflow": "a server that does not end; tests/test_browser.py looks at it",
    "optuna-dashboard": "a server that does not end; tests/test_browser.py looks at it",
    "make": "`make test` runs this test; tests/test_smollm2.py runs the quickstart",
}
# Sizes of single commands, beside those of every tiny run.
SMALLER = {
    "+experiment=compare": ["sampler=uniform,evopress", "seed=0,1", "tokens.seed=0,1"],
    "+experiment=tune": ["hydra.sweeper.trials=2", "search.generations=3", "search.tokens=1000"],
}
COMMANDS = [line for text in blocks(README, "sh") for line in text.splitlines() if line.strip()]


def program(command: str) -> str:
    return shlex.split(command)[0]


def results(folder: Path) -> set[Path]:
    return {path for path in folder.joinpath("runs").rglob("result.json") if path.with_name("config.yaml").is_file()}


def small(command: str, model: Path) -> list[str]:
    """Return a command's arguments with small sizes behind them; nothing that it says is taken away."""
    arguments = [text.replace("org/name", str(model)) for text in shlex.split(command.removeprefix(PREFIX))]
    given = {text.lstrip("+").split("=")[0] for text in arguments}
    extra = [text for key, more in SMALLER.items() if key in arguments for text in more]
    tiny = [text for text in TINY if text.split("=")[0] not in given | {text.split("=")[0] for text in extra}]
    if "model" in given:  # 900 MB are more than the tiny model's largest levels
        arguments = [text.replace("=900", "=0.1") for text in arguments]
    return [*arguments, *extra, *tiny, *(["report=none"] if "-m" in arguments or extra else [])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A user's folder: a model, a text, and what all commands leave."""
    with workplace(tmp_path_factory.mktemp("readme")) as folder:
        shutil.copy(write_corpus(folder), folder / "my.jsonl")
        shutil.copy(write_corpus(folder), folder / "other.jsonl")
        loaded = Random(name="tiny", config=lambda: tiny_config(hidden_size=64, intermediate_size=128), spread=0.15)
        model = loaded.load(progress=Silent())
        model.model.save_pretrained(folder / "model_of_mine")
        model.tokenizer.save_pretrained(folder / "model_of_mine")
        yield folder


def test_every_command_is_run_or_its_reason_named() -> None:
    assert len(COMMANDS) > 15
    unknown = [line for line in COMMANDS if program(line) not in {"python", "evosweep", *COMPOSED}]
    assert not unknown


SEARCHES = [line for line in COMMANDS if line.startswith(PREFIX) and "--cfg" not in line]


@pytest.mark.parametrize("command", SEARCHES)
def test_a_search_of_readme_runs(folder: Path, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = results(folder)
    assert evosweep(*small(command, folder / "model_of_mine")) == 0, capsys.readouterr().err
    rows = [read_result(path) for path in results(folder) - before]
    assert rows and all(row["kl"] >= 0 and row["tokens"] >= 0 for row in rows)
    shown = capsys.readouterr().out
    assert "mlflow ui" in shown and "http://127.0.0.1:5000/#/experiments/" in shown
    assert all(name in shown for name in {row["sampler"] for row in rows}), "no table"
    client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    assert {run.info.status for run in runs} == {"FINISHED"}


def test_all_settings_are_printed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (command,) = [line for line in COMMANDS if "--cfg" in line]
    assert evosweep(*shlex.split(command.removeprefix(PREFIX))) == 0
    assert "bits_per_weight: null" in capsys.readouterr().out


AFTER = [line for line in COMMANDS if program(line) == "evosweep"]


@pytest.mark.parametrize("command", AFTER)
def test_what_follows_a_run(folder: Path, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    if not list(folder.glob("runs/evosweep/*/result.json")):
        assert evosweep(*TINY) == 0
    run = min(path.parent for path in folder.glob("runs/evosweep/*/result.json"))
    capsys.readouterr()
    code = evosweep(*shlex.split(command.replace(RUN, str(run.relative_to(folder))))[1:])
    shown = capsys.readouterr()
    if " resume " in command:  # that search is over, and it says so
        assert code == 2 and "nothing is left to resume" in shown.err
        return
    assert code == 0, shown.err
    if " export " in command:
        assert (run / "model" / "model.safetensors").is_file()
    else:
        assert shown.out.strip()


OTHERS = [line for line in COMMANDS if program(line) in COMPOSED]


@pytest.mark.parametrize("command", OTHERS)
def test_what_is_not_run_is_there(command: str) -> None:
    words = shlex.split(command)
    if words[0] == "torchrun":
        composed(words[words.index("evosweep") + 1 :])
    elif words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    else:
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        found = shutil.which(words[0], path=path)
        assert found, f"{words[0]} is not installed"
        options = [word for word in words if word.startswith("--")]
        if options:
            done = subprocess.run([found, "--help"], capture_output=True, text=True, check=True)
            assert all(option in done.stdout for option in options)


def composed(arguments: list[str]) -> None:
    """Compose what a command asks for; of a sweep, its first job."""
    overrides = [text for text in arguments if not text.startswith("-")]
    if "--config-dir" in arguments:
        return
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        parsed = OverridesParser.create().parse_overrides(overrides)
        single = [
            override.input_line
            if not override.is_sweep_override()
            else f"{override.input_line.split('=')[0]}=" + next(override.sweep_string_iterator())
            for override in parsed
            if not (override.is_sweep_override() and override.sweep_iterator and "glob(" in override.input_line)
        ]
        compose("config", overrides=single)


@pytest.mark.parametrize(
    "command",
    [
        line
        for page in PAGES
        for text in blocks(page, "sh")
        for line in text.replace("\\\n", " ").splitlines()
        if "-m evosweep " in line and page != README
    ],
)
def test_commands_of_the_documentation_compose(command: str) -> None:
    arguments = shlex.split(command.split("-m evosweep ", 1)[1], comments=True)
    arguments = [text for text in arguments if "$" not in text]  # of the shell
    composed([text for text in arguments[1:] if "=" in text] if arguments[0] in SUBCOMMANDS else arguments)


def test_the_python_of_readme_is_the_example() -> None:
    (source,) = [text for text in blocks(README, "python") if "import evosweep\n" in text]
    assert source.strip() in (ROOT / "examples" / "quick.py").read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 15
