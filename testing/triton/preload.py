"""What processes with Triton's interpreter need, imported once. Kernels defined in them are interpreted."""

import os
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"  # asked where a kernel is defined, Triton's own library included
sys.path.insert(0, str(Path(sys.prefix) / "triton"))
import torch  # noqa: F401
import triton  # noqa: F401
