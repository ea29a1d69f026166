"""The presets: method name -> EmbedConfig, each as its paper defines it; nothing else knows a method's name.

Templates are used on the text as it is. The scripts of PromptEOL and its followers also end a sentence with a full stop
and turn its double quotes into single ones before they score STS; that is part of their data, not of the method.
"""

from __future__ import annotations

from typing import Any

from .config import EmbedConfig, Readout
from .errors import InputError

__all__ = ["METHODS", "preset"]

_COMPRESS = "{0}: {{text}}\nCompress the {0} in one word:"
_PROMPT_EOL = 'This sentence : "{text}" means in one word:"'
_PRETENDED_COT = 'After thinking step by step , this sentence : "{text}" means in one word:"'
_KNOWLEDGE = (
    "The essence of a sentence is often captured by its main subjects and actions, while descriptive terms provide "
    'additional but less central details. With this in mind , this sentence : "{text}" means in one word:"'
)
_ECHO = "Rewrite the sentence: {text}, rewritten sentence: {text}"
_TOKEN_PREPENDING = 'This sentence : {pst} "{text}" means in one word:"'  # noqa: S105 (no secret)
_META_TASKS = (
    "In this task, you're presented with a text excerpt. Your task is to categorize the excerpt into a broad "
    "category such as 'Education', 'Technology', 'Health', 'Business', 'Environment', 'Politics', or 'Culture'. "
    "These categories help in organizing content for better accessibility and targeting. For this task, this "
    'sentence : "{text}" should be classified under one general category in one word:"',
    "In this task, you're given a statement and you need to determine whether it's presenting an 'Opinion' or a "
    "'Fact'. This distinction is vital for information verification, educational purposes, and content analysis. "
    'For this task, this sentence : "{text}" discriminates between opinion and fact in one word:"',
    "In this task, you're given a review from an online platform. Your task is to generate a rating for the product "
    "based on the review on a scale of 1-5, where 1 means 'extremely negative' and 5 means 'extremely positive'. "
    'For this task, this sentence : "{text}" reflects the sentiment in one word:"',
    "In this task, you're reading a personal diary entry. Your task is to identify the predominant emotion "
    'expressed, such as joy, sadness, anger, fear, or love. For this task, this sentence : "{text}" conveys the '
    'emotion in one word:"',
    "In this task, you're presented with two sentences. Your task is to assess whether the sentences convey the "
    "same meaning. Use 'identical', 'similar', 'different', or 'unrelated' to describe the relationship. To enhance "
    'the performance of this task, this sentence : "{text}" means in one word:"',
    "In this task, you're given a sentence and a phrase. Your task is to determine if the phrase can be a "
    "contextual synonym within the given sentence. Options include 'yes', 'no', or 'partially'. To enhance the "
    'performance of this task, this sentence : "{text}" means in one word:"',
    "In this task, you're examining a news article. Your task is to extract the most critical fact from the "
    'article. For this task, this sentence : "{text}" encapsulates the key fact in one word:"',
    "In this task, you're reviewing a scientific abstract. Your task is to identify the main entities (e.g., "
    'proteins, diseases) and their relations (e.g., causes, treats). For this task, this sentence : "{text}" '
    'highlights the primary entity or relation in one word:"',
)
# Sentences of many kinds, and the word that each is compressed to.
_EXAMPLES = (
    ("A jockey riding a horse.", "Equestrian"),
    ("How do I reset my password?", "Account"),
    ("The committee approved the annual budget.", "Finance"),
    ("Water boils at a lower temperature on high mountains.", "Pressure"),
    ("Two children are playing football in the park.", "Football"),
    ("My laptop battery drains too fast.", "Battery"),
    ("Shares fell after the bank's profit warning.", "Stocks"),
    ("Which vaccine protects against measles?", "Vaccination"),
)


def _compress_as_in_examples(name: str) -> str:
    """The compression prompt after examples of itself, each with its answer."""
    template = _COMPRESS.format(name)
    return "".join(f"{template.format(text=text)} {word}\n\n" for text, word in _EXAMPLES) + template


METHODS: dict[str, EmbedConfig] = {
    config.method: config
    for config in (
        # KV-Embedding (Tang & Yang 2026, arXiv 2601.01046): compression prompt, re-routing in the layers of least
        # intrinsic dimension with bias 1, normalize((last + mean) / 2) over the last layer's states.
        EmbedConfig(
            method="kv",
            document=_COMPRESS.format("Context"),
            query=_COMPRESS.format("Query"),
            layers=None,
            bias=1.0,
            pooling="hybrid",
        ),
        # The plain baselines: no prompt, the causal model as it is.
        EmbedConfig(method="last", pooling="last"),
        EmbedConfig(method="mean", pooling="mean"),
        # SGPT (Muennighoff 2022, arXiv 2202.08904, section 3): position-weighted mean, w_i = i / sum(1..n).
        EmbedConfig(method="weighted-mean", pooling="weighted-mean"),
        # The causal mask taken off in every layer, mean over the tokens: the untrained control of LLM2Vec
        # (BehnamGhader et al. 2024, arXiv 2404.05961, section 3).
        EmbedConfig(method="bidirectional", layers="all", attention="bidirectional", pooling="mean"),
        # PromptEOL (Jiang et al. 2023, arXiv 2307.16645): explicit one-word limitation, last token.
        EmbedConfig(method="prompt-eol", document=_PROMPT_EOL, query=_PROMPT_EOL, pooling="last"),
        # Pretended chain of thought and Knowledge enhancement (Zhang et al. 2024, arXiv 2404.03921): PromptEOL with a
        # preface, read one layer below the top, as the authors' code does for these two (hidden_states[-2]).
        EmbedConfig(
            method="pretended-cot", document=_PRETENDED_COT, query=_PRETENDED_COT, pooling="last", output_layer=-2
        ),
        EmbedConfig(method="knowledge", document=_KNOWLEDGE, query=_KNOWLEDGE, pooling="last", output_layer=-2),
        # Echo (Springer et al. 2024, arXiv 2402.15449, zero-shot): the text twice, mean over its second copy; with the
        # example prompt of the paper's section 3.
        EmbedConfig(method="echo", document=_ECHO, query=_ECHO, pooling="mean", mean_tokens="content"),
        # Token Prepending (Fu et al. 2024, arXiv 2412.11556): PromptEOL with a placeholder before the text that holds
        # the last token's state from layer 1 up to, not including, layer 7, as for LLaMA-2-7B; the last token read one
        # layer below the top, which the paper takes for all models but that one (there: the output of layer 26 of 32).
        EmbedConfig(
            method="token-prepending",
            document=_TOKEN_PREPENDING,
            query=_TOKEN_PREPENDING,
            pooling="last",
            prepend_layers=tuple(range(1, 7)),
            output_layer=-2,
        ),
        # MetaEOL (Lei et al. 2024, arXiv 2402.18458): the last token's states under eight task prompts, averaged; read
        # at the top, as in the authors' code.
        EmbedConfig(method="meta-eol", document=_META_TASKS, query=_META_TASKS, pooling="last"),
        # No forward at all: the tokens' input embeddings, whitened and weighted by rarity (see `kvembed.static`), then
        # whitened as texts (see `kvembed.transform`).
        EmbedConfig(method="static", pooling="static", transform="whiten"),
        # Ours, for the best vectors: what the model would call the text in one word, as eight examples before it show
        # (in context, as in Jiang et al. 2023, arXiv 2307.16645, section 3.2), its own tokens' states after the first
        # layer, where words are still themselves, and its static vector. These views are whitened and joined by a
        # transform (see `kvembed.transform`). The examples are computed once for all texts (see `kvembed.prefix`), and
        # nothing is re-routed: that adds nothing that could be told from chance once the views are whitened. Far behind
        # the examples and a long text the model has lost its question, so a long text is read in chunks.
        EmbedConfig(
            method="auto",
            document=_compress_as_in_examples("Context"),
            query=_compress_as_in_examples("Query"),
            pooling="last",
            more_readouts=(
                Readout(pooling="mean", mean_tokens="content", output_layer=0),
                Readout(pooling="static"),
            ),
            transform="whiten",
            chunk_tokens=1024,
        ),
    )
}


def preset(method: str | EmbedConfig, **options: Any) -> EmbedConfig:
    """A config, with some fields changed.

    Args:
        method: a key of `METHODS`, or a config of your own: an `EmbedConfig`, or the name of a `.json` file of one.
        options: fields of `EmbedConfig` to change, for example `layers=(4, 5), bias=2.0`.

    Raises:
        InputError: unknown method, unknown option or bad value; or the file can't be read.
    """
    if isinstance(method, EmbedConfig):
        return method.replace(**options)
    if isinstance(method, str):
        if method in METHODS:
            return METHODS[method].replace(**options)
        if method.endswith(".json"):
            return EmbedConfig.read(method).replace(**options)
    raise InputError(f"unknown method {method!r}; choose from {', '.join(METHODS)}, or name a config's .json file")
