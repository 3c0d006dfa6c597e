"""What several commands print."""

from __future__ import annotations

from typing import Any

STATISTICS = {
    "batch": "batch statistics of the queries (transductive)",
    "support": "statistics of the support set (inductive)",
}


def print_summaries(found: dict[str, Any], first: str) -> None:
    """A line for each kind of statistics, `first` before the other; one where the model has no batch norms."""
    from raymeta.metrics import shown_metric

    kinds = sorted(STATISTICS, key=lambda kind: kind != first)
    alike = all(
        found[kinds[0]][name] == found[kinds[1]][name] or found[kinds[0]][name] != found[kinds[0]][name]  # nan
        for name in ("mean", "ci95", "loss")
    )
    for kind in kinds[:1] if alike else kinds:
        one = found[kind]
        print(
            f"  {shown_metric(one['metric'], one['mean'], one['ci95'])}  on {one['episodes']:,} {one['split']} tasks"
            f"{_drawn_from(one)}, {_adaptation(one)}" + ("" if alike else f", {STATISTICS[kind]}")
        )


def _drawn_from(found: dict[str, Any]) -> str:
    """Of a source that has so many tasks, and draws their rows anew."""
    return f" drawn from {found['drawn_from']:,}" if "drawn_from" in found else ""


def _adaptation(found: dict[str, Any]) -> str:
    steps = found["inner_steps"]
    return "no inner steps" if not steps else f"{steps} inner step{'s' if steps > 1 else ''}"


def protocol(source: Any) -> str:
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
