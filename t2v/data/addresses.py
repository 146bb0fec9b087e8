"""Addresses in the configuration -> shards, in a fixed order."""

from __future__ import annotations

import glob
import os

import braceexpand
import fsspec

from t2v.data.folder import table_shards

SHARD_SUFFIXES = (".tar",)
TABLE_SUFFIXES = (".csv", ".jsonl")  # a plain folder of files, listed with their captions


def expand(name: str, url: str) -> list[str]:
    """The shards at one address of source `name`. Raises ValueError where there are none."""
    urls = list(braceexpand.braceexpand(url)) if "{" in url else [url]
    found: list[str] = []
    for item in urls:
        if "://" in item:
            if any(letter in item for letter in "*?[") or not item.split("?")[0].endswith(SHARD_SUFFIXES):
                system, path = fsspec.url_to_fs(item)
                pattern = path if "*" in path else path.rstrip("/") + "/*.tar"
                found += sorted(system.unstrip_protocol(match) for match in system.glob(pattern))
            else:
                found.append(item)
        elif item.endswith(TABLE_SUFFIXES) and os.path.isfile(item):
            found += table_shards(item)
        elif os.path.isdir(item):
            found += sorted(glob.glob(os.path.join(glob.escape(item), "*.tar")))
        elif any(letter in item for letter in "*?["):
            found += sorted(glob.glob(item))
        elif item.endswith(SHARD_SUFFIXES):
            found.append(item)
        else:
            raise ValueError(f"{name}: {item} does not exist; a folder of .tar files is expected there, see `paths` in the configuration")
    if not found:
        raise ValueError(
            f"{name}: no shards at {url}. A folder of .tar files as img2dataset or video2dataset write them is expected; "
            "`python -m t2v.repack` makes one from a folder of videos and a csv or jsonl of captions."
        )
    return found
