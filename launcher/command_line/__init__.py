"""What the commands share: arguments, recipes and their schema, help, the console, the end of a rank."""
