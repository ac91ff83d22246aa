"""A search's result made into a file or figure; each module one artifact."""
