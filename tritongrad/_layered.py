"""A layered layout of a directed acyclic graph: boxes in rows, all arrows downwards.

Sugiyama's method in four steps: a layer for every node (longest path to a sink); lanes through
the layers that a long edge crosses, one for each value, so that all who read it share its lane;
an order within each layer (barycentres, keeping the order with the fewest crossings); horizontal
places (weighted least squares to the neighbours, by isotonic regression).

K. Sugiyama, S. Tagawa, M. Toda, "Methods for visual understanding of hierarchical system
structures", 1981.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TypeAlias

GAP = 20  # Room beside a box or a lane.
RISE = 40  # Room between layers.
# Points at which lanes may bend, in the whole picture. Beyond it edges go straight, over boxes.
BENDS = 20_000
# How often to go through the layers, and how many slots to look at in all while doing so.
SWEEPS, EFFORT = 16, 40_000

Value: TypeAlias = tuple[int, int]  # What an edge carries: a node and one of its outputs.
_Links: TypeAlias = Mapping[int, Sequence[int]]


@dataclass(frozen=True)
class Layout:
    """Places of slots, which are the nodes, by their index, and after them the bends of lanes.

    x: horizontal centre of each slot, from 0 at the left end of the leftmost.
    top, bottom: vertical extent of each slot: a node's box, a bend's whole layer.
    lanes: for each value that is read, its node and then its bends, downwards.
    above: for each edge, the slot of its value's lane from which it comes down to its target.
    width, height: extent of everything.
    """

    x: Sequence[float]
    top: Sequence[float]
    bottom: Sequence[float]
    lanes: Mapping[Value, Sequence[int]]
    above: Sequence[int]
    width: float
    height: float


def lay_out(
    boxes: Sequence[tuple[float, float]],
    edges: Sequence[tuple[Value, int]],
    backbone: Collection[int],
) -> Layout:
    """Return the places of a graph's nodes, and how its edges go.

    Args:
        boxes: width and height of each node, in topological order; at least one.
        edges: the value and the node that reads it. Several edges may be equal.
        backbone: the nodes whose connections should be straight at the cost of the others'.
    """
    nodes = len(boxes)
    layer = _layers(nodes, edges)
    lanes = _lanes(edges, layer)
    above = []
    for value, target in edges:
        lane, span = lanes[value], layer[target] - layer[value[0]]
        above.append(lane[min(span, len(lane)) - 1])
    pieces = [piece for lane in lanes.values() for piece in pairwise(lane)]
    pieces += [(slot, target) for slot, (_, target) in zip(above, edges, strict=True)]
    # Edges that got no lane may span several layers; they have no say in the order.
    up, down = _neighbours([(a, b) for a, b in pieces if layer[b] == layer[a] + 1])

    tallest = [0.0] * (max(layer) + 1)
    for (_, height), level in zip(boxes, layer[:nodes], strict=True):
        tallest[level] = max(tallest[level], height)
    tops = [0.0, *accumulate(height + RISE for height in tallest)]
    widths = [width for width, _ in boxes] + [0.0] * (len(layer) - nodes)
    heights = [height for _, height in boxes] + [tallest[level] for level in layer[nodes:]]
    middles = [tops[level] + tallest[level] / 2 for level in layer]

    def pull(a: int, b: int) -> float:
        if a >= nodes and b >= nodes:
            return 8.0
        return 1.0 if a in backbone and b in backbone else 0.01

    x = _place(_order(layer, up, down), widths, up, down, pull)
    left = min(centre - width / 2 for centre, width in zip(x, widths, strict=True))
    right = max(centre + width / 2 for centre, width in zip(x, widths, strict=True))
    return Layout(
        x=[centre - left for centre in x],
        top=[middle - height / 2 for middle, height in zip(middles, heights, strict=True)],
        bottom=[middle + height / 2 for middle, height in zip(middles, heights, strict=True)],
        lanes=lanes,
        above=above,
        width=right - left,
        height=tops[-1] - RISE,
    )


def _layers(nodes: int, edges: Sequence[tuple[Value, int]]) -> list[int]:
    """Return each node's layer, from 0 at the top: as low as its readers let it be."""
    reads = defaultdict(list)
    for (source, _), target in edges:
        reads[target].append(source)
    height = [0] * nodes
    for node in reversed(range(nodes)):
        for source in reads[node]:
            height[source] = max(height[source], height[node] + 1)
    for node in range(nodes):
        if height[node] == 0 and reads[node]:
            # What nobody reads belongs under what it reads, not at the bottom of the picture.
            height[node] = min(height[source] for source in reads[node]) - 1
    top = max(height)
    return [top - each for each in height]


def _lanes(edges: Sequence[tuple[Value, int]], layer: list[int]) -> dict[Value, list[int]]:
    """Return the lane of each value that is read, and append the layers of the bends to `layer`."""
    lowest: dict[Value, int] = {}
    for value, target in edges:
        lowest[value] = max(lowest.get(value, 0), layer[target])
    lanes = {}
    room = BENDS
    for value, last in sorted(lowest.items(), key=lambda item: item[1] - layer[item[0][0]]):
        crossed = range(layer[value[0]] + 1, last)
        if len(crossed) > room:
            crossed = range(0)
        room -= len(crossed)
        lanes[value] = [value[0], *range(len(layer), len(layer) + len(crossed))]
        layer.extend(crossed)
    return lanes


def _neighbours(pieces: Sequence[tuple[int, int]]) -> tuple[_Links, _Links]:
    """Return the slots that each slot is connected with in the layer above and in that below."""
    up, down = defaultdict(list), defaultdict(list)
    for a, b in pieces:
        down[a].append(b)
        up[b].append(a)
    return dict(up), dict(down)


def _sweeps(slots: int) -> int:
    """Return how often to go through the layers: less often for pictures nobody can survey."""
    return max(3, min(SWEEPS, EFFORT // slots))


def _order(layer: Sequence[int], up: _Links, down: _Links) -> list[list[int]]:
    """Return the slots of each layer from left to right, with few crossings.

    Sweeps down and up, sorting each layer by the mean place of its neighbours in the last one;
    the best order seen is kept, since a sweep can make things worse.
    """
    rows: list[list[int]] = [[] for _ in range(max(layer) + 1)]
    place = [0] * len(layer)
    for slot, level in enumerate(layer):
        place[slot] = len(rows[level])
        rows[level].append(slot)
    best, fewest = [list(row) for row in rows], _crossings(rows, down, place)
    for sweep in range(_sweeps(len(layer))):
        if fewest == 0:
            break
        near = down if sweep % 2 else up
        for row in reversed(rows) if sweep % 2 else rows:
            wanted = {}
            for slot in row:
                others = [place[other] for other in near.get(slot, ())]
                wanted[slot] = sum(others) / len(others) if others else place[slot]
            row.sort(key=wanted.__getitem__)
            for i, slot in enumerate(row):
                place[slot] = i
        crossings = _crossings(rows, down, place)
        if crossings < fewest:
            best, fewest = [list(row) for row in rows], crossings
    return best


def _crossings(rows: Sequence[Sequence[int]], down: _Links, place: Sequence[int]) -> int:
    """Count the pairs of pieces between neighbouring layers that cross."""
    count = 0
    for row in rows:
        ends: list[int] = []
        for slot in row:
            for end in sorted(place[other] for other in down.get(slot, ())):
                count += len(ends) - bisect_right(ends, end)
                insort(ends, end)
    return count


def _place(
    rows: Sequence[Sequence[int]],
    widths: Sequence[float],
    up: _Links,
    down: _Links,
    pull: Callable[[int, int], float],
) -> list[float]:
    """Return the horizontal centre of each slot: near its neighbours, in order, with room."""
    x = [0.0] * len(widths)
    offsets = []
    for row in rows:
        steps = ((widths[a] + widths[b]) / 2 + GAP for a, b in pairwise(row))
        offsets.append([0.0, *accumulate(steps)])
        for slot, offset in zip(row, offsets[-1], strict=True):
            x[slot] = offset - offsets[-1][-1] / 2
    # The last sweep goes down: what is computed stands under what it is computed from.
    for sweep in reversed(range(_sweeps(len(widths)))):
        near = down if sweep % 2 else up
        numbers = range(len(rows))
        for i in reversed(numbers) if sweep % 2 else numbers:
            wanted, weights = [], []
            for slot in rows[i]:
                pulls = [(pull(slot, other), x[other]) for other in near.get(slot, ())]
                weight = sum(force for force, _ in pulls)
                wanted.append(sum(f * at for f, at in pulls) / weight if pulls else x[slot])
                weights.append(weight or 0.001)
            for slot, centre in zip(rows[i], _spread(wanted, weights, offsets[i]), strict=True):
                x[slot] = centre
    return x


def _spread(
    wanted: Sequence[float], weights: Sequence[float], offsets: Sequence[float]
) -> list[float]:
    """Return the places nearest to `wanted`, by weighted least squares, that keep their distance.

    Neighbours i and i + 1 must be at least `offsets[i + 1] - offsets[i]` apart. Less the offsets,
    places need only not decrease: isotonic regression, solved by pooling adjacent violators.
    """
    pools: list[tuple[float, float, int]] = []  # Mean, weight and number of what is pooled.
    for want, weight, offset in zip(wanted, weights, offsets, strict=True):
        mean, total, size = want - offset, weight, 1
        while pools and pools[-1][0] > mean:
            before, heavy, more = pools.pop()
            mean = (before * heavy + mean * total) / (heavy + total)
            total, size = heavy + total, size + more
        pools.append((mean, total, size))
    level = (mean for mean, _, size in pools for _ in range(size))
    return [mean + offset for mean, offset in zip(level, offsets, strict=True)]
