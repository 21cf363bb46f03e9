"""The tables of targets and predictions in each form: their memory and time, and what is lost.

python bench/table.py size --out bench/results/table
python bench/table.py loss --out bench/results/table

`size` makes a table for every image of ImageNet, 1,281,167 x 1,000, touches all of its memory and
times updates of random rows, the forms taking turns. `loss` trains on two-digit numbers (100
classes, wrong labels planted), puts the same predictions into tables of each form, and compares
them and the audits by them; then it trains with each form.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import sets
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor

from elrcli import api
from elrcli.audit.run import audit_run
from elrcli.engine import fit
from elrcli.engine.checkpoints import load_checkpoint, save_checkpoint
from elrcli.methods import table
from elrcli.methods.elr import ELRLoss
from elrcli.methods.record import SampleRecord
from elrcli.run import RunFolder

IMAGENET = 1_281_167
FORMS = ("fp32", "fp16", "top-k")
SIDE = 32


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
    parser.add_argument("--per-class", type=int, default=40, help="loss: images of a class")
    parser.add_argument("--epochs", type=int, default=15, help="loss: of each training")
    parser.add_argument("--noise", default="sym20", help="loss: kind of wrong labels")
    parser.add_argument("--seeds", default="0", help="loss: of the trainings")
    parser.add_argument("--kept", default="4,8,16,32", help="loss: entries of a row")
    parser.add_argument("--folder", type=Path, default=Path("table-runs"), help="loss: removed")
    parser.add_argument("--out", type=Path, help="folder for the figures as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.what == "size":
        keep(args.out, f"size-{args.samples}-{args.classes}", size(args))
        return
    for seed in map(int, args.seeds.split(",")):
        keep(args.out, f"loss-{args.noise}-{seed}", loss(args, seed))
    shutil.rmtree(args.folder)


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
    return {
        "samples": args.samples,
        "classes": args.classes,
        "batch_size": args.batch_size,
        "forms": {
            form: {
                "allocated_gb": round(memory[form] / 1e9, 3),
                "calculated_gb": round(args.samples * table.row_bytes(form, args.classes) / 1e9, 3),
                # Every row is read and written.
                "moved_kb_per_step": round(
                    2 * args.batch_size * table.row_bytes(form, args.classes) / 1e3, 1
                ),
                "update_ms": round(1e3 * statistics.median(r[form] for r in rounds[1:]), 3),
                "update / fp32": round(
                    statistics.median(r[form] / r["fp32"] for r in rounds[1:]), 2
                ),
            }
            for form in FORMS
        },
    }


def resident() -> int:
    """Return the bytes that this process has in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def loss(args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Return what each form loses of one training, and how trainings with each form end."""
    kept = [int(k) for k in args.kept.split(",")]
    data = numbers(args.folder / "numbers.csv", args.per_class, args.noise, seed)
    shadows = Shadows(["fp16", *kept])
    run, exact = train(data, args, seed, "fp32", shadows)
    trained = {"fp32": exact}
    for form in ("fp16", *kept):
        trained[named(form)] = train(data, args, seed, form)[1]
    return {
        "images": 100 * args.per_class,
        "noise": args.noise,
        "seed": seed,
        "epochs": args.epochs,
        "same_predictions": {"fp32": audited(run)}
        | {
            named(form): shadows.differences(form) | audited(shadows.run_with(run, form))
            for form in ("fp16", *kept)
        },
        "trained_with": trained,
    }


def named(form: str | int) -> str:
    """Return the name of a form; of a number, that of the table with so many entries."""
    return form if isinstance(form, str) else f"top-{form}"


def made(form: str | int, build: Any) -> Any:
    """Return what `build(form)` makes, with that many entries where the form is a number."""
    usual = table.TOP
    if isinstance(form, int):
        table.TOP = form
    try:
        return build("top-k" if isinstance(form, int) else form)
    finally:
        table.TOP = usual


class Shadows:
    """Tables in other forms that are given the predictions of a training, too."""

    def __init__(self, forms: list[str | int]) -> None:
        self.forms = forms
        self.tables: dict[str | int, tuple[ELRLoss, SampleRecord]] = {}
        self.overlap_errors: dict[str | int, list[float]] = {form: [] for form in forms}

    def update(
        self, record: SampleRecord, probs: Tensor, labels: Tensor, index: Tensor, epoch: int
    ) -> None:
        """Take one batch: probs [B, K], labels and index [B]."""
        if not self.tables:
            samples, epochs = record.given_prob.shape
            classes = record.num_classes
            for form in ("fp32", *self.forms):
                self.tables[form] = made(
                    form,
                    lambda kind: (
                        ELRLoss(samples, classes, table=kind),
                        SampleRecord(samples, classes, epochs, table=kind),
                    ),
                )
        exact = self.tables["fp32"][0].update_targets(probs, index)
        for form in self.forms:
            loss_fn, sums = self.tables[form]
            rows = loss_fn.update_targets(probs, index)
            sums.update(probs, labels, index, epoch)
            if epoch == record.given_prob.shape[1] - 1:
                errors = ((rows - exact) * probs).sum(dim=1).abs()
                self.overlap_errors[form] += errors.tolist()
        self.tables["fp32"][1].update(probs, labels, index, epoch)

    def differences(self, form: str | int) -> dict[str, float]:
        """Return mean errors over the samples: sums of absolute differences, and of <p, t>."""
        everyone = torch.arange(len(self.tables["fp32"][0].targets))
        (targets, sums), (other, other_sums) = self.tables["fp32"], self.tables[form]
        apart = (targets.targets - other.read("targets", everyone)).abs().sum(dim=1)
        means, other_means = sums.prob_sum, other_sums.read("prob_sum", everyone)
        means = means / means.sum(dim=1, keepdim=True)
        other_means = other_means / other_means.sum(dim=1, keepdim=True)
        return {
            "targets_l1": round(float(apart.mean()), 5),
            "predictions_l1": round(float((means - other_means).abs().sum(dim=1).mean()), 5),
            "overlap_error": round(statistics.fmean(self.overlap_errors[form]), 6),
        }

    def run_with(self, run: RunFolder, form: str | int) -> RunFolder:
        """Return a copy of a run whose checkpoint has the predictions of a form."""
        copy = run.path.with_name(f"{run.path.name}-as-{named(form)}")
        shutil.copytree(run.path, copy, dirs_exist_ok=True)
        state = load_checkpoint(copy / "checkpoint")
        record = self.tables[form][1].state_dict()
        state["record"] |= {name: t for name, t in record.items() if name.startswith("prob_sum")}
        save_checkpoint(copy / "checkpoint", state["epoch"], state)
        return RunFolder(copy)


class Watched(SampleRecord):
    """The record of a training, which hands everything on."""

    shadows: Shadows | None = None

    def update(self, probs: Tensor, labels: Tensor, index: Tensor, epoch: int, *rest: Any) -> None:
        """Add the predictions of one batch."""
        super().update(probs, labels, index, epoch, *rest)
        if self.shadows is not None:
            self.shadows.update(self, probs, labels, index, epoch)


def train(
    data: sets.StudySet,
    args: argparse.Namespace,
    seed: int,
    form: str | int,
    shadows: Shadows | None = None,
) -> tuple[RunFolder, dict[str, float]]:
    """Train with one form; return the run, its accuracy on right labels, and its audit."""
    Watched.shadows = shadows
    fit.SampleRecord = Watched  # type: ignore[misc]
    try:
        run = made(
            form,
            lambda kind: api.train(
                data.csv,
                root=data.root,
                out=args.folder / f"run-{named(form)}",
                overwrite=True,
                backbone="resnet10t",
                pretrained=False,
                epochs=args.epochs,
                seed=seed,
                table=kind,
                truth_column="true_label",
                cache="ram",
                workers=0,
                device="cpu",
                **data.settings,
            ),
        )
    finally:
        fit.SampleRecord = SampleRecord  # type: ignore[misc]
    figures = {"accuracy": round(run.metrics()[-1]["test_accuracy_true"], 4)}
    return run, figures | audited(run)


def audited(run: RunFolder) -> dict[str, float]:
    """Return how well the audit of a run ranks the planted errors of its training data."""
    truth = audit_run(run.path, report=False).summary["truth"]
    return {name: round(value, 4) for name, value in truth.items() if isinstance(value, float)}


def numbers(out: Path, per_class: int, noise: str, seed: int) -> sets.StudySet:
    """Write the numbers 00 to 99 as pairs of handwritten digits; a fifth of them are for tests."""
    rng = np.random.default_rng(seed)
    digits = load_digits()
    is_test = np.arange(len(digits.target)) % 5 == 0
    pictures = {
        (digit, part): digits.images[(digits.target == digit) & (is_test == (part == "test"))]
        for digit in range(10)
        for part in ("", "test")
    }
    tests = per_class // 5
    truth = np.repeat(np.arange(100), per_class + tests)
    split = np.tile(np.array([""] * per_class + ["test"] * tests), 100)
    given = np.where(split == "test", truth, sets.noisy(truth, 100, noise, rng))
    lines = []
    for number, label in enumerate(truth):
        pair = [rng.choice(pictures[d, str(split[number])]) for d in divmod(int(label), 10)]
        pixels = (np.hstack(pair) * 255 / 16).astype(np.uint8)
        path = out.parent / "numbers" / f"{number:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(path)
        name = f"numbers/{path.name}"
        lines.append((name, f"{given[number]:02d}", f"{label:02d}", split[number]))
    settings = {"image_size": SIDE, "flip": False}
    return sets.StudySet(sets.write(out, lines), out.parent, settings)


if __name__ == "__main__":
    main()
