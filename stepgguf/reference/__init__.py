from typing import Literal

DeviceName = Literal["cpu", "cuda", "mps"]  # where torch computes
