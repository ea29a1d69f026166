"""A random model of one layer, for what does not depend on how good vectors are: memory, pace."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from kvembed import Embedder, models

__all__ = ["tiny_embedder"]


def tiny_embedder() -> Embedder:
    """The mean of its states, with the default model's tokenizer; the same weights every time."""
    tokenizer = AutoTokenizer.from_pretrained(models.pull("smollm2"))
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return Embedder.from_model(AutoModelForCausalLM.from_config(config).eval(), tokenizer, method="mean")
