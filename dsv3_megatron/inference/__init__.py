"""A trained model in one process: text from it."""
