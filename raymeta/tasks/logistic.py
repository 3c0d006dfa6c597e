"""Binary logistic regression tasks whose best parameters are known.

y is 1 with probability sigmoid(w.x + b). The true (w, b) minimise the expected logistic loss of a task, and the sign
of w.x + b is the best decision: `LogisticRegression.true_parameters` gives them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from raymeta.tasks.linear import LinearFamily


@dataclass(frozen=True)
class LogisticRegression(LinearFamily):
    """Labels 0 or 1, [T, rows] int64, drawn from the logistic model; a model puts out one logit.

    The settings are those of `LinearFamily`.
    """

    loss: ClassVar[str] = "logistic"
    metric: ClassVar[str] = "binary_accuracy"

    def _targets(self, values: np.ndarray, noise: np.ndarray) -> torch.Tensor:
        uniform = 0.5 * (1 + torch.erf(torch.from_numpy(noise) / math.sqrt(2)))
        return (uniform < torch.sigmoid(torch.from_numpy(values))).to(torch.int64)
