"""Every setting of a training run, declared once: default, range, unit, help text and panel.

The command line builds its options from this declaration, `--config` files and keyword
arguments are checked by it, and `config.json` is written from it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from elrcli.errors import ConfigError, did_you_mean
from elrcli.files import small_text

DATA, MODEL, METHOD, OPTIMISATION, INPUT, MACHINE = (
    "Data",
    "Model",
    "Method",
    "Optimisation",
    "Images",
    "Machine",
)

AUTO = "auto"  # of --batch-size: as many images as fit


def setting(
    default: Any,
    help: str,
    panel: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] | None = None,
    short: str | None = None,
    flag: str | None = None,
    auto: str | None = None,
    only: str | None = None,
    word: str | None = None,
) -> Any:
    """Declare one setting.

    `low` and `high` are inclusive bounds; `auto` says what None stands for; `only` names the one
    method that uses the setting; `word` may stand in place of a number.
    """
    return field(
        default=default,
        metadata={
            "help": help,
            "panel": panel,
            "low": low,
            "high": high,
            "choices": choices,
            "short": short,
            "flag": flag,
            "auto": auto,
            "only": only,
            "word": word,
        },
    )


@dataclass(frozen=True)
class Reading:
    """How a folder or a CSV file of labelled images is read; also settings of `elr train`."""

    root: Path | None = None
    path_column: str = "path"
    label_column: str = "label"
    split_column: str | None = "split"  # None: no splits are read
    follow_links: bool = False


# They belong to the machine: a run or a search may go on with others.
MACHINE_SETTINGS = ("cache", "device", "workers", "compile", "checkpoint_minutes", "table_device")
READING_SETTINGS = tuple(field.name for field in dataclasses.fields(Reading))


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """All settings of `elr train`, checked once when made."""

    data: Path
    root: Path | None = setting(
        None, "Folder that relative paths in a CSV start from.", DATA, auto="the CSV's folder"
    )
    path_column: str = setting("path", "CSV column with the image path.", DATA)
    label_column: str = setting("label", "CSV column with the label.", DATA)
    split_column: str = setting("split", "CSV column with train, val or test.", DATA)
    truth_column: str | None = setting(
        None, "CSV column with true labels: used to report, never to train.", DATA, auto="none"
    )
    follow_links: bool = setting(
        False, "Follow links in the data that lead out of its folder.", DATA
    )
    val_fraction: float = setting(
        0.1, "Share drawn for validation when the data has none.", DATA, low=0.0, high=0.9
    )
    balanced: bool = setting(
        False, "Each epoch draws equally many training images of every class.", DATA
    )
    max_unreadable: float = setting(
        0.05,
        "Largest share of training images that may be unreadable: the run ends as soon as an epoch"
        " has met more, and more than one. 0 allows none.",
        DATA,
        low=0.0,
        high=1.0,
    )

    backbone: str = setting("resnet50", "Name of a timm model.", MODEL, short="-b")
    pretrained: bool = setting(True, "Start from pretrained weights.", MODEL)
    weights: Path | None = setting(
        None, "Start from this timm state dict (.safetensors or .pth).", MODEL, auto="timm's hub"
    )
    small_input: bool = setting(
        False, "3x3 stem with stride 1 and no max-pool, for images near 32 pixels.", MODEL
    )
    freeze: str = setting(
        "none",
        "Keep fixed: BatchNorm (norm), or all but the head (backbone).",
        MODEL,
        choices=("none", "norm", "backbone"),
    )

    method: str = setting(
        "elr",
        "ELR; two networks that teach each other (elr-plus) or each train on one half"
        " (elr-halves). To compare: cross-entropy (ce), also generalised (gce) or symmetric (sl),"
        " and over-parameterisation (sop).",
        METHOD,
        choices=("elr", "elr-plus", "elr-halves", "ce", "gce", "sl", "sop"),
    )
    lam: float = setting(
        3.0, "Weight of the ELR term.", METHOD, low=0.0, high=1000.0, flag="--lambda"
    )
    lam_ramp: int = setting(
        0, "Steps over which lambda rises to its value.", METHOD, low=0, flag="--lambda-ramp"
    )
    beta: float = setting(0.7, "Momentum of the targets.", METHOD, low=0.0, high=0.9999)
    mixup: bool | None = setting(
        None, "Mix pairs of images, labels and targets.", METHOD, auto="only for elr-plus"
    )
    mixup_alpha: float | None = setting(
        None,
        "Both parameters of the Beta distribution of mixup.",
        METHOD,
        low=0.01,
        high=100.0,
        auto="1, less below 200 epochs",
    )
    weigh_labels: bool = setting(
        False, "Weigh the two labels of a mixed image by its target.", METHOD
    )
    ema: bool | None = setting(
        None,
        "Average the weights; the average makes the targets.",
        METHOD,
        auto="only for elr-plus",
    )
    ema_decay: float | None = setting(
        None,
        "Decay of the weight average.",
        METHOD,
        low=0.0,
        high=0.99999,
        auto="0.997, less below 6,667 steps",
    )
    ema_ramp: int = setting(
        0, "Steps over which that decay rises; with 0 it is at most 1 - 1/step.", METHOD, low=0
    )
    sl_alpha: float = setting(
        0.1, "Weight of cross-entropy in sl.", METHOD, low=0.0, high=1000.0, only="sl"
    )
    sl_beta: float = setting(
        1.0, "Weight of reverse cross-entropy in sl.", METHOD, low=0.0, high=1000.0, only="sl"
    )
    sop_lr_u: float = setting(
        10.0, "Learning rate of what sop adds to the given class.", METHOD, low=0.0, only="sop"
    )
    sop_lr_v: float = setting(
        10.0, "Learning rate of what sop takes from the others.", METHOD, low=0.0, only="sop"
    )
    sop_start: float | None = setting(
        None,
        "Deviation of both at the start; they grow by a factor per visit.",
        METHOD,
        low=1e-12,
        high=1.0,
        only="sop",
        auto="1e-8, more below 40 epochs",
    )

    epochs: int = setting(
        15, "Passes over the training data.", OPTIMISATION, low=1, high=10_000, short="-e"
    )
    batch_size: int | str | None = setting(
        None,
        "Images per step, in each process of torchrun. auto: halved until it fits on the device,"
        " with --accumulate raised to match.",
        OPTIMISATION,
        low=1,
        auto="64, less for few images",
        word=AUTO,
    )
    optimizer: str = setting("adamw", "Optimiser.", OPTIMISATION, choices=("sgd", "adamw"))
    lr: float | None = setting(
        None,
        "Peak learning rate.",
        OPTIMISATION,
        low=0.0,
        auto="0.001 for adamw, 0.0002 without BatchNorm, 0.02 for sgd",
    )
    weight_decay: float | None = setting(
        None, "Weight decay.", OPTIMISATION, low=0.0, auto="0.001 for sgd, 0.05 for adamw"
    )
    schedule: str = setting(
        "cosine",
        "How the learning rate falls.",
        OPTIMISATION,
        choices=("cosine", "step", "restarts", "constant"),
    )
    warmup: float = setting(
        1.0,
        "Epochs of linear warm-up, by step; at most a quarter of the run.",
        OPTIMISATION,
        low=0.0,
    )
    min_lr: float = setting(
        0.01,
        "Learning rate where warm-up begins and a cosine ends, as a share of the peak.",
        OPTIMISATION,
        low=0.0,
        high=1.0,
    )
    milestones: tuple[float, ...] = setting(
        (0.33, 0.67),
        "When `step` falls: epochs, or shares of the run where below 1.",
        OPTIMISATION,
        low=0.0,
    )
    step_factor: float = setting(
        0.01, "What `step` multiplies by at each milestone.", OPTIMISATION, low=0.0, high=1.0
    )
    restart_epochs: float = setting(
        10.0, "Epochs from one restart to the next.", OPTIMISATION, low=0.1
    )
    layer_decay: float = setting(
        1.0,
        "Learning rate factor per layer group below the head.",
        OPTIMISATION,
        low=0.01,
        high=1.0,
    )
    head_lr_scale: float = setting(
        1.0, "Learning rate factor of the new head.", OPTIMISATION, low=0.01, high=1000.0
    )
    clip_grad: float | None = setting(
        None, "Largest norm of the gradient.", OPTIMISATION, low=0.0, auto="no clipping"
    )
    on_nan: str = setting(
        "stop",
        "A loss that is no finite number ends the run (stop), or the epoch begins again with half"
        " the learning rate, at most 3 times (retry).",
        OPTIMISATION,
        choices=("stop", "retry"),
    )
    accumulate: int = setting(1, "Batches per optimiser step.", OPTIMISATION, low=1)

    image_size: int | None = setting(
        None, "Side of the square input in pixels.", INPUT, low=8, high=4096, auto="the backbone's"
    )
    augment: str = setting(
        "light",
        "Shift (light), crop of 7/8 (crop), random crops (standard), also colour (strong).",
        INPUT,
        choices=("none", "light", "crop", "standard", "strong"),
    )
    flip: bool = setting(True, "Mirror images at random where --augment is on.", INPUT)
    cache: str = setting(
        "none",
        "Keep decoded images in memory or in the run folder.",
        INPUT,
        choices=("none", "ram", "disk"),
    )
    workers: int | None = setting(
        None, "Processes that load images.", INPUT, low=0, high=256, auto="by cores, at most 8"
    )

    device: str = setting("auto", "auto, cpu, cuda, cuda:1, mps.", MACHINE)
    precision: str = setting(
        "auto", "Arithmetic of the network.", MACHINE, choices=("auto", "fp32", "bf16", "fp16")
    )
    table: str = setting(
        "auto",
        "How targets and predictions of all images are kept: every class (fp32, fp16), or the 16"
        " largest of an image and the sum of the others (top-k). auto goes by free memory.",
        MACHINE,
        choices=("auto", "fp32", "fp16", "top-k"),
    )
    table_device: str = setting(
        "auto",
        "Where they are: beside the network, or in host memory.",
        MACHINE,
        choices=("auto", "device", "host"),
    )
    compile: bool = setting(False, "Compile the network with torch.compile.", MACHINE)
    cuda_graphs: bool = setting(
        True, "Let a GPU replay each step of the network instead of starting it anew.", MACHINE
    )
    sync_bn: bool = setting(
        False, "BatchNorm over the images of all processes, not of each alone.", MACHINE
    )
    checkpoint_minutes: float = setting(
        10.0,
        "Minutes between checkpoints within an epoch; 0 saves after every step.",
        MACHINE,
        low=0.0,
    )
    tensorboard: bool = setting(False, "Write TensorBoard events into the run folder.", MACHINE)
    seed: int = setting(
        0, "Seed of split, order, augmentation and start.", MACHINE, low=0, high=2**32 - 1
    )

    def __post_init__(self) -> None:
        for spec in dataclasses.fields(self):
            checked = _checked(spec, getattr(self, spec.name))
            object.__setattr__(self, spec.name, checked)
        if self.weights is not None and not self.pretrained:
            raise ConfigError("--weights and --no-pretrained exclude each other: drop one of them.")
        if self.method == "elr-halves" and (self.mixup or self.ema):
            raise ConfigError("--method elr-halves: cannot be had with --mixup or --ema.")
        if self.method == "sop" and self.mixup:
            raise ConfigError("--method sop: cannot be had with --mixup.")
        for spec in dataclasses.fields(self):
            only = spec.metadata.get("only") or self.method
            if self.method != only and getattr(self, spec.name) != spec.default:
                option = option_name(spec.name)
                raise ConfigError(f"{option}: only --method {only} uses it. Leave it out.")
        if self.lr == 0.0:
            raise ConfigError("--lr 0: nothing would be learned. Leave it out for the default.")
        if self.clip_grad == 0.0:
            raise ConfigError("--clip-grad 0: nothing would be learned. Leave it out for no limit.")
        if self.sync_bn and self.method == "elr-halves":
            raise ConfigError("--sync-bn: cannot be had with --method elr-halves.")
        if self.sync_bn and self.freeze != "none":
            raise ConfigError(f"--sync-bn: --freeze {self.freeze} fixes BatchNorm. Leave it out.")
        term, average = "the loss has no ELR term", "there is no weight average. Add --ema"
        mixed = "no labels are mixed. Add --mixup"
        steps, restarts = (f"only --schedule {kind} uses it" for kind in ("step", "restarts"))
        has_lowest = self.warmup > 0 or self.schedule in ("cosine", "restarts")
        for name, is_used, why in (
            ("lam", self.method.startswith("elr"), f"{term}. Leave it out"),
            ("lam_ramp", self.has_elr_term, f"{term}. Leave it out"),
            ("ema_ramp", self.averages, average),
            ("ema_decay", self.averages, average),
            ("weigh_labels", self.mixes, mixed),
            ("mixup_alpha", self.mixes, mixed),
            ("milestones", self.schedule == "step", steps),
            ("step_factor", self.schedule == "step", steps),
            ("restart_epochs", self.schedule == "restarts", restarts),
            ("layer_decay", self.freeze != "backbone", "--freeze backbone fixes what it is for"),
            ("min_lr", has_lowest, f"--schedule {self.schedule} has it in --warmup alone"),
        ):
            if not is_used and getattr(self, name) != getattr(TrainConfig, name):
                raise ConfigError(f"{option_name(name)}: {why}.")

    @property
    def reading(self) -> Reading:
        """How the data is read."""
        return Reading(**{name: getattr(self, name) for name in READING_SETTINGS})

    @property
    def networks(self) -> int:
        """How many networks the method trains."""
        return 2 if self.method in ("elr-plus", "elr-halves") else 1

    @property
    def has_elr_term(self) -> bool:
        """Whether the loss has the ELR term."""
        return self.method.startswith("elr") and self.lam > 0

    @property
    def mixes(self) -> bool:
        """Whether images are mixed: as `mixup` says, without it only for ELR+."""
        return self.method == "elr-plus" if self.mixup is None else self.mixup

    @property
    def averages(self) -> bool:
        """Whether weights are averaged: as `ema` says, without it only for ELR+."""
        return self.method == "elr-plus" if self.ema is None else self.ema

    def replace(self, **changes: Any) -> TrainConfig:
        """Return a copy with other values, checked again."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that `from_dict` and JSON understand."""
        return {spec.name: _plain(getattr(self, spec.name)) for spec in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "settings") -> TrainConfig:
        """Build a config from plain values; `source` names the place in error messages."""
        check_names(values, source)
        if "data" not in values:
            raise ConfigError(f"{source}: no 'data' given. Name a folder or a CSV file.")
        try:
            return cls(**values)
        except ConfigError as error:
            raise ConfigError(f"{source}: {error}") from None


TUNED_SETTINGS = ("lam", "beta", "lr")  # what `elr tune` searches

# What `elr audit DATA` trains with where nothing else is asked for: few passes over small images.
AUDIT_SETTINGS: Mapping[str, Any] = {"epochs": 8, "image_size": 96, "cache": "ram"}


def option_name(name: str) -> str:
    """Return the command-line spelling of a setting, `--head-lr-scale` for `head_lr_scale`."""
    flag = TrainConfig.__dataclass_fields__[name].metadata.get("flag")
    return flag or "--" + name.replace("_", "-")


def plain_name(name: str) -> str:
    """Return the spelling of a setting in tables and files, `lambda` for `lam`."""
    return option_name(name).removeprefix("--")


def check_names(values: Mapping[str, Any], source: str) -> None:
    """Refuse names that are not settings, with the nearest one that is."""
    known = [spec.name for spec in dataclasses.fields(TrainConfig)]
    for name in values:
        if name not in known:
            hint = did_you_mean(str(name), known)
            raise ConfigError(f"{source}: unknown setting {str(name)!r}.{hint}")


def read_toml(path: Path) -> dict[str, Any]:
    """Read settings from a TOML file: names as of options, `-` and `_` are equal."""
    try:
        raw = tomllib.loads(small_text(path))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}). Check the path.") from None
    except (ValueError, RecursionError) as error:  # TOMLDecodeError and UnicodeDecodeError
        raise ConfigError(f"{path}: not valid TOML: {error}.") from None
    names = {option_name(spec.name): spec.name for spec in dataclasses.fields(TrainConfig)}
    values: dict[str, Any] = {}
    for given, value in raw.items():
        name = names.get("--" + given.replace("_", "-"), given.replace("-", "_"))
        if name in values:
            raise ConfigError(f"{path}: {given!r} is there in another spelling too. Keep one.")
        values[name] = value
    check_names(values, str(path))
    return values


@functools.cache
def setting_types() -> Mapping[str, type]:
    """Return the plain type of every setting, None stripped: `int` for `int | None`."""
    hints = typing.get_type_hints(TrainConfig)
    return {spec.name: _plain_type(hints[spec.name]) for spec in dataclasses.fields(TrainConfig)}


def _plain_type(hint: Any) -> type:
    if isinstance(hint, types.UnionType):
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    plain: type = typing.get_origin(hint) or hint
    return plain


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


def _checked(spec: dataclasses.Field[Any], value: Any) -> Any:
    """Return the value in the setting's own type, or raise ConfigError."""
    kind, option = setting_types()[spec.name], option_name(spec.name)
    if value is None:
        if spec.default is None:
            return None
        raise ConfigError(f"{option} needs a value.")
    if kind is tuple:
        parts = value.split(",") if isinstance(value, str) else value
        try:
            numbers = tuple(float(part) for part in parts)
        except (TypeError, ValueError, OverflowError):
            raise ConfigError(f"{option} {value!r}: expected numbers, such as 40,80.") from None
        for number in numbers:
            _check_range(spec, option, number)
        return numbers
    word = spec.metadata.get("word")
    if word is not None and value == word:
        return value
    converted = _converted(kind, value)
    if converted is None:
        expected = _KIND_NAMES[kind] + ("" if word is None else f" or {word}")
        raise ConfigError(f"{option} {value!r}: expected {expected}.")
    choices = spec.metadata.get("choices")
    if choices and converted not in choices:
        raise ConfigError(f"{option} {value!r}: choose one of {', '.join(choices)}.")
    if kind in (int, float):
        _check_range(spec, option, converted)
    return converted


_KIND_NAMES = {int: "a whole number", float: "a number", bool: "true or false"} | {
    Path: "a path",
    str: "text",
}


def _converted(kind: type, value: Any) -> Any:
    """Return `value` as `kind` where nothing is lost, else None."""
    if kind is Path and isinstance(value, str | Path):
        return Path(value)
    if kind in (int, float) and isinstance(value, bool):
        return None
    if kind is int and isinstance(value, Integral):  # of numpy, too
        return int(value)
    if kind is float and isinstance(value, Real):
        try:
            return float(value)
        except OverflowError:
            return -math.inf if value < 0 else math.inf
    return value if isinstance(value, kind) else None


def _check_range(spec: dataclasses.Field[Any], option: str, value: float) -> None:
    low, high = spec.metadata.get("low"), spec.metadata.get("high")
    if low is not None and not value >= low:  # `not`: NaN is out of every range
        raise ConfigError(f"{option} {value}: must be at least {low:g}.")
    if value == math.inf or (high is not None and value > high):
        limit = "finite" if high is None else f"at most {high:g}"
        raise ConfigError(f"{option} {value}: must be {limit}.")
