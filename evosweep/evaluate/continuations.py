"""Greedy continuations of prompts by the dense model, or with an allocation applied."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from evosweep.core.problem import Genome
from evosweep.evaluate.population import Evaluator
from evosweep.models.dropping import removed
from evosweep.models.patch import replaced_weights


def continuations(
    evaluator: Evaluator, genome: Genome | None, *, tokenizer: Any, prompts: Sequence[str], tokens: int = 40
) -> list[str]:
    """Return the greedy continuation of every prompt.

    A tokenizer with a chat template is given each prompt as a user's message.

    Args:
        evaluator: The model and its levels.
        genome: Level index of every unit, shape (units,); None leaves the model dense.
        tokenizer: The model's tokenizer.
        prompts: Texts to continue.
        tokens: New tokens at most.
    """
    with applied(evaluator, genome), torch.inference_mode():
        return [_continued(evaluator, tokenizer, prompt, tokens) for prompt in prompts]


@contextmanager
def applied(evaluator: Evaluator, genome: Genome | None) -> Iterator[None]:
    """Give the model the weights of an allocation, and take out what it drops, while the context lasts.

    The inputs of its layers are rounded as ``evaluate.activations`` says.
    """
    if genome is None:
        yield
        return
    genome = evaluator.expand(genome)
    units = {unit.name: index for index, unit in enumerate(evaluator.store.units)}
    slots = [
        slot for slot in evaluator.anatomy.all_slots if slot.name in units and units[slot.name] not in evaluator.drops
    ]
    weights = {slot.name: evaluator.weight(units[slot.name], int(genome[units[slot.name]])) for slot in slots}
    dropped = [effect for index, effect in evaluator.drops.items() if genome[index] == 0]
    inputs = evaluator.rounded_inputs({slot.name: slot.module for slot in slots})
    with torch.no_grad(), replaced_weights(slots, weights), removed(evaluator.anatomy, dropped), inputs:
        yield


def _continued(evaluator: Evaluator, tokenizer: Any, prompt: str, tokens: int) -> str:
    model: Any = evaluator.anatomy.model
    if getattr(tokenizer, "chat_template", None):
        message = [{"role": "user", "content": prompt}]
        made = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        ids = made["input_ids"]
    else:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    ids = ids.to(evaluator.anatomy.device)
    written = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, pad_token_id=0
    )
    return str(tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)).strip()
