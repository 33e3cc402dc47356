"""Folders of its own for everything that a test session and the processes it starts would keep in
the home of whoever runs it."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

OWN = {
    "HOME": "home",
    "XDG_CACHE_HOME": "cache",  # Converted weights; fontconfig, and most of what is not named here.
    "XDG_CONFIG_HOME": "config",
    "XDG_DATA_HOME": "share",
    "HF_HOME": "huggingface",
    "TRITON_HOME": "triton",
    "TRITON_CACHE_DIR": "triton/cache",
    "TORCH_HOME": "torch",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TORCH_EXTENSIONS_DIR": "extensions",
    "CUDA_CACHE_PATH": "cuda",
    "MPLCONFIGDIR": "matplotlib",
    "WANDB_CACHE_DIR": "wandb/cache",
    "WANDB_CONFIG_DIR": "wandb/config",
    "WANDB_DATA_DIR": "wandb/data",
    "NLTK_DATA": "nltk",
}
"""Variables that name a folder, and the folder's name in the session's own."""

ELSEWHERE = (
    "HF_ASSETS_CACHE", "HF_DATASETS_CACHE", "HF_EVALUATE_CACHE", "HF_HUB_CACHE", "HF_METRICS_CACHE",
    "HF_MODULES_CACHE", "HF_TOKEN", "HF_TOKEN_PATH", "HF_XET_CACHE", "HUGGINGFACE_HUB_CACHE",
    "HUGGING_FACE_HUB_TOKEN", "LM_HARNESS_CACHE_PATH", "TRANSFORMERS_CACHE", "TRITON_DUMP_DIR",
    "TRITON_OVERRIDE_DIR", "WANDB_API_KEY", "WANDB_DIR",
)  # fmt: skip
"""Variables that would lead past those folders, or to an account."""


def move_caches() -> Path:
    """Point this process, and those that it will start, to empty folders in a new temporary one,
    which is returned. Libraries read the variables when they are imported: call it before."""
    root = Path(tempfile.mkdtemp(prefix="mixlora-exp-tests-"))
    settings = Path.home() / ".gitconfig"
    for name in ELSEWHERE:
        os.environ.pop(name, None)
    # Each of the many processes would compile the whole package anew.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.dont_write_bytecode = False
    for name, folder in OWN.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        os.environ[name] = str(root / folder)
    if settings.is_file():
        # No cache: it may say that the checkout is to be trusted.
        shutil.copy(settings, root / OWN["HOME"])
    return root
