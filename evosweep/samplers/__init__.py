"""Optuna samplers: adapters of search/ and allocators/."""
