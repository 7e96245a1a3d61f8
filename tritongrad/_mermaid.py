"""A computational graph as a Mermaid flowchart."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .graph import Graph

CLASSES = """\
  classDef leaf fill:#f6f8fa,stroke:#818b98,color:#1f2328
  classDef constant fill:#ffffff,stroke:#818b98,color:#59636e,stroke-dasharray:2 2
  classDef triton fill:#ddf4ff,stroke:#0969da,color:#0a3069,stroke-width:2px
  classDef torch fill:#fff8f0,stroke:#bc4c00,color:#762c00,stroke-dasharray:5 3
  classDef output fill:#dafbe1,stroke:#1a7f37,color:#044f1e"""


def render(graph: Graph) -> str:
    """Return the flowchart of a graph."""
    lines = ["flowchart TD"]
    for node in graph.nodes:
        label = [node.name, *map(str, node.values), *node.details]
        text = "<br/>".join(map(_escape, label))
        left, right = ("[", "]") if node.is_operation else ("([", "])")
        lines.append(f'  n{node.index}{left}"{text}"{right}:::{node.kind.value}')
    for edge in graph.edges:
        several = len(graph.nodes[edge.source].values) > 1
        arrow = f'-->|"{edge.output}"|' if several else "-->"
        lines.append(f"  n{edge.source} {arrow} n{edge.target}")
    lines.append(CLASSES)
    if graph.absent:
        lines.append(f"  %% not in the graph: {_escape(', '.join(graph.absent))}")
    return "\n".join(lines) + "\n"


def _escape(text: str) -> str:
    """Escape what Mermaid reads as markup inside a quoted label, and put it on one line."""
    text = text.replace("#", "#35;")
    for mark, name in (("&", "amp"), ("<", "lt"), (">", "gt"), ('"', "quot"), ("`", "96")):
        text = text.replace(mark, f"#{name};")
    return " ".join(text.split())
