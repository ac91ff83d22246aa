"""Ends a command in order when a scheduler asks for it: after the generation that is being scored, in bounded time."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # of Kubernetes and `kill`; of SLURM's --signal
GRACE = 4.0  # seconds that a generation may still take
LIMIT = 9.5  # seconds until the process ends whatever it does: schedulers kill some ten seconds later
TERMINATED = 143


class Terminated(KeyboardInterrupt):
    """Raised on SIGTERM and SIGUSR1, so that the run ends as after Ctrl-C, with another exit code."""


class Ending:
    """The end that a signal asked for: raised at once, or behind a block that must not be cut."""

    blocks: ClassVar[int] = 0
    asked: ClassVar[bool] = False

    @classmethod
    @contextmanager
    def held(cls) -> Iterator[None]:
        """Let a block finish before Terminated is raised, unless that takes longer than ``GRACE`` seconds."""
        cls.blocks += 1
        try:
            yield
        finally:
            cls.blocks -= 1
        if cls.asked and not cls.blocks:
            signal.setitimer(signal.ITIMER_REAL, 0)
            raise Terminated

    @classmethod
    def ask(cls, *_: Any) -> None:
        """Handle a signal."""
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once
        last = threading.Timer(LIMIT, os._exit, [TERMINATED])
        last.daemon = True
        last.start()
        if not cls.blocks:
            raise Terminated
        cls.asked = True
        signal.signal(signal.SIGALRM, cls._now)
        signal.setitimer(signal.ITIMER_REAL, GRACE)

    @classmethod
    def _now(cls, *_: Any) -> None:
        raise Terminated


@contextmanager
def terminable() -> Iterator[None]:
    """Let SIGTERM and SIGUSR1 end the command in order: its runs are closed as killed, and can be resumed."""
    Ending.asked = False
    try:
        before = {number: signal.signal(number, Ending.ask) for number in SIGNALS}
    except ValueError:  # not the main thread, as in a notebook
        yield
        return
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
