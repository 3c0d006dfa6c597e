"""Speed and memory of meta-gradients: raymeta and its peers on the same tasks, in one run.

`python -m benchmarks.speed` (or `make bench`) starts one process for each peer and workload, lets them take turns,
checks that their meta-gradients agree with a float64 reference, and writes the table; with `--device cuda` (or `make
bench-gpu`) on a GPU. The files, in reading order: `workloads` (what is computed), `peers` (who computes it), `process`
(one peer in a process of its own), `devices` (its clock and memory on a CPU and on a GPU), `run` (turns and checks),
`memory` (flat against unrolled), `workers` (two Ray workers against one), `table` (the markdown).
"""
