"""A search's result made into a file or figure; one module an artifact."""
