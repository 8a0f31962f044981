"""general.* as the model card says it, against gguf-py's Metadata on the same folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stepgguf.cli.main import main
from stepgguf.convert.card import ModelCard, read_card
from stepgguf.convert.sources.hub import ModelOrigin
from stepgguf.files import gguf_header

CARDS = {
    "published": """\
license: apache-2.0
library_name: transformers
base_model:
- stepfun-ai/Step-3.5-Flash-Base
pipeline_tag: text-generation
tags: [moe, "step3p5"]
language:
- en
- zh
""",
    "a merge": """\
license: other
license_name: step-license
license_link: LICENSE.md
base_model: [a/Merge-7B-v0.2, https://huggingface.co/b/Other-Model, https://example.org/x]
datasets: [open/data-set, plain]
author: Somebody
model_creator: Not this one
language: en
""",
    "licences": "license:\n- mit\n- apache-2.0\n",
    "llama.cpp's own keys": """\
model_name: Step Flash Mine
author: Me
organization: Us
description: A model, fine-tuned.
finetune: Mine
basename: Step
repo_url: https://example.org/repo
url: https://example.org/page
doi: 10.1/2
""",
    "nothing": "",
}


def folder(path: Path, card: str | None, **config: Any) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    if card is not None:
        (path / "README.md").write_text(f"---\n{card}---\n# Title\n\nText.\n---\n", encoding="utf-8")
    return path


def values(card: ModelCard) -> dict[str, Any]:
    return {"general.name": card.name, **{key.name: key.value for key in card.keys}}


def theirs(path: Path, dest: Path) -> dict[str, Any]:
    """What gguf-py writes for the folder."""
    writer = gguf.GGUFWriter(dest, "step35")
    gguf.Metadata.load(None, path).set_gguf_meta_model(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return {name: key.value for name, key in gguf_header.read(dest).keys.items()}


@pytest.mark.parametrize("name", CARDS)
def test_keys_and_values_are_gguf_pys_where_both_say_something(tmp_path: Path, name: str) -> None:
    path = folder(tmp_path / "Some-Model", CARDS[name])
    ours, expected = values(read_card(path, {}, ModelOrigin("Some-Model"))), theirs(path, tmp_path / "x.gguf")
    del expected["general.architecture"]
    # Guessed from the folder's name by splitting it at hyphens; the name itself, which they rewrite as a title.
    for key in ("general.basename", "general.finetune", "general.size_label", "general.version"):
        if key not in ours:
            expected.pop(key, None)
    if "model_name" not in CARDS[name]:
        assert (ours.pop("general.name"), expected.pop("general.name")) == ("Some-Model", "Some Model")
    if "general.source.repo_url" in ours:  # theirs has no general.repo_url
        assert ours.pop("general.repo_url") == ours["general.source.repo_url"]
    assert ours == expected


@pytest.mark.parametrize(
    ("loaded", "expected"),
    [
        ("stepfun-ai/Step-3.5-Flash", {"general.organization": "Stepfun Ai", "base": None}),
        ("stepfun-ai/Step-3.5-Flash-Base", {"general.organization": None, "base": "Step 3.5 Flash Base"}),
        ("/home/me/models/step", {"general.organization": None, "base": None}),
        (7, {"general.organization": None, "base": None}),
    ],
)
def test_name_or_path_is_the_model_itself_or_its_base(tmp_path: Path, loaded: Any, expected: dict[str, Any]) -> None:
    card = read_card(folder(tmp_path, None), {"_name_or_path": loaded}, ModelOrigin("step-3.5-flash"))
    assert values(card).get("general.organization") == expected["general.organization"]
    assert values(card).get("general.base_model.0.name") == expected["base"]


def test_scalars_are_texts_as_they_are_written(tmp_path: Path) -> None:
    path = folder(
        tmp_path, "version: 1.10\nlanguage: [no, en, on]\nlicense: null\ntags: [2024-01-01, 1e3, {a: b}, ~, '']\n"
    )
    assert values(read_card(path, {}, ModelOrigin("x"))) == {
        "general.name": "x",
        "general.version": "1.10",
        "general.languages": ["no", "en", "on"],
        "general.tags": ["2024-01-01", "1e3"],
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    "card",
    ["license: [\n", "a: b: c\n", "\t- x\n", "x: !!python/object/apply:os.system [ls]\n", "[" * 3000, "- a\n- b\n",
     "a: &a [x]\nb: *c\n", "'\n", "license: \x00\n", "tags:\n- &a [1]\n- *a\nlicense: {a: 1}\n"],
)  # fmt: skip
def test_a_card_that_is_wrong_is_a_warning_or_nothing(tmp_path: Path, card: str) -> None:
    found = read_card(folder(tmp_path, card), {}, ModelOrigin("x"))
    assert set(values(found)) <= {"general.name", "general.tags"}
    assert all("README.md: its front matter cannot be read" in warning for warning in found.warnings)


@given(st.text(max_size=200) | st.binary(max_size=200))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_card_stops_a_conversion(tmp_path: Path, card: str | bytes) -> None:
    path = folder(tmp_path, None)
    data = card.encode("utf-8", "surrogatepass") if isinstance(card, str) else card
    (path / "README.md").write_bytes(b"---\n" + data + b"\n---\n")
    assert read_card(path, {}, ModelOrigin("x")).name


@pytest.mark.slow
def test_the_card_is_in_the_file_and_name_wins(small: Path, tmp_path: Path) -> None:
    import shutil

    source = Path(shutil.copytree(small, tmp_path / "Mine"))
    folder(source, "license: mit\nmodel_name: From The Card\n", **json.loads((source / "config.json").read_text()))
    for options, name in (((), "From The Card"), (("--name", "given"), "given")):
        assert (
            main(["convert", str(source), str(tmp_path / "x.gguf"), "-t", "Q8_0", "-q", "--overwrite", *options]) == 0
        )
        reader = gguf.GGUFReader(tmp_path / "x.gguf")
        assert reader.fields["general.name"].contents() == name
        assert reader.fields["general.license"].contents() == "mit"
