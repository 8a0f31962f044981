"""Reasoning that a client carries without showing it: Anthropic's `signature`, OpenAI's `encrypted_content`.

Both dialects let a client ask for an answer without its reasoning and yet send the reasoning back, as an opaque text,
so that the model does not lose it between tool calls. This server keeps nothing, so the text must hold the reasoning:
it is base64 behind a prefix and not encrypted, for it never leaves the client who may ask for it in plain.
"""

from __future__ import annotations

import base64
import binascii

PREFIX = "stepgguf:"


def seal(reasoning: str) -> str:
    """Return the reasoning as an opaque text, which `unseal` reads."""
    return PREFIX + base64.b64encode(reasoning.encode()).decode()


def unseal(sealed: str) -> str:
    """Return the reasoning of a sealed text; "" if it is not one of our own."""
    try:
        return (
            base64.b64decode(sealed.removeprefix(PREFIX), validate=True).decode() if sealed.startswith(PREFIX) else ""
        )
    except (binascii.Error, UnicodeDecodeError):
        return ""
