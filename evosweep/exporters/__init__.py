"""An allocation turned into a model on disk that loads elsewhere."""
