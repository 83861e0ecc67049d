"""What the model makes of text that it is not trained on."""
