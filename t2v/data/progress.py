"""How far training has come in a stream: what a checkpoint keeps of the data, on any number of ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from t2v.batch import ClipBatch, Cursor
from t2v.data.readers import START, ClipStream


class Progress:
    """What was consumed of a stream: the samples, and a cursor per reader. Every rank keeps its own; `merge` joins them."""

    def __init__(self, num_readers: int, state: Mapping[str, Any] | None = None, signature: str = "") -> None:
        self.num_readers = num_readers
        state = state or {}
        self.signature = signature or str(state.get("signature", ""))  # of the stream; "" is not checked on a resume
        self.samples = int(state.get("samples", 0))  # of all ranks, up to `state`
        self.consumed = 0  # of this rank, since then
        self.cursors: dict[int, Cursor] = _cursors(state)

    def update(self, batch: ClipBatch) -> None:
        """Call when the batch's step is done."""
        self.consumed += len(batch)
        self.cursors.update(zip(batch.readers, batch.cursors))

    def state_dict(self) -> dict[str, Any]:
        """Plain and small; json keeps it. Of one rank: merge the ranks' before a resume."""
        return {
            "readers": self.num_readers,
            "signature": self.signature,
            "samples": self.samples,
            "consumed": self.consumed,
            "cursors": {str(reader): list(cursor) for reader, cursor in sorted(self.cursors.items())},
        }

    @staticmethod
    def merge(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The states of all ranks of one role -> the state to resume from, on any number of ranks."""
        if not states or any(state[name] != states[0][name] for state in states for name in ("readers", "signature", "samples")):
            raise ValueError("the ranks' data states do not belong together: they differ in readers, signature or samples")
        cursors: dict[int, Cursor] = {}
        for state in states:
            for reader, cursor in _cursors(state).items():
                cursors[reader] = max(cursor, cursors.get(reader, START))
        merged = Progress(states[0]["readers"], states[0])
        merged.samples += sum(state["consumed"] for state in states)
        merged.cursors = cursors
        return merged.state_dict()


def check_state(stream: ClipStream, state: Mapping[str, Any] | None) -> dict[str, Any]:
    """The state to start from. Raises ValueError where its cursors do not refer to this stream."""
    fresh = {"readers": stream.readers, "signature": stream.signature, "samples": 0, "cursors": {}}
    if state is None:
        return fresh
    if state["readers"] != stream.readers:
        raise ValueError(f"{stream.name}: the checkpoint was written with num_readers={state['readers']}, not {stream.readers}; keep it")
    if state["signature"] not in ("", stream.signature):
        raise ValueError(
            f"{stream.name}: the checkpoint's positions refer to other data: shards, weights, shuffle buffer or seed have changed since. "
            "Keep them to resume, or start a new run from the checkpoint's weights"
        )
    if state.get("consumed"):
        raise ValueError(f"{stream.name}: this is the data state of one rank; join the ranks' states with Progress.merge")
    return fresh | {"samples": int(state["samples"]), "cursors": _cursors(state)}


def _cursors(state: Mapping[str, Any]) -> dict[int, Cursor]:
    return {int(reader): (int(c[0]), int(c[1]), int(c[2])) for reader, c in state.get("cursors", {}).items()}
