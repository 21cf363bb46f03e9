from __future__ import annotations

import numpy as np
import pytest
import torch

from elrcli.data.loader import RowLoader
from elrcli.data.manifest import load_data
from elrcli.data.transforms import eval_transform
from elrcli.engine.checkpoints import write_tensors
from elrcli.engine.device import Runtime
from elrcli.engine.features import FEATURES, Features, look_at_images
from elrcli.errors import RunError
from elrcli.models import Preprocessing, create_network
from tests.shapes import write_shapes

PLAIN = Preprocessing(32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def look_at(folder, backbone="resnet10t"):
    torch.manual_seed(0)
    network = create_network(backbone, 3).eval()
    manifest = load_data(folder)
    loader = RowLoader(
        manifest,
        np.arange(len(manifest)),
        eval_transform(32),
        batch_size=4,
        workers=0,
        seed=0,
        shuffle=False,
    )
    runtime = Runtime(torch.device("cpu"), "fp32")
    return list(look_at_images(network, loader, runtime, PLAIN)), manifest


@pytest.fixture
def shapes(tmp_path):
    write_shapes(tmp_path / "shapes", per_class=3, size=32, flip_share=0.0)
    return tmp_path / "shapes"


def test_the_same_picture_has_the_same_features_another_one_has_others(shapes):
    first, second = sorted((shapes / "circle").iterdir())[:2]
    second.write_bytes(first.read_bytes())
    looks, manifest = look_at(shapes)
    features = Features.empty(len(manifest))
    for look in looks:
        features.keep(look, look.batch.index.numpy())
    np.testing.assert_allclose(features.vectors[0], features.vectors[1], atol=1e-3)
    assert np.array_equal(features.thumbnails[0], features.thumbnails[1])
    assert np.abs(features.vectors[0] - features.vectors[2]).max() > 0.01
    assert not np.array_equal(features.thumbnails[0], features.thumbnails[2])


def test_projected_features_keep_their_length_nearly(shapes):
    looks, _ = look_at(shapes)  # 512 features become 256
    lengths = np.linalg.norm(looks[0].vectors.astype(float), axis=1)
    assert looks[0].vectors.shape == (3, FEATURES)
    assert (np.abs(lengths - 1) < 0.3).all()


def test_predictions_come_with_them(shapes):
    looks, _ = look_at(shapes)
    probs = np.concatenate([look.probs for look in looks])
    np.testing.assert_allclose(probs.sum(axis=1), 1, rtol=1e-6)


def test_a_thumbnail_is_grey_and_small(shapes):
    looks, manifest = look_at(shapes)
    from elrcli.data.images import read_image

    picture = read_image(manifest.file(0), 32).mean(axis=2)
    block = picture[:2, 2:4].mean()  # 32 pixels become 16
    assert looks[0].thumbnails[0].reshape(16, 16)[0, 1] == pytest.approx(block, abs=1)


def test_an_unreadable_image_keeps_zeros_and_its_reason(shapes):
    broken = sorted((shapes / "circle").iterdir())[0]
    broken.write_bytes(b"")
    looks, manifest = look_at(shapes)
    assert [row for look in looks for row, _ in look.batch.unreadable] == [0]
    features = Features.empty(len(manifest))
    for look in looks:
        features.keep(look, look.batch.index.numpy())
    assert not features.vectors[0].any()
    assert features.vectors[1].any()


def test_a_batch_without_a_readable_image(shapes):
    for path in shapes.rglob("*.png"):
        path.write_bytes(b"")
    looks, manifest = look_at(shapes)
    features = Features.empty(len(manifest))
    for look in looks:
        features.keep(look, look.batch.index.numpy())
    assert not features.vectors.any()


def test_saved_features_come_back(tmp_path):
    features = Features.empty(3)
    features.vectors[1] = 0.5
    features.save(tmp_path / "features.safetensors")
    found = Features.load(tmp_path / "features.safetensors", 3)
    assert np.array_equal(found.vectors, features.vectors)
    assert found.thumbnails.dtype == np.uint8
    assert Features.load(tmp_path / "none.safetensors", 3) is None


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("vectors", torch.full((2, FEATURES), torch.nan, dtype=torch.float16)),
        ("vectors", torch.zeros(2, FEATURES, dtype=torch.bfloat16)),
        ("vectors", torch.zeros(2, 3, dtype=torch.float16)),
        ("thumbnails", torch.zeros(2, 256)),
    ],
)
def test_tampered_features_are_refused(tmp_path, name, tensor):
    path = tmp_path / "features.safetensors"
    tensors = {
        "vectors": torch.zeros(2, FEATURES, dtype=torch.float16),
        "thumbnails": torch.zeros(2, 256, dtype=torch.uint8),
    }
    write_tensors(path, tensors | {name: tensor})
    with pytest.raises(RunError, match="Delete it"):
        Features.load(path, 2)


@pytest.mark.parametrize("content", [b"", b"nonsense", None])
def test_features_that_do_not_fit_are_refused(tmp_path, content):
    path = tmp_path / "features.safetensors"
    if content is None:
        Features.empty(2).save(path)
    else:
        path.write_bytes(content)
    with pytest.raises(RunError, match="Delete it"):
        Features.load(path, 3)
