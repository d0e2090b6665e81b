"""Does a hierarchy learn goals for their own sake?

    python results/grid_rooms.py SEED HINDSIGHT OUT.json STEPS

Four rooms, no reward: all there is to learn is where one can go, and to go there. HINDSIGHT 0 is the paper's
rule. Writes what results/subgoals.py measures, in its form. 4,800 steps take three CPU minutes.
"""
import sys
import tempfile
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).parents[1])  # the project's root in place of results/
sys.path.append(str(Path(__file__).parent))  # last: results/profile.py hides Python's own

import gymnasium
import numpy as np
import torch

import train
from subgoals import subgoal_study


class GridRooms(gymnasium.Env):
    """Four rooms of 5 x 5 cells, doors between them. Five actions: stay, or go one cell. Seen are row and
    column, one-hot. An episode has 200 steps and begins in any cell."""

    MOVES = ((0, 0), (0, 1), (0, -1), (1, 0), (-1, 0))

    def __init__(self):
        self.observation_space = gymnasium.spaces.Box(0, 1, (22,), np.float32)
        self.action_space = gymnasium.spaces.Discrete(5)
        self.free = np.ones((11, 11), bool)
        self.free[5] = self.free[:, 5] = False
        self.free[[5, 5, 2, 8], [2, 8, 5, 5]] = True

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.cell = 0, tuple(self.np_random.choice(np.argwhere(self.free)))
        return self.observe(), {}

    def step(self, action):
        to = tuple(np.add(self.cell, self.MOVES[int(action)]))
        if 0 <= min(to) and max(to) < 11 and self.free[to]:
            self.cell = to
        self.t += 1
        return self.observe(), 0.0, False, self.t == 200, {}

    def get_state(self):  # a run saves at its end; no one goes on from there
        return {}

    def observe(self):
        observation = np.zeros(22, np.float32)
        observation[[self.cell[0], 11 + self.cell[1]]] = 1
        return observation


SETTINGS = dict(
    game="grid_rooms", preset="debug", device="cpu", levels=2, steps=3200, warmup=800, train_every=2, stoch=8,
    classes=8, hidden=64, state_size=32, s5_layers=2, units=64, mlp_layers=1, sharpness=10.0, kl_warmup=100,
    batch_size=8, batch_length=32, replay_size=20_000, horizon=6, starts=96, entropy_scale=0.02,
    subgoal_weight=1.0, hindsight=0.5, encoder_lr=1e-3, model_lr=1e-3, actor_lr=1e-3, critic_lr=1e-3,
    autoencoder_lr=1e-3, save_every=10 ** 9)


def trained(directory, **settings):
    """An agent trained on GridRooms."""
    config = train.Config(**SETTINGS | {"logdir": str(directory)} | settings)
    Path(config.logdir).mkdir(exist_ok=True)
    run = train.Run(config, GridRooms())
    train.train(run, progress=False)
    return run.agent


def main(seed, hindsight, out, steps):
    """Train, measure, write."""
    start = time.process_time()
    settings = {"seed": int(seed), "hindsight": float(hindsight), "steps": int(steps)}
    with tempfile.TemporaryDirectory() as directory:
        agent = trained(directory, **settings)
    seconds = time.process_time() - start
    with torch.inference_mode():
        study = subgoal_study(agent, GridRooms(), 1, steps=2000)
    train.write_json({"game": "grid_rooms", "seed": int(seed), "hindsight": float(hindsight),
                      "settings": SETTINGS | settings, "agent_steps": int(steps), "cpu_seconds": seconds,
                      "levels": study} | train.origin(), out)


if __name__ == "__main__":
    main(*sys.argv[1:]) if len(sys.argv) == 5 else sys.exit(__doc__)
