"""The learners that ship."""

from __future__ import annotations

from raymeta.algorithms.amortised import Amortised
from raymeta.algorithms.amortised_head import AmortisedHead
from raymeta.algorithms.anil import ANIL
from raymeta.algorithms.augmentation import GANAugmentation, VAEAugmentation
from raymeta.algorithms.baselines import FromScratch, NearestNeighbour
from raymeta.algorithms.cavia import CAVIA
from raymeta.algorithms.imaml import IMAML
from raymeta.algorithms.learner import FILLED_BY_BUILD, Adapted, Learner, Statistics
from raymeta.algorithms.leo import LEO
from raymeta.algorithms.maml import MAML, FirstOrderMAML
from raymeta.algorithms.maml_plus_plus import MAMLPlusPlus
from raymeta.algorithms.matching import MatchingNetworks
from raymeta.algorithms.memory_augmented import MemoryAugmentedNetwork
from raymeta.algorithms.meta_curvature import MetaCurvature
from raymeta.algorithms.meta_sgd import MetaSGD
from raymeta.algorithms.metaoptnet import MetaOptNet
from raymeta.algorithms.multi_task import MultiTask
from raymeta.algorithms.neural_process import AttentiveNeuralProcess, ConditionalNeuralProcess
from raymeta.algorithms.prototypical import PrototypicalNetworks
from raymeta.algorithms.r2d2 import R2D2
from raymeta.algorithms.relation import RelationNetworks
from raymeta.algorithms.reptile import Reptile
from raymeta.algorithms.snail import SNAIL

# Families of methods, and their learners by the name that `algorithm.name` takes.
FAMILIES: dict[str, dict[str, type[Learner]]] = {
    "Adaptation by gradient steps": {
        "maml": MAML,
        "first_order_maml": FirstOrderMAML,
        "anil": ANIL,
        "meta_sgd": MetaSGD,
        "maml_plus_plus": MAMLPlusPlus,
        "imaml": IMAML,
        "cavia": CAVIA,
        "meta_curvature": MetaCurvature,
        "reptile": Reptile,
    },
    "Metrics: comparison with the support set": {
        "prototypical_networks": PrototypicalNetworks,
        "matching_networks": MatchingNetworks,
        "relation_networks": RelationNetworks,
    },
    "Differentiable solvers: a head fitted to its optimum": {
        "r2d2": R2D2,
        "metaoptnet": MetaOptNet,
    },
    "Sequences and memory: tasks read row by row": {
        "snail": SNAIL,
        "memory_augmented_network": MemoryAugmentedNetwork,
    },
    "Latent: neural processes, and inner steps on a code": {
        "conditional_neural_process": ConditionalNeuralProcess,
        "attentive_neural_process": AttentiveNeuralProcess,
        "leo": LEO,
    },
    "Amortised: parameters predicted from the support set": {
        "amortised": Amortised,
        "amortised_head": AmortisedHead,
    },
    "Generative: examples made beside those given": {
        "vae_augmentation": VAEAugmentation,
        "gan_augmentation": GANAugmentation,
    },
    "Baselines": {
        "multi_task": MultiTask,
        "from_scratch": FromScratch,
        "nearest_neighbour": NearestNeighbour,
    },
}
LEARNERS: dict[str, type[Learner]] = {name: learner for family in FAMILIES.values() for name, learner in family.items()}

__all__ = [
    "ANIL",
    "CAVIA",
    "FAMILIES",
    "FILLED_BY_BUILD",
    "IMAML",
    "LEARNERS",
    "LEO",
    "MAML",
    "R2D2",
    "SNAIL",
    "Adapted",
    "Amortised",
    "AmortisedHead",
    "AttentiveNeuralProcess",
    "ConditionalNeuralProcess",
    "FirstOrderMAML",
    "FromScratch",
    "GANAugmentation",
    "Learner",
    "MAMLPlusPlus",
    "MatchingNetworks",
    "MemoryAugmentedNetwork",
    "MetaCurvature",
    "MetaOptNet",
    "MetaSGD",
    "MultiTask",
    "NearestNeighbour",
    "PrototypicalNetworks",
    "RelationNetworks",
    "Reptile",
    "Statistics",
    "VAEAugmentation",
]
