"""``compare report``: pictures and tables of what ``compare bench`` measured, and nothing else.

Without results it says that nothing was measured. What is slower than torch is listed, too.
"""

from __future__ import annotations

import argparse
import html
import json
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tritongrad.policy import slug

from . import peers, plots
from .results import DIRECTORY, Row, read_all
from .terminal import add_json_option, write_json

BEGIN, END = "<!-- speed:begin -->", "<!-- speed:end -->"
"""The speed section of README.md stands between these."""

NOT_MEASURED = """\
Not measured yet: there are no results in `compare/results`. On a machine with a GPU:
`python -m compare bench --suite quick`, then `python -m compare report --write README.md`."""

TABLES = Path(__file__).parents[1] / "tritongrad" / "tables"
"""Where `use(policy="fastest")` looks, in a checkout."""


@dataclass
class Measurements:
    """What was measured on one GPU: of each cell the last row, and where that was measured."""

    gpu: str
    rows: list[Row] = field(default_factory=list)
    about: list[dict[str, str]] = field(default_factory=list)

    @property
    def copy(self) -> float | None:
        """Bytes a second of a copy."""
        rates = [row.gb_s for row in self.rows if row.op == "floor" and row.case == "copy"]
        return 1e9 * rates[-1] if rates and rates[-1] else None

    @property
    def rates(self) -> dict[str, float]:
        """Operations a second of a matrix product, by dtype."""
        own = [row for row in self.rows if row.op == "floor" and row.tflop_s]
        return {row.dtype: 1e12 * (row.tflop_s or 0.0) for row in own}

    def told(self, name: str) -> str:
        """The values of a column that say where rows were measured."""
        return ", ".join(dict.fromkeys(about[name] for about in self.about if about[name]))


def collect(pairs: Iterable[tuple[Row, dict[str, str]]]) -> list[Measurements]:
    """Measurements by GPU. A later row of a cell takes the place of an earlier one."""
    last: dict[str, dict[Any, tuple[Row, dict[str, str]]]] = {}
    for row, about in pairs:
        first_calls = row.suite == "cold"
        last.setdefault(about["gpu"], {})[first_calls, row.cell] = row, about
    return [
        Measurements(
            gpu, [row for row, _ in found.values()], [about for _, about in found.values()]
        )
        for gpu, found in sorted(last.items())
    ]


# ------------------------------------------------------------------------------------ for README.md


def markdown(measurements: Sequence[Measurements]) -> str:
    """The speed section, with the lines that mark its place."""
    lines = [NOT_MEASURED] if not measurements else []
    for found in measurements:
        lines += [*([""] if lines else []), *_section(found)]
    return "\n".join([BEGIN, *lines, END])


def _section(found: Measurements) -> list[str]:
    suites = sorted({f"`python -m compare bench --suite {row.suite}`" for row in found.rows})
    lines = [
        f"### {found.gpu}",
        "",
        f"torch {found.told('torch')}, triton {found.told('triton')}, CUDA {found.told('cuda')}, "
        f"driver {found.told('driver')}, commit {found.told('commit')}, "
        f"measured {_days(found)}, by {', '.join(suites)} (each row has its whole command).",
    ]
    if found.copy is not None:
        reached = [f"a copy {found.copy / 1e12:.2f} TB/s"]
        reached += [f"{d} products {r / 1e12:.0f} TFLOP/s" for d, r in found.rates.items()]
        lines.append(f"Floor, measured in the same runs: {', '.join(reached)}.")
    lines += [
        "",
        "| beside | phase | calls | times as fast, median | at least as fast |",
        "|-|-|-|-|-|",
    ]
    for peer, phase, values in _summaries(found):
        share = sum(v >= 1 for v in values) / len(values)
        median = statistics.median(values)
        lines.append(f"| {peer} | {phase} | {len(values)} | {median:.2f} | {share:.0%} |")
    slower = _slower(found)
    if slower:
        told = "Slower than eager torch on the device, times as fast at the worst size"
        lines += ["", f"{told}: {', '.join(slower)}."]
    ours = [row for row in found.rows if row.implementation == peers.OURS]
    bad = [row for row in ours if row.status != "ok"]
    if bad:
        names = sorted({f"`{row.op}` ({row.status})" for row in bad})
        lines += ["", f"Not timed: {', '.join(names)}."]
    return lines


def _days(found: Measurements) -> str:
    return ", ".join(sorted({about["time"][:10] for about in found.about}))


def _summaries(found: Measurements) -> Iterable[tuple[str, str, list[float]]]:
    for peer in _beside(found):
        ratios = plots.ratios(found.rows, peer, lambda row: row.device_us)
        for phase in dict.fromkeys(row.phase for row in ratios):
            yield peer, phase, [ratio for row, ratio in ratios.items() if row.phase == phase]


def _beside(found: Measurements) -> list[str]:
    names = {row.implementation for row in plots.measured(found.rows)}
    return [name for name in plots.COLOURS if name in names and name != peers.OURS]


def _slower(found: Measurements) -> list[str]:
    ratios = plots.ratios(found.rows, peers.EAGER, lambda row: row.device_us)
    worst: dict[str, float] = {}
    for row, ratio in ratios.items():
        worst[row.op] = min(worst.get(row.op, ratio), ratio)
    behind = sorted((ratio, op) for op, ratio in worst.items() if ratio < 0.95)
    return [f"`{op}` {ratio:.2f}" for ratio, op in behind]


# ----------------------------------------------------------------------------------------- the page

PAGE = """\
<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>tritongrad: speed</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: auto; padding: 1rem; }}
table {{ border-collapse: collapse; font-size: 13px; }}
td, th {{ padding: .15rem .6rem; border-bottom: 1px solid #ddd; text-align: right; }}
td:first-child, th:first-child {{ text-align: left; }}
.slow {{ color: #b91c1c; }} .note {{ color: #666; text-align: left; }}
</style></head><body><h1>tritongrad: speed</h1>
{body}
</body></html>
"""

INTRODUCTION = """\
<p>Device time: between two events on the stream, the cache overwritten before each call, inputs
used in turns, implementations in turns; medians. Host time: until the call returns. Numbers are
compared with torch's before anything is timed. The floor is the larger of the least bytes at the
rate of a copy and the operations at that of a large matrix product, measured in the same run.</p>
"""


def page(measurements: Sequence[Measurements]) -> str:
    """The whole report as one file."""
    if not measurements:
        body = f"<p>{html.escape(NOT_MEASURED)}</p>"
    else:
        body = "\n".join([INTRODUCTION, *(_chapter(found) for found in measurements)])
    return PAGE.format(body=body)


def _chapter(found: Measurements) -> str:
    about = [
        f"<tr><td>{name}</td><td>{html.escape(found.told(name))}</td></tr>"
        for name in (
            "driver", "cuda", "torch", "triton", "tritongrad", "python", "peers", "commit",
            "power_limit_w", "command",
        )
        if found.told(name)
    ]  # fmt: skip
    parts = [f"<h2>{html.escape(found.gpu)}</h2><table>{''.join(about)}</table>"]
    parts += [f"<h3>{title}</h3>{picture}" for title, picture in pictures(found).items()]
    parts.append(_table(found))
    return "\n".join(parts)


def pictures(found: Measurements) -> dict[str, str]:
    """Title -> SVG, of everything that there is something to show of."""
    shown = {f"Beside {peer}": plots.speedups(found.rows, peer) for peer in _beside(found)}
    shown["Attention"] = plots.arithmetic(found.rows, found.rates, attention=True)
    shown["Matrix products"] = plots.arithmetic(found.rows, found.rates, attention=False)
    shown["Memory"] = plots.memory(found.rows)
    for op in dict.fromkeys(row.op for row in found.rows):
        shown[f"Bandwidth of {op}"] = plots.bandwidth(op, found.rows, found.copy)
    return {title: picture for title, picture in shown.items() if picture is not None}


COLUMNS = (
    "op", "shape", "dtype", "phase", "implementation", "device µs", "20–80 %", "host µs", "GB/s",
    "TFLOP/s", "of the floor", "peak MB", "first call s", "with kernels on disk s", "note",
)  # fmt: skip


def _table(found: Measurements) -> str:
    head = "".join(f"<th>{name}</th>" for name in COLUMNS)
    body = []
    for row in found.rows:
        spread = (
            "" if row.device_us_20 is None else f"{row.device_us_20:.1f}–{row.device_us_80:.1f}"
        )
        peak = None if row.peak_bytes is None else row.peak_bytes / 2**20
        numbers = (
            _number(row.device_us), spread, *map(_number, (row.host_us, row.gb_s, row.tflop_s)),
            _number(row.fraction, 2), _number(peak), _number(row.cold_s, 2), _number(row.warm_s, 2),
        )  # fmt: skip
        note = row.note if row.status == "ok" else f"{row.status}: {row.note}"
        words = (row.op, row.shape, row.dtype, row.phase, row.implementation)
        cells = "".join(f"<td>{html.escape(text)}</td>" for text in (*words, *numbers))
        body.append(f"<tr>{cells}<td class=note>{html.escape(note)}</td></tr>")
    return f"<h3>Every row</h3><table><tr>{head}</tr>{''.join(body)}</table>"


def _number(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{value:.{digits}f}"


# ------------------------------------------------------------------------ for use(policy="fastest")


def policy_table(found: Measurements) -> dict[str, Any]:
    """How many times as fast as torch each op is: dtype -> pairs of elements and ratio.

    A call takes the longer of its device and its host time: one of them waits for the other. Value
    and gradients together where both were measured: a policy decides about the two at once.
    """
    phases = [
        plots.ratios([r for r in found.rows if r.phase in group], peers.EAGER, _duration)
        for group in (("both",), ("forward",))
    ]
    ops: dict[str, dict[str, dict[int, float]]] = {}
    for ratios in reversed(phases):  # what comes later is better known
        for row, ratio in ratios.items():
            if row.elements:
                ops.setdefault(row.op, {}).setdefault(row.dtype, {})[row.elements] = ratio
    return {
        "gpu": found.gpu,
        "measured": {
            name: found.told(name) for name in ("torch", "triton", "driver", "cuda", "commit")
        }
        | {"days": _days(found)},
        "ops": {
            op: {
                dtype: [[n, round(ratio, 3)] for n, ratio in sorted(sizes.items())]
                for dtype, sizes in sorted(dtypes.items())
            }
            for op, dtypes in sorted(ops.items())
        },
    }


def _duration(row: Row) -> float:
    return max(row.device_us or 0.0, row.host_us or 0.0)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line. Returns 1 where ``--check`` finds another section, 2 where it finds none."""
    parser = argparse.ArgumentParser(prog="compare report", description=__doc__)
    parser.add_argument("--results", type=Path, default=DIRECTORY, metavar="DIR")
    parser.add_argument("--output", type=Path, metavar="DIR", help="results/report")
    parser.add_argument(
        "--write", type=Path, metavar="FILE", help="bring its speed section up to date"
    )
    parser.add_argument(
        "--check", type=Path, metavar="FILE", help="is its speed section up to date?"
    )
    parser.add_argument(
        "--table", type=Path, nargs="?", const=TABLES, metavar="DIR",
        help='write what use(policy="fastest") reads (tritongrad/tables)',
    )  # fmt: skip
    add_json_option(parser)
    options = parser.parse_args(arguments)
    measurements = collect(read_all(options.results))
    if options.json is not None:
        pairs = [pair for m in measurements for pair in zip(m.rows, m.about, strict=True)]
        write_json(options.json, [asdict(row) | about for row, about in pairs])
    file = options.check or options.write
    if file is not None:
        return _update(file, markdown(measurements), write=options.write is not None)
    if options.table is not None:
        return _write_tables(measurements, options.table)
    output: Path = options.output or options.results / "report"
    output.mkdir(parents=True, exist_ok=True)
    for found in measurements:
        for title, picture in pictures(found).items():
            (output / f"{slug(found.gpu)}-{slug(title)}.svg").write_text(picture)
    (output / "index.html").write_text(page(measurements))
    print(f"{output / 'index.html'}: {_told(measurements)}")
    return 0


def _told(measurements: Sequence[Measurements]) -> str:
    if not measurements:
        return "not measured"
    return "; ".join(f"{found.gpu}, {len(found.rows)} rows" for found in measurements)


def _update(file: Path, section: str, write: bool) -> int:
    text = file.read_text()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        print(
            f"{file}: no lines {BEGIN} and {END} for the section to stand between", file=sys.stderr
        )
        return 2
    new = before + section + after
    if write:
        file.write_text(new)
    elif new != text:
        print(
            f"{file}: out of date; run `python -m compare report --write {file}`", file=sys.stderr
        )
        return 1
    return 0


def _write_tables(measurements: Sequence[Measurements], directory: Path) -> int:
    if not measurements:
        print("compare report: nothing was measured, so there is no table", file=sys.stderr)
        return 2
    directory.mkdir(parents=True, exist_ok=True)
    for found in measurements:
        path = directory / f"{slug(found.gpu)}.json"
        path.write_text(json.dumps(policy_table(found), indent=1) + "\n")
        print(path)
    return 0
