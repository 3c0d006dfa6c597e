"""The command line. Exit codes: 0 done; 1 the run failed; 2 the input was wrong; 128 + its number, so 130 or 143:
stopped by a signal, after a checkpoint (by a second one: at once). Results go to stdout; progress, logs and errors to
stderr."""

from __future__ import annotations

import json
import logging
import os
import signal
import statistics
import sys
import time
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from raymeta import __version__
from raymeta.errors import InputError, RunError

EXIT_FAILED, EXIT_INPUT = 1, 2

log = logging.getLogger("raymeta")


class Stopped(Exception):
    """A run ended on a signal, after its checkpoint."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class StoppedAtOnce(Stopped):
    """A second signal came: the run ended without a checkpoint for it."""


def main(arguments: Sequence[str] | None = None) -> None:
    """The console script `raymeta`."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    sys.exit(run(arguments))


def run(arguments: Sequence[str] | None = None) -> int:
    """The exit code of one command."""
    try:
        commands(arguments, prog_name="raymeta", standalone_mode=False)
        sys.stdout.flush()  # a reader that is gone is met here, not when the interpreter ends
    except click.exceptions.NoArgsIsHelpError as error:
        error.show(sys.stderr)
        return EXIT_INPUT
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        hint = f" See `{context.command_path} --help`." if context is not None else ""
        print(f"raymeta: {error.format_message()}{hint}", file=sys.stderr)
        return EXIT_INPUT
    except InputError as error:
        print(f"raymeta: {error}", file=sys.stderr)
        return EXIT_INPUT
    except RunError as error:
        print(f"raymeta: {error}", file=sys.stderr)
        return EXIT_FAILED
    except (StoppedAtOnce, KeyboardInterrupt, click.Abort) as error:
        print("raymeta: interrupted; no checkpoint was written for it (earlier ones are kept)", file=sys.stderr)
        # click's Abort stands for a KeyboardInterrupt, its cause; Python's own has no number.
        return 128 + getattr(error.__cause__ or error, "number", signal.SIGINT)
    except Stopped as stopped:
        return 128 + stopped.number
    except BrokenPipeError:  # `raymeta recipes | head`: who read no longer does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    return 0


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="raymeta")
def commands() -> None:
    """Meta-learning on Ray: train on many small tasks a model that learns a new one from a few examples."""


@contextmanager
def answered_signals() -> Iterator[Callable[[], int | None]]:
    """While inside, SIGINT and SIGTERM are remembered for the run to stop with a checkpoint; a second one is not
    waited for. Gives the function that tells which came.

    Raises:
        StoppedAtOnce: a second one came.
    """
    seen: list[int] = []

    def remember(number: int, frame: types.FrameType | None) -> None:
        seen.append(number)
        if len(seen) > 1:
            raise KeyboardInterrupt  # the one exception that passes through a call of ray's; its arguments do not
        log.warning("%s: stopping, with a checkpoint of the steps that are done", signal.Signals(number).name)

    before = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: seen[0] if seen else None
    except KeyboardInterrupt:
        if len(seen) > 1:
            raise StoppedAtOnce(seen[-1]) from None
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
        params = build.first_params(config, parts) if found is None else found.params
        console = Console(stderr=True)
        console.print(f"run directory {directory}", highlight=False, soft_wrap=True)
        pool = build.make_pool(config)
        # After the pool: ray.init puts a handler of its own in place.
        with pool, answered_signals() as stop:
            trainer = build.make_trainer(config, parts, pool, directory, params)
            if resume:
                trainer.resume(found)
                log.info("resuming after outer step %d", trainer.step_number)
            config = build.with_chunks(config, parts, params, pool)
            directory.write_config(config.resolved())
            _say_what_runs(console, config, pool, trainer)
            _say_precision(console, config, parts, trainer)
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

    source, overrides = _source_and_overrides(arguments)
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
        if config.chunk_tasks is None:  # by rule, and the rule's word is that run's
            config = replace(config, chunk_tasks=before["algorithm"]["chunk_tasks"])
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
        f"thread{'s' if config.workers.threads > 1 else ''} each, chunks of {config.chunk_tasks} tasks)",
        highlight=False,
        soft_wrap=True,
    )


def _say_precision(console: Console, config: Any, parts: Any, trainer: Any) -> None:
    """Mixed precision is never used without its error beside it."""
    from raymeta.precision import TASKS, gradient_error

    precision = config.algorithm.arguments.get("precision", "float32")
    if precision == "float32":
        return
    error = gradient_error(parts, trainer.params)
    console.print(
        f"precision {precision}: the meta-gradient of the first {TASKS} tasks differs from float32's by "
        f"{100 * error:.2f} % of its norm",
        highlight=False,
        soft_wrap=True,
    )
    if all(record.get("kind") != "precision" for record in trainer.run.read_metrics()):  # else it is a resumed run's
        trainer.run.append_metrics({"step": trainer.step_number, "kind": "precision", "gradient_error": error})


def _print_test(test: dict[str, Any], config: Any, parts: Any) -> None:
    print(f"\ntest, {_protocol(parts.evaluation_source)}, checkpoint of step {test['step']} (chosen by validation)")
    _print_summaries(test, config.evaluation.statistics)


def _print_summaries(found: dict[str, Any], first: str) -> None:
    """A line for each kind of statistics, `first` before the other; one where the model has no batch norms."""
    from raymeta.metrics import shown_metric

    kinds = sorted(STATISTICS, key=lambda kind: kind != first)
    alike = all(found[kinds[0]][name] == found[kinds[1]][name] for name in ("mean", "ci95", "loss"))
    for kind in kinds[:1] if alike else kinds:
        one = found[kind]
        print(
            f"  {shown_metric(one['metric'], one['mean'], one['ci95'])}  on {one['episodes']:,} {one['split']} tasks, "
            f"{_adaptation(one)}" + ("" if alike else f", {STATISTICS[kind]}")
        )


STATISTICS = {
    "batch": "batch statistics of the queries (transductive)",
    "support": "statistics of the support set (inductive)",
}


def _adaptation(found: dict[str, Any]) -> str:
    steps = found["inner_steps"]
    return "no inner steps" if not steps else f"{steps} inner step{'s' if steps > 1 else ''}"


def _protocol(source: Any) -> str:
    """Ways, shots, queries, rotations and split of a task source, as far as it has them."""
    from raymeta.tasks.class_episodes import ClassEpisodes

    if isinstance(source, ClassEpisodes):
        scheme = source.split_scheme or source.data.schemes[0]
        turns = {"none": "no rotations", "per_class": "a rotation per class", "classes": "rotations as classes"}
        return (
            f"{source.ways}-way {source.shots}-shot, {source.queries} queries per class, {turns[source.rotations]}, "
            f"split {scheme}"
        )
    values = [f"{getattr(source, name)} {name}" for name in ("shots", "queries") if hasattr(source, name)]
    return ", ".join(values) or type(source).__name__


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

    source, overrides = _source_and_overrides(arguments)
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


@commands.command()
@click.argument("run_dir")
@click.argument("overrides", nargs=-1, metavar="[section.key=value ...]")
@click.option("--split", type=click.Choice(["train", "validation", "test"]), default="test", show_default=True)
@click.option("--episodes", type=click.IntRange(min=1), default=1000, show_default=True, help="How many tasks.")
@click.option("--checkpoint", default="best", show_default=True, help="best, latest or a step.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
@click.option("--gaps", "with_gaps", is_flag=True, help="Also fit each task, and say how far off predictions are.")
def evaluate(
    run_dir: str,
    overrides: tuple[str, ...],
    split: str,
    episodes: int,
    checkpoint: str,
    as_json: bool,
    with_gaps: bool,
) -> None:
    """Evaluate a run's checkpoint on tasks of a split."""
    from raymeta import build
    from raymeta.algorithms.fitting import Gap, gaps
    from raymeta.checkpoint import without_non_finite
    from raymeta.config import load_config
    from raymeta.evaluation import evaluate as evaluate_split
    from raymeta.params import ParameterLayout
    from raymeta.run_directory import RunDirectory

    directory = RunDirectory(build.expand_run_dir(run_dir))
    config = load_config(directory.read_config(), _overrides(overrides))
    found = directory.load(checkpoint)
    parts = build.check(config)
    _, learner, params = build.trained(config, found.params, build.describe_source(parts.source))
    flat = ParameterLayout.of(params).flatten(params)
    settings = build.evaluation_settings(config)
    with build.make_pool(config) as pool:
        results = evaluate_split(pool, flat, split, episodes, learner.metric, settings.inner_steps)
        found_gaps = pool.map(gaps, flat, split, range(episodes)) if with_gaps else []
    gap = dict(zip(Gap._fields, map(statistics.fmean, zip(*found_gaps, strict=True)), strict=True)) if with_gaps else {}
    first = results[settings.statistics]
    other = results["support" if settings.statistics == "batch" else "batch"]
    if as_json:
        answer = {
            **first.summary(),
            "checkpoint": found.step,
            "protocol": _protocol(parts.evaluation_source),
            "other_statistics": other.summary(),
            "run_dir": str(directory),
            "seed": config.seed,
            **({"gaps": gap} if with_gaps else {}),
        }
        print(json.dumps(without_non_finite(answer), allow_nan=False))
        return
    print(f"{split}, {_protocol(parts.evaluation_source)}, checkpoint of step {found.step}")
    _print_summaries({kind: result.summary() for kind, result in results.items()}, settings.statistics)
    if with_gaps:
        print(
            "  predicted parameters: {distance:.4g} from the fitted optimum (the start: {first_distance:.4g}); "
            "query loss {loss:.4g}, at the optimum {optimum_loss:.4g}, at the start {first_loss:.4g}".format(**gap)
        )


@commands.command()
@click.argument("run_dir")
@click.option("--support", required=True, help="Rows to adapt to: Parquet, CSV or Arrow, or a folder of class folders.")
@click.option("--query", required=True, help="Rows to predict: likewise, labels not needed; or a folder of images.")
@click.option("--output", required=True, help="Predictions: a .csv, .parquet or .arrow file.")
@click.option("--label", default="label", show_default=True, help="The label column of a table.")
@click.option("--target", "targets", multiple=True, help="A numeric target column (once for each), for regression.")
@click.option("--id", "id_column", help="A column that names the rows.")
@click.option("--inner-steps", type=click.IntRange(min=0), help="Default: as in the run's evaluation.")
@click.option("--transductive", is_flag=True, help="Batch norms may see the query rows together.")
@click.option("--checkpoint", default="best", show_default=True, help="best, latest or a step.")
@click.option("--save", "save_path", help="Also write the fitted model to this file.")
def adapt(
    run_dir: str,
    support: str,
    query: str,
    output: str,
    label: str,
    targets: tuple[str, ...],
    id_column: str | None,
    inner_steps: int | None,
    transductive: bool,
    checkpoint: str,
    save_path: str | None,
) -> None:
    """Adapt a run's model to a support file and predict a query file."""
    from raymeta import adapted, build
    from raymeta.data import adapt_files, tables

    writer = adapt_files.prediction_writer(output)
    learner = adapted.load(build.expand_run_dir(run_dir), checkpoint)
    reading: dict[str, Any] = {
        "pixels": learner.description["images"],
        "invert": learner.description["inverted"],
        "label": label,
        "id_column": id_column,
    }
    if learner.regression:
        targets = targets or tuple(learner.description["targets"])
        if not targets:
            raise InputError("the model was trained on numeric targets; name their columns with --target")
        reading["targets"] = targets
    elif targets:
        raise InputError("--target is for regression, but the model was trained on classes; use --label")
    if tables.is_table(support):
        there, known = tables.table_schema(Path(support)).names, tuple(learner.description["features"])
        # In the order of training, whatever the order in this file; columns of other names count by their place.
        reading["features"] = known if set(known) & set(there) else None
    support_rows = adapt_files.read_support(support, learner.input_shape, **reading)
    reading["features"] = support_rows.features or None
    query_rows = adapt_files.read_query(query, learner.input_shape, **reading)
    y: Any = support_rows.targets if learner.regression else support_rows.labels
    fitted = learner.adapt(support_rows.x, y, inner_steps)
    predictions = fitted.predict(query_rows.x, transductive)
    columns: dict[str, Any] = {"row": list(query_rows.names)}
    if fitted.labels is None:
        columns |= {name: predictions[:, place] for place, name in enumerate(targets)}
    else:
        probabilities = fitted.predict_proba(query_rows.x, transductive)
        columns["prediction"] = predictions
        columns |= {f"probability_{name}": probabilities[:, place] for place, name in enumerate(fitted.labels)}
    writer(columns)
    print(f"{len(query_rows):,} predictions in {output}, adapted to {len(support_rows):,} rows of {support}")
    if fitted.labels is not None and query_rows.labels is not None:
        right = sum(a == b for a, b in zip(predictions.tolist(), query_rows.labels, strict=True))
        print(f"{right} of {len(query_rows):,} agree with the query file's own labels")
    if save_path:
        fitted.save(save_path)
        print(f"fitted model in {save_path}")


@commands.command()
@click.argument("run_dirs", nargs=-1, required=True, metavar="RUN_DIR...")
@click.option("--output", required=True, help="The page to write, NAME.html.")
def report(run_dirs: tuple[str, ...], output: str) -> None:
    """Write one HTML page about runs: tests, curves and settings side by side."""
    from raymeta.report import write_report

    write_report(run_dirs, output)
    print(f"{output}: {len(run_dirs)} run{'s' if len(run_dirs) > 1 else ''}")


@commands.group()
def data() -> None:
    """Make and look at stores of examples."""


@data.command("import")
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@click.option("--output", required=True, help="The store to make, NAME.arrow.")
@click.option("--kind", type=click.Choice(["auto", "omniglot", "images", "table"]), default="auto", show_default=True)
@click.option("--size", type=click.IntRange(min=1), help="Images: height and width to resize to.")
@click.option("--gray", is_flag=True, help="Images: one channel.")
@click.option("--invert", is_flag=True, help="Images: 255 - value, for dark ink on white paper.")
@click.option("--label", default="label", show_default=True, help="Table: the column of classes.")
@click.option("--feature", "features", multiple=True, help="Table: a feature column (once for each). Default: all.")
@click.option("--split-column", help="Table: the column with train, validation or test for each class.")
@click.option("--fractions", default="0.6,0.2,0.2", show_default=True, help="Of classes: train, validation, test.")
@click.option("--seed", default=0, show_default=True, help="Of the random split.")
def import_data(
    sources: tuple[str, ...],
    output: str,
    kind: str,
    size: int | None,
    gray: bool,
    invert: bool,
    label: str,
    features: tuple[str, ...],
    split_column: str | None,
    fractions: str,
    seed: int,
) -> None:
    """Make a store from the original Omniglot folders, a folder of class folders of images, or a table.

    Folders may be .zip files. --kind auto goes by what the sources hold.
    """
    from raymeta.data import importers, tables

    try:
        parts = tuple(float(part) for part in fractions.split(","))
    except ValueError:
        raise InputError(f"--fractions {fractions!r}; expected three numbers such as 0.6,0.2,0.2") from None
    if kind == "auto":
        kind = "table" if tables.is_table(sources[0]) else "omniglot" if importers.is_omniglot(sources) else "images"
    if kind == "omniglot":
        summary = importers.import_omniglot(sources, output, size=size or 28, fractions=parts, seed=seed)
    elif len(sources) > 1:
        raise InputError(f"--kind {kind} takes one SOURCE, got {len(sources)}; only --kind omniglot takes several")
    elif kind == "images":
        summary = importers.import_images(
            sources[0],
            output,
            size=size,
            color="grayscale" if gray else "rgb",
            invert=invert,
            fractions=parts,
            seed=seed,
        )
    else:
        summary = importers.import_table(
            sources[0], output, label=label, features=features or None, split_column=split_column,
            fractions=parts, seed=seed,
        )  # fmt: skip
    print("\n".join(summary.lines()))


@data.command()
@click.argument("store", default="omniglot")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
@click.option("--verify", is_flag=True, help="Read everything and compare the checksum.")
def info(store: str, as_json: bool, verify: bool) -> None:
    """Say what a store holds. Without a path: the Omniglot inside the package."""
    from raymeta.data.omniglot import open_omniglot
    from raymeta.data.store import Store
    from raymeta.data.summary import describe

    opened = open_omniglot() if store == "omniglot" else Store.open(Path(store).expanduser())
    if verify:
        opened.verify()
    summary = describe(opened)
    print(json.dumps(summary.to_dict()) if as_json else "\n".join(summary.lines()))


@commands.command()
@click.argument("file", metavar="FILE.yaml")
@click.argument("overrides", nargs=-1, metavar="[section.key=value ...]")
@click.option("--run-dir", help="Where the search's files go: a new directory, or a URI. Default: runs/FILE-TIME.")
@click.option("--resume", is_flag=True, help="Go on with the search there, where there is one (unpickles: trust it).")
def tune(file: str, overrides: tuple[str, ...], run_dir: str | None, resume: bool) -> None:
    """Search for settings: many meta-trainings, by the blocks run, search and tune of a file."""
    from raymeta import build
    from raymeta.tune import outcome, plan

    search = plan.load_plan(file, _overrides(overrides))
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

    source, overrides = _source_and_overrides(arguments)
    config = load_config(source or DEFAULT_RECIPE, overrides)
    parts = build.check(config)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    section = config.workers
    workers = 1 if section.backend == "local" else section.count or max(1, cores // section.threads)
    with Console(stderr=True).status("measuring") as status:
        found = profiling.profile(
            parts,
            build.first_params(config, parts),
            config.outer.tasks_per_step,
            config.chunk_tasks,
            workers,
            config.workers.threads,
            seconds,
            try_compile,
            lambda candidate: status.update(f"{candidate.settings()}: {1e3 * candidate.chunk_seconds:.1f} ms a chunk"),
        )
    if as_json:
        print(json.dumps(found.to_dict()))
        return
    Console(width=None if sys.stdout.isatty() else 140).print(table(found))
    print("\n".join(where(found)))


@commands.command()
def recipes() -> None:
    """List the recipes that ship, one line each."""
    from raymeta.config import recipe_descriptions

    descriptions = recipe_descriptions()
    width = max(map(len, descriptions))
    for name, description in descriptions.items():
        print(f"{name:<{width}}  {description}")


def _source_and_overrides(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """The recipe or file, if any, and the `section.key=value`s after it."""
    source = arguments[0] if arguments and "=" not in arguments[0] else None
    return source, _overrides(arguments[1:] if source is not None else arguments)


def _overrides(texts: Sequence[str]) -> list[str]:
    """The `section.key=value`s, checked to be such."""
    overrides = list(texts)
    for override in overrides:
        if "=" not in override:
            raise InputError(f"{override!r}: expected section.key=value here, such as outer.steps=1000")
    if "workers.backend=local" in overrides:
        # What a cluster needs and one process does not have, unless the same command says it.
        overrides = [*(f"workers.{name}=null" for name in ("count", "gpus_per_worker", "address")), *overrides]
    return overrides


if __name__ == "__main__":
    main()
