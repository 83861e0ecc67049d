"""What a recipe file may hold: plain YAML, references to other keys, and nothing secret."""
