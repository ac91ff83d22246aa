"""The measurements that a sampler asks for before it proposes a generation."""

from collections.abc import Callable

from evosweep.search.protocols import Scorer, Survey

STAGE = 1_000  # stage whose tokens surveys are measured on: never one of a plan
ASKS = 16  # requests of one survey at most


def run_survey(survey: Survey, scorer: Scorer, *, generation: int, note: Callable[[str], None]) -> int:
    """Score what a survey asks for; return the tokens that it took, summed over genomes.

    Args:
        survey: Asks.
        scorer: Gives losses.
        generation: Its tokens follow from (seed, generation).
        note: Receives a line about the survey.
    """
    spent = 0
    requests = 0
    tokens = survey.windows * scorer.seq_len
    for _ in range(ASKS):
        request = survey.ask()
        if request is None:
            break
        losses = scorer.losses(
            request.genomes,
            generation=generation,
            stage=STAGE,
            tokens=tokens,
            windows=request.windows,
            length=request.length,
        )
        survey.tell(losses)
        spent += len(request.genomes) * (request.windows.stop - request.windows.start) * request.length
        requests += len(request.genomes)
    note(f"generation {generation}: {requests} measurements of single moves, {spent:,} tokens")
    return spent
