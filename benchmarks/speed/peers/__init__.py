"""The peers by name, and what each needs installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.speed.peers.func_vmap import FuncVmap, FuncVmapKept
from benchmarks.speed.peers.matrix_products import MatrixProducts
from benchmarks.speed.peers.peer import Peer
from benchmarks.speed.peers.raymeta_pools import Compiled, OneProcess, RayWorkers
from benchmarks.speed.peers.task_loops import CloneAndUpdate, Higher, TorchOpt
from benchmarks.speed.workloads import Problem


@dataclass(frozen=True)
class PeerEntry:
    """How the table knows a peer.

    Attributes:
        title: what the table calls it.
        make: (problem, the workload's name, whether it is the quick one, threads) -> the peer.
        kind: "library" (the ratios' "fastest library"), "vmap", "jax" or "raymeta".
        package: what must be installed for it; None: nothing beyond raymeta.
        models: the models that it is written for; None: any.
    """

    title: str
    make: Callable[[Problem, str, bool, int], Peer]
    kind: str
    package: str | None = None
    models: tuple[str, ...] | None = None

    def installed(self) -> bool:
        return self.package is None or importlib.util.find_spec(self.package) is not None


def _jax(problem: Problem, name: str, quick: bool, threads: int) -> Peer:
    from benchmarks.speed.peers.jax_patches import JaxPatches  # imports jax

    return JaxPatches(problem)


PEERS: dict[str, PeerEntry] = {
    "higher": PeerEntry("higher, task loop", lambda problem, *_: Higher(problem), "library", "higher"),
    "torchopt": PeerEntry("TorchOpt, task loop", lambda problem, *_: TorchOpt(problem), "library", "torchopt"),
    "clone-update": PeerEntry("learn2learn's task loop", lambda problem, *_: CloneAndUpdate(problem), "library"),
    "vmap": PeerEntry("torch.func vmap", lambda problem, *_: FuncVmap(problem), "vmap"),
    "vmap-kept": PeerEntry(
        "torch.func vmap, raymeta's allocator settings", lambda problem, *_: FuncVmapKept(problem), "allocator"
    ),
    "jax": PeerEntry("JAX jit, best form", _jax, "jax", "jax", ("conv4", "mlp")),
    "raymeta": PeerEntry("raymeta, 1 process", OneProcess, "raymeta"),
    "raymeta-workers": PeerEntry("raymeta, Ray workers of 1 thread", RayWorkers, "raymeta"),
    "raymeta-compiled": PeerEntry("raymeta, 1 process, algorithm.compile=true", Compiled, "raymeta", models=("mlp",)),
    "matrix-products": PeerEntry("matrix products", lambda *_: MatrixProducts(), "measure"),
}
