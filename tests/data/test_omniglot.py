"""The embedded Omniglot: counts, splits, licence, and that the file can be made again to the same bits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from raymeta.data.omniglot import FOLDER, PATH, build_omniglot, lake_splits, open_omniglot


def test_counts() -> None:
    store = open_omniglot()
    assert len(store) == 32_460
    assert len(store.class_names) == 1623
    assert set(store.info.class_sizes) == {20}
    assert (store.shape, store.dtype) == ((1, 28, 28), np.uint8)
    assert len({name.split("/")[0] for name in store.class_names}) == 50
    # Ink is 255 and rare: the background is 0.
    assert 0.02 < (store.views[0] > 127).mean() < 0.2
    store.verify()


@pytest.mark.parametrize(("scheme", "counts"), [("vinyals", (1028, 172, 423)), ("lake", (806, 158, 659))])
def test_splits_are_disjoint_and_whole(scheme: str, counts: tuple[int, ...]) -> None:
    splits = open_omniglot().splits(scheme)
    assert tuple(len(numbers) for numbers in splits.values()) == counts
    assert sorted(np.concatenate(list(splits.values()))) == list(range(1623))


def test_vinyals_is_the_default() -> None:
    store = open_omniglot()
    assert store.schemes == ("vinyals", "lake")
    assert all(np.array_equal(store.splits()[split], store.splits("vinyals")[split]) for split in store.splits())


def test_alphabets_of_the_splits() -> None:
    store = open_omniglot()

    def alphabets(scheme: str, split: str) -> set[str]:
        return {store.class_names[number].split("/")[0] for number in store.splits(scheme)[split]}

    assert alphabets("vinyals", "train") & alphabets("vinyals", "test") == {"Gurmukhi"}
    assert not alphabets("lake", "train") & alphabets("lake", "test")
    assert not alphabets("lake", "train") & alphabets("lake", "validation")
    assert alphabets("lake", "validation") == {
        "Balinese",
        "Early_Aramaic",
        "Inuktitut_(Canadian_Aboriginal_Syllabics)",
        "Mkhedruli_(Georgian)",
        "Tifinagh",
    }
    assert len(alphabets("lake", "train")) == 25
    assert len(alphabets("lake", "test")) == 20


def test_lake_validation_is_every_sixth_background_alphabet() -> None:
    names = [f"{alphabet}/character{number:02}" for alphabet in "HGFEDCBA" for number in (1, 2)]
    made = lake_splits(names, evaluation={"H/character01", "H/character02"})
    assert made["validation"] == ["F/character01", "F/character02"]
    assert made["test"] == ["H/character01", "H/character02"]
    assert len(made["train"]) == 12


def test_the_licence_is_shipped() -> None:
    text = (FOLDER / "LICENSE").read_text()
    assert "MIT License" in text
    assert "Copyright (c) 2015 Brenden Lake" in text
    assert open_omniglot().info.licence == text


def test_the_file_is_made_again_to_the_same_bits(tmp_path: Path) -> None:
    store = open_omniglot()
    evaluation = np.zeros(1623, bool)
    evaluation[store.splits("lake")["test"]] = True
    arrays = {"images": store.views[0].reshape(1623, 20, 28, 28), "classes": np.array(store.class_names)}
    np.savez(tmp_path / "omniglot28.npz", is_evaluation=evaluation, **arrays)
    for file, split in (("train", "train"), ("val", "validation"), ("test", "test")):
        names = [store.class_names[number] for number in store.splits("vinyals")[split]]
        lines = [f"{name}/rot{degrees:03}" for name in names for degrees in (0, 90, 180, 270)]
        (tmp_path / f"{file}.txt").write_text("\n".join(lines))
    build_omniglot(tmp_path / "omniglot28.npz", tmp_path, FOLDER / "LICENSE", tmp_path / "again.arrow")
    assert (tmp_path / "again.arrow").read_bytes() == PATH.read_bytes()
