"""Exporters: write an allocation as a model on disk."""
