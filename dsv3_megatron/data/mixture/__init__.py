"""Which source every sample of a run comes from, and several sources as one."""
