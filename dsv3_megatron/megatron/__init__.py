"""What megatron-core needs adapted, from outside, for one version."""
