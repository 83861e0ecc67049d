"""What the files of a checkpoint say, read as data that somebody else may have made."""
