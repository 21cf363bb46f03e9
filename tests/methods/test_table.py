from __future__ import annotations

import pytest
import torch
from torch import Tensor

from elrcli.methods.elr import ELRLoss, clamped_softmax
from elrcli.methods.record import SampleRecord
from elrcli.methods.table import FORMS, TOP, TableChoice, _Arriving, choose_tables, row_bytes

GB = 10**9


def predictions(steps: int, classes: int = 40) -> Tensor:
    """Predictions of six samples [steps, 6, K] that are sure of a few classes."""
    generator = torch.Generator().manual_seed(0)
    return (3 * torch.randn(steps, 6, classes, generator=generator)).softmax(dim=2)


def rows_after(form: str, steps: int, **options: object) -> Tensor:
    loss_fn = ELRLoss(6, 40, table=form, **options)
    index = torch.tensor([4, 2, 0, 1, 5, 3])
    for probs in predictions(steps):
        loss_fn.update_targets(probs, index)
    return loss_fn.read("targets", torch.arange(6))


def test_half_precision_stores_what_full_precision_computes():
    rows = rows_after("fp16", 100)
    assert rows.dtype == torch.float32
    exact = rows_after("fp32", 100)
    assert (rows - exact).abs().sum(dim=1).max() < 2e-3
    assert ELRLoss(6, 40, table="fp16").targets.dtype == torch.float16


def test_the_largest_entries_and_the_sum_of_the_others_by_hand(monkeypatch):
    """Two kept of four. (.5 .3 .1 .1) -> .5 .3 | .2; then the others are .1 each and move on."""
    monkeypatch.setattr("elrcli.methods.table.TOP", 2)
    loss_fn = ELRLoss(2, 4, beta=0.5, table="top-k")
    index = torch.tensor([1])
    loss_fn.update_targets(torch.tensor([[0.5, 0.3, 0.15, 0.05]]), index)
    torch.testing.assert_close(
        loss_fn.targets.float(), torch.tensor([[0, 0, 0], [0.25, 0.15, 0.1]]), atol=1e-3, rtol=0
    )
    assert loss_fn.targets_classes.tolist() == [[0, 0], [0, 1]]
    rows = loss_fn.update_targets(torch.tensor([[0.0, 0.0, 0.0, 1.0]]), index)
    # half of (.25 .15 .05 .05) and half of the prediction
    expected = torch.tensor([[0.125, 0.075, 0.025, 0.525]])
    torch.testing.assert_close(rows, expected, atol=1e-3, rtol=0)
    assert loss_fn.targets_classes[1].tolist() == [3, 0]
    torch.testing.assert_close(
        loss_fn.targets[1].float(), torch.tensor([0.525, 0.125, 0.1]), atol=1e-3, rtol=0
    )
    read = torch.tensor([[0.125, 0.05, 0.05, 0.525]])
    torch.testing.assert_close(loss_fn.read("targets", index), read, atol=1e-3, rtol=0)


def test_a_row_of_the_largest_keeps_its_sum():
    sums = rows_after("top-k", 5).sum(dim=1)
    torch.testing.assert_close(sums, torch.full((6,), 1 - 0.7**5), atol=2e-3, rtol=0)


def test_all_classes_are_kept_where_there_are_few():
    few = ELRLoss(3, 5, table="top-k")
    exact = ELRLoss(3, 5)
    index = torch.tensor([2, 0])
    for probs in predictions(5, classes=5)[:, :2]:
        torch.testing.assert_close(
            few.update_targets(probs, index), exact.update_targets(probs, index), atol=1e-3, rtol=0
        )
    assert few.targets_classes.shape == (3, 5)


def test_a_sample_that_was_never_seen_has_an_empty_row():
    assert not ELRLoss(2, 40, table="top-k").read("targets", torch.arange(2)).any()


def test_the_loss_and_its_gradient_hardly_differ():
    logits = 3 * torch.randn(20, 6, 40, generator=torch.Generator().manual_seed(1))
    labels, index = torch.arange(6), torch.arange(6)
    found = {}
    for form in FORMS:
        loss_fn = ELRLoss(6, 40, table=form)
        for step in logits:
            step = step.clone().requires_grad_()
            loss = loss_fn(step, labels, index)
            loss.backward()
        found[form] = loss.detach(), step.grad
    for form, tolerance in (("fp16", 1e-3), ("top-k", 2e-2)):
        torch.testing.assert_close(found[form], found["fp32"], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("form", FORMS)
def test_on_the_host_nothing_differs(form):
    assert rows_after(form, 9, on_host=True).equal(rows_after(form, 9))


@pytest.mark.parametrize("form", FORMS)
def test_a_table_on_the_host_stays_there(form):
    """`meta` stands for a device."""
    loss_fn = ELRLoss(3, 20, table=form, on_host=True).to("meta")
    assert {table.device.type for table in loss_fn.buffers()} == {"cpu"}
    record = SampleRecord(3, 20, 2, held_out=True, table=form, on_host=True).to("meta")
    stays = {name for name, buffer in record.named_buffers() if buffer.device.type == "cpu"}
    tables = {"prob_sum", "held_out_sum"}
    assert stays == (tables | {f"{t}_classes" for t in tables} if form == "top-k" else tables)
    assert ELRLoss(3, 20, table=form).to("meta").targets.device.type == "meta"


def test_rows_of_a_step_are_told_beforehand():
    """Then nothing is asked of the device, here one that has nothing to say."""
    loss_fn = ELRLoss(3, 2, on_host=True)
    index = torch.empty(2, dtype=torch.int64, device="meta")
    loss_fn.expect(torch.tensor([2, 0]), index)
    assert loss_fn._places(index).tolist() == [2, 0]
    assert loss_fn._places(torch.tensor([1])).tolist() == [1]  # other rows are asked for


class Done:
    """An event after which a copy is complete."""

    def synchronize(self) -> None:
        """Not waited for."""


def test_rows_on_their_way_from_a_device_are_part_of_the_state():
    loss_fn = ELRLoss(3, 2, on_host=True)
    rows, places = torch.tensor([[0.25, 0.5]]), torch.tensor([1])
    loss_fn._arriving.append(_Arriving(Done(), loss_fn.targets, places, rows))
    state = {name: table.clone() for name, table in loss_fn.state_dict().items()}
    assert state["targets"].tolist() == [[0, 0], [0.25, 0.5], [0, 0]]
    loss_fn._arriving.append(_Arriving(Done(), loss_fn.targets, places, 2 * rows))
    loss_fn.load_state_dict(state)  # they belong to a step that is taken back
    assert loss_fn.read("targets", places).tolist() == [[0.25, 0.5]]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("on_host", [False, True])
def test_the_state_holds_the_tables(form, on_host):
    loss_fn = ELRLoss(6, 40, table=form, on_host=on_host)
    record = SampleRecord(6, 40, 3, held_out=True, table=form, on_host=on_host)
    index = torch.arange(6)
    for epoch, probs in enumerate(predictions(3)):
        loss_fn.update_targets(probs, index)
        record.update(probs, index, index, epoch, probs)
    others = ELRLoss(6, 40, table=form), SampleRecord(6, 40, 3, held_out=True, table=form)
    for one, other in zip((loss_fn, record), others, strict=True):
        other.load_state_dict(one.state_dict())
        for name, tensor in one.state_dict().items():
            assert other.state_dict()[name].equal(tensor), name
            assert name in one.per_sample
    assert ("targets_classes" in loss_fn.state_dict()) == (form == "top-k")


def test_classes_that_do_not_exist_are_refused():
    state = ELRLoss(2, 40, table="top-k").state_dict()
    for wrong in (-1, 40):
        state["targets_classes"][1, 3] = wrong
        with pytest.raises(ValueError, match="targets_classes names classes that do not exist"):
            ELRLoss(2, 40, table="top-k").load_state_dict(state)


@pytest.mark.parametrize("form", FORMS)
def test_a_record_sums_the_same_in_every_form(form):
    exact = SampleRecord(6, 40, 15, held_out=True)
    record = SampleRecord(6, 40, 15, held_out=True, table=form)
    index = torch.arange(6)
    for epoch, probs in enumerate(predictions(15)):
        for one in (exact, record):
            one.update(probs, index, index, epoch, probs.flip(0))
    for table in ("prob_sum", "held_out_sum"):
        rows, expected = record.read(table, index), exact.read(table, index)
        error = (rows - expected).abs().sum(dim=1) / expected.sum(dim=1)
        assert error.max() < {"fp32": 1e-6, "fp16": 2e-3, "top-k": 0.35}[form]
        assert rows.argmax(dim=1).equal(expected.argmax(dim=1))
    assert record.prediction.equal(exact.prediction)


def test_the_prediction_of_the_given_label_is_always_kept():
    """The labels are the least likely classes, on which a ranking of the labels depends most."""
    probs = predictions(15)
    labels, index = probs.sum(dim=0).argmin(dim=1), torch.arange(6)
    record = SampleRecord(6, 40, 15, held_out=True, table="top-k")
    for epoch in range(15):
        record.update(probs[epoch], labels, index, epoch, probs[epoch])
    expected = probs.sum(dim=0).gather(1, labels[:, None])
    for table in ("prob_sum", "held_out_sum"):
        found = record.read(table, index).gather(1, labels[:, None])
        torch.testing.assert_close(found, expected, atol=0, rtol=5e-3)


def test_extreme_predictions_fit_into_half_precision():
    """The clamped prediction of 21,000 classes has 1e-4 everywhere: none of it may vanish."""
    logits = torch.zeros(1, 21_000)
    logits[0, 7] = 1e4
    probs = clamped_softmax(logits)
    rows = {}
    for form in FORMS:
        loss_fn = ELRLoss(1, 21_000, table=form)
        loss_fn.update_targets(probs, torch.tensor([0]))
        rows[form] = loss_fn.read("targets", torch.tensor([0]))
    for form in ("fp16", "top-k"):
        torch.testing.assert_close(rows[form], rows["fp32"], atol=1e-4, rtol=2e-3)


def test_another_form_is_refused():
    with pytest.raises(ValueError, match="table form 'bf16': choose one of fp32, fp16, top-k"):
        ELRLoss(2, 3, table="bf16")


def test_bytes_of_a_row():
    assert [row_bytes(form, 1000) for form in FORMS] == [4000, 2000, 16 * (2 + 2) + 2]
    assert row_bytes("top-k", 40_000) == 16 * (2 + 4) + 2
    assert row_bytes("top-k", 10) == 10 * (2 + 2) + 2
    for form in FORMS:
        tables = ELRLoss(1, 50, table=form).buffers()
        assert sum(table.nbytes for table in tables) == row_bytes(form, 50)
    assert TOP == 16


def chosen(form: str, place: str, device: float, host: float, on: str = "cuda:0") -> TableChoice:
    """The choice for two tables of 1.28 million rows and 1,000 classes; free memory in GB."""
    return choose_tables(
        form,
        place,
        rows=1_280_000,
        classes=1000,
        tables=2,
        device=on,
        free=(int(device * GB), int(host * GB)),
    )


@pytest.mark.parametrize(
    ("device", "host", "expected"),
    [
        (41, 0, ("fp32", False)),  # 10.24 GB
        (40, 500, ("fp16", False)),  # 5.12 GB
        (20, 21, ("fp16", True)),
        (20, 20, ("top-k", False)),  # 0.17 GB
        (0.5, 1, ("top-k", True)),
        (0, 0, ("top-k", True)),
    ],
)
def test_the_automatic_choice_goes_by_free_memory(device, host, expected):
    choice = chosen("auto", "auto", device, host)
    assert (choice.form, choice.on_host) == expected


@pytest.mark.parametrize(
    ("form", "place", "device", "host", "expected"),
    [
        ("fp32", "auto", 20, 100, ("fp32", True)),
        ("fp32", "device", 1, 1, ("fp32", False)),
        ("fp16", "auto", 21, 100, ("fp16", False)),
        ("auto", "device", 20, 100, ("top-k", False)),
        ("auto", "host", 100, 100, ("fp16", True)),
        ("top-k", "host", 100, 100, ("top-k", True)),
    ],
)
def test_what_is_asked_for_is_not_chosen(form, place, device, host, expected):
    choice = chosen(form, place, device, host)
    assert (choice.form, choice.on_host) == expected


def test_on_the_cpu_there_is_no_other_place():
    choices = [chosen("auto", "auto", free, free, "cpu") for free in (50, 30, 1)]
    assert [choice.form for choice in choices] == ["fp32", "fp16", "top-k"]
    assert not any(choice.on_host for choice in choices)


def test_the_choice_says_why():
    assert chosen("auto", "auto", 50, 0).note is None
    assert chosen("auto", "auto", 20, 30).note == (
        "targets and predictions of 1,280,000 samples and 1,000 classes are kept as fp16 in host"
        " memory: 5.12 GB, as fp32 10.24 GB; 20.00 GB are free on cuda:0 and 30.00 GB on the host"
    )
    assert chosen("auto", "auto", 30, 30, "cpu").note == (
        "targets and predictions of 1,280,000 samples and 1,000 classes are kept as fp16 on cpu:"
        " 5.12 GB, as fp32 10.24 GB; 30.00 GB are free"
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("form", FORMS)
def test_a_gpu_computes_the_same_by_rows_from_the_host(form):
    index = torch.tensor([4, 2, 0, 1, 5, 3])
    near, far = (ELRLoss(6, 40, table=form, on_host=on_host).cuda() for on_host in (False, True))
    on_gpu = index.cuda()
    for probs in predictions(9).cuda():
        far.expect(index, on_gpu)
        assert far.update_targets(probs, on_gpu).equal(near.update_targets(probs, on_gpu))
    for name, table in far.state_dict().items():
        assert table.equal(near.state_dict()[name].cpu()), name
