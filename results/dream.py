"""The agent plays inside its own head, as a film: `python results/dream.py RUN OUT.gif`.

Some real steps, then level 0's world model in place of the game, which runs alone, by its own `imagine`. All
levels play on in it as they would in the game: they look at the decoded frames and predicted rewards. The
film ends when the model thinks the episode over.
"""
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).parents[1])  # the project's root in place of results/

import torch

from evaluate import draw_frame, film_env, load_run, rollout, save_film, state_image, writable
from train import UsageError, autocast, env_step, program


def dream(agent, env, seed=0, context=45, steps=225):
    """The frames of the film, Pillow images."""
    if len(env.observation_space.shape) != 3:
        raise UsageError("the agent observes numbers, and so it does in its dreams")
    frames, total, over, discretised = [], 0.0, False, agent.discretise()

    def show(image, state, action, title):
        captions = (f"predicted reward {state.reward.item():+.2f}, continue {state.cont.item():.2f}",
                    f"action {int(action.argmax())}, rewards dreamed so far {total:+.1f}")
        frames.append(draw_frame(title, [(image, captions)], scale=5))

    for now, memory, ticks in rollout(agent, env, context, seed):
        start, action = ticks[0]["state"], ticks[0]["action"]
        show(now["observation"][0], start, action, "the real game: eyes open")
        if now["is_last"][0]:
            raise UsageError(f"the episode ended within {context} steps, before the dream")

    def policy(state):  # State of the dream -> action of level 0
        nonlocal memory, total, over
        if state is start:  # the last real one, where the agent has chosen already
            return action
        image, total = state_image(agent, 0, state.z, state.h), total + state.reward.item()
        memory, ticks = agent.act(memory, **env_step(image, state.reward.item()), discretised=discretised)
        if not over:
            title = f"its dream: eyes shut for {len(frames) - context + 1} steps"
            show(image, state, ticks[0]["action"], title)
        over = over or state.cont.item() < 0.5
        return ticks[0]["action"]

    agent.levels[0].world_model.imagine(start, policy, steps)
    return frames


def main(directory, path):
    """The film of the run in a directory."""
    writable(path, ".gif")
    config, agent, _ = load_run(directory, "auto")
    torch.manual_seed(0)
    with torch.inference_mode(), autocast(config):
        save_film(path, dream(agent, film_env(config.game)))


if __name__ == "__main__":
    program(lambda argv: main(*argv) if len(argv) == 2 else __doc__)
