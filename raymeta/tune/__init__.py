"""Searches with Ray Tune, `raymeta tune FILE.yaml`: many meta-trainings, each with workers of its own.

From the file to what it leaves: plan.py (the file, checked), space.py (distributions), placement.py (what a trial
reserves), search.py (Ray Tune), trial.py (one meta-training), outcome.py and picture.py (what was found).
"""
