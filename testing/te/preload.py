"""What a test rank on Transformer Engine needs, imported once in its fork server (testing/ranks.py)."""

import gc
import warnings

warnings.filterwarnings("ignore")

from testing.te.install import install

install()

import hypothesis  # noqa: F401
import pytest  # noqa: F401  what test modules import: else every rank would, for half a second
import transformer_engine.pytorch  # noqa: F401

from testing.training.tiny import small_recipe

small_recipe()  # whose files are composed once

gc.collect()  # as in testing/preload.py
gc.freeze()
