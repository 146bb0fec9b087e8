"""A sample as it lies in its shard."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from t2v.data.errors import BadSample


@dataclass(frozen=True)
class RawSample:
    """One sample as it lies in the shard: member suffix -> bytes."""

    key: str
    members: Mapping[str, bytes]

    def member(self, suffix: str) -> bytes | None:
        """The member `KEY.suffix`, or `KEY.anything.suffix`."""
        if suffix in self.members:
            return self.members[suffix]
        return next((data for name, data in self.members.items() if name.endswith("." + suffix)), None)

    @cached_property
    def fields(self) -> dict[str, Any]:
        """The json member; {} where there is none. Raises BadSample(json_invalid)."""
        data = self.member("json")
        if data is None:
            return {}
        try:
            fields = json.loads(data.decode("utf-8", "replace"))
        except ValueError as error:
            raise BadSample("json_invalid", str(error)) from error
        if not isinstance(fields, dict):
            raise BadSample("json_invalid", f"a {type(fields).__name__}, not an object")
        return fields
