"""Draws as functions of a key: distinct keys, the same stream in every process and on every machine."""

from __future__ import annotations

import itertools
import subprocess
import sys

import numpy as np
import torch

from raymeta.seeding import digest, generator, torch_generator

KEYS = [(), (0,), (1,), ("0",), (0, 1), (1, 0), ("01",), ("0", "1"), ("train", 5), ("train5",), (-1,), ("a\x1fb",)]


def test_distinct_keys_have_distinct_bytes() -> None:
    found = [digest(seed, *key) for seed in (0, 1) for key in KEYS]
    assert len(set(found)) == len(found)
    assert all(len(value) == 16 for value in found)
    assert digest(0, "a", "b") != digest(0, "a\x1fstr:b") != digest(0, "a\\x1fstr:b")
    assert digest(np.int64(0), np.int32(5)) == digest(0, 5)


def test_the_same_key_is_the_same_stream() -> None:
    for make in (
        lambda *key: generator(*key).random(4),
        lambda *key: torch.rand(4, generator=torch_generator(*key)).numpy(),
    ):
        streams = [make(3, *key) for key in KEYS]
        assert all(np.array_equal(stream, make(3, *key)) for stream, key in zip(streams, KEYS, strict=True))
        assert all(not np.array_equal(a, b) for a, b in itertools.combinations(streams, 2))


def test_known_values() -> None:
    """Checkpoints name tasks by number: another stream would silently be other tasks."""
    assert digest(0, "train", 7).hex() == "e97da2e1c2370a68c0d0b54dea77f7fb"
    assert generator(0, "train", 7).integers(0, 1000, 5).tolist() == [855, 615, 971, 974, 906]
    assert torch.randint(0, 1000, (5,), generator=torch_generator(0, "train", 7)).tolist() == [868, 402, 100, 833, 139]


def test_another_process_draws_the_same() -> None:
    code = "from raymeta.seeding import generator; print(generator(1, 'x', 2).integers(0, 10**6, 8).tolist())"
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert printed.strip() == str(generator(1, "x", 2).integers(0, 10**6, 8).tolist())


def test_no_global_generator_is_touched() -> None:
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    generator(0, 1).random(10)
    torch.rand(10, generator=torch_generator(0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)
