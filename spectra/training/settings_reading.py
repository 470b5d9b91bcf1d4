"""Plain values, as TOML and JSON hold them, into frozen classes of settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from spectra.errors import SpectraError
from spectra.training.misspelt import closest


def flat(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as one, under dotted keys."""
    found: dict[str, Any] = {}
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def read_table(table: Any, mapping: Any, where: str, source: str) -> Any:
    """A frozen settings class out of a mapping, with every key and type checked.

    Args: table, a dataclass; where, the dotted place of the mapping, "" or "method."; source, for messages.
    Raises: SpectraError naming the key that is unknown, or whose value is of another type.
    """
    if not isinstance(mapping, Mapping):
        raise SpectraError(f"{source} gives {where.rstrip('.')} = {mapping!r}, which must be a table of settings")
    hints = get_type_hints(table)
    for key in mapping:
        if key not in hints:
            place = f"[{where.rstrip('.')}]" if where else "the top level"
            raise SpectraError(f"{source} gives {where}{key}, which is no setting of {place}{closest(key, hints)}")
    return table(**{key: _value(hints[key], value, f"{where}{key}", source) for key, value in mapping.items()})


def _value(hint: Any, value: Any, key: str, source: str) -> Any:
    """`value` as the type that the setting has; an int serves as a float, a string as a sequence of one."""
    if get_origin(hint) in (UnionType, Union):
        if value is None and type(None) in get_args(hint):
            return None
        (hint,) = (option for option in get_args(hint) if option is not type(None))
    if dataclasses.is_dataclass(hint):
        return read_table(hint, value, f"{key}.", source)
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            choices = ", ".join(map(str, get_args(hint)))
            raise SpectraError(f"{source} gives {key} = {value!r}, which must be one of {choices}")
        return value
    if get_origin(hint) is tuple:
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list | tuple) or not all(isinstance(item, str) for item in items):
            raise SpectraError(f"{source} gives {key} = {value!r}, which must be a list of strings")
        return tuple(items)
    if get_origin(hint) is Mapping:
        _, of = get_args(hint)
        if not isinstance(value, Mapping):
            raise SpectraError(f"{source} gives {key} = {value!r}, which must be a table from patterns to values")
        return {pattern: _value(of, item, f"{key}.{pattern}", source) for pattern, item in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        kind = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a string"}
        raise SpectraError(f"{source} gives {key} = {value!r}, which must be {kind[hint.__name__]}")
    return value
