from __future__ import annotations

import torch
from torch import nn

from elrcli.methods.base import judge


def test_a_judge_keeps_no_gradient_and_goes_back_to_its_mode():
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    points = torch.randn(4, 2)
    logits = judge(model, points)
    assert not logits.requires_grad
    assert all(module.training for module in model.modules())
    assert model[1].num_batches_tracked == 0
    torch.testing.assert_close(judge(model.eval(), points), logits)
    assert not any(module.training for module in model.modules())
