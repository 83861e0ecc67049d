"""The torch backend's leaf modules, and what they do to activations on the way."""
