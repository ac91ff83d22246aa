"""Fitness functions: how far a compressed model is from the dense one."""
