"""Intervals and comparisons of results over items and seeds, at the 95 % level."""
