from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from pytorch_lightning import Trainer

from t2v.batch import ClipBatch
from t2v.data.laion import laion
from t2v.data.shapes import shards
from t2v.data.webvid import webvid
from t2v.models.autoencoder import Autoencoder
from t2v.training.autoencoder_module import AutoencoderModule, AutoencoderScore, busiest, from_unit, measure, psnr, to_unit
from t2v.training.datamodules import LAIONDataModule, MixtureDataModule, WebVidDataModule
from t2v.training.ema import EMA
from t2v.training.learning_rate import constant
from t2v.training.mixture import JointMixture


def tiny_module(kl_weight: float = 1e-4, **arguments: Any) -> AutoencoderModule:
    torch.manual_seed(0)
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 8, 8),
        norm_num_groups=2,
        mid_block_add_attention=False,
        sample_size=64,
    )
    return AutoencoderModule(model, partial(torch.optim.AdamW, lr=3e-3), constant(), EMA(0.9), kl_weight, **arguments)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> MixtureDataModule:
    root = tmp_path_factory.mktemp("shapes")
    images = laion(shards(root, "image", 32, samples_per_shard=16, processes=1), size=64, num_readers=2)
    videos = webvid(shards(root, "video", 8, samples_per_shard=4, processes=1), size=64, num_frames=2, num_readers=2)
    return MixtureDataModule(
        JointMixture(0.75),
        LAIONDataModule(images, batch=6, micro_batch=6, num_workers=0),
        WebVidDataModule(videos, batch=2, micro_batch=2, num_workers=0),
    )


def fit(module: AutoencoderModule, data: MixtureDataModule, steps: int, folder: Path) -> Trainer:
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(module, datamodule=data)
    return trainer


def test_frames_to_unit_range_and_back_are_exact() -> None:
    frames = torch.arange(256, dtype=torch.uint8).repeat(3).reshape(1, 16, 16, 3)
    unit = to_unit(frames)
    assert unit.shape == (1, 3, 16, 16)
    assert (unit.min(), unit.max()) == (-1, 1)
    assert torch.equal(from_unit(unit), frames)
    assert from_unit(torch.tensor([-3.0, 3.0]).reshape(1, 1, 1, 2)).flatten().tolist() == [0, 255]


def test_psnr_of_known_errors() -> None:
    assert psnr(255**2) == 0
    assert psnr(65.025) == pytest.approx(30)
    assert math.isfinite(psnr(0))


def test_the_posterior_starts_narrow_and_kl_is_per_latent_value() -> None:
    module = tiny_module()
    frames = torch.zeros(2, 3, 64, 64)
    posterior = module.autoencoder.encode(frames).latent_dist
    assert (posterior.std < 0.2).all()
    reconstruction, kl = module.losses(frames, torch.zeros_like(posterior.mean))
    expected = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar)
    assert reconstruction.shape == kl.shape == (2,)
    assert torch.allclose(kl, expected.mean((1, 2, 3)), rtol=1e-4)
    with pytest.raises(ValueError, match="kl_weight"):
        tiny_module(kl_weight=-1.0)


def test_the_busiest_window_is_the_one_with_the_shape() -> None:
    frames = torch.full((3, 3, 64, 64), -0.5)
    frames[0, :, 2:10, 50:60] = 1.0
    frames[1, 0, 28:36, 28:36] = 1.0
    windows = busiest(frames, 32)
    assert windows.shape == (3, 3, 32, 32)
    assert torch.equal(windows[0], frames[0, :, :32, 32:])
    assert torch.equal(windows[1], frames[1, :, 16:48, 16:48])
    assert (windows[2] == -0.5).all()
    with pytest.raises(ValueError, match="window"):
        tiny_module(window=20, window_steps=1)


def test_the_same_error_weighs_more_in_a_faint_frame() -> None:
    module = tiny_module(faint=0.01)
    frames = torch.zeros(2, 3, 64, 64)
    frames[0, :, :8, :8], frames[1, :, :8, :8] = 0.1, 1.0
    answer = frames + 0.2
    module.autoencoder.decode = lambda _: SimpleNamespace(sample=answer)
    reconstruction, _ = module.losses(frames, torch.zeros(2, 4, 8, 8))
    error = 0.2**2 + 0.1 * 0.2
    for k in range(2):
        assert float(reconstruction[k]) == pytest.approx(error * 0.01 / (float(frames[k].flatten(1).var(1).mean()) + 0.01), rel=1e-4)
    assert reconstruction[0] > 2 * reconstruction[1]


def test_a_wrong_outline_weighs_more_than_the_same_error_spread_out() -> None:
    module = tiny_module(sharpness=2.0)
    frames = torch.zeros(2, 3, 64, 64)
    answer = torch.stack([torch.full((3, 64, 64), 0.5), 0.5 * (torch.arange(64) % 2 * 2.0 - 1).expand(3, 64, 64)])  # flat; columns in turns
    module.autoencoder.decode = lambda _: SimpleNamespace(sample=answer)
    flat, striped = module.losses(frames, torch.zeros(2, 4, 8, 8))[0].tolist()
    assert flat == pytest.approx(0.25 + 0.05)
    assert striped == pytest.approx(0.25 + 0.05 + 2 * 1.0)  # neighbours in a row differ by 1, in a column by 0


def test_noise_on_the_latents_is_of_their_own_size() -> None:
    module, seen = tiny_module(latent_noise=0.5), []
    module.autoencoder.decode = lambda latents: (seen.append(latents), SimpleNamespace(sample=frames))[1]
    frames = torch.randn(3, 3, 64, 64).clamp(-1, 1)
    posterior = module.autoencoder.encode(frames).latent_dist
    for noise in (torch.zeros_like(posterior.mean), torch.ones_like(posterior.mean)):
        module.losses(frames, noise)
    spread = (posterior.var + 0.25 * posterior.mean.var()).sqrt()
    assert torch.allclose(seen[1] - seen[0], spread, atol=1e-5)
    assert (spread > 1.5 * posterior.std).any()
    with pytest.raises(ValueError, match="latent_noise is -1"):
        tiny_module(latent_noise=-1.0)


def test_the_decoder_alone_learns_and_latents_keep_their_scale(data: MixtureDataModule, tmp_path: Path) -> None:
    first = tiny_module().autoencoder
    first.register_to_config(scaling_factor=0.7)
    first.save_pretrained(tmp_path / "first")
    module = tiny_module(start=str(tmp_path / "first"), decoder_only=True)
    trainer = fit(module, data, 2, tmp_path)
    AutoencoderScore(clips=6, images=4, frames=2).evaluate(trainer, module)
    second = AutoencoderKL.from_pretrained(tmp_path / "autoencoder").float()
    assert second.config["scaling_factor"] == 0.7
    frames = torch.randn(2, 3, 64, 64)
    half = AutoencoderKL.from_pretrained(tmp_path / "first").half().float()  # what is kept is in half precision
    assert torch.equal(second.encode(frames).latent_dist.parameters, half.encode(frames).latent_dist.parameters)
    assert not torch.equal(second.decoder.conv_out.weight, half.decoder.conv_out.weight)
    with pytest.raises(ValueError, match="keeps the encoder"):
        tiny_module(decoder_only=True)


def test_it_goes_on_from_a_folder(tmp_path: Path) -> None:
    first = tiny_module()
    torch.nn.init.normal_(first.autoencoder.decoder.conv_in.weight)
    first.autoencoder.save_pretrained(tmp_path)
    second = tiny_module(start=str(tmp_path))
    for name, weight in first.autoencoder.state_dict().items():
        assert torch.equal(second.autoencoder.state_dict()[name], weight), name
        assert torch.equal(second.average.state_dict()[name], weight), name


def test_windows_first_then_whole_frames(data: MixtureDataModule, tmp_path: Path) -> None:
    module = tiny_module(window=32, window_steps=2)
    sizes: list[int] = []
    losses = module.losses
    module.losses = lambda frames, noise: (sizes.append(frames.shape[-1]), losses(frames, noise))[1]  # type: ignore[method-assign]
    fit(module, data, 3, tmp_path)
    assert sizes == [32, 32, 32, 32, 64, 64]  # two streams a step


def test_it_learns_weighs_the_streams_and_moves_the_average(data: MixtureDataModule, tmp_path: Path) -> None:
    module = tiny_module()
    first = {name: weight.clone() for name, weight in module.average.state_dict().items()}
    seen: list[float] = []
    step = module.training_step

    def watched(batch: dict[str, ClipBatch], batch_idx: int) -> torch.Tensor:
        assert {name: len(clips) for name, clips in batch.items()} == {"image": 6, "video": 2}
        loss = step(batch, batch_idx)
        if not seen:
            logged = module.trainer.callback_metrics
            parts = {name: logged[f"loss/{name}"] + module.kl_weight * logged[f"kl/{name}"] for name in batch}
            assert float(loss.detach()) == pytest.approx(float(0.75 * parts["image"] + 0.25 * parts["video"]), rel=1e-4)
        seen.append(float(loss.detach()))
        return loss

    module.training_step = watched  # type: ignore[method-assign]
    trainer = fit(module, data, 12, tmp_path)
    assert trainer.global_step == 12
    assert sum(seen[-3:]) < 0.7 * sum(seen[:3])
    changed = [not torch.equal(first[name], weight) for name, weight in module.average.state_dict().items()]
    assert all(changed)
    assert any(not torch.equal(a, b) for a, b in zip(module.average.parameters(), module.autoencoder.parameters()))


def test_the_score_writes_a_folder_that_the_frozen_autoencoder_reads(data: MixtureDataModule, tmp_path: Path) -> None:
    module = tiny_module()
    trainer = fit(module, data, 2, tmp_path)
    table = AutoencoderScore(clips=6, images=4, frames=2).evaluate(trainer, module)
    assert "psnr clips" in table
    report = json.loads((tmp_path / "autoencoder_score.json").read_text())
    assert report["checker_clips_original"] == 1.0
    assert report["psnr_clips"] >= report["psnr_clips_worst_frame"]
    assert float(trainer.callback_metrics["autoencoder/psnr_clips"]) == pytest.approx(report["psnr_clips"])
    autoencoder = Autoencoder.from_pretrained(tmp_path / "autoencoder")
    assert (autoencoder.factor, autoencoder.channels) == (8, 4)
    assert autoencoder.scaling_factor == pytest.approx(1 / report["latent_std"], rel=1e-3)


SHIPPED = "package:shapes_autoencoder"


@pytest.fixture(scope="module")
def shipped() -> Autoencoder:
    return Autoencoder.from_pretrained(SHIPPED)


def test_the_shipped_autoencoder_meets_its_figures_on_fresh_frames(shipped: Autoencoder) -> None:
    report = measure(shipped.model, clips=36, images=200, frames=8, seed=77)
    for deck in ("clips", "clips_of_image_only", "images"):
        assert report[f"psnr_{deck}"] >= 34, report
        assert report[f"checker_{deck}_original"] >= 0.99, report
        assert report[f"checker_{deck}_reconstructed"] >= 0.99 * report[f"checker_{deck}_original"], report
    assert shipped.scaling_factor * report["latent_std"] == pytest.approx(1, abs=0.05)
    assert abs(report["latent_mean"]) * shipped.scaling_factor < 0.5


def test_the_shipped_autoencoder_is_small_and_its_two_stages_give_unit_latents(shipped: Autoencoder) -> None:
    from t2v.data.shapes import held_out_specs, render

    assert sum(p.numel() for p in shipped.model.parameters()) < 1e6
    frames = torch.stack([render(spec, 8) for spec in held_out_specs(4, seed=78)])
    moments = shipped.moments(frames)
    assert moments.shape == (4, 8, 8, 8, 8)
    latents = shipped.sample(moments, torch.randn(4, 4, 8, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert float(latents.std()) == pytest.approx(1, abs=0.15)
    assert psnr(float((shipped.decode(latents).float() - frames.float()).square().mean())) >= 29  # also from samples, not only from means
