"""The training regime (phases over tokens consumed) and the optimizer."""
