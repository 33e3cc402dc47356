"""mixlora-exp: fine-tuning language models with mixtures of LoRA experts.

Importing the package makes MixLoRA known to PEFT, at once if PEFT is loaded, else as soon as it
is: parts that need neither PEFT nor torch (configuration, tables) stay quick to import.
"""

from __future__ import annotations

from mixlora_exp import _peft_hook

__all__ = ["__version__"]

__version__ = "0.1.0"

_peft_hook.install()
