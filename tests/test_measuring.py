"""What ``compare bench`` rests on, without a GPU: a clock that is a stub, calls of any size, and a
comparison that sees what is wrong. No test asserts how long anything takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from stub_device import Stub

from tritongrad.compare import phases, timing, workloads
from tritongrad.compare.timing import Spread
from tritongrad.op import OPS
from tritongrad.sampling import Random, Sample, tensors

F = torch.nn.functional


@pytest.fixture(autouse=True)
def few_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes a millisecond for each."""
    for name in ("LEAST_ROUNDS", "MOST_ROUNDS", "WARM_UP", "HOST_CALLS"):
        monkeypatch.setattr(timing, name, 1)


# ------------------------------------------------------------------------------------- measurements


def test_spread() -> None:
    assert timing.spread([5.0, 1.0, 2.0, 3.0, 4.0]) == pytest.approx(Spread(3.0, 1.8, 4.2))
    assert timing.spread([7.0]) == Spread(7.0, 7.0, 7.0)


def test_calls_are_timed_in_turns_after_the_cache_was_flushed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(timing, "MOST_ROUNDS", 4)
    device = Stub()
    order: list[str] = []

    def call(name: str) -> timing.Call:
        def run(n: int) -> None:
            order.append(f"{name}{n}")
            device.did.append(name)

        return run

    found = timing.measure({"a": call("a"), "b": call("b")}, device, seconds=1.0)
    timed = [order[i : i + 2] for i in range(4, 12, 2)]  # after warming up and an estimate
    assert timed == [["a0", "b0"], ["b1", "a1"], ["a2", "b2"], ["b3", "a3"]]
    start = device.did.index("mark") - 2
    assert device.did[start : start + 5] == ["flush", "occupy", "mark", "a", "mark"]
    assert isinstance(found["a"], timing.Timing)
    assert found["a"].device == Spread(5.0, 5.0, 5.0)
    assert found["a"].host.median == pytest.approx(1.0)
    assert found["a"].repeats == 4
    assert found["a"].peak_bytes == 640


def test_rounds_follow_from_the_time_that_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "LEAST_ROUNDS", 2)
    monkeypatch.setattr(timing, "MOST_ROUNDS", 30)
    for seconds, rounds in ((0.0, 2), (4e-5, 10), (1.0, 30)):  # the stub's call takes 2 us
        found = timing.measure({"a": lambda n: None}, Stub(), seconds)["a"]
        assert isinstance(found, timing.Timing)
        assert found.repeats == rounds


@pytest.mark.parametrize("when", [1, 3, 4, 5])
def test_a_call_that_fails_is_left_out(when: int) -> None:
    """While it warms up, while the device's or the host's time is taken, or memory is watched."""
    count, seen = 0, []

    def fails(n: int) -> None:
        nonlocal count
        count += 1
        if count == when:
            raise ValueError("planted")

    calls = {"bad": fails, "good": lambda n: None}
    found = timing.measure(calls, Stub(), 0.0, seen.append)
    assert isinstance(found["bad"], ValueError)
    assert isinstance(found["good"], timing.Timing)
    assert list(found) == ["bad", "good"]
    assert set(seen) == {"bad", "good"}


def test_floor() -> None:
    floor, found = timing.measure_floor(Stub(tick=4.0), [torch.float32], copied=1000, side=8)
    assert list(found) == ["copy", "matmul float32"]
    assert floor.bandwidth == pytest.approx(2 * 1000 / 4e-6)
    assert floor.rates == {"float32": pytest.approx(2 * 8**3 / 4e-6)}
    assert floor.microseconds(5000, 0, "float32") == pytest.approx(10.0)
    assert floor.microseconds(0, 512, "float32") == pytest.approx(2.0)
    assert floor.microseconds(500, 512, "bfloat16") == pytest.approx(1.0)


# -------------------------------------------------------------------------------------------- sizes


@pytest.mark.filterwarnings("ignore:torch.chain_matmul is deprecated")
@pytest.mark.parametrize("name", OPS)
def test_every_op_has_calls_of_any_size(name: str) -> None:
    op = OPS[name]
    recipe = workloads.recipe(op)
    counts = []
    for size in ("2^12", "2^24"):
        sample = workloads.at(op, recipe, workloads.SIZES[size], torch.bfloat16, "meta")
        assert all(t.dtype is torch.bfloat16 for t in tensors(sample) if t.is_floating_point())
        results_ = tensors(Sample((op.replaces[0](*sample.args, **sample.kwargs),)))
        counts.append(max(t.numel() for t in (*tensors(sample), *results_)))
    # Attention has as many tokens at each length, an embedding as many entries.
    assert counts[1] >= (1 if recipe.kind in ("heads", "own") else 32) * counts[0]
    if recipe.kind in ("pointwise", "rows"):
        assert 2**11 <= counts[0] <= 2**13
        assert 2**23 <= counts[1] <= 2**25


def shapes(name: str, size: str) -> list[list[int]]:
    op = OPS[name]
    sample = workloads.at(
        op, workloads.recipe(op), workloads.SIZES[size], torch.float32, "meta"
    )  # fmt: skip
    return [list(t.shape) for t in tensors(sample)]


def test_sizes_are_those_of_the_kind_of_op() -> None:
    assert shapes("softmax", "2^26") == [[8192, 8192]]
    assert shapes("linear", "2^26") == [[4096, 4096], [4096, 4096]]
    assert shapes("bmm", "2^20") == [[2, 1024, 1024]] * 2
    assert shapes("dot", "2^16") == [[2**16]] * 2
    assert shapes("outer", "2^20") == [[2**10]] * 2
    assert shapes("cosine_embedding_loss", "2^20") == [[512, 2048], [512, 2048], [512]]
    assert shapes("layer_norm", "2^16") == [[64, 1024], [1024], [1024]]
    assert shapes("cross_entropy", "2^16") == [[64, 1024], [64]]
    assert shapes("scaled_dot_product_attention", "2^16") == [[16, 16, 1024, 128]] * 3
    op = OPS["softmax"]
    wide = workloads.ROWS["2^26 x 65536"]
    sample = workloads.at(op, workloads.recipe(op), wide, torch.float32, "meta")
    assert list(sample.args[0].shape) == [1024, 65536]


def op_of(samples: Callable[[Any], Any], function: Any) -> Any:
    return dataclasses.replace(OPS["softmax"], replaces=(function,), samples=samples)


def test_an_op_has_sizes_of_its_own() -> None:
    bench = lambda make, size: Sample((make(size.columns), 0))  # noqa: E731
    own = dataclasses.replace(OPS["softmax"], bench=bench)
    sample = workloads.at(
        own, workloads.recipe(own), workloads.SIZES["2^16"], torch.float32, "cpu"
    )  # fmt: skip
    assert sample.args[0].shape == (1024,)


def test_op_that_cannot_be_brought_to_a_size_says_so() -> None:
    for samples, function, reason in (
        (lambda make: [Sample((make(3, 5), torch.ones(3, 5)))], torch.add, "RuntimeError"),
        (lambda make: [Sample((torch.ones(3, 5),))], torch.exp, "its sizes are its own"),
        (lambda make: [Sample((make(0, 5),))], torch.exp, "dense"),
    ):
        with pytest.raises(workloads.Unscalable, match=reason):
            workloads.recipe(op_of(samples, function))


def test_values_are_random_and_in_the_range_that_the_op_is_defined_in() -> None:
    make = workloads.Scaling(torch.float32, "cpu", seed=3)
    make.sizes = lambda n, place: 100 * n
    assert 0.9 < make(5, 5).std() < 1.1
    assert make(5, low=0.5, high=1.0).min() >= 0.5
    assert make(5, dtype=torch.bool).float().mean().item() == pytest.approx(0.5, abs=0.1)
    other = workloads.Scaling(torch.float32, "cpu", seed=4)
    other.sizes = make.sizes
    assert not torch.equal(make(5), other(5))
    op = OPS["cross_entropy"]
    size = workloads.SIZES["2^16"]
    _, target = workloads.at(op, workloads.recipe(op), size, torch.float32, "cpu").args
    assert target.max() > 500  # of 1024 classes


# ------------------------------------------------------------------------------------- right or not


def test_differences_are_seen() -> None:
    x = torch.linspace(-1, 1, 1001)
    for wrong in (x * 1.0001, x.clone().index_fill_(0, torch.tensor([7]), 0.5), x[:-1]):
        assert phases.difference([wrong], [x], 2e-5) is not None
    assert phases.difference([x + 1e-6], [x], 2e-5) is None
    assert phases.difference([x.to(torch.bfloat16)], [x], 3e-2) is None
    assert phases.difference([], [x], 1.0) is not None
    special = torch.tensor([1.0, torch.nan, torch.inf])
    assert phases.difference([special], [special.clone()], 0.0) is None
    for other in (torch.nan, -torch.inf, 5.0):
        assert phases.difference(
            [special.clone().index_fill_(0, torch.tensor([2]), other)], [special], 1.0
        )
    assert (
        phases.difference([torch.tensor([1])], [torch.tensor([2])], 1.0)
        == "result 0: other integers"
    )


def test_what_cancels_is_compared_with_float64() -> None:
    expected, exact = torch.tensor([1.0e-8]), torch.tensor([1.2e-8], dtype=torch.float64)
    close, far = torch.tensor([1.4e-8]), torch.tensor([9.0e-8])
    assert phases.check(lambda: [close], [expected], lambda: [exact], 1e-5) is None
    assert phases.check(lambda: [far], [expected], lambda: [exact], 1e-5) is not None


def test_phases_are_torchs_derivatives() -> None:
    sample = Sample((Random(torch.float64)(3, 4), Random(torch.float64, seed=1)(3, 4)))
    points = phases.Points(torch.mul, [sample, sample])
    x, y = sample.args
    assert torch.equal(points.prepare("forward")(0)[0], x * y)
    g = points._directions([x])[0]
    for phase in ("backward", "both"):
        call = points.prepare(phase)
        for n in (0, 1, 2):
            assert torch.equal(call(n)[0], g * y)
    value, tangent = points.prepare("jvp")(0)
    u, v = points._directions([x, y])
    torch.testing.assert_close((value, tangent), (x * y, u * y + v * x))
    assert len(points.prepare("second")(0)) == 3  # of x, y and the cotangent
    with pytest.raises(phases.Nothing, match="no result"):
        phases.Points(torch.eq, [sample]).prepare("backward")
