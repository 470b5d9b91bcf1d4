"""Steps of one size for slices of different sizes: what each module's learning rate is multiplied by."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from glob import escape
from math import sqrt

import torch

from spectra.errors import SpectraError
from spectra.lora import attach
from spectra.lora.record import adapted_layers
from spectra.training.methods import adapter_config
from spectra.training.settings import MethodSettings
from spectra.training.tasks import Task


def step_size_factor(reference: float, size: float) -> float:
    """sqrt(sum s_ref / sum s_slice), which a learning rate is multiplied by to step as far as the reference slice does.

    The first step of Adam moves every entry of A and B by eta, and so the weight by
    D = c (dB A0 + B0 dA) with E ||D||_F^2 = eta^2 c (m + n) sum_i s_i over the slice (signs taken as random).

    That is of first order in eta. At the end of a spectrum, where s_i nears zero, the factor is large, and c dB dA,
    which is of second order, soon outgrows what was matched: such a slice moves its weight further than the reference.

    Args: sums of the singular values s_i of the reference slice and of the slice (any common unit).
    Returns: 1 where one of them is zero, as no rate can match them then.

    >>> step_size_factor(8.0, 2.0)
    2.0
    """
    return sqrt(reference / size) if reference > 0 and size > 0 else 1.0


@dataclass(frozen=True)
class StartSizes:
    """How large the factors of an attached adapter start, by module, and which other parameters are trained.

    sizes: c ||A0||_F ||B0||_F, which is sum_i s_i over a slice of scale sqrt_sigma, and the same r for all slices of
    scale orthonormal, whose steps are of one size already.   factors: names of the module's A and B, as the optimiser
    has them.   others: names of all other trained parameters (a new head).
    """

    sizes: Mapping[str, float]
    factors: Mapping[str, tuple[str, ...]]
    others: tuple[str, ...]


def start_sizes(
    task: Task, method: MethodSettings, seed: int, cache: str | os.PathLike[str] | None = None
) -> StartSizes:
    """Attach the adapter of a method, measure its factors, and take it off again.

    Cost: that of `attach`; no decomposition where `cache` holds the base's spectra.
    """
    adapted = attach(task.model, adapter_config(method, task, seed), cache=cache)
    trained = {id(parameter): name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    sizes, factors = {}, {}
    for module, layer in adapted_layers(adapted).items():
        A0, B0 = layer.trained()
        norms = [torch.linalg.vector_norm(factor.detach().double()) for factor in (A0, B0)]
        sizes[module] = layer.scaling * float(norms[0] * norms[1])
        factors[module] = trained.pop(id(A0)), trained.pop(id(B0))
    adapted.unload()
    return StartSizes(sizes, factors, tuple(trained.values()))


def matched_rates(
    task: Task,
    methods: Mapping[str, MethodSettings],
    reference: float,
    patterns: Mapping[str, float],
    seed: int,
    cache: str | os.PathLike[str] | None = None,
) -> dict[str, dict[str, float]]:
    """`optimiser.learning_rate_pattern` for each of several methods, so that all step as far as one slice does.

    Args:
        methods: settings by a name of your choice.   reference: position of the slice whose step size all get.
        patterns: of the settings; what they give a factor is multiplied in, and they stay for all other parameters.
    Returns: name -> pattern -> factor; a pattern for each trained factor of each module, then the given ones.
    Raises: SpectraError for a pattern that fits no trained parameter.
    """
    first = next(iter(methods.values()))
    aim = start_sizes(task, replace(first, name="slice", position=reference, start=None), seed, cache)
    trained = [*(factor for factors in aim.factors.values() for factor in factors), *aim.others]
    for glob in patterns:
        if not any(fnmatchcase(name, glob) for name in trained):
            raise SpectraError(
                f"optimiser.learning_rate_pattern has {glob!r}, which fits no trained parameter of the slices; "
                f"one of them is {trained[-1]!r}"
            )
    kept = {glob: factor for glob, factor in patterns.items() if any(fnmatchcase(name, glob) for name in aim.others)}
    result = {}
    for name, method in methods.items():
        here = start_sizes(task, method, seed, cache)
        rates = {
            escape(parameter): _first_fit(patterns, parameter) * step_size_factor(aim.sizes[module], size)
            for module, size in here.sizes.items()
            for parameter in here.factors[module]
        }
        result[name] = {**rates, **kept}
    return result


def _first_fit(patterns: Mapping[str, float], parameter: str) -> float:
    return next((factor for glob, factor in patterns.items() if fnmatchcase(parameter, glob)), 1.0)
