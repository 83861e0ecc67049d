"""What processes with Triton's interpreter need, imported once. Kernels defined in them are interpreted."""

import os

os.environ["TRITON_INTERPRET"] = "1"  # asked where a kernel is defined, Triton's own library included
import testing.triton.preload_compiler  # noqa: F401
