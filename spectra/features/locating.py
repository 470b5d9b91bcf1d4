"""Which module of a running model multiplies by which matrix of its checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import nn

from spectra.checkpoints import Checkpoint
from spectra.features.sites import NotCaptured, Site, holder_of, holders, site_of
from spectra.pairing import Unmatched

if TYPE_CHECKING:
    from spectra.matrices import Matrix

MOST_INPUTS = 16384  # entries of an input whose covariance is kept: 2 GiB


def sites_of_matrices(
    model: nn.Module, matrices: Sequence[tuple[str, Matrix, Checkpoint, str]], side: str = "base"
) -> tuple[dict[str, Site], list[Unmatched]]:
    """The site of each matrix (name, matrix, checkpoint, tensor) in a model, and why some have none."""
    found = holders(model)
    names = {id(module): name for name, module in model.named_modules()}
    sites: dict[str, Site] = {}
    unseen: list[Unmatched] = []
    for name, matrix, checkpoint, tensor in matrices:
        try:
            sites[name] = _site(model, found, names, matrix, checkpoint, tensor)
        except NotCaptured as reason:
            unseen.append(Unmatched(name, side, str(reason)))
    return sites, unseen


def _site(
    model: nn.Module,
    found: dict[str, tuple[str, nn.Module]],
    names: Mapping[int, str],
    matrix: Matrix,
    checkpoint: Checkpoint,
    tensor: str,
) -> Site:
    """The first of a tensor's names under which a module multiplies by it: a tied head, rather than its embedding."""
    if matrix.index is not None:
        raise NotCaptured("one of a stack of matrices, which a module of its own does not multiply by")
    reasons: list[str] = []
    for alias in (tensor, *(other for other, stored in checkpoint.tied.items() if stored == tensor)):
        holder = holder_of(found, alias)
        if holder is None:
            reasons.append("held by no module of the model that runs")
            continue
        name = names.get(id(holder[1]), holder[0])  # a module that is there twice is called by either name
        try:
            site = site_of(model, name, holder[1], alias.rpartition(".")[2], matrix.part)
        except NotCaptured as reason:
            reasons.append(str(reason))
            continue
        if site.is_transposed != matrix.is_transposed:
            way = "in x out" if matrix.is_transposed else "out x in"
            reasons.append(f"read as stored {way}, which its module does not do: say so with `transposed`")
        elif site.view.width > MOST_INPUTS:
            gigabytes = 8e-9 * site.view.width**2
            reasons.append(f"takes in {site.view.width} entries, whose covariance would fill {gigabytes:.1f} GB")
        else:
            return site
    raise NotCaptured(reasons[0])
