"""``install()``: from then on ``import transformer_engine`` finds TE's own Python, over kernels on this CPU.

Nothing is loaded before somebody imports it, so that a program tells TE about its environment first, as on a GPU.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import sys
import types
from collections.abc import Callable, Iterable
from functools import partial
from importlib.metadata import DistributionFinder
from pathlib import Path
from unittest.mock import patch

from testing.te.absent import absent_packages
from testing.te.extension import make_extension, put_kernels
from testing.te.gloo import gather_types_apart
from testing.te.machine import pretend_hopper
from testing.te.project import let_te_run_on_a_cpu
from testing.te.tree import has_bindings, tree

_PACKAGE = "transformer_engine"


def install(on_cpu: bool = True) -> None:
    """Make TE importable in this process. Before megatron-core is imported: it looks for TE once.

    ``on_cpu``: answer for the GPU that is not there, and let the project use TE without one. Else somebody else does.

    Raises: FileNotFoundError: TE's Python was not fetched. RuntimeError: too late.
    """
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    if "megatron.core.extensions.transformer_engine" in sys.modules:
        raise RuntimeError("testing.te.install() must run before megatron-core is imported")
    sys.meta_path.insert(0, _Finder(tree(), on_cpu))


class _Finder(DistributionFinder, importlib.abc.Loader):
    """Finds the package and its version, and nothing else; what is below it Python finds by the package's path."""

    def __init__(self, folder: Path, on_cpu: bool):
        self._folder, self._on_cpu, self._compiled = folder, on_cpu, has_bindings(folder)

    def find_spec(self, name: str, path: object = None, target: object = None) -> importlib.machinery.ModuleSpec | None:
        if name != _PACKAGE:
            return None
        origin = self._folder / _PACKAGE / "__init__.py"
        spec = importlib.machinery.ModuleSpec(name, self, origin=str(origin), is_package=True)
        spec.submodule_search_locations = [str(origin.parent)]
        return spec

    def find_distributions(
        self,
        context: DistributionFinder.Context = DistributionFinder.Context(),  # noqa: B008 (as the base class)
    ) -> Iterable[importlib.metadata.Distribution]:
        here = DistributionFinder.Context(name=context.name, path=[str(self._folder)])
        return importlib.metadata.MetadataPathFinder.find_distributions(here)

    def exec_module(self, package: types.ModuleType) -> None:
        """Do what the package's own ``__init__`` does, without looking for shared libraries that are not there."""
        environment = {"NVTE_FRAMEWORK": "pytorch"} | ({} if self._compiled else {"NVTE_PROJECT_BUILDING": "1"})
        with absent_packages(), patch.dict("os.environ", environment):
            package.common = common = importlib.import_module(f"{_PACKAGE}.common")
            compiled = common.load_framework_extension
            common.load_framework_extension = partial(_load_over, compiled) if self._compiled else _load_stand_in
            package.pytorch = importlib.import_module(f"{_PACKAGE}.pytorch")
            importlib.import_module(f"{_PACKAGE}.common.recipe")
        # It took all names of the extension at import; those made since are asked for one by one.
        sys.modules[f"{_PACKAGE}.pytorch.cpp_extensions"].__getattr__ = lambda name: getattr(
            sys.modules["transformer_engine_torch"], name
        )
        package.__version__ = importlib.metadata.version(_PACKAGE)
        if self._on_cpu:
            pretend_hopper()
            gather_types_apart()
            let_te_run_on_a_cpu()


def _load_stand_in(framework: str) -> None:
    sys.modules["transformer_engine_torch"] = make_extension()


def _load_over(load_compiled: Callable[[str], None], framework: str) -> None:
    load_compiled(framework)
    put_kernels(sys.modules["transformer_engine_torch"])
