"""Transforms of a dense model that keep its function and make its weights easier to compress."""
