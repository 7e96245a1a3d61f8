"""``normalize``: rows over their norms, a composite of the norm and a quotient."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..admission import admit
from ..dtypes import COMPUTE_DTYPE, FLOATING, is_number
from ..op import Tensors, Unsupported
from ..sampling import Make, Sample
from .composite import POINTWISE, composite
from .contraction import REDUCTION
from .reduction import read
from .vector_norm import kind_of as norm_of

F = torch.nn.functional


class _Normal(NamedTuple):
    p: float
    dim: Any
    eps: float


def _bind_normalize(
    input: Tensor, p: float = 2.0, dim: Any = 1, eps: float = 1e-12, out: Tensor | None = None
) -> tuple[Tensors, _Normal]:
    if out is not None:
        raise Unsupported("out=")
    admit(input)
    if input.dtype not in FLOATING:
        raise Unsupported("integer input")
    if any(isinstance(v, bool) or not is_number(v) for v in (p, eps)):
        raise Unsupported(f"p={p!r}, eps={eps!r}")
    if dim is None or dim in ((), []):
        raise Unsupported(f"dim={dim!r}")
    # The norm's own reading of them, so that what it refuses is refused before anything runs.
    read(input, dim, True, None, norm_of, float(p))
    # As torch rounds it: in float16 nothing is left of the usual one.
    return (input,), _Normal(p, dim, torch.tensor(eps, dtype=input.dtype).item())


def _normalized(params: _Normal, x: Tensor) -> Tensor:
    # Not rounded to half precision on the way, because in the gradient two terms cancel.
    wide = x.to(COMPUTE_DTYPE[x.dtype])
    norm = wide.norm(params.p, params.dim, True)
    return (wide / torch.where(norm < params.eps, params.eps, norm)).to(x.dtype)


def _normalize_samples(make: Make) -> Iterator[Sample]:
    yield Sample((make(3, 5),), {}, "rows")
    yield Sample((make(2, 3, 4),), {"dim": (0, -1), "p": 3.0}, "several dims")
    yield Sample((make(4, 9)[:, ::2].t(),), {"dim": 0}, "strided")
    yield Sample((make(2, 0, 3),), {"dim": 2}, "empty")
    yield Sample((make(2, 1031),), {"p": 1.0}, "past one block")


composite(
    "normalize", F.normalize,
    bind=_bind_normalize, value=_normalized, kernels=REDUCTION + POINTWISE,
    formula="that of x / max(|x|, eps)", samples=_normalize_samples,
    autocast={"cuda": "float32"}, opinfo=("nn.functional.normalize",),
)  # fmt: skip
