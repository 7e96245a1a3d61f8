"""torch's numeric core: every name of it is an op's, or is harmless left to torch."""

from __future__ import annotations

import operator

import torch
from support import DEVICE

import tritongrad
from tritongrad.op import TARGETS
from tritongrad.reroute import MOVES

NAMES = """
    acosh asinh atanh acos asin atan atan2 addcdiv addcmul ceil clamp clamp_max clamp_min copysign
    cosh sinh tan deg2rad rad2deg erf erfc exp2 expm1 float_power floor fmax fmin fmod frac hypot
    lerp log10 log1p log2 logaddexp logaddexp2 logit masked_fill nan_to_num reciprocal remainder
    round rsqrt rsub sgn sign sinc square true_divide trunc xlogy special.entr special.ndtr
    special.xlog1py nn.functional.celu nn.functional.elu nn.functional.gelu
    nn.functional.hardshrink nn.functional.hardsigmoid nn.functional.hardswish
    nn.functional.hardtanh nn.functional.leaky_relu nn.functional.logsigmoid nn.functional.mish
    nn.functional.prelu nn.functional.relu nn.functional.relu6 nn.functional.selu
    nn.functional.silu nn.functional.softplus nn.functional.softshrink nn.functional.softsign
    nn.functional.tanhshrink nn.functional.threshold
    prod std var std_mean var_mean logsumexp max min argmax argmin nansum nanmean cumsum cumprod
    norm linalg.norm linalg.vector_norm nn.functional.normalize nn.functional.cosine_similarity
    nn.functional.pairwise_distance
    addmm addmv addr addbmm baddbmm inner outer vdot tensordot einsum chain_matmul linalg.multi_dot
    linalg.vecdot kron matmul
    nn.functional.mse_loss nn.functional.l1_loss nn.functional.smooth_l1_loss
    nn.functional.huber_loss nn.functional.binary_cross_entropy
    nn.functional.binary_cross_entropy_with_logits nn.functional.kl_div
    nn.functional.poisson_nll_loss nn.functional.gaussian_nll_loss nn.functional.soft_margin_loss
    nn.functional.hinge_embedding_loss nn.functional.margin_ranking_loss
    nn.functional.cosine_embedding_loss nn.functional.triplet_margin_loss
""".split()  # noqa: SIM905


def test_every_name_is_an_ops() -> None:
    """What is, is in the tables of ``tritongrad ops`` and ``compare``, and in all suites."""
    assert not [name for name in NAMES if operator.attrgetter(name)(torch) not in TARGETS]


def test_positive_is_its_argument() -> None:
    x = torch.ones(3, device=DEVICE, requires_grad=True)
    with tritongrad.use() as session:
        assert torch.positive(x) is x
        assert +x is x
    assert {reason for _, reason in session.fell_back} == {MOVES}
