"""The Triton form of the mixture's feed-forward layer."""
