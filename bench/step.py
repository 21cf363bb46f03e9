"""What ELR adds to a training step, over cross-entropy and over the published formula.

python bench/step.py --out bench/results/step

Times whole steps (forward, loss, backward, SGD) of a network and the loss alone (forward,
backward to the logits, targets), in rounds that take turns, and prints ratios of the medians of a
round. Without a GPU: ResNet-18 at 64 pixels, batches of 64; with one: ResNet-50 at 224.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from torch import Tensor
from torch.nn import functional

from elrcli import ELRLoss

SAMPLES = 10_000
BATCH = 64
LAM, BETA = 3.0, 0.7
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # logits [B, K], labels [B], index [B]


def published(classes: int, device: torch.device) -> Loss:
    """Return equations 6 and 9 of the paper, line by line."""
    table = torch.zeros(SAMPLES, classes, device=device)

    def loss(logits: Tensor, labels: Tensor, index: Tensor) -> Tensor:
        p = logits.float().softmax(dim=1).clamp(1e-4, 1 - 1e-4)
        seen = p.detach()
        table[index] = BETA * table[index] + (1 - BETA) * seen / seen.sum(dim=1, keepdim=True)
        overlap = (table[index] * p).sum(dim=1)
        return functional.cross_entropy(logits.float(), labels) + LAM * (1 - overlap).log().mean()

    return loss


def losses(classes: int, device: torch.device) -> dict[str, Loss]:
    """Return the three losses by name."""
    return {
        "cross-entropy": lambda logits, labels, index: functional.cross_entropy(
            logits.float(), labels
        ),
        "elr": ELRLoss(SAMPLES, classes, lam=LAM, beta=BETA).to(device),
        "published": published(classes, device),
    }


def seconds(work: Callable[[], object], times: int, device: torch.device) -> float:
    """Return the time of one call, as the mean of `times`; CPU time where the CPU works."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = clock()
    for _ in range(times):
        work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (clock() - started) / times


def rounds_of(
    works: dict[str, Callable[[], object]], rounds: int, times: int, device: torch.device
) -> list[dict[str, float]]:
    """Return the times of every round; the works take turns, the first round is left out."""
    timed = [
        {name: seconds(work, times, device) for name, work in works.items()}
        for _ in range(rounds + 1)
    ]
    return timed[1:]


def measure(classes: int, args: argparse.Namespace, device: torch.device) -> dict[str, object]:
    """Return ratios for one number of classes."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, (BATCH,), generator=generator).to(device)
    logits = torch.randn(BATCH, classes, generator=generator).to(device).requires_grad_()
    images = torch.randn(BATCH, 3, args.image_size, args.image_size, generator=generator)
    images = images.to(device).to(memory_format=torch.channels_last)

    def index() -> Tensor:
        return torch.randperm(SAMPLES, device=device)[:BATCH]

    def alone(loss: Loss) -> Callable[[], object]:
        def work() -> None:
            logits.grad = None
            loss(logits, labels, index()).backward()

        return work

    def step(loss: Loss) -> Callable[[], object]:
        torch.manual_seed(0)
        network = timm.create_model(args.network, num_classes=classes).to(device)
        network = network.to(memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, fused=True)

        def work() -> None:
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                output = network(images)
            loss(output, labels, index()).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return work

    alone_rounds = rounds_of(
        {name: alone(loss) for name, loss in losses(classes, device).items()},
        args.rounds,
        20,
        device,
    )
    step_rounds = rounds_of(
        {name: step(loss) for name, loss in losses(classes, device).items()},
        args.rounds,
        10 if device.type == "cuda" else 1,
        device,
    )

    def ratio(rounds: list[dict[str, float]], first: str, second: str) -> float:
        return statistics.median(r[first] / r[second] for r in rounds)

    loss_ms = {
        name: 1000 * statistics.median(r[name] for r in alone_rounds) for name in alone_rounds[0]
    }
    step_ms = 1000 * statistics.median(r["cross-entropy"] for r in step_rounds)
    return {
        "classes": classes,
        "loss: elr / cross-entropy": round(ratio(alone_rounds, "elr", "cross-entropy"), 2),
        "loss: elr / published": round(ratio(alone_rounds, "elr", "published"), 2),
        "step: elr / cross-entropy": round(ratio(step_rounds, "elr", "cross-entropy"), 3),
        "step: elr / published": round(ratio(step_rounds, "elr", "published"), 3),
        # The difference of two whole steps drowns in noise; that of the losses does not.
        "loss's share of a step": round((loss_ms["elr"] - loss_ms["cross-entropy"]) / step_ms, 4),
        "loss_ms": {name: round(value, 3) for name, value in loss_ms.items()},
        "step_ms": round(step_ms, 1),
    }


def main() -> None:
    """Measure, print, and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--classes", default="10,1000,21000")
    parser.add_argument("--network", help="default: resnet50 on a GPU, resnet18 on a CPU")
    parser.add_argument("--image-size", type=int, help="default: 224 on a GPU, 64 on a CPU")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, help="folder for the figures as JSON")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    is_gpu = device.type == "cuda"
    args.network = args.network or ("resnet50" if is_gpu else "resnet18")
    args.image_size = args.image_size or (224 if is_gpu else 64)
    torch.set_num_threads(1)
    for classes in map(int, args.classes.split(",")):
        figures = {
            "device": torch.cuda.get_device_name() if is_gpu else "cpu, 1 thread",
            "network": args.network,
            "image_size": args.image_size,
            "batch_size": BATCH,
            "torch": torch.__version__,
            **measure(classes, args, device),
        }
        print(json.dumps(figures, indent=1), flush=True)
        if args.out is not None:
            args.out.mkdir(parents=True, exist_ok=True)
            (args.out / f"{device.type}-{classes}.json").write_text(
                json.dumps(figures, indent=1) + "\n"
            )


if __name__ == "__main__":
    main()
