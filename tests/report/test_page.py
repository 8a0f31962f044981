"""The page in a real browser: what is seen of it, and that it asks nobody for anything.

Where Chromium and its driver are not installed these tests are skipped: `apt-get install chromium chromium-driver`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from stepgguf.convert.manifest import manifest_path
from stepgguf.report import figures, measured
from stepgguf.report.page import render_page
from tests.conftest import real_config
from tests.generate import Shape, config
from tests.report.synthetic import Made, write
from tests.server.browser import CHROMEDRIVER, CHROMIUM, Page, browser

pytestmark = pytest.mark.skipif(
    not (CHROMIUM and CHROMEDRIVER), reason="no browser: apt-get install chromium chromium-driver"
)
MODEL = config(Shape(n_mtp=1, n_expert=40))  # layers 2 to 4 have experts, 5 is the MTP block
RIGHT, DOWN, END, PAGE_DOWN = "\ue014", "\ue015", "\ue010", "\ue00f"  # WebDriver's keys
YELLOW, VERMILLION = [253, 231, 37], [213, 94, 0]  # viridis' end; never seen
EXPERTS = "#experts-map .cells"
SECTIONS = "return [...document.querySelectorAll('section')].filter(s => s.checkVisibility()).map(s => s.id)"


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    with browser(tmp_path_factory.mktemp("chromium")) as client:
        yield client


@pytest.fixture
def page(session: httpx.Client, tmp_path: Path) -> Iterator[Page]:
    page = Page(session, tmp_path)
    yield page
    page.devtools("Emulation.clearDeviceMetricsOverride")
    page.devtools("Emulation.setEmulatedMedia", features=[])
    assert page.problems() == []


@pytest.fixture
def made(tmp_path: Path) -> Made:
    """Two experts were never seen, and one error is far above all others."""
    made = write(tmp_path / "step.gguf", MODEL, "Q4_K_M")
    for projection in ("gate", "up", "down"):
        ledger = made.manifest["tensors"][f"blk.3.ffn_{projection}_exps.weight"]["ledger"]
        ledger["count"][7] = ledger["count"][8] = 0
    made.manifest["tensors"]["blk.4.ffn_down_exps.weight"]["ledger"]["error"][11] = 0.5
    made.rewrite(lambda _: None)
    return made


def show(
    page: Page,
    made: Made,
    change: Callable[[dict[str, Any]], None] = lambda _: None,
    frontier: dict[str, Any] | None = None,
) -> None:
    made.rewrite(change)
    file = made.path.with_suffix(".html")
    file.write_text(render_page(measured.read_file(made.path), frontier), encoding="utf-8")
    page.ask_driver("POST", "url", url=file.as_uri())


def ledger(made: Made, layer: int, projection: str, kind: str) -> np.ndarray:
    return np.array(made.manifest["tensors"][f"blk.{layer}.ffn_{projection}_exps.weight"]["ledger"][kind])


def digits(x: float) -> str:
    return f"{x:#.3g}".rstrip(".") if x < 999.5 else f"{x:.0f}"


def percent(x: float) -> str:
    return f"{digits(100 * x)} %"


def rows(page: Page, table: str) -> list[list[str]]:
    """A table's body as it is read."""
    script = "return [...document.querySelectorAll(arguments[0])].map(r => [...r.cells].map(c => c.textContent))"
    cells: list[list[str]] = page.run(script, f"#{table} tbody tr")
    return cells


def pixel(page: Page, row: int, column: int) -> list[int]:
    script = """
      const pixel = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
      pixel.drawImage(document.querySelector(arguments[0]), -arguments[1], -arguments[2]);
      return [...pixel.getImageData(0, 0, 1, 1).data];
    """
    rgba: list[int] = page.run(script, f"{EXPERTS} canvas", column, row)
    return rgba[:3] if rgba[3] else []


def readout(page: Page, section: str, keys: str) -> str:
    page.type(keys, f"#{section}-map .cells")
    return page.text(f"#{section}-map .readout")


def pick(page: Page, name: str, value: str) -> None:
    page.click(f"#controls label:has([name={name}][value={value}])")


@pytest.mark.slow
def test_the_headline_and_the_sizes_are_those_of_the_file(made: Made, page: Page) -> None:
    show(page, made)
    tensors = measured.read_file(made.path).tensors
    n_bytes, n_values = sum(t.info.n_bytes for t in tensors), sum(t.info.n_values for t in tensors)
    routed = sum(t.info.n_bytes for t in tensors if t.role.endswith("_exps"))
    means = [
        np.mean([np.average(ledger(made, i, p, "error"), weights=ledger(made, i, "gate", "count")) for i in (2, 3, 4)])
        for p in ("gate", "up", "down")
    ]
    assert page.text("h1") == "Step"
    assert page.text("#kind") == "Q4_K_M · with importance matrix"
    assert page.text("#file") == "step.gguf · stepgguf 0.4.0"
    values = page.run("return [...document.querySelectorAll('#tiles .value')].map(e => e.textContent.trim())")
    assert values[:2] == [f"{n_bytes / 2**20:.2f} MiB", f"{n_bytes * 8 / n_values:.3f}"]
    assert values[3] == percent(np.mean(means))
    assert page.text("#tiles div:last-child .more") == " · ".join(
        f"{p} {digits(100 * mean)}" for p, mean in zip(("gate", "up", "down"), means, strict=True)
    )
    first = rows(page, "sizes-table")[0]
    assert first[:3] == ["routed experts", f"{routed / 1e6:.2f} MB", f"{100 * routed / n_bytes:.1f} %"]
    assert first[3] == f"{routed * 2 / 40 / 1e3:.2f} kB"


def test_the_page_opens_on_the_errors(made: Made, page: Page) -> None:
    show(page, made)
    assert page.run(SECTIONS) == ["experts", "layers", "worst", "coverage", "sizes", "types", "made"]


def evaluated(name: str, n_bytes: int, *klds: float, is_stock: bool = True) -> dict[str, Any]:
    kld = [[value, value / 10] for value in klds]
    return {"file": name, "is_stock": is_stock, "bytes": n_bytes, "bpw": 4.0, "kld": kld}


def frontier(*files: dict[str, Any], **changes: Any) -> dict[str, Any]:
    columns = ["text, context 512", "random tokens"]
    return {"columns": columns, "off": 1, "top_k": 0, "engine": "stream", "files": list(files), **changes}


# Of the marks of the column that is shown, or of random tokens beside it: what each says, and where its middle is.
MARKS = """
  return [...document.querySelectorAll(arguments[0])].map(e => {
    const box = e.getBoundingClientRect();
    return [e.title, box.x + box.width / 2, box.y + box.height / 2];
  })
"""
SHOWN, AWAY = "#frontier-plot .plot .dot:not(.away)", "#frontier-plot .plot .dot.away"
LABELS = "return [...document.querySelectorAll('.label:not(.hidden)')].map(e => e.textContent)"


def test_evaluated_files_are_drawn_by_size_and_divergence(made: Made, page: Page) -> None:
    files = [
        evaluated("x-small.gguf", 1000, 0.4, 0.4), evaluated("x-worse.gguf", 1500, 0.5, 0.1),
        evaluated("step.gguf", 2000, 0.1, 0.2, is_stock=False), evaluated("x-same.gguf", 9000, 0.0, 0.01),
    ]  # fmt: skip
    show(page, made, frontier=frontier(*files, top_k=64))
    assert page.run(SECTIONS)[0] == "frontier"
    assert "Of the weights alone" in page.text("#frontier-lead")
    assert "Over the 64 likeliest tokens and one bin" in page.text("#frontier-lead")
    assert [row[:2] for row in rows(page, "frontier-table")] == [
        [file["file"], "stock" if file["is_stock"] else ""] for file in files
    ]
    assert rows(page, "frontier-table")[3][4] == "0.00 ± 0.00"
    marks = page.run(MARKS, SHOWN)  # 0 has no place on a log scale
    (small, *at_small), (worse, *at_worse), (own, *at_own) = marks
    assert [small, worse] == ["x-small.gguf: 1.00 kB, 0.400 ± 0.0400", "x-worse.gguf: 1.50 kB, 0.500 ± 0.0500"]
    assert at_small[0] < at_worse[0] < at_own[0]
    assert at_worse[1] < at_small[1] < at_own[1]
    assert page.run(MARKS, f"{SHOWN}.this") == page.run(MARKS, f"{SHOWN}.ours") == [[own, *at_own]]
    path = "return document.querySelector('#frontier-plot path').getAttribute('d').match(/[ML]/g).join('')"
    assert page.run(path) == "ML"  # small, then step: the other is larger and worse than small
    page.click("#frontier-controls label:has([value='1'])")
    assert page.run(path) == "MLL"  # of random tokens: small, worse, same


def test_random_tokens_stand_beside_every_other_column(made: Made, page: Page) -> None:
    show(page, made, frontier=frontier(evaluated("a.gguf", 1000, 0.4, 0.8), evaluated("b.gguf", 2000, 0.1, 0.05)))
    (_, x, y), (_, x_b, y_b) = page.run(MARKS, SHOWN)
    (words, x_away, y_away), (_, x_b_away, y_b_away) = page.run(MARKS, AWAY)
    assert words == "a.gguf: 1.00 kB, random tokens 0.800 ± 0.0800"
    assert [x_away, x_b_away] == pytest.approx([x, x_b], abs=0.5)
    assert y_away < y  # more divergence is further up
    assert y_b_away > y_b
    page.click("#frontier-controls label:has([value='1'])")
    assert page.count(AWAY) == 0


def test_marks_stand_where_the_axes_say(made: Made, page: Page) -> None:
    """Lengths between ticks are those between marks with the ticks' values."""
    show(page, made, frontier=frontier(evaluated("a.gguf", 1000, 0.1, 0.2), evaluated("b.gguf", 3000, 0.01, 0.02)))
    ticks = """
      return [...document.querySelectorAll(arguments[0])].map(e => {
        const box = e.getBoundingClientRect();
        return [e.textContent, box.x + box.width / 2, box.y + box.height / 2];
      })
    """
    [(_, x_a, y_a), (_, x_b, y_b)] = page.run(MARKS, SHOWN)
    across = {word: x for word, x, _ in page.run(ticks, "#frontier-plot .ticks span")}
    up = {word: y for word, _, y in page.run(ticks, "#frontier-plot .names span")}
    assert [across["1 kB"], across["3 kB"]] == pytest.approx([x_a, x_b], abs=1)  # pixels are rounded
    assert [up["0.1"], up["0.01"]] == pytest.approx([y_a, y_b], abs=1)
    assert up["0.05"] == pytest.approx(y_a + (y_b - y_a) * np.log(0.1 / 0.05) / np.log(10), abs=1)


@pytest.mark.parametrize("width", [360, 1200])
def test_names_of_files_cover_nothing(width: int, made: Made, page: Page) -> None:
    """Twelve files, four of them nearly in one place; the page's own is always named."""
    page.show_width(width)
    many = [evaluated(f"m-Q{i}.gguf", 1000 + 150 * i, 0.5 / 1.5**i, 0.5, is_stock=False) for i in range(8)]
    close = [evaluated(f"m-close-{i}.gguf", 1600 + i, 0.11 + i / 1000, 0.5) for i in range(4)]
    show(page, made, frontier=frontier(*many, *close, evaluated("step.gguf", 1605, 0.112, 0.3)))
    page.until("document.querySelector('.label').style.getPropertyValue('--dx')")
    boxes = """
      const plot = document.querySelector("#frontier-plot .plot").getBoundingClientRect();
      return [...document.querySelectorAll(".label:not(.hidden):not(.this), #frontier-plot .plot .dot")].map(e => {
        const { left, right, top, bottom } = e.getBoundingClientRect();
        return [e.textContent, left - plot.left, right - plot.left, top - plot.top, bottom - plot.top, plot.width];
      })
    """
    found = page.run(boxes)
    named = [box for box in found if box[0]]
    assert len(named) >= 4
    assert "step" in page.run(LABELS)
    for name, left, right, top, bottom, plot in named:
        assert 0 <= left < right <= plot
        for other in found:
            apart = right <= other[1] or other[2] <= left or bottom <= other[3] or other[4] <= top
            assert apart or other[0] == name, (name, other)


def test_where_no_file_differs_that_is_said(made: Made, page: Page) -> None:
    show(page, made, frontier=frontier(evaluated("a.gguf", 1000, 0.0, 0.1)))
    assert "no file differs from the original here" in page.text("#frontier-plot")


def test_experts_that_stand_out_are_named_and_only_they(made: Made, page: Page) -> None:
    show(page, made)
    assert rows(page, "coverage-table") == [["3", "7-8"]]
    found = rows(page, "worst-table")
    expected = figures.summary(measured.read_file(made.path))["worst"]
    assert [row[:3] for row in found] == [[str(w["layer"]), str(w["expert"]), w["projection"]] for w in expected]
    assert found[0][:5] == ["4", "11", "down", "Q6_K", "50.0 %"]
    assert page.text("#worst-lead").startswith(f"{len(found)} figures of 360 are at least 1.5 times the median")

    def even(manifest: dict[str, Any]) -> None:
        for name, entry in manifest["tensors"].items():
            if name.endswith("_exps.weight") and "ledger" in entry:
                entry["ledger"]["error"] = [0.01 + 0.0001 * expert for expert in range(40)]

    show(page, made, even)
    assert "worst" not in page.run(SECTIONS)
    assert page.text("#experts-lead").endswith("No expert stands out from its tensor.")


def test_the_heat_map_is_read_by_pointer_and_keys(made: Made, page: Page) -> None:
    show(page, made)
    errors = np.array([ledger(made, layer, "down", "error") for layer in (2, 3, 4)])
    counts = np.array([ledger(made, layer, "gate", "count") for layer in (2, 3, 4)])

    levels = figures.type_levels(measured.read_file(made.path))

    def words(layer: int, expert: int) -> str:
        count, rmse = counts[layer - 2], ledger(made, layer, "down", "rmse")[expert]
        kind, error = made.manifest["tensors"][f"blk.{layer}.ffn_down_exps.weight"]["type"], errors[layer - 2, expert]
        return (
            f"Layer {layer}, expert {expert} · down {kind} · error {percent(error)}, "
            f"{digits(error / levels[kind])} × {kind}'s level · "
            f"RMSE {digits(rmse)} · use {digits(count[expert] / count.mean())} ×, {int(count[expert]):,} tokens"
        )

    assert readout(page, "experts", RIGHT) == words(2, 0)
    assert readout(page, "experts", RIGHT * 5 + DOWN) == words(3, 5)
    assert readout(page, "experts", END + PAGE_DOWN) == words(4, 39)
    assert readout(page, "experts", RIGHT + DOWN) == words(4, 39)  # the edge holds
    box = page.run(f"const b = document.querySelector('{EXPERTS}').getBoundingClientRect(); return [b.width, b.height]")
    x, y = round(box[0] * (11.5 / 40 - 0.5)), round(box[1] * (2.5 / 3 - 0.5))
    origin = {"element-6066-11e4-a52e-4f735466cecf": page.find(EXPERTS).removeprefix("element/")}
    move = {"type": "pointerMove", "origin": origin, "x": x, "y": y}
    page.ask_driver("POST", "actions", actions=[{"type": "pointer", "id": "mouse", "actions": [move]}])
    assert page.text("#experts-map .readout") == words(4, 11)
    away = {"type": "pointerMove", "origin": "viewport", "x": 1, "y": 1}
    page.ask_driver("POST", "actions", actions=[{"type": "pointer", "id": "mouse", "actions": [away]}])
    assert page.text("#experts-map .readout") == words(4, 11)  # it has the focus, and holds
    page.run("document.activeElement.blur()")
    assert page.text("#experts-map .readout") == "Point at a cell, or use the arrow keys."


def test_colours_run_over_what_is_shown_and_the_legend_says_so(made: Made, page: Page) -> None:
    show(page, made)
    ends = "return [...document.querySelectorAll('#experts-legend .ticks span')].map(e => e.textContent)"
    levels = figures.type_levels(measured.read_file(made.path))
    of_layers = [levels[made.manifest["tensors"][f"blk.{i}.ffn_down_exps.weight"]["type"]] for i in (2, 3, 4)]
    over = np.array([ledger(made, i, "down", "error") / of_layers[i - 2] for i in (2, 3, 4)])
    assert [page.run(ends)[i] for i in (0, -1)] == [f"{digits(over.min())} ×", f"{digits(over.max())} ×"]
    assert pixel(page, 2, 11) == YELLOW
    pick(page, "measure", "error")
    down = np.array([ledger(made, layer, "down", "error") for layer in (2, 3, 4)])
    low, high = down.min(), down.max()
    assert page.run(ends) == [percent(low * (high / low) ** t) for t in (0, 0.25, 0.5, 0.75, 1)]
    assert pixel(page, 2, 11) == YELLOW
    pick(page, "scale", "linear")
    assert page.run(ends) == [percent(low + t * (high - low)) for t in (0, 0.25, 0.5, 0.75, 1)]
    pick(page, "projection", "gate")
    gate = np.array([ledger(made, layer, "gate", "error") for layer in (2, 3, 4)])
    assert pixel(page, *map(int, np.unravel_index(gate.argmax(), gate.shape))) == YELLOW
    assert page.run(ends)[-1] == percent(gate.max())


def test_use_shows_who_was_never_seen_and_sorts(made: Made, page: Page) -> None:
    show(page, made)
    pick(page, "measure", "use")
    assert pixel(page, 1, 7) == pixel(page, 1, 8) == VERMILLION
    assert pixel(page, 0, 7) != VERMILLION
    assert page.count("#choose-projection:disabled") == 1  # the three projections see the same tokens
    pick(page, "order", "use")
    assert pixel(page, 1, 38) == pixel(page, 1, 39) == VERMILLION
    most = int(ledger(made, 2, "gate", "count").argmax())
    assert readout(page, "experts", RIGHT).startswith(f"Layer 2, expert {most} ")
    pick(page, "measure", "error")
    assert page.count("#choose-projection:disabled") == 0


def test_signal_takes_the_place_of_use_where_tokens_were_not_counted(made: Made, page: Page) -> None:
    def drop_counts(manifest: dict[str, Any]) -> None:
        for entry in manifest["tensors"].values():
            entry.get("ledger", {}).pop("count", None)

    show(page, made, drop_counts)
    mass = ledger(made, 2, "gate", "mass")
    assert page.text("#choose-measure").split() == "Show Error ÷ level Error RMSE Signal".split()
    assert readout(page, "experts", RIGHT).endswith(f" · signal {digits(mass[0] / mass.mean())} ×")
    assert page.run("return document.getElementById('coverage').checkVisibility()") is False


def test_types_and_errors_by_layer_are_read_like_the_heat_map(made: Made, page: Page) -> None:
    show(page, made)
    q = made.manifest["tensors"]["blk.0.attn_q.weight"]
    assert readout(page, "types", RIGHT) == (
        f"Layer 0 · attn_q · Q4_K, 4.50 bits · {512 * 256 * 4.5 / 8e3:.2f} kB · "
        f"error {percent(q['ledger']['error'][0])}"
    )
    assert readout(page, "types", END).startswith("Layer 5 (MTP) · attn_q · Q8_0, 8.50 bits · ")
    assert readout(page, "types", PAGE_DOWN).startswith("Layer 5 (MTP) · nextn.")
    means = [np.average(ledger(made, 2, p, "error"), weights=ledger(made, 2, "gate", "count")) for p in ("gate", "up")]
    over = {line["name"]: line["relative"].get(2) for line in figures.summary(measured.read_file(made.path))["errors"]}
    layer = readout(page, "layers", RIGHT * 3)
    assert layer.startswith(f"Layer 2 · experts: gate {digits(over['experts: gate'])} × · experts: up ")
    page.click("#layers-controls label:has([value=error])")
    layer = readout(page, "layers", RIGHT * 3)
    assert layer.startswith(f"Layer 2 · experts: gate {percent(means[0])} · experts: up {percent(means[1])} · ")
    assert rows(page, "layers-table")[2][1:3] == [percent(mean) for mean in means]
    types = {tuple(row[:3]) for row in rows(page, "types-table")}
    assert {("attn_q", "Q4_K", "0–4"), ("attn_q", "Q8_0", "5"), ("output", "Q6_K", "–")} <= types


HOSTILE = [
    "</script><script>document.title='broken'</script>",
    "<img src=x onerror=\"document.title='broken'\">",
    "</title><img src=x>",
    "{{data}}",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_what_a_file_says_of_itself_is_text(tmp_path: Path, page: Page, text: str) -> None:
    made = write(tmp_path / "x.gguf", MODEL, "Q4_K_M", name=text)

    def claim(manifest: dict[str, Any]) -> None:
        manifest.update(type=text, recipe=text, made_by=text)
        manifest["imatrix"] = {"file": text, "prior": text, "datasets": [text]}

    show(page, made, claim)
    assert page.run("return document.title") == f"{text} · x.gguf"
    assert page.text("h1") == text
    assert page.text("#recipe") == text
    assert page.run("return [...document.querySelectorAll('#provenance dd')].map(e => e.textContent)").count(text) == 6
    assert page.count("img, h1 *, #provenance dd *") == 0
    assert page.count("script") == 2


def test_the_page_asks_nobody_and_runs_nothing_else(made: Made, page: Page) -> None:
    show(page, made)
    html = made.path.with_suffix(".html").read_text()
    assert not re.search(r"(?:src|href|action)=(?![\"']?data:)|url\(|@import|fetch\(", html)
    assert set(re.findall(r"https?://[^\s\"']+", html)) == {"http://www.w3.org/2000/svg"}  # a name, never fetched
    assert page.run("return performance.getEntriesByType('resource').map(e => e.name)") == []
    page.run("""
      window.refused = [];
      document.addEventListener("securitypolicyviolation", (event) => window.refused.push(event.effectiveDirective));
      const add = (tag, fields) => document.body.append(Object.assign(document.createElement(tag), fields));
      add("script", { textContent: "window.broken = 1" });
      add("style", { textContent: "h1 { display: none }" });
      add("img", { src: "https://example.org/x.png" });
      return fetch("https://example.org/").catch(() => 0);
    """)
    page.until("window.refused.length === 4")
    assert page.run("return window.refused.sort()") == ["connect-src", "img-src", "script-src-elem", "style-src-elem"]
    assert page.run("return window.broken ?? null") is None
    page.problems()  # the console has them too


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_all_text_has_the_contrast_that_wcag_asks_for(made: Made, page: Page, theme: str) -> None:
    """4.5 : 1 is level AA for text of any size (WCAG 2.2, 1.4.3)."""
    page.show_theme(theme)
    files = evaluated("step.gguf", 1000, 0.4, 0.8, is_stock=False), evaluated("b.gguf", 2000, 0.1, 0.05)
    show(page, made, lambda manifest: manifest.update(recipe="default = 'Q4_K'"), frontier(*files))
    is_dark = page.run("return getComputedStyle(document.body).backgroundColor") == "rgb(24, 23, 22)"
    assert is_dark == (theme == "dark")
    found = page.contrasts()
    assert len(found) > 300
    assert [text for ratio, text in found if ratio < 4.5] == []


@pytest.mark.parametrize("width", [360, 768, 1400])
def test_nothing_is_wider_than_the_window(made: Made, page: Page, width: int) -> None:
    show(page, made)
    page.show_width(width)
    page.run("for (const details of document.querySelectorAll('details')) details.open = true")
    assert page.run("return document.documentElement.scrollWidth") <= width
    canvas = page.run(f"const c = document.querySelector('{EXPERTS} canvas'); return [c.width, c.height]")
    assert canvas == ([3, 40] if width == 360 else [40, 3])  # turned on a phone
    assert readout(page, "experts", RIGHT + DOWN * 2).startswith("Layer 2, expert 2 " if width == 360 else "Layer 4, ")


def test_paper_is_light_and_has_no_controls(made: Made, page: Page) -> None:
    page.devtools(
        "Emulation.setEmulatedMedia", media="print", features=[{"name": "prefers-color-scheme", "value": "dark"}]
    )
    show(page, made)
    assert page.run("return getComputedStyle(document.body).backgroundColor") == "rgb(252, 251, 249)"
    assert page.run("return document.getElementById('controls').checkVisibility()") is False
    page.devtools("Emulation.setEmulatedMedia", media="", features=[])


def test_what_was_not_measured_is_said_and_not_drawn(made: Made, page: Page) -> None:
    def strip(manifest: dict[str, Any]) -> None:
        manifest.pop("imatrix")
        for entry in manifest["tensors"].values():
            entry.pop("ledger", None)

    show(page, made, strip)
    assert page.text("#missing").startswith("Errors are not shown: the manifest has no ledger. Make the file again")
    assert page.run(SECTIONS) == ["sizes", "types", "made"]
    assert page.text("#kind") == "Q4_K_M · without importance matrix"


def test_without_a_manifest_there_are_types_and_sizes(made: Made, page: Page) -> None:
    manifest_path(made.path).unlink()
    file = made.path.with_suffix(".html")
    file.write_text(render_page(measured.read_file(made.path)), encoding="utf-8")
    page.ask_driver("POST", "url", url=file.as_uri())
    assert page.text("#missing").startswith("Errors are not shown: there is no manifest beside the file.")
    assert page.run(SECTIONS) == ["sizes", "types", "made"]
    assert page.text("#kind") == "Q4_K_M"  # whether there was an importance matrix, nobody knows
    assert page.text("#file") == "step.gguf"
    assert page.count("#types-table tbody tr") > 10


@pytest.mark.slow
def test_the_page_of_the_real_model_is_small_and_quick(tmp_path: Path, page: Page) -> None:
    made = write(tmp_path / "step.gguf", real_config(), "Q4_K_M", name="Step-3.5-Flash")
    show(page, made)
    assert made.path.with_suffix(".html").stat().st_size < 1.5e6
    assert page.run(f"const c = document.querySelector('{EXPERTS} canvas'); return [c.width, c.height]") == [288, 42]
    assert page.text("#tiles").startswith("Size\n112.84 GiB\n121.16 GB, 804 tensors\nBits per weight\n4.861\n")
