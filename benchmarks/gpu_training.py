"""One of our rows of the GPU benchmark: launcher/pretrain.py as it is, but for the checkpoint at its end.

    python -m benchmarks.gpu_training recipe=dsv3_one_gpu run.steps=12

The state of true-size layers is tens of GiB: writing it would take longer than the training, on a disk that may not
have the room, after the last step that is counted. It compares nothing by itself. Arguments are launcher/pretrain.py's.
"""

from __future__ import annotations

import sys


def main(words: list[str]) -> int:
    """Train."""
    from dsv3_megatron.precision.transformer_engine import prepare_environment
    from launcher.command_line.compose import compose

    prepare_environment(compose(words).precision)  # as pretrain.py: before anything imports TE
    from dsv3_megatron.checkpoint.save import Saver
    from launcher.pretrain import main as pretrain

    Saver.save_finally = lambda self, progress, **options: None
    return pretrain(words)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
