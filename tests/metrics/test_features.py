"""Preprocessing against Pillow and torch-fidelity, FID's Inception against torch-fidelity's, CLIP's against open_clip's own transform."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from t2v.metrics import inception
from t2v.metrics.clip import Clip, preprocess
from t2v.metrics.features import ClipFeatures, InceptionFeatures, MotionFeatures, exact_arithmetic
from t2v.metrics.resize import pillow_bicubic, pillow_bicubic_float, tensorflow_bilinear


def pictures(n: int, h: int, w: int) -> Tensor:
    return torch.randint(0, 256, (n, h, w, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(h * w))


@pytest.mark.parametrize(
    ("h", "w", "height", "width"), [(256, 256, 224, 224), (240, 320, 224, 298), (64, 64, 224, 224), (100, 77, 224, 224)]
)
class TestResize:
    def test_gives_pillows_bytes(self, h: int, w: int, height: int, width: int) -> None:
        x = pictures(2, h, w)
        want = [np.asarray(Image.fromarray(p.numpy()).resize((width, height), Image.Resampling.BICUBIC)) for p in x]
        assert np.array_equal(pillow_bicubic(x, height, width).numpy(), np.stack(want))

    def test_gives_pillows_floats(self, h: int, w: int, height: int, width: int) -> None:
        x = pictures(1, h, w)
        channel = Image.fromarray(x[0, :, :, 1].numpy().astype(np.float32), mode="F").resize((width, height), Image.Resampling.BICUBIC)
        want = np.asarray(channel).clip(0, 255)
        np.testing.assert_allclose(pillow_bicubic_float(x, height, width)[0, 1].numpy(), want, atol=1e-3)

    def test_gives_tensorflows_grid(self, h: int, w: int, height: int, width: int) -> None:
        from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

        x = pictures(1, h, w).permute(0, 3, 1, 2).float()
        want = interpolate_bilinear_2d_like_tensorflow1x(x, size=(height, width), align_corners=False)
        torch.testing.assert_close(tensorflow_bilinear(x, height, width), want, atol=1e-3, rtol=0)


@pytest.mark.parametrize(("h", "w"), [(256, 256), (240, 320), (300, 200)])
def test_clip_preprocessing_is_open_clips(h: int, w: int) -> None:
    from open_clip.transform import image_transform

    transform = image_transform(224, is_train=False)
    x = pictures(2, h, w)
    want = torch.stack([transform(Image.fromarray(p.numpy())) for p in x])
    torch.testing.assert_close(preprocess(x), want, atol=1e-6, rtol=0)


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random file in the layout that torch-fidelity publishes."""
    torch.manual_seed(0)
    network = inception.FidInception()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    state = {k: v for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")}
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(state | {"fc.weight": torch.randn(1008, 2048), "fc.bias": torch.randn(1008)}, path)
    return path


class TestInception:
    @pytest.mark.parametrize("size", [299, 128])
    def test_is_torch_fidelitys(self, inception_file: Path, size: int) -> None:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        oracle = FeatureExtractorInceptionV3("oracle", ["2048"], feature_extractor_weights_path=str(inception_file))
        ours = InceptionFeatures(inception.load(inception_file), "0" * 64, resize="tf1")
        x = pictures(2, size, size)
        with exact_arithmetic():
            want = oracle(x.permute(0, 3, 1, 2))[0]
        got = ours(x[None])
        assert got.shape == (1, 2, 2048)
        torch.testing.assert_close(got[0], want, atol=1e-5, rtol=1e-4)

    def test_recipes_have_names_and_differ(self, inception_file: Path) -> None:
        network = inception.load(inception_file)
        extractors = [InceptionFeatures(network, "", resize=resize) for resize in ("clean", "tf1", "torch")]
        assert len({e.recipe for e in extractors}) == 3
        with pytest.raises(ValueError, match="bilinear"):
            InceptionFeatures(network, "", resize="bilinear")

    def test_takes_only_its_size(self, inception_file: Path) -> None:
        with pytest.raises(ValueError, match="299"):
            inception.load(inception_file)(torch.zeros(1, 3, 256, 256))


def tiny_clip() -> Clip:
    import open_clip
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    torch.manual_seed(0)
    network = CLIP(
        32,
        CLIPVisionCfg(layers=1, width=64, head_width=32, patch_size=32, image_size=224),
        CLIPTextCfg(context_length=77, vocab_size=49408, width=32, heads=2, layers=1),
    )
    return Clip(network, open_clip.get_tokenizer("ViT-B-32"))


class TestClip:
    def test_features_of_frames_and_captions(self) -> None:
        extractor = ClipFeatures(tiny_clip(), "0" * 64)
        x = pictures(6, 64, 64).unflatten(0, (2, 3))
        got = extractor(x)
        assert got.shape == (2, 3, 32)
        torch.testing.assert_close(got[1, 2], extractor(x[1:, 2:])[0, 0], rtol=1e-4, atol=1e-5)
        texts = extractor.captions(["a dog", "a cat " * 80])
        assert texts.shape == (2, 32)
        assert not torch.allclose(texts[0], texts[1])

    def test_long_captions_keep_the_end_token(self) -> None:
        clip = tiny_clip()
        tokens = clip.tokenizer(["word " * 200])[0]
        assert len(tokens) == 77
        assert int(tokens[-1]) == 49407


def test_motion_of_still_and_blinking_videos() -> None:
    still = torch.full((1, 4, 8, 8, 3), 100, dtype=torch.uint8)
    blinking = still.clone()
    blinking[:, 1::2] = 151
    got = MotionFeatures()(torch.cat([still, blinking]))
    assert torch.equal(got[0], torch.zeros(3))
    torch.testing.assert_close(got[1], torch.full((3,), 0.2))


def test_exact_arithmetic_restores_what_it_found() -> None:
    before = torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    with exact_arithmetic():
        assert not torch.backends.cudnn.allow_tf32
        assert not torch.backends.cudnn.benchmark
        assert not torch.is_grad_enabled()
    assert torch.backends.cudnn.benchmark
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = before
