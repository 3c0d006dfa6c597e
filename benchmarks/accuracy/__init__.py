"""What each learner reaches: its recipe trained, and tested once, row by row.

`python -m benchmarks.accuracy` fills the table and can be stopped and started again: a run goes on from its checkpoint,
a row that is there is not computed again unless its recipe changed (`measured/` has its numbers). Files: `rows.py`
(which recipes, and the papers' figures), `run.py` (one row), `table.py` (Markdown), `__main__.py`.
"""
