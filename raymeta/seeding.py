"""Random draws as pure functions of a key.

Every draw in raymeta comes from a generator that is made for one purpose from (seed, key...), never from a global
one: a task, a dropout mask or a mini-batch is then the same in any process, in any order, after any restart.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch

Key = int | str


def digest(seed: int, *key: Key) -> bytes:
    """16 bytes that name (seed, key...); distinct keys give distinct bytes (BLAKE2b over an unambiguous text).

    An integer is the same key whatever its type (a NumPy integer, say).
    """
    text = "\x1f".join(_text(part) for part in (seed, *key))
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _text(part: Key) -> str:
    if isinstance(part, str):
        # The separator must not occur in a part.
        return "str:" + part.replace("\\", "\\\\").replace("\x1f", "\\x1f")
    return f"int:{int(part)}"


def generator(seed: int, *key: Key) -> np.random.Generator:
    """A NumPy generator for (seed, key...): Philox, counter-based, the same stream on every machine."""
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest(seed, *key), "little")))


def torch_generator(seed: int, *key: Key, device: torch.device | str = "cpu") -> torch.Generator:
    """A torch generator for (seed, key...). Streams of CPU and GPU differ; on one kind of device they are equal."""
    made = torch.Generator(device=device)
    made.manual_seed(int.from_bytes(digest(seed, *key)[:8], "little") >> 1)
    return made
