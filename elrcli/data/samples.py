"""The samples of a training: what its settings say of the data."""

from __future__ import annotations

from elrcli.config import TrainConfig
from elrcli.data.manifest import Manifest, draw_validation, load_data
from elrcli.errors import ConfigError


def load_samples(config: TrainConfig) -> Manifest:
    """Return the samples that `config` trains on, with the validation split that it draws."""
    return draw_validation(listed_samples(config), config.val_fraction, config.seed)


def listed_samples(config: TrainConfig) -> Manifest:
    """Return the samples of `config` in the splits that the data itself has.

    Raises ConfigError where a share is asked for that would not be drawn.
    """
    listed = load_data(config.data, config.reading, truth_column=config.truth_column)
    if listed.has_val and config.val_fraction not in (0.0, TrainConfig.val_fraction):
        raise ConfigError(
            f"--val-fraction {config.val_fraction:g}: {config.data} has validation images of its"
            " own, none are drawn. Leave it out."
        )
    return listed
