"""How a profile reads on a terminal."""

from __future__ import annotations

from rich.table import Table

from raymeta.profiling import Profile


def table(found: Profile) -> Table:
    """One row for each candidate, in the order in which they were measured; the fastest is marked."""
    shown = Table(
        title=f"{found.tasks_per_step} tasks a step, {found.workers} workers with {found.threads} threads each, on "
        f"{found.device}",
        title_justify="left",
    )
    shown.add_column("")
    for name in ("chunk_tasks", "kernels", "precision", "memory", "compile"):
        shown.add_column(name)
    for name in ("ms a chunk", "tasks/s of a worker", "ms a step"):
        shown.add_column(name, justify="right")
    for candidate in found.candidates:
        shown.add_row(
            "*" if candidate is found.best else "",
            str(candidate.chunk_tasks),
            candidate.kernels,
            candidate.precision,
            candidate.memory,
            str(candidate.compile),
            f"{1e3 * candidate.chunk_seconds:.1f}",
            f"{candidate.tasks_per_second:.0f}",
            f"{1e3 * candidate.step_seconds:.1f}",
        )
    return shown


def where(found: Profile) -> list[str]:
    """Where the time of the best goes, and what to set."""
    lines = [f"not measured: {what}" for what in found.left_out]
    if found.shares:
        shares = ", ".join(f"{kind} {100 * share:.0f} %" for kind, share in found.shares.items())
        lines.append(f"where the time of a chunk goes (*): {shares}")
    else:
        lines.append("where the time goes cannot be told: the computation is not recorded (raymeta.algorithms.program)")
    if found.gigaflops is not None:
        share = 100 * found.gigaflops / found.matmul_gigaflops
        lines.append(
            f"products and convolutions: {found.gigaflops:.0f} GFLOP/s over the whole chunk, {share:.0f} % of what a "
            f"1024 x 1024 matrix product reaches here ({found.matmul_gigaflops:.0f})"
        )
    drawn, updated = 1e3 * found.draw_seconds, 1e3 * found.update_seconds
    lines.append(
        f"drawing the tasks of a chunk takes {drawn:.1f} ms (Ray workers do it while the driver updates, as far as "
        f"that leaves time), the outer update {updated:.1f} ms"
    )
    lines.append("a step is the chunks of the worker that has the most of them; the way to it and back comes on top")
    lines.append(f"to use the fastest: {found.best.settings()}")
    lines.append("other chunks, kernels or memory round otherwise: set them before a run, not in the middle of one")
    return lines
