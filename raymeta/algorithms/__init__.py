"""The learners that ship, by the name that `algorithm.name` takes."""

from __future__ import annotations

from raymeta.algorithms.anil import ANIL
from raymeta.algorithms.imaml import IMAML
from raymeta.algorithms.learner import FILLED_BY_BUILD, Adapted, Learner, Statistics
from raymeta.algorithms.maml import MAML, FirstOrderMAML
from raymeta.algorithms.maml_plus_plus import MAMLPlusPlus
from raymeta.algorithms.meta_sgd import MetaSGD
from raymeta.algorithms.multi_task import MultiTask
from raymeta.algorithms.prototypical import PrototypicalNetworks
from raymeta.algorithms.reptile import Reptile

LEARNERS: dict[str, type[Learner]] = {
    "maml": MAML,
    "first_order_maml": FirstOrderMAML,
    "anil": ANIL,
    "meta_sgd": MetaSGD,
    "maml_plus_plus": MAMLPlusPlus,
    "imaml": IMAML,
    "reptile": Reptile,
    "prototypical_networks": PrototypicalNetworks,
    "multi_task": MultiTask,
}

__all__ = [
    "ANIL",
    "FILLED_BY_BUILD",
    "IMAML",
    "LEARNERS",
    "MAML",
    "Adapted",
    "FirstOrderMAML",
    "Learner",
    "MAMLPlusPlus",
    "MetaSGD",
    "MultiTask",
    "PrototypicalNetworks",
    "Reptile",
    "Statistics",
]
