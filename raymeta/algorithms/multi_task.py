"""The multi-task baseline: train one network on all training tasks together, then fine-tune it on a task.

What meta-learning has to be better than: for regression the pretrained network of the MAML paper (arXiv 1703.03400,
section 5.1); for classification a classifier over all training classes whose embedding gets a new head (Baseline of
Chen et al. 2019, arXiv 1904.04232).

Legend: T tasks, N ways, S support rows, Q query rows, D embedding size, C training classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from raymeta.algorithms.explain import explained
from raymeta.algorithms.gradient_learner import rows_of_step
from raymeta.algorithms.inner_loop import InnerLoop, Number, Rates
from raymeta.algorithms.learner import Adapted, MiniBatches, Statistics, StepPlan
from raymeta.algorithms.maml import MAML
from raymeta.algorithms.outer_gradients import OuterGradient, QueryResult, direct
from raymeta.algorithms.task_model import TaskModel, products
from raymeta.episodes import Episodes, filled, joined_mask
from raymeta.errors import InputError
from raymeta.ops.batch_norm import LayerStatistics
from raymeta.ops.draws import task_keys
from raymeta.params import MODEL, Params, model_params
from raymeta.seeding import torch_generator

JOINT_WEIGHT, JOINT_BIAS = "joint_head.weight", "joint_head.bias"
# The task's own head among the fast parameters: names that no parameter of a module can have.
HEAD_WEIGHT, HEAD_BIAS = "task head/weight", "task head/bias"
# Beside them in what an adaptation leaves: [T, N] bool, the classes of other tasks of the batch that a task lacks.
HEAD_ABSENT = "task head/absent"


@dataclass(frozen=True, kw_only=True)
class MultiTask(MAML):
    """Outer loss: sum over the tasks of the mean over all their rows, support and query, of loss(f_theta(x), y).
    Adaptation: theta_{i+1} = theta_i - inner_rate * grad L_support(theta_i), `inner_steps` times from theta.

    With classes (`training_classes` given) the model is an embedding: a joint linear head over all C training classes
    is trained with it, and a task fine-tunes a new linear head that starts at 0. Without classes (regression) the
    network itself is trained on all tasks and fine-tuned.

    Attributes:
        fine_tune: "all" parameters, or the "head" alone (only with classes).

    Departs from the papers: the rows of a training step come task by task, with the classes that its tasks have; Chen
    et al. fine-tune the head alone, which is `fine_tune` = "head", by mini-batches, which are `inner_batch`; the MAML
    paper tunes the rate of fine-tuning, which is a setting here.
    """

    inner_steps: int = 50
    inner_rate: float = 0.01
    fine_tune: Literal["all", "head"] = "all"
    embedding_size: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        expected = "exact: joint training has no inner loop to differentiate"
        self.require(self.outer_gradient == "exact", "outer_gradient", expected)
        self.require(not self.proximal_weight, "proximal_weight", "0: fine-tuning has no proximal term")

    @property
    def needs_head(self) -> bool:  # type: ignore[override]
        return self.training_classes is None

    def init(self, model: nn.Module, seed: int) -> Params:
        params = super().init(model, seed)
        if self.training_classes is None:
            if self.fine_tune == "head":
                raise InputError("algorithm.fine_tune='head' needs tasks with classes; expected 'all' for regression")
            return params
        assert self.embedding_size is not None, "the build step fills embedding_size in"
        like = next(iter(params.values()))
        bound = self.embedding_size**-0.5
        unit = torch.rand((self.training_classes, self.embedding_size), generator=torch_generator(seed, "joint_head"))
        params[JOINT_WEIGHT] = ((2 * unit - 1) * bound).to(like)
        params[JOINT_BIAS] = torch.zeros(self.training_classes).to(like)
        return params

    def plan(self, params: Params, batch: Episodes, step: int) -> StepPlan:
        keys = {"joint": task_keys(self.seed, "joint", step, batch.tasks, batch.support_x.device)}
        return StepPlan(keys)

    def summed_gradient(self, model: TaskModel, params: Params, batch: Episodes, plan: StepPlan) -> OuterGradient:
        x, y, mask = _joined(batch)
        keys = plan.keys["joint"]

        def query(leaves: Params) -> QueryResult:
            outputs, targets = model.outputs({}, model_params(leaves), x, mask, keys), y
            if self.training_classes is not None:
                if batch.classes is None:
                    raise InputError("tasks.name: the multi-task baseline needs tasks that number their classes")
                targets = batch.classes.gather(1, y)
                outputs = torch.nn.functional.linear(outputs, leaves[JOINT_WEIGHT], leaves[JOINT_BIAS])
            return QueryResult(self.losses(outputs, targets, mask), self.metrics(outputs.detach(), targets, mask))

        return direct(params, query)

    @products("float32")
    def adapt(
        self,
        model: nn.Module,
        params: Params,
        support_x: Tensor,
        support_y: Tensor,
        support_mask: Tensor | None = None,
        tasks: Tensor | None = None,
        inner_steps: int | None = None,
    ) -> Adapted:
        if self.training_classes is None:
            return super().adapt(model, params, support_x, support_y, support_mask, tasks, inner_steps)
        prepared, weights, count = self.prepared(model), model_params(params), len(support_x)
        support_x, support_y = filled(support_x, support_y, support_mask)
        ways = int(support_y.max()) + 1
        member = torch.nn.functional.one_hot(support_y, ways)  # rows that do not count repeat one that does
        absent = member.sum(1) == 0
        steps = self.inner_steps if inner_steps is None else inner_steps
        numbers = torch.arange(count) if tasks is None else tasks
        batches = self.mini_batches(support_x.shape[1], support_mask, numbers, "adapt", 0, steps, support_x.device)
        names = tuple(weights) if self.fine_tune == "all" else ()
        shared = {name: value for name, value in weights.items() if name not in names}
        support = [value for value in (support_x, support_y, absent, support_mask) if value is not None]

        def rebuilt(tensors: list[Tensor], rows: MiniBatches | None) -> tuple[InnerLoop, Params]:
            own = dict(zip(params, tensors, strict=False))
            support_x, support_y, absent, *masks = tensors[len(params) :]
            like, weights = own[JOINT_WEIGHT], model_params(own)

            def start(params: Params) -> Params:
                body = {name: params[MODEL + name].expand(count, *weights[name].shape) for name in names}
                head = {HEAD_WEIGHT: like.new_zeros(count, ways, like.shape[1]), HEAD_BIAS: like.new_zeros(count, ways)}
                return {**body, **head}

            def objective(fast: Params, params: Params, number: Number) -> Tensor:
                mask = masks[0] if masks else None
                if embedded is not None:
                    return self.losses(_scores(embedded, fast, absent), support_y, mask)
                x, y, mask = rows_of_step(support_x, support_y, mask, rows, number)
                shared = {name: value for name, value in weights.items() if name not in names}
                return self.losses(_with_head(prepared, fast, shared, absent, x, mask, None), y, mask)

            def rates(params: Params, number: Number) -> Rates:
                return dict.fromkeys([*names, HEAD_WEIGHT, HEAD_BIAS], self.inner_rate)

            return InnerLoop(steps, start, objective, rates, self.rule()), own

        with explained(prepared, weights, support_x[0]):
            embedded, advance, tensors = None, None, [*params.values(), *support]
            if not names and batches is None:  # the same in every step
                with torch.no_grad():
                    embedded = prepared.outputs({}, shared, support_x, support_mask)
            else:
                advance = self.recorded_steps(prepared, tuple(params), tensors, batches, steps, rebuilt)
            fast = rebuilt(tensors, batches)[0].run(params, advance)
            body = {name: fast[name] for name in names}
            statistics = prepared.support_statistics(body, shared, support_x, support_mask)
        return Adapted({**fast, HEAD_ABSENT: absent}, shared, statistics)

    @products("float32")
    def predict(
        self,
        model: nn.Module,
        adapted: Adapted,
        query_x: Tensor,
        query_mask: Tensor | None = None,
        statistics: Statistics = "support",
    ) -> Tensor:
        if self.training_classes is None:
            return super().predict(model, adapted, query_x, query_mask, statistics)
        given = adapted.statistics if statistics == "support" else None
        with torch.no_grad():
            absent = adapted.fast[HEAD_ABSENT]
            return _with_head(self.prepared(model), adapted.fast, adapted.shared, absent, query_x, query_mask, given)


def _with_head(
    model: TaskModel,
    fast: Params,
    shared: Params,
    absent: Tensor,
    x: Tensor,
    mask: Tensor | None,
    given: LayerStatistics | None,
) -> Tensor:
    """[T, B, N]: the embedding of x, and the task's own linear head on it; -inf for classes that it lacks."""
    body = {name: value for name, value in fast.items() if name not in (HEAD_WEIGHT, HEAD_BIAS, HEAD_ABSENT)}
    return _scores(model.outputs(body, shared, x, mask, None, given), fast, absent)


def _scores(embedded: Tensor, fast: Params, absent: Tensor) -> Tensor:
    """[T, B, N] of embedded [T, B, E]."""
    scores = embedded @ fast[HEAD_WEIGHT].transpose(1, 2) + fast[HEAD_BIAS][:, None]
    return scores.masked_fill(absent[:, None], -torch.inf)


def _joined(batch: Episodes) -> tuple[Tensor, Tensor, Tensor | None]:
    """Support and query rows of each task as one set: x [T, S+Q, ...], y, mask."""
    x = torch.cat([batch.support_x, batch.query_x], 1)
    return x, torch.cat([batch.support_y, batch.query_y], 1), joined_mask(batch)
