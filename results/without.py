"""Which parts of --hindsight are needed? results/grid_rooms.py with one of them left out:

    python results/without.py PART SEED OUT.json STEPS

PART: changes (a goal is a place, the code of h itself), foreseen (a goal names all of a change, also what
comes anyway), goals (none in hindsight), reached (no reward for goals that come true), life (a goal's return
reaches as far as any other).
"""
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).parents[1])  # the project's root in place of results/
sys.path.append(str(Path(__file__).parent))  # last: results/profile.py hides Python's own

import grid_rooms
import hierarchy

PARTS = ("changes", "foreseen", "goals", "reached", "life")


class Without(hierarchy.Level):
    """A level that lacks the part named on the command line."""

    def __init__(self, *args, **others):
        super().__init__(*args, **others)
        self.relative = self.relative and PART != "changes"
        if PART == "reached" and PART in self.rewards:
            self.weights[..., list(self.rewards).index(PART)] = 0
        if PART == "life":
            self.stays[:], self.weights[:] = 1, self.weights[:1].clone()

    def origin(self, start, ticks=None):
        origin = super().origin(start, ticks)
        return start + 0 * origin if PART == "foreseen" and self.relative else origin

    def hindsight_goals(self, subgoal, *others):
        return subgoal if PART == "goals" else super().hindsight_goals(subgoal, *others)


if __name__ == "__main__":
    if len(sys.argv) != 5 or sys.argv[1] not in PARTS:
        sys.exit(__doc__)
    PART, seed, out, steps = sys.argv[1:]
    hierarchy.Level = Without
    grid_rooms.main(seed, "0.5", out, steps)
