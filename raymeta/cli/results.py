"""`raymeta evaluate`, `raymeta adapt` and `raymeta report`: what a run has given."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import click

from raymeta.cli.group import commands, overrides_of
from raymeta.cli.text import print_summaries, protocol
from raymeta.errors import InputError


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
    from raymeta.config import load_config, to_predict
    from raymeta.evaluation import evaluate as evaluate_split
    from raymeta.params import ParameterLayout
    from raymeta.run_directory import RunDirectory

    directory = RunDirectory(build.expand_run_dir(run_dir))
    given = overrides_of(overrides)
    config = load_config(to_predict(directory.read_config()), given)
    found = directory.load(checkpoint)
    parts = build.check(config)
    same_data = build.same_data(config, parts.source, found.state.get("data"), given)
    _, learner, params = build.trained(config, found.params, build.describe_source(parts.source))
    flat = ParameterLayout.of(params).flatten(params)
    settings = build.evaluation_settings(config)
    with build.make_pool(config) as pool:
        results = evaluate_split(pool, flat, split, episodes, learner.metric, settings.inner_steps)
        found_gaps = pool.map(gaps, flat, split, range(episodes)) if with_gaps else []
    gap = dict(zip(Gap._fields, map(statistics.fmean, zip(*found_gaps, strict=True)), strict=True)) if with_gaps else {}
    if with_gaps:
        tolerance = config.algorithm.arguments["fit_tolerance"]
        gap["converged"] = statistics.fmean(one.gradient_norm <= tolerance for one in found_gaps)
    first = results[settings.statistics]
    other = results["support" if settings.statistics == "batch" else "batch"]
    if as_json:
        answer = {
            **first.summary(),
            "checkpoint": found.step,
            "protocol": protocol(parts.evaluation_source),
            "other_statistics": other.summary(),
            "run_dir": str(directory),
            "seed": config.seed,
            "same_data": same_data,
            **({"gaps": gap} if with_gaps else {}),
        }
        print(json.dumps(without_non_finite(answer), allow_nan=False))
        return
    print(f"{split}, {protocol(parts.evaluation_source)}, checkpoint of step {found.step}")
    print_summaries({kind: result.summary() for kind, result in results.items()}, settings.statistics)
    if same_data is False:
        print(
            "  other training tasks than the run's (tasks.*, seed): with another split or other data, tasks of this "
            "split may have been trained on"
        )
    if with_gaps:
        print(
            "  predicted parameters: {distance:.4g} from the fitted optimum (the start: {first_distance:.4g}); "
            "query loss {loss:.4g}, at the optimum {optimum_loss:.4g}, at the start {first_loss:.4g}\n"
            "  {converged:.1%} of the fits have converged".format(**gap)
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
