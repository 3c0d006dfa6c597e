"""CAVIA, fast context adaptation via meta-learning (Zintgraf, Shiarlis, Kurin, Hofmann, Whiteson 2019, arXiv
1810.03642)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from raymeta.algorithms.maml import MAML
from raymeta.algorithms.task_model import TaskModel, task_model
from raymeta.models.context import CONTEXT, SCALE, SHIFT, VECTOR, context_layer, with_context
from raymeta.params import Params, model_params, with_prefix
from raymeta.seeding import torch_generator

OWN = "context."
# Among the parameters of the prepared module.
PHI = f"{CONTEXT}.{VECTOR}"


@dataclass(frozen=True)
class Extension:
    """What a prepared module has beside the model's own; the fields are the arguments of `with_context`."""

    layer: str
    channels: int
    film: bool
    size: int

    def __call__(self, module: nn.Module) -> nn.Module:
        return with_context(module, self.layer, self.channels, self.film, self.size)


@dataclass(frozen=True, kw_only=True)
class CAVIA(MAML):
    """phi_{i+1} = phi_i - inner_rate * grad_phi L_support(phi_i, theta), phi_0 = 0 (equation 4): a task changes a few
    context parameters phi alone; the model's weights theta are the same for all tasks, and learned by the outer
    gradient through the inner steps (equation 5).

    phi changes what one layer puts out. Of a linear layer it adds W phi, which is the paper's concatenation of phi and
    the layer's input; of a convolution's norm it makes (1 + W_scale phi) h + W_shift phi, channel by channel (FiLM, the
    paper's section 4.3). theta includes these W.

    Attributes:
        context_size: how many numbers phi has.
        context_at: the name of the layer; None: see `raymeta.models.context.context_layer` (the first linear layer, or
            the third norm of a convolutional network).

    Departs from the paper: FiLM without a bias of its own (the norm before it has one); phi acts after the norm, whose
    statistics would else take it away.
    """

    inner_rate: float = 1.0
    inner_steps: int = 2
    context_size: int = 5
    context_at: str | None = None

    all_are_fast = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.context_size > 0, "context_size", "1 or more")

    def init(self, model: nn.Module, seed: int) -> Params:
        params = super().init(model, seed)
        like, draw = next(iter(params.values())), torch_generator(seed, "cavia")
        _, channels, film = context_layer(model, self.context_at)
        bound = self.context_size**-0.5
        for name in (SHIFT, SCALE) if film else (SHIFT,):
            unit = torch.rand((channels, self.context_size), generator=draw, dtype=torch.float64)
            params[OWN + name] = ((2 * unit - 1) * bound).to(like)
        return params

    def prepared(self, model: nn.Module) -> TaskModel:
        layer, channels, film = context_layer(model, self.context_at)
        extension = Extension(layer, channels, film, self.context_size)
        return task_model(model, self.batching, self.precision, self.kernels, extension)

    def weights(self, params: Params) -> Params:
        own = {f"{CONTEXT}.{name}": value for name, value in with_prefix(params, OWN).items()}
        start = params[OWN + SHIFT].new_zeros(self.context_size).requires_grad_()
        return {**model_params(params), **own, PHI: start}

    def fast_names(self, names: tuple[str, ...]) -> tuple[str, ...]:
        return (PHI,)
