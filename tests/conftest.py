"""Shared by all tests: a one-process world for those that build a model in the test process itself."""

import os

import pytest

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # commands that tests start as a user types them find no GPU either

from dsv3_megatron.megatron.host import adapt_host

adapt_host("cpu")  # all tests, on machines with GPUs too


WAITING = ("tests/slurm/", "tests/end_to_end/")  # whose tests wait for other processes, most of the time or in part


def pytest_collection_modifyitems(items):
    """Begin with the files that take longest, so that of several workers none is left with one of them at the end."""

    def place(item):
        return next((n for n, start in enumerate(WAITING) if item.nodeid.startswith(start)), len(WAITING))

    items.sort(key=place)


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
