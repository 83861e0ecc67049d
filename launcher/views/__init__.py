"""What launcher/plan.py shows: one file per view."""
