"""A goal of the project beside what a run measured, and the table of such lines."""

from dataclasses import asdict, dataclass
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class Standing:
    """One goal and its figure."""

    goal: str
    quantity: str
    measured: float
    floor: float
    target: float
    lower_is_better: bool = False

    @property
    def verdict(self) -> str:
        """met | below target | below floor."""
        sign = -1 if self.lower_is_better else 1
        if sign * self.measured >= sign * self.target:
            return "met"
        return "below target" if sign * self.measured >= sign * self.floor else "below floor"

    def as_row(self) -> Row:
        """For the JSON document."""
        return {**asdict(self), "verdict": self.verdict}


def print_goals(found: list[Standing]) -> None:
    """Where the run stands; goals without a figure in this run are left out."""
    if not found:
        print("\ngoals: none is defined for these sizes")
        return
    width = max(len(standing.quantity) for standing in found)
    print(f"\n{'goal':4} {'quantity':{width}} {'measured':>9} {'floor':>8} {'target':>8}  verdict")
    for s in found:
        sign = "<" if s.lower_is_better else ">"
        print(
            f"{s.goal:4} {s.quantity:{width}} {s.measured:9.3g} {sign}{s.floor:7.3g} "
            f"{sign}{s.target:7.3g}  {s.verdict}"
        )
