"""The table of stability: training runs that differ in what decides it, and in nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mixlora_exp.results.build import gather

Write = Callable[..., Path]
WORDS = ["model=smollm2_135m", "data=local", "data.path=x", "method=mixlora", "task=arc_e"]


def with_steps(losses: list[float], norms: list[float]) -> Callable[[dict], None]:
    def change(record: dict) -> None:
        record["train"] |= {
            "examples": 8,
            "stability": {
                "gradient_norm_median": sorted(norms)[len(norms) // 2],
                "gradient_norm_max": max(norms),
                "gradient_norm_max_step": norms.index(max(norms)) + 1,
                "gradient_spikes": [i + 1 for i, n in enumerate(norms) if n > 10],
                "loss_spikes": [],
                "step_losses": losses,
                "step_gradient_norms": norms,
            },
        }

    return change


def test_one_line_per_setting(write: Write, results: Path) -> None:
    share = {"arc_e": 0.5}
    calm = with_steps([3.0] * 10 + [2.0] * 10, [1.0] * 20)
    wild = with_steps([5.0] * 10 + [4.0] * 10, [1.0] * 18 + [50.0, 1.0])
    for seed in (1, 2):
        write(results / "runs", f"base-{seed}", [*WORDS, f"seed={seed}"], share, change=calm)
    # Trained alike, and scored in another way.
    write(results / "runs", "scored", [*WORDS, "seed=1", "evaluation.dropout=true"], share,
          change=calm)  # fmt: skip
    changed = [*WORDS, "trainer.loss_on=all", "trainer.max_grad_norm=1.0"]
    write(results / "runs", "all", changed, share, change=wild)
    # How often it was saved decides nothing.
    often = [*changed, "seed=2", "trainer.save_steps=7", "trainer.pack_adapters=2"]
    write(results / "runs", "often", often, share, change=wild)
    # Another rank, other data, or no figures: not of this block.
    write(results / "runs", "rank", [*WORDS, "method.rank=4", "trainer.loss_on=all"], share,
          change=wild)  # fmt: skip
    write(results / "runs", "rows", [*WORDS, "data.train_limit=4"], share, change=wild)
    write(results / "runs", "old", [*WORDS, "seed=3"], share)
    (block,) = gather(results).tables[11].blocks
    assert "MixLoRA trained on ARC-e: 8 examples" in block.heading
    found = {row.label[0]: dict(zip(block.columns, row.cells, strict=True)) for row in block.rows}
    assert list(found) == [
        "as trained by default", "trainer.loss_on=all, trainer.max_grad_norm=1.0",
    ]  # fmt: skip
    base, other = found.values()
    assert (base["seeds"].value, base["first loss"].value, base["last loss"].value) == (2, 3, 2)
    assert base["gradient spikes"].value == 0
    assert (other["largest"].value, other["at step"].value) == (50.0, 19)
    assert (other["gradient spikes"].value, other["steps"].value) == (2, 20)
    assert other["largest"].records == ("all", "often")


def test_a_setting_alone_is_no_comparison(write: Write, results: Path) -> None:
    calm = with_steps([3.0] * 20, [1.0] * 20)
    write(results / "runs", "base", WORDS, {"arc_e": 0.5}, change=calm)
    assert gather(results).tables[11].blocks == []
