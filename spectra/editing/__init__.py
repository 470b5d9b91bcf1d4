"""Edits of checkpoints: intruder dimensions scaled, updates truncated, scaled or rewound, and written in their format.

The public names are imported on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spectra.editing.edits import Edit, Mitigation, Rewinding, Scaling, Truncation
    from spectra.editing.running import Edited, edit, mitigate

__all__ = ["Edit", "Edited", "Mitigation", "Rewinding", "Scaling", "Truncation", "edit", "mitigate"]

# No module here may have the name of a function here: importing it would put the module in the function's place.
_HOMES = {
    "Edit": "edits",
    "Edited": "running",
    "Mitigation": "edits",
    "Rewinding": "edits",
    "Scaling": "edits",
    "Truncation": "edits",
    "edit": "running",
    "mitigate": "running",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'spectra.editing' has no attribute {name!r}")
    value = getattr(import_module(f"spectra.editing.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
