"""What every process of a rehearsal needs, imported once."""

from dsv3_megatron.megatron.host import adapt_host

adapt_host("cpu")
import dsv3_megatron.train.run  # noqa: F401
