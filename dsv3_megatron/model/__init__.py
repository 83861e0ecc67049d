"""The model: settings, megatron-core specs, stages, leaf modules of both backends, exact costs."""
