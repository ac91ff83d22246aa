"""Storage formats of payloads: one module a format; the manifest names it by its path."""
