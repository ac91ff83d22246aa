"""Undoes what a model does to its own weights when it runs."""

from typing import Any


def undo_rescaling(model: Any) -> bool:
    """Return whether a model divides weights in place when it runs; it does not any more, and what it did is undone.

    RWKV halves two matrices of every ``rescale_every``-th block, and the stream with them, against overflow in fp16.
    The weights that are compressed and written must be those that the model is loaded with.
    """
    if not getattr(model.config, "rescale_every", 0):
        return False
    base = model.base_model
    if base.layers_are_rescaled:
        base.train()
        base._rescale_layers()
        base.eval()
    model.config.rescale_every = 0
    return True
