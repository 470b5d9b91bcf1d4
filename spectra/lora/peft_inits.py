"""The initialisations of peft, on a base that stays as it is.

Several of them (pissa, olora, corda, lora_ga) take c B0 A0 out of the base weights. The weights are put back, and the
factors that peft chose become A0 and B0 of the difference form.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from spectra.errors import SpectraError
from spectra.lora.configuration import PEFT, SliceConfig
from spectra.lora.injecting import inject
from spectra.lora.layers import stored_as
from spectra.lora.targets import Target

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

FLAGS: Mapping[str, bool] = {"true": True, "false": False}
FROM_BATCHES = ("corda", "eva")


def inject_initialised(
    model: nn.Module,
    targets: Sequence[Target],
    settings: LoraConfig,
    config: SliceConfig,
    gradients: Mapping[str, Tensor] | None,
    batches: Iterable[Any] | None,
) -> PeftModel:
    """A PeftModel whose factors peft initialised, on unchanged base weights; a copy of each target's weight meanwhile.

    Raises: SpectraError for an initialisation that peft does not have, or not for these modules and dtypes, and where
        what it starts from is missing.
    """
    name = config.method.removeprefix(PEFT)
    examples = list(batches) if batches is not None and name in FROM_BATCHES else None
    _check(name, targets, examples)
    value: Any = FLAGS.get(name.lower(), name)
    settings.init_lora_weights = value
    kept = [(target, target.stored.clone()) for target in targets]

    def finish(adapted: PeftModel) -> None:
        if name == "eva":
            from peft import initialize_lora_eva_weights

            assert examples is not None
            # peft's own preparation leaves out padded tokens; without tokens, every row of a layer's input counts.
            of_texts = all("input_ids" in batch for batch in examples)
            rows: dict[str, Any] = {"prepare_model_inputs_fn": None, "prepare_layer_inputs_fn": _rows}
            initialize_lora_eva_weights(adapted, examples, show_progress_bar=False, **({} if of_texts else rows))

    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            _prepare(name, model, targets, settings, gradients, examples)
            return inject(model, targets, settings, finish)
    finally:
        settings.init_lora_weights = True
        for target, weight in kept:
            target.module.get_parameter("weight").data = weight
            for attribute in ("eigens", "_peft_loraga_grad"):
                if hasattr(target.module, attribute):
                    delattr(target.module, attribute)


def _rows(layer_input: Any, model_input: Any, layer_name: str) -> Tensor:
    """What a layer was given, a row an example and position."""
    given: Tensor = layer_input[0] if isinstance(layer_input, tuple | list) else layer_input
    return given.flatten(0, -2)


def _check(name: str, targets: Sequence[Target], examples: Sequence[Any] | None) -> None:
    if name == "loftq":
        raise SpectraError("peft:loftq quantises the base, which stays as it is here; take another initialisation")
    if name in FROM_BATCHES and not examples:
        raise SpectraError(f"peft:{name} starts from activations; pass the batches to run the model on")
    if other_kind := next((type(batch) for batch in examples or () if not isinstance(batch, Mapping)), None):
        raise SpectraError(
            f"peft:{name} runs the model on its named arguments, and a batch is a {other_kind.__name__}; "
            "give mappings, such as {'input_ids': ...}"
        )
    other = next((target for target in targets if target.kind not in ("linear", "conv1d")), None)
    if other is not None and name.lower() not in (*FLAGS, "gaussian"):
        raise SpectraError(f"peft:{name} is for linear layers, and {other.name!r} is of kind {other.kind}; exclude it")
    turned = next((target.name for target in targets if target.kind == "conv1d"), None)
    if name == "olora" and turned is not None:
        raise SpectraError(f"peft:olora takes the weight of a Conv1D for its transpose; exclude {turned!r}")


def _prepare(
    name: str,
    model: nn.Module,
    targets: Sequence[Target],
    settings: LoraConfig,
    gradients: Mapping[str, Tensor] | None,
    examples: Sequence[Any] | None,
) -> None:
    """What peft looks for on the layers and in the settings."""
    if name == "lora_ga":
        from peft import LoraGAConfig

        settings.lora_ga_config = LoraGAConfig()
        for target in targets:
            if gradients is None or target.name not in gradients:
                raise SpectraError(f"no mean gradient of {target.name!r} was given; pass those of mean_gradients")
            gradient = stored_as(target.kind, gradients[target.name], target.stored.shape)
            target.module._peft_loraga_grad = gradient.to(target.stored.device)
    if name == "corda":
        from peft.tuners.lora.config import CordaConfig

        try:
            from peft.tuners.lora.corda import preprocess_corda
        except ImportError as error:  # attrs, which peft does not ask for
            raise SpectraError(f"peft:corda needs a library that is not installed ({error}); install it") from error

        settings.corda_config = CordaConfig()
        assert examples is not None

        def run() -> None:
            with torch.no_grad():
                for batch in examples:
                    model(**batch)

        preprocess_corda(model, settings, run_model=run)
    if name == "eva":
        from peft import EvaConfig

        settings.eva_config = EvaConfig(rho=1.0)  # which keeps every module's rank
