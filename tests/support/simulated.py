"""Simulated methods whose true accuracy is known, and how often the tables' intervals hold it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.stats import norm

from mixlora_exp.records.wilson import LEVEL
from mixlora_exp.results.statistics.estimates import compare, estimate
from mixlora_exp.results.statistics.families import holm
from mixlora_exp.results.statistics.parts import accuracy_part, difference_part


@dataclass(frozen=True)
class World:
    """Two methods answer `items` of each of `tasks` under `seeds` seeds. An answer is right where a
    sum of normal variables is positive: the method's `skill`, and with these standard deviations
    the item's difficulty, what the item is for the method, the seed's luck (for all items and tasks
    of a method) and the rest. `cluster` items each have one difficulty."""

    seeds: int = 3
    items: int = 500
    tasks: int = 1
    skill: tuple[float, float] = (0.3, 0.3)
    item: float = 1.0
    of_method: float = 0.3
    seed: float = 0.0
    rest: float = 0.2
    cluster: int = 1

    def truth(self) -> np.ndarray:
        """Accuracy of each method over all items and all seeds."""
        spread = self.item**2 + self.of_method**2 + self.seed**2 + self.rest**2
        return norm.cdf(np.array(self.skill) / spread**0.5)

    def draw(self, draw: np.random.Generator) -> np.ndarray:
        """Right answers (tasks, methods, seeds, items)."""
        shape = (self.tasks, 2, self.seeds, self.items)
        alone = self.items // self.cluster
        difficulty = self.item * draw.normal(size=(self.tasks, 1, 1, alone))
        own = self.of_method * draw.normal(size=(self.tasks, 2, 1, alone))
        luck = self.seed * draw.normal(size=(1, 2, self.seeds, 1))
        fixed = np.repeat(difficulty + own, self.cluster, axis=-1)
        skill = np.array(self.skill)[None, :, None, None]
        return skill + fixed + luck + self.rest * draw.normal(size=shape) > 0


@dataclass
class Coverage:
    """Shares of draws in which the interval holds the true accuracy, and the true difference; in
    which p is at most 0.05; and the mean width of the interval of the difference."""

    accuracy: float
    difference: float
    rejected: float
    width: float


def _sides(answers: np.ndarray) -> list[dict[int, dict[str, float]]]:
    """Of one task: per method, seed -> item -> right."""
    names = [f"{i:05}" for i in range(answers.shape[-1])]
    return [
        {seed: dict(zip(names, map(float, row), strict=True)) for seed, row in enumerate(method)}
        for method in answers
    ]


def _groups(world: World) -> Mapping[str, str]:
    return {f"{i:05}": f"{i - i % world.cluster:05}" for i in range(world.items)}


def coverage(world: World, times: int, random: int = 0) -> Coverage:
    draw, truth, groups = np.random.default_rng(random), world.truth(), _groups(world)
    held = np.zeros(4)
    for _ in range(times):
        sides = [_sides(task) for task in world.draw(draw)]
        cell = estimate(*(accuracy_part(task[0], groups) for task in sides))
        found = compare(*(difference_part(*task, groups, binary=True) for task in sides))
        held += (
            cell.low <= truth[0] <= cell.high,
            found.low <= truth[0] - truth[1] <= found.high,
            found.p <= 1 - LEVEL,
            found.high - found.low,
        )
    return Coverage(*map(float, held / times))


def false_calls(world: World, comparisons: int, times: int, random: int = 0) -> tuple[float, float]:
    """Shares of families of `comparisons` equally good pairs with a false call: without correction,
    and with Holm's."""
    draw, groups, wrong = np.random.default_rng(random), _groups(world), np.zeros(2)
    world = dataclasses.replace(world, skill=(world.skill[0], world.skill[0]))
    for _ in range(times):
        p = [
            compare(difference_part(*_sides(world.draw(draw)[0]), groups, binary=True)).p
            for _ in range(comparisons)
        ]
        wrong += min(p) <= 1 - LEVEL, min(holm(p)) <= 1 - LEVEL
    return float(wrong[0] / times), float(wrong[1] / times)
