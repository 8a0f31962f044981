"""Our header code against gguf-py, both ways."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFValueType

from stepgguf.errors import BadMagic, BadMetadata, GGUFError, TruncatedFile
from stepgguf.files import gguf_header
from stepgguf.files.gguf_header import Key, TensorInfo

V = GGUFValueType


def write_with_gguf_py(path: Path) -> None:
    writer = gguf.GGUFWriter(path, "step35")
    writer.add_uint32("a.u32", 7)
    writer.add_int32("a.i32", -7)
    writer.add_float32("a.f32", 0.5)
    writer.add_bool("a.bool", True)
    writer.add_string("a.string", "Ġ｜▁é")
    writer.add_array("a.ints", [1, -2, 3])
    writer.add_array("a.strings", ["x", "", "yy"])
    writer.add_uint16("a.u16", 3)
    writer.add_tensor("t", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.add_tensor("u", np.zeros((2, 256 // 256 * 144), np.uint8), raw_dtype=GGMLQuantizationType.Q4_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_reads_what_gguf_py_writes_and_writes_the_same_bytes(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    write_with_gguf_py(path)
    header = gguf_header.read(path)
    assert header.get("a.u32") == 7
    assert header.get("a.i32") == -7
    assert header.get("a.bool") is True
    assert header.get("a.string") == "Ġ｜▁é"
    assert header.get("a.ints") == [1, -2, 3]
    assert header.get("a.strings") == ["x", "", "yy"]
    assert header.get("absent", 5) == 5
    assert [(t.name, t.shape, t.ggml_type.name, t.offset) for t in header.tensors] == [
        ("t", (2, 3), "F32", 0),
        ("u", (2, 256), "Q4_K", 32),
    ]
    assert path.read_bytes()[: header.data_start] == gguf_header.encode(header.keys.values(), header.tensors)


def test_gguf_py_reads_what_we_write(tmp_path: Path) -> None:
    keys = [
        Key.of("general.architecture", "step35", V.STRING),
        Key.of("x.floats", [0.0, 7.0], V.ARRAY, V.FLOAT32),
        Key.of("x.bools", [False, True], V.ARRAY, V.BOOL),
        Key.of("x.words", ["a", "bb"], V.ARRAY, V.STRING),
        Key.of("x.n", 3, V.UINT16),
    ]
    info = TensorInfo("w", (2, 3, 32), GGMLQuantizationType.Q8_0, 0)
    path = tmp_path / "x.gguf"
    path.write_bytes(gguf_header.encode(keys, [info]) + bytes(info.n_bytes))
    reader = gguf.GGUFReader(path)
    assert reader.fields["x.floats"].contents() == [0.0, 7.0]
    assert reader.fields["x.bools"].contents() == [False, True]
    assert reader.fields["x.words"].contents() == ["a", "bb"]
    assert reader.fields["x.n"].contents() == 3
    assert list(reader.tensors[0].shape) == [32, 3, 2]
    assert reader.tensors[0].data_offset == gguf_header.read(path).data_start


@pytest.mark.parametrize("n", range(24, 400, 13))
def test_every_cut_of_a_header_is_named(tmp_path: Path, n: int) -> None:
    path = tmp_path / "x.gguf"
    write_with_gguf_py(path)
    path.write_bytes(path.read_bytes()[:n])
    with pytest.raises(TruncatedFile, match=r"x\.gguf"):
        gguf_header.read(path)


@pytest.mark.parametrize("seed", range(200))
def test_no_damage_to_a_header_escapes_as_another_error(tmp_path: Path, seed: int) -> None:
    path = tmp_path / "x.gguf"
    write_with_gguf_py(path)
    data = bytearray(path.read_bytes())
    rng = np.random.default_rng(seed)
    for at in rng.integers(0, 400, 4):
        data[at] = rng.integers(256)
    path.write_bytes(data)
    try:
        for key in gguf_header.read(path).keys.values():
            _ = key.value
    except GGUFError:
        pass


@pytest.mark.parametrize(
    ("content", "error", "text"),
    [
        (b"", BadMagic, "too short"),
        (b"PK\x03\x04" + bytes(60), BadMagic, "not b'GGUF'"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), BadMagic, "version"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", BadMagic, "not b'GGUF'"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60) + bytes(32), BadMetadata, "x.gguf|GGUFValueType"),
    ],
)
def test_what_is_not_a_gguf_is_said(tmp_path: Path, content: bytes, error: type[Exception], text: str) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises((error, TruncatedFile), match=text):
        gguf_header.read(path)


def strings(n_levels: int) -> bytes:
    """The value of an array of arrays of ... of no texts."""
    return struct.pack("<IQ", V.ARRAY, 1) * n_levels + struct.pack("<IQ", V.STRING, 0)


ARCHITECTURE = Key.of("general.architecture", "step35", V.STRING)
F32 = GGMLQuantizationType.F32
A, B = TensorInfo("a", (2, 8), F32, 0), TensorInfo("b", (8,), F32, 64)


@pytest.mark.parametrize(
    ("keys", "tensors", "text"),
    [
        ([ARCHITECTURE], [A, TensorInfo("a", (8,), F32, 64)], "tensor 'a' is there twice"),
        ([ARCHITECTURE], [A, TensorInfo("b", (8,), F32, 32)], "tensors 'a' and 'b' overlap at 32"),
        ([ARCHITECTURE], [A, TensorInfo("b", (8,), F32, 0)], "tensors 'a' and 'b' overlap at 0"),
        ([ARCHITECTURE], [A, TensorInfo("b", (8,), F32, 68)], "tensor 'b' lies at 68, expected a multiple of 32"),
        ([ARCHITECTURE], [A, TensorInfo("b", (), F32, 64)], "tensor 'b' has 0 dimensions, expected 1 to 4"),
        ([ARCHITECTURE], [A, TensorInfo("b", (0, 8), F32, 64)], r"tensor 'b' is \[0, 8\]"),
        ([ARCHITECTURE, ARCHITECTURE], [A], "key 'general.architecture' is there twice"),
        ([Key("x", V.ARRAY, strings(1200))], [A], "arrays lie more than 4 deep in each other"),
        ([Key.of("general.alignment", 24, V.UINT32)], [A], "general.alignment is 24, expected a power of two"),
        ([Key.of("general.alignment", "x", V.STRING)], [A], "general.alignment is 'x', expected a power of two"),
    ],
)
def test_headers_that_cannot_be_are_named(
    tmp_path: Path, keys: list[Key], tensors: list[TensorInfo], text: str
) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(gguf_header.encode(keys, tensors) + bytes(256))
    with pytest.raises(BadMetadata, match=rf"x\.gguf: {text}") as caught:
        gguf_header.read(path)
    assert caught.value.hint


@pytest.mark.parametrize("at", [8, 16])
@pytest.mark.parametrize("count", [2**32, 2**63, 2**64 - 1])
def test_absurd_counts_are_an_error(tmp_path: Path, at: int, count: int) -> None:
    path = tmp_path / "x.gguf"
    data = bytearray(gguf_header.encode([ARCHITECTURE], [A, B]) + bytes(96))
    struct.pack_into("<Q", data, at, count)
    path.write_bytes(data)
    with pytest.raises(GGUFError, match=r"x\.gguf: "):
        gguf_header.read(path)


def test_a_long_array_of_empty_texts_in_a_large_file_ends_at_a_headers_largest_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_header, "_MAX_HEADER", 10_000)
    path = tmp_path / "x.gguf"
    with path.open("wb") as file:
        file.write(gguf_header.encode([Key("x", V.ARRAY, struct.pack("<IQ", V.STRING, 2**60))], [], 1))
        file.truncate(2**33)
    with pytest.raises(TruncatedFile, match="does not end in its first 10000 bytes"):
        gguf_header.read(path)


def test_a_file_without_tensors_need_not_be_padded(tmp_path: Path) -> None:
    """gguf-py does not pad a file of metadata alone."""
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "step35")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert gguf_header.read(tmp_path / "x.gguf").get("general.architecture") == "step35"
