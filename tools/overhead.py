"""Time of a re-routed forward over a plain causal one of the same tokens: interleaved runs, ratios, medians.

usage: python tools/overhead.py [--model smollm2] [--layers 6-9 | all] [--dtype float32] [--pairs 9]
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from kvembed import EmbedConfig, models
from kvembed.backbone import Backbone

SHAPES = {64: 16, 512: 4, 2048: 1}  # tokens: texts in the batch


def seconds(backbone: Backbone, ids: torch.Tensor, lengths: torch.Tensor, config: EmbedConfig) -> float:
    """One forward."""
    started = time.perf_counter()
    backbone.states(ids, lengths, config)
    if ids.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def main() -> None:
    """Print one line a length."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--layers", default="6-9")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--pairs", type=int, default=9)
    args = parser.parse_args()
    model, _ = models.load(args.model, dtype=args.dtype)
    backbone = Backbone(model)
    first, _, last = args.layers.partition("-")
    chosen = backbone.attention_layers if first == "all" else range(int(first), int(last or first) + 1)
    plain, routed = EmbedConfig(), EmbedConfig(layers=tuple(chosen))
    print(
        f"{args.model}, {args.dtype}, {backbone.device.type}, {torch.get_num_threads()} threads, {len(chosen)} layers"
    )
    print("tokens  texts  plain s  re-routed / plain: median (quartiles)")
    for tokens, texts in SHAPES.items():
        ids = torch.randint(100, 1000, (texts, tokens), device=backbone.device)
        lengths = torch.full((texts,), tokens, device=backbone.device)
        for config in (plain, routed):
            seconds(backbone, ids, lengths, config)
        pairs = [
            (seconds(backbone, ids, lengths, plain), seconds(backbone, ids, lengths, routed)) for _ in range(args.pairs)
        ]
        ratios = [b / a for a, b in pairs]
        low, middle, high = statistics.quantiles(ratios, n=4)
        once = statistics.median(a for a, _ in pairs)
        print(f"{tokens:6}  {texts:5}  {once:7.3f}  {middle:.3f} ({low:.3f} to {high:.3f})")


if __name__ == "__main__":
    main()
