"""From settings to tasks: the base, the new task on its body, and what the base could do before."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from spectra.errors import SpectraError
from spectra.sources.factories import build_model, find_factory
from spectra.sources.libraries import first_line
from spectra.sources.models import load_model
from spectra.sources.preprocessing import load_image_processor, load_tokenizer
from spectra.training.datasets import (
    FileExamples,
    MaskedTokens,
    classes_of_column,
    classes_of_folder,
    config_of_classes,
    fingerprint_of,
    parted,
    read_images,
    read_texts,
)
from spectra.training.examples import Examples
from spectra.training.heads import with_new_head
from spectra.training.lengths import with_length
from spectra.training.settings import ModelSettings, RetainSettings, TrainSettings
from spectra.training.tasks import Task, next_token_logits, next_tokens

MakeTask = Callable[[nn.Module], Task]

_OWN_KINDS = (
    ("ForSequenceClassification", "text-classification"),
    ("ForImageClassification", "image-classification"),
    ("ForMaskedLM", "masked-lm"),
    ("ForPreTraining", "masked-lm"),
    ("ForCausalLM", "causal-lm"),
    ("LMHeadModel", "causal-lm"),
)


@dataclass(frozen=True)
class Built:
    """What a run works on. All modules share one body.

    Attributes:
        source: the base's folder, None where it has none.
        files: those that the examples were read from, by the settings that name them.
    """

    base: nn.Module
    task: Task
    retained: Mapping[str, Task]
    source: str | None
    files: Mapping[str, str]

    @property
    def notes(self) -> tuple[str, ...]:
        """What was decided in reading the examples, a sentence each, each once."""
        examples = [each for task in (self.task, *self.retained.values()) for each in (task.train, task.test)]
        return tuple(dict.fromkeys(note for each in examples for note in getattr(each, "notes", ())))

    def fingerprints(self) -> dict[str, str]:
        """What tells whether the files are still the same, by the settings that name them."""
        return {name: fingerprint_of(file) for name, file in self.files.items()}


def build(
    settings: TrainSettings,
    *,
    base: nn.Module | None = None,
    task: MakeTask | None = None,
    retain: Mapping[str, MakeTask] | None = None,
) -> Built:
    """Load the base (a given one is copied, so that it stays as it is), and build the tasks on it.

    Args: `task` and `retain` make tasks of the base in the place of `[task]` with `[data]`, and of `[retain]`.
    Raises: SpectraError naming the setting, file, column or factory that will not do.
    """
    model, source = (copy.deepcopy(base), None) if base is not None else load_base(settings.model)
    learnt = _made(model, task, "task") if task else _new_task(model, settings)
    if learnt.train is None:
        raise SpectraError("the task has no examples to train on; give it `train`")
    if retain is not None:
        retained = {name: _made(model, make, f"retain {name!r}") for name, make in retain.items()}
    else:
        retained = {"retain": _own_task(model, settings)} if settings.retain else {}
    if wrong := {"train", "test"} & retained.keys():
        raise SpectraError(f"a retained task cannot be called {wrong.pop()!r}, which names the new task's own numbers")
    return Built(model, learnt, retained, source, dict(_files(settings, task, retain)))


def _files(
    settings: TrainSettings, task: MakeTask | None, retain: Mapping[str, MakeTask] | None
) -> Iterator[tuple[str, str]]:
    """The files that are read, and not left to a function."""
    if task is None and settings.task.kind != "custom":
        yield from ((f"data.{name}", file) for name in ("train", "test") if (file := getattr(settings.data, name)))
    if retain is None and settings.retain and settings.retain.kind != "custom" and settings.retain.test:
        yield "retain.test", settings.retain.test


def load_base(model: ModelSettings) -> tuple[nn.Module, str | None]:
    """The base of `[model]`, and its folder where it has one. Raises: SpectraError naming the setting at fault."""
    dtype = getattr(torch, model.dtype, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise SpectraError(f"model.dtype is {model.dtype!r}, which is no floating dtype of torch; give float32")
    if model.factory is not None:
        return build_model(model.factory).to(dtype), None
    if model.source is None:
        raise SpectraError("the settings name no base; give model.source (a folder) or model.factory")
    return load_model(model.source, dtype=dtype), model.source


def _made(model: nn.Module, make: MakeTask, what: str) -> Task:
    task = make(model)
    if not isinstance(task, Task):
        raise SpectraError(f"the factory of {what} gave {type(task).__name__}; it must give a spectra.training.Task")
    unknown = [name for name in task.head if name not in dict(task.model.named_modules())]
    if unknown:
        raise SpectraError(f"the head {unknown[0]!r} of {what} is no module of its model {type(task.model).__name__}")
    return task


def _by_factory(model: nn.Module, spec: str | None, place: str) -> Task:
    if spec is None:
        raise SpectraError(f'{place}.kind is "custom", which needs {place}.factory = "package.module:function"')
    factory = find_factory(spec)
    try:
        return _made(model, factory, spec)
    except SpectraError:
        raise
    except Exception as error:  # the user's own code may raise anything
        raise SpectraError(f"{spec} failed: {type(error).__name__}: {first_line(error)}; mend the function") from error


def _new_task(model: nn.Module, settings: TrainSettings) -> Task:
    kind, data = settings.task.kind, settings.data
    if kind == "custom":
        return _by_factory(model, settings.task.factory, "task")
    if kind == "masked-lm":
        raise SpectraError("masked language modelling is only a task to retain; give another task.kind")
    if data.train is None:
        raise SpectraError("the settings name no training data; give data.train (a file, or a folder of images)")
    files = [file for file in (data.train, data.test) if file is not None]
    folder = _folder(settings, kind)
    if kind == "causal-lm":
        tokenizer, texts = load_tokenizer(folder), with_length(data, model, "data")
        train, test = _parts([read_texts(file, texts, tokenizer) for file in files], settings)
        return _language_task(_with_causal_head(model), test, train, tokenizer)
    if kind == "text-classification":
        tokenizer, texts = load_tokenizer(folder), with_length(data, model, "data")
        classes = classes_of_column(data.train, data.test, data)
        config = config_of_classes(classes)
        train, test = _parts([read_texts(file, texts, tokenizer, config) for file in files], settings)
    else:
        tokenizer = load_image_processor(folder)
        classes = classes_of_folder(data.train)
        config = config_of_classes(classes)
        train, test = _parts([read_images(file, data, tokenizer, config) for file in files], settings)
    if len(classes) < 2:
        raise SpectraError(f"{data.train} has the one class {classes[0]!r}; classification needs at least two")
    shaped, head = with_new_head(model, kind, classes, settings.seed)
    _give_padding(shaped, tokenizer)
    return Task(shaped, test, train, head, tokenizer=tokenizer)


def _own_task(model: nn.Module, settings: TrainSettings) -> Task:
    """The task that the base was made for, on the base itself: its own head, the shared body."""
    retain = settings.retain
    assert retain is not None
    if retain.kind == "custom":
        return _by_factory(model, retain.factory, "retain")
    name = type(model).__name__
    own = next((kind for ending, kind in _OWN_KINDS if name.endswith(ending)), None)
    kind = retain.kind or own
    if kind is None or own != kind:
        has = f"a head for {own}" if own else "no head of its own"
        raise SpectraError(
            f"the base is a {name} with {has}, so that {kind or 'no task'} can be retained; give a base that has it, "
            'or retain.kind = "custom" with a factory'
        )
    if retain.test is None:
        raise SpectraError("the settings name no data for what is to be retained; give retain.test")
    return _kept(model, kind, retain, _folder(settings, kind))


def _kept(model: nn.Module, kind: str, retain: RetainSettings, folder: str) -> Task:
    assert retain.test is not None
    config: Any = getattr(model, "config", None)
    if kind == "image-classification":
        processor = load_image_processor(folder)
        return Task(model, FileExamples(read_images(retain.test, retain, processor, config)))
    tokenizer, texts = load_tokenizer(folder), with_length(retain, model, "retain")
    if kind == "text-classification":
        _give_padding(model, tokenizer)
        return Task(model, FileExamples(read_texts(retain.test, texts, tokenizer, config)))
    examples = FileExamples(read_texts(retain.test, texts, tokenizer))
    if kind == "masked-lm":
        if tokenizer.mask_token_id is None:
            raise SpectraError(f"the tokenizer in {folder} has no token that masks; retain another task")
        return Task(model, MaskedTokens(examples, tokenizer))
    return _language_task(model, examples)


def _language_task(model: nn.Module, test: Examples, train: Examples | None = None, tokenizer: Any = None) -> Task:
    return Task(
        model, test, train, metric="log_likelihood", forward=next_token_logits, targets=next_tokens, tokenizer=tokenizer
    )


def _with_causal_head(model: nn.Module) -> nn.Module:
    name = type(model).__name__
    if not name.endswith(("ForCausalLM", "LMHeadModel")):
        raise SpectraError(f"the base is a {name}, which predicts no next token; give a causal language model")
    return model


def _parts(read: list[Any], settings: TrainSettings) -> tuple[FileExamples, FileExamples]:
    if len(read) == 1:
        read = list(parted(read[0], settings.data.holdout, settings.seed, str(settings.data.train)))
    train, test = (FileExamples(batches) for batches in read)
    return train, test


def _folder(settings: TrainSettings, kind: str) -> str:
    if settings.model.source is None:
        what = "image processor" if kind == "image-classification" else "tokenizer"
        raise SpectraError(
            f'{kind} from files needs the {what} beside the model; give model.source, or kind "custom" with a factory'
        )
    return settings.model.source


def _give_padding(model: Any, tokenizer: Any) -> None:
    """Tell a decoder which token pads: its classification head looks for the last one that does not."""
    if getattr(model.config, "pad_token_id", 0) is None:
        model.config.pad_token_id = getattr(tokenizer, "pad_token_id", None)
