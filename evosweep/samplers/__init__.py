"""Thin Optuna adapters over search/ and allocators/."""
