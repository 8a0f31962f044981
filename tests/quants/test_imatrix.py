"""Importance matrices against ggml's GGUF writer, gguf-py, and llama_model_quantize's bytes."""

from __future__ import annotations

import ctypes
import resource
import struct
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGUFReader, ReaderTensor
from hypothesis import given, settings
from hypothesis import strategies as st

from stepgguf.cli.main import main
from stepgguf.errors import ImatrixError, OutputError
from stepgguf.model.names import TensorName
from stepgguf.model.tensors import TensorSpec
from stepgguf.quants import ggml
from stepgguf.quants.imatrix import Imatrix, ImatrixEntry, channel_importance, read_imatrix, write_imatrix
from stepgguf.quants.kernels import choose_kernel, decoder_for
from stepgguf.quants.types import BF16, row_size
from tests.generate import Shape, write_checkpoint
from tests.oracle import llama_quantize

pytestmark = pytest.mark.slow

Floats = npt.NDArray[np.float32]


def entry(rng: np.random.Generator, counts: list[int], columns: int) -> ImatrixEntry:
    """Channels of very different strength, as real activations have."""
    means = rng.lognormal(0, 2, (len(counts), columns)).astype(np.float32)
    n = np.array(counts, np.float32)
    return ImatrixEntry(means * n[:, None], n)


def made(columns: int = 32) -> Imatrix:
    rng = np.random.default_rng(0)
    entries = {
        "blk.3.ffn_down_exps.weight": entry(rng, [900, 0, 3, 77, 0, 1_000_003], columns),
        "blk.10.attn_q.weight": entry(rng, [1024], columns),
        "blk.1.attn_q.weight": entry(rng, [1024], 2 * columns),
    }
    return Imatrix(Path("made"), ("wiki.train.raw", "dialogues-é.txt"), 2, 512, entries)


def same(a: Imatrix, b: Imatrix) -> None:
    assert (a.datasets, a.chunk_count, a.chunk_size) == (b.datasets, b.chunk_count, b.chunk_size)
    assert sorted(a.entries) == sorted(b.entries)
    for name in a.entries:
        np.testing.assert_array_equal(a.entries[name].sums, b.entries[name].sums, strict=True)
        np.testing.assert_array_equal(a.entries[name].counts, b.entries[name].counts, strict=True)


# The GGUF form


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    write_imatrix(made(), tmp_path / "made.gguf")
    same(read_imatrix(tmp_path / "made.gguf"), made())
    assert list(tmp_path.iterdir()) == [tmp_path / "made.gguf"]


def test_no_dataset_is_read_back_as_none(tmp_path: Path) -> None:
    write_imatrix(replace(made(), datasets=()), tmp_path / "made.gguf")
    assert "imatrix.datasets" in GGUFReader(tmp_path / "made.gguf").fields  # llama-quantize asks for the key
    assert read_imatrix(tmp_path / "made.gguf").datasets == ()


def write_with_ggml(imatrix: Imatrix, path: Path) -> None:
    """save_imatrix of llama.cpp's tools/imatrix/imatrix.cpp, call by call, with ggml's own library."""
    library = ggml.load_library()
    assert library is not None
    lib, p, s = ctypes.CDLL(str(library.path)), ctypes.c_void_p, ctypes.c_char_p

    class InitParams(ctypes.Structure):
        _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", p), ("no_alloc", ctypes.c_bool))

    for name, result, *arguments in (
        ("ggml_init", p, InitParams),
        ("ggml_free", None, p),
        ("ggml_new_tensor_2d", p, p, ctypes.c_int, ctypes.c_int64, ctypes.c_int64),
        ("ggml_set_name", p, p, s),
        ("ggml_get_data", p, p),
        ("gguf_init_empty", p),
        ("gguf_free", None, p),
        ("gguf_set_val_str", None, p, s, s),
        ("gguf_set_val_u32", None, p, s, ctypes.c_uint32),
        ("gguf_set_arr_str", None, p, s, ctypes.POINTER(s), ctypes.c_size_t),
        ("gguf_add_tensor", None, p, p),
        ("gguf_write_to_file", ctypes.c_bool, p, s, ctypes.c_bool),
    ):
        getattr(lib, name).restype, getattr(lib, name).argtypes = result, arguments
    context, file = lib.ggml_init(InitParams(2**20, None, False)), lib.gguf_init_empty()
    datasets = (s * len(imatrix.datasets))(*(name.encode() for name in imatrix.datasets))
    lib.gguf_set_val_str(file, b"general.type", b"imatrix")
    lib.gguf_set_arr_str(file, b"imatrix.datasets", datasets, len(datasets))
    lib.gguf_set_val_u32(file, b"imatrix.chunk_count", imatrix.chunk_count)
    lib.gguf_set_val_u32(file, b"imatrix.chunk_size", imatrix.chunk_size)
    for name in sorted(imatrix.entries):
        e = imatrix.entries[name]
        for suffix, columns, values in ((".in_sum2", e.sums.shape[1], e.sums), (".counts", 1, e.counts)):
            tensor = lib.ggml_new_tensor_2d(context, 0, columns, len(e.counts))  # 0: GGML_TYPE_F32
            lib.ggml_set_name(tensor, (name + suffix).encode())
            ctypes.memmove(lib.ggml_get_data(tensor), values.ctypes.data, values.nbytes)
            lib.gguf_add_tensor(file, tensor)
    assert lib.gguf_write_to_file(file, str(path).encode(), False)
    lib.gguf_free(file)
    lib.ggml_free(context)


def test_the_file_is_ggmls_byte_for_byte(tmp_path: Path) -> None:
    write_imatrix(made(), tmp_path / "ours.gguf")
    write_with_ggml(made(), tmp_path / "theirs.gguf")
    assert (tmp_path / "ours.gguf").read_bytes() == (tmp_path / "theirs.gguf").read_bytes()


def test_a_file_that_cannot_be_finished_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "made.gguf"
    write_imatrix(made(), path)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OutputError, match=r"made\.gguf: "):
            write_imatrix(replace(made(), chunk_count=7), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("folder", ["absent", "file"])
def test_a_folder_that_is_none_is_named(folder: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=f"{folder}/made.gguf: "):
        write_imatrix(made(), tmp_path / folder / "made.gguf")


# The .dat form: imatrix.cpp, save_imatrix_legacy

ROW_A = [1.5, 0.25, 3.0, 0.125]
DAT = (
    b"\x02\x00\x00\x00"  # two entries
    b"\x05\x00\x00\x00" b"a.wei" b"\x04\x00\x00\x00" b"\x04\x00\x00\x00"  # name, 4 calls, 4 values
    b"\x00\x00\xc0\x3f" b"\x00\x00\x80\x3e" b"\x00\x00\x40\x40" b"\x00\x00\x00\x3e"  # ROW_A
    b"\x18\x00\x00\x00" b"blk.0.ffn_up_exps.weight" b"\x03\x00\x00\x00" b"\x06\x00\x00\x00"  # 3 calls, 3 experts of 2
    b"\x00\x00\x00\x40" b"\x00\x00\x80\x3f" b"\x00\x00\x40\x40" b"\x00\x00\x40\x40"  # 2 1, 3 3 (= 1.0 a call: unseen)
    b"\x00\x00\x40\x40" b"\x00\x00\xe0\x40"  # 3 7
    b"\x09\x00\x00\x00" b"\x08\x00\x00\x00" b"text.txt"
)  # fmt: skip
ENTRIES_END = len(DAT) - 16


def wanted(name: str, shape: tuple[int, ...], *, is_mtp: bool = False) -> TensorSpec:
    return TensorSpec(name, TensorName(name), shape, is_mtp)


B = wanted("blk.0.ffn_up_exps.weight", (3, 5, 2))


def dat(path: Path, data: bytes = DAT) -> Path:
    path.write_bytes(data)
    return path


def test_the_dat_form_is_read(tmp_path: Path) -> None:
    imatrix = read_imatrix(dat(tmp_path / "old.dat"))
    assert (imatrix.datasets, imatrix.chunk_count, imatrix.chunk_size) == (("text.txt",), 9, 0)
    a = imatrix.entries["a.wei"]
    assert (a.sums.tolist(), a.counts.tolist()) == ([ROW_A], [4])


def test_the_dat_form_may_end_after_its_entries(tmp_path: Path) -> None:
    imatrix = read_imatrix(dat(tmp_path / "old.dat", DAT[:ENTRIES_END]))
    assert (imatrix.datasets, imatrix.chunk_count, sorted(imatrix.entries)) == ((), 0, ["a.wei", B.name])


def test_experts_that_a_dat_marks_as_unseen_are_told(tmp_path: Path) -> None:
    found = read_imatrix(dat(tmp_path / "old.dat")).entry_of(B.name, B.shape)
    assert found is not None
    assert found.sums.tolist() == [[2, 1], [0, 0], [3, 7]]
    assert (found.counts.tolist(), found.counted) == ([3, 0, 3], False)


def test_a_dat_survives_being_written_as_gguf(tmp_path: Path) -> None:
    old = read_imatrix(dat(tmp_path / "old.dat"))
    write_imatrix(old, tmp_path / "new.gguf")
    same(read_imatrix(tmp_path / "new.gguf"), old)


def test_a_name_that_a_dat_has_twice_is_refused(tmp_path: Path) -> None:
    one = struct.pack("<i1siif", 1, b"b", 3, 1, 2.0)
    with pytest.raises(ImatrixError, match="b is there twice"):
        read_imatrix(dat(tmp_path / "old.dat", struct.pack("<i", 2) + one + one))


def test_sums_of_another_type_are_refused(tmp_path: Path) -> None:
    write_imatrix(made(2), tmp_path / "made.gguf")
    data = bytearray((tmp_path / "made.gguf").read_bytes())
    at = data.index(b"blk.1.attn_q.weight.counts") + len("blk.1.attn_q.weight.counts") + 4 + 8
    assert data[at : at + 4] == b"\0\0\0\0"  # F32; 26 is I32
    data[at] = 26
    (tmp_path / "made.gguf").write_bytes(data)
    with pytest.raises(ImatrixError, match="sums are F32 and counts I32, expected F32"):
        read_imatrix(tmp_path / "made.gguf")


def test_bytes_after_the_end_of_a_dat_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ImatrixError, match="3 bytes after the end"):
        read_imatrix(dat(tmp_path / "old.dat", DAT + b"abc"))


def test_an_offset_that_wraps_around_is_refused(tmp_path: Path) -> None:
    write_imatrix(made(2), tmp_path / "made.gguf")
    data = bytearray((tmp_path / "made.gguf").read_bytes())
    at = data.index(b"blk.1.attn_q.weight.counts") + len("blk.1.attn_q.weight.counts") + 4 + 8 + 4
    data[at : at + 8] = b"\xff" * 8
    (tmp_path / "made.gguf").write_bytes(data)
    with pytest.raises(
        ImatrixError, match=r"attn_q\.weight\.counts' lies at 18446744073709551615, expected a multiple"
    ):
        read_imatrix(tmp_path / "made.gguf")


# Damage


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """A small file of each form."""
    folder = tmp_path_factory.mktemp("whole")
    write_imatrix(made(2), folder / "made.gguf")
    return {"gguf": folder / "made.gguf", "dat": dat(folder / "old.dat")}


def read_damaged(file: Path, damaged: bytes) -> None:
    """Nothing but ImatrixError; what is read all the same must be usable."""
    path = file.with_suffix(".damaged")
    path.write_bytes(damaged)
    try:
        imatrix = read_imatrix(path)
    except ImatrixError:
        return
    for name, e in imatrix.entries.items():
        for values in (e.sums, e.counts, channel_importance(e, "flat")):
            assert np.isfinite(values).all(), name
            assert (values >= 0).all(), name


@pytest.mark.parametrize("form", ["gguf", "dat"])
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_damaged_file_is_an_imatrix_error_or_usable(
    form: str, whole: Mapping[str, Path], data: st.DataObject
) -> None:
    damaged = bytearray(whole[form].read_bytes())
    for at in data.draw(st.lists(st.integers(0, len(damaged) - 1), min_size=1, max_size=4)):
        damaged[at] = data.draw(st.integers(0, 255))
    read_damaged(whole[form], bytes(damaged))


@settings(max_examples=150, deadline=None)
@given(start=st.sampled_from([b"", b"GGUF", b"GGUF\3\0\0\0", DAT[:17]]), rest=st.binary(max_size=200))
def test_any_bytes_are_an_imatrix_error_or_usable(start: bytes, rest: bytes, whole: Mapping[str, Path]) -> None:
    read_damaged(whole["dat"], start + rest)


@pytest.mark.parametrize("form", ["gguf", "dat"])
def test_every_shorter_file_is_refused(form: str, whole: Mapping[str, Path]) -> None:
    data, path = whole[form].read_bytes(), whole[form].with_suffix(".short")
    content = len(data.rstrip(b"\0")) if form == "gguf" else len(data)  # zeros pad a GGUF's end
    for n in range(content):
        path.write_bytes(data[:n])
        if form == "dat" and n == ENTRIES_END:
            continue  # an early .dat file
        with pytest.raises(ImatrixError, match=r"whole.*\.short: "):
            read_imatrix(path)


def test_a_type_byte_that_claims_an_endless_array_is_refused_at_once(whole: Mapping[str, Path]) -> None:
    data = bytearray(whole["gguf"].read_bytes())
    at = data.index(b"general.type") + len("general.type")
    assert data[at] == 8  # a string; 9 is an array
    data[at] = 9
    path = whole["gguf"].with_suffix(".array")
    path.write_bytes(data + bytes(2**20))
    with pytest.raises(ImatrixError, match=r"array: the GGUF header does not end in its first \d+ bytes"):
        read_imatrix(path)


BAD = {
    "sums from nan": ImatrixEntry(np.array([[1, np.nan]], np.float32), np.ones(1, np.float32)),
    "sums from 1.0 to inf": ImatrixEntry(np.array([[1, np.inf]], np.float32), np.ones(1, np.float32)),
    "sums from -1.0 to 1.0": ImatrixEntry(np.array([[1, -1]], np.float32), np.ones(1, np.float32)),
    "counts from -2.0 to -2.0": ImatrixEntry(np.ones((1, 2), np.float32), np.full(1, -2, np.float32)),
    "counts from nan": ImatrixEntry(np.ones((1, 2), np.float32), np.full(1, np.nan, np.float32)),
    "whole numbers": ImatrixEntry(np.ones((1, 2), np.float32), np.full(1, 2.5, np.float32)),
    "matrix 1 of 2 has sums, but saw no token": ImatrixEntry(np.ones((2, 2), np.float32), np.array([3, 0], np.float32)),
    "3 sums do not divide into 2 matrices": ImatrixEntry(np.ones((1, 3), np.float32), np.ones(2, np.float32)),
}


@pytest.mark.parametrize("message", BAD)
def test_values_that_cannot_be_are_named(message: str, tmp_path: Path) -> None:
    write_imatrix(replace(made(), entries={**made().entries, "blk.2.x": BAD[message]}), tmp_path / "bad.gguf")
    with pytest.raises(ImatrixError, match=rf"bad.gguf: blk.2.x: .*{message}"):
        read_imatrix(tmp_path / "bad.gguf")


def test_a_tensor_without_values_is_named(tmp_path: Path) -> None:
    empty = ImatrixEntry(np.ones((1, 0), np.float32), np.ones(1, np.float32))
    write_imatrix(replace(made(), entries={**made().entries, "blk.2.x": empty}), tmp_path / "bad.gguf")
    with pytest.raises(ImatrixError, match=r"bad\.gguf: tensor 'blk\.2\.x\.in_sum2' is \[0\]"):
        read_imatrix(tmp_path / "bad.gguf")


@pytest.mark.parametrize(("suffix", "message"), [("counts", "no .in_sum2 tensor"), ("in_sum2", "no .counts tensor")])
def test_sums_and_counts_come_in_pairs(suffix: str, message: str, tmp_path: Path) -> None:
    write_imatrix(made(2), tmp_path / "made.gguf")
    data = (tmp_path / "made.gguf").read_bytes()
    other = b"in_sum2" if suffix == "counts" else b"counts"
    name = b"blk.10.attn_q.weight."
    (tmp_path / "made.gguf").write_bytes(data.replace(name + other, name + b"x" * len(other)))
    with pytest.raises(ImatrixError, match=f"blk.10.attn_q.weight: {message}"):
        read_imatrix(tmp_path / "made.gguf")


def test_a_model_is_no_importance_matrix(demo_gguf: Path) -> None:
    with pytest.raises(ImatrixError, match=r"imatrix\.datasets is None, expected list"):
        read_imatrix(demo_gguf)


@pytest.mark.parametrize(("name", "data"), [("absent", None), ("empty", b""), ("text", b"What is 2 + 3?\n" * 9)])
def test_what_is_no_importance_matrix_is_named(name: str, data: bytes | None, tmp_path: Path) -> None:
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(ImatrixError, match=f"{name}: "):
        read_imatrix(tmp_path / name)


# Importance


def load_imatrix(sums: Floats, counts: Floats | int) -> Floats:
    """load_imatrix of llama.cpp's tools/quantize/quantize.cpp, line by line. An int is the ncall of a .dat."""
    flat = sums.reshape(-1)
    e = np.zeros(flat.size, np.float32)
    if not isinstance(counts, int):
        ne0 = flat.size // counts.size
        for j in range(counts.size):
            count = np.float32(counts[j])
            for i in range(ne0):
                e[j * ne0 + i] = flat[j * ne0 + i] / count if count > 0 else 1
    else:
        for i in range(flat.size):
            e[i] = flat[i] / np.float32(counts) if counts > 0 else flat[i]
    return e


def bits(values: Floats) -> npt.NDArray[np.uint32]:
    assert values.dtype == np.float32
    return np.ascontiguousarray(values).view(np.uint32).reshape(-1)


def test_flat_is_llama_quantizes_arithmetic() -> None:
    for name, e in made().entries.items():
        np.testing.assert_array_equal(
            bits(channel_importance(e, "flat")), bits(load_imatrix(e.sums, e.counts)), err_msg=name
        )


@pytest.mark.parametrize("n_call", [7, 0])
def test_flat_is_llama_quantizes_arithmetic_for_a_dat(n_call: int, tmp_path: Path) -> None:
    values = np.random.default_rng(0).lognormal(0, 2, (3, 8)).astype(np.float32)
    values[1] = n_call or 1  # unseen
    header = struct.pack("<ii24siI", 1, 24, B.name.encode(), n_call, values.size)
    found = read_imatrix(dat(tmp_path / "old.dat", header + values.tobytes())).entry_of(B.name, (3, 5, 8))
    assert found is not None
    assert found.counts.tolist() == [max(n_call, 1), 0, max(n_call, 1)]
    np.testing.assert_array_equal(bits(channel_importance(found, "flat")), bits(load_imatrix(values, n_call)))


def test_pooled_moves_an_expert_towards_the_layer_the_less_it_saw() -> None:
    rng = np.random.default_rng(0)
    e = entry(rng, [10_000, 0, 4], 8)
    pooled = e.sums.astype(np.float64).sum(axis=0) / 10_004
    expected = [(e.sums[i] + 16 * pooled) / (e.counts[i] + 16) for i in range(3)]
    found = channel_importance(e, "pooled", n0=16)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, np.array(expected).astype(np.float32))
    np.testing.assert_array_equal(found[1], pooled.astype(np.float32))


def test_channels_that_are_an_experts_own_take_only_the_level() -> None:
    e = replace(entry(np.random.default_rng(0), [10_000, 0, 4], 8), shared=False)
    level = (e.sums.astype(np.float64).sum(axis=0) / 10_004).mean()
    expected = [(e.sums[i] + 16 * level) / (e.counts[i] + 16) for i in range(3)]
    np.testing.assert_array_equal(channel_importance(e, "pooled", n0=16), np.array(expected).astype(np.float32))


def test_only_the_experts_down_projection_has_channels_of_its_own() -> None:
    for role, shared in (("ffn_down_exps", False), ("ffn_gate_exps", True), ("ffn_up_exps", True)):
        name = TensorName(f"blk.3.{role}.weight")
        found = replace(made(), entries={name: made().entries["blk.3.ffn_down_exps.weight"]}).entry_of(name, (6, 5, 32))
        assert found is not None
        assert found.shared is shared


def test_without_counts_only_unseen_experts_are_pooled(tmp_path: Path) -> None:
    found = read_imatrix(dat(tmp_path / "old.dat")).entry_of(B.name, B.shape)
    assert found is not None
    expected = np.array([[2 / 3, 1 / 3], [5 / 6, 8 / 6], [3 / 3, 7 / 3]])
    np.testing.assert_array_equal(channel_importance(found, "pooled"), expected.astype(np.float32))


@pytest.mark.parametrize("prior", ["flat", "pooled"])
def test_a_dense_tensor_has_its_mean_whatever_the_prior(prior: str) -> None:
    e = made().entries["blk.10.attn_q.weight"]
    np.testing.assert_array_equal(channel_importance(e, prior), e.sums / np.float32(1024))


# Bytes


@pytest.fixture(scope="module")
def trunk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense layer and one of four experts, in BF16: ggml takes seconds a million weights for the IQ types."""
    folder = tmp_path_factory.mktemp("trunk")
    checkpoint = write_checkpoint(folder / "trunk", Shape(n_layer=2, n_dense=1, n_expert=4, dense=256))
    assert main(["convert", str(checkpoint), str(folder / "bf16.gguf"), "--type", "BF16", "--quiet"]) == 0
    return folder / "bf16.gguf"


@pytest.fixture(scope="module")
def calibrated(trunk: Path, tmp_path_factory: pytest.TempPathFactory) -> Imatrix:
    """For every product of the trunk: one expert unseen, one thin. Through a file, as for a user."""
    rng = np.random.default_rng(1)
    entries = {}
    for name, tensor in tensors(trunk).items():
        if name.startswith("blk.") and len(tensor.shape) > 1:
            counts = [2048] if len(tensor.shape) == 2 else [511, 0, 1, 2048]
            entries[name] = entry(rng, counts, int(tensor.shape[0]))
    path = tmp_path_factory.mktemp("imatrix") / "made.gguf"
    write_imatrix(Imatrix(None, ("random",), 4, 512, entries), path)
    return read_imatrix(path)


def tensors(path: Path) -> dict[str, ReaderTensor]:
    return {tensor.name: tensor for tensor in GGUFReader(path).tensors}


@pytest.mark.parametrize("name", ["Q4_K_M", "IQ2_XS", "IQ3_XXS"])
def test_flat_gives_llama_quantizes_bytes(name: str, trunk: Path, calibrated: Imatrix, tmp_path: Path) -> None:
    theirs = {key: load_imatrix(e.sums, e.counts) for key, e in calibrated.entries.items()}
    llama_quantize(trunk, tmp_path / "theirs.gguf", name, imatrix=theirs)
    source, result = tensors(trunk), tensors(tmp_path / "theirs.gguf")
    seen = set()
    for key, e in calibrated.entries.items():
        kind, columns = result[key].tensor_type, e.sums.shape[1]
        if kind.name == "F32":
            continue  # the router
        experts = source[key].data.reshape(len(e.counts), -1, 2 * columns)  # BF16
        encoded = result[key].data.reshape(len(e.counts), -1, row_size(kind, columns))
        kernel = choose_kernel(kind, "ggml", weighted=True)
        for i, weights in enumerate(channel_importance(e, "flat")):
            some = np.ascontiguousarray(experts[i, :64])  # rows do not depend on each other
            rows, out = np.empty((len(some), columns), np.float32), np.empty_like(encoded[i, :64])
            decoder_for(BF16).decode(some, rows)
            kernel.encode(rows, out, weights)
            np.testing.assert_array_equal(out, encoded[i, :64], err_msg=f"{key} {i}")
        seen.add(kind.name)
    assert name.removesuffix("_M") in seen
