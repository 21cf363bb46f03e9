"""The samples of a training: what its settings say of the data."""

from __future__ import annotations

from elrcli.config import TrainConfig
from elrcli.data.manifest import Manifest, draw_validation, load_data


def load_samples(config: TrainConfig) -> Manifest:
    """Return the samples that `config` trains on, with the validation split that it draws."""
    listed = load_data(config.data, config.reading, truth_column=config.truth_column)
    return draw_validation(listed, config.val_fraction, config.seed)
