"""The store: what goes in comes out, mapped and not copied; damaged and foreign files are refused by name."""

from __future__ import annotations

import os
import pickle
import resource
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from raymeta.data.splits import random_splits
from raymeta.data.store import Store
from raymeta.data.writer import write_store
from raymeta.errors import InputError, RunError

ALL_TRAIN = random_splits((1.0, 0.0, 0.0), seed=0)


def images(count: int, shape: tuple[int, ...] = (1, 4, 4), seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def small_store(path: Path, **options: object) -> tuple[Store, np.ndarray, list[str]]:
    x = images(30)
    labels = [f"class{number}" for number in np.random.default_rng(1).permutation(np.repeat(np.arange(5), 6))]
    parts = [(x[:7], labels[:7]), (x[7:8], labels[7:8]), (x[8:], labels[8:])]
    return write_store(path, parts, random_splits((0.6, 0.2, 0.2), 0), **options), x, labels  # type: ignore[arg-type]


@pytest.mark.parametrize("batch_rows", [None, 1, 7])
def test_what_goes_in_comes_out_sorted_by_class(tmp_path: Path, batch_rows: int | None) -> None:
    store, x, labels = small_store(tmp_path / "s.arrow", batch_rows=batch_rows, licence="mine", source="here")
    assert len(store) == 30
    assert store.class_names == tuple(f"class{number}" for number in range(5))
    assert (store.shape, store.dtype) == ((1, 4, 4), np.uint8)
    assert (store.info.licence, store.info.source) == ("mine", "here")
    assert len(store.views) == (1 if batch_rows is None else -(-30 // batch_rows))
    for number, name in enumerate(store.class_names):
        expected = x[[position for position, label in enumerate(labels) if label == name]]
        assert np.array_equal(store.rows(np.array(store.class_rows(number))), expected)
    picked = np.array([29, 0, 14, 0])
    assert np.array_equal(store.rows(picked), np.concatenate([store.rows(np.array([row])) for row in picked]))
    assert store.rows(np.array([], dtype=np.int64)).shape == (0, 1, 4, 4)
    store.verify()


def test_batches_do_not_change_the_checksum(tmp_path: Path) -> None:
    one, _, _ = small_store(tmp_path / "one.arrow")
    many, _, _ = small_store(tmp_path / "many.arrow", batch_rows=4)
    assert one.checksum == many.checksum


def test_the_same_examples_make_the_same_bytes(tmp_path: Path) -> None:
    small_store(tmp_path / "one.arrow")
    small_store(tmp_path / "two.arrow")
    assert (tmp_path / "one.arrow").read_bytes() == (tmp_path / "two.arrow").read_bytes()


def test_features_of_any_shape(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(6, 7)).astype(np.float32)
    store = write_store(tmp_path / "s.arrow", [(x, ["a", "b"] * 3)], ALL_TRAIN, features=list("abcdefg"))
    assert np.array_equal(store.rows(np.arange(6)), x[[0, 2, 4, 1, 3, 5]])
    assert store.info.features == tuple("abcdefg")


@pytest.mark.parametrize("row", [-1, 30])
def test_rows_outside_are_refused(tmp_path: Path, row: int) -> None:
    store, _, _ = small_store(tmp_path / "s.arrow", batch_rows=7)
    with pytest.raises(IndexError, match=r"outside 0 \.\. 29"):
        store.rows(np.array([0, row]))


def test_opening_maps_the_file_and_allocates_nothing(tmp_path: Path) -> None:
    x = images(4000, (1, 64, 64))
    path = tmp_path / "s.arrow"
    write_store(path, [(x, [f"{row // 100}" for row in range(4000)])], ALL_TRAIN)
    before = pa.total_allocated_bytes()
    store = Store.open(path)
    assert pa.total_allocated_bytes() - before < 2**16 < x.nbytes
    assert not store.views[0].flags.writeable
    assert not store.views[0].flags.owndata
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("no /proc/self/maps here to see the mapping in")
    address = store.views[0].__array_interface__["data"][0]
    spans = [line.split()[0].split("-") for line in maps.read_text().splitlines() if line.endswith(str(path))]
    assert any(int(low, 16) <= address and address + x.nbytes <= int(high, 16) for low, high in spans)


def test_a_store_pickles_as_its_path(tmp_path: Path) -> None:
    store, _, _ = small_store(tmp_path / "s.arrow")
    message = pickle.dumps(store)
    assert len(message) < 500
    again = pickle.loads(message)
    assert again.checksum == store.checksum
    assert np.array_equal(again.rows(np.arange(30)), store.rows(np.arange(30)))


def test_any_arrow_reader_opens_it(tmp_path: Path) -> None:
    store, _, _ = small_store(tmp_path / "s.arrow")
    table = pa.ipc.open_file(tmp_path / "s.arrow").read_all()
    assert table.column_names == ["x", "class"]
    assert np.array_equal(table["x"].combine_chunks().to_numpy_ndarray(), store.rows(np.arange(30)))


# --- damaged and foreign files


@pytest.mark.parametrize("left", [0, 5, 200, 0.5, 0.99, -1])
def test_a_file_cut_off_is_refused(tmp_path: Path, left: float) -> None:
    path = tmp_path / "cut.arrow"
    small_store(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(left * len(whole)) if 0 < left < 1 else int(left)])
    with pytest.raises(InputError, match=r"cut\.arrow"):
        Store.open(path)


def test_every_altered_byte_is_found_or_harmless(tmp_path: Path) -> None:
    path = tmp_path / "altered.arrow"
    small_store(path)
    whole = path.read_bytes()
    content = Store.open(path).rows(np.arange(30))
    refused = 0
    for position in range(0, len(whole), 23):
        changed = bytearray(whole)
        changed[position] ^= 0x55
        path.write_bytes(changed)
        try:
            store = Store.open(path)
            store.verify()
        except InputError:
            refused += 1
        else:
            assert np.array_equal(store.rows(np.arange(30)), content)
    assert refused > len(whole) / 23 / 4


def test_altered_rows_are_found_by_verify(tmp_path: Path) -> None:
    path = tmp_path / "altered.arrow"
    store, _, _ = small_store(path)
    whole = path.read_bytes()
    row = store.rows(np.array([17])).tobytes()
    assert whole.count(row) == 1
    path.write_bytes(whole.replace(row, row[:-1] + bytes([row[-1] ^ 1])))
    with pytest.raises(InputError, match=r"altered\.arrow .* another SHA-256"):
        Store.open(path).verify()


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    foreign = tmp_path / "foreign.arrow"
    table = pa.table({"x": [1.0], "class": [1]})
    with pa.OSFile(str(foreign), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(InputError, match=r"foreign\.arrow is an Arrow file, but not a store"):
        Store.open(foreign)
    (tmp_path / "text.arrow").write_text("hello " * 100)
    with pytest.raises(InputError, match=r"text\.arrow cannot be read"):
        Store.open(tmp_path / "text.arrow")
    with pytest.raises(InputError, match="does not exist"):
        Store.open(tmp_path / "none.arrow")
    with pytest.raises(InputError, match="is a directory"):
        Store.open(tmp_path)


# --- what the writer refuses


def test_a_class_in_two_splits_is_refused(tmp_path: Path) -> None:
    splits = {"mine": {"train": ["a", "b"], "test": ["b"]}}
    with pytest.raises(InputError, match=r"'mine' has class 'b' in 'train' and in 'test'"):
        write_store(tmp_path / "s.arrow", [(images(4), list("abab"))], lambda names: splits)


def test_a_split_of_an_unknown_class_or_name_is_refused(tmp_path: Path) -> None:
    parts = [(images(4), list("abab"))]
    with pytest.raises(InputError, match=r"puts class 'c' in 'train'"):
        write_store(tmp_path / "s.arrow", parts, lambda names: {"mine": {"train": ["c"]}})
    with pytest.raises(InputError, match=r"has a split 'tset'; did you mean 'test'"):
        write_store(tmp_path / "s.arrow", parts, lambda names: {"mine": {"tset": ["a"]}})


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_number_that_is_not_finite_is_refused_by_its_row(tmp_path: Path, value: float) -> None:
    x = np.zeros((6, 3), np.float32)
    x[4, 1] = value
    with pytest.raises(InputError, match=r"mine: row 4 holds NaN or infinity"):
        write_store(tmp_path / "s.arrow", [(x[:3], list("aba")), (x[3:], list("bab"))], ALL_TRAIN, source="mine")


def test_other_shapes_types_and_one_class_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.arrow"
    with pytest.raises(InputError, match=r"row 2 has shape \(1, 5, 5\)"):
        write_store(path, [(images(2), list("ab")), (images(2, (1, 5, 5)), list("ab"))], ALL_TRAIN)
    with pytest.raises(InputError, match="rows of type int64"):
        write_store(path, [(np.zeros((2, 3), np.int64), list("ab"))], ALL_TRAIN)
    with pytest.raises(InputError, match="all 2 examples are of one class, 'a'"):
        write_store(path, [(images(2), list("aa"))], ALL_TRAIN)
    with pytest.raises(InputError, match="no examples"):
        write_store(path, [], ALL_TRAIN)
    assert os.listdir(tmp_path) == []


def test_a_failed_write_leaves_the_older_store(tmp_path: Path) -> None:
    path = tmp_path / "s.arrow"
    store, _, _ = small_store(path)
    with pytest.raises(InputError, match="one class"):
        write_store(path, [(images(2), list("aa"))], ALL_TRAIN)
    assert os.listdir(tmp_path) == ["s.arrow"]
    assert Store.open(path).checksum == store.checksum


# --- outputs that cannot be written


def asked_for() -> Iterator[tuple[np.ndarray, list[str]]]:
    raise AssertionError("no part is asked for where the output cannot be written")
    yield


def test_outputs_that_cannot_be_written_are_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "folder.arrow").mkdir()
    (tmp_path / "file").write_text("mine")
    for name, says in (
        ("folder.arrow", "folder.arrow is a folder"),
        ("s.parquet", r"s.parquet must have a name that ends in \.arrow"),
        ("file/s.arrow", "the output .*file/s.arrow cannot be written: "),
        ("n" * 300 + ".arrow", "cannot be written: File name too long"),
    ):
        with pytest.raises(InputError, match=says):
            write_store(tmp_path / name, asked_for(), ALL_TRAIN)
    with pytest.raises(InputError, match="is a folder"):
        write_store("", asked_for(), ALL_TRAIN)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder.arrow"]
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write everywhere")
def test_a_folder_without_permission_is_refused(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(InputError, match="cannot be written: Permission denied"):
        write_store(tmp_path / "closed" / "s.arrow", asked_for(), ALL_TRAIN)


@pytest.mark.parametrize("batches", [1, 40])
def test_no_room_is_said_in_one_sentence_and_leaves_nothing(tmp_path: Path, batches: int) -> None:
    # A limit on a file's size is met as a full disk is: in the middle of a write, or when the last bytes are flushed.
    parts = [(images(40), list("ab") * 20)] * batches
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(RunError, match=r"no room to write .*s\.arrow: File too large; .* twice its size"):
            write_store(tmp_path / "s.arrow", parts, ALL_TRAIN)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.listdir(tmp_path) == []


# --- splits


def test_random_splits_are_disjoint_whole_and_drawn_by_the_seed() -> None:
    names = tuple(f"c{number:03}" for number in range(101))
    made = random_splits((0.6, 0.2, 0.2), 3)(names)["random"]
    assert sorted([*made["train"], *made["validation"], *made["test"]]) == list(names)
    assert [len(made[split]) for split in ("train", "validation", "test")] == [61, 20, 20]
    assert made == random_splits((0.6, 0.2, 0.2), 3)(names)["random"]
    assert made != random_splits((0.6, 0.2, 0.2), 4)(names)["random"]


def test_small_splits_have_a_class_for_each_fraction() -> None:
    made = random_splits((0.98, 0.01, 0.01), 0)(("a", "b", "c"))["random"]
    assert [len(made[split]) for split in ("train", "validation", "test")] == [1, 1, 1]
    with pytest.raises(InputError, match="there are 2 classes, but the split needs 3"):
        random_splits((0.98, 0.01, 0.01), 0)(("a", "b"))


@pytest.mark.parametrize("fractions", [(0.5, 0.5), (0.5, 0.6, 0.1), (1.5, -0.5, 0.0), (float("nan"), 0.5, 0.5)])
def test_fractions_that_make_no_whole_are_refused(fractions: tuple[float, ...]) -> None:
    with pytest.raises(InputError, match="expected three numbers"):
        random_splits(fractions, 0)


def test_an_unknown_scheme_is_refused_with_the_nearest(tmp_path: Path) -> None:
    store, _, _ = small_store(tmp_path / "s.arrow")
    with pytest.raises(InputError, match=r"no split scheme 'randon'; did you mean 'random'\?"):
        store.splits("randon")
