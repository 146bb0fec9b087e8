import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.schedulers import DDIMScheduler
from tiny_model import read_tiny_parts, tiny_card, tiny_frozen, tiny_unet
from torch import Tensor

from t2v import checkpoint
from t2v.diffusion.guidance import ClassifierFreeGuidance
from t2v.diffusion.randomness import normal
from t2v.diffusion.recording import CUDAGraphs
from t2v.diffusion.sampling import Sampler
from t2v.diffusion.schedule import NoiseSchedule
from t2v.models.autoencoder import Autoencoder
from t2v.models.frozen import Frozen
from t2v.models.text_encoder import TextEncoder
from t2v.models.unet import VideoUNet
from t2v.pipeline import TextToVideoPipeline

PROMPTS = ["a red circle moving left", "a blue square", "a green star moving up slowly", "nothing much", "a yellow triangle"]
SAMPLE = {"frames": 4, "height": 32, "width": 48, "fps": 3}


@pytest.fixture(scope="module")
def unet() -> VideoUNet:
    return tiny_unet()


@pytest.fixture
def pipeline(unet: VideoUNet) -> TextToVideoPipeline:
    return TextToVideoPipeline(unet, tiny_frozen(), Sampler("ddim", 4, ClassifierFreeGuidance(5.0)), sample=SAMPLE)


def test_shapes(pipeline: TextToVideoPipeline) -> None:
    video = pipeline(PROMPTS[0])
    assert (video.shape, video.dtype, video.device.type) == ((4, 32, 48, 3), torch.uint8, "cpu")
    assert pipeline(PROMPTS[:2], num_frames=2, height=40, width=24).shape == (2, 2, 40, 24, 3)
    assert pipeline(PROMPTS[:1]).shape == (1, 4, 32, 48, 3)
    assert video.float().std() > 5


def test_released_sizes_by_default(unet: VideoUNet) -> None:
    assert TextToVideoPipeline(unet, tiny_frozen()).sample == {"frames": 16, "height": 256, "width": 256, "fps": 8}


@torch.no_grad()
def test_ddim_50_equals_a_plain_diffusers_loop(unet: VideoUNet) -> None:
    """Latents of the whole pipeline against diffusers' own scheduler, two passes a step, written out."""
    frozen = tiny_frozen()
    seen: list[Tensor] = []
    decode = frozen.autoencoder.decode
    frozen.autoencoder.decode = lambda latents: (seen.append(latents), decode(latents))[1]  # type: ignore[method-assign]
    TextToVideoPipeline(unet, frozen, sample=SAMPLE)(PROMPTS[:2], seed=3)

    z = normal([("sample", 3, 0), ("sample", 3, 1)], (4, 4, 4, 6))
    text, empty = frozen.text_encoder.encode(PROMPTS[:2]), frozen.text_encoder.encode(["", ""])
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )
    scheduler.set_timesteps(50)
    assert scheduler.timesteps.tolist() == list(range(981, 0, -20))
    for t in scheduler.timesteps:
        unconditional, conditional = unet(z, t, empty), unet(z, t, text)
        z = scheduler.step(unconditional + 9.0 * (conditional - unconditional), t, z, eta=0.0).prev_sample
    assert z.std() > 0.5
    assert (seen[0] - z).abs().max() <= 1e-4


@pytest.mark.parametrize("scheduler", ["ddim", "dpm++", "ddpm"])
def test_alone_as_in_a_batch(unet: VideoUNet, scheduler: str) -> None:
    """Bitwise the same noise; frames within 1/255 on 99.9 % of the pixels."""
    pipeline = TextToVideoPipeline(unet, tiny_frozen(), Sampler(scheduler, 5, ClassifierFreeGuidance(5.0)), sample=SAMPLE)
    together = pipeline(PROMPTS, seed=11)
    for other in (
        torch.stack([pipeline([prompt], seed=11, indices=[index])[0] for index, prompt in enumerate(PROMPTS)]),
        pipeline(PROMPTS, seed=11, batch_size=2),
        pipeline(PROMPTS[::-1], seed=11, indices=[4, 3, 2, 1, 0]).flip(0),
    ):
        difference = (other.int() - together.int()).abs()
        assert (difference <= 1).float().mean() >= 0.999
    assert (pipeline(PROMPTS, seed=12).int() - together.int()).abs().float().mean() > 1
    assert (together[0].int() - pipeline(PROMPTS[0], seed=11, indices=[1]).int()).abs().float().mean() > 1


def test_the_first_prompts_noise_is_that_of_a_single_prompt(pipeline: TextToVideoPipeline) -> None:
    assert ((pipeline(PROMPTS[0]).int() - pipeline(PROMPTS)[0].int()).abs() <= 1).float().mean() >= 0.999


@pytest.mark.parametrize("frames", [1, 8, 16, 24, 32])
def test_one_set_of_weights_makes_any_number_of_frames(pipeline: TextToVideoPipeline, frames: int) -> None:
    video = pipeline(PROMPTS[0], num_frames=frames, height=16, width=16)
    assert video.shape == (frames, 16, 16, 3)


def test_it_begins_with_the_noise_of_the_models_schedule(unet: VideoUNet, pipeline: TextToVideoPipeline) -> None:
    shared = TextToVideoPipeline(
        unet, pipeline.frozen, replace(pipeline.sampler, schedule=NoiseSchedule(shared_noise=0.9)), sample=pipeline.sample
    )
    assert not torch.equal(shared("a dog", num_frames=2), pipeline("a dog", num_frames=2))


def test_global_random_state_is_left_alone(pipeline: TextToVideoPipeline) -> None:
    before = torch.get_rng_state()
    first = pipeline(PROMPTS[0])
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(pipeline(PROMPTS[0]), first)


def test_nan_is_an_error_and_no_black_video(pipeline: TextToVideoPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = torch.zeros(2, 4, 4, 4, 6)
    broken[1, 0, 0, 0, 0] = torch.nan
    monkeypatch.setattr(Sampler, "sample", lambda *_, **__: broken)
    with pytest.raises(ValueError, match=r"NaN or infinity for prompts \[8\]"):
        pipeline(PROMPTS[:2], indices=[7, 8])


def test_progress_counts_over_batches(pipeline: TextToVideoPipeline) -> None:
    seen: list[tuple[int, int]] = []
    pipeline(PROMPTS[:3], batch_size=2, height=16, width=16, num_frames=1, on_step=lambda done, of: seen.append((done, of)))
    assert seen == [(done, 8) for done in range(1, 9)]


def test_bfloat16(unet: VideoUNet) -> None:
    pipeline = TextToVideoPipeline(tiny_unet(), tiny_frozen(), Sampler("ddim", 4), sample=SAMPLE)
    exact = pipeline(PROMPTS[0]).float()
    rough = pipeline.to("cpu", torch.bfloat16)(PROMPTS[0]).float()
    assert next(pipeline.unet.parameters()).dtype == torch.bfloat16
    assert 0 < (rough - exact).abs().mean() < 10


@pytest.mark.parametrize("prompts", ["", "   ", "\n", ["a cat", ""], ["a cat", " \t"], [], [None]])
def test_empty_prompts_are_refused(pipeline: TextToVideoPipeline, prompts: list[str]) -> None:
    with pytest.raises(ValueError, match="is empty|there is no prompt"):  # noqa: RUF043
        pipeline(prompts)


def test_cut_prompts_warn_with_their_count(pipeline: TextToVideoPipeline) -> None:
    long = "very " * 80 + "long"
    with pytest.warns(UserWarning, match=r"prompt 1 has 83 tokens, of which the first 77 are read: 'very very"):
        pipeline(["short", long], height=8, width=8, num_frames=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipeline(["very " * 75], height=8, width=8, num_frames=1)  # 75 words, start and end: it just fits


def test_counts_of_the_real_tokenizer(unet: VideoUNet) -> None:
    frozen = tiny_frozen()
    frozen.text_encoder = TextEncoder.random(width=32)
    pipeline = TextToVideoPipeline(unet, frozen, Sampler("ddim", 1), sample=SAMPLE)
    assert pipeline.check_prompts(["red " * 75]) == []
    assert pipeline.check_prompts(["red " * 76]) == [f"prompt 0 has 78 tokens, of which the first 77 are read: {('red ' * 76)[:60]!r}..."]
    assert pipeline("a red circle").shape == (4, 32, 48, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_frames": 0}, "num_frames is 0; a video has at least 1 frame"),
        ({"num_frames": 1.5}, "num_frames is 1.5"),
        ({"height": 33}, "height is 33; the autoencoder works in squares of 8 pixels: take 32"),
        ({"width": 4}, "width is 4; the autoencoder works in squares of 8 pixels: take 8"),
        ({"width": -8}, "width is -8"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"indices": [1, 2]}, "2 indices for 1 prompts"),
    ],
)
def test_impossible_sizes(pipeline: TextToVideoPipeline, arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipeline("a cat", **arguments)  # type: ignore[arg-type]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    read_tiny_parts(monkeypatch)
    parts = {
        "unet.safetensors": lambda path: checkpoint.save_weights(tiny_unet(1), path),
        "ema.safetensors": lambda path: checkpoint.save_weights(tiny_unet(2), path),
    }
    return checkpoint.write(checkpoint.step_folder(tmp_path, 7), parts, tiny_card())


def test_from_a_checkpoint(folder: Path) -> None:
    pipeline = TextToVideoPipeline.from_pretrained(folder, device="cpu")
    assert pipeline.sampler.config == tiny_card().sampler
    assert pipeline.sampler.schedule.config == tiny_card().schedule
    assert pipeline.sample == tiny_card().sample
    video = pipeline(PROMPTS[0], seed=4)
    direct = TextToVideoPipeline(tiny_unet(2), tiny_frozen(), pipeline.sampler, sample=SAMPLE)(PROMPTS[0], seed=4)
    assert torch.equal(video, direct)  # the averaged weights
    raw = TextToVideoPipeline.from_pretrained(folder, ema=False, device="cpu")(PROMPTS[0], seed=4)
    assert torch.equal(raw, TextToVideoPipeline(tiny_unet(1), tiny_frozen(), pipeline.sampler, sample=SAMPLE)(PROMPTS[0], seed=4))
    assert not torch.equal(raw, video)
    run = TextToVideoPipeline.from_pretrained(folder.parent.parent, device="cpu", sampler=Sampler("dpm++", 2), dtype=torch.bfloat16)
    assert run.sampler.num_steps == 2
    assert next(run.unet.parameters()).dtype == torch.bfloat16


def test_from_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no checkpoint at"):
        TextToVideoPipeline.from_pretrained(tmp_path / "nowhere")


def test_a_model_of_real_parts_survives_its_checkpoint(tmp_path: Path, unet: VideoUNet) -> None:
    levels = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4, "block_out_channels": [8] * 4}
    AutoencoderKL(**levels, norm_num_groups=4).save_pretrained(tmp_path / "autoencoder")
    frozen = Frozen(Autoencoder.from_pretrained(tmp_path / "autoencoder"), TextEncoder.random(seed=5, width=32))
    before = TextToVideoPipeline(unet, frozen, Sampler("dpm++", 2, ClassifierFreeGuidance(3.0)), sample=SAMPLE)
    card = checkpoint.describe(unet, frozen, before.sampler, sample=SAMPLE, step=1)
    folder = checkpoint.write(tmp_path / "step-1", {"unet.safetensors": lambda path: checkpoint.save_weights(unet, path)}, card)
    after = TextToVideoPipeline.from_pretrained(folder, device="cpu")
    assert torch.equal(after(PROMPTS[:2], seed=6), before(PROMPTS[:2], seed=6))

    (tmp_path / "autoencoder").rename(tmp_path / "moved")
    with pytest.raises(ValueError, match="there is no such file or folder"):
        TextToVideoPipeline.from_pretrained(folder, device="cpu")
    moved = TextToVideoPipeline.from_pretrained(folder, device="cpu", autoencoder=str(tmp_path / "moved"))
    assert torch.equal(moved(PROMPTS[0], seed=6), before(PROMPTS[0], seed=6))
    AutoencoderKL(**levels, norm_num_groups=4).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="the autoencoder built here has sha256"):
        TextToVideoPipeline.from_pretrained(folder, device="cpu", autoencoder=str(tmp_path / "other"))


def test_cuda_graph_replays_the_network_until_it_is_moved(unet: VideoUNet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("t2v.diffusion.recording.recordable", lambda network: True)
    recorded = []

    def record(self: CUDAGraphs, call: Callable[[], Tensor]) -> Callable[[], Tensor]:
        recorded.append(call)
        return call

    monkeypatch.setattr(CUDAGraphs, "__call__", record)
    videos = {}
    for cuda_graph in (False, True):
        pipeline = TextToVideoPipeline(unet, tiny_frozen(), Sampler("ddim", 4), sample=SAMPLE, cuda_graph=cuda_graph)
        videos[cuda_graph] = pipeline(PROMPTS[:2])
        pipeline(PROMPTS[:2])
        assert len(recorded) == cuda_graph
    assert torch.equal(videos[True], videos[False])
    pipeline.to("cpu")(PROMPTS[:2])
    assert len(recorded) == 2
