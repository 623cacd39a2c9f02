"""What one implementation did on one hostile input, as plain data: a line of `findings.jsonl`."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from dsa_bench.record import MAX_NAME, check_schema
from dsa_bench.untrusted import Refused, build, shown, text

FINDING_SCHEMA = "dsa-bench/finding@1"
VERDICTS = ("ok", "wrong", "raised", "refused")
BAD = frozenset({"wrong", "raised"})
MAX_INPUT_NAME = 200
"""Characters of the name of an input in a file that others wrote."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One implementation on one hostile input."""

    op: str
    impl: str
    name: str
    """Of the input: phase, precision, L and what makes it hostile."""
    verdict: str
    """`ok`, `wrong`, `refused` (it says that it cannot take this) or `raised`."""
    reason: str = ""

    @property
    def is_bad(self) -> bool:
        return self.verdict in BAD

    def to_json(self) -> dict[str, Any]:
        cut = {"name": self.name[:MAX_INPUT_NAME]}
        return {"schema": FINDING_SCHEMA, **asdict(self), **cut}

    @classmethod
    def from_json(cls, data: Any) -> "Finding":
        """The finding that a line says; ValueError where it says none."""
        if not isinstance(data, Mapping):
            raise Refused(f"it must be an object, got {shown(data)}")
        check_schema(data.get("schema"), FINDING_SCHEMA)
        found = build(cls, data, "")
        for place, limit in (("op", MAX_NAME), ("impl", MAX_NAME), ("name", MAX_INPUT_NAME)):
            text(getattr(found, place), place, limit)
        if found.verdict not in VERDICTS:
            raise Refused(f"verdict must be {', '.join(VERDICTS)}, got {shown(found.verdict)}")
        return found
