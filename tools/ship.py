"""src/kvembed/transforms/: the default model's transforms, so that nobody has to wait for a first vector.

    python tools/ship.py [METHOD ...]

Fits them if they are not in the cache (minutes), rounds them to float16 and writes them; one is found by the weights
and config that it is for. To be run again when `transform.FORMULA`, a method's config or the calibration texts change.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from kvembed import METHODS, Embedder
from kvembed.transform import FORMULA

FOLDER = Path(__file__).parent.parent / "src" / "kvembed" / "transforms"


def main() -> None:
    """Write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    fitted = [name for name, config in METHODS.items() if config.transform != "none"]
    parser.add_argument("methods", nargs="*", choices=[*fitted, []], default=fitted)
    for method in parser.parse_args().methods:
        ship(method)


def ship(method: str) -> None:
    """Write one."""
    target = FOLDER / f"smollm2-{method}.safetensors"
    target.unlink(missing_ok=True)  # or else it would be found, and written again
    transform = Embedder.from_pretrained("smollm2", method=method, dtype="auto", progress=True).transform
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
