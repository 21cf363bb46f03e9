"""Backbones: the only module that imports timm."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import timm
import timm.data
import torch
from huggingface_hub.errors import CacheNotFound, LocalEntryNotFoundError
from huggingface_hub.utils import logging as hub_logging
from timm.layers import BatchNormAct2d, convert_sync_batchnorm, create_conv2d
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, ResNet
from timm.models.resnetv2 import ResNetV2
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import Tensor, nn

from elrcli.config import TrainConfig
from elrcli.errors import ModelError, first_line
from elrcli.weights import offline_when_unreachable, read_state_dict

_CIFAR: dict[str, Any] = {
    "url": "",  # no pretrained weights
    "num_classes": 10,
    "input_size": (3, 32, 32),
    "pool_size": (4, 4),
    "crop_pct": 1.0,
    "interpolation": "bilinear",
    "mean": (0.4914, 0.4822, 0.4465),
    "std": (0.2023, 0.1994, 0.2010),
}
default_cfgs = generate_default_cfgs(  # where `register_model` looks
    {
        "cifar_resnet34": _CIFAR | {"first_conv": "conv1", "classifier": "fc"},
        "cifar_preact_resnet18": _CIFAR | {"first_conv": "stem.conv", "classifier": "head.fc"},
    }
)


@register_model
def cifar_resnet34(pretrained: bool = False, **options: Any) -> nn.Module:
    """Build ResNet-34 for 32 pixels: 3x3 stem with stride 1, no max-pool. He et al. 2015.

    21.28 M parameters with 10 classes; the network of the tables of Liu et al. 2020 (ELR).
    """
    options |= {"block": BasicBlock, "layers": (3, 4, 6, 3), "zero_init_last": False}
    network: nn.Module = build_model_with_cfg(ResNet, "cifar_resnet34", pretrained, **options)
    network.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    network.maxpool = nn.Identity()
    return network


@register_model
def cifar_preact_resnet18(pretrained: bool = False, **options: Any) -> nn.Module:
    """Build ResNet-18 with pre-activation for 32 pixels, stem as above. He et al. 2016.

    11.17 M parameters with 10 classes; the network of ELR+ in Liu et al. 2020.
    """
    options |= {
        "layers": (2, 2, 2, 2),
        "channels": (64, 128, 256, 512),
        "basic": True,
        "bottle_ratio": 1.0,
        "conv_layer": create_conv2d,
        "norm_layer": BatchNormAct2d,
    }
    variant = "cifar_preact_resnet18"
    network: nn.Module = build_model_with_cfg(ResNetV2, variant, pretrained, **options)
    network.stem = nn.Sequential()
    network.stem.add_module("conv", nn.Conv2d(3, 64, 3, padding=1, bias=False))
    return network


@dataclass(frozen=True)
class Preprocessing:
    """What the network expects: `(pixel / 255 - mean) / std` at `image_size`."""

    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


class Ensemble(nn.Module):
    """Networks of one architecture; the logits are the mean of theirs."""

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)
        self.pretrained_cfg = networks[0].pretrained_cfg

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [B, K]."""
        return torch.stack([network(images) for network in self.networks]).mean(dim=0)


def members(network: nn.Module) -> list[nn.Module]:
    """Return the networks of an ensemble, or the one network itself."""
    return list(network.networks) if isinstance(network, Ensemble) else [network]


def is_from_timm(backbone: str) -> bool:
    """Tell timm's own networks from those that are registered here."""
    return backbone.split(".")[0] not in default_cfgs


def timm_config(
    backbone: str, classes: Sequence[str], preprocessing: Preprocessing
) -> dict[str, Any]:
    """Return the `config.json` with which timm builds a network and prepares its images.

    The form is that of timm's `local-dir:` and `hf-hub:` sources.
    """
    name, _, _ = backbone.partition(".")
    source = _pretrained_config(backbone)
    size = preprocessing.image_size
    is_fixed = bool(source.get("fixed_input_size"))
    config: dict[str, Any] = {
        "architecture": name,
        "num_classes": len(classes),
        "label_names": list(classes),
    }
    if is_fixed and tuple(source["input_size"][1:]) != (size, size):
        config["model_args"] = {"img_size": size}
    config["pretrained_cfg"] = {
        "num_classes": len(classes),
        "input_size": [3, size, size],
        "fixed_input_size": is_fixed,
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "crop_mode": "center",
        "mean": list(preprocessing.mean),
        "std": list(preprocessing.std),
        "first_conv": source.get("first_conv"),
        "classifier": source.get("classifier"),
        "custom_load": False,
    }
    return config


def plain_attention(network: nn.Module) -> None:
    """Make attention of steps that every exporter knows, with the same result."""
    for module in network.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # type: ignore[assignment]


def list_backbones(pattern: str = "", *, pretrained: bool = False) -> list[str]:
    """Return model names that contain `pattern` or match it as a glob: timm's and `cifar_*`."""
    glob = pattern if any(sign in pattern for sign in "*?[") else f"*{pattern}*"
    has_tag = "." in pattern  # of weights, as `resnet50.a1_in1k`
    return list(timm.list_models(glob, pretrained=pretrained or has_tag))


def network_of(config: TrainConfig, num_classes: int) -> nn.Module:
    """Build the network that `config` names, without its weights."""
    return create_network(
        config.backbone,
        num_classes,
        small_input=config.small_input,
        image_size=config.image_size,
        copies=config.networks,
    )


def create_network(
    backbone: str,
    num_classes: int,
    *,
    pretrained: bool = False,
    weights: Path | None = None,
    small_input: bool = False,
    image_size: int | None = None,
    copies: int = 1,
) -> nn.Module:
    """Build a timm network with a new head of `num_classes` outputs.

    With several `copies` an Ensemble of them: each starts from another random head.
    """
    if copies > 1:
        return Ensemble(
            [
                create_network(
                    backbone,
                    num_classes,
                    pretrained=pretrained,
                    weights=weights,
                    small_input=small_input,
                    image_size=image_size,
                )
                for _ in range(copies)
            ]
        )
    config = _pretrained_config(backbone)
    options: dict[str, Any] = {"num_classes": num_classes}
    if image_size is not None and config.get("fixed_input_size"):
        options["img_size"] = image_size
    if pretrained and weights is None:
        network = _download(backbone, options)
    else:
        network = timm.create_model(backbone, **options)
    if not classifier_names(network):
        raise ModelError(f"{backbone}: has no head for classes. Choose another --backbone.")
    calm_head(network)
    if weights is not None:
        load_weights(network, weights, classifier_names(network))
    if small_input:
        shrink_stem(network)
    return network


def calm_head(network: nn.Module) -> None:
    """Start the head near zero, so that the first predictions are near uniform.

    Some timm heads start with logits of a deviation above 5 for few classes. ELR would take such
    confident random guesses for targets.
    """
    for name in classifier_names(network):
        head = network.get_submodule(name)
        if isinstance(head, nn.Linear | nn.Conv2d):
            nn.init.normal_(head.weight, std=0.01)
            if head.bias is not None:
                nn.init.zeros_(head.bias)


def preprocessing(network: nn.Module, image_size: int | None = None) -> Preprocessing:
    """Return the network's own preprocessing, at another size if one is given."""
    config = timm.data.resolve_model_data_config(network)
    size = image_size or int(config["input_size"][-1])
    return Preprocessing(size, tuple(config["mean"]), tuple(config["std"]))


@torch.no_grad()
def check_image_size(network: nn.Module, image_size: int) -> None:
    """Raise ModelError if the network cannot take squares of `image_size`; runs it once."""
    network.eval()
    try:
        network(torch.zeros(1, 3, image_size, image_size))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ModelError(
            f"--image-size {image_size}: the backbone cannot take it ({first_line(error)}). "
            "Choose another size, such as the backbone's own."
        ) from None


def classifier_names(network: nn.Module) -> tuple[str, ...]:
    """Return the module names of the head that timm replaces for new classes."""
    if isinstance(network, Ensemble):
        parts = [classifier_names(part) for part in network.networks]
        return tuple(f"networks.{i}.{name}" for i, names in enumerate(parts) for name in names)
    names = getattr(network, "pretrained_cfg", {}).get("classifier") or ()
    return (names,) if isinstance(names, str) else tuple(names)


@contextmanager
def features_kept(network: nn.Module) -> Iterator[Callable[[], Tensor]]:
    """Inside, the yielded function returns what entered the head last, [B, D].

    The features of an ensemble stand side by side.
    """
    kept: dict[int, Tensor] = {}

    def keep(place: int, head: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        features = inputs[0]
        if isinstance(head, nn.Conv2d):
            features = features.mean(dim=(2, 3))
        kept[place] = features.flatten(1)

    handles = []
    for place, part in enumerate(members(network)):
        head = part.get_submodule(classifier_names(part)[0])
        handles.append(head.register_forward_pre_hook(partial(keep, place)))
    try:
        yield lambda: torch.cat([kept[place] for place in sorted(kept)], dim=1)
    finally:
        for handle in handles:
            handle.remove()


def _is_head(parameter: str, network: nn.Module) -> bool:
    return parameter.startswith(tuple(f"{name}." for name in classifier_names(network)))


def load_weights(network: nn.Module, path: Path, head: tuple[str, ...] = ()) -> None:
    """Load a timm state dict; a head for other classes is left as it was made.

    `.pth` files are read as tensors only: code in a pickle is refused, never run.
    """
    state, own = read_state_dict(path), network.state_dict()
    in_head = tuple(f"{name}." for name in head)
    for name in list(state):
        if name.startswith(in_head) and (name not in own or own[name].shape != state[name].shape):
            del state[name]
    problems = {
        "of another shape": [n for n in state if n in own and state[n].shape != own[n].shape],
        "unknown": [name for name in state if name not in own],
        "missing": [
            name
            for name in own
            if name not in state
            and not name.startswith(in_head)
            and not name.endswith(".num_batches_tracked")  # old files lack these counters
        ],
    }
    details = [
        f"{len(names)} {what}, first {names[0]!r}" for what, names in problems.items() if names
    ]
    if details:
        raise ModelError(
            f"{path}: weights do not fit the backbone ({'; '.join(details)}). "
            "Choose the --backbone that they were made for."
        )
    network.load_state_dict(state, strict=False)


def shrink_stem(network: nn.Module) -> None:
    """Make the stem fit images near 32 pixels: first convolution 3x3 with stride 1, no max-pool.

    A larger pretrained kernel keeps its centre.
    """
    name = getattr(network, "pretrained_cfg", {}).get("first_conv")
    if not isinstance(name, str):
        raise ModelError("--small-input: this backbone has no single first convolution to shrink.")
    stem = network.get_submodule(name)
    if not isinstance(stem, nn.Conv2d) or stem.kernel_size[0] % 2 == 0:
        raise ModelError(f"--small-input: {name} is no convolution that can take stride 1.")
    kernel = stem.kernel_size[0]
    if kernel > 3:
        margin = (kernel - 3) // 2
        stem.weight = nn.Parameter(stem.weight.data[:, :, margin:-margin, margin:-margin].clone())
        stem.kernel_size = (3, 3)
        stem.padding = (1, 1)
    stem.stride = (1, 1)
    for place in ("maxpool", "stem.pad", "stem.pool"):  # ResNet and its kin; the last two ResNetV2
        if place in dict(network.named_modules()):
            network.set_submodule(place, nn.Identity())


def lay_out(network: nn.Module, device: torch.device) -> nn.Module:
    """Move a network to a device, in the memory format that its steps are fastest in there.

    That is channels_last, but not where torch's backward passes are wrong in it: pooling and
    BatchNorm on Apple's GPUs, and average pooling with padding on CUDA before torch 2.14. There
    weights and images are contiguous.
    """
    network.to(device)
    is_old = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 14)
    if device.type == "mps" or (device.type == "cuda" and is_old and _pools_padded(network)):
        for part in members(network):
            part.register_forward_pre_hook(lambda _, images: (images[0].contiguous(),))
        return network
    return network.to(memory_format=torch.channels_last)


def _pools_padded(network: nn.Module) -> bool:
    paddings = (part.padding for part in network.modules() if isinstance(part, nn.AvgPool2d))
    in_functions = any(type(part).__name__ == "InceptionV3" for part in network.modules())
    return in_functions or any(padding not in (0, (0, 0)) for padding in paddings)


def parameter_groups(
    network: nn.Module, *, weight_decay: float, layer_decay: float, head_lr_scale: float
) -> list[dict[str, Any]]:
    """Return optimiser groups; `lr_scale` in a group is its factor of the learning rate.

    Biases, normalisation and what a network spares, such as the embedding of positions, have no
    weight decay. With `layer_decay` below 1 timm's groups give earlier layers smaller rates.
    """
    if isinstance(network, Ensemble):
        build = partial(parameter_groups, weight_decay=weight_decay, layer_decay=layer_decay)
        parts = [build(part, head_lr_scale=head_lr_scale) for part in network.networks]
        return [group for groups in parts for group in groups]
    spared: Collection[str] = getattr(network, "no_weight_decay", tuple)()
    if layer_decay < 1.0:
        groups = param_groups_layer_decay(
            network, weight_decay, no_weight_decay_list=spared, layer_decay=layer_decay
        )
    else:
        groups = param_groups_weight_decay(network, weight_decay, no_weight_decay_list=spared)
    head_ids: set[int] = set()
    if head_lr_scale != 1.0:  # otherwise fewer groups are faster
        named = network.named_parameters()
        head_ids = {id(parameter) for name, parameter in named if _is_head(name, network)}
    result = []
    for group in groups:
        scale = float(group.get("lr_scale", 1.0))
        for is_head in (False, True):
            chosen = [p for p in group["params"] if (id(p) in head_ids) == is_head]
            if chosen:
                result.append(
                    {
                        "params": chosen,
                        "weight_decay": float(group["weight_decay"]),
                        "lr_scale": scale * (head_lr_scale if is_head else 1.0),
                    }
                )
    return result


def freeze(network: nn.Module, what: str) -> None:
    """Fix `norm` (BatchNorm weights and statistics) or `backbone` (all but the head)."""
    if what == "backbone":
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(_is_head(name, network))
    elif what == "norm":
        norms = list(_batch_norms(network))
        if not norms:
            raise ModelError("--freeze norm: this backbone has no BatchNorm. Leave --freeze out.")
        for module in norms:
            module.requires_grad_(False)


def training_mode(network: nn.Module, frozen: str) -> None:
    """Set train mode; frozen BatchNorm keeps its statistics."""
    network.train()
    if frozen != "none":
        for module in _batch_norms(network):
            module.eval()


def synchronise_batch_norm(network: nn.Module) -> None:
    """Make BatchNorm take its statistics over the images of all processes; names stay."""
    convert_sync_batchnorm(network)


def has_batch_norm(network: nn.Module) -> bool:
    """Tell convolutional networks with BatchNorm from transformers and their kin."""
    return any(True for _ in _batch_norms(network))


def _batch_norms(network: nn.Module) -> Iterator[nn.Module]:
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            yield module


def _pretrained_config(backbone: str) -> dict[str, Any]:
    name = backbone.split(".")[0]
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f" Did you mean {', '.join(near)}?" if near else ""
        raise ModelError(f"{backbone}: no such backbone.{hint} `elr backbones` lists them.")
    try:
        config = timm.get_pretrained_cfg(backbone)
    except (RuntimeError, ValueError):
        known = ", ".join(timm.list_pretrained(f"{name}.*")) or name
        raise ModelError(f"{backbone}: no such weights. Choose one of {known}.") from None
    return dict(config.to_dict()) if config is not None else {}


def _download(backbone: str, options: dict[str, Any]) -> nn.Module:
    level = hub_logging.get_verbosity()
    hub_logging.set_verbosity_error()  # its retries would fill the screen
    try:
        with offline_when_unreachable():
            return timm.create_model(backbone, pretrained=True, **options)
    except Exception as error:  # hub, network and timm raise many unrelated kinds here
        reason = first_line(error)
        if "pretrained=False" in reason:  # timm's own remedy
            reason = "there are none for this network"
        elif isinstance(error, LocalEntryNotFoundError):
            reason = "they are not in the cache, and the hub cannot be reached"
        raise ModelError(
            f"{backbone}: no pretrained weights ({reason}). Give a local file with --weights FILE,"
            " or start from scratch with --no-pretrained."
        ) from None
    finally:
        hub_logging.set_verbosity(level)


@dataclass(frozen=True)
class WeightsCache:
    """Pretrained weights on this machine, where the client of timm's hub keeps them."""

    folder: Path
    size: int  # bytes
    backbones: tuple[str, ...]  # with their tags, as `--backbone` takes them
    is_offline: bool  # HF_HUB_OFFLINE: nothing is fetched


def weights_cache() -> WeightsCache:
    """Look into the cache of pretrained weights, without the network.

    Raises ModelError if it cannot be read.
    """
    constants: Any = huggingface_hub.constants
    folder = Path(constants.HF_HUB_CACHE)
    if not os.path.lexists(folder):
        return WeightsCache(folder, 0, (), constants.HF_HUB_OFFLINE)
    try:
        found = huggingface_hub.scan_cache_dir(folder)
    except (OSError, ValueError, CacheNotFound) as error:
        raise ModelError(
            f"{folder}: cannot be read ({first_line(error)}). Set HF_HOME to another folder."
        ) from None
    held = {repo.repo_id for repo in found.repos if _holds_weights(repo)}
    backbones = [name for name in timm.list_pretrained() if held and _hub_name(name) in held]
    return WeightsCache(folder, found.size_on_disk, tuple(backbones), constants.HF_HUB_OFFLINE)


def _holds_weights(repo: Any) -> bool:
    """Tell whether one revision of a repository in the cache has a file of weights."""
    names = (file.file_name for revision in repo.revisions for file in revision.files)
    return any(name.endswith((".safetensors", ".bin")) for name in names)


def _hub_name(backbone: str) -> str | None:
    config = timm.get_pretrained_cfg(backbone)
    return None if config is None else config.hf_hub_id
