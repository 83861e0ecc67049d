"""Router load: its balance, its measure, and what steers it."""
