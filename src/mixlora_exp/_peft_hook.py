"""Registers the MixLoRA tuner when PEFT is imported, without importing PEFT itself."""

from __future__ import annotations

import importlib
import importlib.abc
import sys


def _register() -> None:
    importlib.import_module("mixlora_exp.adapters")


class _Loader(importlib.abc.Loader):
    """PEFT's own loader, followed by the registration."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module) -> None:
        # Resource readers and tracebacks use the module's loader.
        module.__loader__ = module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        _register()
        sys.meta_path[:] = [f for f in sys.meta_path if not isinstance(f, _Finder)]


class _Finder(importlib.abc.MetaPathFinder):
    """Delegates the search for PEFT to the other finders. Stays installed until PEFT is imported,
    since many callers only look for it (`transformers.utils.is_peft_available`)."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname != "peft":
            return None
        for finder in sys.meta_path:
            find = None if finder is self else getattr(finder, "find_spec", None)
            spec = None if find is None else find(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader)
                return spec
        return None


def install() -> None:
    """Register the tuner now if PEFT is imported, otherwise when PEFT is imported."""
    if "peft" in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
