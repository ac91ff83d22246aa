"""Compressors: they make the payloads of all levels from weights and statistics; store/ calls them."""
