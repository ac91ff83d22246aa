"""Weights in, level payloads out. Kernels know tensors only; the walk that feeds them lives in store/."""
