"""Command lines of odd words: each does what it says, or is refused in one message."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import odd_values
import pytest
from huggingface_hub import constants
from odd_values import LONG, misbehaviour

from mixlora_exp.bench import runner
from mixlora_exp.cli import figures, gpu_check, report, tables
from mixlora_exp.cli.main import COMMANDS, main
from mixlora_exp.errors import UserError

Draws = Callable[..., Iterator[Random]]
HYDRA = ("train", "evaluate", "generate", "search")
GROUPS = {
    "model": ("tiny", "llama2_7b", "tinny"), "method": ("lora", "mixlora", "none", "adalora"),
    "task": ("arc_e", "multi"), "data": ("embedded", "local", "hub", "chat"),
    "kernel": ("auto", "triton", "reference"), "experiment": ("smoke", "table2", "study"),
    "preset": ("official", "correct"), "tracker": ("none", "wandb"), "trainer": ("default",),
    "hydra/launcher": ("basic", "joblib"), "hydra/sweeper": ("basic",),
}  # fmt: skip
FIELDS = (
    "seed", "output_dir", "dry_run", "force", "adapter", "adapters", "base", "name", "prompt",
    "run", "protocol", "trainer.max_steps", "trainer.learning_rate", "trainer.batch_size",
    "trainer.micro_batch_size", "trainer.pack_adapters", "trainer.precision", "trainer", "method",
    "method.rank", "method.top_k", "method.num_experts", "method.targets", "method.router_options",
    "method.match_params", "method.name", "model.path", "model.name", "model.config",
    "model.config.hidden_size", "model.hub_id", "model.package", "model.quantization", "data.path",
    "data.train_limit", "data.train_limits", "data.forms", "data.mirror", "data.seed", "task.train",
    "task.custom", "task.evaluate", "evaluation.protocols", "evaluation.limit", "kernel.name",
    "evaluation.shuffle_experts", "tracker.group", "study", "trials", "ranges", "coef_low",
    "hydra.mode", "hydra.run.dir", "hydra.sweep.dir", "hydra.sweeper.params", "hydra.verbose",
    "hydra.job.chdir", "hydra.job.num", "hydra.launcher", "hydra.searchpath", "hydra", "a.b.c",
    "hydra.sweeper", "hydra.job.env_set", "hydra.callbacks", "hydra.sweeper._target_",
)  # fmt: skip
TYPED = (
    "1", "0", "-1", "1.5", "1e400", "nan", "null", "true", "", "''", "'", '"', "[", "]", "[]",
    "{}", "[1,2]", "[{a:1}]", "[{}]", "[[]]", "{a:{b:c}}", "{a:1", "a,b", "1,2", "range(1,3)",
    "range(0,5)", "choice(1,2)", "interval(0,1)", "glob(*)", "sort(2,1)", "shuffle(1,2)",
    "tag(a,1)", "${x}", "${seed}", "${oc.env:HOME}", "${oc.env:NOWHERE}", "${", "${hydra:job.num}",
    "${eval:1}", "???", "MULTIRUN", "a=b", "a b", "é", "\x1b[2J", "\u202e", "a\nb", LONG,
    "/no/such", "..", "/", "/dev/null", "~", "hub:a/b@c", "hub:", "[lora,mixlora]", "\\", "a\\,b",
    "lora", "arc_e", "[arc_e]", "[label_logits]", "[lora,{method:mixlora}]", "99999999999999999999",
)  # fmt: skip
FLAGS = (
    "-m", "--multirun", "-sc", "--cfg", "--cfg=job", "-c", "job", "--help", "--info", "--version",
    "--hydra-help", "--resolve", "--package", "-p", "--config-name", "--config-name=x",
    f"--config-name={LONG}", "--config-dir=/no", "--config-path=/no", "-cd", "--run",
    "--experimental-rerun=x", "--from", "--from=x", "install=bash", "-", "--", "--force",
    "--source=/no", "--results=/no/x", f"--output={LONG}", "--check", "--runs", "x", "--brief",
    "--state=done", "--seeds=0", "--seeds=x", "--tasks", "--changed=nan", "--results=/dev/null",
    "--file=../x", "--license=x", "--experiment=table2", "kind=none", "kind=steps", "rows=[]",
)  # fmt: skip


def word(draw: Random, command: str) -> str:
    """One argument, more or less as people type them."""
    kind = draw.random()
    if kind < 0.2:
        group = draw.choice(sorted(GROUPS))
        return f"{group}={draw.choice((*GROUPS[group], draw.choice(TYPED)))}"
    if kind < (0.7 if command in HYDRA else 0.35):
        before = draw.choice(("", "", "", "", "+", "++", "~"))
        return f"{before}{draw.choice(FIELDS)}={draw.choice(TYPED)}"
    if kind < 0.9:
        return draw.choice(FLAGS)
    typed = draw.choice((*TYPED, *FIELDS, *GROUPS))
    return typed[: draw.randrange(len(typed) + 1)] if draw.random() < 0.3 else typed


def one_odd(draw: Random) -> list[str]:
    command = draw.choice(("train", "train", "train", "evaluate", *sorted(COMMANDS)))
    words = [word(draw, command) for _ in range(draw.choice((1, 1, 2, 2, 3, 5)))]
    # lm-eval's own command line is another project's.
    return ["status" if command == "lm-eval" else command, *words]


def not_here(*_: object, **__: object) -> None:
    raise UserError("the test stops here")


def stand_in(name: str, **members: object) -> types.ModuleType:
    module = types.ModuleType(f"mixlora_exp.{name}")
    vars(module).update(members)
    return module


@pytest.fixture
def nothing_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Stand in for all that would take long, write outside of an empty folder or use a network."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for module in (
        stand_in("runs.run", run=lambda *_, **__: None),
        stand_in("runs.together", run_together=lambda *_, **__: []),
        stand_in("serving.answer", answer=not_here),
    ):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for command in (tables, figures, report):
        monkeypatch.setattr(command, "gather", not_here)
    monkeypatch.setattr(runner, "measure", not_here)
    monkeypatch.setattr(gpu_check, "check", not_here)


@pytest.mark.parametrize(
    ("code", "written", "wrong"),
    [(2, "error: a\n", False), (0, "", False), (0, "a notice\n", False), (2, "", True),
     (2, "a notice\nerror: a\n", True), (2, "error: a\nerror: b\n", True), (2, "a\n", True),
     (1, "error: a\n", True), (2, "error: Traceback\n", True)],
)  # fmt: skip
def test_the_judge(code: int, written: str, wrong: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def command(_: object) -> int:
        sys.stderr.write(written)
        return code

    monkeypatch.setattr(odd_values, "main", command)
    assert bool(misbehaviour([])) is wrong


@pytest.mark.usefixtures("nothing_runs")
def test_odd_command_lines(draws: Draws, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "experiment=smoke"]) == 0, "here a good one is not refused"
    wrong = {}
    for number, draw in enumerate(draws("command lines", 25, 500)):
        argv = one_odd(draw)
        if what := misbehaviour(argv):
            wrong[f"{number}: {argv}"] = what
    capfd.readouterr()
    assert not wrong, "\n".join(f"{name}: {what}" for name, what in wrong.items())


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("hydra.sweeper=basic", "a choice is written hydra/sweeper=NAME"),
        ("hydra.launcher=joblib", "a choice is written hydra/launcher=NAME"),
        ("hydra.verbose=1", "write true, false, or the name of a logger"),
        ("hydra.verbose=null", "write true, false, or the name of a logger"),
        ('hydra.job.env_set=${oc.decode:"1"}', "hydra.job.env_set is an object"),
        ("hydra.callbacks=${now:%Y}", "hydra.callbacks is an object"),
        ("hydra.sweeper._target_=os.system", "is chosen by name"),
        ("+hydra.callbacks.a={_target_: os.system}", "is chosen by name"),
    ],
)
@pytest.mark.parametrize("flags", [(), ("-m",)], ids=["run", "sweep"])
def test_hydra_s_own_settings_have_their_form(
    word: str, told: str, flags: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *flags, "experiment=smoke", "dry_run=true", word]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert told in line
