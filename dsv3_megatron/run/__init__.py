"""The directory of a run: its files, and who may write there."""
