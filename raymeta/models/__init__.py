"""The models that ship, by the name that `model.name` takes: ordinary modules, built as Model(input_shape, outputs,
**arguments)."""

from __future__ import annotations

from torch import nn

from raymeta.models.conv4 import Conv4
from raymeta.models.mlp import MLP
from raymeta.models.resnet12 import ResNet12
from raymeta.models.transformer import Transformer

MODELS: dict[str, type[nn.Module]] = {
    "mlp": MLP,
    "conv4": Conv4,
    "resnet12": ResNet12,
    "transformer": Transformer,
}

__all__ = ["MLP", "MODELS", "Conv4", "ResNet12", "Transformer"]
