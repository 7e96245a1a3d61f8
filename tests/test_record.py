import torch


def test_fresh():
    assert torch.empty(3).isnan().all()
