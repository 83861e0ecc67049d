"""Fuzzing what this program reads: a damaged file gives a right result or one line, soon and in little memory."""
