"""How much of what a goal is about can an action move? `python results/remainder.py RUN OUT.json`

With the world model of a run as it is, for level 0: the shares of scene, action (one, held) and chance in how
h changes within k dreamed ticks; and in what remains of that when a small network, which sees the first h,
has foreseen what it can. `controllable` and `named` as in results/subgoals.py, `named` by a new autoencoder;
`kept`: the remainder's variance as a share of the change's.
"""
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path[0] = str(Path(__file__).parents[1])  # the project's root in place of results/
sys.path.append(str(Path(__file__).parent))  # last: results/profile.py hides Python's own

import torch

from evaluate import load_run, rollout, writable
from hierarchy import SubgoalAutoencoder
from subgoals import controllable
from train import make_env, origin, program, write_json
from world_model import MLP, State


def study(config, agent, updates=800, steps=3000, n=128):
    """The above: {"change": shares, "remainder": shares, "kept": share}."""
    level, actions = agent.levels[0], torch.eye(agent.levels[0].action_shape[1])
    with torch.no_grad():
        states, goals = zip(*[(ticks[0]["state"], memory["levels"][0]["subgoal"].clone()) for _, memory, ticks
                              in rollout(agent, make_env(config.game), steps, seed=0)])
    states, goals = State(*(torch.cat(field).clone() for field in zip(*states))), torch.cat(goals)
    size = config.hidden, (config.subgoal_categoricals, config.subgoal_classes), config.units, 2
    foresee, coders = MLP(size[0], size[0], size[2], 2), [SubgoalAutoencoder(*size) for _ in range(2)]
    adam = torch.optim.Adam([p for net in (foresee, *coders) for p in net.parameters()], 1e-3)
    for _ in range(updates):
        pick, another = torch.randint(len(goals), (2, n))
        dream, _ = level.world_model.imagine(states.map(lambda field: field[pick]),
                                             lambda state: level.policy(state, goals[another]), level.k)
        change = dream.h[-1] - dream.h[0]
        remainder = change - foresee(dream.h[0])
        # The sum is of losses that share no parameter.
        loss = remainder.square().sum(-1).mean() + sum(
            coder.loss(h)[0] for coder, h in zip(coders, (change, remainder.detach())))
        adam.zero_grad()
        loss.backward()
        adam.step()
    with torch.no_grad():
        shares = [controllable(SimpleNamespace(world_model=level.world_model, k=level.k, autoencoder=coder,
                                               origin=origin_of), states, actions)
                  for coder, origin_of in zip(coders, (lambda start: start,
                                                       lambda start: start + foresee(start)))]
    return {"change": shares[0], "remainder": shares[1],
            "kept": round((remainder.var(0).sum() / change.var(0).sum()).item(), 4)}


def main(directory, out):
    """The study of the run in a directory, to a JSON file."""
    writable(out, ".json")
    config, agent, past = load_run(directory, "cpu")
    torch.manual_seed(0)
    shares = study(config, agent)
    print(shares)
    write_json({"game": config.game, "agent_steps": past["step"]} | shares | origin(), out)


if __name__ == "__main__":
    program(lambda argv: main(*argv) if len(argv) == 2 else __doc__)
