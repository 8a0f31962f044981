"""IQ4_NL and IQ4_XS against ggml."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import IQ4_NL

from stepgguf.quants.lanes.iq4 import TYPES
from tests.oracle import library


@pytest.mark.parametrize("name", TYPES)
def test_a_number_in_the_middle_between_two_values_takes_the_level_that_ggml_takes(name: str) -> None:
    kind = GGMLQuantizationType[name]
    block, size = GGML_QUANT_SIZES[kind]
    levels = np.array(IQ4_NL.kvalues, np.float32)
    # The middles weigh nothing, so the scale is exactly 1.
    row = np.tile(np.append(levels, np.append((levels[1:] + levels[:-1]) / 2, 0)), block // 32).astype(np.float32)
    importance = np.tile(np.repeat([1, 0], 16), block // 32).astype(np.float32)
    ours, theirs = np.empty((2, 1, size), np.uint8)
    assert TYPES[name].encode(row[None], None, importance, ours)
    library().quantize(kind, row[None], theirs, importance)
    np.testing.assert_array_equal(ours, theirs)
