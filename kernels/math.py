"""Elementary functions: the one place that decides which implementation a kernel calls.

Compiled, they are libdevice's (CUDA) or ocml's (AMD), which are accurate to one or two ulp in
float32 and float64; ``tl.exp`` and ``tl.log`` would use the fast approximations. The interpreter
has no libdevice, so there the function of the same name is NumPy's.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice

_INTERPRETED = triton.knobs.runtime.interpret

if _INTERPRETED:
    import numpy as np
    from triton.runtime.interpreter import TensorHandle

    def _elementwise(function):
        """A function over interpreted blocks from a NumPy ufunc."""

        def call(*blocks):
            blocks = tl.broadcast(*blocks) if len(blocks) == 2 else blocks
            data = function(*(block.handle.data for block in blocks))
            dtype = blocks[0].dtype
            return tl.tensor(TensorHandle(data, dtype.scalar), blocks[0].type)

        return call

    exp = _elementwise(np.exp)
    log = _elementwise(np.log)
    sqrt = _elementwise(np.sqrt)
    sin = _elementwise(np.sin)
    cos = _elementwise(np.cos)
    tanh = _elementwise(np.tanh)
    pow = _elementwise(np.power)
    div = _elementwise(np.divide)
else:
    # Wrapped, not aliased: the compiler puts the target's library in place of `libdevice` only
    # where a jit function names it.

    @triton.jit
    def exp(x):
        return libdevice.exp(x)

    @triton.jit
    def log(x):
        return libdevice.log(x)

    @triton.jit
    def sin(x):
        return libdevice.sin(x)

    @triton.jit
    def cos(x):
        return libdevice.cos(x)

    @triton.jit
    def tanh(x):
        return libdevice.tanh(x)

    @triton.jit
    def pow(x, y):
        return libdevice.pow(x, y)

    @triton.jit
    def sqrt(x):
        # tl.sqrt is an approximation in float32; float64 has only the exact one.
        return tl.sqrt_rn(x) if x.dtype == tl.float32 else tl.sqrt(x)

    @triton.jit
    def div(x, y):
        # `/` is an approximation in float32; float64 has only the exact one.
        return tl.div_rn(x, y) if x.dtype == tl.float32 else x / y


@triton.jit
def is_nan(x):
    return x != x


@triton.jit
def sign(x):
    # NaN compares false with everything: its sign is 0, as torch's is.
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0)).to(x.dtype)
