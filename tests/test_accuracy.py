"""Values of the elementary functions against exact ones, in units in the last place (ulp).

The exact values are mpmath's, to 60 digits. Each op has its formula and its range here, and one
limit holds for all: 2 ulp in float32, 4 ulp in float64; WIDER lists what exceeds it, and why. Half
precision is compared with float64, which is as exact as that, at all of its numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mpmath
import numpy
import pytest
import torch
import triton
import triton.language as tl
from mpmath import mpf
from support import DEVICE
from torch import Tensor

import tritongrad
from tritongrad.kernels import activation, arithmetic, elementary, gated
from tritongrad.kernels import math as m
from tritongrad.op import OPS
from tritongrad.runtime import INTERPRETED

F = torch.nn.functional
G = tritongrad.nn.functional

LIMIT = {torch.float32: 2.0, torch.float64: 4.0}
COUNT = 400
DIGITS = 60

Range = tuple[float, float]
Exact = Callable[..., Any]


def sigmoid(x: mpf) -> mpf:
    return 1 / (1 + mpmath.exp(-x))


def softplus(x: mpf) -> mpf:
    return mpmath.log1p(mpmath.exp(x))


def elu(x: mpf, alpha: mpf = 1, scale: mpf = 1) -> mpf:
    return scale * (x if x > 0 else alpha * mpmath.expm1(x))


def gelu_tanh(x: mpf) -> mpf:
    return x / 2 * (1 + mpmath.tanh(mpmath.sqrt(2 / mpmath.pi) * (x + mpf(0.044715) * x**3)))


def hardswish(x: mpf) -> mpf:
    return x * min(max(x + 3, 0), 6) / 6


SELU = mpf(1.6732632423543772), mpf(1.0507009873554805)

# Name of the case -> torch's call, the exact function, the range of each operand. The name is the
# op's, with more behind a colon where an op has several cases.
CASES: dict[str, tuple[Callable[..., Tensor], Exact, tuple[Range, ...]]] = {
    "acos": (torch.acos, mpmath.acos, ((-1, 1),)),
    "acosh": (torch.acosh, mpmath.acosh, ((1, 1e4),)),
    "addcdiv": (torch.addcdiv, lambda x, y, z: x + y / z, ((1, 2), (1, 2), (1, 2))),
    "addcmul": (torch.addcmul, lambda x, y, z: x + y * z, ((1, 2), (1, 2), (1, 2))),
    "asin": (torch.asin, mpmath.asin, ((-1, 1),)),
    "asinh": (torch.asinh, mpmath.asinh, ((-1e4, 1e4),)),
    "atan": (torch.atan, mpmath.atan, ((-1e2, 1e2),)),
    "atan2": (torch.atan2, mpmath.atan2, ((-4, 4), (-4, 4))),
    "atanh": (torch.atanh, mpmath.atanh, ((-1, 1),)),
    "celu": (F.celu, elu, ((-10, 10),)),
    "cos": (torch.cos, mpmath.cos, ((-1e2, 1e2),)),
    "cosh": (torch.cosh, mpmath.cosh, ((-20, 20),)),
    "deg2rad": (torch.deg2rad, lambda x: x * mpmath.pi / 180, ((-360, 360),)),
    "div": (torch.div, lambda x, y: x / y, ((-4, 4), (0.1, 4))),
    "elu": (F.elu, elu, ((-10, 10),)),
    "entr": (torch.special.entr, lambda x: -x * mpmath.log(x), ((0, 10),)),
    "erf": (torch.erf, mpmath.erf, ((-4, 4),)),
    "erfc": (torch.erfc, mpmath.erfc, ((-4, 9),)),
    "exp": (torch.exp, mpmath.exp, ((-80, 80),)),
    "exp2": (torch.exp2, lambda x: mpf(2) ** x, ((-120, 120),)),
    "expm1": (torch.expm1, mpmath.expm1, ((-20, 20),)),
    "float_power": (torch.float_power, lambda x, y: x**y, ((0, 10), (-4, 4))),
    "gelu": (F.gelu, lambda x: x * mpmath.ncdf(x), ((-1, 5),)),
    "gelu:tail": (F.gelu, lambda x: x * mpmath.ncdf(x), ((-12, -1),)),
    "gelu:tanh": (lambda x: F.gelu(x, approximate="tanh"), gelu_tanh, ((-1, 5),)),
    "gelu:tanh tail": (lambda x: F.gelu(x, approximate="tanh"), gelu_tanh, ((-8, -1),)),
    "geglu": (
        G.geglu,
        lambda x, y: x * mpmath.ncdf(x) * y,
        ((-1, 5), (-10, 10)),
    ),
    "geglu:tanh": (
        lambda x, y: G.geglu(x, y, "tanh"),
        lambda x, y: gelu_tanh(x) * y,
        ((-1, 5), (-10, 10)),
    ),
    "glu": (
        lambda x, y: F.glu(torch.cat([x, y])),
        lambda x, y: x * sigmoid(y),
        ((-10, 10), (-20, 20)),
    ),
    "hardsigmoid": (F.hardsigmoid, lambda x: min(max(x + 3, 0), 6) / 6, ((-2.5, 4),)),
    "hardswish": (F.hardswish, hardswish, ((-2.5, 4),)),
    "hypot": (torch.hypot, mpmath.hypot, ((-4, 4), (-4, 4))),
    "lerp": (torch.lerp, lambda x, y, w: x + w * (y - x), ((1, 2), (3, 4), (0, 1))),
    "log": (torch.log, mpmath.log, ((0, 1e3),)),
    "log10": (torch.log10, mpmath.log10, ((0, 1e3),)),
    "log1p": (torch.log1p, mpmath.log1p, ((-1, 1e3),)),
    "log2": (torch.log2, lambda x: mpmath.log(x, 2), ((0, 1e3),)),
    "logaddexp": (
        torch.logaddexp,
        lambda x, y: mpmath.log(mpmath.exp(x) + mpmath.exp(y)),
        ((0, 10), (0, 10)),
    ),
    "logaddexp2": (
        torch.logaddexp2,
        lambda x, y: mpmath.log(mpf(2) ** x + mpf(2) ** y, 2),
        ((0, 10), (0, 10)),
    ),
    "logit": (torch.logit, lambda x: mpmath.log(x / (1 - x)), ((0, 1),)),
    "logsigmoid": (F.logsigmoid, lambda x: -softplus(-x), ((-20, 20),)),
    "mish": (F.mish, lambda x: x * mpmath.tanh(softplus(x)), ((-20, 20),)),
    "ndtr": (torch.special.ndtr, mpmath.ncdf, ((-1, 5),)),
    "ndtr:tail": (torch.special.ndtr, mpmath.ncdf, ((-12, -1),)),
    "pow": (torch.pow, lambda x, y: x**y, ((0, 10), (-4, 4))),
    "rad2deg": (torch.rad2deg, lambda x: x * 180 / mpmath.pi, ((-6, 6),)),
    "reciprocal": (torch.reciprocal, lambda x: 1 / x, ((0.1, 10),)),
    "rsqrt": (torch.rsqrt, lambda x: 1 / mpmath.sqrt(x), ((0, 1e3),)),
    "selu": (F.selu, lambda x: elu(x, *SELU), ((-10, 10),)),
    "sigmoid": (torch.sigmoid, sigmoid, ((-20, 20),)),
    "silu": (F.silu, lambda x: x * sigmoid(x), ((-20, 20),)),
    "sin": (torch.sin, mpmath.sin, ((-1e2, 1e2),)),
    "sinc": (torch.sinc, lambda x: mpmath.sinc(mpmath.pi * x), ((-0.7, 0.7),)),
    "sinh": (torch.sinh, mpmath.sinh, ((-20, 20),)),
    "softplus": (F.softplus, softplus, ((-20, 19),)),
    "softsign": (F.softsign, lambda x: x / (1 + abs(x)), ((-10, 10),)),
    "sqrt": (torch.sqrt, mpmath.sqrt, ((0, 1e3),)),
    "square": (torch.square, lambda x: x * x, ((-10, 10),)),
    "swiglu": (G.swiglu, lambda x, y: x * sigmoid(x) * y, ((-20, 20), (-10, 10))),
    "tan": (torch.tan, mpmath.tan, ((-20, 20),)),
    "tanh": (torch.tanh, mpmath.tanh, ((-10, 10),)),
    "tanhshrink": (F.tanhshrink, lambda x: x - mpmath.tanh(x), ((-10, 10),)),
    "xlog1py": (torch.special.xlog1py, lambda x, y: x * mpmath.log1p(y), ((0, 4), (-0.9, 9))),
    "xlogy": (torch.xlogy, lambda x, y: x * mpmath.log(y), ((0, 4), (0.1, 9))),
}

ROUNDED_AT_MOST_ONCE = frozenset(
    """
    abs add addr ceil clamp clamp_max clamp_min copysign eq floor fmax fmin fmod frac ge gt
    hardshrink hardtanh le leaky_relu lt masked_fill maximum minimum mul nan_to_num ne neg prelu
    reglu relu relu6 remainder round sign softshrink sub threshold trunc where
    """.split()  # noqa: SIM905
)
"""Ops that choose, step, or are one or two operations of arithmetic: nothing to measure here."""

TAIL = "the rounding of the argument of erfc or exp counts twice the argument squared"

WIDER: dict[str, tuple[float, float, str]] = {
    "geglu": (2.5, 4, "gelu's roundings and one more"),
    "gelu:tail": (256, 256, TAIL),
    "gelu:tanh tail": (128, 128, TAIL),
    "mish": (4, 4, "six roundings in a row"),
    "ndtr:tail": (256, 256, TAIL),
    "sinc": (4, 4, "four roundings in a row; in float64 that of pi * x, before its sine is taken"),
    "tanhshrink": (3, 4, "six roundings in a row"),
}
"""Case -> limits in float32 and float64, and why they are wider."""

LIBRARY = 4.0
"""What comes on top where kernels are compiled: the functions are the GPU library's then, whose
makers publish errors of up to 4 ulp (CUDA Programming Guide, "Mathematical Functions": tan, acosh,
erfc and pow in float32)."""


def arguments(ranges: tuple[Range, ...], dtype: torch.dtype) -> list[Tensor]:
    """Operands for one call: half of the numbers evenly spread over the range, half down to 1e-6
    from the end of it, or the zero inside it, near which a function may lose its digits."""
    generator = torch.Generator().manual_seed(0)

    def draw(low: float, high: float) -> Tensor:
        unit = torch.rand(COUNT, dtype=torch.float64, generator=generator)
        small = 10 ** (-6 * torch.rand(COUNT, dtype=torch.float64, generator=generator))
        if low < 0 < high:
            near = small * torch.where(unit < 0.5, max(low, -1.0), min(high, 1.0))
        else:
            near = low + (high - low) * small
        spread = low + (high - low) * unit
        values = torch.where(torch.arange(COUNT) % 2 == 0, spread, near).to(dtype)
        inside = (values.double() > low) & (values.double() < high)
        return torch.where(inside, values, torch.tensor((low + high) / 2, dtype=dtype))

    return [draw(low, high).to(DEVICE) for low, high in ranges]


def ulp_errors(got: Tensor, exact: list[mpf]) -> list[float]:
    """Distance of each value from the exact one, in units of the last place there."""
    precision = 24 if got.dtype is torch.float32 else 53
    least = mpf(torch.finfo(got.dtype).smallest_normal)
    found = []
    for value, truth in zip(got.tolist(), exact, strict=True):
        size = max(abs(truth), least)
        unit = mpf(2) ** (mpmath.floor(mpmath.log(size, 2)) + 1 - precision)
        found.append(float(abs(mpf(value) - truth) / unit))
    return found


def limit(case: str, dtype: torch.dtype) -> float:
    column = 0 if dtype is torch.float32 else 1
    wider = WIDER[case][column] if case in WIDER else LIMIT[dtype]
    return wider if INTERPRETED else wider + LIBRARY


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("case", CASES)
def test_within_limit(case: str, dtype: torch.dtype) -> None:
    function, formula, ranges = CASES[case]
    operands = arguments(ranges, dtype)
    with tritongrad.use() as session:
        got = function(*operands)
    assert session.ran[case.split(":")[0]] == 1
    with mpmath.workdps(DIGITS):
        columns = [[mpf(v) for v in t.tolist()] for t in operands]
        exact = [formula(*values) for values in zip(*columns, strict=True)]
        errors = ulp_errors(got, exact)
    worst = max(range(COUNT), key=errors.__getitem__)
    at = [t[worst].item() for t in operands]
    assert errors[worst] <= limit(case, dtype), f"{errors[worst]:.2f} ulp at {at}"


def test_every_op_is_measured_or_exact() -> None:
    rows = {
        n for n, op in OPS.items() if getattr(op.forward, "__module__", "") == "tritongrad.ops.rows"
    }
    measured = {case.split(":")[0] for case in CASES}
    assert rows - measured - ROUNDED_AT_MOST_ONCE == set()
    assert not measured & ROUNDED_AT_MOST_ONCE


def test_an_error_would_be_seen() -> None:
    """The measure can fail: the exponential of a value one ulp off."""
    x = torch.tensor([1.5])
    with mpmath.workdps(DIGITS):
        truth = [mpmath.exp(mpf(1.5))]
        assert ulp_errors(torch.exp(x), truth)[0] <= 1
        assert ulp_errors(torch.exp(x) * (1 + 4 * 2**-23), truth)[0] > 2


HALF = {
    "acosh": torch.acosh,
    "atanh": torch.atanh,
    "asinh": torch.asinh,
    "atan": torch.atan,
    "elu": F.elu,
    "elu:celu": lambda x: F.celu(x, -2),
    "elu:selu": F.selu,
    "entr": torch.special.entr,
    "erf": torch.erf,
    "erfc": torch.erfc,
    "expm1": torch.expm1,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "logit": torch.logit,
    "logit:clamped": lambda x: torch.logit(x, 0.2),
    "logsigmoid": F.logsigmoid,
    "mish": F.mish,
    "ndtr": torch.special.ndtr,
    "pow_number": lambda x: x**3.7,
    "pow_number:odd": lambda x: x**-3,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "sinh": torch.sinh,
    "softplus": F.softplus,
    "softplus:arguments": lambda x: F.softplus(x, 3, 0.5),
    "tanhshrink": F.tanhshrink,
}
"""Device function with a variant for half precision (with more behind a colon, one of several
cases) -> torch's call. Their gradients are measured too where these have a variant."""

HALF_OF_TWO = {
    "atan2": torch.atan2,
    "geglu": G.geglu,
    "geglu_tanh": lambda x, y: G.geglu(x, y, "tanh"),
    "glu": lambda x, y: F.glu(torch.cat([x, y])),
    "logaddexp": torch.logaddexp,
    "logaddexp2": torch.logaddexp2,
    "pow": torch.pow,
    "swiglu": G.swiglu,
}

ROUNDING = 0.51
"""Limit in ulp of half precision: its rounding, and a little for what is rounded."""

CANCELS = {"gelu_bwd": 0.6, "gelu_tanh_bwd": 0.6, "mish_bwd": 0.6}
"""Limits of gradients next to where they are 0."""

if not INTERPRETED:
    # A GPU's own exp2 is off by 2 units of float32, and these are differences of its results.
    CANCELS |= {"gelu_bwd": 0.75, "silu_bwd": 0.6}


def of_variants(suffix: str) -> set[str]:
    return {
        name
        for module in (activation, arithmetic, elementary, gated)
        for name, function in vars(module).items()
        if name.endswith(suffix) and "HALF" in getattr(function, "arg_names", ())
    }


def all_numbers(dtype: torch.dtype) -> Tensor:
    return torch.arange(-(2**15), 2**15, device=DEVICE).to(torch.int16).view(dtype)


def assert_rounded(found: Tensor, exact: Tensor, at: tuple[Tensor, ...], limit: float) -> None:
    """That a half precision result is what float64 is rounded to, or almost. Compiled, one that is
    no normal number of float32, in which it is computed, may be 0: a GPU's exp2 makes none."""
    expected = exact.to(found.dtype)
    finite = expected.isfinite() & found.isfinite()
    same = (found == expected) | (found.isnan() & expected.isnan())
    if not INTERPRETED:
        same |= (found == 0) & (exact.abs() < torch.finfo(torch.float32).smallest_normal)
    precision = torch.finfo(found.dtype)
    size = exact.abs().clamp(min=precision.smallest_normal)
    unit = precision.eps * torch.exp2(torch.floor(torch.log2(size)))
    error = torch.where(same, 0.0, torch.where(finite, (found - exact).abs() / unit, math.inf))
    worst = int(error.argmax())
    where = [t[worst].item() for t in at]
    assert error[worst] <= limit, f"{error[worst]:.3f} ulp at {where}: {found[worst]}"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("case", HALF)
def test_every_half_precision_number(case: str, dtype: torch.dtype) -> None:
    name, function = case.split(":")[0], HALF[case]
    x = all_numbers(dtype)
    if name == "gelu_tanh":
        x = x[~(x.abs() > 1e12)]  # the cube of more is no float32
    half, double = x.clone().requires_grad_(), x.double().requires_grad_()
    with tritongrad.use():
        found, exact = function(half), function(double)
        assert_rounded(found.detach(), exact.detach(), (x,), ROUNDING)
        if f"{name}_bwd" in of_variants("_bwd"):
            (found,) = torch.autograd.grad(found, half, torch.ones_like(found))
            (exact,) = torch.autograd.grad(exact, double, torch.ones_like(exact))
            # A gradient that overflows on its way does so in float32 too.
            inside = x.abs() < 1e9
            assert_rounded(
                found[inside], exact[inside], (x[inside],), CANCELS.get(f"{name}_bwd", ROUNDING)
            )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("name", HALF_OF_TWO)
def test_pairs_of_half_precision_numbers(name: str, dtype: torch.dtype) -> None:
    """Of all magnitudes at random, of those near 1, and of each two numbers that are special."""
    generator = torch.Generator().manual_seed(0)
    numbers = all_numbers(dtype)
    wild = numbers[torch.randint(0, 2**16, (2, 2**13), generator=generator).to(DEVICE)]
    tame = (4 * torch.randn(2, 2**13, generator=generator)).to(DEVICE, dtype)
    inf, nan, precision = math.inf, math.nan, torch.finfo(dtype)
    special = [0, 0.5, 1, 1.5, 2, 3, inf, nan, precision.max, precision.tiny, precision.tiny / 4]
    pairs = torch.cartesian_prod(*2 * [torch.tensor([*special, *[-v for v in special]])])
    x, y = torch.cat([wild, tame, pairs.t().to(DEVICE, dtype)], 1)
    with tritongrad.use() as session:
        found, exact = HALF_OF_TWO[name](x, y), HALF_OF_TWO[name](x.double(), y.double())
    assert session.ran[name.removesuffix("_tanh")] == 2
    if "glu" in name:
        # Beyond, the first factor overflows in float32, or is subnormal there.
        inside = (x.abs() < 9) & (y.abs() < 9)
    else:
        # Next to 0, the logarithm of a sum is a difference.
        inside = (exact.abs() > 0.01) | torch.tensor("log" not in name, device=DEVICE)
    x, y, found, exact = x[inside], y[inside], found[inside], exact[inside]
    assert_rounded(found, exact, (x, y), ROUNDING)


def test_every_variant_for_half_precision_is_measured() -> None:
    inner = {"logistic", "tanh_softplus", "power_or_root"}
    forward = {name for name in of_variants("") if not name.endswith(("_bwd", "_slopes"))}
    assert forward - inner == {case.split(":")[0] for case in HALF} | set(HALF_OF_TWO)


@triton.jit
def quotients(out_ptr, first, step, BY: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = (first + i * step).to(tl.float32, bitcast=True)
    tl.store(out_ptr + i, m.divided(x, BY))


BINADE = 2**23


@pytest.mark.parametrize(
    ("first", "step", "count"),
    [
        (127 * BINADE, 1, BINADE),  # from 1 to 2, every significand
        (0, 17, 2**22),  # subnormal numbers, and those whose quotients are
        (250 * BINADE + 1, 11, 2**22),  # up to infinity and NaN
        (-(2**31), 3, 2**22),
        (-(2**31) + 255 * BINADE, 1, 2**20),
    ],
)
@pytest.mark.parametrize("by", [3, 6])
def test_division_by_a_constant(by: int, first: int, step: int, count: int) -> None:
    """As correctly rounded as the division that it is in place of."""
    block = 2**20 if INTERPRETED else 1024
    found = torch.empty(count, device=DEVICE)
    with numpy.errstate(all="ignore"):
        quotients[(count // block,)](found, first, step, BY=by, BLOCK=block)
    bits = first + step * torch.arange(count)
    # On the CPU: torch divides by a number on a GPU by multiplying with its reciprocal.
    expected = (bits.to(torch.int32).view(torch.float32) / by).to(DEVICE)
    same = (found.view(torch.int32) == expected.view(torch.int32)) | (found != found)
    assert bool(same.all())
    assert torch.equal(found.isnan(), expected.isnan())
