"""From files of text to shards of tokens."""
