"""Kernels and layers that know the task dimension: what the engine lowers a user's module to."""
