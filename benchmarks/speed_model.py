"""Published generation speeds beside what the byte model predicts for them: how far `stepgguf plan` is to be trusted.

    python -m benchmarks.speed_model

A figure is predicted twice, never by itself: by the efficiency at the other depths of its run, which asks whether bytes
explain how speed falls with the context; and by the efficiencies that others published for the chip, which asks what a
figure of one file and one build says about another.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from stepgguf.fit.catalogue import ListedMachine, PublishedSpeed, load_catalogue


@dataclass(frozen=True)
class Prediction:
    """tok/s by other depths of the same run, and by other sources; None where there is no other."""

    machine: ListedMachine
    published: PublishedSpeed
    by_depth: float | None
    by_source: float | None

    @property
    def depth_error(self) -> float | None:
        return None if self.by_depth is None else self.by_depth / self.published.tps - 1

    @property
    def source_error(self) -> float | None:
        return None if self.by_source is None else self.by_source / self.published.tps - 1


def predictions() -> list[Prediction]:
    """All figures of the catalogue, each chip once."""
    chips = {machine.measured: machine for machine in reversed(load_catalogue().values()) if machine.measured}
    return [prediction for machine in reversed(chips.values()) for prediction in _predict(machine)]


def median_error(errors: Iterable[float | None]) -> float:
    """Of the errors that there are, signs aside."""
    return median(abs(error) for error in errors if error is not None)


def _predict(machine: ListedMachine) -> Iterator[Prediction]:
    bandwidth = machine.bandwidth
    runs: dict[tuple[str, str], list[PublishedSpeed]] = {}
    for speed in machine.measured:
        runs.setdefault((speed.file, speed.source), []).append(speed)
    efficiencies = {run: median(m.efficiency(bandwidth) for m in speeds) for run, speeds in runs.items()}
    for key, run in runs.items():
        elsewhere = [efficiency for other, efficiency in efficiencies.items() if other != key]
        for speed in run:
            others = [m.efficiency(bandwidth) for m in run if m is not speed]
            by_depth, by_source = (median(shares) * bandwidth / speed.read if shares else None
                                   for shares in (others, elsewhere))  # fmt: skip
            yield Prediction(machine, speed, by_depth, by_source)


def main() -> None:
    found = predictions()
    print(f"{'machine':<15} {'depth':>7} {'GB':>6} {'tok/s':>6} {'by depth':>14} {'by source':>14}  file, source")
    for p in found:
        m = p.published
        figures = f"{p.machine.name:<15} {m.depth:>7,} {m.read / 1e9:>6.2f} {m.tps:>6g}"
        print(
            figures, _column(p.by_depth, p.depth_error), _column(p.by_source, p.source_error), f" {m.file}, {m.source}"
        )
    _print_errors("other depths", [p.depth_error for p in found])
    _print_errors("other sources", [p.source_error for p in found])


def _print_errors(name: str, errors: Sequence[float | None]) -> None:
    known = [abs(error) for error in errors if error is not None]
    print(f"by {name}: {len(known)} figures, median error {median_error(errors):.1%}, largest {max(known):.0%}")


def _column(tps: float | None, error: float | None) -> str:
    return f"{'-':>14}" if tps is None or error is None else f"{tps:>7.1f} {error:>+6.0%}"


if __name__ == "__main__":
    main()
