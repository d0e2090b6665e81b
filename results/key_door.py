"""Does a hierarchy find what one level does not? Two rooms, a key, a door, a reward at the very end.

    python results/key_door.py AGENT SEED OUT.json STEPS

AGENT: flat, one level; curious, one level with the novelty reward that higher levels have; paper, two levels
by the paper's rule; hindsight, two levels with --hindsight 0.5. Random play solves 1.5% of the episodes.
"""
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).parents[1])  # the project's root in place of results/
sys.path.append(str(Path(__file__).parent))  # last: results/profile.py hides Python's own

import numpy as np
from gymnasium import Env
from gymnasium.spaces import Box, Discrete

import hierarchy
import train
from grid_rooms import GridRooms, trained


class KeyDoor(GridRooms):
    """Two rooms of 5 x 5 cells. It starts in the middle of the left one, whose corner has the key; with it
    the door opens; the far corner of the right one gives a reward of 1 and ends the episode, which has at
    most 100 steps. Seen are row, column and whether it has the key, one-hot."""

    START, KEY, DOOR, GOAL = (2, 2), (0, 4), (2, 5), (4, 10)

    def __init__(self):
        self.observation_space, self.action_space = Box(0, 1, (18,), np.float32), Discrete(5)

    def reset(self, *, seed=None, options=None):
        Env.reset(self, seed=seed)
        self.t, self.cell, self.has_key = 0, self.START, False
        return self.observe(), {}

    def step(self, action):
        row, column = to = tuple(np.add(self.cell, self.MOVES[int(action)]))
        if 0 <= row < 5 and 0 <= column < 11 and (column != 5 or to == self.DOOR and self.has_key):
            self.cell = to
        self.t, self.has_key = self.t + 1, self.has_key or self.cell == self.KEY
        done = self.cell == self.GOAL
        return self.observe(), float(done), done, self.t == 100 and not done, {}

    def observe(self):
        seen = zip((5, 11, 2), (*self.cell, int(self.has_key)))
        return np.concatenate([np.eye(n, dtype=np.float32)[i] for n, i in seen])


AGENTS = {"flat": dict(levels=1), "curious": dict(levels=1), "paper": dict(hindsight=0.0), "hindsight": {}}


class CuriousLevel(hierarchy.Level):
    """A level that is rewarded for novelty, whichever it is."""

    def __init__(self, observation_shape, action_shape, subgoal_shape, code_shape, rewards, *model, **others):
        super().__init__(observation_shape, action_shape, subgoal_shape, code_shape,
                         rewards | {"novelty": train.Config.novelty_weight}, *model, **others)


def main(agent, seed, out, steps):
    """Train, and write how many of the last 50 episodes were solved, and every episode's end."""
    if agent == "curious":
        hierarchy.Level = CuriousLevel
    run, how = trained(KeyDoor(), game="key_door", seed=int(seed), steps=int(steps), warmup=1000,
                       train_every=4, horizon=15, gamma=0.99, entropy_scale=3e-3, subgoal_weight=0.1,
                       **AGENTS[agent])
    solved = [score for _, score in run.curve]
    last = float(np.mean(solved[-50:]))
    train.write_json({"game": "key_door", "agent": agent, "seed": int(seed), "last_50": last,
                      "curve": run.curve} | how | train.origin(), out)
    print(f"{agent}, seed {seed}: {last:.0%} of the last 50 episodes solved, {sum(solved):.0f} of"
          f" {len(solved)} in all")


if __name__ == "__main__":
    main(*sys.argv[1:]) if len(sys.argv) == 5 else sys.exit(__doc__)
