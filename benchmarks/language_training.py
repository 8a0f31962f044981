"""Training of the language model: its configuration, its layers in a form that is quick on a CPU, and the steps."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.functional import pad

from benchmarks.language_rows import END_ID, VOCABULARY, Tokens, held_out_rows, rows, stream, train_tokenizer
from benchmarks.language_text import documents
from stepgguf.demo.tokenizer import PROTOCOL
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
from stepgguf.files.disk import replacing
from stepgguf.model.hparams import HParams
from stepgguf.model.layers import Layer
from stepgguf.reference.model import Attention, DecoderLayer, MoE, Step35

N_LAYER, N_DENSE = 8, 2
SHORT, LONG = 512, 2048  # tokens in a row
LONG_EVERY = 8  # steps
STEPS, STEP_TOKENS = 2000, 2048
LEARNING_RATE = 1.5e-3  # the peak
LOG_EVERY, SAVE_EVERY = 20, 300.0  # steps, seconds


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
        (b, t, _, e), w = q.shape, self.window
        near = mask[w : 2 * w, : 2 * w].repeat(t // w, 1, 1)
        near[0, :, :w] = False  # nothing is before the first window
        q, k, v = (x.reshape(b, t // w, w, -1, e) for x in (q, k, v))
        k, v = (torch.cat([pad(x[:, :-1], (0, 0, 0, 0, 0, 0, 1, 0)), x], dim=2) for x in (k, v))
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        return super().attend(q, k, v, near.repeat(b, 1, 1)[:, None]).reshape(b, t, -1, e)


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
        assert isinstance(layer, DecoderLayer)
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
        self.settings = language_config([END_ID, VOCABULARY - len(PROTOCOL) + PROTOCOL.index("<|im_end|>")])
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
            return float(np.mean([trunk_loss(self.model, part, part).item() for part in torch.split(tokens, 4)]))

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
