"""An edit of a tuned checkpoint: every matrix of it, written in the format that it came in, or kept in memory."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from spectra.checkpoints import Adapter, Checkpoint
from spectra.checkpoints.adapter_folder import ADAPTER_CONFIG
from spectra.editing.adapter_files import SLICES, check_adapter, rounded, write_factors
from spectra.editing.arguments import wholes
from spectra.editing.edits import Edit, Mitigation, Rewinding, Scaling, Truncation
from spectra.editing.folder import Layout, check_target, copy_files, layout_of, leftovers, put_in_place
from spectra.editing.leaders import Sides
from spectra.editing.matrices import Task, Treated, treat
from spectra.editing.patching import InFiles, InMemory, Store
from spectra.editing.placing import joined, rows_of
from spectra.editing.record import said, table, widened, write_record
from spectra.editing.selecting import Choice, of_layers, require_apart, require_components
from spectra.editing.vectors import Vector, vectors_of
from spectra.engines import local
from spectra.engines.devices import ieee_products
from spectra.engines.studying import Opened, Places, Progress, opened, places
from spectra.errors import SpectraError
from spectra.linalg.lowrank import LowRank
from spectra.loading import grouped
from spectra.pairing import Pairing

if TYPE_CHECKING:
    import pandas as pd

Source = Any  # a path, a hub id, a state dict, an nn.Module, or an open Checkpoint
LABEL = "tuned"


@dataclass(frozen=True)
class Edited:
    """What an edit did.

    Attributes:
        matrices: a row per weight matrix; every column is defined in `spectra/definitions.md`.
        notes: what was decided on the way, what was not copied, and that nothing changed where nothing did.
        folder: what was written; None where nothing was to be.
        tensors: without a folder, the edited tensors of the tuned checkpoint by name, as it stores them.
        updates: without a folder, the edited updates of an adapter by the base tensor's name.
    """

    matrices: pd.DataFrame
    notes: tuple[str, ...]
    folder: Path | None = None
    tensors: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    updates: Mapping[str, LowRank] = field(default_factory=dict, repr=False)

    @property
    def changed(self) -> int:
        """How many matrices the edit changed."""
        return int((self.matrices["status"] == "edited").sum())


def mitigate(
    base: Source,
    tuned: Source,
    folder: str | os.PathLike[str] | None = None,
    *,
    factor: float = 0.7,
    which: Literal["top", "all"] = "top",
    k: int = 10,
    epsilon: float = 0.5,
    side: Sides = "left",
    keep_spread: bool = False,
    control: bool = False,
    equal_change: bool = False,
    **options: Any,
) -> Edited:
    """Scale the intruder dimensions of a tuned model by `factor` (lambda), and count them again afterwards.

    W'(lambda) = W' + (lambda - 1) sum s'_j y_j z_j^T over the intruders: 1 is the tuned model, 0 takes them out, more
    than 1 strengthens them. Of an adapter, the result is an adapter of exact rank r + (number of intruders).

    Args:
        factor, which, k, epsilon, side, keep_spread, control, equal_change: see `Mitigation`.
        options: the rest, as for `edit`.
    Returns: an `Edited`, whose rows count the intruders before and after, and those that appeared.
    Raises: as `edit`.

    >>> base = {"fc.weight": torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0]))}
    >>> tuned = {"fc.weight": base["fc.weight"] + 5 * torch.ones(4, 4) / 4}
    >>> edited = mitigate(base, tuned, factor=0.0, k=1, epsilon=0.9)
    >>> columns = ["intruders_before", "intruders_scaled", "intruders_after", "intruders_appeared"]
    >>> edited.matrices[columns].values.tolist()  # the one is gone, and what stood behind it is another
    [[1, 1, 1, 1]]
    """
    what = Mitigation(factor, which, k, epsilon, side, keep_spread, control, equal_change)
    return edit(base, tuned, what, folder, **options)


def edit(
    base: Source,
    tuned: Source,
    what: Edit,
    folder: str | os.PathLike[str] | None = None,
    *,
    layers: Sequence[int] | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    transposed: Sequence[str] | None = None,
    device: str | Sequence[str] = "auto",
    workers: int | None = None,
    cache: str | os.PathLike[str] | None = None,
    cache_limit: int = 20 * 2**30,
    force: bool = False,
    progress: Progress | None = None,
) -> Edited:
    """Edit every matrix of a tuned model, or of an adapter, and write it in the format that it came in.

    A file or folder of safetensors or torch files is copied whole, and the edited tensors are written over their own
    bytes: shards, index, metadata, optimiser and every other tensor stay as they are, to the bit. An adapter gets new
    factors where the edit made some. What is written is read back before it takes its place.

    Args:
        base, tuned: checkpoint files or folders, hub ids in the local cache, state dicts, modules, open checkpoints.
        what: `Mitigation`, `Truncation`, `Scaling` or `Rewinding`.
        folder: to write; None keeps the edited tensors in the result.
        layers: the blocks whose matrices are edited; None: all, and what stands outside of blocks. An empty list is
            refused.
        include, exclude, transposed, device, workers, cache, cache_limit, progress: as for `compare`.
        force: replace what an earlier edit left in `folder`, as its record there lists it.
    Returns: an `Edited`. A matrix that failed is kept as it was, with status "failed" and the reason.
    Raises: SpectraError for input that cannot be read or matched, a folder that is taken, a full disk, and where
        matrices failed and none was edited.

    >>> from spectra.editing import Scaling
    >>> edited = edit({"fc.weight": torch.zeros(2, 2)}, {"fc.weight": torch.ones(2, 2)}, Scaling(0.5))
    >>> edited.tensors["fc.weight"].tolist()
    [[0.5, 0.5], [0.5, 0.5]]
    """
    if not isinstance(what, Mitigation | Truncation | Scaling | Rewinding):
        raise SpectraError(f"{what!r} is no edit; give a Mitigation, Truncation, Scaling or Rewinding")
    where = places(device, workers, cache, cache_limit)
    layers = None if layers is None else wholes(layers, "layers")
    pairs = opened(base, {LABEL: tuned}, include, exclude, transposed)
    checkpoint, pairing = pairs.tuned[LABEL], of_layers(pairs.pairings[LABEL], layers)
    require_apart(pairing)
    if isinstance(what, Rewinding) and what.components is not None:
        require_components(pairing, what.components[0])
    choice = Choice(layers, include, exclude)
    vectors, kept = vectors_of(what, pairs.base, checkpoint, pairs.pairings[LABEL], pairing, choice)
    if folder is None:
        memory = InMemory(checkpoint)
        rows, updates, written = _run(what, pairs, pairing, vectors, where, memory, progress)
        notes = (*pairs.notes(), *widened(checkpoint, updates), *kept, *said(rows, written))
        return Edited(table(rows), notes, tensors=memory.tensors, updates=updates)
    target = Path(folder).expanduser().absolute()
    layout = layout_of(checkpoint)
    check_target(target, layout, (pairs.base, checkpoint), force)
    beside = leftovers(target)
    with put_in_place(target) as made:
        copy_files(layout, made)
        files = InFiles(checkpoint, layout.root, made)
        rows, updates, written = _run(what, pairs, pairing, vectors, where, files, progress)
        files.finish()
        files.check()
        dropped = _write_adapter(checkpoint, updates, layout, made)
        of_files = (*layout.notes, *beside, *dropped, *widened(checkpoint, updates))
        notes = (*pairs.notes(), *of_files, *kept, *said(rows, written))
        matrices = table(rows)
        write_record(made, what, pairs, where, matrices, notes)
    return Edited(matrices, notes, target)


def _run(
    what: Edit,
    pairs: Opened,
    pairing: Pairing,
    vectors: Sequence[Vector],
    where: Places,
    store: Store,
    progress: Progress | None,
) -> tuple[list[Treated], dict[str, LowRank], int]:
    """Treat every matrix, the edited ones into the store; the rows, the adapter's new updates, the vectors moved."""
    checkpoint = pairs.tuned[LABEL]
    task = Task(what, checkpoint.config or pairs.base.config, pairs.base.config, where.cache)
    groups = grouped({LABEL: pairing})
    total, done = sum(group.cost for group in groups), 0
    rows: list[Treated] = []
    factors: list[Treated] = []
    with ieee_products():
        for index, found in local.run_on(partial(treat, task), groups, where.devices):
            for one in found:
                if isinstance(one.stored, Tensor):
                    store.write(one.pair.tuned_tensor, one.pair.tuned_matrix, one.stored)
                elif one.stored is not None:
                    factors.append(one)
                rows.append(one.without_weights())
            done += groups[index].cost
            if progress:
                progress(done, total, groups[index].matrix.name)
    written = 0
    for vector in vectors:
        before = checkpoint[vector.name]
        after = vector.moved(pairs.base[vector.of_base], before)
        if not torch.equal(before, after):
            store.write(vector.name, None, after)
            written += 1
    failed = [row for row in rows if row.status == "failed"]
    if failed and not any(row.status == "edited" for row in rows):
        raise SpectraError(f"no matrix could be edited, and nothing was written; {failed[0].note}")
    order = {pair.matrix.name: at for at, pair in enumerate(pairing.pairs)}
    rows.sort(key=lambda row: order[row.pair.matrix.name])
    return rows, _updates(checkpoint, factors), written


def _updates(checkpoint: Checkpoint, treated: Sequence[Treated]) -> dict[str, LowRank]:
    """The new update of every module that an edit changed, from those of its matrices."""
    by_tensor: dict[str, list[Treated]] = {}
    for one in treated:
        by_tensor.setdefault(one.pair.tuned_tensor, []).append(one)
    updates = {}
    for name, parts in by_tensor.items():
        assert isinstance(checkpoint, Adapter)
        whole = checkpoint.update(name)
        places_in = [(rows_of(p.pair.tuned_matrix, whole.shape[0]), p.stored) for p in parts]
        new = joined(whole, [(rows, stored) for rows, stored in places_in if isinstance(stored, LowRank)])
        updates[name] = rounded(new, torch.promote_types(whole.B.dtype, whole.A.dtype))
    return updates


def _write_adapter(
    checkpoint: Checkpoint, updates: Mapping[str, LowRank], layout: Layout, made: Path
) -> tuple[str, ...]:
    """New factors into the copied files of an adapter; what is to be said of it."""
    if not isinstance(checkpoint, Adapter) or not updates:
        return ()
    folder = made / next(path for path in layout.others if path.name == ADAPTER_CONFIG).parent
    write_factors(checkpoint, updates, folder)
    slices = folder / SLICES
    dropped = slices.exists()
    slices.unlink(missing_ok=True)
    check_adapter(checkpoint, updates, folder)
    return (f"not copied, for it does not fit edited factors: {SLICES!r}",) if dropped else ()
