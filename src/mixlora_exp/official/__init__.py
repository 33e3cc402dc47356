"""Adapters in the format of the official packages."""
