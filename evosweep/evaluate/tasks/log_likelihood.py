"""Computes the log-likelihood of every choice of a question; a shared context runs through the model once."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from evosweep.core.events import Progress, Silent
from evosweep.evaluate.tasks.questions import Question
from evosweep.models.anatomy import base_model
from evosweep.models.decoder import find_blocks
from evosweep.models.head import Head

LOGITS = 1 << 26  # logits in memory at once: 256 MB in fp32
WORTH = {"cpu": 0, "cuda": 8192}  # tokens that a GPU could read in the time in which it launches one more forward pass


@dataclass(frozen=True)
class Encoded:
    """A question as tokens.

    Attributes:
        index: Which question it is.
        context: Tokens of the context, at least one.
        choices: Tokens of each continuation, at least one.
    """

    index: int
    context: tuple[int, ...]
    choices: tuple[tuple[int, ...], ...]

    @property
    def longest(self) -> int:
        """Tokens of the longest choice."""
        return max(map(len, self.choices))


@dataclass(frozen=True)
class Likelihoods:
    """What a model says of a question's choices.

    Attributes:
        sums: Log-likelihood of each choice in nats, over its tokens.
        greedy: Whether each choice is what greedy decoding would write.
    """

    sums: tuple[float, ...]
    greedy: tuple[bool, ...]


@dataclass(frozen=True)
class _Reading:
    """One sequence to read, and the choices whose tokens it predicts.

    Attributes:
        ids: Tokens: a context and a choice but for its last token.
        wanted: Of every choice that it serves: position of its question, number of the choice, its first predicting
            position, its tokens.
    """

    ids: tuple[int, ...]
    wanted: list[tuple[int, int, int, tuple[int, ...]]]


def encode(tokenizer: Any, parts: Sequence[tuple[int, Question]], *, longest: int) -> list[Encoded]:
    """Return questions as tokens; choices that change how the context's end is tokenized get a context of their own.

    As in lm-evaluation-harness a choice's tokens are those of context and choice together behind as many tokens as the
    context has alone. A context too long for the model loses its beginning.

    Args:
        tokenizer: The model's; it is given all texts at once.
        parts: Index of a question, and what is asked.
        longest: Tokens that the model can read.
    """
    if not parts:
        return []
    contexts = tokenizer([part.context for _, part in parts])["input_ids"]
    texts = iter(tokenizer([part.context + choice for _, part in parts for choice in part.choices])["input_ids"])
    return [
        item
        for (index, part), context in zip(parts, contexts, strict=True)
        for item in _encoded(index, len(context), [next(texts) for _ in part.choices], longest)
    ]


def _encoded(index: int, length: int, whole: Sequence[Sequence[int]], longest: int) -> list[Encoded]:
    """Return a question's parts, given how many tokens its context has alone and those of it with each choice."""
    parts = []
    for ids in whole:
        cut = min(length, len(ids) - 1)
        room = max(longest - len(ids) + cut, 1)
        parts.append((tuple(ids[max(cut - room, 0) : cut]), tuple(ids[cut:])))
    if len({context for context, _ in parts}) == 1:
        return [Encoded(index, parts[0][0], tuple(choice for _, choice in parts))]
    return [Encoded(index, context, (choice,)) for context, choice in parts]


@torch.inference_mode()
def likelihoods(
    model: Any,
    encoded: Sequence[Encoded],
    *,
    batch_tokens: int,
    worth: int | None = None,
    progress: Progress | None = None,
    description: str = "tasks",
) -> dict[int, list[Likelihoods]]:
    """Return the index of every question -> likelihoods of its parts, in their order.

    Contexts of one length are read together and leave their keys and values, which are repeated for the choices; where
    that saves too few tokens, contexts are read anew with every choice, sequences of like length together. Nothing is
    masked: padding stands behind what counts. Logits are computed in fp32, at the choices' own tokens alone.

    Args:
        model: A causal language model of transformers.
        encoded: The questions.
        batch_tokens: Tokens at once, padding counted.
        worth: Tokens that contexts of one length must save to be read once; None: what suits the device.
        progress: Shows how far it is.
        description: What it shows.
    """
    reader = _Reader(model)
    least = WORTH.get(reader.device.type, 0) if worth is None else worth
    shared, others = _planned(encoded, least if reader.keeps_cache else None)
    batches: list[list[tuple[int, Encoded]] | list[_Reading]] = [
        *(batch for group in shared for batch in _batches(group, batch_tokens)),
        *_whole_batches(_readings(others), batch_tokens),
    ]
    sums = [[0.0] * len(item.choices) for item in encoded]
    greedy = [[False] * len(item.choices) for item in encoded]
    for batch in (progress or Silent()).track(batches, description=description):
        for (position, number), total, best in reader.read(batch):
            sums[position][number] = total
            greedy[position][number] = best
    result: dict[int, list[Likelihoods]] = {}
    for position, item in enumerate(encoded):
        result.setdefault(item.index, []).append(Likelihoods(tuple(sums[position]), tuple(greedy[position])))
    return result


def _planned(
    encoded: Sequence[Encoded], least: int | None
) -> tuple[list[list[tuple[int, Encoded]]], list[tuple[int, Encoded]]]:
    """Split questions into groups whose contexts run through the model once, and those whose choices run in full."""
    by_length: dict[int, list[tuple[int, Encoded]]] = {}
    others = []
    for position, item in enumerate(encoded):
        if least is None or item.longest == 1 or len(item.choices) == 1:
            others.append((position, item))
        else:
            by_length.setdefault(len(item.context), []).append((position, item))
    shared = []
    for length, group in sorted(by_length.items()):
        if length * sum(len(item.choices) - 1 for _, item in group) > (least or 0):
            shared.append(sorted(group, key=lambda one: one[1].longest))
        else:
            others += group
    return shared, others


def _readings(questions: Iterable[tuple[int, Encoded]]) -> list[_Reading]:
    """Return the token sequences to run through the model, each once; a choice of one token needs its context alone."""
    found: dict[tuple[int, ...], _Reading] = {}
    for position, item in questions:
        for number, choice in enumerate(item.choices):
            ids = item.context + choice[:-1]
            reading = found.setdefault(ids, _Reading(ids, []))
            reading.wanted.append((position, number, len(item.context) - 1, choice))
    return sorted(found.values(), key=lambda reading: len(reading.ids))


def _whole_batches(readings: Sequence[_Reading], batch_tokens: int) -> Iterator[list[_Reading]]:
    """Yield sequences, sorted by length, that take at most ``batch_tokens`` tokens with their padding."""
    batch: list[_Reading] = []
    for reading in readings:
        if batch and (len(batch) + 1) * len(reading.ids) > batch_tokens:
            yield batch
            batch = []
        batch.append(reading)
    if batch:
        yield batch


def _batches(group: Sequence[tuple[int, Encoded]], batch_tokens: int) -> Iterator[list[tuple[int, Encoded]]]:
    """Yield questions whose contexts, and whose choices behind them, are at most ``batch_tokens`` tokens."""
    batch: list[tuple[int, Encoded]] = []
    rows = 0
    for position, item in group:
        if batch and (rows + len(item.choices)) * (len(item.context) + item.longest) > batch_tokens:
            yield batch
            batch = []
            rows = 0
        batch.append((position, item))
        rows += len(item.choices)
    if batch:
        yield batch


class _Reader:
    """A model and its head.

    Attributes:
        keeps_cache: Whether the model returns keys and values that can be repeated for several continuations.
    """

    def __init__(self, model: Any) -> None:
        self.base: Any = base_model(model, find_blocks(model)[0])
        self.head = Head.of(model, self.base)
        self.device = self.head.weight.device
        found = self.base(input_ids=torch.zeros((1, 1), dtype=torch.long, device=self.device), use_cache=True)
        self.keeps_cache = hasattr(getattr(found, "past_key_values", None), "reorder_cache")

    def read(
        self, batch: Sequence[tuple[int, Encoded]] | Sequence[_Reading]
    ) -> Iterator[tuple[tuple[int, int], float, bool]]:
        """Yield (position of a question, number of a choice), its log-likelihood, and whether it is the greedy one."""
        if isinstance(batch[0], _Reading):
            names, hidden, targets = self._whole(batch)  # type: ignore[arg-type]
        else:
            names, hidden, targets = self._shared(batch)  # type: ignore[arg-type]
        chosen, best = self._scored(hidden, torch.tensor([one for row in targets for one in row], device=self.device))
        rows = torch.arange(len(targets), device=self.device).repeat_interleave(
            torch.tensor([len(row) for row in targets], device=self.device)
        )
        sums = torch.zeros(len(targets), dtype=torch.float64, device=self.device).index_add_(0, rows, chosen.double())
        misses = torch.zeros(len(targets), dtype=torch.long, device=self.device).index_add_(0, rows, (~best).long())
        yield from zip(names, sums.tolist(), (misses == 0).tolist(), strict=True)

    def _whole(self, readings: Sequence[_Reading]) -> tuple[list[tuple[int, int]], torch.Tensor, list[tuple[int, ...]]]:
        """Return choices' names, the hidden states before each of their tokens one after another, and the tokens."""
        width = max(len(reading.ids) for reading in readings)
        padded = torch.tensor([reading.ids + (0,) * (width - len(reading.ids)) for reading in readings])
        hidden = self.base(input_ids=padded.to(self.device), use_cache=False)[0]
        wanted = [(row, *one) for row, reading in enumerate(readings) for one in reading.wanted]
        flat = [row * width + start + step for row, _, _, start, ids in wanted for step in range(len(ids))]
        states = hidden.flatten(0, 1)[torch.tensor(flat, device=self.device)]
        return [(position, number) for _, position, number, _, _ in wanted], states, [ids for *_, ids in wanted]

    def _shared(
        self, questions: Sequence[tuple[int, Encoded]]
    ) -> tuple[list[tuple[int, int]], torch.Tensor, list[tuple[int, ...]]]:
        """Return the same of questions whose contexts have one length."""
        choices = [choice for _, item in questions for choice in item.choices]
        names = [(position, number) for position, item in questions for number in range(len(item.choices))]
        of = torch.tensor([row for row, (_, item) in enumerate(questions) for _ in item.choices], device=self.device)
        contexts = torch.tensor([item.context for _, item in questions], device=self.device)
        found = self.base(input_ids=contexts, use_cache=True)
        found.past_key_values.reorder_cache(of)
        width = max(map(len, choices)) - 1
        padded = torch.tensor([(choice[:-1] + (0,) * width)[:width] for choice in choices], device=self.device)
        rest = self.base(input_ids=padded, past_key_values=found.past_key_values, use_cache=True)[0]
        hidden = torch.cat([found[0][of, -1:], rest], dim=1)
        lengths = torch.tensor([len(choice) for choice in choices], device=self.device)
        return names, hidden[torch.arange(width + 1, device=self.device) < lengths[:, None]], choices

    def _scored(self, hidden: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return each token's log-probability, and whether it is the most probable one.

        Args:
            hidden: Hidden states before the tokens (tokens, hidden).
            targets: The tokens (tokens,).
        """
        hidden = hidden.to(self.head.weight.dtype)
        step = max(LOGITS // len(self.head.weight), 1)
        chosen = []
        best = []
        for start in range(0, len(hidden), step):
            logits = self.head.logits(hidden[start : start + step])
            wanted = targets[start : start + step]
            chosen.append(logits.gather(-1, wanted[:, None])[:, 0] - logits.logsumexp(-1))
            best.append(logits.argmax(-1) == wanted)
        return torch.cat(chosen), torch.cat(best)
