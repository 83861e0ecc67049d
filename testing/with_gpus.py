"""What a machine with GPUs answers, for tests of what a run on its CPU must not touch.

Torch is the one installed: whatever really uses CUDA raises ("Torch not compiled with CUDA enabled").
"""

import torch


def say_there_are(count: int) -> None:
    """Let torch answer, in this process, as one that is built with CUDA and sees ``count`` GPUs, none in use yet."""
    torch.version.cuda = "12.9"
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: count
    torch.cuda.is_initialized = lambda: False
