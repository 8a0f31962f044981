"""How a plan is made: types from recipes, budgets and options, metadata, and everything refused that can be.

checkpoint --candidates--> recipe, allocated types --> PlannedTensors --keys--> files, split --> Plan
GGUF ----------^
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from gguf import GGMLQuantizationType

from stepgguf.convert import metadata
from stepgguf.convert.importance import wanted_tensor
from stepgguf.convert.plan import Options, Plan, PlannedFile, PlannedTensor
from stepgguf.convert.sources.source import SourceTensor, TensorSource
from stepgguf.convert.sources.splits import split_path
from stepgguf.errors import OutputError, RecipeError
from stepgguf.files.gguf_header import Key
from stepgguf.model.hparams import AnyHParams
from stepgguf.model.names import TensorName
from stepgguf.model.tensors import TensorSpec
from stepgguf.quants import coverage, mixtures
from stepgguf.quants.coverage import Coverage
from stepgguf.quants.kernels import choose_kernel
from stepgguf.quants.mixtures import Candidate, Facts, TypeChoice
from stepgguf.quants.type_names import check_name
from stepgguf.quants.types import fitting_type

F32 = GGMLQuantizationType.F32


def plan_source(source: TensorSource, dest: Path, options: Options) -> Plan:
    """The plan for whatever the source is."""
    if source.own_types is None:
        return plan_checkpoint(source, dest, options)
    return plan_gguf(source, dest, options)


# from a checkpoint ----------------------------------------------------------------------------------------------


def plan_checkpoint(checkpoint: TensorSource, dest: Path, options: Options) -> Plan:
    """The plan of a conversion from safetensors."""
    hp = checkpoint.hparams
    if options.mtp != "drop":
        checkpoint.require_mtp()
    notes = checkpoint.warnings if options.mtp == "drop" else checkpoint.notes
    facts = rule_facts(hp)
    main, mtp = select_checkpoint(checkpoint.specs, facts, checkpoint.constants, options)
    described = checkpoint.metadata(options.name, options.chat_template)
    has_mtp = options.mtp == "include" and hp.n_mtp > 0
    files = []
    for path, tensors, with_mtp in ((dest, main, has_mtp), (mtp_path(dest), mtp, True)):
        if not tensors:
            continue
        keys = described.file_keys([(t.name, t.shape) for t in tensors], with_mtp=with_mtp)
        keys += _provenance(options, facts, tensors, checkpoint.title)
        files += _split(PlannedFile(path, tuple(keys), tuple(tensors)), options.split_max_size)
    return _plan(files, checkpoint.tensors, facts, options, (*notes, *described.warnings))


def select_checkpoint(
    specs: Sequence[TensorSpec], facts: Facts, constants: Mapping[TensorName, bytes], options: Options
) -> tuple[list[PlannedTensor], list[PlannedTensor]]:
    """The tensors of the main file and of the separate MTP file (empty unless asked for), with types and reasons."""
    wanted = [spec for spec in specs if not (spec.is_mtp and options.mtp == "drop")]
    candidates = [Candidate(s.name, s.role, s.shape, s.layer) for s in wanted if s.is_quantizable]
    choices = _choose(candidates, facts, options)
    planned = [_planned(spec, choices.get(spec.name)) for spec in wanted if not spec.is_mtp]
    mtp = [_planned(spec, choices.get(spec.name)) for spec in wanted if spec.is_mtp]
    planned += [
        PlannedTensor(name, (len(data) // 4,), F32, "llama3 RoPE scaling", None, constant=data)
        for name, data in constants.items()
    ]
    if options.mtp == "include" or not mtp:
        return _ordered(planned + mtp), []
    kind = max((tensor for tensor in mtp), key=lambda tensor: tensor.n_values).ggml_type
    shared = [
        t if t.ggml_type == F32 else replace(t, ggml_type=fitting_type(kind, t.shape[-1]), reason="MTP file")
        for t in planned
        if t.name in (*metadata.SHARED_BY_MTP_FILE, *constants)
    ]
    return _ordered(planned), _ordered(shared + mtp)


def rule_facts(hp: AnyHParams) -> Facts:
    """What recipes ask about a model. BadMetadata for a GGUF that does not say it."""
    return Facts(hp.n_layer, hp.n_expert, hp.gqa)


def mtp_path(dest: Path) -> Path:
    """Where `--mtp separate` puts the MTP file of dest."""
    return dest.with_name(f"mtp-{dest.name}")


# from a GGUF ----------------------------------------------------------------------------------------------------


def plan_gguf(source: TensorSource, dest: Path, options: Options) -> Plan:
    """The plan of a quantization of a GGUF: the keys of the source, its tensors in new types."""
    facts = rule_facts(source.hparams)
    candidates = [Candidate(s.name, s.role, s.shape, s.layer) for s in source.specs if s.is_quantizable]
    choices = _choose(candidates, facts, options)
    tensors = [
        _requantized(spec, source.tensors[spec.source], choices.get(spec.name), options) for spec in source.specs
    ]
    replaced = _provenance(options, facts, tensors, source.title)
    described = source.metadata(options.name, options.chat_template)
    keys = described.file_keys([(spec.name, spec.shape) for spec in source.specs], with_mtp=False)
    kept = [key for key in keys if key.name not in {k.name for k in replaced}]
    files = _split(PlannedFile(dest, (*kept, *replaced), tuple(tensors)), options.split_max_size)
    if {os.path.realpath(file.path) for file in files} & set(map(os.path.realpath, source.files)):
        raise OutputError(f"{dest} is the source", hint="Write to another name.")
    return _plan(files, source.tensors, facts, options)


def _requantized(spec: TensorSpec, tensor: SourceTensor, choice: TypeChoice | None, options: Options) -> PlannedTensor:
    assert tensor.ggml_type is not None
    if choice is None or choice.ggml_type == tensor.ggml_type:
        reason = "kept as it is" if choice is None else choice.reason
        return PlannedTensor(spec.name, spec.shape, tensor.ggml_type, reason, spec.source)
    if tensor.dtype not in ("F32", "F16", "BF16") and not options.allow_requantize:
        raise RecipeError(
            f"{tensor.name} is already {tensor.dtype}; quantizing it again to {choice.ggml_type.name} adds its error",
            hint="Start from the BF16 file or the checkpoint, or accept the loss with --allow-requantize.",
        )
    return PlannedTensor(spec.name, spec.shape, choice.ggml_type, choice.reason, spec.source)


# shared ---------------------------------------------------------------------------------------------------------


def _choose(candidates: Sequence[Candidate], facts: Facts, options: Options) -> dict[str, TypeChoice]:
    """Name -> type and reason, by the recipe; of MTP tensors by --mtp-type if that is given."""
    has_imatrix = options.importance is not None
    choices = options.recipe.choose_types(candidates, facts, has_imatrix=has_imatrix, allocated=options.allocated)
    result = {c.name: choice for c, choice in zip(candidates, choices, strict=True)}
    if options.mtp_type is None:
        return result
    name = check_name(options.mtp_type)
    if name not in GGMLQuantizationType.__members__:
        raise RecipeError(f"--mtp-type {name} is a mixture", hint="Give one type, such as Q8_0, Q6_K or BF16.")
    kind = GGMLQuantizationType[name]
    heads = [c for c in candidates if facts.is_mtp(c.layer)]
    return result | {c.name: TypeChoice(fitting_type(kind, c.shape[-1]), f"--mtp-type {name}") for c in heads}


def _provenance(options: Options, facts: Facts, tensors: Sequence[PlannedTensor], source: str) -> list[Key]:
    """What made this file of what: of a file of MTP blocks alone, with their types as its own."""
    made = [t for t in tensors if t.source is not None and len(t.shape) > 1 and t.ggml_type != F32]
    mtp = [t for t in made if facts.is_mtp(t.name.layer)]
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
        choose_kernel(tensor.ggml_type, options.kernel, weighted=has)
    if covered is not None:
        warnings = (*warnings, *(f"imatrix: {text}" for text in covered.warnings))
    return Plan(options.recipe, options.mtp, tuple(files), warnings, options.importance, covered, options.kernel)


def _cover(tensors: Sequence[PlannedTensor], facts: Facts, options: Options) -> Coverage | None:
    if options.importance is None or not tensors:
        return None
    asked = [wanted_tensor(t.name, t.shape, is_mtp=facts.is_mtp(t.name.layer)) for t in tensors]
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


def _planned(spec: TensorSpec, choice: TypeChoice | None) -> PlannedTensor:
    kind, reason = (F32, "never quantized") if choice is None else (choice.ggml_type, choice.reason)
    return PlannedTensor(spec.name, spec.shape, kind, reason, spec.source, spec.plus_one)


def _ordered(tensors: Iterable[PlannedTensor]) -> list[PlannedTensor]:
    return sorted(tensors, key=lambda tensor: tensor.name.file_order)


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
