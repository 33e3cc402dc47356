"""mixlora-exp: fine-tuning language models with mixtures of LoRA experts.

Importing the package registers MixLoRA with PEFT: immediately if PEFT is loaded, otherwise when it
is imported. Parts that need neither PEFT nor torch (configuration, tables) import quickly.
"""

from __future__ import annotations

from mixlora_exp import _peft_hook

__all__ = ["__version__"]

__version__ = "0.1.0"

_peft_hook.install()
