"""Every shipped sweep runs: two of its jobs at a tiny size end in their table."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from trainings import Trainings

from t2v.configuration import config_dir

pytestmark = pytest.mark.slow

TWO = {  # the first two jobs of each sweep
    "claim1": ("shapes_gpu", "mixture.image_weight=0,0.5 seed=0"),
    "claim2": ("shapes_motion", "unet=motion_frames,motion_positions seed=0"),
    "claim3": ("shapes_motion", "init.zero_temporal_outputs=true,false seed=0"),
    "claim4": ("shapes_motion", "unet.num_temporal_convs=1,8 seed=0"),
    "dropout": ("shapes_motion", "module.caption_dropout=0,0.2 seed=0"),
    "noise": ("shapes_motion", "schedule.shared_noise=0,0.5 seed=0"),
    "timesteps": ("shapes_motion", "timesteps=uniform,shifted seed=0"),
    "images": ("shapes_gpu", "mixture.image_weight=0,0.125"),
    "guidance": ("shapes", "sampler.guidance.scale=1,9"),
    "seeds": ("shapes", "seed=0,1"),
    "paths": ("shapes_gpu", "training_path=plain,all seed=0"),
}
TINY = (
    "data.video.urls={_target_: t2v.data.shapes.shards, root: '${paths.data}/shapes', media: video, count: 32}",
    "trainer={max_steps: 2, accelerator: cpu}",
    "lr_schedule.warmup_steps=1",
    "batch={image: 2, video: 2}",
    "micro_batch={image: 2, video: 2}",
    "unet.block_out_channels=[16,32]",
    "sampler.num_steps=2",
    "loader.num_workers=0",
    "++callbacks.score.num_prompts=4",
    "++callbacks.score.every_n_steps=1",
    "++callbacks.samples=null",
)
IMAGES = "data.image.urls={_target_: t2v.data.shapes.shards, root: '${paths.data}/shapes', media: image, count: 128}"
MORE = {
    "shapes_motion": ("callbacks.evaluation.protocol.num_videos=8", "callbacks.evaluation.dataset.videos=8"),
    "shapes_gpu": ("++callbacks.image_only=null", "++callbacks.final=null", "++callbacks.unseen=null", "metric=score/all"),
}


def test_every_sweep_is_here() -> None:
    assert sorted(TWO) == sorted(path.stem for path in (config_dir() / "sweep").glob("*.yaml"))


@pytest.mark.parametrize("sweep", TWO)
def test_two_jobs_end_in_their_table(trainings: Trainings, sweep: str) -> None:
    experiment, jobs = TWO[sweep]
    base = (f"experiment={experiment}", *TINY, *MORE.get(experiment, ()), *([] if experiment == "shapes_motion" else [IMAGES]))
    if sweep in ("claim1", "claim3"):
        spatial = ("run=start", "unet.num_temporal_convs=0", "unet.num_temporal_attentions=0", "trainer.max_steps=2", "metric=null")
        code, output = trainings.run(*spatial, "callbacks.score=null", base=(f"experiment={experiment}", *base[1:]))
        assert code == 0, output
        base = (*base, f"init.path={trainings.folder / experiment / 'runs' / 'start'}")
    if sweep == "paths":
        base = (
            f"experiment={experiment}",
            *(part for part in TINY if "callbacks" not in part),
            IMAGES,
            "callbacks.training_log.every_n_steps=2",
        )
    if sweep == "claim2":  # one of them as the records do it: all jobs at once
        base = (*base, "hydra/launcher=side_by_side")
    code, output = trainings.run("-m", f"sweep={sweep}", *jobs.split(), base=base)
    assert code == 0, output
    assert len(re.findall(r"^\| [01] \| ", output, re.MULTILINE)) == 2, output
    if sweep == "paths":  # losses, and no scores over time
        assert re.search(r"^\| training_path=all \| loss/video \| [\d.]+ \| - \| \S+ \| [-0] \| [-0] \|$", output, re.MULTILINE), output
        return
    drawn = re.search(r"^curves   (.*)$", output, re.MULTILINE)
    assert drawn, output
    assert Path(drawn[1]).read_text().count("<polyline") >= (1 if sweep == "seeds" else 2)  # seeds are drawn as their mean


def test_what_was_learned_at_64_goes_on_at_128(trainings: Trainings) -> None:
    """From the shipped weights: experiment=shapes_gpu_128."""
    tiny = [part for part in TINY if not part.startswith(("unet", "data"))]
    base = ("experiment=shapes_gpu_128", "data.video.urls.count=32", "data.image.urls.count=128", *tiny, *MORE["shapes_gpu"])
    code, text = trainings.run("run=larger", base=base)
    assert code == 0, text
    record = json.loads((trainings.folder / "shapes_gpu_128" / "runs" / "larger" / "scores.jsonl").read_text().splitlines()[0])
    assert (record["step"], record["frames"]) == (0, 16)
    assert record["score"]["background"]["accuracy"] == 1.0  # known before the first step


def test_latents_stand_in_for_clips(trainings: Trainings) -> None:
    """As the records of the claims are made."""
    output = trainings.folder / "latents"
    made = ["data=shapes_motion", TINY[0], f"paths.data={trainings.data}", "autoencoder=shapes", "num_workers=0", f"output={output}"]
    subprocess.run([sys.executable, "-m", "t2v.encode", *made], check=True, capture_output=True, cwd=trainings.folder)
    base = ("experiment=shapes_motion", "data=shapes_motion_latents", f"data.video.urls={output}", *TINY[1:])
    code, text = trainings.run("run=latents", "callbacks.evaluation=null", base=base)
    assert code == 0, text
    assert "score: motion prompts, 16 frames" in text
