"""How far back does a level remember? The passive T-maze (Ni et al. 2023, arXiv 2307.03864).

    python results/memory.py agent OUT.jsonl N SEED [VARIANT ...] [flags of train.py, such as --levels 2]
    python results/memory.py alone OUT.jsonl N SEED [VARIANT ...] [flags, such as --sharpness 30]

A cue, a corridor of N steps in which nothing matters, two arms, of which the cue's pays 1. `alone` trains the
world model of level 0 (add --levels 1) on random play until it recalls 0.9, at most 4,000 times. A line is
appended. recall: how often a level's reward head promises more in the right arm than in the wrong one. z, h:
how often a linear probe of them tells the cue, by ticks after it; arm: how often one of z tells the arm.
nats: entropy of z. VARIANT: reward-100, a loss of the reward 100 times as heavy; quiet, z is its
probabilities; likeliest, its likeliest classes; gru, not S5.
"""
import json
import sys
import tempfile
from importlib import import_module
from pathlib import Path

sys.path[0] = str(Path(__file__).parents[1])  # the project's root in place of results/
sys.path.append(str(Path(__file__).parent))  # last: results/profile.py hides Python's own

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box, Discrete

import train
import world_model

SEEN = np.eye(6, dtype=np.float32)  # cue 0, cue 1, corridor, junction, arm 0, arm 1


def seen(t, n, cue, arm):
    """What step t of an episode of steps 0 ... n + 1 shows, numbers or arrays; arm: the last action."""
    return SEEN[np.where(t == 0, cue, np.where(t < n, 2, np.where(t == n, 3, 4 + arm)))]


class TMaze(gymnasium.Env):
    def __init__(self, n):
        self.n, self.observation_space, self.action_space = n, Box(0, 1, (6,), np.float32), Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.cue = 0, int(self.np_random.integers(2))
        return SEEN[self.cue], {}

    def step(self, action):
        self.t += 1
        end = self.t > self.n
        return seen(self.t, self.n, self.cue, action), float(end and action == self.cue), end, False, {}


for n in 8, 16, 24, 48, 96, 200:
    gymnasium.register(f"TMaze{n}-v0", TMaze, kwargs={"n": n})


class HeavyTwoHot(world_model.TwoHot):  # of the world models; the critics have hierarchy.py's
    def loss(self, logits, target):
        return 100 * super().loss(logits, target)


VARIANTS = {"reward-100": lambda: (world_model, "TwoHot", HeavyTwoHot),  # what is replaced by what
            "quiet": lambda: (world_model, "sample_onehot", lambda p: p),
            "likeliest": lambda: (world_model, "sample_onehot", lambda p: (p == p.amax(-1, True)).float()),
            "gru": lambda: (world_model, "S5Stack", import_module("gru").GRUStack)}


def random_play(n, B, T, rng):
    """(B,T) steps from anywhere in an episode: the arguments of WorldModel.loss."""
    step = rng.integers(n + 2, size=(B, 1)) + np.arange(T)
    t, action = step % (n + 2), rng.integers(2, size=(B, T))
    cue = np.take_along_axis(rng.integers(2, size=(B, T // (n + 2) + 2)), step // (n + 2), 1)
    arm = np.concatenate([rng.integers(2, size=(B, 1)), action[:, :-1]], 1)
    reward = np.float32((t > n) & (arm == cue))
    return map(torch.from_numpy, (seen(t, n, cue, arm), SEEN[:2, :2][action], reward, t == 0, t > n))


def probe(x, cue):
    """Share of every second of states x (N,...) whose cue (N,) a ridge regression on the others tells."""
    x = torch.nn.functional.normalize(x.flatten(1) - x.flatten(1).mean(0), dim=0) * len(x) ** 0.5
    ridge = x[::2].T @ x[::2] + 0.05 * len(x) * torch.eye(x.shape[1])
    w = torch.linalg.solve(ridge, x[::2].T @ (cue[::2] - 0.5))
    return round(float(((x[1::2] @ w > 0) == (cue[1::2] > 0)).float().mean()), 3)


@torch.inference_mode()
def study(agent, n, count=1000, probed=True):
    """The figures of each level, [{name: value}], from `count` fresh episodes side by side."""
    cue = np.random.default_rng(0).integers(2, size=count)
    memory, discretised, states, ends = agent.initial_memory(count), agent.discretise(), {}, []

    def act(t, arm):
        flags = [np.full(count, flag) for flag in (t == 0, t > n, t > n)]
        return agent.act(memory, seen(t, n, cue, arm), np.zeros(count), *flags, discretised)

    for t in range(n + 1):
        memory, ticks = act(t, 0)
        states |= {(i, t // agent.k ** i): tick["state"] for i, tick in enumerate(ticks)}
    for arm in cue, 1 - cue:  # from one and the same junction
        memory["levels"][0]["action"] = torch.eye(2)[arm]
        ends.append([tick["state"] for tick in act(n + 1, arm)[1]])
    levels = [{"recall": float(((right.reward > wrong.reward) + 0.5 * (right.reward == wrong.reward)).mean())}
              for right, wrong in zip(*ends)]
    for i, level in enumerate(levels if probed else ()):
        ticks = [j for j in (0, 2, 6, 10, n // agent.k ** i) if (i, j) in states]
        for name in "z", "h":
            level[name] = {j: probe(getattr(states[i, j], name), torch.tensor(cue).float()) for j in ticks}
        z, arm = torch.cat([end[i].z for end in ends]), np.concatenate([cue, 1 - cue])
        level["arm"] = probe(z, torch.tensor(arm).float())
        level["nats"] = {j: round(float(states[i, j].entropy.mean()), 2) for j in ticks}
    return levels


def alone(config, n):
    agent, rng = train.make_agent(config, train.make_env(config.game)), np.random.default_rng(config.seed)
    level, curve = agent.levels[0], []
    encode = level.world_model.posterior  # each of the six observations once: a tenth of the time is saved
    level.world_model.posterior = lambda seen: encode(torch.from_numpy(SEEN))[seen.argmax(-1)]
    while not curve or curve[-1][0] < 4000 and curve[-1][1] < 0.9:
        for _ in range(250):
            batch = list(random_play(n, config.batch_size, config.batch_length, rng))
            level.world_model.update_statistics(batch[0])
            level.world_model.loss(*batch)[0].backward()
            level.optimisers["model"].step()
        curve.append([250 * len(curve) + 250, study(agent, n, 300, probed=False)[0]["recall"]])
        print(*curve[-1], file=sys.stderr)
    updates = curve[-1][0] if curve[-1][1] >= 0.9 else None
    return {"updates": updates, "curve": curve, "levels": study(agent, n)}


def agent(config, n):
    run = train.Run(config, train.make_env(config.game))
    if train.train(run, progress=False):  # a signal has come: half a training is no result
        sys.exit(f"stopped at step {run.step}, nothing written")
    return {"steps": run.step, "updates": run.updates, "levels": study(run.agent, n),
            "last_50": float(np.mean([score for _, score in run.curve[-50:]]))}


TASKS = {"alone": alone, "agent": agent}


def main(argv):
    task, out, n, seed, *rest = argv
    open(out, "a").close()  # to know before the training that it can be written
    variants, flags = [[word for word in rest if (word in VARIANTS) == known] for known in (True, False)]
    for variant in variants:
        setattr(*VARIANTS[variant]())
    with tempfile.TemporaryDirectory() as directory:
        config = train.make_config(train.parse_config([
            "--game", f"TMaze{n}-v0", "--preset", "vector", "--device", "cpu", "--seed", seed,
            "--logdir", directory, "--save_every", str(10 ** 9), *flags])[0])
        torch.manual_seed(config.seed)
        line = {"task": task, "n": int(n), "variants": variants, "flags": flags, "seed": config.seed,
                **TASKS[task](config, int(n)), **train.origin()}
    with open(out, "a") as file:
        file.write(json.dumps(line) + "\n")
    print(json.dumps(line))


if __name__ == "__main__":
    train.program(lambda argv: main(argv) if len(argv) > 3 and argv[0] in TASKS else __doc__)
