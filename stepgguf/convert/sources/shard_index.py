"""model.safetensors.index.json: which shard each tensor is in, as far as one may believe it.

Shards are found by their headers and never by the index: that of the official FP8 repository is stale (it is that of
the BF16 one and lists none of the 126 scale tensors). It tells what a download lacks, and where it disagrees with the
headers, a warning names both.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from stepgguf.convert.sources.shards import StoredTensor
from stepgguf.errors import BadConfig
from stepgguf.files import jsonread

INDEX = "model.safetensors.index.json"


def read_index(path: Path) -> dict[str, str]:
    """Tensor name -> shard, a file name in the same directory. Empty without an index. BadConfig for a damaged one."""
    if not path.exists():
        return {}
    weight_map = jsonread.read(path, BadConfig, "Delete it: the shards are found without it.").get("weight_map")
    shards = dict(weight_map.members()) if weight_map is not None else {}
    for value in shards.values():
        name = value.text()
        if not 0 < len(name.encode()) < 256 or name == ".." or Path(name).name != name or "\0" in name:
            raise value.wrong("a file's name in this directory")
    return {name: value.text() for name, value in shards.items()}


def compare_with_index(index: Mapping[str, str], stored: Mapping[str, StoredTensor]) -> list[str]:
    """A warning, if the index disagrees with the shards."""
    found = {tensor.name: tensor.shard.name for tensor in stored.values()}
    wrong = sorted(name for name in found.keys() | index.keys() if found.get(name) != index.get(name))
    if not index or not wrong:
        return []
    name = wrong[0]
    return [
        f"{INDEX} and the shard headers disagree on {len(wrong)} tensors (first: {name}, index: "
        f"{index.get(name, 'not listed')}, headers: {found.get(name, 'not found')}); the headers are used"
    ]
