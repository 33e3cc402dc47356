"""Roles of adapter parameters, which say what LoRA+ trains at its higher rate.

LoRA+ trains B at a multiple of A's learning rate. Its authors' rule goes by names and shapes:
`lora_B` and every one-dimensional parameter. Here each parameter has a declared role, so that one
of a new method does not silently get the wrong rate.
"""

from __future__ import annotations

from mixlora_exp.errors import UserError
from mixlora_exp.kernels import MIXTURES, ROUTERS

_OF_MIXTURES = {
    f"lora_{part}": role for one in MIXTURES.values() for part, role in one.roles.items()
}
_OF_ROUTERS = {
    f"lora_router_{part}".removesuffix("_"): role
    for one in ROUTERS.values()
    for part, role in one.roles.items()
}
LORA_PLUS_ROLES = {
    **_OF_MIXTURES,
    **_OF_ROUTERS,
    # `lora_E`: AdaLoRA's singular values.
    **dict.fromkeys(("lora_A_gate", "lora_A_up", "lora_A_down", "hira_A", "lora_E"), "A"),
    **dict.fromkeys(("lora_B_gate", "lora_B_up", "lora_B_down", "hira_B"), "B"),
    # Of one dimension, which the authors' rule puts beside B.
    "lora_magnitude_vector": "B",
    **dict.fromkeys(("lora_magnitude_gate", "lora_magnitude_up", "lora_magnitude_down"), "B"),
}
"""Role by the part of a parameter's name that says what it is: A, with the learning rate itself, or
B, with `method.lora_plus_ratio` times as much. Routers and mixtures declare those of their own
(`roles`)."""


def rate_factor(name: str, ratio: float) -> float:
    """Return the multiple of the learning rate for the parameter `name`; 1 for all if the ratio is
    1.

    Raises:
        UserError: the parameter has no role.
    """
    if ratio == 1:
        return 1.0
    known = (LORA_PLUS_ROLES.get(part) for part in reversed(name.split(".")))
    role = next(filter(None, known), None)
    if role is None:
        raise UserError(
            f"method.lora_plus_ratio={ratio:g}: {name} has no role in LoRA+ "
            "(models/parameter_roles.py names A and B): leave the ratio at 1"
        )
    return ratio if role == "B" else 1.0
