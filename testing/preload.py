"""What every test rank needs, imported once in the fork server."""

import warnings

warnings.filterwarnings("ignore")

from dsv3_megatron.megatron.host import adapt_host

adapt_host("cpu")
import dsv3_megatron.train.trainer  # noqa: F401
