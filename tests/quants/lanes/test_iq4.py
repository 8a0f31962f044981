"""IQ4_NL and IQ4_XS against ggml."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import IQ4_NL

from stepgguf.quants.lanes.iq4 import TYPES
from tests.quants.lanes.inputs import check_valid


@pytest.mark.parametrize("name", TYPES)
def test_a_number_in_the_middle_between_two_values_takes_the_level_that_ggml_takes(name: str) -> None:
    block, _ = GGML_QUANT_SIZES[GGMLQuantizationType[name]]
    levels = np.array(IQ4_NL.kvalues, np.float32)
    # The middles weigh nothing, so the scale is exactly 1.
    row = np.tile(np.append(levels, np.append((levels[1:] + levels[:-1]) / 2, 0)), block // 32).astype(np.float32)
    importance = np.tile(np.repeat([1, 0], 16), block // 32).astype(np.float32)
    check_valid(name, TYPES[name].encode, row[None], importance)
