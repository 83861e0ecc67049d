"""What a user types: compose a recipe, call the packages below, report."""
