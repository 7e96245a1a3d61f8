"""The library of elementary functions that kernels call.

Compiled, they are libdevice's (CUDA) or ocml's (AMD), which are accurate to a few ulp in float32
and float64; ``tl.exp`` and ``tl.log`` would use the fast approximations. The interpreter has no
libdevice. There the functions are those of NumPy, or of torch where NumPy has none, evaluated in
float64 and rounded: NumPy's own in float32 are off by up to three ulp, depending on the processor.

Kernels import ``libdevice`` from math.py and name its functions themselves: the compiler puts the
target's library in its place only where a jit function of the file names it, not in an alias.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

if _INTERPRETED:
    from types import SimpleNamespace

    import numpy as np
    from triton.runtime.interpreter import TensorHandle

    def _elementwise(function):
        """A function over interpreted blocks, and numbers, from a NumPy ufunc."""

        def call(*values):
            blocks = [value for value in values if isinstance(value, tl.tensor)]
            arrays = [v.handle.data if isinstance(v, tl.tensor) else v for v in values]
            like = max(blocks, key=lambda block: block.handle.data.size)
            with np.errstate(all="ignore"):
                wide = function(*[np.asarray(array, np.float64) for array in arrays])
                data = np.asarray(wide).astype(like.handle.data.dtype)
            return tl.tensor(TensorHandle(data, like.dtype.scalar), like.type)

        return call

    def _torchs(name):
        """A ufunc from torch's function of that name."""

        def function(block):
            import torch

            # Out of sight of function modes: one of them would hand the call to a kernel again.
            with torch._C.DisableTorchFunction():
                return getattr(torch, name)(torch.from_numpy(block)).numpy()

        return function

    libdevice = SimpleNamespace(
        acos=_elementwise(np.arccos),
        acosh=_elementwise(np.arccosh),
        asin=_elementwise(np.arcsin),
        asinh=_elementwise(np.arcsinh),
        atan=_elementwise(np.arctan),
        atan2=_elementwise(np.arctan2),
        atanh=_elementwise(np.arctanh),
        copysign=_elementwise(np.copysign),
        cos=_elementwise(np.cos),
        cosh=_elementwise(np.cosh),
        erf=_elementwise(_torchs("erf")),
        erfc=_elementwise(_torchs("erfc")),
        exp=_elementwise(np.exp),
        exp2=_elementwise(np.exp2),
        expm1=_elementwise(np.expm1),
        fast_dividef=_elementwise(np.divide),
        fast_log2f=_elementwise(np.log2),
        fmod=_elementwise(np.fmod),
        hypot=_elementwise(np.hypot),
        log=_elementwise(np.log),
        log10=_elementwise(np.log10),
        log1p=_elementwise(np.log1p),
        log2=_elementwise(np.log2),
        pow=_elementwise(np.power),
        rint=_elementwise(np.rint),
        rsqrt=_elementwise(lambda x: 1 / np.sqrt(x)),
        sin=_elementwise(np.sin),
        sinh=_elementwise(np.sinh),
        tan=_elementwise(np.tan),
        tanh=_elementwise(np.tanh),
        trunc=_elementwise(np.trunc),
    )
    sqrt = _elementwise(np.sqrt)
    div = _elementwise(np.divide)
    # Of float32, rounded once: a product of two has half the digits of float64. (Twice, where the
    # sum's digits end in the middle between two of float32, which nothing here depends on.)
    fma = _elementwise(lambda x, y, z: x * y + z)
else:

    @triton.jit
    def sqrt(x):
        # tl.sqrt is an approximation in float32; float64 has only the exact one.
        return tl.sqrt_rn(x) if x.dtype == tl.float32 else tl.sqrt(x)

    @triton.jit
    def div(x, y):
        # `/` is an approximation in float32; float64 has only the exact one.
        return tl.div_rn(x, y) if x.dtype == tl.float32 else x / y

    @triton.jit
    def fma(x, y, z):
        return tl.fma(x, y, z)
