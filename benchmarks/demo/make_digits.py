"""Write `edgeprune/demo/digits.npz` from the handwritten digits bundled with scikit-learn.

    python benchmarks/demo/make_digits.py

The data are the UCI "Optical Recognition of Handwritten Digits" test images (CC BY 4.0).  Every
image is given to one split of the demo scenes for good, so that no split shows another's digits.
"""

from itertools import pairwise
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

from edgeprune import demo

SHARES = (0.68, 0.06, 0.18, 0.08)  # train, validation, held_out, calibration


def main() -> None:
    """Assign the images to splits, digit by digit, and write them."""
    data = load_digits()
    labels = data.target.astype(np.uint8)
    splits = np.zeros(len(labels), dtype=np.uint8)
    rng = np.random.default_rng(0)
    for digit in range(10):
        indices = rng.permutation(np.flatnonzero(labels == digit))
        bounds = np.cumsum([0, *SHARES]) * len(indices)
        for i, (lo, hi) in enumerate(pairwise(bounds)):
            splits[indices[round(lo) : round(hi)]] = i
    path = Path(demo.__file__).with_name("digits.npz")
    images = data.images.astype(np.uint8)
    np.savez_compressed(path, images=images, labels=labels, splits=splits)
    print(f"{len(labels)} digits, {path.stat().st_size} bytes, per split {np.bincount(splits)}")


if __name__ == "__main__":
    main()
