from __future__ import annotations

import torch

from elrcli.methods.record import SampleRecord


def test_a_new_record_knows_nothing():
    record = SampleRecord(2, 3, epochs=4)
    assert record.prediction.tolist() == [-1, -1]
    assert record.visits.tolist() == [0, 0]
    assert record.given_prob.shape == (2, 4)
    assert record.given_prob.isnan().all()


def test_two_visits_by_hand():
    record = SampleRecord(3, 3, epochs=2)
    index, labels = torch.tensor([2, 0]), torch.tensor([0, 1])
    record.update(torch.tensor([[0.5, 0.25, 0.25], [0.75, 0.25, 0.0]]), labels, index, epoch=0)
    record.update(torch.tensor([[0.0, 0.25, 0.75], [0.0, 1.0, 0.0]]), labels, index, epoch=1)
    assert record.prob_sum.tolist() == [[0.75, 1.25, 0.0], [0.0] * 3, [0.5, 0.5, 1.0]]
    assert record.visits.tolist() == [2, 0, 2]
    assert record.prediction.tolist() == [1, -1, 2]
    assert record.given_prob[2].tolist() == [0.5, 0.0]
    assert record.given_prob[0].tolist() == [0.25, 1.0]
    assert record.given_prob[1].isnan().all()


def test_everything_is_in_the_state_dict():
    record = SampleRecord(2, 2, epochs=1)
    record.update(torch.tensor([[0.25, 0.75]]), torch.tensor([1]), torch.tensor([1]), epoch=0)
    other = SampleRecord(2, 2, epochs=1)
    other.load_state_dict(record.state_dict())
    for name, tensor in record.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], tensor, equal_nan=True)
    assert set(record.state_dict()) == {
        "prob_sum",
        "visits",
        "prediction",
        "given_prob",
    }


def test_every_buffer_is_shared_out_by_sample():
    record = SampleRecord(2, 3, epochs=4, held_out=True, table="top-k")
    assert set(record.per_sample) == set(record.state_dict())
    assert set(SampleRecord(2, 3, epochs=4).state_dict()) < set(record.per_sample)
    assert {len(tensor) for tensor in record.state_dict().values()} == {2}


def test_held_out_predictions_are_summed_beside_the_others():
    record = SampleRecord(3, 2, epochs=2, held_out=True)
    index, labels = torch.tensor([2, 0]), torch.tensor([0, 1])
    probs = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    for epoch in range(2):
        held_out = torch.tensor([[0.25, 0.75], [0.5, 0.5]])
        record.update(probs, labels, index, epoch, held_out)
    assert record.held_out_sum.tolist() == [[1.0, 1.0], [0.0, 0.0], [0.5, 1.5]]
    assert record.prob_sum.tolist() == [[0.0, 2.0], [0.0, 0.0], [2.0, 0.0]]
    assert record.prediction.tolist() == [1, -1, 0]  # of the network that trains


def test_without_a_second_judge_nothing_is_held_out():
    probs, zero = torch.tensor([[0.25, 0.75]]), torch.tensor([0])
    plain = SampleRecord(1, 2, epochs=1)
    plain.update(probs, zero, zero, 0, held_out=probs)
    assert plain.held_out_sum is None
    judged = SampleRecord(1, 2, epochs=1, held_out=True)
    judged.update(probs, zero, zero, 0)
    assert judged.held_out_sum.tolist() == [[0.0, 0.0]]
    assert set(judged.state_dict()) - set(plain.state_dict()) == {"held_out_sum"}


def test_no_gradient_is_kept():
    record = SampleRecord(1, 2, epochs=1)
    probs = torch.tensor([[0.25, 0.75]], requires_grad=True)
    record.update(probs, torch.tensor([1]), torch.tensor([0]), epoch=0)
    assert not record.prob_sum.requires_grad
