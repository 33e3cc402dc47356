"""How the tests of the Triton kernels import them."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import pytest
import torch
import triton

GPU = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
PREFIX = "mixlora_exp.kernels.triton_"


def load(*names: str) -> list[ModuleType]:
    """Modules of Triton kernels, interpreted where there is no GPU."""
    if not GPU:
        interpret()
    with pytest.MonkeyPatch.context() as patch:
        if not GPU:
            patch.setenv("TRITON_INTERPRET", "1")
        return [importlib.import_module(PREFIX + name) for name in names]


def interpret() -> None:
    """Make Triton forget what it made for the compiler when another test imported it."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction

    for module in (tl.standard, tl):
        for name, value in list(vars(module).items()):
            if isinstance(value, triton.JITFunction):
                setattr(module, name, InterpretedFunction(value.fn))
    loaded = [name for name in sys.modules if name.startswith(PREFIX)]
    parts = sys.modules.get(f"{PREFIX}parts")
    if parts is not None and not parts.INTERPRETED:
        for name in loaded:
            del sys.modules[name]
