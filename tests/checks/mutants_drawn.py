"""Mutants of a room's files, drawn by a seed, without those that mean the same by construction."""

from __future__ import annotations

import ast
import difflib
import random
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cosmic_ray.ast import ast_nodes, get_ast_from_path
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names

from mixlora_exp.records.canonical_code import meanings

PACKAGE = "src/mixlora_exp"
ROOMS = {
    "statistics": ("results/statistics/*.py",),
    "records": ("records/*.py",),
    "runlock": ("system/runlock.py",),
    "kernels": ("kernels/*.py", "kernels/[!t]*/*.py"),
    # A kernel takes Triton's interpreter minutes: only where it is asked for.
    "triton": ("kernels/triton/*.py",),
}
"""Room -> its files in the package."""


@dataclass(frozen=True, slots=True)
class Mutant:
    """One changed place of a file; `name`: what cosmic-ray did, and where."""

    room: str
    file: str
    line: int
    name: str
    before: str
    after: str
    original: str
    source: str

    @property
    def key(self) -> str:
        return f"{self.file} {self.name} {self.after}"


class _Bare(ast.NodeTransformer):
    """Takes out what a run of the code does not read: annotations, `__all__` and lines of a log."""

    def visit_arg(self, node: ast.arg) -> ast.AST:
        node.annotation = None
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        return self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        node.annotation = ast.Constant("")
        return self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> ast.AST:
        return ast.Pass() if ast.unparse(node.targets) == "__all__" else self.generic_visit(node)

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        logs = ast.unparse(node).startswith(("log.", "logger.", "logging.", "warnings.warn("))
        return ast.Pass() if logs else self.generic_visit(node)


def _meaning(source: str) -> str:
    """The code without the above, layout, docstrings and texts of exceptions."""
    return meanings({"": ast.unparse(_Bare().visit(ast.parse(source)))})[""]


def _places(path: Path) -> Iterator[list[tuple[str, int, tuple[int, int]]]]:
    """The mutants (operator, occurrence, position) at each place where one or more can be made."""
    tree = get_ast_from_path(path)
    found = defaultdict(list)
    for name in sorted(operator_names()):
        if get_operator(name).arguments():
            continue
        operator = get_operator(name)()
        positions = (at for node in ast_nodes(tree) for at in operator.mutation_positions(node))
        for occurrence, at in enumerate(positions):
            found[at].append((name, occurrence, at[0]))
    yield from found.values()


def draw(root: Path, room: str, count: int, seed: int) -> tuple[list[Mutant], dict[str, int]]:
    """`count` mutants of a room, each at another place; and what they were drawn from.

    Each place is as likely as any other, and there each mutant: nine in ten of all mutants replace
    an arithmetic operator by another.
    """
    chance = random.Random(f"{seed}/{room}")
    files = sorted(path for pattern in ROOMS[room] for path in (root / PACKAGE).glob(pattern))
    places = [(path, choices) for path in files for choices in _places(path)]
    chance.shuffle(places)
    found, alike = [], 0
    for path, choices in places:
        mutant = _mutant(root, room, path, chance.choice(choices))
        if mutant is None:
            alike += 1
            continue
        found.append(mutant)
        if len(found) == count:
            break
    counted = {"files": len(files), "places": len(places), "without effect": alike}
    return sorted(found, key=lambda mutant: (mutant.file, mutant.line)), counted


def made_again(root: Path, row: Mapping[str, Any]) -> Mutant | None:
    """The mutant of a record's row in today's file, of several alike that with the nearest line;
    None where there is no such place."""
    path, operator = root / row["file"], row["name"].partition(" ")[0]
    choices = [one for place in _places(path) for one in place] if path.exists() else []
    made = (
        _mutant(root, row["room"], path, choice)
        for choice in choices
        if choice[0].partition("/")[2] == operator
    )
    alike = [m for m in made if m and (m.before, m.after) == (row["before"], row["after"])]
    return min(alike, key=lambda mutant: abs(mutant.line - row["line"]), default=None)


def _mutant(
    root: Path, room: str, path: Path, choice: tuple[str, int, tuple[int, int]]
) -> Mutant | None:
    """None where the change means the same by construction, or is no Python."""
    operator, occurrence, (line, column) = choice
    source = path.read_text(encoding="utf-8")
    mutated = mutate_code(source, get_operator(operator)(), occurrence)
    try:
        if mutated is None or _meaning(mutated) == _meaning(source):
            return None
    except SyntaxError:
        return None
    changed = list(difflib.ndiff(source.splitlines(), mutated.splitlines()))
    before, after = (
        "\n".join(text[2:].strip() for text in changed if text[0] == sign) for sign in "-+"
    )
    name = f"{operator.partition('/')[2]} {line}:{column}"
    file = path.relative_to(root).as_posix()
    return Mutant(room, file, line, name, before, after, source, mutated)
