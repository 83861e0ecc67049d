"""A GPU of straw: fake tensors on ``cuda:LOCAL_RANK`` and process groups that move nothing (README.md)."""
