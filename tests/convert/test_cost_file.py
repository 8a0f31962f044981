"""A file of costs, and budgets that choose types by it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType

from stepgguf.convert import measure
from stepgguf.convert.budget import price_trunk, recipe_without_rules
from stepgguf.convert.cost_file import TypeCosts, read_costs, write_costs
from stepgguf.convert.importance import Importance
from stepgguf.convert.measure import possible_types
from stepgguf.convert.plan import Options
from stepgguf.convert.sizes import take_inventory
from stepgguf.convert.sources.checkpoint import Checkpoint
from stepgguf.errors import CostsError
from stepgguf.quants.imatrix import Imatrix, ImatrixEntry, write_imatrix
from stepgguf.quants.types import bits_per_weight
from stepgguf.quants.values import Values
from tests.generate import Shape, write_checkpoint

T = GGMLQuantizationType
DEST = Path("x.gguf")
OUTPUT = "output.weight"


class Unread(Checkpoint):
    """A checkpoint whose numbers nobody may read."""

    def values(self, name: str, start: int, stop: int) -> Values:
        raise AssertionError(f"{name} is read")


@pytest.fixture(autouse=True)
def _few_types(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "MEASURED_TYPES", (T.Q2_K, T.Q4_K, T.Q8_0))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("costs") / "two", Shape(n_layer=2, n_dense=1, n_mtp=1))


@pytest.fixture
def source(checkpoint: Path) -> Iterator[Checkpoint]:
    with Unread(checkpoint) as opened:
        yield opened


def made_up(source: Checkpoint) -> TypeCosts:
    """Fewer bits cost more, and the output ten times as much as others."""
    return {
        spec.name: {
            g: 2.0 ** -bits_per_weight(g) * (10 if spec.name == OUTPUT else 1)
            for g in possible_types(spec.name, spec.shape, None)
        }
        for spec in take_inventory(source).matrices
    }


def options(importance: Importance | None = None) -> Options:
    return Options(recipe_without_rules("fit"), importance=importance)


def test_costs_come_back_as_they_were_written(source: Checkpoint, tmp_path: Path) -> None:
    costs = made_up(source)
    write_costs(tmp_path / "costs.jsonl", costs, source, None)
    assert read_costs(tmp_path / "costs.jsonl", source, None) == costs


def test_a_budget_takes_its_costs_from_them_and_reads_no_tensor(source: Checkpoint) -> None:
    costs = made_up(source)
    trunk = price_trunk(source, DEST, options(), costs=costs)
    chosen = {item.name: {o.ggml_type: o.cost for o in item.options} for item in trunk.items if len(item.options) > 1}
    assert chosen == costs
    types = trunk.choose_types(trunk.smallest_bytes + 0.3 * (trunk.largest_bytes - trunk.smallest_bytes))
    assert types[OUTPUT] == T.Q8_0
    assert set(types.values()) > {T.Q2_K, T.Q8_0}
    assert trunk.predicted_loss(types) == pytest.approx(sum(costs[n][g] for n, g in types.items() if n in costs))


def test_types_that_the_costs_lack_are_named(source: Checkpoint) -> None:
    costs = {name: dict(by_type) for name, by_type in made_up(source).items() if "attn_q" not in name}
    del costs[OUTPUT][T.Q4_K]
    missing = r"say nothing of .*attn_q.weight as Q8_0, .* and 4 more"
    with pytest.raises(CostsError, match=missing) as caught:
        price_trunk(source, DEST, options(), costs=costs)
    assert "Make the costs again" in (caught.value.hint or "")


def test_costs_of_another_source_or_importance_are_refused(
    source: Checkpoint, checkpoint: Path, tmp_path: Path
) -> None:
    file, other = tmp_path / "costs.jsonl", write_checkpoint(tmp_path / "other", Shape(n_layer=2, n_dense=1), seed=1)
    entries = {OUTPUT: ImatrixEntry(np.ones((1, 256), np.float32), np.ones(1, np.float32))}
    write_imatrix(Imatrix(None, ("made up",), 1, 1, entries), tmp_path / "imatrix.gguf")
    write_costs(file, made_up(source), source, None)
    with Checkpoint(other) as opened, pytest.raises(CostsError, match="with another source"):
        read_costs(file, opened, None)
    with pytest.raises(CostsError, match="with another importance matrix"):
        read_costs(file, source, Importance.read(tmp_path / "imatrix.gguf"))


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"tensor": "output.weight", "costs": {"Q4_K": ', "line 2: not valid JSON"),
        (b'{"tensor": "output.weight"}', "line 2: key 'costs' is missing"),
        (b'{"tensor": "output.weight", "costs": {"Q9_K": 1.0}}', "costs of types, and 'Q9_K' is none"),
        (b'{"tensor": "output.weight", "costs": {"Q4_K": -1}}', "costs.Q4_K is -1"),
        (b'{"tensor": "output.weight", "costs": {"Q4_K": NaN}}', "costs.Q4_K is nan"),
    ],
)
def test_a_damaged_line_is_named(line: bytes, problem: str, source: Checkpoint, tmp_path: Path) -> None:
    file = tmp_path / "costs.jsonl"
    write_costs(file, {}, source, None)
    file.write_bytes(file.read_bytes() + line)
    with pytest.raises(CostsError, match=problem):
        read_costs(file, source, None)


@pytest.mark.parametrize("content", [b"", b"GGUF\x03", b"{}\n", b'{"version": 9}\n', b"[]"])
def test_what_is_no_file_of_costs_is_refused(content: bytes, source: Checkpoint, tmp_path: Path) -> None:
    file = tmp_path / "costs.jsonl"
    file.write_bytes(content)
    with pytest.raises(CostsError, match=r"costs\.jsonl"):
        read_costs(file, source, None)


def test_a_file_that_cannot_be_read_is_named(source: Checkpoint, tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent.jsonl"):
        with pytest.raises(CostsError, match=str(path)):
            read_costs(path, source, None)
