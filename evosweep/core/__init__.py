"""Basic types: unit, level, allocation, problem, budget, event, error. Dataclasses and numpy only."""
