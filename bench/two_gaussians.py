"""Early learning and memorisation in a linear model: section 3 of the paper, on two Gaussians.

    python bench/two_gaussians.py --out docs/images/two_gaussians.svg

Points of two classes lie around v and -v in as many dimensions as there are points; 30% of the
labels are flipped. Logistic regression by full-batch gradient descent, with and without the ELR
term, starts from a random direction. Prints the shares that the picture shows.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from elrcli.plots import BLUE, GREEN, GREY, RED, finish, svg

POINTS = DIMENSIONS = 1000
DISTANCE = 3.0  # |v|, in standard deviations of the noise
FLIPPED = 0.3
STEPS, RATE = 5000, 0.01
START = 0.1  # norm of the random direction
BETA = 0.7


def descend(lam: float, seed: int = 0) -> dict[str, np.ndarray]:
    """Return shares [STEPS + 1] of points predicted by their true class, before each step."""
    rng = np.random.default_rng(seed)
    v = rng.normal(size=DIMENSIONS)
    v *= DISTANCE / np.linalg.norm(v)

    def draw() -> tuple[np.ndarray, np.ndarray]:
        truth = rng.choice([-1.0, 1.0], POINTS)
        return truth[:, None] * v + rng.normal(size=(POINTS, DIMENSIONS)), truth

    (x, truth), (fresh, fresh_truth) = draw(), draw()
    wrong = rng.random(POINTS) < FLIPPED
    label = np.where(wrong, -truth, truth)
    w = START * rng.normal(size=DIMENSIONS) / np.sqrt(DIMENSIONS)
    target = np.zeros((POINTS, 2))
    shares: dict[str, list[float]] = {"clean": [], "wrong": [], "fresh": []}
    for _ in range(STEPS + 1):
        logit = x @ w
        right = np.sign(logit) == truth
        shares["clean"].append(right[~wrong].mean())
        shares["wrong"].append(right[wrong].mean())
        shares["fresh"].append((np.sign(fresh @ w) == fresh_truth).mean())
        q = 1 / (1 + np.exp(-np.clip(logit, -50, 50)))  # probability of class +1
        probs = np.stack((1 - q, q), axis=1).clip(1e-4, 1 - 1e-4)
        target = BETA * target + (1 - BETA) * probs
        slope = (target[:, 1] - target[:, 0]) * q * (1 - q)  # of <p, t>, by the logit
        pull = q - (label > 0) - lam * slope / (1 - (probs * target).sum(axis=1))
        w = w - RATE * x.T @ pull / POINTS
    return {name: np.array(values) for name, values in shares.items()}


def panel(axes: Axes, shares: dict[str, np.ndarray], title: str) -> None:
    """Draw one descent over its steps, on a logarithmic axis that begins at 1."""
    steps = np.unique(np.geomspace(1, STEPS + 1, 150).round().astype(int))
    shares = {name: values[steps - 1] for name, values in shares.items()}
    finish(axes, title, percent=True)
    axes.plot(steps, shares["clean"], color=BLUE, label="right labels, predicted right")
    axes.plot(steps, shares["wrong"], color=GREEN, label="wrong labels, predicted right")
    axes.plot(steps, 1 - shares["wrong"], color=RED, label="wrong labels, memorised")
    axes.plot(steps, shares["fresh"], "--", color=GREY, label="new points, predicted right")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_xlabel("step")


def main() -> None:
    """Descend with and without the term, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="SVG file to write")
    args = parser.parse_args()
    figure = Figure(figsize=(10.0, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    print("| | wrong labels predicted right, at best | at the end | new points | at the end |")
    print("|---|---|---|---|---|")
    for axes, title, lam in ((left, "Cross-entropy", 0.0), (right, "ELR, λ = 3, β = 0.7", 3.0)):
        shares = descend(lam)
        panel(axes, shares, title)
        cells = [
            f"{s[i]:.1%}" for s in (shares["wrong"], shares["fresh"]) for i in (s.argmax(), -1)
        ]
        print(f"| {title} |", " | ".join(cells), "|")
    figure.legend(
        *left.get_legend_handles_labels(),
        ncols=4,
        loc="outside lower center",
        frameon=False,
        fontsize=9,
    )
    args.out.write_text(svg(figure))


if __name__ == "__main__":
    main()
