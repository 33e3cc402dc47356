"""What Table 12 says on the page's first screen, by the rule of docs/comparison.md."""

from __future__ import annotations

import dataclasses

from mixlora_exp.results.forest import Contrast
from mixlora_exp.results.paper import METHOD_TITLES
from mixlora_exp.results.step_sizes import METHODS
from mixlora_exp.results.tables.parts import AVERAGE, REFERENCE, Block, Entry, Row, Table
from mixlora_exp.results.tables.step_size import CHOSEN, differences, scores
from mixlora_exp.results.tables.summary import seeds_in_heading

LORA, MIXLORA = (METHOD_TITLES[method] for method in METHODS)
OWN = "each at its own"
CAPTION = "Paired differences of the average over four tasks"
UNSEEN = "no difference was found, and one below about two and a half points could not be told"
"""The size is from the power analysis in docs/comparison.md."""
NOTES = (
    "Average accuracy in percent over ARC-e, ARC-c, OBQA and PIQA, answers by log-likelihood per "
    "character, at three step sizes (alpha times learning rate), and at the one that rows held "
    "out of training choose for each method. The last difference decides, by its own p; better or "
    "worse stands at the others after correction for five comparisons.",
)


def main_block(table: Table) -> Block:
    """Return a line for each step size: both methods' averages, their difference, and chance. The
    table must be complete."""
    block = scores(table)
    at = block.columns.index(AVERAGE)
    found = {row.label: row.cells[at] for row in block.rows}
    steps = tuple(dict.fromkeys(label[1] for label in found if label[1]))
    best = {label[0]: cell for label, cell in found.items() if label[2] == CHOSEN}
    by_step = {label[:2]: cell for label, cell in found.items()}
    minus = [entry for (method, _, other), entry in differences(table).items() if other]
    own, *equal = minus
    level = found[REFERENCE, "", ""]
    rows = [
        Row((title,), (*(by_step[title, step] for step in steps), best[title]))
        for title in (LORA, MIXLORA)
    ]
    rows.append(Row((f"{MIXLORA} minus {LORA}",), (*equal, own)))
    rows.append(Row((REFERENCE,), (level,) * (len(steps) + 1)))
    found = dataclasses.replace(
        block, heading=block.words, stub=("step size",), columns=(*steps, OWN), rows=tuple(rows),
        notes=NOTES,
    )  # fmt: skip
    return seeds_in_heading(found)


def contrasts(table: Table) -> list[Contrast]:
    """Return all comparisons, the one that decides first."""
    return [
        Contrast(", ".join([f"{method} {other}".strip(), setting]), entry)
        for (method, setting, other), entry in differences(table).items()
    ]


def _shown(entry: Entry) -> str:
    mark = f" ({entry.mark})" if entry.mark else ""
    return dataclasses.replace(entry, mark="").show() + mark


def sentences(table: Table) -> list[str]:
    """Return the primary comparison with its verdict, and the secondary ones."""
    steps = {row.label[0]: row.label[1] for row in scores(table).rows if row.label[2] == CHOSEN}
    (_, own), *others = differences(table).items()
    verdict = f"at this size {MIXLORA} is {own.mark} than {LORA}" if own.mark else UNSEEN
    alike = steps[LORA] == steps[MIXLORA]
    chosen = f"{LORA}: {steps[LORA]}; {MIXLORA}: {steps[MIXLORA]}"
    first = (
        f"{MIXLORA} minus {LORA}, each at the step size that held-out rows choose for it "
        f"({f'both: {steps[LORA]}' if alike else chosen}), is "
        f"{dataclasses.replace(own, mark='').show()} points "
        f"({own.seeds} seeds, mean of four tasks): {verdict}."
    )
    equal = [_shown(entry) for (*_, other), entry in others if other]
    longer = [f"{_shown(entry)} with {method}" for (method, _, other), entry in others if not other]
    marked = sum(bool(entry.mark) for _, entry in others)
    told = f"{marked or 'none'} tell{'s' * (marked < 2)} two settings apart"
    second = (
        f"{MIXLORA} minus {LORA} at equal step sizes, from the smallest to the largest, in points: "
        f"{', '.join(equal)}; the largest step size minus the smallest: {' and '.join(longer)}. "
        f"Of these {len(others)} comparisons {told} after correction."
    )
    return [first, second]
