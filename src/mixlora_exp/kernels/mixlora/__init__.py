"""A feed-forward layer with a mixture of LoRA experts."""
