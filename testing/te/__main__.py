"""Runs a program with Transformer Engine's Python at hand: ``python -m testing.te launcher/pretrain.py backend=te``.

The program is a file, or a module after ``-m``; it is run as ``python`` would run it.
"""

from __future__ import annotations

import runpy
import sys

from testing.te.install import install

if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    install()
    del sys.argv[0]
    if sys.argv[0] == "-m":
        del sys.argv[0]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")
