"""`spectra covariance`."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from spectra.errors import SpectraError

from .options import AsJson, Exclude, Include, Quiet, Transposed
from .output import check_writable, finish_shift
from .progress import progress_bar

if TYPE_CHECKING:
    from spectra.comparison import Comparison
    from spectra.sources.inputs import Inputs


class Basis(enum.StrEnum):
    """Whose directions."""

    weight = "weight"
    feature = "feature"


class Mode(enum.StrEnum):
    """Whose inputs the tuned weights see."""

    end_to_end = "end_to_end"
    same_inputs = "same_inputs"


class Task(enum.StrEnum):
    """What a model is for."""

    encoder = "encoder"
    masked_lm = "masked-lm"
    causal_lm = "causal-lm"
    seq2seq_lm = "seq2seq-lm"
    classification = "classification"
    token_classification = "token-classification"
    image_classification = "image-classification"


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(no_args_is_help=True)(covariance)


def covariance(
    base: Annotated[
        str, typer.Argument(help="The base: a model folder, or a hub id in the local cache; with --model a checkpoint.")
    ],
    tuned: Annotated[str, typer.Argument(help="The tuned model: the same, or a PEFT LoRA folder of the base.")],
    data: Annotated[
        Path | None,
        typer.Option(help="Texts: a .csv, .tsv, .json, .jsonl, .parquet or .txt file. Or a folder, as --images."),
    ] = None,
    text_column: Annotated[
        str | None, typer.Option(help="The column of --data that holds the texts; by default text.")
    ] = None,
    label_column: Annotated[
        str | None, typer.Option(help="Its column of labels: classes by number or name, or numbers to predict.")
    ] = None,
    images: Annotated[Path | None, typer.Option(help="A folder of images, a sub-folder per class.")] = None,
    model: Annotated[
        str | None, typer.Option(help="package.module:function that builds a torch module for both checkpoints.")
    ] = None,
    batches: Annotated[
        str | None, typer.Option(help="package.module:function that returns batches, the same ones in every pass.")
    ] = None,
    task: Annotated[
        Task | None, typer.Option(help="What the models are for, instead of what config.json says.")
    ] = None,
    basis: Annotated[
        Basis, typer.Option(help="Directions: the base weight's singular ones, or its features' principal ones.")
    ] = Basis.weight,
    mode: Annotated[
        Mode, typer.Option(help="Each model on its own inputs (own and inherited shift), or both on the base's.")
    ] = Mode.end_to_end,
    uncentred: Annotated[bool, typer.Option("--uncentred", help="Second moments in place of covariances.")] = False,
    include: Include = None,
    exclude: Exclude = None,
    transposed: Transposed = None,
    batch_size: Annotated[int | None, typer.Option(help="Samples a batch; by default 16.", min=1)] = None,
    max_length: Annotated[
        int | None, typer.Option(help="Tokens after which a text is cut; by default what the model takes.", min=1)
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Use so many samples at most.", min=1)] = None,
    directions: Annotated[
        int | None, typer.Option(help="Leading directions of a layer; by default all, up to 8192 outputs.", min=1)
    ] = None,
    slices: Annotated[int, typer.Option(help="Cut each matrix's directions into so many slices.", min=1)] = 8,
    functional: Annotated[bool, typer.Option(help="Whether to compare the models' answers, too.")] = True,
    together: Annotated[
        bool | None,
        typer.Option(
            "--together/--apart",
            help="Hold both models in memory, which linear CKA end to end takes; by default up to 4 GiB of them.",
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")] = "auto",
    out: Annotated[
        Path | None, typer.Option(help="Write tables (Parquet), covariance_shift.json and pictures into this folder.")
    ] = None,
    matrices: Annotated[
        list[str] | None, typer.Option(help="Keep the whole Delta of matrices that fit this glob. May be repeated.")
    ] = None,
    join: Annotated[
        Path | None, typer.Option(help="Add the columns to the comparison that `spectra compare --out` wrote there.")
    ] = None,
    join_label: Annotated[
        str | None, typer.Option(help="Which tuned model of that comparison this is, where it has several.")
    ] = None,
    top: Annotated[int, typer.Option(help="How many of the most shifted matrices the table shows.", min=1)] = 15,
    pictures: Annotated[bool, typer.Option(help="Whether --out gets pictures.")] = True,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Run base and tuned model on data, and say how the covariance of every layer's features shifted (Eq. 11).

    The shift is split, exactly, into what a layer's own weights moved and what it inherited from the layers before it.
    Beside it stands what the answers did: KL(base || tuned) and the change of loss, sample by sample. Without data,
    inputs are taken as white, and weights alone are needed.

    Examples:

      spectra covariance base/ tuned/ --data texts.csv --text-column text --limit 256 --out shift/

      spectra covariance base/ lora-adapter/ --data reviews.parquet --label-column label

      spectra covariance base/ tuned/ --images photos/

      spectra covariance base.pt tuned.pt --model my_models:build --batches my_data:batches

      spectra covariance base.safetensors tuned.safetensors
    """
    if join_label is not None and join is None:
        raise SpectraError("--join-label names a model of the comparison of --join; give --join, too, or leave it out")
    if matrices and out is None:
        raise SpectraError("--matrices are kept in the folder of --out; give --out, too, or leave them out")
    if out is not None:
        check_writable(out)
    import torch

    from spectra.comparison import load
    from spectra.features.shifting import covariance_shift
    from spectra.sources.inputs import inputs_from

    comparison = None if join is None else load(join)
    if comparison is not None:
        _check_join(comparison, join_label, basis)
    chosen = None if task is None else task.value
    given: Inputs = inputs_from(
        base, tuned, data=data, text_column=text_column, label_column=label_column, images=images, model=model,
        batches=batches, task=chosen, batch_size=batch_size, max_length=max_length, limit=limit,
    )  # fmt: skip
    with progress_bar(quiet or as_json, "streaming") as progress:
        result = covariance_shift(
            *given.models(together),
            given.batches,
            basis=basis.value,
            mode=mode.value,
            centred=not uncentred,
            include=include or (),
            exclude=exclude or (),
            transposed=transposed or None,
            top=directions,
            slices=slices,
            device="cuda" if device == "auto" and torch.cuda.is_available() else device,
            functional=functional,
            matrices=("*",) if out is not None and pictures else tuple(matrices or ()),
            progress=progress,
        )
    result = given.described(result)
    finish_shift(
        result, out=out, pictures=pictures, as_json=as_json, quiet=quiet, top=top, matrices=tuple(matrices or ())
    )
    if comparison is not None and join is not None:
        comparison.join(result, join_label).save(join)


def _check_join(comparison: Comparison, label: str | None, basis: Basis) -> None:
    """Refuse, before the models run, a join that cannot be."""
    if basis is not Basis.weight:
        raise SpectraError(
            f"--join adds to the components of a comparison, of which --basis {basis.value} has none; "
            "leave out one of the two"
        )
    labels = list(dict.fromkeys(map(str, comparison.layers["tuned"])))
    if label is None and len(labels) > 1:
        raise SpectraError(
            f"the comparison of --join is of {', '.join(map(repr, labels))}; say with --join-label which this is"
        )
    if label is not None and label not in labels:
        raise SpectraError(
            f"--join-label {label} is none of the comparison's tuned models ({', '.join(map(repr, labels))}); "
            "name one of them"
        )
