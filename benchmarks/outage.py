"""What an outage of MLflow's server costs a search, and what is missing afterwards.

    python -m benchmarks.outage [--down 60] [--generations 100] [--second 0.8]

Two searches of 210 units whose scoring takes --second a generation (the thread sleeps, as one that waits for a GPU
does), tracked by a real ``mlflow server``: one undisturbed, one whose server is killed after a tenth of the generations
and started again --down seconds later, on the same port and database.
"""

import argparse
import json
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

from benchmarks.tracking import Waiting, problem
from evosweep.cli.job import quiet_libraries
from evosweep.core.events import Event, GenerationRecord
from evosweep.samplers.evopress import EvoPressSampler
from evosweep.search.loop import run_search
from evosweep.search.plan import Plan
from evosweep.tracking.behind import Behind
from evosweep.tracking.mlflow_tracker import MlflowTracker
from tests.faults.server import Server, mlflow_server


class Outage:
    """Listener that kills a server at a generation and starts it again some seconds later.

    Args:
        server: Runs.
        generation: At which it is killed.
        down: Seconds until it is started again; 0 leaves it alone.
    """

    def __init__(self, server: Server, *, generation: int, down: float) -> None:
        self.server = server
        self.generation = generation
        self.down = down

    def on_event(self, event: Event) -> None:
        """Kill the server."""
        if self.down and isinstance(event, GenerationRecord) and event.generation == self.generation:
            self.server.kill()
            threading.Timer(self.down, self.server.start, kwargs={"wait": False}).start()


def searched(name: str, server: Server, folder: Path, options: argparse.Namespace, *, down: float) -> dict[str, Any]:
    """Return the seconds of a tracked search, those of what was logged after it, and what the server has in the end."""
    folder.mkdir()
    uri = f"http://127.0.0.1:{server.port}"
    tracker = MlflowTracker(experiment=name, uri=uri)
    tracker.check()
    run = tracker.start(name, params={"sampler": "evopress"}, tags={}, folder=folder)
    behind = Behind(tracker, name="MLflow")
    outage = Outage(server, generation=options.generations // 10, down=down)
    began = time.perf_counter()
    run_search(
        name=name,
        sampler=EvoPressSampler(problem(), seed=0, offspring=16),
        plan=Plan.of(
            generations=options.generations, stages=[{"survivors": 4, "tokens": 1}, {"survivors": 1, "tokens": 1}]
        ),
        scorer=Waiting(210, options.second),
        dense={"kl": 0.0, "ppl": 1.0},
        listeners=[behind, outage],
    )
    ended = time.perf_counter()
    behind.wait()
    tracker.close("FINISHED")
    closed = time.perf_counter()
    client = MlflowClient(tracking_uri=uri)
    points = client.get_metric_history(run, "val/kl")
    artifacts = client.list_artifacts(run, "generations")
    return {
        "search_seconds": ended - began,
        "seconds_after_it": closed - ended,
        "status": client.get_run(run).info.status,
        "undelivered": tracker.missing,
        "steps": len(points),
        "steps_in_order": [point.step for point in points] == list(range(options.generations + 1)),
        "times_in_order": [point.timestamp for point in points] == sorted(point.timestamp for point in points),
        "generations_with_allocation": len(artifacts),
    }


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--down", type=float, default=60.0)
    parser.add_argument("--generations", type=int, default=100)
    parser.add_argument("--second", type=float, default=0.8)
    options = parser.parse_args()
    quiet_libraries()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        with mlflow_server(folder) as server:
            found = {
                name: searched(name, server, folder / name, options, down=down)
                for name, down in (("undisturbed", 0.0), ("outage", options.down))
            }
    longer = found["outage"]["search_seconds"] - found["undisturbed"]["search_seconds"]
    print(json.dumps({**vars(options), **found, "search_longer_by_seconds": longer}, indent=1))


if __name__ == "__main__":
    main()
