"""Random generators seeded by what they are used for, not by the order of use.

A draw follows from the seed and its purpose (search, generation, slot), so resuming, adding workers or finishing
out of order changes nothing.
"""

import hashlib

import numpy as np


def generator(seed: int, *purpose: int | str) -> np.random.Generator:
    """Return the random generator of one purpose.

    Args:
        seed: The user's seed.
        purpose: What the random numbers are for, e.g. ``("offspring", generation, slot)``.
    """
    text = "/".join([str(seed), *map(str, purpose)])
    digest = hashlib.sha256(text.encode()).digest()
    words = np.frombuffer(digest, dtype=np.uint32)
    return np.random.Generator(np.random.PCG64(words))
