"""What every test rank needs, imported once in the fork server."""

import gc
import warnings

warnings.filterwarnings("ignore")

from dsv3_megatron.megatron.host import adapt_host

adapt_host("cpu")
import hypothesis  # noqa: F401
import pytest  # noqa: F401  what test modules import: else every rank would, for half a second

import dsv3_megatron.train.run  # noqa: F401
from testing.training.tiny import small_recipe

small_recipe()  # whose files are composed once

# A collection writes to every object it looks at, so that a rank would copy all that it shares with this process.
gc.collect()
gc.freeze()
