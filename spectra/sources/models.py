"""Models that can be run: a Hugging Face folder, or an adapter on its base."""

from __future__ import annotations

import copy
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spectra.checkpoints import Adapter, Checkpoint, open_checkpoint
from spectra.errors import SpectraError
from spectra.sources.adapters import class_names, head_modules, merge_adapter
from spectra.sources.libraries import first_line, library, quietly

Source = str | os.PathLike[str]

AUTO_CLASSES = {
    "encoder": "AutoModel",
    "masked-lm": "AutoModelForMaskedLM",
    "causal-lm": "AutoModelForCausalLM",
    "seq2seq-lm": "AutoModelForSeq2SeqLM",
    "classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "image-classification": "AutoModelForImageClassification",
}
TASKS = tuple(AUTO_CLASSES)
# By the end of the architecture's name; the first that fits.
_ARCHITECTURES = (
    ("ForMaskedLM", "masked-lm"),
    ("ForPreTraining", "masked-lm"),
    ("ForCausalLM", "causal-lm"),
    ("LMHeadModel", "causal-lm"),
    ("ForConditionalGeneration", "seq2seq-lm"),
    ("ForSequenceClassification", "classification"),
    ("ForTokenClassification", "token-classification"),
    ("ForImageClassification", "image-classification"),
    ("Model", "encoder"),
)
_ADAPTER_TASKS = {
    "SEQ_CLS": "classification",
    "CAUSAL_LM": "causal-lm",
    "SEQ_2_SEQ_LM": "seq2seq-lm",
    "TOKEN_CLS": "token-classification",
    "FEATURE_EXTRACTION": "encoder",
}


def load_model(
    source: Source,
    task: str | None = None,
    base: Source | nn.Module | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """A model in evaluation mode, from a folder that `save_pretrained` wrote. Nothing is downloaded, no code is run.

    Args:
        source: a Hugging Face folder, the name of a model in the local Hugging Face cache, or a PEFT LoRA folder.
        task: one of `TASKS`; by default what the architecture in config.json says (an adapter: its task_type, then
            its base).
        base: for an adapter, the model it was trained on: a folder, a name, or a module, which is copied.
        device: where the model shall be.   dtype: of its parameters, whatever the checkpoint stores.
    Returns: the module. An adapter is merged into its base in float32, so that names are those of the base.
    Raises: SpectraError where the source cannot be read or run, the task does not fit, parameters would have to be
        made up, or transformers (peft) is not installed.
    """
    if task is not None and task not in AUTO_CLASSES:
        raise SpectraError(f"{task!r} is no task; choose one of {', '.join(TASKS)}")
    checkpoint = open_checkpoint(source)
    model = _adapted(checkpoint, task, base) if isinstance(checkpoint, Adapter) else _loaded(checkpoint, task)
    return model.to(device=device, dtype=dtype).eval()


def model_folder(source: Source) -> Path:
    """The folder in which the config.json, and so the tokenizer, of `source` lie; of an adapter, its own folder.

    Raises: SpectraError where there is no config.json.
    """
    checkpoint = open_checkpoint(source)
    if isinstance(checkpoint, Adapter):
        return _folder(checkpoint, "adapter_config.json")
    return _folder(checkpoint)


def load_config(source: Source) -> Any:
    """The transformers configuration of a model folder.

    Raises: SpectraError where there is none, or transformers does not know its model type.
    """
    return _config(open_checkpoint(source))


def _folder(checkpoint: Checkpoint, wanted: str = "config.json") -> Path:
    found = next((file.parent for file in checkpoint.files if file.name == wanted), None)
    if found is None:
        raise SpectraError(
            f"{checkpoint.source} holds weights and no {wanted}, so that nothing says how to run them; give the folder "
            "that save_pretrained wrote, or a function of your own that builds the module (package.module:function)"
        )
    return found


def _config(checkpoint: Checkpoint) -> Any:
    transformers = library("transformers", "to run a Hugging Face model")
    folder = _folder(checkpoint)
    with quietly():
        try:
            if "model_type" not in checkpoint.config and (found := _described_by_names(checkpoint)):
                model_type, described = found
                return transformers.CONFIG_MAPPING[model_type].from_pretrained(
                    folder, local_files_only=True, **described
                )
            return transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # transformers raises what it likes
            raise SpectraError(
                f"transformers makes no model of {folder / 'config.json'}: {first_line(error)}; "
                'write its "model_type" into it, or give a function of your own that builds the module '
                "(package.module:function)"
            ) from error


def _described_by_names(checkpoint: Checkpoint) -> tuple[str, dict[str, Any]] | None:
    """The model type, architecture and classes that the names of the tensors tell, for folders of early transformers.

    Their config.json said neither; the first part of the names did: "bert.encoder.layer.0...", "classifier.weight".
    """
    known = library("transformers", "to run a Hugging Face model").CONFIG_MAPPING
    model_type = next((first for name in checkpoint if (first := name.split(".")[0]) in known), None)
    if model_type is None:
        return None
    if any(name.startswith("cls.predictions.") for name in checkpoint):
        return model_type, {"architectures": ["ForMaskedLM"]}
    if "classifier.weight" in checkpoint:
        classes = checkpoint.tensors["classifier.weight"].shape[0]
        return model_type, {"architectures": ["ForSequenceClassification"], "num_labels": classes}
    return model_type, {}


def task_of(config: Any, where: object) -> str:
    """The task that an architecture is made for. Raises: SpectraError where the config names none that is known."""
    architectures = list(getattr(config, "architectures", None) or ())
    for ending, task in _ARCHITECTURES:
        if architectures and str(architectures[0]).endswith(ending):
            return task
    named = f"names the architecture {architectures[0]!r}" if architectures else "names no architecture"
    raise SpectraError(f"the config.json of {where} {named}; say for which task it is ({', '.join(TASKS)})")


def _loaded(
    checkpoint: Checkpoint,
    task: str | None,
    made_up: Collection[str] = (),
    classes: Mapping[int, str] | None = None,
) -> nn.Module:
    """A model from its folder, in float32.

    Args: made_up: modules that may be missing, since an adapter brings them.   classes: those of that adapter's head.
    """
    transformers = library("transformers", "to run a Hugging Face model")
    folder = _folder(checkpoint)
    config = _config(checkpoint)
    if classes:
        config.id2label = dict(classes)
        config.label2id = {name: number for number, name in classes.items()}
    task = task or task_of(config, folder)
    kind = getattr(transformers, AUTO_CLASSES[task])
    model, missing = _from_pretrained(kind, folder, config, task, made_up)
    if missing and all(name.startswith("pooler.") for name in missing):  # of an encoder that was saved without
        model, missing = _from_pretrained(kind, folder, config, task, made_up, add_pooling_layer=False)
    if missing:
        raise SpectraError(
            f"{folder} lacks {len(missing)} of the parameters of a model for {task} ({', '.join(missing[:3])}"
            f"{', ...' if len(missing) > 3 else ''}), which would be random; choose the task that it was saved with"
        )
    return model


def _from_pretrained(
    kind: Any, folder: Path, config: Any, task: str, made_up: Collection[str], **options: Any
) -> tuple[nn.Module, list[str]]:
    """The model, and the names of its parameters that the folder does not hold and nothing else will bring."""
    with quietly(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # for what an adapter replaces
        try:
            model, report = kind.from_pretrained(
                folder,
                config=config,
                dtype=torch.float32,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=bool(made_up),
                **options,
            )
        except Exception as error:  # transformers raises what it likes
            raise SpectraError(
                f"transformers cannot load {folder} for {task}: {first_line(error)}; save the model again, or give a "
                "function of your own that builds it (package.module:function)"
            ) from error
    made = {*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])}
    return model, sorted(name for name in made if not any(f".{whole}." in f".{name}" for whole in made_up))


def _adapted(adapter: Adapter, task: str | None, base: Source | nn.Module | None) -> nn.Module:
    if base is None:
        raise SpectraError(f"{adapter.source} is an adapter, which runs on its base only; give the base, too")
    if isinstance(base, nn.Module):
        return merge_adapter(copy.deepcopy(base).float(), adapter)
    under = open_checkpoint(base)
    if isinstance(under, Adapter):
        raise SpectraError(f"{under.source} is an adapter and no base; give the model that it was trained on")
    config: Mapping[str, Any] = adapter.config
    wanted = task or _ADAPTER_TASKS.get(str(config.get("task_type")))
    return merge_adapter(_loaded(under, wanted, head_modules(config), class_names(adapter)), adapter)
