"""Addresses, captions and filters of the formats in the wild."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from pathlib import Path

import fsspec
import pytest
from made_shards import image_bytes, image_sample, write_images, write_tar

from t2v.data.addresses import expand
from t2v.data.encoding import jobs_of
from t2v.data.entries import find
from t2v.data.errors import BadSample
from t2v.data.folder import FolderRows, read_table
from t2v.data.laion import laion
from t2v.data.loader import ClipLoader
from t2v.data.raw import RawSample
from t2v.data.readers import share
from t2v.data.sources import Filter, Source, clean
from t2v.models.text_encoder import TextEncoder


def pick(members: dict[str, bytes], **options) -> tuple[str, bytes, str]:
    source = Source(**{"name": "x", "urls": "x.tar", "media": ["mp4", "webm"], "caption": ["txt", "json:caption"]} | options)
    return source.pick(RawSample("k", members), random.Random(0))


def reason(members: dict[str, bytes], **options) -> str:
    with pytest.raises(BadSample) as caught:
        pick(members, **options)
    return caught.value.reason


def test_media_by_suffix_in_order() -> None:
    assert pick({"webm": b"w", "mp4": b"m", "txt": b"c"})[:2] == ("mp4", b"m")
    assert pick({"video.webm": b"w", "m4a": b"a", "txt": b"c"})[:2] == ("webm", b"w")
    assert reason({"txt": b"c", "json": b"{}"}) == "missing_member"
    assert reason({"json": b'{"status": "failed_to_download", "error_message": "404"}', "txt": b"c"}) == "download_failed"


@pytest.mark.parametrize(
    ("members", "caption"),
    [
        ({"txt": b"a cat"}, "a cat"),
        ({"txt": "caf\xe9".encode("latin-1")}, "caf\ufffd"),
        ({"txt": b"\xef\xbb\xbfa\x00b \n c\t"}, "a b c"),
        ({"txt": b"", "json": b'{"caption": "from json"}'}, "from json"),
        ({"json": b'{"caption": ["first"]}'}, "first"),
    ],
)
def test_captions(members: dict[str, bytes], caption: str) -> None:
    assert pick({"mp4": b"m", **members})[2] == caption


def test_entities_and_too_many_words_reach_the_text_encoder() -> None:
    """Its tokenizer resolves &amp; and cuts at 77 tokens, so captions are left as they are."""
    encoder = TextEncoder.random(width=16)
    for written, meant in (("salt &amp; pepper", "salt & pepper"), ("&lt;3 &quot;cats&quot;", '<3 "cats"')):
        caption = pick({"mp4": b"m", "txt": written.encode()})[2]
        assert encoder.tokenize([caption]).tolist() == encoder.tokenize([meant]).tolist()
    long = pick({"mp4": b"m", "txt": b"word " * 500})[2]
    assert long.count("word") == 500
    assert encoder.tokenize([long]).shape == (1, 77)


def test_empty_captions_are_skipped_or_kept() -> None:
    assert reason({"mp4": b"m", "txt": b" \n"}) == "caption_empty"
    assert reason({"mp4": b"m", "json": b'{"caption": null}'}) == "caption_empty"
    assert pick({"mp4": b"m", "txt": b""}, keep_uncaptioned=True)[2] == ""


def test_twenty_captions_are_drawn_from() -> None:
    fields = json.dumps({f"caption_{k}": f"sentence {k}" for k in range(20)} | {"caption_length": 3}).encode()
    source = Source("x", "x.tar", ["mp4"], ["json:caption_*"])
    drawn = {source.pick(RawSample("k", {"mp4": b"m", "json": fields}), random.Random(seed))[2] for seed in range(300)}
    assert drawn == {f"sentence {k}" for k in range(20)}


def test_filters() -> None:
    members = {"mp4": b"m", "txt": b"c", "json": b'{"punsafe": 0.1, "NSFW": "UNLIKELY", "n": null, "meta": {"fps": 25}}'}
    for text in ("punsafe < 0.5", "NSFW == UNLIKELY", "meta.fps >= 24", "NSFW in [UNLIKELY, UNSURE]", "NSFW != NSFW"):
        assert pick(members, filters=[text])[2] == "c"
    for text in ("punsafe > 0.5", "n < 1", "missing == 1", "NSFW < 3", "meta.fps in [1, 2]"):
        assert reason(members, filters=[text]) == "filtered"
    assert reason({"mp4": b"m", "txt": b"c", "json": b"{"}, filters=["a < 1"]) == "json_invalid"
    for text in ("punsafe > 1e-3", "punsafe < 1E+2", "punsafe < 5.e-1", "punsafe in [1e-1, 2]", "day >= 2020-01-31", "tag == '1e5'"):
        assert pick(members | {"json": b'{"punsafe": 0.1, "day": "2020-02-01", "tag": "1e5"}'}, filters=[text])[2] == "c"
    for text in ("punsafe in 1e-1", "NSFW in UNLIKELY", "NSFW in [UNLIKELY"):
        with pytest.raises(ValueError, match="the filter"):
            Filter.parse(text)
    with pytest.raises(ValueError, match="op one of"):
        Filter.parse("punsafe ~ 3")
    assert clean("a\u0000 b\r\nc") == "a b c"


def test_addresses(tmp_path: Path) -> None:
    write_images(tmp_path / "a", 3, 1)

    def expand(urls) -> list[str]:
        return [Path(url).name for url in Source("x", urls, ["png"]).expand()]

    every = ["00000.tar", "00001.tar", "00002.tar"]
    assert expand(str(tmp_path / "a")) == every
    assert expand(f"{tmp_path}/a/*.tar") == every
    assert expand(f"{tmp_path}/a/{{00000..00001}}.tar") == every[:2]
    assert expand([f"{tmp_path}/a/00002.tar", f"{tmp_path}/a/{{00000..00001}}.tar"]) == ["00002.tar", *every[:2]]
    (tmp_path / "empty").mkdir()
    for missing in (tmp_path / "empty", tmp_path / "none/*.tar"):
        with pytest.raises(ValueError, match="no shards at"):
            expand(str(missing))
    with pytest.raises(ValueError, match="none of the 5 shards exists"):
        expand(f"{tmp_path}/none/{{0..4}}.tar")
    with pytest.raises(ValueError, match="either urls or sources"):
        laion()
    with pytest.raises(ValueError, match="weight"):
        Source("x", "y", ["png"], weight=0)


def test_names_and_signatures_are_no_patterns(tmp_path: Path) -> None:
    for name in ("a[1]", "b{0,1}", "c*"):
        write_images(tmp_path / name, 1, 1)
        write_tar(tmp_path / f"{name}.tar", [image_sample(1)])
        assert expand("x", f"{tmp_path}/{name}") == [f"{tmp_path}/{name}/00000.tar"]
        assert expand("x", f"{tmp_path}/{name}.tar") == [f"{tmp_path}/{name}.tar"]
    signed = "https://host/00000.tar?filter=a[0]*&list={1,2}&sig=/x/"
    assert expand("x", signed) == [signed]
    assert expand("x", "https://host/{07..08}.tar?sig={1,2}") == [f"https://host/0{k}.tar?sig={{1,2}}" for k in (7, 8)]
    assert expand("x", "http://host/download?id=7") == ["http://host/download?id=7"]
    for shard in range(3):
        fsspec.filesystem("memory").pipe(f"/patterns/0{shard}.tar", b"")
    assert expand("x", "memory://patterns/0[12].tar") == ["memory:///patterns/01.tar", "memory:///patterns/02.tar"]
    assert len(expand("x", "memory://patterns/0?.tar")) == 3


def test_shards_that_are_signed_anew_are_the_same(tmp_path: Path) -> None:
    old, new, other = (laion(f"https://host/{name}", size=4) for name in ("0.tar?sig=a/b", "0.tar?sig=c", "1.tar?sig=c"))
    assert old.signature == new.signature != other.signature
    jobs = [jobs_of(stream, tmp_path)[0] for stream in (old, new, other)]
    assert [job.output.name for job in jobs] == ["0.tar", "0.tar", "1.tar"]
    assert jobs[0].origin == jobs[1].origin != jobs[2].origin
    numbered = jobs_of(laion(["https://host/get?id=1", "https://host/get?id=2"], size=4), tmp_path)
    assert len({job.output for job in numbered}) == len({job.origin for job in numbered}) == 2


def test_weights_are_shares_of_the_samples(tmp_path: Path) -> None:
    for name, shards in (("a", 2), ("b", 5)):
        write_images(tmp_path / name, shards, 9)
    sources = {name: {"urls": str(tmp_path / name), "weight": weight} for name, weight in (("a", 3), ("b", 1))}
    stream = laion(sources=sources, size=4, num_readers=8)
    batch = next(iter(ClipLoader(stream, global_batch=80)))
    assert (batch.sources.count("a"), batch.sources.count("b")) == (60, 20)
    assert share(64, [1, 1, 1000], 0).count(0) == 1
    assert 24 < sum(a != b for a, b in pairwise(share(64, [1, 1], 0))) < 40  # mixed by chance: steps hold both
    assert sorted(share(10, [1, 2, 7], 5)) == [0] + [1] * 2 + [2] * 7


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_a_plain_folder_with_captions(tmp_path: Path, form: str) -> None:
    rows = []
    for number in range(300):
        (tmp_path / "sub").mkdir(exist_ok=True)
        (tmp_path / f"sub/{number}.png").write_bytes(image_bytes(number))
        rows.append({"file": f"sub/{number}.png", "caption": f"picture {number}, of 300"})
    rows.append({"file": "sub/none.png", "caption": "not there"})
    table = tmp_path / f"captions.{form}"
    if form == "csv":
        table.write_text("\ufefffile,caption\n" + "".join(f'{row["file"]},"{row["caption"]}"\n' for row in rows))
    else:
        table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    stream = laion(str(table), size=4, num_readers=4)
    loader = iter(ClipLoader(stream, global_batch=300))
    first, second = next(loader), next(loader)
    assert len(stream.shards[0]) == 2
    assert len(set(first.keys)) > 250
    assert all(caption == f"picture {key.removeprefix('sub/')}, of 300" for key, caption in zip(first.keys, first.captions))
    assert (first.bad + second.bad)[("laion", "missing_member")] >= 1
    table.write_text("a,b\n1,2\n" if form == "csv" else '{"a": 1}\n')
    with pytest.raises(ValueError, match=r"unreadable|no column names the files"):
        laion(str(_copy(table)), size=4)


def test_a_caption_is_not_cut_at_its_first_comma(tmp_path: Path) -> None:
    table = tmp_path / "captions.csv"
    table.write_text("file,caption\n1.mp4,one,\n2.mp4,a red, blue and green thing\n")
    with pytest.raises(ValueError, match=r"captions.csv: unreadable: the row of 2.mp4 has more values than columns.*in quotes"):
        laion(str(table), size=4)
    table = tmp_path / "other.csv"
    table.write_text("file,caption\n1.mp4,one,,\n")  # nothing is lost
    assert read_table(str(table)) == ([{"file": "1.mp4", "caption": "one"}], "file")


def _copy(table: Path) -> Path:
    other = table.with_stem("other")  # tables are read once per process
    other.write_bytes(table.read_bytes())
    return other


def test_object_stores_give_the_same_samples(tmp_path: Path) -> None:
    write_images(tmp_path, 5, 6)
    memory = fsspec.filesystem("memory")
    for path in sorted(tmp_path.iterdir()):
        memory.pipe(f"/bucket/{path.name}", path.read_bytes())
    local, remote = (
        next(iter(ClipLoader(laion(url, size=4, num_readers=4, buffer=3), global_batch=60))) for url in (str(tmp_path), "memory://bucket")
    )
    assert remote.keys == local.keys
    assert remote.cursors == local.cursors
    with pytest.raises(ValueError, match="no shards at"):
        laion("memory://nothing", size=4)


def test_presets_read_what_their_formats_hold(tmp_path: Path) -> None:
    key, members = image_sample(3)
    fields = {"text": "from datacomp", "uid": "x", "face_bboxes": []}
    write_tar(tmp_path / "00000.tar", [(key, {"jpg": members["png"], "json": json.dumps(fields).encode()})])
    stream = laion(str(tmp_path), size=4, num_readers=1, caption=["txt", "json:text", "json:caption"])
    assert next(iter(ClipLoader(stream, global_batch=1))).captions == ["from datacomp"]


def test_rows_that_cannot_be_read_do_not_end_their_shard(tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    names = ["0.png", "folder.png", "nul\0.png", "x" * 300 + ".png", None, "absent.png", "", "7.png"]
    rows = [{"file": name, "caption": "c"} if name is not None else {"path": "4.png", "caption": "c"} for name in names]
    for number in (0, 7):
        (tmp_path / f"{number}.png").write_bytes(image_bytes(number))
    table = tmp_path / "captions.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shard = FolderRows(f"{table}#0:8")
    samples = [shard.read(k) for k in range(len(shard))]
    assert [sample.key for sample in samples if "png" in sample.members] == ["0", "7"]
    assert samples[4].key == "row 4"
    batch = next(iter(ClipLoader(laion(str(table), size=4, num_readers=1), global_batch=4)))
    assert set(batch.keys) == {"0", "7"}
    assert set(batch.bad) == {("laion", "missing_member")}
    assert [entry.name for entry in find(tmp_path, table)] == ["0.png", "folder.png", "7.png"]
