"""Parts of messages that a model of text cannot read: images, audio, video, files, and what is newer than this server.

An agent's own tool returns an image, and the client sends it again with every later turn. Refusing it would end that
session for good, so a sentence stands in its place and the model knows that something was there. It is refused only in
the message that the user has just written: he can take it out, and would wonder about the answer. What holds text is
text: a document with a text source, a file of text, a search result, any part with a field `text`.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from stepgguf.errors import RequestError
from stepgguf.server.body.objects import RequestObject

# What a type's name says it is: input_image, image_url, computer_screenshot, container_upload, ...
MEDIA_WORDS = {"image": "image", "screenshot": "image", "audio": "audio", "video": "video"}
MEDIA_WORDS |= {"document": "document", "file": "file", "upload": "file"}
LONGEST_TYPE = 64  # characters of a type's name that are repeated to client and model: it may be anything
TEXT_TYPES = ("text", "input_text", "output_text")
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1a\x1c-\x1f]")  # not in text; escape is, in what terminals show


class TextPart(RequestObject):
    """A part of a message as the model reads it, in any dialect."""

    type: Literal["text"]
    text: str


class UnreadablePart(TextPart):
    """A part that a model of text cannot read. `text` is the sentence in its place; `was` is the type that the client
    gave it."""

    was: str = Field(exclude=True)


def as_text(part: Any) -> Any:
    """Return a part as a TextPart, if it has a type or is a string, which is short for one; null is no text.

    It runs before parts are validated: what is no part stays as it is, for the validation to refuse.
    """
    if isinstance(part, str):
        return TextPart(type="text", text=part)
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        return part
    if part["type"] in TEXT_TYPES and part.get("text", part) is None:  # null, and not absent
        return TextPart(type="text", text="")
    if part["type"] == "text":
        return part
    text = _text_of_part(part)
    if text is None:
        return UnreadablePart(type="text", text=placeholder(part["type"]), was=part["type"])
    return TextPart(type="text", text=text)


AnyPart = Annotated[TextPart, BeforeValidator(as_text)]


def as_parts(content: Any) -> Any:
    """Return a content as a list of parts, before they are validated: a string is short for one part."""
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def paragraphs(texts: Iterable[str]) -> str:
    """Return the texts of parts or blocks as one, each a paragraph."""
    return "\n\n".join(text for text in texts if text)


def as_tool_output(value: Any) -> list[Any]:
    """Return what a tool gave as parts, before they are validated. It is never wrong: what is no part of a message is
    shown as it is."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    return [_output_part(item) for item in values]


def _output_part(value: Any) -> Any:
    part = as_text(value)
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return part
    return part if isinstance(part, TextPart) else TextPart(type="text", text=as_shown_text(value))


def as_shown_text(value: Any) -> str:
    """Return a string as it is, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def placeholder(part_type: str) -> str:
    """Return what stands in the place of a part of this type."""
    return f"[{_medium_of(part_type)}: this model reads text only]"


def _medium_of(part_type: str) -> str:
    return next((word for name, word in MEDIA_WORDS.items() if name in part_type), part_type[:LONGEST_TYPE])


def newest_user_message(roles: Sequence[str]) -> int | None:
    """Return which of the messages with these roles the user has just written: the last of role user.

    None if it was answered since, or if it follows a tool's result: clients put images there that belong to the result.
    """
    index = next((i for i in reversed(range(len(roles))) if roles[i] not in ("system", "developer")), None)
    if index is None or roles[index] != "user" or (index and roles[index - 1] == "tool"):
        return None
    return index


def refuse_unreadable(parts: Iterable[object], param: str) -> None:
    """Raise RequestError if a part of the message that the user has just written cannot be read. param: where the parts
    are in the body.

    Its first words are Anthropic's: by them Claude Code knows to take the image or the PDF out and to go on.
    """
    for i, part in enumerate(parts):
        if isinstance(part, UnreadablePart):
            raise RequestError(
                f"Could not process {'PDF' if 'document' in part.was else _medium_of(part.was)}: "
                f"the model reads text only, it cannot take {part.was[:LONGEST_TYPE]}",
                param=f"{param}[{i}]",
                hint="Take it out of the message, or say in words what it shows.",
            )


def _text_of_part(part: dict[str, Any]) -> str | None:
    """The text that a part holds; None if it holds something else."""
    plain: str | None = next((part[name] for name in ("text", "refusal") if isinstance(part.get(name), str)), None)
    if plain is not None:
        return plain
    inner = next((part[name] for name in ("source", "file", "resource") if isinstance(part.get(name), dict)), part)
    text = _text_of_source(inner)
    if text is None:
        return None
    named = (part.get("title"), part.get("context"), inner.get("filename"))
    return paragraphs([*(name for name in named if isinstance(name, str)), text])


def _text_of_source(source: dict[str, Any]) -> str | None:
    """The text of a document's source, of a file's data, of a search result's content."""
    content = source.get("content", source.get("text"))
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        texts = [_text_of_part(part) or "" for part in content if isinstance(part, dict)]
        return paragraphs(texts) or None
    data: str | None = next(
        (source[name] for name in ("data", "file_data", "blob") if isinstance(source.get(name), str)), None
    )
    if data is None or source.get("type") == "text":  # Anthropic's source of type text has it in plain
        return data
    return _decoded_text(data.partition(";base64,")[2] if data.startswith("data:") else data)


def _decoded_text(encoded: str) -> str | None:
    """The text in base64; None if the bytes are not text. Their media type does not tell: that of a program is often
    application/octet-stream."""
    try:
        text = base64.b64decode(encoded, validate=True).decode()
    except (binascii.Error, UnicodeDecodeError, ValueError):
        return None
    return None if not text or text.startswith("%PDF-") or _CONTROL.search(text) else text
