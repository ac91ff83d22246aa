"""Makes the flat row of ``result.json``: what a run found, and what compares it with others."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from evosweep.core.events import SearchResult
from evosweep.core.latency import MILLISECONDS, times_of
from evosweep.core.problem import Genome, Problem
from evosweep.data.domains import PREFIX
from evosweep.evaluate.scorer import StagedScorer
from evosweep.evaluate.tasks.accuracy import compared
from evosweep.fitness.kl import KL
from evosweep.samplers.two_objectives import front_of
from evosweep.search.controls import controls
from evosweep.task import Draft, Notes, Task
from evosweep.tracking.significance import BY_WINDOW, paired
from evosweep.workbench import Workbench

PARAGRAPH = 160  # tokens that the report colours
COMMON_TOKENS = 8192  # search tokens that winners are compared on where the plan scores no elites again


def described(task: Task, bench: Workbench, result: SearchResult) -> SearchResult:
    """Return a result with all that is measured of its winner for report and ``result.json``.

    Args:
        task: Says what is wanted: prompts, tasks, pictures.
        bench: Measures it.
        result: Of the search.
    """
    return replace(
        result,
        continuations=continuations_of(task, bench, result),
        tails=tails_of(bench, result),
        tasks=tasks_of(task, bench, result),
        domains=domains_of(bench, result),
        against=against_of(bench, result),
        controls=controls_of(task, bench, result),
        paragraph=paragraph_of(bench, result) if task.report.artifacts else {},
    )


def continuations_of(task: Task, bench: Workbench, result: SearchResult) -> dict[str, dict[str, str]]:
    """Return prompt -> name -> continuation, for the dense model, the uniform allocation and the winner.

    Args:
        task: Its report names the prompts.
        bench: Continues them.
        result: Of the search.
    """
    prompts = task.report.prompts
    if not prompts:
        return {}
    problem = result.problem
    genomes = {"dense": None, "uniform": problem.uniform(), result.sampler: problem.encode(result.allocation)}
    with bench.timed("continuations"):
        texts = {
            name: bench.continuations(genome, prompts=prompts, tokens=task.report.prompt_tokens)
            for name, genome in genomes.items()
        }
    return {prompt: {name: texts[name][index] for name in texts} for index, prompt in enumerate(prompts)}


def tasks_of(task: Task, bench: Workbench, result: SearchResult) -> dict[str, dict[str, Any]]:
    """Return task -> name -> accuracy, for the dense model, the uniform allocation and the winner.

    The winner has its difference from each of both as well, with the p-value of McNemar's test.

    Args:
        task: Its tasks.
        bench: Asks them.
        result: Of the search.
    """
    if not task.tasks.enabled:
        return {}
    problem = result.problem
    winner = problem.encode(result.allocation)
    with bench.timed("tasks"):
        dense = bench.asked(None, task.tasks)
        uniform = bench.asked(problem.uniform(), task.tasks)
        found = bench.asked(winner, task.tasks)
    return {
        name: {
            "dense": dense[name].row(),
            "uniform": uniform[name].row(),
            "found": found[name].row(),
            "found_against_uniform": compared(found[name].correct, uniform[name].correct),
            "found_against_dense": compared(found[name].correct, dense[name].correct),
        }
        for name in found
    }


def tails_of(bench: Workbench, result: SearchResult) -> dict[str, dict[str, dict[str, float]]]:
    """Return ``found`` and ``uniform`` -> percentiles of KL, flips and RMS shift on the validation split."""
    problem = result.problem
    return {"found": bench.tails(problem.encode(result.allocation)), "uniform": bench.tails(problem.uniform())}


def domains_of(bench: Workbench, result: SearchResult) -> dict[str, dict[str, Any]]:
    """Return text -> figures of the dense model, the uniform allocation and the winner, with their paired comparison.

    Args:
        bench: Has the texts of ``data.validation``.
        result: Of the search.
    """
    problem = result.problem
    dense = bench.on_domains(None)
    uniform = bench.on_domains(problem.uniform())
    found = bench.on_domains(problem.encode(result.allocation))
    return {
        name: {
            "text": bench.splits[PREFIX + name].hash,
            "tokens": bench.splits[PREFIX + name].tokens,
            "dense": {"ppl": dense[name]["ppl"]},
            "uniform": uniform[name],
            "found": found[name],
            "against_uniform": paired(found[name][BY_WINDOW], uniform[name][BY_WINDOW]).row(),
        }
        for name in found
    }


def against_of(bench: Workbench, result: SearchResult) -> dict[str, dict[str, Any]]:
    """Return the paired tests of a winner against the uniform allocation and, after a search, its own start.

    They are over validation windows, which no search uses.

    Args:
        bench: Scores them.
        result: Of the search.
    """
    problem = result.problem
    found = bench.kl_by_window(problem.encode(result.allocation))
    others = {"uniform": problem.uniform()}
    if len(result.generations) > 1:
        others["start"] = problem.encode(result.generations[0].elite)
    return {
        name: {
            **paired(found, bench.kl_by_window(genome)).row(),
            "bits_per_weight": problem.bits_per_weight(problem.cost(genome)),
        }
        for name, genome in others.items()
    }


def paragraph_of(bench: Workbench, result: SearchResult) -> dict[str, list[Any]]:
    """Return tokens of a typical window of validation text, and what each of two allocations loses at them.

    The window is that of the median KL. A token's KL is that of the distribution which it was drawn from, so the first
    token has none.

    Returns:
        ``tokens``: text of each; ``uniform`` and ``found``: KL in nats.
    """
    problem = result.problem
    found = problem.encode(result.allocation)
    by_window = bench.kl_by_window(found)
    window = int(np.argsort(by_window)[len(by_window) // 2])
    length = min(PARAGRAPH, bench.splits["validation"].seq_len)
    losses = bench.evaluator.token_losses(
        np.stack([problem.uniform(), found]), split="validation", windows=[window], fitness=[KL()], length=length
    )["kl"][:, 0]
    split = bench.splits["validation"]
    weights = split.weights([window], length)
    if weights is not None:
        losses /= np.maximum(weights, 1.0)  # as they are, without the factors that make a mean one over text
    ids = split.pictures.plain(torch.from_numpy(split.windows[window, 1:length])).tolist()
    pieces = [bench.loaded.tokenizer.decode([token]) for token in ids]
    return {"tokens": pieces, "uniform": losses[0].tolist(), "found": losses[1].tolist()}


def controls_of(task: Task, bench: Workbench, result: SearchResult) -> dict[str, dict[str, float]]:
    """Return validation figures of a searched winner, of the uniform allocation, and of the winner's controls.

    Args:
        task: Its report says whether they are wanted.
        bench: Scores them.
        result: Of the search.
    """
    wanted = any(getattr(artifact, "needs_controls", False) for artifact in task.report.artifacts)
    if not wanted or len(result.generations) < 2:
        return {}
    problem = result.problem
    winner = problem.encode(result.allocation)
    genomes = {"found": winner, **controls(problem, winner), "uniform": problem.uniform()}
    with bench.timed("controls"):
        return {name: validated(bench, problem, genome) for name, genome in genomes.items()}


def with_front(task: Task, bench: Workbench, result: SearchResult) -> SearchResult:
    """Return a result with the points of its front, scored on common search tokens, which are counted.

    Args:
        task: Its plan says on how many tokens.
        bench: Scores them.
        result: Of the search.
    """
    genomes = result.candidates_of_front
    if not genomes:
        return result
    problem = result.problem
    scorer = task.scorer(evaluator=bench.evaluator, fitness=task.fitness, seed=task.seed)
    limit = task.plan.final_limit if task.plan.final else COMMON_TOKENS
    with bench.timed("front"):
        losses = scorer.score_all(np.stack(genomes), limit=limit)
        costs = [problem.cost(genome) for genome in genomes]
        sizes = np.array(costs, dtype=np.float64)
        times = [_milliseconds(problem, genome) for genome in genomes] if result.axis == MILLISECONDS else []
        sizes = np.array(times) if times else sizes
        points = []
        for number, index in enumerate(front_of(sizes, losses).tolist()):
            bits = costs[index]
            points.append(
                {
                    "point": number,
                    "size_mb": problem.megabytes(bits),
                    **({MILLISECONDS: times[index]} if times else {}),
                    "search_loss": float(losses[index]),
                    **validated(bench, problem, genomes[index]),
                    "allocation": dict(problem.decode(genomes[index])),
                }
            )
    tokens = result.tokens + scorer.final_tokens(limit) * len(genomes)
    return replace(result, front=tuple(points), tokens=tokens)


def _milliseconds(problem: Problem, genome: Genome) -> float:
    times = times_of(problem.units, setting=MILLISECONDS)
    return float(times[problem.indices, genome].sum())


def comparable_row(task: Task, bench: Workbench, result: SearchResult) -> dict[str, Any]:
    """Return the entries of ``result.json`` that compare winners of different searches.

    ``search_loss`` is on the same search tokens for all searches of a workbench, so that a multirun can name its best
    job without a look at validation; ``kl_by_window`` is on validation, for paired tests of what was named.

    Args:
        task: Its plan says how many tokens.
        bench: Scores the winner.
        result: Of the search.
    """
    genome = result.problem.encode(result.allocation)
    scorer = task.scorer(evaluator=bench.evaluator, fitness=task.fitness, seed=task.seed)
    limit = task.plan.final_limit if task.plan.final else COMMON_TOKENS
    if result.final is None:
        loss = float(scorer.score_all(genome[None], limit=limit)[0])
    else:
        loss = result.final.scores[result.winner_generation]
    return {
        "text": bench.splits["validation"].hash,
        "kl_by_window": bench.kl_by_window(genome),
        "search_loss": loss,
        "search_loss_tokens": scorer.final_tokens(limit),
        "continuations": {prompt: dict(texts) for prompt, texts in result.continuations.items()},
        "against": {name: dict(test) for name, test in result.against.items()},
        "uniform": validated(bench, result.problem, result.problem.uniform()),
        "tails": {name: dict(figures) for name, figures in result.tails.items()},
        "front": [dict(point) for point in result.front],
        "controls": {name: dict(figures) for name, figures in result.controls.items()},
        "tasks": {name: dict(figures) for name, figures in result.tasks.items()},
        "domains": {name: dict(figures) for name, figures in result.domains.items()},
    }


def validated(bench: Workbench, problem: Problem, genome: Genome) -> dict[str, float]:
    """Return validation figures and true bits of an allocation.

    Args:
        bench: Scores it.
        problem: Units and levels.
        genome: The allocation.
    """
    figures = StagedScorer(bench.evaluator, fitness=KL(), seed=0).validate(genome)
    return {**figures, "bits_per_weight": problem.bits_per_weight(problem.cost(genome))}


def plain_row(task: Task, bench: Workbench, draft: Draft, notes: Notes, result: SearchResult) -> dict[str, Any]:
    """Return the flat row of ``result.json``.

    Args:
        task: The search.
        bench: The model and its levels.
        draft: The run's name.
        notes: What is recorded beside the figures.
        result: Of the search.
    """
    source = bench.loaded.source
    width = 8 * bench.anatomy.dtype.itemsize
    dense_bits = width * int(result.problem.numels.sum())
    return {
        "run": draft.name,
        "budget": str(task.budget),
        "store": bench.store.key,
        "activations": bench.resources.activations,
        "folder": str(task.folder),
        **notes.row,
        **result.row(),
        "selected_by": f"{task.fitness.name} on search tokens; validation never selects",
        "dense_bits_per_weight": float(width),
        "dense_size_mb": (dense_bits + bench.store.fixed_bits) / 8e6,
        "coverage": bench.plan.coverage.share,
        "left_out": bench.plan.coverage.record()["left_out"],
        "source": None if source is None else {"name": source.name, "size_mb": source.size_mb},
        "mlflow_run": task.tracker.run_id,
        "mlflow_link": task.tracker.link,
        "export": {},
        "history": result.history(),
    }
