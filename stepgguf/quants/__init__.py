"""Numbers to quantization blocks and back.

The choices that the command line offers are here, where reading them loads nothing else.
"""

from typing import Literal, TypeAlias

KernelName: TypeAlias = Literal["lanes", "ggml"]  # who encodes: kernels of our own, ggml's
ImatrixPrior: TypeAlias = Literal["pooled", "flat"]  # what thin experts get; see imatrix.channel_importance
