"""The audit study on frozen features: a linear head takes seconds, so sets, seeds and lengths vary.

Features of EfficientNet-Lite0 with ImageNet weights are computed once. For every kind of labels,
seed and number of epochs a linear head is trained with ELR and with cross-entropy (for AUM), and
five times with cross-entropy for cleanlab's cross-validation. One JSON file per cell; the script
goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import numpy as np
import sets
import torch
from audit_quality import FOLDS, PeerRecord, audit_figures, calibration_error, evidence_kinds
from cleanlab.count import num_label_issues
from sklearn.model_selection import StratifiedKFold
from torch import nn

from elrcli.audit.scores import ranking_figures
from elrcli.config import Reading
from elrcli.data.loader import RowLoader
from elrcli.data.manifest import load_data
from elrcli.data.transforms import eval_transform
from elrcli.engine.device import choose_runtime
from elrcli.methods.elr import ELRLoss
from elrcli.models import create_network, features_kept, preprocessing

NOISE = ("aggre", "rand1", "sym20", "sym40", "asym30", "clean")
BATCH = 64
HELD_OUT = 10  # every tenth sample


def frozen_features(args: argparse.Namespace) -> tuple[list[str], np.ndarray]:
    """Return paths and features [N, 1280] float32 of a class-balanced part of CIFAR-10."""
    stored = args.out / "features.npz"
    if not stored.exists():
        made = sets.cifar(
            args.out / "all.csv", args.cifar, args.labels, "clean", args.pool, 0, seed=0
        )
        manifest = load_data(made.csv, Reading(root=args.cifar))
        network = create_network("tf_efficientnet_lite0", 10, weights=args.weights).eval()
        runtime, prepared = choose_runtime("cpu"), preprocessing(network, args.image_size)
        loader = RowLoader(
            manifest,
            np.arange(len(manifest)),
            eval_transform(args.image_size),
            batch_size=BATCH,
            workers=0,
            seed=0,
            shuffle=False,
        )
        parts = []
        with torch.inference_mode(), features_kept(network) as features:
            for batch in loader.epoch(0):
                network(runtime.normalise(batch.images, prepared))
                parts.append(features().numpy())
        np.savez(stored, paths=np.array(manifest.paths), features=np.concatenate(parts))
    content = np.load(stored)
    return content["paths"].tolist(), content["features"]


def train_head(
    inputs: np.ndarray, labels: np.ndarray, held_out: np.ndarray, lam: float, epochs: int, seed: int
) -> dict[str, np.ndarray]:
    """Train a linear head and return the evidence, named as `audit_quality.py` stores it."""
    torch.manual_seed(seed)
    x, y = torch.from_numpy(inputs), torch.from_numpy(labels)
    classes = int(labels.max()) + 1
    head = nn.Linear(x.shape[1], classes)
    nn.init.normal_(head.weight, std=0.01)
    loss_fn = ELRLoss(len(y), classes, lam=lam)
    record = PeerRecord(len(y), classes, epochs)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3, weight_decay=0.05)
    rows, others = (torch.from_numpy(np.flatnonzero(kind)) for kind in (~held_out, held_out))
    steps = epochs * -(-len(rows) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for epoch in range(epochs):
        for index in rows[torch.randperm(len(rows))].split(BATCH):
            logits = head(x[index])
            optimizer.zero_grad()
            loss_fn(logits, y[index], index).backward()
            optimizer.step()
            schedule.step()
            record.update(logits.detach().softmax(dim=1), y[index], index, epoch)
        with torch.no_grad():
            probs = head(x[others]).softmax(dim=1)
        loss_fn.update_targets(probs, others)
        record.update(probs, y[others], others, epoch)
    return {
        "labels": labels,
        "held_out": held_out,
        "seen": record.prob_sum.numpy(),
        "judged": np.zeros(0),
        "targets": loss_fn.targets.numpy(),
        "agreements": PeerRecord.agreements,
        "losses": -record.given_prob.float().clamp_min(1e-4).log().mean(dim=1).numpy(),
        "margins": PeerRecord.margins,
        "last": PeerRecord.last,
        "features": inputs,
    }


def cell(
    noise: str,
    seed: int,
    epochs: int,
    pool: tuple[list[str], np.ndarray],
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Return the figures of all methods on one set."""
    paths, features = pool
    made = sets.cifar(args.out / "set.csv", args.cifar, args.labels, noise, args.pool, 0, seed=0)
    manifest = load_data(made.csv, Reading(root=args.cifar), truth_column="true_label")
    assert manifest.truth is not None
    assert list(manifest.paths) == paths
    rng = np.random.default_rng(seed)
    chosen = np.sort(rng.choice(len(paths), args.images, replace=False))
    inputs = features[chosen]
    inputs = (inputs - inputs.mean(axis=0)) / (inputs.std(axis=0) + 1e-6)
    labels, truth = manifest.labels[chosen].astype(np.int64), manifest.truth[chosen]
    is_error = labels != truth
    held_out = rng.permutation(len(labels)) % HELD_OUT == 0
    elr = train_head(inputs, labels, held_out, 3.0, epochs, seed)
    figures: dict[str, Any] = {"elr audit": audit_figures(elr, is_error)}
    kinds = evidence_kinds(elr)
    ce = train_head(inputs, labels, held_out, 0.0, epochs, seed)
    kinds["AUM (cross-entropy)"] = -ce["margins"]
    probs = np.zeros_like(ce["last"])
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    for _, part in folds.split(labels, labels):
        is_part = np.isin(np.arange(len(labels)), part)
        probs[part] = train_head(inputs, labels, is_part, 0.0, epochs, seed)["last"][part]
    doubt = 1 - probs[np.arange(len(labels)), labels]
    figures["cleanlab"] = ranking_figures(doubt, is_error) | {
        "count": int(num_label_issues(labels, probs)),
        "ece": calibration_error(doubt, is_error),
    }
    trained = ~held_out
    figures["evidence"] = {
        name: ranking_figures(score[trained], is_error[trained])["ap"]
        for name, score in kinds.items()
    }
    return figures


def print_tables(args: argparse.Namespace) -> None:
    """Print both tables as Markdown, means over seeds and lengths."""
    cells = {path.stem: json.loads(path.read_text()) for path in sorted(args.out.glob("*.json"))}
    print("| labels | method | AUROC | AP | P@N | count / true | inside | ECE |\n|" + 8 * "---|")
    for noise in NOISE:
        for method in ("elr audit", "cleanlab"):
            found = [content[method] for name, content in cells.items() if name.startswith(noise)]
            if found:
                print(f"| {noise} | {method} | {' | '.join(_columns(found))} |")
    kinds = next(iter(cells.values()))["evidence"]
    print(f"\n| average precision | {' | '.join(NOISE[:-1])} |\n|{'---|' * len(NOISE)}")
    for kind in kinds:
        means = []
        for noise in NOISE[:-1]:
            found = [c["evidence"][kind] for name, c in cells.items() if name.startswith(noise)]
            means.append(f"{np.mean(found):.3f}" if found else "")
        print(f"| {kind} | {' | '.join(means)} |")


def _columns(found: list[dict[str, Any]]) -> list[str]:
    """Return means; the count as a ratio to the truth where there are errors."""
    ranks = [
        "" if found[0][name] is None else f"{np.mean([figures[name] for figures in found]):.3f}"
        for name in ("auroc", "ap", "p_at_n")
    ]
    ratios = [f["count"] / f["errors"] for f in found if f["errors"]]
    count = (
        f"{np.mean(ratios):.2f}" if ratios else f"{np.mean([f['count'] for f in found]):.0f} / 0"
    )
    inside = [f["low"] <= f["errors"] <= f["high"] for f in found if "low" in f]
    ece = f"{np.mean([figures['ece'] for figures in found]):.3f}"
    return [*ranks, count, f"{sum(inside)} of {len(inside)}" if inside else "", ece]


def main() -> None:
    """Run what is missing, then print the tables."""
    parser = sets.cifar_arguments(__doc__)
    parser.add_argument("--pool", type=int, default=10_000, help="images with features")
    parser.add_argument("--images", type=int, default=5_000, help="of them in a set")
    parser.add_argument("--image-size", type=int, default=96)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, nargs="+", default=[8, 30])
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.table:
        pool = frozen_features(args)
        for seed in args.seeds:
            for noise in NOISE:
                for epochs in args.epochs:
                    result = args.out / f"{noise}-{seed}-{epochs}.json"
                    if not result.exists():
                        figures = cell(noise, seed, epochs, pool, args)
                        result.write_text(json.dumps(figures, indent=2) + "\n")
                        print(result.stem, flush=True)
    print_tables(args)


if __name__ == "__main__":
    main()
