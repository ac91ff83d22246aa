"""Text to token windows with stable ids, in three splits that share no document."""
