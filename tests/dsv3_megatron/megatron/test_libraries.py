"""One cuDNN a process, found by Transformer Engine's own search; and no kernel of a GPU for tensors of a CPU."""

import ctypes
import os
import sys

import pytest
import torch

from dsv3_megatron.megatron.libraries import cudnn_of_torch, share_cudnn
from testing.ranks import TE, run_ranks
from testing.training.on_te import WORDS, Training, train


@pytest.fixture
def two_cudnns(tmp_path, monkeypatch):
    """A machine with a toolkit's cuDNN and the one that torch's wheels need."""
    for folder in ("toolkit/lib", "site/nvidia/cudnn/lib"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "libcudnn.so.9").touch()
    for name in ("CUDNN_HOME", "CUDNN_PATH"):
        monkeypatch.setenv(name, "")  # so that what the product sets is undone afterwards
        monkeypatch.delenv(name)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    for name in [name for name in sys.modules if name == "nvidia" or name.startswith("nvidia.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    return tmp_path


def found_by_te(unused):
    """Return the file of the cuDNN that Transformer Engine would load."""
    from transformer_engine import common

    loads, ctypes.CDLL = ctypes.CDLL, lambda file, mode=0: file
    try:
        common._load_cuda_library_from_system.cache_clear()
        return common._load_cuda_library_from_system("cudnn")[1]
    finally:
        ctypes.CDLL = loads
        common._load_cuda_library_from_system.cache_clear()


def found_twice(place):
    """Return what it loads on a machine with two, before and after the product has said which."""
    os.environ.pop("CUDNN_HOME", None)
    os.environ["CUDA_HOME"] = f"{place}/toolkit"
    before = found_by_te(None)
    os.environ["CUDNN_HOME"] = f"{place}/site/nvidia/cudnn"
    return before, found_by_te(None)


def test_transformer_engine_is_sent_to_torchs_own(two_cudnns):
    share_cudnn()
    assert os.environ["CUDNN_HOME"] == str(two_cudnns / "site/nvidia/cudnn")
    [(before, after)] = run_ranks(1, found_twice, [str(two_cudnns)], preload=TE)[0]
    assert before == str(two_cudnns / "toolkit/lib/libcudnn.so.9")  # what mixed the two
    assert after == str(two_cudnns / "site/nvidia/cudnn/lib/libcudnn.so.9")


@pytest.mark.parametrize("name", ["CUDNN_HOME", "CUDNN_PATH"])
def test_who_names_a_cudnn_is_obeyed(two_cudnns, monkeypatch, name):
    monkeypatch.setenv(name, "/opt/cudnn")
    share_cudnn()
    assert os.environ.get("CUDNN_HOME") == ("/opt/cudnn" if name == "CUDNN_HOME" else None)


def test_a_torch_over_the_systems_cudnn_changes_nothing(two_cudnns, monkeypatch):
    (two_cudnns / "site/nvidia/cudnn/lib/libcudnn.so.9").unlink()
    assert cudnn_of_torch() is None
    share_cudnn()
    assert "CUDNN_HOME" not in os.environ


def train_beside_kernels(case):
    """Train on a CPU where megatron-core has taken kernels that refuse its tensors, as compiled ones do."""
    import megatron.core.optimizer.clip_grads as clipping

    def refuse(*given):
        raise RuntimeError("CUDA error: no CUDA-capable device is detected")

    clipping.l2_norm_impl = clipping.multi_tensor_scale_impl = clipping.multi_tensor_applier = refuse
    return train(case)


def test_a_cpu_run_uses_no_kernel_of_transformer_engine():
    case = Training((*WORDS, "backend=torch"))
    [beside] = run_ranks(1, train_beside_kernels, [case], preload=TE)[0]
    [alone] = run_ranks(1, train, [case])[0]
    assert beside["norms"] == pytest.approx(alone["norms"], rel=1e-6)
    assert beside["losses"] == pytest.approx(alone["losses"], rel=1e-6)
