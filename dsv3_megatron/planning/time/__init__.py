"""Seconds that a step takes, by a roofline and a simulated schedule."""
