"""Kernels of our own for a CPU, in C, built where they run.

`library` builds and loads them, `calls` calls them and makes operations of torch of them, `operators` and `layer_norm`
have these, `layers` makes them differentiable.
"""
