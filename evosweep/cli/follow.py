"""Runs a process that torchrun started: the first one runs the command, the others do what it orders."""

import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any

from omegaconf import OmegaConf

from evosweep import parallel
from evosweep.cli.compose import build, with_path
from evosweep.cli.job import materials_of, quiet_libraries
from evosweep.cli.signals import LIMIT, SIGNALS, TERMINATED
from evosweep.core.errors import EvosweepError
from evosweep.core.events import Silent
from evosweep.evaluate.passes import PASSES, answer_pass
from evosweep.evaluate.shared import LOSSES, TUNED, answer_losses
from evosweep.fitness.base import Fitness
from evosweep.fitness.kl import KL
from evosweep.fitness.perplexity import Perplexity
from evosweep.workbench import Workbench, open_bench

BAD_INPUT = 2


def one_of_several(command: Callable[[], int]) -> int:
    """Join the processes of this command, run it in the first one, follow in any other; return the exit code.

    Args:
        command: Runs the command; returns its exit code.
    """
    try:
        parallel.join()
        if parallel.is_leader():
            parallel.lead()
            return command()
        quiet_libraries()
        follower = _Follower()
        parallel.follow(follower.handlers)
        return TERMINATED if follower.asked_to_end else 0
    except EvosweepError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)  # noqa: T201
        return BAD_INPUT
    finally:
        parallel.leave()


class _Follower:
    """What a process that follows has: the leader's workbench, made of the same settings."""

    def __init__(self) -> None:
        self.bench: Workbench | None = None
        self.known: dict[str, Fitness] = {}
        self.asked_to_end = False
        for number in (*SIGNALS, signal.SIGINT):
            signal.signal(number, self._signal)
        self.handlers = {
            "prepare": self._prepare,
            "fitness": self._fitness,
            "store": self._store,
            TUNED: self._tuned,
            LOSSES: self._losses,
            PASSES: lambda facts, _: answer_pass(self._ready.evaluator, facts),
        }

    def _signal(self, number: int, frame: Any) -> None:
        """Go on while the leader, which had the signal too, finishes its generation; then it sends the end."""
        del frame
        self.asked_to_end = self.asked_to_end or number in SIGNALS
        last = threading.Timer(LIMIT, os._exit, [TERMINATED])
        last.daemon = True
        last.start()

    @property
    def _ready(self) -> Workbench:
        assert self.bench is not None, "the leader prepares first"
        return self.bench

    def _prepare(self, facts: Mapping[str, Any], _: parallel.Tensors) -> None:
        self.bench = None  # its memory is needed
        try:
            self.bench = open_bench(materials_of(OmegaConf.create(json.loads(facts["settings"]))), progress=Silent())
        except EvosweepError as error:
            raise with_path(error) from error

    def _fitness(self, facts: Mapping[str, Any], _: parallel.Tensors) -> None:
        fitness: Fitness = build(OmegaConf.create({"fitness": facts["fitness"]}), "fitness")
        self.known = {one.name: one for one in (KL(), Perplexity(), fitness)}

    def _store(self, _: Mapping[str, Any], __: parallel.Tensors) -> None:
        assert self._ready.store is not None

    def _tuned(self, _: Mapping[str, Any], tensors: parallel.Tensors) -> None:
        device = self._ready.anatomy.device
        self._ready.evaluator.tuned_values = {name: tensor.to(device) for name, tensor in tensors.items()}

    def _losses(self, facts: Mapping[str, Any], tensors: parallel.Tensors) -> parallel.Message:
        return answer_losses(self._ready.evaluator, self.known, facts, tensors)
