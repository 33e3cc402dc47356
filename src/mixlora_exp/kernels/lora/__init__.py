"""Low-rank additions to one linear layer."""
