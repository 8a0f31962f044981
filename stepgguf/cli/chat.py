"""stepgguf chat: a conversation in the terminal, or one answer in a pipe."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from stepgguf.cli import arguments, engine_options, loading, memory_options
from stepgguf.runtime.engine import DEFAULT_CACHE_RAM

if TYPE_CHECKING:
    from stepgguf.cli.terminal.screen import Screen
    from stepgguf.conversation.session import ChatBackend, Session


def chat(
    path: Annotated[
        Path | None, typer.Argument(metavar="FILE.gguf", help="A GGUF file; of a split one, any of its files.")
    ] = None,
    url: Annotated[
        str | None, typer.Option(metavar="URL", help="Chat with a running server instead, e.g. http://127.0.0.1:8080.")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="STEPGGUF_API_KEY", metavar="KEY", help="The server's key.")
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            "--prompt", "-p", metavar="QUESTION", help="Ask this, print the answer, leave. Piped input is added to it."
        ),
    ] = None,
    continue_: Annotated[bool, typer.Option("--continue", "-c", help="Go on with the last session.")] = False,
    system: Annotated[str | None, typer.Option(metavar="MESSAGE", help="A system message.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer, thinking included.")] = None,
    ctx: memory_options.Ctx = None,
    gpu_layers: memory_options.GpuLayers = None,
    n_cpu_moe: memory_options.CpuMoe = None,
    override_tensor: memory_options.OverrideTensor = None,
    tensor_split: memory_options.TensorSplit = None,
    split_mode: memory_options.SplitMode = "layer",
    main_gpu: memory_options.MainGpu = 0,
    cache_type_k: memory_options.CacheTypeK = "f16",
    cache_type_v: memory_options.CacheTypeV = "f16",
    flash_attn: memory_options.FlashAttn = "auto",
    batch: memory_options.Batch = None,
    ubatch: memory_options.Ubatch = None,
    threads: arguments.Threads = None,
    draft: engine_options.Draft = None,
    mtp_file: engine_options.MtpFile = None,
    mmap: engine_options.Mmap = None,
    cache_ram: engine_options.CacheRam = DEFAULT_CACHE_RAM,
    cache_folder: engine_options.CacheFolder = None,
    engine: engine_options.EngineName = engine_options.IN_PROCESS,
    rpc: engine_options.Rpc = None,
    thinking: Annotated[
        Literal["full", "fold", "hide"] | None,
        typer.Option(
            help="How the thinking is shown. Default: fold on a terminal, hide elsewhere; full goes to stderr there.",
        ),
    ] = None,
    reasoning_budget: Annotated[
        int | None, typer.Option(min=0, help="At most so many tokens of thinking; 0 is none.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, help="Default: the file's. 0 always takes the best token.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(min=0, help="Choose among so many tokens; 0 is all.")] = None,
    top_p: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Choose among the likeliest tokens with this share in all.")
    ] = None,
    min_p: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Leave out tokens below this share of the likeliest's.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same answer.")] = None,
    plain: Annotated[bool, typer.Option("--plain", help="Show Markdown as it is written.")] = False,
    json: Annotated[
        bool, typer.Option("--json", help="With -p or piped input: answer, thinking and usage as JSON on stdout.")
    ] = False,
    no_save: Annotated[bool, typer.Option("--no-save", help="Do not keep this session.")] = False,
    force: engine_options.Force = False,
    quiet: arguments.Quiet = False,
) -> None:
    """Chat with a GGUF, or with a running server. /help lists what can be done in it.

    Sessions are saved as they go; -c goes on with the last one. With -p or piped input the answer alone goes to stdout,
    and it is saved only with -c.

    Examples:

    - `stepgguf chat step-q4_k_s.gguf`
    - `stepgguf chat step-q4_k_s.gguf -p "What is 347 + 286?" --thinking full`
    - `git diff | stepgguf chat step-q4_k_s.gguf -p "Review this change" --reasoning-budget 2000`
    - `stepgguf chat --url http://127.0.0.1:8080 -c`
    """
    if (path is None) == (url is None):
        raise typer.BadParameter("give either a GGUF file or --url", param_hint="FILE.gguf")
    interactive = sys.stdin is not None and sys.stdin.isatty()
    question = _question(prompt, None if interactive else _read_piped())
    if not question and (prompt is not None or json or not interactive):
        raise typer.BadParameter("there is nothing to answer", param_hint="--prompt")

    from stepgguf.cli.answering import answer_once, open_view
    from stepgguf.cli.terminal.screen import Screen
    from stepgguf.conversation.transcript import list_sessions
    from stepgguf.files import folders

    view = open_view(reasoning_display=thinking, plain=plain, silent=json)
    if sys.platform == "darwin":  # where older versions kept them on every system
        folders.adopt_data(Path.home() / ".local" / "share" / "stepgguf")
    folder = folders.sessions()
    last = next(iter(list_sessions(folder)), None) if continue_ else None
    if continue_ and last is None:
        raise typer.BadParameter(f"there is no session in {folder}", param_hint="--continue")
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "seed": seed}
    settings = {"system": system, "max_tokens": max_tokens, "reasoning_budget": reasoning_budget}
    options = engine_options.EngineOptions(
        ctx=ctx,
        queue=0,
        placement=memory_options.read_placement(
            gpu_layers, n_cpu_moe, override_tensor, tensor_split, split_mode, main_gpu
        ),
        attention=memory_options.read_attention(cache_type_k, cache_type_v, flash_attn),
        batch=batch,
        ubatch=ubatch,
        threads=threads,
        draft=draft,
        mmap=mmap,
        cache_ram=cache_ram,
        cache_folder=cache_folder,
        engine=engine,
        rpc=tuple(rpc or ()),
        mtp_file=mtp_file,
        force=force,
    )
    with _open_backend(path, url, api_key, options, quiet=quiet) as backend:
        new = folder if not no_save and not question else None  # one answer alone is not worth a session
        session = _open_session(backend, last, new)
        _change_settings(session, settings, sampling)
        if question:
            answer_once(session, question, view, quiet=quiet, as_json=json)
        elif isinstance(view, Screen):
            _converse(session, view, folder, save=not no_save, resumed=last is not None, quiet=quiet)
        else:
            raise typer.BadParameter("a conversation needs a terminal; ask with --prompt", param_hint="--prompt")


def _question(prompt: str | None, piped: str | None) -> str:
    """What is asked on the command line and through a pipe, one below the other."""
    given = prompt and prompt.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return "\n\n".join(part for part in (given, piped) if part)


def _read_piped() -> str | None:
    """What stdin has, if it is open; bytes that are no text become U+FFFD."""
    if sys.stdin is None:
        return None
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="replace")
    return sys.stdin.read().strip()


def _open_session(backend: ChatBackend, last: Path | None, new: Path | None) -> Session:
    """The session saved at `last`; without one a new session, which is saved in the folder `new` if that is given."""
    from stepgguf.cli.dialogue import resume_session
    from stepgguf.conversation.records import ChatSettings
    from stepgguf.conversation.session import Session
    from stepgguf.conversation.transcript import Transcript

    session = Session(backend, ChatSettings())
    if last is not None:
        return resume_session(session, last)
    if new is not None:
        session.transcript = Transcript(new, backend.origin)
    return session


def _change_settings(
    session: Session, settings: Mapping[str, str | int | None], sampling: Mapping[str, float | None]
) -> None:
    """Set what was given on the command line; what is None stays as the session has it."""
    given: dict[str, Any] = {name: value for name, value in settings.items() if value is not None}
    given["sampling"] = {**session.settings.sampling, **{k: v for k, v in sampling.items() if v is not None}}
    session.change_settings(replace(session.settings, **given))


def _converse(session: Session, screen: Screen, folder: Path, *, save: bool, resumed: bool, quiet: bool) -> None:
    """Questions and answers until somebody leaves. folder: of the saved sessions."""
    from stepgguf.cli.dialogue import Dialogue
    from stepgguf.files import folders

    backend = session.backend
    if not quiet:
        limit = f", context {backend.n_ctx:,}" if backend.n_ctx is not None else ""
        screen.note(f"{backend.origin.model}{limit}. /help lists the commands, Ctrl+D leaves.")
    dialogue = Dialogue(session, screen, folder, history=folders.history() if save else None)
    if resumed:
        dialogue.show_last_messages()
    dialogue.run()


@contextmanager
def _open_backend(
    path: Path | None, url: str | None, api_key: str | None, options: engine_options.EngineOptions, *, quiet: bool
) -> Iterator[ChatBackend]:
    if url is not None:
        from stepgguf.conversation.remote import RemoteBackend

        yield RemoteBackend(url, api_key)
        return
    assert path is not None
    from stepgguf.chat.exchange import ChatModel
    from stepgguf.conversation.inprocess import InProcessBackend
    from stepgguf.conversation.records import AnswerOrigin

    with loading.open_engine(path, options, command="chat", quiet=quiet) as engine:
        yield InProcessBackend(ChatModel(engine), AnswerOrigin.of_file(engine.info.name, path))
