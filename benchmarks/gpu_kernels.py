"""Training whose fourth step runs under torch's profiler: prints the kernels that took longest in it.

    python benchmarks/gpu_kernels.py recipe=dsv3_h200 run.steps=5

A part of benchmarks/fp8_gpu_step.py, of our rows only: it says where a row's time goes, and compares nothing. Lines are
KERNEL, milliseconds, calls, name, with tabs between. Arguments are launcher/pretrain.py's.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

FOURTH, LINES = 4, 15


def main() -> int:
    """Train, one step of it watched."""
    from dsv3_megatron.precision.transformer_engine import prepare_environment
    from launcher.compose import compose

    prepare_environment(compose(sys.argv[1:]).precision)  # as pretrain.py: before anything imports TE
    from torch.profiler import ProfilerActivity, profile

    import dsv3_megatron.trainer as trainer
    from launcher.pretrain import main as pretrain

    real, calls = trainer.train_step, []

    def train_step(*arguments: Any) -> Any:
        calls.append(0)
        if len(calls) != FOURTH:
            return real(*arguments)
        with profile(activities=[ProfilerActivity.CUDA]) as found:
            result = real(*arguments)
        for row in sorted(found.key_averages(), key=lambda r: -r.self_device_time_total)[:LINES]:
            print(f"KERNEL\t{row.self_device_time_total / 1e3:.2f}\t{row.count}\t{row.key[:110]}")
        return result

    trainer.train_step = train_step
    return pretrain(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
