"""How a plan is made: types from recipes, budgets and options, metadata, and everything refused that can be.

source.specs     --recipe, allocated types--> (spec, choice) of each file --actions--> PlannedTensors --+
source.metadata  --keys, provenance---------------------------------------------------------------------+-split-> Plan
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from gguf import GGMLQuantizationType

from stepgguf.convert import metadata
from stepgguf.convert.plan import Constant, Options, Plan, PlannedFile, PlannedTensor, choose_action
from stepgguf.convert.sources.source import SourceTensor, TensorSource
from stepgguf.convert.sources.splits import split_path
from stepgguf.errors import OutputError, RecipeError
from stepgguf.files.gguf_header import Key
from stepgguf.model.hparams import AnyHParams
from stepgguf.model.tensors import TensorSpec
from stepgguf.quants import mixtures
from stepgguf.quants.coverage import Coverage, check_coverage
from stepgguf.quants.mixtures import RuleFacts, TypeChoice
from stepgguf.quants.type_names import check_type_name
from stepgguf.quants.types import F32, FLOATS, fitting_type

Chosen = tuple[TensorSpec, TypeChoice]  # a tensor and the type that it shall have


def plan_source(source: TensorSource, dest: Path, options: Options) -> Plan:
    """The plan that makes `dest`, with its splits and a separate MTP file, of a checkpoint or a GGUF.

    RecipeError, ImatrixError, QuantError or OutputError for what cannot be made.
    """
    if options.mtp != "drop":
        source.require_mtp()
    notes = source.warnings if options.mtp == "drop" else source.notes
    facts = rule_facts(source.hparams)
    main, mtp = choose_file_types(source.specs, source.own_types, facts, options)
    covered = _check_types([*main, *mtp], source.tensors, options)
    described = source.metadata(options.name, options.chat_template)
    has_mtp = options.mtp == "include" and source.hparams.n_mtp > 0
    files: list[PlannedFile] = []
    # The header's keys say whether its layers include MTP blocks, so they differ between the two files.
    for path, chosen, with_mtp in ((dest, main, has_mtp), (mtp_path(dest), mtp, True)):
        if chosen:
            tensors = _plan_tensors(chosen, source, options)
            keys = described.file_keys([(t.name, t.shape) for t in tensors], with_mtp=with_mtp)
            keys = _replace_keys(keys, _provenance(options, facts, tensors, source.title))
            files += _split(PlannedFile(path, tuple(keys), tuple(tensors)), options.split_max_size)
    if {os.path.realpath(file.path) for file in files} & set(map(os.path.realpath, source.files)):
        raise OutputError(f"{dest} is the source", hint="Write to another name.")
    warnings = (*notes, *described.warnings, *(f"imatrix: {text}" for text in (covered.warnings if covered else ())))
    return Plan(
        options.recipe,
        options.mtp,
        tuple(files),
        warnings,
        options.importance,
        covered,
        options.kernel,
        options.calibration,
        options.predicted_kld,
    )


def rule_facts(hp: AnyHParams) -> RuleFacts:
    """What recipes ask about a model. BadMetadata for a GGUF that does not say it."""
    return RuleFacts(hp.n_layer, hp.n_expert, hp.gqa)


def mtp_path(dest: Path) -> Path:
    """Where `--mtp separate` puts the MTP file of dest."""
    return dest.with_name(f"mtp-{dest.name}")


# types ----------------------------------------------------------------------------------------------------------


def choose_file_types(
    specs: Sequence[TensorSpec], own: Mapping[str, GGMLQuantizationType] | None, facts: RuleFacts, options: Options
) -> tuple[list[Chosen], list[Chosen]]:
    """The tensors of the main file and of the separate MTP file (empty unless asked for), with types and reasons.

    own: the types that a GGUF as the source has: what the rules do not touch keeps them, and is F32 otherwise.
    """
    wanted = [spec for spec in specs if not (spec.is_mtp and options.mtp == "drop")]
    choices = _choose_by_rules([spec for spec in wanted if spec.is_quantizable], facts, options)
    chosen = [(spec, choices.get(spec.name) or _choose_untouched(spec, own)) for spec in wanted]
    mtp = [(spec, choice) for spec, choice in chosen if spec.is_mtp]
    if options.mtp == "include" or not mtp:
        return chosen, []
    trunk = [(spec, choice) for spec, choice in chosen if not spec.is_mtp]
    # llama.cpp reads an MTP file as a model of its own, which needs embedding, output and norm again.
    main_type = max(mtp, key=lambda pair: math.prod(pair[0].shape))[1].ggml_type
    shared = [
        (spec, choice if choice.ggml_type == F32 else TypeChoice(fitting_type(main_type, spec.shape[-1]), "MTP file"))
        for spec, choice in trunk
        if spec.name in metadata.SHARED_BY_MTP_FILE
    ]
    return trunk, [*shared, *mtp]


def _choose_by_rules(specs: Sequence[TensorSpec], facts: RuleFacts, options: Options) -> dict[str, TypeChoice]:
    """Name -> type and reason, by the recipe; of MTP tensors by --mtp-type if that is given."""
    has_imatrix = options.importance is not None or options.calibration is not None
    choices = options.recipe.choose_types(specs, facts, has_imatrix=has_imatrix, allocated=options.allocated)
    result: dict[str, TypeChoice] = {spec.name: choice for spec, choice in zip(specs, choices, strict=True)}
    if options.mtp_type is None:
        return result
    name = check_type_name(options.mtp_type)
    if name not in GGMLQuantizationType.__members__:
        raise RecipeError(f"--mtp-type {name} is a mixture", hint="Give one type, such as Q8_0, Q6_K or BF16.")
    reason, mtp_type = f"--mtp-type {name}", GGMLQuantizationType[name]
    in_mtp = [spec for spec in specs if spec.is_mtp]
    return result | {spec.name: TypeChoice(fitting_type(mtp_type, spec.shape[-1]), reason) for spec in in_mtp}


def _choose_untouched(spec: TensorSpec, own: Mapping[str, GGMLQuantizationType] | None) -> TypeChoice:
    return TypeChoice(F32, "never quantized") if own is None else TypeChoice(own[spec.name], "kept as it is")


# checks ---------------------------------------------------------------------------------------------------------


def _check_types(chosen: Sequence[Chosen], stored: Mapping[str, SourceTensor], options: Options) -> Coverage | None:
    """Refuse types that would add a loss unasked, or lack their imatrix; what the imatrix covers, if there is one."""
    encoded = [(spec, choice.ggml_type) for spec, choice in chosen if stored[spec.source].ggml_type != choice.ggml_type]
    for spec, ggml_type in encoded:
        _check_loss(stored[spec.source], ggml_type, options)
    quantized = [spec for spec, ggml_type in encoded if ggml_type not in FLOATS]
    importance = options.importance
    covered = check_coverage(importance.source, quantized) if importance is not None and quantized else None
    _check_importance(encoded, options)
    return covered


def _check_loss(stored: SourceTensor, ggml_type: GGMLQuantizationType, options: Options) -> None:
    if stored.ggml_type not in (None, *FLOATS) and not options.allow_requantize:
        raise RecipeError(
            f"{stored.name} is already {stored.dtype}; quantizing it again to {ggml_type.name} adds its error",
            hint="Start from the BF16 file or the checkpoint, or accept the loss with --allow-requantize.",
        )


def _check_importance(encoded: Sequence[tuple[TensorSpec, GGMLQuantizationType]], options: Options) -> None:
    """RecipeError naming the tensors whose types llama-quantize refuses without an importance matrix."""
    base = options.recipe.base or ""
    importance = options.importance
    lacking = [
        (spec.name, ggml_type)
        for spec, ggml_type in encoded
        if mixtures.requires_imatrix(base, spec, ggml_type)
        and not (importance and importance.has(spec.name, spec.shape))
        and not _is_calibrated(spec, options)
    ]
    if not lacking:
        return
    names = ", ".join(name for name, _ in lacking[:3]) + (f" and {len(lacking) - 3} more" if len(lacking) > 3 else "")
    types = " and ".join(sorted({ggml_type.name for _, ggml_type in lacking}))
    if importance is None:
        message = "need an importance matrix"
        hint = "Give one with --imatrix, use --calibrate, or a type from IQ3_S or Q3_K_S upwards."
    else:
        message = f"need importance, and {importance.path.name} has none for them"
        hint = "Give these tensors another type in a recipe, or calibrate again."
    raise RecipeError(f"{options.recipe.name}: {len(lacking)} tensors of type {types} {message}: {names}", hint=hint)


def _is_calibrated(spec: TensorSpec, options: Options) -> bool:
    """Whether it is a matrix of the trunk's layers, whose importance calibration finds by itself."""
    return options.calibration is not None and spec.name.layer is not None and spec.is_quantizable and not spec.is_mtp


# files ----------------------------------------------------------------------------------------------------------


def _plan_tensors(chosen: Sequence[Chosen], source: TensorSource, options: Options) -> list[PlannedTensor]:
    """The tensors of one file with their actions, constants among them, in the file's order."""
    tensors = [
        PlannedTensor(name, (len(data) // 4,), F32, "llama3 RoPE scaling", Constant(data))
        for name, data in source.constants.items()
    ]
    for spec, choice in chosen:
        stored = source.tensors[spec.source]
        action = choose_action(
            spec.name,
            stored,
            choice.ggml_type,
            options.importance,
            plus_one=spec.plus_one,
            is_calibrated=_is_calibrated(spec, options),
            wish=options.kernel,
        )
        tensors.append(PlannedTensor(spec.name, spec.shape, choice.ggml_type, choice.reason, action))
    return sorted(tensors, key=lambda tensor: tensor.name.file_order)


def _provenance(options: Options, facts: RuleFacts, tensors: Sequence[PlannedTensor], source: str) -> list[Key]:
    """What made this file of what: of a file of MTP blocks alone, with their types as its own."""
    # The router and the constants are F32 whatever was asked for: they say nothing of it.
    made = [t for t in tensors if t.source is not None and len(t.shape) > 1 and t.ggml_type != F32]
    mtp = [t for t in made if t.name.is_mtp(facts.n_layer)]
    # Such a file has embedding and output too, so it is known by its layers.
    is_mtp_file = bool(mtp) and all(t in mtp for t in made if t.name.startswith("blk."))
    sizes: dict[GGMLQuantizationType, int] = {}
    for tensor in mtp if is_mtp_file else made:
        sizes[tensor.ggml_type] = sizes.get(tensor.ggml_type, 0) + tensor.n_values
    recipe = options.recipe
    most = max(sizes, key=lambda ggml_type: sizes[ggml_type], default=F32)
    if recipe.base and recipe.is_stock and not is_mtp_file:
        name, ftype = recipe.base, mixtures.file_type(recipe.base)
    else:
        name, ftype = (most.name if is_mtp_file else recipe.name), mixtures.nearest_file_type(most)
    return metadata.provenance_keys(
        name,
        ftype,
        source,
        mtp_type=", ".join(sorted({t.ggml_type.name for t in mtp})) or None,
        recipe=recipe.text if recipe.text and not recipe.is_stock else None,
        calibration=options.calibration,
        predicted_kld=options.predicted_kld,
        imatrix=options.importance.source if options.importance else None,
    )


def _replace_keys(keys: Sequence[Key], new: Sequence[Key]) -> list[Key]:
    """The keys, then the new ones, which take the place of any of the same name."""
    # What was said of other codes and types holds no longer.
    names = {metadata.CALIBRATION, metadata.PREDICTED_KLD, *(key.name for key in new)}
    return [*(key for key in keys if key.name not in names), *new]


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
