"""Numbers of a run for who watches the cluster: Ray's gauges and counters, for Prometheus `ray_raymeta_*`."""

from __future__ import annotations

from collections.abc import Mapping

from ray.util.metrics import Counter, Gauge

from raymeta.workers.pool import StepTimings

GAUGES = {
    "outer_step": "Outer steps done.",
    "tasks_per_second": "Tasks per second of the latest outer step.",
    "train_loss": "Mean query loss over the tasks of the latest outer step.",
    "validation_metric": "Mean of the latest validation's metric.",
}
PARTS = ("broadcast", "compute", "gather", "add", "update")


class Gauges:
    """Made once Ray is there; they end with the process, or with its connection."""

    def __init__(self) -> None:
        self._gauges = {name: Gauge(f"raymeta_{name}", description=text) for name, text in GAUGES.items()}
        self._seconds = Gauge(
            "raymeta_step_seconds",
            description=f"Seconds of the latest outer step by part ({', '.join(PARTS)}; compute: the slowest worker).",
            tag_keys=("part",),
        )
        self.restarts = Counter("raymeta_worker_restarts_total", description="Workers that were lost and set up again.")
        self.stragglers = Counter(
            "raymeta_stragglers_total", description="Calls whose work went to other workers as well."
        )

    def show(self, values: Mapping[str, float]) -> None:
        """Set those of `GAUGES` that are in `values`."""
        for name, value in values.items():
            self._gauges[name].set(value)

    def show_step(self, timings: StepTimings, update_seconds: float) -> None:
        """Set the seconds of a step's parts."""
        slowest = max(timings.compute_seconds.values(), default=0.0)
        seconds = (timings.broadcast_seconds, slowest, timings.gather_seconds, timings.add_seconds, update_seconds)
        for part, value in zip(PARTS, seconds, strict=True):
            self._seconds.set(value, tags={"part": part})
