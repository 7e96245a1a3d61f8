"""The recorded computational graph of a tensor, as text, Mermaid and SVG.

Autograd records which data went through which operations to make a result. `graph(y)` reads that
record into plain data: which leaves, which operations, which of them run on Triton (with their
derivative and their kernels) and which on torch.

Only the structure is read: nodes, edges, shapes, dtypes. Saved tensors are not touched, because
reading one may recompute a checkpoint or copy from another device; therefore a graph whose saved
tensors were freed by `backward` draws like any other. The result holds no tensor and no autograd
node, so keeping a `Graph` keeps no memory of the program alive.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch

from . import _mermaid, _svg
from .op import Op

_AccumulateGrad = torch._C._functions.AccumulateGrad  # type: ignore[attr-defined]

# What the walk visits: an operation's autograd node or, where the recording begins, a tensor.
_Element: TypeAlias = torch.autograd.graph.Node | torch.Tensor
# Where a tensor comes from: an element and which of its outputs the tensor is.
_Origin: TypeAlias = tuple[_Element, int]


class Kind(enum.Enum):
    """What a node of the graph is. The values are its class names in Mermaid and SVG."""

    LEAF = "leaf"
    CONSTANT = "constant"
    TRITON = "triton"
    TORCH = "torch"
    OUTPUT = "output"


@dataclass(frozen=True)
class Value:
    """A tensor that flows through the graph. `shape` is None where torch has none (nested)."""

    dtype: torch.dtype
    shape: tuple[int | torch.SymInt, ...] | None
    name: str = ""

    def __str__(self) -> str:
        """`float32[4, 3]`, and `u: float32[4, 3]` for a value that the caller named."""
        sizes = "nested" if self.shape is None else ", ".join(map(str, self.shape))
        text = f"{str(self.dtype).removeprefix('torch.')}[{sizes}]"
        return f"{self.name}: {text}" if self.name else text


class Edge(NamedTuple):
    """A value's way from output number `output` of node `source` to an argument of `target`."""

    source: int
    output: int
    target: int
    argument: int


@dataclass(frozen=True)
class Node:
    """One node: a leaf, an operation or an output of the graph.

    `inputs` has an entry for each tensor argument of an operation, None for an argument that needs
    no gradient, and for an output the one edge to it. `rule` is the derivative as one line of
    mathematics, or what computes it; empty where torch does. Only Triton nodes have kernels.
    """

    index: int
    kind: Kind
    name: str
    values: tuple[Value, ...]
    inputs: tuple[Edge | None, ...] = ()
    rule: str = ""
    kernels: tuple[str, ...] = ()
    backward_kernels: tuple[str, ...] = ()

    @property
    def is_operation(self) -> bool:
        """Whether something is computed here."""
        return self.kind in (Kind.TRITON, Kind.TORCH)

    @property
    def details(self) -> tuple[str, ...]:
        """What the node is, and for an operation what computes it and its derivative."""
        match self.kind:
            case Kind.LEAF:
                return ("leaf, requires grad",)
            case Kind.CONSTANT:
                return ("requires no gradient: nothing was recorded",)
            case Kind.OUTPUT:
                return ("output",)
            case Kind.TORCH:
                return ("torch", f"derivative: {self.rule or 'torch'}")
        parts = {
            "derivative": self.rule,
            "kernels": ", ".join(self.kernels),
            "backward": ", ".join(self.backward_kernels),
        }
        return ("Triton", *(f"{what}: {text}" for what, text in parts.items() if text))


@dataclass(frozen=True)
class Graph:
    """The computational graph of one or more tensors. Made by `graph`.

    Nodes are in topological order, each node's number is its place in `nodes`, and a node that is
    used several times is there once. `str` gives the readable text, `_repr_svg_` the picture in
    notebooks. `absent` has the names the caller gave to tensors that are not in the graph.
    """

    nodes: tuple[Node, ...]
    absent: tuple[str, ...] = ()

    @property
    def edges(self) -> tuple[Edge, ...]:
        """Every edge, in the direction of the data, ordered by target and argument."""
        return tuple(edge for node in self.nodes for edge in node.inputs if edge is not None)

    def summary(self) -> str:
        """Count the leaves and the operations: `1 leaf, 2 operations (1 Triton, 1 torch)`."""
        count = {kind: sum(node.kind is kind for node in self.nodes) for kind in Kind}
        leaves, triton, other = count[Kind.LEAF], count[Kind.TRITON], count[Kind.TORCH]
        return (
            f"{leaves} {'leaf' if leaves == 1 else 'leaves'}, {triton + other} "
            f"{'operation' if triton + other == 1 else 'operations'} "
            f"({triton} Triton, {other} torch)"
        )

    def __repr__(self) -> str:
        return f"<tritongrad.Graph: {self.summary()}>"

    def __str__(self) -> str:
        """One numbered line for each node: what made it of which nodes, its value, on what."""
        rows = [
            (self.expression(node), "; ".join(map(str, node.values)), " | ".join(node.details))
            for node in self.nodes
        ]
        # One very wide row (a cat of hundreds) must not push every other row's columns away.
        widths = [min(40, max(len(row[column]) for row in rows)) for column in (0, 1)]
        digits = len(str(len(rows) - 1))
        lines = [self.summary()]
        for index, (call, values, what) in enumerate(rows):
            number = f"%{index}".rjust(digits + 1)
            lines.append(f"  {number}  {call:{widths[0]}}  {values:{widths[1]}}  {what}")
        if self.absent:
            lines.append(f"  not in the graph: {', '.join(self.absent)}")
        return "\n".join(lines)

    def expression(self, node: Node) -> str:
        """Write a node as a call of the nodes it reads: `mul(%0, %3.1, constant)`."""
        if node.kind in (Kind.LEAF, Kind.CONSTANT):
            return node.name
        arguments = []
        for edge in node.inputs:
            if edge is None:
                arguments.append("constant")
            elif len(self.nodes[edge.source].values) == 1:
                arguments.append(f"%{edge.source}")
            else:
                arguments.append(f"%{edge.source}.{edge.output}")
        if node.kind is Kind.OUTPUT:
            return f"{node.name} = {arguments[0]}"
        return f"{node.name}({', '.join(arguments)})"

    def to_mermaid(self) -> str:
        """Return a Mermaid flowchart. Mermaid draws at most 500 edges unless set otherwise."""
        return _mermaid.render(self)

    def to_svg(self) -> str:
        """Return a self-contained SVG picture that follows the reader's light or dark scheme."""
        return _svg.render(self)

    def _repr_svg_(self) -> str:
        return self.to_svg()

    def save(self, path: str | Path) -> None:
        """Write the graph to `path`: a picture (.svg), Mermaid (.mmd) or text (.txt).

        Raises ValueError for any other suffix.
        """
        path = Path(path)
        match path.suffix.lower():
            case ".svg":
                content = self.to_svg()
            case ".mmd":
                content = self.to_mermaid()
            case ".txt":
                content = f"{self}\n"
            case suffix:
                raise ValueError(f"path must end in .svg, .mmd or .txt, got {suffix!r}")
        path.write_text(content, encoding="utf-8")


def graph(
    y: torch.Tensor | Sequence[torch.Tensor],
    names: Mapping[str, torch.Tensor] | None = None,
) -> Graph:
    """Return the computational graph that autograd recorded for `y`.

    Args:
        y: a tensor, or a tuple or list of tensors, of any shape, dtype and device. A tensor
            without a history (a leaf, or one that needs no gradient) gives a single node.
        names: what to call tensors, for example `{"x": x}` or `dict(model.named_parameters())`:
            leaves, intermediate values and outputs. Tensors that did not contribute, such as
            detached ones, are listed in `Graph.absent`.

    Drawing changes nothing: no gradient is computed, no hook runs, no saved tensor is read.

    Raises:
        TypeError: `y` or a value of `names` is not a tensor, or belongs to a `torch.func`
            transform that is still running.
        ValueError: `y` is an empty sequence.
    """
    several = isinstance(y, (tuple, list))
    outputs: dict[str, Any]
    outputs = {f"y[{i}]": tensor for i, tensor in enumerate(y)} if several else {"y": y}
    if not outputs:
        raise ValueError("graph(): argument 'y' is an empty sequence, expected tensors")
    if names is None:
        names = {}
    if not isinstance(names, Mapping):
        raise TypeError(f"graph(): argument 'names' must be a mapping, got {type(names).__name__}")
    for argument, tensor in outputs.items():
        _check_tensor(argument, tensor)
    for name, tensor in names.items():
        _check_tensor(f"names[{name!r}]", tensor)

    roots = [_origin(tensor) for tensor in outputs.values()]
    walk = _topological([element for element, _ in roots])
    number = {id(element): index for index, (element, _) in enumerate(walk)}

    labels: dict[tuple[int, int], str] = {}
    absent = []
    for name, tensor in names.items():
        element, output = _origin(tensor)
        if id(element) in number:
            key = (number[id(element)], output)
            labels[key] = f"{labels[key]}, {name}" if key in labels else name
        else:
            absent.append(name)

    read = {id(origin[0]) for _, origins in walk for origin in origins if origin}
    nodes: list[Node] = []
    for index, (element, origins) in enumerate(walk):
        edges = tuple(
            origin and Edge(number[id(origin[0])], origin[1], index, argument)
            for argument, origin in enumerate(origins)
        )
        if isinstance(element, torch.Tensor):
            # A leaf that was frozen after it was used is still a leaf of this recording.
            recorded = element.requires_grad or id(element) in read
            nodes.append(_leaf(index, element, recorded, labels.get((index, 0), "")))
        else:
            nodes.append(_operation(index, element, edges, labels))
    for i, (element, output) in enumerate(roots):
        if isinstance(element, torch.Tensor):
            continue  # Nothing was computed: the leaf's own node says all there is to say.
        edge = Edge(number[id(element)], output, len(nodes), 0)
        value = nodes[edge.source].values[output]
        name = value.name or (f"output {i}" if several else "output")
        nodes.append(Node(edge.target, Kind.OUTPUT, name, (replace(value, name=""),), (edge,)))
    return Graph(tuple(nodes), tuple(absent))


def _check_tensor(argument: str, tensor: object) -> None:
    """Raise TypeError, naming the argument, unless `tensor` is a tensor whose graph we can see."""
    if not isinstance(tensor, torch.Tensor):
        expected = "a tensor, or a tuple or list of tensors" if argument == "y" else "a tensor"
        raise TypeError(
            f"graph(): argument {argument!r} must be {expected}, got {type(tensor).__name__}"
        )
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        raise TypeError(
            f"graph(): argument {argument!r} belongs to a torch.func transform that is still "
            "running; call graph() outside the transform, on what it returns"
        )


def _origin(tensor: torch.Tensor) -> _Origin:
    """Return where a tensor comes from: a node and its output number, or itself for a leaf."""
    if tensor.grad_fn is None:
        return tensor, 0
    return tensor.grad_fn, tensor.output_nr


def _origins(element: _Element) -> list[_Origin | None]:
    """Return where each argument of an element comes from, None if it needs no gradient.

    A leaf stands for its gradient accumulator: that node is how autograd refers to the leaf.
    """
    if isinstance(element, torch.Tensor):
        return []
    found: list[_Origin | None] = []
    for node, output in element.next_functions:
        if node is None:
            found.append(None)
        elif isinstance(node, _AccumulateGrad):
            found.append((node.variable, 0))
        else:
            found.append((node, output))
    return found


def _topological(roots: Sequence[_Element]) -> list[tuple[_Element, list[_Origin | None]]]:
    """Return every element the roots depend on with its origins, once, inputs before readers.

    A depth-first walk with its own stack: graphs are deeper than Python's recursion limit.
    Elements are told apart by `id`, which is safe while the lists here hold them: torch makes one
    Python object for an autograd node and keeps it as long as somebody refers to it.
    """
    ordered: list[tuple[_Element, list[_Origin | None]]] = []
    seen: set[int] = set()
    stack: list[tuple[_Element, list[_Origin | None] | None]]
    stack = [(root, None) for root in reversed(roots)]
    while stack:
        element, origins = stack.pop()
        if origins is not None:
            ordered.append((element, origins))
        elif id(element) not in seen:
            seen.add(id(element))
            origins = _origins(element)
            stack.append((element, origins))
            stack.extend((origin[0], None) for origin in reversed(origins) if origin)
    return ordered


def _leaf(index: int, tensor: torch.Tensor, recorded: bool, name: str) -> Node:
    """Describe a tensor at which the recording begins, or one of which nothing was recorded."""
    nested = tensor.is_nested and tensor.layout is torch.strided
    value = Value(tensor.dtype, None if nested else tuple(tensor.shape))
    if not recorded:
        return Node(index, Kind.CONSTANT, name or "constant", (value,))
    default = "parameter" if isinstance(tensor, torch.nn.Parameter) else "leaf"
    return Node(index, Kind.LEAF, name or default, (value,))


def _operation(
    index: int,
    node: torch.autograd.graph.Node,
    inputs: tuple[Edge | None, ...],
    labels: Mapping[tuple[int, int], str],
) -> Node:
    """Describe an autograd node; what its backward takes in is shaped as what forward gave out."""
    values = tuple(
        Value(
            output.dtype,
            None if output.is_cpp_nested_tensor else tuple(output.shape),
            labels.get((index, i), ""),
        )
        for i, output in enumerate(node._input_metadata)
    )
    name = node.name().rpartition("::")[2]  # Some have their C++ namespace in front.
    if not isinstance(node, torch.autograd.function.BackwardCFunction):
        return Node(index, Kind.TORCH, name, values, inputs)
    function = node._forward_cls
    op = vars(function).get("op")
    if not isinstance(op, Op):  # Somebody else's Function.
        rule = f"{function.__name__}.backward"
        return Node(index, Kind.TORCH, name, values, inputs, rule)
    # What forward returns beyond the op's outputs is for its backward alone.
    return Node(
        index,
        Kind.TRITON,
        op.name,
        values[: op.outputs],
        inputs,
        op.rule_text,
        op.kernels,
        op.backward_kernels,
    )
