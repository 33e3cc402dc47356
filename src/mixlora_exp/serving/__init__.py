"""Use of trained adapters: loading, text generation, merging."""
