"""checkpoint.every_minutes=auto on its way from a command line into a run."""

import pytest
import yaml

from launcher.command_line.compose import compose
from launcher.pretrain import train
from testing.training.tiny import SMALL

AUTO = (*SMALL, "run.device=cpu", "cluster=h100_8", "cluster.storage_gigabytes_per_second=0.01")


@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_the_run_and_its_stored_recipe_get_the_planned_minutes_and_rank_0_says_so(monkeypatch, asynchronous):
    from dsv3_megatron.train import run as training

    given = {}

    def run(recipe, world, reporter, resolved_recipe, signals):
        given.update(recipe=recipe, reporter=reporter, resolved=resolved_recipe)
        return {"stopped_by_signal": True}

    monkeypatch.setattr(training, "run", run)
    train(compose([*AUTO, f"checkpoint.asynchronous={asynchronous}", "checkpoint.every_minutes=auto"]))
    minutes = given["recipe"].checkpoint.every_minutes
    assert 0 < minutes < 1e5
    assert yaml.safe_load(given["resolved"])["checkpoint"]["every_minutes"] == minutes
    said = f"checkpoint.every_minutes = auto: {minutes:g} minutes between saves, planned for 1 GPU"
    assert given["reporter"]._remarks == [said]
    train(compose([*AUTO, f"checkpoint.every_minutes={minutes}"]))
    assert given["recipe"].checkpoint.every_minutes == minutes and given["reporter"]._remarks == []
