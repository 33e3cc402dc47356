"""Fixtures that several rooms' tests share, and caches that are the session's alone.

Libraries read where their caches are when they are imported, which is before any fixture: the
folders are moved when this file is. The processes of pytest-xdist inherit them from the one that
starts them, so that packaged weights are converted once for all of them.
"""

from __future__ import annotations

import gc
import logging
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from caches import move_caches

# Set by pytest-xdist in the processes that it starts.
CACHES = None if "PYTEST_XDIST_WORKER" in os.environ else move_caches()
# Each worker and each process that a test starts takes a core: with two threads each, two workers
# on two cores wait for one another. torch reads it when it is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_unconfigure() -> None:
    """Converted weights take half a gigabyte: nothing stays, whatever pytest keeps of tests."""
    gc.unfreeze()  # Else libraries tell of what was not freed.
    if CACHES is not None:
        shutil.rmtree(CACHES, ignore_errors=True)


def pytest_collection_finish() -> None:
    """What is imported by now stays: the collections that each run asks for pass it over."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def what_earlier_tests_imported_stays() -> None:
    """Libraries that are imported when they are needed are passed over too."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def streams_of_warnings() -> None:
    """transformers' warnings go to the stream of the test that runs.

    Its own handler would keep the stream of the test that warned first, which is closed by then.
    """
    from transformers.utils.logging import disable_default_handler  # Reads where the caches are.

    disable_default_handler()


def loggers() -> Iterator[logging.Logger]:
    yield logging.getLogger()
    known = list(logging.Logger.manager.loggerDict.values())
    yield from (logger for logger in known if isinstance(logger, logging.Logger))


@pytest.fixture(autouse=True)
def handlers_of_this_test_alone() -> Iterator[None]:
    """What a test's command adds to the loggers goes with it.

    Hydra and lm-eval set up the root logger with the stream that the test captures. It is closed
    afterwards, and a later test that logs anything would find Python's complaint in its output.
    """
    before = {id(handler) for logger in loggers() for handler in logger.handlers}
    level = logging.getLogger().level
    yield
    for logger in loggers():
        added = [handler for handler in logger.handlers if id(handler) not in before]
        for handler in added:
            logger.removeHandler(handler)
    logging.getLogger().setLevel(level)


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


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A folder that nobody may write to, root included."""
    folder = tmp_path / "mounted"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", folder], capture_output=True, text=True
    )
    if done.returncode:
        if os.geteuid() == 0:
            pytest.skip(f"nothing can be mounted, and root may write everywhere: {done.stderr}")
        folder.chmod(0o555)
    yield folder
    if not done.returncode:
        subprocess.run(["umount", folder], check=True)
