"""Features -> scores: every metric by name, with its count in the name, its interval, and what it may be compared with."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from t2v.evaluation.protocol import Manifest, Protocol, digest
from t2v.metrics.clipsim import clipsim, dynamics, still_share, temporal_consistency
from t2v.metrics.frechet import Moments, frechet_distance, moments
from t2v.metrics.kernel import kernel_distance
from t2v.metrics.uncertainty import extrapolate, frechet_error, mean_error, rounded

VERSION = 1  # of what happens to features; raise it whenever a number would change

FRECHET = {  # metric: (extractor, name of the unbiased companion)
    "fvd": ("i3d", "kvd"),
    "fid_vid_clip_vit_b32": ("clip_vit_b32", "kid_vid_clip_vit_b32"),
    "fid_vid_inception_v3": ("inception_v3", "kid_vid_inception_v3"),
    "fvd_shapes": ("shapes", "kvd_shapes"),
}
PER_VIDEO = {"clipsim": "clip_vit_b32", "temporal_consistency": "clip_vit_b32", "dynamics": "motion", "attributes": "checker"}
ATTRIBUTES = ("colour", "shape", "background", "direction", "speed")  # the columns of the checker's features (t2v.evaluation.shapes)
EXTRACTORS = {metric: extractor for metric, (extractor, _) in FRECHET.items()} | PER_VIDEO


@dataclass(frozen=True)
class Score:
    """`error` is one standard error, None where there is none; `n` counts videos. Equal `fingerprint`: comparable."""

    metric: str
    value: float
    n: int
    fingerprint: str
    error: float | None = None
    higher_is_better: bool | None = False  # None: neither
    note: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "value", rounded(self.value))
        object.__setattr__(self, "error", None if self.error is None else rounded(self.error))

    @property
    def name(self) -> str:
        return f"{self.metric}_n{self.n}"

    @property
    def interval(self) -> tuple[float, float] | None:
        return None if self.error is None else (self.value - 1.96 * self.error, self.value + 1.96 * self.error)

    def plain(self) -> dict[str, Any]:
        return {"name": self.name, **asdict(self), "interval": self.interval}


def extractors_of(metrics: Sequence[str]) -> list[str]:
    """Names of the extractors that these metrics need, each once. ValueError for an unknown metric."""
    unknown = [metric for metric in metrics if metric not in EXTRACTORS]
    if unknown or not metrics:
        raise ValueError(f"Unknown metrics {unknown}: choose from {', '.join(EXTRACTORS)}.")
    return list(dict.fromkeys(EXTRACTORS[metric] for metric in metrics))


def reference_extractors(metrics: Sequence[str]) -> list[str]:
    """Extractors that must see the real clips too."""
    return [
        name for name in extractors_of(metrics) if name in ("motion", "checker") or any(FRECHET.get(m, ("",))[0] == name for m in metrics)
    ]


def distance_extractors(metrics: Sequence[str]) -> list[str]:
    """Extractors whose features of the real clips a Gaussian is fitted to."""
    return list(dict.fromkeys(FRECHET[metric][0] for metric in metrics if metric in FRECHET))


def check_protocol(protocol: Protocol) -> None:
    """Metrics exist and make sense together, before anything is generated."""
    extractors_of(protocol.metrics)
    distances = [metric for metric in protocol.metrics if metric in FRECHET]
    if distances and protocol.captions == "all":
        raise ValueError(f"{', '.join(distances)} count each real video once: use captions=one, or only {', '.join(PER_VIDEO)}.")
    if "fvd" in distances and protocol.num_frames < 9:
        raise ValueError(f"fvd needs clips of at least 9 frames, the protocol has num_frames={protocol.num_frames}.")


def fingerprint(metric: str, manifest: Manifest, identity: Mapping[str, str]) -> str:
    return digest({"metric": metric, "version": VERSION, "manifest": manifest.sha256, "extractor": dict(identity)})


def measure(
    protocol: Protocol,
    manifest: Manifest,
    identities: Mapping[str, Mapping[str, str]],
    generated: Mapping[str, Tensor],
    real: Mapping[str, Tensor],
    references: Mapping[str, Moments] | None = None,
    captions: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> list[Score]:
    """All scores of a protocol. Features by extractor: (n d) or (n f d), of generated videos in the order of the manifest's rows, of real
    ones in that of its `clips`; `captions` (n d) for CLIPSIM."""
    scores: list[Score] = []
    for metric in protocol.metrics:
        name = EXTRACTORS[metric]
        mark = fingerprint(metric, manifest, identities[name])
        if metric in FRECHET:
            fitted = None if references is None else references.get(name)
            scores += distances(metric, generated[name], real[name], fitted, mark, protocol.companions, device)
        elif metric == "clipsim":
            assert captions is not None
            scores.append(mean_score(metric, clipsim(generated[name], captions), manifest, mark))
            if name in real and protocol.companions:
                relative = scores[-1].value / float(clipsim(real[name][manifest.clip_of_row], captions).mean())
                scores.append(Score("clipsim_relative", relative, len(manifest), mark, None, True, "generated over real"))
        elif metric == "temporal_consistency":
            scores.append(mean_score(metric, temporal_consistency(generated[name]), manifest, mark))
        elif metric == "attributes":
            scores += attributes(generated[name], real[name], manifest.clip_of_row, mark)
        else:
            scores.append(mean_score(metric, dynamics(generated[name]), manifest, mark, None))
            scores.append(Score("still_videos", still_share(generated[name]), len(manifest), mark, None, False, "share"))
            if name in real:
                scores.append(mean_score("dynamics_of_real", dynamics(real[name]), manifest.clips, mark, None))
    return scores


def distances(
    metric: str, generated: Tensor, real: Tensor, reference: Moments | None, mark: str, companions: bool, device: torch.device | str
) -> list[Score]:
    """A Frechet distance; with companions its interval, its extrapolation, and the kernel distance."""
    n = generated.shape[0]
    frames = 1 if generated.ndim == 2 else generated.shape[1]
    fake, true = generated.flatten(0, -2), real.flatten(0, -2)
    width = fake.shape[1]
    reference = moments(true) if reference is None else reference
    value = frechet_distance(reference, moments(fake))
    kernel = Score(FRECHET[metric][1], kernel_distance(_fast(true, device), _fast(fake, device), frames), n, mark, note="unbiased")
    if not companions:
        return [Score(metric, value, n, mark), kernel]
    resamples, repeats = (100, 6) if width <= 512 else (20, 1)  # a 2,048 x 2,048 eigenproblem takes seconds
    true, fake = _fast(true, device), _fast(fake, device)
    error = frechet_error(true, fake, frames, resamples)
    limit = extrapolate(true, fake, frames, repeats=repeats)
    return [
        Score(metric, value, n, mark, error),
        Score(f"{metric}_extrapolated", limit.value, n, mark, note="to infinitely many videos"),
        kernel,
    ]


def attributes(generated: Tensor, real: Tensor, clip_of_row: Sequence[int], mark: str) -> list[Score]:
    """Shares of videos that show what the real clip of the same caption shows, by the pixel checker: (n 5) codes, 0 is "cannot be told".
    Beside each stands chance: the agreement with the next real clip."""
    scores, others, real = [], real.roll(1, 0)[clip_of_row], real[clip_of_row]
    for column, name in enumerate((*ATTRIBUTES, "all_attributes")):
        columns = [column] if name in ATTRIBUTES else list(range(len(ATTRIBUTES)))
        right, chance = (((generated == side) & (side > 0))[:, columns].all(1).double() for side in (real, others))
        note = f"with shuffled captions {float(chance.mean()):.2f}"
        n, hits = len(right), float(right.sum())
        shrunk = (hits + 2) / (n + 4)  # Agresti and Coull: an interval that does not vanish at 0 and 1
        error = (shrunk * (1 - shrunk) / (n + 4)) ** 0.5
        scores.append(Score(f"{name}_right", hits / n, n, mark, error, True, note))
    return scores


def mean_score(metric: str, values: Tensor, manifest: Manifest, mark: str, better: bool | None = True) -> Score:
    """A mean over captions, its error clustered by video."""
    if not torch.isfinite(values).all():
        rows = (~torch.isfinite(values)).nonzero().flatten().tolist()
        raise ValueError(f"{metric} is NaN or infinite for rows {rows[:8]} of the manifest. Look at those videos.")
    groups = torch.unique(torch.tensor([_number(row.video_id) for row in manifest.rows]), return_inverse=True)[1]
    return Score(metric, float(values.double().mean()), len(manifest), mark, mean_error(values, groups), better)


def _number(video_id: str) -> int:
    return int(digest(video_id)[:15], 16)


def _fast(features: Tensor, device: torch.device | str) -> Tensor:
    """float64 linear algebra on the GPU where there is one that has it."""
    return features.to(device) if torch.device(device).type == "cuda" else features


def environment() -> dict[str, str]:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {"python": platform.python_version(), "torch": torch.__version__, "gpu": gpu}
