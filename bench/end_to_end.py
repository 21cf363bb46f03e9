"""`elr train` beside other ways of training: the whole process, from the command to its end.

    python bench/end_to_end.py --out bench/results/end_to_end
    python bench/end_to_end.py --peer ultralytics --out bench/results/end_to_end

Both train the same network on the same photo-like JPEGs with the same crops, batch size, epochs,
optimiser, precision and workers, validate after every epoch and save the state. timm's side is
its own parts in the order of its training script: dataset, loader with prefetcher, network,
optimiser, scheduler, saver. Ultralytics has a trainer of its own for `classify train`, and a head
of its own on torchvision's ResNet-18, with 6% more parameters. Processes take turns; what is
printed are ratios of paired rounds. The first step is told by the time when the first batch of
training is through.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

EPOCHS, BATCH, RATE, DECAY = 3, 32, 0.001, 0.05
# width, height, JPEG quality, images
FILES = {"500x375": (500, 375, 90, 600), "2048x1536": (2048, 1536, 85, 200)}
BACKBONES = {"resnet18": 96, "resnet50": 224, "test_resnet": 96}  # side of the input


def train_elr(folder: Path, out: Path, backbone: str, args: argparse.Namespace) -> None:
    """Train through the public function that the command calls."""
    import elrcli

    class FirstStep(elrcli.Observer):
        def progress(self, stage: str, done: int, total: int | None) -> None:
            if done > 0:
                tell_first_step()

    elrcli.train(
        folder,
        out=out,
        for_audit=False,
        observer=FirstStep(),
        backbone=backbone,
        pretrained=False,
        image_size=BACKBONES[backbone],
        epochs=EPOCHS,
        batch_size=BATCH,
        lr=RATE,
        weight_decay=DECAY,
        augment="standard",
        workers=args.workers,
        device=args.device,
        precision=args.precision,
    )


def train_timm(folder: Path, out: Path, backbone: str, args: argparse.Namespace) -> None:
    """Train with timm's parts: cross-entropy, channels_last, AdamW, cosine."""
    import timm
    import torch
    from timm.data import create_dataset, create_loader
    from timm.optim import create_optimizer_v2
    from timm.scheduler import CosineLRScheduler
    from timm.utils import AverageMeter, CheckpointSaver, accuracy

    from elrcli.data.transforms import AREAS, RATIOS

    device, size = torch.device(args.device), BACKBONES[backbone]
    torch.manual_seed(0)
    network = timm.create_model(backbone, num_classes=2)
    network.to(device).to(memory_format=torch.channels_last)
    config = timm.data.resolve_data_config({"input_size": (3, size, size)}, model=network)
    common = {
        "input_size": config["input_size"],
        "batch_size": BATCH,
        "interpolation": "bilinear",
        "mean": config["mean"],
        "std": config["std"],
        "num_workers": args.workers,
        "persistent_workers": args.workers > 0,
        "pin_memory": device.type == "cuda",
        "device": device,
    }
    train = create_loader(
        create_dataset("", str(folder / "train")),
        is_training=True,
        scale=AREAS,
        ratio=RATIOS,
        hflip=0.5,
        color_jitter=None,  # type: ignore[arg-type] # for none, says its code
        **common,
    )
    val = create_loader(create_dataset("", str(folder / "val")), is_training=False, **common)
    optimizer = create_optimizer_v2(network, opt="adamw", lr=RATE, weight_decay=DECAY)
    scheduler = CosineLRScheduler(optimizer, t_initial=EPOCHS, lr_min=RATE / 100)
    out.mkdir(parents=True)
    saver = CheckpointSaver(network, optimizer, checkpoint_dir=str(out), max_history=1)
    criterion = torch.nn.CrossEntropyLoss().to(device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16")
    for epoch in range(EPOCHS):
        network.train()
        losses, right = AverageMeter(), AverageMeter()
        for number, (images, labels) in enumerate(train):
            images = images.contiguous(memory_format=torch.channels_last)
            with autocast:
                loss = criterion(network(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if number % 50 == 0:  # as its script logs
                losses.update(loss.item(), len(images))
            tell_first_step()
        network.eval()
        with torch.no_grad():
            for images, labels in val:
                images = images.contiguous(memory_format=torch.channels_last)
                with autocast:
                    right.update(accuracy(network(images), labels)[0].item(), len(images))
        scheduler.step(epoch + 1)
        saver.save_checkpoint(epoch, metric=right.avg)


def train_ultralytics(folder: Path, out: Path, backbone: str, args: argparse.Namespace) -> None:
    """Train with the trainer of `yolo classify train`, without its random colours and erasing."""
    from ultralytics.models.yolo.classify import ClassificationTrainer

    from elrcli.data.transforms import AREAS

    out.mkdir(parents=True)
    network = out / "network.yaml"  # torchvision's network without its last two layers, a new head
    network.write_text(
        f"nc: 2\nbackbone:\n  - [-1, 1, TorchVision, [512, {backbone}, null, true, 2]]\n"
        "head:\n  - [-1, 1, Classify, [nc]]\n"
    )
    settings = {
        "model": str(network),
        "data": str(folder),
        "project": str(out),
        "pretrained": False,
        "imgsz": BACKBONES[backbone],
        "epochs": EPOCHS,
        "batch": BATCH,
        "optimizer": "AdamW",
        "lr0": RATE,
        "weight_decay": DECAY,
        "cos_lr": True,
        "warmup_epochs": 0,
        "scale": 1 - AREAS[0],
        "auto_augment": None,
        "erasing": 0.0,
        **dict.fromkeys(("hsv_h", "hsv_s", "hsv_v"), 0.0),
        "workers": args.workers,
        "device": args.device,
        "amp": args.precision != "fp32",
        "plots": False,
        "verbose": False,
    }
    trainer = ClassificationTrainer(overrides=settings)
    trainer.add_callback("on_train_batch_end", lambda trainer: tell_first_step())
    trainer.train()


TRAIN = {"elr": train_elr, "timm": train_timm, "ultralytics": train_ultralytics}
STARTED = "seconds to the first step:"


def tell_first_step() -> None:
    """Print once how many seconds after the start of this process a step was through."""
    started = os.environ.pop("ELR_BENCH_STARTED", None)
    if started is not None:
        print(STARTED, time.time() - float(started), flush=True)


def run(side: str, folder: Path, out: Path, backbone: str, args: argparse.Namespace) -> list[float]:
    """Return the seconds of a whole process and those to its first step."""
    shutil.rmtree(out, ignore_errors=True)
    words = [side, folder, out, backbone, args.workers, args.device, args.precision]
    started = time.time()
    done = subprocess.run(
        [sys.executable, __file__, "--side", *map(str, words)],
        env=os.environ
        | {"ELR_BENCH_STARTED": str(started), "OMP_WAIT_POLICY": "PASSIVE", "YOLO_OFFLINE": "true"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    ended = time.time()
    return [ended - started, float(done.stdout.partition(STARTED)[2].split()[0])]


def measure(files: str, backbone: str, args: argparse.Namespace) -> dict[str, object]:
    """Return ratios of whole times, starts, and of the time between, elr over its peer."""
    from loader import write_photos

    width, height, quality, count = FILES[files]
    count = args.images or count
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made) / "photos"
        for split, share in (("train", 0.8), ("val", 0.2)):
            (folder / split).mkdir(parents=True)
            write_photos(folder / split, width, height, quality, round(share * count))
        rounds = []
        for number in range(args.rounds + 1):
            turns = ["elr", args.peer] if number % 2 else [args.peer, "elr"]
            times = {s: run(s, folder, Path(made) / s, backbone, args) for s in turns}
            if number > 0:  # the first one warms the disk cache
                rounds.append(times)

    sides = ["elr", args.peer]

    def ratio(part: int | None) -> list[float]:
        seconds = [
            [times[s][part] if part is not None else times[s][0] - times[s][1] for s in sides]
            for times in rounds
        ]
        return [round(ours / theirs, 3) for ours, theirs in seconds]

    found = {"whole": ratio(0), "to the first step": ratio(1), "after it": ratio(None)}
    return {
        "files": files,
        "backbone": backbone,
        "peer": args.peer,
        "images": count,
        "epochs": EPOCHS,
        "ratios": {name: statistics.median(values) for name, values in found.items()},
        "rounds": found,
        "device": args.device,
        "machine": platform.machine(),
        "versions": {name: version(name) for name in ("torch", args.peer, "pillow")},
    }


def main() -> None:
    """Measure, print, and write JSON if asked."""
    if sys.argv[1:2] == ["--side"]:
        side, folder, out, backbone, workers, device, precision = sys.argv[2:]
        args = argparse.Namespace(workers=int(workers), device=device, precision=precision)
        TRAIN[side](Path(folder), Path(out), backbone, args)
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", default=",".join(FILES))
    parser.add_argument("--images", type=int, help="files; default: some hundred")
    parser.add_argument("--backbones", default="resnet18")
    parser.add_argument("--peer", default="timm", choices=("timm", "ultralytics"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--out", type=Path, help="folder for the figures as JSON")
    args = parser.parse_args()
    for backbone in args.backbones.split(","):
        for files in args.files.split(","):
            figures = measure(files, backbone, args)
            print(json.dumps(figures, indent=1), flush=True)
            if args.out is not None:
                args.out.mkdir(parents=True, exist_ok=True)
                peer = "" if args.peer == "timm" else f"-{args.peer}"
                path = args.out / f"{backbone}-{files}{peer}.json"
                path.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
