"""Time and memory of an audit of many samples and classes, on a run that was never trained.

Writes a run folder of N samples and K classes with made-up predictions (the images do not exist),
audits it in a process of its own and prints seconds and peak memory beside the size of the table.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

import elrcli
from elrcli.config import TrainConfig
from elrcli.data.manifest import Manifest, StringTable, manifest_text
from elrcli.engine.checkpoints import save_checkpoint, take_snapshot
from elrcli.engine.features import Features
from elrcli.files import json_text, write_text
from elrcli.run import RunFolder

EPOCHS = 10
CHUNK = 20_000
WRONG = 0.1


def write_run(folder: Path, samples: int, classes: int, features: bool, seed: int = 0) -> RunFolder:
    """Write a run whose predictions are sure of the true class, with a tenth of wrong labels."""
    rng = np.random.default_rng(seed)
    run = RunFolder.create(folder, overwrite=True)
    names = [f"class {i:04d}" for i in range(classes)]
    truth = rng.integers(0, classes, samples)
    shift = rng.integers(1, classes, samples) * (rng.random(samples) < WRONG)
    labels = ((truth + shift) % classes).astype(np.int32)
    splits = np.where(rng.random(samples) < 0.1, 1, 0).astype(np.int8)
    paths = StringTable([f"{i // 1000:04d}/{i:08d}.jpg" for i in range(samples)])
    manifest = Manifest(folder / "images", paths, labels, splits, tuple(names))
    table = np.empty((samples, classes), dtype=np.float32)
    for start in range(0, samples, CHUNK):
        part = table[start : start + CHUNK]
        rng.standard_exponential(out=part, dtype=np.float32)
        part *= 1 / classes
        rows = np.arange(len(part))
        part[rows, truth[start : start + CHUNK]] += rng.uniform(0.2, 4, len(part))
        part *= EPOCHS / part.sum(axis=1, keepdims=True)
    record = {
        "prob_sum": torch.from_numpy(table),
        "visits": torch.full((samples,), EPOCHS, dtype=torch.int32),
    }
    state = {"record": record, "unreadable": []}
    save_checkpoint(run.checkpoint_folder, EPOCHS, take_snapshot(state))
    if features:
        made_up = Features.empty(samples)
        centres = rng.standard_normal((classes, made_up.vectors.shape[1]), dtype=np.float32)
        for start in range(0, samples, CHUNK):
            part = made_up.vectors[start : start + CHUNK]
            noise = rng.standard_normal(part.shape, dtype=np.float32)
            part[:] = 0.05 * (centres[truth[start : start + CHUNK]] + noise)
        made_up.thumbnails[:] = rng.integers(0, 256, made_up.thumbnails.shape, dtype=np.uint8)
        made_up.save(run.features_file)
    settings = TrainConfig(data=folder / "images", epochs=EPOCHS).to_dict()
    content = {"elr": elrcli.__version__, "settings": settings, "data_root": str(manifest.root)}
    write_text(run.classes_file, json_text({"classes": names}))
    write_text(run.manifest_file, manifest_text(manifest))
    write_text(run.config_file, json_text(content))
    return run


def main() -> None:
    """Write the run, audit it, print what it took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--classes", type=int, default=1_000)
    parser.add_argument("--folder", type=Path, default=Path("scale-run"))
    parser.add_argument("--features", action="store_true", help="with features and thumbnails")
    parser.add_argument("--keep", action="store_true", help="leave the run folder there")
    args = parser.parse_args()
    run = write_run(args.folder, args.samples, args.classes, args.features)
    command = [sys.executable, "-m", "elrcli", "audit", str(run.path), "--json", "--quiet"]
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        raise SystemExit(f"the audit failed with status {os.waitstatus_to_exitcode(status)}")
    summary = json.loads(printed)
    figures = {
        "samples": args.samples,
        "classes": args.classes,
        "features": args.features,
        "seconds": round(time.monotonic() - started, 1),
        "peak_gb": round(usage.ru_maxrss / 1024**2, 2),
        "table_gb": round(args.samples * args.classes * 4 / 1024**3, 2),
        "estimated_error_rate": summary["estimated_error_rate"],
    }
    print(json.dumps(figures))
    if not args.keep:
        shutil.rmtree(run.path)


if __name__ == "__main__":
    main()
