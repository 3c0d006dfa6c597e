"""Meta-Curvature (Park, Oliva 2019, arXiv 1902.03356): a transform of the inner gradient, learned with the weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from raymeta.algorithms.maml import MAML
from raymeta.params import MODEL, Params, with_prefix

CURVATURE = "curvature."


@dataclass(frozen=True, kw_only=True)
class MetaCurvature(MAML):
    """theta_{i+1} = theta_i - inner_rate * MC(grad L_support(theta_i)), with MC(G) = G x_3 M_f x_2 M_i x_1 M_o
    (equations 4 and 7): for a convolution's gradient G [out, in, taps] one square matrix for each of its three
    dimensions; for a linear layer's, M_o and M_i; for a vector, M_o. That is one matrix M_o (x) M_i (x) M_f on all
    numbers of the layer (equation 12). Every matrix starts as the identity, which is MAML, and is learned by the outer
    loop, by the rate `outer.learned_rate`.

    Departs from the paper: biases and the weights of norms, which are vectors, have an M_o of their own; any number of
    inner steps with any inner optimiser, which takes MC(G) for the gradient.
    """

    all_are_fast = False

    def init(self, model: nn.Module, seed: int) -> Params:
        params = super().init(model, seed)
        curvature: Params = {}
        for name, value in params.items():
            for place, size in enumerate(dimensions(value.shape)):
                curvature[f"{CURVATURE}{name.removeprefix(MODEL)}.{place}"] = torch.eye(size).to(value)
        return {**params, **curvature}

    def transformed(self, gradients: Params, params: Params) -> Params:
        matrices = with_prefix(params, CURVATURE)
        return {name: _transformed(gradient, matrices, name) for name, gradient in gradients.items()}


def dimensions(shape: torch.Size) -> tuple[int, ...]:
    """The sizes of M_o, M_i and M_f of a parameter, as many as it has: what is beyond the second dimension is one."""
    return (*shape[:2], shape[2:].numel()) if len(shape) > 2 else tuple(shape) or (1,)


def _transformed(gradient: Tensor, matrices: Params, name: str) -> Tensor:
    """MC of gradient [T, *shape]."""
    sizes = dimensions(gradient.shape[1:])
    found = gradient.reshape(len(gradient), *sizes)
    for place in range(len(sizes)):
        # Dimension `place` moves to the end, where a row times the matrix' transpose is its product with the dimension.
        found = (found.movedim(place + 1, -1) @ matrices[f"{name}.{place}"].T).movedim(-1, place + 1)
    return found.reshape(gradient.shape)
