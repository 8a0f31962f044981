"""Where torch computes."""

from __future__ import annotations

import torch

from stepgguf.errors import RequestError
from stepgguf.reference import DeviceName


def open_device(name: DeviceName, n_threads: int | None = None) -> torch.device:
    """The device, with so many threads of the processor; None leaves torch's default.

    RequestError where torch finds none of this kind.
    """
    found = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not found[name]:
        raise RequestError(
            f"torch {torch.__version__} finds no {name} device",
            param="device",
            hint="Use --device cpu, or install a torch that is made for this machine's GPU.",
        )
    if n_threads is not None:
        torch.set_num_threads(n_threads)
    return torch.device(name)
