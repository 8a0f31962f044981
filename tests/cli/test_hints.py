"""Hints that can be followed: names from elsewhere are understood, or answered with what to write here."""

from __future__ import annotations

import json
import re
import shlex
from importlib import metadata
from pathlib import Path

import pytest
import typer

from stepgguf.cli import llama_cpp_spellings
from stepgguf.cli.main import app, main
from stepgguf.demo import CHECKPOINT
from stepgguf.files import gguf_header, installed


def said(capfd: pytest.CaptureFixture[str]) -> str:
    return " ".join(capfd.readouterr().err.split())


@pytest.fixture(scope="module")
def bf16(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hints") / "bf16.gguf"
    assert main(["convert", str(small), str(path), "-t", "BF16", "-q"]) == 0
    return path


# types ----------------------------------------------------------------------------------------------------------

FOUR = "Q4_0 Q4_1 Q4_K_S Q4_K_M".split()
NEAR = {
    **dict.fromkeys(("q4", "Q4_K_XL", "UD-Q4_K_XL", "Q4_K", "ud-q4_k_xl"), FOUR),
    **{name: [*FOUR, "IQ4_XS"] for name in "4bit 4-bit int4 INT4 fp4 nvfp4 w4a16 4".split()},
    "4 bits": [*FOUR, "IQ4_XS"],
    "iq3": ["IQ3_XXS", "IQ3_S"],
    "fp8": ["Q8_0"],
    "int8": ["Q8_0"],
    "half": ["F16", "BF16"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NEAR)
@pytest.mark.parametrize("command", ["convert", "quantize", "plan"])
def test_a_name_from_elsewhere_lists_types_that_come_near_with_their_sizes(
    command: str, name: str, small: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--types", name] if command == "plan" else ["x.gguf", "-t", name]
    assert main([command, str(small), *arguments]) == 1
    text = said(capfd)
    for near in NEAR[name]:
        assert re.search(rf"\b{near} [\d.]+ MiB", text), text


SLIPS = {"q4-k-m": "Q4_K_M", "Q4KM": "Q4_K_M", "fp16": "F16", "bf-16": "BF16", "IQ4XS": "IQ4_XS", "q5_k_n": r"Q5_K_\w"}


@pytest.mark.parametrize("name", SLIPS)
def test_a_slip_gets_the_type_that_is_spelled_like_it(
    name: str, small: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(small), "x.gguf", "-t", name]) == 1
    assert re.search(rf"; did you mean {SLIPS[name]}\?", said(capfd))


BUDGETS = {
    "100gb": "--fit 100GB",
    "100 GiB": "--fit 100GiB",
    "7.5G": "--fit 7.5GB",
    "4.25bpw": "--target-bpw 4.25",
    "4.25 BPW": "--target-bpw 4.25",
    "4.25": "--target-bpw 4.25",
    "3bpw": "--target-bpw 3",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BUDGETS)
def test_a_size_or_a_rate_names_its_option(name: str, small: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(small), "x.gguf", "-t", name]) == 1
    assert f"{BUDGETS[name]}." in said(capfd)


def test_a_recipe_is_found_whatever_its_case(capfd: pytest.CaptureFixture[str]) -> None:
    for name in ("128gb", "128GB"):
        assert main(["recipes", name]) == 0
        assert '"ffn_{gate' in capfd.readouterr().out


# llama.cpp's habits ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("rest", [["Q5_K_M"], ["q5_k_m", "2"], ["Q5_K_M", "0"], ["Q5_K_M", "1", "-t", "Q5_K_M"]])
def test_llama_quantizes_arguments_are_understood(rest: list[str], bf16: Path, tmp_path: Path) -> None:
    assert main(["quantize", str(bf16), str(tmp_path / "x.gguf"), *rest, "-q"]) == 0
    assert gguf_header.read(tmp_path / "x.gguf").get("stepgguf.type") == "Q5_K_M"


def test_two_types_are_one_too_many(bf16: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["quantize", str(bf16), "x.gguf", "Q5_K_M", "-t", "Q4_K_M"]) == 2
    assert "give one type" in said(capfd)


def test_without_a_name_for_the_file_the_whole_command_is_said(bf16: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["quantize", str(bf16), "Q4_K_M"]) == 1
    assert f"stepgguf quantize {bf16} bf16-Q4_K_M.gguf --type Q4_K_M" in said(capfd)


@pytest.mark.parametrize(
    ("arguments", "ours"),
    [
        (["convert", "a", "--outfile", "b.gguf", "--outtype", "q8_0"], "DEST"),
        (["convert", "a", "b.gguf", "--outtype=q8_0"], "--type"),
        (["quantize", "a", "b.gguf", "--token-embedding-type", "q8_0"], "recipe"),
        (["quantize", "--pure", "a", "b.gguf", "Q4_K_M"], "recipe"),
        (["convert", "a", "b.gguf", "--model-name", "x"], "--name"),
        (["convert", "a", "-o", "b.gguf"], "DEST"),
        (["chat", "a.gguf", "-ctk", "q8_0"], "--cache-type-k"),
        (["serve", "a.gguf", "--ctx-size=4096"], "--ctx N"),
    ],
)
def test_other_tools_options_are_answered_with_ours(
    arguments: list[str], ours: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    text = said(capfd)
    assert "is an option of llama.cpp's tools" in text
    assert ours in text.partition("hint:")[2]


@pytest.mark.parametrize("command", llama_cpp_spellings.OPTIONS)
def test_what_is_to_be_written_instead_is_an_option_of_the_command(command: str) -> None:
    named = set(re.findall(r"--[a-z-]+", " ".join(llama_cpp_spellings.OPTIONS[command].values())))
    parameters = typer.main.get_group(app).commands[command].params
    assert named <= {option for parameter in parameters for option in parameter.opts}


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        (["convert", "a.gguf"], "stepgguf quantize a.gguf DEST.gguf --type Q4_K_S"),
        (["convert", "a.gguf", "--dry-run"], "stepgguf quantize a.gguf DEST.gguf --type Q4_K_S"),
        (["convert", "a b", "c.gguf", "Q4_K_M", "-q"], "stepgguf convert 'a b' c.gguf --type Q4_K_M"),
    ],
)
def test_arguments_where_other_tools_have_them_are_answered_with_the_command(
    arguments: list[str], command: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert command in said(capfd).partition("hint:")[2]


def test_an_empty_type_is_not_the_default(bf16: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(bf16.parent), str(tmp_path / "x.gguf"), "--type", "", "--dry-run"]) == 1
    assert "unknown type or recipe ''" in said(capfd)


@pytest.mark.slow
def test_commands_in_hints_hold_names_with_spaces(
    bf16: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    spaced = tmp_path / "my model.gguf"
    spaced.write_bytes(bf16.read_bytes())
    for arguments in (["quantize", str(spaced), "Q4_K_M"], ["convert", str(spaced), "x.gguf"]):
        assert main(arguments) == 1
        assert f"stepgguf quantize '{spaced}' " in said(capfd)
    assert main(["convert", str(CHECKPOINT), str(tmp_path / "no folder" / "x.gguf"), "-q"]) == 1
    assert f"mkdir -p '{tmp_path / 'no folder'}'" in said(capfd)


def test_a_gguf_is_not_converted_but_quantized(bf16: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(bf16), "x.gguf", "-t", "Q8_0"]) == 1
    assert f"stepgguf quantize {bf16}" in said(capfd)


def test_what_convert_says_last_is_a_command_that_works(
    small: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "with a space.gguf"
    assert main(["convert", str(small), str(path), "-t", "Q8_0"]) == 0
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("next: stepgguf chat ")
    assert Path(shlex.split(last)[-1]) == path


# installation ---------------------------------------------------------------------------------------------------


def distribution(folder: Path, origin: dict[str, object] | None) -> metadata.Distribution:
    info = folder / "stepgguf-1.dist-info"
    info.mkdir()
    requires = ["numpy>=1", "jinja2>=3 ; extra == 'run'", "torch>=2; extra == 'reference'", 'uvicorn; extra == "run"']
    (info / "METADATA").write_text("\n".join(["Name: stepgguf", *(f"Requires-Dist: {r}" for r in requires)]) + "\n")
    if origin is not None:
        (info / "direct_url.json").write_text(json.dumps(origin))
    return metadata.Distribution.at(info)


@pytest.mark.parametrize(
    ("origin", "command"),
    [
        ({"url": "file://HERE", "dir_info": {"editable": True}}, "install -e 'HERE[run]'"),
        ({"url": "file://HERE", "dir_info": {}}, "install 'HERE[run]'"),
        ({"url": "file://HERE/stepgguf-1.dist-info/METADATA", "archive_info": {}},
         "install 'HERE/stepgguf-1.dist-info/METADATA[run]'"),
        ({"url": "https://example.org/x.git", "vcs_info": {"vcs": "git"}},
         "install 'stepgguf[run] @ git+https://example.org/x.git'"),
        ({"url": "https://example.org/x.whl", "archive_info": {}}, "install 'stepgguf[run] @ https://example.org/x.whl'"),
        ({"url": "file:///gone/x.whl", "archive_info": {}}, "install 'jinja2>=3' 'uvicorn'"),
        (None, "install 'jinja2>=3' 'uvicorn'"),
    ],
)  # fmt: skip
def test_an_extra_is_installed_from_where_the_package_came(
    origin: dict[str, object] | None, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(installed, "_CHECKOUT", tmp_path / "no checkout")
    here = json.loads(json.dumps(origin).replace("HERE", str(tmp_path)))
    found = installed.extra_command("run", distribution(tmp_path, here))
    assert found.endswith(command.replace("HERE", str(tmp_path)))


def test_no_hint_names_the_package_as_if_it_were_on_an_index() -> None:
    package = Path(installed.__file__).parents[1]
    for path in package.rglob("*.py"):
        assert "pip install 'stepgguf" not in path.read_text(), path
