"""Commands over data, and what they share."""
