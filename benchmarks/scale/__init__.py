"""What a step's parts take as workers and parameters grow, on one machine: `python -m benchmarks.scale`.

Files: `local.py` (one step and its parts), `reach.py` (two workers against one; what driver and Ray add), `predict.py`
(tasks per second of larger clusters, from the parts), `__main__.py` (the command and its page); beside them
`python -m benchmarks.scale.network`, with `links.py` (machines in network namespaces).
"""
