"""Which tensors of the table a checkpoint's shards hold, and where. All of the trunk and nothing unknown, or an error.

Which tensors are needed follows from what is there and what is asked for. A checkpoint without any tensor of its MTP
blocks is one without MTP, as transformers leaves them out when it saves; one whose MTP blocks cannot be used is
refused only where they are asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from stepgguf.convert.sources import diagnosis
from stepgguf.convert.sources.layout import Layout, StoredMatrix, find_tensors
from stepgguf.convert.sources.shard_index import INDEX, compare_with_index, read_index
from stepgguf.convert.sources.shards import Shard, StoredTensor
from stepgguf.errors import CheckpointError, UnexpectedTensor
from stepgguf.files.jsonread import Value
from stepgguf.model.hparams import HParams
from stepgguf.model.names import TensorName
from stepgguf.model.spelling import NO_WEIGHT, VISION_PREFIXES, published_name
from stepgguf.model.tensors import TensorSpec, tensor_specs


class CheckpointContents:
    """The shards' tensors, matched with the table.

    hparams, specs: the model that is there, with its MTP blocks or without. matrices: where each of its tensors lies,
    by its name in the table. mtp_note: why MTP blocks that config.json names are left out; mtp_fault: the error where
    they are asked for all the same.

    Raises CheckpointError for tensors that are missing, have a shape or dtype that cannot be, or are of no such model.
    """

    def __init__(self, folder: Path, described: HParams, shards: Sequence[Shard], config: Value) -> None:
        self._folder, self._shards = folder, [shard.path for shard in shards]
        self._has_vision = "text_config" in config.object()
        stored = _by_published_name(shards)
        diagnosis.check_weights(folder, stored, {shard.format or "" for shard in shards}, config)
        self._index = read_index(folder / INDEX)
        self.warnings = compare_with_index(self._index, stored)
        self.mtp_note: str | None = None
        self.mtp_fault: CheckpointError | None = None
        layout, specs = Layout(stored), tensor_specs(described)
        # The trunk first: whoever lacks a shard shall hear of it, and not of MTP blocks that cannot be used.
        self.matrices = self._find_matrices(layout, [spec for spec in specs if not spec.is_mtp])
        has_mtp = self._add_mtp(layout, described, [spec for spec in specs if spec.is_mtp])
        self.hparams = described if has_mtp else described.without_mtp()
        self.specs = [spec for spec in specs if has_mtp or not spec.is_mtp]
        self._check_others(layout, described)

    def _find_matrices(self, layout: Layout, specs: Sequence[TensorSpec]) -> dict[str, tuple[StoredMatrix, ...]]:
        """Where the tensors lie, by their names in the table; an error that says why some are missing."""
        found, lacking = find_tensors(layout, specs)
        if lacking:
            raise diagnosis.missing_tensors_error(self._folder, lacking, len(specs), self._shards, self._index)
        return found

    def _add_mtp(self, layout: Layout, hp: HParams, specs: Sequence[TensorSpec]) -> bool:
        """Find the MTP blocks' tensors; whether they are all there. If not, note why."""
        present = [
            name for name in layout.stored if TensorName(name).is_mtp(hp.n_layer) and not name.endswith(NO_WEIGHT)
        ]
        if not specs:
            if present:
                self.warnings.append(f"config.json names no MTP blocks; {len(present)} tensors of such are left out")
            return False
        if not present and not any(TensorName(name).is_mtp(hp.n_layer) for name in self._index):
            self.mtp_note = (
                f"the {hp.n_mtp} MTP blocks that config.json names are in no shard (programs that fine-tune and merge "
                "leave them out): the model is converted without them"
            )
            return False
        try:
            found = self._find_matrices(layout, specs)
            _refuse_unknown(layout, present, hp)
        except CheckpointError as error:
            self.mtp_fault = type(error)(
                f"the MTP blocks cannot be used: {error.message}",
                hint="`stepgguf convert --mtp drop` converts the model without them.",
            )
            self.mtp_note = self.mtp_fault.message
            return False
        self.matrices |= found
        return True

    def _check_others(self, layout: Layout, hp: HParams) -> None:
        """What no tensor of the table took: vision is left out, other tensors are refused."""
        others = [
            name
            for name in layout.stored
            if name not in layout.used and not TensorName(name).is_mtp(hp.n_layer) and not name.endswith(NO_WEIGHT)
        ]
        # Under "text_config" the text model is part of one that sees; with a flat config.json such tensors are strange.
        vision = [name for name in others if self._has_vision and name.startswith(VISION_PREFIXES)]
        _refuse_unknown(layout, set(others).difference(vision), hp)
        if vision:
            self.warnings.append(f"{len(vision)} tensors of the vision tower are left out; the text model is converted")


def _by_published_name(shards: Iterable[Shard]) -> dict[str, StoredTensor]:
    """All stored tensors. UnexpectedTensor for one that is there twice, be it in two spellings."""
    found: dict[str, StoredTensor] = {}
    for shard in shards:
        for tensor in shard.tensors:
            name = published_name(tensor.name)
            if name in found:
                other = found[name]
                again = f"and again in {shard.path.name}" + (f" as {tensor.name}" if tensor.name != other.name else "")
                raise UnexpectedTensor(
                    f"{other.name} is in {other.shard.name} {again}",
                    hint="Remove the shard that does not belong to this checkpoint.",
                )
            found[name] = tensor
    return found


def _refuse_unknown(layout: Layout, names: Iterable[str], hp: HParams) -> None:
    """UnexpectedTensor for the first of these that no tensor of the table took: nothing is left out silently."""
    for name in names:
        if name not in layout.used:
            tensor = layout.stored[name]
            raise UnexpectedTensor(
                f"{tensor.shard.name}: {tensor.name} {list(tensor.shape)} is not a tensor of {hp.architecture}",
                hint="The checkpoint is of another variant, or config.json does not belong to it.",
            )
