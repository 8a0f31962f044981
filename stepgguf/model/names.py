"""What a tensor's name says: its layer and its role.

GGUF         token_embd.weight    blk.3.ffn_down_exps.weight      blk.45.nextn.eh_proj.weight
checkpoint   lm_head.weight       model.layers.3.moe.gate.weight
stem         token_embd           ffn_down_exps                   nextn.eh_proj
role         token_embd           ffn_down_exps                   eh_proj
"""

from __future__ import annotations

import re

_PARTS = re.compile(r"(?:(?:blk|model\.layers)\.(\d{1,9})\.)?(.*)", re.DOTALL)


class TensorName(str):
    """A tensor's name as a file has it: a text that can be asked for its parts."""

    __slots__ = ()

    @property
    def layer(self) -> int | None:
        """The layer; None outside the layers."""
        number = self._layer_and_rest[0]
        return None if number is None else int(number)

    @property
    def stem(self) -> str:
        """The name without its layer and without ".weight" or ".bias"."""
        inside: str = self._layer_and_rest[1]
        return inside.rpartition(".")[0] or inside

    @property
    def role(self) -> str:
        """The stem's last word, by which recipes and llama.cpp's rules know a tensor."""
        return self.stem.rpartition(".")[2]

    @property
    def is_expert(self) -> bool:
        """Whether it holds routed experts, of which a token uses a few."""
        return self.role.endswith("_exps")

    def is_mtp(self, n_layer: int) -> bool:
        """Whether it is in a layer behind the trunk's n_layer, where MTP blocks are."""
        layer = self.layer
        return layer is not None and layer >= n_layer

    @property
    def file_order(self) -> tuple[int, str]:
        """Sort key: llama-quantize's own order, which its mixture rules count in."""
        layer = self.layer
        return -1 if layer is None else layer, str(self)

    @property
    def _layer_and_rest(self) -> tuple[str | None, str]:
        match = _PARTS.fullmatch(self)
        assert match is not None
        return match[1], match[2]
