"""Which initial step sizes and decays of the S5 layers foresee best? World model alone at the preset `cpu`.

    python results/s5_initialisation.py results/s5_initialisation.jsonl

Trained on 6,000 steps of random play of three games, two seeds each, for 400 updates; then the squared error
a frame of the open loop (5 frames seen, the rest of 32 imagined, mean of 3 dreams) on 2,048 held-out frames.
A mode that turns by more than half a circle a step (|w Delta| > pi) cannot be told from a slower one.
"""

import json
import math
import sys
from pathlib import Path

import torch
from world_model_alone import MODEL, record, tensors  # the path of this script, and so of the project

import train
from hierarchy import Optimiser
from world_model import WorldModel

GAMES, SEEDS, UPDATES, HELD_OUT = ("pong", "boxing", "krull"), (0, 1), 400, 2048


def unaliased(s5, T):
    """As it is, but no frequency above half a circle a step."""
    s5.frequency.clamp_(max=math.pi / torch.exp(s5.log_Delta))


def raised_decays(s5, T):
    """S5's own range of step sizes, decays raised so that no state outlives T."""
    s5.log_Delta.uniform_(math.log(1e-3), math.log(1e-1))
    s5.log_decay.copy_(torch.maximum(torch.full_like(s5.log_decay, 0.5), 2 / T / torch.exp(s5.log_Delta) / 2).log())


def spread(s5, T):
    """Memories from 2 to T steps as now, frequencies evenly spread from 0 to half a circle a step."""
    count = len(s5.frequency)
    turn = math.pi * (torch.randperm(count) + 0.5) / count
    s5.frequency.copy_(turn / torch.exp(s5.log_Delta))


def rescale(s5):
    """White input gives states of unit variance, as S5Layer does for its own initialisation."""
    Lambda_bar, B_bar = s5.discretise()
    B = torch.view_as_complex(B_bar.unflatten(-1, (-1, 2)))
    deviation = (B.abs().square().sum(0) / (1 - Lambda_bar.abs().square())).sqrt()
    s5.B_tilde.div_(deviation.repeat_interleave(2))


VARIANTS = {"as it is": None, "unaliased": unaliased, "raised decays": raised_decays, "spread": spread,
            "as it is, S5 rates / 4": None}


def run(game, seed, variant):
    config = train.make_config({"game": game, "preset": "cpu", "device": "cpu", "seed": seed})
    T = config.batch_length
    replay, actions = record(game, T, HELD_OUT, seed)
    held_out = tensors({name: array[-HELD_OUT:].reshape(-1, T, *array.shape[1:])
                        for name, array in replay.arrays.items()}, actions)
    replay.total -= HELD_OUT  # from now on what is drawn to train on
    torch.manual_seed(seed)
    model = WorldModel((3, 64, 64), actions, memory=T, scaled=False,
                       **{name: getattr(config, name) for name in MODEL})
    if VARIANTS[variant]:
        with torch.no_grad():
            for block in model.sequence.blocks:
                VARIANTS[variant](block.s5, T)
                rescale(block.s5)
    slow = [p for name, p in model.named_parameters() if name.split(".")[-1] in (
        "log_decay", "frequency", "log_Delta")]
    encoder, ids = list(model.encoder.parameters()), {id(p) for p in [*slow, *model.encoder.parameters()]}
    others = [p for p in model.parameters() if id(p) not in ids]
    rate = config.model_lr / (4 if "/ 4" in variant else 1)
    optimiser = Optimiser(1e-8, 1000, (encoder, config.encoder_lr), (others, config.model_lr), (slow, rate))
    for _ in range(UPDATES):
        batch = tensors(replay.sample(config.batch_size), actions)
        model.update_statistics(batch[0])
        loss, *_ = model.loss(*batch)
        loss.backward()
        optimiser.step()
    truth = held_out[0]
    dreams = torch.stack([model.open_loop(truth, held_out[1], held_out[3]) for _ in range(3)])
    error = (dreams - truth).square().sum((-3, -2, -1)).mean((0, 1))
    turns = torch.cat([(b.s5.frequency * torch.exp(b.s5.log_Delta)).abs() for b in model.sequence.blocks])
    return {"game": game, "seed": seed, "variant": variant, "open_loop": float(error[5:].mean()),
            "reconstruction": float(error[:5].mean()), "last_10": float(error[-10:].mean()),
            "mean_frame": float((truth - truth.mean((0, 1))).square().sum((-3, -2, -1)).mean()),
            "aliased": float((turns > math.pi).float().mean())}


if __name__ == "__main__":
    train.keep_freed_memory()
    for game in GAMES:
        for seed in SEEDS:
            for variant in VARIANTS:
                line = json.dumps(run(game, seed, variant) | train.origin())
                with Path(sys.argv[1]).open("a") as file:
                    file.write(line + "\n")
                print(line, flush=True)
