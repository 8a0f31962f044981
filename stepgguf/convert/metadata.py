"""GGUF keys, in the order and with the types of the GGUFs that StepFun publishes.

rope.dimension_count is left out on purpose: llama.cpp takes the head size and halves it on full-attention layers by
itself (step35.cpp), so writing 64 would give 32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
from gguf import ExpertGatingFuncType, GGUFValueType, Keys, LlamaFileType

from stepgguf import __version__
from stepgguf.convert.card import ModelCard, read_card
from stepgguf.convert.sources.hub import ModelOrigin
from stepgguf.errors import BadConfig
from stepgguf.files import jsonread, textfile
from stepgguf.files.gguf_header import Header, Key
from stepgguf.files.jsonread import Value
from stepgguf.model.hparams import ARCHITECTURE, HParams
from stepgguf.model.names import TensorName
from stepgguf.model.tokenizer import PRE_TOKENIZER, TOKENIZER_MODEL, Vocabulary, read_vocabulary
from stepgguf.quants.imatrix import Imatrix
from stepgguf.quants.mixtures import file_type_name

V = GGUFValueType
CHAT_TEMPLATE = Keys.Tokenizer.CHAT_TEMPLATE
_VERSION, TYPE = "stepgguf.version", "stepgguf.type"
CALIBRATION = "stepgguf.calibration"  # in words, what the codes were calibrated on
IMATRIX_FILE = "quantize.imatrix.file"
PREDICTED_KLD = "stepgguf.predicted_kld"  # nats a token, of the chosen types with stock codes
RESERVE, RESERVE_BYTES = "stepgguf.reserve", 16384  # room for a longer chat template later: rewrite.py
SHARED_BY_MTP_FILE = ("token_embd.weight", "output.weight", "output_norm.weight")

# The model card's recommended settings. llama.cpp's own defaults (0.8, 40, 0.95, min_p 0.05) do not fit this model.
SAMPLING: dict[str, tuple[float | int, GGUFValueType]] = {
    Keys.General.SAMPLING_TEMP: (1.0, V.FLOAT32),
    Keys.General.SAMPLING_TOP_K: (40, V.INT32),
    Keys.General.SAMPLING_TOP_P: (0.95, V.FLOAT32),
    Keys.General.SAMPLING_MIN_P: (0.0, V.FLOAT32),
}
# generation_config.json's names of these, and the largest value that makes sense.
_GENERATION_CONFIG = {
    "temperature": (Keys.General.SAMPLING_TEMP, 100.0),
    "top_k": (Keys.General.SAMPLING_TOP_K, 2**31 - 1),
    "top_p": (Keys.General.SAMPLING_TOP_P, 1.0),
    "min_p": (Keys.General.SAMPLING_MIN_P, 1.0),
}
_TOKENIZER_HINT = "Take tokenizer.json from the model's repository."
_MAX_TEMPLATE_BYTES = 2**20  # the published ones have 5 KB


@dataclass(frozen=True, slots=True)
class CheckpointMetadata:
    """What a checkpoint says of its model, read once for all files of a conversion.

    sampling: keys that take the place of SAMPLING's. vocab: the keys about tokens.
    """

    hparams: HParams
    name: str
    card: ModelCard
    sampling: dict[str, Key]
    vocab: tuple[Key, ...]
    warnings: tuple[str, ...]

    def file_keys(self, shapes: Sequence[tuple[TensorName, tuple[int, ...]]], *, with_mtp: bool) -> list[Key]:
        """The keys of a file with these tensors. `with_mtp` extends the per-layer arrays over the MTP blocks."""
        label = _size_label(shapes, self.hparams.n_expert)
        keys = model_keys(self.hparams, self.name, label, with_mtp=with_mtp, described=self.card.keys)
        return [*(self.sampling.get(key.name, key) for key in keys), *self.vocab]


def read_metadata(
    folder: Path,
    config: Mapping[str, Any],
    origin: ModelOrigin,
    hp: HParams,
    *,
    name: str | None,
    template: Path | None,
) -> CheckpointMetadata:
    """Read what lies beside the shards: card, tokenizer, sampling, chat template. BadConfig for what cannot be used.

    name, template: in place of the checkpoint's own.
    """
    vocab, warnings = _vocab_keys(folder, hp, template)
    sampling = _sampling_keys(folder)
    card = read_card(folder, config, origin)
    return CheckpointMetadata(hp, name or card.name, card, sampling, vocab, (*card.warnings, *warnings))


def model_keys(hp: HParams, name: str, size_label: str, *, with_mtp: bool, described: Sequence[Key] = ()) -> list[Key]:
    """general.* and step35.*. `with_mtp` extends the per-layer arrays over the MTP blocks; described: a card's."""
    layers = hp.layers if with_mtp else hp.trunk_layers
    llm, attention, rope = Keys.LLM, Keys.Attention, Keys.Rope
    leading_dense = next((layer.index for layer in hp.trunk_layers if layer.is_moe), hp.n_layer)
    keys = [
        _typed_key(Keys.General.ARCHITECTURE, ARCHITECTURE),
        _typed_key(Keys.General.TYPE, "model"),
        _typed_key(Keys.General.NAME, name),
        _typed_key(Keys.General.SIZE_LABEL, size_label),
        *described,
        *(Key.of(key, value, type) for key, (value, type) in SAMPLING.items()),
        _typed_key(llm.BLOCK_COUNT, len(layers)),
        _typed_key(llm.CONTEXT_LENGTH, hp.max_position),
        _typed_key(llm.EMBEDDING_LENGTH, hp.hidden_size),
        _typed_key(llm.FEED_FORWARD_LENGTH, hp.intermediate_size),
        _typed_key(attention.HEAD_COUNT, [layer.n_head for layer in layers]),
        _typed_key(rope.FREQ_BASE, hp.rope_theta_full),
        _typed_key(rope.FREQ_BASE_SWA, hp.rope_theta_sliding),
        _typed_key(llm.EXPERT_GATING_FUNC, int(ExpertGatingFuncType.SIGMOID)),
        _typed_key(attention.KEY_LENGTH, hp.head_dim),
        _typed_key(attention.VALUE_LENGTH, hp.head_dim),
        _typed_key(attention.HEAD_COUNT_KV, [layer.n_head_kv for layer in layers]),
        _typed_key(attention.SLIDING_WINDOW, hp.sliding_window),
        _typed_key(attention.SLIDING_WINDOW_PATTERN, [layer.is_sliding for layer in layers]),
        _typed_key(llm.EXPERT_COUNT, hp.n_expert),
        _typed_key(llm.EXPERT_USED_COUNT, hp.n_expert_used),
        _typed_key(llm.EXPERT_FEED_FORWARD_LENGTH, hp.expert_size),
        _typed_key(llm.EXPERT_SHARED_FEED_FORWARD_LENGTH, hp.shared_expert_size),
        _typed_key(llm.EXPERT_WEIGHTS_SCALE, hp.router_scale),
        _typed_key(llm.EXPERT_WEIGHTS_NORM, hp.router_norm),
        _typed_key(llm.LEADING_DENSE_BLOCK_COUNT, leading_dense),
        _typed_key(llm.MOE_EVERY_N_LAYERS, 1),
        _typed_key(attention.LAYERNORM_RMS_EPS, hp.rms_norm_eps),
        _typed_key(llm.SWIGLU_CLAMP_EXP, [layer.clamp for layer in layers]),
        _typed_key(llm.SWIGLU_CLAMP_SHEXP, [layer.clamp_shared for layer in layers]),
    ]
    if with_mtp and hp.n_mtp:
        keys.append(_typed_key(llm.NEXTN_PREDICT_LAYERS, hp.n_mtp))
    return keys


def _vocab_keys(folder: Path, hp: HParams, chat_template: Path | None) -> tuple[tuple[Key, ...], list[str]]:
    """tokenizer.* and warnings: every id that ends a generation is written, so that no engine has to guess by name."""
    tok, warnings = Keys.Tokenizer, []
    vocabulary = read_vocabulary(jsonread.read(folder / "tokenizer.json", BadConfig, _TOKENIZER_HINT), hp.vocab_size)
    settings = _optional_json(folder / "tokenizer_config.json")
    eos = _token_id(settings, "eos_token", vocabulary, hp.eos_token_ids[-1])
    padding = _token_id(settings, "pad_token", vocabulary, hp.eos_token_ids[0])
    for i in (hp.bos_token_id, eos, padding, *hp.eos_token_ids):
        if i >= hp.vocab_size:
            raise BadConfig(f"token id {i} does not fit config.json's vocab_size {hp.vocab_size}")
    keys = [
        _typed_key(tok.MODEL, TOKENIZER_MODEL),
        _typed_key(tok.PRE, PRE_TOKENIZER),
        Key.of(tok.LIST, vocabulary.tokens, V.ARRAY, V.STRING),
        Key.of(tok.TOKEN_TYPE, vocabulary.types, V.ARRAY, V.INT32),
        Key.of(tok.MERGES, vocabulary.merges, V.ARRAY, V.STRING),
        _typed_key(tok.BOS_ID, hp.bos_token_id),
        _typed_key(tok.EOS_ID, eos),
        _typed_key(tok.PAD_ID, padding),
        _typed_key(tok.ADD_BOS, True),
        _typed_key(tok.ADD_SEP, False),
        _typed_key(tok.ADD_EOS, False),
    ]
    others = [i for i in hp.eos_token_ids if i != eos]
    keys += [_typed_key(name, i) for name, i in zip((tok.EOT_ID, tok.EOM_ID), others, strict=False)]
    if len(others) > 2:
        left_out = ", ".join(map(str, others[2:]))
        warnings.append(
            f"config.json and tokenizer_config.json name {1 + len(others)} end tokens, of which a GGUF has room for 3: "
            f"{left_out} is not recorded"
        )
    template = _read_template(chat_template) if chat_template else _find_template(folder, settings)
    if template is None:
        warnings.append("the checkpoint has no chat template; add one with --chat-template FILE")
    else:
        keys.append(_typed_key(CHAT_TEMPLATE, template))
    return tuple(keys), warnings


def _sampling_keys(folder: Path) -> dict[str, Key]:
    """general.sampling.* that a checkpoint's generation_config.json sets otherwise than the model card."""
    settings = _optional_json(folder / "generation_config.json")
    found = {}
    for name, (key, most) in _GENERATION_CONFIG.items():
        value, type = settings.get(name), SAMPLING[key][1]
        if value is not None:
            number = value.integer(-1, int(most)) if type == V.INT32 else value.number(0.0, most)
            found[key] = Key.of(key, number, type)
    return found


def provenance_keys(
    type_name: str,
    ftype: LlamaFileType,
    source: str,
    *,
    mtp_type: str | None = None,
    recipe: str | None = None,
    calibration: str | None = None,
    predicted_kld: float | None = None,
    imatrix: Imatrix | None = None,
) -> list[Key]:
    """Which tool made the file, how and of what; then the two keys that llama-quantize writes last."""
    keys = [
        _typed_key(Keys.General.QUANTIZED_BY, f"stepgguf {__version__}"),
        _typed_key(_VERSION, __version__),
        _typed_key(TYPE, type_name),
        _typed_key("stepgguf.source", source),
    ]
    if mtp_type is not None:
        keys.append(_typed_key("stepgguf.mtp_type", mtp_type))
    if recipe is not None:
        keys.append(_typed_key("stepgguf.recipe", recipe))
    if calibration is not None:
        keys.append(_typed_key(CALIBRATION, calibration))
    if predicted_kld is not None:
        keys.append(_typed_key(PREDICTED_KLD, predicted_kld))
    keys.append(reserve_key(RESERVE_BYTES))
    keys.append(_typed_key(Keys.General.QUANTIZATION_VERSION, gguf.GGML_QUANT_VERSION))
    keys.append(_typed_key(Keys.General.FILE_TYPE, int(ftype)))
    if imatrix is not None and imatrix.path is not None:  # as llama-quantize names them
        keys.append(_typed_key(IMATRIX_FILE, imatrix.path.name))
        keys.append(_typed_key("quantize.imatrix.dataset", ", ".join(imatrix.datasets)))
        keys.append(_typed_key("quantize.imatrix.entries_count", len(imatrix.entries)))
        keys.append(_typed_key("quantize.imatrix.chunks_count", imatrix.chunk_count))
    return keys


def made_here(header: Header) -> bool:
    """Whether a file has the keys of this program; llama-quantize copies them from its source."""
    return _VERSION in header.keys


def recorded_type(header: Header) -> str | None:
    """What a file says that it is made as: llama.cpp's name of its mixture, or else the type of its conversion.

    Our own key comes last, since llama-quantize copies it from its source.
    """
    number, own = header.get(Keys.General.FILE_TYPE), header.get(TYPE)
    return (file_type_name(number) if isinstance(number, int) else None) or (own if isinstance(own, str) else None)


def reserve_key(n: int) -> Key:
    """A key of n spaces, which rewrite.py may turn into a longer template."""
    return _typed_key(RESERVE, " " * n)


def split_keys(index: int, count: int, n_tensors: int) -> list[Key]:
    """split.* of part `index` (from 0) of `count`; n_tensors: of all parts."""
    return [
        Key.of(Keys.Split.LLM_KV_SPLIT_NO, index, V.UINT16),
        Key.of(Keys.Split.LLM_KV_SPLIT_TENSORS_COUNT, n_tensors, V.INT32),
        Key.of(Keys.Split.LLM_KV_SPLIT_COUNT, count, V.UINT16),
    ]


def _size_label(shapes: Sequence[tuple[TensorName, tuple[int, ...]]], n_expert: int) -> str:
    """gguf-py's label ("288x7.4B") from the names and shapes of the file's tensors: experts count once."""
    expert = sum(math.prod(shape) // n_expert for name, shape in shapes if name.is_expert)
    total = sum(math.prod(shape) for _, shape in shapes)
    shared = sum(math.prod(shape) for name, shape in shapes if not name.is_expert)
    return gguf.size_label(total, shared, expert, n_expert if expert else 0)


def _typed_key(name: str, value: Any) -> Key:
    """A key with the GGUF type that StepFun's files use for such a value."""
    name = name.format(arch=ARCHITECTURE)
    scalar_types = {bool: V.BOOL, int: V.UINT32, float: V.FLOAT32, str: V.STRING}
    if isinstance(value, list):
        return Key.of(name, value, V.ARRAY, V.INT32 if type(value[0]) is int else scalar_types[type(value[0])])
    return Key.of(name, value, scalar_types[type(value)])


def _optional_json(path: Path) -> Value:
    """A JSON file that may be missing: an empty object then."""
    return jsonread.read(path, BadConfig) if path.exists() else Value({}, str(path), BadConfig)


def _token_id(settings: Value, key: str, vocabulary: Vocabulary, default: int) -> int:
    """The id of a token that tokenizer_config.json names, as a text or as {"content": text}."""
    token = settings.get(key)
    if token is None:
        return default
    found = vocabulary.token_id((token["content"] if isinstance(token.raw, dict) else token).text())
    return default if found is None else found


def _find_template(folder: Path, settings: Value) -> str | None:
    """chat_template.jinja, chat_template.json of older processors, or the one inside tokenizer_config.json."""
    file = folder / "chat_template.jinja"
    if file.exists():
        return _read_template(file)
    inside = _optional_json(folder / "chat_template.json").get("chat_template") or settings.get("chat_template")
    if inside is None:
        return None
    if isinstance(inside.raw, str):
        return inside.raw
    named = {entry["name"].text(): entry["template"].text() for entry in inside.array()}
    return named.get("default")


def _read_template(path: Path) -> str:
    return textfile.read(path, BadConfig, most=_MAX_TEMPLATE_BYTES)
