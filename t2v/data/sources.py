"""What a source is: where its shards lie, which members are media, where the caption lives, which samples are wanted.

- urls: a tar, a folder of tars, a pattern (*.tar), a brace list ({00000..00099}.tar), an fsspec address (s3://..., a signed https://...),
  the .csv or .jsonl of a plain folder (folder.py), or a list of them; addresses.py says what is a pattern
- media: member suffixes, the first that is present is taken: [mp4, webm, mkv]
- caption: where to look, in order: txt, json:caption, json:caption_* (one of those that match, drawn at random)
- filters: "field op value" on the json, all must hold: "pwatermark < 0.8", "status == success", "language in [en, de]"
"""

from __future__ import annotations

import fnmatch
import operator
import os
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from t2v.data.addresses import expand
from t2v.data.errors import BadSample
from t2v.data.raw import RawSample

OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    ">": operator.gt,
    "in": lambda value, choices: value in choices,
}
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\ufeff]")


class Loader(yaml.SafeLoader):
    """Takes 1e-3 for the number that it is; in YAML 1.1 it is text. Dates are text, as in json."""


Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if not tag.endswith(":timestamp")]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789"))


@dataclass(frozen=True)
class Filter:
    """`field op value` on a sample's json; a missing or incomparable field fails it."""

    name: str
    symbol: str
    value: Any

    @staticmethod
    def parse(text: str) -> Filter:
        match = re.fullmatch(r"\s*([\w.\- ]+?)\s*(<=|>=|==|!=|<|>|\bin\b)\s*(.+?)\s*", text)
        if match is None:
            raise ValueError(f"cannot read the filter {text!r}: write it as 'field op value' with op one of {', '.join(OPERATORS)}")
        try:
            value = yaml.load(match[3], Loader)
        except yaml.YAMLError as error:
            raise ValueError(f"cannot read the value {match[3]!r} of the filter {text!r}") from error
        if match[2] == "in" and not isinstance(value, list):
            raise ValueError(f"the filter {text!r}: 'in' takes a list, such as 'language in [en, de]', not {match[3]!r}")
        return Filter(match[1], match[2], value)

    def __call__(self, fields: Mapping[str, Any]) -> bool:
        value: Any = fields
        for part in [self.name] if self.name in fields else self.name.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        try:
            return value is not None and OPERATORS[self.symbol](value, self.value)
        except TypeError:
            return False


@dataclass(frozen=True)
class Source:
    """One data set in shards. `weight` is its share of the stream's samples, relative to the other sources' weights."""

    name: str
    urls: str | Sequence[str]
    media: Sequence[str]
    caption: Sequence[str] = ("txt",)
    filters: Sequence[str] = ()
    weight: float = 1.0
    keep_uncaptioned: bool = False  # an empty caption trains the unconditional model instead of being skipped
    conditions: tuple[Filter, ...] = field(init=False)

    def __post_init__(self) -> None:
        for name in ("media", "caption", "filters"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))
        object.__setattr__(self, "conditions", tuple(Filter.parse(text) for text in self.filters))
        if not self.weight > 0:
            raise ValueError(f"{self.name}: the weight of a source is positive, not {self.weight}; leave the source out instead")

    def expand(self) -> list[str]:
        """All shards, in a fixed order. Raises ValueError where nothing is found."""
        shards = [shard for url in ([self.urls] if isinstance(self.urls, str) else self.urls) for shard in expand(self.name, str(url))]
        if not shards:
            raise ValueError(f"{self.name}: the list of shard addresses is empty: {self.urls!r}")
        if all("://" not in shard and not os.path.exists(shard.split("#")[0]) for shard in shards):
            raise ValueError(f"{self.name}: none of the {len(shards)} shards exists, e.g. {shards[0]}; see `paths` in the configuration")
        return shards

    def pick(self, sample: RawSample, rng: random.Random) -> tuple[str, bytes, str]:
        """(media suffix, its bytes, caption). Raises BadSample: missing_member, download_failed, filtered, caption_empty, json_invalid."""
        suffix, data = next(((suffix, data) for suffix in self.media if (data := sample.member(suffix)) is not None), ("", None))
        if data is None:
            if str(sample.fields.get("status", "success")) != "success":  # video2dataset keeps the rest of failed downloads
                raise BadSample("download_failed", str(sample.fields.get("error_message")))
            raise BadSample("missing_member", f"none of {', '.join(self.media)} among {', '.join(sample.members) or 'no members'}")
        for condition, text in zip(self.conditions, self.filters):
            if not condition(sample.fields):
                raise BadSample("filtered", text)
        caption = self._caption(sample, rng)
        if not caption and not self.keep_uncaptioned:
            raise BadSample("caption_empty", f"nothing in {', '.join(self.caption)}")
        return suffix, data, caption

    def _caption(self, sample: RawSample, rng: random.Random) -> str:
        for place in self.caption:
            if place.startswith("json:"):
                pattern = place.removeprefix("json:")
                names = [pattern] if pattern in sample.fields else sorted(fnmatch.filter(sample.fields, pattern))
                found = [sample.fields[name] for name in names]
                texts = [text for value in found for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)]
                captions = [caption for caption in map(clean, texts) if caption]
            else:
                data = sample.member(place)
                captions = [clean(data.decode("utf-8", "replace"))] if data else []
            if captions and captions[0]:
                return captions[0] if len(captions) == 1 else rng.choice(captions)
        return ""


def clean(caption: str) -> str:
    """Without control characters and byte-order marks, on one line."""
    return " ".join(CONTROLS.sub(" ", caption).split())
