"""Sources of items, and the way from items to batches of tokens."""
