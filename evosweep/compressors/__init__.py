"""Compressors: weights and statistics in, payloads of levels out. They know tensors only; store/ calls them."""
