"""The peers by name, and what each needs to take part."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from benchmarks.speed.peers.func_vmap import FuncVmap, FuncVmapKept
from benchmarks.speed.peers.matrix_products import MatrixProducts
from benchmarks.speed.peers.peer import Peer
from benchmarks.speed.peers.raymeta_pools import OneProcess, RayWorkers
from benchmarks.speed.peers.task_loops import CloneAndUpdate, Higher, TorchOpt
from benchmarks.speed.process import Order
from benchmarks.speed.workloads import Problem

# How far off a gradient may be in low precision, as a part of what the workload allows in bfloat16. TF32 has three bits
# more; as units change sides at random, an eighth of the rounding makes about a third of the difference (not measured).
LOW_PRECISION = {"tf32": 0.5, "bfloat16": 1.0}


@dataclass(frozen=True)
class PeerEntry:
    """How the table knows a peer.

    Attributes:
        title: what the table calls it.
        make: (problem, what was ordered) -> the peer.
        kind: "library" (the ratios' "fastest library"), "vmap", "allocator", "jax", "raymeta" or "measure".
        package: what must be installed for it; None: nothing beyond raymeta.
        models: the models that it is written for; None: any.
        devices: where it has a row.
        of_bfloat16: the part of the workload's `bfloat16_tolerance` that it may differ by; 0: what float32 may.
    """

    title: str
    make: Callable[[Problem, Order], Peer]
    kind: str
    package: str | None = None
    models: tuple[str, ...] | None = None
    devices: tuple[str, ...] = ("cpu", "cuda")
    of_bfloat16: float = 0.0

    def missing(self, device: str) -> str:
        """What it lacks to compute on this device, as the table says it; "": nothing."""
        if self.package is not None and importlib.util.find_spec(self.package) is None:
            return "not installed"
        if self.kind == "jax" and device == "cuda":
            from benchmarks.speed.peers.jax_patches import has_gpu  # imports jax

            return "" if has_gpu() else "this JAX has no GPU"
        return ""


def _jax(problem: Problem, order: Order) -> Peer:
    from benchmarks.speed.peers.jax_patches import JaxPatches  # imports jax

    return JaxPatches(problem)


CPU, GPU = ("cpu",), ("cuda",)
PEERS: dict[str, PeerEntry] = {
    "higher": PeerEntry("higher, task loop", lambda problem, _: Higher(problem), "library", "higher"),
    "torchopt": PeerEntry("TorchOpt, task loop", lambda problem, _: TorchOpt(problem), "library", "torchopt"),
    "clone-update": PeerEntry("learn2learn's task loop", lambda problem, _: CloneAndUpdate(problem), "library"),
    "vmap": PeerEntry("torch.func vmap", lambda problem, _: FuncVmap(problem), "vmap"),
    "vmap-kept": PeerEntry(
        "torch.func vmap, raymeta's allocator settings",
        lambda problem, _: FuncVmapKept(problem),
        "allocator",
        devices=CPU,
    ),
    "jax": PeerEntry("JAX jit, best form", _jax, "jax", "jax"),
    "raymeta": PeerEntry("raymeta, 1 process", OneProcess, "raymeta"),
    "raymeta-workers": PeerEntry("raymeta, Ray workers of 1 thread", RayWorkers, "raymeta", devices=CPU),
    "raymeta-compiled": PeerEntry(
        "raymeta, 1 process, algorithm.compile=true", partial(OneProcess, compile=True), "raymeta", models=("mlp",)
    ),
    **{
        f"raymeta-{precision}": PeerEntry(
            f"raymeta, 1 process, algorithm.precision={precision}",
            partial(OneProcess, precision=precision),
            "raymeta",
            devices=GPU,
            of_bfloat16=part,
        )
        for precision, part in LOW_PRECISION.items()
    },
    "matrix-products": PeerEntry("matrix products", lambda _, order: MatrixProducts(order.device), "measure"),
}
