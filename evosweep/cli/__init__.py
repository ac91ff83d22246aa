"""The command line: the only reader of a Hydra configuration."""
