"""Pair the weight matrices of a base and a tuned checkpoint, and account for everything else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

from spectra.checkpoints.checkpoint import Adapter, Checkpoint
from spectra.checkpoints.collector import paused_collector
from spectra.errors import SpectraError
from spectra.matrices import ROLES, Matrix
from spectra.matrices.finding import reading_place
from spectra.matrices.names import natural
from spectra.pairing.fitting import Fit, Misfit, fit, fit_update
from spectra.pairing.matching import match_names
from spectra.pairing.pairs import Pair, Pairing, Unmatched
from spectra.pairing.refusals import matches_nothing, require_same_architecture
from spectra.pairing.selection import Selection
from spectra.pairing.side import Side, side_of
from spectra.pairing.spelling import expert_place, spell


@paused_collector()
def pair(
    base: Checkpoint,
    tuned: Checkpoint,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    transposed: Sequence[str] | None = None,
) -> Pairing:
    """Pair every weight matrix of `base` with its counterpart in `tuned`, from the headers alone.

    Args:
        include, exclude: globs on matrix names; without `include` all are taken. What they leave out is listed.
        transposed: globs on tensor names: exactly these are stored in x out (GPT-2's Conv1D). None: decided by bias,
            shape, model type and name.

    Names are matched exactly, and through prefixes where that makes more of them agree (see `match_names`). Tied
    tensors are compared once, and twice where one side unties them. Vocabularies and tables of positions that grew are
    compared on their common rows. Of an adapter, its updates are paired; what it does not touch is counted in a note.

    Raises `SpectraError` where nothing, or too little, of the two agrees; where an adapter's factors do not fit the
    base; and for globs that match nothing.

    >>> import torch
    >>> from spectra.checkpoints import open_checkpoint
    >>> base = open_checkpoint({"h.0.attn.qkv.weight": torch.ones(6, 2), "norm.weight": torch.ones(2)})
    >>> tuned = open_checkpoint({"module.h.0.attn.qkv.weight": torch.ones(6, 2)})
    >>> found = pair(base, tuned)
    >>> [(one.matrix.name, one.matrix.role, one.tuned_tensor) for one in found.pairs][0]
    ('h.0.attn.qkv.weight[q]', 'query', 'module.h.0.attn.qkv.weight')
    >>> [(line.name, line.reason) for line in found.unmatched]
    [('norm.weight', 'missing in the tuned checkpoint')]
    """
    config = base.config if isinstance(tuned, Adapter) else tuned.config or base.config
    sides = side_of(base, tuned, base.config or config, transposed), side_of(tuned, base, config, transposed)
    for pattern in transposed or ():
        if not any(fnmatchcase(name, pattern) for side in sides for name in side.matrices):
            raise matches_nothing("transposed", pattern, sides[0].matrices, base.source)
    found = _Pairs(*sides)
    matching = match_names(sides[0].shapes, sides[1].shapes)
    found.match(matching.partners)
    found.match_experts()
    found.list_the_rest(matching.ambiguous_base, matching.ambiguous_tuned)
    require_same_architecture(sides[0], sides[1], found.pairs, found.unmatched)

    found.add_untouched()
    selection = Selection(tuple(include), tuple(exclude))
    selection.require_sense([pair.matrix for pair in found.pairs], base.source)
    kept: list[Pair] = []
    filtered: list[Unmatched] = []
    for one in found.pairs:
        reason = selection.why_not(one.matrix)
        if reason is None:
            kept.append(one)
        else:
            filtered.append(Unmatched(one.matrix.name, "base", reason))
    if not kept:
        raise SpectraError(
            f"the include and exclude patterns leave no weight matrix of {base.source}; loosen one of them"
        )
    return Pairing(
        pairs=tuple(sorted(kept, key=lambda pair: reading_place(pair.matrix))),
        unmatched=tuple(
            sorted([*found.unmatched, *filtered], key=lambda line: (line.side, natural(line.name), line.reason))
        ),
        notes=(*matching.notes, *found.notes()),
    )


@dataclass
class _Pairs:
    """The pairs found so far, and what is known not to be one."""

    base: Side
    tuned: Side
    pairs: list[Pair] = field(default_factory=list)
    unmatched: list[Unmatched] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    seen_base: set[str] = field(default_factory=set)
    seen_tuned: set[str] = field(default_factory=set)
    restacked_experts: int = 0

    def match(self, partners: Mapping[str, str]) -> None:
        """Pair the matrices in tensors whose names were matched."""
        once: set[tuple[str, str]] = set()
        # A tied tensor goes under its stored names first: the same two tensors are not compared again under another.
        for tuned, base in sorted(partners.items(), key=lambda names: (self._ties(*names), natural(names[1]))):
            self.seen_base.add(base)
            self.seen_tuned.add(tuned)
            stored = self.base.stored.get(base, base), self.tuned.stored.get(tuned, tuned)
            if stored in once:
                self.remarks.append(f"'{base}' is tied to '{stored[0]}' on both sides: compared once")
                continue
            once.add(stored)
            self._pair_tensors(base, tuned)

    def _ties(self, tuned: str, base: str) -> int:
        return (base in self.base.stored) * 2 + (tuned in self.tuned.stored)

    def _pair_tensors(self, base: str, tuned: str) -> None:
        if base in self.base.checkpoint.refused:
            self._leave(base, "base", self.base.checkpoint.refused[base])
        elif tuned in self.tuned.checkpoint.refused:
            self._leave(tuned, "tuned", self.tuned.checkpoint.refused[tuned])
        elif tuned in self.tuned.updates:
            self._pair_update(base, tuned)
        elif base in self.base.left_out:
            self._leave(base, "base", self.base.left_out[base])
        elif tuned in self.tuned.left_out:
            self._leave(tuned, "tuned", self.tuned.left_out[tuned])
        else:
            try:
                fits = fit(
                    self.base.matrices[base],
                    self.base.tensors[base].shape,
                    self.tuned.tensors[tuned].shape,
                    is_transposed=self.tuned.is_transposed.get(tuned),
                    vocabulary=self.base.vocabulary,
                )
            except Misfit as misfit:
                self._leave(base, "base", str(misfit))
            else:
                self._add(base, tuned, fits)

    def _pair_update(self, base: str, tuned: str) -> None:
        update = self.tuned.updates[tuned]
        if base in self.base.left_out:
            self._leave(tuned, "tuned", f"updates '{base}', which is no weight matrix: {self.base.left_out[base]}")
            return
        matrices = self.base.matrices[base]
        if matrices[0].index is not None:
            self._leave(tuned, "tuned", f"updates '{base}', a stack of matrices, with a single pair of factors")
            return
        try:
            fits = fit_update(matrices, update.shape)
        except Misfit as misfit:
            raise SpectraError(
                f"the adapter {self.tuned.checkpoint.source} updates '{tuned}' by factors that make {misfit}: "
                f"{self.base.checkpoint.source} is not the base it was trained on; give that one"
            ) from misfit
        else:
            self._add(base, tuned, fits, rank=update.rank)

    def _add(self, base: str, tuned: str, fits: Sequence[Fit], rank: int | None = None) -> None:
        stored = self.tuned.stored.get(tuned, tuned)
        ties = [
            f"tied to '{side.stored[name]}' in the {word}"
            for side, name, word in ((self.base, base, "base"), (self.tuned, tuned, "tuned checkpoint"))
            if name in side.stored
        ]
        base_dtype = self.base.tensors[base].dtype
        tuned_dtype = (self.tuned.updates if rank is not None else self.tuned.tensors)[tuned].dtype
        for one in fits:
            self.pairs.append(
                Pair(
                    matrix=one.base,
                    tuned_tensor=stored,
                    base_dtype=base_dtype,
                    tuned_dtype=tuned_dtype,
                    rank=rank,
                    note="; ".join(filter(None, (one.base.note, one.note, *ties))),
                    tuned_matrix=one.tuned if one.tuned.tensor == stored else replace(one.tuned, tensor=stored),
                    base=self.base.checkpoint,
                    tuned=self.tuned.checkpoint,
                )
            )
            if one.rest or ties:
                self.remarks.append(f"'{one.base.name}': {self.pairs[-1].note}")
            if one.rest:
                side, reason = one.rest
                self._leave(one.base.name if side == "base" else tuned, side, reason)

    def match_experts(self) -> None:
        """Pair experts that one side stacks into one tensor and the other keeps apart."""
        of_base, of_tuned = self._experts(self.base, self.seen_base), self._experts(self.tuned, self.seen_tuned)
        matched: set[str] = set()
        for place, (base, matrix) in of_base.items():
            tuned, counterpart = of_tuned.get(place, ("", None))
            if counterpart and (matrix.rows, matrix.columns) == (counterpart.rows, counterpart.columns):
                self._add(base, tuned, [Fit(matrix, counterpart)])
                matched |= {matrix.name, counterpart.name}
                self.seen_base.add(base)
                self.seen_tuned.add(tuned)
                self.restacked_experts += 1
        for side, places, seen, other in (
            ("base", of_base, self.seen_base, "missing in the tuned checkpoint"),
            ("tuned", of_tuned, self.seen_tuned, "not in the base"),
        ):
            for name, matrix in places.values():
                if name in seen and matrix.name not in matched:
                    self._leave(matrix.name, side, other)

    @staticmethod
    def _experts(side: Side, seen: set[str]) -> dict[tuple[str, int, str], tuple[str, Matrix]]:
        """The experts in tensors without a partner, by place; none where a place is given twice."""
        found: dict[tuple[str, int, str], list[tuple[str, Matrix]]] = {}
        alone = {name: matrices for name, matrices in side.matrices.items() if name not in seen}
        spelled = spell(side.matrices) if alone else {}
        for name, matrices in alone.items():
            for matrix in matrices:
                if place := expert_place(matrix, spelled[name]):
                    found.setdefault(place, []).append((name, matrix))
        return {place: experts[0] for place, experts in found.items() if len(experts) == 1}

    def list_the_rest(self, ambiguous_base: Mapping[str, str], ambiguous_tuned: Mapping[str, str]) -> None:
        """What has no partner. What an adapter does not touch is no loss, and counted in a note instead."""
        # A tensor that was compared under another of its names is not missing under this one.
        seen_base, seen_tuned = (
            seen | {side.stored[name] for name in seen if name in side.stored}
            for side, seen in ((self.base, self.seen_base), (self.tuned, self.seen_tuned))
        )
        for name in self.tuned.shapes:
            if name not in seen_tuned and name not in self.tuned.stored:
                refused = self.tuned.checkpoint.refused.get(name)
                self._leave(name, "tuned", ambiguous_tuned.get(name) or refused or "not in the base")
        for name in self.base.shapes:
            if name in seen_base or name in self.base.stored:
                continue
            refused = self.base.checkpoint.refused.get(name)
            if name in ambiguous_base or not isinstance(self.tuned.checkpoint, Adapter):
                self._leave(name, "base", ambiguous_base.get(name) or refused or "missing in the tuned checkpoint")

    def add_untouched(self) -> None:
        """What an adapter does not touch is part of the tuned model all the same: unchanged."""
        if not isinstance(self.tuned.checkpoint, Adapter):
            return
        known = {pair.matrix.tensor for pair in self.pairs} | {line.name for line in self.unmatched}
        for name, matrices in self.base.matrices.items():
            if name in known or name in self.base.stored:
                continue
            dtype = self.base.tensors[name].dtype
            for matrix in matrices:
                checkpoint = self.base.checkpoint
                self.pairs.append(Pair(matrix, name, dtype, dtype, None, matrix.note, matrix, checkpoint, checkpoint))

    def _leave(self, name: str, side: str, reason: str) -> None:
        self.unmatched.append(Unmatched(name, side, reason))

    def notes(self) -> list[str]:
        """What was decided for all pairs together."""
        notes = list(self.remarks)
        if self.restacked_experts:
            notes.append(
                f"experts stacked on one side and stored apart on the other: {self.restacked_experts} matrices"
            )
        turned = [pair.matrix for pair in self.pairs if pair.matrix.is_transposed]
        if turned:
            notes.append(f"stored in x out in the base (Conv1D and the like) and read transposed: {_count(turned)}")
        apart = [
            p.matrix for p in self.pairs if p.rank is None and p.matrix.is_transposed != p.tuned_matrix.is_transposed
        ]
        if apart:
            notes.append(f"stored in x out in one of the two and out x in in the other: {_count(apart)}")
        reasons = sorted({pair.matrix.note for pair in self.pairs if pair.matrix.note})
        notes += [f"{why}: {_count(pair.matrix for pair in self.pairs if pair.matrix.note == why)}" for why in reasons]
        if isinstance(self.tuned.checkpoint, Adapter):
            untouched = [pair.matrix for pair in self.pairs if pair.is_untouched]
            if untouched:
                notes.append(f"left as they are by the adapter: {_count(untouched)}")
        return notes


def _count(matrices: Iterable[Matrix]) -> str:
    """How many matrices there are of which roles, in words."""
    times = Counter(matrix.role for matrix in matrices)
    roles = ", ".join(f"{times[role]} {role}" for role in ROLES if times[role])
    return f"{times.total()} matrices ({roles})" if times.total() > 1 else f"1 matrix ({roles})"
