"""What goes into a decode, and which tokens come out of it.

    rows       first every request that is generating     its unread tokens, which are few, and its guesses
               then, in equal shares, prompts             up to the prompt's next save point

    a request with guesses, after it has said x:

    row        x   g0  g1  g2        the model reads all of them at once; each row's logits are those after its token
    chosen     a   b   c   d         a is kept. If g0 is a, b is what the model says after a, and is kept. And so on:
                                     the first wrong guess ends it, and what was read behind is removed

So guesses cost rows and never change what is said: each token is sampled from the model's own logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stepgguf.errors import BadGrammar
from stepgguf.runtime.engine import FinishReason, Step, Tokens
from stepgguf.runtime.llama.context import DecodeRows, LlamaContext
from stepgguf.runtime.llama.request import ActiveRequest

# A request with more unread tokens than this is reading a prompt. Generating ones have 1, or the forced tokens of a
# closing; they come first, so that answers go on while a long prompt is read.
MOST_UNREAD_OF_GENERATING = 32


@dataclass(frozen=True, slots=True)
class BatchPart:
    """What a request contributes to a decode: its next unread tokens, then guesses of what follows.

    outputs: it has no unread tokens after these, so the last of them and all guesses get logits.
    """

    request: ActiveRequest
    tokens: list[int]
    guesses: list[int]
    outputs: bool

    @property
    def n_rows(self) -> int:
        return len(self.tokens) + len(self.guesses)

    def decode_rows(self) -> DecodeRows:
        """Return its rows, which go behind what its sequence holds."""
        n_outputs = 1 + len(self.guesses) if self.outputs else 0
        return DecodeRows(self.request.seq, self.request.n_read, self.tokens + self.guesses, n_outputs)

    def without_guesses(self) -> BatchPart:
        """Return the same part with its tokens alone, for a context that has no room for more."""
        return BatchPart(self.request, self.tokens, [], self.outputs)


def is_generating(request: ActiveRequest) -> bool:
    """Whether a running request is past its prompt, or nearly."""
    return request.n_unread <= MOST_UNREAD_OF_GENERATING


def compose_batch(
    running: Sequence[ActiveRequest], guesses: dict[ActiveRequest, list[int]], n_batch: int
) -> list[BatchPart]:
    """Share n_batch rows out among the running requests. One for which nothing is left waits for the next decode."""
    generating = [request for request in running if is_generating(request)]
    reading = [request for request in running if not is_generating(request)]
    parts: list[BatchPart] = []
    budget = n_batch
    for i, request in enumerate(generating + reading):
        # A prompt gets an equal share of what is left, so one that needs less leaves more to those behind it.
        share = budget if is_generating(request) else budget // (len(running) - i)
        part = _part_of(request, share, guesses.get(request, []))
        if part.tokens:
            parts.append(part)
            budget -= part.n_rows
    return parts


def _part_of(request: ActiveRequest, share: int, guesses: list[int]) -> BatchPart:
    """Return the next unread tokens of a request, at most up to its next save point: the state is saved between
    decodes."""
    start = request.n_read
    stop = min([start + share, len(request.tokens), *(n for n in request.save_points if n > start)])
    outputs = stop == len(request.tokens)
    return BatchPart(request, request.tokens[start:stop], guesses[: max(0, share - 1)] if outputs else [], outputs)


def take_tokens(part: BatchPart, context: LlamaContext, row: int) -> FinishReason | None:
    """Choose the tokens that follow a part with outputs, as long as its guesses were right, and emit them.

    `row` is that of the part's last token, which its sequence holds already. The sequence then holds the right guesses
    too, and the context forgets the wrong ones. Returns why the request ends, None if it does not.
    """
    request, sequence = part.request, part.request.sequence
    assert sequence is not None
    steps: list[Step] = []
    n_accepted = 0
    reason: FinishReason | None = None
    for i, guess in enumerate([*part.guesses, None]):
        try:
            steps += request.next_steps(context, row + i)
        except BadGrammar as error:
            request.error, reason = error, "error"
            break
        if request.ended or request.n_left == 0:
            reason = "stop" if request.ended else "length"
            break
        # Two or more unread: tokens were forced behind the sampled one, and no row of this decode comes after those.
        if request.tokens[-1] != guess or request.n_unread > 1:
            break
        sequence.extend([guess])
        n_accepted += 1
    if part.guesses:
        context.remove(sequence.id, len(sequence))
    request.count_decode(len(part.guesses), n_accepted, len(steps))
    if steps:
        request.emit(Tokens(tuple(steps)))
    return reason
