"""What a folder that cannot be converted is, and the one thing to do about it.

    check_files    by the names of its files: adapters, other formats, training states, nothing
    check_weights  by the names and dtypes of its tensors: adapters that are not merged, quantizations of other tools
    missing_tensors_error   by what is lacking: an unfinished download, shards, the head

One row for each sort of folder; the first that matches is said. What is right passes: a row must not match any
checkpoint that could be converted.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from shlex import quote

from stepgguf.convert.sources.encodings import DTYPES, ENCODINGS, scale_names
from stepgguf.convert.sources.hub import model_origin, unfinished_downloads
from stepgguf.convert.sources.shards import StoredTensor
from stepgguf.errors import CheckpointError, MissingShard, TensorNotFound, UnsupportedCheckpoint
from stepgguf.files import jsonread
from stepgguf.files.jsonread import Value

_ORIGINAL = "Convert the checkpoint that it was made from, in BF16 or FP8 (such as stepfun-ai/Step-3.5-Flash-FP8)."
_MERGE = "Merge it into its base{base} (in PEFT: merge_and_unload, then save_pretrained) and convert what that writes."
_SAVE = "Load it with the program that wrote it, save it as safetensors (transformers: save_pretrained), convert that."

# Files beside or in place of the weights: pattern, what the folder is, what to do.
_INSTEAD_OF_WEIGHTS = (
    ("*.gguf", "holds GGUF files and no safetensors", "Give the GGUF file itself, of a split one any part: {first}"),
    ("model_index.json", "is a diffusers pipeline", _ORIGINAL),
    ("*.onnx", "is an ONNX export", _ORIGINAL),
    ("openvino_model.*", "is an OpenVINO export", _ORIGINAL),
    ("*.engine", "is a TensorRT-LLM engine", _ORIGINAL),
    ("*.h5", "holds TensorFlow weights", _SAVE),
    ("*.msgpack", "holds Flax weights", _SAVE),
    ("*.distcp", "is a distributed training state (torch.distributed.checkpoint)", _SAVE),
    (
        "zero_to_fp32.py",
        "is a DeepSpeed training state",
        "Gather it first: python zero_to_fp32.py --safe_serialization",
    ),
    ("latest_checkpointed_iteration.txt", "is a Megatron training state", _SAVE),
    ("pytorch_model*.bin", "holds PyTorch pickles (.bin) and no safetensors", _SAVE),
    ("consolidated*.pth", "holds PyTorch pickles (.pth) and no safetensors", _SAVE),
    ("*.bin", "holds PyTorch pickles (.bin) and no safetensors", _SAVE),
    ("*.pt", "holds PyTorch pickles (.pt) and no safetensors", _SAVE),
    ("*.pth", "holds PyTorch pickles (.pth) and no safetensors", _SAVE),
)

# Ends of tensor names that other tools leave: pattern, what the checkpoint is.
QUANTIZED = (
    (r"\.weight_scale_2$", "an NVFP4 checkpoint (ModelOpt)"),
    (r"\.weight_global_scale$", "an NVFP4 checkpoint (compressed-tensors)"),
    (r"\.weight_packed$", "a compressed-tensors checkpoint ({format})"),
    (r"\.(?:qweight|qzeros|g_idx)$", "{method} checkpoint"),
    (r"\.(?:absmax|quant_map|nested_absmax|SCB)$|\.quant_state\.", "a bitsandbytes checkpoint"),
    (r"\.switch_mlp\.|\.biases$", "an MLX checkpoint"),
    (r"_blocks$", "an MXFP4 checkpoint"),
    (r"\.(?:trellis|suh|svh)$", "an EXL3 checkpoint"),
    (r"\.(?:q_weight|q_invperm|q_scale)$", "an EXL2 checkpoint"),
    (r"\.(?:codes|codebooks)$", "an AQLM checkpoint"),
    (r"\.W_q$", "an HQQ checkpoint"),
    (r"\.weight_scale$", "an FP8 or INT8 checkpoint with scales of channels or tensors (compressed-tensors, ModelOpt)"),
)
_MARKS = re.compile("|".join(f"(?:{pattern})" for pattern, _ in QUANTIZED))
_METHODS = {"gptq": "a GPTQ", "awq": "an AWQ", "auto-round": "an AutoRound", "auto_round": "an AutoRound"}


def check_files(folder: Path, files: Sequence[Path]) -> list[Path]:
    """The shards among a folder's files. UnsupportedCheckpoint if its files are those of something else."""
    names = [path.name for path in files if not path.name.startswith(".")]
    shards = [path for path in files if path.suffix == ".safetensors" and not path.name.startswith(".")]
    weights = [path for path in shards if not path.name.startswith("adapter_model.")]
    adapter = next((name for name in names if name.startswith("adapter_model.")), None)
    # An adapter's folder may hold its base's config.json too, so its own files are asked before anything else.
    if not weights and (adapter or "adapter_config.json" in names):
        raise UnsupportedCheckpoint(
            f"{folder} is a LoRA adapter ({adapter or 'adapter_config.json'}) and no whole model",
            hint=_MERGE.format(base=_adapter_base(folder)),
        )
    if not weights:
        raise _no_weights_error(folder, names)
    if adapter is not None:
        hint = _MERGE.format(base=_adapter_base(folder)) + " Or move adapter_* away to convert the base alone."
        raise UnsupportedCheckpoint(f"{folder} holds a LoRA adapter ({adapter}) beside its base", hint=hint)
    return shards


def _no_weights_error(folder: Path, names: list[str]) -> CheckpointError:
    """The error that says what a folder without safetensors is."""
    if (unfinished := unfinished_downloads(folder)) or "model.safetensors.index.json" in names:
        which = f"{unfinished[0].name} is half there" if unfinished else "only the index is there"
        return MissingShard(f"{folder}: its download has not finished ({which})", hint=_resume_hint(folder))
    for pattern, what, hint in _INSTEAD_OF_WEIGHTS:
        found = sorted(
            name for name in names if fnmatch(name, pattern) and not name.startswith(("training_args", "rng"))
        )
        if found:
            return UnsupportedCheckpoint(f"{folder} {what}", hint=hint.format(first=folder / found[0]))
    inner = sorted(path.parent.name for path in folder.glob("*/config.json"))
    if inner:
        return UnsupportedCheckpoint(
            f"{folder} holds no weights itself, but other directories do: {', '.join(inner[:4])}",
            hint=f"Give the one that is meant, such as {folder / inner[0]}",
        )
    if not names:
        return UnsupportedCheckpoint(f"{folder} is empty", hint=_resume_hint(folder))
    has_config = "config.json" in names
    content = "a tokenizer without a model" if "tokenizer.json" in names and not has_config else "no weights"
    return UnsupportedCheckpoint(
        f"{folder} holds {content}: there is no *.safetensors in it ({', '.join(sorted(names)[:4])})",
        hint="Give the directory that holds config.json and the *.safetensors.",
    )


def check_weights(folder: Path, stored: Mapping[str, StoredTensor], formats: Collection[str], config: Value) -> None:
    """UnsupportedCheckpoint if the tensors are those of an unmerged adapter or of another tool's quantization.

    stored: by published names. formats: what the shards' metadata name.
    """
    for tensor in stored.values():
        if ".lora_" in tensor.name or ".base_layer." in tensor.name or ".modules_to_save." in tensor.name:
            raise UnsupportedCheckpoint(
                f"{folder} holds a LoRA adapter that is not merged ({tensor.name})", hint=_MERGE.format(base="")
            )
    settings = config.get("quantization_config") or config.get("compression_config")
    method, packing = (_text_setting(settings, key) for key in ("quant_method", "format"))
    if "mlx" in formats:
        # Its norms are stored whole and not less one, also where it is not quantized.
        raise UnsupportedCheckpoint(f"{folder} is an MLX checkpoint", hint=_ORIGINAL)
    known = scale_names(stored)
    marked = [tensor for name, tensor in stored.items() if name not in known and _MARKS.search(tensor.name)]
    for pattern, what in QUANTIZED:
        found = next((tensor for tensor in marked if re.search(pattern, tensor.name)), None)
        if found is not None:
            named = what.format(format=packing or "packed", method=_METHODS.get(method or "", "a GPTQ or AWQ"))
            raise UnsupportedCheckpoint(f"{folder} is {named}: {found.name} is {found.dtype}", hint=_ORIGINAL)
    # A method without a row of its own is known by dtypes that no encoding has.
    strange = next((tensor for tensor in stored.values() if tensor.dtype not in DTYPES), None)
    if strange is not None and method not in (None, "fp8"):
        raise UnsupportedCheckpoint(
            f"{folder} is quantized by {method}: {strange.name} is {strange.dtype}", hint=_ORIGINAL
        )


def missing_tensors_error(
    folder: Path, names: Sequence[str], n_wanted: int, shards: Sequence[Path], index: Mapping[str, str]
) -> CheckpointError:
    """The error for tensors that are in no shard, with the reason where it can be seen."""
    found = {path.name for path in shards}
    absent = sorted(set(index.values()) - found) or _numbering_gaps(found)
    count = f"{len(names)} of {n_wanted} tensors are missing, the first is {names[0]}"
    if unfinished := unfinished_downloads(folder):
        return MissingShard(
            f"{folder}: its download has not finished ({unfinished[0].name}); {count}", hint=_resume_hint(folder)
        )
    if absent:
        listed = f"{folder / absent[0]} is missing" + (f" and {len(absent) - 1} more shards" if len(absent) > 1 else "")
        return MissingShard(f"{listed}; {count}", hint="Download the missing shards into the same directory.")
    for encoding in ENCODINGS:
        for scale in encoding.scales:
            if names[0].endswith(scale.suffix):
                weight = f"{names[0].removesuffix(scale.suffix)} is {encoding.dtype}"
                return TensorNotFound(f"{folder}: {weight}, but {names[0]} is in no shard", hint=_ORIGINAL)
    if names == ["lm_head.weight"]:  # what transformers' text-only class saves
        return TensorNotFound(
            f"{folder}: lm_head.weight is in no shard: the model was saved without its head",
            hint="Save the whole model (Step3p7ForConditionalGeneration and not its text model), or add that tensor.",
        )
    return TensorNotFound(
        f"{folder}: {names[0]} is in none of the {len(shards)} *.safetensors files ({len(names)} of {n_wanted} tensors "
        "are missing)",
        hint="config.json describes more than the shards hold; take both from the same repository.",
    )


def _numbering_gaps(names: Collection[str]) -> list[str]:
    """Shards that the others' numbers say are missing: of "model-00002-of-00003" the first and the third."""
    missing = set()
    for name in names:
        if match := re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})\.safetensors", name):
            missing |= {f"{match[1]}-{i:05d}-of-{match[3]}.safetensors" for i in range(1, int(match[3]) + 1)}
    return sorted(missing - set(names))


def _adapter_base(folder: Path) -> str:
    """ " (org/name)", as the adapter's configuration names its base."""
    try:
        named = jsonread.read(folder / "adapter_config.json", CheckpointError).get("base_model_name_or_path")
        return f" ({named.text()})" if named is not None else ""
    except CheckpointError:
        return ""


def _text_setting(settings: Value | None, key: str) -> str | None:
    """A text of the quantization's settings."""
    found = settings.object().get(key) if settings is not None else None
    return found if isinstance(found, str) else None


def _resume_hint(folder: Path) -> str:
    """The command that goes on with a download, with the model's id where the folder's place says it."""
    command = (
        f"hf download {model}"
        if (model := model_origin(folder).hub_id)
        else f"hf download ORG/NAME --local-dir {quote(str(folder))}"
    )
    return f"Repeat the download: {command} (it goes on where it stopped)."
