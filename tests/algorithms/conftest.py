"""Small problems in float64 for the engine: quadratics with closed forms, and small models on random tasks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raymeta.algorithms import (
    ANIL,
    CAVIA,
    LEARNERS,
    LEO,
    MAML,
    R2D2,
    SNAIL,
    Learner,
    MAMLPlusPlus,
    MatchingNetworks,
    MemoryAugmentedNetwork,
    MetaCurvature,
    MetaOptNet,
    MetaSGD,
    MultiTask,
    PrototypicalNetworks,
    RelationNetworks,
)
from raymeta.algorithms.amortised import Amortised
from raymeta.algorithms.amortised_head import AmortisedHead
from raymeta.algorithms.neural_process import AttentiveNeuralProcess, ConditionalNeuralProcess
from raymeta.episodes import Episodes
from raymeta.metrics import LOSSES, METRICS
from raymeta.models import MLP, Conv4, Transformer
from raymeta.params import ParameterLayout, Params

WAYS = 3
TRAINING_CLASSES = 7
EMBEDDING = 4
SHAPES = {"mlp": (5,), "conv4": (1, 6, 6), "transformer": (3, 4), "recurrent": (4, 3), "dropout": (3, 4)}


class Quadratic(nn.Module):
    """1/2 x'Ax - b'x for each row (A | b) of shape [n, n+1]; x is the parameter."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.zeros(size, dtype=torch.float64))

    def forward(self, rows: Tensor) -> Tensor:
        a, b = rows[..., :-1], rows[..., -1]
        return 0.5 * ((a @ self.x) @ self.x) - b @ self.x


class Recurrent(nn.Module):
    """An LSTM, a GRU on its outputs, and a linear head on the last position."""

    def __init__(self, input_shape: tuple[int, ...], outputs: int | None) -> None:
        super().__init__()
        self.lstm = nn.LSTM(input_shape[1], EMBEDDING, batch_first=True)
        self.gru = nn.GRU(EMBEDDING, EMBEDDING, batch_first=True)
        self.head = nn.Identity() if outputs is None else nn.Linear(EMBEDDING, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gru(self.lstm(x)[0])[0][:, -1])


def small_model(kind: str, outputs: int | None = WAYS) -> nn.Module:
    """One of the small models, in float64, always the same weights."""
    state = torch.get_rng_state()
    torch.manual_seed(3)
    shape = SHAPES[kind]
    made: nn.Module
    if kind == "mlp":
        made = MLP(shape, outputs, hidden=(6, EMBEDDING))
    elif kind == "conv4":
        made = Conv4(shape, outputs, filters=EMBEDDING, blocks=2)
    elif kind == "recurrent":
        made = Recurrent(shape, outputs)
    else:
        dropout = 0.25 if kind == "dropout" else 0.0
        made = Transformer(shape, outputs, width=EMBEDDING, heads=2, layers=1, dropout=dropout)
    torch.set_rng_state(state)
    return made.double()


def random_tasks(
    shape: tuple[int, ...], tasks: int = 3, support: int = 6, query: int = 6, masks: bool = False, first: int = 0,
    loss: str = "cross_entropy", targets: int = WAYS,
) -> Episodes:  # fmt: skip
    """`tasks` random tasks, always the same. With `masks`, the rows that do not count hold nan and the label -1."""
    draw = torch.Generator().manual_seed(11)

    def part(rows: int) -> tuple[Tensor, Tensor, Tensor | None]:
        x = torch.randn(tasks, rows, *shape, generator=draw, dtype=torch.float64)
        if loss == "cross_entropy":
            y = torch.arange(rows).remainder(WAYS).expand(tasks, rows).clone()
        elif loss == "logistic":
            y = torch.randint(2, (tasks, rows), generator=draw)
        else:
            y = torch.randn(tasks, rows, targets, generator=draw, dtype=torch.float64)
        if not masks:
            return x, y, None
        mask = torch.arange(rows) < rows - torch.arange(tasks)[:, None] % (rows - WAYS + 1)
        x[~mask] = torch.nan
        y[~mask] = torch.nan if y.is_floating_point() else -1
        return x, y, mask

    sx, sy, sm = part(support)
    qx, qy, qm = part(query)
    classes = torch.stack([torch.randperm(TRAINING_CLASSES, generator=draw)[:WAYS] for _ in range(tasks)])
    return Episodes(sx, sy, qx, qy, torch.arange(first, first + tasks), sm, qm, classes)


def named_gradient(learner: Learner, model: nn.Module, params: Params, batch: Episodes, step: int = 0) -> Params:
    """The summed meta-gradient by parameter name."""
    return ParameterLayout.of(params).unflatten(learner.meta_gradient(model, params, batch, step).gradient)


def reported_loss(learner: Learner, model: nn.Module, batch: Episodes, step: int = 0) -> Callable[[Params], float]:
    """The summed query loss as a function of the outer parameters."""
    return lambda params: learner.meta_gradient(model, params, batch, step).metrics["loss"]


def central_differences(
    loss: Callable[[Params], float], params: Params, gradient: Params, tolerance: float = 1e-6, size: float = 1e-5
) -> None:
    """Asserts the derivative along a random direction: of the model's parameters, and of the learner's own."""
    draw = torch.Generator().manual_seed(5)
    for group in sorted({name.partition(".")[0] for name in params}):
        names = [name for name in params if name.startswith(group + ".")]
        direction = {
            name: torch.randn(params[name].shape, generator=draw, dtype=torch.float64) / params[name].numel() ** 0.5
            for name in names
        }
        ahead, behind = (
            loss({**params, **{name: params[name] + sign * size * direction[name] for name in names}})
            for sign in (1, -1)
        )
        expected = (ahead - behind) / (2 * size)
        found = sum(float((gradient[name] * direction[name]).sum()) for name in names)
        assert found == pytest.approx(expected, rel=tolerance, abs=tolerance), group


def relative_error(found: Params, expected: Params) -> float:
    """The largest difference, as a fraction of the largest number (of 1 where all are 0)."""
    assert list(found) == list(expected)
    largest = max(float(value.abs().max()) for value in expected.values())
    return max(float((found[name] - expected[name]).abs().max()) for name in expected) / (largest or 1.0)


LEO_SIZES = {"code_size": 5, "latent_size": 3}

# Learners whose outer gradient is the derivative of the outer loss.
EXACT: dict[str, Learner] = {
    "maml": MAML(inner_rate=0.3, inner_steps=2),
    "maml_zero_steps": MAML(inner_steps=0),
    "maml_momentum": MAML(inner_rate=0.2, inner_steps=3, inner_momentum=0.7),
    "maml_weight_decay": MAML(inner_rate=0.2, inner_steps=2, inner_weight_decay=0.3),
    "maml_adam": MAML(inner_rate=0.05, inner_steps=3, inner_optimizer="adam"),
    "maml_adam_weight_decay": MAML(inner_rate=0.05, inner_steps=2, inner_optimizer="adam", inner_weight_decay=0.1),
    "maml_adam_beta1_0": MAML(inner_rate=0.05, inner_steps=2, inner_optimizer="adam", inner_beta1=0.0),
    "maml_proximal": MAML(inner_rate=0.2, inner_steps=3, proximal_weight=0.5),
    "maml_inner_batch": MAML(inner_rate=0.2, inner_steps=3, inner_batch=4),
    "anil": ANIL(inner_rate=0.4, inner_steps=3),
    "anil_momentum": ANIL(inner_rate=0.3, inner_steps=2, inner_momentum=0.5, proximal_weight=0.3),
    "meta_sgd": MetaSGD(inner_steps=2, inner_rate_high=0.4),
    "maml_plus_plus": MAMLPlusPlus(inner_steps=3, annealing_steps=0),
    "prototypical_networks": PrototypicalNetworks(),
    "matching_networks": MatchingNetworks(),
    "matching_networks_full_context": MatchingNetworks(full_context=True, context_steps=3, embedding_size=EMBEDDING),
    "relation_networks": RelationNetworks(filters=6, embedding_size=EMBEDDING),
    "r2d2": R2D2(),
    "metaoptnet": MetaOptNet(),
    "metaoptnet_logistic": MetaOptNet(head="logistic"),
    "conditional_neural_process": ConditionalNeuralProcess(width=6, embedding_size=EMBEDDING, latent_size=2),
    "cavia": CAVIA(inner_rate=0.5, inner_steps=2, context_size=3),
    "meta_curvature": MetaCurvature(inner_rate=0.3, inner_steps=2),
    "snail": SNAIL(embedding_size=EMBEDDING, outputs=WAYS, filters=3, key_size=4, value_size=3),
    "memory_augmented_network": MemoryAugmentedNetwork(
        embedding_size=EMBEDDING, outputs=WAYS, units=6, slots=5, slot_size=4, heads=2
    ),
    "memory_augmented_feed_forward": MemoryAugmentedNetwork(
        embedding_size=EMBEDDING, outputs=WAYS, controller="feed_forward", units=6, slots=5, slot_size=4, heads=2
    ),
    "leo": LEO(embedding_size=EMBEDDING, inner_steps=2, fine_tuning_steps=2, encoder_penalty=0.0, **LEO_SIZES),
    "attentive_neural_process": AttentiveNeuralProcess(width=6, heads=2, embedding_size=EMBEDDING),
    "amortised": Amortised(width=6, input_size=36, outputs=WAYS, inner_steps=1, inner_rate=0.2),
    "amortised_head": AmortisedHead(width=6, embedding_size=EMBEDDING, inner_steps=2),
    "multi_task": MultiTask(training_classes=TRAINING_CLASSES, embedding_size=EMBEDDING),
}

# Small where the defaults are large; everything else is as it ships.
SMALL: dict[str, Any] = {
    "reptile": {"inner_batch": 4},
    "imaml": {"inner_steps": 4},
    "relation_networks": {"filters": 6, "embedding_size": 4},
    "from_scratch": {"inner_steps": 3},
    "snail": {"embedding_size": 4, "outputs": 3, "filters": 6},
    "memory_augmented_network": {"embedding_size": 4, "outputs": 3, "units": 8, "slots": 6},
    "leo": {"embedding_size": 4, "code_size": 8, "latent_size": 6},
    "amortised": {"input_size": 36, "outputs": 3, "width": 16},
    "amortised_head": {"embedding_size": 4, "width": 16},
    "vae_augmentation": {"embedding_size": 4, "width": 16, "generated": 5},
    "gan_augmentation": {"embedding_size": 4, "width": 16, "generated": 5},
    "conditional_neural_process": {"embedding_size": 4, "width": 32},
    "attentive_neural_process": {"embedding_size": 4, "width": 32},
    "multi_task": {"inner_steps": 3, "training_classes": 7, "embedding_size": 4},
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """As the workers compute; on these small tensors a second thread costs time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=list(LEARNERS))
def learner(request: pytest.FixtureRequest) -> Learner:
    """Each learner that ships."""
    return LEARNERS[request.param](**SMALL.get(request.param, {}))


@pytest.fixture(params=list(EXACT))
def exact_learner(request: pytest.FixtureRequest) -> Learner:
    """Each learner whose outer gradient is the derivative of the outer loss."""
    return EXACT[request.param]


@pytest.fixture
def quadratic(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Quadratic, Episodes, dict[str, Tensor]]]:
    """quadratic(tasks) -> the model, a batch, and the tasks' A, b, C, d; the loss "value" is the model's output."""
    monkeypatch.setitem(LOSSES, "value", lambda outputs, targets: outputs)
    monkeypatch.setitem(METRICS, "value", lambda outputs, targets: outputs)

    def make(tasks: int = 3, size: int = 4) -> tuple[Quadratic, Episodes, dict[str, Tensor]]:
        draw = torch.Generator().manual_seed(7)

        def part() -> tuple[Tensor, Tensor, Tensor]:
            # Two rows a task: the loss is the mean over rows, and so are A and b.
            root = torch.randn(tasks, 2, size, size, generator=draw, dtype=torch.float64)
            a = root @ root.transpose(-1, -2) / size + 0.2 * torch.eye(size, dtype=torch.float64)
            b = torch.randn(tasks, 2, size, 1, generator=draw, dtype=torch.float64)
            return torch.cat([a, b], -1), a.mean(1), b.mean(1)[..., 0]

        support, a, b = part()
        query, c, d = part()
        nothing = torch.zeros(tasks, 2, dtype=torch.float64)
        model = Quadratic(size)
        model.x.data = torch.randn(size, generator=draw, dtype=torch.float64)
        batch = Episodes(support, nothing, query, nothing, torch.arange(tasks))
        return model, batch, {"A": a, "b": b, "C": c, "d": d, "x": model.x.detach().clone()}

    return make


@pytest.fixture
def small() -> Any:
    """The helpers above, by name: test modules cannot import a conftest."""

    class Helpers:
        model = staticmethod(small_model)
        tasks = staticmethod(random_tasks)
        gradient = staticmethod(named_gradient)
        loss = staticmethod(reported_loss)
        central_differences = staticmethod(central_differences)
        relative_error = staticmethod(relative_error)
        shapes = SHAPES
        exact = EXACT
        sizes = SMALL
        training_classes = TRAINING_CLASSES
        embedding = EMBEDDING

        @staticmethod
        def problem(learner: Learner, kind: str = "mlp", **settings: Any) -> tuple[nn.Module, Params, Episodes]:
            """A model that fits the learner, its outer parameters, and a batch."""
            model = small_model(kind, WAYS if learner.needs_head else None)
            if "input_size" in learner.settings():  # which `init` alone looks at
                learner = replace(learner, input_size=math.prod(SHAPES[kind]))  # type: ignore[call-arg]
            return model, learner.init(model, 0), random_tasks(SHAPES[kind], **settings)

    return Helpers
