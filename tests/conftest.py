"""Fixtures that several rooms' tests share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of benchmark data beside the repository, where there is one."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("shared data folder is absent")
    return folder


@pytest.fixture(scope="session")
def shared_oracle() -> Path:
    """The folder of another implementation's outputs beside the repository, where there is one."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "oracle"
    if not folder.is_dir():
        pytest.skip("shared oracle folder is absent")
    return folder
