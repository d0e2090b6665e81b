"""Does a world model know what is rewarded? Trained alone on what a run has played, its last 4,096 steps held
out, with the reward's loss weighed by SCALE:

    python results/reward_scale.py RUN SCALE UPDATES OUT.jsonl

A line every 300 updates, all on held-out steps: squared error of the predicted reward as a share of the
reward's variance (1: no better than its mean), `seen` from the state after the frame has been seen and
`ahead` from dreams, 1 to 3 and 4 to 10 steps after the last frame (mean of 8); reconstruction error; KL.
"""
import json
import sys
from pathlib import Path

folder = sys.path[0]
sys.path[0] = str(Path(__file__).parents[1])  # the project's root in place of results/
sys.path.append(folder)  # last: results/profile.py hides Python's own

import numpy as np
import torch
from recorded import learner

import train
from evaluate import load_run
from replay import Replay
from world_model import State


@torch.no_grad()
def measure(model, observation, action, reward, is_first, seen=12, dreams=8):
    z, h, _, q, p = model.observe(observation, action, is_first)
    error = (model.decode(z, h) - observation).square().sum((-3, -2, -1)).mean()
    said = model.twohot.mean(model.outcome(z, h)[0])
    start = model.observe(observation[:, :seen], action[:, :seen], is_first[:, :seen])
    z, h, x = (field[:, -1] for field in start[:3])
    ahead = 0
    for _ in range(dreams):
        actions = iter(action[:, seen - 1:].unbind(1))
        imagined, _ = model.imagine(State(x, z, h, *torch.zeros(3, len(z))), lambda state: next(actions), 10)
        ahead = ahead + imagined.reward[1:].T / dreams
    later = reward[:, seen:seen + 10]
    result = {name: round(float((guess - truth).square().mean() / truth.var()), 4) for name, guess, truth in (
        ("seen", said[:, 4:], reward[:, 4:]), ("ahead1-3", ahead[:, :3], later[:, :3]),
        ("ahead4-10", ahead[:, 3:], later[:, 3:]))}
    return result | {"reconstruction": round(float(error), 2),
                     "kl": round(float((q * (q.log() - p.log())).sum((-2, -1)).mean()), 2)}


def main(path, scale, updates, out):
    train.keep_freed_memory()
    config, agent, past = load_run(path, "cpu")
    config.reward_scale = float(scale)
    total = train.load_checkpoint(Path(path) / "checkpoint.pt", "cpu")["replay_totals"][0]
    replay = Replay(agent.specs[0], config.replay_size, config.batch_length, config.tau,
                    np.random.default_rng(config.seed))
    replay.load(Path(path) / "replay-0", total)
    replay.arrays["action"] = replay.arrays["action"][:, 0]
    model, update, (observation, action, reward, is_first, _) = learner(config, config.game, 4096, replay)
    for i in range(1, int(updates) + 1):
        update()
        if i % 300 == 0:
            line = {"game": config.game, "steps": past["step"], "reward_scale": config.reward_scale,
                    "updates": i}
            line |= measure(model, observation, action, reward, is_first)
            with open(out, "a") as file:
                file.write(json.dumps(line | train.origin()) + "\n")
            print(line, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:]) if len(sys.argv) == 5 else sys.exit(__doc__)
