"""Training with compiled decoder layers: the numbers of eager training, and nothing read back."""

from __future__ import annotations

import os

import pytest
import torch
from host_reads import host_reads
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.masking_utils import sdpa_mask

from mixlora_exp.adapters.routed_layer import RoutedLayer
from mixlora_exp.config.choices import PAPER_METHODS, Compile
from mixlora_exp.kernels import RowIds, dropout
from mixlora_exp.system.caches import keep_compiled_code
from mixlora_exp.training import compiled
from mixlora_exp.training.compiled import compiled_layers
from mixlora_exp.training.trainer import MixLoraTrainer

FEW = ["trainer.max_steps=3", "trainer.logging_steps=1", "method.dropout=0.1"]
# What is compiled is traced, which takes a second for each projection: what is no matter of the
# projections is shown with few of them.
ONE = ["method.targets=[q_proj]"]
BLOCK = ["method.targets=[q_proj,gate_proj,up_proj,down_proj]"]


@pytest.fixture(autouse=True)
def fresh_compiler(monkeypatch: pytest.MonkeyPatch):
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Layers are traced with their backward pass and not compiled further, which takes long; a
    number for each graph."""
    graphs: list[int] = []
    own = torch.compile

    def backend(module, inputs):
        graphs.append(len(graphs))
        return torch._dynamo.lookup_backend("aot_eager")(module, inputs)

    monkeypatch.setattr(
        torch, "compile", lambda model, **options: own(model, **{**options, "backend": backend})
    )
    return graphs


# Tracing takes seconds: MixDoRA has the parts of all four.
@pytest.mark.parametrize(
    "method",
    ["mixdora", *(pytest.param(m, marks=pytest.mark.slow) for m in ("lora", "dora", "mixlora"))],
)
def test_losses_are_those_of_eager_training(train, traced, capsys, method) -> None:
    words = [f"method={method}", *FEW, "+model.config.num_hidden_layers=3"]
    eager = train(*words)
    found = train(*words, "trainer.compile=layer")
    assert "trainer.compile" not in capsys.readouterr().err
    assert found.losses == pytest.approx(eager.losses, rel=1e-5)
    # Shared by the layers but for the first, whose input needs no gradient; the last step is looked
    # at without gradients. All batches have one length.
    assert len(traced) == 3
    for name, weight in eager.after.items():
        torch.testing.assert_close(found.after[name], weight, rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("method", [pytest.param("lora", marks=pytest.mark.slow), "mixlora"])
def test_checkpointing_and_accumulation_too(train, traced, method) -> None:
    words = [f"method={method}", *BLOCK, *FEW, "trainer.gradient_checkpointing=true",
             "trainer.batch_size=4", "trainer.micro_batch_size=2"]  # fmt: skip
    eager = train(*words)
    assert train(*words, "trainer.compile=layer").losses == pytest.approx(eager.losses, rel=1e-5)
    assert traced


@pytest.mark.slow
def test_recomputed_parts_keep_no_graph(train, traced, monkeypatch: pytest.MonkeyPatch) -> None:
    """By their routers' decisions, until the next pass."""
    followed, step = [], MixLoraTrainer.training_step

    def noted(self: MixLoraTrainer, model, *args, **kwargs):
        found = step(self, model, *args, **kwargs)
        layers = [part for part in model.modules() if isinstance(part, RoutedLayer)]
        decisions = [routing for layer in layers for routing in layer.routings.values()]
        followed.append([routing.weights.requires_grad for routing in decisions])
        return found

    monkeypatch.setattr(MixLoraTrainer, "training_step", noted)
    words = ["method=mola", *ONE, *FEW, "trainer.gradient_checkpointing=true"]
    train(*words, "trainer.compile=layer")
    assert traced
    assert followed == 6 * [[False, False]], "two micro-batches a step, two layers"


VARIED = ["trainer.batch_size=1", "trainer.micro_batch_size=1", "trainer.max_steps=8",
          "trainer.logging_steps=1"]  # fmt: skip


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.slow
def test_batches_of_many_lengths(train, traced, monkeypatch, capsys, checkpointing) -> None:
    """More graphs than the eight after which torch refuses."""
    monkeypatch.setattr(compiled, "BUCKET", 1)
    words = ["method=mixlora", *VARIED, f"trainer.gradient_checkpointing={checkpointing}"]
    eager = train(*words)
    assert train(*words, "trainer.compile=layer").losses == pytest.approx(eager.losses, rel=1e-5)
    assert len(traced) > 8
    assert "the compiler refuses" not in capsys.readouterr().err


@pytest.mark.slow
def test_more_graphs_than_allowed_run_eagerly(train, traced, monkeypatch, capsys) -> None:
    monkeypatch.setattr(compiled, "BUCKET", 1)
    monkeypatch.setattr(compiled, "GRAPHS", 2)
    words = ["method=lora", *ONE, *VARIED, "trainer.max_steps=4"]
    eager = train(*words)
    assert train(*words, "trainer.compile=layer").losses == pytest.approx(eager.losses, rel=1e-5)
    assert capsys.readouterr().err.count("the compiler refuses them") == 1


@pytest.mark.slow
@pytest.mark.parametrize("method", PAPER_METHODS)
def test_fifty_steps_compiled_to_the_end(train, method) -> None:
    words = [f"method={method}", "trainer.max_steps=50", "trainer.logging_steps=1"]
    eager = train(*words)
    found = train(*words, "trainer.compile=layer")
    assert found.losses == pytest.approx(eager.losses, rel=1e-5)


def test_a_cpu_runs_graph_as_layer(train, traced, capsys) -> None:
    """It says so. Batches are padded to multiples, and the layers are as before afterwards."""
    words = ["method=lora", *ONE, "trainer.max_steps=1", "trainer.compile=graph"]
    found = train(*words, attention="sdpa")
    assert "trainer.compile=graph: a CPU has no graphs to record: it runs as layer" in (
        capsys.readouterr().err
    )
    assert traced
    base = found.trainer.model.base_model.model
    assert all(layer._compiled_call_impl is None for layer in base.model.layers)
    assert base.config._attn_implementation == "sdpa"
    (job,) = found.trainer.jobs.values()
    assert 0 < found.summary.first_step_seconds <= found.summary.seconds
    batch = job.collate(found.examples)
    assert batch["input_ids"].shape[1] % compiled.BUCKET == 0
    assert batch["attention_mask"].sum() == sum(len(e.input_ids) for e in found.examples)


def test_compiled_code_is_kept_in_the_user_s_cache(train, traced, monkeypatch, tmp_path) -> None:
    """Unless the user has chosen a folder."""
    chosen = "TORCHINDUCTOR_CACHE_DIR"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(chosen, "mine")
    keep_compiled_code()
    assert os.environ[chosen] == "mine"
    monkeypatch.delenv(chosen)
    train("method=lora", *ONE, "trainer.max_steps=1", "trainer.compile=layer")
    assert os.environ[chosen] == str(tmp_path / "mixlora_exp" / "inductor")


def test_several_adapters_train_without_it(capsys) -> None:
    """One line says why."""
    base = torch.nn.Module()
    with compiled_layers(base, Compile.graph, adapters=3) as refusal:
        assert refusal.reason is None
    told = capsys.readouterr().err
    assert told.startswith("trainer.compile=graph: 3 adapters train together without it, since")
    assert told.count("\n") == 1


def test_what_cannot_be_compiled_runs_as_it_is(train, monkeypatch, capsys) -> None:
    """One line says why, and the numbers are those of eager training."""
    eager = train("method=lora", *ONE, *FEW)

    def refuse(module, inputs):
        raise torch._dynamo.exc.Unsupported("no such thing")

    own = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda model, **options: own(model, **{**options, "backend": refuse})
    )
    found = train("method=lora", *ONE, *FEW, "trainer.compile=layer")
    lines = [line for line in capsys.readouterr().err.splitlines() if "trainer.compile" in line]
    assert len(lines) == 1
    assert "run eagerly, because the compiler refuses them" in lines[0]
    assert found.losses == pytest.approx(eager.losses, rel=1e-5)


@pytest.fixture
def reads_of_passes(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, int]]:
    """What the host reads in each micro-batch, from the batch to its gradients."""
    seen: list[dict[str, int]] = []
    own = MixLoraTrainer.training_step

    def watched(self, *args, **kwargs):
        with host_reads() as reads:
            loss = own(self, *args, **kwargs)
        seen.append(dict(reads))
        return loss

    monkeypatch.setattr(MixLoraTrainer, "training_step", watched)
    # As on a GPU, where masks are not drawn but made by a hash, of the same rows.
    monkeypatch.setattr(dropout, "_runs", lambda *rows: None)
    return seen


@pytest.mark.parametrize(
    ("method", "targets"),
    [("lora", ONE), *(pytest.param(m, BLOCK, marks=pytest.mark.slow) for m in PAPER_METHODS)],
)
def test_nothing_is_read_within_a_micro_batch(
    train, traced, monkeypatch, reads_of_passes, method, targets
) -> None:
    """Dropout included, with the attention of a GPU. Where transformers decides whether a mask is
    needed, it reads the batch."""
    words = [f"method={method}", *targets, "trainer.max_steps=3", "method.dropout=0.1"]
    train(*words, "trainer.compile=layer", attention="sdpa")
    # The first one compiles.
    assert len(reads_of_passes) > 2
    assert not any(reads_of_passes[1:]), reads_of_passes
    if targets is ONE:
        reads_of_passes.clear()
        monkeypatch.setattr(compiled, "_static_mask", sdpa_mask)
        train(*words, "trainer.compile=layer", attention="sdpa")
        assert all(reads_of_passes[1:]), reads_of_passes


def test_rows_are_named_without_a_read_on_a_gpu() -> None:
    """On a CPU, where the rows of each example are drawn for together, with one."""
    rows = torch.arange(12) // 5, torch.arange(12) % 5
    with host_reads() as reads:
        assert RowIds.of(3, 1, *rows).runs is not None
    assert reads == {"nonzero": 1}
    with FakeTensorMode(), host_reads() as reads:
        made = RowIds.of(3, 1, *(torch.empty(12, dtype=torch.int64, device="cuda") for _ in rows))
    assert made.runs is None
    assert made.keys.device.type == "cuda"
    assert not reads
