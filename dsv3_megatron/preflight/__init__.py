"""What a recipe is refused for before a process group, data or a model exists."""
