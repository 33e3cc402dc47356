"""A tokenizer that cannot be written is an OSError, as any other file."""

from __future__ import annotations

import errno
import resource
from pathlib import Path

import pytest
from composed import compose

from mixlora_exp.models import load_tokenizer
from mixlora_exp.models.writing import write_tokenizer


def test_a_full_disk_is_the_system_s_error(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(compose(["model=tiny"]).model)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match=str(tmp_path)) as raised:
            write_tokenizer(tokenizer, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert raised.value.errno == errno.EFBIG
    write_tokenizer(tokenizer, tmp_path)
    assert (tmp_path / "tokenizer.json").stat().st_size > 1000


def test_other_failures_stay_what_they_are(tmp_path: Path) -> None:
    class Broken:
        def save_pretrained(self, folder: Path) -> None:
            raise Exception("no vocabulary")

    with pytest.raises(Exception, match="no vocabulary") as raised:
        write_tokenizer(Broken(), tmp_path)
    assert type(raised.value) is Exception
