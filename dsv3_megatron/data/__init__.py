"""From text to batches: tokenizer, sources, order of samples."""
