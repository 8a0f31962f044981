"""The model card as a README.md of the Hugging Face Hub: front matter in YAML, then Markdown.

    render_card(data, digests) -> "---\\n" YAML "---\\n" Markdown

Names, licences, tags and recipes come from files that others may have made. Each becomes one line of printable
characters; YAML is PyYAML's, in Markdown all punctuation that means something is escaped, and a block of code has a
longer fence than anything in it. So none of them ends a cell, a block or the front matter, and none becomes HTML.
"""

from __future__ import annotations

import glob
import os
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

import yaml

from stepgguf.convert.sources.hub import HUB
from stepgguf.convert.sources.splits import model_stem
from stepgguf.fit.planning import PlanRow
from stepgguf.report.card import CardData, CardFile, EvaluatedFile, Provenance

Digests = Mapping[Path, str]  # SHA-256 of each file, in hex
_TAGS = ("gguf", "step3p5")
_TASK = "text-generation"
# Punctuation that Markdown reads anywhere in a line; and what makes a link of an address.
_SPECIAL = re.compile(r"([\\`*_\[\]<>|~&$@]|:(?=//)|(?<=www)\.)")


def render_card(data: CardData, digests: Digests) -> str:
    """The card as the text of a README.md. digests: of all parts of its files."""
    sections = [
        [f"# {_escape(data.provenance.name)} GGUF", "", _opening(data)],
        ["## Files", "", *_file_table(data)],
        *([["## Which file fits", "", *_machine_table(data)]] if any(file.rows for file in data.files) else []),
        ["## Download", "", *_code(_download_commands(data), "sh")],
        ["## Run", "", *_run_section(data)],
        ["## How they were made", "", *(line for file in data.files for line in _file_history(file))],
        ["## Checksums", "", "SHA-256, as `sha256sum --check` reads them:", "", *_code(_checksums(data, digests))],
        ["## Licence", "", _licence(data.provenance)],
    ]
    body = "\n\n".join("\n".join(lines).rstrip() for lines in sections)
    return f"---\n{_front_matter(data)}---\n\n{body}\n"


def upload_commands(data: CardData, page: Path, manifests: Iterable[Path]) -> list[str]:
    """The command lines that publish the card, the files and what belongs to them."""
    folders: dict[Path, list[str]] = {}
    for path in (*(path for file in data.files for path in file.measured.paths), *manifests):
        folders.setdefault(path.parent, []).extend(("--include", glob.escape(path.name)))
    commands = [(str(folder), ".", *names) for folder, names in folders.items()]
    return [shlex.join(("hf", "upload", _repo(data), *words)) for words in (*commands, (str(page), "README.md"))]


def _front_matter(data: CardData) -> str:
    """The keys that the Hub knows, in its spelling; what is not known is left out."""
    origin = data.provenance
    imatrix = ["imatrix"] if any(file.measured.imatrix for file in data.files) else []
    tags = [*_TAGS, *imatrix, *map(_one_line, origin.tags)]
    fields = {
        "base_model": origin.source,
        "base_model_relation": "quantized" if origin.source else None,
        "license": _one_or_all([_one_line(name) for name in (origin.licence or "").split(",")]),
        "license_name": _one_line(origin.licence_name or ""),
        "license_link": _licence_address(origin),
        "language": [_one_line(language) for language in origin.languages],
        "library_name": "gguf",
        "pipeline_tag": _TASK,
        "quantized_by": data.repo.split("/")[0] if data.repo else _one_line(origin.quantized_by or ""),
        "tags": [tag for tag in dict.fromkeys(tags) if tag not in ("", _TASK)],
    }
    known = {key: value for key, value in fields.items() if value}
    text = yaml.safe_dump(known, sort_keys=False, allow_unicode=True, width=float("inf"))  # type: ignore[no-untyped-call]
    return str(text)


def _opening(data: CardData) -> str:
    origin, made_by = data.provenance, data.files[0].measured.made_by
    whose = f" by {_escape(origin.organization)}" if origin.organization else ""
    how = f", made with {_escape(made_by)}" if made_by else ""
    return f"GGUF files of {_source_link(origin)}{whose}{how}."


def _source_link(origin: Provenance) -> str:
    return f"[{_escape(origin.source)}]({HUB}/{origin.source})" if origin.source else _escape(origin.name)


# tables ---------------------------------------------------------------------------------------------------------


def _file_table(data: CardData) -> Iterator[str]:
    """A row for each file, and one for each that was evaluated for comparison."""
    heads = ["file", "type", "GB", "bpw", *(f"KLD: {_escape(column)}" for column in data.columns)]
    rows = [
        [_file_link(file), _escape(file.measured.type or "-"), f"{file.n_bytes / 1e9:.2f}", f"{file.bpw:.2f}",
         *_kld_cells(data, file.evaluated)]
        for file in data.files
    ]  # fmt: skip
    rows += [
        [f"{_escape(other.name)} (not here)", "-", f"{other.n_bytes / 1e9:.2f}", f"{other.bpw:.2f}",
         *_kld_cells(data, other)]
        for other in data.compared
    ]  # fmt: skip
    yield from _table(heads, rows, n_left=2)
    if data.columns:
        yield from ("", _explain_kld(data))


def _file_link(file: CardFile) -> str:
    paths = file.measured.paths
    name = f"[{_escape(paths[0].name)}](./{quote(os.fsencode(paths[0].name))})"
    return name if len(paths) == 1 else f"{name} and {len(paths) - 1} more"


def _kld_cells(data: CardData, found: EvaluatedFile | None) -> list[str]:
    if found is None:
        return ["-"] * len(data.columns)
    return [f"{round(value, 4) + 0.0:.4f} ± {error:.4f}" for value, error in found.kld]  # -0.0 + 0.0 is 0.0


def _explain_kld(data: CardData) -> str:
    text = "KLD is the mean KL divergence from the original model's next-token distribution in nats, smaller is better"
    if data.top_k:
        text += f"; over its {data.top_k} likeliest tokens and the rest as one, which is a lower bound"
    if data.off is not None:
        text += f". {_escape(data.columns[data.off]).capitalize()} are unlike any text that calibration shows"
    if data.compared:
        text += ". Sizes of files that are not here are without MTP blocks"
    return f"{text}. Measured with `stepgguf eval`."


def _machine_table(data: CardData) -> Iterator[str]:
    """The longest context of each file on each machine, and how fast it is estimated to answer."""
    files = [file for file in data.files if file.rows is not None]
    heads = ["machine", *(_escape(file.first.name) for file in files)]
    rows = [
        [_escape(machine.title), *(_fit_cell(file.rows[i]) for file in files if file.rows is not None)]
        for i, machine in enumerate(data.machines)
    ]
    yield from _table(heads, rows, n_left=1)
    yield from ("", "The longest context with which it fits, and an estimate of tokens per second for one request.")
    setups = [m.listed for m in data.machines if m.listed is not None]
    yield from ("", "What the machines are set up with:", "")
    yield from (f"- {_escape(listed.title)}: {_escape(listed.setup)}" for listed in setups)


def _fit_cell(row: PlanRow) -> str:
    if row.n_ctx is None:
        return "no"
    low, high = row.empty.tps or (0.0, 0.0)
    return f"{row.n_ctx:,} tokens" + (f", {low:.0f} to {high:.0f} tok/s" if high else "")


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], *, n_left: int) -> Iterator[str]:
    """A table of Markdown whose first n_left columns are texts and the others numbers."""
    yield from (f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * n_left + ["---:"] * (len(heads) - n_left)))
    yield from (f"| {' | '.join(cells)} |" for cells in rows)


# commands -------------------------------------------------------------------------------------------------------


def _repo(data: CardData) -> str:
    """Where the files are, or a name to be replaced."""
    return data.repo or f"USER/{re.sub(r'[^A-Za-z0-9.]+', '-', data.provenance.name).strip('-.') or 'Step'}-GGUF"


def _download_commands(data: CardData) -> Iterator[str]:
    yield "pip install --upgrade huggingface_hub"
    for file in data.files:
        names = [path.name for path in file.measured.paths]
        if len(names) > 1:
            names = ["--include", f"{glob.escape(model_stem(file.first))}-*-of-{len(names):05d}.gguf"]
        yield shlex.join(("hf", "download", _repo(data), *map(_printable, names), "--local-dir", "."))


def _run_section(data: CardData) -> Iterator[str]:
    """What runs the first file that can run."""
    file = next((file for file in data.files if file.rows is not None), None)
    if file is None:
        yield "These are MTP blocks alone: `stepgguf chat` and `stepgguf serve` find them beside the model's file."
        return
    name = shlex.quote(_printable(file.first.name))
    yield from _code(
        [
            f"llama-server -m {name} -c {data.n_ctx}",
            f"llama-cli -m {name} -c {data.n_ctx}",
            f"stepgguf serve {name} --ctx {data.n_ctx}   # the APIs of OpenAI and Anthropic, a chat page",
            f"stepgguf chat {name} --ctx {data.n_ctx}",
        ],
        "sh",
    )
    if len(file.measured.paths) > 1:
        yield from ("", "Name the first part; the others are found beside it.")


# provenance -----------------------------------------------------------------------------------------------------


def _file_history(file: CardFile) -> Iterator[str]:
    """How a file was made, as far as it and its manifest say."""
    measured, imatrix = file.measured, file.measured.imatrix
    yield from (f"### {_escape(file.first.name)}", "")
    if file.rows is None:
        yield "- MTP blocks alone, for use beside the model's file"
    if measured.type:
        yield f"- type: {_escape(measured.type)}"
    if measured.source:
        yield f"- made of: {_escape(measured.source)}"
    if imatrix is not None:
        texts = f", of {', '.join(map(_escape, imatrix.datasets))}" if imatrix.datasets else ""
        yield f"- importance matrix: {_escape(imatrix.file or 'without a name')}{texts}"
    if file.calibration is not None:
        yield f"- codes calibrated on: {_escape(file.calibration)}"
    if measured.made_by:
        yield f"- made by: {_escape(measured.made_by)}"
    if not measured.without_manifest:
        yield "- the manifest beside it has a SHA-256 of every expert; `stepgguf verify` checks them"
    if measured.recipe:
        yield from ("- recipe:", "", *_code(map(_printable, measured.recipe.splitlines()), "toml"))
    yield ""


def _checksums(data: CardData, digests: Digests) -> Iterator[str]:
    return (f"{digests[path]}  {_printable(path.name)}" for file in data.files for path in file.measured.paths)


def _licence(origin: Provenance) -> str:
    """Whose licence holds: quantizing does not change it."""
    name = _escape(origin.licence_name or origin.licence or "")
    if not name:
        return f"That of {_source_link(origin)}; the files do not name it."
    address = _licence_address(origin)
    text = f"[{name}](<{quote(address, safe=':/?#%&=@')}>)" if address.startswith("https://") else name
    return f"{text}, that of {_source_link(origin)}: quantizing does not change it."


def _licence_address(origin: Provenance) -> str:
    """The licence's address; a file's name is one in the repository of the model."""
    link = _one_line(origin.licence_link or "")
    if link and origin.source and "://" not in link:
        return f"{HUB}/{origin.source}/blob/main/{quote(link)}"
    return link


# escaping -------------------------------------------------------------------------------------------------------


def _printable(text: str) -> str:
    """The text in one line: what cannot be printed, such as the end of a line, becomes a space."""
    return "".join(c if c.isprintable() else " " for c in text)


def _one_line(text: str) -> str:
    return _printable(text).strip()


def _escape(text: str) -> str:
    """The text as Markdown that shows it as it is, in a line or in a table's cell."""
    return _SPECIAL.sub(r"\\\1", _one_line(text))


def _code(lines: Iterable[str], language: str = "") -> list[str]:
    """A block of code, whose fence is longer than any row of backticks in it."""
    body = list(lines)
    longest = max((len(run) for line in body for run in re.findall("`+", line)), default=0)
    fence = "`" * max(3, longest + 1)
    return [f"{fence}{language}", *body, fence]


def _one_or_all(texts: Sequence[str]) -> str | list[str]:
    """The text, or the list if it has several."""
    found = [text for text in texts if text]
    return found[0] if len(found) == 1 else found
