"""What of a program counts, and what is only said to people."""

from __future__ import annotations

import ast

import pytest

from mixlora_exp.records import canonical_code

PROGRAM = '''"""Limits."""

from mixlora_exp.checks import require

LIMIT = 3
"""The most."""


class Refused(Exception):
    """Too many."""

    def __init__(self, n):
        super().__init__(f"refused: {n}")


def _hint(n):
    return f"at most {LIMIT}" if n else "none"


def check(n: int, known: list[str]) -> str:
    """Refuse `n`."""
    require(n > 0, "n", "must be > 0")
    assert n < 100, "far too many"
    names = ", ".join(known)
    if n > LIMIT:
        # It would not fit.
        wrong = f"n={n} is wrong"
        wrong += f", known are {names}"
        raise ValueError(wrong) from None
    if n == LIMIT:
        raise Refused(n) from ValueError("that many")
    if n == 2:
        return prompt(n)
    raise KeyError("n", f"{n}: " + _hint(n))


def prompt(n):
    text = f"Choose {n} options"
    return text
'''
CHECKS = """
def require(ok, name, rule):
    if not ok:
        raise ValueError(f"{name} {rule}")
"""


def meant(program: str, checks: str = CHECKS) -> dict[str, str]:
    return canonical_code.meanings({"limits.py": program, "checks.py": checks})


@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param('"""Limits."""', '"""What is allowed."""', id="docstring of the module"),
        pytest.param('"""Too many."""', '"""Refused."""', id="docstring of a class"),
        pytest.param('    """Refuse `n`."""\n', "", id="docstring of a function"),
        pytest.param('"""The most."""', '"""A bound."""', id="docstring of a constant"),
        pytest.param("# It would not fit.", "# Why not.", id="comment"),
        pytest.param("LIMIT = 3", "LIMIT = (\n    3\n)", id="layout"),
        pytest.param('"far too many"', 'f"too many: {n}"', id="assertion"),
        pytest.param("refused: {n}", "no, {n + 1} is too many", id="an exception's own text"),
        pytest.param(
            "{n} is wrong", "{n:,} will not do, {LIMIT} would", id="f-string in a variable"
        ),
        pytest.param(", known are {names}", "; known: {names}", id="text that is added to"),
        pytest.param('", ".join(known)', '" ".join(known)', id="text for a text"),
        pytest.param('"that many"', '"so many"', id="cause"),
        pytest.param('f"{n}: " +', '"no: " +', id="text that is put together"),
        pytest.param('f"at most {LIMIT}"', '"less"', id="helper"),
        pytest.param('"must be > 0"', '"is too small"', id="argument of a check"),
    ],
)
def test_what_is_said_does_not_count(old: str, new: str) -> None:
    assert old in PROGRAM
    assert meant(PROGRAM.replace(old, new)) == meant(PROGRAM)


def test_nor_does_an_argument_by_name() -> None:
    first, second = (PROGRAM.replace('"must be > 0"', f'rule="{r}"') for r in ("> 0", "positive"))
    assert meant(first) == meant(second)


def test_what_a_check_says_does_not_count() -> None:
    assert meant(PROGRAM, CHECKS.replace("{name} {rule}", "{name}: {rule}")) == meant(PROGRAM)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param("LIMIT = 3", "LIMIT = 4", id="constant"),
        pytest.param("LIMIT = 3", "LIMIT = None", id="no constant"),
        pytest.param("n > LIMIT", "n >= LIMIT", id="operator"),
        pytest.param("n > 0", "n > 1", id="condition of a check"),
        pytest.param("Choose {n} options", "Choose {n} of these", id="prompt"),
        pytest.param("ValueError(wrong)", "TypeError(wrong)", id="type of an exception"),
        pytest.param("raise Refused(n)", "raise Refused(n + 1)", id="number of an exception"),
        pytest.param("        raise Refused(n) from ValueError", "        Refused(n), ValueError",
                     id="no exception"),
        pytest.param("require(n", "refuse(n", id="another check"),
        pytest.param("return text", "return text, 1", id="result"),
    ],
)  # fmt: skip
def test_what_is_done_counts(old: str, new: str) -> None:
    assert old in PROGRAM
    assert meant(PROGRAM.replace(old, new)) != meant(PROGRAM)


def test_a_text_with_a_second_use_counts() -> None:
    program = """
def ask(n):
    text = "Choose"
    if n:
        raise ValueError(text)
    return text
"""
    assert meant(program) != meant(program.replace("Choose", "Take"))
    # So does what only looks like a check: its argument is returned.
    other = CHECKS + "    return rule\n"
    assert meant(PROGRAM, other) != meant(PROGRAM.replace("must be > 0", "is small"), other)
    # And an argument of a function that makes an exception, unless it becomes its text.
    made = """
def wrong(kind):
    seen.append(kind)
    return ValueError("no")


def ask(n):
    raise wrong("Choose")
"""
    assert meant(made) != meant(made.replace("Choose", "Take"))
    # And an argument of a function that this package does not have.
    foreign = "from elsewhere import require\nrequire(1, 'n', 'a rule')\n"
    assert meant(foreign) != meant(foreign.replace("a rule", "another"))


@pytest.mark.parametrize("told", ["n or 'Choose'", "[n, 'Choose']", "(n, 'Choose')", "{'Choose'}"])
def test_a_text_inside_what_is_said_does_not_count(told: str) -> None:
    program = f"def ask(n):\n    raise ValueError({told})\n"
    assert meant(program) == meant(program.replace("Choose", "Take"))
    assert meant(program) != meant(program.replace("ValueError", "list"))


def test_nor_does_what_a_library_s_exception_says() -> None:
    program = "import library\n\ndef ask(n):\n    raise library.Wrong('Choose')\n"
    assert meant(program) == meant(program.replace("Choose", "Take"))


def test_a_text_that_other_functions_read_counts() -> None:
    program = """
def ask(n):
    global text
    text = "Choose"
    raise ValueError(text)
"""
    assert meant(program) != meant(program.replace("Choose", "Take"))
    alone = program.replace("    global text\n", "")
    assert meant(alone) == meant(alone.replace("Choose", "Take"))


def test_fields_that_a_python_does_not_know_yet_change_nothing() -> None:
    tree = ast.parse("def f(a): return [None, 0, 'x']")
    before = canonical_code._dump(tree)
    for node in ast.walk(tree):
        node._fields = (*node._fields, "of_a_later_python")
        node.of_a_later_python = []
    assert canonical_code._dump(tree) == before
