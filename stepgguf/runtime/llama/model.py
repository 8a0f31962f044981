"""A GGUF that llama.cpp has loaded: weights, vocabulary, metadata, and llama.cpp's log."""

from __future__ import annotations

import ctypes
import functools
from collections import deque
from collections.abc import Callable
from pathlib import Path

import llama_cpp

from stepgguf.errors import BadMagic, ModelLoadFailed, UnsupportedModel
from stepgguf.model.hparams import ARCHITECTURE
from stepgguf.runtime.engine import Sampling
from stepgguf.runtime.llama.model_params import ModelParams
from stepgguf.runtime.passages import passages
from stepgguf.runtime.placement import Placement

_LOG_ERROR = 4  # ggml_log_level


class LlamaModel:
    """The weights of a GGUF, and what its metadata says. Thread-safe once it is loaded.

    `ends`: the tokens that end an answer. `n_mtp`: MTP blocks that were loaded.
    """

    def __init__(
        self, path: Path, placement: Placement, *, mtp: bool, mmap: bool, progress: Callable[[float], None] | None
    ) -> None:
        """Load a file. BadMagic, ModelLoadFailed or UnsupportedModel say why not.

        mtp: load the MTP blocks too, if the file has them. mmap False reads the file instead of mapping it. progress is
        told the share that is loaded, 0 to 1.
        """
        self.path = path
        self.log = _process_log()
        self.log.install()
        _check_magic(path)
        llama_cpp.llama_backend_init()
        self._params = ModelParams(placement, mtp=mtp, mmap=mmap)
        params = self._params.struct
        if progress is not None:  # llama.cpp keeps a pointer to the callback, so it must live as long as the model
            params.progress_callback = self._progress = _progress_callback(progress)
        handle = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        if not handle:
            raise self.load_error(f"{path} could not be loaded")
        self.handle = handle
        self._is_open = True
        architecture = self.metadata("general.architecture")
        if architecture != ARCHITECTURE:
            self.close()
            raise UnsupportedModel(
                f"{path}: general.architecture is {architecture!r}, expected {ARCHITECTURE!r}",
                hint="stepgguf runs Step-3.5 and Step-3.7 models only.",
            )
        vocab = llama_cpp.llama_model_get_vocab(handle)
        assert vocab is not None  # only a model without one has none
        self.vocab = vocab
        self.n_vocab = int(llama_cpp.llama_vocab_n_tokens(self.vocab))
        self.n_embd = int(llama_cpp.llama_model_n_embd(self.handle))
        self.n_ctx_train = int(llama_cpp.llama_model_n_ctx_train(self.handle))
        self.n_swa = int(llama_cpp.llama_model_n_swa(self.handle))
        self.n_mtp = int(llama_cpp.llama_model_n_layer_nextn(self.handle)) if mtp else 0
        ends = (t for t in range(self.n_vocab) if llama_cpp.llama_vocab_is_eog(self.vocab, t))
        self.ends = frozenset(ends)
        self.piece = functools.cache(self._piece)

    def close(self) -> None:
        if self._is_open:
            llama_cpp.llama_model_free(self.handle)
            self._is_open = False

    def load_error(self, message: str) -> ModelLoadFailed:
        """Return the error of a load that llama.cpp refused: its own last lines, and a hint that fits them."""
        text = self.log.last_errors()
        memory = any(word in text.lower() for word in ("alloc", "out of memory", "oom"))
        hint = (
            "There is not enough memory: try a smaller --ctx, a larger --n-cpu-moe or a smaller type."
            if memory
            else "Check the file with `stepgguf verify`, and that llama-cpp-python is recent enough for step35."
        )
        return ModelLoadFailed(message + text, hint=hint)

    # tokens -----------------------------------------------------------------------------------------------------

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool = True) -> list[int]:
        """Return the ids of a text of any length.

        parse_special: special tokens that are written in it become their ids. add_special puts bos in front, once.
        """
        first, *others = passages(text)
        ids = self._tokenize(first, add_special, parse_special)
        for passage in others:
            ids += self._tokenize(passage, False, parse_special)
        bos = llama_cpp.llama_vocab_bos(self.vocab)  # a template may write it itself, and then it stands there twice
        return ids[1:] if add_special and ids[:2] == [bos, bos] else ids

    def _tokenize(self, passage: str, add_special: bool, parse_special: bool) -> list[int]:
        data = passage.encode("utf-8", errors="replace")
        room = len(data) + 2
        buffer = (llama_cpp.llama_token * room)()
        n = llama_cpp.llama_tokenize(self.vocab, data, len(data), buffer, room, add_special, parse_special)
        assert 0 <= n <= room  # a token covers at least one byte
        return list(buffer[:n])

    def _piece(self, token_id: int) -> bytes:
        buffer = ctypes.create_string_buffer(256)
        n = llama_cpp.llama_token_to_piece(self.vocab, token_id, buffer, 256, 0, True)
        return buffer.raw[: max(0, n)]

    # metadata ---------------------------------------------------------------------------------------------------

    def metadata(self, key: str) -> str | None:
        """Return the value of one of the file's keys, as text. None: it has no such key."""
        name = key.encode()
        n = llama_cpp.llama_model_meta_val_str(self.handle, name, None, 0)
        if n < 0:
            return None
        buffer = ctypes.create_string_buffer(n + 1)
        llama_cpp.llama_model_meta_val_str(self.handle, name, buffer, n + 1)
        return buffer.value.decode("utf-8", errors="replace")

    def recommended_sampling(self) -> Sampling:
        """Return what the file recommends, and the model card's values for the rest."""
        default = Sampling()
        values = {
            field: float(text) if (text := self.metadata(f"general.sampling.{key}")) else getattr(default, field)
            for field, key in (("temperature", "temp"), ("top_k", "top_k"), ("top_p", "top_p"), ("min_p", "min_p"))
        }
        return Sampling(values["temperature"], int(values["top_k"]), values["top_p"], values["min_p"])


class LlamaLog:
    """Keeps llama.cpp's messages for error reports instead of printing them. llama.cpp has one log for the process."""

    def __init__(self) -> None:
        self._lines: deque[str] = deque(maxlen=20)
        self._level = 0
        self._callback = llama_cpp.llama_log_callback(self._on_message)

    def install(self) -> None:
        """Take the messages from whoever had them, and forget those of before."""
        self._lines.clear()
        llama_cpp.llama_log_set(self._callback, ctypes.c_void_p(0))

    def _on_message(self, level: int, text: bytes, _: ctypes.c_void_p) -> None:
        self._level = level if level < 5 else self._level  # 5 continues the line before
        if self._level >= _LOG_ERROR:
            self._lines.append(text.decode("utf-8", errors="replace").strip())

    def last_errors(self) -> str:
        """Return its last three errors, to be put behind a message."""
        lines = [line for line in self._lines if line]
        return f": {'; '.join(lines[-3:])}" if lines else ""


@functools.cache
def _process_log() -> LlamaLog:
    """Return the one log. llama.cpp keeps a pointer to its callback, so it must never go away."""
    return LlamaLog()


def _progress_callback(report: Callable[[float], None]) -> Callable[[float, ctypes.c_void_p], bool]:
    def on_progress(share: float, _: ctypes.c_void_p) -> bool:
        report(share)
        return True  # go on; False would end the load

    return llama_cpp.llama_progress_callback(on_progress)


def _check_magic(path: Path) -> None:
    """Refuse what llama.cpp would only hint at: ModelLoadFailed if there is no file, BadMagic if it is not a GGUF."""
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise ModelLoadFailed(f"{path}: {error.strerror}", hint="Give a GGUF file.") from error
    if magic != b"GGUF":
        raise BadMagic(f"{path}: starts with {magic!r}, not b'GGUF'", hint="Give a file that `stepgguf convert` wrote.")
