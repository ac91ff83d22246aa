"""evosweep: fit a language model into a size, with proof of which layers to compress how hard."""

__version__ = "0.1.0"
