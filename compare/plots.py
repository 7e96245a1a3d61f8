"""Pictures of what ``compare bench`` measured, as SVG.

Each takes rows of one GPU and answers None where there is nothing to show. The same rows give the
same bytes, so that a picture in a repository changes only with its results.
"""

from __future__ import annotations

import io
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from . import peers
from .results import Row

STYLE: Any = {
    "svg.hashsalt": "tritongrad",  # else identifiers are random
    "svg.fonttype": "none",  # text stays text: searchable, and a tenth of the size
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
}

NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))  # the day would differ

COLOURS = {
    peers.OURS: "#c2410c",
    peers.EAGER: "#475569",
    "torch.compile": "#2563eb",
    "torch.compile max-autotune": "#7c3aed",
    "Liger-Kernel": "#059669",
    "FlagGems": "#ca8a04",
    "flash-linear-attention": "#db2777",
    "quack": "#0891b2",
    "SDPA flash": "#65a30d",
    "SDPA cuDNN": "#16a34a",
    "SDPA efficient": "#84cc16",
    "SDPA math": "#a3a3a3",
}


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    with mpl.rc_context(STYLE):
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata=NO_METADATA)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _axes(width: float, height: float, columns: int = 1) -> tuple[Figure, list[Any]]:
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width * columns, height))
        axes = figure.subplots(1, columns, squeeze=False)[0]
    return figure, list(axes)


def _lines(
    axes: Any, rows: Sequence[Row], x: Callable[[Row], float], y: Callable[[Row], float | None]
) -> None:
    """A line for each implementation, ours on top."""
    names = [name for name in COLOURS if any(row.implementation == name for row in rows)]
    for name in reversed(names):
        points = sorted(
            (x(row), value)
            for row in rows
            if row.implementation == name and (value := y(row)) is not None
        )
        if points:
            axes.plot(
                *zip(*points, strict=True), label=name, color=COLOURS[name], marker=".",
                linewidth=2 if name == peers.OURS else 1,
            )  # fmt: skip


def measured(rows: Iterable[Row]) -> list[Row]:
    """Those that were timed, the floor's own apart."""
    return [row for row in rows if row.status == "ok" and row.device_us and row.op != "floor"]


def bandwidth(op: str, rows: Sequence[Row], limit: float | None) -> str | None:
    """GB/s against bytes of an op, forward and backward, with the line that a copy reaches."""
    own = [row for row in measured(rows) if row.op == op and row.bytes and not row.operations]
    phases = [p for p in ("forward", "backward") if any(row.phase == p for row in own)]
    if not phases:
        return None
    dtype = _commonest(own)
    figure, panels = _axes(3.6, 2.4, len(phases))
    for axes, phase in zip(panels, phases, strict=True):
        shown = [row for row in own if row.phase == phase and row.dtype == dtype]
        _lines(axes, shown, lambda row: float(row.bytes or 0), lambda row: row.gb_s)
        if limit is not None:
            axes.axhline(limit / 1e9, color="black", linestyle=":", label="copy: the floor")
        axes.set(xscale="log", xlabel="bytes", ylabel="GB/s", title=f"{op} {phase}, {dtype}")
        axes.set_ylim(bottom=0)
    panels[-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return _svg(figure)


def _commonest(rows: Sequence[Row]) -> str:
    return statistics.mode(sorted(row.dtype for row in rows))


def dimensions(shape: str) -> list[tuple[int, ...]]:
    """The shapes of the tensors in a row's description of its call, ``16x16x1024x128, bool 4``."""
    return [
        tuple(map(int, found.split("x")))
        for found in re.findall(r"(?<![\w.=-])(?:u?int\d+ |bool )?(\d+(?:x\d+)+)\b", shape)
    ]


def arithmetic(rows: Sequence[Row], rates: dict[str, float], attention: bool) -> str | None:
    """TFLOP/s of products of matrices against their side, or of attention against its length."""
    own = [row for row in measured(rows) if row.tflop_s and dimensions(row.shape)]
    own = [row for row in own if (len(dimensions(row.shape)[0]) == 4) == attention]
    if not own:
        return None
    dtype = _commonest(own)
    panels_of = sorted({(row.op, row.phase) for row in own if row.phase in ("forward", "backward")})
    if not panels_of:
        return None
    figure, panels = _axes(3.4, 2.6, len(panels_of))
    for axes, (op, phase) in zip(panels, panels_of, strict=True):
        shown = [row for row in own if (row.op, row.phase, row.dtype) == (op, phase, dtype)]
        _lines(
            axes, shown, lambda row: float(dimensions(row.shape)[0][-2]), lambda row: row.tflop_s
        )
        if dtype in rates:
            axes.axhline(rates[dtype] / 1e12, color="black", linestyle=":", label="matrix product")
        axes.set(
            xscale="log", xlabel="length" if attention else "rows", ylabel="TFLOP/s",
            title=f"{op} {phase}, {dtype}",
        )  # fmt: skip
        axes.set_ylim(bottom=0)
    panels[-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return _svg(figure)


def ratios(
    rows: Iterable[Row], peer: str, quantity: Callable[[Row], float | None]
) -> dict[Row, float]:
    """Our row -> the peer's ``quantity`` in ours, for calls of which there are both."""
    found: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in measured(rows):
        if row.implementation in (peers.OURS, peer):
            key = (row.op, row.case, row.dtype, row.phase)
            found.setdefault(key, {})[row.implementation] = row
    pairs = [pair for pair in found.values() if len(pair) == 2]
    values = [
        (pair[peers.OURS], quantity(pair[peers.OURS]), quantity(pair[peer])) for pair in pairs
    ]
    return {own: theirs / ours for own, ours, theirs in values if ours and theirs}


def _largest(found: dict[Row, float], phase: str) -> dict[str, float]:
    """Op -> the ratio at the largest size that it was measured at."""
    chosen: dict[str, tuple[float, float]] = {}
    for row, ratio in found.items():
        if row.phase == phase:
            weight = float(row.bytes or row.operations or 0)
            chosen[row.op] = max(chosen.get(row.op, (-1.0, 0.0)), (weight, ratio))
    return {op: ratio for op, (_, ratio) in chosen.items()}


def speedups(rows: Sequence[Row], peer: str) -> str | None:
    """How many times as fast as a peer each op is, at the largest size measured: bars."""
    found = ratios(rows, peer, lambda row: row.device_us)
    panels_of = [p for p in ("forward", "backward", "both") if _largest(found, p)]
    return _bars(
        {phase: _largest(found, phase) for phase in panels_of},
        f"times as fast as {peer} on the device",
    )


def memory(rows: Sequence[Row]) -> str | None:
    """Memory of eager torch's peak in ours, of value and gradients together: bars."""
    found = ratios(rows, peers.EAGER, lambda row: row.peak_bytes)
    for phase in ("both", "backward", "forward"):
        if values := _largest(found, phase):
            return _bars({phase: values}, "times as little memory at the peak as torch")
    return None


def _bars(panels_of: dict[str, dict[str, float]], label: str) -> str | None:
    if not panels_of:
        return None
    count = max(map(len, panels_of.values()))
    figure, panels = _axes(3.6, 0.8 + 0.16 * count, len(panels_of))
    for axes, (phase, values) in zip(panels, panels_of.items(), strict=True):
        order = sorted(values, key=lambda op: values[op])
        heights = [values[op] for op in order]
        colours = [COLOURS[peers.OURS] if v >= 1 else COLOURS[peers.EAGER] for v in heights]
        axes.barh(order, heights, color=colours)
        axes.axvline(1.0, color="black", linestyle=":")
        axes.set(xlabel=label, title=phase)
        axes.tick_params(axis="y", labelsize=7)
        axes.margins(y=0.01)
    figure.tight_layout()
    return _svg(figure)
