"""`raymeta tune`, `raymeta profile` and `raymeta recipes`: which settings to run with."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from raymeta.cli.group import commands, overrides_of, source_and_overrides
from raymeta.cli.signals import Stopped
from raymeta.errors import InputError


@commands.command()
@click.argument("file", metavar="FILE.yaml")
@click.argument("overrides", nargs=-1, metavar="[section.key=value ...]")
@click.option("--run-dir", help="Where the search's files go: a new directory, or a URI. Default: runs/FILE-TIME.")
@click.option("--resume", is_flag=True, help="Go on with the search there, where there is one (unpickles: trust it).")
def tune(file: str, overrides: tuple[str, ...], run_dir: str | None, resume: bool) -> None:
    """Search for settings: many meta-trainings, by the blocks run, search and tune of a file."""
    from raymeta import build
    from raymeta.tune import outcome, plan

    search = plan.load_plan(file, overrides_of(overrides))
    place = run_dir or search.tune.storage
    if place is None and resume:
        raise InputError("--resume needs --run-dir (or tune.storage in the file): the search to go on with")
    directory = build.lasting_run_dir(place or f"runs/{Path(file).stem}-{time.strftime('%Y%m%d-%H%M%S')}")
    objective = plan.check(search)
    from raymeta.tune.search import run_search  # ray takes a second to import: not for a file that is refused

    Console(stderr=True).print(f"search directory {directory}", highlight=False, soft_wrap=True)
    found = run_search(search, objective, directory, resume)
    if found.signal is not None:
        raise Stopped(found.signal)
    print(outcome.counts(found.trials))
    for trial in found.trials:
        if trial.state == "failed":
            print(f"  trial {trial.name} failed: {trial.error}")
    best = outcome.ranked(found.trials, objective)[0]
    Console(width=None if sys.stdout.isatty() else 160).print(outcome.table(found.trials, objective))
    print(f"best settings: {directory}/best.yaml (raymeta train takes it)")
    print(f"best checkpoint: {best.checkpoint} (raymeta evaluate takes it, with --checkpoint {best.outer_step})")
    print(f"picture: {directory}/search.svg")


@commands.command()
@click.argument("arguments", nargs=-1, metavar="[RECIPE | FILE.yaml] [section.key=value ...]")
@click.option("--seconds", default=3.0, show_default=True, help="Time for each candidate.")
@click.option("--compile", "try_compile", is_flag=True, help="Try algorithm.compile, too: tens of seconds to compile.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def profile(arguments: tuple[str, ...], seconds: float, try_compile: bool, as_json: bool) -> None:
    """Measure what a chunk of tasks costs here with other settings, and where its time goes."""
    from raymeta import build, profiling
    from raymeta.config import DEFAULT_RECIPE, load_config
    from raymeta.profile_text import table, where
    from raymeta.workers.device import choose_device

    source, overrides = source_and_overrides(arguments)
    config = load_config(source or DEFAULT_RECIPE, overrides)
    settings = _settings_of_a_worker(config.workers)
    workers = _workers_here(config.workers, choose_device(settings.device).type)
    parts = build.check(config)
    with Console(stderr=True).status("measuring") as status:
        found = profiling.profile(
            parts,
            build.first_params(config, parts),
            config.outer,
            config.chunk_tasks,
            workers,
            settings,
            seconds,
            try_compile,
            lambda candidate: status.update(f"{candidate.settings()}: {1e3 * candidate.chunk_seconds:.1f} ms a chunk"),
        )
    if as_json:
        print(json.dumps(found.to_dict()))
        return
    Console(width=None if sys.stdout.isatty() else 140).print(table(found))
    print("\n".join(where(found)))


def _settings_of_a_worker(section: Any) -> Any:
    """What a worker of the `workers` section computes with; one that Ray gives no GPU computes on the CPU."""
    from raymeta.workers import WorkerSettings

    device = "cpu" if section.gpus_per_worker == 0 else section.device
    return WorkerSettings(section.threads, device, section.deterministic)


def _workers_here(section: Any, device: str) -> int:
    """How many workers this machine has room for, where the section does not say: by GPUs, or else by cores."""
    import torch

    if section.backend == "local" or section.count is not None:
        return section.count or 1
    if device == "cuda":
        return max(1, int(torch.cuda.device_count() / (section.gpus_per_worker or 1)))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // section.threads)


@commands.command()
def recipes() -> None:
    """List the recipes that ship, by family of their learner, one line each."""
    from raymeta.config import recipe_descriptions, recipes_by_family

    descriptions = recipe_descriptions()
    width = max(map(len, descriptions))
    for place, (family, names) in enumerate(recipes_by_family().items()):
        print(f"{chr(10) if place else ''}{family}")
        for name in names:
            print(f"  {name:<{width}}  {descriptions[name]}")
