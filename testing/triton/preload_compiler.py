"""What processes with Triton's compiler need, imported once."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(sys.prefix) / "triton"))
import torch  # noqa: F401
import triton  # noqa: F401
