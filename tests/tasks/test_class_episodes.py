"""Class episodes: disjoint, balanced, labelled right, and functions of (seed, split, number) alone."""

from __future__ import annotations

import dataclasses
import functools
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raymeta.data.omniglot import open_omniglot
from raymeta.data.splits import random_splits
from raymeta.data.writer import write_store
from raymeta.episodes import Episodes
from raymeta.errors import InputError
from raymeta.tasks.class_episodes import ROTATIONS, ClassEpisodes, Omniglot

CLASSES = 24
# Each class has its own number of rows, some more than are drawn by keys.
SIZES = [4 + number % 5 for number in range(CLASSES - 2)] + [70, 90]


def marked(class_number: int, row: int) -> np.ndarray:
    """An image [1, 4, 4] that says who it is: the class in one corner, the row in the next, a mark beside the first."""
    image = np.zeros((1, 4, 4), np.uint8)
    image[0, 0, 0], image[0, 0, 1], image[0, 0, 3] = class_number + 1, 255, row + 100
    return image


@functools.cache
def marked_store() -> str:
    folder = Path(tempfile.mkdtemp(prefix="raymeta-test-"))
    parts = [
        (np.stack([marked(number, row) for row in range(size)]), [f"class{number:02}"] * size)
        for number, size in enumerate(SIZES)
    ]
    write_store(folder / "marked.arrow", parts, random_splits((0.5, 0.25, 0.25), 1))
    return str(folder / "marked.arrow")


def read_marks(image: np.ndarray) -> tuple[int, int, int]:
    """Class, row and quarter turns of an image [1, 4, 4] in [0, 1]."""
    pixels = np.rint(image[0] * 255).astype(int)
    for turns in range(4):
        upright = np.rot90(pixels, -turns)
        if upright[0, 1] == 255:
            return int(upright[0, 0]) - 1, int(upright[0, 3]) - 100, turns
    raise AssertionError("no mark in the image")


def same(one: Episodes, other: Episodes) -> bool:
    pairs = [(getattr(one, field.name), getattr(other, field.name)) for field in dataclasses.fields(one)]
    return all((a is None and b is None) or torch.equal(a, b) for a, b in pairs)


@settings(max_examples=60)
@given(
    ways=st.integers(2, 6),
    shots=st.integers(1, 2),
    queries=st.integers(1, 2),
    rotations=st.sampled_from(ROTATIONS),
    split=st.sampled_from(["train", "validation", "test"]),
    seed=st.integers(0, 2**40),
    indices=st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=4, unique=True),
)
def test_every_task_is_what_it_should_be(
    ways: int, shots: int, queries: int, rotations: str, split: str, seed: int, indices: list[int]
) -> None:
    source = ClassEpisodes(marked_store(), ways, shots, queries, rotations=rotations, seed=seed)
    drawn = source.tasks(split, indices)
    members = source.data.splits()[split]
    assert drawn.tasks.tolist() == indices
    assert drawn.support_x.shape == (len(indices), ways * shots, 1, 4, 4)
    assert drawn.query_x.shape == (len(indices), ways * queries, 1, 4, 4)
    assert drawn.support_x.dtype == drawn.query_x.dtype == torch.float32
    assert drawn.classes is not None
    for task in range(len(indices)):
        seen: set[tuple[int, int, int]] = set()
        for x, y, each in (
            (drawn.support_x[task], drawn.support_y[task], shots),
            (drawn.query_x[task], drawn.query_y[task], queries),
        ):
            assert y.tolist() == [way for way in range(ways) for _ in range(each)]
            for image, way in zip(x.numpy(), y.tolist(), strict=True):
                class_number, row, turns = read_marks(image)
                number = int(drawn.classes[task, way])
                if rotations == "classes":
                    assert number % 4 == turns
                    number //= 4
                assert members[number] == class_number
                assert 0 <= row < SIZES[class_number]
                if rotations == "none":
                    assert turns == 0
                # Support and query share no drawing (of one class), and no drawing comes twice.
                assert (way, class_number, row) not in seen
                seen.add((way, class_number, row))
        turns_of_way = {way: set() for way in range(ways)}  # type: ignore[var-annotated]
        for image, way in zip(drawn.query_x[task].numpy(), drawn.query_y[task].tolist(), strict=True):
            turns_of_way[way].add(read_marks(image)[2])
        assert all(len(turns) == 1 for turns in turns_of_way.values())
        assert len(set(drawn.classes[task].tolist())) == ways
    # The order and the company of the numbers do not matter.
    backwards = source.tasks(split, indices[::-1])
    for position, index in enumerate(indices):
        place = len(indices) - 1 - position
        assert same(drawn.select(position, position + 1), backwards.select(place, place + 1))
        assert same(drawn.select(position, position + 1), source.tasks(split, [index]))


def test_draws_are_uniform() -> None:
    source = ClassEpisodes(marked_store(), ways=3, shots=1, queries=2, rotations="per_class")
    drawn = source.tasks("train", range(4000))
    assert drawn.classes is not None
    members = source.data.splits()["train"]
    counts = np.bincount(drawn.classes.flatten().numpy(), minlength=len(members))
    expected = 4000 * 3 / len(members)
    assert abs(counts - expected).max() < 6 * expected**0.5
    turns = np.array([read_marks(image)[2] for image in drawn.support_x[:1000].flatten(0, 1).numpy()])
    assert abs(np.bincount(turns, minlength=4) - 750).max() < 6 * 750**0.5
    rows: dict[int, list[int]] = {}
    for image in drawn.support_x.flatten(0, 1).numpy():
        class_number, row, _ = read_marks(image)
        rows.setdefault(class_number, []).append(row)
    for class_number, found in rows.items():
        expected = len(found) / SIZES[class_number]
        assert abs(np.bincount(found, minlength=SIZES[class_number]) - expected).max() < 6 * expected**0.5


def test_seeds_splits_and_numbers_draw_other_tasks() -> None:
    one = Omniglot(seed=1)
    assert not torch.equal(one.tasks("train", [0]).support_x, one.tasks("train", [1]).support_x)
    assert not torch.equal(one.tasks("train", [0]).support_x, one.tasks("test", [0]).support_x)
    assert not torch.equal(one.tasks("train", [0]).support_x, Omniglot(seed=2).tasks("train", [0]).support_x)


PROGRAM = """
import hashlib, sys
from raymeta.tasks.class_episodes import ClassEpisodes
source = ClassEpisodes(sys.argv[1], ways=3, shots=1, queries=2, rotations="classes", seed=7)
drawn = source.tasks("test", [12, 3, 2**40])
print(hashlib.sha256(drawn.support_x.numpy().tobytes() + drawn.query_x.numpy().tobytes()).hexdigest())
print(source.fingerprint())
"""


def test_another_process_draws_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    root = str(Path(__file__).parents[2])
    found = subprocess.run(
        [sys.executable, "-c", PROGRAM, marked_store()], cwd=root, check=True, capture_output=True, text=True
    )
    exec(PROGRAM.replace("sys.argv[1]", repr(marked_store())), {})
    assert found.stdout == capsys.readouterr().out
    assert len(found.stdout.split()) == 2


def test_omniglot_tasks() -> None:
    source = Omniglot()
    assert (source.outputs, source.input_shape, source.classes) == (5, (1, 28, 28), 1028)
    assert (source.loss, source.metric) == ("cross_entropy", "accuracy")
    drawn = source.tasks("test", range(50))
    assert drawn.query_x.shape == (50, 75, 1, 28, 28)
    assert float(drawn.query_x.min()) == 0
    assert float(drawn.query_x.max()) == 1
    assert Omniglot(rotations="classes").classes == 4112
    assert Omniglot(split_scheme="lake").classes == 806


def test_a_turned_class_is_the_drawing_turned() -> None:
    store = open_omniglot()
    source = Omniglot(ways=20, rotations="classes", queries=1)
    drawn = source.tasks("train", [5])
    assert drawn.classes is not None
    members = store.splits()["train"]
    for way, number in enumerate(drawn.classes[0].tolist()):
        drawings = store.rows(np.array(store.class_rows(members[number // 4])))
        turned = np.rot90(drawings, number % 4, axes=(2, 3)).astype(np.float32) / 255
        assert any(np.array_equal(drawn.support_x[0, way].numpy(), drawing) for drawing in turned)


def test_features_are_left_as_they_are(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(60, 3)).astype(np.float32)
    write_store(
        tmp_path / "f.arrow", [(x, [f"{row // 10}" for row in range(60)])], random_splits((0.34, 0.33, 0.33), 0)
    )
    source = ClassEpisodes(str(tmp_path / "f.arrow"), ways=2, queries=2)
    drawn = source.tasks("test", range(10))
    assert {tuple(row) for row in drawn.query_x.flatten(0, 1).tolist()} <= {tuple(row) for row in x.tolist()}
    with pytest.raises(InputError, match=r"tasks.rotations='per_class', but the rows of .*f\.arrow have shape \(3,\)"):
        dataclasses.replace(source, rotations="per_class").check()


def test_settings_travel_without_the_data() -> None:
    source = Omniglot()
    source.check()
    source.tasks("train", [0])
    message = pickle.dumps(source)
    assert len(message) < 1000
    assert same(pickle.loads(message).tasks("train", [3]), source.tasks("train", [3]))
    other = dataclasses.replace(source, ways=20, queries=5)
    assert (other.outputs, other.seed) == (20, source.seed)


def test_fingerprints_follow_settings_and_data(tmp_path: Path) -> None:
    source = ClassEpisodes(marked_store(), ways=3, queries=2)
    prints = {
        made.fingerprint()
        for made in (
            source,
            dataclasses.replace(source, ways=4),
            dataclasses.replace(source, seed=1),
            dataclasses.replace(source, rotations="per_class"),
        )
    }
    assert len(prints) == 4
    assert source.fingerprint() == ClassEpisodes(marked_store(), ways=3, queries=2).fingerprint()
    # The same path, other data.
    path = tmp_path / "s.arrow"
    found = []
    for value in (0, 1):
        x = np.full((80, 1, 4, 4), value, np.uint8)
        write_store(path, [(x, [f"{row // 8:02}" for row in range(80)])], random_splits((0.4, 0.3, 0.3), 0))
        found.append(ClassEpisodes(str(path), ways=3, queries=2).fingerprint())
    assert found[0] != found[1]


def test_too_few_classes_or_rows_are_refused() -> None:
    source = ClassEpisodes(marked_store(), ways=20, shots=1, queries=2)
    with pytest.raises(InputError, match=r"tasks\.ways=20, but split 'train' has 12 classes with the 3 images that"):
        source.check()
    with pytest.raises(InputError, match=r"shots=1 and queries=2 need; its largest class has 8\. Lower tasks\.ways, "):
        source.tasks("test", [0])
    dataclasses.replace(source, ways=12).check(["train"])
    with pytest.raises(InputError, match=r"tasks\.ways=12, but split 'validation' has 6 classes"):
        dataclasses.replace(source, ways=12).check(["train", "validation"])
    with pytest.raises(InputError, match=r"tasks\.ways=5, but split 'train' has 0 classes with the 101 images"):
        Omniglot(queries=100).check()
    # Classes with too few rows are left out, whatever the split has of them.
    few = ClassEpisodes(marked_store(), ways=2, shots=1, queries=7)
    enough = {number for number, size in enumerate(SIZES) if size >= 8}
    drawn = few.tasks("train", range(50))
    assert drawn.classes is not None
    assert set(few.data.splits()["train"][drawn.classes.flatten().numpy()].tolist()) <= enough


def test_a_split_without_classes_is_refused(tmp_path: Path) -> None:
    x = np.zeros((40, 1, 4, 4), np.uint8)
    write_store(tmp_path / "s.arrow", [(x, [f"{row // 8}" for row in range(40)])], random_splits((1.0, 0.0, 0.0), 0))
    source = ClassEpisodes(str(tmp_path / "s.arrow"), ways=3, queries=2)
    source.check(["train"])
    with pytest.raises(InputError, match=r"split 'validation' of scheme 'random' in .* has no classes"):
        source.check()
    assert source.fingerprint()


def test_an_altered_store_is_refused_before_the_start(tmp_path: Path) -> None:
    path = tmp_path / "s.arrow"
    content = Path(marked_store()).read_bytes()
    row = marked(3, 2).tobytes()
    assert content.count(row) == 1
    path.write_bytes(content.replace(row, marked(3, 3).tobytes()))
    with pytest.raises(InputError, match=r"s\.arrow is cut off or was altered"):
        ClassEpisodes(str(path), ways=2, queries=2).check()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"ways": 1}, r"tasks\.ways=1; expected 2 or more"),
        ({"shots": 0}, r"tasks\.shots=0; expected 1"),
        ({"queries": -3}, r"tasks\.queries=-3; expected 1"),
        ({"rotations": "perclass"}, r"tasks\.rotations='perclass'; did you mean 'per_class'\?"),
    ],
)
def test_settings_out_of_range_are_refused(change: dict[str, object], match: str) -> None:
    with pytest.raises(InputError, match=match):
        Omniglot(**change)  # type: ignore[arg-type]


def test_unknown_schemes_and_stores_are_refused() -> None:
    with pytest.raises(InputError, match=r"no split scheme 'vinyal'; did you mean 'vinyals'"):
        Omniglot(split_scheme="vinyal").check()
    with pytest.raises(InputError, match=r"nowhere\.arrow does not exist"):
        ClassEpisodes("nowhere.arrow").check()


def test_shifts_move_training_images_by_no_more_than_they_say(tmp_path: Path) -> None:
    x = np.zeros((48, 1, 9, 9), np.uint8)
    x[:, 0, 4, 4] = 255
    write_store(tmp_path / "s.arrow", [(x, [f"{row // 4:02}" for row in range(48)])], random_splits((0.4, 0.3, 0.3), 0))
    source = ClassEpisodes(str(tmp_path / "s.arrow"), ways=3, queries=3, shift=2)
    source.check()
    drawn = source.tasks("train", range(100))
    places = torch.cat([drawn.support_x, drawn.query_x], dim=1).flatten(0, 1)[:, 0].nonzero()
    assert len(places) == 100 * 12  # no image lost its point
    assert {tuple(place) for place in places[:, 1:].tolist()} == {
        (row, column) for row in range(2, 7) for column in range(2, 7)
    }
    for split in ("validation", "test"):
        assert set(map(tuple, source.tasks(split, range(20)).query_x.nonzero()[:, 3:].tolist())) == {(4, 4)}
    one = source.tasks("train", [7])
    assert same(one, drawn.select(7, 8))
    with pytest.raises(InputError, match=r"tasks\.shift=9, but the rows of .* have shape \(1, 9, 9\)"):
        dataclasses.replace(source, shift=9).check()
