"""Which source every sample of a run comes from."""
