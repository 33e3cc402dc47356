"""`mixlora-exp`: its commands, and what is told of one that is none or that cannot run."""

from __future__ import annotations

import ast
import importlib
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mixlora_exp.cli import compare
from mixlora_exp.cli.main import COMMANDS, main
from mixlora_exp.cli.parser import Parser
from mixlora_exp.errors import UserError
from mixlora_exp.system import library_notices

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_the_commands_are_listed(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 0
    told = capsys.readouterr().out
    assert all(f"  {name} " in told for name in COMMANDS)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("mixlora-exp 0.")


def test_help_imports_no_package(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from mixlora_exp.cli.main import main\n"
        "assert main([]) == 0\n"
        "assert not {'torch', 'hydra', 'omegaconf', 'pandas', 'rich', 'peft'} & set(sys.modules)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, check=True)


SCRIPTS = [ROOT / f"{name}.py" for name in ("train", "evaluate", "generate")]
SCRIPTS += [path for path in (ROOT / "scripts").glob("*.py") if path.stem != "checkout"]


def test_scripts_are_three_lines() -> None:
    for path in (ROOT / "scripts").glob("*.py"):
        if path.stem == "checkout":
            continue
        tree = ast.parse(path.read_text())
        name = ast.unparse(tree.body[-1].body[0]).removeprefix("run('").removesuffix("')")
        assert name in COMMANDS
        assert len(tree.body) == 3, "docstring, import, call"
        assert ast.unparse(tree.body[1]) == "from checkout import run"


FIRST_IMPORT = """
import runpy, sys
class Found:
    def find_spec(self, name, path=None, target=None):
        if name == "mixlora_exp":
            sys.exit(sys.path[0])
sys.meta_path.insert(0, Found())
sys.path.insert(0, sys.argv[1].rpartition("/")[0])  # As `python SCRIPT` does.
runpy.run_path(sys.argv[1])
"""


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_looks_beside_itself_first(script: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", FIRST_IMPORT, str(script)]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert found.stderr.strip() == str(ROOT / "src")


def test_a_checkout_runs_its_own_code(tmp_path: Path) -> None:
    """Also where another copy is installed, in a virtual environment that two checkouts share."""
    (tmp_path / "mixlora_exp.py").write_text("raise RuntimeError('another checkout')\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, str(ROOT / "train.py"), "--version"]
    subprocess.run(command, env=environment, cwd=tmp_path, check=True)


def test_a_folder_of_no_user(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "~no-user/run"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ~no-user/run: there is no user of the name after ~: write ")
    assert told.count("\n") == 1


def test_a_command_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tabels"]) == 2
    assert capsys.readouterr().err == "error: tabels is not a command; did you mean tables?\n"
    assert main(["x"]) == 2
    assert "choose from train, evaluate" in capsys.readouterr().err


def test_a_package_that_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Who installed the adapters alone is told of the extra."""
    monkeypatch.setitem(sys.modules, "rich.console", None)
    monkeypatch.delitem(sys.modules, "mixlora_exp.cli.status", raising=False)
    assert main(["status"]) == 2
    assert "`pip install '.[harness]'`, in the folder of the code" in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    assert len(capsys.readouterr().out) > 100


def test_usage_names_the_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["bin/mixlora-exp", "compare", "--help"])
    assert main() == 0
    assert capsys.readouterr().out.startswith("usage: mixlora-exp compare [-h]")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--outptu=x", "a"], "there is no option --outptu; did you mean --output?"),
        (["--zzz", "a"], "there is no option --zzz; choose from"),
        (["whole=yes", "a"], "whole=yes is not valid: expected true or false"),
        (["a", "--count=two"], "invalid int value: 'two'"),
        ([], "the following arguments are required"),
        ([f"results={__file__}", "a"], "test_main.py is a file: name a folder"),
        ([f"results={__file__}/a", "a"], "test_main.py, which is a file: name a folder"),
        ([f"html={HERE}", "a"], f"html={HERE} is a folder: name the file to write, as {HERE}/pa"),
    ],
)
def test_mistakes_in_options_are_one_message(words: list[str], message: str) -> None:
    parser = Parser("A command.")
    parser.add_argument("--output")
    parser.add_argument("--count", type=int)
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--html", metavar="FILE", type=Path)
    parser.add_results()
    parser.add_argument("folder")
    with pytest.raises(UserError, match=message):
        parser.parse(words)
    args = parser.parse(["lr=1/out", "--output", "x=y", "--count=2"])
    assert (args.folder, args.output, args.count) == ("lr=1/out", "x=y", 2)
    args = parser.parse(["output=x=y", "count=2", "out", "whole=true"])
    assert (args.folder, args.output, args.count, args.whole) == ("out", "x=y", 2, True)
    assert not parser.parse(["out", "whole=false"]).whole
    fine = ["out", f"html={__file__}", f"results={HERE}/new/one"]
    assert parser.parse(fine).results == HERE / "new" / "one"


@pytest.mark.slow
def test_libraries_print_nothing_when_they_are_imported(tmp_path: Path) -> None:
    for name in ("bitsandbytes", "torchao"):
        pytest.importorskip(name, reason=f"{name} is not installed")
    code = (
        "from mixlora_exp.system.library_notices import shorten_notices\n"
        "shorten_notices()\n"
        "import bitsandbytes, peft, torchao, transformers\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env=environment, cwd=tmp_path, check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout + done.stderr == ""


@pytest.mark.parametrize("command", ["gpu-check", "lm-eval"])
def test_commands_are_imported_after_that(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those that load libraries before they read `--help`."""
    loggers = [logging.getLogger(name) for name in library_notices.AT_IMPORT]
    for logger in loggers:
        monkeypatch.setattr(logger, "level", logging.NOTSET)

    levels: set[int] = set()

    def noted(name: str) -> None:
        levels.update(logger.level for logger in loggers)
        raise ModuleNotFoundError(name="x")

    monkeypatch.setattr(importlib, "import_module", noted)
    assert main([command, "--help"]) == 2
    assert levels == {logging.ERROR}


FIRST_LINE = """
import json, sys, time
class Terminal:
    first = None
    def isatty(self): return True
    def flush(self): pass
    def write(self, text):
        if Terminal.first is None:
            heavy = {"torch", "transformers", "peft", "hydra", "omegaconf", "rich", "yaml"}
            Terminal.first = [text, sorted(heavy & set(sys.modules)), time.process_time()]
sys.stderr = Terminal()
sys.argv = ["train.py", "experiment=smoke", "dry_run=true"]
import runpy
try:
    runpy.run_path("train.py", run_name="__main__")
except SystemExit as done:
    print(json.dumps([*Terminal.first, done.code]))
"""


def test_the_first_line_comes_before_anything_heavy(tmp_path: Path) -> None:
    """On a terminal; what takes seconds is imported later."""
    command = [sys.executable, "-W", "ignore", "-c", FIRST_LINE]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    text, heavy, seconds, code = json.loads(done.stdout.splitlines()[-1])
    assert text == "mixlora-exp train: loading, some seconds\n"
    assert heavy == []
    assert seconds < 1.0  # Of this process: other processes do not count.
    assert code == 0


def test_a_package_that_a_command_meets_late_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`compare html=` and `figures` draw after they have read."""

    def run(argv: object) -> int:
        raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib.figure")

    monkeypatch.setattr(compare, "run", run)
    assert main(["compare", "a", "b"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: compare needs the package matplotlib: run `make install`, or ")
    assert "'.[figures]'" in line
