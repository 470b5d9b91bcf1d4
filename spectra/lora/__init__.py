"""LoRA adapters of PEFT: taken out of checkpoints."""

from spectra.lora.extract import extract

__all__ = ["extract"]
