"""When the state is kept in memory, when all that is kept is forgotten, and when memory is given back."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from dsv3_megatron.train.callbacks.saving_in_memory import SavingInMemory
from dsv3_megatron.train.progress import Progress


class Memory:
    """Notes what is asked of states in memory."""

    def __init__(self):
        self.asked = []

    def __getattr__(self, name):
        return lambda *given: self.asked.append(name) or (name == "due" and given[0] % 2 == 0)


@pytest.mark.parametrize("saved_step, ends_with", [(4, "free"), (2, "finish")])
def test_states_in_memory_are_forgotten_once_rolled_back_and_freed_once_on_disk(saved_step, ends_with):
    memory, saver = Memory(), SimpleNamespace(saved_step=saved_step)
    watchdog = SimpleNamespace(phase=lambda *given: nullcontext())
    trainer = SimpleNamespace(
        progress=Progress(),
        finished=False,
        parts=SimpleNamespace(watchdog=watchdog),
        recipe=SimpleNamespace(run=SimpleNamespace(checkpoint_seconds=1)),
    )
    callback = SavingInMemory(memory, saver)
    callback.begin(trainer)
    asked = {}
    for step, rollbacks in ((1, 0), (2, 0), (1, 1), (2, 1)):
        trainer.progress.step, trainer.progress.health.rollbacks = step, rollbacks
        memory.asked.clear()
        callback.after_step(trainer, None)
        asked[step, rollbacks] = list(memory.asked)
    assert asked == {(1, 0): ["due"], (2, 0): ["due", "save"], (1, 1): ["forget"], (2, 1): ["due", "save"]}
    trainer.progress.step = 4
    memory.asked.clear()
    callback.end(trainer)
    assert memory.asked == [ends_with]
