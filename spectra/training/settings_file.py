"""Files of settings as nested plain values."""

from __future__ import annotations

import json
import os
import tomllib
from pathlib import Path
from typing import Any

from spectra.errors import SpectraError


def read_settings(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The tables of a TOML file, or of the settings.json of a run. Raises `SpectraError` for a file that is neither."""
    file = Path(path)
    is_json = file.suffix == ".json"
    try:
        text = file.read_text(encoding="utf-8")
        mapping = json.loads(text) if is_json else tomllib.loads(text)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SpectraError(f"the settings {file} cannot be read: {reason}; give a TOML file") from error
    except ValueError as error:
        raise SpectraError(f"{file} is not valid {'JSON' if is_json else 'TOML'}: {error}") from error
    if not isinstance(mapping, dict):
        raise SpectraError(f"the settings {file} are no table; give a TOML file")
    return mapping
