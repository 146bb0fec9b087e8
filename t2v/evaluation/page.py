"""The HTML page of an evaluation: sampled videos beside the real ones, as in the paper's Figures 5 and 6 (six frames uniformly taken, the
prompt above). One file, nothing to fetch.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from t2v.evaluation.protocol import replace_file
from t2v.evaluation.results import Results, show
from t2v.evaluation.videos import uniform

FRAMES = 6
STYLE = """
body { font: 15px/1.4 sans-serif; max-width: 1600px; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse } td, th { padding: .2em .8em; border-bottom: 1px solid #ddd; text-align: left }
figure { margin: 2em 0 } figcaption { font-weight: bold; margin-bottom: .3em } img { width: 100%; display: block; margin: 2px 0 }
small { color: #666 } .warning { color: #b00 }
"""


def write_page(path: Path, results: Results, samples: Sequence[tuple[str, Tensor, Tensor | None]]) -> None:
    """`samples`: prompt, generated video, real video or None, each uint8 (f h w c)."""
    escape = html.escape
    rows = "".join(
        f"<tr><td>{escape(score.name)}</td><td>{escape(show(score))}</td><td>{escape(score.note)}</td></tr>" for score in results.scores
    )
    warning = f'<p class="warning">Unverified weights: {escape(", ".join(results.unverified))}</p>' if results.unverified else ""
    figures = []
    for prompt, generated, real in samples:
        pictures = [f"<small>generated</small>{_image(generated)}"] + ([] if real is None else [f"<small>real</small>{_image(real)}"])
        figures.append(f"<figure><figcaption>{escape(prompt)}</figcaption>{''.join(pictures)}</figure>")
    title = escape(results.subject)
    text = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style><h1>{title}</h1>'
        f"<p>Protocol {escape(str(results.protocol['name']))}, manifest {results.manifest[:12]}. ± is 1.96 standard errors.</p>{warning}"
        f"<table><tr><th>metric</th><th>value</th><th></th></tr>{rows}</table>{''.join(figures)}</html>\n"
    )
    replace_file(path, text.encode())


def six_frames(video: Tensor) -> Tensor:
    """uint8 (f h w c) -> (h 6*w c): six frames uniformly taken, side by side."""
    chosen = video[uniform(len(video), FRAMES)] if len(video) >= FRAMES else video
    return chosen.permute(1, 0, 2, 3).flatten(1, 2)


def _image(video: Tensor) -> str:
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(six_frames(video).numpy())).save(buffer, "JPEG", quality=88)
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}">'
