"""Where llama.cpp puts a model's tensors, and how it keeps keys and values: in the words and with the values of
llama-server's options. Both engines take these, and stepgguf.fit plans with them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

SplitMode = Literal["none", "layer", "row", "tensor"]
CacheType = Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl"]
FlashAttention = Literal["auto", "on", "off"]

ALL_LAYERS = -1
DEFAULT_UBATCH = 512  # rows of a decode at most: so much a cancel may have to wait for
_PLAIN_TYPES = ("f32", "f16", "bf16")


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """What goes on cards and what into RAM. None stands for what nobody has chosen yet.

    gpu_layers: so many of the last layers go on cards, the output being one of them; ALL_LAYERS, and None, is all.
    n_cpu_moe: the routed experts of the first so many layers stay in RAM. tensor_split: the cards' shares of the
    layers; None deals by their free memory. split_mode: what is dealt: nothing (all goes on main_gpu), layers, or parts
    of each matrix. overrides: pairs (regular expression, buffer type); a tensor in whose name an expression is found
    goes there, by the first that is found.
    """

    gpu_layers: int | None = None
    n_cpu_moe: int | None = None
    tensor_split: tuple[float, ...] | None = None
    split_mode: SplitMode = "layer"
    main_gpu: int = 0
    overrides: tuple[tuple[str, str], ...] = ()

    @property
    def all_overrides(self) -> tuple[tuple[str, str], ...]:
        """The overrides, and those that n_cpu_moe stands for."""
        experts = (rf"blk\.{i}\.ffn_(up|down|gate|gate_up)_exps" for i in range(self.n_cpu_moe or 0))
        return (*self.overrides, *((pattern, "CPU") for pattern in experts))

    def arguments(self) -> list[str]:
        """What was chosen, as options of llama-server, which chooses the rest itself."""
        pairs = [
            ("--gpu-layers", "all" if self.gpu_layers == ALL_LAYERS else self.gpu_layers),
            ("--n-cpu-moe", self.n_cpu_moe),
            ("--tensor-split", self.tensor_split and ",".join(f"{share:g}" for share in self.tensor_split)),
            ("--split-mode", self.split_mode if self.split_mode != "layer" else None),
            ("--main-gpu", self.main_gpu or None),
            *(("--override-tensor", f"{pattern}={buffer}") for pattern, buffer in self.overrides),
        ]
        return [word for option, value in pairs if value is not None for word in (option, str(value))]


@dataclass(frozen=True, slots=True)
class Attention:
    """How keys and values are kept, those of sliding windows too, and how attention is computed.

    The MTP blocks' cache is small and stays F16, as it does in llama-server unless its draft options say otherwise.
    """

    cache_type_k: CacheType = "f16"
    cache_type_v: CacheType = "f16"
    flash_attn: FlashAttention = "auto"

    @property
    def of_mtp(self) -> Attention:
        """How the MTP blocks' context has it."""
        return Attention(flash_attn=self.flash_attn)

    @property
    def is_plain(self) -> bool:
        """Whether neither is in blocks of fewer bits."""
        return {self.cache_type_k, self.cache_type_v} <= set(_PLAIN_TYPES)

    @property
    def is_possible(self) -> bool:
        """Whether llama.cpp can: it reads quantized values with flash attention only."""
        return self.cache_type_v in _PLAIN_TYPES or self.flash_attn != "off"

    def arguments(self) -> list[str]:
        """What differs from llama-server's own choice, as its options."""
        values = (self.cache_type_k, self.cache_type_v, self.flash_attn)
        names, defaults = ("--cache-type-k", "--cache-type-v", "--flash-attn"), ("f16", "f16", "auto")
        chosen = zip(names, values, defaults, strict=True)
        return [word for name, value, default in chosen if value != default for word in (name, value)]
