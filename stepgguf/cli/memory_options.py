"""Where a model goes and what its context takes: options of chat, serve, bench and doctor, in llama-server's words."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Annotated

import typer

from stepgguf.runtime.engine import DEFAULT_CTX
from stepgguf.runtime.placement import ALL_LAYERS, DEFAULT_UBATCH, Attention, CacheType, FlashAttention, Placement
from stepgguf.runtime.placement import SplitMode as SplitModeName

LONGEST = 0  # --ctx auto
_LEAST_CTX = 64
_PANEL = "Memory and placement"


def parse_ctx(text: str) -> int:
    """Read a context's length in tokens, or LONGEST."""
    return LONGEST if text == "auto" else _parse_number(text, _LEAST_CTX, "auto")


def parse_gpu_layers(text: str) -> int | None:
    """Read a number of layers, ALL_LAYERS, or None for `auto`."""
    if text in ("all", str(ALL_LAYERS)):
        return ALL_LAYERS
    return None if text == "auto" else _parse_number(text, 0, "auto or all")


def parse_n_cpu_moe(text: str) -> int | None:
    """Read a number of layers, or None for `auto`."""
    return None if text == "auto" else _parse_number(text, 0, "auto")


class Shares(tuple[float, ...]):
    """The cards' shares of a model: "3,1" gives the first one three quarters."""

    __slots__ = ()

    @classmethod
    def parse(cls, text: str) -> Shares:
        try:
            shares = cls(map(float, text.split(",")))
        except ValueError:
            shares = cls()
        if not any(shares) or not all(math.isfinite(share) and share >= 0 for share in shares):
            raise typer.BadParameter(f"{text!r} are no shares; write for example 3,1 for two cards")
        return shares


def parse_override(text: str) -> tuple[str, str]:
    """Read "REGEX=BUFFER" as a pair."""
    pattern, _, buffer = text.rpartition("=")
    if not pattern or not buffer:
        raise typer.BadParameter(f"{text!r} names no tensors and buffer; write for example exps=CPU")
    try:
        re.compile(pattern)
    except re.error as error:
        raise typer.BadParameter(f"{pattern!r} is not a regular expression: {error}") from error
    return pattern, buffer


Ctx = Annotated[
    int | None,
    typer.Option(
        parser=parse_ctx,
        metavar="N|auto",
        help="Tokens of context, for all requests together; auto is the longest that fits. Default: the model's, at "
        f"most {DEFAULT_CTX}.",
        rich_help_panel=_PANEL,
    ),
]
GpuLayers = Annotated[
    int | None,
    typer.Option(
        parser=parse_gpu_layers,
        metavar="N|all|auto",
        show_default="auto",
        help="So many of the last layers go on the GPU; auto is as many as fit.",
        rich_help_panel=_PANEL,
    ),
]
CpuMoe = Annotated[
    int | None,
    typer.Option(
        "--n-cpu-moe",
        parser=parse_n_cpu_moe,
        metavar="N|auto",
        show_default="auto",
        help="Keep the routed experts of the first N layers in RAM; auto is as few as can be.",
        rich_help_panel=_PANEL,
    ),
]
OverrideTensor = Annotated[
    list[str] | None,
    typer.Option(
        metavar="REGEX=BUFFER",
        help="Put tensors with such names there, e.g. exps=CPU or 'blk.4.ffn_.*=CUDA1'; may be repeated.",
        rich_help_panel=_PANEL,
    ),
]
TensorSplit = Annotated[
    Shares | None,
    typer.Option(
        parser=Shares.parse,
        metavar="N,N",
        show_default="by what is free",
        help="Each card's share of the layers.",
        rich_help_panel=_PANEL,
    ),
]
SplitMode = Annotated[
    SplitModeName,
    typer.Option(
        help="What is dealt to several cards: nothing, whole layers, or parts of each matrix.", rich_help_panel=_PANEL
    ),
]
MainGpu = Annotated[
    int, typer.Option(min=0, metavar="N", help="The card that takes what is not dealt.", rich_help_panel=_PANEL)
]
CacheTypeK = Annotated[CacheType, typer.Option(help="Type of the keys in the KV cache.", rich_help_panel=_PANEL)]
CacheTypeV = Annotated[CacheType, typer.Option(help="Type of the values in the KV cache.", rich_help_panel=_PANEL)]
FlashAttn = Annotated[
    FlashAttention, typer.Option(help="Flash attention; auto is where it can be had.", rich_help_panel=_PANEL)
]
Batch = Annotated[
    int | None,
    typer.Option(
        min=1, metavar="N", help="With llama-server: tokens that it takes from requests at a time.",
        rich_help_panel=_PANEL,
    ),
]  # fmt: skip
Ubatch = Annotated[
    int | None,
    typer.Option(
        min=32, max=8192, metavar="N", show_default=str(DEFAULT_UBATCH),
        help="Tokens that are computed at a time: more read prompts faster and take more memory.",
        rich_help_panel=_PANEL,
    ),
]  # fmt: skip


def read_placement(
    gpu_layers: int | None,
    n_cpu_moe: int | None,
    override_tensor: Sequence[str] | None,
    tensor_split: Shares | None,
    split_mode: SplitModeName,
    main_gpu: int,
) -> Placement:
    """What the options above say together; None in it is left to be chosen."""
    try:
        overrides = tuple(map(parse_override, override_tensor or ()))
    except typer.BadParameter as error:
        raise typer.BadParameter(error.message, param_hint="--override-tensor") from error
    return Placement(
        gpu_layers=gpu_layers,
        n_cpu_moe=n_cpu_moe,
        tensor_split=tensor_split and tuple(tensor_split),
        split_mode=split_mode,
        main_gpu=main_gpu,
        overrides=overrides,
    )


def read_attention(cache_type_k: CacheType, cache_type_v: CacheType, flash_attn: FlashAttention) -> Attention:
    """The same. typer.BadParameter for values in blocks without flash attention."""
    attention = Attention(cache_type_k, cache_type_v, flash_attn)
    if not attention.is_possible:
        raise typer.BadParameter(
            f"values in {cache_type_v} need flash attention: leave it on, or give --cache-type-v f16",
            param_hint="--flash-attn",
        )
    return attention


def _parse_number(text: str, least: int, words: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) < least:
        raise typer.BadParameter(f"{text!r} is not a number from {least} on, nor {words}")
    return int(text)
