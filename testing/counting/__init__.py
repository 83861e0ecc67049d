"""Counts what a rank asks of the file system, the rendezvous store, the network and the host's memory, by phase."""
