"""What is done to a search's winner before it is exported, at no cost in search."""
