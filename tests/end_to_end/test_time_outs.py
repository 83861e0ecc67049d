"""What hangs ends by itself, each phase after a time of its own, and says in which it was."""

import pytest

from testing.torchrun import torchrun
from testing.training.tiny import SMALL

# The last rank sleeps in the function named: argv = module, name, then the command.
SLEEPING = """
import importlib, os, runpy, sys, time
from functools import reduce
module, name = sys.argv[1:3]
del sys.argv[:3]
if os.environ["RANK"] == "1":
    *path, last = name.split(".")
    setattr(reduce(getattr, path, importlib.import_module(module)), last, lambda *given, **named: time.sleep(600))
runpy.run_path(sys.argv[0], run_name="__main__")
"""
START, LOAD = "run.start_seconds=20", "run.checkpoint_seconds=6"
HANG = ("run.hang_seconds=3", "run.abort_seconds=6")
RUN = "dsv3_megatron.train.run"
CASES = {
    "meeting": (RUN, "start_processes", ["run.start_seconds=5"]),
    "building the model": (RUN, "build_parts", [START]),
    "making the run directory": (RUN, "create_for_all_hosts", [START]),
    "loading a checkpoint": (RUN, "load_start", [LOAD]),
    "training": ("dsv3_megatron.train.trainer", "train_step", HANG),
    "what follows a step": ("dsv3_megatron.train.callbacks.metrics", "Metrics.after_step", HANG),
    "saving a checkpoint": ("dsv3_megatron.checkpoint.save", "Saver.save", [LOAD, "checkpoint.every_steps=1"]),
}
FAST = ("loading a checkpoint", "training")


@pytest.mark.slow
@pytest.mark.parametrize("where", [c if c in FAST else pytest.param(c, marks=pytest.mark.full) for c in CASES])
def test_a_rank_that_hangs_ends_the_run_in_the_time_of_its_phase(tmp_path, where):
    module, name, keys = CASES[where]
    script = tmp_path / "sleeping.py"
    script.write_text(SLEEPING)
    words = (*SMALL, "data=synthetic", "optim.global_batch=8", "run.steps=3", "parallel.pipeline=2")
    lines, code = torchrun(
        2, script, module, name, "launcher/pretrain.py", *words, *keys, f"run.directory={tmp_path / 'run'}"
    )
    text = "\n".join(lines)
    assert code == 1, text
    if where == "meeting":
        assert "fault: rank 0 on " in text and "could not meet all 2 ranks (" in text, text
        assert "run.start_seconds = 5" in text, text
        return
    assert "exitcode  : 70" in text, text
    phase = "no action ended for 3 s of training" if keys is HANG else f"{where} is not over after"
    assert f"hang: {phase}" in text, text
    (told,) = [line for line in lines if line.startswith("  rank 1: ")]
    assert (where in told) == (where != "training") and "sleeping.py" in told, text
