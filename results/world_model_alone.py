"""Does the world model of the preset `paper` learn? It alone, at full size, on 6,000 steps of random play.

    python results/world_model_alone.py pong results/paper/pong-old.json --sharpness 1 --kl_warmup 0

Every 50 updates, on 512 frames that are not trained on: squared error summed over a frame's pixels, of the
reconstruction and of one whose z is that of another frame; and the information in nats that z has of the
frame, summed over its categoricals: entropy of the mean distribution less mean entropy. The error of the mean
frame stands beside them: as long as the reconstruction's is no smaller, z says nothing.
"""

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

import train
from hierarchy import Optimiser
from replay import Replay
from world_model import WorldModel, entropy

MODEL = ("stoch", "classes", "hidden", "state_size", "s5_layers", "units", "mlp_layers", "depth", "first_stride",
         "sharpness", "kl_warmup")
STEPS, HELD_OUT, UPDATES, EVERY = 6000, 512, 300, 50


def record(game, length, held_out, seed):
    """A replay of random play: STEPS to train on, then `held_out` more; and the number of actions."""
    env, rng = train.Atari(game), np.random.default_rng(seed)
    spec = {"observation": ((64, 64, 3), np.uint8), "action": ((), np.int64), "reward": ((), np.float32),
            "is_first": ((), np.bool_), "is_terminal": ((), np.bool_)}
    replay, actions = Replay(spec, STEPS + held_out, length, 0.0, rng), int(env.action_space.n)
    over = True
    while replay.total < replay.capacity:
        if over:
            observation, reward, terminal, first = env.reset(seed=int(rng.integers(2 ** 31)))[0], 0.0, False, True
        action = int(rng.integers(actions))
        replay.add({"observation": observation, "action": action, "reward": reward, "is_first": first,
                    "is_terminal": terminal})
        if not (over := not first and (terminal or truncated)):
            observation, reward, terminal, truncated, _ = env.step(action)
            first = False
    return replay, actions


def tensors(batch, actions):
    """The arguments of WorldModel.loss."""
    batch = {name: torch.from_numpy(array) for name, array in batch.items()}
    return (batch["observation"].movedim(-1, -3) / 255, torch.eye(actions)[batch["action"]], batch["reward"],
            batch["is_first"], batch["is_terminal"])


@torch.no_grad()
def measure(model, observation, action, is_first):
    z, h, _, q, _ = model.observe(observation, action, is_first)
    error = [float((model.decode(code, h) - observation).square().sum((-3, -2, -1)).mean())
             for code in (z, z.flatten(0, 1).roll(z.shape[1] // 2 + 1, 0).view_as(z))]
    return {"error": error[0], "error_shuffled_z": error[1],
            "nats": float(entropy(q.flatten(0, 1).mean(0)) - entropy(q).mean())}


def main(game, path, *flags):
    given, *_ = train.parse_config(["--game", game, "--preset", "paper", "--device", "cpu", *flags])
    config = train.make_config(given)
    torch.manual_seed(config.seed)
    replay, actions = record(config.game, config.batch_length, HELD_OUT, config.seed)
    held_out = tensors({name: array[STEPS:].reshape(-1, config.batch_length, *array.shape[1:])
                        for name, array in replay.arrays.items()}, actions)
    replay.total = STEPS  # from now on what is drawn to train on
    model = WorldModel((3, 64, 64), actions, memory=config.batch_length, scaled=False,
                       **{name: getattr(config, name) for name in MODEL})
    encoder, others = model.encoder.parameters(), [
        p for name, p in model.named_parameters() if not name.startswith("encoder.")]
    optimiser = Optimiser(1e-8, 1000, (encoder, config.encoder_lr), (others, config.model_lr))
    observation = held_out[0]
    result = {"game": config.game, "settings": {name: getattr(config, name) for name in (
        *MODEL, "encoder_lr", "model_lr", "batch_size", "batch_length", "seed")},
        "mean_frame": float((observation - observation.mean((0, 1))).square().sum((-3, -2, -1)).mean()),
        "updates": [], "error": [], "error_shuffled_z": [], "nats": []} | train.origin()
    start = time.process_time()
    for update in range(UPDATES + 1):
        if update % EVERY == 0:
            values = measure(model, *held_out[:2], held_out[3]) | {"updates": update}
            for name, value in values.items():
                result[name].append(value)
            result["cpu_seconds"] = round(time.process_time() - start)
            Path(path).write_text(json.dumps(result, indent=1) + "\n")
            print(config.game, values, result["cpu_seconds"], flush=True)
        batch = tensors(replay.sample(config.batch_size), actions)
        model.update_statistics(batch[0])
        loss, *_ = model.loss(*batch)
        loss.backward()
        optimiser.step()


if __name__ == "__main__":
    train.keep_freed_memory()
    main(*sys.argv[1:])
