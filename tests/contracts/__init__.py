"""Suites that every sampler, compressor, exporter, source and fitness inherits: subclass, say how to make one."""
