"""A recorded program as one CUDA graph: the GPU runs its kernels without being told of each.

Launching a kernel costs the CPU some microseconds, which is what small meta-learning models spend most of a GPU's time
on. A program (`raymeta.algorithms.program`) is a fixed list of kernels on fixed shapes, which is what a graph can hold:
the inputs are copied to where the graph reads them, the graph runs, and its outputs are copied out. The kernels and
their order are the program's own, so the bits are.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

# Before a capture the libraries choose their kernels and take their workspaces, which a graph cannot hold.
WARM_RUNS = 3


def captured(
    program: Callable[[list[Tensor]], list[Tensor]], tensors: list[Tensor]
) -> Callable[[list[Tensor]], list[Tensor]]:
    """`program` as a CUDA graph for tensors like these; `program` itself where the graph cannot hold it."""
    inputs = [tensor.clone() for tensor in tensors]
    if any(own.stride() != tensor.stride() for own, tensor in zip(inputs, tensors, strict=True)):
        # A program knows its inputs' strides, and a copy of a tensor that overlaps itself has others.
        logger.info("no CUDA graph can hold the program, which runs as it is: an input overlaps itself")
        return program
    try:
        here = torch.cuda.current_stream()
        side = torch.cuda.Stream()
        side.wait_stream(here)
        with torch.no_grad(), torch.cuda.stream(side):
            for _ in range(WARM_RUNS):
                program(inputs)
        here.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(graph):
            outputs = program(inputs)
    except RuntimeError as error:  # an operation that waits for the device, or no memory for a second set of tensors
        logger.info("no CUDA graph can hold the program, which runs as it is: %s", str(error).strip().split("\n")[0])
        torch.cuda.synchronize()
        return program

    return Captured(program, graph, inputs, outputs)


@dataclass(frozen=True)
class Captured:
    """A graph that was captured, and the `program` that it holds; called as that is."""

    program: Callable[[list[Tensor]], list[Tensor]]
    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    outputs: list[Tensor]

    def __call__(self, given: list[Tensor]) -> list[Tensor]:
        for own, value in zip(self.inputs, given, strict=True):
            own.copy_(value, non_blocking=True)
        self.graph.replay()
        return [output.clone() for output in self.outputs]  # the next replay writes over the graph's own
