"""Whose a model is, under which licence, made of what: the general.* keys that a checkpoint's own files say.

The sources are the front matter of README.md (YAML between two lines of "---"), the layout of the Hub's cache, and
_name_or_path in config.json. The keys are those that gguf-py's Metadata writes, in its spelling ("stepfun-ai" is
"Stepfun Ai"), with these differences:

    general.name        the name of the folder or the repository as it is, unless the card or --name says another
    general.repo_url    the model's repository, which gguf-py leaves out; general.source.repo_url is the same
    _name_or_path       is what was loaded before it was saved: the model itself if it has its name, else its base
    scalars             are texts as they are written: version 1.10 is no 1.1, the language "no" is no false

A card is written by hand: what is wrong in it is a warning or is left out, and never stops a conversion.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from gguf import GGUFValueType, Keys, Metadata

from stepgguf.convert.sources.hub import HUB, ModelOrigin
from stepgguf.files import disk
from stepgguf.files.gguf_header import Key

V, General = GGUFValueType, Keys.General
_MAX_BYTES = 256 * 1024  # of front matter
_MAX_ITEMS = 1000

# GGUF key -> the card's keys that say it, the first one first.
_TEXTS = {
    General.AUTHOR: ("author", "model_author", "model_creator"),
    General.VERSION: ("version", "model_version"),
    General.ORGANIZATION: ("organization", "model_organization"),
    General.FINETUNE: ("finetune", "model_finetune"),
    General.BASENAME: ("basename", "model_basename"),
    General.DESCRIPTION: ("description", "model_description"),
    General.LICENSE: ("license",),
    General.LICENSE_NAME: ("license_name",),
    General.LICENSE_LINK: ("license_link",),
    General.SOURCE_URL: ("url", "model_url"),
    General.SOURCE_DOI: ("doi", "model_doi"),
    General.SOURCE_REPO_URL: ("repo_url", "model_repo_url"),
}
_LISTS = {General.TAGS: ("tags", "pipeline_tag"), General.LANGUAGES: ("languages", "language")}
_NAMES = ("name", "model_name")
_MODELS = {"base_model": ("base_model", "base_models"), "dataset": ("datasets", "dataset")}


@dataclass(frozen=True, slots=True)
class ModelCard:
    """`name` is general.name. `keys` are the other general.* keys."""

    name: str
    keys: tuple[Key, ...]
    warnings: tuple[str, ...]


def read_card(folder: Path, config: Mapping[str, Any], origin: ModelOrigin) -> ModelCard:
    """What a checkpoint says about itself: its name, and keys."""
    front_matter, warnings = _front_matter(folder / "README.md")
    loaded = config.get("_name_or_path")
    loaded = loaded if isinstance(loaded, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", loaded) else None
    own_id = origin.hub_id
    if own_id is None and loaded is not None and loaded.split("/")[1].casefold() == origin.name.casefold():
        own_id = loaded
    texts = {key: text for key, names in _TEXTS.items() if (text := _first_text(front_matter, names))}
    if own_id is not None:
        texts.setdefault(General.ORGANIZATION, _spell_title(own_id.split("/")[0]))
        texts.setdefault(General.SOURCE_REPO_URL, f"{HUB}/{own_id}")
    if General.SOURCE_REPO_URL in texts:
        texts[General.REPO_URL] = texts[General.SOURCE_REPO_URL]
    keys = [Key.of(key, text, V.STRING) for key, text in texts.items()]
    for relation, names in _MODELS.items():
        # Two spellings of one list: what both say would stand twice.
        models = _all_texts(front_matter, names[:1]) or _all_texts(front_matter, names[1:])
        if not models and relation == "base_model" and loaded is not None and loaded != own_id:
            models = [loaded]
        keys += _model_keys(relation, models)
    for key, names in _LISTS.items():
        if items := _all_texts(front_matter, names):
            keys.append(Key.of(key, items, V.ARRAY, V.STRING))
    return ModelCard(_first_text(front_matter, _NAMES) or origin.name, tuple(keys), tuple(warnings))


def _front_matter(path: Path) -> tuple[dict[str, Any], list[str]]:
    """The mapping at the head of a Markdown file, all its scalars as texts; empty if there is none."""
    if not path.is_file():
        return {}, []
    try:
        with disk.open_regular(path) as file:
            text = file.read(_MAX_BYTES).decode("utf-8-sig", errors="replace")
    except OSError:
        return {}, []
    lines = text.splitlines()
    if not lines or lines[0].rstrip() != "---":
        return {}, []
    end = next((i for i, line in enumerate(lines[1:], 1) if line.rstrip() == "---"), None)
    try:
        if end is None:
            raise ValueError("it does not end")
        found = yaml.load("\n".join(lines[1:end]).replace("\t", "  "), Loader=yaml.BaseLoader)  # type: ignore[no-untyped-call]
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:120] or "nested too deep"
        return {}, [f"{path}: its front matter cannot be read, so licence, tags and the like are not kept ({reason})"]
    return found if isinstance(found, dict) else {}, []


def _first_text(front_matter: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """The first of these keys that says something; several values (licences) are joined by commas."""
    for name in names:
        if items := _all_texts(front_matter, (name,)):
            return ",".join(items)
    return None


def _all_texts(front_matter: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """The texts of these keys, each of which may have one or a list."""
    found = [value for name in names for value in (_as_list(front_matter.get(name)))]
    texts = [item.encode("utf-8", "replace").decode().strip() for item in found if isinstance(item, str)]
    return [text for text in texts if text not in ("", "null", "~")][:_MAX_ITEMS]


def _spell_title(word: str) -> str:
    """An id's part as gguf-py spells names."""
    return str(Metadata.id_to_title(word))  # type: ignore[no-untyped-call]


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _model_keys(relation: str, models: Sequence[str]) -> Iterator[Key]:
    """general.base_model.* or general.dataset.*: how many, and of each what its id or its address says."""
    if not models:
        return
    yield Key.of(f"general.{relation}.count", len(models), V.UINT32)
    for i, model in enumerate(models):
        url = re.match(rf"{HUB}/(?:datasets/)?([^/\s]+/[^/\s]+)/?$", model)
        name, organization, _, _, version, _ = Metadata.get_model_id_components(url[1] if url else model)
        if "://" in model and not url:
            yield Key.of(f"general.{relation}.{i}.repo_url", model, V.STRING)
            continue
        said = {
            "name": _spell_title(name) if name else None,
            "organization": _spell_title(organization) if organization else None,
            "version": version,
            "repo_url": model if url else f"{HUB}/{model}" if organization and name else None,
        }
        yield from (Key.of(f"general.{relation}.{i}.{key}", text, V.STRING) for key, text in said.items() if text)
