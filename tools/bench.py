"""Speed, as ratios of interleaved runs in one process, medians and quartiles; `make tables` writes docs/speed.md of it.

    python tools/bench.py [--data ../shared/eval-data] [--model smollm2] [--dtype DTYPE] [--rounds N] [SECTION ...]
    python tools/bench.py --shape qwen3-4b     random weights of that shape, for an accelerator: the sections with a *

overhead* a re-routed forward over a plain causal one of the same tokens, and over other ways to see the whole text
packing*  texts of mixed lengths, padded, over packed
agreement* cosine of vectors to those of a CPU in float32
corpus    texts of mixed lengths, against sentence-transformers with the same backbone (needs --data)
llama     the same texts, against llama.cpp with the same GGUF file (needs --data, --gguf, llama-cpp-python), and with
          the same model in more files, if --gguf names some
preface   a template with a long beginning: computed with every text, over once for all of them
machine*  the forward's arithmetic over that of bare matrix products of the same shapes; share of tokens not padding
growth*   seconds by length of a text
memory    peak resident set of `kvembed embed` with few and with many texts, a tiny random model
start     `kvembed embed` of one sentence, the whole process

Each section writes results/speed/DTYPE/SECTION.json, or of a shape or on a GPU results/speed/DEVICE-MODEL/SECTION.json.
Nothing else should run on the machine meanwhile.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peak import peak_of
from shapes import SHAPES, random_model
from tiny import tiny_embedder
from torch import Tensor, nn
from transformers import AutoTokenizer

from kvembed import EmbedConfig, Embedder, models
from kvembed.backbone import Backbone
from kvembed.batching import token_batches
from kvembed.device import best_device, best_dtype
from kvembed.evaluate import hardware
from kvembed.process import keep_freed_memory
from kvembed.reroute import Reroute
from kvembed.tasks import load_tasks

ROOT = Path(__file__).parent.parent
LENGTHS = ((64, 16), (512, 4), (2048, 1), (4096, 1))  # tokens of a text, texts in a batch
# An accelerator's batches are larger; and one short text, a query, is what it is slowest at.
LENGTHS_THERE = ((64, 1), (64, 256), (512, 32), (2048, 8), (4096, 4))
GROWTH = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
PACKAGES = ("kvembed", "torch", "transformers")
LLAMA_BATCHES = (512, 2048)  # tokens
CORPUS_TEXTS = 79  # of each task
CORPUS_TASKS = {"stsb": None, "stackoverflow": None, "scifact": 1500, "qmsum": 400}  # cut to so many characters
ROUNDS = {"corpus": 5, "llama": 3, "growth": 3, "start": 5, "agreement": 1, "memory": 1}  # others: 7
LLAMA_TEXTS = 20  # of each task: llama.cpp takes minutes for more


def main() -> None:
    """Run the sections asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--gguf", type=Path, nargs="+")
    parser.add_argument("--dtype", help="default: bfloat16, or float32 on a CPU that can't multiply bfloat16")
    parser.add_argument("--rounds", type=int, help="default: by section")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "speed")
    parser.add_argument("sections", nargs="*", choices=[*SECTIONS, []], default=[])
    arguments = parser.parse_args()
    device = best_device()
    arguments.dtype = arguments.dtype or best_dtype(device)
    model = arguments.shape or arguments.model
    plain = device.type == "cpu" and not arguments.shape
    out = arguments.out / (arguments.dtype if plain else f"{device.type}-{model}")
    keep_freed_memory()  # as the command line does; all that is compared has it
    asked_rounds = arguments.rounds
    for name in arguments.sections or (SHAPE_SECTIONS if arguments.shape else SECTIONS):
        arguments.rounds = 1 if ROUNDS.get(name) == 1 else asked_rounds or ROUNDS.get(name, 7)
        needs = {"corpus": ("data",), "llama": ("data", "gguf")}.get(name, ())
        if lacking := [f"--{option}" for option in needs if getattr(arguments, option) is None]:
            print(f"{name}: left out, needs {' and '.join(lacking)}")
            continue
        rows = SECTIONS[name](arguments)
        told = {
            "section": name,
            "model": arguments.gguf[0].name if name == "llama" else model + " shape, random" * bool(arguments.shape),
            "dtype": arguments.dtype,
            "device": device.type,
            "threads": torch.get_num_threads(),
            "hardware": torch.cuda.get_device_name() if device.type == "cuda" else hardware(),
            # A processor with more can be kept to what others have: with ONEDNN_MAX_CPU_ISA and MKL's variable, too.
            "instructions": torch.backends.cpu.get_cpu_capability() + " alone" * ("ATEN_CPU_CAPABILITY" in os.environ),
            "versions": {
                package: _version(package) for package in PACKAGES + ("llama-cpp-python",) * (name == "llama")
            },
            "rounds": arguments.rounds,
            "rows": rows,
        }
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{name}.json").write_text(json.dumps(told, indent=1) + "\n")
        for row in rows:
            print(name, json.dumps(row), flush=True)


def _version(package: str) -> str:
    import importlib.metadata

    return importlib.metadata.version(package)


def _backbone(arguments: argparse.Namespace) -> Backbone:
    if arguments.shape:
        return Backbone(random_model(arguments.shape, getattr(torch, arguments.dtype), best_device()))
    return Backbone(models.load(arguments.model, dtype=arguments.dtype)[0])


def _embedder(arguments: argparse.Namespace, backbone: Backbone, method: str) -> Embedder:
    """Of the same weights."""
    tokenizer = AutoTokenizer.from_pretrained(models.pull(arguments.model))
    return Embedder.from_model(backbone.model, tokenizer, method=method)


def _kv_layers(arguments: argparse.Namespace, backbone: Backbone) -> tuple[int, ...]:
    """The layers that `kv` re-routes; of random weights, a fifth of all, as of real ones."""
    if not arguments.shape:
        return backbone.changed_layers(_embedder(arguments, backbone, "kv").config)
    depth = len(backbone.layers)
    return tuple(range(depth // 3, depth // 3 + depth // 5))


def _token_texts(count: int, shortest: int, longest: int) -> list[list[int]]:
    """Texts as token ids, of many lengths, short ones more often; the same every time."""
    draw = random.Random(0)
    lengths = math.log2(shortest), math.log2(longest)
    return [[draw.randrange(100, 1000) for _ in range(round(2 ** draw.uniform(*lengths)))] for _ in range(count)]


def _interleaved(runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each, run in turn, in another order every round, after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    order = list(runs)
    for turn in range(rounds + 1):
        random.Random(turn).shuffle(order)
        for name in order:
            started = time.perf_counter()
            runs[name]()
            if torch.accelerator.is_available():
                torch.accelerator.synchronize()
            if turn:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def _ratio(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """How many times longer `ours` takes: median and quartiles over rounds."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return {"ratio": round(middle, 3), "low": round(low, 3), "high": round(high, 3)}


def _linear(backbone: Backbone) -> list[nn.Linear]:
    return [part for layer in backbone.layers for part in layer.modules() if isinstance(part, nn.Linear)]


def _products(backbone: Backbone, batches: Sequence[int]) -> Callable[[], None]:
    """A forward's matrix products with weights, and nothing else, for batches of so many tokens."""
    linear = _linear(backbone)
    inputs = {
        (tokens, size): torch.randn(tokens, size, dtype=linear[0].weight.dtype, device=backbone.device)
        for tokens in batches
        for size in {part.in_features for part in linear}
    }

    @torch.inference_mode()
    def run() -> None:
        for tokens in batches:
            for part in linear:
                nn.functional.linear(inputs[tokens, part.in_features], part.weight)

    return run


def overhead(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """As `kv` does, and in every layer that has attention."""
    backbone = _backbone(arguments)
    chosen = _kv_layers(arguments, backbone)
    plain, some, routed = (EmbedConfig(layers=layers) for layers in ((), chosen, backbone.attention_layers))
    rows = []
    for tokens, texts in LENGTHS if backbone.device.type == "cpu" else LENGTHS_THERE:
        ids, twice = (torch.randint(100, 1000, (texts, n), device=backbone.device) for n in (tokens, 2 * tokens))
        lengths = torch.full((texts,), tokens, device=backbone.device)

        def forward(
            config: EmbedConfig, kind: Callable[..., Reroute], ids: Tensor = ids, lengths: Tensor = lengths
        ) -> None:
            backbone.rerouting = kind
            backbone.states(ids, lengths, config)

        def two_passes(run: Callable[..., None] = forward) -> None:
            run(plain, Reroute)
            run(plain, Reroute)

        def stock(ids: Tensor = ids) -> None:
            with torch.inference_mode():
                backbone.decoder(input_ids=ids, use_cache=False)

        runs: dict[str, Callable[[], object]] = {
            "stock": stock,
            "plain": lambda run=forward: run(plain, Reroute),  # type: ignore[misc]
            "kv": lambda run=forward: run(some, Reroute),  # type: ignore[misc]
            "re-routed": lambda run=forward: run(routed, Reroute),  # type: ignore[misc]
            "echo": lambda run=forward, ids=twice, n=lengths: run(plain, Reroute, ids, 2 * n),  # type: ignore[misc]
            "two passes": two_passes,
        }
        if tokens <= 2048:
            runs["prepended, with a mask"] = lambda run=forward: run(
                routed, functools.partial(Reroute, prefer_closed=False)
            )  # type: ignore[misc]
        seconds = _interleaved(runs, arguments.rounds)
        for name, ours in (("kv's layers", "kv"), ("every layer", "re-routed")):
            rows.append({"tokens": tokens, "texts": texts, "what": f"re-routed in {name} over plain"})
            rows[-1] |= _ratio(seconds[ours], seconds["plain"])
        rows.append({"tokens": tokens, "texts": texts, "what": "plain over transformers' own forward"})
        rows[-1] |= _ratio(seconds["plain"], seconds["stock"])
        for other in ("echo", "two passes", "prepended, with a mask"):
            if other in seconds:
                rows.append({"tokens": tokens, "texts": texts, "what": f"{other}, over re-routed in every layer"})
                rows[-1] |= _ratio(seconds[other], seconds["re-routed"])
    return rows


def packing(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Texts of 8 to 1,024 tokens, sorted by length; each way in batches of its own."""
    backbone = _backbone(arguments)
    on_cpu = backbone.device.type == "cpu"
    budget, count = (2048, 64) if on_cpu else (16384, 1024)
    texts = _token_texts(count, 8, 1024)
    tokens = [len(text) for text in texts]

    def encode(packed: bool) -> None:
        vars(backbone)["can_pack"] = packed  # a cached property
        for batch in token_batches(tokens, budget, packed=packed):
            backbone.states(*backbone.pad([texts[index] for index in batch]), EmbedConfig())[:, 0].cpu()

    seconds = _interleaved({"packed": lambda: encode(True), "padded": lambda: encode(False)}, arguments.rounds)
    return _against("packed", seconds, texts=count, tokens=sum(tokens))


def agreement(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Vectors are means of the last layer's states, of 16 texts of mixed lengths."""
    backbone = _backbone(arguments)
    chosen = _kv_layers(arguments, backbone)
    texts = _token_texts(16, 4, 256)

    def vectors(one: Backbone, config: EmbedConfig) -> Tensor:
        ids, lengths = one.pad(texts)
        states = one.states(ids, lengths, config).cpu().float()
        return torch.stack([row[:n].mean(0) for row, n in zip(states, lengths.tolist(), strict=True)])

    configs = {"plain": (), "re-routed in kv's layers": chosen, "re-routed in every layer": backbone.attention_layers}
    found = {name: vectors(backbone, EmbedConfig(layers=layers)) for name, layers in configs.items()}
    backbone.model.to("cpu", torch.float32)
    rows = []
    for name, layers in configs.items():
        cosine = nn.functional.cosine_similarity(found[name], vectors(backbone, EmbedConfig(layers=layers)))
        rows.append({"what": f"least cosine to float32 on a CPU, {name}", "cosine": round(float(cosine.min()), 5)})
    return rows


def _corpus(data: Path, count: int = CORPUS_TEXTS) -> list[str]:
    """So many texts of each task, mixed."""
    texts: list[str] = []
    for task in load_tasks(data, list(CORPUS_TASKS)):
        documents = list(task.documents)
        random.Random(0).shuffle(documents)
        texts += [text[: CORPUS_TASKS[task.name]] for text in documents[:count]]
    random.Random(1).shuffle(texts)
    return texts


def corpus(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Mean pooling without a prompt on both sides, so that the tokens are the same."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    texts = _corpus(arguments.data)
    embedder = Embedder.from_pretrained(arguments.model, method="mean", dtype=arguments.dtype)
    folder = str(models.pull(arguments.model))
    transformer = Transformer(folder, model_kwargs={"dtype": getattr(torch, arguments.dtype)})
    if {"message", "text"} <= {*getattr(transformer, "modality_config", ())}:  # no chat template on plain text
        del transformer.modality_config["message"]
        transformer.input_formatter.supported_modalities.remove("message")
    theirs = SentenceTransformer(
        modules=[transformer, Pooling(embedder.backbone.dim)], device=str(embedder.model.device)
    )
    counts = embedder.encode_with_report(texts).token_counts.tolist()
    tokens = sum(counts)
    batches = [
        math.ceil(sum(counts[index] for index in batch) / 8) * 8  # as packed batches are, see backbone.py
        for batch in token_batches(counts, embedder.batch_tokens, packed=True)
    ]
    runs: dict[str, Callable[[], object]] = {
        "kvembed": lambda: embedder.encode(texts),
        "its matrix products alone": _products(embedder.backbone, batches),
    }
    for size in (1, 8, 32):
        runs[f"sentence-transformers, batches of {size}"] = lambda size=size: theirs.encode(texts, batch_size=size)  # type: ignore[misc]
    seconds = _interleaved(runs, arguments.rounds)
    cosine = (embedder.encode(texts) * theirs.encode(texts, batch_size=1, normalize_embeddings=True)).sum(1).min()
    return _against("kvembed", seconds, texts=len(texts), tokens=tokens, least_cosine=round(float(cosine), 4))


def _against(ours: str, seconds: Mapping[str, Sequence[float]], tokens: int, **common: float) -> list[dict[str, Any]]:
    """A row for each, with its time over ours."""
    return [
        {"what": name, "tokens_per_second": round(tokens / statistics.median(found)), "tokens": tokens, **common}
        | (_ratio(found, seconds[ours]) if name != ours else {})
        for name, found in seconds.items()
    ]


def llama(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Mean pooling without a prompt and all threads on both sides; llama.cpp by its file and its tokens in a batch."""
    import llama_cpp  # not of the project's dependencies: it compiles for minutes
    import numpy as np

    texts = _corpus(arguments.data, LLAMA_TEXTS)
    embedder = Embedder.from_pretrained(arguments.gguf[0], method="mean", dtype=arguments.dtype)
    runs: dict[str, Callable[[], object]] = {"kvembed": lambda: embedder.encode(texts)}
    for path in arguments.gguf:
        for batch in LLAMA_BATCHES:
            theirs = llama_cpp.Llama(
                str(path),
                embedding=True,
                pooling_type=llama_cpp.LLAMA_POOLING_TYPE_MEAN,
                n_ctx=max(LLAMA_BATCHES),
                n_batch=batch,
                n_ubatch=batch,
                n_threads=torch.get_num_threads(),
                n_threads_batch=torch.get_num_threads(),
                verbose=False,
            )
            runs[f"llama.cpp, {path.stem}, batches of {batch:,}"] = functools.partial(
                theirs.embed, texts, normalize=True
            )
    seconds = _interleaved(runs, arguments.rounds)
    encoded = embedder.encode_with_report(texts)
    first = next(name for name in runs if name != "kvembed")  # of the file that kvembed reads too
    cosine = (encoded.vectors * np.array(runs[first](), np.float32)).sum(1).min()
    tokens = int(encoded.token_counts.sum())
    return _against("kvembed", seconds, texts=len(texts), tokens=tokens, least_cosine=round(float(cosine), 4))


def preface(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """`knowledge`, whose template begins with a long sentence, on short texts."""
    embedder = Embedder.from_pretrained(arguments.model, method="knowledge", dtype=arguments.dtype)
    notices = (ROOT / "examples" / "notices.txt").read_text().splitlines()
    texts = [f"{notice} {number}" for number in range(8) for notice in notices][:256]

    def encode(share: bool) -> None:
        vars(embedder.backbone)["can_share"] = share  # a cached property
        embedder.encode(texts)

    runs = {name: functools.partial(encode, share) for name, share in (("once", True), ("with each", False))}
    seconds = _interleaved(runs, arguments.rounds)
    row = {"what": "the preface with each text, over once for all", "texts": len(texts)}
    return [row | _ratio(seconds["with each"], seconds["once"])]


def machine(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Model FLOP/s over GEMM FLOP/s in the same rounds; and the share of computed tokens that is real, packed."""
    backbone = _backbone(arguments)
    texts, tokens = 32, 64 if backbone.device.type == "cpu" else 512
    ids = torch.randint(100, 1000, (texts, tokens), device=backbone.device)
    lengths = torch.full((texts,), tokens, device=backbone.device)
    compiled = Backbone(copy.deepcopy(backbone.model))
    compiled.compile()
    seconds = _interleaved(
        {
            "forward": lambda: backbone.states(ids, lengths, EmbedConfig()),
            "compiled": lambda: compiled.states(ids, lengths, EmbedConfig()),
            "products": _products(backbone, [texts * tokens]),
        },
        arguments.rounds,
    )
    work = 2 * texts * tokens * sum(part.weight.numel() for part in _linear(backbone))
    rate = work / statistics.median(seconds["products"]) / 1e9
    rows: list[dict[str, Any]] = [
        {"what": "model FLOP/s over GEMM FLOP/s", "gemm_gflops": round(rate)}
        | _ratio(seconds["products"], seconds["forward"]),
        {"what": "the same, compiled"} | _ratio(seconds["products"], seconds["compiled"]),
        {"what": "plain forward over compiled"} | _ratio(seconds["forward"], seconds["compiled"]),
    ]
    if arguments.data is not None and not arguments.shape:
        embedder = _embedder(arguments, backbone, "mean")
        computed = []
        hook = backbone.layers[0].register_forward_pre_hook(
            lambda _, args, kwargs: computed.append((args[0] if args else kwargs["hidden_states"]).shape[:2].numel()),
            with_kwargs=True,
        )
        real = int(embedder.encode_with_report(_corpus(arguments.data)).token_counts.sum())
        hook.remove()
        probes = sum(count for count in computed if count <= 16)
        rows.append({"what": "real tokens over computed tokens", "ratio": round(real / (sum(computed) - probes), 4)})
    return rows


def growth(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One text of so many tokens, re-routed in every layer."""
    backbone = _backbone(arguments)
    routed = EmbedConfig(layers=backbone.attention_layers)
    rows = []
    for tokens in GROWTH:
        if backbone.max_tokens and tokens > backbone.max_tokens:
            continue
        ids = torch.randint(100, 1000, (1, tokens), device=backbone.device)
        lengths = torch.full((1,), tokens, device=backbone.device)
        run = functools.partial(backbone.states, ids, lengths, routed)
        seconds = _interleaved({"": run}, arguments.rounds)[""]
        rows.append({"tokens": tokens, "seconds": round(statistics.median(seconds), 4)})
    return rows


def memory(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A process each, so that a peak is its own."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        tiny_embedder().save_pretrained(folder / "tiny")
        for count in (2_000, 20_000, 200_000):
            source = folder / f"{count}.txt"
            source.write_text("".join(f"Text number {i} of {count}, about {i % 97} things.\n" for i in range(count)))
            command = [sys.executable, "-m", "kvembed", "embed", source, "-o", folder / "out.npy"]
            command += ["--model", folder / "tiny", "--dtype", arguments.dtype]
            rows.append({"texts": count, "peak_mib": round(peak_of(command) / 1024)})
    rows.append({"what": "peak of many over few", "ratio": round(rows[-1]["peak_mib"] / rows[0]["peak_mib"], 3)})
    return rows


def start(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Weights in the cache, as after a first use."""
    command = [sys.executable, "-m", "kvembed", "embed", "--model", arguments.model, "--dtype", arguments.dtype]
    run = functools.partial(subprocess.run, command, input=b"One sentence.\n", check=True, capture_output=True)
    seconds = _interleaved({"": run}, arguments.rounds)[""]
    return [{"what": "one sentence, whole process", "seconds": round(statistics.median(seconds), 2)}]


SECTIONS: dict[str, Callable[[argparse.Namespace], list[dict[str, Any]]]] = {
    part.__name__: part
    for part in (overhead, packing, corpus, llama, preface, machine, growth, agreement, memory, start)
}
SHAPE_SECTIONS = [part.__name__ for part in (overhead, packing, machine, growth, agreement)]

if __name__ == "__main__":
    main()
