"""How a payload lies on disk: one module a format, named in the manifest, with ``encode``/``decode``."""
