"""The commands that users type, on the committed records."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from mixlora_exp.cli import figures, report, tables
from mixlora_exp.cli.main import main
from mixlora_exp.config.paths import RESULTS
from mixlora_exp.results.build import Results


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def script(capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """A command, carried out in this process."""

    def run(name: str, *arguments: str) -> Done:
        return Done(main([name, *arguments]), *capsys.readouterr())

    return run


@pytest.fixture
def read_once(committed: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands that would each read all committed records take what was read before."""
    for command in (tables, figures, report):
        monkeypatch.setattr(command, "gather", lambda folder, names=None: committed)


@pytest.mark.usefixtures("read_once")
def test_tables(script: Callable[..., Done], tmp_path: Path) -> None:
    done = script("tables", f"--results={RESULTS}", f"--output={tmp_path}")
    assert done.returncode == 0, done.stderr
    committed = RESULTS / "tables"
    tidy = {"scores.csv", "differences.csv"}
    assert {p.name for p in tmp_path.iterdir()} == {p.name for p in committed.iterdir()} | tidy
    assert (
        script("tables", f"--results={RESULTS}", f"--output={tmp_path}", "--check").returncode == 0
    )
    (tmp_path / "table1.csv").write_text("other\n")
    done = script("tables", f"--results={RESULTS}", f"--output={tmp_path}", "--check")
    assert done.returncode == 2
    assert "run it without --check" in done.stderr
    assert (tmp_path / "table1.csv").read_text() == "other\n"


@pytest.mark.slow
@pytest.mark.usefixtures("read_once")
def test_figures_and_report(script: Callable[..., Done], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    done = script("report", f"--results={RESULTS}", f"--output={tmp_path}")
    assert done.returncode == 0, done.stderr
    page = tmp_path / "report" / "index.html"
    content = page.read_text()
    assert len(content) > 50_000
    # Written elsewhere, it leads to the records and tables where they lie.
    links = re.findall(r'href="([^#"]+)"', content)
    assert any(re.search(r"/runs/[^/]+\.zip$", link) for link in links)
    assert [link for link in links if not (page.parent / link).is_file()] == []
    done = script("figures", f"--results={RESULTS}", f"--output={tmp_path / 'again'}")
    assert done.returncode == 0, done.stderr
    for path in (tmp_path / "figures").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_collect(script: Callable[..., Done], write: Callable[..., Path], tmp_path: Path) -> None:
    overrides = ("model=smollm2_135m", "task=arc_e", "data=embedded", "method=lora")
    write(tmp_path / "out", "a", overrides, {"arc_e": 0.5})
    words = (f"--source={tmp_path / 'out'}", f"--results={tmp_path}")
    done = script("collect", *words)
    assert (done.returncode, done.stdout.splitlines()[0]) == (0, "collected: a")
    write(tmp_path / "out", "trial", ("model=tiny", *overrides[1:]), {"arc_e": 0.5})
    done = script("collect", *words)
    told = "skipped: 1 on random weights, whose scores mean nothing"
    assert (done.returncode, done.stdout.splitlines()[0]) == (0, told)
    (tmp_path / "out" / "a" / "record.json").write_text("{}")
    assert script("collect", *words).returncode == 2


@pytest.mark.parametrize("empty", [False, True], ids=["no outputs", "no finished run"])
def test_a_fresh_clone_has_nothing_to_collect(
    script: Callable[..., Done], tmp_path: Path, empty: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if empty:
        (tmp_path / "outputs" / "begun").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    words = ["collect", f"--results={tmp_path}"]
    done = script(*words)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("nothing to collect: no finished run in outputs\n")
    done = script(*words, f"--source={tmp_path / 'nowhere'}")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "nowhere is not a folder" in done.stderr


@pytest.mark.parametrize("name", ["tables", "figures", "report", "collect"])
def test_help_is_given(script: Callable[..., Done], name: str) -> None:
    done = script(name, "--help")
    assert done.returncode == 0
    assert "--output" in done.stdout or "--source" in done.stdout


@pytest.mark.parametrize("name", ["tables", "figures", "report", "collect"])
def test_unknown_options_are_reported(script: Callable[..., Done], name: str) -> None:
    done = script(name, "--outptu=x")
    assert done.returncode == 2
    assert "there is no option --outptu" in done.stderr


def test_ones_own_results_stay_apart_from_the_projects(
    script: Callable[..., Done], write: Callable[..., Path], tmp_path: Path, monkeypatch
) -> None:
    """By default everything goes to a folder in the working directory, which git ignores."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    monkeypatch.chdir(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in RESULTS.rglob("*")}
    words = ("model=smollm2_135m", "data=local", "data.path=d", "task=arc_e")
    for method, share in (("lora", 0.25), ("mixlora", 0.5)):
        write(tmp_path / "outputs", method, [*words, f"method={method}"], {"arc_e": share})
    for name in ("collect", "tables", "figures", "report"):
        done = script(name)
        assert done.returncode == 0, done.stderr
    own = tmp_path / "my-results"
    assert {path.name for path in (own / "runs").iterdir()} == {"lora.zip", "mixlora.zip"}
    for made in (
        "tables/table2.md",
        "scores.csv",
        "figures/learning_curves.png",
        "report/index.html",
    ):
        assert (own / made).is_file()
    lines = (own / "scores.csv").read_text().splitlines()
    assert {line.rpartition(",")[2] for line in lines[1:]} == {"lora", "mixlora"}
    assert {path: path.stat().st_mtime_ns for path in RESULTS.rglob("*")} == before
    ignored = (Path(__file__).parents[2] / ".gitignore").read_text().splitlines()
    assert "my-results/" in ignored
    # Another root, by either way of writing it; a collected run is found by its name.
    assert script("collect", f"results={tmp_path / 'two'}").returncode == 0
    assert (tmp_path / "two" / "runs" / "lora.zip").is_file()
    assert "lora" in script("compare", "lora", "mixlora").stdout


@pytest.mark.parametrize("command", ["tables", "report", "figures", "status"])
def test_results_that_are_not_there(
    script: Callable[..., Done], tmp_path: Path, command: str
) -> None:
    done = script(command, f"--results={tmp_path / 'typo'}")
    assert done.returncode == 2
    assert f"results={tmp_path / 'typo'} does not exist" in done.stderr
    assert not list(tmp_path.iterdir())
