"""The tables of targets and predictions in each form: their memory and time, and what is lost.

python bench/table.py size --out bench/results/table
python bench/table.py loss --out bench/results/table

`size` makes a table for every image of ImageNet, 1,281,167 x 1,000, touches all of its memory and
times updates of random rows, the forms taking turns. `loss` trains a small network with ELR on
two-digit numbers (100 classes, pairs of scikit-learn's digits, wrong labels planted) and puts the
same predictions into tables of each form; then it trains with each form.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import sets
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from elrcli.audit.evidence import Evidence, TopTable
from elrcli.audit.neighbours import FeatureSpace, neighbourhoods
from elrcli.audit.ranking import rank_labels
from elrcli.audit.scores import ranking_figures
from elrcli.methods import table
from elrcli.methods.elr import ELRLoss, clamped_softmax
from elrcli.methods.record import SampleRecord

IMAGENET = 1_281_167
FORMS = ("fp32", "fp16", "top-k")
CLASSES = 100
BATCH = 64


def main() -> None:
    """Measure, print, and write JSON if asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("size", "loss"))
    parser.add_argument("--samples", type=int, default=IMAGENET, help="size: rows of the table")
    parser.add_argument("--classes", type=int, default=1000, help="size: columns of the table")
    parser.add_argument("--batch-size", type=int, default=256, help="size: rows of an update")
    parser.add_argument("--rounds", type=int, default=15, help="size: of ten updates each")
    parser.add_argument("--per-class", type=int, default=20, help="loss: training images")
    parser.add_argument("--epochs", type=int, default=15, help="loss: of each training")
    parser.add_argument("--noise", default="sym40", help="loss: kind of wrong labels")
    parser.add_argument("--seeds", default="0,1", help="loss: of data and trainings")
    parser.add_argument("--kept", default="4,16", help="loss: entries of a row")
    parser.add_argument("--out", type=Path, help="folder for the figures as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.what == "size":
        keep(args.out, f"size-{args.samples}-{args.classes}", size(args))
        return
    for seed in map(int, args.seeds.split(",")):
        keep(args.out, f"loss-{args.noise}-{seed}", loss(args, seed))


def keep(out: Path | None, name: str, figures: dict[str, Any]) -> None:
    """Print figures, and write them if asked."""
    text = json.dumps({"torch": torch.__version__, **figures}, indent=1)
    print(text, flush=True)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{name}.json").write_text(text + "\n")


def size(args: argparse.Namespace) -> dict[str, Any]:
    """Return memory and time of tables, all of them there at once."""
    generator = torch.Generator().manual_seed(0)
    tables: dict[str, ELRLoss] = {}
    memory = {}
    for form in FORMS:
        before = resident()
        tables[form] = ELRLoss(args.samples, args.classes, table=form)
        for buffer in tables[form].buffers():
            buffer.fill_(1)  # untouched zeros take no memory
        memory[form] = resident() - before
    probs = torch.randn(args.batch_size, args.classes, generator=generator).softmax(dim=1)
    rounds = []
    for _ in range(args.rounds + 1):
        times = {}
        for form, loss_fn in tables.items():
            batches = [
                torch.randint(args.samples, (args.batch_size,), generator=generator).unique()
                for _ in range(10)
            ]
            started = time.process_time()
            for index in batches:
                loss_fn.update_targets(probs[: len(index)], index)
            times[form] = (time.process_time() - started) / len(batches)
        rounds.append(times)
    figures = {}
    for form in FORMS:
        row = table.row_bytes(form, args.classes)
        figures[form] = {
            "allocated_gb": round(memory[form] / 1e9, 3),
            "calculated_gb": round(args.samples * row / 1e9, 3),
            "moved_kb": round(2 * args.batch_size * row / 1e3, 1),  # rows are read and written
            "update_ms": round(1e3 * statistics.median(r[form] for r in rounds[1:]), 3),
            "update / fp32": round(statistics.median(r[form] / r["fp32"] for r in rounds[1:]), 2),
        }
    return {
        "samples": args.samples,
        "classes": args.classes,
        "batch_size": args.batch_size,
        "forms": figures,
    }


def resident() -> int:
    """Return the bytes that this process has in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def loss(args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Return what each form loses of one training, and how trainings with each form end."""
    forms: list[str | int] = ["fp32", "fp16", *map(int, args.kept.split(","))]
    data = numbers(args.per_class, args.noise, seed)
    keepers = {form: Keeper.make(form, len(data.labels), args.epochs) for form in forms}
    accuracy, near = train(data, keepers["fp32"], args.epochs, seed, list(keepers.values()))
    same = {
        named(form): differences(keeper, keepers["fp32"]) | audited(data, keeper, near)
        for form, keeper in keepers.items()
    }
    trained = {"fp32": {"accuracy": accuracy, **audited(data, keepers["fp32"], near)}}
    for form in forms[1:]:
        keeper = Keeper.make(form, len(data.labels), args.epochs)
        accuracy, near = train(data, keeper, args.epochs, seed, [keeper])
        trained[named(form)] = {"accuracy": accuracy, **audited(data, keeper, near)}
    return {
        "classes": CLASSES,
        "images": len(data.labels),
        "wrong": int((data.labels != data.truth).sum()),
        "noise": args.noise,
        "seed": seed,
        "epochs": args.epochs,
        "same_predictions": same,
        "trained_with": trained,
    }


def named(form: str | int) -> str:
    """Return the name of a form; of a number, that of the table with so many entries."""
    return form if isinstance(form, str) else f"top-{form}"


class Numbers(NamedTuple):
    """Two-digit numbers: pixels as rows; every tenth training image is held out."""

    inputs: Tensor  # [N, 128]
    labels: Tensor  # [N] as given
    truth: Tensor  # [N]
    test_inputs: Tensor
    test_labels: Tensor

    @property
    def held_out(self) -> Tensor:
        """Which of the samples are not trained on, [N] bool."""
        return torch.arange(len(self.labels)) % 10 == 0


def numbers(per_class: int, noise: str, seed: int) -> Numbers:
    """Return pairs of digits; every fifth picture of a digit is used for tests only."""
    rng = np.random.default_rng(seed)
    digits = load_digits()
    for_tests = np.arange(len(digits.target)) % 5 == 0

    def draw(labels: np.ndarray, part: np.ndarray) -> Tensor:
        pictures = [digits.data[part & (digits.target == digit)] / 16 for digit in range(10)]
        pairs = [[rng.choice(pictures[d]) for d in divmod(int(label), 10)] for label in labels]
        return torch.from_numpy(np.array(pairs).reshape(len(labels), -1)).float()

    truth = rng.permutation(np.repeat(np.arange(CLASSES), per_class))
    tests = np.repeat(np.arange(CLASSES), 20)
    return Numbers(
        draw(truth, ~for_tests),
        torch.from_numpy(sets.noisy(truth, CLASSES, noise, rng)),
        torch.from_numpy(truth),
        draw(tests, for_tests),
        torch.from_numpy(tests),
    )


class Keeper(NamedTuple):
    """Targets and record of one form."""

    loss_fn: ELRLoss
    record: SampleRecord
    overlap_errors: list[float]  # of <p, t>, in the last epoch

    @classmethod
    def make(cls, form: str | int, samples: int, epochs: int) -> Keeper:
        """Make empty tables."""
        with entries_kept(form) as kind:
            return cls(
                ELRLoss(samples, CLASSES, table=kind),
                SampleRecord(samples, CLASSES, epochs, table=kind),
                [],
            )


@contextmanager
def entries_kept(form: str | int) -> Iterator[str]:
    """Let tables that are made inside keep so many entries, where the form is a number."""
    usual = table.TOP
    if isinstance(form, int):
        table.TOP = form
    yield "top-k" if isinstance(form, int) else form
    table.TOP = usual


def train(
    data: Numbers, leader: Keeper, epochs: int, seed: int, keepers: list[Keeper]
) -> tuple[float, np.ndarray]:
    """Train by the targets of `leader` and tell all `keepers`.

    Returns the accuracy on the tests, and the neighbours [N, k] of the samples.
    """
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, CLASSES))
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.003)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    held_out = data.held_out.nonzero()[:, 0]
    trained = (~data.held_out).nonzero()[:, 0]
    for epoch in range(epochs):
        for part in trained[torch.randperm(len(trained))].split(BATCH):
            logits = network(data.inputs[part])
            leader_loss = leader.loss_fn(logits, data.labels[part], part)
            optimizer.zero_grad()
            leader_loss.backward()
            optimizer.step()
            tell(keepers, leader, logits.detach(), data.labels[part], part, epoch)
        schedule.step()
        with torch.no_grad():
            for part in held_out.split(BATCH):
                logits = network(data.inputs[part])
                leader.loss_fn.update_targets(clamped_softmax(logits), part)
                tell(keepers, leader, logits, data.labels[part], part, epoch)
    with torch.no_grad():
        right = network(data.test_inputs).argmax(dim=1) == data.test_labels
        space = FeatureSpace.of(network[:2](data.inputs).numpy())
    return round(float(right.float().mean()), 4), neighbourhoods(space, CLASSES)


def tell(
    keepers: list[Keeper], leader: Keeper, logits: Tensor, labels: Tensor, index: Tensor, epoch: int
) -> None:
    """Let keepers have the predictions [B, K] of a step that moved the leader's targets already."""
    probs = logits.softmax(dim=1)
    exact = leader.loss_fn.read("targets", index)
    for keeper in keepers:
        keeper.record.update(probs, labels, index, epoch)
        if keeper is leader:
            continue
        rows = keeper.loss_fn.update_targets(clamped_softmax(logits), index)
        if epoch == keeper.record.given_prob.shape[1] - 1:
            keeper.overlap_errors.extend(((rows - exact) * probs).sum(dim=1).abs().tolist())


def differences(keeper: Keeper, exact: Keeper) -> dict[str, float]:
    """Return mean errors over the samples: sums of absolute differences, and of <p, t>."""
    everyone = torch.arange(len(exact.loss_fn.targets))

    def apart(name: str) -> float:
        found, expected = (
            getattr(one, "loss_fn" if name == "targets" else "record").read(name, everyone)
            for one in (keeper, exact)
        )
        whole = expected.sum(dim=1)
        return round(float(((found - expected).abs().sum(dim=1) / whole).mean()), 5)

    return {
        "targets_l1": apart("targets"),
        "predictions_l1": apart("prob_sum"),
        "overlap_error": round(statistics.fmean(keeper.overlap_errors or [0.0]), 6),
    }


def audited(data: Numbers, keeper: Keeper, neighbours: np.ndarray) -> dict[str, float]:
    """Return how well the audit ranks the planted errors."""
    record = keeper.record
    seen: Any = record.prob_sum.numpy()
    if record.form == "top-k":
        seen = TopTable(seen, record.get_buffer("prob_sum_classes").numpy(), CLASSES)
    evidence = Evidence(
        np.arange(len(data.labels)),
        data.labels.numpy(),
        data.held_out.numpy(),
        seen,
        neighbours=neighbours,
    )
    result = rank_labels(evidence, 0.5).result
    wrong = (data.labels != data.truth).numpy()[result.rows]
    figures = ranking_figures(result.score, wrong)
    return {name: round(value, 4) for name, value in figures.items() if isinstance(value, float)}


if __name__ == "__main__":
    main()
