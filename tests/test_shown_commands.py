"""Commands as README, docs and conf show them can be typed into a shell: one rule for all."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES += sorted(path for path in (ROOT / "conf").rglob("*") if path.suffix in (".md", ".yaml"))
PAGES += sorted((ROOT / "src" / "mixlora_exp" / "cli").glob("*.py"))
COMMAND = re.compile(r"(?:\b(?:train|evaluate|generate)\.py|scripts/\w+\.py|\bmixlora-exp) (.*)")


def faults(line: str) -> list[str]:
    """What of a shown command a shell would not pass on, or that is quoted otherwise."""
    found = []
    for span in [line] if "`" not in line else line.split("`")[1::2]:
        shown = COMMAND.search(span)
        bare = re.sub(r"'[^']*'|(?:^|\s)#.*", "", shown[1]) if shown is not None else ""
        found += re.findall(r"\S*[\[{][^\]}]*|\S+=\"\S*|\"\S+=\S*", bare)
    return found


def test_what_a_shell_would_read_otherwise_is_in_single_quotes() -> None:
    odd = [
        f"{path.relative_to(ROOT)}:{number}: {fault}"
        for path in PAGES
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if path.suffix != ".py" or 'f"' not in line
        for fault in faults(line)
    ]
    assert odd == []


def test_the_rule_sees_what_breaks_it() -> None:
    assert faults("python train.py task.train=[a,b]") == ["task.train=[a,b"]
    assert faults('`x` and `mixlora-exp generate prompt="a b"`') == ['prompt="a']
    assert faults('mixlora-exp search "ranges=[a=1:2]"') == ['"ranges=[a=1:2']
    assert faults("python train.py -m method.rank=2,4 'data.forms=[text]'  # [all]") == []
