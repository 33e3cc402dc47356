"""Configuration files as Hydra reads them, each parsed once in a process.

Hydra parses every file again, and copies every registered dataclass, for each configuration that it
composes: a third of the time, and a sweep composes hundreds.
"""

from __future__ import annotations

import copy
import os
from typing import Any

from hydra._internal.config_repository import ConfigRepository
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.config_source import ConfigResult

_PARSED: dict[tuple[str, int, int], ConfigResult] = {}
"""Parsed files by path, time of the last change in ns, and size in bytes."""


class ParsedFiles(FileConfigSource):
    """A folder of YAML files, which are parsed again only where they changed."""

    def load_config(self, config_path: str) -> ConfigResult:
        path = os.path.join(self.path, self._normalize_file_name(config_path))
        try:
            found = os.stat(path)
        except OSError:
            return super().load_config(config_path)
        key = os.path.realpath(path), found.st_mtime_ns, found.st_size
        if key not in _PARSED:
            _PARSED[key] = super().load_config(config_path)
        parsed = _PARSED[key]
        # Hydra changes what it gets.
        return ConfigResult(
            provider=self.provider,
            path=f"{self.scheme()}://{self.path}",
            config=copy.deepcopy(parsed.config),
            header=dict(parsed.header),
        )


class Repository(ConfigRepository):
    """Hydra's repository of configurations over `ParsedFiles`."""

    def initialize_sources(self, config_search_path: ConfigSearchPath) -> None:
        super().initialize_sources(config_search_path)
        self.sources = [
            ParsedFiles(s.provider, s.path) if type(s) is FileConfigSource else s
            for s in self.sources
        ]

    def __deepcopy__(self, memo: dict[int, Any]) -> Repository:
        """Hydra copies it before it replaces its sources, which it otherwise only reads."""
        return copy.copy(self)
