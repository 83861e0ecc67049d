"""Shared libraries that a process must hold once: cuDNN, which torch brings along and Transformer Engine looks for."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import torch

_NAMED_BY_THE_USER = ("CUDNN_HOME", "CUDNN_PATH")  # where TE looks before anywhere else


def share_cudnn() -> None:
    """Let Transformer Engine load the cuDNN that torch has loaded. Must run before TE is imported.

    Why: TE 2.20 loads a cuDNN of its own choice, that of the CUDA toolkit before that of the packages torch needs. With
    both on a machine the process holds two, one finds the other's parts, and TE then has no fused attention: "cuDNN
    status: sub-library loading failed", seen only in TE's debug log (cuDNN 9.14 of the toolkit, 9.19 of torch). Can go
    when the attention row of ``make gpu-check`` passes without it on a machine that has two.
    """
    if torch.version.cuda is None or any(os.environ.get(name) for name in _NAMED_BY_THE_USER):
        return
    if (folder := cudnn_of_torch()) is not None:
        os.environ["CUDNN_HOME"] = str(folder)


def cudnn_of_torch() -> Path | None:
    """Return the folder of the cuDNN package that torch's own wheels need; None where torch uses the system's."""
    try:
        found = find_spec("nvidia.cudnn")
    except ModuleNotFoundError:
        return None
    folders = [Path(place) for place in (found.submodule_search_locations or ())] if found else []
    return next((folder for folder in folders if list(folder.glob("lib/libcudnn.so*"))), None)
