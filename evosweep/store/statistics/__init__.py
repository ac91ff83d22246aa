"""Statistics that calibration can measure: one module each, found by the name in ``Compressor.needs``."""
