"""The commands of the README and of the pages it leads to, each run at tiny size."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from official_format import as_official

from mixlora_exp.cli.evaluate import run as evaluate
from mixlora_exp.cli.main import COMMANDS, main
from mixlora_exp.cli.train import execute
from mixlora_exp.config import schema
from mixlora_exp.config.command import compose
from mixlora_exp.config.paths import CONF_DIR
from mixlora_exp.config.resolve import open_session
from mixlora_exp.models import load_model, load_tokenizer
from mixlora_exp.records.record import read_record
from mixlora_exp.system.console import console
from mixlora_exp.system.exit_codes import guarded
from mixlora_exp.tasks import embedded

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    ROOT / "README.md",
    *(
        ROOT / "docs" / f"{name}.md"
        for name in ("running", "adapters", "several-adapters", "results")
    ),
]
README = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def commands(start: str) -> list[str]:
    lines = [
        line.partition("  # ")[0].strip() for block in blocks("bash") for line in block.splitlines()
    ]
    return [line for line in dict.fromkeys(lines) if line.startswith(start)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What DIR stands for in a command: data files, a model, an adapter, all tiny."""
    root = tmp_path_factory.mktemp("folders")
    for task in schema.TASK_NAMES:
        for split in ("train", "test"):
            path = root / "data" / task / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            rows = embedded.rows(task, split, seed=0)[:8]
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = compose(["model=tiny_gemma"]).model
    load_model(config, torch.float32).save_pretrained(root / "model")
    load_tokenizer(config).save_pretrained(root / "model")
    assert execute(["experiment=smoke", "model=tiny_gemma", f"output_dir={root / 'out'}"]) == 0
    (adapter,) = (root / "out").glob("*/adapter")
    other = ["method=dora", f"output_dir={root / 'other'}"]
    assert execute(["experiment=smoke", "model=tiny_gemma", *other]) == 0
    (second,) = (root / "other").glob("*/adapter")
    return {
        "outputs/A": adapter.parent,
        "outputs/B": second.parent,
        "data.path": root / "data",
        "model.path": root / "model",
        "adapter": adapter,
        "run": adapter.parent,
    }


def both(word: str, folders: dict[str, Path]) -> str:
    """With the two runs that stand in a command of the README."""
    for name in ("outputs/A", "outputs/B"):
        word = word.replace(name, str(folders[name]))
    return word


def tiny(arguments: list[str], folder: Path, folders: dict[str, Path]) -> list[str]:
    """The same command on a random tiny model, small data and two steps."""
    if "dry_run=true" in arguments:
        return arguments
    arguments = [a.replace("run=outputs/NAME", "run=DIR") for a in arguments]
    given = {a.partition("=")[0] for a in arguments if a.endswith("=DIR") or "outputs/A" in a}
    kept = [a for a in arguments if a.partition("=")[0] not in ("trainer.max_steps", "model")]
    kept = [f"{a[:-4]}={folders[a[:-4]]}" if a.endswith("=DIR") else a for a in kept]
    kept = [both(a, folders) for a in kept]
    small = ["data.train_limit=8", "trainer.max_steps=2", "trainer.batch_size=4"]
    small += ["model=tiny_gemma" if given else "model=tiny"]
    set_size = any(a.startswith("trainer.micro_batch_size=") for a in kept)
    small += [] if set_size else ["trainer.micro_batch_size=2"]
    small += [] if "evaluation.limit=100" in kept else ["evaluation.limit=2"]
    small += [] if "data=local" in kept else ["data=embedded"]
    if "experiment=smoke" in kept:
        small = []
    if "-m" in kept:  # A sweep is shown by its first two values of each parameter.
        kept = [re.sub(r"^([^=]+=[^,]+,[^,]+),.*", r"\1", a) for a in kept]
    return [*kept, *small, f"output_dir={folder}"]


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_bytes()) <= 12_000


def test_the_readme_names_the_groups_of_conf_and_commands_that_there_are() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    listed = re.findall(r"`(\w+)`", text.split("Options come in groups: ")[1].split(" (")[0])
    with open_session() as hydra:
        groups = [name for name in hydra.config_loader.list_groups("") if name != "hydra"]
    assert sorted(listed) == sorted(groups)
    assert set(re.findall(r"mixlora-exp ([a-z][\w-]*)", README)) <= set(COMMANDS)


def test_the_table_of_methods_has_all() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = text.split("## Methods")[1].split("##")[0]
    named = re.findall(r"`(\w+)`", table)
    # Who adds one need not add it there; this project's are.
    assert set(named) <= {path.stem for path in (CONF_DIR / "method").glob("*.yaml")}
    assert len(named) == len(set(named)) >= 30


def test_links_lead_to_files() -> None:
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md")):
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for link in re.findall(r"\]\(([^)#\s]+)", text):
            if not link.startswith("http"):
                assert (page.parent / link).exists(), f"{page.relative_to(ROOT)}: {link}"


def test_there_are_commands_to_test() -> None:
    assert len(commands("python train.py")) >= 8
    assert len(commands("python evaluate.py")) >= 3
    assert {"make quickstart", "make test"} <= set(commands("make"))


def by_length(command: str) -> Any:
    """Sweeps and lists of adapters of several runs take as long as all other commands."""
    runs = command.count(",") + 1 if " -m " in command or "adapters=" in command else 1
    return pytest.param(command, marks=pytest.mark.slow) if runs > 2 else command


@pytest.mark.parametrize("command", [by_length(each) for each in commands("python train.py")])
def test_command_runs_at_tiny_size(command: str, tmp_path: Path, folders: dict[str, Path]) -> None:
    if "model.quantization=nf4" in command:
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    arguments = tiny(shlex.split(command)[2:], tmp_path, folders)
    assert execute(arguments) == 0
    if "dry_run=true" not in arguments:
        records = sorted(tmp_path.glob("*/record.json"))
        assert records
        assert all(read_record(path)["status"] == "finished" for path in records)


@pytest.mark.parametrize("command", commands("python evaluate.py"))
def test_scoring_command_runs_at_tiny_size(
    command: str, tmp_path: Path, folders: dict[str, Path]
) -> None:
    if "lm_eval" in command:
        pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    command = command.replace("adapter=converted", "adapter=DIR")
    arguments = tiny(shlex.split(command)[2:], tmp_path, folders)
    assert guarded(evaluate, arguments) == 0
    records = [read_record(path) for path in tmp_path.glob("*/record.json")]
    assert len(records) == (2 if "outputs/A" in command else 1)
    assert all(record["train"] is None for record in records)
    if "run=outputs/NAME" in command:
        assert all("-mixlora-" in record["name"] for record in records), "named by its method"


@pytest.fixture
def run_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Runs a command of the README in the test's folder, with other folders and a tiny model; gives
    what it says. In this process, for another one would import for seconds."""

    def run(line: str, changes: dict[str, str]) -> str:
        words = shlex.split(line)[1:]
        words = [part for word in words for part in changes.get(word, word).split("\n")]
        if "status" not in line and ("converted" in line or "DIR" in line):
            words = [re.sub(r"^model=.*", "model=tiny_gemma", word) for word in words]
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", words)
        monkeypatch.setattr(sys, "path", [str((ROOT / words[0]).parent), *sys.path])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / words[0]), run_name="__main__")
        told = capsys.readouterr()
        assert not ended.value.code, told.err
        return told.out

    return run


def test_the_path_of_an_official_adapter(
    folders: dict[str, Path], tmp_path: Path, run_script: Callable[..., str]
) -> None:
    """Converted, scored and used: the commands of the README in their order."""
    official = as_official(folders["adapter"], tmp_path / "official")
    lines = [line for line in commands("python ") if "converted" in line]
    assert [shlex.split(line)[1] for line in lines] == [
        "scripts/convert_adapter.py", "evaluate.py", "generate.py",
    ]  # fmt: skip
    changes = {
        "OFFICIAL_DIR": str(official),
        "task=arc_e": "task=arc_e\ndata=embedded\nevaluation.limit=2",
    }
    for line in lines:
        extra = " max_new_tokens=4" if "generate" in line else ""
        assert run_script(line + extra, changes).strip()


def test_use_after_training(
    folders: dict[str, Path], tmp_path: Path, run_script: Callable[..., str]
) -> None:
    lines = [line for line in commands("python ") if "merge_adapter" in line]
    lines += [line for line in commands("python generate.py") if "DIR" in line]
    assert len(lines) == 2
    words = ["experiment=smoke", "model=tiny_gemma", "method=lora", f"output_dir={tmp_path}"]
    assert execute(words) == 0
    (adapter,) = tmp_path.glob("*/adapter")
    for line in lines:
        extra = " max_new_tokens=4" if "generate" in line else ""
        changes = {"adapter=DIR": f"adapter={adapter}", "DIR": str(adapter)}
        assert run_script(line + extra, changes).strip()
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    (line,) = [line for line in commands("python generate.py") if "outputs/A" in line]
    answers = run_script(both(line, folders) + " max_new_tokens=4", {})
    assert len(answers.splitlines()) == 2


@pytest.mark.parametrize("command", commands("make"))
def test_make_target_exists(command: str) -> None:
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    done = subprocess.run(["make", "-n", *command.split()[1:]], cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


def transcripts() -> list[tuple[str, str]]:
    shown = [block for block in blocks("text") if block.startswith("$ ")]
    pairs = []
    for block in shown:
        for part in block.split("$ ")[1:]:
            command, _, output = part.partition("\n")
            pairs.append((command, output.strip()))
    return list(dict.fromkeys(pairs))


def shown_by(kind: str) -> list[tuple[str, str]]:
    return [(c, o) for c, o in transcripts() if shlex.split(c)[1] == kind]


def test_every_transcript_is_tested() -> None:
    kinds = ("train.py", "scripts/status.py", "compare")
    assert all(shown_by(kind) for kind in kinds)
    assert sum(len(shown_by(kind)) for kind in kinds) == len(transcripts())


@pytest.mark.parametrize(("command", "output"), shown_by("train.py"))
def test_shown_output_is_the_real_output(
    command: str, output: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code = execute(shlex.split(command)[2:])
    captured = capsys.readouterr()
    assert code == (2 if output.startswith("error: ") else 0)
    # What a plan says of this checkout, while one works on it.
    told = re.sub(r"(?m)^record +make collect will not take it:.*$", "", captured.out)
    assert " ".join((told + captured.err).split()) == " ".join(output.split())


@pytest.mark.parametrize(("command", "output"), shown_by("scripts/status.py"))
def test_shown_status_is_the_real_one(
    command: str, output: str, run_script: Callable[..., str]
) -> None:
    """Run where there are no outputs, and seen from the root of the repository."""
    command = command.replace("results=results", f"results={ROOT / 'results'}")
    shown = run_script(command, {}).replace(f"{ROOT}/", "")
    assert " ".join(shown.split()) == " ".join(output.split())


@pytest.mark.parametrize(("command", "output"), shown_by("compare"))
def test_shown_comparison_is_the_real_one(
    command: str, output: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    # The console may have been made under another environment.
    monkeypatch.setattr(console, "_width", 100)
    monkeypatch.setattr(console, "_height", 25)
    assert main(shlex.split(command)[1:]) == 0
    assert " ".join(capsys.readouterr().out.split()) == " ".join(output.split())


def ran(code: str, model: str, folder: Path) -> dict[str, Any]:
    """What a block of Python leaves, run with the model and the adapter that lie in folders."""
    for name in ("HuggingFaceTB/SmolLM2-135M-Instruct", "meta-llama/Llama-2-7b-hf"):
        code = code.replace(name, model)
    space: dict[str, Any] = {}
    exec(compile(code.replace("outputs/.../adapter", str(folder)), "README.md", "exec"), space)
    return space


def test_the_readme_trains_with_the_trainer_and_with_trl_and_loads_what_they_saved(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The numbers are those of the method as the paper has it."""
    pytest.importorskip("trl", reason="trl is not installed")
    monkeypatch.chdir(tmp_path)
    trainer, trl, loading = blocks("python", PAGES[0].read_text(encoding="utf-8"))
    assert max(len(block.strip().splitlines()) for block in (trainer, trl, loading)) <= 13
    trl = trl.replace("max_steps=2", "max_steps=2, use_cpu=True, bf16=False")
    paper = compose(["method=mixlora"]).method
    for code in (trainer, trl):
        space = ran(code, str(folders["model.path"]), tmp_path)
        config = space["config"]
        assert (config.r, config.lora_alpha, config.lora_dropout) == (
            paper.rank, paper.alpha, paper.dropout,
        )  # fmt: skip
        for name in ("num_experts", "top_k", "router_loss_coef", "router_init_std"):
            assert getattr(config, name) == getattr(paper, name), name
        loaded = ran(loading, str(folders["model.path"]), tmp_path)["model"]
        weights = {n: p for n, p in loaded.named_parameters() if "lora_B" in n}
        assert weights
        assert all(weight.any() for weight in weights.values()), "B is 0 before training"
        shutil.rmtree("adapter")


def test_the_way_without_make_installs_what_make_installs() -> None:
    (lines,) = (block for block in blocks("bash", PAGES[0].read_text()) if "pip install" in block)
    made = (ROOT / "Makefile").read_text(encoding="utf-8")
    for pinned in re.findall(r"[\w-]+==[\d.]+", lines):
        assert f" {pinned}\n" in made
    assert (ROOT / "requirements" / "constraints.txt").is_file()


def test_python_block_loads_an_adapter(folders: dict[str, Path]) -> None:
    """The first of the page on adapters; that on several is tested in tests/adapters/."""
    block, *_ = blocks("python", PAGES[2].read_text(encoding="utf-8"))
    space = ran(block, str(folders["model.path"]), folders["adapter"])
    assert space["model"].active_peft_config.peft_type == "MIXLORA"
