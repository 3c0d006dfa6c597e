"""The worker and the pool in this process: closed by a plain sum over tasks; errors name their task."""

from __future__ import annotations

import functools
import logging
import pickle
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from raymeta.algorithms import MAML
from raymeta.build.running import worker_parts
from raymeta.config import load_config
from raymeta.errors import InputError
from raymeta.ops.native import library
from raymeta.params import ParameterLayout, params_hash
from raymeta.tasks import Sinusoid
from raymeta.workers.local_pool import LocalPool
from raymeta.workers.pool import Abandoned, require_alike
from raymeta.workers.worker import (
    TaskError,
    Worker,
    WorkerParts,
    WorkerSettings,
    keep_freed_memory,
    settle_thresholds,
)


@pytest.mark.parametrize("chunk_tasks", [None, 1, 3, 100])
def test_the_total_is_the_sum_over_the_tasks(lines, params, chunk_tasks):
    build = lines()
    before = params_hash(params)
    with LocalPool(build, chunk_tasks=chunk_tasks) as pool:
        total = pool.meta_gradient(params, 2, range(20, 33))
        again = pool.meta_gradient(params, 2, range(20, 33))
    parts = build()
    layout = ParameterLayout.of(parts.learner.init(parts.model, 0))
    each = [
        parts.learner.meta_gradient(parts.model, layout.unflatten(params), parts.source.tasks("train", [task]), 2)
        for task in range(20, 33)
    ]
    assert total.tasks == 13
    assert total.step == 2
    torch.testing.assert_close(total.gradient, torch.stack([one.gradient for one in each]).sum(0))
    assert total.metrics["loss"] == pytest.approx(sum(one.metrics["loss"] for one in each))
    assert torch.equal(total.gradient, again.gradient)
    assert params_hash(params) == before


def test_map_gives_one_result_per_task_in_index_order(lines, params, first_numbers):
    with LocalPool(lines()) as pool:
        assert [task for task, _ in pool.map(first_numbers, params, "test", range(19))] == list(range(19))
        assert [task for task, _ in pool.map(first_numbers, params, "test", [7, 3, 11])] == [7, 3, 11]
        assert pool.map(first_numbers, params, "test", []) == []


def test_threads_are_the_callers_own_again(lines, params):
    before = torch.get_num_threads()
    seen = []
    with LocalPool(lines(act=lambda task: seen.append(torch.get_num_threads())), WorkerSettings(threads=3)) as pool:
        pool.meta_gradient(params, 0, range(4))
    assert set(seen) == {3}
    assert torch.get_num_threads() == before


def test_an_error_names_its_tasks_and_carries_the_original_traceback(lines, params, first_numbers):
    with LocalPool(lines(broken=(5, 6)), chunk_tasks=4) as pool:
        with pytest.raises(TaskError, match="task 5, 6 of step 9 failed: ZeroDivisionError") as caught:
            pool.meta_gradient(params, 9, range(12))
        with pytest.raises(TaskError, match="task 5 of split 'test' failed"):
            pool.map(first_numbers, params, "test", [3, 5])
    error = pickle.loads(pickle.dumps(caught.value))
    assert error.tasks == (5, 6)
    assert "raise ZeroDivisionError" in str(error)
    assert "in tasks" in error.traceback_text


def test_an_operation_without_a_deterministic_kernel_is_said_with_the_setting_that_allows_it(lines, params):
    """With two threads the rule is on on a CPU, too, which has one or two such operations; a GPU has many."""

    def act(task):
        torch.zeros(1).put_(torch.zeros(1, dtype=torch.int64), torch.ones(1))

    with (
        LocalPool(lines(act=act), WorkerSettings(threads=2, device="cpu")) as pool,
        pytest.raises(TaskError, match=r"task 0 .*put_ does not have a deterministic .*workers\.deterministic=false"),
    ):
        pool.meta_gradient(params, 0, range(1))
    with LocalPool(lines(act=act), WorkerSettings(threads=2, device="cpu", deterministic=False)) as pool:
        assert pool.meta_gradient(params, 0, range(1)).tasks == 1


def test_an_error_of_the_model_names_all_its_tasks(lines, params):
    def build():
        parts = lines()()

        class Narrow(nn.Linear):
            def forward(self, x):
                return super().forward(x[..., :2])

        return type(parts)(parts.source, parts.source, Narrow(5, 1), parts.learner)

    with LocalPool(build, chunk_tasks=2) as pool, pytest.raises(TaskError) as caught:
        pool.meta_gradient(params, 0, range(4))
    assert caught.value.tasks == (0, 1)


def test_parameters_of_another_model_are_refused(lines):
    with LocalPool(lines()) as pool, pytest.raises(InputError, match=r"shape \(7,\)"):
        pool.meta_gradient(torch.zeros(7), 0, range(4))


def test_prepared_batches_are_used_once_and_stale_ones_dropped(lines, params):
    drawn = []
    worker = Worker()
    worker.setup(lines(act=drawn.append, broken=(9,)), WorkerSettings())
    worker.prepare([range(2), range(2, 4)])
    assert drawn == [0, 1, 2, 3]
    worker.prepare([range(2, 4), range(8, 10)])  # task 9 cannot be drawn: left to the step that needs it
    drawn.clear()
    worker.meta_gradient(params, 0, [(0, range(2)), (1, range(2, 4))], 2)
    assert drawn == [0, 1]


def test_the_report_says_what_decides_the_bits(lines):
    with LocalPool(lines(), WorkerSettings(device="cpu")) as pool:
        (report,) = pool.reports
    assert report.fingerprints == ("lines-0", "lines-0")
    assert report.torch_version == torch.__version__
    assert report.device == "cpu"
    assert report.parameters == 6


def test_settings_out_of_range_are_refused():
    with pytest.raises(InputError, match=r"workers\.threads=0"):
        WorkerSettings(threads=0)
    with pytest.raises(InputError, match=r"workers\.device='tpu'"):
        WorkerSettings(device="tpu")


def test_an_abandoned_call_ends_between_two_batches_and_the_pool_goes_on(lines, params, first_numbers):
    drawn: list[int] = []
    with LocalPool(lines(act=drawn.append)) as pool:
        whole = pool.meta_gradient(params, 0, range(32))
        drawn.clear()
        pool.abandon = lambda: len(drawn) >= 8
        with pytest.raises(Abandoned):
            pool.meta_gradient(params, 0, range(32))
        assert drawn == list(range(8))
        with pytest.raises(Abandoned):
            pool.map(first_numbers, params, "test", range(32))
        assert drawn == list(range(8))
        pool.abandon = None
        assert torch.equal(pool.meta_gradient(params, 0, range(32)).gradient, whole.gradient)


def test_a_model_in_float64_gets_its_tasks_in_float64():
    tasks = Sinusoid(shots=3, queries=3)  # float32
    model = nn.Linear(1, 1).double()
    learner = MAML(inner_rate=0.01, loss=tasks.loss, metric=tasks.metric)
    with LocalPool(lambda: WorkerParts(tasks, tasks, model, learner)) as pool:
        flat = torch.zeros(2, dtype=torch.float64)
        assert pool.meta_gradient(flat, 0, range(3)).gradient.dtype == torch.float64


def test_workers_that_would_round_otherwise_are_refused(monkeypatch):
    """One of them on a machine without a C compiler."""
    config = load_config("omniglot-5w1s-maml", ["model.filters=4"])
    reports = []
    for can_run in (True, False):
        monkeypatch.setattr(library, "can_run", lambda can_run=can_run: can_run)
        with LocalPool(functools.partial(worker_parts, config.resolved())) as pool:
            reports += pool.reports
    assert [report.kernels for report in reports] == ["native", "task"]
    require_alike(reports[:1] * 2)
    with pytest.raises(
        InputError, match=r"kernels=native, worker 1 .* with task: .*no C compiler.*kernels=task for all"
    ):
        require_alike(reports)


def test_a_worker_without_a_compiler_is_refused_where_the_learner_is_to_be_compiled(monkeypatch):
    """The driver's machine may have one where a node has none."""
    config = load_config("sinusoid-10s-maml", ["model.hidden=[4]"])
    compiled = load_config("sinusoid-10s-maml", ["model.hidden=[4]", "algorithm.compile=true"])
    settings = WorkerSettings(device="cpu")
    with LocalPool(functools.partial(worker_parts, compiled.resolved()), settings) as pool:
        (report,) = pool.reports
    assert report.lacks == ""
    monkeypatch.setenv("CXX", "no-such-compiler")
    with LocalPool(functools.partial(worker_parts, config.resolved()), settings) as pool:
        assert pool.reports[0].lacks == ""  # nobody is to compile
    with pytest.raises(InputError, match=r"compile=True, but worker 0 on \S+ has no C\+\+ compiler .*compile=False"):
        LocalPool(functools.partial(worker_parts, compiled.resolved()), settings)
    lacking = replace(report, lacks="C++ compiler", host="node-7")
    with pytest.raises(InputError, match=r"worker 1 on node-7 has no C\+\+ compiler"):
        require_alike((report, lacking))


def test_a_model_without_such_layers_needs_no_compiler(monkeypatch):
    monkeypatch.setattr(library, "kernels", lambda real: pytest.fail("a compiler was asked for"))
    config = load_config("sinusoid-10s-maml", ["model.hidden=[4]"])
    with LocalPool(functools.partial(worker_parts, config.resolved())) as pool:
        assert pool.reports[0].kernels == "task"


@pytest.mark.skipif(sys.platform != "linux", reason="no glibc here")
def test_this_machines_libc_takes_the_thresholds(caplog):
    caplog.set_level(logging.WARNING, "raymeta.workers")
    keep_freed_memory()
    assert caplog.messages == []


@pytest.mark.parametrize(("largest", "taken"), [(1 << 30, 1 << 30), (1 << 25, 1 << 25), (0, None)])
def test_a_libc_that_refuses_a_threshold_is_asked_for_less_and_then_it_is_said(largest, taken, caplog):
    """Older glibc takes at most 32 MiB (HEAP_MAX_SIZE / 2), and says so by its result alone."""
    caplog.set_level(logging.WARNING, "raymeta.workers")
    held = {}

    def mallopt(setting, value):
        if setting == -3 and value > largest:
            return 0
        held[setting] = value
        return 1

    settle_thresholds(mallopt)
    assert held.get(-3) == taken
    assert held[-1] == 2**31 - 1
    assert len(caplog.messages) == (taken is None)
    assert taken is not None or "up to 32 MiB" in caplog.messages[0]
