"""What the harness must know of a model family: names of its projections, and its activation."""

from __future__ import annotations

from dataclasses import dataclass

from mixlora_exp.config.schema import ATTENTION_TARGETS, FEED_FORWARD_TARGETS, Family

__all__ = ["FAMILIES", "FamilyLayout"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FamilyLayout:
    """Module names inside one decoder layer of a family, as transformers spells them."""

    model_type: str
    """`model_type` of the family's `config.json`."""
    attention: str
    """Name of the attention module."""
    attention_projections: tuple[str, ...]
    feed_forward: str
    """Name of the feed-forward module."""
    gate: str
    up: str
    down: str
    activation: str
    """Key of `transformers.activations.ACT2FN`, applied to the gate projection."""

    @property
    def feed_forward_projections(self) -> tuple[str, str, str]:
        """Gate, up and down, in the order in which they are applied."""
        return (self.gate, self.up, self.down)


def _layout(model_type: str, activation: str) -> FamilyLayout:
    gate, up, down = FEED_FORWARD_TARGETS
    return FamilyLayout(
        model_type=model_type,
        attention="self_attn",
        attention_projections=ATTENTION_TARGETS,
        feed_forward="mlp",
        gate=gate,
        up=up,
        down=down,
        activation=activation,
    )


FAMILIES: dict[Family, FamilyLayout] = {
    Family.llama: _layout("llama", "silu"),
    Family.gemma: _layout("gemma", "gelu_pytorch_tanh"),
}
