"""What programs import: convert a checkpoint or a GGUF, and ask a model that runs in this process.

    from stepgguf.api import convert, open_session

`convert` does what the commands convert and quantize do, `open_session` what chat does, without a terminal. For tokens
in and tokens out there is the engine below, `stepgguf.runtime.llama.LlamaEngine`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stepgguf.conversation.records import ChatSettings
    from stepgguf.conversation.session import Session
    from stepgguf.convert import MtpMode
    from stepgguf.runtime.llama import LlamaOptions

__all__ = ["convert", "open_session"]


def convert(
    source: str | Path,
    dest: str | Path,
    *,
    type: str = "Q4_K_M",
    imatrix: str | Path | None = None,
    mtp: MtpMode = "include",
    split_max_size: int | None = None,
    overwrite: bool = False,
    threads: int | None = None,
    memory: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Path, ...]:
    """Make the GGUF `dest` of a checkpoint's folder, its address on the Hub (hf:ORG/NAME), or another GGUF.

    type: a stock mixture or a recipe's name or file. imatrix: an importance matrix's file. mtp: where MTP blocks go.
    split_max_size: bytes of a part. threads: None is all cores. memory: bytes in flight; None is 2 GiB. progress is
    told the bytes that are written and those that will be.

    Returns the files that were made. An interrupted call goes on where it was when it is made again. StepggufError is
    what can go wrong, with `hint` for what to do.
    """
    from stepgguf.convert import pipeline
    from stepgguf.convert.importance import Importance
    from stepgguf.convert.pipeline import UnitProgress
    from stepgguf.convert.plan import Options
    from stepgguf.convert.planner import plan_source
    from stepgguf.convert.sources.opening import open_source
    from stepgguf.convert.writer import Writer
    from stepgguf.quants.recipe_files import load_recipe

    options = Options(
        load_recipe(type),
        mtp,
        split_max_size=split_max_size,
        importance=None if imatrix is None else Importance.read(Path(imatrix), "pooled"),
    )
    with open_source(Path(source)) as opened:
        plan = plan_source(opened, Path(dest), options)
        done = 0

        def count(unit: UnitProgress) -> None:
            nonlocal done
            done += unit.n_bytes
            progress(done, plan.n_bytes)

        with Writer(plan, opened.identity(), overwrite=overwrite) as writer:
            pipeline.make_files(
                opened, writer, progress=count, threads=threads, memory=memory or pipeline.DEFAULT_MEMORY
            )
    return tuple(file.path for file in plan.files)


@contextmanager
def open_session(
    path: str | Path, settings: ChatSettings | None = None, options: LlamaOptions | None = None
) -> Iterator[Session]:
    """Load a GGUF and open a conversation with it, which is saved nowhere.

    settings: system message, sampling, budget of the reasoning, tools. options: context, placement, drafts; what they
    leave open is chosen from what is free. DoesNotFit comes before anything is loaded; ModelLoadFailed, BadMagic and
    UnsupportedModel say why a file cannot be run.
    """
    from stepgguf.chat.exchange import ChatModel
    from stepgguf.conversation.inprocess import InProcessBackend
    from stepgguf.conversation.session import Session
    from stepgguf.runtime.llama import LlamaEngine, LlamaOptions

    with LlamaEngine(Path(path), _fitted(Path(path), options or LlamaOptions())) as engine:
        yield Session(InProcessBackend(ChatModel(engine)), settings)


def _fitted(path: Path, options: LlamaOptions) -> LlamaOptions:
    """The options with what this machine has room for. DoesNotFit if that is not enough."""
    from stepgguf.fit.capacity import check_context_length, check_memory, refuse_to_load
    from stepgguf.fit.choice import choose
    from stepgguf.fit.machine import probe_machine, use_mmap
    from stepgguf.fit.memory import ContextParams
    from stepgguf.fit.model_file import read_model_file
    from stepgguf.runtime.llama_build import probe_build

    machine, build, model = probe_machine(), probe_build(), read_model_file(path, options.mtp_file)
    wished = ContextParams(
        options.n_ctx or model.default_ctx,
        options.n_parallel,
        options.ubatch,
        cache_ram=options.cache_ram,
        mtp=options.draft != 0,
        attention=options.attention,
        placement=options.placement,
    )
    context = choose(machine, build, model, wished, longest=False).context
    findings = (check_context_length(model, context.n_ctx), check_memory(machine, build, model, context))
    refuse_to_load(model, (finding for finding in findings if finding.level != "ok"))
    return replace(
        options,
        n_ctx=context.n_ctx,
        placement=context.placement,
        mtp_file=model.mtp_file,
        mmap=options.mmap and use_mmap(machine, None),
    )
