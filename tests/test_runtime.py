"""Launching, counting, threads, and the environment the kernels need."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton.language as tl
from support import DEVICE
from torch import Tensor

import tritongrad
from tritongrad import runtime
from tritongrad.op import OPS
from tritongrad.sampling import Random


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-c", code],
        env=kept | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the order does not matter")
def test_triton_imported_too_early_is_an_error_that_says_what_to_do() -> None:
    done = run_python("import triton.language, tritongrad")
    assert done.returncode != 0
    assert "EnvironmentProblem" in done.stderr
    assert "Import tritongrad first" in done.stderr
    assert "TRITON_INTERPRET=1" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU kernels are compiled")
def test_triton_imported_first_is_fine_when_the_environment_asks_for_the_interpreter() -> None:
    code = "import triton.language, torch, tritongrad; print(tritongrad.exp(torch.zeros(2)))"
    done = run_python(code, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    assert "tensor([1., 1.])" in done.stdout


def test_the_short_way_into_the_function_gives_what_apply_gives() -> None:
    """Eager calls enter below Function.apply's Python layer."""
    for name in ("mul", "tanh", "where"):
        op = OPS[name]
        assert op.samples is not None
        assert op.bind is not None
        sample = next(iter(op.samples(Random(torch.float64, DEVICE))))
        bound, params = op.bind(*sample.args, **sample.kwargs)
        leaves = [t for t in bound if t is not None and t.requires_grad]
        short = op(*sample.args, **sample.kwargs)
        long: Any = op.function.apply(params, *bound)
        assert short.grad_fn is not None
        assert short.grad_fn.name() == long.grad_fn.name()
        torch.testing.assert_close(short, long, rtol=0, atol=0)
        torch.testing.assert_close(
            torch.autograd.grad(short.sum(), leaves), torch.autograd.grad(long.sum(), leaves)
        )


def test_observe_sees_forward_and_backward_and_ends() -> None:
    seen: list[str] = []
    x = Random(torch.float64, DEVICE)(3)
    with runtime.observe(lambda kernel, grid, args, meta: seen.append(kernel.__name__)):
        y = tritongrad.tanh(x)
        assert seen == ["pointwise_dense"]
        y.backward(torch.ones_like(y))
        assert seen == ["pointwise_dense"] * 2
    tritongrad.tanh(x)
    assert len(seen) == 2


def test_stub_launches_nothing() -> None:
    x = torch.zeros(3, device=DEVICE)
    with runtime.stub():
        # Fresh memory is NaN in these tests, and nothing wrote over it.
        assert tritongrad.exp(x).isnan().all()
    assert (tritongrad.exp(x) == 1).all()


def test_stub_and_observe_restore_after_an_exception() -> None:
    with pytest.raises(KeyError), runtime.stub():
        raise KeyError
    with pytest.raises(KeyError), runtime.observe(lambda *_: None):
        raise KeyError
    assert not runtime._stubbed
    assert runtime._observer is None


def test_launches_of_a_session_count_in_the_ones_around_it() -> None:
    x = Random(torch.float64, DEVICE)(3)
    with tritongrad.use() as outer:
        torch.exp(x)
        with tritongrad.use() as inner:
            torch.tanh(x)
    assert inner.launches == 1
    assert outer.launches == 2
    assert outer.ran == {"exp": 1, "tanh": 1}


def test_backward_on_another_thread_counts_for_the_session_of_its_forward() -> None:
    x = Random(torch.float64, DEVICE)(3)
    with tritongrad.use() as session:
        y = torch.tanh(x).sin()
    forward = session.launches
    thread = threading.Thread(target=y.backward, args=(torch.ones_like(y),))
    thread.start()
    thread.join()
    assert forward == 2
    assert session.launches > forward
    torch.testing.assert_close(x.grad, torch.cos(x.tanh()) * (1 - x.tanh() ** 2))


def test_two_threads_at_once_give_right_numbers() -> None:
    def work(seed: int, failures: list[str]) -> None:
        make = Random(torch.float64, DEVICE, seed)
        for _ in range(5):
            x, y = make(4, 5), make(5)
            with tritongrad.use() as session:
                z = (torch.tanh(x) * y).sum()
                dx, dy = torch.autograd.grad(z, (x, y))
            t = x.tanh()
            right = torch.allclose(dx, (1 - t * t) * y) and torch.allclose(dy, t.sum(0))
            if not right or session.ran["tanh"] != 1:
                failures.append(f"thread {seed}: {session}")

    failures: list[str] = []
    threads = [threading.Thread(target=work, args=(seed, failures)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_kernel_is_launched_on_the_device_of_its_tensors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The device guard, with devices that need not exist."""
    current = 0
    ran_on: list[int] = []

    class Guard:
        def __init__(self, device: torch.device) -> None:
            self.index = device.index

        def __enter__(self) -> None:
            nonlocal current
            self.before, current = current, self.index

        def __exit__(self, *exception: Any) -> None:
            nonlocal current
            current = self.before

    monkeypatch.setattr(runtime, "_single_device", False)
    monkeypatch.setattr(runtime, "_run", lambda *_: ran_on.append(current))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.setattr(torch.cuda, "device", Guard)
    kernel = SimpleNamespace(__name__="kernel")
    for index in (0, 1):
        there: Any = SimpleNamespace(
            device=torch.device("cuda", index), get_device=lambda index=index: index
        )
        runtime.launch(kernel, (1,), (), there)
    assert ran_on == [0, 1]
    assert current == 0


def test_a_session_reads_well() -> None:
    x = Random(torch.float64, DEVICE)(3)
    with tritongrad.use() as session:
        torch.exp(x).view(3).erfinv()
    text = str(session)
    assert text.startswith("tritongrad session: 1 calls on Triton, 1 kernels launched")
    assert "torch.Tensor.erfinv" in text
    assert "no kernel" in text
    assert "views" in text
    assert repr(session) == text


def test_results_do_not_depend_on_the_callers_thread_state() -> None:
    """Rules are evaluated under a mode of our own; the user's must be back afterwards."""
    x = Random(torch.float64, DEVICE)(3)

    def slope(x: Tensor) -> Tensor:
        return torch.autograd.grad(tritongrad.abs(x).sum(), x, create_graph=True)[0]

    before = torch._C._len_torch_function_stack()
    torch.autograd.grad(slope(x).sum(), x, allow_unused=True)
    assert torch._C._len_torch_function_stack() == before
    assert runtime.local.bypass == 0
    assert runtime.local.session is None


@pytest.mark.skipif(not runtime.INTERPRETED, reason="of the interpreter")
def test_the_interpreters_replacements_are_made_once() -> None:
    """For all kernels, whatever modules they see, and by its own functions."""
    from triton.runtime import interpreter

    from tritongrad._interpreter import _Replacements

    assert isinstance(interpreter._patch_lang, _Replacements)
    tritongrad.sum(torch.ones(3))
    found = [tl.load, tl.core.load, tl.reduce, tl.core.reduce, tl.tensor.__add__, tl.dtype.to_ir]
    assert not any(map(tl.core.is_builtin, found))
    tritongrad.tanh(torch.ones(3))
    assert found == [
        *(tl.load, tl.core.load, tl.reduce, tl.core.reduce, tl.tensor.__add__, tl.dtype.to_ir)
    ]
