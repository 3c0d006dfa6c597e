"""Support and query files come out as the model was trained on them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from raymeta.data.adapt_files import read_query, read_support
from raymeta.data.importers import import_images
from raymeta.data.store import Store
from raymeta.errors import InputError


def image_folder(root: Path) -> None:
    random = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (root / name).mkdir(parents=True)
        for drawing in range(3):
            Image.fromarray(random.integers(0, 256, (9, 12, 3), dtype=np.uint8)).save(root / name / f"{drawing}.png")


@pytest.mark.parametrize(("color", "channels"), [("grayscale", 1), ("rgb", 3)])
@pytest.mark.parametrize("invert", [False, True])
def test_images_are_prepared_as_at_import(tmp_path: Path, color: str, channels: int, invert: bool) -> None:
    image_folder(tmp_path / "in")
    fractions = (1.0, 0.0, 0.0)
    import_images(tmp_path / "in", tmp_path / "s.arrow", size=(4, 6), color=color, invert=invert, fractions=fractions)
    stored = Store.open(tmp_path / "s.arrow").rows(np.arange(6)).astype(np.float32) / 255
    support = read_support(tmp_path / "in", (channels, 4, 6), pixels=True, invert=invert)
    assert np.array_equal(support.x, stored)
    assert support.labels == ("cat",) * 3 + ("dog",) * 3
    assert support.names[:2] == ("cat/0.png", "cat/1.png")
    query = read_query(tmp_path / "in" / "dog", (channels, 4, 6), pixels=True, invert=invert)
    assert np.array_equal(query.x, stored[3:])
    assert query.labels is None
    assert query.names == ("0.png", "1.png", "2.png")
    one = read_query(tmp_path / "in" / "dog" / "1.png", (channels, 4, 6), pixels=True, invert=invert)
    assert np.array_equal(one.x, stored[4:5])


def test_image_refusals(tmp_path: Path) -> None:
    image_folder(tmp_path / "in")
    with pytest.raises(InputError, match=r"0\.png lies in no class folder"):
        read_support(tmp_path / "in" / "cat", (1, 4, 4), pixels=True)
    with pytest.raises(InputError, match=r"trained on features of shape \(5,\)"):
        read_support(tmp_path / "in", (5,))
    with pytest.raises(InputError, match="needs numeric targets"):
        read_support(tmp_path / "in", (1, 4, 4), pixels=True, targets=["y"])
    with pytest.raises(InputError, match="none does not exist"):
        read_query(tmp_path / "none", (1, 4, 4), pixels=True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty has no images"):
        read_query(tmp_path / "empty", (1, 4, 4), pixels=True)
    (tmp_path / "in" / "cat" / "notes.txt").write_text("no image")
    with pytest.raises(InputError, match=r"notes\.txt is no image"):
        read_support(tmp_path / "in", (1, 4, 4), pixels=True)


def write(path: Path, **columns: object) -> Path:
    pa.parquet.write_table(pa.table(columns), path)
    return path


def test_table_rows_labels_and_identifiers(tmp_path: Path) -> None:
    path = write(tmp_path / "s.parquet", id=["r", "s", "t"], a=[1.0, 2.0, 3.0], label=[7, 8, 7], b=[4, 5, 6])
    support = read_support(path, (2,), id_column="id")
    assert np.array_equal(support.x, np.array([[1, 4], [2, 5], [3, 6]], np.float32))
    assert support.labels == ("7", "8", "7")
    assert support.names == ("r", "s", "t")
    assert support.features == ("a", "b")
    query = read_query(write(tmp_path / "q.parquet", b=[5], a=[1.5], other=["x"]), (2,), features=support.features)
    assert np.array_equal(query.x, np.array([[1.5, 5]], np.float32))
    assert (query.labels, query.targets, query.names) == (None, None, ("1",))


def test_numeric_targets(tmp_path: Path) -> None:
    path = write(tmp_path / "s.parquet", a=[1.0, 2.0], y=[0.5, 1.5], z=[3, 4])
    support = read_support(path, (1,), targets=["y", "z"])
    assert support.targets is not None
    assert np.array_equal(support.targets, np.array([[0.5, 3], [1.5, 4]], np.float32))
    assert support.labels is None
    assert read_query(write(tmp_path / "q.parquet", a=[1.0]), (1,), targets=["y", "z"]).targets is None


def test_pixels_in_tables(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 256, (3, 1, 2, 2), dtype=np.uint8)
    values[0, 0, 0, 0] = 200
    expected = values.astype(np.float32) / 255
    tensor = write(tmp_path / "t.parquet", label=list("aba"), x=pa.FixedShapeTensorArray.from_numpy_ndarray(values))
    flat = tmp_path / "t.csv"
    rows = [
        f"{label},{','.join(map(str, row))}" for label, row in zip("aba", values.reshape(3, 4).tolist(), strict=True)
    ]
    flat.write_text("\n".join(["label,p0,p1,p2,p3", *rows]))
    for path in (tensor, flat):
        assert np.array_equal(read_support(path, (1, 2, 2), pixels=True).x, expected)
    flat.write_text("label,p0,p1,p2,p3\na,0,0.5,1,0.25\n")
    assert np.array_equal(
        read_support(flat, (1, 2, 2), pixels=True).x.reshape(-1), np.array([0, 0.5, 1, 0.25], np.float32)
    )
    flat.write_text("label,p0,p1,p2,p3\na,0,0.5,300,0.25\n")
    with pytest.raises(InputError, match=r"t\.csv has pixel values from 0 to 300"):
        read_support(flat, (1, 2, 2), pixels=True)


def test_table_refusals(tmp_path: Path) -> None:
    path = write(tmp_path / "s.parquet", a=[1.0, float("nan")], lable=["x", "y"])
    with pytest.raises(InputError, match=r"no column 'label' .*did you mean 'lable'"):
        read_support(path, (1,))
    with pytest.raises(InputError, match="row 2, column 'a': NaN"):
        read_support(path, (1,), label="lable")
    path = write(tmp_path / "s.parquet", a=[1.0, 2.0], label=["x", "y"])
    with pytest.raises(InputError, match=r"rows of shape \(1,\) \(columns a\); .* shape \(3,\)"):
        read_support(path, (3,))
    with pytest.raises(InputError, match="no column 'y' for the targets"):
        read_support(path, (1,), targets=["y"])
    with pytest.raises(InputError, match="no column 'key' for the row identifiers"):
        read_query(path, (1,), id_column="key")
