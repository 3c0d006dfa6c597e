"""The results as markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.speed.machine import MATRIX_SIZES

Results = dict[str, Any]
MIB = 2**20
# raymeta's rows as the summary's columns, by device; the ratios are of those that compute in float32.
COLUMNS = {
    "cpu": {
        "raymeta": "raymeta, 1 process",
        "raymeta-workers": "raymeta, Ray workers",
        "raymeta-compiled": "raymeta, compiled",
    },
    "cuda": {
        "raymeta": "raymeta",
        "raymeta-compiled": "raymeta, compiled",
        "raymeta-tf32": "raymeta, TF32",
        "raymeta-bfloat16": "raymeta, bfloat16",
    },
}
# Whom raymeta is compared with: the columns, and a peer or a kind of peers, whose fastest it is.
OTHERS = {
    "cpu": {"fastest library": "library", "vmap": "vmap", "JAX": "jax"},
    "cuda": {"learn2learn": "clone-update", "fastest library": "library", "vmap": "vmap", "JAX": "jax"},
}
RATIOS = {"cpu": tuple(COLUMNS["cpu"]), "cuda": ("raymeta", "raymeta-compiled")}
NOT_MEASURED = "not measured"


def markdown(results: Results) -> str:
    """The whole file."""
    parts = [_head(results)]
    if results["workloads"]:
        parts.append(_summary(results))
        parts += [_workload(results, row) for row in results["workloads"].values()]
    if results["memory"]:
        parts.append(_memory(results["memory"]))
    if (workers := results.get("workers", {"status": NOT_MEASURED}))["status"] != NOT_MEASURED:
        parts.append(_workers(workers))
    return "\n\n".join(parts) + "\n"


EXPLANATION = """
- A step is the exact second-order MAML gradient, summed over its tasks, float32, plain SGD inside, batch statistics. No
  outer update, and the tasks are drawn before. All start from the same weights and the same tasks.
- {circumstances}
  They take turns, and the figures are medians over all timed steps. The first step (imports, compiling, warming up) is
  not among them and is told apart; nor is the first of a turn, which finds the caches full of another peer's numbers.
- A gradient counts as right if no entry differs from a float64 reference by more than the bound that each table states,
  relative to the largest entry. No speed is printed for one that does not. The tasks are such as are not within
  rounding of a ReLU's kink, where no two programs agree (`benchmarks/speed/steady.py`).
- GFLOP/s count matrix products and convolutions of the plain loop (forward, backward, double backward; by
  `torch.utils.flop_counter`), whatever the peer really computes; beside it the share of the machine's own rate at
  {size} x {size} float32 matrix products, which took turns too.
- {memory}
- `-`: not written for this peer.
"""
CIRCUMSTANCES = {
    "cpu": "Every peer has {threads} threads and a process of its own.",
    "cuda": """Every peer has {threads} CPU cores, a process of its own, and the GPU to itself in its turn. The GPU is
  idle when a step's clock starts, and done when it stops (`torch.cuda.synchronize`): steps do not overlap. Products and
  convolutions are float32 ones, without TF32, but in the rows that name another precision, whose gradients have wider
  bounds of their own. raymeta uses deterministic kernels, as a training does by default. No rows: Ray workers (a GPU is
  one worker's, who computes as the one process does), and vmap with raymeta's settings of the CPU's allocator.""",
}
MEMORY_IS = {
    "cpu": """Memory is the peak of the resident size during the timed steps less what was resident before anything was
  computed (libraries imported, also those that torch imports late; weights and tasks there; worker processes started),
  added up over the processes that compute. So it holds what the steps need at once; what recording or compiling has
  left (programs, compiled code); the libraries' own code that the first step pages in (about 8 MiB a process); and
  freed memory that the allocator keeps, for raymeta on purpose and of all its warming up. JAX has given back what
  choosing its form took.""",
    "cuda": """Memory is the most that torch's allocator has given out at a time (`torch.cuda.max_memory_allocated`)
  since before anything was computed, less what it had given out then (weights and tasks). Recording and capturing a
  graph count: its replays use what the capture took. JAX, with an allocator of its own, has no figure.""",
}
SUMMARY = {
    "cpu": """
Median milliseconds of a step; the last three columns say how many times as fast raymeta is, in 1 process / with Ray
workers / in 1 process with `algorithm.compile=true` (for small models). "Fastest library" is the fastest of higher,
TorchOpt and learn2learn's loop.
""",
    "cuda": """
Median milliseconds of a step; the last four columns say how many times as fast raymeta is in float32 / with
`algorithm.compile=true` (for small models). "Fastest library" is the fastest of higher, TorchOpt and learn2learn's
loop, which has a column of its own.
""",
}
WORKERS = """
Medians of {steps} steps ({job_steps} of the main job), with Ray, after those in which the workers record. A step is
what a training asks of its workers: the parameters go out, each draws its tasks, computes and sends its sums, the
driver adds them up. The outer update (here by {optimizer}) is made between the steps, as in a training, and is in none
of the figures: it takes {update:.1f} ms. "Driver and Ray" is the step less what the slowest worker computes. Two
processes that know nothing of each other (no Ray, no driver) say what the machine has for two: a core is slower beside
a busy one.
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
    device = _device(results)
    gpu = machine.get("gpu")
    on_gpu = f"GPU: {gpu['name']}, {gpu['memory_gib']} GiB, CUDA {gpu['cuda']}.\n" if gpu else ""
    explanation = EXPLANATION.format(
        circumstances=CIRCUMSTANCES[device].format(threads=machine["threads"]),
        size=MATRIX_SIZES[device],
        memory=MEMORY_IS[device],
    )
    return f"""# Speed and memory of meta-gradients

Written by {commands} on {results["date"]}, in {results["seconds"] / 60:.0f} minutes.
{quick}Machine: {machine["processor"]}, {machine["cores"]} cores of which {machine["threads"]} are used,
{machine["memory_gib"]} GiB, {machine["system"]}; load {machine["load_at_start"]} at the start.
{on_gpu}Versions: {versions}.
{explanation.rstrip()}"""


def _device(results: Results) -> str:
    return str(results.get("device", "cpu"))


def _summary(results: Results) -> str:
    rows, device = [], _device(results)
    for row in results["workloads"].values():
        peers, catalogue = row["peers"], results["peers"]
        others = [
            _fastest(peers, [name for name in peers if wanted in (name, catalogue[name]["kind"])])
            for wanted in OTHERS[device].values()
        ]
        own = {name: peers.get(name, {}).get("seconds") for name in COLUMNS[device]}
        cells = [row["title"]]
        cells += [_milliseconds(peers[name]["seconds"]) if name else "-" for name in others]
        cells += [_milliseconds(seconds) for seconds in own.values()]
        compared = [name for name in RATIOS[device] if name != "raymeta-compiled" or own[name] is not None]
        for name in others:
            theirs = peers[name]["seconds"] if name else None
            cells.append(" / ".join(_ratio(theirs, own[each]) for each in compared))
        rows.append(cells)
    head = ["workload", *OTHERS[device], *COLUMNS[device].values()]
    head += [f"x {name.removeprefix('fastest ')}" for name in OTHERS[device]]
    return f"## Summary\n{SUMMARY[device]}\n{_table(head, rows)}"


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
    if not row.get("memory_from_the_first"):
        notes.append("Memory counted from after warming up then: of raymeta and JAX next to nothing.")
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
                "-" if peer["peak_bytes"] is None else f"{peer['peak_bytes'] / MIB:.0f}",
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
        if peer.get("tolerance", 0.0) > row["tolerance"]:
            notes.append(f"{title}: its gradient is within {peer['tolerance']:.0e}, a bound of its own.")
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


def _workers(found: dict[str, Any]) -> str:
    title = "## Ray workers"
    if found["status"] != "ok":
        return f"{title}\n\n{found['status']}" + (
            f": {found['message'].splitlines()[-1]}" if "message" in found else ""
        )
    text = WORKERS.format(
        steps=found["steps"],
        job_steps=5 * found["steps"],
        optimizer=found["optimizer"].capitalize(),
        update=found["update_milliseconds"],
    )
    job = f"the main job ({found['parameters']:,} parameters, 2 workers)"
    rows = [
        ["conv4, 1 step, 15 queries/class, 32 tasks: 1 worker", f"{found['one_worker_seconds'] * 1e3:.0f} ms", ""],
        ["the same: 2 workers", f"{found['two_workers_seconds'] * 1e3:.0f} ms", ""],
        ["2 workers against 1, tasks/s", f"{found['ratio']:.2f}x", "1.9x"],
        ["2 processes that know nothing of each other, against 1", f"{found['unconnected_ratio']:.2f}x", ""],
        [f"a step of {job}", f"{found['main_job_seconds'] * 1e3:.0f} ms", ""],
        [
            "of it driver and Ray: median (least)",
            f"{found['beside_compute_milliseconds']:.1f} ({found['beside_compute_least_milliseconds']:.1f}) ms",
            "under 5 ms",
        ],
    ]
    return f"{title}\n{text}\n{_table(['', 'measured', 'to reach'], rows)}"


def _rest(case: dict[str, Any]) -> float:
    return float(case["peak_bytes"] - (case["state_bytes"] if case["memory"] == "flat" else 0))


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.0f}" if seconds >= 0.1 else f"{seconds * 1e3:.2g}"


def _ratio(theirs: float | None, ours: float | None) -> str:
    return "-" if theirs is None or ours is None else f"{theirs / ours:.2f}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
