"""Does the world model of the preset `paper` learn? It alone, at full size, on 6,000 steps of random play.

    python results/world_model_alone.py pong results/paper/pong-old.json --sharpness 1 --kl_warmup 0
    python results/world_model_alone.py results/paper/world_model.png results/paper/*-*.json

The first command trains, the second draws what was measured. Every 50 updates, on 512 frames that are not
trained on: squared error summed over a frame's pixels, of the reconstruction and of one whose z is that of
another frame; and the information in nats that z has of the frame: entropy of the mean distribution less mean
entropy, summed over the categoricals. As long as the error is no smaller than that of the mean frame, z says
nothing.
"""
import json
import sys
import time
from pathlib import Path

folder = sys.path[0]
sys.path[0] = str(Path(__file__).parents[1])  # the project's root in place of results/
sys.path.append(folder)  # last: results/profile.py hides Python's own

import torch
from recorded import MODEL, learner

import train
from world_model import entropy


@torch.no_grad()
def measure(model, observation, action, is_first):
    z, h, _, q, _ = model.observe(observation, action, is_first)
    other = z.flatten(0, 1).roll(len(z) // 2 * z.shape[1] + 1, 0).view_as(z)
    error, shuffled = ((model.decode(code, h) - observation).square().sum((-3, -2, -1)).mean().item()
                       for code in (z, other))
    return {"error": error, "error_shuffled_z": shuffled,
            "nats": float(entropy(q.flatten(0, 1).mean(0)) - entropy(q).mean())}


def main(game, path, *flags):
    config = train.make_config(train.parse_config(["--game", game, "--preset", "paper", *flags])[0])
    model, update, held_out = learner(config, config.game, 512)
    observation, action, _, is_first, _ = held_out
    settings = {name: getattr(config, name) for name in (*MODEL, "encoder_lr", "model_lr", "batch_size")}
    result, start = {"game": config.game, "settings": settings, "mean_frame": float(
        (observation - observation.mean((0, 1))).square().sum((-3, -2, -1)).mean())}, time.process_time()
    for i in range(301):
        if i % 50 == 0:
            for name, value in (measure(model, observation, action, is_first) | {
                    "updates": i, "cpu_seconds": round(time.process_time() - start)}).items():
                result.setdefault(name, []).append(value)
            train.write_json(result | train.origin(), path)
            print(config.game, {name: values[-1] for name, values in result.items() if type(values) is list})
        update()


def draw(path, *files):
    """A panel a game: error as a share of the mean frame's, with its own z and, dotted, with another's."""
    from matplotlib.figure import Figure
    results = [json.loads(Path(file).read_text()) for file in files]
    games = sorted({result["game"] for result in results})
    figure = Figure((4 * len(games), 3.2), layout="constrained")
    axes = dict(zip(games, figure.subplots(1, len(games), squeeze=False)[0]))
    for result in results:
        sharpness, warmup = result["settings"]["sharpness"], result["settings"]["kl_warmup"]
        for name, line in ("error", ".-"), ("error_shuffled_z", ".:"):
            share = [error / result["mean_frame"] for error in result[name]]
            axes[result["game"]].plot(result["updates"], share, line, color=f"C{int(sharpness > 1)}",
                                      label=f"sharpness {sharpness:g}, kl_warmup {warmup}" * (line == ".-"))
    for game, axis in axes.items():
        axis.legend(fontsize=7)
        axis.axhline(0.8, color="grey", linewidth=0.5)
        axis.set(title=game, xlabel="updates", ylim=(0, 1.6))
    axes[games[0]].set_ylabel("error of a frame / of the mean frame")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    train.keep_freed_memory()
    (draw if sys.argv[1].endswith(".png") else main)(*sys.argv[1:])
