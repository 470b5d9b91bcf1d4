"""What a user names (folders, files, functions) -> two models and the batches to run them on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from spectra.checkpoints import Adapter, open_checkpoint
from spectra.errors import SpectraError
from spectra.sources.batches import Batches
from spectra.sources.examples import text_batches
from spectra.sources.factories import build_batches, build_model
from spectra.sources.images import image_batches
from spectra.sources.labels import WITH_CLASSES
from spectra.sources.models import load_config, load_model, task_of
from spectra.sources.preprocessing import load_image_processor, load_tokenizer
from spectra.sources.weights import load_weights

if TYPE_CHECKING:
    from spectra.shift import CovarianceShift

MOST_TOGETHER = 4 << 30


@dataclass(frozen=True)
class Inputs:
    """Two models, each built when it is called, so that they need not be in memory together; and batches.

    Attributes:
        base, tuned: functions that build the models; without batches the paths, which need not be runnable.
        batches: to run them on; None: without data.
        sources: what the user named, for the record.
        notes: what was decided, a sentence each; it grows when models are built.
        bytes: of both models in float32, as far as files tell.
    """

    base: Callable[[], nn.Module] | str
    tuned: Callable[[], nn.Module] | str
    batches: Iterable[Any] | Callable[[], Iterable[Any]] | None
    sources: dict[str, str | None]
    notes: list[str] = field(default_factory=list)
    bytes: int = 0

    def models(self, together: bool | None = None) -> tuple[Any, Any]:
        """Base and tuned, built where they may be in memory together; else as functions that build them.

        Args:
            together: None decides by their size, at most 4 GiB.
        """
        if isinstance(self.base, str) or isinstance(self.tuned, str):
            return self.base, self.tuned
        fits = self.bytes <= MOST_TOGETHER if together is None else together
        return (self.base(), self.tuned()) if fits else (self.base, self.tuned)

    def described(self, result: CovarianceShift) -> CovarianceShift:
        """The result with the sources and notes in its provenance."""
        provenance = dict(result.provenance)
        notes = [*self.notes, *provenance.get("notes", [])]
        provenance |= {"sources": self.sources, "notes": list(dict.fromkeys(notes))}
        return replace(result, provenance=provenance)


def inputs_from(
    base: str,
    tuned: str,
    *,
    data: Path | None = None,
    text_column: str | None = None,
    label_column: str | None = None,
    images: Path | None = None,
    model: str | None = None,
    batches: str | None = None,
    task: str | None = None,
    batch_size: int | None = None,
    max_length: int | None = None,
    limit: int | None = None,
) -> Inputs:
    """Models and batches as the options of the command line name them.

    Args:
        base, tuned: model folders or adapters (see `load_model`); with `model`, checkpoints of that module.
        data: a table of texts (see `text_batches`), or a folder of images.   images: a folder of images.
        model, batches: "package.module:function" (see `factories`).
        text_column, batch_size: "text" and 16 where None.
    Raises: SpectraError where these contradict each other or one would do nothing, or something cannot be read.
    """
    given = {"--data": data, "--images": images, "--batches": batches}
    named = [option for option, value in given.items() if value is not None]
    if len(named) > 1:
        raise SpectraError(f"{' and '.join(named)} both say what the models shall be run on; give one of them")
    sources = {
        "base": base, "tuned": tuned, "model": model, "batches": batches,
        "data": str(data or images) if data or images else None,
    }  # fmt: skip
    of_texts = {"--text-column": text_column, "--label-column": label_column, "--max-length": max_length}
    of_samples = {"--batch-size": batch_size, "--limit": limit}
    if not named:
        if idle := _given({"--model": model, "--task": task, **of_texts, **of_samples}):
            raise SpectraError(
                f"there is nothing to run the models on; give --data, --images or --batches, or leave out {idle} for "
                "the answer without data"
            )
        return Inputs(base, tuned, None, sources)
    if data is not None and data.is_dir():
        data, images = None, data
    idle = _given(of_texts if batches is None else {**of_texts, **of_samples}) if data is None else ""
    if idle:
        said = f"the batches are those of {batches}" if batches is not None else f"{images} is a folder of images"
        raise SpectraError(f"{said}, for which {idle} would do nothing; leave that out")
    if batches is not None and model is not None and task is not None:
        raise SpectraError("--model builds the models, for which --task would do nothing; leave one of them out")
    notes: list[str] = []
    if model is not None:
        if batches is None:
            raise SpectraError(f"{named[0]} needs the tokenizer of a model folder; with --model, give --batches, too")
        return Inputs(
            partial(_built, model, base, notes),
            partial(_built, model, tuned, notes),
            build_batches(batches),
            sources,
            notes,
            _bytes(base, tuned),
        )
    if isinstance(open_checkpoint(base), Adapter):
        raise SpectraError(f"{base} is an adapter and no base; give the model that it was trained on first")
    if batches is not None:
        found: Any = build_batches(batches)
    else:
        found = _own_batches(
            base, tuned, data, images, text_column=text_column or "text", label_column=label_column, task=task,
            batch_size=16 if batch_size is None else batch_size, max_length=max_length, limit=limit,
        )  # fmt: skip
        notes += found.notes
    under = base if isinstance(open_checkpoint(tuned), Adapter) else None
    # The class of an adapter's model is the base's: a head that the base lacks has no features to compare.
    of_base = task if task or under is None else task_of(load_config(base), base)
    return Inputs(
        partial(load_model, base, task),
        partial(load_model, tuned, of_base, under),
        found,
        sources,
        notes,
        _bytes(base, tuned),
    )


def _given(options: Mapping[str, Any]) -> str:
    """The names of the options that have a value."""
    return " and ".join(name for name, value in options.items() if value is not None)


def _bytes(base: str, tuned: str) -> int:
    """Of both models in float32; an adapter runs on a copy of its base."""
    first, second = (open_checkpoint(source) for source in (base, tuned))
    sides = (first, first if isinstance(second, Adapter) else second)
    return sum(4 * prod(info.shape) for side in sides for info in side.tensors.values())


def _built(model: str, source: str, notes: list[str]) -> nn.Module:
    built = build_model(model)
    notes += load_weights(built, source)
    return built


def _own_batches(
    base: str,
    tuned: str,
    data: Path | None,
    images: Path | None,
    *,
    text_column: str,
    label_column: str | None,
    task: str | None,
    batch_size: int,
    max_length: int | None,
    limit: int | None,
) -> Batches:
    """Batches of texts or images as the base's own tokenizer or image processor makes them."""
    if images is not None:
        config = _with_classes(base, tuned, task)
        return image_batches(images, load_image_processor(base), config=config, batch_size=batch_size, limit=limit)
    assert data is not None
    config = _with_classes(base, tuned, task) if label_column else None
    if label_column and config is None:
        raise SpectraError(
            f"--label-column {label_column} has no use: neither {base} nor {tuned} is a model of classes; leave it out"
        )
    return text_batches(
        data, load_tokenizer(base), text_column=text_column, label_column=label_column, config=config,
        task="classification" if label_column else None, batch_size=batch_size, max_length=max_length, limit=limit,
    )  # fmt: skip


def _with_classes(base: str, tuned: str, task: str | None) -> Any:
    """The configuration of the first of the two that predicts classes; None where neither does."""
    for source in (base, tuned):
        if isinstance(open_checkpoint(source), Adapter):
            continue
        config = load_config(source)
        if (task or task_of(config, source)) in WITH_CLASSES:
            return config
    return None
