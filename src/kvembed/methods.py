"""The presets: method name -> EmbedConfig, each as its paper defines it; nothing else knows a method's name."""

from __future__ import annotations

from typing import Any

from .config import EmbedConfig
from .errors import InputError

__all__ = ["METHODS", "preset"]

METHODS: dict[str, EmbedConfig] = {
    config.method: config
    for config in (
        # KV-Embedding (Tang & Yang 2026, arXiv 2601.01046): compression prompt, re-routing in the layers of least
        # intrinsic dimension with bias 1, normalize((last + mean) / 2) over the last layer's states.
        EmbedConfig(
            method="kv",
            document="Context: {text}\nCompress the Context in one word:",
            query="Query: {text}\nCompress the Query in one word:",
            layers=None,
            bias=1.0,
            pooling="hybrid",
        ),
        # The plain baselines: no prompt, the causal model as it is.
        EmbedConfig(method="last", pooling="last"),
        EmbedConfig(method="mean", pooling="mean"),
        # SGPT (Muennighoff 2022, arXiv 2202.08904, section 3): position-weighted mean, w_i = i / sum(1..n).
        EmbedConfig(method="weighted-mean", pooling="weighted-mean"),
        # PromptEOL (Jiang et al. 2023, arXiv 2307.16645): explicit one-word limitation, last token.
        EmbedConfig(
            method="prompt-eol",
            document='This sentence : "{text}" means in one word:"',
            query='This sentence : "{text}" means in one word:"',
            pooling="last",
        ),
    )
}


def preset(method: str, **options: Any) -> EmbedConfig:
    """The config of a named method, with some fields changed.

    Args:
        method: a key of `METHODS`.
        options: fields of `EmbedConfig` to change, for example `layers=(4, 5), bias=2.0`.

    Raises:
        InputError: unknown method, unknown option or bad value.
    """
    if method not in METHODS:
        raise InputError(f"unknown method {method!r}; choose from {', '.join(METHODS)}")
    return METHODS[method].replace(**options)
