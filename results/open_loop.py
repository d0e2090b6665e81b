"""How long do dreams stay true? `python results/open_loop.py RUN ERROR.png STRIP.png`

From 32 sequences of newly played episodes the model sees 5 steps and then imagines 60, told the true actions.
ERROR.png and what is printed: mean squared error a pixel by the dream's length, beside two predictors that
know nothing of the game: the last frame seen, repeated; and the mean of all frames, which nobody could know.
STRIP.png: true frames above imagined ones of one sequence.
"""
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).parents[1])  # the project's root in place of results/

import torch

from evaluate import image_bytes, load_run, rollout, writable
from train import UsageError, make_env

CONTEXT, HORIZON = 5, 60  # steps seen, steps imagined


def fresh_sequences(agent, env, seed, count=32, length=CONTEXT + HORIZON):
    """observation, action, is_first of `count` new sequences of `length` steps. None runs over an episode's
    end, since nobody could foresee the next episode's start."""
    sequences, steps = [], []
    for now, memory, _ in rollout(agent, env, 10 * count * length, seed):
        steps = [] if now["is_first"][0] else steps
        steps.append((torch.as_tensor(now["observation"]), memory["levels"][0]["action"],
                      torch.as_tensor(now["is_first"])))
        if len(steps) == length:
            sequences, steps = [*sequences, [torch.cat(field) for field in zip(*steps)]], []
        if len(sequences) == count:
            o, a, is_first = map(torch.stack, zip(*sequences))
            return agent.levels[0].observation({"observation": o.to(a.device)}), a, is_first.to(a.device)
    raise UsageError(f"episodes are too short: {len(sequences)} of {count} sequences of {length} steps")


def open_loop_error(truth, imagined):
    """At horizon 1 ... T - CONTEXT: {name: (T-CONTEXT,) array}, of frames (N,T,3,64,64)."""
    guesses = {"dream": imagined[:, CONTEXT:], "last frame, repeated": truth[:, CONTEXT - 1:CONTEXT],
               "mean frame": truth.mean((0, 1))}
    return {name: (guess - truth[:, CONTEXT:]).square().mean((0, 2, 3, 4)).cpu().numpy()
            for name, guess in guesses.items()}


def draw(truth, imagined, game, error_path, strip_path, columns=(0, 1, 2, 5, 10, 15, 20, 30, 45, 60)):
    """Both pictures, and four points of each curve printed."""
    from matplotlib.figure import Figure
    figure, points = Figure((6, 4), layout="constrained"), [5, 15, 30, 60]
    axis = figure.add_subplot(title=game, xlabel="steps imagined", ylabel="mean squared error a pixel")
    for (name, error), style in zip(open_loop_error(truth, imagined).items(), ("-", "--", ":")):
        axis.plot(range(1, len(error) + 1), error, style, label=name)
        print(f"{name:<22}" + "".join(f"  {n} steps {error[n - 1]:.5f}" for n in points))
    axis.legend()
    figure.savefig(error_path, dpi=120)
    figure = Figure((len(columns), 2.6), layout="constrained")
    axes = figure.subplots(2, len(columns), subplot_kw=dict(xticks=[], yticks=[]))
    for n, top, bottom in zip(columns, *axes):
        top.imshow(image_bytes(truth[-1, CONTEXT - 1 + n]))
        bottom.imshow(image_bytes(imagined[-1, CONTEXT - 1 + n]))
        top.set_title(f"+{n}" if n else "last seen", fontsize=9)
    figure.savefig(strip_path, dpi=120)


def main(directory, error_path, strip_path):
    """The pictures of the run in a directory."""
    writable(error_path, ".png"), writable(strip_path, ".png")
    config, agent, _ = load_run(directory, "auto")
    torch.manual_seed(0)
    with torch.inference_mode():
        batch = fresh_sequences(agent, make_env(config.game), 0)
        imagined = agent.levels[0].world_model.open_loop(*batch, CONTEXT)
    draw(batch[0], imagined, config.game, error_path, strip_path)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:]) if len(sys.argv) == 4 else sys.exit(__doc__)
    except (UsageError, ImportError) as error:
        sys.exit(f"open_loop.py: {error}")
