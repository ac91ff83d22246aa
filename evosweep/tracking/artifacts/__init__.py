"""A search's records turned into files and figures."""
