"""A Step-3.5 language model on real text, trained once and kept: what calibrated quantization is proved on.

    python -m benchmarks.language [--out FOLDER] [--steps 2000] [--threads 2]

The embedded model plays two small tasks, and its activations have low rank: methods that use second moments look too
good on it. This one has 54 million parameters (21 million for a token: 16 experts, 2 used), learns code and prose
(language_text.py), and has every mechanism of Step-3.5 but MTP blocks. Weights are kept in BF16.

    FOLDER/checkpoint/     config.json, safetensors, tokenizer.json: what `stepgguf convert` reads
    FOLDER/training.pt     weights, optimizer and steps of a training that has not ended; starting again goes on

The rate falls over the last 40 % of the steps, so --steps may be another number when a training goes on before that.
OMP_WAIT_POLICY=passive helps much where other programs want the cores too.

Rows are BOS and what follows in a stream of documents, each ended by END_OF_SENTENCE. Most steps see rows of 512
tokens, every eighth rows of 2,048, for contexts in which full attention and the sliding window (64) differ much.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer, models, trainers
from torch import Tensor
from torch.nn.functional import pad

from benchmarks.language_text import OTHER_CHARACTERS, documents, limited_texts, other_documents
from stepgguf.demo import tokenizer
from stepgguf.demo.train import (
    balance_routers,
    descend,
    initialize_weights,
    make_optimizer,
    model_config,
    rate_at,
    save_checkpoint,
    trunk_loss,
)
from stepgguf.errors import StepggufError
from stepgguf.files import folders
from stepgguf.files.disk import replacing
from stepgguf.model.hparams import HParams
from stepgguf.model.layers import Layer
from stepgguf.reference.model import Attention, MoE, Step35

Tokens = npt.NDArray[np.int32]

FOLDER = folders.cache() / "language-model"
VOCABULARY = 4096
N_LAYER, N_DENSE = 8, 2
BOS_ID, END_ID = 0, 1
SHORT, LONG = 512, 2048  # tokens in a row
LONG_EVERY = 8  # steps
TOKENIZER_CHARACTERS = 8_000_000  # of the training text, enough for 4,096 tokens
STEPS, STEP_TOKENS = 2000, 2048
LEARNING_RATE = 1.5e-3  # the peak
LOG_EVERY, SAVE_EVERY = 20, 300.0  # steps, seconds


def open_model(folder: Path = FOLDER) -> Path:
    """The folder of the checkpoint, trained now if it is not there. During training it is what was saved last."""
    if not (folder / "checkpoint").exists():
        train(folder)
    return folder / "checkpoint"


def is_trained(folder: Path) -> bool:
    """Whether the folder's checkpoint is of a training that came to its end."""
    return (folder / "checkpoint").exists() and not (folder / "training.pt").exists()


def held_out_rows(kind: str, n: int, t: int, folder: Path = FOLDER) -> Tokens:
    """int32 [n, t], each row BOS and t - 1 tokens of text that training never saw, of the "same" kind or an "other".

    Rows of the other kind come from its sources in turn. StepggufError if the text is too short for n rows.
    """
    encoder = load_tokenizer(folder)
    if kind == "same":
        return first_rows(rows(stream(encoder, (d.read() for d in documents("held-out"))), t), n)
    texts = (limited_texts(source, OTHER_CHARACTERS) for source in other_documents())
    each = [rows(stream(encoder, source), t) for source in texts]
    least = min(map(len, each))
    return first_rows(np.stack([source[:least] for source in each], axis=1).reshape(-1, t), n)


def calibration_rows(n: int, t: int, folder: Path = FOLDER) -> Tokens:
    """int32 [n, t], rows of the kind of text that was learnt, from documents neither learnt nor held out."""
    texts = (document.read() for document in documents("calibration"))
    return first_rows(rows(stream(load_tokenizer(folder), texts), t), n)


def load_tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "checkpoint" / "tokenizer.json"))


def stream(encoder: Tokenizer, texts: Iterable[str]) -> Tokens:
    """The tokens of all texts in one row, END_ID after each."""
    encoded = encoder.encode_batch_fast(list(texts), add_special_tokens=False)
    return np.concatenate([np.array([*text.ids, END_ID], np.int32) for text in encoded])


def rows(tokens: Tokens, t: int) -> Tokens:
    """The stream cut into rows [n, t] that each begin with BOS, shuffled, always in the same way."""
    pieces = tokens[: len(tokens) // (t - 1) * (t - 1)].reshape(-1, t - 1)
    order = np.random.default_rng(0).permutation(len(pieces))
    return np.pad(pieces[order], ((0, 0), (1, 0)), constant_values=BOS_ID)


def first_rows(found: Tokens, n: int) -> Tokens:
    """The first n rows. StepggufError if there are fewer."""
    if n > len(found):
        raise StepggufError(
            f"The text has {len(found)} rows of {found.shape[1]} tokens, not {n}.", hint="Ask for less."
        )
    return found[:n]


def train_tokenizer() -> str:
    """The text of tokenizer.json: byte-level BPE of the training text, with the family's layout and special tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = tokenizer.pre_tokenizer()
    size = VOCABULARY - tokenizer.N_FIXED + len(tokenizer.ALPHABET)
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=tokenizer.ALPHABET, show_progress=False)
    bpe.train_from_iterator(limited_texts(documents("training"), TOKENIZER_CHARACTERS), trainer)
    return tokenizer.tokenizer_json(merges_of(bpe))


def merges_of(bpe: Tokenizer) -> list[tuple[str, str]]:
    """The merges of a BPE tokenizer, in their order."""
    return [(first, second) for first, second in json.loads(bpe.to_str())["model"]["merges"]]


def language_config(eos: list[int]) -> dict[str, Any]:
    """The embedded model's configuration, larger, and without MTP blocks. The last layers have clamps."""
    sliding = [bool(i % 4) for i in range(N_LAYER)]
    return {
        **model_config(VOCABULARY, eos),
        "hidden_size": 512,
        "intermediate_size": 1024,
        "num_hidden_layers": N_LAYER,
        "num_nextn_predict_layers": 0,
        "moe_layers_enum": ",".join(map(str, range(N_DENSE, N_LAYER))),
        "moe_num_experts": 16,
        "num_attention_heads": 8,
        "attention_other_setting": {"attention_type": "sliding_attention", "num_attention_heads": 12,
                                    "num_attention_groups": 2, "head_dim": 64, "true_head_dim": 64},
        "layer_types": ["sliding_attention" if s else "full_attention" for s in sliding],
        "rope_theta": [10000.0 if s else 5000000.0 for s in sliding],
        "partial_rotary_factors": [1.0 if s else 0.5 for s in sliding],
        "swiglu_limits": [0.0] * (N_LAYER - 2) + [7, 7],
        "swiglu_limits_shared": [0.0] * (N_LAYER - 1) + [16],
    }  # fmt: skip


class LocalAttention(Attention):
    """Sliding-window attention, a window of queries against its keys and those of the window before.

    q [b, t, h, e] is taken as [b * t / w, w, h, e]; rows must be whole windows. The mask is the one for any such row.
    """

    def __init__(self, hp: HParams, layer: Layer) -> None:
        super().__init__(hp, layer)
        self.window = hp.sliding_window

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        w, n = self.window, q.shape[1] // self.window
        near = mask[w : 2 * w, : 2 * w].repeat(n, 1, 1)
        near[0, :, :w] = False  # nothing is before the first window
        q, k, v = (x.unflatten(1, (n, w)) for x in (q, k, v))
        k, v = (torch.cat([pad(x[:, :-1], (0, 0, 0, 0, 0, 0, 1, 0)), x], 2).flatten(0, 1) for x in (k, v))
        masks = near.repeat(len(q), 1, 1)[:, None]
        return super().attend(q.flatten(0, 1), k, v, masks).unflatten(0, (-1, n)).flatten(1, 2)


class PaddedMoE(MoE):
    """MoE whose experts see multiples of 64 rows: oneDNN compiles a kernel for each number, tens of milliseconds."""

    def add_experts(self, x: Tensor, rows: Tensor, weights: Tensor, counts: list[int]) -> Tensor:
        padded = [-(-count // 64) * 64 for count in counts]
        starts = torch.tensor([0, *padded]).cumsum(0)
        places = torch.cat([torch.arange(count) + start for count, start in zip(counts, starts, strict=False)])
        zeros = torch.zeros(sum(padded))  # more rows, which are the first token's, weigh nothing
        return super().add_experts(
            x, zeros.long().index_copy(0, places, rows), zeros.index_copy(0, places, weights), padded
        )


def quicken(model: Step35) -> list[MoE]:
    """Have the model compute the same in less time, on rows of whole windows. Gives its routers."""
    routers: list[MoE] = []
    for layer in model.model.layers:
        if layer.spec.is_sliding:
            layer.self_attn = LocalAttention(model.hp, layer.spec)
        if layer.spec.is_moe:
            layer.moe = PaddedMoE(model.hp, layer.spec.clamp)
            routers.append(layer.moe)
    return routers


class Training:
    """A model on its way, its step and its optimizer, as they were saved in `folder` if they were."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        self.folder, self.step = folder, 0
        state = torch.load(self.state_file) if self.state_file.exists() else None
        self.tokenizer_json = state["tokenizer"] if state else train_tokenizer()
        self.encoder = Tokenizer.from_str(self.tokenizer_json)
        self.settings = language_config([END_ID, self.encoder.token_to_id("<|im_end|>")])
        self.model = Step35(HParams.from_config(self.settings))
        self.routers = quicken(self.model)
        initialize_weights(self.model)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(self.parameters, LEARNING_RATE)
        if state:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step = state["step"]

    @property
    def state_file(self) -> Path:
        return self.folder / "training.pt"

    def learn(self, batch: Tokens, rate: float) -> float:
        """One step on rows [n, t]; `rate` is the learning rate's share of its peak. Gives the loss."""
        tokens = torch.from_numpy(batch).long()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = trunk_loss(self.model, tokens, tokens)
        descend(self.optimizer, self.parameters, loss, LEARNING_RATE * rate)
        balance_routers(self.routers)
        self.step += 1
        return loss.item()

    def loss(self, batch: Tokens) -> float:
        """The mean loss on rows [n, t], in nats a token."""
        tokens = torch.from_numpy(batch).long()
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            return float(np.mean([trunk_loss(self.model, row, row).item() for row in tokens.split(4)]))

    def save(self) -> None:
        """Write what going on takes, and then the checkpoint. Who has the last one open keeps its files."""
        parts = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacing(self.state_file) as file:
            torch.save({**parts, "step": self.step, "tokenizer": self.tokenizer_json}, file)
        new, place = self.folder / "checkpoint.new", self.folder / "checkpoint"
        save_checkpoint(self.model, self.settings, self.tokenizer_json, new, fp8=False)
        shutil.rmtree(place, ignore_errors=True)
        new.rename(place)


class Batches:
    """What each step learns from: STEP_TOKENS tokens in rows of SHORT, every LONG_EVERY-th time of LONG."""

    def __init__(self, encoder: Tokenizer) -> None:
        text = stream(encoder, (document.read() for document in documents("training")))
        self.rows, self.n_tokens = {t: rows(text, t) for t in (SHORT, LONG)}, len(text)

    def __getitem__(self, step: int) -> Tokens:
        t, i = (SHORT, step) if (step + 1) % LONG_EVERY else (LONG, step // LONG_EVERY)
        n = STEP_TOKENS // t
        return self.rows[t][np.arange(i * n, (i + 1) * n) % len(self.rows[t])]


def train(folder: Path, steps: int = STEPS) -> None:
    """Train the model, from where an earlier run in this folder was stopped if there was one."""
    training = Training(folder)
    batches = Batches(training.encoder)
    n = sum(p.numel() for p in training.parameters)
    print(f"{n:,} parameters; {steps * STEP_TOKENS:,} tokens to see, {batches.n_tokens:,} are there", flush=True)
    training.save()
    kinds = {kind: held_out_rows(kind, 16, SHORT, folder) for kind in ("same", "other")}
    saved = logged = time.monotonic()
    losses: list[float] = []
    while training.step < steps:
        losses.append(training.learn(batches[training.step], rate_at(training.step, steps)))
        if len(losses) == LOG_EVERY:
            speed, logged = LOG_EVERY * STEP_TOKENS / (time.monotonic() - logged), time.monotonic()
            print(f"{training.step}/{steps} loss {np.mean(losses):.4f} {speed:.0f} tok/s", flush=True)
            losses.clear()
        if time.monotonic() - saved > SAVE_EVERY or training.step == steps:
            training.save()
            found = ", ".join(f"{kind} kind {training.loss(batch):.4f}" for kind, batch in kinds.items())
            print(f"saved at {training.step}; held-out loss: {found}", flush=True)
            saved = logged = time.monotonic()
            losses.clear()
    training.state_file.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FOLDER, help="where the model is kept (%(default)s)")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of {STEP_TOKENS} tokens each (%(default)s)")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if is_trained(args.out):
        print(f"{args.out} has a trained model. Remove the folder to train another.")
    else:
        train(args.out, args.steps)


if __name__ == "__main__":
    main()
