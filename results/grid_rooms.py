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

import numpy as np
from gymnasium import Env
from gymnasium.spaces import Box, Discrete

import train
from subgoals import subgoal_study


class GridRooms(Env):
    """Four rooms of 5 x 5 cells, doors between them. Five actions: stay, or go one cell. Seen are row and
    column, one-hot. An episode has 200 steps and begins in any cell."""

    MOVES = ((0, 0), (0, 1), (0, -1), (1, 0), (-1, 0))

    def __init__(self):
        self.observation_space, self.action_space = Box(0, 1, (22,), np.float32), Discrete(5)
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

    def observe(self):
        return np.concatenate([np.eye(11, dtype=np.float32)[i] for i in self.cell])

    def get_state(self):  # a run saves at its end; no one goes on from there
        return {}


SETTINGS = dict(
    game="grid_rooms", preset="debug", device="cpu", levels=2, steps=3200, warmup=800, train_every=2, stoch=8,
    classes=8, hidden=64, state_size=32, s5_layers=2, units=64, mlp_layers=1, sharpness=10.0, kl_warmup=100,
    batch_size=8, batch_length=32, replay_size=20_000, horizon=6, starts=96, entropy_scale=0.02,
    subgoal_weight=1.0, hindsight=0.5, encoder_lr=1e-3, model_lr=1e-3, actor_lr=1e-3, critic_lr=1e-3,
    autoencoder_lr=1e-3, save_every=10 ** 9)


def trained(env, **settings):
    """(the Run of an agent trained on `env` with SETTINGS but these, {"settings", "cpu_seconds"})."""
    start, settings = time.process_time(), SETTINGS | settings
    with tempfile.TemporaryDirectory() as directory:
        run = train.Run(train.Config(**settings, logdir=directory), env)
        if train.train(run, progress=False):  # a signal has come: half a training is no result
            sys.exit(f"stopped at step {run.step}, nothing written")
    return run, {"settings": settings, "cpu_seconds": round(time.process_time() - start)}


def main(seed, hindsight, out, steps):
    """Train, measure, write."""
    run, how = trained(GridRooms(), seed=int(seed), hindsight=float(hindsight), steps=int(steps))
    study = subgoal_study(run.agent, GridRooms(), 1, steps=2000)
    train.write_json({"game": "grid_rooms", "seed": int(seed), "hindsight": float(hindsight),
                      "agent_steps": int(steps), "levels": study} | how | train.origin(), out)


if __name__ == "__main__":
    main(*sys.argv[1:]) if len(sys.argv) == 5 else sys.exit(__doc__)
