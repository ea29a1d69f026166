"""src/kvembed/transforms/: the default model's transform for `auto`, so that nobody has to wait for a first vector.

    python tools/ship.py

Fits it if it is not in the cache (minutes), rounds it to float16 and writes it; it is found by the weights and config
that it is for. To be run again when `transform.FORMULA`, `auto`'s config or the calibration texts change.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from kvembed import Embedder
from kvembed.transform import FORMULA

FOLDER = Path(__file__).parent.parent / "src" / "kvembed" / "transforms"


def main() -> None:
    """Write it."""
    target = FOLDER / "smollm2-auto.safetensors"
    target.unlink(missing_ok=True)  # or else it would be found, and written again
    transform = Embedder.from_pretrained("smollm2", method="auto", dtype="bfloat16", progress=True).transform
    assert transform is not None
    dataclasses.replace(
        transform,
        means={role: mean.half() for role, mean in transform.means.items()},
        whiten=transform.whiten.half(),
        rotate=transform.rotate.half(),
        info=transform.info | {"formula": str(FORMULA)},
    ).save(target)
    print(f"{target.relative_to(FOLDER.parent.parent.parent)}: {target.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
