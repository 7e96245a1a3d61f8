"""``tritongrad.graph``: what it reads from autograd's record, and its text, Mermaid and SVG."""

from __future__ import annotations

import gc
import re
import sys
import weakref
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from support import DEVICE
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tritongrad import _layered
from tritongrad.graph import Edge, Graph, Kind, graph
from tritongrad.op import OPS, Op

SVG = "{http://www.w3.org/2000/svg}"


def make_op(name: str, function: Callable[..., Tensor], formula: str) -> Callable[..., Tensor]:
    """A product-like op whose forward is torch's, with the record of a Triton op."""
    backward = Op(
        name=f"{name}_backward",
        bind=None,
        forward=lambda params, g, a, b, _: (g * b, g * a),
        outputs=2,
        reference=lambda params, g, a, b, _: (g * b, g * a),
        kernels=(f"{name}_bwd",),
    )
    op = Op(
        name=name,
        bind=None,
        forward=lambda params, a, b: function(a, b),
        rule=lambda params, needs, specs, grads, saved: (
            grads[0] * saved[1] if needs[0] else None,
            grads[0] * saved[0] if needs[1] else None,
        ),
        backward=backward,
        kernels=(f"{name}_fwd",),
        formula=formula,
    )
    return lambda a, b: op.function.apply(None, a, b)


dot = make_op("dot", torch.dot, "g * other, g * input")
mul = make_op("mul", torch.mul, "g * other, g * input")


@pytest.fixture
def x() -> Tensor:
    return torch.arange(4.0, requires_grad=True)


def operations(drawn: Graph) -> list[str]:
    return [node.name for node in drawn.nodes if node.is_operation]


def boxes(drawn: Graph, kind: str) -> list[list[str]]:
    """The lines of text in the boxes of one kind in the picture, legend left out."""
    root = ET.fromstring(drawn.to_svg())
    picture = root.findall(f"{SVG}g")[1]
    groups = picture.findall(f"{SVG}g[@class='{kind}']")
    return [[text.text or "" for text in group.findall(f"{SVG}text")] for group in groups]


def check_renders(drawn: Graph) -> None:
    """All three forms exist, and agree on how many nodes and edges there are."""
    assert str(drawn).count("\n  ") == len(drawn.nodes) + bool(drawn.absent)
    mermaid = drawn.to_mermaid()
    assert len(re.findall(r"^  n\d+[\[(]", mermaid, re.M)) == len(drawn.nodes)
    assert len(re.findall(r"^  n\d+ -->.*n\d+$", mermaid, re.M)) == len(drawn.edges)
    picture = ET.fromstring(drawn.to_svg())
    assert len(picture.findall(f".//{SVG}path[@class='head']")) == len(drawn.edges)
    assert sum(len(boxes(drawn, kind.value)) for kind in Kind) == len(drawn.nodes)


# The examples of the document.


def test_product_with_itself(x: Tensor) -> None:
    drawn = graph(2 * dot(x, x), {"x": x})
    assert str(drawn) == (
        "1 leaf, 2 operations (1 Triton, 1 torch)\n"
        "  %0  x                           float32[4]  leaf, requires grad\n"
        "  %1  dot(%0, %0)                 float32[]   Triton | derivative: g * other, g * input"
        " | kernels: dot_fwd | backward: dot_bwd\n"
        "  %2  MulBackward0(%1, constant)  float32[]   torch | derivative: torch\n"
        "  %3  output = %2                 float32[]   output"
    )
    assert repr(drawn) == "<tritongrad.Graph: 1 leaf, 2 operations (1 Triton, 1 torch)>"
    assert drawn.edges == (Edge(0, 0, 1, 0), Edge(0, 0, 1, 1), Edge(1, 0, 2, 0), Edge(2, 0, 3, 0))
    check_renders(drawn)


def test_mermaid_in_full(x: Tensor) -> None:
    text = graph(mul(x, x), {"x": x}).to_mermaid()
    assert text.split("  classDef")[0] == (
        "flowchart TD\n"
        '  n0(["x<br/>float32[4]<br/>leaf, requires grad"]):::leaf\n'
        '  n1["mul<br/>float32[4]<br/>Triton<br/>derivative: g * other, g * input'
        '<br/>kernels: mul_fwd<br/>backward: mul_bwd"]:::triton\n'
        '  n2(["output<br/>float32[4]<br/>output"]):::output\n'
        "  n0 --> n1\n"
        "  n0 --> n1\n"
        "  n1 --> n2\n"
    )
    assert all(f"classDef {kind.value} " in text for kind in Kind)


def test_svg_shows_what_runs_where(x: Tensor) -> None:
    drawn = graph((x * mul(x, x)).sum(), {"x": x})
    assert boxes(drawn, "leaf") == [["x", "float32[4]"]]
    assert boxes(drawn, "triton") == [["mul", "float32[4]", "g * other, g * input"]]
    assert boxes(drawn, "torch") == [["MulBackward0", "float32[4]"], ["SumBackward0", "float32[]"]]
    assert boxes(drawn, "output") == [["output", "float32[]"]]
    svg = drawn.to_svg()
    legend = ET.fromstring(svg).findall(f"{SVG}g")[0]
    assert [text.text for text in legend.iter(f"{SVG}text")] == [
        "leaf (1)", "Triton (1)", "torch (2)", "output (1)",
    ]  # fmt: skip
    assert "<title>%1: mul(%0, %0)\nfloat32[4]\nTriton\nderivative: " in svg
    assert "prefers-color-scheme: dark" in svg
    assert "http" not in svg.replace("http://www.w3.org/2000/svg", "")  # self-contained
    assert drawn._repr_svg_() == svg


def test_detached_value_is_a_constant(x: Tensor) -> None:
    y = x * x
    u = y.detach()
    drawn = graph(mul(u, x), {"x": x, "y": y, "u": u})
    assert operations(drawn) == ["mul"]
    assert drawn.absent == ("y", "u")
    assert "mul(constant, %0)" in str(drawn)
    assert str(drawn).endswith("\n  not in the graph: y, u")
    assert "%% not in the graph: y, u" in drawn.to_mermaid()
    assert "not in the graph: y, u" in drawn.to_svg()
    check_renders(drawn)


def test_control_flow_leaves_the_branch_taken() -> None:
    def f(a: Tensor) -> Tensor:
        b = a * 2
        while b.norm() < 1000:
            b = b * 2
        return b if b.sum() > 0 else 100 * b

    up, down = (torch.tensor(value, requires_grad=True) for value in (300.0, -300.0))
    assert operations(graph(f(up))) == ["MulBackward0"] * 2
    assert operations(graph(f(down))) == ["MulBackward0"] * 3
    small = torch.tensor(1.0, requires_grad=True)
    assert len(operations(graph(f(small)))) == 10  # 2**10 is the first to reach 1000


# What a graph can be made of.


def test_real_op(x: Tensor) -> None:
    op, x = OPS["mul"], x.detach().to(DEVICE).requires_grad_()
    node = graph(op(x, x)).nodes[1]
    assert (node.kind, node.name) == (Kind.TRITON, "mul")
    assert node.rule == op.formula
    assert node.kernels == op.kernels != ()
    assert node.backward_kernels == op.backward_kernels


def test_leaf_and_constant(x: Tensor) -> None:
    leaf = graph(x)
    assert [(node.kind, node.name) for node in leaf.nodes] == [(Kind.LEAF, "leaf")]
    constant = graph(torch.zeros(2, 0, dtype=torch.int64))
    assert constant.nodes[0].kind is Kind.CONSTANT
    assert "int64[2, 0]  requires no gradient: nothing was recorded" in str(constant)
    parameter = graph(torch.nn.Parameter(torch.ones(())))
    assert parameter.nodes[0].name == "parameter"
    for drawn in (leaf, constant, parameter):
        assert drawn.edges == ()
        check_renders(drawn)


def test_no_recording(x: Tensor) -> None:
    with torch.no_grad():
        assert graph(x * x).nodes[0].kind is Kind.CONSTANT
    with torch.inference_mode():
        assert graph(x * x).nodes[0].kind is Kind.CONSTANT


def test_leaf_frozen_after_use_is_still_recorded(x: Tensor) -> None:
    y = x * 2
    x.requires_grad_(False)
    assert graph(y).nodes[0].kind is Kind.LEAF


def test_shared_nodes_appear_once(x: Tensor) -> None:
    y = x * x
    z = (y + y) * y
    drawn = graph([z, y, z], {"x": x, "y": y})
    assert operations(drawn) == ["MulBackward0", "AddBackward0", "MulBackward0"]
    names = [node.name for node in drawn.nodes if node.kind is Kind.OUTPUT]
    assert names == ["output 0", "y", "output 2"]
    assert "y: float32[4]" in str(drawn)
    check_renders(drawn)


def test_two_names_of_one_tensor(x: Tensor) -> None:
    assert graph(x, {"x": x, "tied": x}).nodes[0].name == "x, tied"


def test_output_numbers(x: Tensor) -> None:
    a, b, c = torch.stack([x, x, x]).unbind(0)
    drawn = graph(a * c, {"a": a, "b": b})
    assert "MulBackward0(%2.0, %2.2)" in str(drawn)
    assert "a: float32[4]; b: float32[4]; float32[4]" in str(drawn)
    assert 'n2 -->|"2"| n3' in drawn.to_mermaid()
    ports = ET.fromstring(drawn.to_svg()).findall(f".//{SVG}text[@class='port']")
    assert sorted(port.text or "" for port in ports) == ["0", "2"]
    check_renders(drawn)


def test_outputs_kept_for_backward_are_not_shown(x: Tensor) -> None:
    op = Op(
        name="norm",
        bind=None,
        forward=lambda params, a: (a * 2, a.sum()),
        rule=lambda params, needs, specs, grads, saved: (grads[0] * 2,),
    )
    y, _ = op.function.apply(None, x)
    assert [str(value) for value in graph(y).nodes[1].values] == ["float32[4]"]


def test_double_backward(x: Tensor) -> None:
    x = x.detach().to(DEVICE).requires_grad_()
    (g,) = torch.autograd.grad(mul(mul(x, x), x).sum(), x, create_graph=True)
    drawn = graph(g, {"x": x})
    assert operations(drawn).count("mul_backward") == 2
    node = next(node for node in drawn.nodes if node.name == "mul_backward")
    assert (node.kind, node.kernels) == (Kind.TRITON, ("mul_bwd",))
    assert [node.name for node in drawn.nodes if node.kind is Kind.LEAF] == ["x"]
    check_renders(drawn)


def test_views_and_in_place(x: Tensor) -> None:
    base = torch.zeros(2, 4)
    base[0] = x
    base[1].view(2, 2)[:, 0].mul_(x[:2])
    drawn = graph(base)
    assert "CopySlices" in operations(drawn)
    check_renders(drawn)


def test_complex_and_nested(x: Tensor) -> None:
    z = torch.complex(x, x) * 1j
    assert "complex64[4]" in str(graph(z.abs()))
    jagged = torch.nested.nested_tensor([x.detach()], layout=torch.jagged, requires_grad=True)
    check_renders(graph(jagged * 2))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_nested_without_shape(x: Tensor) -> None:
    y = torch.nested.nested_tensor([x.detach(), x.detach()], requires_grad=True)
    assert str(graph(y * 2)).count("float32[nested]") == 3


def test_function_of_the_user(x: Tensor) -> None:
    class Twice(torch.autograd.Function):
        op = "not a record of ours"

        @staticmethod
        def forward(ctx, a):
            return a * 2

        @staticmethod
        def backward(ctx, g):
            return g * 2

    node = graph(Twice.apply(x)).nodes[1]
    assert (node.kind, node.name, node.rule) == (Kind.TORCH, "TwiceBackward", "Twice.backward")


def test_under_transforms_that_have_ended(x: Tensor) -> None:
    mul_op, x = OPS["mul"], x.detach().to(DEVICE).requires_grad_()
    g = torch.func.grad(lambda t: mul_op(mul_op(t, t), t).sum())(x)
    assert "mul_backward" in operations(graph(g))
    assert "mul" in operations(graph(torch.func.vmap(lambda t: mul_op(t, t))(x)))


# What drawing must not do.


def test_freed_graph_draws_the_same(x: Tensor) -> None:
    y = mul(x, x).exp().sum()
    before = str(graph(y))
    y.backward()
    assert str(graph(y)) == before
    with pytest.raises(RuntimeError, match="second time"):
        y.backward()


def test_nothing_runs(x: Tensor) -> None:
    def fail(*args: object) -> None:
        raise AssertionError("drawing must not call this")

    x.register_hook(fail)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, fail):
        y = mul(x, x).exp()
    y.register_hook(fail)
    y.grad_fn.register_prehook(fail)  # type: ignore[union-attr]
    check_renders(graph(y))
    calls = []
    z = checkpoint(lambda t: calls.append(1) or t.sin().exp(), x, use_reentrant=False)
    assert operations(graph(z)) == ["SinBackward0", "ExpBackward0"]
    assert calls == [1]


def test_graph_keeps_nothing_alive() -> None:
    leaf = torch.ones(3, requires_grad=True)
    hidden = leaf.exp()
    alive = [weakref.ref(leaf), weakref.ref(hidden)]
    drawn = graph(mul(hidden, hidden), {"leaf": leaf})
    del leaf, hidden
    gc.collect()
    assert [reference() for reference in alive] == [None, None]
    check_renders(drawn)


# Arguments.


def test_wrong_arguments(x: Tensor) -> None:
    with pytest.raises(TypeError, match=r"'y' must be a tensor, or a tuple .* got float"):
        graph(2.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"'y\[1\]' must be a tensor, got int"):
        graph([x, 3])  # type: ignore[list-item]
    with pytest.raises(TypeError, match=r"names\['n'\].* must be a tensor, got str"):
        graph(x, {"n": "x"})  # type: ignore[dict-item]
    with pytest.raises(TypeError, match="'names' must be a mapping, got list"):
        graph(x, [x])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'y' is an empty sequence"):
        graph([])


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.vmap])
def test_inside_a_transform(x: Tensor, transform: Callable) -> None:
    def draw(t: Tensor) -> Tensor:
        graph(t * t)
        return t.sum()

    with pytest.raises(TypeError, match=r"'y' belongs to a torch\.func transform"):
        transform(draw)(x)


def test_save(x: Tensor, tmp_path: Path) -> None:
    drawn = graph(x * x, {"größe": x})
    expected = {"g.svg": drawn.to_svg(), "g.MMD": drawn.to_mermaid(), "g.txt": f"{drawn}\n"}
    for name, content in expected.items():
        drawn.save(tmp_path / name)
        assert (tmp_path / name).read_text(encoding="utf-8") == content
    with pytest.raises(ValueError, match=r"\.svg, \.mmd or \.txt, got '\.png'"):
        drawn.save(str(tmp_path / "g.png"))


def test_names_are_escaped(x: Tensor) -> None:
    name = 'a<b>&"c" `d` #e\n]]> \x00'
    drawn = graph(mul(x, x), {name: x, "<gone>": torch.ones(1)})
    (label,) = boxes(drawn, "leaf")
    assert label[0] == 'a<b>&"c" `d` #e ]]> \ufffd'
    line = drawn.to_mermaid().splitlines()[1]
    assert line.startswith('  n0(["a#lt;b#gt;#amp;#quot;c#quot; #96;d#96; #35;e ]]#gt;')
    assert line.endswith('"]):::leaf')


def test_long_text_is_cut_in_the_box_only(x: Tensor) -> None:
    name = "layers." * 20 + "weight"
    drawn = graph(x, {name: x, **{f"unused{i}": torch.ones(1) for i in range(99)}})
    assert name in drawn.to_svg()
    assert len(boxes(drawn, "leaf")[0][0]) == 34
    assert float(ET.fromstring(drawn.to_svg()).get("width", "inf")) < 1000


# Size and layout.


def drawn_in_all_forms(x: Tensor, length: int) -> tuple[Graph, str, str, str]:
    y = x
    for _ in range(length):
        y = y * x  # x has the longest of edges to every operation
    drawn = graph(y)
    return drawn, str(drawn), drawn.to_mermaid(), drawn.to_svg()


def test_chain_of_ten_thousand(x: Tensor) -> None:
    drawn, text, mermaid, svg = drawn_in_all_forms(x, 10_000)
    assert len(drawn.nodes) == text.count("\n") == 10_002
    assert mermaid.count("-->") == len(drawn.edges) == 20_001
    assert ET.fromstring(svg).tag == f"{SVG}svg"


def test_work_grows_with_the_length(x: Tensor) -> None:
    """Lines of Python that run, which no other load of the machine changes: not with its square."""

    def lines(length: int) -> int:
        count = 0

        def trace(frame: FrameType, event: str, argument: Any) -> Any:
            nonlocal count
            count += event == "line"
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            drawn_in_all_forms(x, length)
        finally:
            sys.settrace(before)
        return count

    lines(1)  # what is imported when it is first needed
    assert lines(800) < 2.2 * lines(400)


def test_arrows_go_down_and_boxes_do_not_overlap() -> None:
    generator = torch.Generator().manual_seed(0)
    edges = [
        ((int(torch.randint(node, (), generator=generator)), 0), node)
        for node in range(1, 60)
        for _ in range(2)
    ]
    size = [(40.0 + 7 * (node % 9), 20.0 + 10 * (node % 3)) for node in range(60)]
    layout = _layered.lay_out(size, edges, set(range(60)))
    for (value, target), above in zip(edges, layout.above, strict=True):
        assert layout.bottom[value[0]] < layout.top[target]
        assert layout.bottom[above] < layout.top[target]
    for a in range(60):
        assert layout.bottom[a] - layout.top[a] == pytest.approx(size[a][1])
        for b in range(a):
            apart_in_x = abs(layout.x[a] - layout.x[b]) >= (size[a][0] + size[b][0]) / 2
            apart_in_y = layout.bottom[a] < layout.top[b] or layout.bottom[b] < layout.top[a]
            assert apart_in_x or apart_in_y


def test_crossings_are_removed() -> None:
    # Two chains whose ends are swapped: drawn in the order given, they would cross.
    edges = [((0, 0), 3), ((1, 0), 2), ((2, 0), 4), ((3, 0), 5)]
    layout = _layered.lay_out([(50.0, 20.0)] * 6, edges, set(range(6)))
    assert (layout.x[0] < layout.x[1]) == (layout.x[3] < layout.x[2])
    assert layout.x[0] == layout.x[3] == layout.x[5]


def test_without_room_for_lanes_edges_go_straight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_layered, "BENDS", 1)
    edges = [((0, 0), 1), ((1, 0), 2), ((2, 0), 3), ((0, 0), 3), ((1, 0), 3)]
    layout = _layered.lay_out([(10.0, 10.0)] * 4, edges, set())
    assert [len(lane) for _, lane in sorted(layout.lanes.items())] == [1, 2, 1]
    assert layout.above[3] == 0
