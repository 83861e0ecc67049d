"""megatron-core's embedding, whose gradient goes to float32 row by row."""

from __future__ import annotations

import types

from megatron.core.tensor_parallel import layers
from torch import Tensor

from dsv3_megatron.megatron.replaced import replaced
from dsv3_megatron.precision.weight_gradients import embedding

_FUNCTIONS = types.SimpleNamespace(embedding=embedding)


class VocabParallelEmbedding(layers.VocabParallelEmbedding):
    """Rows of a matrix whose rows are over TP ranks."""

    def forward(self, input_: Tensor) -> Tensor:
        """Return the embeddings of tokens [B, S].

        megatron-core's own forward looks them up with ``F.embedding``, the one name of ``F`` it uses (0.16.1); can go
        when the lookup is a method.
        """
        with replaced(layers, "F", _FUNCTIONS):
            return super().forward(input_)
