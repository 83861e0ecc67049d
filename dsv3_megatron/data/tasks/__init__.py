"""Multiple-choice tasks: read from a file, made into what a model scores, and counted."""
