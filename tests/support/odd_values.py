"""Odd files by a seeded generator: JSON trees with a value changed, removed, added or nested, and
the judge of what a command made of them."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import json
import traceback
from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Any

from mixlora_exp.cli.main import main

LONG = 300 * "a"


def nested(depth: int) -> Any:
    """A list in a list in a list."""
    found: Any = 1
    for _ in range(depth):
        found = [found]
    return found


VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 7, 10**30, 10**60, 0.5, -0.5, 1e308, float("nan"), float("inf"),
    "", " ", "a", "0", "null", "\x1b[2J\u202e", "a\nb", "a|b`<img>", "../../x", "/etc/passwd",
    "${now:}", "\ud800", LONG, 5000 * "b", [], {}, [[]], [None], [{}], {"a": {}}, {"": ""},
    {LONG: 1}, [0.5, "a"], nested(50), nested(200),
)  # fmt: skip


def places(value: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value inside a JSON tree."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        yield (*here, key)
        if isinstance(inner, dict | list):
            yield from places(inner, (*here, key))


def changed_somewhere(tree: dict[str, Any], draw: Random) -> dict[str, Any]:
    """A copy with one to three of its values replaced, removed, nested, added or exchanged."""
    found = copy.deepcopy(tree)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        all_places = list(places(found))
        if not all_places:
            break
        # By depth first: else nearly all would be far inside the longest list.
        depth = draw.choice(sorted({len(place) for place in all_places}))
        *above, last = draw.choice([place for place in all_places if len(place) == depth])
        owner: Any = found
        for key in above:
            owner = owner[key]
        match draw.randrange(6):
            case 0:
                del owner[last]
            case 1 if isinstance(owner, dict):
                owner[draw.choice(("extra", "", "__class__", LONG))] = draw.choice(VALUES)
            case 2:
                owner[last] = [owner[last]]
            case _:
                owner[last] = copy.deepcopy(draw.choice(VALUES))
    return found


def sealed(record: dict[str, Any]) -> bytes:
    """The file of a record whose hash fits whatever it says."""
    content = {name: value for name, value in record.items() if name != "content_sha256"}
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(canonical.encode()).hexdigest()
    return json.dumps({**content, "content_sha256": digest}).encode()


def cut_or_flipped(content: bytes, draw: Random) -> bytes:
    """A copy of a file's bytes that ends too early, or has a few others in it."""
    if draw.random() < 0.4:
        return content[: draw.randrange(len(content) + 1)]
    found = bytearray(content)
    for _ in range(draw.choice((1, 1, 3, 20))):
        if found:
            found[draw.randrange(len(found))] = draw.randrange(256)
    return bytes(found)


def trouble(action: Callable[[], object], *allowed: type[BaseException]) -> str:
    """What an action raised that it may not raise; empty if it ended or raised an allowed one."""
    try:
        action()
    except allowed:
        return ""
    except BaseException:
        return traceback.format_exc(limit=-6)
    return ""


def misbehaviour(argv: Sequence[str]) -> str:
    """What is wrong with how `mixlora-exp` ended for a command line; empty if nothing is: it may
    do what it was asked (0), or say in one line why not (2)."""
    out, err, code = io.StringIO(), io.StringIO(), None

    def act() -> None:
        nonlocal code
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(list(argv))

    if raised := trouble(act):
        return raised
    told = err.getvalue()
    if code not in (0, 2) or "Traceback" in told:
        return f"exit code {code}: {told[-1500:]}"
    if code == 2:
        # No notice of a library or of Hydra may stand beside it.
        lines = told.splitlines()
        if len(lines) != 1 or not lines[0].startswith("error: "):
            return f"exit code 2 with {len(lines)} lines: {told[-1500:]}"
    return ""
