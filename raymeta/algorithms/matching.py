"""Matching Networks (Vinyals, Blundell, Lillicrap, Kavukcuoglu, Wierstra 2016, arXiv 1606.04080).

Legend: T tasks, N ways, S support rows, Q query rows, D embedding size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from raymeta.algorithms.embedding_learner import EmbeddingLearner, membership, without_absent
from raymeta.algorithms.lstm import draw_cell, lstm_cell, lstm_over_rows
from raymeta.params import Params, with_prefix
from raymeta.seeding import torch_generator

LOG_SCALE = "attention.log_scale"
FORWARD, BACKWARD, READ = "context.forward.", "context.backward.", "context.read."

SUPPORT, MEMBER = "embeddings", "member"


@dataclass(frozen=True, kw_only=True)
class MatchingNetworks(EmbeddingLearner):
    """P(c | q) = sum of a(q, s_i) over the support rows i of class c, with a(q, s_i) the softmax over i of
    scale * cosine(f(q), g(s_i)) (equations 1 and 2). The class scores are log P.

    Without `full_context` f and g are the model. With it (the paper's appendix A, "fully conditional embeddings"):
    g(s_i, S) = h_forward_i + h_backward_i + model(s_i), the outputs of an LSTM in each direction over the support
    embeddings in their order (A.2); and f(q, S) is h_K of K = `context_steps` steps of an LSTM with the input model(q),
    the hidden state [h_k, r_k], h_{k+1} = output + model(q), r_k = the mean of the g(s_i, S) under the softmax of
    h_k . g(s_i, S) (A.1, equations 3 to 6). The order of the support rows then matters.

    Attributes:
        score_scale: `scale`, at first. The paper: 1, with which the probability of a class among N is at most
            1 / (1 + (N - 1) / e^2).
        learn_scale: whether it is learned (its logarithm is), by the outer rate `outer.learned_rate`.
        full_context: see above. context_steps: K.

    Departs from the paper: `scale`; the softmax in A.1 is of h_k . g / sqrt(D), which else is a hard choice for
    embeddings of a few hundred numbers; batch statistics are those of the rows at hand, never running means.
    """

    score_scale: float = 10.0
    learn_scale: bool = True
    full_context: bool = False
    context_steps: int = 5
    embedding_size: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.score_scale > 0, "score_scale", "a number above 0")
        self.require(self.context_steps >= 0, "context_steps", "0 or more")

    def init(self, model: nn.Module, seed: int) -> Params:
        params = super().init(model, seed)
        like = next(iter(params.values()))
        if self.learn_scale:
            params[LOG_SCALE] = torch.tensor([math.log(self.score_scale)], dtype=torch.float64).to(like)
        if self.full_context:
            assert self.embedding_size is not None, "the build step fills embedding_size in"
            size, draw = self.embedding_size, torch_generator(seed, "matching_networks")
            for prefix, hidden in ((FORWARD, size), (BACKWARD, size), (READ, 2 * size)):
                params |= {prefix + name: value.to(like) for name, value in draw_cell(size, hidden, size, draw).items()}
        return params

    def fit(self, params: Params, support: Tensor, labels: Tensor, ways: int, mask: Tensor | None) -> Params:
        if self.full_context:
            forward = lstm_over_rows(with_prefix(params, FORWARD), support, mask)
            backward = lstm_over_rows(with_prefix(params, BACKWARD), support, mask, backward=True)
            support = forward + backward + support
        return {SUPPORT: support, MEMBER: membership(labels, ways, mask)}

    def scores(self, params: Params, fitted: Params, query: Tensor) -> Tensor:
        support, member = fitted[SUPPORT], fitted[MEMBER]
        if self.full_context:
            query = self._in_context(with_prefix(params, READ), query, support, member.any(2))
        cosines = unit(query) @ unit(support).transpose(1, 2)
        scale = params[LOG_SCALE].exp() if self.learn_scale else self.score_scale
        return log_class_probabilities(scale * cosines, member)

    def _in_context(self, cell: Params, query: Tensor, support: Tensor, counts: Tensor) -> Tensor:
        """f(q, S) [T, Q, D] of query [T, Q, D], given g(s, S) [T, S, D] and which rows count [T, S]."""
        hidden, state = torch.zeros_like(query), torch.zeros_like(query)
        for _ in range(self.context_steps):
            nearness = hidden @ support.transpose(1, 2) / math.sqrt(query.shape[2])
            read = without_absent(nearness, counts).softmax(2) @ support
            output, state = lstm_cell(cell, query, torch.cat([hidden, read], 2), state)
            hidden = output + query
        return hidden if self.context_steps else query


def unit(x: Tensor) -> Tensor:
    """x [..., D] / (|x|^2 + 1e-6)^(1/2): 0 where x is 0 (as an embedding may be, and a memory at first), with a
    derivative of 1,000 there; that of x / |x|, cut off at 1e-8, is 1e8."""
    return x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()


def log_class_probabilities(logits: Tensor, member: Tensor) -> Tensor:
    """[T, Q, N] the logarithm of each class's share of softmax(logits [T, Q, S]), given member [T, S, N] (one class a
    row, or none); -inf for a class without a row.

    Every class has a maximum of its own: no share is rounded to 0 beside a large one.
    """
    ways, counts, present = member.shape[2], member.any(2), member.any(1)
    label = member.to(torch.uint8).argmax(2)[:, None].expand(logits.shape)
    open_logits = without_absent(logits, counts)
    lowest = torch.full((*logits.shape[:2], ways), -torch.inf, dtype=logits.dtype, device=logits.device)
    most = lowest.scatter_reduce(2, label, open_logits.detach(), "amax")
    most = torch.where(present[:, None], most, torch.zeros_like(most))
    shares = (logits - most.gather(2, label)).where(counts[:, None], torch.zeros_like(logits)).exp()
    sums = shares @ member.to(logits.dtype)
    logs = torch.where(present[:, None], sums, torch.ones_like(sums)).log() + most
    return torch.log_softmax(without_absent(logs, present), 2)
