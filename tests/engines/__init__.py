"""Programs that serve models, each in a virtual environment of its own, and the scripts that tests run in them."""
