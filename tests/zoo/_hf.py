"""Hugging Face models from small random configurations; built only when asked for."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from zoo._case import LOSSES, Case, call, randint, randn, randomize, targets_for

TEXT = {"hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 3}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}


def _bert() -> tuple[nn.Module, Any]:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(vocab_size=5, max_position_embeddings=4, type_vocab_size=2, num_labels=2, **TEXT)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    return BertForSequenceClassification(config), {"input_ids": randint(4, 2, 3) + 1, "attention_mask": mask}


def _gpt2() -> tuple[nn.Module, Any]:
    from transformers import GPT2Config, GPT2ForSequenceClassification

    config = GPT2Config(vocab_size=5, n_positions=4, n_embd=4, n_layer=1, n_head=2, n_inner=3, num_labels=2, **SPECIAL)
    return GPT2ForSequenceClassification(config), {"input_ids": randint(4, 2, 3) + 1}


def _gpt2_language() -> tuple[nn.Module, Any]:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=5, n_positions=3, n_embd=4, n_layer=1, n_head=1, n_inner=3, **SPECIAL)
    return _ClassesSecond(GPT2LMHeadModel(config)), {"input_ids": randint(5, 2, 3)}


class _ClassesSecond(nn.Module):
    """Logits [N, T, C] as [N, C, T], the order that the cross-entropy takes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.model(input_ids=input_ids, use_cache=False).logits.transpose(1, 2)}


def _vit() -> tuple[nn.Module, Any]:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(image_size=4, patch_size=2, num_channels=1, num_labels=2, **TEXT)
    return ViTForImageClassification(config), {"pixel_values": randn(2, 1, 4, 4)}


def _resnet() -> tuple[nn.Module, Any]:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        num_channels=1, embedding_size=2, hidden_sizes=[2, 3], depths=[1, 1], layer_type="basic", num_labels=2
    )
    return ResNetForImageClassification(config), {"pixel_values": randn(2, 1, 16, 16)}


def _case(name: str, make: Any, *tags: str) -> Case:
    def build() -> tuple[nn.Module, Any, Any]:
        torch.manual_seed(0)
        model, inputs = make()
        model = randomize(model).eval()
        with torch.no_grad():
            out = call(model, inputs, "logits")
        return model, inputs, targets_for("cross_entropy", out)

    return Case(
        name,
        build,
        "cross_entropy",
        LOSSES["cross_entropy"],
        "eval",
        "logits",
        frozenset({"transformers", *tags}),
    )


HUGGING_FACE = [
    _case("hf_bert", _bert, "sequence", "integer"),
    _case("hf_gpt2", _gpt2, "sequence", "integer"),
    _case("hf_gpt2_language", _gpt2_language, "sequence", "integer", "shared"),
    _case("hf_vit", _vit, "sequence", "conv"),
    _case("hf_resnet", _resnet, "conv", "kinked"),
]
