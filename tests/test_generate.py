import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from tiny_model import read_tiny_parts, tiny_card, tiny_unet

from t2v import checkpoint, generate
from t2v.diffusion.sampling import Sampler
from t2v.models.autoencoder import Autoencoder
from t2v.models.frozen import Frozen
from t2v.models.text_encoder import TextEncoder
from t2v.pipeline import TextToVideoPipeline
from t2v.video import decode_clip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    read_tiny_parts(monkeypatch)
    monkeypatch.chdir(tmp_path)
    write = {"unet.safetensors": lambda path: checkpoint.save_weights(tiny_unet(1), path, torch.float16)}
    return checkpoint.write(tmp_path / "models" / "step-7", write, tiny_card())


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    GlobalHydra.instance().clear()
    monkeypatch.setattr(sys, "argv", ["t2v-generate", *arguments])
    generate.main()


def test_one_prompt(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    before = dict(os.environ)
    run(monkeypatch, "prompt=A red, (big) circle's way: left", f"checkpoint={folder}", "device=cpu", "output=here", "seed=3")
    assert dict(os.environ).get("HYDRA_FULL_ERROR") == before.get("HYDRA_FULL_ERROR")  # what this process starts next reports as usual
    path = Path("here/0000-a-red-big-circle-s-way-left-seed3.mp4")
    assert {file.name for file in tmp_path.iterdir()} == {"models", "here"}  # no outputs/, no log
    assert list((tmp_path / "here").iterdir()) == [tmp_path / path]
    printed = capsys.readouterr().out
    assert str(path) in printed
    assert "ddim, 3 steps, guidance 2, seed 3" in printed
    frames, _ = decode_clip(path.read_bytes(), num_frames=None, fps=None, size=None)
    assert frames.shape == (4, 32, 48, 3)
    expected = TextToVideoPipeline.from_pretrained(folder, device="cpu")("A red, (big) circle's way: left", seed=3)
    assert (frames.float() - expected.float()).abs().mean() < 12  # H.264 in between


def test_several_prompts_and_every_option(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("prompts.txt").write_text("\ufeffa cat, one\n\n  a dog  \na cat, one\n", encoding="utf-8")
    options = [
        "sampler=dpm",
        "steps=2",
        "guidance=1",
        "frames=2",
        "height=16",
        "width=24",
        "fps=4",
        "batch_size=2",
        "dtype=float32",
        "ema=false",
    ]
    run(monkeypatch, "prompts=prompts.txt", f"checkpoint={folder}", "output=some where/a=b", *options)
    names = sorted(path.name for path in Path("some where/a=b").iterdir())
    assert names == ["0000-a-cat-one-seed0.mp4", "0001-a-dog-seed0.mp4", "0002-a-cat-one-seed0.mp4", "contact-sheet-seed0.mp4"]
    frames, _ = decode_clip(Path("some where/a=b", names[0]).read_bytes(), num_frames=None, fps=None, size=None)
    assert frames.shape == (2, 16, 24, 3)
    printed = capsys.readouterr().out
    assert "dpm++, 2 steps, guidance 1, seed 0" in printed
    assert "3 videos of 2 frames of 24 x 16" in printed
    sheet, _ = decode_clip(Path("some where/a=b", names[3]).read_bytes(), num_frames=None, fps=None, size=None)
    assert sheet.shape[0] == 2
    assert sheet.shape[2] > 2 * 24


def test_the_shipped_model_is_the_default(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "SHIPPED", folder)
    run(monkeypatch, "prompt=a cat", "frames=1")
    assert [path.name for path in Path("generated").iterdir()] == ["0000-a-cat-seed0.mp4"]


def test_cut_prompts_are_told(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run(monkeypatch, f"prompt={'very ' * 80}long", f"checkpoint={folder}", "frames=1", "steps=1")
    assert "warning: prompt 0 has 83 tokens, of which the first 77 are read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "say what to show"),
        (["prompt="], "the prompt is empty"),
        (["prompt=  "], "the prompt is empty"),
        (["prompt=a cat", "prompts=file"], "one of the two"),
        (["prompts=nowhere.txt"], "prompts=nowhere.txt cannot be read: No such file"),
        (["prompts=."], "prompts=. cannot be read: Is a directory"),
        (["prompts=models/step-7/unet.safetensors"], "is not a text file in UTF-8"),
        (["prompts=/dev/null"], "holds no prompt"),
        (["prompt=a cat", "checkpoint=nowhere"], "there is no checkpoint at nowhere"),
        (["prompt=a cat", "checkpoint=models"], "models is not a checkpoint"),
        (["prompt=a cat", "checkpoint=a", "weights=diffusers:b"], "exclude each other"),
        (["prompt=a cat", "weights=models"], "write weights=diffusers:DIR or weights=modelscope:DIR"),
        (["prompt=a cat", "weights=diffusers:nowhere"], "there is no folder nowhere"),
        (["prompt=a cat", "weights=modelscope:models"], "text2video_pytorch_model.pth"),
        (["prompt=a cat", "checkpoint=models/step-7", "steps=0"], "num_steps is 0"),
        (["prompt=a cat", "checkpoint=models/step-7", "guidance=-1"], "guidance scale is -1"),
        (["prompt=a cat", "checkpoint=models/step-7", "height=30"], "take 32"),
        (["prompt=a cat", "checkpoint=models/step-7", "dtype=int8"], "dtype=int8 is unknown; there are float32"),
        (["prompt=a cat", "checkpoint=models/step-7", "device=teapot"], "device teapot is unknown"),
        (["prompt=a cat", "checkpoint=models/step-7", "device=cuda:77"], "device cuda:77 is not here"),
        (["prompt=a cat", "sampler=dmp"], "Did you mean"),
        (["prompt=a cat", "fps=-3"], "fps=-3 must be a number from 0.1 to 240"),
        (["prompt=a cat", "fps=slow"], "fps=slow must be a number"),
        (["prompt=a cat", "frames=16.5"], "frames=16.5 must be a whole number"),
        (["prompt=a cat", "guidance=high"], "guidance=high must be a number"),
        (["prompt=a cat", "fps=inf"], "fps=inf must be a number from 0.1 to 240"),
        (["prompt=a cat", "frames=0"], "frames=0 must be a whole number of at least 1"),
        (["prompt=a cat", "seed=null"], "seed=null is nothing where conf/ has a whole number, 0"),
        (["prompt=a cat", "steps=true"], "steps=True must be a whole number"),
        (["prompt=a cat", "seed=one"], "seed=one is a word where conf/ has a whole number, 0"),
        (["promt=a cat"], "Did you mean prompt"),
        (["prompt=a cat", "checkpoint=models/step-7", "output=/proc/here"], "cannot write to /proc/here"),
    ],
)
def test_mistakes_are_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, *arguments)
    assert caught.value.code not in (0, None)
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1
    assert not list(Path(".").glob("**/*.mp4"))


@pytest.mark.parametrize(
    "prompt",
    [
        "a red, circle",
        "it's (a) [b] {c: d}",
        'say "hi"',
        "back\\slash",
        "end\\",
        "a \\' b",
        "100% = $HOME #1 @ ~ !",
        "123",
        "日本 é",
        "x=${y}",
    ],
)
def test_prompts_mean_nothing_to_hydra(prompt: str) -> None:
    override = OverridesParser.create().parse_override(generate.protect(f"prompt={prompt}"))
    assert override.key_or_group == "prompt"
    assert str(override.value()).replace("\\${", "${") == prompt


def test_hydras_own_syntax_is_left_alone() -> None:
    for argument in ("seed=1,2", "prompt='quoted, already'", "sampler=dpm", "--cfg", "prompt=null", "checkpoint=null"):
        assert generate.protect(argument) == argument


def test_file_names() -> None:
    assert generate.slug("A red, circle; 3/4 of ../it!") == "a-red-circle-3-4-of-it"
    assert generate.slug("?!") == "prompt"
    assert len(generate.slug("word " * 100)) <= 60
    assert "/" not in generate.slug("a/b\\c\0d")


def test_help_is_quick_and_leaves_nothing(tmp_path: Path) -> None:
    root = str(Path(generate.__file__).parents[1])
    for flags in (["--help"], ["--cfg", "job"]):
        began = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])  # processor time: other work on the machine does not count
        command = [sys.executable, "-m", "t2v.generate", *flags]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": root})
        assert done.returncode == 0, done.stderr
        assert "prompt" in done.stdout
        assert sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]) - began < 3
    assert list(tmp_path.iterdir()) == []


def test_a_whole_process_says_what_matters_only(tmp_path: Path) -> None:
    """Real parts, read by name from the checkpoint; no warnings of third parties."""
    levels = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4, "block_out_channels": [8] * 4}
    AutoencoderKL(**levels, norm_num_groups=4).save_pretrained(tmp_path / "autoencoder")
    unet = tiny_unet()
    frozen = Frozen(Autoencoder.from_pretrained(tmp_path / "autoencoder"), TextEncoder.random(width=32))
    card = checkpoint.describe(unet, frozen, Sampler("ddim", 2), sample=tiny_card().sample, step=1)
    checkpoint.write(tmp_path / "model", {"unet.safetensors": lambda path: checkpoint.save_weights(unet, path)}, card)
    command = [sys.executable, "-m", "t2v.generate", "prompt=a cat, of course", "checkpoint=model", "device=cpu", "frames=1", "output=here"]
    environment = {**os.environ, "PYTHONPATH": str(Path(generate.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[:2] == ["ddim, 2 steps, guidance 9, seed 0", "here/0000-a-cat-of-course-seed0.mp4"]
    assert lines[2].startswith("1 video of 1 frame of 48 x 32 in ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["autoencoder", "here", "model"]


def test_nothing_heavy_is_imported_at_the_top() -> None:
    code = "import sys, t2v.generate; print([name for name in ('torch', 'numpy', 'diffusers', 'av', 'PIL') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
