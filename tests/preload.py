"""What every test rank needs, imported once in the fork server."""

import warnings

warnings.filterwarnings("ignore")

import dsv3_megatron.trainer  # noqa: F401
