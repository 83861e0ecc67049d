"""Whether the nodes of a job are fit for a run: looked at, measured and compared before it starts."""
