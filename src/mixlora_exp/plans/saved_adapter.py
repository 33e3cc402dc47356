"""Sizes of an existing adapter, from its file's header and configuration."""

from __future__ import annotations

import math
from pathlib import Path

from mixlora_exp.errors import UserError


def saved_sizes(folder: Path, layers: int) -> tuple[int, int]:
    """Return the numbers in the tensors of an adapter for a model with `layers` layers, and the
    most slots per token in a block with experts (0 without).

    Raises:
        UserError: the folder holds no adapter that can be loaded, or one for another model.
    """
    # Imported late: PEFT takes a second to load.
    from mixlora_exp.adapters.config import MixLoraConfig
    from mixlora_exp.adapters.files import SAFETENSORS
    from mixlora_exp.adapters.saved import saved_settings
    from mixlora_exp.adapters.tensor_shapes import load_shapes

    settings = saved_settings(folder)
    held = sum(math.prod(shape) for shape in load_shapes(folder / SAFETENSORS).values())
    if settings["peft_type"] != "MIXLORA":
        return held, 0
    try:
        config = MixLoraConfig.from_pretrained(str(folder))
        pairs = config.experts_by_layer(layers)
        return held, max(config.make_router(*pair, width=1).slots for pair in pairs)
    except ValueError as error:
        raise UserError(f"adapter={folder}: {error}") from error
