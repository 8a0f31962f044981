"""Text to token ids and back, as llama-server does it.

llama-server sends text as JSON strings, which cannot hold a part of a character. Only /tokenize with pieces gives the
bytes of a token that is one; so where a character came in several tokens, its text is tokenized again.
"""

from __future__ import annotations

from stepgguf.runtime.llamaserver.client import LlamaServerClient
from stepgguf.runtime.passages import passages


class ServerVocabulary:
    """The tokens of the model that a llama-server has loaded. Thread-safe. Every method may raise ConnectionLost."""

    def __init__(self, client: LlamaServerClient) -> None:
        self._client = client
        self._pieces: dict[int, bytes] = {}
        self._bos = self._ids("", add_special=True)

    def tokenize(self, text: str) -> list[int]:
        """Return the ids of a prompt, with bos in front: see `Engine.tokenize`, as for the two methods below."""
        ids = self._ids(text, add_special=True)
        # A template may write bos itself, and then it stands there twice.
        return ids[1:] if ids[:2] == self._bos * 2 else ids

    def tokenize_piece(self, text: str) -> list[int]:
        return self._ids(text, add_special=False)

    def tokenize_plain(self, text: str) -> list[int]:
        return self._ids(text, add_special=False, parse_special=False)

    def piece(self, token_id: int) -> bytes:
        """Return the bytes that a token stands for. One that is a part of a character comes as U+FFFD: see `spell`."""
        if token_id not in self._pieces:
            content = self._client.post("/detokenize", {"tokens": [token_id]})["content"]
            self._pieces[token_id] = content.encode()
        return self._pieces[token_id]

    def spell(self, text: str) -> list[tuple[int, bytes]]:
        """Return the tokens of a text, each with its exact bytes, also where a character takes several."""
        tokens = self._client.post("/tokenize", {"content": text, "with_pieces": True})["tokens"]
        return [(t["id"], t["piece"].encode() if isinstance(t["piece"], str) else bytes(t["piece"])) for t in tokens]

    def _ids(self, text: str, *, add_special: bool, parse_special: bool = True) -> list[int]:
        ids: list[int] = []
        for passage in passages(text):
            asked = {"content": passage, "add_special": add_special and not ids, "parse_special": parse_special}
            ids += self._client.post("/tokenize", asked)["tokens"]
        return ids
