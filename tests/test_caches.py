"""No test reads what other programs, or earlier runs, left on the machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from caches import ELSEWHERE, OWN

from mixlora_exp.system.caches import cache_folder

ROOT = Path(__file__).resolve().parents[1]


def test_caches_are_the_session_s_own() -> None:
    session = Path(os.environ["HOME"]).parent
    assert session.name.startswith("mixlora-exp-tests-")
    for name in OWN:
        assert Path(os.environ[name]).is_relative_to(session), name
    assert not set(ELSEWHERE) & set(os.environ)


def test_libraries_have_taken_them_over() -> None:
    session = Path(os.environ["HOME"]).parent
    found = {
        "huggingface_hub": huggingface_hub.constants.HF_HUB_CACHE,
        "token": huggingface_hub.constants.HF_TOKEN_PATH,
        "torch": torch.hub.get_dir(),
        "converted weights": cache_folder(),
        "home": Path("~").expanduser(),
    }
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    found["datasets"] = datasets.config.HF_DATASETS_CACHE
    assert {k: v for k, v in found.items() if not Path(v).is_relative_to(session)} == {}


INSIDE = """
import os
from pathlib import Path

from mixlora_exp.cli.train import execute


def test_a_run(tmp_path):
    assert execute(["experiment=smoke", "trainer.max_steps=1", f"output_dir={tmp_path}"]) == 0
    Path(os.environ["SEEN"], os.environ["PYTEST_XDIST_WORKER"]).write_text(
        os.environ["XDG_CACHE_HOME"]
    )


test_another = test_a_run
"""


@pytest.mark.slow
def test_a_home_that_cannot_be_read_disturbs_no_test(tmp_path: Path) -> None:
    """Every variable leads to a file, below which nothing can be looked up or made; the processes
    of pytest-xdist share what the session keeps."""
    pytest.importorskip("xdist", reason="pytest-xdist is not installed")
    poison = tmp_path / "poison"
    poison.write_text("")
    checkout, seen = tmp_path / "checkout", tmp_path / "seen"
    seen.mkdir()
    (checkout / "tests").mkdir(parents=True)
    for name in ("pyproject.toml", "conf", "src", "tests/conftest.py", "tests/support"):
        (checkout / name).symlink_to(ROOT / name)
    (checkout / "tests" / "test_inside.py").write_text(INSIDE)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environment |= {name: str(poison / name) for name in (*OWN, *ELSEWHERE)}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "2"],
        cwd=checkout, capture_output=True, text=True,
        env={**environment, "SEEN": str(seen), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout
    assert {path.name for path in seen.iterdir()} == {"gw0", "gw1"}
    (folder,) = {Path(path.read_text()) for path in seen.iterdir()}
    assert folder.name == OWN["XDG_CACHE_HOME"]
    assert not folder.exists(), "what the session kept is gone with it"
