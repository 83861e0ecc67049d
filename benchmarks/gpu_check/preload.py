"""What every process of a rehearsal needs, imported once."""

import dsv3_megatron.trainer  # noqa: F401
