"""What a step measured, and who writes it down."""
