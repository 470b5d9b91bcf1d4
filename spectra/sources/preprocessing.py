"""What turns texts and images into a model's inputs: the tokenizer or image processor beside the model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spectra.errors import SpectraError
from spectra.sources.libraries import first_line, library, quietly
from spectra.sources.models import Source, load_config, model_folder

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "merges.txt", "spiece.model",
    "sentencepiece.bpe.model", "tokenizer.model",
)  # fmt: skip
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


def load_tokenizer(source: Source) -> Any:
    """The tokenizer in a model's folder, with a padding token: its own, else its end-of-text token.

    Padding is masked, so that which token pads changes nothing. Raises: SpectraError where there is no tokenizer.
    """
    folder = model_folder(source)
    try:
        config = load_config(source)  # the tokenizer's class may be found by the model's type
    except SpectraError:
        config = None
    tokenizer = _loaded("AutoTokenizer", folder, "tokenizer", TOKENIZER_FILES, config=config)
    files = (
        {*tokenizer.vocab_files_names.values(), "tokenizer.json"} if tokenizer.vocab_files_names else {*TOKENIZER_FILES}
    )
    if not any((folder / file).is_file() for file in files):  # transformers makes one that knows no words
        raise _nothing("tokenizer", folder, TOKENIZER_FILES[0])
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token is None:
        raise SpectraError(f"the tokenizer in {folder} has no token to pad with; set its pad_token and save it again")
    return tokenizer


def load_image_processor(source: Source) -> Any:
    """The image processor in a model's folder. Raises: SpectraError where there is none, or Pillow is missing."""
    library("PIL", "to read images")
    return _loaded("AutoImageProcessor", model_folder(source), "image processor", PROCESSOR_FILES)


def _loaded(kind: str, folder: Path, what: str, files: Sequence[str], **options: Any) -> Any:
    transformers = library("transformers", f"to use the {what} of a model")
    if not any((folder / file).is_file() for file in files):
        raise _nothing(what, folder, files[0])
    with quietly():
        try:
            return getattr(transformers, kind).from_pretrained(
                folder, local_files_only=True, trust_remote_code=False, **options
            )
        except Exception as error:  # transformers raises what it likes
            raise SpectraError(
                f"no {what} can be had from {folder}: {first_line(error)}; save it there again, or give "
                "examples by a function of your own (package.module:function)"
            ) from error


def _nothing(what: str, folder: Path, file: str) -> SpectraError:
    return SpectraError(
        f"no {what} is in {folder}; put its {file} beside the model, or give examples by a function of your own "
        "(package.module:function)"
    )
