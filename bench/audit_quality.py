"""The audit against cleanlab and AUM: ranking, count, calibration, cost.

On subsets of CIFAR-10 with human labels (CIFAR-10N), synthetic noise and clean labels, one
network is fine-tuned with the same settings and epochs for all: once for `elr`, the method of
`elr train` and `elr audit DATA`, once for `halves` (`--method elr-halves`), once with
cross-entropy for AUM (mean margin of the logits over the epochs), five times with cross-entropy
for cleanlab's cross-validation. With `--set digits` or `--set shapes` the same is done with
scikit-learn's digits or drawn shapes and a small network from scratch.

Every training keeps its evidence in a file, every method and set has a JSON file with its figures;
the script stops when its time is used up and goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import sets
import torch
from cleanlab.count import num_label_issues
from cleanlab.rank import get_label_quality_scores
from sklearn.model_selection import StratifiedKFold
from torch import Tensor

from elrcli import api
from elrcli.audit.evidence import Evidence, TopTable, agreed, evidence_of_run, normalised
from elrcli.audit.neighbours import FeatureSpace, neighbourhoods
from elrcli.audit.ranking import rank_labels
from elrcli.audit.scores import ranking_figures
from elrcli.config import Reading
from elrcli.data.manifest import load_data
from elrcli.engine import learner
from elrcli.engine.checkpoints import load_checkpoint
from elrcli.engine.features import Features
from elrcli.methods.record import SampleRecord
from elrcli.tables import write_table

FOLDS = 5
NOISE = ("aggre", "rand1", "sym20", "sym40", "asym30", "clean")
SETTINGS: dict[str, dict[str, Any]] = {
    "elr": {"method": "elr"},
    "halves": {"method": "elr-halves", "val_fraction": 0.0},
    "ce": {"method": "ce"},
}
TITLES = {
    "elr": "elr audit",
    "halves": "elr audit, two halves",
    "aum": "AUM, of the trained 90%",
    "cleanlab": "cleanlab, 5 folds",
}
LOWEST = 1e-12  # probability that a logit margin is cut at


class PeerRecord(SampleRecord):
    """Keeps what the peers rank by, too: agreements, margins of the logits, last predictions."""

    agreements: np.ndarray  # [N] predictions equal to the given label
    margins: np.ndarray  # [N] summed over the epochs
    last: np.ndarray  # [N, K]

    def __init__(self, num_samples: int, num_classes: int, *args: Any, **options: Any) -> None:
        super().__init__(num_samples, num_classes, *args, **options)
        PeerRecord.agreements = np.zeros(num_samples)
        PeerRecord.margins = np.zeros(num_samples)
        PeerRecord.last = np.zeros((num_samples, num_classes), dtype=np.float32)

    def update(
        self,
        probs: Tensor,
        labels: Tensor,
        index: Tensor,
        epoch: int,
        held_out: Tensor | None = None,
    ) -> None:
        """Add the predictions of one batch."""
        super().update(probs, labels, index, epoch, held_out)
        logs = probs.clamp_min(LOWEST).log()
        given = logs.gather(1, labels[:, None])[:, 0]
        others = logs.scatter(1, labels[:, None], -torch.inf).amax(dim=1)
        PeerRecord.agreements[index.numpy()] += (given > others).numpy()
        PeerRecord.margins[index.numpy()] += (given - others).numpy()
        PeerRecord.last[index.numpy()] = probs.numpy()


def train(noise: str, seed: int, kind: str, args: argparse.Namespace) -> None:
    """Train one network and keep what it says of every sample."""
    made = make_set(noise, seed, args)
    data, settings = made.csv, network(made, args) | SETTINGS.get(kind, SETTINGS["ce"])
    if kind.startswith("fold"):
        data = write_fold(made, int(kind[4:]), noise, seed, args)
    started = time.monotonic()
    run = api.train(
        data,
        root=made.root,
        out=args.out / "run",
        overwrite=True,
        epochs=args.epochs,
        seed=seed,
        workers=args.workers,
        truth_column="true_label",
        **settings,
    )
    minutes = (time.monotonic() - started) / 60
    manifest = run.manifest()
    state = load_checkpoint(run.checkpoint_folder)
    evidence, record = evidence_of_run(manifest, state), state["record"]
    features = Features.load(run.features_file, len(manifest))
    assert features is not None
    assert manifest.truth is not None
    assert isinstance(evidence.seen, np.ndarray)
    assert not isinstance(evidence.judged, TopTable)
    np.savez(
        evidence_file(noise, seed, kind, args),
        labels=evidence.labels,
        truth=manifest.truth,
        held_out=evidence.held_out,
        seen=evidence.seen,
        judged=np.zeros(0) if evidence.judged is None else evidence.judged,
        targets=state["method"]["loss.targets"].numpy(),
        agreements=PeerRecord.agreements,
        losses=-record["given_prob"].float().clamp_min(LOWEST).log().mean(dim=1).numpy(),
        margins=PeerRecord.margins,
        last=PeerRecord.last,
        features=np.zeros(0) if kind.startswith("fold") else features.vectors,
        minutes=minutes,
    )
    shutil.rmtree(run.path)


def make_set(noise: str, seed: int, args: argparse.Namespace) -> sets.StudySet:
    """Write the CSV file of one kind of labels."""
    out = args.out / f"{noise}-{seed}.csv"
    if args.set == "digits":
        return sets.digits(out, noise, seed, tests=False)
    if args.set == "shapes":
        return sets.shapes(out, noise, 60, 24, seed=seed, tests=0)
    return sets.cifar(out, args.cifar, args.labels, noise, args.images, 0, seed=seed)


def network(made: sets.StudySet, args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings of the network that suits the images."""
    if args.set != "cifar":
        settings = made.settings | {"small_input": False}
        return settings | {"backbone": "resnet10t", "pretrained": False}
    return {"backbone": "tf_efficientnet_lite0", "weights": args.weights, "image_size": 64}


def write_fold(
    made: sets.StudySet, fold: int, noise: str, seed: int, args: argparse.Namespace
) -> Path:
    """Write the labels with one fifth as validation split."""
    manifest = load_data(made.csv, Reading(root=made.root), truth_column="true_label")
    assert manifest.truth is not None
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    held_out = list(folds.split(manifest.labels, manifest.labels))[fold][1]
    split = np.full(len(manifest), "train", dtype=object)
    split[held_out] = "val"
    columns = (manifest.paths, manifest.labels, manifest.truth, split)
    rows = (
        {"path": path, "label": names[0], "true_label": names[1], "split": part}
        for path, *ids, part in zip(*columns, strict=True)
        for names in [[manifest.classes[i] for i in ids]]
    )
    out: Path = args.out / f"{noise}-{seed}-fold{fold}.csv"
    write_table(out, ("path", "label", "true_label", "split"), rows)
    return out


def evidence_file(noise: str, seed: int, kind: str, args: argparse.Namespace) -> Path:
    """Return where a training keeps its evidence."""
    return Path(args.out / f"{noise}-{seed}-{kind}.npz")


def measure(noise: str, seed: int, method: str, args: argparse.Namespace) -> dict[str, Any] | None:
    """Return the figures of one method on one set; None if a training is missing."""
    kinds = {"aum": ["ce"], "cleanlab": [f"fold{k}" for k in range(FOLDS)]}.get(method, [method])
    files = [evidence_file(noise, seed, kind, args) for kind in kinds]
    if not all(file.exists() for file in files):
        return None
    stored = [np.load(file) for file in files]
    labels, truth = stored[0]["labels"].astype(int), stored[0]["truth"]
    is_error = labels != truth
    figures: dict[str, Any] = {"samples": len(labels), "trainings": len(files)}
    if method == "aum":
        trained = ~stored[0]["held_out"]  # margins of held-out samples are of another scale
        figures |= ranking_figures(-stored[0]["margins"][trained], is_error[trained])
    elif method == "cleanlab":
        probs = np.zeros_like(stored[0]["seen"], dtype=np.float64)
        for part in stored:
            probs[part["held_out"]] = normalised(part["last"][part["held_out"]])
        doubt = 1 - get_label_quality_scores(labels, probs, method="self_confidence")
        figures |= ranking_figures(doubt, is_error)
        figures |= {"count": int(num_label_issues(labels, probs))}
        figures |= {"ece": calibration_error(doubt, is_error)}
    else:
        figures |= audit_figures(stored[0], is_error)
    return figures | {"minutes": sum(float(part["minutes"]) for part in stored)}


def audit_figures(stored: Any, is_error: np.ndarray) -> dict[str, Any]:
    """Return the figures of our own audit."""
    space = FeatureSpace.of(stored["features"])
    classes = stored["seen"].shape[1]
    evidence = Evidence(
        rows=np.arange(len(is_error)),
        labels=stored["labels"],
        held_out=stored["held_out"],
        seen=stored["seen"],
        judged=stored["judged"] if stored["judged"].size else None,
        neighbours=neighbourhoods(space, classes),
    )
    ranking = rank_labels(evidence, 0.5)
    found = is_error[ranking.result.rows]
    share, samples = ranking.share, len(is_error)
    return ranking_figures(ranking.result.score, found) | {
        "count": share.estimate * samples,
        "low": share.low * samples,
        "high": share.high * samples,
        "ece": calibration_error(ranking.result.error_probability, found),
        "flagged": int(ranking.result.flagged.sum()),
        "flagged_right": int(found[ranking.result.flagged].sum()),
    }


def evidence_kinds(stored: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return scores [N], higher is more suspicious, for every kind of evidence that is kept."""
    labels = stored["labels"].astype(int)
    samples, classes = np.arange(len(labels)), stored["seen"].shape[1]
    mean = normalised(stored["seen"])
    beside = neighbourhoods(FeatureSpace.of(stored["features"]), classes)
    votes = np.eye(classes)[labels][beside].mean(axis=1)
    around = mean[beside].mean(axis=1)
    return {
        "ELR target": 1 - normalised(stored["targets"])[samples, labels],
        "last prediction": 1 - stored["last"][samples, labels],
        "mean loss": stored["losses"],
        "agreement": -stored["agreements"],
        "mean margin": -stored["margins"],
        "mean probability (m)": 1 - mean[samples, labels],
        "neighbours' labels": 1 - votes[samples, labels],
        "neighbours' m": 1 - around[samples, labels],
        "m and target": 1 - (mean + normalised(stored["targets"]))[samples, labels] / 2,
        "m and neighbours' m": 1 - agreed(mean, around)[samples, labels],
    }


def print_evidence(args: argparse.Namespace) -> None:
    """Print the average precision of every kind of evidence, means over the seeds, as Markdown.

    Only trained samples are ranked: held-out ones have evidence of another scale.
    """
    found: dict[str, dict[str, list[float]]] = {}
    for noise in args.noise.split(","):
        for path in sorted(args.out.glob(f"{noise}-[0-9]-{args.evidence}.npz")):
            stored = np.load(path)
            trained = ~stored["held_out"]
            is_error = (stored["labels"] != stored["truth"])[trained]
            for name, score in evidence_kinds(stored).items() if is_error.any() else ():
                figures = ranking_figures(score[trained], is_error)
                found.setdefault(name, {}).setdefault(noise, []).append(figures["ap"] or 0.0)
    columns = list(next(iter(found.values()), {}))
    print(f"| average precision | {' | '.join(columns)} | mean |\n|{'---|' * (len(columns) + 2)}")
    for name, cells in found.items():
        means = [float(np.mean(cells[noise])) for noise in columns]
        shown = " | ".join(f"{value:.3f}" for value in (*means, np.mean(means)))
        print(f"| {name} | {shown} |")


def calibration_error(probability: np.ndarray, happened: np.ndarray) -> float:
    """Return the mean distance of predicted and true shares over 10 bins, weighted by size."""
    bins = np.minimum((probability * 10).astype(int), 9)
    return float(
        sum(
            abs(probability[bins == k].mean() - happened[bins == k].mean()) * (bins == k).mean()
            for k in range(10)
            if (bins == k).any()
        )
    )


def run_cells(args: argparse.Namespace) -> None:
    """Train what is missing while the time lasts, then measure all that is there."""
    deadline = time.monotonic() + 60 * args.budget_minutes
    kinds = args.kinds.split(",") if args.kinds else [*SETTINGS, *(f"fold{k}" for k in range(5))]
    for seed in args.seeds:
        for noise in args.noise.split(","):
            for kind in kinds:
                is_there = evidence_file(noise, seed, kind, args).exists()
                if not is_there and time.monotonic() < deadline:
                    with patch.object(learner, "SampleRecord", PeerRecord):  # raises if not there
                        train(noise, seed, kind, args)
                    print(f"{noise} {seed} {kind}", flush=True)


def measure_cells(args: argparse.Namespace) -> None:
    """Write a JSON file for every method and set whose trainings are there."""
    for seed in args.seeds:
        for noise in args.noise.split(","):
            for method in TITLES:
                figures = measure(noise, seed, method, args)
                if figures is not None:
                    result = args.out / f"{noise}-{seed}-{method}.json"
                    result.write_text(json.dumps(figures, indent=2) + "\n")


def print_table(args: argparse.Namespace) -> None:
    """Print the figures as Markdown: means over the seeds, counts of each seed."""
    titles = "labels | method | seeds | AUROC | AP | P@N | count / true | inside | ECE | trainings"
    print(f"| {titles} |\n|{'---|' * (titles.count('|') + 1)}")
    for noise in args.noise.split(","):
        for method, title in TITLES.items():
            paths = sorted(args.out.glob(f"{noise}-[0-9]-{method}.json"))
            cells = [json.loads(path.read_text()) for path in paths]
            if cells:
                print(f"| {noise} | {title} | {len(cells)} | {' | '.join(_columns(cells))} |")


def _columns(cells: list[dict[str, Any]]) -> list[str]:
    def mean(name: str) -> str:
        values = [cell[name] for cell in cells if cell.get(name) is not None]
        return f"{np.mean(values):.3f}" if values else ""

    counts = [f"{cell['count']:.0f} / {cell['errors']}" for cell in cells if "count" in cell]
    inside = [cell["low"] <= cell["errors"] <= cell["high"] for cell in cells if "low" in cell]
    return [
        *(mean(name) for name in ("auroc", "ap", "p_at_n")),
        ", ".join(counts),
        f"{sum(inside)} of {len(inside)}" if inside else "",
        mean("ece"),
        f"{cells[0]['trainings']}",
    ]


def main() -> None:
    """Train, measure, print."""
    parser = sets.cifar_arguments(__doc__)
    parser.add_argument("--set", choices=("cifar", "digits", "shapes"), default="cifar")
    parser.add_argument("--noise", default=",".join(NOISE), help="no human labels but for cifar")
    parser.add_argument("--kinds", help="trainings, such as halves,fold0; all without it")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=3000)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--budget-minutes", type=float, default=240)
    parser.add_argument("--evidence", help="only print how kinds of evidence rank: elr, halves, ce")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.evidence:
        print_evidence(args)
        return
    if not args.table:
        run_cells(args)
        measure_cells(args)
    print_table(args)


if __name__ == "__main__":
    main()
