"""What is in the files: metadata, MTP, splits, templates; and what verify and inspect make of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import pytest

from stepgguf import __version__
from stepgguf.cli.main import main
from stepgguf.convert.metadata import RESERVE
from stepgguf.convert.plan import Options
from stepgguf.convert.planner import plan_source
from stepgguf.convert.sources.checkpoint import Checkpoint
from stepgguf.demo import CHECKPOINT
from stepgguf.errors import BadConfig
from stepgguf.files import gguf_header
from stepgguf.model.hparams import HParams
from stepgguf.model.rope import rope_freqs
from stepgguf.quants.recipe_files import load_recipe
from stepgguf.reference.model import rope_scaling_factors
from tests.conftest import real_config

EVERYTHING = "{% for message in messages %}{{ message.content }}{% endfor %}"


def convert(source: Path, dest: Path, *options: str) -> gguf_header.Header:
    assert main(["convert", str(source), str(dest), "-q", *options]) == 0
    return gguf_header.read(dest) if dest.is_file() else gguf_header.read(sorted(dest.parent.glob("*.gguf"))[0])


@pytest.fixture(scope="module")
def q4(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("q4") / "q4.gguf"
    convert(small, path, "-t", "Q4_K_M")
    return path


@pytest.fixture
def copy(q4: Path, tmp_path: Path) -> Path:
    for path in q4.parent.iterdir():
        shutil.copy(path, tmp_path)
    return tmp_path / q4.name


# metadata -------------------------------------------------------------------------------------------------------

STEPFUN_KEYS = """block_count context_length embedding_length feed_forward_length attention.head_count rope.freq_base
rope.freq_base_swa expert_gating_func attention.key_length attention.value_length attention.head_count_kv
attention.sliding_window attention.sliding_window_pattern expert_count expert_used_count expert_feed_forward_length
expert_shared_feed_forward_length expert_weights_scale expert_weights_norm leading_dense_block_count moe_every_n_layers
attention.layer_norm_rms_epsilon swiglu_clamp_exp swiglu_clamp_shexp""".split()


def test_keys_and_their_order_are_those_of_stepfuns_files(q4: Path) -> None:
    keys = [key.removeprefix("step35.") for key in gguf_header.read(q4).keys if key.startswith("step35.")]
    assert keys == [*STEPFUN_KEYS, "nextn_predict_layers"]


def test_values_that_engines_need(q4: Path, small: Path) -> None:
    header = gguf_header.read(q4)
    config = json.loads((small / "config.json").read_text())
    assert header.get("step35.block_count") == 8
    assert header.get("step35.attention.head_count") == [8, 12, 12, 12, 8, 12, 12, 12]
    assert header.get("step35.attention.sliding_window_pattern") == [i % 4 != 0 for i in range(5)] + [True, True, True]
    assert "step35.rope.dimension_count" not in header.keys
    eos = config["eos_token_id"]
    ends = [header.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    assert sorted(ends) == sorted([eos[0], eos[1], header.get("tokenizer.ggml.eos_token_id")])
    assert header.get("tokenizer.ggml.pre") == "deepseek-v3"
    assert header.get("tokenizer.chat_template") == (small / "chat_template.jinja").read_text()
    assert header.get("general.sampling.temp") == 1.0
    assert header.get("general.sampling.top_k") == 40
    assert header.get("general.file_type") == int(gguf.LlamaFileType.MOSTLY_Q4_K_M)
    assert header.get("stepgguf.version") == __version__
    assert header.get("stepgguf.type") == "Q4_K_M"
    assert header.get("general.architecture") == "step35"


def test_end_tokens_that_a_gguf_has_no_room_for_are_named(
    small: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(small, tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "eos_token_id": [1, 2, 5]}))
    header = convert(copy, tmp_path / "x.gguf", "-t", "Q8_0")
    assert header.get("tokenizer.ggml.eos_token_id") not in (1, 2, 5)  # tokenizer_config.json names another
    text = "config.json and tokenizer_config.json name 4 end tokens, of which a GGUF has room for 3: 5 is not recorded"
    assert text in capfd.readouterr().err


def test_generation_config_overrides_the_recommended_sampling(small: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(small, tmp_path / "copy"))
    (copy / "generation_config.json").write_text('{"temperature": 0.5, "top_k": 7}')
    header = convert(copy, tmp_path / "x.gguf", "-t", "Q8_0")
    assert header.get("general.sampling.temp") == 0.5
    assert header.get("general.sampling.top_k") == 7


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        (
            "generation_config.json",
            {"temperature": 1e10},
            "temperature is 10000000000.0, expected a number from 0 to 100",
        ),
        ("generation_config.json", {"top_k": 1e10}, r"top_k is 10000000000\.0, expected an integer from -1"),
        ("generation_config.json", {"top_k": 10**10}, "top_k is 10000000000, expected an integer"),
        ("generation_config.json", {"top_p": "0.9"}, r"top_p is '0\.9', expected a number"),
        ("generation_config.json", {"min_p": True}, "min_p is True, expected a number"),
        ("generation_config.json", [], "the document is a list of 0, expected a JSON object"),
        ("tokenizer_config.json", {"eos_token": 7}, "eos_token is 7, expected a text"),
        ("tokenizer_config.json", {"eos_token": {"text": "x"}}, "key 'content' is missing in eos_token"),
        ("chat_template.json", {"chat_template": 7}, "chat_template is 7, expected a list"),
        ("chat_template.json", {"chat_template": [{"name": 1}]}, r"chat_template\[0\]\.name is 1, expected a text"),
    ],
)
def test_strange_settings_are_named_with_file_and_place(
    small: Path, tmp_path: Path, name: str, content: Any, text: str
) -> None:
    copy = Path(shutil.copytree(small, tmp_path / "copy"))
    (copy / "chat_template.jinja").unlink()
    (copy / name).write_text(json.dumps(content))
    with Checkpoint(copy) as checkpoint, pytest.raises(BadConfig, match=rf"copy/{name}: {text}"):
        plan_source(checkpoint, tmp_path / "x.gguf", Options(load_recipe("Q8_0")))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["chat_template.jinja", "chat_template.json", "tokenizer_config.json", "named"])
def test_the_chat_template_may_be_in_any_of_three_files(small: Path, tmp_path: Path, name: str) -> None:
    copy = Path(shutil.copytree(small, tmp_path / "copy"))
    text = (copy / "chat_template.jinja").read_text()
    (copy / "chat_template.jinja").unlink()
    several = [{"name": "rag", "template": "no"}, {"name": "default", "template": text}]
    content = {"chat_template": several if name == "named" else text}
    name = "tokenizer_config.json" if name == "named" else name
    (copy / name).write_text(text if name.endswith(".jinja") else json.dumps(content))
    assert convert(copy, tmp_path / "x.gguf", "-t", "Q8_0").get("tokenizer.chat_template") == text


def test_rope_freqs_are_the_reference_models_factors() -> None:
    hp = HParams.from_config(real_config())
    assert hp.rope_scaling is not None
    data = np.frombuffer(rope_freqs(hp) or b"", np.float32)
    import torch

    freqs = 1.0 / hp.rope_theta_full ** (torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    expected = rope_scaling_factors(freqs, hp.rope_scaling).numpy()
    assert data.shape == (64,)
    np.testing.assert_allclose(data[:32], expected, rtol=3e-6)  # float32 powers of theta: 2e-6 in the exponent's range
    assert (data[32:] == 1.0).all()
    assert data[0] == 1.0
    assert data[31] == 2.0


@pytest.mark.slow
def test_norms_are_stored_plus_one_in_float32(small: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    convert(small, tmp_path / "x.gguf", "-t", "Q8_0")
    stored = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "x.gguf").tensors}
    state = {k: v for shard in small.glob("*.safetensors") for k, v in load_file(shard).items()}
    for source, name in (
        ("model.norm.weight", "output_norm.weight"),
        ("model.layers.3.self_attn.q_norm.weight", "blk.3.attn_q_norm.weight"),
        ("model.layers.6.hnorm.weight", "blk.6.nextn.hnorm.weight"),
        ("model.layers.7.transformer.shared_head.norm.weight", "blk.7.nextn.shared_head_norm.weight"),
    ):
        np.testing.assert_array_equal(stored[name], state[source].float().numpy() + np.float32(1))


# MTP ------------------------------------------------------------------------------------------------------------


def loads(path: Path) -> int:
    """llama.cpp loads the file; returns its number of MTP layers."""
    params = llama_cpp.llama_model_default_params()
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
    assert model, path
    n = llama_cpp.llama_model_n_layer_nextn(model)
    llama_cpp.llama_model_free(model)
    return int(n)


def test_mtp_included_is_one_file_that_llama_cpp_loads(q4: Path) -> None:
    header = gguf_header.read(q4)
    nextn = [t for t in header.tensors if ".nextn." in t.name]
    assert len(nextn) == 15
    assert {t.ggml_type.name for t in nextn} == {"Q8_0", "F32"}
    assert loads(q4) == 3


@pytest.mark.slow
def test_mtp_dropped(small: Path, tmp_path: Path) -> None:
    header = convert(small, tmp_path / "x.gguf", "-t", "Q4_K_M", "--mtp", "drop")
    assert header.get("step35.block_count") == 5
    assert "step35.nextn_predict_layers" not in header.keys
    assert not [t for t in header.tensors if ".nextn." in t.name or t.name.startswith("blk.5")]
    assert loads(tmp_path / "x.gguf") == 0


def test_mtp_separate_is_laid_out_like_stepfuns_mtp_file(small: Path, q4: Path, tmp_path: Path) -> None:
    main(["convert", str(small), str(tmp_path / "x.gguf"), "-q", "-t", "Q4_K_M", "--mtp", "separate"])
    trunk, mtp = (gguf_header.read(tmp_path / name) for name in ("x.gguf", "mtp-x.gguf"))
    assert trunk.get("step35.block_count") == 5
    assert mtp.get("step35.block_count") == 8
    assert mtp.get("step35.nextn_predict_layers") == 3
    assert mtp.get("general.file_type") == int(gguf.LlamaFileType.MOSTLY_Q8_0)
    shared = {"token_embd.weight", "output.weight", "output_norm.weight", "rope_freqs.weight"}
    names = {t.name: t.ggml_type.name for t in mtp.tensors}
    assert shared <= names.keys()
    assert all(n in shared or n.startswith(("blk.5.", "blk.6.", "blk.7.")) for n in names)
    assert set(names.values()) == {"Q8_0", "F32"}
    assert {t.name for t in trunk.tensors} | set(names) == {t.name for t in gguf_header.read(q4).tensors}
    assert loads(tmp_path / "x.gguf") == 0


@pytest.mark.slow
@pytest.mark.parametrize("type_name", ["BF16", "Q6_K"])
def test_mtp_type(small: Path, tmp_path: Path, type_name: str) -> None:
    header = convert(small, tmp_path / "x.gguf", "-t", "Q4_K_M", "--mtp-type", type_name)
    assert {t.ggml_type.name for t in header.tensors if ".nextn." in t.name} == {type_name, "F32"}


def test_unquantized_files_keep_mtp_unquantized(small: Path, tmp_path: Path) -> None:
    header = convert(small, tmp_path / "x.gguf", "-t", "BF16")
    assert {t.ggml_type.name for t in header.tensors} == {"BF16", "F32"}


# splits ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_splits_are_named_and_loaded_as_llama_cpps(small: Path, tmp_path: Path) -> None:
    main(["convert", str(small), str(tmp_path / "x.gguf"), "-q", "-t", "Q8_0", "--split-max-size", "2M"])
    files = sorted(p.name for p in tmp_path.glob("*.gguf"))
    n = len(files)
    assert n > 3
    assert files == [f"x-{i + 1:05d}-of-{n:05d}.gguf" for i in range(n)]
    assert all((tmp_path / name).stat().st_size < 2_100_000 for name in files[1:])
    assert loads(tmp_path / files[0]) == 3
    assert main(["verify", str(tmp_path / files[2]), "-q"]) == 0


def test_a_split_smaller_than_a_tensor_is_refused(
    small: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(small), str(tmp_path / "x.gguf"), "-t", "Q8_0", "--split-max-size", "10K"]) == 1
    assert "--split-max-size 10,000: output.weight alone has 208,896 bytes" in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


# verify, inspect, template --------------------------------------------------------------------------------------


def flip(path: Path, tensor: str, row: int) -> None:
    header = gguf_header.read(path)
    info = next(t for t in header.tensors if t.name == tensor)
    at = header.data_start + info.offset + row * (info.n_bytes // (info.n_values // info.shape[-1]))
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 4]))


def test_verify_passes_on_what_was_written(copy: Path, small: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(copy)]) == 0
    assert "compared: no differences" in capfd.readouterr().err
    assert main(["verify", str(copy), "--against", str(small), "--all", "--json", "-q"]) == 0
    report = json.loads(capfd.readouterr().out)
    assert report["ok"] is True
    assert report["tensors"] == 130


def test_verify_names_the_damaged_expert(copy: Path, small: Path, capfd: pytest.CaptureFixture[str]) -> None:
    flip(copy, "blk.3.ffn_down_exps.weight", 4 * 256 + 30)
    assert main(["verify", str(copy), "-q"]) == 1
    assert "blk.3.ffn_down_exps.weight expert 4 rows 0-255 differs from the manifest" in capfd.readouterr().err
    assert main(["verify", str(copy), "--against", str(small), "--all", "-q"]) == 1
    err = capfd.readouterr().err
    assert "blk.3.ffn_down_exps.weight expert 4 rows 0-255 is not what the source gives" in err


def test_verify_notices_a_changed_header(copy: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with copy.open("r+b") as file:
        data = file.read()
        file.seek(data.index(b"deepseek-v3"))
        file.write(b"deepseek-v4")
    assert main(["verify", str(copy), "-q"]) == 1
    assert "the header (metadata or tensor list) is not the one that was written" in capfd.readouterr().err


def test_verify_against_another_checkpoint_fails(copy: Path, small_fp8: Path) -> None:
    assert main(["verify", str(copy), "--against", str(small_fp8), "--all", "-q"]) == 1


@pytest.mark.slow
def test_verify_against_a_gguf(copy: Path, small: Path, tmp_path: Path) -> None:
    convert(small, tmp_path / "bf16.gguf", "-t", "BF16")
    assert main(["verify", str(copy), "--against", str(tmp_path / "bf16.gguf"), "--all", "-q"]) == 0


def test_verify_without_a_manifest_says_what_to_do(copy: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Path(f"{copy}.manifest.json").unlink()
    assert main(["verify", str(copy)]) == 1
    assert "--against" in capfd.readouterr().err


@pytest.mark.parametrize("target", ["gguf", "checkpoint"])
def test_inspect_as_text_and_json(q4: Path, small: Path, target: str, capfd: pytest.CaptureFixture[str]) -> None:
    path = q4 if target == "gguf" else small
    assert main(["inspect", str(path)]) == 0
    text = capfd.readouterr().out
    assert ("blk.2-4 ffn_gate_exps           3x  Q4_K" if target == "gguf" else "blk.2-4 ffn_gate_exps") in text
    assert main(["inspect", str(path), "--json"]) == 0
    report = json.loads(capfd.readouterr().out)
    assert report["tensors"] == (130 if target == "gguf" else 129)
    assert sum(line["bytes"] for line in report["folded"]) == report["bytes"]


@pytest.mark.slow
def test_a_new_template_moves_no_data_and_keeps_the_file_whole(
    copy: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = gguf_header.read(copy)
    data = copy.read_bytes()[before.data_start :]
    new = tmp_path / "new.jinja"
    for text in (EVERYTHING, EVERYTHING + "x" * 15000, EVERYTHING + "{{ bos_token }}"):
        new.write_text(text)
        assert main(["template", str(copy), str(new)]) == 0
        after = gguf_header.read(copy)
        assert after.data_start == before.data_start
        assert after.get("tokenizer.chat_template") == text
        assert after.tensors == before.tensors
        assert copy.read_bytes()[after.data_start :] == data
        assert main(["verify", str(copy), "-q"]) == 0
    capfd.readouterr()
    assert main(["template", str(copy)]) == 0
    assert capfd.readouterr().out == EVERYTHING + "{{ bos_token }}"
    assert loads(copy) == 3
    assert main(["template", str(copy), "--restore"]) == 0
    after = gguf_header.read(copy)
    kept = before.keys.keys() - {RESERVE}
    assert {k: after.keys[k] for k in after.keys.keys() - {RESERVE}} == {k: before.keys[k] for k in kept}
    assert copy.read_bytes()[after.data_start :] == data
    assert main(["verify", str(copy), "-q"]) == 0
    assert main(["template", str(copy), "--restore"]) == 1
    assert "has the chat template that it was made with" in capfd.readouterr().err


def test_a_template_that_does_not_fit_is_put_in_by_a_copy(copy: Path, tmp_path: Path) -> None:
    before = gguf_header.read(copy)
    data = copy.read_bytes()[before.data_start :]
    (tmp_path / "new.jinja").write_text(EVERYTHING + "y" * 100_000)
    assert main(["template", str(copy), str(tmp_path / "new.jinja")]) == 0
    after = gguf_header.read(copy)
    assert after.get("tokenizer.chat_template") == EVERYTHING + "y" * 100_000
    assert len(after.get(RESERVE)) == 16384
    assert copy.read_bytes()[after.data_start :] == data
    assert main(["verify", str(copy), "-q"]) == 0
    assert not list(tmp_path.glob("*.part"))


def test_a_crash_between_the_two_headers_is_mended(copy: Path, tmp_path: Path) -> None:
    header = gguf_header.read(copy)
    whole = copy.read_bytes()
    Path(f"{copy}.header").write_bytes(whole[: header.data_start])
    with copy.open("r+b") as file:  # half of a new header is there
        file.write(b"\0" * 1000)
    (tmp_path / "new.jinja").write_text(EVERYTHING)
    assert main(["template", str(copy), str(tmp_path / "new.jinja")]) == 0
    assert gguf_header.read(copy).get("tokenizer.chat_template") == EVERYTHING
    assert main(["verify", str(copy), "-q"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("template", "message"),
    [
        (b"{% if %}", "does not compile"),
        (b"hello", "does not use `messages`"),
        (b"{{ raise_exception('not for tools') }}", "not for tools"),
        (b"{{ 'a' * 10**11 }}", "memory"),
        (b"\xff\xfe\x00", "not UTF-8 text"),
        (None, "No such file"),
    ],
)
def test_a_template_that_cannot_work_is_refused(
    copy: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], template: bytes | None, message: str
) -> None:
    before, new = copy.read_bytes(), tmp_path / "new.jinja"
    if template is not None:
        new.write_bytes(template)
        assert main(["convert", str(CHECKPOINT), str(tmp_path / "x.gguf"), "-q", "--chat-template", str(new)]) == 1
        assert message in capfd.readouterr().err
        assert not (tmp_path / "x.gguf").exists()
    assert main(["template", str(copy), str(new)]) == 1
    assert message in capfd.readouterr().err
    assert copy.read_bytes() == before


@pytest.mark.slow
def test_a_checkpoint_whose_template_cannot_work_is_refused(
    small: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = shutil.copytree(small, tmp_path / "source")
    (source / "chat_template.jinja").write_text("hello")
    assert main(["convert", str(source), str(tmp_path / "x.gguf"), "-q"]) == 1
    assert "does not use `messages`" in capfd.readouterr().err
    assert not (tmp_path / "x.gguf").exists()
    good = ["--chat-template", str(small / "chat_template.jinja")]
    assert main(["convert", str(source), str(tmp_path / "x.gguf"), "-q", *good]) == 0
