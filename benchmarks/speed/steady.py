"""Which tasks a workload takes: those whose gradient is not within rounding of a jump.

A meta-gradient jumps where a unit of a ReLU changes sides in the support set: one unit of the last block is 1e-3 of a
step's sum. Among the tasks drawn some are within float32's rounding of such a jump, and no two correct programs agree
there. `python -m benchmarks.speed.steady [WORKLOAD ...]` moves the weights by rounding-sized steps in float64, keeps
the tasks whose gradient moves least, and writes their numbers to `steady_tasks.json`. How long a step takes does not
depend on the choice.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import Tensor

FILE = Path(__file__).with_name("steady_tasks.json")
CANDIDATES = 3.0  # for each task that is kept
MOVES = 6
RELATIVE_SIZE = 3e-6  # of a move; float32 rounds by 6e-8, sums of some hundred products, twice, by tens of that


def steady_tasks(name: str) -> list[int]:
    """The numbers of the workload's tasks, as `steady_tasks.json` has them."""
    numbers: list[int] = json.loads(FILE.read_text(encoding="utf-8"))[name]
    return numbers


def find(name: str) -> list[int]:
    """The steadiest tasks of the workload, in increasing order."""
    from benchmarks.speed.reference import task_gradient
    from benchmarks.speed.workloads import WORKLOADS, problem

    chosen = WORKLOADS[name]
    exact = problem(chosen, torch.float64, numbers=range(round(CANDIDATES * chosen.tasks)))
    weights = exact.params()
    random = torch.Generator().manual_seed(0)
    moved = [
        {n: v * (1 + RELATIVE_SIZE * torch.randn(v.shape, generator=random, dtype=v.dtype)) for n, v in weights.items()}
        for _ in range(MOVES)
    ]
    changes = []
    for place in range(len(exact.batch)):
        at_start = _flat(task_gradient(exact, weights, place))
        found = [_flat(task_gradient(exact, each, place)) - at_start for each in moved]
        changes.append(float(torch.stack([change.norm() for change in found]).max() / at_start.norm()))
    order = sorted(range(len(changes)), key=lambda place: changes[place])
    kept = order[: chosen.tasks]
    print(f"{name}: kept {changes[kept[0]]:.1e} .. {changes[kept[-1]]:.1e}, left out up to {changes[order[-1]]:.1e}")
    return sorted(kept)


def _flat(gradients: list[Tensor]) -> Tensor:
    return torch.cat([gradient.reshape(-1) for gradient in gradients])


def main(names: list[str]) -> None:
    known: dict[str, list[int]] = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
    for name in names:
        known[name] = find(name)
        FILE.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    from benchmarks.speed.workloads import WORKLOADS

    main(sys.argv[1:] or list(WORKLOADS))
