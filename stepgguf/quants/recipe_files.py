"""Where recipes are found: a stock mixture's name, a recipe that comes with the program, or a .toml file."""

from __future__ import annotations

from pathlib import Path

from stepgguf.errors import RecipeError
from stepgguf.files import textfile
from stepgguf.quants.mixtures import BASE_TYPES
from stepgguf.quants.recipe import Recipe
from stepgguf.quants.recipe_grammar import parse_recipe
from stepgguf.quants.type_names import did_you_mean, unknown_type

_FOLDER = Path(__file__).with_name("recipes")
MAX_BYTES = 2**20


def load_recipe(name_or_path: str) -> Recipe:
    """A stock mixture, a shipped recipe or a .toml file, looked for in this order. RecipeError if it is none."""
    if name_or_path.upper() in BASE_TYPES:
        return parse_recipe(f'base = "{name_or_path.upper()}"\n', name_or_path.upper())
    if name_or_path.lower() in shipped_names():
        return parse_recipe(shipped_text(name_or_path.lower()), name_or_path.lower())
    path = Path(name_or_path)
    files = sorted(str(file) for file in path.parent.glob("*.toml")) if path.parent.is_dir() else []
    if path.suffix == ".toml" and not path.exists():
        raise RecipeError(
            f"{path}: no such file{did_you_mean(str(path), files, 0.8)}",  # they all end alike
            hint="Those that come with stepgguf: stepgguf recipes.",
        )
    if path.suffix != ".toml":
        raise unknown_type(name_or_path, (*shipped_names(), *files))
    return parse_recipe(textfile.read(path, RecipeError, most=MAX_BYTES), name_or_path)


def shipped_names() -> list[str]:
    """The recipes that come with stepgguf, for the smallest machine first."""
    return sorted((path.stem for path in _FOLDER.glob("*.toml")), key=lambda name: (len(name), name))


def shipped_text(name: str) -> str:
    """The TOML of a shipped recipe."""
    return (_FOLDER / f"{name}.toml").read_text("utf-8")


def shipped_descriptions() -> dict[str, str]:
    """What each shipped recipe says of itself, by name."""
    return {name: load_recipe(name).description for name in shipped_names()}
