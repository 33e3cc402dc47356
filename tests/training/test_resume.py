"""Interrupted and started again, training ends as if it had never stopped, to the bit."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from composed import compose
from encoded import examples_of
from safetensors.torch import save_file as write_file
from stand_in_recorder import StandIn

from mixlora_exp.adapters import attach_adapter, attach_together
from mixlora_exp.adapters.mixed_adapters import plain_parameters_of
from mixlora_exp.adapters.router_report import RouterReport
from mixlora_exp.config.schema import Config
from mixlora_exp.data.collator import Collator
from mixlora_exp.errors import UserError
from mixlora_exp.models import load_model, load_tokenizer
from mixlora_exp.training import fit, fit_jointly, graph_step, make_job
from mixlora_exp.training.checkpoints import Checkpoints
from mixlora_exp.training.run_statistics import Track

SMALL = [
    "experiment=smoke",
    "trainer.precision=float32",
    "data.train_limit=20",
    "trainer.batch_size=8",
    "trainer.micro_batch_size=4",
    "trainer.max_steps=8",
    "trainer.logging_steps=3",
    "trainer.save_steps=2",
    "trainer.schedule=linear",
    "trainer.warmup_steps=2",
    "method.dropout=0.2",
]
OTHERS = ("lora", "dora", "mixlora", "mixlora method.router=random_frozen")
NOISY = "mixlora_switch +method.router_options.jitter=0.1"
PADDED = [f"mixlora method.router={name}" for name in ("threshold", "top_p", "dense", "uniform")]
BY_LAYER = "mixdora method.num_experts=[2,4] method.top_k=[1,2]"
KILLS = [[5], [20], [33, 14], [53]]
"""In the first step, in the second epoch, twice, and in the last step."""


class Killed(BaseException):
    """Stands in for a kill: nothing after it is carried out."""


def train(
    config: Config, folder: Path, identity: dict[str, Any] | None = None
) -> tuple[dict[str, torch.Tensor], Any]:
    """A start of the run in `folder`."""
    folder.mkdir(exist_ok=True)
    base = load_model(config.model, torch.float32, config.seed)
    base.set_attn_implementation("eager")
    model = attach_adapter(base, config.method, config.kernel, config.seed)
    keep = config.trainer.keep_checkpoints
    checkpoints = Checkpoints(folder / "checkpoints", identity or {"data": "a"}, keep)
    tokenizer = load_tokenizer(config.model)
    summary = fit(
        config=config, model=model, tokenizer=tokenizer, examples=examples_of(config),
        folder=folder, dtype=torch.float32, checkpoints=checkpoints,
    )  # fmt: skip
    return {n: p.detach() for n, p in plain_parameters_of(model, "default").items()}, summary


def comparable(summary: Any) -> dict[str, Any]:
    found = asdict(summary)
    for name in ("seconds", "first_step_seconds", "tokens_per_second", "peak_memory_bytes"):
        del found[name]
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple]:
    """Weights, summary and folder, which is only read, of a method's run without interruption."""

    @functools.cache
    def run(method: str) -> tuple:
        folder = tmp_path_factory.mktemp("whole")
        weights, summary = train(compose([*SMALL, *f"method={method}".split()]), folder)
        return weights, summary, folder

    return run


@pytest.fixture(scope="module")
def killed_late(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of MixLoRA that was killed in its last steps: to be copied."""
    folder = tmp_path_factory.mktemp("killed") / "run"
    with pytest.raises(Killed):
        interrupted(compose([*SMALL, "method=mixlora"]), folder, 52)
    return folder


@pytest.mark.parametrize(
    ("method", "killed"),
    [
        # One method has every part, one has noise beside dropout, one rows of varying numbers of
        # experts, one layers.
        *(("mixdora", killed) for killed in KILLS),
        (NOISY, [33, 14]),
        (PADDED[0], [33, 14]),
        (BY_LAYER, [33, 14]),
        *(pytest.param(m, [33, 14], marks=pytest.mark.slow) for m in PADDED[1:]),
        *(pytest.param(m, k, marks=pytest.mark.slow) for m in OTHERS for k in KILLS),
        *(pytest.param(NOISY, k, marks=pytest.mark.slow) for k in KILLS if k != [33, 14]),
    ],
    ids=str,
)
def test_killed_and_started_again(whole, tmp_path, method, killed) -> None:
    config = compose([*SMALL, *f"method={method}".split()])
    expected, truth, folder = whole(method)
    for after in killed:
        with pytest.raises(Killed):
            interrupted(config, tmp_path / "run", after)
    found, summary = train(config, tmp_path / "run")
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name
    assert comparable(summary) == comparable(truth)
    log = (folder / "train_log.jsonl").read_text()
    assert (tmp_path / "run" / "train_log.jsonl").read_text() == log


# Each projection takes long to trace: two have both masks of dropout.
@pytest.mark.parametrize(
    ("how", "words"),
    [
        pytest.param("layer", [], id="layer", marks=pytest.mark.slow),
        pytest.param("graph", [], id="graph, all projections", marks=pytest.mark.slow),
        pytest.param(
            "graph",
            ["method.targets=[q_proj,down_proj]"],
            id="graph",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_compiled_run_is_resumed(tmp_path, monkeypatch, how, words) -> None:
    """As one that was not interrupted, to the bit."""
    own = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda layer, **options: own(layer, **{**options, "backend": "aot_eager"})
    )
    # Where there is no GPU, a graph's passes are computed anew by what stands in for it.
    stand_in = StandIn() if how == "graph" else None
    monkeypatch.setattr(graph_step, "recorder", lambda config, device: stand_in)
    config = compose([*SMALL, "method=mixlora", f"trainer.compile={how}", *words])
    expected, truth = train(config, tmp_path / "whole")
    assert stand_in is None or stand_in.replayed
    with pytest.raises(Killed):
        interrupted(config, tmp_path / "run", 33)
    found, summary = train(config, tmp_path / "run")
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    assert summary.stability.step_losses == truth.stability.step_losses
    torch.compiler.reset()


def interrupted(config: Config, folder: Path, after: int) -> None:
    """A start that is killed by the n-th batch row that is collated."""
    real, left = Collator.__call__, [after]

    def collate(self, examples, first=0):
        left[0] -= len(examples)
        if left[0] < 0:
            raise Killed
        return real(self, examples, first)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Collator, "__call__", collate)
        train(config, folder)


def test_a_finished_training_is_not_repeated(whole, tmp_path, monkeypatch) -> None:
    """Killed while it was scored, a run goes on with the adapter that it had."""
    config = compose([*SMALL, "method=mixlora"])
    expected, truth, folder = whole("mixlora")
    shutil.copytree(folder, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(
            "mixlora_exp.training.trainer.MixLoraTrainer.training_step",
            lambda *args, **kwargs: pytest.fail("trained again"),
        )
        found, summary = train(config, tmp_path / "run")
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    assert comparable(summary) == comparable(truth)


FILES = ("adapter.safetensors", "optimizer.safetensors", "state.json")


@pytest.mark.parametrize(
    ("damage", "file"),
    [
        *((damage, file) for damage in ("cut off", "a bit flipped") for file in FILES),
        ("no manifest", "manifest.json"),
        ("partial", "manifest.json"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(
    whole, killed_late, tmp_path, capsys, damage, file
) -> None:
    config = compose([*SMALL, "method=mixlora"])
    expected, *_ = whole("mixlora")
    shutil.copytree(killed_late, tmp_path / "run")
    newest = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))[-1]
    path = newest / file
    data = bytearray(path.read_bytes())
    if damage == "cut off":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "a bit flipped":
        data[len(data) // 2] ^= 4
        path.write_bytes(data)
    elif damage == "no manifest":
        path.unlink()
    else:
        newest.rename(newest.with_name(".partial-77"))
    found, _ = train(config, tmp_path / "run")
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    told = capsys.readouterr().err
    assert (f"{newest} is damaged" in told) == (damage != "partial")


def test_other_data_is_refused(whole, tmp_path) -> None:
    config = compose([*SMALL, "method=lora"])
    shutil.copytree(whole("lora")[-1], tmp_path / "run")
    with pytest.raises(UserError, match=r"other data.*another output_dir, or force=true"):
        train(config, tmp_path / "run", identity={"data": "b"})


def test_the_newest_are_kept(tmp_path) -> None:
    config = compose([*SMALL, "method=lora", "trainer.keep_checkpoints=3"])
    train(config, tmp_path / "run")
    names = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["step-00000004", "step-00000006", "step-00000008"]


@pytest.mark.parametrize("keep", [1, 2])
def test_damaged_ones_do_not_push_good_ones_out(tmp_path, capsys, keep) -> None:
    config = compose([*SMALL, "method=lora", f"trainer.keep_checkpoints={keep}"])
    folder = tmp_path / "run" / "checkpoints"
    with pytest.raises(Killed):
        interrupted(config, tmp_path / "run", 20)
    good = Checkpoints(folder, {"data": "a"}).newest()
    assert good is not None
    for step in (97, 98, 99):
        copied = shutil.copytree(good.path, folder / f"step-{step:08d}")
        (copied / "state.json").write_text("{}")
    (folder / ".partial-77").mkdir()
    with pytest.raises(Killed):
        interrupted(config, tmp_path / "run", 24)
    assert "step-00000099 is damaged" in capsys.readouterr().err
    newest = Checkpoints(folder, {"data": "a"}).newest()
    assert newest is not None
    assert newest.step > good.step
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["damaged-step-00000097", *(n for n in names if n.startswith("step-"))]
    assert len(names) == 1 + keep


def test_one_that_may_not_be_read_is_not_taken_for_damaged(whole, tmp_path, monkeypatch) -> None:
    config = compose([*SMALL, "method=lora"])
    shutil.copytree(whole("lora")[-1], tmp_path / "run")

    def refuse(path: Path) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("mixlora_exp.training.checkpoints.file_sha256", refuse)
    with pytest.raises(UserError, match="cannot be read.*permissions"):
        train(config, tmp_path / "run")


def test_a_continued_track_follows_the_device() -> None:
    """What was stored lies on the CPU, what comes next on the device of the pass."""
    track = Track(2)
    track.note_pass(RouterReport(torch.tensor(1.0), torch.ones(2, 4)), 5, 1.0)
    track.fold()
    track.note_pass(RouterReport(torch.tensor(1.0), torch.ones(2, 4)), 5, 1.0)
    again = Track(2)
    again.load(track.state(), 0.0)
    report = RouterReport(torch.tensor(1.0), torch.ones(2, 4, device="meta"))
    again.note_pass(report, 5, 1.0)
    again.fold()
    assert again.counts is not None
    assert again.counts.device.type == "meta"


def test_a_full_disk_keeps_the_older_ones(whole, tmp_path, monkeypatch) -> None:
    config = compose([*SMALL, "method=lora"])

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        saved = []

        def save_file(tensors, path) -> None:
            if len(saved) >= 4:
                full()
            saved.append(path)
            write_file(tensors, path)

        patch.setattr("mixlora_exp.training.checkpoints.save_file", save_file)
        with pytest.raises(UserError, match="No space left on device.*start the same command"):
            train(config, tmp_path / "run")
    left = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert left == ["step-00000002", "step-00000004"]
    expected, *_ = whole("lora")
    found, _ = train(config, tmp_path / "run")
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def start_together(configs: list[Config], folder: Path) -> dict[str, tuple]:
    jobs = []
    for number, config in enumerate(configs):
        place = folder / config.method.name
        place.mkdir(parents=True, exist_ok=True)
        jobs.append(
            make_job(
                name=f"adapter{number}",
                config=config,
                examples=examples_of(config),
                folder=place,
                tokenizer=load_tokenizer(config.model),
                checkpoints=Checkpoints(place / "checkpoints", {"data": "a"}),
            )
        )
    base = load_model(configs[0].model, torch.float32, configs[0].seed)
    base.set_attn_implementation("eager")
    methods = {j.name: (c.method, c.seed) for j, c in zip(jobs, configs, strict=True)}
    model = attach_together(base, methods, configs[0].kernel)
    found = fit_jointly(model=model, jobs=jobs, dtype=torch.float32)
    return {
        config.method.name: (
            {n: p.detach() for n, p in plain_parameters_of(model, job.name).items()},
            found[job.name],
        )
        for job, config in zip(jobs, configs, strict=True)
    }


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Config], dict[str, tuple]]:
    """Four adapters, and what they come to when nothing interrupts them."""
    steps = {"lora": 8, "dora": 3, "mixlora": 6, "mixdora": 8}
    configs = [
        compose([*SMALL, f"method={method}", f"trainer.max_steps={n}"])
        for method, n in steps.items()
    ]
    return configs, start_together(configs, tmp_path_factory.mktemp("several"))


@pytest.mark.parametrize("killed", [[70], pytest.param([130, 30], marks=pytest.mark.slow)], ids=str)
def test_several_resume_together(several, tmp_path, monkeypatch, killed) -> None:
    """Each from its own newest checkpoint, whatever step the others have reached."""
    configs, expected = several
    real = Collator.__call__
    for after in killed:
        left = [after]

        def collate(self, examples, first=0, left=left):
            left[0] -= len(examples)
            if left[0] < 0:
                raise Killed
            return real(self, examples, first)

        with monkeypatch.context() as patch:
            patch.setattr(Collator, "__call__", collate)
            with pytest.raises(Killed):
                start_together(configs, tmp_path / "run")
    found = start_together(configs, tmp_path / "run")
    for method, (weights, truth) in expected.items():
        for name, weight in weights.items():
            assert torch.equal(found[method][0][name], weight), (method, name)
        assert comparable(found[method][1]) == comparable(truth)


def test_a_checkpoint_of_one_alone_is_continued_among_several(whole, tmp_path) -> None:
    """And the other way round: what a checkpoint holds is the adapter's own."""
    config = compose([*SMALL, "method=mixdora"])
    expected, *_ = whole("mixdora")
    with pytest.raises(Killed):
        interrupted(config, tmp_path / "mixdora", 40)
    other = compose([*SMALL, "method=lora"])
    found = start_together([other, config], tmp_path)
    for name, weight in expected.items():
        torch.testing.assert_close(found["mixdora"][0][name], weight, rtol=0, atol=1e-5)


def test_state_is_plain_json(whole) -> None:
    newest = sorted((whole("mixlora")[-1] / "checkpoints").iterdir())[-1]
    state = json.loads((newest / "state.json").read_text())
    assert state["step"] == 8
    assert len(state["track"]["losses"]) == 8
