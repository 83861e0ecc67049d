"""Small trainings that tests and benchmarks run on ranks, and what they are compared by."""
