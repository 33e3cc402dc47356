"""Mixtures of LoRA experts in single linear layers, as PEFT adapters."""
