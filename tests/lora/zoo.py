"""A small model with every kind of module that carries a LoRA, and one of each kind of transformers model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

KINDS = ("table", "kernel", "biased", "bare", "turned")


class Zoo(nn.Module):
    """Tokens and an image through an embedding, a convolution, two linear layers and a Conv1D."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(17, 12, padding_idx=0)
        self.kernel = nn.Conv2d(3, 12, 3, stride=2, padding=1)
        self.biased = nn.Linear(12, 20)
        self.bare = nn.Linear(20, 9, bias=False)
        self.turned = Conv1D(14, 9)
        self.head = nn.Linear(14, 3)

    def forward(self, ids: Tensor, image: Tensor) -> Tensor:
        x = self.table(ids).mean(1) + self.kernel(image).flatten(2).mean(2)
        x = torch.tanh(self.biased(torch.tanh(x)))
        result: Tensor = self.head(torch.tanh(self.turned(torch.tanh(self.bare(x)))))
        return result


def zoo(dtype: torch.dtype = torch.float32) -> Zoo:
    torch.manual_seed(0)
    return Zoo().to(dtype).eval()


def inputs(dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "ids": torch.randint(17, (4, 5), generator=generator),
        "image": torch.randn(4, 3, 6, 6, generator=generator).to(dtype),
    }


def train(model: nn.Module, step: Callable[[nn.Module], Tensor], steps: int = 3, rate: float = 0.05) -> None:
    """A few steps of SGD on what requires a gradient."""
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=rate)
    for _ in range(steps):
        optimiser.zero_grad()
        step(model).backward()
        optimiser.step()


def zoo_loss(model: nn.Module) -> Tensor:
    dtype = next(p.dtype for name, p in model.named_parameters() if "head" in name and name.endswith("weight"))
    output = model(**inputs(dtype, seed=1))
    return nn.functional.cross_entropy(output.float(), torch.tensor([0, 1, 2, 0]))


def woken(make: Callable[[], Any]) -> Any:
    """A transformers model whose random weights are as large as those of trained ones, so that its logits differ."""
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, parameter[0].numel() ** -0.5)
    return model


def bert() -> Any:
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=61
        )
    )


def gpt2() -> Any:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            n_embd=32, n_layer=2, n_head=2, vocab_size=61, n_positions=16, bos_token_id=0, eos_token_id=0
        )
    )


def llama() -> Any:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=61,
        )
    )  # fmt: skip


def vit() -> Any:
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=16,
            patch_size=8, num_labels=3,
        )
    )  # fmt: skip
