"""The results as markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

Results = dict[str, Any]
MIB = 2**20
RAYMETA = ("raymeta", "raymeta-workers", "raymeta-compiled")


def markdown(results: Results) -> str:
    """The whole file."""
    parts = [_head(results)]
    if results["workloads"]:
        parts.append(_summary(results))
        parts += [_workload(results, row) for row in results["workloads"].values()]
    if results["memory"]:
        parts.append(_memory(results["memory"]))
    return "\n\n".join(parts) + "\n"


EXPLANATION = """
- A step is the exact second-order MAML gradient, summed over its tasks, float32, plain SGD inside, batch statistics. No
  outer update, and the tasks are drawn before. All start from the same weights and the same tasks.
- Every peer has {threads} threads and a process of its own; they take turns, and the figures are medians over all timed
  steps. The first step (imports, compiling, warming up) is not among them and is told apart; nor is the first of a
  turn, which finds the caches full of another peer's numbers.
- A gradient counts as right if no entry differs from a float64 reference by more than the bound that each table states,
  relative to the largest entry. No speed is printed for one that does not. The tasks are such as are not within
  rounding of a ReLU's kink, where no two programs agree (`benchmarks/speed/steady.py`).
- GFLOP/s count matrix products and convolutions of the plain loop (forward, backward, double backward; by
  `torch.utils.flop_counter`), whatever the peer really computes; beside it the share of the machine's own rate at
  2048 x 2048 float32 matrix products, which took turns too.
- Memory is the peak of the resident size during the timed steps less what was resident before anything was computed
  (libraries imported, weights and tasks there, worker processes started), added up over the processes that compute. So
  it holds what the steps need at once; what compiling or recording has left (programs, compiled code, the libraries'
  code that the first step loads: tens of MiB for each process, also where tensors are small); and freed memory that the
  allocator keeps, for raymeta on purpose and of all its warming up. JAX has given back what choosing its form took.
- `-`: not written for this peer.
"""
SUMMARY = """
Median milliseconds of a step; the last three columns say how many times as fast raymeta is, in 1 process / with Ray
workers / in 1 process with `algorithm.compile=true` (for small models). "Fastest library" is the fastest of higher,
TorchOpt and learn2learn's loop.
"""
MEMORY = """
Peak memory of one chunk's step. Flat stores the states s_0 .. s_k-1 (fast weights and the inner optimiser's own
variables) and is judged by the rest; unrolled is judged by the whole. `gradient differs by`: unrolled from flat, of the
largest entry, both in float32.
"""


def _head(results: Results) -> str:
    machine = results["machine"]
    quick = "A quick run: fewer tasks and repetitions than the table's.\n" if results["quick"] else ""
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    commands = ", then ".join(f"`{command}`" for command in results["commands"])
    return f"""# Speed and memory of meta-gradients

Written by {commands} on {results["date"]}, in {results["seconds"] / 60:.0f} minutes.
{quick}Machine: {machine["processor"]}, {machine["cores"]} cores of which {machine["threads"]} are used,
{machine["memory_gib"]} GiB, {machine["system"]}; load {machine["load_at_start"]} at the start.
Versions: {versions}.
{EXPLANATION.format(threads=machine["threads"]).rstrip()}"""


def _summary(results: Results) -> str:
    rows = []
    for row in results["workloads"].values():
        peers, catalogue = row["peers"], results["peers"]
        library = _fastest(peers, [name for name in peers if catalogue[name]["kind"] == "library"])
        others = [library, _fastest(peers, ["vmap"]), _fastest(peers, ["jax"])]
        own = [peers.get(name, {}).get("seconds") for name in RAYMETA]
        cells = [row["title"]]
        cells += [_milliseconds(peers[name]["seconds"]) if name else "-" for name in others]
        cells += [_milliseconds(seconds) for seconds in own]
        for name in others:
            ratios = [_ratio(peers[name]["seconds"] if name else None, seconds) for seconds in own]
            cells.append(" / ".join(ratios if own[-1] is not None else ratios[:-1]))
        rows.append(cells)
    head = ["workload", "fastest library", "vmap", "JAX", "raymeta, 1 process", "raymeta, Ray workers"]
    head += ["raymeta, compiled", "x library", "x vmap", "x JAX"]
    return f"## Summary\n{SUMMARY}\n{_table(head, rows)}"


def _fastest(peers: dict[str, Any], names: Iterable[str]) -> str | None:
    timed = [name for name in names if "seconds" in peers.get(name, {})]
    return min(timed, key=lambda name: peers[name]["seconds"], default=None)


def _workload(results: Results, row: dict[str, Any]) -> str:
    head = ["peer", "ms per step", "fastest - slowest", "steps", "tasks/s", "GFLOP/s", "of matmul", "peak MiB"]
    head += ["gradient differs by", "first step s"]
    rate = row["matmul_flop_per_second"]
    rows, notes = [], []
    if not row.get("untimed_first"):
        notes.append("Measured when the first step of a turn was timed too; a long step's figures are of such alone.")
    for name, peer in row["peers"].items():
        title = results["peers"][name]["title"]
        if "seconds" in peer:
            cells = [
                title,
                _milliseconds(peer["seconds"]),
                f"{_milliseconds(peer['fastest_seconds'])} - {_milliseconds(peer['slowest_seconds'])}",
                str(peer["steps"]),
                f"{peer['tasks_per_second']:.0f}",
                f"{peer['flop_per_second'] / 1e9:.1f}",
                f"{peer['flop_per_second'] / rate:.0%}",
                f"{peer['peak_bytes'] / MIB:.0f}",
                f"{peer['gradient_difference']:.0e}",
                f"{peer['first_seconds']:.1f}",
            ]
        elif peer["status"] == "differs":
            cells = [title, "gradient differs: not timed", *[""] * 6, f"{peer['gradient_difference']:.0e}", ""]
        else:
            cells = [title, peer["status"], *[""] * 8]
        rows.append(cells)
        if peer.get("note"):
            compiled = peer.get("compile_seconds")
            took = f"; this form took {compiled:.1f} s to compile" if compiled is not None else ""
            notes.append(f"{title}: {peer['note']}{took}.")
        if peer["status"] == "failed":
            notes.append(f"{title}: {peer['message'].splitlines()[-1]}")
    text = (
        f"{row['tasks']} tasks, {row['flop'] / 1e9:.2f} GFLOP a step; matrix products at {rate / 1e9:.0f} GFLOP/s; "
        f"gradients within {row['tolerance']:.0e}."
    )
    after = "\n\n" + "\n".join(f"- {note}" for note in notes) if notes else ""
    return f"## {row['title']}\n\n{text}\n\n{_table(head, rows)}{after}"


def _memory(cases: Sequence[dict[str, Any]]) -> str:
    found = {(c["model"], c["optimizer"], c["inner_steps"], c["memory"]): c for c in cases if c["status"] == "ok"}
    rows = []
    for (model, optimizer, steps, form), case in found.items():
        fewest = min(k for m, o, k, f in found if (m, o, f) == (model, optimizer, form))
        base, unrolled = found[model, optimizer, fewest, form], found.get((model, optimizer, steps, "unrolled"))
        rows.append(
            [
                f"{model}, {case['tasks']} tasks",
                optimizer,
                str(steps),
                form,
                f"{case['peak_bytes'] / MIB:.1f}",
                f"{case['state_bytes'] / MIB:.1f}",
                f"{_rest(case) / MIB:.1f}",
                f"{_rest(case) / _rest(base):.2f}"
                if form == "flat"
                else f"{case['peak_bytes'] / base['peak_bytes']:.2f}",
                _milliseconds(case["seconds"]),
                f"{case['seconds'] / unrolled['seconds']:.2f}" if unrolled else "-",
                f"{case['gradient_difference']:.0e}",
            ]
        )
    head = ["chunk", "inner rule", "inner steps", "form", "peak MiB", "stored states MiB", "the rest MiB"]
    head += ["against fewest steps", "ms", "time / unrolled", "gradient differs by"]
    failed = [
        f"- {c['model']}, {c['optimizer']}, {c['inner_steps']} steps, {c['memory']}: {c['message'].splitlines()[-1]}"
        for c in cases
        if c["status"] == "failed"
    ]
    after = "\n\nFailed:\n" + "\n".join(failed) if failed else ""
    return f"## Memory of the exact gradient\n{MEMORY}\n{_table(head, rows)}{after}"


def _rest(case: dict[str, Any]) -> float:
    return float(case["peak_bytes"] - (case["state_bytes"] if case["memory"] == "flat" else 0))


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.0f}" if seconds >= 0.1 else f"{seconds * 1e3:.2g}"


def _ratio(theirs: float | None, ours: float | None) -> str:
    return "-" if theirs is None or ours is None else f"{theirs / ours:.2f}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
