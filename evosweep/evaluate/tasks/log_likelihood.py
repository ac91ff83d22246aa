"""Computes how probable a model finds each choice of questions; a context is read once for all of its choices."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch

from evosweep.evaluate.tasks.questions import Question


@dataclass(frozen=True)
class Encoded:
    """A question as tokens.

    Attributes:
        index: Which question it is.
        context: Tokens of the context.
        choices: Tokens of each continuation, at least one.
    """

    index: int
    context: tuple[int, ...]
    choices: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Likelihoods:
    """What a model says of a question's choices.

    Attributes:
        sums: Log-likelihood of each choice in nats, over its tokens.
        greedy: Whether each choice is what greedy decoding would write.
    """

    sums: tuple[float, ...]
    greedy: tuple[bool, ...]


def encode(tokenizer: Any, question: Question, index: int, *, longest: int) -> list[Encoded]:
    """Return a question as tokens; choices that change how the context's end is tokenized get a context of their own.

    As in lm-evaluation-harness a choice's tokens are those of context and choice together behind as many tokens as the
    context has alone. A context too long for the model loses its beginning.

    Args:
        tokenizer: The model's.
        question: What is asked.
        index: Which question it is.
        longest: Tokens that the model can read.
    """
    length = len(tokenizer(question.context)["input_ids"])
    parts = []
    for choice in question.choices:
        ids = tokenizer(question.context + choice)["input_ids"]
        cut = min(length, len(ids) - 1)
        parts.append((tuple(ids[:cut][-(longest - len(ids) + cut) :]), tuple(ids[cut:])))
    if len({context for context, _ in parts}) == 1:
        return [Encoded(index, parts[0][0], tuple(choice for _, choice in parts))]
    return [Encoded(index, context, (choice,)) for context, choice in parts]


@torch.inference_mode()
def likelihoods(model: Any, encoded: Sequence[Encoded], *, batch_tokens: int) -> dict[int, list[Likelihoods]]:
    """Return the index of every question -> likelihoods of its parts, in their order.

    Contexts of one length are read together and leave their keys and values; these are repeated for the choices.

    Args:
        model: A causal language model of transformers that keeps a cache.
        encoded: The questions.
        batch_tokens: Tokens at once.
    """
    ordered = sorted(enumerate(encoded), key=lambda item: (len(item[1].context), max(map(len, item[1].choices))))
    found: dict[int, Likelihoods] = {}
    for length, group in groupby(ordered, key=lambda item: len(item[1].context)):
        for batch in _batches(list(group), length, batch_tokens):
            made = _of_batch(model, [item for _, item in batch])
            found.update({position: likelihood for (position, _), likelihood in zip(batch, made, strict=True)})
    result: dict[int, list[Likelihoods]] = {}
    for position, item in enumerate(encoded):
        result.setdefault(item.index, []).append(found[position])
    return result


def _batches(
    group: Sequence[tuple[int, Encoded]], length: int, batch_tokens: int
) -> Iterator[list[tuple[int, Encoded]]]:
    """Yield questions whose contexts, and whose choices behind them, are at most ``batch_tokens`` tokens."""
    batch: list[tuple[int, Encoded]] = []
    rows = 0
    for item in group:
        longest = max(map(len, item[1].choices))
        if batch and (rows + len(item[1].choices)) * (length + longest) > batch_tokens:
            yield batch
            batch = []
            rows = 0
        batch.append(item)
        rows += len(item[1].choices)
    if batch:
        yield batch


def _of_batch(model: Any, questions: Sequence[Encoded]) -> list[Likelihoods]:
    """Return the likelihoods of questions whose contexts have one length."""
    device = next(model.parameters()).device
    contexts = torch.tensor([item.context for item in questions], device=device)
    choices = [choice for item in questions for choice in item.choices]
    longest = max(map(len, choices))
    out = model(input_ids=contexts, use_cache=longest > 1)
    repeats = torch.tensor([len(item.choices) for item in questions], device=device)
    logits = out.logits[:, -1:].float().repeat_interleave(repeats, dim=0)
    targets = torch.zeros(len(choices), longest, dtype=torch.long, device=device)
    for row, choice in enumerate(choices):
        targets[row, : len(choice)] = torch.tensor(choice, device=device)
    if longest > 1:
        cache = out.past_key_values
        cache.reorder_cache(torch.arange(len(questions), device=device).repeat_interleave(repeats))
        rest = model(input_ids=targets[:, :-1], past_key_values=cache, use_cache=True).logits
        logits = torch.cat([logits, rest.float()], dim=1)
    lengths = torch.tensor([len(choice) for choice in choices], device=device)
    inside = torch.arange(longest, device=device) < lengths[:, None]
    chosen = logits.gather(-1, targets[..., None])[..., 0] - logits.logsumexp(-1)
    sums = torch.where(inside, chosen, 0.0).sum(1).tolist()
    greedy = ((logits.argmax(-1) == targets) | ~inside).all(1).tolist()
    result = []
    row = 0
    for item in questions:
        rows = slice(row, row + len(item.choices))
        result.append(Likelihoods(tuple(sums[rows]), tuple(greedy[rows])))
        row += len(item.choices)
    return result
