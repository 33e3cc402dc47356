"""Writes the package's results/facts/: most frequent answers of training, clusters of scored items.

`python tests/checks/data_facts.py DIR`: a folder of data as for `data=local`. Splits that are not
there are left out.
"""

from __future__ import annotations

import csv
import sys
from collections import Counter

from mixlora_exp.data.local import load_local
from mixlora_exp.errors import UserError
from mixlora_exp.results.data_facts import FOLDER
from mixlora_exp.tasks import TASKS, Item
from mixlora_exp.tasks.clusters import clusters


def items(root: str, task: str, split: str) -> list[Item]:
    try:
        return load_local(root, TASKS[task], split).items
    except UserError:
        return []


def lines(root: str) -> dict[str, list[tuple]]:
    """The content of each file, by name."""
    most: list[tuple] = [("task", "most", "rows")]
    shared: list[tuple] = [("task", "item", "cluster")]
    for task in TASKS:
        rows = items(root, task, "train")
        # Of a part of the split it would be another figure.
        if len(rows) == TASKS[task].sizes["train"]:
            count = Counter(item.answer for item in rows).most_common(1)[0][1]
            most.append((task, count, len(rows)))
        shared += [(task, *pair) for pair in clusters(items(root, task, "test")).items()]
    return {"majority.csv": most, "clusters.csv": shared}


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, content in lines(sys.argv[1]).items():
        with (FOLDER / name).open("w", newline="", encoding="utf-8") as stream:
            csv.writer(stream, lineterminator="\n").writerows(content)
