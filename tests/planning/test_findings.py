"""Each set-up error that the plan can see, and what mends it."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import open_dict

from t2v.configuration import config_dir
from t2v.models.spatio_temporal import CHECKPOINTING
from t2v.plan import examine, plan, ways_to_run
from t2v.planning.findings import Finding, ranks_of_the_mixture, readers_and_shards, run_folder, sizes
from t2v.planning.length import Length
from t2v.planning.report import counted, duration
from t2v.training.mixture import JointMixture, RankMixture, StepPlan


def composed(*overrides: str) -> Any:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        cfg = compose("plan", overrides=list(overrides), return_hydra_config=True)
    HydraConfig.instance().set_config(cfg)
    with open_dict(cfg):
        del cfg["hydra"]
    return cfg


@pytest.fixture(autouse=True)
def hydra_forgets(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `composed` sets ends with the test."""
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)


def mends(found: list[Finding]) -> dict[str, bool]:
    return {finding.mend: finding.error for finding in found}


def test_sizes_name_the_key_and_the_nearest_size() -> None:
    (finding,) = sizes("frames", {"sample.height": 64, "sample.width": 100}, 8)
    assert "100 pixels" in finding.problem
    assert finding.mend in ("sample.width=96", "sample.width=104")


def test_shards_readers_ranks(tmp_path: Path) -> None:
    def found(shards: int, readers: int, ranks: int, workers: int, there: bool = True) -> list[Finding]:
        return list(readers_and_shards("video", [f"{n}.tar" for n in range(shards)], readers, ranks, workers, lambda url: not there))

    assert found(64, 64, 8, 4) == []
    assert mends(found(128, 64, 128, 1)) == {"data.video.num_readers=128": True}
    assert mends(found(999, 64, 8, 5)) == {"loader.num_workers=4": False}
    assert mends(found(999, 64, 10, 4)) == {"data.video.num_readers=80 (before step 1)": False}
    assert mends(found(10, 64, 8, 4)) == {"python -m t2v.repack into at least 32 shards": False}
    (missing,) = found(64, 64, 8, 4, there=False)
    assert missing.error
    assert "64 of 64 shards are not there, 0.tar the first" in missing.problem


def test_the_planned_machines_precision_stays_in_its_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    planned = composed("experiment=shapes_autoencoder", "hardware=h200", f"paths.experiments={tmp_path}", f"paths.data={tmp_path}")
    with contextlib.suppress(ValueError):  # shards that are not there
        plan(planned)
    assert planned.trainer.precision == planned.hardware.precision == "bf16-mixed"
    here = "bf16-mixed" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "32-true"
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        assert compose("train", overrides=["experiment=shapes_autoencoder"]).trainer.precision == here
    typed = composed("experiment=shapes_autoencoder", "hardware=h200", "trainer.precision=32-true", f"paths.experiments={tmp_path}")
    with contextlib.suppress(ValueError):
        plan(typed)
    assert typed.trainer.precision == "32-true"


def test_mixture_rank_wants_eights() -> None:
    assert list(ranks_of_the_mixture(RankMixture(), 16)) == []
    assert list(ranks_of_the_mixture(JointMixture(), 10)) == []
    (finding,) = ranks_of_the_mixture(RankMixture(), 10)
    assert "2 of 10" in finding.problem


def test_run_folder(tmp_path: Path) -> None:
    assert list(run_folder(tmp_path / "new" / "deep", 1000)) == []
    (full,) = run_folder(tmp_path, 2**60)
    assert "callbacks.checkpoints.keep=1" in full.mend
    (file := tmp_path / "file").write_text("")
    (closed,) = run_folder(file / "run", 0)
    assert closed.mend == "paths.experiments=FOLDER"


def test_length_is_that_of_the_busiest_rank() -> None:
    mixture = RankMixture()
    steps = StepPlan.of(mixture, {"image": 175, "video": 57 * 7}, {"image": 175, "video": 57}, 8)
    length = Length(steps, 1000, {"image": 1e12, "video": 10e12}, tflops=100)
    assert length.seconds_per_step(mixture) == pytest.approx(57 * 10 / 100)
    joint = Length(steps, 1000, {"image": 1e12, "video": 10e12}, tflops=100).seconds_per_step(JointMixture())
    assert joint == pytest.approx((22 + 50 * 10) / 100)


def test_words_for_numbers() -> None:
    assert (counted(900), counted(28_800), counted(373.8e6)) == ("900", "28.8 k", "373.8 M")
    assert (duration(40 * 86_400), duration(0.03611)) == ("40.0 days", "0.0361 seconds")


def test_plan_of_a_wrong_set_up(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Everything wrong at once is found at once, without weights, data or a GPU."""
    cfg = composed(
        "experiment=base_256",
        "init=sd21",
        "mixture=rank",
        "trainer.devices=1",
        "data.video.size=250",
        "module.compile=inductor",
        f"paths.experiments={tmp_path / 'file' / 'x'}",
        f"paths.laion='{tmp_path}/{{00000..00009}}.tar'",
        f"paths.webvid={tmp_path / 'nowhere'}",
        f"autoencoder.source={tmp_path / 'nowhere'}",
    )
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="set-up errors"):
        plan(cfg)
    printed = capsys.readouterr().out
    for words in (
        "use mixture=joint",
        "none of the 10 shards exists",
        "mend: data.video.urls=FOLDER",
        "mend: autoencoder.source=FOLDER",
        "mend: text_encoder.path=FILE",
        "mend: init.path=FOLDER",
        "mend: data.video.size=248",
        "set unet.fused_kernels=false",
        "mend: paths.experiments=FOLDER",
    ):
        assert words in printed, (words, printed)


@pytest.mark.parametrize(
    ("overrides", "tflops", "errors", "mends"),
    [
        (("strategy=single",), 376, 1, ["module.cuda_graphs=false", *(f"{which} module.cuda_graphs=false" for which in CHECKPOINTING[1:])]),
        (("strategy=fsdp", "strategy.gather=pass", "unet.gradient_checkpointing=all"), 328, 0, []),
    ],
)
def test_memory_that_graphs_take_and_time_that_they_save(
    overrides: Any, tflops: int, errors: int, mends: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One GPU; a network that fits without what graphs keep of its gradients, and where FSDP moves weights there are none."""
    network = "unet.block_out_channels=[512]", "unet.down_block_types=[DownBlock3D]", "unet.up_block_types=[UpBlock3D]"
    memory = "batch={image: 1, video: 1}", "hardware=h200", "hardware.memory_gib=1.3", "hardware.usable=1"
    places = f"paths.experiments={tmp_path}", f"paths.data={tmp_path}"
    found: list[Finding] = []
    examine(composed("experiment=shapes", "trainer=gpu", *network, "unet.num_temporal_convs=1", *memory, *overrides, *places), found)
    printed = capsys.readouterr().out
    assert f"at {tflops} TFLOP/s" in printed
    assert " or more, not counted" in printed  # of the stream that is not alive when most is
    wrong = [finding for finding in found if finding.error]
    assert len(wrong) == errors
    offered = [mend.removeprefix("unet.gradient_checkpointing=") for finding in wrong for mend in finding.mend.split(" or ")]
    assert [mend for mend in offered if not mend.startswith("micro_batch")] == mends


@pytest.mark.parametrize("strategy", ["single", "ddp", "fsdp"])
def test_where_networks_are_recorded_recomputation_that_cannot_be_is_refused(strategy: str) -> None:
    unet = SimpleNamespace(gradient_checkpointing="all")
    with pytest.raises(ValueError, match=r"module\.cuda_graphs=true cannot record unet\.gradient_checkpointing=all"):
        ways_to_run(unet, composed("experiment=shapes", "trainer=gpu", f"strategy={strategy}"))


def test_compiled_blocks_are_refused_where_networks_are_recorded() -> None:
    unet = SimpleNamespace(gradient_checkpointing="none", config={"fused_kernels": False, "attention_backend": "sdpa"})
    compiled = "experiment=shapes", "trainer=gpu", "module.compile=inductor"
    with pytest.raises(ValueError, match=r"set module\.cuda_graphs=false"):
        ways_to_run(unet, composed(*compiled, "strategy=ddp"))
    with pytest.raises(ValueError, match=r"set module\.cuda_graphs=false"):
        ways_to_run(unet, composed(*compiled, "strategy=fsdp"))
    ways_to_run(unet, composed(*compiled, "strategy=fsdp", "strategy.gather=pass"))


def test_missing_keys_are_findings(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="set-up errors"):
        plan(composed("experiment=shapes", "batch.image=???", "trainer.max_steps=???"))
    printed = capsys.readouterr().out
    assert "mend: batch.image=VALUE" in printed
    assert "mend: trainer.max_steps=VALUE" in printed


@pytest.mark.slow
@pytest.mark.parametrize("init", ["checkpoint", "spatial"])
def test_a_start_from_a_run_is_looked_at(init: str, tmp_path: Path) -> None:
    same = ("experiment=shapes_gpu", f"init={init}", "trainer.devices=1", f"paths.experiments={tmp_path}", f"paths.data={tmp_path}")
    for path, of, wanted in (
        ("package:shapes", 64, ""),
        ("package:shapes", 96, f"{'spatial ' * (init == 'spatial')}layers"),
        ("nowhere", 64, "nowhere"),
    ):
        found: list[Finding] = []
        examine(composed(*same, f"init.path={path}", f"unet.block_out_channels=[{of},{2 * of}]"), found)
        wrong = [finding for finding in found if finding.error]
        assert len(wrong) == bool(wanted)
        assert all(wanted in finding.problem and finding.mend.startswith("init.path=RUN") for finding in wrong)


def test_autoencoder_training(tmp_path: Path) -> None:
    found: list[Finding] = []
    examine(composed("experiment=shapes_autoencoder", "trainer.devices=1", "hardware=cpu", f"paths.experiments={tmp_path}"), found)
    assert not [finding for finding in found if finding.error]


@pytest.mark.slow
@pytest.mark.parametrize("experiment", sorted(path.stem for path in (config_dir() / "experiment").glob("*.yaml")))
def test_every_experiment_can_be_planned(experiment: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Weights and shards that a user brings are stood in for by empty files, which are looked for but never read."""
    for name in ("autoencoder", "text_encoder"):
        (tmp_path / name).mkdir()
    (tmp_path / "autoencoder" / "VQGAN_autoencoder.pth").touch()
    (tmp_path / "text_encoder" / "model.safetensors").touch()
    for name in ("laion", "webvid"):
        (tmp_path / name).mkdir()
        for number in range(80):
            (tmp_path / name / f"{number:05}.tar").touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("T2V_WEIGHTS", str(tmp_path))
        found: list[Finding] = []
        examine(composed(f"experiment={experiment}", "hardware=h200", "trainer.devices=1", f"paths.data={tmp_path}"), found)
    errors = [finding.problem for finding in found if finding.error and "GiB" not in finding.problem]
    assert not errors, json.dumps(errors, indent=1)
    assert "trained" in capsys.readouterr().out
