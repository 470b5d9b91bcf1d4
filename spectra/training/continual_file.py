"""A sequence of tasks in a file of settings."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any

from spectra.errors import SpectraError
from spectra.training.settings import TrainSettings
from spectra.training.settings_file import read_settings


def read_continual_file(path: str | PathLike[str]) -> tuple[TrainSettings, dict[str, Mapping[str, Any]]]:
    """Settings and tasks of a TOML file: what `TrainSettings.from_file` reads, and tables `[tasks.NAME]` beside it.

    A table holds the settings that are its task's own, such as `[tasks.mail.data]`; tasks are learnt in the order of
    the file. Returns: what all share, and the tasks. Raises: SpectraError naming what is wrong.
    """
    mapping = read_settings(path)
    tasks = mapping.pop("tasks", None)
    if not isinstance(tasks, Mapping) or not tasks:
        raise SpectraError(f"{path} names no tasks; give each one a table [tasks.NAME], in the order of learning")
    settings = TrainSettings.from_mapping(mapping, str(path))
    for name, own in tasks.items():
        if not isinstance(own, Mapping):
            raise SpectraError(f"{path} gives tasks.{name} = {own!r}, which must be a table of settings")
    return settings, dict(tasks)
