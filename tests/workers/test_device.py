"""Where a worker computes: the user's own module and parameters stay where they are."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from raymeta.algorithms import MAML
from raymeta.episodes import Episodes
from raymeta.errors import InputError
from raymeta.evaluation import EvaluationSettings
from raymeta.outer_optimizer import OuterSettings
from raymeta.params import ParameterLayout
from raymeta.tasks import Sinusoid
from raymeta.trainer import MetaTrainer
from raymeta.workers import LocalPool, WorkerParts, WorkerSettings
from raymeta.workers.device import Sender, choose_device, placed

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


def test_a_model_for_another_device_is_a_copy():
    model = nn.Sequential(nn.Linear(1, 2), nn.BatchNorm1d(2))
    weight = model[0].weight
    assert placed(model, torch.device("cpu")) is model
    there = placed(model, torch.device("meta"))  # a device that every machine has
    assert {value.device.type for value in (*there.parameters(), *there.buffers())} == {"meta"}
    assert {value.device.type for value in (*model.parameters(), *model.buffers())} == {"cpu"}
    assert model[0].weight is weight


def test_a_model_of_which_a_buffer_alone_is_elsewhere_is_a_copy():
    model = nn.Sequential(nn.Linear(1, 2))
    model.register_buffer("table", torch.zeros(2, device="meta"))
    assert placed(model, torch.device("meta")) is not model
    assert model[0].weight.device.type == "cpu"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_is_refused_where_there_is_none():
    assert choose_device("auto").type == "cpu"
    with pytest.raises(InputError, match=r"workers\.device=cuda, but this machine has no GPU"):
        choose_device("cuda")


@pytest.mark.gpu
@needs_gpu
def test_a_pool_on_a_gpu_leaves_model_and_parameters_on_the_cpu():
    tasks, model = Sinusoid(shots=3, queries=3), nn.Linear(1, 1)
    learner = MAML(inner_rate=0.01, loss=tasks.loss, metric=tasks.metric)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with LocalPool(lambda: WorkerParts(tasks, tasks, model, learner)) as pool:
        assert pool.reports[0].device == "cuda"
        params = learner.init(model, seed=0)
        settings = OuterSettings(steps=2, tasks_per_step=2), EvaluationSettings(every_steps=1, tasks=2, test_tasks=2)
        trainer = MetaTrainer(pool, params, learner.metric, *settings)
        trainer.fit()
    assert {value.device.type for value in (*model.parameters(), *trainer.params.values())} == {"cpu"}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    batch = tasks.tasks("test", range(3))
    total = learner.meta_gradient(model, trainer.params, batch, step=0)  # as in README: nothing here is on the GPU
    assert total.gradient.device.type == "cpu"


@pytest.mark.gpu
@needs_gpu
def test_what_a_worker_maps_is_computed_without_tf32(lines, params):
    def allowed(parts, params, split, tasks):
        return [(torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) for _ in tasks]

    before = torch.backends.cudnn.allow_tf32
    with LocalPool(lines()) as pool:
        assert pool.map(allowed, params, "test", range(2)) == [(False, False)] * 2
    assert torch.backends.cudnn.allow_tf32 is before


def test_a_batch_for_the_cpu_stays_there():
    batch = Sinusoid(shots=3, queries=3).tasks("train", range(2))
    sender = Sender(torch.device("cpu"), torch.float64)
    assert not sender.ahead
    received = sender.send(batch)()
    assert received.support_x.dtype == torch.float64
    assert torch.equal(received.support_x, batch.support_x.double())
    assert received.tasks is batch.tasks


@pytest.mark.gpu
@needs_gpu
def test_batches_are_sent_to_a_gpu_beside_what_it_computes():
    source = Sinusoid(shots=30, queries=30)
    sender = Sender(torch.device("cuda"), torch.float32)
    assert sender.ahead
    busy = torch.randn(4096, 4096, device="cuda")
    for first in range(0, 40, 4):
        batch = source.tasks("train", range(first, first + 4))
        received = sender.send(batch)
        for _ in range(4):
            busy = torch.tanh(busy @ busy)
        there = received()
        for name in ("support_x", "support_y", "query_x", "query_y", "tasks"):
            assert torch.equal(getattr(there, name).cpu(), getattr(batch, name))


@pytest.mark.gpu
@needs_gpu
def test_rows_that_share_their_memory_or_have_gaps_are_sent_too():
    grid, many = torch.linspace(-1, 1, 8)[:, None], torch.randn(3, 12, 1)
    batch = Episodes(grid.expand(3, 8, 1), many[:, :8], many[:, 8:], many[:, 4:8], torch.arange(3))
    there = Sender(torch.device("cuda"), torch.float32).send(batch)()
    for name in ("support_x", "support_y", "query_x", "query_y"):
        assert torch.equal(getattr(there, name).cpu(), getattr(batch, name))


@pytest.mark.gpu
@needs_gpu
def test_a_pool_on_a_gpu_gives_what_one_on_the_cpu_gives():
    """With many chunks, whose batches are sent ahead."""
    tasks, model = Sinusoid(shots=3, queries=3), nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    learner = MAML(inner_rate=0.01, loss=tasks.loss, metric=tasks.metric)
    params = learner.init(model, seed=0)
    flat = ParameterLayout.of(params).flatten(params)
    found = []
    for device in ("cpu", "cuda"):
        settings = WorkerSettings(device=device)
        with LocalPool(lambda: WorkerParts(tasks, tasks, model, learner), settings, chunk_tasks=3) as pool:
            found.append(pool.meta_gradient(flat, 0, range(20)).gradient)
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-11)
