"""SNAIL, the simple neural attentive learner (Mishra, Rohaninejad, Chen, Abbeel 2018, arXiv 1707.03141).

Legend: T tasks, N ways, S support rows, Q query rows, E embedding size, L numbers that stand for a label.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch.func import functional_call

from raymeta.algorithms.sequence_learner import SequenceLearner, centred
from raymeta.models.snail import SnailNetwork
from raymeta.params import Params, with_prefix
from raymeta.seeding import digest

NETWORK = "snail."
PAIRS, COUNTS = "pairs", "counts"


@dataclass(frozen=True, kw_only=True)
class SNAIL(SequenceLearner):
    """scores(q) = network((e(s_1), y_1), .., (e(s_S), y_S), (e(q), 0)) at its last row (section 3.1): e is the model,
    the network alternates causal attention with causal temporal convolutions (`raymeta.models.snail`), and the query's
    label is withheld. With targets that are numbers, a row has one number more, which says whether its target is known.

    Attributes:
        filters, layers, blocks, key_size, value_size: see `SnailNetwork`. The paper has 2 blocks of ceil(log2(S + 1))
            layers with 128 filters, keys of 64, 256 and 512 and values of 32, 128 and 256 numbers.

    Departs from the paper: all attentions have keys and values of one size, and queries and keys start with the same
    weights; the number of layers is a setting, so that other shots than in training have a meaning (attention sees all
    rows); embeddings are centred, and they and one-hot labels have the length sqrt(E), so that neither is lost beside
    the other.
    """

    filters: int = 64
    layers: int = 3
    blocks: int = 2
    key_size: int = 64
    value_size: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("filters", "layers", "key_size", "value_size"):
            self.require(getattr(self, field) > 0, field, "1 or more")
        self.require(self.blocks >= 0, "blocks", "0 or more")

    def init(self, model: nn.Module, seed: int) -> Params:
        params = super().init(model, seed)
        like = next(iter(params.values()))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int.from_bytes(digest(seed, "snail")[:8], "little") >> 1)
            network = self._new_network()
        return {**params, **{NETWORK + name: value.detach().to(like) for name, value in network.named_parameters()}}

    def _new_network(self) -> SnailNetwork:
        embedding, label = self.sizes
        inputs = embedding + label + int(self.numeric)
        return SnailNetwork(inputs, label, self.filters, self.layers, self.blocks, self.key_size, self.value_size)

    def fit(self, params: Params, support: Tensor, labels: Tensor, ways: int, mask: Tensor | None) -> Params:
        x, y, counts, present = self.sequence(support, labels, ways, mask)
        known = [y.new_ones(*y.shape[:2], 1)] if self.numeric else []
        return {PAIRS: torch.cat([x, y, *known], 2), COUNTS: counts, **present}

    def scores(self, params: Params, fitted: Params, query: Tensor) -> Tensor:
        pairs = fitted[PAIRS]
        withheld = query.new_zeros(*query.shape[:2], pairs.shape[2] - query.shape[2])
        rows = (pairs, torch.cat([centred(query), withheld], 2), fitted[COUNTS])
        outputs = functional_call(_shell(self), with_prefix(params, NETWORK), rows)
        return self.judged(outputs, fitted)


@cache
def _shell(learner: SNAIL) -> SnailNetwork:
    """A network to be called with parameters of its own, never with those that it holds."""
    with torch.random.fork_rng(devices=[]):
        return learner._new_network()
