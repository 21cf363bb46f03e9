from __future__ import annotations

import functools
import pickle
import socket
import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import safetensors.torch
import timm
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from torch import nn
from torch.nn import functional

from elrcli.errors import ModelError
from elrcli.models import (
    Ensemble,
    Preprocessing,
    calm_head,
    check_image_size,
    classifier_names,
    create_network,
    features_kept,
    freeze,
    has_batch_norm,
    lay_out,
    list_backbones,
    load_weights,
    members,
    parameter_groups,
    preprocessing,
    shrink_stem,
    training_mode,
    weights_cache,
)
from elrcli.weights import read_state_dict, why_hub_is_silent

TINY = "test_resnet"


def tiny(num_classes: int = 3) -> nn.Module:
    return create_network(TINY, num_classes)


def pair(num_classes: int = 3) -> Ensemble:
    return create_network(TINY, num_classes, copies=2)


def contiguous(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.contiguous() for name, tensor in network.state_dict().items()}


# --- names ---


def test_list_backbones_by_part_and_by_glob():
    assert "resnet50" in list_backbones("resnet5")
    assert list_backbones("test_resnet*") == ["test_resnet"]
    assert list_backbones("test_resnet", pretrained=True) == ["test_resnet.r160_in1k"]
    assert list_backbones("test_resnet.r160") == ["test_resnet.r160_in1k"]
    assert list_backbones("nothing like this") == []


@pytest.mark.parametrize(("name", "near"), [("resnet5O", "resnet50"), ("convnext_tny", "convnext")])
def test_an_unknown_backbone_gets_a_hint(name, near):
    with pytest.raises(ModelError, match=rf"^{name}: no such backbone\. Did you mean .*{near}"):
        create_network(name, 2)


@pytest.mark.parametrize("name", ["", "hf-hub:someone/model", "local-dir:/tmp", "zzzzzzzz"])
def test_other_sources_are_no_backbones(name):
    with pytest.raises(ModelError, match="`elr backbones` lists them"):
        create_network(name, 2)


@pytest.mark.parametrize("name", ["test_resnet.nothing", "test_resnet.hf-hub:someone/model"])
def test_an_unknown_weight_tag_names_the_known_ones(name):
    with pytest.raises(ModelError, match=r"no such weights\. Choose one of test_resnet\.r160_in1k"):
        create_network(name, 2)


# --- the new network ---


def test_the_head_has_one_output_per_class():
    network = tiny(5).eval()
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 5)
    assert classifier_names(network) == ("fc",)


@pytest.mark.parametrize("backbone", [TINY, "tf_efficientnet_lite0", "test_vit", "test_convnext"])
def test_first_predictions_are_near_uniform(backbone):
    torch.manual_seed(0)
    size = 160 if backbone == "test_vit" else 32
    network = create_network(backbone, 4).train()
    probs = network(torch.randn(8, 3, size, size)).softmax(dim=1)
    torch.testing.assert_close(probs, torch.full((8, 4), 0.25), atol=0.15, rtol=0)


def test_calm_head_touches_only_the_head():
    network = tiny()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    calm_head(network)
    changed = {
        name for name, tensor in network.state_dict().items() if not before[name].equal(tensor)
    }
    assert changed == {"fc.weight"}
    assert network.get_submodule("fc").weight.detach().std().item() == pytest.approx(0.01, rel=0.2)
    assert not network.get_submodule("fc").bias.any()


def test_preprocessing_is_the_backbones_own():
    prepared = preprocessing(tiny())
    assert prepared.image_size == 160
    assert prepared.mean == pytest.approx((0.5, 0.5, 0.5), abs=0.1)
    assert preprocessing(tiny(), 32) == Preprocessing(32, prepared.mean, prepared.std)


def test_a_network_of_fixed_size_is_built_for_the_size_asked():
    network = create_network("test_vit", 2, image_size=64).eval()
    assert network(torch.zeros(1, 3, 64, 64)).shape == (1, 2)


@pytest.mark.parametrize(("backbone", "size"), [("test_vit", 33), ("inception_v4", 32)])
def test_a_size_that_cannot_work_is_refused(backbone, size):
    network = create_network(backbone, 2, image_size=size)
    with pytest.raises(ModelError, match=f"^--image-size {size}: the backbone cannot take it"):
        check_image_size(network, size)


def test_check_image_size_changes_nothing():
    network = tiny()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    check_image_size(network, 32)
    for name, tensor in network.state_dict().items():
        assert before[name].equal(tensor), name


# --- two networks as one ---


def test_an_ensemble_predicts_the_mean_of_logits():
    both = pair().eval()
    images = torch.randn(2, 3, 32, 32)
    first, second = (part(images) for part in both.networks)
    torch.testing.assert_close(both(images), (first + second) / 2)
    assert not first.allclose(second)


def test_members_are_the_networks_that_train():
    both, one = pair(), tiny()
    assert members(both) == [both.networks[0], both.networks[1]]
    assert members(one) == [one]


def test_copies_start_from_the_same_weights_and_different_heads(tmp_path):
    donor = timm.create_model(TINY, num_classes=7)
    torch.save(donor.state_dict(), tmp_path / "w.pth")
    both = create_network(TINY, 3, weights=tmp_path / "w.pth", copies=2)
    first, second = (part.state_dict() for part in both.networks)
    assert {name for name in first if not first[name].equal(second[name])} == {"fc.weight"}
    assert first["conv1.0.weight"].equal(donor.state_dict()["conv1.0.weight"])


def test_copies_without_weights_differ_everywhere():
    first, second = (part.state_dict() for part in pair().networks)
    for name in ("conv1.0.weight", "layer4.0.conv1.weight", "fc.weight"):
        assert not first[name].equal(second[name]), name


def test_copies_take_stem_and_size():
    both = create_network("resnet10t", 2, small_input=True, copies=2)
    assert [part.conv1[0].stride for part in both.networks] == [(1, 1), (1, 1)]
    both = create_network("test_vit", 2, image_size=64, copies=2).eval()
    assert both(torch.zeros(1, 3, 64, 64)).shape == (1, 2)


def test_an_ensemble_is_prepared_for_like_its_networks():
    both = pair()
    assert preprocessing(both, 32) == preprocessing(tiny(), 32)
    assert has_batch_norm(both)
    check_image_size(both, 32)


def test_the_weights_of_an_ensemble_load_again(tmp_path):
    one, other = pair(), pair()
    safetensors.torch.save_file(contiguous(one), tmp_path / "w.safetensors")
    load_weights(other, tmp_path / "w.safetensors")
    for name, tensor in one.state_dict().items():
        assert tensor.equal(other.state_dict()[name]), name


def test_an_ensemble_has_the_heads_of_its_networks():
    assert classifier_names(pair()) == ("networks.0.fc", "networks.1.fc")


# --- features ---


@pytest.mark.parametrize(
    ("backbone", "kind"),
    [(TINY, nn.Linear), ("test_convnext", nn.Linear), ("resnetv2_18", nn.Conv2d)],
)
def test_features_are_what_the_head_makes_logits_of(backbone, kind):
    network = create_network(backbone, 3).eval()
    head = network.get_submodule(classifier_names(network)[0])
    assert isinstance(head, kind)
    with torch.no_grad(), features_kept(network) as features:
        for images in torch.randn(2, 2, 3, 32, 32):  # two batches, the last one counts
            logits = network(images)
        assert features().shape == (2, head.weight.shape[1])
        by_hand = functional.linear(features(), head.weight.flatten(1), head.bias)
    torch.testing.assert_close(by_hand, logits)


def test_features_before_a_convolution_are_means_over_the_picture():
    network = nn.Sequential(nn.Conv2d(3, 2, 1))
    network.pretrained_cfg = {"classifier": "0"}
    with features_kept(network) as features:
        network(torch.tensor([1.0, 2.0, 3.0, 6.0]).reshape(1, 1, 2, 2).expand(1, 3, 2, 2))
        assert features().tolist() == [[3.0, 3.0, 3.0]]


def test_features_of_an_ensemble_stand_side_by_side():
    both = pair().eval()
    images = torch.randn(2, 3, 32, 32)
    parts = []
    for part in both.networks:
        with torch.no_grad(), features_kept(part) as features:
            part(images)
            parts.append(features())
    with torch.no_grad(), features_kept(both) as features:
        both(images)
        torch.testing.assert_close(features(), torch.cat(parts, dim=1))


def test_nothing_is_kept_afterwards():
    network = tiny()
    with features_kept(network):
        assert len(network.fc._forward_pre_hooks) == 1
    assert len(network.fc._forward_pre_hooks) == 0
    with pytest.raises(KeyboardInterrupt), features_kept(network):
        raise KeyboardInterrupt
    assert len(network.fc._forward_pre_hooks) == 0


def test_a_backbone_without_a_known_head_is_refused(monkeypatch):
    monkeypatch.setattr("elrcli.models.classifier_names", lambda network: ())
    with pytest.raises(ModelError, match="resnet10t: has no head for classes"):
        create_network("resnet10t", 3)


def test_unreachable_weights_name_both_ways_out(monkeypatch):
    def refuse(*arguments: object, **options: object) -> nn.Module:
        raise OSError("We couldn't connect to the hub.\nTraceback and more")

    monkeypatch.setattr(timm, "create_model", refuse)
    with pytest.raises(ModelError) as caught:
        create_network(TINY, 2, pretrained=True)
    assert str(caught.value) == (
        "test_resnet: no pretrained weights (We couldn't connect to the hub.). "
        "Give a local file with --weights FILE, or start from scratch with --no-pretrained."
    )


def test_a_network_without_pretrained_weights_is_said_to_have_none():
    with pytest.raises(
        ModelError, match=r"cifar_resnet34: no pretrained weights \(there are none f"
    ):
        create_network("cifar_resnet34", 2, pretrained=True)


def test_weights_that_are_not_in_the_cache_of_an_offline_machine(monkeypatch):
    def refuse(*arguments: object, **options: object) -> nn.Module:
        raise LocalEntryNotFoundError(
            "An error happened while trying to locate the file on the Hub"
        )

    monkeypatch.setattr(timm, "create_model", refuse)
    with pytest.raises(ModelError, match=r"\(they are not in the cache, and the hub cannot be rea"):
        create_network(TINY, 2, pretrained=True)


@pytest.mark.parametrize(("has_address", "offline"), [(True, False), (False, True)])
def test_an_unreachable_hub_is_not_asked(monkeypatch, has_address, offline):
    """Its client would retry for a minute; weights in the cache are still found."""
    seen = []

    def lookup(*arguments: object) -> None:
        if not has_address:
            raise OSError("Name or service not known")

    def create(*arguments: object, **options: object) -> nn.Module:
        seen.append(huggingface_hub.constants.HF_HUB_OFFLINE)
        raise OSError("not in the cache")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    monkeypatch.setattr(urllib.request, "getproxies", dict)
    monkeypatch.setattr(timm, "create_model", create)
    with pytest.raises(ModelError, match="not in the cache"):
        create_network(TINY, 2, pretrained=True)
    assert seen == [offline]
    assert not huggingface_hub.constants.HF_HUB_OFFLINE


def test_local_weights_need_no_download(monkeypatch, tmp_path):
    safetensors.torch.save_file(contiguous(tiny()), tmp_path / "w.safetensors")
    asked = []
    original = timm.create_model

    def create(*arguments: object, **options: object) -> nn.Module:
        asked.append(options.get("pretrained", False))
        return original(*arguments, **options)

    monkeypatch.setattr(timm, "create_model", create)
    create_network(TINY, 2, pretrained=True, weights=tmp_path / "w.safetensors")
    assert asked == [False]


# --- weights from a file ---


@pytest.mark.parametrize(
    "name", ["w.safetensors", "module.safetensors", "w.pth", "wrapped.pth", "module.pth"]
)
def test_weights_load_and_a_head_for_other_classes_is_left_out(tmp_path, name):
    donor = timm.create_model(TINY, num_classes=7)
    state = contiguous(donor)
    path = tmp_path / name
    prefix = "module." if name.startswith("module.") else ""  # of DistributedDataParallel
    saved = {prefix + key: tensor for key, tensor in state.items()}
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(saved, path)
    else:
        torch.save({"epoch": 3, "state_dict": saved} if name == "wrapped.pth" else saved, path)
    network = create_network(TINY, 3, weights=path)
    for key, tensor in network.state_dict().items():
        assert key.startswith("fc.") or tensor.equal(state[key]), key
    assert network.get_submodule("fc").weight.shape[0] == 3
    assert network.get_submodule("fc").weight.abs().max() < 0.1  # still calm


def test_a_head_that_fits_is_taken(tmp_path):
    donor = timm.create_model(TINY, num_classes=3)
    torch.save(donor.state_dict(), tmp_path / "w.pth")
    network = create_network(TINY, 3, weights=tmp_path / "w.pth")
    assert network.get_submodule("fc").weight.equal(donor.get_submodule("fc").weight)


def test_old_files_without_batch_counters_load(tmp_path):
    state = {
        name: tensor
        for name, tensor in tiny().state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    torch.save(state, tmp_path / "w.pth")
    create_network(TINY, 3, weights=tmp_path / "w.pth")


def test_weights_of_another_backbone_name_the_counts(tmp_path):
    torch.save(create_network("test_vit", 3).state_dict(), tmp_path / "w.pth")
    expected = r"fit the backbone \(\d+ unknown, first 'cls_token'; \d+ missing, .*--backbone"
    with pytest.raises(ModelError, match=expected):
        create_network(TINY, 3, weights=tmp_path / "w.pth")


def test_a_tensor_of_another_shape_is_named(tmp_path):
    state = tiny().state_dict()
    state["bn1.weight"] = torch.zeros(5)
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(ModelError, match=r"\(1 of another shape, first 'bn1\.weight'\)"):
        create_network(TINY, 3, weights=tmp_path / "w.pth")


def test_without_a_head_named_nothing_may_be_left_out(tmp_path):
    torch.save(tiny(7).state_dict(), tmp_path / "w.pth")
    with pytest.raises(ModelError, match=r"2 of another shape, first 'fc\.weight'"):
        load_weights(tiny(3), tmp_path / "w.pth")


class Payload:
    """Unpickling an instance creates a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.target,)


@pytest.mark.parametrize("style", ["torch", "pickle"])
def test_code_in_a_weight_file_is_refused_and_never_run(tmp_path, style):
    proof, path = tmp_path / "executed", tmp_path / "w.pth"
    content = {"conv1.0.weight": torch.zeros(1), "extra": Payload(proof)}
    if style == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    message = r"w\.pth: refused, holds more than tensors\. Load it .* with safetensors\.$"
    with pytest.raises(ModelError, match=message):
        read_state_dict(path)
    assert not proof.exists()
    if style == "torch":  # the trap is real: an unguarded reader springs it
        torch.load(path, weights_only=False)
        assert proof.exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("w.safetensors", b"", "not a readable state dict"),
        ("w.safetensors", b"\xff" * 64, "not a readable state dict"),
        ("w.safetensors", b"\x10\0\0\0\0\0\0\0" + b"[" * 16, "not a readable state dict"),
        ("w.pth", b"", "not a readable state dict|refused"),
        ("w.pth", b"hello", "not a readable state dict|refused"),
        ("w.pth", b"PK\3\4 torn", "not a readable state dict"),
    ],
)
def test_damaged_weight_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match=message):
        read_state_dict(tmp_path / name)


def test_a_safetensors_file_that_claims_too_much_is_refused(tmp_path):
    header = b'{"w":{"dtype":"F32","shape":[1000000,1000000],"data_offsets":[0,4000000000000]}}'
    (tmp_path / "w.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ModelError, match="not a readable state dict"):
        read_state_dict(tmp_path / "w.safetensors")


@pytest.mark.parametrize("content", [{}, [1], {"epoch": 3}, {"model": {"a": [1]}}, torch.zeros(2)])
def test_a_file_without_tensors_by_name_is_no_state_dict(tmp_path, content):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(ModelError, match="holds no state dict"):
        read_state_dict(tmp_path / "w.pth")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ModelError, match=r"none\.pth: no such file"):
        create_network(TINY, 3, weights=tmp_path / "none.pth")


# --- small input ---


def test_small_input_on_resnet34():
    """The variant of the paper: 3x3 stem with stride 1, no max-pool; 32 px end as 4x4."""
    network = create_network("resnet34", 10)
    centre = network.conv1.weight[:, :, 2:5, 2:5].clone()
    shrink_stem(network)
    stem = network.conv1
    assert (stem.kernel_size, stem.stride, stem.padding) == ((3, 3), (1, 1), (1, 1))
    assert isinstance(network.maxpool, nn.Identity)
    assert stem.weight.equal(centre)
    with torch.no_grad():
        assert network.eval().forward_features(torch.zeros(1, 3, 32, 32)).shape[2:] == (4, 4)


def test_small_input_on_efficientnet_lite0():
    network = create_network("tf_efficientnet_lite0", 10, small_input=True).eval()
    assert network.conv_stem.stride == (1, 1)
    with torch.no_grad():
        assert network.forward_features(torch.zeros(1, 3, 32, 32)).shape[2:] == (2, 2)


def test_small_input_weights_come_from_the_full_network(tmp_path):
    donor = timm.create_model("resnet18", num_classes=2)
    torch.save(donor.state_dict(), tmp_path / "w.pth")
    network = create_network("resnet18", 2, weights=tmp_path / "w.pth", small_input=True)
    assert network.conv1.weight.equal(donor.conv1.weight[:, :, 2:5, 2:5])


@pytest.mark.parametrize("backbone", ["test_vit", "test_convnext"])
def test_small_input_is_refused_where_it_cannot_work(backbone):
    with pytest.raises(ModelError, match=r"^--small-input: "):
        create_network(backbone, 2, small_input=True)


def test_small_input_on_a_network_whose_pool_is_in_its_stem():
    network = create_network("resnetv2_18", 10, small_input=True).eval()
    with torch.no_grad():
        assert network.forward_features(torch.zeros(1, 3, 32, 32)).shape[2:] == (4, 4)


# --- the cache of weights ---


def cached(folder: Path, repository: str, file: str) -> None:
    """Lay a file into the hub's cache as its client does."""
    place = folder / f"models--{repository.replace('/', '--')}"
    for name in ("blobs", "refs", "snapshots/0123"):
        (place / name).mkdir(parents=True)
    (place / "blobs" / "abc").write_bytes(b"x" * 1000)
    (place / "refs" / "main").write_text("0123")
    (place / "snapshots/0123" / file).symlink_to("../../blobs/abc")


def test_the_cache_tells_which_backbones_it_holds(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    cached(tmp_path, "timm/resnet10t.c3_in1k", "model.safetensors")
    cached(tmp_path, "timm/resnet18.a1_in1k", "config.json")  # no weights
    cached(tmp_path, "someone/else", "model.safetensors")  # of no backbone
    found = weights_cache()
    assert (found.folder, found.size, found.is_offline) == (tmp_path, 3000, True)
    assert found.backbones == ("resnet10t.c3_in1k",)


def test_a_cache_that_is_not_there_is_empty(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "none"))
    found = weights_cache()
    assert (found.size, found.backbones) == (0, ())


def test_a_cache_that_is_no_folder_is_named(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelError, match=r"file: cannot be read \(.*\)\. Set HF_HOME to another"):
        weights_cache()


class _Hub(BaseHTTPRequestHandler):
    """Answers every question with 501: it knows no method."""

    def log_message(self, *_: object) -> None:
        pass


def test_any_answer_of_the_hub_will_do(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with HTTPServer(("127.0.0.1", 0), _Hub) as hub:
        address = f"http://127.0.0.1:{hub.server_port}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        thread = threading.Thread(target=hub.handle_request)
        thread.start()
        assert why_hub_is_silent(5) is None
        thread.join()
    assert "refused" in why_hub_is_silent(5)


def test_a_hub_that_says_nothing(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        assert "timed out" in why_hub_is_silent(0.1)


def test_an_address_that_is_looked_up_for_long(monkeypatch):
    end = threading.Event()

    def look_up(*_, **__):
        end.wait(10)
        raise OSError("found at last")

    monkeypatch.setattr(urllib.request, "urlopen", look_up)
    assert why_hub_is_silent(-0.9) == "no answer"
    end.set()


# --- networks for 32 pixels ---


@pytest.mark.parametrize(
    ("backbone", "parameters", "stages", "blocks"),
    [
        # The second by hand: stem 1,728; stages 147,968 + 525,184 + 2,098,944 + 8,392,192; last
        # BatchNorm 1,024; head 5,130. Stage 2: 3x3 convolutions 9 * 128 * (64 + 3 * 128), BatchNorm
        # 2 * (64 + 3 * 128), shortcut 64 * 128.
        ("cifar_resnet34", 21_282_122, ["layer1", "layer2", "layer3", "layer4"], [3, 4, 6, 3]),
        ("cifar_preact_resnet18", 11_172_170, [f"stages.{i}.blocks" for i in range(4)], [2] * 4),
    ],
)
def test_networks_of_the_papers_tables(backbone, parameters, stages, blocks):
    network = create_network(backbone, 10).eval()
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters
    assert [len(network.get_submodule(name)) for name in stages] == blocks
    sizes = []
    for name in stages:
        network.get_submodule(name).register_forward_hook(
            lambda module, inputs, output: sizes.append(tuple(output.shape[1:]))
        )
    with torch.no_grad():
        assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert sizes == [(64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4)]
    assert preprocessing(network).image_size == 32
    assert has_batch_norm(network)


@pytest.mark.parametrize("backbone", ["cifar_resnet34", "cifar_preact_resnet18"])
def test_networks_for_32_pixels_are_backbones_like_others(backbone, tmp_path):
    assert list_backbones(backbone) == [backbone]
    assert list_backbones(backbone, pretrained=True) == []
    with pytest.raises(ModelError, match=r"there are none for this .* with --no-pretrained\.$"):
        create_network(backbone, 2, pretrained=True)
    donor = create_network(backbone, 3, small_input=True)  # has the small stem already: no change
    torch.save(donor.state_dict(), tmp_path / "w.pth")
    network = create_network(backbone, 2, pretrained=True, weights=tmp_path / "w.pth")
    own, given = network.state_dict(), donor.state_dict()
    head = classifier_names(network)[0]
    assert {name for name in own if not torch.equal(own[name], given[name])} <= {
        f"{head}.weight",
        f"{head}.bias",
    }
    assert len(parameter_groups(network, weight_decay=0.1, layer_decay=0.75, head_lr_scale=2)) > 4


@pytest.mark.parametrize("backbone", ["resnet50", "inception_resnet_v2"])
def test_networks_of_the_large_sets_are_timms(backbone):
    names = list_backbones(f"{backbone}.*", pretrained=True)
    assert names[0].startswith(f"{backbone}.")  # with the tag of the weights


# --- memory format ---


class Pools(nn.Module):
    """Tells whether what comes in is in channels_last alone."""

    def __init__(self, padding: int) -> None:
        super().__init__()
        self.weights = nn.Conv2d(3, 4, 3)
        self.pool = nn.AvgPool2d(3, padding=padding)

    def forward(self, images: torch.Tensor) -> bool:
        return not images.is_contiguous()


@pytest.mark.parametrize(
    ("device", "version", "padding", "is_channels_last"),
    [
        ("cpu", "2.11.0", 1, True),
        ("mps", "2.14.1", 0, False),
        ("cuda", "2.14.1+cu130", 1, True),
        ("cuda", "2.13.0+cu130", 1, False),
        ("cuda", "2.13.0+cu130", 0, True),
    ],
)
def test_networks_are_laid_out_as_the_device_computes_right(
    monkeypatch, device, version, padding, is_channels_last
):
    monkeypatch.setattr(torch, "__version__", version)
    network = Pools(padding)
    monkeypatch.setattr(network, "to", functools.partial(_stay, network))
    lay_out(network, torch.device(device))
    images = torch.zeros(2, 3, 8, 8).to(memory_format=torch.channels_last)
    assert network(images) == is_channels_last
    assert (not network.weights.weight.is_contiguous()) == is_channels_last


def _stay(network: nn.Module, device: object = None, **formats: Any) -> nn.Module:
    """Convert a network without moving it."""
    return nn.Module.to(network, **formats) if formats else network


def test_inception_v3_pools_in_functions(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.13.0")
    network = create_network("inception_v3", 2, pretrained=False)
    monkeypatch.setattr(network, "to", functools.partial(_stay, network))
    lay_out(network, torch.device("cuda"))
    assert next(network.parameters()).is_contiguous()


# --- parameter groups ---


def scales(network: nn.Module, **options: float) -> dict[str, tuple[float, float]]:
    """Return (lr_scale, weight_decay) by parameter name."""
    settings = {"weight_decay": 0.1, "layer_decay": 1.0, "head_lr_scale": 1.0, **options}
    groups = parameter_groups(network, **settings)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    found = {
        names[id(parameter)]: (group["lr_scale"], group["weight_decay"])
        for group in groups
        for parameter in group["params"]
    }
    assert len(found) == sum(len(group["params"]) for group in groups)  # none twice
    return found


@pytest.mark.parametrize("layer_decay", [1.0, 0.75])
def test_what_a_network_spares_has_no_weight_decay(layer_decay):
    network = create_network("test_vit", 2, pretrained=False)
    found = scales(network, layer_decay=layer_decay)
    assert {"pos_embed", "cls_token"} <= network.no_weight_decay()
    assert found["pos_embed"][1] == found["cls_token"][1] == 0.0
    assert found["patch_embed.proj.weight"][1] == 0.1


def test_biases_and_norms_have_no_weight_decay():
    found = scales(tiny())
    assert set(found) == {name for name, _ in tiny().named_parameters()}
    assert found["conv1.0.weight"] == (1.0, 0.1)
    assert found["fc.weight"] == (1.0, 0.1)
    assert found["fc.bias"] == found["bn1.weight"] == found["bn1.bias"] == (1.0, 0.0)


def test_the_head_learns_at_its_own_rate():
    found = scales(tiny(), head_lr_scale=10.0)
    assert found["fc.weight"] == (10.0, 0.1)
    assert found["fc.bias"] == (10.0, 0.0)
    assert {scale for name, (scale, _) in found.items() if not name.startswith("fc.")} == {1.0}


def test_layer_decay_halves_the_rate_from_layer_to_layer():
    found = scales(tiny(), layer_decay=0.5, head_lr_scale=4.0)
    assert found["fc.weight"][0] == 4.0
    rates = [found[name][0] for name in found if name.startswith("layer")]
    assert min(rates) >= found["conv1.0.weight"][0] > 0
    assert all(torch.log2(torch.tensor(rate)) % 1 == 0 for rate in rates)
    assert max(rates) == 0.5
    assert found["layer4.0.conv1.weight"][0] > found["layer1.0.conv1.weight"][0]


def test_frozen_parameters_are_in_no_group():
    network = tiny()
    freeze(network, "backbone")
    assert set(scales(network)) == {"fc.weight", "fc.bias"}
    assert set(scales(network, layer_decay=0.5)) == {"fc.weight", "fc.bias"}


@pytest.mark.parametrize("options", [{}, {"layer_decay": 0.5, "head_lr_scale": 4.0}])
def test_each_network_of_an_ensemble_has_its_own_groups(options):
    single = scales(tiny(), **options)
    both = scales(pair(), **options)
    assert len(both) == 2 * len(single)
    for name, expected in single.items():
        assert both[f"networks.0.{name}"] == both[f"networks.1.{name}"] == expected


# --- freezing ---


def test_freezing_the_backbones_of_an_ensemble_leaves_both_heads():
    both = pair()
    freeze(both, "backbone")
    trainable = {name for name, p in both.named_parameters() if p.requires_grad}
    assert trainable == {f"networks.{i}.fc.{kind}" for i in (0, 1) for kind in ("weight", "bias")}
    assert set(scales(both)) == trainable


def test_freezing_the_norms_of_an_ensemble():
    both = pair()
    freeze(both, "norm")
    training_mode(both, "norm")
    for part in both.networks:
        assert part.training
        assert not part.bn1.training
        assert not part.bn1.weight.requires_grad
        assert part.fc.weight.requires_grad


def test_freeze_norm():
    network = tiny()
    freeze(network, "norm")
    frozen = {name for name, p in network.named_parameters() if not p.requires_grad}
    assert {"bn1.weight", "bn1.bias"} <= frozen
    assert all("bn" in name or "downsample" in name or "conv1." in name for name in frozen)
    assert "conv1.0.weight" not in frozen
    training_mode(network, "norm")
    assert network.training
    assert not network.get_submodule("bn1").training


def test_freeze_none_trains_everything():
    network = tiny()
    freeze(network, "none")
    assert all(parameter.requires_grad for parameter in network.parameters())
    training_mode(network.eval(), "none")
    assert all(module.training for module in network.modules())


def test_freeze_norm_is_refused_where_there_is_none():
    with pytest.raises(ModelError, match=r"^--freeze norm: this backbone has no BatchNorm"):
        freeze(create_network("test_vit", 2), "norm")
