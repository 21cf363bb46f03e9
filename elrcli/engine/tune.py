"""A short search over learning rate, lambda and beta, one after the other.

Short runs choose the learning rate. What lambda and beta do shows only once a network begins to
memorise: their runs take what is left of a quarter of the cost of the whole grid. Another beta is
tried with the lambda that makes up for it, because it weakens the early targets. The criterion is
the share of validation images whose given label is predicted, at the end of a run. Every run has
the whole learning-rate schedule, squeezed into its epochs, and the same validation rows: more than
the training itself would hold out, where they are few.
"""

from __future__ import annotations

import hashlib
import json
import math
import shlex
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from elrcli.config import MACHINE_SETTINGS, TrainConfig, plain_name
from elrcli.data.manifest import Manifest, draw_validation, manifest_text
from elrcli.data.samples import listed_samples
from elrcli.engine.automatic import automatic_lr
from elrcli.engine.checkpoints import has_checkpoint, load_checkpoint
from elrcli.engine.distributed import current_group, joined
from elrcli.engine.fit import fit, resume
from elrcli.engine.interrupts import interrupted_at_once
from elrcli.engine.metrics import Diverged
from elrcli.engine.observer import Observer
from elrcli.errors import (
    SAME_COMMAND,
    ConfigError,
    DataError,
    Interrupted,
    RunError,
    TrainingError,
)
from elrcli.files import csv_text, json_text, read_json_object, write_text
from elrcli.models import has_batch_norm, network_of
from elrcli.run import LOCK, RunFolder, locked_folder, new_path

LAMBDAS, BETAS = (1.0, 3.0, 7.0), (0.7, 0.9)
LR_FACTORS = (0.3, 1.0, 3.0)  # times the automatic learning rate
COST = 1 / 4  # of what the whole grid would take
SHORT, LONG = 1 / 8, 1 / 2  # of the epochs: the runs for the rate, and the least for the others
ENOUGH, LARGEST_SHARE = 500, 0.3  # validation images, and the most that are taken of few
MIN_EPOCHS = 2  # one epoch has no targets to speak of
HIT, MISS, UNREADABLE = "1", "0", "-"  # marks of validation images in a file of a run


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

    def with_betas(self, betas: Sequence[float], lambdas: Sequence[float]) -> list[Candidate]:
        """Return this one with each of `betas` and that of `lambdas` which makes up for it.

        The targets of the first epochs grow with `1 - beta`, so `lam * (1 - beta)` is kept.
        """

        def lam_for(beta: float) -> float:
            even = self.lam * (1 - self.beta) / (1 - beta)
            return min(lambdas, key=lambda lam: abs(math.log((1 + lam) / (1 + even))))

        return [Candidate(lam_for(beta), beta, self.lr) for beta in betas]


class Trial(NamedTuple):
    """One run of the search."""

    candidate: Candidate
    epochs: int
    agreement: float | None  # share of validation labels predicted; None where training failed


class Choice(NamedTuple):
    """What one step of the search takes, and from what."""

    pick: Candidate
    best: Candidate
    within: int  # candidates that are not told apart from the best, that one among them
    compared: int


class Step(NamedTuple):
    """A part of the search that chooses some of the settings."""

    names: tuple[str, ...]  # fields of Candidate
    epochs: int
    errors: float  # standard errors below the best at which a candidate is as good
    candidates_at: Callable[[Candidate], list[Candidate]]


@dataclass(frozen=True)
class TuneResult:
    """The outcome of a search."""

    folder: Path
    config: TrainConfig  # the whole training with the pick
    pick: Candidate
    choices: dict[tuple[str, ...], Choice]  # by fields of Candidate, in the order of the search
    trials: list[Trial]  # in the order of training
    val_images: int
    cost: float  # epochs trained, as a share of the whole grid's

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the config as plain values for JSON."""
        return {
            "folder": str(self.folder),
            "pick": _plain(self.pick, Candidate._fields),
            "steps": [
                {
                    "pick": _plain(choice.pick, names),
                    "best": _plain(choice.best, names),
                    "within": choice.within,
                    "compared": choice.compared,
                }
                for names, choice in self.choices.items()
            ],
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
    overwrite: bool = False,
    observer: Observer | None = None,
) -> TuneResult:
    """Search learning rate, beta and lambda for the training that `config` describes.

    `lrs` defaults to LR_FACTORS times the automatic rate, `out` to `runs/<data>-tune-<time>`; a
    search that is there already goes on. Processes started by torchrun search together. Raises
    ConfigError, DataError, RunError or TrainingError; Interrupted after a signal, with the trial
    saved.
    """
    observer = observer or Observer()
    if not config.has_elr_term:
        raise ConfigError(f"--method {config.method}: has no lambda and no beta to search.")
    automatic = _automatic_lr(config)
    default = Candidate(TrainConfig.lam, TrainConfig.beta, automatic)
    if lrs is None:
        lrs = [float(f"{factor * automatic:.3g}") for factor in LR_FACTORS]
    grid = _grid(config, lambdas, betas, lrs)
    with ExitStack() as held:
        search = _Search.begun(config, grid, out, overwrite, observer, held)
        with interrupted_at_once(search.command):  # between two trials
            return _run(search, config, grid, default)


def _run(
    search: _Search,
    config: TrainConfig,
    grid: Mapping[str, Sequence[float]],
    default: Candidate,
) -> TuneResult:
    """Take the steps of a search for `config`, each from the pick of the one before."""
    sizes = {name: len(values) for name, values in grid.items()}
    short, long, planned = plan_epochs(sizes, config.epochs)
    whole = f"{planned / config.epochs:.1f} whole trainings"
    search.observer.note(f"{search.folder}: {planned} epochs at most, like {whole}")
    pick = Candidate(**{name: _nearest(name, grid[name], default) for name in grid})
    choices: dict[tuple[str, ...], Choice] = {}
    for step in _steps(grid, short, long):
        candidates = step.candidates_at(pick)
        if len(candidates) > 1:
            hits = search.compare(candidates, step)
            choices[step.names] = choose(hits, default, step.errors)
            pick = choices[step.names].pick
    return TuneResult(
        folder=search.folder,
        config=config.replace(**pick._asdict()),
        pick=pick,
        choices=choices,
        trials=search.done,
        val_images=len(search.manifest.rows("val")),
        cost=sum(trial.epochs for trial in search.done) / config.epochs / math.prod(sizes.values()),
    )


def search_fraction(fraction: float, images: int) -> float:
    """Return the share of `images` that a search compares by, at least `fraction`.

    The search trains only to compare, and few noisy labels cannot: it holds out ENOUGH of the
    images, or LARGEST_SHARE of them where that is less. A fraction of 0 stays.
    """
    if fraction == 0.0 or images == 0:
        return fraction
    return max(fraction, min(LARGEST_SHARE, ENOUGH / images))


def plan_epochs(sizes: Mapping[str, int], epochs: int) -> tuple[int, int, int]:
    """Return the epochs of a run for the rate, of one for lambda or beta, and of all runs.

    `sizes` are the numbers of values of `lr`, `lam` and `beta`, `epochs` the length of the training
    that the search is for. The long runs share what the short ones leave of COST, but have at
    least LONG.
    """
    short_runs = sizes["lr"] if sizes["lr"] > 1 else 0
    long_runs = sizes["lam"] + sizes["beta"] - 1  # the second comparison has one run already
    if sizes["lam"] == sizes["beta"] == 1:
        long_runs = 0
    short = min(epochs, max(MIN_EPOCHS, round(SHORT * epochs)))
    left = COST * epochs * math.prod(sizes.values()) - short_runs * short
    share = int(left / max(long_runs, 1))
    long = min(epochs, max(MIN_EPOCHS, round(LONG * epochs), share))
    planned = short_runs * short + long_runs * long
    return short, long, planned


def choose(hits: Mapping[Candidate, np.ndarray], default: Candidate, errors: float = 1.0) -> Choice:
    """Return the candidate nearest to `default` within so many standard errors of the best.

    `hits` tell which of the V validation labels each predicts, bool [V]. Two candidates differ
    only where one is right and the other wrong: on g images for the best and l for the other, and
    if both were equally good, g - l would have the standard error sqrt(g + l) (McNemar 1947).
    """
    best = max(hits, key=lambda each: (hits[each].mean(), -each.distance(default)))
    within = []
    for candidate, predicted in hits.items():
        gained = int((hits[best] & ~predicted).sum())
        lost = int((predicted & ~hits[best]).sum())
        if gained - lost <= errors * math.sqrt(gained + lost):
            within.append(candidate)
    pick = min(within, key=lambda each: (each.distance(default), -hits[each].mean()))
    return Choice(pick, best, len(within), len(hits))


def shortened(config: TrainConfig, epochs: int) -> TrainConfig:
    """Return `config` with its schedule squeezed into `epochs`."""
    share = epochs / config.epochs
    if config.schedule == "restarts":
        config = config.replace(restart_epochs=max(0.1, config.restart_epochs * share))
    return config.replace(
        epochs=epochs,
        warmup=config.warmup * share,
        milestones=tuple(m if m < 1 else max(1.0, m * share) for m in config.milestones),
        lam_ramp=round(config.lam_ramp * share),
        ema_ramp=round(config.ema_ramp * share),
    )


def _grid(
    config: TrainConfig, lambdas: Sequence[float], betas: Sequence[float], lrs: Sequence[float]
) -> dict[str, list[float]]:
    """Return the values by field of Candidate in the order of the search, each checked."""
    grid = {
        name: [getattr(config.replace(**{name: value}), name) for value in dict.fromkeys(values)]
        for name, values in (("lr", lrs), ("lam", lambdas), ("beta", betas))
    }
    if all(len(values) == 1 for values in grid.values()):
        raise ConfigError("one setting is no choice. Name several --lambdas, --betas or --lrs.")
    return grid


def _steps(grid: Mapping[str, Sequence[float]], short: int, long: int) -> tuple[Step, ...]:
    return (
        Step(("lr",), short, 1.0, lambda at: [at._replace(lr=lr) for lr in grid["lr"]]),
        Step(("lam",), long, 1.0, lambda at: [at._replace(lam=lam) for lam in grid["lam"]]),
        # These are alike in strength: none is the safe one.
        Step(("lam", "beta"), long, 0.0, lambda at: at.with_betas(grid["beta"], grid["lam"])),
    )


def _nearest(name: str, values: Sequence[float], default: Candidate) -> float:
    return min(values, key=lambda value: default.distance(default._replace(**{name: value})))


def _automatic_lr(config: TrainConfig) -> float:
    return automatic_lr(config.optimizer, has_batch_norm(network_of(config, 2)))


def _description(
    config: TrainConfig, grid: Mapping[str, Sequence[float]], manifest: Manifest
) -> dict[str, Any]:
    """Return what must be equal for a search to go on."""
    left_out = (*Candidate._fields, *MACHINE_SETTINGS)
    settings = {name: v for name, v in config.to_dict().items() if name not in left_out}
    samples = f"{manifest.root}\n{manifest_text(manifest)}"
    return {
        "settings": settings | {"data": str(config.data.absolute())},
        "grid": dict(grid),
        "samples": hashlib.sha256(samples.encode("utf-8", "surrogateescape")).hexdigest(),
    }


def _claim(
    folder: Path, description: Mapping[str, Any], held: ExitStack, *, overwrite: bool
) -> None:
    """Make the folder of a search, or take up the one that is there; locked while `held`."""
    file = folder / "tune.json"
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder}: is a file. Choose another --out.")
    held.enter_context(locked_folder(folder))
    torn = f".{file.name}."  # what a process leaves that was killed while it wrote
    if any(path.name != LOCK and not path.name.startswith(torn) for path in folder.iterdir()):
        try:
            found = read_json_object(file) if file.is_file() else {}
        except ConfigError as error:
            raise RunError(str(error)) from None
        if not found.keys() >= description.keys():
            raise RunError(f"{folder}: not empty and not a search. Choose another --out.")
        if not overwrite:
            _check_same(folder, found, description)
            return
        shutil.rmtree(folder / "trials", ignore_errors=True)
    write_text(file, json_text(description))


def _check_same(folder: Path, found: Mapping[str, Any], description: Mapping[str, Any]) -> None:
    for part, text in (
        ("settings", "has other settings"),
        ("grid", "has another grid"),
        ("samples", "was made on other data, or the data has changed"),
    ):
        if found[part] != json.loads(json.dumps(description[part])):
            raise RunError(f"{folder}: {text}. Add --overwrite, or choose another --out.")


@dataclass(frozen=True)
class _Search:
    """What all runs of a search have in common, and those that are done."""

    config: TrainConfig  # of the runs, but for epochs and candidate
    manifest: Manifest
    folder: Path
    command: str  # goes on with it, in words: who typed the first one knows it
    observer: Observer
    done: list[Trial] = field(default_factory=list)

    @classmethod
    def begun(
        cls,
        config: TrainConfig,
        grid: Mapping[str, Sequence[float]],
        out: Path | None,
        overwrite: bool,
        observer: Observer,
        held: ExitStack,
    ) -> _Search:
        """Draw the validation rows, and make the folder or take up the search in it.

        No other search works in the folder until `held` is closed.
        """
        samples = listed_samples(config)
        if not samples.has_val:
            fraction = search_fraction(config.val_fraction, len(samples.rows("train")))
            config = config.replace(val_fraction=fraction)
        manifest = draw_validation(samples, config.val_fraction, config.seed)
        if len(manifest.rows("val")) == 0:
            raise DataError(
                f"{config.data}: no validation images to compare by. Raise --val-fraction."
            )
        group = current_group()
        folder = out or group.from_first(lambda: new_path(config.data, "tune"))
        description = _description(config, grid, manifest)
        group.from_first(lambda: _claim(folder, description, held, overwrite=overwrite))
        place = "" if out is not None else f" --out {shlex.quote(str(folder))}"
        return cls(config, manifest, folder, f"{SAME_COMMAND}{place}", observer)

    def compare(self, candidates: Sequence[Candidate], step: Step) -> dict[Candidate, np.ndarray]:
        """Train the candidates of a step and return which validation labels each predicts.

        bool [V], over the images that all of them could read; without those that failed to train.
        """
        marks: dict[Candidate, np.ndarray] = {}
        for number, candidate in enumerate(candidates, 1):
            title = f"{plain_name(step.names[-1])} {number} of {len(candidates)}"
            found = self._train(candidate, step.epochs, title)
            trial = Trial(candidate, step.epochs, None)
            if found is not None:
                marks[candidate] = found
                trial = trial._replace(agreement=_agreement(found))
            if trial not in self.done:  # what has been picked is compared again
                self.done.append(trial)
            if current_group().is_first:
                write_text(self.folder / "trials.csv", _table(self.done))
        if not marks:
            raise TrainingError(f"{self.folder}: no run could be trained. Lower --lrs.")
        readable = np.all([each != UNREADABLE for each in marks.values()], axis=0)
        return {candidate: each[readable] == HIT for candidate, each in marks.items()}

    def _train(self, candidate: Candidate, epochs: int, title: str) -> np.ndarray | None:
        """Train one candidate, go on where it stopped, or read what it reached.

        Returns a mark per validation label, str [V] of HIT, MISS and UNREADABLE, or None where
        training failed.
        """
        name = f"{epochs}-epochs-{candidate}".replace(", ", "-").replace(" ", "-")
        run = RunFolder(self.folder / "trials" / name)
        reached = run.path / "validation.txt"
        group = current_group()
        if not group.from_first(reached.is_file):
            watcher = _TrialObserver(self.observer, title)
            try:
                if group.from_first(lambda: _can_go_on(run, self.config.device)):
                    resume(run.path, observer=watcher, for_audit=False)
                else:
                    group.from_first(lambda: shutil.rmtree(run.path, ignore_errors=True))
                    settings = shortened(self.config, epochs).replace(**candidate._asdict())
                    fit(
                        settings,
                        run.path,
                        samples=self.manifest,
                        observer=watcher,
                        for_audit=False,
                    )
            except Interrupted as error:
                raise Interrupted(error.signal_number, self.command) from None
            except Diverged as error:
                if group.processes > 1:  # the others may not know of it
                    raise
                self.observer.note(f"{candidate}: {error}")
                return None
            group.from_first(lambda: write_text(reached, _marks_text(run, self.manifest)))
        group.from_first(run.remove_state)
        text = group.from_first(lambda: reached.read_text(encoding="utf-8")).strip()
        marks = np.array(list(text))
        if (marks == UNREADABLE).all():
            raise DataError(f"{self.config.data}: no validation image can be read.")
        self.observer.note(f"{title}: {candidate}, {epochs} epochs: {_agreement(marks):.1%}")
        return marks


def _agreement(marks: np.ndarray) -> float:
    """Return the share of readable validation images whose label is predicted."""
    return float((marks[marks != UNREADABLE] == HIT).mean())


def _can_go_on(run: RunFolder, device: str) -> bool:
    """Tell whether there is a checkpoint of a run on `device`: the search may have moved."""
    if not run.is_run() or not has_checkpoint(run.checkpoint_folder):
        return False
    return run.train_config().device == device


def _marks_text(run: RunFolder, manifest: Manifest) -> str:
    """Return one mark per validation image: HIT where it is predicted as labelled."""
    rows = manifest.rows("val")
    predicted = load_checkpoint(run.checkpoint_folder)["record"]["prediction"].numpy()[rows]
    labels = manifest.labels[rows]
    marks = np.where(predicted < 0, UNREADABLE, np.where(predicted == labels, HIT, MISS))
    return "".join(marks) + "\n"


@dataclass(frozen=True)
class _TrialObserver(Observer):
    """Passes the progress of one run on, under its number."""

    observer: Observer
    title: str

    def progress(self, stage: str, done: int, total: int | None) -> None:
        self.observer.progress(f"{self.title}, {stage}", done, total)


def _row(trial: Trial) -> dict[str, Any]:
    return _plain(trial.candidate, Candidate._fields) | {
        "epochs": trial.epochs,
        "val_agreement": trial.agreement,
    }


def _plain(candidate: Candidate, names: Sequence[str]) -> dict[str, float]:
    return {plain_name(name): getattr(candidate, name) for name in names}


def _table(trials: Sequence[Trial]) -> str:
    columns = ("lambda", "beta", "lr", "epochs", "val_agreement")
    return csv_text([_row(trial) for trial in trials], columns)
