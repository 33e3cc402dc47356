"""The suite for a GPU, as far as a CPU can tell: its checks, its order, and what it leaves out."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from mixlora_exp.bench.check_pool import CheckTask, all_checks, carry_out, failure, results
from mixlora_exp.bench.checks import CASES, kernel_errors, router_errors
from mixlora_exp.bench.kinds import gpu
from mixlora_exp.bench.linear_checks import CASES as LINEAR_CASES
from mixlora_exp.bench.options import StepOptions, as_json
from mixlora_exp.bench.report import kernel_table, markdown
from mixlora_exp.bench.row_registry import ROWS
from mixlora_exp.bench.runner import run_benchmark
from mixlora_exp.errors import UserError
from mixlora_exp.kernels import lora

ROOT = Path(__file__).parents[2]


def test_each_kernel_is_checked_in_each_precision_bf16_first() -> None:
    tasks = all_checks()
    each = 3 * len(CASES) + len(LINEAR_CASES)
    assert len(set(tasks)) == len(tasks) == 3 * each + 4
    assert {t.dtype for t in tasks[: each + 4]} == {"bfloat16"}
    assert {(t.what, t.kernel) for t in tasks} == {
        ("block", "triton"), ("block", "exact"), ("router", "triton"),
        ("graph", "triton"), ("graph", "exact"), ("linear", "fused"),
    }  # fmt: skip


@pytest.mark.parametrize("name", LINEAR_CASES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_layers_steps_of_a_cpu_pass_their_check(name: str, dtype: str) -> None:
    found = carry_out(CheckTask("linear", "fused", name, dtype, "cpu"))
    assert found["passed"], found
    assert found["kernel"] == "fused linear"


@pytest.mark.parametrize("step", ["low", "gradients_of_a", "input_gradient", "unscaled"])
def test_a_wrong_step_of_a_layer_fails_its_check(step: str, monkeypatch) -> None:
    right = getattr(lora.eager_linear, step)

    def wrong(*inputs):
        made = right(*inputs)
        first = made if isinstance(made, torch.Tensor) else made[0]
        first.mul_(1.1)
        return made

    monkeypatch.setattr(lora.eager_linear, step, wrong)
    found = carry_out(CheckTask("linear", "fused", "MixDoRA", "bfloat16", "cpu"))
    assert not found["passed"]
    assert failure(found).startswith("MixDoRA, fused linear, bfloat16: ")


def test_checks_run_in_processes_and_end_in_time() -> None:
    tasks = [CheckTask("block", "exact", name, "float32", "cpu") for name in ("K=1", "one token")]
    tasks.append(CheckTask("block", "no such kernel", "K=1", "float32", "cpu"))
    found = {(r["case"], r["kernel"]): r for r in results(tasks, 2, time.monotonic() + 300)}
    assert found["K=1", "exact"]["passed"]
    assert found["one token", "exact"]["passed"]
    wrong = found["K=1", "no such kernel"]
    assert not wrong["passed"]
    assert failure(wrong) == "K=1, no such kernel, float32: KeyError: 'no such kernel'"
    assert list(results(tasks, 2, time.monotonic())) == []


def test_a_failure_names_the_tensor_and_how_far_it_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    from mixlora_exp.bench import checks

    right = checks.KERNELS["exact"]
    monkeypatch.setitem(checks.KERNELS, "exact", lambda *inputs: right(*inputs) * 1.25)
    found = carry_out(CheckTask("block", "exact", "K=1", "float32", "cpu"))
    assert not found["passed"]
    start = f"K=1, exact, float32: {found['worst']} at {found['worst_ratio']} of"
    assert failure(found).startswith(start)


# Many draws of float64 oracles; the quick tests judge one case of each kind.
@pytest.mark.slow
def test_one_token_is_judged_by_many_draws() -> None:
    """By a single one a right kernel fails now and then: the router's gradient is one number."""
    seeds = {
        name: carry_out(CheckTask("block", "exact", name, "bfloat16", "cpu"))
        for name in ("one token", "odd sizes")
    }
    assert [(one["seeds"], one["passed"]) for one in seeds.values()] == [(16, True), (1, True)]


class Cut:
    """The suite on a CPU: two checks and a tiny model in place of four."""

    def __init__(self, patch: pytest.MonkeyPatch, *checks: CheckTask) -> None:
        models = {"tiny": (2, 8, 0.8, 1.0), "other": (2, 8, 0.9, 1.0)}
        patch.setattr(gpu, "MODELS", models)
        patch.setattr(gpu, "all_checks", lambda: list(checks))
        patch.setattr(
            gpu, "results", lambda tasks, processes, until: (carry_out(t) for t in checks[:1])
        )
        patch.setattr(gpu, "steps_of", self.steps)
        patch.setattr(torch.cuda, "is_available", lambda: False)

    def steps(self, options: gpu.GpuOptions, model: str) -> StepOptions:
        return StepOptions(
            model=model, batch=2, length=8, dtype="float32", memory=False, rounds=2,
            rows=["lora_peft", "mixlora"],
        )  # fmt: skip


def test_the_suite_reports_what_failed_and_what_it_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checks = [CheckTask("block", k, "K=1", "float32", "cpu") for k in ("no such", "exact")]
    Cut(monkeypatch, *checks)
    parts = list(gpu.suite(gpu.GpuOptions(models=["tiny", "other"])))
    assert [len(part["benchmarks"]) for part in parts] == [0, 1, 1, 1]
    assert "launches_per_layer" not in parts[1]["benchmarks"][0]["rows"]["mixlora"]
    last = parts[-1]
    assert last["failed"] == ["K=1, no such, float32: KeyError: 'no such'"]
    assert last["skipped"]["checks"] == "1 of 2, no time left: K=1, exact, float32"
    assert last["skipped"]["other"].startswith("UserError: model=other is unknown")
    assert last["benchmarks"][0]["rows"]["mixlora"]["launches_per_layer"] > 0
    origin = {"hardware": {"cpu": "c", "gpus": ["G"]}, "packages": {"torch": "t"}}
    text = gpu._markdown({**last, "provenance": origin})
    assert "0 of 1 checks passed" in text
    assert "- failed: K=1, no such" in text
    assert "- not measured: other: UserError" in text
    assert "| mixlora |" in text


def test_the_longest_kernels_of_a_step_are_shown() -> None:
    kernels = [{"name": "gemm<a|b>", "count": 3, "us": 75.0}, {"name": "add", "count": 9, "us": 5}]
    row = {**asdict(ROWS["mixlora_triton"]), "rounds": 1, "by_kernel": kernels}
    row |= {"busy_us": 100.0, "kernels": 1200, "launches_per_layer": 45}
    options = StepOptions(model="tiny", batch=1, length=10, rounds=1)
    record = {"config": as_json(options), "layers": 2, "threads": 1, "tokens": 10}
    record["rows"] = {"lora_peft": {"error": "out of memory"}, "mixlora_triton": row}
    text = kernel_table(record, "mixlora_triton")
    assert "1,200 kernels, 100 us of the GPU; the 2 longest" in text
    assert "| gemm<a/b> | 3 | 75 | 75.0 |" in text
    assert kernel_table(record, "lora_peft") == kernel_table(record, "dora") == ""
    origin = {"hardware": {"cpu": "c", "gpus": ["G"]}, "packages": {"torch": "t"}}
    table = markdown({**record, "provenance": origin})
    assert "| GPU busy us/token | kernels a step | launches a layer |" in table
    assert "| 10.0 | 1,200 | 45 |" in table
    assert "loss on the last 8 tokens of each sequence" in table


def test_no_model_is_begun_without_time(monkeypatch: pytest.MonkeyPatch) -> None:
    Cut(monkeypatch)
    options = gpu.GpuOptions(models=["tiny", "other"], checks=False, minutes=1e-9)
    *_, last = gpu.suite(options)
    assert last["skipped"] == dict.fromkeys(("tiny", "other"), "no time left")
    assert last["benchmarks"] == []


def test_the_goals_rows_are_registered() -> None:
    assert set(gpu.GOAL_ROWS) <= set(ROWS)
    options = gpu.GpuOptions()
    assert gpu.steps_of(options, "llama2_7b").rows[0] == "lora_peft"
    assert any(ROWS[name].compiled for name in gpu.steps_of(options, "llama2_7b").rows)
    assert set(gpu.steps_of(options, "gemma_2b").rows) == set(gpu.EVERYWHERE)
    assert not any(ROWS[name].compiled for name in gpu.EVERYWHERE)


def test_failing_tests_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = tmp_path / "tests" / "kernels"
    kernels.mkdir(parents=True)
    lines = "def test_good(): pass\ndef test_bad(): assert 1 == 2, 'why - so'\n"
    (kernels / "test_triton_case.py").write_text(lines)
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    record = {"failed": [], "skipped": {}}
    gpu.run_tests(record, gpu.GpuOptions(output="here", name="card"), 120)
    expected = ["tests/kernels/test_triton_case.py::test_bad"]
    assert record["failed"] == record["tests"]["failed"] == expected
    assert record["tests"]["exit_code"] == 1
    assert "1 failed, 1 passed" in (tmp_path / "here" / record["tests"]["log"]).read_text()
    gpu.run_tests(record, gpu.GpuOptions(output="here", name="card"), 0.01)
    assert record["skipped"] == {"tests": "not finished: no time left"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["models=[llama9]"], "models=llama9 is not in this suite: choose from llama2_7b"),
        (["minutes=0"], "minutes=0.0 must be above 0"),
    ],
)
def test_mistakes_are_reported(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run_benchmark(["kind=gpu", *words])


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, and the suite takes minutes")
def test_the_gpu_suite_says_that_it_needs_a_gpu_and_needs_no_hydra() -> None:
    """It runs on machines that have PyTorch, transformers and PEFT alone."""
    block = (
        "import sys, runpy\n"
        "class Without:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('hydra', 'omegaconf', 'lm_eval'):\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Without())\n"
        "sys.path.insert(0, 'scripts')\n"
        "sys.argv[1:] = ['kind=gpu']\n"
        "runpy.run_path('scripts/bench.py', run_name='__main__')\n"
    )
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", block], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 2, result.stderr
    assert "needs a CUDA GPU" in result.stderr


@pytest.mark.parametrize("name", ["paper's setting", "MixDoRA, biases", "K=1"])
def test_the_gpu_suites_check_accepts_a_right_kernel_and_no_wrong_one(name, monkeypatch) -> None:
    case = CASES[name]
    assert kernel_errors("exact", case, torch.float32, "cpu", seeds=1)["passed"]
    from mixlora_exp.bench import checks

    right = checks.KERNELS["exact"]
    monkeypatch.setitem(checks.KERNELS, "exact", lambda *inputs: right(*inputs) * (1 + 1e-4))
    assert not kernel_errors("exact", case, torch.float32, "cpu", seeds=1)["passed"]


@pytest.mark.parametrize("name", CASES)
def test_the_gpu_suites_check_of_routers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    assert router_errors("exact", case, torch.float32, "cpu")["passed"]
    from mixlora_exp.bench import checks

    def other_expert(x: torch.Tensor, router: torch.Tensor, top_k: int):
        found = checks.route(x, router, top_k)
        return dataclasses.replace(found, experts=(found.experts + 1) % case.experts)

    right = checks.router_of
    chosen = {"exact": other_expert}
    monkeypatch.setattr(checks, "router_of", lambda kernel: chosen.get(kernel, right(kernel)))
    # The one token lies near a tie, and nothing is asked of it.
    if case.top_k < case.experts and case.tokens > 1:
        assert not router_errors("exact", case, torch.float32, "cpu")["passed"]
