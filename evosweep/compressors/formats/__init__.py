"""How payloads are stored: one module a format, named in the manifest by its path, with ``encode`` and ``decode``."""
