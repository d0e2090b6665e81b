"""Does a hierarchy find what one level does not? Two rooms, a key, a door, a reward at the very end.

    python results/key_door.py AGENT SEED STEPS [MountainCar-v0]

AGENT: flat, one level; curious, one level with the novelty reward that higher levels have; paper, two levels.
With MountainCar-v0 they play that game instead, at the preset `vector`. Prints a line of JSON: the returns of
the training's last 50 episodes. Random play solves 1.5% of the episodes with key and door.
"""
import json
import sys
import tempfile
from pathlib import Path
from unittest.mock import patch

sys.path[0] = str(Path(__file__).parents[1])  # the project's root in place of results/

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Discrete

import train
from hierarchy import Level

SETTINGS = dict(
    stoch=8, classes=8, hidden=64, state_size=32, s5_layers=2, units=64, mlp_layers=1,
    kl_warmup=100, warmup=1000, train_every=4, batch_size=8, batch_length=32, replay_size=20_000, horizon=15,
    starts=96, gamma=0.99, entropy_scale=3e-3, encoder_lr=1e-3, model_lr=1e-3, actor_lr=1e-3, critic_lr=1e-3,
    autoencoder_lr=1e-3)


class KeyDoor(gymnasium.Env):
    """Two rooms of 5 x 5 cells. It starts in the middle of the left one, whose corner has the key; with it
    the door opens; the far corner of the right one gives a reward of 1 and ends the episode, which has at
    most 100 steps. Five actions: stay, or go one cell. Seen are row, column and whether it has the key,
    one-hot."""

    START, KEY, DOOR, GOAL = (2, 2), (0, 4), (2, 5), (4, 10)
    MOVES = ((0, 0), (0, 1), (0, -1), (1, 0), (-1, 0))

    def __init__(self):
        self.observation_space, self.action_space = Box(0, 1, (18,), np.float32), Discrete(5)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
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


class CuriousLevel(Level):
    """A level that is rewarded for novelty, whichever it is."""

    def __init__(self, *, rewards, **settings):
        super().__init__(rewards=rewards | {"novelty": 0.1}, **settings)


AGENTS = {"flat": (1, Level), "curious": (1, CuriousLevel), "paper": (2, Level)}


def main(agent, seed, steps, task="key_door"):
    """Train one of AGENTS and print its last returns."""
    env = KeyDoor() if task == "key_door" else train.make_env(train.game_name(task))
    settings = SETTINGS if task == "key_door" else train.PRESETS["vector"]
    levels, kind = AGENTS[agent]
    with tempfile.TemporaryDirectory() as directory, patch("hierarchy.Level", kind):
        run = train.Run(train.Config(**settings | dict(
            game=task, seed=int(seed), steps=int(steps), levels=levels, subgoal_weight=0.1, device="cpu",
            logdir=directory, save_every=10 ** 9)), env)
        if train.train(run, progress=False):  # a signal has come: half a training is no result
            sys.exit(f"stopped at step {run.step}, nothing printed")
    print(json.dumps({"task": task, "agent": agent, "seed": int(seed), "steps": int(steps),
                      "returns": [score for _, score in run.curve[-50:]], **train.origin()}))


if __name__ == "__main__":
    train.program(lambda argv: main(*argv) if len(argv) in (3, 4)
                  and argv[0] in AGENTS and "".join(argv[1:3]).isdigit() else __doc__)
