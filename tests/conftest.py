"""How every test runs: seeded, and on fresh memory full of NaN.

tritongrad is imported here, before any test file can import triton, because Triton decides at its
own import whether kernels are interpreted.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

# cuBLAS is deterministic only with a workspace of fixed size, settled before CUDA starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import hypothesis
import pytest
import torch

from tritongrad.runtime import INTERPRETED

# The same examples on every run: a failure that nobody can repeat helps nobody. No deadline:
# interpreted kernels take what time the machine has.
hypothesis.settings.register_profile("tritongrad", derandomize=True, database=None, deadline=None)
hypothesis.settings.load_profile("tritongrad")

for absent in (torch.cuda, torch.xpu):
    if not absent.is_available():
        # It would keep the seed for a device to come, with the text of the caller's stack.
        absent.manual_seed_all = lambda seed: None


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--every-op",
        action="store_true",
        help="also for ops that differ in a device function alone, what they share (takes twice as "
        "long)",
    )


def pytest_configure(config: pytest.Config) -> None:
    # Native torch is the reference; where it has nothing deterministic, it may say so and go on.
    config.addinivalue_line(
        "filterwarnings", "ignore:.*does not have a deterministic implementation:UserWarning"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("every_op"):
        leave_out_repetitions(config, items)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA or ROCm device"))


def leave_out_repetitions(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep, of the tests of what ops share, those for one op of each mechanism."""
    from support import representatives

    chosen = representatives()
    repeated = [
        item
        for item in items
        if item.get_closest_marker("mechanism") and item.callspec.params["name"] not in chosen
    ]
    config.hook.pytest_deselected(items=repeated)
    left_out = set(repeated)
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture
def device() -> torch.device:
    """Where our kernels run: the GPU, or the CPU where they are interpreted."""
    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture(autouse=True)
def nan_in_fresh_memory() -> Iterator[None]:
    """HAZARDS 20: an element that no kernel writes is NaN, and not by luck the right number."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before, warn_only=warn_only)


@pytest.fixture(autouse=True)
def seed() -> None:
    """Tests do not depend on which ran before them."""
    torch.manual_seed(0)
