"""Data sources, and the conversion of items to batches of tokens."""
