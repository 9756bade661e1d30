"""Handwritten digits of scikit-learn: 1797 real images of 8 × 8 pixels, without a download."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split


class Images(NamedTuple):
    """Labelled images.

    Attributes:
      pixels: ``[n, 8, 8]`` float32 in [-1, 1].
      digits: the digits they show, ``[n]`` int32.
    """

    pixels: np.ndarray
    digits: np.ndarray


def load(digits: range, seed: int) -> tuple[Images, Images]:
    """Return the training and the test images, half of all images each, of the given digits.

    >>> train, test = load(range(5, 10), seed=0)
    >>> train.pixels.shape, test.pixels.shape, sorted(set(test.digits.tolist()))
    ((448, 8, 8), (448, 8, 8), [5, 6, 7, 8, 9])
    """
    flat, target = (np.asarray(part) for part in load_digits(return_X_y=True))
    chosen = np.isin(target, digits)
    pixels = (flat[chosen].reshape(-1, 8, 8) / 8 - 1).astype(np.float32)  # from [0, 16]
    shown = target[chosen].astype(np.int32)
    splits = train_test_split(pixels, shown, test_size=0.5, stratify=shown, random_state=seed)
    train_pixels, test_pixels, train_digits, test_digits = map(np.asarray, splits)
    return Images(train_pixels, train_digits), Images(test_pixels, test_digits)


def batches(images: Images, steps: int, seed: int, size: int = 64) -> Iterator[Images]:
    """Yield ``steps`` random batches of ``size`` images, determined by ``seed``."""
    generator = np.random.default_rng(seed)
    for _ in range(steps):
        chosen = generator.choice(len(images.digits), size, replace=False)
        yield Images(images.pixels[chosen], images.digits[chosen])
