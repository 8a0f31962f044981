"""Codes, scales and minimums chosen one by one against second moments, for types whose blocks have parts (parts/).

    begin      scales and minimums as ggml's encoder chooses them for the ideal weights; then codes by error feedback
               and descent over codes, scales and minimums, twice
    improve    descent

The super-blocks' FP16 factors stay what they are: to refit them as well was measured and brings 0 to 0.7 %.
"""

from __future__ import annotations

from gguf import GGMLQuantizationType

from stepgguf.quants.kernels import Blocks
from stepgguf.quants.lanes.descent import descend
from stepgguf.quants.lanes.feedback import feed_back
from stepgguf.quants.lanes.part_tiles import Rules
from stepgguf.quants.parts import TABLE, Layout, empty_parts, pack, take_apart
from stepgguf.quants.second_moments import Floats, SecondMoments
from stepgguf.quants.step_encoder import StepEncoder

ROUNDS = 2  # of feedback and descent when a step begins
ROUND_PASSES = 3  # of descent in a round
PASSES = 2  # of descent when it is improved


class CodeEncoder(StepEncoder):
    """Parts, which change in place."""

    def __init__(
        self, ggml_type: GGMLQuantizationType, target: Floats, moments: SecondMoments, importance: Floats
    ) -> None:
        super().__init__(ggml_type, target, moments, importance)
        self.rules = rules_of(TABLE[ggml_type])
        self.parts = empty_parts(TABLE[ggml_type], *self.target.shape)

    def _begin(self, step: slice, carried: Floats, root: Floats, blocks: Blocks) -> None:
        self.parts.columns(TABLE[self.ggml_type], step).fill(take_apart(self.ggml_type, blocks))
        pivots, metric = root.diagonal(), root @ root.T
        aims, factor = self.target[:, step] + carried / pivots, root / pivots
        for _ in range(ROUNDS):
            feed_back(self.target, aims, factor, *self.parts, self.rules, step.start, self.errors)
            residuals = (carried + self.errors[:, step] @ root) @ root.T
            self._descend(step, residuals, metric, ROUND_PASSES)

    def improve(self, step: slice, residuals: Floats) -> None:
        self._descend(step, residuals, self.moments.damped_block(step), PASSES)

    def _descend(self, step: slice, residuals: Floats, metric: Floats, passes: int) -> None:
        descend(self.target, residuals, metric, *self.parts, self.rules, step.start, passes, self.errors)

    def blocks(self) -> Blocks:
        return pack(self.ggml_type, self.parts)


def rules_of(layout: Layout) -> Rules:
    """The layout as the kernels' plain numbers."""
    scales, minimums = layout.scales, layout.minimums
    return Rules(
        layout.block,
        layout.sub,
        layout.codes.lowest,
        layout.codes.highest,
        layout.codes.zero,
        layout.uneven,
        scales is not None,
        0 if scales is None else scales.lowest - scales.zero,
        0 if scales is None else scales.highest - scales.zero,
        layout.minimum_factor is not None,
        0 if minimums is None else minimums.highest,
    )
