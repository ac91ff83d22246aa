"""Report files: figures, tables and the page of a search's result, one module for each."""
