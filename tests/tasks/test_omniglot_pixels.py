"""Pixels of Omniglot images as rows."""

from __future__ import annotations

import numpy as np
import pytest

from raymeta.errors import InputError
from raymeta.tasks.omniglot_pixels import OmniglotPixels


def test_all_rows_together_are_the_image() -> None:
    source = OmniglotPixels(shots=300, queries=484)
    drawn = source.tasks("test", [3, 11])
    for task, number in enumerate((3, 11)):
        x = np.concatenate([drawn.support_x[task], drawn.query_x[task]])
        y = np.concatenate([drawn.support_y[task], drawn.query_y[task]])[:, 0]
        place = np.rint((x + 1) / 2 * 27).astype(int)
        assert len({tuple(pixel) for pixel in place.tolist()}) == 784
        image = np.zeros((28, 28), np.float32)
        image[place[:, 0], place[:, 1]] = y
        assert np.array_equal(image, source.image("test", number))
        assert 0.01 < image.mean() < 0.5  # ink on paper
        assert image.max() <= 1


def test_images_of_a_split_show_its_characters_alone() -> None:
    source = OmniglotPixels()
    rows = {split: set(source._rows[split].tolist()) for split in ("train", "validation", "test")}
    assert all(rows.values())
    assert not rows["train"] & rows["test"]
    assert not rows["validation"] & (rows["train"] | rows["test"])
    assert sum(map(len, rows.values())) == source.data.class_starts[-1]


def test_more_rows_than_pixels_are_refused() -> None:
    with pytest.raises(InputError, match=r"tasks\.shots=500 and tasks\.queries=300, but an image has 784 pixels"):
        OmniglotPixels(shots=500, queries=300).check()
    with pytest.raises(InputError, match=r"tasks\.fewest_shots=0"):
        OmniglotPixels(fewest_shots=0)
    assert OmniglotPixels(fewest_shots=2).tasks("train", [1]).support_mask is not None
