"""Task sources by the name that `tasks.name` gives them. Every field of a source is a setting `tasks.<field>`."""

from __future__ import annotations

from raymeta.tasks.class_episodes import ClassEpisodes, Omniglot
from raymeta.tasks.sinusoid import Sinusoid

TASK_SOURCES: dict[str, type] = {
    "omniglot": Omniglot,
    "class_episodes": ClassEpisodes,
    "sinusoid": Sinusoid,
}
