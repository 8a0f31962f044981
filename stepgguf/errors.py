"""Everything that can go wrong, as one tree.

    StepggufError
    ├── CheckpointError          the safetensors side
    │   ├── UnsupportedCheckpoint  the folder is something else: an adapter, another tool's quantization, empty
    │   ├── BadConfig            config.json or tokenizer.json: a key is missing or has a value that cannot be
    │   ├── MissingShard         a file that the index names is not there
    │   ├── TruncatedShard       the header promises more bytes than the file has
    │   ├── CorruptShard         the header is not a safetensors header
    │   ├── TensorNotFound       the architecture needs it, no shard has it
    │   ├── UnexpectedTensor     a shard has it, the architecture does not know it (or has it twice)
    │   ├── ShapeMismatch        the shape or dtype is not the one that config.json implies
    │   ├── CorruptTensor        non-finite values
    │   └── HubError             the Hugging Face Hub: not reached, refuses, has changed
    ├── UnsupportedModel         a checkpoint of another architecture
    ├── GGUFError                the GGUF side
    │   ├── BadMagic             not a GGUF
    │   ├── TruncatedFile        shorter than its own header says
    │   └── BadMetadata          a key is missing or wrong
    ├── RecipeError              a type that cannot be had, a recipe that is none
    │   └── UnknownType          there is no such type; `near` names those that may be meant
    ├── QuantError               ggml refused
    ├── ImatrixError             an importance matrix: damaged, or of another model
    ├── TextError                a text to calibrate with: unreadable, too short, a line that is no dialogue
    ├── EvaluationError          a reference or a text to evaluate on: damaged, of another model, too short
    ├── CostsError               a file of types' costs: damaged, of another model, or without what is asked of it
    ├── DoesNotFit               a byte budget below what the smallest types need
    ├── OutputError              the destination: exists, differs, no space
    ├── VerifyError              bytes are not what the manifest or the source says
    ├── SetupError               installing what runs a model: a tool is missing, a build failed
    ├── RequestError             a request that cannot be served as it is; `param` names its field
    │   ├── BadGrammar           a grammar or a JSON schema that cannot be used, or is too large
    │   └── TemplateRefused      the chat template cannot show these messages
    └── EngineError              running a model
        ├── ModelLoadFailed
        ├── ContextLengthExceeded  `n_prompt` tokens do not fit into `n_ctx`
        ├── EngineBusy           the queue is full; try again after `retry_after` seconds
        └── EngineDied           it failed under a request; whether that can be tried again is `recovered`

An error carries the object, what was found, what was expected; `hint` says what to do. Prose is made here, once, and
shown at the boundaries (cli/main.py, server/problems.py).
"""

from __future__ import annotations


class StepggufError(Exception):
    """Base of all errors that a user can cause or fix. `hint` is one imperative sentence."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class CheckpointError(StepggufError):
    pass


class UnsupportedCheckpoint(CheckpointError):
    pass


class BadConfig(CheckpointError):
    pass


class MissingShard(CheckpointError):
    pass


class TruncatedShard(CheckpointError):
    pass


class CorruptShard(CheckpointError):
    pass


class TensorNotFound(CheckpointError):
    pass


class UnexpectedTensor(CheckpointError):
    pass


class ShapeMismatch(CheckpointError):
    pass


class CorruptTensor(CheckpointError):
    pass


class HubError(CheckpointError):
    pass


class UnsupportedModel(StepggufError):
    pass


class GGUFError(StepggufError):
    pass


class BadMagic(GGUFError):
    pass


class TruncatedFile(GGUFError):
    pass


class BadMetadata(GGUFError):
    pass


class RecipeError(StepggufError):
    pass


class UnknownType(RecipeError):
    def __init__(self, message: str, *, hint: str | None = None, near: tuple[str, ...] = ()) -> None:
        super().__init__(message, hint=hint)
        self.near = near


class QuantError(StepggufError):
    pass


class ImatrixError(StepggufError):
    pass


class TextError(StepggufError):
    pass


class EvaluationError(StepggufError):
    pass


class CostsError(StepggufError):
    pass


class DoesNotFit(StepggufError):
    pass


class OutputError(StepggufError):
    pass


class VerifyError(StepggufError):
    pass


class SetupError(StepggufError):
    pass


class RequestError(StepggufError):
    def __init__(self, message: str, *, param: str | None = None, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.param = param


class BadGrammar(RequestError):
    pass


class TemplateRefused(RequestError):
    pass


class EngineError(StepggufError):
    pass


class ModelLoadFailed(EngineError):
    pass


class ContextLengthExceeded(EngineError):
    """n_ctx_train: the longest context that the model knows, if that is known. `hint` names --ctx only where a larger
    one would help."""

    def __init__(self, n_prompt: int, n_ctx: int, n_ctx_train: int | None = None) -> None:
        known = f" (the model knows up to {n_ctx_train})" if n_ctx_train is not None else ""
        larger = f"Start with a larger --ctx{known} or a new chat."
        shorter = f"The model knows no more than {n_ctx_train}: send less, or start a new chat."
        helps = n_ctx_train is None or n_prompt < n_ctx_train
        super().__init__(f"the prompt has {n_prompt} tokens, the context {n_ctx}", hint=larger if helps else shorter)
        self.n_prompt = n_prompt
        self.n_ctx = n_ctx


class EngineBusy(EngineError):
    def __init__(self, message: str, *, retry_after: int) -> None:
        super().__init__(message, hint=f"Try again in {retry_after} s.")
        self.retry_after = retry_after


class EngineDied(EngineError):
    def __init__(self, message: str, *, recovered: bool, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.recovered = recovered
