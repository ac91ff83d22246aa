"""Tasks: questions with a few answers each, of which a model should find the right one the most probable."""
