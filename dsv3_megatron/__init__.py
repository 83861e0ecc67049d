"""The DeepSeek-V3 model, its data, training regime and trainer, on megatron-core."""
