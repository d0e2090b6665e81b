"""What does a world model alone learn, without an agent? The table by which candidates are compared.

    python results/world_model_alone.py pong 1500 --preset cpu     on random play of a game
    python results/world_model_alone.py runs/pong-0 1500           on what a run has played

It updates the WorldModel of level 0 so many times. At each tenth it prints a line of JSON, of held-out play
(the last quarter, 4,096 steps at most): squared error of the reconstruction, loss of the reward, KL, and the
correlation of the expected reward with the real one: in the frame that it comes with (`seen`), and 1 to 6
steps ahead, in dreams that are told the real actions. `seconds` are the processor's, for that tenth.
Flags are those of train.py; a run has its own settings. Of random play --warmup says how many steps (10,000)
and --warmup_hold how long an action is held (16). A candidate is a subclass: main(sys.argv[1:], Candidate).
"""
import json
import sys
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).parents[1])  # the project's root in place of results/

import numpy as np
import torch

import hierarchy
import train
from world_model import WorldModel


def random_play(config, env, rng):
    """config.warmup steps [{name: array (1,...)}], as the replay of level 0 holds them."""
    steps, now = [], hierarchy.env_step(env.reset(seed=config.seed))
    for t in range(config.warmup):
        action = int(rng.integers(env.action_space.n)) if t % config.warmup_hold == 0 else action
        steps.append(now | {"reward": np.float32(now["reward"]), "action": np.uint8([[action]])})
        now = hierarchy.env_step(env.reset() if now["is_last"][0] else env.step(action))
    return steps


@torch.no_grad()
def measure(model, observation, action, reward, is_first, is_terminal, ahead=6):
    """What the table says, of sequences (B,T,...): {name: number, or None where nothing was rewarded}."""
    _, states, metrics = model.loss(observation, action, reward, is_first, is_terminal)
    T, episode = reward.shape[1] - ahead, is_first.cumsum(1)
    told = iter([action[:, n:n + T].flatten(0, 1) for n in range(ahead)])
    dreams, _ = model.imagine(states.map(lambda each: each[:, :T].flatten(0, 1)), lambda _: next(told), ahead)
    row = [metrics.get("loss/image", metrics.get("loss/vector")), metrics["loss/rew"], metrics["kl"]]
    for n, expected in enumerate(dreams.reward.unflatten(1, (-1, T))):  # (B,T): of the reward n steps later
        same = episode[:, n:n + T] == episode[:, :T]
        row.append(torch.corrcoef(torch.stack([expected[same], reward[:, n:n + T][same]]))[0, 1])
    names = "reconstruction", "reward", "KL", "seen", *(f"{n} ahead" for n in range(1, ahead + 1))
    return {name: round(x.item(), 3) if x.isfinite() else None for name, x in zip(names, row)}


def main(argv, Model=WorldModel):
    """Train a Model and print what was measured."""
    source, updates, *flags = argv
    usual = (train.load_checkpoint(Path(source) / "checkpoint.pt", "cpu")["config"] if Path(source).is_dir()
             else {"game": source, "warmup": 10_000, "warmup_hold": 16})
    settings = usual | train.parse_config(flags)[0] | {"levels": 1}
    config = train.make_config({name: settings[name] for name in settings if hasattr(train.Config, name)})
    torch.manual_seed(config.seed)
    env, rng, T = train.make_env(config.game), np.random.default_rng(config.seed), config.batch_length
    hierarchy.WorldModel = Model  # of which a Level is made
    level = train.make_agent(config, env).levels[0]
    pieces = [*map(np.load, sorted(Path(source).glob("replay-0/*.npz")))] or random_play(config, env, rng)
    play = {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}
    n = len(play["reward"])
    end = n - min(4096, n // 4)  # from here on it is held out

    def sequences(start):  # the arguments of WorldModel.loss, of the sequences that begin there
        batch = {name: torch.from_numpy(array[start[:, None] + np.arange(T)]).to(config.device)
                 for name, array in play.items()}
        action = hierarchy.onehot(batch["action"], level.action_shape[1]).flatten(-2)
        return level.observation(batch), action, batch["reward"], batch["is_first"], batch["is_terminal"]

    model, held_out, began = level.world_model, sequences(np.arange(end, n - T + 1, T)), time.process_time()
    for i in range(1, int(updates) + 1):
        batch = sequences(rng.integers(0, end - T + 1, config.batch_size))
        model.update_statistics(batch[0])
        model.loss(*batch)[0].backward()
        level.optimisers["model"].step()
        if i % max(1, int(updates) // 10) == 0:
            row = {"source": source, "model": Model.__name__, "commit": train.origin()["commit"],
                   "updates": i, "seconds": round(time.process_time() - began)}
            print(json.dumps(row | measure(model, *held_out)), flush=True)
            began = time.process_time()


if __name__ == "__main__":
    train.program(lambda argv: main(argv) if len(argv) > 1 else __doc__)
