"""The share of a run's time that failures leave: what saves cost, how often to save, what is lost."""
