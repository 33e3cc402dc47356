"""Reads the shapes of an adapter's tensors without loading them."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open

from mixlora_exp.errors import UserError


def load_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors in a safetensors file, by name, read only from its header.

    Raises:
        UserError: it is truncated or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} is truncated or damaged ({error}): take another copy") from error
