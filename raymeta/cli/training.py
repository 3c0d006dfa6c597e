"""`raymeta train` and `raymeta fit`."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from raymeta.cli.group import commands, source_and_overrides
from raymeta.cli.signals import Stopped, answered_signals
from raymeta.cli.text import print_summaries, protocol
from raymeta.errors import InputError

log = logging.getLogger("raymeta")


@commands.command()
@click.argument("arguments", nargs=-1, metavar="[RECIPE | FILE.yaml] [section.key=value ...]")
@click.option("--run-dir", help="Where the run's files go: a new directory, or a URI. Default: runs/RECIPE-TIME.")
@click.option("--resume", is_flag=True, help="Go on from the run directory's last checkpoint, where there is one.")
def train(arguments: tuple[str, ...], run_dir: str | None, resume: bool) -> None:
    """Meta-train. Without a recipe: omniglot-5w1s-maml."""
    from raymeta import build
    from raymeta.progress import RunProgress
    from raymeta.trainer import Interrupted

    config, directory = _config_and_directory(arguments, run_dir, resume)
    parts = build.check(config)
    directory.create(resume=resume)
    with directory:
        found = directory.load("latest") if resume and directory.steps() else None
        params = build.first_params(config, parts) if found is None else build.ordered_params(config, parts, found)
        console = Console(stderr=True)
        console.print(f"run directory {directory}", highlight=False, soft_wrap=True)
        pool = build.make_pool(config)
        # After the pool: ray.init puts a handler of its own in place.
        with pool, answered_signals() as stop:
            trainer = build.make_trainer(config, parts, pool, directory, params)
            if resume:
                trainer.resume(found)
                if found is None:
                    log.info("no checkpoint to resume from: starting with the first outer step")
                else:
                    log.info("resuming after outer step %d", trainer.step_number)
            config = build.settled(config, parts, params, pool)
            directory.write_config(config.resolved())
            _say_what_runs(console, config, pool, trainer)
            _say_precision(console, config, pool, trainer)
            with RunProgress(
                config.outer.steps, trainer.step_number, config.outer.tasks_per_step, trainer.metric, console
            ) as progress:
                try:
                    test = trainer.fit(progress.on_record, stop)
                except Interrupted as interrupted:
                    console.print(
                        f"stopped after step {interrupted.step}; the same command with --run-dir {directory} --resume "
                        "goes on from there",
                        highlight=False,
                        soft_wrap=True,
                    )
                    raise Stopped(interrupted.signal) from None
    _print_test(test, config, parts)
    print(f"run directory: {directory}")


def _config_and_directory(arguments: Sequence[str], run_dir: str | None, resume: bool) -> tuple[Any, Any]:
    """What `train` is to run, and where; a run that is resumed without a recipe has its own configuration."""
    from raymeta import build
    from raymeta.config import DEFAULT_RECIPE, load_config, require_resumable
    from raymeta.run_directory import RunDirectory

    source, overrides = source_and_overrides(arguments)
    if run_dir is None:
        run_dir = _overridden_run_dir(overrides)
    there = RunDirectory(build.lasting_run_dir(run_dir)) if run_dir else None
    if source is None and resume and there is not None and there.has_config():
        config = load_config(there.read_config(), overrides)
    else:
        config = load_config(source or DEFAULT_RECIPE, overrides)
    place = run_dir or config.run_dir
    if place is None:
        if resume:
            raise InputError("--resume needs --run-dir (or run_dir in the configuration): the run to go on with")
        name = Path(source or DEFAULT_RECIPE).stem
        place = f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    directory = RunDirectory(build.lasting_run_dir(place))
    if resume and directory.has_config() and directory.steps():
        before = directory.read_config()
        config = build.settled_as(config, before)
        require_resumable(before, config.resolved(), str(directory))
    return config, directory


def _overridden_run_dir(overrides: Sequence[str]) -> str | None:
    """The last `run_dir=...`; None where there is none, or none that is a text (`load_config` refuses all but null)."""
    from raymeta import yaml_text

    text = next((text.partition("=")[2] for text in reversed(overrides) if text.startswith("run_dir=")), "")
    value = yaml_text.parse(text, f"the value of 'run_dir={text}'")
    return value if isinstance(value, str) else None


def _say_what_runs(console: Console, config: Any, pool: Any, trainer: Any) -> None:
    device = pool.reports[0].device
    console.print(
        f"{config.tasks.name}, {config.model.name} ({trainer.layout.size:,} parameters), {config.algorithm.name}: "
        f"{config.outer.steps:,} steps of {config.outer.tasks_per_step} tasks on {pool.workers} "
        f"{config.workers.backend} worker{'s' if pool.workers > 1 else ''} ({device}, {config.workers.threads} "
        f"thread{'s' if config.workers.threads > 1 else ''} each, chunks of {config.chunk_tasks} tasks"
        f"{', native kernels' if pool.reports[0].kernels == 'native' else ''})",
        highlight=False,
        soft_wrap=True,
    )


def _say_precision(console: Console, config: Any, pool: Any, trainer: Any) -> None:
    """Mixed precision is never used without its error beside it."""
    from raymeta.precision import TASKS, gradient_error

    precision = config.algorithm.arguments.get("precision", "float32")
    if precision == "float32":
        return
    error = gradient_error(pool, trainer.flat)
    console.print(
        f"precision {precision}: the meta-gradient of the first {TASKS} tasks differs from float32's by "
        f"{100 * error:.2f} % of its norm",
        highlight=False,
        soft_wrap=True,
    )
    if all(record.get("kind") != "precision" for record in trainer.run.read_metrics()):  # else it is a resumed run's
        trainer.run.append_metrics({"step": trainer.step_number, "kind": "precision", "gradient_error": error})


def _print_test(test: dict[str, Any], config: Any, parts: Any) -> None:
    print(f"\ntest, {protocol(parts.evaluation_source)}, checkpoint of step {test['step']} (chosen by validation)")
    print_summaries(test, config.evaluation.statistics)


@commands.command()
@click.argument("arguments", nargs=-1, metavar="RECIPE | FILE.yaml [section.key=value ...]")
@click.option("--output", required=True, help="The data set of fits: a directory, or a URI. One that is there grows.")
@click.option("--tasks", type=click.IntRange(min=1), default=10_000, show_default=True, help="How many to have in all.")
def fit(arguments: tuple[str, ...], output: str, tasks: int) -> None:
    """Fit training tasks one by one, for a learner that predicts a task's parameters from its data.

    `raymeta train` then learns by them: algorithm.supervision=both algorithm.fits=DIR. The same command goes on where
    it stopped; a larger --tasks adds to what is there.
    """
    from raymeta import build
    from raymeta.config import load_config
    from raymeta.fits import make_fits, read_fits
    from raymeta.params import ParameterLayout

    source, overrides = source_and_overrides(arguments)
    if source is None:
        raise InputError("name the recipe or file whose tasks are to be fitted, such as sinusoid-10s-amortised")
    config = load_config(source, overrides)
    if not build.is_learned_map(config):
        raise InputError(
            f"algorithm.name={config.algorithm.name} predicts no parameters, so that nothing is to be fitted; expected "
            "amortised or amortised_head"
        )
    place = build.lasting_run_dir(output)
    config = load_config(source, [*overrides, "algorithm.supervision=query", "algorithm.fits=null"])
    parts = build.check(config)
    params = build.first_params(config, parts)
    console, started = Console(stderr=True), time.monotonic()

    def say(done: int, of: int, fits: Any) -> None:
        loss = sum(fit.loss for fit in fits) / len(fits)
        seconds = time.monotonic() - started
        console.print(f"{done:,}/{of:,} tasks after {seconds:.0f} s, loss {loss:.4g}", highlight=False)

    with build.make_pool(config) as pool, answered_signals() as stop:
        about = build.about_fits(parts.source, parts.learner, params)  # type: ignore[arg-type]
        flat = ParameterLayout.of(params).flatten(params)
        make_fits(pool, flat, place, about, tasks, say, stop=lambda: stop() is not None)
        signalled = stop()
    if signalled is not None:
        console.print(f"stopped; the same command goes on from the fits that are in {place}", highlight=False)
        raise Stopped(signalled)
    found = read_fits(place)
    tolerance = config.algorithm.arguments["fit_tolerance"]
    print(f"{len(found.tasks):,} fits of {found.parameters.shape[1]:,} parameters in {place}")
    print(
        f"  mean loss {found.first_loss.mean():.4g} at the start, {found.loss.mean():.4g} at the optima; "
        f"{100 * (found.gradient_norm <= tolerance).mean():.1f} % have converged (gradient at most {tolerance:g})"
    )
