"""Does a hierarchy find what one level does not? Two rooms, a key, a door, a reward at the very end.

    python results/key_door.py AGENT SEED STEPS [MountainCar-v0]

AGENT: flat, one level; curious, one level with the novelty reward that higher levels have; paper, two levels
by the paper's rule; hindsight, two levels by results/hindsight.py. With MountainCar-v0 they play that game
instead, at the preset `vector`. Prints a line of JSON: the returns of the training's last 50 episodes. Random
play solves 1.5% of the episodes with key and door.
"""
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).parents[1])  # the project's root in place of results/
sys.path.append(str(Path(__file__).parent))  # last: results/profile.py hides Python's own

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Discrete

import train
from hierarchy import Hieros
from hindsight import SETTINGS, GridRooms, HindsightHieros, print_line, trained


class KeyDoor(GridRooms):
    """Two rooms of 5 x 5 cells. It starts in the middle of the left one, whose corner has the key; with it
    the door opens; the far corner of the right one gives a reward of 1 and ends the episode, which has at
    most 100 steps. Seen are row, column and whether it has the key, one-hot."""

    START, KEY, DOOR, GOAL = (2, 2), (0, 4), (2, 5), (4, 10)

    def __init__(self):
        self.observation_space, self.action_space = Box(0, 1, (18,), np.float32), Discrete(5)

    def reset(self, *, seed=None, options=None):
        gymnasium.Env.reset(self, seed=seed)
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


class CuriousHieros(Hieros):
    """An agent whose levels are rewarded for novelty, whichever they are."""

    def make_level(self, rewards, **settings):
        return super().make_level(rewards=rewards | {"novelty": 0.1}, **settings)


AGENTS = {"flat": (1, Hieros), "curious": (1, CuriousHieros), "paper": (2, Hieros),
          "hindsight": (2, HindsightHieros)}


def main(agent, seed, steps, task="key_door"):
    """Train one of AGENTS and print its last returns."""
    if task == "key_door":
        env = KeyDoor()
        settings = SETTINGS | dict(warmup=1000, train_every=4, horizon=15, gamma=0.99, entropy_scale=3e-3)
    else:
        env = train.make_env(train.game_name(task))
        settings = train.PRESETS["vector"] | dict(preset="vector", device="cpu")
    levels, kind = AGENTS[agent]
    settings |= dict(game=task, seed=int(seed), steps=int(steps), levels=levels, subgoal_weight=0.1)
    run = trained(env, kind, **settings)
    print_line(task=task, agent=agent, seed=int(seed), steps=int(steps),
               returns=[score for _, score in run.curve[-50:]])


if __name__ == "__main__":
    train.program(lambda argv: main(*argv) if len(argv) in (3, 4) and argv[0] in AGENTS else __doc__)
