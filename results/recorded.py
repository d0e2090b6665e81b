"""A world model alone, on recorded random play: for world_model_alone.py, s5_initialisation.py and decoded.py
in results/. `python results/recorded.py` does nothing."""
import numpy as np
import torch

import train
from hierarchy import Optimiser
from replay import Replay
from world_model import WorldModel

MODEL = ("stoch", "classes", "hidden", "state_size", "s5_layers", "units", "mlp_layers", "depth",
         "first_stride", "sharpness", "kl_warmup", "decoded")


def record(game, length, steps, seed):
    """(a full replay of so many steps of random play, number of actions)."""
    env, rng = train.make_env(game), np.random.default_rng(seed)
    spec = {"observation": ((64, 64, 3), np.uint8), "action": ((), np.int64), "reward": ((), np.float32),
            "is_first": ((), np.bool_), "is_terminal": ((), np.bool_)}
    replay, step = Replay(spec, steps, length, 0.0, rng), None
    for _ in range(steps):
        if step is None:
            step = env.reset(seed=int(rng.integers(2 ** 31)))[0], 0.0, False, False
            first = True
        action = int(rng.integers(env.action_space.n))
        replay.add({"observation": step[0], "action": action, "reward": step[1], "is_first": first,
                    "is_terminal": step[2]})
        step, first = None if step[2] or step[3] else env.step(action)[:4], False
    return replay, int(env.action_space.n)


def tensors(batch, actions):
    """The arguments of WorldModel.loss."""
    batch = {name: torch.from_numpy(array) for name, array in batch.items()}
    return (batch["observation"].movedim(-1, -3) / 255, torch.eye(actions)[batch["action"]], batch["reward"],
            batch["is_first"], batch["is_terminal"])


def learner(config, game, held_out):
    """(WorldModel, a function that trains it once, `held_out` steps as the arguments of its loss)."""
    T = config.batch_length
    replay, actions = record(game, T, 6000 + held_out, config.seed)
    rest = {name: array[-held_out:].reshape(-1, T, *array.shape[1:]) for name, array in replay.arrays.items()}
    replay.total -= held_out  # from now on what is drawn to train on
    torch.manual_seed(config.seed)
    model = WorldModel((3, 64, 64), actions, memory=T, scaled=False,
                       **{name: getattr(config, name) for name in MODEL})
    encoder = {id(p) for p in model.encoder.parameters()}
    optimiser = Optimiser(1e-8, 1000, (model.encoder.parameters(), config.encoder_lr),
                          ([p for p in model.parameters() if id(p) not in encoder], config.model_lr))

    def update():
        batch = tensors(replay.sample(config.batch_size), actions)
        model.update_statistics(batch[0])
        model.loss(*batch)[0].backward()
        optimiser.step()
    return model, update, tensors(rest, actions)
