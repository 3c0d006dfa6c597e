"""Importers on real files made here: what goes in comes out, and each refusal names file, row and column."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.feather
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, TensorDataset

from raymeta.data.importers import (
    describe,
    import_examples,
    import_images,
    import_omniglot,
    import_table,
    is_omniglot,
)
from raymeta.data.omniglot import open_omniglot
from raymeta.data.store import Store
from raymeta.errors import InputError

Write = Callable[[pa.Table, Path], None]


def save_image(path: Path, pixels: np.ndarray, mode: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(path)


def class_folders(root: Path, classes: int = 5, each: int = 4, shape: tuple[int, ...] = (6, 6, 3)) -> np.ndarray:
    """Class folders of random images; the pixels [classes, each, *shape]."""
    pixels = np.random.default_rng(0).integers(0, 256, (classes, each, *shape), dtype=np.uint8)
    for number in range(classes):
        for drawing in range(each):
            save_image(root / f"class{number}" / f"{drawing}.png", pixels[number, drawing])
    return pixels


# --- class folders of images


def test_class_folders_come_out_as_they_went_in(tmp_path: Path) -> None:
    pixels = class_folders(tmp_path / "in")
    summary = import_images(tmp_path / "in", tmp_path / "out.arrow", licence="CC0")
    assert (summary.classes, summary.examples) == (5, 20)
    assert (summary.smallest_class, summary.largest_class) == (4, 4)
    assert (summary.shape, summary.dtype) == ((3, 6, 6), "uint8")
    assert summary.splits == {"random": {"train": 3, "validation": 1, "test": 1}}
    store = Store.open(tmp_path / "out.arrow")
    assert store.class_names == tuple(f"class{number}" for number in range(5))
    assert np.array_equal(store.rows(np.arange(20)), np.moveaxis(pixels.reshape(20, 6, 6, 3), -1, 1))
    assert describe(store) == summary
    assert any("5 classes, 20 examples (4 in a class)" in line for line in summary.lines())
    assert any("CC0" in line for line in summary.lines())
    assert summary.to_dict()["classes"] == 5


def test_a_zip_is_read_as_its_folder(tmp_path: Path) -> None:
    class_folders(tmp_path / "in")
    import_images(tmp_path / "in", tmp_path / "folder.arrow")
    with zipfile.ZipFile(tmp_path / "in.zip", "w") as archive:
        for file in sorted((tmp_path / "in").rglob("*.png")):
            archive.write(file, Path("everything") / file.relative_to(tmp_path / "in"))
        archive.writestr("__MACOSX/everything/x.txt", "clutter")
    import_images(tmp_path / "in.zip", tmp_path / "zip.arrow")
    stores = [Store.open(tmp_path / f"{name}.arrow") for name in ("folder", "zip")]
    assert stores[0].class_names == stores[1].class_names
    assert stores[0].info.rows_sha256 == stores[1].info.rows_sha256


def test_size_colour_and_inversion(tmp_path: Path) -> None:
    blocks = np.arange(9, dtype=np.uint8).reshape(3, 3) * 20
    for name in "ab":
        save_image(tmp_path / "in" / name / "1.png", np.kron(blocks, np.ones((4, 4), np.uint8)))
        save_image(tmp_path / "in" / name / "2.bmp", blocks)
    options = {"size": 3, "color": "grayscale", "fractions": (1, 0, 0)}
    import_images(tmp_path / "in", tmp_path / "plain.arrow", **options)  # type: ignore[arg-type]
    # Box averaging of blocks of one value gives these values.
    assert np.array_equal(Store.open(tmp_path / "plain.arrow").rows(np.arange(4)), np.stack([blocks[None]] * 4))
    import_images(tmp_path / "in", tmp_path / "turned.arrow", invert=True, **options)  # type: ignore[arg-type]
    turned = Store.open(tmp_path / "turned.arrow")
    assert turned.info.inverted
    assert np.array_equal(turned.rows(np.arange(4)), 255 - np.stack([blocks[None]] * 4))


def test_split_folders_are_the_split(tmp_path: Path) -> None:
    for split, name in (("train", "a"), ("train", "b"), ("val", "c"), ("test", "d/e")):
        save_image(tmp_path / "in" / split / name / "1.png", np.zeros((4, 4), np.uint8))
    summary = import_images(tmp_path / "in", tmp_path / "out.arrow", color="grayscale")
    assert summary.splits == {"given": {"train": 2, "validation": 1, "test": 1}}
    store = Store.open(tmp_path / "out.arrow")
    assert store.class_names == ("a", "b", "c", "d/e")
    save_image(tmp_path / "in" / "test" / "a" / "1.png", np.zeros((4, 4), np.uint8))
    with pytest.raises(InputError, match=r"class 'a' is in 'train' here, and in 'test' before"):
        import_images(tmp_path / "in", tmp_path / "out.arrow", color="grayscale")


def test_image_refusals_name_the_file(tmp_path: Path) -> None:
    out = tmp_path / "out.arrow"

    def refused(match: str, folder: str, **options: object) -> None:
        with pytest.raises(InputError, match=match):
            import_images(tmp_path / folder, out, **options)  # type: ignore[arg-type]
        assert not out.exists()

    refused("none is no folder and no .zip", "none")
    class_folders(tmp_path / "size", shape=(6, 6))
    save_image(tmp_path / "size" / "class3" / "9.png", np.zeros((6, 7), np.uint8))
    refused(r"class3/9\.png is 6 pixels high and 7 wide, .*class0/0\.png 6 and 6", "size")
    refused("color='blue'; expected grayscale or rgb", "size", color="blue", size=6)
    refused(r"size=\(0, 0\)", "size", size=0)
    class_folders(tmp_path / "broken")
    broken = tmp_path / "broken" / "class2" / "1.png"
    broken.write_bytes(broken.read_bytes()[:60])
    refused(r"class2/1\.png cannot be read as an image", "broken")
    class_folders(tmp_path / "foreign")
    (tmp_path / "foreign" / "readme.txt").write_text("beside the classes: left out")
    import_images(tmp_path / "foreign", tmp_path / "fine.arrow")
    (tmp_path / "foreign" / "class1" / "notes.txt").write_text("in a class")
    refused(r"class1/notes\.txt is no image", "foreign")
    class_folders(tmp_path / "loose")
    save_image(tmp_path / "loose" / "top.png", np.zeros((6, 6, 3), np.uint8))
    refused(r"top\.png lies in no class folder", "loose")
    class_folders(tmp_path / "deep")
    save_image(tmp_path / "deep" / "class0" / "0.png", np.zeros((6, 6), np.uint16))
    refused(r"class0/0\.png has pixels of type I;16", "deep")
    class_folders(tmp_path / "single", classes=1)
    refused("images of single: all 4 examples are of one class, 'class0'", "single")
    (tmp_path / "empty").mkdir()
    refused("empty has no class folders", "empty")
    (tmp_path / "bad.zip").write_text("no zip")
    refused(r"bad\.zip cannot be read as a .zip", "bad.zip")


# --- the original Omniglot


def original_omniglot(root: Path, names: list[str]) -> None:
    """Black strokes on white paper, 105 x 105, 1 bit, in the layout of the release."""
    random = np.random.default_rng(0)
    for name in names:
        for drawing in range(3):
            paper = np.ones((105, 105), bool)
            paper[random.integers(0, 80) :, 40:60] = False
            (root / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(paper).save(root / name / f"0001_{drawing:02}.png")


def test_the_original_omniglot_gets_its_splits(tmp_path: Path) -> None:
    embedded = open_omniglot()
    chosen = [embedded.class_names[number] for numbers in embedded.splits("vinyals").values() for number in numbers[:3]]
    original_omniglot(tmp_path / "images_background", chosen)
    summary = import_omniglot([tmp_path / "images_background"], tmp_path / "o.arrow")
    assert list(summary.splits) == ["vinyals", "lake", "random"]
    assert summary.splits["vinyals"] == {"train": 3, "validation": 3, "test": 3}
    assert (summary.classes, summary.examples, summary.shape) == (9, 27, (1, 28, 28))
    store = Store.open(tmp_path / "o.arrow")
    for split, numbers in store.splits("vinyals").items():
        expected = {embedded.class_names[number] for number in embedded.splits("vinyals")[split]}
        assert {store.class_names[number] for number in numbers} <= expected
    x = store.rows(np.arange(27))
    assert x[:, 0, 27, 13].min() == 255  # ink
    assert x[:, 0, :, 0].max() == 0  # paper
    # 105 = 28 * 3.75: a border pixel of the stroke is the mean of the area that it covers.
    assert set(np.unique(x[:, 0, 27])) == {0, 85, 255}


def test_omniglot_with_other_classes_gets_a_random_split(tmp_path: Path) -> None:
    original_omniglot(tmp_path / "mine", [f"Elvish/character{number:02}" for number in range(5)])
    with zipfile.ZipFile(tmp_path / "mine.zip", "w") as archive:
        for file in (tmp_path / "mine").rglob("*.png"):
            archive.write(file, file.relative_to(tmp_path))
    for source in ("mine", "mine.zip"):
        summary = import_omniglot([tmp_path / source], tmp_path / "o.arrow")
        assert summary.splits == {"random": {"train": 3, "validation": 1, "test": 1}}
    class_folders(tmp_path / "other")
    with pytest.raises(InputError, match="not the original Omniglot"):
        import_omniglot([tmp_path / "other"], tmp_path / "o.arrow")


def test_omniglot_is_known_by_its_folders(tmp_path: Path) -> None:
    names = list(open_omniglot().class_names)
    original_omniglot(tmp_path / "images_background", names[:2])
    original_omniglot(tmp_path / "images_evaluation", names[-2:])
    original_omniglot(tmp_path / "mine", ["Elvish/character01", names[0]])
    class_folders(tmp_path / "other", classes=2, each=1)
    (tmp_path / "empty").mkdir()
    both = [tmp_path / "images_background", tmp_path / "images_evaluation"]
    assert is_omniglot(both)
    assert is_omniglot(both[:1])
    for name in ("mine", "other", "empty"):
        assert not is_omniglot([*both, tmp_path / name])
    with pytest.raises(InputError, match=r"nosuch is no folder and no \.zip"):
        is_omniglot([tmp_path / "nosuch"])


# --- tables


def write_parquet(table: pa.Table, path: Path) -> None:
    pa.parquet.write_table(table, path, row_group_size=7)


def write_csv(table: pa.Table, path: Path) -> None:
    pa.csv.write_csv(table, path)


def write_feather(table: pa.Table, path: Path) -> None:
    pa.feather.write_feather(table, path, compression="lz4", chunksize=7)


def write_arrow(table: pa.Table, path: Path) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=7)


FORMATS = [("t.parquet", write_parquet), ("t.csv", write_csv), ("t.feather", write_feather), ("t.arrow", write_arrow)]


def features_table(rows: int = 20) -> tuple[pa.Table, np.ndarray, list[str]]:
    x = np.random.default_rng(0).normal(size=(rows, 3)).astype(np.float32)
    labels = [f"{row % 5:02}" for row in range(rows)]
    columns = {name: x[:, position] for position, name in enumerate("abc")}
    return pa.table({"a": columns["a"], "label": labels, "b": columns["b"], "c": columns["c"]}), x, labels


@pytest.mark.parametrize(("name", "write"), FORMATS)
def test_tables_of_every_format(tmp_path: Path, name: str, write: Write) -> None:
    table, x, labels = features_table()
    write(table, tmp_path / name)
    summary = import_table(tmp_path / name, tmp_path / "out.arrow")
    assert (summary.classes, summary.examples, summary.shape, summary.dtype) == (5, 20, (3,), "float32")
    store = Store.open(tmp_path / "out.arrow")
    assert store.class_names == ("00", "01", "02", "03", "04")  # text, not numbers
    assert store.info.features == ("a", "b", "c")
    assert np.allclose(store.rows(np.arange(20)), x[np.argsort(labels, kind="stable")], rtol=1e-6, atol=0)


def test_chosen_columns_in_the_order_asked_for(tmp_path: Path) -> None:
    table, x, labels = features_table()
    write_parquet(table.append_column("name", pa.array(["x"] * 20)), tmp_path / "t.parquet")
    import_table(tmp_path / "t.parquet", tmp_path / "out.arrow", features=["c", "a"])
    store = Store.open(tmp_path / "out.arrow")
    assert np.array_equal(store.rows(np.arange(20)), x[np.argsort(labels, kind="stable")][:, [2, 0]])


def tensors(kind: str, x: np.ndarray) -> pa.Array:
    if kind == "tensor":
        return pa.FixedShapeTensorArray.from_numpy_ndarray(x)
    flat = pa.array(x.reshape(-1))
    width = x[0].size
    if kind == "fixed_size_list":
        return pa.FixedSizeListArray.from_arrays(flat, width)
    return pa.ListArray.from_arrays(pa.array(np.arange(len(x) + 1) * width, pa.int32()), flat)


@pytest.mark.parametrize(("name", "write"), [pair for pair in FORMATS if pair[0] != "t.csv"])
@pytest.mark.parametrize("kind", ["tensor", "fixed_size_list", "list"])
def test_tensor_columns(tmp_path: Path, name: str, write: Write, kind: str) -> None:
    x = np.random.default_rng(0).normal(size=(20, 2, 3)).astype(np.float32)
    labels = np.repeat(np.arange(4), 5)
    write(pa.table({"label": labels, "x": tensors(kind, x)}), tmp_path / name)
    import_table(tmp_path / name, tmp_path / "out.arrow")
    made = Store.open(tmp_path / "out.arrow").rows(np.arange(20))
    assert np.array_equal(made, x if kind == "tensor" else x.reshape(20, 6))


@pytest.mark.parametrize("shape", [(4, 4), (1, 4, 4), (3, 4, 5)])
def test_uint8_tensors_are_images(tmp_path: Path, shape: tuple[int, ...]) -> None:
    x = np.random.default_rng(0).integers(0, 256, (6, *shape), dtype=np.uint8)
    write_parquet(pa.table({"label": list("aabbcc"), "x": tensors("tensor", x)}), tmp_path / "t.parquet")
    summary = import_table(tmp_path / "t.parquet", tmp_path / "out.arrow")
    assert (summary.dtype, summary.shape) == ("uint8", shape if len(shape) == 3 else (1, *shape))
    assert np.array_equal(Store.open(tmp_path / "out.arrow").rows(np.arange(6)).reshape(x.shape), x)


def test_the_split_of_a_column(tmp_path: Path) -> None:
    table, _, labels = features_table()
    split = [{"00": "train", "01": "train", "02": "val", "03": "test", "04": "train"}[label] for label in labels]
    write_csv(table.append_column("part", pa.array(split)), tmp_path / "t.csv")
    import_table(tmp_path / "t.csv", tmp_path / "out.arrow", split_column="part")
    store = Store.open(tmp_path / "out.arrow")
    assert {name: numbers.tolist() for name, numbers in store.splits().items()} == {
        "train": [0, 1, 4],
        "validation": [2],
        "test": [3],
    }
    split[7] = "test"
    write_csv(table.append_column("part", pa.array(split)), tmp_path / "t.csv")
    with pytest.raises(InputError, match=r"t\.csv, row 8, column 'part': class '02' is in 'test' here"):
        import_table(tmp_path / "t.csv", tmp_path / "out.arrow", split_column="part")
    split[7] = "holdout"
    write_csv(table.append_column("part", pa.array(split)), tmp_path / "t.csv")
    with pytest.raises(InputError, match=r"row 8, column 'part': there is no split 'holdout'"):
        import_table(tmp_path / "t.csv", tmp_path / "out.arrow", split_column="part")


@pytest.mark.parametrize(("name", "write"), FORMATS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), None, 1e300])
def test_a_number_that_cannot_be_used_is_named(tmp_path: Path, name: str, write: Write, value: float | None) -> None:
    table, x, _ = features_table()
    column = [float(number) for number in x[:, 1]]
    column[12] = value  # type: ignore[call-overload]
    write(table.set_column(2, "b", pa.array(column, pa.float64())), tmp_path / name)
    with pytest.raises(InputError, match=rf"{name}, row 13, column 'b': "):
        import_table(tmp_path / name, tmp_path / "out.arrow")
    assert not (tmp_path / "out.arrow").exists()


def test_table_refusals_name_what_is_wrong(tmp_path: Path) -> None:
    table, _, _ = features_table()
    out = tmp_path / "out.arrow"

    def refused(match: str, made: pa.Table, **options: object) -> None:
        write_parquet(made, tmp_path / "t.parquet")
        with pytest.raises(InputError, match=match):
            import_table(tmp_path / "t.parquet", out, **options)  # type: ignore[arg-type]
        assert not out.exists()

    refused(r"no column 'lable' for the class .*did you mean 'label'\?", table, label="lable")
    refused(r"no column 'bb' for the features", table, features=["a", "bb"])
    refused(r"no column 'part' for the split", table, split_column="part")
    refused(r"column 'name' holds string, not numbers", table.append_column("name", pa.array(["x"] * 20)))
    refused(r"no feature column beside label", table.select(["label"]))
    refused(r"t\.parquet: all 20 examples are of one class", table.set_column(1, "label", pa.array(["a"] * 20)))
    refused(r"t\.parquet: there are no examples", table.slice(0, 0))
    refused(
        r"row 3, column 'label': the value is empty",
        table.set_column(1, "label", pa.array(["a", "b", None] + ["a"] * 17)),
    )
    ragged = pa.table({"label": list("aabb"), "x": [[1.0, 2.0], [1.0, 2.0], [1.0], [1.0, 2.0]]})
    refused(r"row 3, column 'x': the list has 1 numbers; expected 2", ragged)
    inner = pa.table({"label": list("aabb"), "x": [[1.0, 2.0], [1.0, None], [1.0, 2.0], [1.0, 2.0]]})
    refused(r"row 2, column 'x': a value inside is empty", inner)
    refused(
        r"column 'x' holds a tensor in each row, so it must be the only", ragged.append_column("y", pa.array([1.0] * 4))
    )
    last = np.zeros((4, 8, 8, 3), np.uint8)
    refused(r"look like \[H, W, C\]", pa.table({"label": list("aabb"), "x": tensors("tensor", last)}))
    refused("expected three numbers", table, fractions=(0.5, 0.5, 0.5))


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (pa.array([[1], [2]] * 10), "list<element: int64>"),
        (pa.array([{"a": 1}] * 20), "struct<a: int64>"),
        (pa.array([b"a", b"\xff"] * 10), "binary"),
    ],
)
def test_words_of_no_text_are_refused_with_their_type(values: pa.Array, kind: str, tmp_path: Path) -> None:
    table, _, _ = features_table()
    write_parquet(table.set_column(table.column_names.index("label"), "label", values), tmp_path / "t.parquet")
    write_parquet(table.append_column("part", values), tmp_path / "u.parquet")
    for name, options in (("t", {}), ("u", {"split_column": "part"})):
        with pytest.raises(InputError) as error:
            import_table(tmp_path / f"{name}.parquet", tmp_path / "out.arrow", **options)  # type: ignore[arg-type]
        column = options.get("split_column", "label")
        assert f"{name}.parquet: column {column!r} holds {kind}, which cannot be read as text" in str(error.value)
    assert not (tmp_path / "out.arrow").exists()


def test_the_source_is_not_overwritten(tmp_path: Path) -> None:
    table, _, _ = features_table()
    source = tmp_path / "t.arrow"
    pa.feather.write_feather(table, source, compression="uncompressed")
    before = source.read_bytes()
    (tmp_path / "link.arrow").symlink_to(source)
    for out in (source, tmp_path / "." / "t.arrow", tmp_path / "link.arrow"):
        with pytest.raises(InputError, match="is the source itself"):
            import_table(source, out)
    with pytest.raises(InputError, match="is the source itself"):
        import_omniglot([tmp_path / "a.zip", tmp_path / "b.zip"], tmp_path / "b.zip")
    class_folders(tmp_path / "in")
    with pytest.raises(InputError, match="is a folder"):
        import_images(tmp_path / "in", tmp_path / "in")
    assert source.read_bytes() == before


def test_unreadable_tables_are_refused_by_name(tmp_path: Path) -> None:
    for name in ("t.parquet", "t.arrow", "t.csv"):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(InputError, match=rf"{name} cannot be read"):
            import_table(tmp_path / name, tmp_path / "out.arrow")
    (tmp_path / "t.csv").write_text("label,a,a\nx,1,2\n")
    with pytest.raises(InputError, match="more than one column 'a'"):
        import_table(tmp_path / "t.csv", tmp_path / "out.arrow")
    (tmp_path / "t.csv").write_text("label,a\nx,1\ny,two\n")
    with pytest.raises(InputError, match=r"t\.csv, row 2, column 'a': 'two' is no number"):
        import_table(tmp_path / "t.csv", tmp_path / "out.arrow")
    (tmp_path / "t.csv").write_text("label,a\nx,1\ny\n")
    with pytest.raises(InputError, match=r"t\.csv cannot be read: .*Expected 2 columns"):
        import_table(tmp_path / "t.csv", tmp_path / "out.arrow")
    with pytest.raises(InputError, match="does not exist"):
        import_table(tmp_path / "none.csv", tmp_path / "out.arrow")
    (tmp_path / "t.xlsx").write_text("")
    with pytest.raises(InputError, match="is no table that can be read"):
        import_table(tmp_path / "t.xlsx", tmp_path / "out.arrow")


# --- examples in memory


def test_arrays_come_out_as_they_went_in(tmp_path: Path) -> None:
    x = np.random.default_rng(0).integers(0, 256, (600, 3, 5, 4), dtype=np.uint8)
    labels = np.arange(600) % 6
    summary = import_examples(zip(x, labels, strict=True), tmp_path / "out.arrow", licence="CC0")
    assert (summary.classes, summary.examples, summary.shape, summary.dtype) == (6, 600, (3, 5, 4), "uint8")
    assert summary.splits == {"random": {"train": 4, "validation": 1, "test": 1}}
    store = Store.open(tmp_path / "out.arrow")
    assert store.class_names == tuple("012345")
    assert np.array_equal(store.rows(np.arange(600)), x[np.argsort(labels, kind="stable")])


def test_a_dataset_of_tensors_and_one_of_pictures(tmp_path: Path) -> None:
    x = torch.randn(12, 7, dtype=torch.float64, requires_grad=True)
    given = {0: "train", 1: "val", 2: "test"}
    summary = import_examples(TensorDataset(x, torch.arange(12) % 3), tmp_path / "a.arrow", splits=given)
    assert (summary.shape, summary.dtype) == ((7,), "float32")
    assert summary.splits == {"given": {"train": 1, "validation": 1, "test": 1}}
    found = Store.open(tmp_path / "a.arrow").rows(np.arange(12))
    assert np.array_equal(found, x.detach().float()[torch.argsort(torch.arange(12) % 3, stable=True)].numpy())
    pixels = np.random.default_rng(0).integers(0, 256, (8, 6, 5, 3), dtype=np.uint8)

    class Pictures(Dataset[tuple[Image.Image, str]]):
        """Never raises IndexError: iterating over it would not end."""

        def __len__(self) -> int:
            return 8

        def __getitem__(self, number: int) -> tuple[Image.Image, str]:
            return Image.fromarray(pixels[number % 8]), "ab"[number % 2]

    summary = import_examples(Pictures(), tmp_path / "b.arrow", splits={"a": "train", "b": "test"})
    assert (summary.shape, summary.dtype, summary.examples) == ((3, 6, 5), "uint8", 8)
    assert np.array_equal(Store.open(tmp_path / "b.arrow").rows(np.array([1])), np.moveaxis(pixels[2:3], -1, 1))


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        (
            [(np.zeros(3), "a"), (np.zeros(4), "b")],
            r"^example 1 is float32 of shape \(4,\), the first ",
        ),
        ([(np.zeros((6, 6, 3), np.uint8), "a")] * 2, r"^examples: tensors of shape \(6, 6, 3\) look like \[H, W, C\]"),
        ([(np.zeros(3), 0.5)], r"^example 0 has the label 0\.5; expected a text or a whole number"),
        ([(np.zeros(3), "")], r"^example 0 has the label ''"),
        ([(np.zeros(3), "a"), np.zeros(3)], r"^example 1 is ndarray; expected a pair"),
        ([(np.zeros(3), "a"), (np.array([0, np.nan, 0]), "b")], "NaN"),
        ([(np.zeros(3), "a")], "two classes"),
        ([(np.zeros(3), np.eye(3)[0])], r"^example 0 has a label of shape \(3,\); expected one .* a DataLoader|argmax"),
        ([(np.array(["x"]), "a")], r"^example 0 has an x of <U1; expected numbers, or a picture"),
        ([(np.full((1, 4, 4), 200), "a")], r"^example 0 has an x of shape \(1, 4, 4\) and int64 with values up to 200"),
        ([], "no rows|no examples"),
    ],
)
def test_examples_that_cannot_be_used_are_refused(tmp_path: Path, examples: list[object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        import_examples(examples, tmp_path / "out.arrow")  # type: ignore[arg-type]
    assert not (tmp_path / "out.arrow").exists()


def test_each_label_needs_a_split_where_they_are_given(tmp_path: Path) -> None:
    examples = [(np.zeros(3), "a"), (np.ones(3), "b")]
    with pytest.raises(InputError, match="example 1 has the label 'b', for which `splits` has no split"):
        import_examples(examples, tmp_path / "out.arrow", splits={"a": "train"})
    with pytest.raises(InputError, match=r"example 1: there is no split 'tset'.*test"):
        import_examples(examples, tmp_path / "out.arrow", splits={"a": "train", "b": "tset"})
