"""What a test rank on Transformer Engine needs, imported once in its fork server (testing/ranks.py)."""

import gc
import warnings

warnings.filterwarnings("ignore")

from testing.te.install import install

install()

import hypothesis  # noqa: F401
import pytest  # noqa: F401  what test modules import: else every rank would, for half a second
import transformer_engine.pytorch  # noqa: F401

import testing.training.tiny  # noqa: F401

gc.collect()  # as in testing/preload.py
gc.freeze()
