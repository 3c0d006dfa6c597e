"""Benchmarks of raymeta: each folder is one, run by `python -m benchmarks.<folder>` from the repository's root."""
