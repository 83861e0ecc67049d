"""The model's stages on the pipeline: how layers are split, in which order they run, and what one does."""
