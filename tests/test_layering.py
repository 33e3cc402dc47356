"""Who may import whom: read from the sources, lazy imports inside functions included."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "mixlora_exp"
PACKAGE = SOURCE.name

ROOMS: dict[str, set[str]] = {
    # Floor 1: what knows nothing of this project.
    "errors": set(),
    "kernels": set(),
    "tasks": set(),
    # Floor 2
    "config": {"errors", "tasks"},
    "system": {"errors"},
    # Floor 3
    "data": {"config", "errors", "system", "tasks"},
    "models": {"config", "errors", "kernels", "system"},
    "records": {"config", "errors", "system"},
    # Floor 4
    "adapters": {"config", "errors", "kernels", "models", "system"},
    "evaluation": {"config", "data", "errors", "tasks"},
    "results": {"config", "errors", "records", "system", "tasks"},
    # Floor 5
    "plans": {
        *("adapters", "config", "data", "errors", "kernels", "models", "records", "system"),
        "tasks",
    },
    "official": {"adapters", "errors", "system"},
    "training": {"adapters", "config", "data", "errors", "kernels", "models", "records", "system"},
    # Floor 6: one run, which brings everything below together; and measurements.
    "bench": {
        *("adapters", "config", "data", "errors", "evaluation", "kernels", "models", "records"),
        *("system", "training"),
    },
    "runs": {
        *("adapters", "config", "data", "errors", "evaluation", "kernels", "models", "plans"),
        *("records", "system", "training"),
    },
    # Floor 7
    "serving": {
        *("adapters", "config", "data", "errors", "evaluation", "models", "records", "runs"),
        "system",
    },
    "sweeps": {"config", "data", "errors", "plans", "records", "runs", "system"},
    # Floor 8: the commands. No room imports this one.
    "cli": {
        *("__init__", "adapters", "bench", "config", "errors", "models", "official"),
        *("plans", "records", "results", "runs", "serving", "sweeps", "system", "training"),
    },
    # The package itself makes the tuner known to PEFT, and does nothing else.
    "__init__": {"_peft_hook"},
    "_peft_hook": {"adapters"},
}
"""Room (a folder, or one of three modules beside them) and the other rooms that it may import."""
FLOORS = 8
BEFORE_TORCH = (
    *("cli/main.py", "cli/parser.py", "cli/hydra_command.py", "cli/train.py", "cli/evaluate.py"),
    *("cli/generate.py", "cli/convert.py", "cli/merge.py", "runs/base_choice.py"),
    *("sweeps/jobs.py", "sweeps/launch.py", "sweeps/ledger.py"),
)
"""Beside the room `config`, what a mistake on the command line is told from, before torch loads."""

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
    return {room if room in ROOMS else "__init__" for room in own}


def test_every_room_is_in_the_table() -> None:
    assert {room_of(path) for path in FILES} == set(ROOMS)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_stay_below(path: Path) -> None:
    room = room_of(path)
    assert imported_rooms(path) - {room} <= ROOMS[room]


@pytest.mark.parametrize("room", ROOMS)
def test_every_permission_is_used(room: str) -> None:
    used = {other for path in FILES if room_of(path) == room for other in imported_rooms(path)}
    assert ROOMS[room] == used - {room}


def floor_of(room: str, above: tuple[str, ...] = ()) -> int:
    """A room stands one floor above the highest of those that it may import."""
    assert room not in above, f"{' -> '.join([*above, room])} is a circle"
    below = (floor_of(other, (*above, room)) for other in ROOMS[room] if other != "__init__")
    return 1 + max(below, default=0)


def test_the_house_has_no_circle_and_few_floors() -> None:
    assert max(map(floor_of, set(ROOMS) - {"__init__", "_peft_hook"})) == FLOORS


def test_no_two_modules_import_each_other() -> None:
    """Nor any longer circle, inside a room as well: imports for type checking and inside functions
    count."""
    modules = {path: ".".join(path.relative_to(SOURCE.parent).with_suffix("").parts)
               for path in FILES}  # fmt: skip
    names = {name.removesuffix(".__init__") for name in modules.values()}
    imports = {}
    for path, name in modules.items():
        given = imported_modules(path)
        # `from mixlora_exp.kernels import KERNELS` imports the room's own file.
        found = {one if one in names else one.rpartition(".")[0] for one in given}
        own = name.removesuffix(".__init__")
        imports[own] = {one for one in found if one in names} - {own}
    assert sum(map(len, imports.values())) > 500
    list(TopologicalSorter(imports).static_order())
    with pytest.raises(CycleError):
        list(TopologicalSorter({**imports, f"{PACKAGE}.errors": names}).static_order())


def test_the_root_holds_no_other_module() -> None:
    modules = {path.stem for path in SOURCE.glob("*.py")}
    assert modules == {"__init__", "_peft_hook", "errors"}


def test_few_rooms_know_most_of_the_others() -> None:
    """Of the folders: the modules beside them are no rooms."""
    folders = set(ROOMS) - {"__init__", "_peft_hook", "errors"}
    most = {room for room in folders if len(ROOMS[room] & folders) > len(folders) / 2}
    assert most <= {"cli", "runs"}


def test_imports_are_really_seen() -> None:
    seen = imported_rooms(SOURCE / "runs" / "run.py")
    assert {"adapters", "data", "evaluation", "training"} <= seen
    inside = imported_rooms(SOURCE / "sweeps" / "jobs.py")
    assert "runs" in inside, "imported inside a function"
    assert imported_rooms(SOURCE / "_peft_hook.py") == {"adapters"}


@pytest.mark.parametrize("room", ["results", "records", "errors"])
def test_light_rooms_import_no_heavy_package(room: str) -> None:
    for path in FILES:
        if room_of(path) == room:
            found = {module.split(".")[0] for module in imported_modules(path)}
            assert not found & HEAVY, name_of(path)


def test_config_and_the_command_line_are_imported_without_torch() -> None:
    for path in FILES:
        name = path.relative_to(SOURCE).as_posix()
        if room_of(path) == "config" or name in BEFORE_TORCH:
            found = {module.split(".")[0] for module in imported_modules(path)}
            assert not found & {"torch", "transformers", "peft", "datasets"}, name_of(path)


def test_files_stay_readable() -> None:
    lengths = {name_of(path): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert not {name: n for name, n in lengths.items() if n > 400}


def classes_of(node: ast.stmt) -> list[str]:
    """The public class that a statement makes, `Name = Enum(...)` included."""
    made = isinstance(node, ast.Assign) and isinstance(node.value, ast.Call)
    if made and ast.unparse(node.value.func) == "Enum":
        return [ast.unparse(node.targets[0])]
    return [node.name] if isinstance(node, ast.ClassDef) and node.name[0] != "_" else []


def test_no_two_public_classes_share_a_name() -> None:
    names = [name for tree in TREES.values() for node in tree.body for name in classes_of(node)]
    assert {name for name in names if names.count(name) > 1} == set()
    assert {"Kernel", "KernelName"} <= set(names)


def test_names_of_projections_are_listed_once() -> None:
    """The official format has its own list: a change of ours must not change its files."""
    lists = {
        name_of(path)
        for path in FILES
        for node in ast.walk(TREES[path])
        if isinstance(node, ast.Tuple | ast.List | ast.Set | ast.Dict)
        and sum(
            isinstance(part, ast.Constant) and str(part.value).endswith("_proj")
            for part in (node.keys if isinstance(node, ast.Dict) else node.elts)
        )
        >= 3
    }
    assert lists == {f"{PACKAGE}/config/schema_method.py", f"{PACKAGE}/official/tensors.py"}


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
    assert {name_of(path) for path in readers if room_of(path) != "models"} <= {
        # Which code other processes import: this.
        f"{PACKAGE}/config/paths.py",
        f"{PACKAGE}/records/checkout.py",
        # Where caches are.
        f"{PACKAGE}/system/caches.py",
        f"{PACKAGE}/system/device.py",
        # How much may be read; more is refused.
        f"{PACKAGE}/system/untrusted.py",
    }


def test_triton_is_only_in_its_kernels() -> None:
    users = {
        path for path in FILES for module in imported_modules(path) if module.startswith("triton")
    }
    for path in users:
        assert path.parent == SOURCE / "kernels" / "triton", name_of(path)


def test_the_official_format_can_be_removed_as_a_whole() -> None:
    assert {room for room, allowed in ROOMS.items() if "official" in allowed} == {"cli"}
