"""Packages that Transformer Engine imports for purposes nobody here has (ONNX, Triton, debugging), while it loads."""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Iterator
from unittest.mock import MagicMock

_NAMES = ("onnxscript", "onnx", "triton", "nvdlfw_inspect", "einops")


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: object = None, target: object = None) -> importlib.machinery.ModuleSpec | None:
        if name.split(".")[0] in _NAMES:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> MagicMock:
        module = MagicMock(name=spec.name)
        module.__path__, module.__spec__, module.__version__ = [], spec, "3.6.0"
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


@contextlib.contextmanager
def absent_packages() -> Iterator[None]:
    """Let imports of these packages succeed inside, where they are not installed."""
    finder, before = _Finder(), set(sys.modules)
    sys.meta_path.append(finder)  # last: an installed one is found first
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in set(sys.modules) - before:
            if isinstance(sys.modules[name], MagicMock):
                del sys.modules[name]
