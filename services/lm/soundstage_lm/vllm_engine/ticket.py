"""What travels with a request into the engine's processes: plain data beside vLLM's own sampling parameters."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from pydantic import TypeAdapter

from soundstage_lm.brief import Sampling
from soundstage_lm.rules import Rule

Role = Literal["alone", "conditional", "unconditional"]
KEY: Final = "soundstage"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ticket:
    """Which text a request belongs to, as what, and how the text is written."""

    text: str
    role: Role
    rule: Rule
    sampling: Sampling
    seed: int
    phase: int

    @property
    def num_members(self) -> int:
        """How many requests the text has."""
        return 1 if self.role == "alone" else 2


_adapter: Final = TypeAdapter(Ticket)


def to_extra_args(ticket: Ticket) -> dict[str, Any]:
    """Write a ticket as what SamplingParams.extra_args can carry."""
    return {KEY: _adapter.dump_python(ticket, mode="json")}


def from_extra_args(extra_args: Mapping[str, Any] | None) -> Ticket:
    """Read a ticket. Raises ValueError when there is none, or no good one."""
    return _adapter.validate_python((extra_args or {}).get(KEY))
