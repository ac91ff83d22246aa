"""Configuration, one folder per choice; a package so that ``pkg://evosweep.conf`` works in a wheel."""
