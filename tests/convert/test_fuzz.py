"""Whatever is done to a source's files, what comes out is a plan or one of our own errors."""

from __future__ import annotations

import copy
import json
import random
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stepgguf.cli.inspect import gguf_contents
from stepgguf.convert.plan import Options
from stepgguf.convert.planner import plan_source
from stepgguf.convert.sizes import take_inventory
from stepgguf.convert.sources.opening import open_source
from stepgguf.convert.sources.shard_index import INDEX
from stepgguf.errors import StepggufError
from stepgguf.files import gguf_header
from stepgguf.files.gguf_header import TensorInfo
from stepgguf.quants.recipe_files import load_recipe
from tests.generate import Shape, write_checkpoint

pytestmark = pytest.mark.slow

ROUNDS = 150
DEEP: list[Any] = []
for _ in range(150):
    DEEP = [DEEP]
STRANGE: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 7, 2**31, 2**32, 2**63, 2**64, 10**400, 1.5, -0.0, 1e-320, 1e308, float("inf"),
    float("nan"), "", "x", "3,4,5", "é｜", "\ud800", "\0", "x" * 300, "../x", "NaN", [], [1], ["x"], [[]], [None, {}],
    {}, {"a": 1}, {"content": 7}, DEEP, "full_attention", "F8_E4M3",
)  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with every file that is read."""
    path = tmp_path_factory.mktemp("fuzz") / "tiny"
    write_checkpoint(path, Shape(n_layer=2, n_dense=1, n_mtp=1, n_expert=2, n_used=1), index=True)
    settings = {"temperature": 0.5, "top_k": 20, "top_p": 0.9, "min_p": 0.1}
    (path / "generation_config.json").write_text(json.dumps(settings))
    return path


def members(document: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of everything in a document."""
    pairs = document.items() if isinstance(document, dict) else enumerate(document)
    for key, value in list(pairs):
        yield document, key
        if isinstance(value, dict | list):
            yield from members(value)


def changed(document: Any, rng: random.Random) -> Any:
    """A document with one to three places replaced, removed or repeated."""
    document = copy.deepcopy(document)
    for _ in range(rng.randint(1, 3)):
        found = list(members(document))
        if not found:
            break
        container, key = rng.choice(found)
        match rng.randrange(6):
            case 0:
                del container[key]
            case 1 if isinstance(container, list):
                container.insert(key, copy.deepcopy(container[key]))
            case _:
                container[key] = copy.deepcopy(rng.choice(STRANGE))
    return document


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Bytes replaced, cut off or repeated."""
    result = bytearray(data)
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(len(result))
        match rng.randrange(4):
            case 0:
                result[at] = rng.randrange(256)
            case 1:
                result[at] ^= 1 << rng.randrange(8)
            case 2:
                result[at:at] = result[at : at + rng.randrange(12)]
            case 3 if rng.random() < 0.2:
                del result[at + 1 :]
    return bytes(result)


def plan(path: Path) -> bool:
    """Plan a conversion of a source; whether it could be planned. Any other error than ours fails the test."""
    try:
        with open_source(path) as source:
            plan_source(
                source, path.parent / "out.gguf", Options(load_recipe("Q4_K_M"), mtp="drop", allow_requantize=True)
            )
            take_inventory(source)
    except StepggufError:
        return False
    return True


JSON_FILES = ("config.json", INDEX, "generation_config.json", "tokenizer_config.json", "tokenizer.json")


@pytest.mark.parametrize("name", JSON_FILES)
def test_json_files_with_strange_values(tiny: Path, tmp_path: Path, name: str) -> None:
    path = Path(shutil.copytree(tiny, tmp_path / "copy"))
    document, data, rng = json.loads((tiny / name).read_text()), (tiny / name).read_bytes(), random.Random(name)
    if name == "tokenizer.json":  # most of it is one list of merges: leave a few
        document["model"]["merges"] = document["model"]["merges"][:3]
    planned = 0
    for i in range(ROUNDS):
        text = json.dumps(changed(document, rng)).encode() if i % 3 else damaged(data, rng)
        (path / name).write_bytes(text)
        planned += plan(path)
    assert planned < ROUNDS


def test_shard_headers_with_strange_values(tiny: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(tiny, tmp_path / "copy"))
    shard, rng = path / "model-00001.safetensors", random.Random(1)
    data = shard.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    planned = 0
    for i in range(ROUNDS):
        text = json.dumps(changed(header, rng)).encode() if i % 3 else damaged(data[8 : 8 + length], rng)
        head = struct.pack("<Q", len(text) if rng.random() > 0.05 else rng.choice((0, 2**62, 2**64 - 1, 99)))
        shard.write_bytes(head + text + body)
        planned += plan(path)
    assert planned < ROUNDS


def test_gguf_headers_with_damaged_bytes(tiny: Path, tmp_path: Path) -> None:
    path, rng = tmp_path / "x.gguf", random.Random(2)
    with open_source(tiny) as source:
        file = plan_source(source, path, Options(load_recipe("Q8_0"))).files[0]
    # Little of the vocabulary and of the room for a template, so that most damage meets keys and tensors.
    keys = [key for key in file.keys if not key.name.startswith(("tokenizer.", "stepgguf.reserve"))]
    infos = zip(file.tensors, file.offsets, strict=True)
    head = gguf_header.encode(keys, [TensorInfo(t.name, t.shape, t.ggml_type, offset) for t, offset in infos])
    path.write_bytes(head)
    with path.open("r+b") as output:
        output.truncate(len(head) + file.data_size)
    assert plan(path)
    planned = 0
    for _ in range(ROUNDS * 2):
        with path.open("r+b") as output:
            output.write(damaged(head, rng)[: len(head)].ljust(len(head), b"\0"))
        planned += plan(path)
        try:
            found = gguf_header.read(path)
        except StepggufError:
            continue
        metadata = {name: key.value for name, key in found.keys.items()}
        assert gguf_contents(metadata, [tensor.name for tensor in found.tensors])
    assert 0 < planned < ROUNDS * 2
