"""The model card against those who read one: huggingface_hub's metadata, a Markdown parser."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFValueType
from huggingface_hub import ModelCard
from huggingface_hub.repocard import metadata_load
from markdown_it import MarkdownIt

from stepgguf.convert.manifest import manifest_path
from stepgguf.errors import EvaluationError
from stepgguf.files import gguf_header
from stepgguf.files.gguf_header import Key
from stepgguf.report.card import CardData, read_card_data
from stepgguf.report.card_text import render_card
from tests.conftest import real_config
from tests.generate import Shape, config
from tests.report import synthetic
from tests.report.test_frontier import result
from tests.report.test_frontier import write as write_results

MODEL = config(Shape(n_mtp=1))
EVERYTHING: dict[str, Any] = {
    "general.license": "apache-2.0",
    "general.organization": "StepFun",
    "general.source.repo_url": "https://huggingface.co/stepfun-ai/Step-3.5-Flash",
    "general.languages": ["en", "zh", "no"],
    "general.tags": ["moe", "text-generation", "gguf"],
    "general.quantized_by": "stepgguf 0.4.0",
    "stepgguf.calibration": "default, 131072 tokens",
}
# What might end a line, a cell, a block or the front matter, or be read as markup.
HOSTILE = (
    "a\n---\nlicense: mit\n| x | [y](javascript:z) <script>alert(1)</script> `b` ``` \x1b[2J\u202e "
    "https://evil.example &lt; 'q' \"r\""
)


def with_keys(path: Path, keys: dict[str, Any]) -> Path:
    """A synthetic file, some keys of which are replaced or added; its manifest is as before."""
    old = gguf_header.read(path)
    given = {
        name: Key.of(name, value, GGUFValueType.ARRAY, GGUFValueType.STRING)
        if isinstance(value, list)
        else Key.of(name, value, GGUFValueType.STRING)
        for name, value in keys.items()
    }
    header = gguf_header.encode({**old.keys, **given}.values(), old.tensors)
    data = path.read_bytes()[old.data_start :]
    path.write_bytes(header + data)
    return path


@pytest.fixture
def made(tmp_path: Path) -> Callable[..., Path]:
    def make(name: str = "step-q4_k_m.gguf", **keys: Any) -> Path:
        path = synthetic.write(tmp_path / name, MODEL, "Q4_K_M").path
        return with_keys(path, {key.replace("__", "."): value for key, value in keys.items()} or EVERYTHING)

    return make


def render(data: CardData) -> str:
    return render_card(data, {path: "0" * 64 for file in data.files for path in file.measured.paths})


def metadata(folder: Path, text: str) -> dict[str, Any]:
    """The front matter as huggingface_hub reads it, by both of its ways."""
    page = folder / "card.md"
    page.write_text(text)
    found = metadata_load(page)
    assert found is not None
    assert ModelCard(text).data.to_dict() == found
    return found


def tables(text: str) -> list[list[list[str]]]:
    """The cells of each table, as a Markdown parser finds them: the text that is shown."""
    found: list[list[list[str]]] = []
    for token in MarkdownIt("commonmark", {"linkify": False}).enable("table").parse(body(text)):
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            found[-1].append([])
        elif token.type == "inline" and found and token.level == 4:
            found[-1][-1].append("".join(child.content for child in token.children or ()))
    return found


def blocks(text: str) -> list[str]:
    return [token.content for token in MarkdownIt("commonmark").parse(body(text)) if token.type == "fence"]


def body(text: str) -> str:
    return text.split("\n---\n", 1)[1]


def test_the_front_matter_says_what_the_files_say(made: Callable[..., Path], tmp_path: Path) -> None:
    found = metadata(tmp_path, render(read_card_data([made()])))
    assert found == {
        "base_model": "stepfun-ai/Step-3.5-Flash",
        "base_model_relation": "quantized",
        "license": "apache-2.0",
        "language": ["en", "zh", "no"],
        "library_name": "gguf",
        "pipeline_tag": "text-generation",
        "quantized_by": "stepgguf 0.4.0",
        "tags": ["gguf", "step3p5", "imatrix", "moe"],
    }


def test_what_is_not_known_is_left_out_and_what_is_given_is_in(made: Callable[..., Path], tmp_path: Path) -> None:
    path = made(general__license="other", general__license__name="step", general__license__link="LICENSE.md")
    found = metadata(tmp_path, render(read_card_data([path])))
    assert found.keys() == {
        "license", "license_name", "license_link", "library_name", "pipeline_tag", "tags"
    }  # fmt: skip
    assert found["license_link"] == "LICENSE.md"
    text = render(read_card_data([path], repo="me/Step-GGUF", source="stepfun-ai/Step-3.5-Flash"))
    found = metadata(tmp_path, text)
    assert (found["base_model"], found["quantized_by"]) == ("stepfun-ai/Step-3.5-Flash", "me")
    assert found["license_link"] == "https://huggingface.co/stepfun-ai/Step-3.5-Flash/blob/main/LICENSE.md"
    assert "hf download me/Step-GGUF step-q4_k_m.gguf --local-dir ." in text


@pytest.mark.parametrize(
    "key",
    ["general.name", "general.license", "general.license.name", "general.license.link", "general.organization",
     "general.quantized_by", "stepgguf.type", "stepgguf.source", "stepgguf.calibration", "general.source.repo_url",
     "general.tags", "general.languages"],
)  # fmt: skip
def test_what_a_hostile_file_says_changes_neither_front_matter_nor_tables(
    made: Callable[..., Path], tmp_path: Path, key: str
) -> None:
    plain = render(read_card_data([made()]))
    is_list = isinstance(EVERYTHING.get(key), list)
    path = with_keys(made(), EVERYTHING | {key: [HOSTILE] if is_list else HOSTILE})
    text = render(read_card_data([path]))
    assert metadata(tmp_path, text).keys() - metadata(tmp_path, plain).keys() <= {"license_name", "license_link"}
    assert [len(row) for table in tables(text) for row in table] == [
        len(row) for table in tables(plain) for row in table
    ]
    assert not {"\x1b", "\u202e"} & set(text)
    html = MarkdownIt("gfm-like", {"html": True, "linkify": False}).enable("table").render(body(text))
    assert "<script" not in html
    assert "javascript:" not in html.replace("[y](javascript:z)", "")
    assert [line for line in text.splitlines() if line == "---"] == ["---", "---"]


@pytest.mark.skipif(sys.platform != "linux", reason="names there are text")
def test_a_files_name_may_be_anything(made: Callable[..., Path], tmp_path: Path) -> None:
    path = made(os.fsdecode(b"a\xff|`\n# b`.gguf"))
    manifest_path(path).unlink()
    text = render(read_card_data([path], repo="me/x"))
    assert text.encode()
    assert "(./a%FF%7C%60%0A%23%20b%60.gguf)" in text
    assert [len(row) for row in tables(text)[0]] == [4, 4]
    assert len(blocks(text)) == 3


def test_a_hostile_recipe_stays_in_its_block(made: Callable[..., Path]) -> None:
    path = made()
    manifest = json.loads(manifest_path(path).read_text())
    manifest["recipe"] = 'default = "Q8_0"\n```\n# evil\n````\n'
    manifest_path(path).write_text(json.dumps(manifest))
    assert 'default = "Q8_0"\n```\n# evil\n````\n' in blocks(render(read_card_data([path])))


def test_divergences_are_shown_and_other_files_compared(made: Callable[..., Path], tmp_path: Path) -> None:
    path = made()
    size = sum(t.info.n_bytes for t in read_card_data([path]).files[0].measured.tensors if t.group != "MTP")
    results = write_results(tmp_path, result(path.name, size, 0.02), result("stock.gguf", 5 * 10**9, 0.04))
    text = render(read_card_data([path, made("other.gguf")], results))
    assert tables(text)[0] == [
        ["file", "type", "GB", "bpw", "KLD: text, context 512", "KLD: random tokens"],
        ["step-q4_k_m.gguf", "Q4_K_M", "0.01", "5.37", "0.0200 ± 0.0020", "0.0400 ± 0.0040"],
        ["other.gguf", "Q4_K_M", "0.01", "5.37", "-", "-"],
        ["stock.gguf (not here)", "-", "5.00", "4.50", "0.0400 ± 0.0040", "0.0800 ± 0.0080"],
    ]
    assert "Random tokens are unlike any text that calibration shows. Sizes of files that are not here" in text
    results = write_results(tmp_path, result(path.name, size - 1, 0.02))
    with pytest.raises(EvaluationError, match=f"{size - 1:,} bytes of tensors, here it has {size:,}"):
        read_card_data([path], results)


def test_no_divergence_is_minus_zero(made: Callable[..., Path], tmp_path: Path) -> None:
    same = [{"name": "text", "tokens": "abc", "kld": {"value": -1e-9, "error": 1e-9}}]
    text = render(read_card_data([made()], write_results(tmp_path, result("same.gguf", 10**9, 0.0, columns=same))))
    assert tables(text)[0][-1] == ["same.gguf (not here)", "-", "1.00", "4.50", "0.0000 ± 0.0000"]


def test_the_real_model_fits_where_plan_says_it_does(tmp_path: Path) -> None:
    paths = [synthetic.write(tmp_path / f"{name}.gguf", real_config(), name).path for name in ("Q4_K_S", "Q8_0")]
    rows = {row[0]: row[1:] for row in tables(render(read_card_data(paths)))[1]}
    assert rows["machine"] == ["Q4_K_S.gguf", "Q8_0.gguf"]
    assert rows["Mac Studio 64 GB (M1 Ultra)"] == ["no", "no"]
    assert rows["Mac 192 GB (M2 Ultra)"] == ["262,144 tokens", "no"]
    context, speed = rows["DGX Spark 128 GB (GB10)"][0].split(" tokens, ")
    assert 60_000 < int(context.replace(",", "")) < 262_144
    assert speed.endswith(" tok/s")


def test_a_file_without_a_manifest_has_a_card(made: Callable[..., Path], tmp_path: Path) -> None:
    path = made()
    manifest_path(path).unlink()
    text = render(read_card_data([path]))
    assert metadata(tmp_path, text)["tags"] == ["gguf", "step3p5", "moe"]
    assert "manifest" not in text
    assert "codes calibrated on: default, 131072 tokens" in text
