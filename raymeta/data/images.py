"""Reading image files from a folder or a .zip: 8 bits, [C, H, W], one rule of resizing for import and for use.

Resizing is box averaging (Pillow's BOX filter: each new pixel is the mean of the area that it covers), stretched to
the size where the proportions differ. The way a photograph was held (EXIF) is undone.
"""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from raymeta.errors import InputError

CHANNELS = {"grayscale": 1, "rgb": 3}
_CLUTTER = {"thumbs.db", "desktop.ini", "__macosx"}
_EIGHT_BITS = {"1", "L", "P", "PA", "LA", "La", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "LAB", "HSV"}


@dataclass(frozen=True)
class SourceFile:
    """A file below the folder or .zip that is read.

    Attributes:
        root: the folder or .zip.
        parts: its place below, folder by folder, the file's name last.
    """

    root: Path
    parts: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.root}/{'/'.join(self.parts)}"

    @property
    def is_image(self) -> bool:
        """Whether Pillow knows the file's suffix."""
        return Path(self.parts[-1]).suffix.lower() in Image.registered_extensions()


def list_files(root: Path) -> list[SourceFile]:
    """All files below a folder or in a .zip, sorted; hidden ones and what file managers leave are left out.

    Raises:
        InputError: there is no such folder or .zip.
    """
    if root.is_dir():
        found = []
        seen: set[str] = set()  # a link may lead back up
        for folder, folders, files in os.walk(root, followlinks=True):
            real = os.path.realpath(folder)
            if real in seen:
                folders.clear()
                continue
            seen.add(real)
            place = Path(folder).relative_to(root).parts
            found += [(*place, name) for name in files]
    elif root.is_file() and root.suffix.lower() == ".zip":
        try:
            with zipfile.ZipFile(root) as archive:
                found = [tuple(name.split("/")) for name in archive.namelist() if not name.endswith("/")]
        except (zipfile.BadZipFile, OSError) as error:
            raise InputError(f"{root} cannot be read as a .zip: {error}") from error
    else:
        raise InputError(f"{root} is no folder and no .zip.")
    return [SourceFile(root, parts) for parts in sorted(found) if not any(_is_clutter(part) for part in parts)]


def class_folders(files: Sequence[SourceFile]) -> list[tuple[str, ...]]:
    """The folder of each file as its parts; without those that all files of a .zip share, but for the last one."""
    folders = [file.parts[:-1] for file in files]
    while files[0].root.is_file() and len({folder[0] for folder in folders}) == 1 and all(map(_is_deep, folders)):
        folders = [folder[1:] for folder in folders]
    return folders


def _is_deep(folder: tuple[str, ...]) -> bool:
    return len(folder) > 1


def _is_clutter(name: str) -> bool:
    return name.startswith(".") or name.lower() in _CLUTTER


class ImageReader:
    """Reads images to uint8 [C, H, W] of one shape. Use it with `with`: it keeps the last .zip open.

    Args:
        size: (height, width) to resize to; None: as they are.
        color: "grayscale" (C = 1) or "rgb" (C = 3).
        invert: 255 - value, for dark ink on white paper.
    """

    def __init__(self, size: tuple[int, int] | None, color: str, invert: bool = False) -> None:
        if color not in CHANNELS:
            raise InputError(f"color={color!r}; expected {' or '.join(CHANNELS)}.")
        if size is not None and min(size) < 1:
            raise InputError(f"size={size}; expected a height and a width of 1 or more.")
        self.size, self.color, self.invert = size, color, invert
        self._archive: zipfile.ZipFile | None = None

    def __enter__(self) -> ImageReader:
        return self

    def __exit__(self, *_: object) -> None:
        if self._archive is not None:
            self._archive.close()

    def read(self, file: SourceFile) -> np.ndarray:
        """The image, uint8 [C, H, W]. Raises InputError naming the file."""
        try:
            with Image.open(io.BytesIO(self._bytes(file))) as opened:
                if opened.mode not in _EIGHT_BITS:
                    raise InputError(
                        f"{file} has pixels of type {opened.mode}; expected 8 bits or fewer per channel. Convert it."
                    )
                image = ImageOps.exif_transpose(opened).convert("L" if self.color == "grayscale" else "RGB")
        except InputError:
            raise
        except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError, zipfile.BadZipFile) as error:
            raise InputError(f"{file} cannot be read as an image: {error}") from error
        if self.size is not None and image.size != self.size[::-1]:
            image = image.resize(self.size[::-1], Image.Resampling.BOX)
        pixels = np.asarray(image, dtype=np.uint8)
        pixels = pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels, -1, 0)
        return 255 - pixels if self.invert else pixels

    def _bytes(self, file: SourceFile) -> bytes:
        if file.root.is_dir():
            return file.root.joinpath(*file.parts).read_bytes()
        if self._archive is None or self._archive.filename != str(file.root):
            if self._archive is not None:
                self._archive.close()
            self._archive = zipfile.ZipFile(file.root)
        return self._archive.read("/".join(file.parts))
