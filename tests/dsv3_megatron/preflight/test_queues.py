"""One queue between host and GPU, in which the streams of a pipeline would wait for each other."""

import pytest
import torch

from dsv3_megatron.preflight.world import check_queues
from launcher import pretrain
from launcher.command_line.compose import compose
from parallel.errors import LayoutError
from parallel.world import World


@pytest.mark.parametrize(("device", "refused"), [("cuda", True), ("cpu", False)])
def test_ranks_on_gpus_refuse_one_queue_beside_a_pipeline(monkeypatch, device, refused):
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    monkeypatch.setattr("dsv3_megatron.megatron.host.choose_device", lambda wanted, world: torch.device(device))
    monkeypatch.setattr(pretrain, "prepare_threads", lambda ranks: None)
    recipe, world = compose(["recipe=dsv3_tiny", "parallel.pipeline=2"]), World(0, 2, 0)
    if refused:
        with pytest.raises(LayoutError, match="can hang"):
            pretrain.prepare_process(recipe, world)
    else:
        pretrain.prepare_process(recipe, world)


def test_one_queue_without_a_pipeline_and_more_with_one_are_taken():
    recipe = compose(["recipe=dsv3_tiny", "parallel.pipeline=2"])
    for words, value in ((["parallel.pipeline=1"], "1"), (["parallel.pipeline=2"], "32")):
        check_queues(compose(["recipe=dsv3_tiny", *words]), {"CUDA_DEVICE_MAX_CONNECTIONS": value})
    check_queues(recipe, {})
