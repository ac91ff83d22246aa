"""Questions, likelihoods of their choices, and accuracies."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest
import torch
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna_dashboard import get_note

from evosweep.core.errors import DataError, SettingError
from evosweep.core.results import read_result
from evosweep.evaluate.tasks.accuracy import GREEDY, PER_CHARACTER, SUM, Accuracy, compared, is_right
from evosweep.evaluate.tasks.library import LIBRARY
from evosweep.evaluate.tasks.log_likelihood import Encoded, Likelihoods, encode, likelihoods
from evosweep.evaluate.tasks.questions import Question, read_questions
from evosweep.evaluate.tasks.tasks import Tasks
from evosweep.testing.tiny import tiny_model
from tests.cli import TINY, evosweep, workplace


def request(number: int, context: object, choice: str, label: object) -> dict:
    return {"doc_id": number, "request": {"context": context, "continuation": choice}, "label": label}


def lines(*requests: dict) -> bytes:
    return "".join(json.dumps(item) + "\n" for item in requests).encode()


FILE = lines(
    request(0, "Ice is", " hot", 1),
    request(0, "Ice is", " cold", 1),
    request(1, "The cup is in the box since the cup", " is small.", 0),
    request(1, "The cup is in the box since the box", " is small.", 0),
    request(2, "Two words are", " enough", ["enough"]),
    request(1_000_000, "Answer:", " hot", 1),
)


@pytest.mark.parametrize("content", [FILE, gzip.compress(FILE)])
def test_requests_of_a_question_are_its_choices(content: bytes) -> None:
    first, second, third = read_questions(content, name="own.jsonl")
    assert first == [Question("Ice is", (" hot", " cold"), 1)]
    assert [part.choices for part in second] == [(" is small.",), (" is small.",)] and second[0].right == 0
    assert third == [Question("Two words are", (" enough",), 0)]
    assert len(read_questions(content, name="own.jsonl", limit=2)) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "own.jsonl, line 1: not JSON"),
        (b"[]\n", "own.jsonl, line 1: request must be an object, got None"),
        (lines(request(0, 5, " hot", 0)), "own.jsonl, line 1: request.context must be text, got 5"),
        (FILE + lines(request(3, "Ice is", " hot", "1")), "own.jsonl, line 7: label must be an integer, got '1'"),
        (lines(request(0, "Ice is", " hot", 4)), "own.jsonl: label of question 0 is 4, of 1 choices"),
        (b"", "own.jsonl has no question in it"),
        (b"\x1f\x8bno", "own.jsonl is no text"),
    ],
)
def test_a_wrong_line_is_named(content: bytes, message: str) -> None:
    with pytest.raises(DataError) as caught:
        read_questions(content, name="own.jsonl")
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("batch_tokens", [16, 4096])
@pytest.mark.parametrize("worth", [0, 12, 10**9])
def test_likelihoods_are_those_of_whole_sequences(batch_tokens: int, worth: int) -> None:
    model = tiny_model().model
    generator = torch.Generator().manual_seed(3)
    made = []
    for index, (length, sizes) in enumerate([(5, (1, 1)), (5, (3, 1, 4)), (9, (2,)), (5, (1, 2))]):
        tokens = [torch.randint(0, 200, (size,), generator=generator).tolist() for size in (length, *sizes)]
        made.append(Encoded(index, tuple(tokens[0]), tuple(map(tuple, tokens[1:]))))
    found = likelihoods(model, made, batch_tokens=batch_tokens, worth=worth)
    for item in made:
        (parts,) = found[item.index]
        for choice, value, greedy in zip(item.choices, parts.sums, parts.greedy, strict=True):
            ids = torch.tensor([[*item.context, *choice]])
            with torch.inference_mode():
                logits = model(input_ids=ids).logits[0, len(item.context) - 1 : -1].double()
            wanted = logits.log_softmax(-1).gather(-1, torch.tensor(choice)[:, None]).sum()
            assert value == pytest.approx(float(wanted), abs=1e-4)
            assert greedy == (logits.argmax(-1).tolist() == list(choice))


def test_a_long_context_loses_its_beginning() -> None:
    def tokenizer(texts: list[str]) -> dict:
        return {"input_ids": [list(text.encode()) for text in texts]}

    (item,) = encode(tokenizer, [(4, Question("abcdef", (" x", " y"), 0))], longest=5)
    assert bytes(item.context) == b"def" and [bytes(choice) for choice in item.choices] == [b" x", b" y"]


def test_scores_choose_otherwise() -> None:
    question = [Question("c", (" long answer", " no"), 0)]
    said = [Likelihoods((-6.0, -3.0), (True, False))]
    assert not is_right(question, said, SUM)
    assert is_right(question, said, PER_CHARACTER) and is_right(question, said, GREEDY)


def test_accuracies_are_compared_question_by_question() -> None:
    row = Accuracy((True, True, False, True)).row()
    assert row["accuracy"] == 0.75 and row["stderr"] == pytest.approx(0.25) and row["correct"] == "1101"
    assert compared([True] * 10 + [False] * 5, [False] * 10 + [False] * 5) == (pytest.approx(2 / 3), 2 / 2**10)
    assert compared([True, False], [True, False]) == (0.0, 1.0)


def test_bad_settings_are_refused() -> None:
    with pytest.raises(SettingError, match=r"did you mean 'hellaswag'"):
        Tasks(names=["hellaswg"])
    with pytest.raises(SettingError, match="limit"):
        Tasks(names=["piqa"], limit=1)
    with pytest.raises(DataError, match=r"tasks.files: nowhere.jsonl cannot be read"):
        Tasks(files=["nowhere.jsonl"]).questions()


def test_the_library_holds_what_it_names() -> None:
    tasks = Tasks(names=list(LIBRARY), limit=3)
    found = tasks.questions()
    assert set(found) == set(LIBRARY) and all(len(questions) == 3 for questions in found.values())
    assert found["boolq"][0][0].choices == (" yes", " no")
    assert len(found["winogrande"][0]) == 2 and len(found["lambada"][0][0].choices) == 1


def test_the_page_names_each_task_with_its_licence() -> None:
    page = (Path(__file__).parents[3] / "docs" / "how-to" / "tasks.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| `")]
    assert {name.strip("`"): licence for name, _, licence in rows} == {
        name: task.licence for name, task in LIBRARY.items()
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with workplace(tmp_path_factory.mktemp("tasks")) as folder:
        yield folder


def test_a_run_asks_dense_uniform_and_winner(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "own.jsonl").write_bytes(FILE)
    bare = ["tracking=none", "export=none", "data.validation=[code]"]
    assert evosweep(*TINY, *bare, "tasks=core", "tasks.names=[]", "tasks.files=[own.jsonl]", "name=asked") == 0
    (path,) = folder.glob("runs/asked/*/result.json")
    (figures,) = read_result(path)["tasks"].values()
    assert {figures[name]["questions"] for name in ("dense", "uniform", "found")} == {3}
    assert "   own: " in capsys.readouterr().out
    page = (path.parent / "report" / "report.html").read_text(encoding="utf-8")
    assert "<h2>Tasks</h2>" in page and page.count("<figure>") == page.count("<figcaption>") >= 4
    assert "prefers-color-scheme:dark" in page and "<h2>What the budget was spent on</h2>" in page


def test_the_note_tells_what_tasks_and_tokens_say(folder: Path) -> None:
    storage = JournalStorage(JournalFileBackend(str(folder / "studies" / "asked.journal")))
    (study,) = optuna.get_all_study_summaries(storage)
    note = get_note(optuna.load_study(study_name=study.study_name, storage=storage))
    (path,) = folder.glob("runs/asked/*/result.json")
    row = read_result(path)
    dense = 100 * row["tasks"]["own"]["dense"]["accuracy"]
    assert f"| own | 3 | {dense:.1f} ± " in note and "McNemar" in note
    flips = [f"{name} {100 * row['tails'][name]['flips']['value']:.1f} %" for name in ("found", "uniform")]
    assert all(text in note for text in flips) and "| code | " in note and "How to read this study" in note
