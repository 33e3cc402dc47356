"""Names of the PEFT types that this project adds."""

from __future__ import annotations

MIXLORA = "MIXLORA"
LORA_MIXTURE = "LORA_MIXTURE"
"""In files only. In memory adapters have the type of the MixLoRA tuner, which serves both, since
PEFT refuses several types on one base model."""
OWN_TYPES = (MIXLORA, LORA_MIXTURE)
