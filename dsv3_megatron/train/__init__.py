"""Training: from a recipe and a world to a finished run."""
