"""What a model of text cannot read, in the forms of all dialects."""

from __future__ import annotations

import base64
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from stepgguf.errors import RequestError
from stepgguf.server.body.unreadable import AnyPart, TextPart, UnreadablePart, newest_user_message, refuse_unreadable

PNG = base64.b64encode(b"\x89PNG\r\n\x1a\n\x00\x00").decode()
PDF = base64.b64encode(b"%PDF-1.4\n1 0 obj\n").decode()
NOTES = base64.b64encode("größer\n\tals".encode()).decode()
any_part: TypeAdapter[TextPart] = TypeAdapter(AnyPart)


@pytest.mark.parametrize(
    ("part", "text"),
    [
        ({"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}"}}, "image"),
        ({"type": "input_image", "image_url": "http://x/y.png"}, "image"),
        ({"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PNG}}, "image"),
        ({"type": "computer_screenshot", "file_id": "f"}, "image"),
        ({"type": "input_audio", "input_audio": {"data": PNG, "format": "wav"}}, "audio"),
        ({"type": "video_url", "video_url": {"url": "http://x/y.mp4"}}, "video"),
        ({"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": PDF}}, "document"),
        ({"type": "document", "source": {"type": "url", "url": "http://x/y.pdf"}}, "document"),
        ({"type": "file", "file": {"filename": "a.pdf", "file_data": f"data:application/pdf;base64,{PDF}"}}, "file"),
        ({"type": "input_file", "file_id": "file_1"}, "file"),
        ({"type": "container_upload", "file_id": "file_1"}, "file"),
        ({"type": "hologram"}, "hologram"),
    ],
)
def test_a_sentence_stands_in_its_place(part: dict[str, Any], text: str) -> None:
    found = any_part.validate_python(part)
    assert isinstance(found, UnreadablePart)
    assert found.text == f"[{text}: this model reads text only]"
    assert found.model_dump() == {"type": "text", "text": found.text}


@pytest.mark.parametrize(
    ("part", "text"),
    [
        (" a ", " a "),
        ({"type": "text", "text": None}, ""),
        ({"type": "input_text", "text": " a "}, " a "),
        ({"type": "refusal", "refusal": "no"}, "no"),
        ({"type": "newer", "text": "a"}, "a"),
        (
            {"type": "document", "title": "T", "context": "C", "source": {"type": "text", "data": "SGVsbG8="}},
            "T\n\nC\n\nSGVsbG8=",
        ),
        (
            {"type": "document", "source": {"type": "content", "content": [{"type": "text", "text": "a"}] * 2}},
            "a\n\na",
        ),
        ({"type": "document", "source": {"type": "content", "content": "a"}}, "a"),
        ({"type": "document", "source": {"type": "base64", "media_type": "text/x", "data": NOTES}}, "größer\n\tals"),
        ({"type": "input_file", "filename": "n.rs", "file_data": f"data:;base64,{NOTES}"}, "n.rs\n\ngrößer\n\tals"),
        ({"type": "file", "file": {"filename": "n.rs", "file_data": NOTES}}, "n.rs\n\ngrößer\n\tals"),
        (
            {"type": "search_result", "source": "http://x", "title": "T", "content": [{"type": "text", "text": "a"}]},
            "T\n\na",
        ),
        ({"type": "resource", "resource": {"uri": "file:///a", "text": "a"}}, "a"),
    ],
)
def test_what_holds_text_is_text(part: dict[str, Any], text: str) -> None:
    found = any_part.validate_python(part)
    assert not isinstance(found, UnreadablePart)
    assert found.text == text


@pytest.mark.parametrize("part", [1, {}, {"type": 1}, {"type": "text"}, {"type": "text", "text": 1}])
def test_what_is_no_part_is_an_error(part: Any) -> None:
    with pytest.raises(ValidationError):
        any_part.validate_python(part)


@pytest.mark.parametrize(
    ("roles", "index"),
    [
        ("user", 0),
        ("user assistant user", 2),
        ("user system developer", 0),
        ("user user", 1),
        ("user assistant", None),
        ("user assistant tool", None),
        ("user assistant tool user", None),
        ("user assistant tool assistant user", 4),
        ("system", None),
        ("", None),
    ],
)
def test_which_message_was_just_written(roles: str, index: int | None) -> None:
    assert newest_user_message(roles.split()) == index


def test_in_the_message_just_written_it_is_refused_with_its_place() -> None:
    parts = [any_part.validate_python(part) for part in ({"type": "text", "text": "a"}, {"type": "input_image"})]
    with pytest.raises(RequestError, match="it cannot take input_image") as caught:
        refuse_unreadable(parts, "input[0].content")
    assert caught.value.param == "input[0].content[1]"
