"""Shared by all tests: a one-process world for those that build a model in the test process itself."""

import os
import sys

import pytest

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # commands that tests start as a user types them find no GPU either
# Where an environment forbids compiled files, each of those commands would compile all our modules: half a second.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

from dsv3_megatron.megatron.host import adapt_host

adapt_host("cpu")  # all tests, on machines with GPUs too

from testing.lanes import (  # noqa: F401  hooks of pytest
    pytest_addoption,
    pytest_collection_finish,
    pytest_collection_modifyitems,
    pytest_configure,
    pytest_deselected,
    pytest_runtest_protocol,
    pytest_sessionfinish,
    pytest_terminal_summary,
    pytest_testnodedown,
    pytest_xdist_make_scheduler,
)

_SET_BY_COMMANDS = ("DSV3_UMASK", "PYTHONSAFEPATH", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "WANDB_ERROR_REPORTING")
_AT_THE_START = {name: os.environ.get(name) for name in _SET_BY_COMMANDS}
_UMASK = os.umask(0o022)
os.umask(_UMASK)


@pytest.fixture(autouse=True)
def the_process_is_as_it_was():
    """What a command sets for its process ends with the test, or the fixture of a whole file, that has run it here."""
    _as_at_the_start()
    yield
    _as_at_the_start()


def _as_at_the_start():
    os.umask(_UMASK)
    for name, value in _AT_THE_START.items():
        os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)


@pytest.fixture(scope="module")
def in_full_lane(request):
    """Whether tests of this file run that the fast lane leaves out: what they alone need is made only then."""
    return any(item.path == request.path and item.get_closest_marker("full") for item in request.session.items)


@pytest.fixture
def one_process():
    """The default process group with this process alone in it; yields megatron-core's groups."""
    import torch
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

    from parallel.groups import build_groups, start_processes, stop_processes
    from parallel.layout import Layout
    from parallel.world import World

    torch.set_num_threads(1)
    start_processes(World(0, 1, 0), torch.device("cpu"))
    try:
        groups = build_groups(Layout())
        model_parallel_cuda_manual_seed(1)
        MTPLossLoggingHelper.tracker.clear()  # global, sized by the first model of the process
        yield groups
    finally:
        stop_processes()
