"""bitsandbytes' layers without its products; imported only where that package is used.

PEFT takes them for bitsandbytes' own layers, which they are.
"""

from __future__ import annotations

from bitsandbytes.nn import Linear4bit, Linear8bitLt

from mixlora_exp.models.weight_only import WeightOnly


class WeightOnly4bit(WeightOnly, Linear4bit):
    """A 4-bit layer of bitsandbytes that computes as `WeightOnly`."""


class WeightOnly8bit(WeightOnly, Linear8bitLt):
    """An 8-bit layer of bitsandbytes that computes as `WeightOnly`."""
