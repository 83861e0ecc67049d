"""Raw documents in files of many kinds, packed or not, whole or damaged."""
