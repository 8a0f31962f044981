"""How a plan is made: types from recipes, budgets and options, metadata, and everything refused that can be.

checkpoint --candidates--> recipe, allocated types --> PlannedTensors --keys--> files, split --> Plan
GGUF ----------^
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from gguf import GGMLQuantizationType, Keys

from stepgguf.convert import metadata
from stepgguf.convert.card import read_card
from stepgguf.convert.importance import wanted_tensor
from stepgguf.convert.plan import Options, Plan, PlannedFile, PlannedTensor
from stepgguf.convert.sources.checkpoint import Checkpoint
from stepgguf.convert.sources.gguf_file import ARCHITECTURE, GGUFSource
from stepgguf.convert.sources.source import SourceTensor
from stepgguf.convert.sources.splits import split_path
from stepgguf.errors import BadMetadata, OutputError, RecipeError
from stepgguf.files.gguf_header import Key
from stepgguf.files.jsonread import shown
from stepgguf.model.tensors import ROPE_FREQS, TensorSpec, file_order, layer_of, role_of
from stepgguf.quants import codec, coverage, mixtures
from stepgguf.quants.coverage import Coverage
from stepgguf.quants.mixtures import Candidate, Choice, Facts
from stepgguf.quants.type_names import check_name

F32 = GGMLQuantizationType.F32


def plan_source(source: Checkpoint | GGUFSource, dest: Path, options: Options) -> Plan:
    """The plan for whatever the source is."""
    if isinstance(source, Checkpoint):
        return plan_checkpoint(source, dest, options)
    return plan_gguf(source, dest, options)


# from a checkpoint ----------------------------------------------------------------------------------------------


def plan_checkpoint(checkpoint: Checkpoint, dest: Path, options: Options) -> Plan:
    """The plan of a conversion from safetensors."""
    hp = checkpoint.hparams
    if options.mtp != "drop":
        checkpoint.require_mtp()
    notes = checkpoint.warnings if options.mtp == "drop" else checkpoint.notes
    facts = model_facts(checkpoint)
    main, mtp = select_checkpoint(checkpoint.specs, facts, metadata.rope_freqs(hp), options)
    vocab = metadata.vocab_keys(checkpoint, options.chat_template)
    sampling = metadata.sampling_keys(checkpoint)
    card = read_card(checkpoint.path, checkpoint.config, checkpoint.origin)
    name = options.name or card.name
    has_mtp = options.mtp == "include" and hp.n_mtp > 0
    files = []
    for path, tensors, with_mtp in ((dest, main, has_mtp), (mtp_path(dest), mtp, True)):
        if not tensors:
            continue
        label = metadata.size_label([(t.role, t.shape) for t in tensors], hp.n_expert)
        said = metadata.model_keys(hp, name, label, with_mtp=with_mtp, described=card.keys)
        keys = [
            *(sampling.get(key.name, key) for key in said),
            *vocab.keys,
            *_provenance(options, facts, tensors, _source_name(checkpoint)),
        ]
        files += _split(PlannedFile(path, tuple(keys), tuple(tensors)), options.split_max_size)
    return _plan(files, checkpoint.tensors, facts, options, (*notes, *card.warnings, *vocab.warnings))


def select_checkpoint(
    specs: Sequence[TensorSpec], facts: Facts, rope_freqs: bytes | None, options: Options
) -> tuple[list[PlannedTensor], list[PlannedTensor]]:
    """The tensors of the main file and of the separate MTP file (empty unless asked for), with types and reasons."""
    wanted = [spec for spec in specs if not (spec.is_mtp and options.mtp == "drop")]
    candidates = [Candidate(s.name, s.role, s.shape, s.layer) for s in wanted if not s.float32]
    choices = _choose(candidates, facts, options)
    planned = [_planned(spec, choices.get(spec.name)) for spec in wanted if not spec.is_mtp]
    mtp = [_planned(spec, choices.get(spec.name)) for spec in wanted if spec.is_mtp]
    if rope_freqs is not None:
        n = len(rope_freqs) // 4
        planned.append(PlannedTensor(ROPE_FREQS, (n,), F32, "llama3 RoPE scaling", None, constant=rope_freqs))
    if options.mtp == "include" or not mtp:
        return _ordered(planned + mtp), []
    kind = max((tensor for tensor in mtp), key=lambda tensor: tensor.n_values).ggml_type
    shared = [
        t if t.ggml_type == F32 else replace(t, ggml_type=mixtures.fallback(kind, t.shape[-1]), reason="MTP file")
        for t in planned
        if t.name in (*metadata.SHARED_BY_MTP_FILE, ROPE_FREQS)
    ]
    return _ordered(planned), _ordered(shared + mtp)


def model_facts(checkpoint: Checkpoint) -> Facts:
    hp = checkpoint.hparams
    return Facts(hp.n_layer, hp.n_expert, hp.layers[0].n_head // hp.layers[0].n_head_kv)


def mtp_path(dest: Path) -> Path:
    """Where `--mtp separate` puts the MTP file of dest."""
    return dest.with_name(f"mtp-{dest.name}")


# from a GGUF ----------------------------------------------------------------------------------------------------


def plan_gguf(source: GGUFSource, dest: Path, options: Options) -> Plan:
    """The plan of a quantization of a GGUF: the keys of the source, its tensors in new types."""
    facts = gguf_facts(source)
    names = sorted(source.tensors, key=file_order)
    quantizable = [name for name in names if is_quantizable(name, source.tensors[name].shape)]
    candidates = [Candidate(n, role_of(n), source.tensors[n].shape, layer_of(n)) for n in quantizable]
    choices = _choose(candidates, facts, options)
    tensors = [_requantized(source.tensors[name], choices.get(name), options) for name in names]
    replaced = _provenance(options, facts, tensors, source.path.name)
    kept = [key for name, key in source.keys.items() if name not in {k.name for k in replaced}]
    files = _split(PlannedFile(dest, (*kept, *replaced), tuple(tensors)), options.split_max_size)
    if {os.path.realpath(file.path) for file in files} & {os.path.realpath(h.path) for h in source.headers}:
        raise OutputError(f"{dest} is the source", hint="Write to another name.")
    return _plan(files, source.tensors, facts, options)


def is_quantizable(name: str, shape: tuple[int, ...]) -> bool:
    """llama-quantize's rule: weights with two or more dimensions, but no norms and no router."""
    matrix = any(size > 1 for size in shape[:-1])
    return matrix and name.endswith(".weight") and not name.endswith(("_norm.weight", ".ffn_gate_inp.weight"))


def _requantized(tensor: SourceTensor, choice: Choice | None, options: Options) -> PlannedTensor:
    assert tensor.ggml_type is not None
    if choice is None or choice.ggml_type == tensor.ggml_type:
        reason = "kept as it is" if choice is None else choice.reason
        return PlannedTensor(tensor.name, tensor.shape, tensor.ggml_type, reason, tensor.name)
    if tensor.dtype not in ("F32", "F16", "BF16") and not options.allow_requantize:
        raise RecipeError(
            f"{tensor.name} is already {tensor.dtype}; quantizing it again to {choice.ggml_type.name} adds its error",
            hint="Start from the BF16 file or the checkpoint, or accept the loss with --allow-requantize.",
        )
    return PlannedTensor(tensor.name, tensor.shape, choice.ggml_type, choice.reason, tensor.name)


def gguf_facts(source: GGUFSource) -> Facts:
    """BadMetadata for a file that does not say what the rules ask."""
    n_layer = number(source, Keys.LLM.BLOCK_COUNT) - number(source, Keys.LLM.NEXTN_PREDICT_LAYERS, 0)
    heads, kv_heads = (number(source, key) for key in (Keys.Attention.HEAD_COUNT, Keys.Attention.HEAD_COUNT_KV))
    return Facts(n_layer, number(source, Keys.LLM.EXPERT_COUNT, 0), heads // max(1, kv_heads))


def number(source: GGUFSource, key: str, default: int | None = None) -> int:
    """An integer key; of a per-layer one, which may also be one number for all layers, the value at layer 0."""
    name = key.format(arch=ARCHITECTURE)
    value = source.headers[0].get(name, default)
    value = value[0] if isinstance(value, list) and value else value
    if not isinstance(value, int):
        raise BadMetadata(f"{source.path}: key {name} is {shown(value)}, expected an integer", hint="Convert it again.")
    return value


# shared ---------------------------------------------------------------------------------------------------------


def _choose(candidates: Sequence[Candidate], facts: Facts, options: Options) -> dict[str, Choice]:
    """Name -> type and reason, by the recipe; of MTP tensors by --mtp-type if that is given."""
    has_imatrix = options.importance is not None
    choices = options.recipe.choose(candidates, facts, has_imatrix=has_imatrix, allocated=options.allocated)
    result = {c.name: choice for c, choice in zip(candidates, choices, strict=True)}
    if options.mtp_type is None:
        return result
    name = check_name(options.mtp_type)
    if name not in GGMLQuantizationType.__members__:
        raise RecipeError(f"--mtp-type {name} is a mixture", hint="Give one type, such as Q8_0, Q6_K or BF16.")
    kind = GGMLQuantizationType[name]
    heads = [c for c in candidates if facts.is_mtp(c.layer)]
    return result | {c.name: Choice(mixtures.fallback(kind, c.shape[-1]), f"--mtp-type {name}") for c in heads}


def _provenance(options: Options, facts: Facts, tensors: Sequence[PlannedTensor], source: str) -> list[Key]:
    """What made this file of what: of a file of MTP blocks alone, with their types as its own."""
    made = [t for t in tensors if t.source is not None and len(t.shape) > 1 and t.ggml_type != F32]
    mtp = [t for t in made if facts.is_mtp(layer_of(t.name))]
    is_mtp_file = all(t in mtp for t in made if t.name.startswith("blk."))
    sizes: dict[GGMLQuantizationType, int] = {}
    for tensor in mtp if is_mtp_file else made:
        sizes[tensor.ggml_type] = sizes.get(tensor.ggml_type, 0) + tensor.n_values
    chosen = options.recipe
    most = max(sizes, key=lambda kind: sizes[kind], default=F32)
    if chosen.base and chosen.is_stock and not (is_mtp_file and mtp):
        name, ftype = chosen.base, mixtures.file_type(chosen.base)
    else:
        name, ftype = (most.name if is_mtp_file and mtp else chosen.name), mixtures.nearest_file_type(most)
    return metadata.provenance_keys(
        name,
        ftype,
        source,
        mtp_type=", ".join(sorted({t.ggml_type.name for t in mtp})) or None,
        recipe=chosen.text if chosen.text and not chosen.is_stock else None,
        imatrix=options.importance.source if options.importance else None,
    )


def _plan(
    files: Sequence[PlannedFile],
    sources: Mapping[str, SourceTensor],
    facts: Facts,
    options: Options,
    warnings: tuple[str, ...] = (),
) -> Plan:
    """The plan, after everything has been refused that can be: types without an encoder or without their imatrix."""
    tensors = [tensor for file in files for tensor in file.tensors]
    encoded = [t for t in tensors if t.source and sources[t.source].ggml_type != t.ggml_type]
    covered = _cover([t for t in encoded if t.is_quantized], facts, options)
    _check_importance(encoded, options)
    for tensor in encoded:
        has = options.importance is not None and options.importance.has(tensor.name, tensor.shape)
        codec.check_encoder(tensor.ggml_type, has_imatrix=has, kernel=options.kernel)
    if covered is not None:
        warnings = (*warnings, *(f"imatrix: {text}" for text in covered.warnings))
    return Plan(options.recipe, options.mtp, tuple(files), warnings, options.importance, covered, options.kernel)


def _cover(tensors: Sequence[PlannedTensor], facts: Facts, options: Options) -> Coverage | None:
    if options.importance is None or not tensors:
        return None
    asked = [wanted_tensor(t.name, t.shape, is_mtp=facts.is_mtp(layer_of(t.name))) for t in tensors]
    return coverage.coverage(options.importance.source, asked)


def _check_importance(tensors: Sequence[PlannedTensor], options: Options) -> None:
    """RecipeError naming the tensors whose types llama-quantize refuses without an importance matrix."""
    base = options.recipe.base or ""
    importance = options.importance
    lacking = [
        t
        for t in tensors
        if mixtures.requires_imatrix(base, Candidate(t.name, t.role, t.shape, None), t.ggml_type)
        and not (importance and importance.has(t.name, t.shape))
    ]
    if not lacking:
        return
    names = ", ".join(t.name for t in lacking[:3]) + (f" and {len(lacking) - 3} more" if len(lacking) > 3 else "")
    kinds = " and ".join(sorted({t.ggml_type.name for t in lacking}))
    if importance is None:
        message, hint = (
            "need an importance matrix",
            "Give one with --imatrix, or use a type from IQ3_S or Q3_K_S upwards.",
        )
    else:
        message = f"need importance, and {importance.path.name} has none for them"
        hint = "Give these tensors another type in a recipe, or calibrate again."
    raise RecipeError(f"{options.recipe.name}: {len(lacking)} tensors of type {kinds} {message}: {names}", hint=hint)


def _planned(spec: TensorSpec, choice: Choice | None) -> PlannedTensor:
    kind, reason = (F32, "never quantized") if choice is None else (choice.ggml_type, choice.reason)
    return PlannedTensor(spec.name, spec.shape, kind, reason, spec.source, spec.plus_one)


def _ordered(tensors: Iterable[PlannedTensor]) -> list[PlannedTensor]:
    return sorted(tensors, key=lambda tensor: file_order(tensor.name))


def _source_name(checkpoint: Checkpoint) -> str:
    dtypes = sorted({t.dtype for t in checkpoint.tensors.values()} - {"F32"})
    return f"{checkpoint.origin.name} ({checkpoint.hparams.architecture}, {' and '.join(dtypes) or 'F32'})"


def _split(file: PlannedFile, max_size: int | None) -> list[PlannedFile]:
    """The file, or llama.cpp's splits of it: the first has all keys, each has the split keys."""
    if max_size is None or file.data_size <= max_size:
        return [file]
    groups: list[list[PlannedTensor]] = [[]]
    size = 0
    for tensor in file.tensors:
        if tensor.n_bytes > max_size:
            raise OutputError(
                f"--split-max-size {max_size:,}: {tensor.name} alone has {tensor.n_bytes:,} bytes",
                hint="A tensor cannot be split; give at least its size.",
            )
        if groups[-1] and size + tensor.n_bytes > max_size:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.n_bytes
    architecture = file.keys[:1]
    return [
        PlannedFile(
            split_path(file.path, i, len(groups)),
            (*(file.keys if i == 0 else architecture), *metadata.split_keys(i, len(groups), len(file.tensors))),
            tuple(group),
        )
        for i, group in enumerate(groups)
    ]
