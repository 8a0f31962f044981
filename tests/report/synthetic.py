"""A quantized file of a Step-3.x model as it lies on a disk, its manifest made up: header and size, no weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, Keys

from stepgguf.convert.manifest import manifest_path
from stepgguf.convert.metadata import model_keys
from stepgguf.files import gguf_header
from stepgguf.files.gguf_header import Key, TensorInfo, V
from stepgguf.model.hparams import HParams
from stepgguf.model.tensors import TensorSpec, tensor_specs
from stepgguf.quants.mixtures import RuleFacts, choose_types

T = GGMLQuantizationType
# About what ggml's types lose of normally distributed weights; only looks depend on it.
TYPICAL = {T.Q8_0: 4e-5, T.Q6_K: 3.6e-4, T.Q5_K: 1.5e-3, T.Q4_K: 5.4e-3, T.IQ4_XS: 5.2e-3, T.Q3_K: 2.3e-2, T.Q2_K: 9e-2}


@dataclass(frozen=True)
class Made:
    """The file's path and the manifest as it was written; `rewrite` puts a changed one in its place."""

    path: Path
    manifest: dict[str, Any]

    def rewrite(self, change: Callable[[dict[str, Any]], None]) -> None:
        manifest = json.loads(json.dumps(self.manifest))
        change(manifest)
        manifest_path(self.path).write_text(json.dumps(manifest))


def write(path: Path, config: dict[str, Any], type_name: str, *, imatrix: bool = True, name: str = "Step") -> Made:
    """The types are the stock mixture's, the MTP blocks Q8_0. `imatrix`: with counts, a few of them 0."""
    hp = HParams.from_config(config)
    types = _types(hp, type_name, imatrix)
    infos, end = [], 0
    for spec in tensor_specs(hp):
        info = TensorInfo(spec.name, spec.shape, types[spec.name], end)
        infos.append(info)
        end += info.n_bytes + -info.n_bytes % 32
    own = {"stepgguf.type": type_name, "stepgguf.source": name}
    keys = [*model_keys(hp, name, "", with_mtp=True), *(Key.of(key, text, V.STRING) for key, text in own.items())]
    header = gguf_header.encode([key for key in keys if key.name != Keys.General.SIZE_LABEL], infos)
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + end)
    manifest = {
        "made_by": "stepgguf 0.4.0",
        "file": path.name,
        "bytes": len(header) + end,
        "tensors": {
            info.name: {"type": info.ggml_type.name, "shape": list(info.shape), "rows_per_unit": 1, "sha256": []}
            for info in infos
        },
    }
    if imatrix:
        manifest["imatrix"] = {"file": "step-calibration.gguf", "prior": "pooled", "datasets": ["dialogues", "code"]}
    rng = np.random.default_rng(0)
    popularity = {}
    for info, spec in zip(infos, tensor_specs(hp), strict=True):
        if spec.layer not in popularity:
            popularity[spec.layer] = _tokens(rng, hp.n_expert)
        if info.ggml_type != T.F32:
            counts = popularity[spec.layer] if imatrix and len(spec.shape) == 3 else None
            manifest["tensors"][info.name]["ledger"] = _ledger(rng, info, spec, hp.n_layer, counts)
    made = Made(path, manifest)
    made.rewrite(lambda _: None)
    return made


def _types(hp: HParams, type_name: str, imatrix: bool) -> dict[str, T]:
    specs = tensor_specs(hp)
    trunk = [s for s in specs if s.is_quantizable and not s.is_mtp]
    facts = RuleFacts(hp.n_layer, hp.n_expert, hp.gqa)
    candidates = trunk
    choices = choose_types(type_name, candidates, facts, has_imatrix=imatrix)
    chosen = {s.name: c.ggml_type for s, c in zip(trunk, choices, strict=True)}
    return {s.name: chosen.get(s.name, T.Q8_0) if s.is_quantizable else T.F32 for s in specs}


def _tokens(rng: np.random.Generator, n: int) -> np.ndarray:
    """Tokens that each expert saw: a long tail, and about one in 3,000 saw none."""
    counts = np.floor(rng.lognormal(8.5, 1.1, n))
    counts[rng.random(n) < 3e-4] = 0
    return counts


def _ledger(
    rng: np.random.Generator, info: TensorInfo, spec: TensorSpec, n_layer: int, counts: np.ndarray | None
) -> dict[str, Any]:
    n = info.shape[0] if len(info.shape) == 3 else 1
    depth = (spec.layer or 0) / n_layer
    layer = 1 + 0.5 * np.exp(-depth * 12) + 0.5 * np.exp((depth - 1) * 18) + 0.12 * rng.standard_normal()
    error = TYPICAL[info.ggml_type] * layer * rng.lognormal(0, 0.12, n) * (1 + 2.0 * (rng.random(n) < 0.003))
    if counts is not None:
        error = error * np.clip((counts + 1) / 5000, 1e-3, 50) ** -0.06
    ledger = {"error": error.tolist(), "rmse": (np.sqrt(error) / np.sqrt(info.shape[-1])).tolist()}
    if counts is not None:
        ledger |= {"mass": rng.lognormal(0, 0.3, n).tolist(), "count": counts.tolist()}
    return ledger
