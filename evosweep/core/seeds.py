"""Random generators named by place, never by order.

What a draw gives follows from the seed and from where it stands (search, generation, slot), so resuming,
adding workers or finishing out of order changes nothing.
"""

import hashlib

import numpy as np


def generator(seed: int, *place: int | str) -> np.random.Generator:
    """Return the generator of one place.

    Args:
        seed: The user's seed.
        place: Where the randomness is used, e.g. ``("offspring", generation, slot)``.
    """
    text = "/".join([str(seed), *map(str, place)])
    digest = hashlib.sha256(text.encode()).digest()
    words = np.frombuffer(digest, dtype=np.uint32)
    return np.random.Generator(np.random.PCG64(words))
