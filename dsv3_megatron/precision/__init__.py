"""Number formats: which tensor is held and multiplied in which."""
