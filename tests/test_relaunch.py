"""Launches that are remembered run what Triton itself would have run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from tritongrad import relaunch


@pytest.fixture(scope="module")
def seen() -> dict[str, Any]:
    """What launches did in a process where kernels are compiled, for a GPU that is not there."""
    script = str(Path(__file__).with_name("relaunching.py"))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_each_kind_of_launch_runs_its_own_kernel_and_is_bound_once(seen: dict[str, Any]) -> None:
    kinds = seen["kinds"]
    assert len(kinds) == 3 * 17
    assert [name for name, (same, _) in kinds.items() if not same] == []
    bound = {name: count for name, (_, count) in kinds.items()}
    # A parameter is a tensor, and 1 is as good a constant as True but another one.
    assert [name for name, count in bound.items() if count] == [
        name for name in bound if name.endswith("turn 1") and not name.startswith("parameter")
    ]


def test_hooks_see_launches(seen: dict[str, Any]) -> None:
    assert seen["hooks"] == {"seen": ["enter", "exit", "pre-run"], "binder": 1}


def test_threads_get_each_its_own(seen: dict[str, Any]) -> None:
    assert seen["threads"] is True


def test_what_triton_refuses_it_refuses(seen: dict[str, Any]) -> None:
    assert "failed to specialize argument of type: object" in seen["refused"]


def test_it_forgets(seen: dict[str, Any]) -> None:
    assert seen["bounded"] is True


def test_other_versions_of_triton(seen: dict[str, Any]) -> None:
    assert seen["without_convention"] is True
    assert seen["without_parts"] == 2


BASE = torch.zeros(64)
TENSORS = [BASE, BASE[1:], BASE[4:], BASE.half(), BASE.half()[1:], BASE.long(), torch.empty(0)]
LEAVES = st.one_of(
    st.sampled_from([0, 1, 2, 15, 16, 17, -1, -16, 2**31 - 1, 2**31, -(2**31) - 16, 2**63, True]),
    st.integers(-(2**40), 2**40),
    st.none(),
    st.floats(),
    st.sampled_from(TENSORS),
)
ARGUMENTS = st.tuples(
    st.one_of(LEAVES, st.tuples(LEAVES, LEAVES), st.tuples(st.tuples(LEAVES), LEAVES)), LEAVES
)
META = st.builds(
    lambda a, warps: {"A": a, "num_warps": warps},  # in this order, as a call site has it
    st.sampled_from([0, 1, True, False, 16, "x", None]),
    st.sampled_from([4, 8]),
)


def kernel(first: Any, second: Any, A: Any) -> None:
    """Of two arguments and a constant."""


@pytest.mark.parametrize("target", [("cuda", 90, 32), ("hip", "gfx942", 64)])
def test_equal_keys_are_the_same_specialisation(
    target: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.language import constexpr
    from triton.runtime.jit import JITFunction, compute_cache_key, create_function_from_signature

    kernel.__annotations__["A"] = constexpr
    backend = make_backend(GPUTarget(*target))
    monkeypatch.setattr(relaunch, "backend", lambda device: backend)
    function: Any = JITFunction(kernel)
    bind = create_function_from_signature(function.signature, function.params, backend)
    parts = relaunch.triton()
    assert parts is not None

    def tritons(args: tuple[Any, ...], meta: dict[str, Any]) -> str:
        _, specialisation, options = bind(*args, **meta)
        # With nothing remembered: else it takes 0 for False, which have equal hashes.
        return compute_cache_key({}, specialisation, options)

    @hypothesis.settings(max_examples=300)
    @hypothesis.given(ARGUMENTS, ARGUMENTS, META, META)
    def check(a: Any, b: Any, one: Any, two: Any) -> None:
        keys = [relaunch.key_of(parts, function, *pair, 0) for pair in ((a, one), (b, two))]
        assert (keys[0] == keys[1]) == (tritons(a, one) == tritons(b, two))

    check()
    first = relaunch.key_of(parts, function, (1, 2), {"A": 1}, 0)
    assert first != relaunch.key_of(parts, function, (1, 2), {"A": 1}, 1)
    assert first != relaunch.key_of(parts, JITFunction(kernel), (1, 2), {"A": 1}, 0)
