"""Table: size against quality, in the layout that MLflow's UI shows as a table."""

from pathlib import Path
from typing import Any

from evosweep.core.events import SearchResult
from evosweep.core.files import write_json


class TradeOff:
    """Dense model, and the elite of every generation in which it changed: true size, KL, perplexity."""

    def __call__(self, result: SearchResult, folder: Path) -> None:
        """Write ``trade_off.json``."""
        rows: list[list[Any]] = [["dense", None, None, result.dense["kl"], result.dense["ppl"], 0]]
        for record in result.generations:
            if record.generation == 0 or record.changed:
                bits = record.cost
                rows.append(
                    [
                        f"{result.sampler}, generation {record.generation}",
                        result.problem.bits_per_weight(bits),
                        result.problem.megabytes(bits),
                        record.validation["kl"],
                        record.validation["ppl"],
                        record.tokens,
                    ]
                )
        columns = ["model", "bits_per_weight", "size_mb", "kl", "ppl", "tokens"]
        write_json(folder / "trade_off.json", {"columns": columns, "data": rows})
