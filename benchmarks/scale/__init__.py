"""What a step's parts take as workers and parameters grow, on one machine: `python -m benchmarks.scale`.

Files: `local.py` (the measurement), `__main__.py` (the command).
"""
