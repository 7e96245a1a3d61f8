"""The ops, one module a family. Importing this package registers them all.

torch has a namespace of this name too (``torch.ops.aten``); under ``import tritongrad as torch``
its attributes are found here as well.
"""

from typing import Any

import torch

from . import activation as activation
from . import add_norm as add_norm
from . import addition as addition
from . import arithmetic as arithmetic
from . import attention as attention
from . import channel_norm as channel_norm
from . import classification as classification
from . import distance as distance
from . import dropout as dropout
from . import einsum as einsum
from . import elementary as elementary
from . import embedding as embedding
from . import embedding_bag as embedding_bag
from . import extremum as extremum
from . import gated as gated
from . import likelihood as likelihood
from . import linear as linear
from . import linear_fused as linear_fused
from . import linear_loss as linear_loss
from . import loss as loss
from . import margin as margin
from . import matmul as matmul
from . import moments as moments
from . import norm as norm
from . import normalize as normalize
from . import rope as rope
from . import row_loss as row_loss
from . import scan as scan
from . import selection as selection
from . import softmax as softmax
from . import softmax_calls as softmax_calls
from . import tensor_product as tensor_product
from . import totals as totals
from . import triplet as triplet
from . import vector_norm as vector_norm


def __getattr__(name: str) -> Any:
    return getattr(torch.ops, name)
