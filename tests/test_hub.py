"""What is fetched of an adapter on the hub, and what is told if it cannot be."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from composed import compose
from fake_hub import FakeHub, fake_hub

from mixlora_exp.cli.train import execute
from mixlora_exp.errors import UserError
from mixlora_exp.runs.inputs import resolve_config
from mixlora_exp.system.hub import adapter_folder, pin_revision

FILES = {
    "adapter_config.json": b"{}",
    "adapter_model.safetensors": b"weights",
    "base_model.json": b"{}",
    "README.md": b"# card",
    "adapter_model.bin": b"pickle",
    "modeling.py": b"raise SystemExit",
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    with fake_hub(monkeypatch, str(tmp_path / "hub")) as found:
        yield found


def test_only_the_adapter_s_own_files_are_fetched(
    hub: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    commit = hub.commit("owner/name", FILES)
    place = pin_revision("hub:owner/name@main")
    assert place == f"hub:owner/name@{commit}"
    assert f"hub:owner/name@main is {place} today" in capsys.readouterr().err
    fetched = {"adapter_config.json", "adapter_model.safetensors", "base_model.json"}
    assert hub.fetched() == fetched
    folder = adapter_folder(place)
    assert {path.name for path in folder.iterdir()} == fetched
    assert (folder / "adapter_model.safetensors").read_bytes() == b"weights"


def test_a_commit_in_the_cache_needs_no_network(
    hub: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    commit = hub.commit("owner/name", FILES)
    place = f"hub:owner/name@{commit}"
    folder = adapter_folder(place)
    hub.asked.clear()
    hub.refuse = 500
    assert adapter_folder(place) == folder
    assert not hub.asked
    assert not capsys.readouterr().err


def test_a_branch_that_moves_gives_another_commit(hub: FakeHub) -> None:
    first = hub.commit("owner/name", FILES)
    assert pin_revision("hub:owner/name").endswith(first)
    second = hub.commit("owner/name", {**FILES, "adapter_model.safetensors": b"other"})
    assert pin_revision("hub:owner/name").endswith(second)
    assert (
        adapter_folder(f"hub:owner/name@{first}") / "adapter_model.safetensors"
    ).read_bytes() == (b"weights")


def test_a_run_asks_once_which_commit_a_branch_has(hub: FakeHub) -> None:
    """What is hashed, told and scored is then of one commit."""
    first = hub.commit("owner/name", FILES)
    config = compose(["method=none", "adapter='hub:owner/name@main'"])
    found = resolve_config(config)
    hub.commit("owner/name", {**FILES, "adapter_model.safetensors": b"other"})
    assert found.adapter == f"hub:owner/name@{first}"
    assert resolve_config(found) == found
    assert (adapter_folder(found.adapter) / "adapter_model.safetensors").read_bytes() == b"weights"


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("hub:owner/other@main", "the repository does not exist"),
        ("hub:owner/name@v9", "has no such revision"),
        ("hub:owner/model@main", "is no adapter: the repository has no adapter_config.json"),
        ("hub:owner/pickled@main", "has no adapter_model.safetensors"),
        ("hub:owner/wide@main", "adapter_config.json has 2,000,000 bytes"),
        ("hub:name", "write hub:OWNER/NAME@REVISION"),
        ("hub:../x@main", "write hub:OWNER/NAME@REVISION"),
        ("hub:owner/name@", "write hub:OWNER/NAME@REVISION"),
        ("hub:a/b@main\x1b[2J", "write hub:OWNER/NAME@REVISION"),
    ],
)
def test_what_is_no_adapter_is_reported_in_a_line(hub: FakeHub, place: str, words: str) -> None:
    hub.commit("owner/name", FILES)
    hub.commit("owner/model", {"config.json": b"{}"})
    hub.commit("owner/pickled", {"adapter_config.json": b"{}", "adapter_model.bin": b"x"})
    wide = b" " * 2_000_000
    hub.commit("owner/wide", {"adapter_config.json": wide, "adapter_model.safetensors": b"x"})
    with pytest.raises(UserError) as caught:
        pin_revision(place)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not hub.fetched()


@pytest.mark.parametrize("dry_run", ["false", "true"])
def test_so_it_is_on_the_command_line(hub: FakeHub, dry_run: str, tmp_path: Path, capsys) -> None:
    hub.commit("owner/model", {"config.json": b"{}"})
    argv = ["experiment=smoke", "method=none", "adapter='hub:owner/model@main'"]
    assert execute([*argv, f"dry_run={dry_run}", f"output_dir={tmp_path / 'out'}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: adapter=hub:owner/model@main is no adapter: the repository")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("status", "words"), [(403, "may not do that"), (500, "the hub refused")])
def test_a_hub_that_refuses(hub: FakeHub, status: int, words: str, monkeypatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    hub.refuse = status
    with pytest.raises(UserError, match=words):
        pin_revision("hub:owner/name@main")


def test_a_hub_that_cannot_be_reached(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="cannot be reached"):
        pin_revision("hub:owner/name@main")
