"""The suites catch implementations that are wrong: a suite that cannot fail promises nothing."""

import re
import subprocess
import sys
from pathlib import Path

# Without torch: its suite imports the module in other processes.
WRONG_SOURCES = """
import itertools
from evosweep.data.documents import Document
from evosweep.testing import DataSourceContract

TEXTS = ["one text", "another text", "a third text"]
COUNTER = itertools.count()


class Listed:
    def __init__(self, documents):
        self.listed = documents

    def documents(self, *, progress):
        return self.listed


class TestRepeatedIds(DataSourceContract):
    def make(self, folder):
        return Listed([Document("same", text) for text in TEXTS])


class TestEmptyText(DataSourceContract):
    def make(self, folder):
        return Listed([Document(text, text) for text in TEXTS] + [Document("empty", " ")])


class TestHashedIds(DataSourceContract):
    def make(self, folder):
        return Listed([Document(str(hash(text)), text) for text in TEXTS])


class TestPathsAsIds(DataSourceContract):
    def make(self, folder):
        return Listed([Document(f"{folder}/{text}", text) for text in TEXTS])


class TestState(DataSourceContract):
    def make(self, folder):
        return Listed([Document(str(next(COUNTER)), text) for text in TEXTS])


class TestTraceback(DataSourceContract):
    def make(self, folder):
        return Listed([Document(text, text) for text in TEXTS])

    def broken(self, folder):
        return {"no list": Listed(iter([Document("a", "a")]))}
"""

WRONG_FITNESSES = """
import torch
from evosweep.fitness.kl import KL
from evosweep.testing import FitnessContract


class Mean(KL):
    def losses(self, outputs, targets):
        losses = super().losses(outputs, targets)
        return losses + losses.mean()


class Half(KL):
    def losses(self, outputs, targets):
        return super().losses(outputs, targets).half()


class Negative(KL):
    def losses(self, outputs, targets):
        return -super().losses(outputs, targets)


class Noisy(KL):
    def losses(self, outputs, targets):
        losses = super().losses(outputs, targets)
        return losses + 0.1 * torch.rand(len(losses))


class InPlace(KL):
    def losses(self, outputs, targets):
        losses = super().losses(outputs, targets)
        outputs.hidden.zero_()
        return losses


class ByChunk(KL):
    def losses(self, outputs, targets):
        losses = super().losses(outputs, targets)
        return losses * (1 + sum(1 for _ in outputs.logits()))


class Summed(KL):
    name = "kl in nats"

    def targets(self, dense):
        return {**super().targets(dense), "total": torch.zeros(1)}

    def reduce(self, mean):
        return min(mean, 1.0)


class TestMean(FitnessContract):
    make = Mean


class TestHalf(FitnessContract):
    make = Half


class TestNegative(FitnessContract):
    make = Negative


class TestNoisy(FitnessContract):
    make = Noisy


class TestInPlace(FitnessContract):
    make = InPlace


class TestByChunk(FitnessContract):
    make = ByChunk


class TestSummed(FitnessContract):
    make = Summed
"""

CAUGHT = {
    "TestRepeatedIds": {"test_ids_are_unique_strings", "test_there_are_enough_for_all_splits"},
    "TestEmptyText": {"test_documents_have_text"},
    "TestHashedIds": {"test_another_process_reads_the_same"},
    "TestPathsAsIds": {"test_paths_are_not_part_of_ids"},
    "TestState": {
        "test_reading_twice_gives_the_same",
        "test_paths_are_not_part_of_ids",
        "test_another_process_reads_the_same",
    },
    "TestTraceback": {"test_what_cannot_be_read_is_one_line"},
    "TestMean": {"test_losses_do_not_depend_on_later_tokens"},
    "TestHalf": {"test_losses_are_one_finite_float_per_token"},
    "TestNegative": {"test_the_dense_model_has_no_divergence_from_itself", "test_worse_means_higher"},
    "TestNoisy": {"test_losses_repeat_themselves"},
    "TestInPlace": {"test_inputs_are_left_as_they_were"},
    "TestByChunk": {"test_losses_do_not_depend_on_chunks"},
    "TestSummed": {
        "test_the_name_can_be_a_metric",
        "test_targets_are_one_row_per_token",
        "test_the_reported_figure_rises_with_the_mean",
    },
}


def test_every_wrong_implementation_is_caught(tmp_path: Path) -> None:
    (tmp_path / "test_sources.py").write_text(WRONG_SOURCES)
    (tmp_path / "test_fitnesses.py").write_text(WRONG_FITNESSES)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rf", "--tb=no", "-p", "no:cacheprovider"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    failed: dict[str, set[str]] = {}
    for suite, test in re.findall(r"^FAILED test_\w+\.py::(\w+)::(\w+)", done.stdout, re.M):
        failed.setdefault(suite, set()).add(test)
    for suite, tests in CAUGHT.items():
        assert tests <= failed.get(suite, set()), done.stdout
