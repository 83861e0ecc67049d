"""A pipeline schedule as data, and what executes, times, proves and draws it."""
