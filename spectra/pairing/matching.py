"""Which tuned name is which base name: exact names and prefixes, whatever makes most names and shapes agree."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import takewhile

from spectra.matrices.names import unwrapped
from spectra.pairing.spelling import spell

_WORDS = """
    model base_model backbone student teacher net network encoder transformer language_model text_model vision_model
    auto_model pretrained_model encoder_q online_encoder llm policy
    bert roberta xlm_roberta distilbert albert electra deberta longformer mpnet camembert esm gpt_neox
    vit deit beit swin swinv2 dinov2 convnext resnet clip wav2vec2 hubert wavlm whisper
"""
_PREFIXES = frozenset(_WORDS.split())

Shape = tuple[int, ...] | None
"""A tensor's shape; None agrees with every shape."""


@dataclass(frozen=True)
class Rewriting:
    """Read the tuned prefix as the base's: `Rewriting("", "bert.")` puts "bert." before a tuned name."""

    tuned: str
    base: str

    def apply(self, name: str) -> str | None:
        return self.base + name.removeprefix(self.tuned) if name.startswith(self.tuned) else None

    def __str__(self) -> str:
        if not self.tuned:
            return f"the base's prefix '{self.base}' is not in the tuned names"
        if not self.base:
            return f"the tuned prefix '{self.tuned}' is not in the base's names"
        return f"the tuned prefix '{self.tuned}' is '{self.base}' in the base"


_EXACT = Rewriting("", "")


@dataclass(frozen=True)
class Matching:
    """Which name is which.

    Attributes:
        partners: tuned name -> base name.
        ambiguous_base, ambiguous_tuned: names that could be several of the other side -> those, in words.
        notes: which prefixes were read as which.
    """

    partners: Mapping[str, str]
    ambiguous_base: Mapping[str, str]
    ambiguous_tuned: Mapping[str, str]
    notes: tuple[str, ...]


def match_names(base: Mapping[str, Shape], tuned: Mapping[str, Shape]) -> Matching:
    """Match tuned names to base names.

    Every rewriting of one leading prefix into another (known prefixes, and those that all names of one side share) is
    counted by the names whose shapes then agree, plain equality among them. They are applied in the order of their
    counts, equality first among equals. A name that a second rewriting of at least half the count would match
    differently is left unmatched: it is never guessed.
    """
    if base == tuned:  # most fine-tunings: equality explains everything, and no rewriting can explain more
        return Matching({name: name for name in tuned}, {}, {}, ())
    spelled_base, spelled_tuned = spell(base), spell(tuned)
    base_names = {spelled: name for name, spelled in spelled_base.items()}
    tuned_names = {spelled: name for name, spelled in spelled_tuned.items()}
    votes = _votes(
        {spelled: base[name] for spelled, name in base_names.items()},
        {spelled: tuned[name] for spelled, name in tuned_names.items()},
    )
    partners: dict[str, str] = {}  # tuned -> base, as spelled
    taken: set[str] = set()  # base, as spelled
    ambiguous_base: dict[str, str] = {}
    ambiguous_tuned: dict[str, str] = {}
    notes: list[str] = []
    for rewriting in sorted(votes, key=lambda r: (-len(votes[r]), r != _EXACT, len(r.tuned + r.base), r.tuned, r.base)):
        rivals = [] if rewriting == _EXACT else _rivals(rewriting, votes)
        # As they stand before this rewriting: what is ambiguous must not depend on the order of the names.
        rival_bases, rival_tuned = [rival.base_of for rival in rivals], [rival.tuned_of for rival in rivals]
        gone_base, gone_tuned = frozenset(taken if rivals else ()), frozenset(partners if rivals else ())
        matched = 0
        for tuned_name in [name for name in tuned_names if name not in partners]:
            base_name = rewriting.apply(tuned_name)
            if base_name not in base_names or base_name in taken:
                continue
            bases = _others(tuned_name, base_name, rival_bases, gone_base)
            contenders = _others(base_name, tuned_name, rival_tuned, gone_tuned)
            if bases:
                ambiguous_tuned[tuned_names[tuned_name]] = _any_of([base_name, *bases], base_names, "base")
            if contenders:
                ambiguous_base[base_names[base_name]] = _any_of([tuned_name, *contenders], tuned_names, "tuned")
            if not bases and not contenders:
                partners[tuned_name] = base_name
                taken.add(base_name)
                matched += 1
        if matched and rewriting != _EXACT:
            notes.append(f"{rewriting} (names matched so: {matched})")
    respelled = sorted(t for t, b in partners.items() if _is_respelled(tuned_names[t], t, base_names[b], b))
    if respelled:
        example = respelled[0]
        names = f"'{tuned_names[example]}' is '{base_names[partners[example]]}' there"
        notes.append(f"names spelled otherwise in the base: {len(respelled)}, such as {names}")
    return Matching(
        partners={tuned_names[t]: base_names[b] for t, b in partners.items()},
        ambiguous_base={n: why for n, why in ambiguous_base.items() if spelled_base[n] not in taken},
        ambiguous_tuned={n: why for n, why in ambiguous_tuned.items() if spelled_tuned[n] not in partners},
        notes=tuple(notes),
    )


@dataclass(frozen=True)
class _Rival:
    """Another rewriting, by what it would match."""

    base_of: Mapping[str, str]
    tuned_of: Mapping[str, str]


def _rivals(rewriting: Rewriting, votes: Mapping[Rewriting, Mapping[str, str]]) -> list[_Rival]:
    """The other rewritings of at least half as many votes. Fewer are coincidences: two norms of equal size."""
    return [
        _Rival(found, {base_name: tuned_name for tuned_name, base_name in found.items()})
        for other, found in votes.items()
        if other != rewriting and 2 * len(found) >= len(votes[rewriting])
    ]


def _others(name: str, partner: str, partners: list[Mapping[str, str]], gone: frozenset[str]) -> set[str]:
    """The partners that rival rewritings would give to a name, of those that are still free."""
    found = {rival[name] for rival in partners if name in rival}
    return {other for other in found if other != partner and other not in gone}


def _is_respelled(tuned_name: str, tuned_spelled: str, base_name: str, base_spelled: str) -> bool:
    """Whether more than wrappers and a prefix tell the two names apart."""
    return (unwrapped(tuned_name), unwrapped(base_name)) != (tuned_spelled, base_spelled) and not (
        unwrapped(tuned_name).endswith(unwrapped(base_name)) or unwrapped(base_name).endswith(unwrapped(tuned_name))
    )


def _any_of(spelled: Iterable[str], names: Mapping[str, str], side: str) -> str:
    choices = " or ".join(f"'{names[name]}'" for name in sorted(spelled))
    return f"could be {choices} of the {side} checkpoint: rename one of them to say which"


def _votes(base: Mapping[str, Shape], tuned: Mapping[str, Shape]) -> dict[Rewriting, dict[str, str]]:
    """For each rewriting, the tuned and base names that it makes equal, with equal shapes. Equality is always there."""
    base_shared, tuned_shared = _shared_prefix(base), _shared_prefix(tuned)
    by_rest: dict[str, list[tuple[str, tuple[str, ...]]]] = defaultdict(list)
    for name in base:
        for prefix, rest in _splits(name, base_shared):
            by_rest[rest].append((name, prefix))
    by_prefixes: dict[tuple[tuple[str, ...], tuple[str, ...]], dict[str, str]] = defaultdict(dict)
    for tuned_name, shape in tuned.items():
        for tuned_prefix, rest in _splits(tuned_name, tuned_shared):
            for base_name, base_prefix in by_rest.get(rest, ()):
                if shape is None or base[base_name] is None or shape == base[base_name]:
                    by_prefixes[tuned_prefix, base_prefix][tuned_name] = base_name
    votes: dict[Rewriting, dict[str, str]] = {_EXACT: {}}
    for (tuned_prefix, base_prefix), found in by_prefixes.items():
        votes.setdefault(_reduced(tuned_prefix, base_prefix), {}).update(found)
    # A prefix that no one has heard of counts on one side only, and where it explains most of the names.
    enough = max(2, min(len(base), len(tuned)) / 2)
    least = {0: 0.0, 1: enough, 2: float("inf")}
    return {rewriting: found for rewriting, found in votes.items() if len(found) >= least[_unknown_sides(rewriting)]}


def _unknown_sides(rewriting: Rewriting) -> int:
    prefixes = rewriting.tuned, rewriting.base
    return sum(any(part not in _PREFIXES for part in prefix.split(".")[:-1]) for prefix in prefixes)


def _shared_prefix(names: Mapping[str, Shape]) -> int:
    """How many leading components, none of them a number, all names share, leaving each at least two."""
    if len(names) < 2:
        return 0
    # What the first and the last in order begin with, all between them begin with too.
    first, last = (name.split(".")[:-1] for name in (min(names), max(names)))
    most = max(0, min(name.count(".") for name in names) - 1)
    shared = takewhile(lambda parts: parts[0] == parts[1] and not parts[0].isdigit(), zip(first, last, strict=False))
    return min(most, sum(1 for _ in shared))


def _splits(name: str, shared: int) -> Iterator[tuple[tuple[str, ...], str]]:
    """Each way to part a name into a prefix that may be rewritten and the rest."""
    prefix: tuple[str, ...] = ()
    yield prefix, name
    while "." in name:
        part, _, name = name.partition(".")
        prefix = (*prefix, part)
        if len(prefix) > shared and part not in _PREFIXES:
            return
        yield prefix, name


def _reduced(tuned: tuple[str, ...], base: tuple[str, ...]) -> Rewriting:
    while tuned and base and tuned[-1] == base[-1]:
        tuned, base = tuned[:-1], base[:-1]
    return Rewriting("".join(f"{part}." for part in tuned), "".join(f"{part}." for part in base))
