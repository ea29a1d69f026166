"""src/kvembed/calibration/ and transforms/: what the default model wrote, and its transforms. Nobody waits for them.

    python tools/ship.py [--method METHOD ...]

Takes texts and transforms from the cache, or makes them (minutes), and rounds the latter to float16; they are found by
the model, and by the config that they are for. To be run again when `transform.FORMULA`, a method's config or the way
texts are written changes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from kvembed import METHODS, Embedder
from kvembed.files import store
from kvembed.self_written import SEED, generated_texts
from kvembed.tuning import FIT_TEXTS

FOLDER = Path(__file__).parent.parent / "src" / "kvembed"


def main() -> None:
    """Write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    fitted = [name for name, config in METHODS.items() if config.transform != "none"]
    parser.add_argument("--method", action="append", choices=fitted)
    methods = parser.parse_args().method or fitted
    ship_texts()
    for method in methods:
        ship(method)


def ship_texts() -> None:
    """Write the texts."""
    embedder = Embedder.from_pretrained("smollm2", method="mean", dtype="float32")
    target = FOLDER / "calibration" / f"{embedder.fingerprint()}-{SEED}.json"
    for old in target.parent.glob("*.json"):
        old.unlink()  # or else it would be found, and written again
    texts = generated_texts(embedder.model, embedder.tokenizer, embedder.fingerprint(), FIT_TEXTS, progress=True)
    store(target, json.dumps(texts, indent=0, ensure_ascii=False) + "\n", "the texts")
    print(f"{target.relative_to(FOLDER.parent.parent)}: {len(texts):,} texts")


def ship(method: str) -> None:
    """Write one transform."""
    target = FOLDER / "transforms" / f"smollm2-{method}.safetensors"
    target.unlink(missing_ok=True)  # or else it would be found, and written again
    transform = Embedder.from_pretrained("smollm2", method=method, dtype="auto", progress=True).transform
    assert transform is not None
    dataclasses.replace(
        transform,
        means={role: mean.half() for role, mean in transform.means.items()},
        whiten=transform.whiten.half(),
        rotate=transform.rotate.half(),
    ).save(target)
    print(f"{target.relative_to(FOLDER.parent.parent)}: {target.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
