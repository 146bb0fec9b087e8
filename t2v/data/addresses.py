"""Addresses in the configuration -> shards, in a fixed order.

What is there under that very name on a disk is taken as it is. Of all else {a,b} and {00000..00099} are expanded, then *, ? and [...]
are matched. Only in http:// and https:// a ? begins a query (a signature, a number): it stays as it is, and what has one is a shard.
"""

from __future__ import annotations

import glob
import os
import re

import braceexpand
import fsspec

from t2v.data.folder import table_shards

SHARD_SUFFIXES = (".tar",)
PATTERN = re.compile(r"[*?[]")
WEB = ("http://", "https://")
TABLE_SUFFIXES = (".csv", ".jsonl")  # a plain folder of files, listed with their captions


def expand(name: str, url: str) -> list[str]:
    """The shards at one address of source `name`. Raises ValueError where there are none."""
    address, mark, query = url.partition("?") if url.startswith(WEB) else (url, "", "")
    expanded = braceexpand.braceexpand(address) if "{" in address and not os.path.exists(address) else [address]
    found: list[str] = []
    for item in expanded:
        if mark:
            found.append(item + mark + query)
        elif "://" in item:
            if PATTERN.search(item) or not item.endswith(SHARD_SUFFIXES):
                system, path = fsspec.url_to_fs(item)
                pattern = path if PATTERN.search(path) else path.rstrip("/") + "/*.tar"
                found += sorted(system.unstrip_protocol(match) for match in system.glob(pattern))
            else:
                found.append(item)
        elif item.endswith(TABLE_SUFFIXES) and os.path.isfile(item):
            found += table_shards(item)
        elif os.path.isdir(item):
            found += sorted(glob.glob(os.path.join(glob.escape(item), "*.tar")))
        elif PATTERN.search(item) and not os.path.exists(item):
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


def unsigned(shard: str) -> str:
    """A shard's address as it stays when it is signed anew: without the query, unless that says which shard it is (download?id=7)."""
    address = shard.partition("?")[0]
    return address if shard.startswith(WEB) and address.endswith(SHARD_SUFFIXES) else shard
