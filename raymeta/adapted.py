"""Using the result: a trained learner that adapts to a new task in one call, and the fitted model that comes of it.

    learner = raymeta.load("runs/omniglot")
    fitted = learner.adapt(support_x, support_y)
    fitted.predict(query_x), fitted.predict_proba(query_x), fitted.save("fitted.safetensors")
    many = learner.adapt_many([(x, y), (other_x, other_y), ...])

Legend: S support rows, Q query rows, N classes, D targets.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from raymeta.algorithms import Adapted, Learner
from raymeta.algorithms.gradient_learner import GradientLearner
from raymeta.build import trained
from raymeta.build.sources import describe_source
from raymeta.config import load_config, to_predict
from raymeta.errors import InputError
from raymeta.metrics import of_classes
from raymeta.params import ParameterLayout, Params
from raymeta.run_directory import RunDirectory
from raymeta.tasks.source import TaskSource

# Rows that an inductive prediction computes at once; each row is treated alone, so the cut changes nothing.
ROWS_AT_ONCE = 1024
FORMAT = 1

# Or whatever has `__array__`, such as a data frame of pandas: of named columns those of the training table are taken,
# in its order.
Rows = np.ndarray | Tensor | Sequence[Any]


def load(
    place: str | os.PathLike[str], checkpoint: str | int = "best", device: str | torch.device = "cpu"
) -> TrainedLearner:
    """The learner that a run trained.

    Args:
        place: a run directory, a local path or a URI. It is enough alone: the training data is not needed.
        checkpoint: "best" (by validation), "latest" or a step.
        device: where it computes, such as "cuda"; what comes and goes are arrays on the CPU all the same.

    Raises:
        InputError: no run directory, a checkpoint that is missing, cut off or altered, a device that is not here.
    """
    run = RunDirectory(place)
    resolved = to_predict(run.read_config())
    found = run.load(checkpoint)
    return TrainedLearner.make(resolved, found.params, found.state["describes"], found.step, device)


@dataclass(frozen=True)
class TrainedLearner:
    """What meta-training leaves: model, learner and outer parameters.

    Attributes:
        description: what it was trained on: input_shape, outputs, loss, metric, images, ...
        resolved: the run's configuration.
        step: the outer steps of the checkpoint.
    """

    model: nn.Module
    learner: Learner
    params: Params
    description: Mapping[str, Any]
    resolved: Mapping[str, Any]
    step: int

    @classmethod
    def make(
        cls,
        resolved: Mapping[str, Any],
        params: Params,
        description: Mapping[str, Any],
        step: int,
        device: str | torch.device = "cpu",
    ) -> TrainedLearner:
        """From a configuration and a checkpoint's content. Raises InputError where torch has no such device."""
        model, learner, ordered = trained(load_config(resolved), params, description)
        try:
            model.to(device)
            ordered = {name: value.to(device) for name, value in ordered.items()}
        except (RuntimeError, AssertionError) as error:  # AssertionError: a torch that was built without CUDA
            raise InputError(f"device={str(device)!r}: {str(error).splitlines()[0]}; expected cpu, or cuda") from error
        return cls(model, learner, ordered, description, resolved, step)

    @classmethod
    def of(
        cls, model: nn.Module, learner: Learner, params: Params, tasks: TaskSource, inner_steps: int | None = None
    ) -> TrainedLearner:
        """From what a training in Python has: `TrainedLearner.of(model, learner, trainer.best_params, tasks)`.

        Args:
            tasks: the training's task source, for the shapes and units of a task.
            inner_steps: of an adaptation; None: as in training.

        Raises:
            InputError: the parameters are not those of this model and learner.
        """
        ordered = ParameterLayout.of(learner.init(model, 0)).ordered(params, "params")
        resolved = {"algorithm": {"name": type(learner).__name__}, "evaluation": {"inner_steps": inner_steps}}
        return cls(model, learner, ordered, describe_source(tasks), resolved, 0)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one row of x."""
        return tuple(self.description["input_shape"])

    @property
    def regression(self) -> bool:
        """Whether targets are numbers, not classes."""
        return not of_classes(self.learner.loss)

    def adapt(self, support_x: Rows, support_y: Rows, inner_steps: int | None = None) -> FittedModel:
        """Adapts to one task.

        Args:
            support_x: [S, *input_shape]; images as uint8 (0 to 255) or floating in [0, 1], ink bright where the
                training images were inverted; features in the units of the training table.
            support_y: [S] class labels (texts or numbers), or [S, D] (or [S]) numeric targets.
            inner_steps: None: as in the run's evaluation.

        Raises:
            InputError: rows of another shape or type, NaN, labels that do not fit.
        """
        x, y, labels = self._support(support_x, support_y)
        return FittedModel(self, self._adapted(x[None], y[None], inner_steps), labels)

    def adapt_many(
        self, tasks: Iterable[tuple[Rows, Rows]], inner_steps: int | None = None, at_once: int = 16
    ) -> list[FittedModel]:
        """Adapts to many tasks, several times as fast as one after the other; up to rounding with the same result.

        Args:
            tasks: pairs (support_x, support_y) as for `adapt`, of any sizes.
            inner_steps: as for `adapt`.
            at_once: how many tasks of one size are computed together at most.

        Raises:
            InputError: as `adapt`, naming the task's place (from 0).
        """
        found: dict[int, FittedModel] = {}
        alike: dict[tuple[int, int], dict[int, tuple[Tensor, Tensor, tuple[Any, ...] | None]]] = {}

        def compute(some: dict[int, tuple[Tensor, Tensor, tuple[Any, ...] | None]]) -> None:
            x, y = (torch.stack([given[part] for given in some.values()]) for part in (0, 1))  # type: ignore[misc]
            adapted = self._adapted(x, y, inner_steps)
            for place, (number, given) in enumerate(some.items()):
                found[number] = FittedModel(self, adapted.task(place), given[2])
            some.clear()

        for number, task in enumerate(tasks):
            if not isinstance(task, tuple | list) or len(task) != 2:
                raise InputError(f"task {number} is {type(task).__name__}; expected a pair (support_x, support_y)")
            try:
                given = self._support(*task)
            except InputError as error:
                raise InputError(f"task {number}: {error}") from error
            some = alike.setdefault((len(given[0]), len(given[2] or ())), {})
            some[number] = given
            if len(some) == at_once:
                compute(some)
        for some in alike.values():
            if some:
                compute(some)
        return [found[number] for number in sorted(found)]

    def _support(self, support_x: Rows, support_y: Rows) -> tuple[Tensor, Tensor, tuple[Any, ...] | None]:
        """x [S, ...] and y [S] or [S, D] as the learner takes them, and the labels."""
        x = self.inputs(support_x, "support_x")
        if self.regression:
            return x, self._targets(support_y, len(x)), None
        labels, y = self._classes(support_y, len(x))
        return x, y.to(x.device), labels

    def _adapted(self, x: Tensor, y: Tensor, inner_steps: int | None) -> Adapted:
        """Of x [T, S, ...] and y [T, S, ...]; what a task draws is what it draws alone."""
        steps = (self.resolved.get("evaluation") or {}).get("inner_steps") if inner_steps is None else inner_steps
        if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 0):
            raise InputError(f"inner_steps={steps!r}; expected a whole number of 0 or more")
        alone = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        return self.learner.adapt(self.model, self.params, x, y, tasks=alone, inner_steps=steps)

    def inputs(self, rows: Rows, name: str) -> Tensor:
        """[R, *input_shape] floating, checked, from an array or tensor. Raises InputError."""
        array = _array(self._in_order(rows, name), name)
        if array.shape[1:] != self.input_shape or not len(array):
            raise InputError(
                f"{name} has shape {array.shape}; the model was trained on rows of shape {self.input_shape}, expected "
                f"{('rows', *self.input_shape)}"
            )
        if not (np.issubdtype(array.dtype, np.floating) or np.issubdtype(array.dtype, np.integer)):
            raise InputError(f"{name} is of type {array.dtype}; expected numbers")
        like = next(iter(self.params.values()))
        if self.description["images"]:
            if array.dtype == np.uint8:
                array = array.astype(np.float32) / np.float32(255)
            elif not np.issubdtype(array.dtype, np.floating):
                raise InputError(f"{name} is of type {array.dtype}; expected images as uint8, or floating in [0, 1]")
        if not np.isfinite(array).all():
            row = int(np.argwhere(~np.isfinite(array))[0][0])
            raise InputError(f"{name} has a value in row {row} that is not finite; remove or replace it")
        if self.description["images"] and (array.min() < 0 or array.max() > 1):
            raise InputError(
                f"{name} has values from {array.min():g} to {array.max():g}; expected images as uint8, or floating in "
                "[0, 1] (divide by 255)"
            )
        units = self.units("x")
        if units is not None:
            array = (array - units[0]) / units[1]
        return torch.from_numpy(np.ascontiguousarray(array)).to(like)

    def _in_order(self, rows: Rows, name: str) -> Rows:
        """A data frame's feature columns in the order of training, where both have names."""
        features, columns = list(self.description.get("features") or ()), getattr(rows, "columns", None)
        if not features or columns is None or not hasattr(rows, "__array__"):
            return rows
        there = list(columns)
        if not all(isinstance(column, str) for column in there):
            return rows  # numbered, not named
        lacking = [column for column in features if column not in there]
        if lacking:
            raise InputError(
                f"{name} has the columns {', '.join(there)}, and lacks {lacking[0]!r}; the model was trained on "
                f"{', '.join(features)}"
            )
        return rows[features]  # type: ignore[call-overload]

    def units(self, which: Literal["x", "y"]) -> tuple[np.ndarray, np.ndarray] | None:
        """Mean and scale by which the training data's features ("x") or targets ("y") were standardised; None: they
        were not."""
        done = self.description["standardisation"]
        if done is None:
            return None
        return np.asarray(done[f"{which}_mean"]), np.asarray(done[f"{which}_scale"])

    def _targets(self, rows: Rows, count: int) -> Tensor:
        array = _array(rows, "support_y")
        if not (np.issubdtype(array.dtype, np.floating) or np.issubdtype(array.dtype, np.integer)):
            raise InputError(f"support_y is of type {array.dtype}; the model was trained on numeric targets")
        array = array[:, None] if array.ndim == 1 else array
        expected = (count, self.description["outputs"])
        if array.shape != expected:
            raise InputError(f"support_y has shape {array.shape}; expected {expected}")
        if not np.isfinite(array).all():
            row = int(np.argwhere(~np.isfinite(array))[0][0])
            raise InputError(f"support_y has a value in row {row} that is not finite; remove or replace it")
        units = self.units("y")
        if units is not None:
            array = (array - units[0]) / units[1]
        return torch.from_numpy(np.ascontiguousarray(array)).to(next(iter(self.params.values())))

    def _classes(self, rows: Rows, count: int) -> tuple[tuple[Any, ...], Tensor]:
        given = _array(rows, "support_y").tolist() if hasattr(rows, "__array__") else list(rows)
        given = [label.item() if isinstance(label, np.generic | Tensor) else label for label in given]
        if len(given) != count:
            raise InputError(f"support_y has {len(given)} labels for {count} rows of support_x")
        odd = next((label for label in given if not isinstance(label, str | int | float) or label != label), None)
        if odd is not None or None in given:
            raise InputError(f"support_y has the label {odd!r}; expected one text or number for each row")
        try:
            labels = tuple(sorted(set(given)))
        except TypeError as error:
            raise InputError("support_y has texts and numbers as labels; expected labels of one kind") from error
        wanted = 2 if self.learner.loss == "logistic" else self.description["outputs"]
        if self.learner.needs_head and len(labels) != wanted:
            raise InputError(
                f"support_y has {len(labels)} classes ({', '.join(map(str, labels[:8]))}); the model was trained for "
                f"{wanted}. Give {wanted} classes, or train with another tasks.ways."
            )
        if len(labels) < 2:
            raise InputError(f"support_y has the class {labels[0]!r} alone; expected two classes or more")
        places = {label: place for place, label in enumerate(labels)}
        return labels, torch.tensor([places[label] for label in given])


@dataclass(frozen=True)
class FittedModel:
    """A model adapted to one task.

    Attributes:
        labels: the classes in the order of `predict_proba`'s columns; None for regression.
    """

    trained: TrainedLearner
    adapted: Adapted
    labels: tuple[Any, ...] | None

    def outputs(self, x: Rows, transductive: bool = False) -> np.ndarray:
        """[Q, outputs] the model's own outputs: class scores, a logit, or targets (standardised as in training), with
        the logarithms of their scales after them where the learner says how sure it is."""
        rows = self.trained.inputs(x, "x")
        learner, model = self.trained.learner, self.trained.model
        if transductive:
            return learner.predict(model, self.adapted, rows[None], statistics="batch")[0].cpu().numpy()
        parts = [learner.predict(model, self.adapted, part[None])[0] for part in rows.split(ROWS_AT_ONCE)]
        return torch.cat(parts).cpu().numpy()

    def predict_proba(self, x: Rows, transductive: bool = False) -> np.ndarray:
        """[Q, N] the probability of each class, columns in the order of `labels`.

        Args:
            x: [Q, *input_shape].
            transductive: batch norms may use the statistics of all rows of x together (the papers' test); else each
                row is treated alone, with the support set's.

        Raises:
            InputError: rows of another shape or type; a regression model has no probabilities.
        """
        if self.labels is None:
            raise InputError("a regression model has no class probabilities; use predict")
        outputs = torch.from_numpy(self.outputs(x, transductive)).double()
        if self.trained.learner.loss == "logistic":
            positive = torch.sigmoid(outputs[:, 0])
            return torch.stack([1 - positive, positive], 1).numpy()
        return outputs.softmax(1).numpy()

    def predict(self, x: Rows, transductive: bool = False) -> np.ndarray:
        """[Q] the label of each row, or [Q, D] its targets; arguments as in `predict_proba`."""
        if self.labels is None:
            units, outputs = self.trained.units("y"), self.outputs(x, transductive)
            outputs = self.trained.learner.point(torch.from_numpy(outputs)).numpy()
            return outputs if units is None else (outputs * units[1] + units[0]).astype(outputs.dtype)
        return np.asarray(self.labels)[self.predict_proba(x, transductive).argmax(1)]

    def predict_scale(self, x: Rows, transductive: bool = False) -> np.ndarray:
        """[Q, D] the standard deviation of each row's targets, as far as the learner says how sure it is; arguments as
        in `predict_proba`.

        Raises:
            InputError: the learner predicts targets, or classes, alone.
        """
        scale = self.trained.learner.uncertainty(torch.from_numpy(self.outputs(x, transductive)))
        if scale is None:
            raise InputError(
                f"algorithm.name={self.trained.resolved['algorithm']['name']} does not say how sure it is of a numeric "
                "target; expected a neural process on such targets"
            )
        units = self.trained.units("y")
        return scale.numpy() if units is None else (scale.numpy() * units[1]).astype(scale.numpy().dtype)

    # As a plain module

    def module(self) -> nn.Module:
        """The user's own module with the adapted weights, in `eval()` mode; it predicts what `predict` does.

        Its batch norms carry the support set's mean and (biased) variance as running statistics. Where the training
        data was standardised (`TrainedLearner.units`), so are its inputs and outputs. With precision=bfloat16
        `predict` multiplies in bfloat16, the module in its own precision: they agree to that.

        Raises:
            InputError: the learner has no plain module, or a norm has no place for its statistics.
        """
        learner = self.trained.learner
        own = {name for name, _ in self.trained.model.named_parameters()}
        plain = isinstance(learner, GradientLearner) and learner.needs_head
        if not plain or not own.issuperset(self.adapted.fast):
            raise InputError(
                f"algorithm.name={self.trained.resolved['algorithm']['name']} predicts by more than the model itself "
                "(prototypes, a head of the task's own, context parameters), so that no state dict of the model can "
                "hold it; use save() and predict()"
            )
        tracking = [
            name
            for name, layer in self.trained.model.named_modules()
            if isinstance(layer, nn.modules.instancenorm._InstanceNorm) and layer.track_running_stats
        ]
        if tracking:
            raise InputError(
                f"instance norm {tracking[0]!r} tracks running statistics, which in eval() take the place of each "
                "row's own, and training uses the row's own; build it with track_running_stats=False, or use save() "
                "and predict()"
            )
        module = copy.deepcopy(self.trained.model).cpu().eval()
        fast = {name: value[0] for name, value in self.adapted.fast.items()}
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(fast.get(name, self.adapted.shared.get(name, parameter)))
            for name, calls in self.adapted.statistics.items():
                layer = module.get_submodule(name) if name else module
                if len(calls) != 1 or getattr(layer, "running_mean", None) is None:
                    why = f"is called {len(calls)} times" if len(calls) != 1 else "keeps no running statistics"
                    raise InputError(f"batch norm {name!r} {why}, so that no state dict can hold its statistics")
                layer.running_mean.copy_(calls[0][0][0])  # type: ignore[operator]
                layer.running_var.copy_(calls[0][1][0])  # type: ignore[operator]
        return module

    def state_dict(self) -> dict[str, Tensor]:
        """The state dict of `module()`, for the user's own code to load. Raises InputError as `module`."""
        return self.module().state_dict()

    # Saving

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes everything that `FittedModel.load` needs into one safetensors file, atomically.

        Raises:
            InputError: a path that cannot be written, or a learner that came of `TrainedLearner.of`.
        """
        if "model" not in self.trained.resolved:
            raise InputError(
                "this learner was made of Python objects, and no configuration says how to make its model again; keep "
                "state_dict(), or train with `raymeta train` and model.name=package.module:Class"
            )
        tensors = {
            **{f"params.{name}": value for name, value in self.trained.params.items()},
            **{f"fast.{name}": value for name, value in self.adapted.fast.items()},
            **{f"shared.{name}": value for name, value in self.adapted.shared.items()},
        }
        for name, calls in self.adapted.statistics.items():
            for call, (mean, variance) in enumerate(calls):
                tensors[f"mean.{call}.{name}"], tensors[f"variance.{call}.{name}"] = mean, variance
        tensors = {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}
        about = {
            "format": FORMAT,
            "labels": None if self.labels is None else list(self.labels),
            "description": dict(self.trained.description),
            "config": dict(self.trained.resolved),
            "step": self.trained.step,
            "names": list(tensors),
        }
        text = json.dumps(about)
        metadata = {"raymeta": text, "sha256": _digest(text, tensors)}
        target = Path(path).expanduser()
        partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
        try:
            partial.write_bytes(safetensors.torch.save(tensors, metadata))
            os.replace(partial, target)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise InputError(f"{target} cannot be written: {error}") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: str | torch.device = "cpu") -> FittedModel:
        """A fitted model that `save` wrote; `device` as in `raymeta.load`.

        Raises:
            InputError: another file, or one that is cut off or altered, a device that is not here.
        """
        try:
            with safetensors.safe_open(str(Path(path).expanduser()), "pt") as file:
                metadata = file.metadata() or {}
                text, sealed = metadata["raymeta"], metadata["sha256"]
                about = json.loads(text)
                # Copies: where a tensor begins in memory decides the last bits of some products.
                tensors = {name: file.get_tensor(name).clone() for name in about["names"]}
        except (OSError, KeyError, TypeError, ValueError, safetensors.SafetensorError) as error:
            raise InputError(
                f"{path} is no fitted model, or is cut off ({type(error).__name__}: {error}); expected a file that "
                "save() wrote"
            ) from error
        if _digest(text, tensors) != sealed:
            raise InputError(f"{path} was altered after it was saved: its SHA-256 differs")
        if about["format"] != FORMAT:
            raise InputError(f"{path} has format {about['format']}; this version of raymeta reads {FORMAT}")
        groups: dict[str, Params] = {}
        for name, value in tensors.items():
            group, _, rest = name.partition(".")
            groups.setdefault(group, {})[rest] = value
        statistics: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for key, mean in groups.get("mean", {}).items():
            statistics.setdefault(key.partition(".")[2], []).append((mean, groups["variance"][key]))
        made = TrainedLearner.make(about["config"], groups["params"], about["description"], about["step"], device)
        adapted = Adapted(groups.get("fast", {}), groups.get("shared", {}), statistics).to(device)
        return cls(made, adapted, None if about["labels"] is None else tuple(about["labels"]))


def _array(rows: Rows, name: str) -> np.ndarray:
    """`rows` as an array. Raises InputError where they are of several lengths."""
    if isinstance(rows, np.ndarray):
        return rows
    if isinstance(rows, Tensor):
        rows = rows.detach().cpu()
        return (rows.float() if rows.dtype == torch.bfloat16 else rows).numpy()
    try:
        if hasattr(rows, "__array__"):  # a data frame, say, whose iteration gives the names of its columns
            return np.array(rows)  # a copy: newer versions of pandas give memory that may not be written to
        return np.asarray([row.detach().cpu() if isinstance(row, Tensor) else row for row in rows])
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} cannot be made an array: {error}; expected rows of one shape") from error


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name, value in tensors.items():
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        digest.update(value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
