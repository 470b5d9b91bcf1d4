"""Anything else: a function of the user's own, "package.module:function", that builds a model or batches."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import nn

from spectra.errors import SpectraError
from spectra.sources.libraries import first_line


def find_factory(spec: str) -> Any:
    """The object that "package.module:name" names; modules are looked for in the current folder, too.

    Raises: SpectraError where the text has another form, or the module or the name cannot be had.
    """
    module_name, colon, name = spec.partition(":")
    if not colon or not name.isidentifier() or not all(part.isidentifier() for part in module_name.split(".")):
        raise SpectraError(f"{spec!r} names no function; write package.module:function, such as my_models:build")
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise SpectraError(
                f"no module {error.name!r} for {spec!r}; "
                f"put {module_name.replace('.', '/')}.py into {here}, or install the package that has it"
            ) from error
        raise SpectraError(f"{module_name!r} imports {error.name!r}, which is not installed; install it") from error
    except Exception as error:  # the user's own code may raise anything
        raise SpectraError(
            f"importing {module_name!r} failed: {type(error).__name__}: {first_line(error)}; mend the module"
        ) from error
    if not hasattr(module, name):
        functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        has = f"it has {', '.join(functions[:5])}" if functions else "it has no public functions"
        raise SpectraError(f"the module {module_name!r} has no {name!r} ({has}); name one that is there")
    return getattr(module, name)


def build_model(spec: str) -> nn.Module:
    """The module that the factory "package.module:function" returns, called without arguments.

    A name that is a module already is taken as it is. Raises: SpectraError where it raises, or returns something else.
    """
    found = find_factory(spec)
    model = found if isinstance(found, nn.Module) else _called(found, spec)
    if not isinstance(model, nn.Module):
        raise SpectraError(f"{spec} returned a {type(model).__name__}; a factory of models returns a torch.nn.Module")
    return model


def build_batches(spec: str) -> Iterable[Any] | Callable[[], Iterable[Any]]:
    """Batches by the factory "package.module:function": something that can be gone through more than once.

    The factory returns an iterable (a DataLoader, a list), or a function that starts a new pass. A generator, which is
    spent after one pass, is made anew by calling the factory again.
    Raises: SpectraError where it raises, or returns something that cannot be gone through.
    """
    factory = find_factory(spec)
    if not callable(factory):
        found = factory
    else:
        found = _called(factory, spec)
        if isinstance(found, Iterator):
            return lambda: iter(_called(factory, spec))
    if isinstance(found, str | bytes | dict) or not (callable(found) or isinstance(found, Iterable)):
        raise SpectraError(
            f"{spec} returned a {type(found).__name__}; a factory of batches returns an iterable of them, or a "
            "function that returns one"
        )
    batches: Iterable[Any] | Callable[[], Iterable[Any]] = found
    return batches


def _called(factory: Any, spec: str) -> Any:
    if not callable(factory):
        raise SpectraError(f"{spec} is a {type(factory).__name__} and no function; name a function without arguments")
    try:
        return factory()
    except SpectraError:
        raise
    except Exception as error:  # the user's own code may raise anything
        raise SpectraError(f"{spec} failed: {type(error).__name__}: {first_line(error)}; mend the function") from error
