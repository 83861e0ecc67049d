"""What every process of a rehearsal needs, imported once."""

from dsv3_megatron.megatron.host import adapt_host

adapt_host("cpu")
import dsv3_megatron.trainer  # noqa: F401
