"""Kernels of our own for a CPU, in C, built where they run: `task_kernels.c`.

`library` builds and loads them, `operators` calls them as operations of torch, `layers` makes them differentiable.
"""
