"""How new does a trained agent find what it sees? `python results/novelty.py RUN ...`

Prints the mean squared error of each level's subgoal autoencoder on the level's own h, its reward "novelty",
over 2,000 steps each: in its own game, played by itself; in other games, whose pictures it sees and whose
actions it presses modulo their number; and in its own game, played at random. Kept: results/cpu/novelty.txt.
"""
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).parents[1])  # the project's root in place of results/

import torch

from evaluate import load_run, rollout
from train import Atari, UsageError, make_env


def novelty(agent, env, steps=2000):
    """The mean of each level: [number]."""
    h = [[] for _ in agent.levels]
    for _, _, ticks in rollout(agent, env, steps, seed=5):
        for states, tick in zip(h, ticks):
            states.append(tick["state"].h)
    return [float(level.autoencoder.loss(torch.cat(states))[1].mean())
            for level, states in zip(agent.levels, h)]


def foreign(game):
    """Another game, whose actions may be numbers of any size."""
    env = Atari(game)
    step, actions = env.step, int(env.action_space.n)
    env.step = lambda action: step(action % actions)
    return env


def study(directory, games=("boxing", "krull", "pong"), steps=2000):
    """{what is played: [novelty of each level]} of a run."""
    config, agent, _ = load_run(directory, "cpu")
    torch.manual_seed(0)
    with torch.inference_mode():
        rows = {"itself": novelty(agent, make_env(config.game), steps)}
        rows |= {game: novelty(agent, foreign(game), steps) for game in games if game != config.game}
        for level in agent.levels:
            level.actor.net[-1].weight.zero_(), level.actor.net[-1].bias.zero_()  # all actions equally likely
        rows["at random"] = novelty(agent, make_env(config.game), steps)
    return rows


if __name__ == "__main__":
    try:
        for directory in sys.argv[1:]:
            for name, values in study(directory).items():
                print(f"{Path(directory).name:18}{name:12}"
                      + "".join(f"  level {i} {value:.4f}" for i, value in enumerate(values)))
    except UsageError as error:
        sys.exit(f"novelty.py: {error}")
