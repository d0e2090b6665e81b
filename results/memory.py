"""How far back does a level remember? The passive T-maze (Ni et al. 2023, arXiv 2307.03864).

    python results/memory.py agent OUT.jsonl N SEED [hindsight] [flags of train.py, such as --levels 2]
    python results/memory.py alone OUT.jsonl N SEED [VARIANT ...] [flags of train.py, such as --sharpness 30]

A cue, a corridor of N steps in which nothing matters, two arms, of which the cue's pays 1. A training sequence
begins with a state of zeros, so level i can learn to remember T k^i steps. Recall: how often a level's reward
head, in the right arm, promises more than it would in the wrong one. `alone` trains the world model of level 0
on random play, until recall is 0.9, at most 4,000 times. Each run appends a line.
"""
import contextlib
import json
import math
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

sys.path[0] = str(Path(__file__).parents[1])  # the project's root in place of results/
sys.path.append(str(Path(__file__).parent))  # last: results/profile.py hides Python's own

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box, Discrete

import s5
import train
import world_model
from gru import GRUStack

SEEN = np.eye(6, dtype=np.float32)  # cue 0, cue 1, corridor, junction, arm 0, arm 1
TICKS = 0, 2, 6, 10  # after the cue, at which it is probed for


def place(t, n, cue, arm):
    """Which row of SEEN step t of an episode 0 ... n + 1 shows. Numbers or arrays."""
    return np.where(t == 0, cue, np.where(t < n, 2, np.where(t == n, 3, 4 + arm)))


class TMaze(gymnasium.Env):
    """The action at step n chooses the arm; no other does anything."""

    def __init__(self, n):
        self.n, self.observation_space, self.action_space = n, Box(0, 1, (6,), np.float32), Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.cue = 0, int(self.np_random.integers(2))
        return SEEN[self.cue], {}

    def step(self, action):
        self.t += 1
        end = self.t > self.n
        return SEEN[place(self.t, self.n, self.cue, action)], float(end and action == self.cue), end, False, {}


for n in 8, 16, 24, 40, 48, 96, 200:
    gymnasium.register(f"TMaze{n}-v0", TMaze, kwargs={"n": n})


def random_play(n, B, T, rng):
    """(B,T) steps of random play, which begin anywhere in an episode: the arguments of WorldModel.loss."""
    step = rng.integers(n + 2, size=(B, 1)) + np.arange(T)
    t, action = step % (n + 2), rng.integers(2, size=(B, T))
    cue = np.take_along_axis(rng.integers(2, size=(B, T // (n + 2) + 2)), step // (n + 2), 1)
    arm = np.concatenate([rng.integers(2, size=(B, 1)), action[:, :-1]], 1)
    return map(torch.from_numpy, (SEEN[place(t, n, cue, arm)], SEEN[:2, :2][action],
                                  np.float32((t > n) & (arm == cue)), t == 0, t > n))


def probe(x, cue):
    """Share of the second half of states x (N, ...) whose cue a linear map of the first half tells."""
    x = torch.nn.functional.normalize(x.flatten(1) - x.flatten(1).mean(0), dim=0) * len(x) ** 0.5
    w = torch.linalg.solve(x[::2].T @ x[::2] + 0.05 * len(x) * torch.eye(x.shape[1]), x[::2].T @ (cue[::2] - 0.5))
    return round(float(((x[1::2] @ w > 0) == (cue[1::2] > 0)).float().mean()), 3)


@torch.inference_mode()
def study(agent, n, count=1000, probed=True):
    """What each level recalls at the end of fresh episodes, and where the cue is: [{name: value}]."""
    cue = np.random.default_rng(0).integers(2, size=count)
    memory, discretised, states, promised = agent.initial_memory(count), agent.discretise(), {}, []

    def act(t, arm):
        flags = [np.full(count, flag) for flag in (t == 0, t > n, t > n)]
        return agent.act(memory, SEEN[place(t, n, cue, arm)], np.zeros(count), *flags, discretised)

    for t in range(n + 1):
        memory, ticks = act(t, 0)
        states |= {(i, t // agent.k ** i): tick["state"] for i, tick in enumerate(ticks)}
    for arm in cue, 1 - cue:  # from one and the same junction
        memory["levels"][0]["action"] = torch.eye(2)[arm]
        promised.append([tick["state"].reward for tick in act(n + 1, arm)[1]])
    levels = []
    for i, (right, wrong) in enumerate(zip(*promised)):
        levels.append({"recall": float(((right > wrong) + 0.5 * (right == wrong)).mean()),
                       "more": float((right - wrong).mean())})
        for name in ("z", "h") if probed else ():
            levels[i][name] = {j: probe(getattr(states[i, j], name), torch.from_numpy(cue).float())
                               for j in (*TICKS, n // agent.k ** i) if (i, j) in states}
        if probed:
            levels[i]["nats"] = {j: round(float(states[i, j].entropy.mean()), 2) for j in TICKS if (i, j) in states}
    return levels


class SlowModes(s5.S5Layer):
    """Every second mode remembers 8 times as long, and its output is zero at first."""

    def __init__(self, features, state_size, memory, blocks=4):
        super().__init__(features, state_size, memory, blocks)
        with torch.no_grad():
            self.log_Delta[::2] -= math.log(8)
            self.C_tilde.unflatten(0, (-1, 2))[::2] = 0


class HeavyTwoHot(world_model.TwoHot):
    """The reward's loss 100 times as heavy. (The critics have their own TwoHot.)"""

    def loss(self, logits, target):
        return 100 * super().loss(logits, target)


def no_free_bits(q, p, share):
    """world_model.kl_balance, which pulls to the end."""
    def kl(q, p):
        return (q * (q.log() - p.log())).sum((-2, -1))
    return 0.5 * kl(q.detach(), p) + share * 0.1 * kl(q, p.detach()), kl(q, p).detach()


VARIANTS = {"reward-100": (world_model, "TwoHot", HeavyTwoHot), "gru": (world_model, "S5Stack", GRUStack),
            "quiet": (world_model, "sample_onehot", lambda p: p),  # z is its probabilities
            "no-free-bits": (world_model, "kl_balance", no_free_bits), "slow": (s5, "S5Layer", SlowModes),
            "small-input": (world_model.WorldModel, "VARIANCE", 4.0)}


def alone(config, n):
    """Train the world model of level 0."""
    agent, rng = train.make_agent(config, train.make_env(config.game)), np.random.default_rng(config.seed)
    level, curve = agent.levels[0], []
    model, posterior = level.world_model, level.world_model.posterior
    while not curve or curve[-1][0] < 4000 and curve[-1][1] < 0.9:
        # Three quarters of the time: each of the six observations is encoded once, and no metrics.
        model.posterior = lambda seen: posterior(torch.from_numpy(SEEN))[seen.argmax(-1)]
        with mock.patch.object(world_model, "entropy", lambda p: p.new_zeros(())):
            for _ in range(250):
                batch = list(random_play(n, config.batch_size, config.batch_length, rng))
                model.update_statistics(batch[0])
                model.loss(*batch)[0].backward()
                level.optimisers["model"].step()
        curve.append([250 * len(curve) + 250, study(agent, n, 300, probed=False)[0]["recall"]])
    return {"updates": curve[-1][0] if curve[-1][1] >= 0.9 else None, "curve": curve, "levels": study(agent, n)}


def agent(config, n):
    """Train an agent."""
    run = train.Run(config, train.make_env(config.game))
    if train.train(run, progress=False):  # a signal has come: half a training is no result
        sys.exit(f"stopped at step {run.step}, nothing written")
    return {"steps": config.steps, "updates": run.updates, "episodes": len(run.curve),
            "last_50": float(np.mean([score for _, score in run.curve[-50:]])), "levels": study(run.agent, n)}


def main(what, out, n, seed, *rest):
    """Train, measure, append."""
    began, variants = time.process_time(), [word for word in rest if word in VARIANTS]
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
        for variant in variants:  # "hindsight" needs results/hindsight.py
            stack.enter_context(mock.patch.object(*VARIANTS[variant]))
        flags = [word for word in rest if word not in VARIANTS]
        config = train.make_config(train.parse_config([
            "--game", f"TMaze{n}-v0", "--preset", "vector", "--device", "cpu", "--seed", seed,
            "--logdir", directory, "--save_every", str(10 ** 9), *flags])[0])
        torch.manual_seed(config.seed)
        line = {"task": what, "n": int(n), "variants": variants, "flags": flags, "seed": config.seed,
                **{"alone": alone, "agent": agent}[what](config, int(n)),
                "cpu_seconds": round(time.process_time() - began), **train.origin()}
    with open(out, "a") as file:
        file.write(json.dumps(line) + "\n")
    print({name: line[name] for name in ("task", "n", "variants", "flags", "seed", "updates", "levels")})


if __name__ == "__main__":
    train.keep_freed_memory()
    main(*sys.argv[1:]) if len(sys.argv) > 4 else sys.exit(__doc__)
