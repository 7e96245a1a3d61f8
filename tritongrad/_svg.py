"""A picture of a computational graph, as one self-contained SVG string. Data flows downwards."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar
from xml.sax.saxutils import escape

from ._layered import Layout, Value, lay_out

if TYPE_CHECKING:
    from .graph import Graph, Node

T = TypeVar("T", int, Value)

CHAR = 7.23  # Width of a character of the 12 px monospace font; 0.6 em, rounded up.
SMALL = 10.5 / 12  # Size of the second and third line of a node relative to the first.
LINE, PAD, MARGIN = 15, 10, 18  # Height of a line; room inside a node and around the picture.
LONGEST = 34  # Characters of a line in a node; the rest is in its tooltip.
ARROW = 7  # Height of an arrowhead.

STYLE = """
.tritongrad { font: 12px ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono",
  "Liberation Mono", monospace; }
.tritongrad text { fill: #1f2328; }
.tritongrad .more { font-size: 10.5px; fill: #59636e; }
.tritongrad .back { fill: #ffffff; }
.tritongrad .way { fill: none; stroke: #818b98; stroke-width: 1.2; }
.tritongrad .head { fill: #818b98; }
.tritongrad .port { font-size: 9.5px; fill: #59636e; text-anchor: middle; stroke: #ffffff;
  stroke-width: 4px; paint-order: stroke; }
.tritongrad rect { stroke-width: 1.2; }
.tritongrad .leaf rect { fill: #f6f8fa; stroke: #818b98; }
.tritongrad .constant rect { fill: #ffffff; stroke: #818b98; stroke-dasharray: 2 2; }
.tritongrad .triton rect { fill: #ddf4ff; stroke: #0969da; stroke-width: 2; }
.tritongrad .triton .name { font-weight: bold; fill: #0550ae; }
.tritongrad .torch rect { fill: #fff8f0; stroke: #bc4c00; stroke-dasharray: 5 3; }
.tritongrad .output rect { fill: #dafbe1; stroke: #1a7f37; }
@media (prefers-color-scheme: dark) {
.tritongrad text { fill: #e6edf3; }
.tritongrad .more, .tritongrad .port { fill: #9198a1; }
.tritongrad .back { fill: #0d1117; }
.tritongrad .port { stroke: #0d1117; }
.tritongrad .way { stroke: #7d8590; }
.tritongrad .head { fill: #7d8590; }
.tritongrad .leaf rect { fill: #212830; stroke: #7d8590; }
.tritongrad .constant rect { fill: #0d1117; stroke: #7d8590; }
.tritongrad .triton rect { fill: #0c2d5e; stroke: #4493f8; }
.tritongrad .triton .name { fill: #a5d0ff; }
.tritongrad .torch rect { fill: #2c1d12; stroke: #db6d28; }
.tritongrad .output rect { fill: #12331d; stroke: #3fb950; }
}
"""

LEGEND = {
    "leaf": "leaf",
    "constant": "no gradient",
    "triton": "Triton",
    "torch": "torch",
    "output": "output",
}


def render(graph: Graph) -> str:
    """Return the picture of a graph."""
    layout = lay_out(
        [_size(node) for node in graph.nodes],
        [((edge.source, edge.output), edge.target) for edge in graph.edges],
        {node.index for node in graph.nodes if node.is_operation},
    )
    header, header_width, header_height = _draw_header(graph)
    width = max(layout.width, header_width) + 2 * MARGIN
    height = header_height + layout.height + 2 * MARGIN
    left = (width - layout.width) / 2
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" class="tritongrad" role="img" '
            f'width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}">',
            f"<title>{_text(graph.summary())}</title>",
            f"<style>{STYLE}</style>",
            # The background is our own: a page may be dark while the reader's scheme is light.
            '<rect class="back" width="100%" height="100%" rx="6"/>',
            f'<g transform="translate({MARGIN} {MARGIN})">',
            *header,
            "</g>",
            f'<g transform="translate({left:.1f} {MARGIN + header_height})">',
            *_draw_edges(graph, layout),
            *(_draw_node(graph, node, layout) for node in graph.nodes),
            "</g>",
            "</svg>",
            "",
        ]
    )


def _text(text: str) -> str:
    """Return text as XML has it; characters that XML cannot have at all become U+FFFD."""
    allowed = "\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff"
    return escape(re.sub(f"[^{allowed}]", "\ufffd", text))


def _lines(node: Node) -> list[str]:
    """Return the lines of text in a node's box: its name, what it makes, its derivative."""
    values = str(node.values[0]) if len(node.values) == 1 else f"{len(node.values)} outputs"
    return [_shorten(line, LONGEST) for line in (node.name, values, node.rule) if line]


def _shorten(text: str, length: int) -> str:
    """Return text on one line of at most `length` characters."""
    text = " ".join(text.split())
    return text if len(text) <= length else f"{text[: length - 1]}\u2026"


def _size(node: Node) -> tuple[float, float]:
    """Return the width and height of a node's box."""
    name, *more = (len(line) * CHAR for line in _lines(node))
    return max(name, *(width * SMALL for width in more)) + 2 * PAD, (1 + len(more)) * LINE + PAD


def _draw_node(graph: Graph, node: Node, layout: Layout) -> str:
    width, height = _size(node)
    x, y = layout.x[node.index], layout.top[node.index]
    tip = [f"%{node.index}: {graph.expression(node)}", *map(str, node.values), *node.details]
    text = [
        f'<text class="{"more" if i else "name"}" x="{x:.1f}" y="{y + 17 + i * LINE:.1f}" '
        f'text-anchor="middle">{_text(line)}</text>'
        for i, line in enumerate(_lines(node))
    ]
    return (
        f'<g class="{node.kind.value}"><title>{_text(chr(10).join(tip))}</title>'
        f'<rect x="{x - width / 2:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" '
        f'rx="{4 if node.is_operation else height / 2:.1f}"/>{"".join(text)}</g>'
    )


def _draw_edges(graph: Graph, layout: Layout) -> list[str]:
    """Draw each lane once, and from it one arrow to each reader of its value."""
    nodes, x = graph.nodes, layout.x
    arrows = list(enumerate(zip(graph.edges, layout.above, strict=True)))
    readers: dict[Value, list[int]] = defaultdict(list)
    arriving: dict[int, list[tuple[float, int]]] = defaultdict(list)
    for number, (edge, above) in arrows:
        readers[edge.source, edge.output].append(edge.target)
        arriving[edge.target].append((x[above], number))
    leaving: dict[int, list[tuple[float, Value]]] = defaultdict(list)
    for value, lane in layout.lanes.items():
        below = lane[1:2] or readers[value]
        leaving[value[0]].append((sum(x[slot] for slot in below) / len(below), value))
    # Along a box, ends stand in the order of where they come from or go to, so as not to cross.
    ends = {key: at for node in arriving for key, at in _ports(nodes[node], arriving[node], x)}
    starts = {key: at for node in leaving for key, at in _ports(nodes[node], leaving[node], x)}

    drawn, labels = [], []
    for value, (source, *bends) in layout.lanes.items():
        at, low = starts[value], layout.bottom[source]
        if len(nodes[source].values) > 1:
            labels.append(f'<text class="port" x="{at:.1f}" y="{low + 13:.1f}">{value[1]}</text>')
        path = f"M{at:.1f} {low:.1f}"
        for bend in bends:
            path += f"{_curve(at, low, x[bend], layout.top[bend])}V{layout.bottom[bend]:.1f}"
            at, low = x[bend], layout.bottom[bend]
        if bends:
            drawn.append(f'<path class="way" d="{path}"/>')
    for number, (edge, above) in arrows:
        at = starts[edge.source, edge.output] if above == edge.source else x[above]
        end, low, high = ends[number], layout.bottom[above], layout.top[edge.target]
        value_text = nodes[edge.source].values[edge.output]
        tip = f"%{edge.source} to %{edge.target}, argument {edge.argument}: {value_text}"
        drawn.append(
            f'<path class="way" d="M{at:.1f} {low:.1f}{_curve(at, low, end, high - ARROW)}">'
            f"<title>{_text(tip)}</title></path>"
            f'<path class="head" d="M{end:.1f} {high:.1f}l-3.5 {-ARROW - 1}h7z"/>'
        )
    return drawn + labels


def _ports(node: Node, ends: list[tuple[float, T]], x: Sequence[float]) -> list[tuple[T, float]]:
    """Spread edge ends, given as place wanted and key, along a node's box; return key and place."""
    step = min(16.0, (_size(node)[0] - 2 * PAD) / len(ends))
    left = x[node.index] - step * (len(ends) - 1) / 2
    return [(key, left + i * step) for i, (_, key) in enumerate(sorted(ends))]


def _curve(x: float, y: float, to_x: float, to_y: float) -> str:
    """Return path commands from (x, y) to another point, vertical at both ends."""
    if abs(x - to_x) < 0.05:
        return f"V{to_y:.1f}"
    middle = (y + to_y) / 2
    return f"C{x:.1f} {middle:.1f} {to_x:.1f} {middle:.1f} {to_x:.1f} {to_y:.1f}"


def _draw_header(graph: Graph) -> tuple[list[str], float, float]:
    """Draw the legend of the kinds that occur and what is not there; return also the size."""
    drawn, x, height = [], 0.0, 36.0
    for kind, meaning in LEGEND.items():
        found = [node for node in graph.nodes if node.kind.value == kind]
        if not found:
            continue
        text = f"{meaning} ({len(found)})"
        drawn.append(
            f'<g class="{kind}"><rect x="{x + 1:.1f}" y="1" width="24" height="14" '
            f'rx="{3 if found[0].is_operation else 7}"/>'
            f'<text class="more" x="{x + 32:.1f}" y="12">{text}</text></g>'
        )
        x += 32 + len(text) * CHAR * SMALL + 20
    width = x - 20
    if graph.absent:
        text = _shorten(f"not in the graph: {', '.join(graph.absent)}", 3 * LONGEST)
        drawn.append(f'<text class="more" x="1" y="34">{_text(text)}</text>')
        width, height = max(width, len(text) * CHAR * SMALL), height + 18
    return drawn, width, height
