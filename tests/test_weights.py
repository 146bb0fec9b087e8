from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from t2v import weights
from t2v.weights import WeightsError


def put(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"x": torch.arange(3.0)}, path)
    return path


def test_a_given_path_wins_and_may_be_a_file_or_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = put(tmp_path / "a" / "vae" / "diffusion_pytorch_model.safetensors")
    put(tmp_path / "b" / "vae" / "diffusion_pytorch_model.safetensors")
    monkeypatch.setenv("T2V_WEIGHTS", str(tmp_path / "b"))
    for place in (file, file.parent, tmp_path / "a"):
        assert weights.find("autoencoder", place) == file


def test_the_environment_then_the_cache_are_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("T2V_WEIGHTS", raising=False)
    cache = tmp_path / "hub" / "models--stabilityai--stable-diffusion-2-1-base"
    cached = put(cache / "snapshots" / "abc" / "vae" / "diffusion_pytorch_model.safetensors")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert weights.find("autoencoder") == cached
    own = put(tmp_path / "weights" / "autoencoder" / "diffusion_pytorch_model.safetensors")
    monkeypatch.setenv("T2V_WEIGHTS", str(tmp_path / "weights"))
    assert weights.find("autoencoder") == own


def test_what_is_not_there_is_described_with_all_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("T2V_WEIGHTS", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(WeightsError) as caught:
        weights.find("sd21", repositories=["somebody/stable-diffusion"])
    for words in ("v2-1_512-ema-pruned.ckpt", "RAIL", "3.5 GB", str(tmp_path), "somebody/stable-diffusion", "download=true"):
        assert words in str(caught.value)
    with pytest.raises(WeightsError, match="no such file"):
        weights.find("unet", tmp_path / "nowhere")
    with pytest.raises(WeightsError, match="no unet in it"):
        weights.find("unet", tmp_path)


def test_nothing_is_fetched_unless_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    calls = []

    def download(repository: str, file: str, local_files_only: bool) -> str:
        calls.append((repository, file, local_files_only))
        if local_files_only:
            raise LocalEntryNotFoundError("not here")
        if repository == "second/one" and file == "VQGAN_autoencoder.pth":
            return str(tmp_path / file)
        raise EntryNotFoundError("not there")

    monkeypatch.delenv("T2V_WEIGHTS", raising=False)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with pytest.raises(WeightsError):
        weights.find("autoencoder", repositories=["first/one", "second/one"])
    assert calls
    assert all(local for _, _, local in calls)
    assert weights.find("autoencoder", repositories=["first/one", "second/one"], download=True) == tmp_path / "VQGAN_autoencoder.pth"


def test_package_names_a_folder_of_the_installed_package() -> None:
    assert weights.folder_of("package:shapes") == Path(weights.__file__).parent / "pretrained" / "shapes"


def test_files_are_read_as_tensors_only(tmp_path: Path) -> None:
    file = put(tmp_path / "w.safetensors")
    torch.save({"state_dict": {"x": torch.arange(3.0)}, "epoch": 1}, tmp_path / "w.pth")
    torch.save({"x": torch.arange(3.0)}, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    for path in (file, tmp_path / "w.pth", tmp_path / "old.bin"):
        assert torch.equal(weights.read(path)["x"], torch.arange(3.0))


class Evil:
    def __reduce__(self) -> tuple:
        return os.system, ("touch evil_was_here",)


def test_bad_files_are_refused_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    whole = put(tmp_path / "w.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-3])
    torch.save({"x": torch.arange(1000.0)}, tmp_path / "w.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "w.pth").read_bytes()[:-200])
    (tmp_path / "foreign.pth").write_bytes(pickle.dumps({"x": Evil()}))
    torch.save({"x": Evil()}, tmp_path / "foreign2.pth")
    (tmp_path / "text.bin").write_text("<html>not found</html>")
    (tmp_path / "pointer.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    torch.save({"epoch": 3}, tmp_path / "nothing.pth")
    for name, words in {
        "cut.safetensors": "truncated",
        "cut.pth": "truncated",
        "foreign.pth": "refused",
        "foreign2.pth": "refused",
        "text.bin": r"text\.bin",
        "pointer.safetensors": "git lfs pull",
        "nothing.pth": "no weights",
        "absent.pth": "missing",
    }.items():
        with pytest.raises(WeightsError, match=words):
            weights.read(tmp_path / name)
    assert not (tmp_path / "evil_was_here").exists()
