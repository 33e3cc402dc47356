"""Who may import whom: read from the sources, lazy imports inside functions included."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "mixlora_exp"
PACKAGE = SOURCE.name

EVERYTHING = None
ALLOWED: dict[str, set[str] | None] = {
    "interruption": set(),
    "errors": {"interruption"},
    "meaning": set(),
    "untrusted": {"errors"},
    "hashing": {"meaning", "untrusted"},
    "durable": set(),
    "spikes": set(),
    "runlock": {"errors", "untrusted"},
    "config": {"errors"},
    "kernels": set(),
    "tasks": {"errors"},
    "models": {"config", "errors", "hashing", "runlock", "untrusted"},
    "adapters": {"config", "kernels", "models", "durable", "errors", "untrusted"},
    "data": {"config", "tasks", "errors", "untrusted"},
    "runtime": {"config", "errors"},
    "training": {
        "config",
        "kernels",
        "data",
        "adapters",
        "runtime",
        "durable",
        "errors",
        "hashing",
        "interruption",
        "spikes",
        "untrusted",
    },
    "evaluation": {"config", "tasks", "data", "runtime", "errors"},
    "results": {"config", "tasks", "durable", "errors", "spikes", "untrusted"},
    "bench": {
        "config",
        "kernels",
        "models",
        "adapters",
        "training",
        "runtime",
        "results",
        "errors",
    },
    "memory": {"config"},
    "planning": EVERYTHING,
    "reporting": EVERYTHING,
    "basechoice": EVERYTHING,
    "rescoring": EVERYTHING,
    "serving": EVERYTHING,
    "mergecheck": {"adapters", "errors", "evaluation", "runtime"},
    "merging": EVERYTHING,
    "continuing": EVERYTHING,
    "generation": EVERYTHING,
    "lm_eval": {"adapters", "models", "errors"},
    "inputs": EVERYTHING,
    "experiment": EVERYTHING,
    "together": EVERYTHING,
    "underway": EVERYTHING,
    "scored": EVERYTHING,
    "status": EVERYTHING,
    "search": EVERYTHING,
    "search_study": {"errors"},
    "ledger": set(),
    "jobs": {"config", "errors", "interruption", "ledger", "together", "experiment"},
    "sweep": {"config", "errors", "interruption", "ledger", "jobs", "inputs"},
    "cli": EVERYTHING,
    # The package itself makes the tuner known to PEFT, and does nothing else.
    "__init__": {"_peft_hook"},
    "_peft_hook": {"adapters"},
}
"""Room (a folder or a module beside them) and the other rooms that it may import."""

HEAVY = {"torch", "transformers", "peft", "datasets", "hydra", "omegaconf"}
FILES = sorted(SOURCE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}


def name_of(path: Path) -> str:
    return path.relative_to(SOURCE.parent).as_posix()


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported_modules(path: Path) -> Iterator[str]:
    """Dotted names of what a file imports anywhere, `import_module("...")` too."""
    package = list(path.relative_to(SOURCE.parent).parts[:-1])
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and "import_module" in ast.unparse(node.func):
            yield from (a.value for a in node.args if isinstance(a, ast.Constant))


def imported_rooms(path: Path) -> set[str]:
    parts = [module.split(".") for module in imported_modules(path)]
    own = {names[1] if len(names) > 1 else "__init__" for names in parts if names[0] == PACKAGE}
    # `from mixlora_exp import __version__` names no room.
    return {room if room in ALLOWED else "__init__" for room in own}


def test_every_room_is_in_the_table() -> None:
    assert {room_of(path) for path in FILES} == set(ALLOWED)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_stay_below(path: Path) -> None:
    room = room_of(path)
    allowed = ALLOWED[room]
    if allowed is not EVERYTHING:
        assert imported_rooms(path) - {room} <= allowed


def test_lower_rooms_are_really_seen() -> None:
    assert {"adapters", "data", "evaluation", "training"} <= imported_rooms(
        SOURCE / "experiment.py"
    )
    assert "experiment" in imported_rooms(SOURCE / "jobs.py"), "imported inside a function"
    assert imported_rooms(SOURCE / "_peft_hook.py") == {"adapters"}


@pytest.mark.parametrize("room", ["results", "errors"])
def test_light_rooms_import_no_heavy_package(room: str) -> None:
    for path in FILES:
        if room_of(path) == room:
            found = {module.split(".")[0] for module in imported_modules(path)}
            assert not found & HEAVY, name_of(path)


def test_config_and_the_command_line_are_imported_without_torch() -> None:
    for path in FILES:
        if room_of(path) in ("config", "cli", "jobs", "sweep", "ledger"):
            found = {module.split(".")[0] for module in imported_modules(path)}
            assert not found & {"torch", "transformers", "peft", "datasets"}, name_of(path)


def test_files_stay_readable() -> None:
    lengths = {name_of(path): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert not {name: n for name, n in lengths.items() if n > 400}


def test_environment_is_read_in_few_places() -> None:
    """No environment variable may change a result; the record strips git's from a subprocess."""
    readers = {
        path
        for path in FILES
        for node in ast.walk(TREES[path])
        if (isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv"))
        or (
            isinstance(node, ast.ImportFrom)
            and {alias.name for alias in node.names} & {"environ", "getenv"}
        )
    }
    allowed = {"runtime", "models"}
    assert {name_of(p) for p in readers if room_of(p) not in allowed} <= {
        f"{PACKAGE}/results/checkout.py",
        # How much may be read; more is refused.
        f"{PACKAGE}/untrusted.py",
    }


def test_triton_is_only_in_its_kernels() -> None:
    users = {
        path for path in FILES for module in imported_modules(path) if module.startswith("triton")
    }
    for path in users:
        assert room_of(path) == "kernels", name_of(path)
        assert path.name.startswith("triton_"), name_of(path)
