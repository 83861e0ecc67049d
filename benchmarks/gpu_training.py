"""One of our rows of the GPU benchmark: launcher/pretrain.py as it is, but for the checkpoint at its end.

    python benchmarks/gpu_training.py profile=false recipe=dsv3_h200 run.steps=12

The state of true-size layers is tens of GiB: writing it would take longer than the training, on a disk that may not
have the room, after the last step that is counted. With ``profile=true`` the fourth step runs under torch's profiler,
and the kernels that took longest are printed: KERNEL, milliseconds, calls, name, with tabs between. It compares nothing
by itself. Other arguments are launcher/pretrain.py's.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

FOURTH, LINES = 4, 15


def watched(train_step: Any) -> Any:
    """Return ``train_step`` whose fourth call is profiled."""
    from torch.profiler import ProfilerActivity, profile

    calls = []

    def step(*arguments: Any) -> Any:
        calls.append(0)
        if len(calls) != FOURTH:
            return train_step(*arguments)
        with profile(activities=[ProfilerActivity.CUDA]) as found:
            result = train_step(*arguments)
        for row in sorted(found.key_averages(), key=lambda r: -r.self_device_time_total)[:LINES]:
            print(f"KERNEL\t{row.self_device_time_total / 1e3:.2f}\t{row.count}\t{row.key[:110]}")
        return result

    return step


def main(profiled: bool, words: list[str]) -> int:
    """Train."""
    from dsv3_megatron.precision.transformer_engine import prepare_environment
    from launcher.compose import compose

    prepare_environment(compose(words).precision)  # as pretrain.py: before anything imports TE
    import dsv3_megatron.trainer as trainer
    from dsv3_megatron.checkpoint.save import Saver
    from launcher.pretrain import main as pretrain

    Saver.save_finally = lambda self, progress: None
    if profiled:
        trainer.train_step = watched(trainer.train_step)
    return pretrain(words)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] == "profile=true", sys.argv[2:]))
