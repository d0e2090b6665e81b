"""Which initial step sizes and decays of the S5 layers foresee best? World model alone at the preset `cpu`.

    python results/s5_initialisation.py results/s5_initialisation.jsonl

Trained on 6,000 steps of random play of three games, two seeds each, for 400 updates; then the squared error
a frame of the open loop (5 frames seen, the rest of 32 imagined, mean of 3 dreams) on 2,048 held-out frames.
A mode that turns by more than half a circle a step (|w Delta| > pi) cannot be told from a slower one.
"""
import itertools
import json
import math
import sys
from pathlib import Path

folder = sys.path[0]
sys.path[0] = str(Path(__file__).parents[1])  # the project's root in place of results/
sys.path.append(folder)  # last: results/profile.py hides Python's own

import torch
from recorded import learner

import train


def raised_decays(s5, T):
    """S5's own range of step sizes, decays raised so that no state outlives T."""
    s5.log_Delta.uniform_(math.log(1e-3), math.log(1e-1))
    s5.log_decay.copy_((1 / T / torch.exp(s5.log_Delta)).clamp(min=0.5).log())


def spread(s5, T):
    """Memories from 2 to T steps as they are, frequencies evenly from 0 to half a circle a step."""
    count = len(s5.frequency)
    s5.frequency.copy_(math.pi * (torch.randperm(count) + 0.5) / count / torch.exp(s5.log_Delta))


def rescale(s5):
    """White input gives states of unit variance, as S5Layer does for its own initialisation."""
    Lambda_bar, B_bar = s5.discretise()
    B = torch.view_as_complex(B_bar.unflatten(-1, (-1, 2)))
    deviation = (B.abs().square().sum(0) / (1 - Lambda_bar.abs().square())).sqrt()
    s5.B_tilde.div_(deviation.repeat_interleave(2))


def run(game, seed, variant):
    config = train.make_config({"game": game, "preset": "cpu", "device": "cpu", "seed": seed})
    model, update, (truth, action, _, is_first, _) = learner(config, game, 2048)
    layers = [block.s5 for block in model.sequence.blocks]
    with torch.no_grad():
        for s5 in layers if variant else ():
            variant(s5, config.batch_length)
            rescale(s5)
        turns = torch.cat([(s5.frequency * torch.exp(s5.log_Delta)).abs() for s5 in layers])
    for _ in range(400):
        update()
    dreams = torch.stack([model.open_loop(truth, action, is_first) for _ in range(3)])
    error = (dreams - truth).square().sum((-3, -2, -1)).mean((0, 1))
    return {"game": game, "seed": seed, "variant": variant.__name__ if variant else "as it is",
            "open_loop": float(error[5:].mean()), "reconstruction": float(error[:5].mean()),
            "mean_frame": float((truth - truth.mean((0, 1))).square().sum((-3, -2, -1)).mean()),
            "aliased": float((turns > math.pi).float().mean())}


if __name__ == "__main__":
    train.keep_freed_memory()
    for game, seed, variant in itertools.product(("pong", "boxing", "krull"), (0, 1),
                                                 (None, raised_decays, spread)):
        line = json.dumps(run(game, seed, variant) | train.origin())
        with Path(sys.argv[1]).open("a") as file:
            file.write(line + "\n")
        print(line)
