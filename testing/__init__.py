"""Stand-ins for what a test machine has not. Each folder's README lists what its stand-in does not imitate."""
