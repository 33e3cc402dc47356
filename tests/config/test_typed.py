"""What follows `=` in a field with a folder or a text is read as it was typed."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from mixlora_exp.config.command import compose, parse_overrides
from mixlora_exp.config.typed import as_typed, literal

ODD = ("a=b", "a b", "x,=y", "(c)", "it's", 'a"b', "a\\", "null ", "12", "true", "$5", "a:b", "é#")


@pytest.mark.parametrize("name", ODD)
def test_a_folder_needs_no_quotes_of_hydra(name: str) -> None:
    for typed in (name, f"/tmp/{name}"):
        assert compose(as_typed([f"output_dir={typed}"])).output_dir == typed


def test_a_folder_that_exists_is_never_several_values(tmp_path: Path) -> None:
    for name in ("x, y", "[a]", "${seed}", "'q'"):
        (tmp_path / name).mkdir()
        word = f"output_dir={tmp_path / name}"
        assert compose(as_typed([word])).output_dir == str(tmp_path / name)


@pytest.mark.parametrize(
    "word",
    ["output_dir=/plain/path-1.2", "output_dir=null", "output_dir='quoted'", "output_dir=a,b",
     "output_dir=${oc.env:HOME}/x", "method=lora", "task.train=[a=b]", "--help"],
)  # fmt: skip
def test_what_hydra_reads_is_left_to_it(word: str) -> None:
    assert as_typed([word]) == [word]


@pytest.mark.parametrize("text", [*ODD, "[a,b]", "'q'", "a,b", "${seed}", "null\n"])
def test_a_prompt_is_always_what_was_typed(text: str) -> None:
    assert compose(as_typed([f"prompt={text}"]), "generate").prompt == text


@pytest.mark.parametrize("text", [*ODD, "name", "Null", "INF", "${seed}", "\\${seed}", "a.b"])
def test_a_value_survives_the_grammar(text: str) -> None:
    value = {"a": [text, 1, 2.5, None, True], "b": {"c": text}}
    (parsed,) = parse_overrides([f"model.config={literal(value)}"])
    found = OmegaConf.to_container(OmegaConf.create(parsed.value()), resolve=True)
    assert found == value
