"""How many tasks run as one batch of tensors, where `algorithm.chunk_tasks` does not say: a rule on shapes and device.

The rule is part of what decides a run's bits, so it looks at nothing that is measured on the way: the kind of device,
the number of tasks in a step, and how large the activations of one task are. What it gives is written into the run's
configuration. `raymeta profile` measures what other sizes would cost.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from raymeta.algorithms import Learner
from raymeta.algorithms.task_model import exact_kernels
from raymeta.params import Params, model_params
from raymeta.workers.reduction import LEAST_CHUNKS, TASKS_PER_CHUNK
from raymeta.workers.worker import WorkerParts

# The most bytes of activations of one forward pass over a chunk's support and query rows. A gradient through an inner
# step holds a few times as much. On two CPU cores chunks beyond this gained nothing and cost memory.
CHUNK_BYTES = {"cpu": 512 << 20, "cuda": 8 << 30}
# Below so many bytes of activations a chunk costs as much as one of fewer tasks: what it takes is calls, not arithmetic
# (25 sinusoid tasks with an MLP, 0.3 MB, on a core of a Zen 4: 2.6 ms as one chunk, 3.7 as two, 10 as seven).
LEAST_BYTES = {"cpu": 512 << 10, "cuda": 8 << 20}


def chunk_tasks(parts: WorkerParts, params: Params, tasks_per_step: int, device: str) -> int:
    """The rule: at most what fills the device (8 tasks on a CPU, 64 on a GPU), at most `CHUNK_BYTES` of activations,
    and no fewer than `LEAST_CHUNKS` chunks in a step that has the tasks, so that so many workers find something to do;
    but no chunk of less than `LEAST_BYTES` of activations, as far as the step has the tasks.

    Args:
        device: "cpu" or "cuda".
    """
    each, patches = _activation_and_patch_bytes(parts, params)
    if device == "cuda":  # where a convolution writes out its patches (`raymeta.ops.patches`), one layer's at a time
        each += patches
    by_memory = CHUNK_BYTES[device] // max(1, each)
    worth_a_call = LEAST_BYTES[device] // each if each else 1
    spread = min(TASKS_PER_CHUNK[device], tasks_per_step // LEAST_CHUNKS)
    return max(1, min(max(spread, worth_a_call), by_memory, tasks_per_step))


def activation_bytes(parts: WorkerParts, params: Params) -> int:
    """What the model's layers put out for the support and query rows of training task 0; 0 for other kinds of task."""
    return _activation_and_patch_bytes(parts, params)[0]


def _activation_and_patch_bytes(parts: WorkerParts, params: Params) -> tuple[int, int]:
    """`activation_bytes`, and the most that one convolution's kernel sees of the same rows, place by place."""
    learner = parts.learner
    batch = parts.source.tasks("train", [0])
    x = getattr(batch, "support_x", None)
    if not isinstance(learner, Learner) or not isinstance(x, Tensor):
        return 0, 0
    prepared = learner.prepared(parts.model)
    total = patches = 0

    def count(layer: nn.Module, inputs: object, output: object) -> None:
        nonlocal total, patches
        if isinstance(output, Tensor):
            total += output.nbytes
            if isinstance(layer, nn.Conv2d):
                patches = max(patches, output.nbytes // layer.out_channels * layer.weight[0].numel())

    layers = [layer for layer in prepared.module.modules() if not list(layer.children())]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    like = next(iter(params.values()))
    try:
        with torch.no_grad(), exact_kernels(prepared.recurrent):
            prepared.alone(model_params(params), x[0].to(like))
    finally:
        for hook in hooks:
            hook.remove()
    rows, all_rows = x.shape[1], x.shape[1] + batch.query_x.shape[1]
    return total * all_rows // rows, patches * all_rows // rows
