"""What calibration can measure for a compressor: one module a statistic, found by the name in ``Compressor.needs``."""
