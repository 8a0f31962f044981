"""The model in torch: the specification, and layer by layer for models that no memory holds.

The choice that the command line offers is here, where reading it does not load torch.
"""

from typing import Literal, TypeAlias

DeviceName: TypeAlias = Literal["cpu", "cuda", "mps"]  # where torch computes
