"""Several adapters trained together."""
