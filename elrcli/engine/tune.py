"""A short search over lambda, beta and learning rate.

Short runs choose the learning rate, longer ones lambda and beta at that rate: what these two do
shows only once a network begins to memorise. The criterion is the share of validation images
whose given label is predicted, at the end of a run. Every run has the whole learning-rate
schedule, squeezed into its epochs, and the same validation rows.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from elrcli.config import TrainConfig, read_json_object
from elrcli.data.manifest import Manifest, manifest_text
from elrcli.engine.distributed import current_group, joined
from elrcli.engine.fit import automatic_lr, fit, load_samples, resume
from elrcli.engine.observer import Observer
from elrcli.errors import ConfigError, DataError, Interrupted, RunError, TrainingError
from elrcli.models import create_network, has_batch_norm
from elrcli.run import RunFolder, csv_text, json_text, write_text

LAMBDAS, BETAS = (1.0, 3.0, 7.0), (0.7, 0.9)
LR_FACTORS = (0.3, 1.0, 3.0)  # times the automatic learning rate
COST = 1 / 4  # of what the whole grid would take
SHORT, LONG = 1 / 8, 1 / 3  # of the epochs: the runs for the rate, and the least for the others
MIN_EPOCHS = 2  # one epoch has no targets to speak of
MACHINE_SETTINGS = ("cache", "device", "workers", "compile")  # a search may go on with others


class Candidate(NamedTuple):
    """One setting of the grid."""

    lam: float
    beta: float
    lr: float

    def __str__(self) -> str:
        return f"lambda {self.lam:g}, beta {self.beta:g}, lr {self.lr:g}"

    def distance(self, other: Candidate) -> float:
        """Return how far two settings are apart, in factors: symmetric, 0 for equal ones.

        beta counts by `1 - beta`, the share of the newest prediction; lambda by `1 + lambda`.
        """
        return (
            abs(math.log((1 + self.lam) / (1 + other.lam)))
            + abs(math.log((1 - self.beta) / (1 - other.beta)))
            + abs(math.log(self.lr / other.lr))
        )


class Trial(NamedTuple):
    """One run of the search."""

    candidate: Candidate
    epochs: int
    agreement: float | None  # share of validation labels predicted; None where training failed


class Choice(NamedTuple):
    """What the one-standard-error rule takes, and from what."""

    pick: Candidate
    best: Candidate
    standard_error: float  # of the best one's agreement, as a share
    within: int  # candidates within it, the best one among them


@dataclass(frozen=True)
class TuneResult:
    """The outcome of a search."""

    folder: Path
    config: TrainConfig  # the whole training with the pick
    trials: list[Trial]  # in the order of training, short runs first
    choice: Choice
    val_images: int
    cost: float  # epochs trained, as a share of the whole grid's

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the config as plain values for JSON."""
        return {
            "folder": str(self.folder),
            "pick": _plain(self.choice.pick),
            "best": _plain(self.choice.best),
            "standard_error": self.choice.standard_error,
            "within": self.choice.within,
            "val_images": self.val_images,
            "cost": self.cost,
            "trials": [_row(trial) for trial in self.trials],
        }


@joined()
def tune(
    config: TrainConfig,
    out: Path | None = None,
    *,
    lambdas: Sequence[float] = LAMBDAS,
    betas: Sequence[float] = BETAS,
    lrs: Sequence[float] | None = None,
    trials: int | None = None,
    overwrite: bool = False,
    observer: Observer | None = None,
) -> TuneResult:
    """Search the grid of `lambdas`, `betas` and `lrs` for the training that `config` describes.

    `lrs` defaults to LR_FACTORS times the automatic rate. With more than `trials` pairs of lambda
    and beta, that many are drawn. `out` defaults to `runs/<data>-tune-<time>`; a search that is
    there already goes on. Processes started by torchrun search together. Raises ConfigError,
    DataError, RunError or TrainingError; Interrupted after a signal, with the trial saved.
    """
    observer = observer or Observer()
    if not config.has_elr_term:
        raise ConfigError(f"--method {config.method}: has no lambda and no beta to search.")
    if trials is not None and trials < 1:
        raise ConfigError(f"--trials {trials}: must be at least 1.")
    automatic = _automatic_lr(config)
    default = Candidate(TrainConfig.lam, TrainConfig.beta, automatic)
    if lrs is None:
        lrs = [float(f"{factor * automatic:.3g}") for factor in LR_FACTORS]
    grid = _grid(config, lambdas, betas, lrs)
    rates = list(dict.fromkeys(candidate.lr for candidate in grid))
    pairs = [candidate for candidate in grid if candidate.lr == rates[0]]
    pairs = draw_pairs(pairs, default, trials, config.seed)
    manifest = load_samples(config)
    val_images = len(manifest.rows("val"))
    if val_images == 0:
        raise DataError(f"{config.data}: no validation images to compare by. Raise --val-fraction.")
    group = current_group()
    folder = out or group.from_first(lambda: default_folder(config.data))
    description = _description(config, pairs, rates, manifest)
    group.from_first(lambda: _claim(folder, description, overwrite=overwrite))

    short, long = plan_epochs(len(pairs), len(rates), config.epochs)
    planned = len(pairs) * long + (len(rates) * short if len(rates) > 1 else 0)
    observer.note(
        f"{folder}: {planned} epochs in all, like {planned / config.epochs:.1f} whole trainings"
    )
    done: list[Trial] = []

    def compare(candidates: Sequence[Candidate], epochs: int) -> Choice:
        """Train candidates and choose among those that could be trained."""
        scores = {}
        for number, candidate in enumerate(candidates, 1):
            title = f"{number} of {len(candidates)}"
            trial = _run_trial(config, candidate, epochs, folder, title, observer)
            if trial not in done:  # where all runs are of one length
                done.append(trial)
            if group.is_first:
                write_text(folder / "trials.csv", _table(done))
            if trial.agreement is not None:
                scores[candidate] = trial.agreement
        if not scores:
            raise TrainingError(f"{folder}: no run could be trained. Lower --lrs.")
        return choose(scores, default, val_images)

    rate = rates[0]
    if len(rates) > 1:
        nearest = min(pairs, key=default.distance)
        rate = compare([nearest._replace(lr=lr) for lr in rates], short).pick.lr
    choice = compare([pair._replace(lr=rate) for pair in pairs], long)
    return TuneResult(
        folder=folder,
        config=config.replace(**choice.pick._asdict()),
        trials=done,
        choice=choice,
        val_images=val_images,
        cost=planned / (config.epochs * len(pairs) * len(rates)),
    )


def plan_epochs(pairs: int, rates: int, epochs: int) -> tuple[int, int]:
    """Return how long the runs for the learning rate and those for lambda and beta are.

    The longer runs share what is left of COST, as long as that gives each at least LONG.
    """
    short = min(epochs, max(MIN_EPOCHS, round(SHORT * epochs)))
    share = int((COST * pairs * rates * epochs - rates * short) / pairs)
    return short, min(epochs, max(MIN_EPOCHS, round(LONG * epochs), share))


def choose(scores: Mapping[Candidate, float], default: Candidate, images: int) -> Choice:
    """Return the candidate nearest to `default` within one standard error of the best.

    `scores` are shares of `images` validation labels predicted. The error is the binomial one of
    the best share with two hits and two misses added (Agresti and Coull 1998), so never 0.
    """
    best = max(scores, key=lambda candidate: (scores[candidate], -candidate.distance(default)))
    share = (scores[best] * images + 2) / (images + 4)
    error = math.sqrt(share * (1 - share) / (images + 4))
    within = [candidate for candidate in scores if scores[candidate] >= scores[best] - error]
    pick = min(within, key=lambda candidate: (candidate.distance(default), -scores[candidate]))
    return Choice(pick, best, error, len(within))


def draw_pairs(
    pairs: Sequence[Candidate], default: Candidate, limit: int | None, seed: int
) -> list[Candidate]:
    """Return all pairs, or `limit` of them: the nearest to `default` and a seeded draw."""
    if limit is None or limit >= len(pairs):
        return list(pairs)
    nearest = min(pairs, key=default.distance)
    others = [pair for pair in pairs if pair != nearest]
    drawn = np.random.default_rng(seed).permutation(len(others))[: limit - 1]
    kept = {nearest, *(others[place] for place in drawn)}
    return [pair for pair in pairs if pair in kept]


def shortened(config: TrainConfig, epochs: int) -> TrainConfig:
    """Return `config` with its schedule squeezed into `epochs`."""
    share = epochs / config.epochs
    return config.replace(
        epochs=epochs,
        warmup=config.warmup * share,
        milestones=tuple(m if m < 1 else max(1.0, m * share) for m in config.milestones),
        restart_epochs=max(0.1, config.restart_epochs * share),
        lam_ramp=round(config.lam_ramp * share),
        ema_ramp=round(config.ema_ramp * share),
    )


def default_folder(data: Path) -> Path:
    """Return where a search goes that is not told where."""
    return Path("runs") / f"{data.absolute().stem}-tune-{datetime.now():%Y%m%d-%H%M%S}"


def _grid(
    config: TrainConfig, lambdas: Sequence[float], betas: Sequence[float], lrs: Sequence[float]
) -> list[Candidate]:
    """Return all combinations, each of them a setting that can be trained with."""
    grid = list(dict.fromkeys(Candidate(*each) for each in itertools.product(lambdas, betas, lrs)))
    for candidate in grid:
        config.replace(**candidate._asdict())
    if min(lrs, default=0.0) <= 0:
        raise ConfigError("--lrs: needs learning rates above 0.")
    if len(grid) < 2:
        raise ConfigError("one setting is no choice. Name several --lambdas, --betas or --lrs.")
    return grid


def _automatic_lr(config: TrainConfig) -> float:
    network = create_network(
        config.backbone, 2, small_input=config.small_input, image_size=config.image_size
    )
    return automatic_lr(config.optimizer, has_batch_norm(network))


def _description(
    config: TrainConfig, pairs: Sequence[Candidate], rates: Sequence[float], manifest: Manifest
) -> dict[str, Any]:
    """Return what must be equal for a search to go on."""
    left_out = (*Candidate._fields, *MACHINE_SETTINGS)
    settings = {name: v for name, v in config.to_dict().items() if name not in left_out}
    samples = f"{manifest.root}\n{manifest_text(manifest)}"
    return {
        "settings": settings | {"data": str(config.data.absolute())},
        "grid": {"pairs": [[pair.lam, pair.beta] for pair in pairs], "lrs": list(rates)},
        "samples": hashlib.sha256(samples.encode("utf-8", "surrogateescape")).hexdigest(),
    }


def _claim(folder: Path, description: Mapping[str, Any], *, overwrite: bool) -> None:
    """Make the folder of a search, or take up the one that is there."""
    file = folder / "tune.json"
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder}: is a file. Choose another --out.")
    if folder.is_dir() and any(folder.iterdir()):
        if not file.is_file():
            raise RunError(f"{folder}: not empty and not a search. Choose another --out.")
        if not overwrite:
            _check_same(file, description)
            return
        shutil.rmtree(folder / "trials", ignore_errors=True)
    write_text(file, json_text(description))


def _check_same(file: Path, description: Mapping[str, Any]) -> None:
    try:
        found = read_json_object(file)
    except ConfigError as error:
        raise RunError(str(error)) from None
    for part, text in (
        ("settings", "has other settings"),
        ("grid", "has another grid"),
        ("samples", "was made on other data, or the data has changed"),
    ):
        if found.get(part) != json.loads(json.dumps(description[part])):
            raise RunError(f"{file.parent}: {text}. Add --overwrite, or choose another --out.")


def _run_trial(
    config: TrainConfig,
    candidate: Candidate,
    epochs: int,
    folder: Path,
    title: str,
    observer: Observer,
) -> Trial:
    """Train one candidate, go on where it stopped, or read what it reached."""
    name = f"{epochs}-epochs-{candidate}".replace(", ", "-").replace(" ", "-")
    run = RunFolder(folder / "trials" / name)
    group = current_group()
    metrics = group.from_first(run.metrics)
    if len(metrics) < epochs:
        watcher = _TrialObserver(observer, f"run {title}")
        try:
            if group.from_first(lambda: run.is_run() and run.checkpoint_folder.is_dir()):
                resume(run.path, observer=watcher, for_audit=False)
            else:
                group.from_first(lambda: shutil.rmtree(run.path, ignore_errors=True))
                settings = shortened(config, epochs).replace(**candidate._asdict())
                fit(settings, run.path, observer=watcher, for_audit=False)
        except Interrupted as error:
            stopped = str(error).partition(" Continue with: ")[0]
            message = f"{stopped} Continue with: the same command, --out {folder}"
            raise Interrupted(message, error.exit_code - 128) from None
        except TrainingError as error:
            if group.processes > 1:  # the others may not know of it
                raise
            observer.note(f"{candidate}: {error}")
            return Trial(candidate, epochs, None)
        metrics = group.from_first(run.metrics)
    if group.is_first:
        run.remove_state()
    agreement = metrics[-1]["val_agreement"]
    if agreement is None:
        raise DataError(f"{config.data}: no validation image can be read.")
    observer.note(f"{title}: {candidate}, {epochs} epochs: {agreement:.1%}")
    return Trial(candidate, epochs, agreement)


@dataclass(frozen=True)
class _TrialObserver(Observer):
    """Passes the progress of one run on, under its number."""

    observer: Observer
    title: str

    def progress(self, stage: str, done: int, total: int | None) -> None:
        self.observer.progress(f"{self.title}, {stage}", done, total)


def _row(trial: Trial) -> dict[str, Any]:
    return _plain(trial.candidate) | {"epochs": trial.epochs, "val_agreement": trial.agreement}


def _plain(candidate: Candidate) -> dict[str, float]:
    return {"lambda": candidate.lam, "beta": candidate.beta, "lr": candidate.lr}


def _table(trials: Sequence[Trial]) -> str:
    columns = ("lambda", "beta", "lr", "epochs", "val_agreement")
    return csv_text([_row(trial) for trial in trials], columns)
