"""When Triton's kernels are used, and what is said where they cannot be."""

from types import SimpleNamespace

import pytest
import torch

from dsv3_megatron.precision.kernels import available


@pytest.fixture
def complete(monkeypatch, tmp_path):
    """A machine that has everything but, perhaps, a GPU."""
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(available, "find_spec", lambda name: object())
    monkeypatch.setattr(available.shutil, "which", lambda name: "/usr/bin/gcc" if name == "gcc" else None)
    monkeypatch.setattr(available.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    available.why_not.cache_clear()
    yield monkeypatch
    available.why_not.cache_clear()


def test_nothing_is_in_the_way_on_a_complete_machine_with_a_gpu(complete):
    assert available.why_not() is None
    assert available.usable(SimpleNamespace(device=torch.device("cuda", 3)))
    assert not available.usable(torch.empty(0))


@pytest.mark.parametrize(("name", "answer", "said"), [
    ("find_spec", lambda name: None, "triton is not installed"),
    ("shutil.which", lambda name: None, "no C compiler"),
    ("sysconfig.get_path", lambda name: "/nowhere", "Python's headers"),
])  # fmt: skip
def test_what_is_missing_is_named(complete, name, answer, said):
    owner, _, attribute = name.rpartition(".")
    complete.setattr(getattr(available, owner) if owner else available, attribute, answer)
    assert said in available.why_not()


def test_a_compiler_may_be_named_by_cc(complete):
    complete.setattr(available.shutil, "which", lambda name: None)
    complete.setenv("CC", "icx")
    assert available.why_not() is None
