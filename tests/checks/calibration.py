"""Draws simulated seeds and items many times: how often the tables' intervals hold the truth.

Writes results/calibration.json and calibration.md; about ten minutes on one core.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests" / "support")]

from simulated import World, coverage, false_calls  # noqa: E402

from mixlora_exp.config.paths import RESULTS  # noqa: E402
from mixlora_exp.records.record import write_json, write_text  # noqa: E402

DRAWS, FAMILIES = 2000, 400
WORLDS = {
    "one seed, easy items": World(seeds=1, items=300, skill=(2.0, 1.6)),
    "one seed, methods that hardly differ": World(seeds=1, items=300, of_method=0.02, rest=0.02),
    "seeds alike": World(items=300),
    "seeds that answer other items, equally many": World(items=300, rest=0.6, of_method=0.0),
    "a little luck of the seed": World(items=300, seed=0.05),
    "much luck of the seed": World(items=300, seed=0.3, skill=(0.5, 0.2)),
    "much luck, many items": World(items=2000, seed=0.15),
    "two seeds": World(seeds=2, items=300, seed=0.05),
    "five seeds": World(seeds=5, items=300, seed=0.1),
    "four items to a cluster": World(items=400, cluster=4, seed=0.05),
    "average of four tasks": World(items=300, tasks=4, seed=0.05),
}
HEAD = """# Do the tables' intervals cover as they say?

Made by `python tests/checks/calibration.py`. Two simulated methods, whose true accuracy over
all items and all seeds is known, are drawn {draws:,} times; the table gives the share of draws in
which the 95 % interval holds the true accuracy, and the true difference of the two.

| simulated | seeds | items a task | accuracy | difference |
| --- | ---: | ---: | ---: | ---: |
"""


def measured() -> dict:
    rows, calls = [], []
    for name, world in WORLDS.items():
        found = dataclasses.asdict(coverage(world, DRAWS))
        rows.append({"name": name, **dataclasses.asdict(world), **found})
        print(name, found, flush=True)  # noqa: T201
    for comparisons in (5, 20):
        plain, corrected = false_calls(World(items=150, seed=0.05), comparisons, FAMILIES)
        calls.append({"comparisons": comparisons, "plain": plain, "corrected": corrected})
    return {"draws": DRAWS, "families": FAMILIES, "coverage": rows, "false_calls": calls}


def shown(found: dict) -> str:
    lines = [
        f"| {row['name']} | {row['seeds']} | {row['items']} | {100 * row['accuracy']:.1f} % "
        f"| {100 * row['difference']:.1f} % |\n"
        for row in found["coverage"]
    ]
    lines.append(
        f"\nOf {found['families']} families of comparisons of equally good methods, the share with "
        "a false mark:\n\n| comparisons | without correction | Holm |\n| ---: | ---: | ---: |\n"
    )
    lines += [
        f"| {row['comparisons']} | {100 * row['plain']:.1f} % | {100 * row['corrected']:.1f} % |\n"
        for row in found["false_calls"]
    ]
    return HEAD.format(draws=found["draws"]) + "".join(lines)


if __name__ == "__main__":
    made = measured()
    write_json(RESULTS / "calibration.json", made)
    write_text(RESULTS / "calibration.md", shown(made))
