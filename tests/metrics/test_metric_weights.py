"""Which files are taken for the metrics' networks: found, verified, refused; and, where the real ones are, the published numbers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from t2v.metrics import clip, golden, i3d_weights, weights
from t2v.metrics.features import ClipFeatures, I3dFeatures
from t2v.metrics.i3d import InceptionI3d
from t2v.weights import WeightsError


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No weights anywhere on this machine."""
    monkeypatch.delenv("T2V_WEIGHTS", raising=False)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    monkeypatch.setattr("t2v.weights._from_hub", lambda repository, files, local: None)
    return tmp_path


@pytest.fixture(scope="module")
def i3d_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    state = InceptionI3d().state_dict()
    path = tmp_path_factory.mktemp("i3d") / "i3d.safetensors"
    save_file({name: state[name].contiguous() for name in i3d_weights.key_maps()[0]}, path)
    return path


def test_what_is_missing_is_said_at_once_for_all(nowhere: Path) -> None:
    with pytest.raises(WeightsError) as error:
        weights.load(["i3d", "inception_v3", "clip_vit_b32", "motion"])
    for name in ("i3d_torchscript.pt", "weights-inception-2015-12-05-6726825d.pth", "ViT-B-32.pt", "T2V_WEIGHTS", ".cache/clip"):
        assert name in str(error.value)


def test_networks_without_files_need_none(nowhere: Path) -> None:
    extractors, found = weights.load(["motion"])
    assert extractors["motion"].weights == "none"
    assert found == []


@pytest.mark.parametrize("place", ["T2V_WEIGHTS", "hub", "clip"])
def test_files_are_found_where_others_leave_them(nowhere: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    folder = {"T2V_WEIGHTS": nowhere / "own", "hub": nowhere / "hub" / "checkpoints", "clip": nowhere / "home" / ".cache" / "clip"}[place]
    folder.mkdir(parents=True)
    name = "inception_v3" if place == "hub" else "clip_vit_b32"
    (folder / weights.KNOWN[name].files[0]).write_bytes(b"x")
    if place == "T2V_WEIGHTS":
        monkeypatch.setenv("T2V_WEIGHTS", str(folder))
    assert weights.find(name) == folder / weights.KNOWN[name].files[0]


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("i3d", "i3d_torchscript.pt"),
        ("i3d", "i3d_pretrained_400.pt"),
        ("inception_v3", "weights-inception-2015-12-05-6726825d.pth"),
        ("clip_vit_b32", "ViT-B-32.pt"),
    ],
)
def test_a_published_name_with_other_content_is_refused(tmp_path: Path, name: str, file: str) -> None:
    (tmp_path / file).write_bytes(b"a download that broke off")
    with pytest.raises(WeightsError, match="published"):
        weights.verify(name, tmp_path / file)


def test_unknown_torchscript_is_never_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Nothing(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    torch.jit.script(Nothing()).save(str(tmp_path / "mine.pt"))
    torch.save({"a": torch.zeros(1)}, tmp_path / "plain.pt")
    assert clip.is_torchscript(tmp_path / "mine.pt")
    assert not clip.is_torchscript(tmp_path / "plain.pt")
    monkeypatch.setattr(torch.jit, "load", lambda *a, **k: pytest.fail("opened"))
    for name in ("i3d", "clip_vit_b32"):
        with pytest.raises(WeightsError, match="is code"):
            weights.verify(name, tmp_path / "mine.pt")


@pytest.mark.parametrize(
    ("name", "file"), [("i3d", "mine.pt"), ("i3d", "mine.safetensors"), ("inception_v3", "mine.pth"), ("clip_vit_b32", "mine.pt")]
)
def test_damaged_and_foreign_files_are_one_error_even_where_unverified_ones_are_allowed(tmp_path: Path, name: str, file: str) -> None:
    path = tmp_path / file
    path.write_bytes(b"a download that broke off" * 50)
    with pytest.raises(WeightsError, match=file):
        weights.load([name], {name: str(path)}, allow_unverified=True)
    foreign = {"layer.weight": torch.ones(2, 2)}
    save_file(foreign, path) if path.suffix == ".safetensors" else torch.save(foreign, path)
    with pytest.raises(WeightsError, match=file) as error:
        weights.load([name], {name: str(path)}, allow_unverified=True)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("error", [RuntimeError, ValueError])
def test_an_error_without_words_is_named_by_its_kind(error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (path := tmp_path / "mine.pt").write_bytes(b"x")

    def wordless(name: str, path: Path) -> None:
        raise error

    monkeypatch.setattr(clip, "load", wordless)
    with pytest.raises(WeightsError, match=rf"mine\.pt does not hold the weights of clip_vit_b32: {error.__name__}\. Fetch it again"):
        weights.load(["clip_vit_b32"], {"clip_vit_b32": str(path)}, allow_unverified=True)


def test_unverified_weights_must_be_allowed_and_are_marked(i3d_file: Path) -> None:
    with pytest.raises(WeightsError, match=r"230 of 230 tensors are not DeepMind's.*allow_unverified=true"):
        weights.load(["i3d"], {"i3d": str(i3d_file)})
    extractors, found = weights.load(["i3d"], {"i3d": str(i3d_file)}, {"i3d": "tf1"}, allow_unverified=True)
    assert not found[0].verified
    assert extractors["i3d"].weights == found[0].sha256
    assert extractors["i3d"].recipe == "bilinear-tf1-224-1"


def test_a_download_that_fails_is_one_error(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(url: str, target: str, hash_prefix: str) -> None:
        assert len(hash_prefix) == 64
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refused)
    with pytest.raises(WeightsError, match=r"could not be fetched from https://.*no network"):
        weights.find("clip_vit_b32", download=True)


def real(name: str) -> Path:
    try:
        return weights.verify(name, weights.find(name)).path
    except WeightsError:
        pytest.skip(f"the real {name} is not on this machine")


class TestPublishedNumbers:
    """Only where the real weights are."""

    def test_fvd_of_zeros_and_ones(self) -> None:
        real("i3d")
        network = weights.load(["i3d"])[0]["i3d"]
        assert isinstance(network, I3dFeatures)
        assert golden.zeros_and_ones(network) == pytest.approx(golden.ZEROS_AND_ONES, abs=1)

    @pytest.mark.slow
    def test_fvd_of_random_tensors(self) -> None:
        real("i3d")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        network = weights.load(["i3d"], device=device)[0]["i3d"]
        assert isinstance(network, I3dFeatures)
        assert golden.random_tensors(network, device) == pytest.approx(golden.RANDOM_TENSORS, abs=1e-3)

    def test_clip_tells_colours_apart(self) -> None:
        real("clip_vit_b32")
        extractor = weights.load(["clip_vit_b32"])[0]["clip_vit_b32"]
        assert isinstance(extractor, ClipFeatures)
        assert golden.colours(extractor.clip)

    def test_clipsim_of_a_noise_picture(self) -> None:
        """torchmetrics' documented value, which is ViT-B/16's: T2V_WEIGHTS must hold OpenAI's ViT-B-16.pt."""
        path = Path(os.environ.get("T2V_WEIGHTS", "nowhere")) / "ViT-B-16.pt"
        if not path.is_file():
            pytest.skip("the real ViT-B-16.pt is not on this machine")
        assert golden.noise_picture(clip.load("clip_vit_b16", path)) == pytest.approx(golden.CLIP_B16_NOISE, abs=1e-4)


def test_golden_procedures_run_on_any_weights(i3d_file: Path) -> None:
    """The procedure itself: two constant clips differ by the squared distance of their logits."""
    network = weights.load(["i3d"], {"i3d": str(i3d_file)}, allow_unverified=True)[0]["i3d"]
    assert isinstance(network, I3dFeatures)
    value = golden.zeros_and_ones(network)
    with torch.no_grad():
        black, white = (network.network(torch.full((1, 3, 30, 224, 224), level)) for level in (-1.0, 1.0))
    assert value == pytest.approx(float((black - white).double().square().sum()), rel=1e-4)
