"""DESIGN section 3: a file imports its own folder and lower floors; ray in three places alone. Read from the files."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import raymeta

PACKAGE = Path(raymeta.__file__).parent

# From the ground up. A name is a file of the package, or a folder of it. A name that is not there yet is no error.
FLOORS: tuple[frozenset[str], ...] = (
    frozenset({"errors", "params", "seeding", "episodes", "metrics", "meta_gradient", "own_code"})
    | frozenset({"cache", "storage"}),
    frozenset({"data", "models", "ops"}),
    frozenset({"tasks", "algorithms"}),
    frozenset({"workers"}),
    frozenset({"yaml_text", "checkpoint", "event_file", "run_directory"})
    | frozenset({"sections", "evaluation", "outer_optimizer", "muon", "precision", "trainer", "fits"}),
    frozenset({"parts", "config", "chunks"}),
    frozenset({"build"}),
    # The faces; the command line calls the others.
    frozenset({"adapted", "progress", "profiling", "profile_text"}),
    frozenset({"tune", "report"}),
    frozenset({"cli"}),
    frozenset({"__init__", "__main__"}),
)
# The Ray pool and its helpers, the Tune face and the command line.
MAY_IMPORT_RAY = ("workers/ray_", "tune.py", "tune/", "cli/")
FILES = sorted(PACKAGE.rglob("*.py"))


def part_of(path: Path) -> str:
    """The file or folder of the floor table that a path is in."""
    inside = path.relative_to(PACKAGE)
    return inside.parts[0] if len(inside.parts) > 1 else inside.stem


def floor_of(part: str) -> int:
    return next(number for number, names in enumerate(FLOORS) if part in names)


def imports(path: Path) -> set[str]:
    """Every module that a file imports, at its top or inside a function, as a dotted name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide which floor is meant"
            assert node.module is not None
            found |= {f"{node.module}.{name.name}" for name in node.names}
    return found


def own_parts(path: Path) -> set[str]:
    """The parts of the package that a file imports."""
    found = set()
    for name in imports(path):
        if name == "raymeta" or name.startswith("raymeta."):
            words = name.split(".")
            there = len(words) > 1 and ((PACKAGE / words[1]).is_dir() or (PACKAGE / f"{words[1]}.py").is_file())
            found.add(words[1] if there else "__init__")
    return found


def test_the_search_found_the_package() -> None:
    assert len(FILES) > 50
    assert {"errors", "data", "algorithms", "workers", "trainer", "build", "cli"} <= set(map(part_of, FILES))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_imports_its_own_folder_and_lower_floors(path: Path) -> None:
    part = part_of(path)
    assert any(part in names for names in FLOORS), f"{path} has no place in the floor table"
    floor, is_folder = floor_of(part), len(path.relative_to(PACKAGE).parts) > 1
    # Everyone may ask for the version; `raymeta/__init__.py` itself imports nothing when it is imported.
    for other in own_parts(path) - {part, "__init__"}:
        above = floor_of(other) > floor
        sideways = floor_of(other) == floor and (is_folder or (PACKAGE / other).is_dir())
        assert not above, f"{path} imports raymeta.{other}, which is on a higher floor"
        assert not sideways, f"{path} imports raymeta.{other}, another folder of its own floor"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_ray_is_imported_in_three_places_alone(path: Path) -> None:
    uses_ray = any(name == "ray" or name.startswith("ray.") for name in imports(path))
    inside = path.relative_to(PACKAGE).as_posix()
    assert not uses_ray or inside.startswith(MAY_IMPORT_RAY), f"{inside} imports ray"


def test_the_test_can_fail(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.py"
    wrong.write_text("def f():\n    import ray.util\n    from raymeta.cli import main\n    from raymeta import build\n")
    assert imports(wrong) == {"ray.util", "raymeta.cli.main", "raymeta.build"}
    assert own_parts(wrong) == {"cli", "build"}
    assert floor_of("cli") > floor_of("build") > floor_of("trainer") > floor_of("workers") > floor_of("tasks")
