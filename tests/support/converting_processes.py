"""Conversions of a package's weights in processes of their own, which can be killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
from multiprocessing.connection import Connection
from pathlib import Path

from mixlora_exp.config.schema import ModelConfig

CONTEXT = multiprocessing.get_context("forkserver")


def convert(config: ModelConfig, cache: Path, pipe: Connection, *, hang: bool = False) -> None:
    """Load model and tokenizer, saying "converting" and "loaded" through the pipe; `hang`: stop for
    ever in the middle of writing, and say "half"."""
    import torch

    from mixlora_exp.models import load_model, load_tokenizer, pypi

    os.environ["XDG_CACHE_HOME"] = str(cache)
    torch.set_num_threads(1)
    restore = pypi._restore_pre_tokenizer

    def watched(*given: object) -> None:
        pipe.send("converting")
        if hang:
            (folder,) = (cache / "mixlora_exp").glob(".*-*")
            (folder / "model.safetensors").write_bytes(b"half of it")
            pipe.send("half")
            os.kill(os.getpid(), signal.SIGSTOP)
        restore(*given)

    pypi._restore_pre_tokenizer = watched
    load_tokenizer(config)
    load_model(config, torch.float32)
    pipe.send("loaded")
    pipe.close()
    os._exit(0)


class Converting:
    """A process that converts."""

    def __init__(self, config: ModelConfig, cache: Path, *, hang: bool = False) -> None:
        # Started from a server that has imported everything, unless another test's runs already.
        CONTEXT.set_forkserver_preload(["mixlora_exp.models"])
        self._pipe, theirs = CONTEXT.Pipe(duplex=False)
        self.process = CONTEXT.Process(
            target=convert, args=(config, cache, theirs), kwargs={"hang": hang}
        )
        self.process.start()
        theirs.close()

    def hears(self) -> str:
        """What it says next."""
        assert self._pipe.poll(120), "it says nothing"
        return self._pipe.recv()

    def rest(self) -> list[str]:
        """All that it says until it ends well."""
        said = []
        try:
            while True:
                said.append(self.hears())
        except EOFError:
            self.process.join(60)
        assert self.process.exitcode == 0
        return said

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
