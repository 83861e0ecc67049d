"""Checkpoints to and from the Hugging Face format of the DeepSeek-V3 family."""
