from __future__ import annotations

import pytest
import torch

from elrcli.methods.mixup import Mixup

CPU = torch.device("cpu")


def test_the_share_lies_between_one_half_and_one():
    draws = torch.Generator().manual_seed(0)
    shares = torch.tensor([Mixup.draw(2, 1.0, draws, CPU).share for _ in range(2000)])
    assert 0.5 <= shares.min() < 0.51
    assert 0.99 < shares.max() <= 1.0
    assert shares.mean().item() == pytest.approx(0.75, abs=0.01)  # uniform on [0.5, 1]


def test_the_same_generator_draws_the_same():
    one, other = (Mixup.draw(5, 0.4, torch.Generator().manual_seed(7), CPU) for _ in range(2))
    assert one.share == other.share
    assert one.partner.equal(other.partner)
    assert sorted(one.partner.tolist()) == [0, 1, 2, 3, 4]


def test_the_next_draw_is_another():
    generator = torch.Generator().manual_seed(7)
    one, other = (Mixup.draw(50, 1.0, generator, CPU) for _ in range(2))
    assert one.share != other.share
    assert not one.partner.equal(other.partner)


def test_rows_are_mixed_with_their_partners():
    mixup = Mixup(0.75, torch.tensor([1, 0, 2]))
    rows = torch.tensor([[4.0, 0.0], [0.0, 8.0], [1.0, 1.0]])
    expected = torch.tensor([[3.0, 2.0], [1.0, 6.0], [1.0, 1.0]])
    torch.testing.assert_close(mixup.mix(rows), expected)


def test_targets_weigh_the_two_labels():
    """.75 * .2 against .25 * .6: one half; a label that is its own partner has it all."""
    mixup = Mixup(0.75, torch.tensor([1, 0, 2]))
    targets = torch.tensor([[0.2, 0.6], [0.9, 0.1], [0.5, 0.5]])
    share = mixup.label_share(torch.tensor([0, 1, 1]), targets)
    first, second, third = 0.15 / (0.15 + 0.15), 0.075 / (0.075 + 0.225), 0.375 / (0.375 + 0.125)
    torch.testing.assert_close(share, torch.tensor([first, second, third]))
