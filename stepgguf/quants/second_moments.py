"""Second moments of a matrix's inputs, H = E[x x^T]: the metric in which its quantization error counts.

    E |(w - q) x|^2 = (w - q) H (w - q)^T        for a row w of weights and what its blocks decode to, q

encode_calibrated (calibrated.py) chooses codes in this metric. All large work is float32 matrix products.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stepgguf.errors import QuantError

Floats = NDArray[np.float32]

STEP = 256  # columns that are worked on together


@dataclass(frozen=True, slots=True)
class SecondMoments:
    """Moments made ready to quantize against. `factor_moments` gives them; matrices of the same inputs share them.

    matrix      [columns, columns]: H over the mean of its diagonal; 0 if H is
    damping     added to the diagonal of the matrix where codes are chosen
    root        [columns, columns]: R, upper triangular, with R R^T = matrix + damping
    """

    matrix: Floats
    damping: float
    root: Floats

    def damped_block(self, step: slice) -> Floats:
        """Matrix + damping of a step's columns: [n, n]."""
        block: Floats = self.matrix[step, step].copy()
        block.flat[:: len(block) + 1] += self.damping
        return block


def factor_moments(moments: Floats, damping: float = 0.05) -> SecondMoments:
    """Make moments [columns, columns] ready: symmetric, positive semidefinite, of any magnitude.

    damping: what is added to the diagonal, as a share of its mean. It grows until the matrix can be factored.
    QuantError if the moments are not finite.
    """
    if not np.isfinite(moments.sum(dtype=np.float64)):
        raise QuantError("the second moments have values that are not finite")
    mean = float(np.trace(moments, dtype=np.float64)) / len(moments)
    matrix = moments * np.float32(1 / mean) if mean > 0 else np.zeros_like(moments)
    while True:
        try:
            return SecondMoments(matrix, damping, _root(matrix, damping))
        except np.linalg.LinAlgError:
            damping = max(10 * damping, 1e-4)


def _root(matrix: Floats, damping: float) -> Floats:
    """The upper triangular R of matrix + damping, its last columns first. LinAlgError if it is not positive.

    By blocks, so that all but little is matrix products: three times as fast as LAPACK through numpy.
    """
    root = np.zeros_like(matrix)
    for step in reversed(list(steps(len(matrix)))):
        first, stop = step.start, step.stop
        columns = matrix[:stop, step] - root[:stop, stop:] @ root[step, stop:].T
        own = columns[first:]
        own.flat[:: len(own) + 1] += damping
        # numpy's factor is lower triangular: of rows and columns reversed, reversed, it is upper.
        own = np.linalg.cholesky(own[::-1, ::-1])[::-1, ::-1]
        root[step, step] = own
        root[:first, step] = columns[:first] @ np.linalg.inv(own).T
    return root


def steps(columns: int) -> Iterator[slice]:
    """Yield the columns of each step."""
    return (slice(first, min(first + STEP, columns)) for first in range(0, columns, STEP))


def row_errors(errors: Floats, matrix: Floats) -> NDArray[np.float64]:
    """e M e^T of each row e of errors [rows, columns]; M is symmetric. Products in float32, sums in float64."""
    totals = np.zeros(len(errors))
    for step in steps(errors.shape[1]):
        # What is behind the step has the same products: M is symmetric.
        products = errors[:, : step.start] @ matrix[: step.start, step]
        products *= 2
        products += errors[:, step] @ matrix[step, step]
        products *= errors[:, step]
        totals += products.sum(1, np.float64)
    return totals


def output_error(weights: Floats, decoded: Floats, moments: Floats) -> float:
    """The sum over rows of (w - q) H (w - q)^T: the mean square error of the outputs, all outputs together.

    weights, decoded: [rows, columns]; moments: [columns, columns], symmetric.
    """
    return float(row_errors(weights - decoded, moments).sum())
