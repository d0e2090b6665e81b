"""Train Hieros on a game, then play it for a score.

Read hierarchy.py and replay.py first. The loop is `train`, what it does in a step is in `Run`. Two things
besides learning take most of the lines: a run may be killed at any moment and goes on as if it had not been,
and whatever a user can mend is said in one line.

examples:
  python train.py --game pong                            writes runs/pong-0
  python train.py --game breakout --levels 1 --seed 3    the flat agent, in runs/breakout-3
  python train.py --game CartPole-v1                     a few minutes
  python train.py --logdir runs/pong-0 --resume          goes on where it was stopped or killed
  python train.py --preset debug --logdir runs/try       does it work at all? in under a minute

presets: paper, for Atari on a GPU; cpu, an hour on two cores; vector, for observations that are no images,
minutes; debug, under a minute; auto, one of the first three by game and device

exit codes: 0 done; 1 a loss was not finite; 2 the command, a file or your environment is wrong, one line on
the standard error says what; 130 or 143 stopped by Ctrl+C or SIGTERM, and saved
"""

import argparse
import contextlib
import ctypes
import dataclasses
import difflib
import functools
import importlib
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import traceback
import zipfile
from pathlib import Path

import ale_py
import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box, Discrete, flatdim, flatten
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from tqdm import tqdm

from hierarchy import Hieros
from replay import Replay, replacing


# ------------------------------------------------------------------------------------------------------------
# Settings
# ------------------------------------------------------------------------------------------------------------

def setting(default, low=None, high=None, choices=None):
    """A field of Config: its default, and the values that make sense."""
    return dataclasses.field(default=default, metadata={"low": low, "high": high, "choices": choices})


@dataclasses.dataclass
class Config:
    """Every setting of a run; each is a flag of the command line. The defaults are the preset `paper`: the
    values of Hieros, unless the comment says otherwise."""

    # The run.
    game: str = setting("pong")             # Atari game in any spelling, CartPole-v1, my_module:MyEnv-v0
    preset: str = setting("auto", choices=["auto", "paper", "cpu", "vector", "debug"])  # auto takes what fits
    seed: int = setting(0, 0, 2 ** 63 - 1)  # seed of everything random
    device: str = setting("auto")           # auto, cpu, cuda, cuda:1, ...
    logdir: str = setting("")               # where the run is written (default runs/GAME-SEED)
    levels: int = setting(3, 1, 6)          # L, levels of the hierarchy; 1 is the flat agent
    k: int = setting(4, 2, 64)              # a level acts every k ticks of the level below

    # Experience.
    steps: int = setting(100_000, 1)        # agent steps; on Atari each is 4 frames
    warmup: int = setting(1000, 0)          # agent steps before the first update
    warmup_hold: int = setting(1, 1)        # steps for which each action is held before the first update
    train_every: int = setting(1, 1)        # agent steps an update of level 0; level i has k^i times fewer
    batch_size: int = setting(16, 1)        # B, sequences in a batch
    batch_length: int = setting(64, 2)      # T, steps in a sequence
    replay_size: int = setting(100_000, 1)  # steps that level 0 keeps; level i keeps k^i times fewer
    tau: float = setting(0.3, 0, 1)         # temperature of time-balanced sampling; 0 is uniform

    # World model (world_model.py, s5.py).
    stoch: int = setting(32, 1)             # categoricals in the stochastic state z
    classes: int = setting(32, 2, 255)      # classes of each of them
    hidden: int = setting(256, 1)           # H, size of h and features of the S5 layers
    state_size: int = setting(128, 8)       # P, state size of an S5 layer, a multiple of 8
    s5_layers: int = setting(8, 1)          # S5 layers
    units: int = setting(256, 1)            # units of every MLP layer
    mlp_layers: int = setting(2, 1)         # hidden layers of the MLPs
    depth: int = setting(24, 1)             # channels of the first convolution
    first_stride: int = setting(2, choices=[2, 4])  # stride of the first convolution, 4 to save its cost
    sharpness: float = setting(10.0, 0)     # factor of the initial posterior's logits (Hieros: 1)
    kl_warmup: int = setting(200, 0)        # updates without KL, which rises for as many more (Hieros: 0)
    decoded: float = setting(1.0, 0, 1)     # share of a batch's observations that is decoded to learn from

    # Behaviour (hierarchy.py).
    horizon: int = setting(16, 2)           # imagined steps
    starts: int = setting(1024, 1)          # imagined rollouts an update, at most batch_size * batch_length
    gamma: float = setting(0.997, 0, 1)     # discount of a tick
    lam: float = setting(0.95, 0, 1)        # lambda of the returns
    entropy_scale: float = setting(3e-4, 0)  # weight of the policy's entropy
    slow: float = setting(0.02, 0, 1)       # share by which the slow critics follow, an update
    extrinsic_weight: float = setting(1.0, 0)  # weight of the game's reward
    subgoal_weight: float = setting(0.3, 0)  # weight of the subgoal reward
    novelty_weight: float = setting(0.1, 0)  # weight of the novelty reward
    subgoal_categoricals: int = setting(8, 1)  # categoricals of a subgoal code
    subgoal_classes: int = setting(8, 2, 255)  # classes of each of them
    encoder_lr: float = setting(1e-4, 0)    # learning rate of the encoders, which belong to the world models
    model_lr: float = setting(1e-4, 0)      # learning rate of the world models
    actor_lr: float = setting(3e-5, 0)      # learning rate of the actors
    critic_lr: float = setting(3e-5, 0)     # learning rate of the critics
    autoencoder_lr: float = setting(1e-4, 0)  # learning rate of the subgoal autoencoders

    # The machine.
    precision: str = setting("tf32", choices=["tf32", "float32", "bf16"])  # of matrix products
    log_every: int = setting(500, 1)        # agent steps between lines of metrics.jsonl
    save_every: int = setting(2500, 1)      # agent steps between checkpoints
    eval_episodes: int = setting(100, 1)    # episodes of the final evaluation


PRESETS = {
    "paper": {},  # for a GPU
    # An hour on two CPU cores, where `paper` would take five days: smaller networks, and a tenth of the
    # updates, for which rates are higher.
    "cpu": dict(train_every=10, decoded=0.25, batch_size=8, batch_length=32, stoch=32, classes=16, hidden=128,
                state_size=64, s5_layers=2, units=128, first_stride=4, horizon=10, starts=128, gamma=0.99,
                slow=0.1, entropy_scale=1e-3, subgoal_weight=0.03, encoder_lr=3e-4, model_lr=1e-3,
                actor_lr=3e-4, critic_lr=1e-3, autoencoder_lr=1e-3),
    # Observations that are no images cost little: more updates than `cpu`, and done in minutes. Where a step
    # moves little, a random action that lasts gets further than one that trembles: so warmup holds it.
    "vector": dict(steps=20_000, warmup=2500, warmup_hold=4, train_every=6, batch_size=8, batch_length=32,
                   stoch=16, classes=16, hidden=64, state_size=32, s5_layers=2, units=64, kl_warmup=100,
                   horizon=15, starts=96, gamma=0.99, slow=0.1, entropy_scale=1e-3, subgoal_weight=0.03,
                   encoder_lr=1e-3, model_lr=1e-3, actor_lr=5e-4, critic_lr=3e-3, autoencoder_lr=1e-3),
    # Does everything run? It learns nothing in its minute.
    "debug": dict(steps=1200, replay_size=2000, train_every=10, warmup=300, batch_size=4, batch_length=16,
                  stoch=8, classes=8, hidden=64, state_size=32, s5_layers=2, units=64, mlp_layers=1, depth=8,
                  first_stride=4, kl_warmup=20, horizon=5, starts=32, log_every=100, save_every=400,
                  eval_episodes=2),
}
# What --resume may change, since it touches no number that is learned.
RESUMABLE = {"steps", "logdir", "device", "log_every", "save_every", "eval_episodes"}


class UsageError(Exception):
    """The user can mend this: one line that says what is wrong and what would be right; exit code 2."""

    def __init__(self, message):
        super().__init__(" ".join(line.strip() for line in message.splitlines()))


@contextlib.contextmanager
def blaming(what):
    """Turns whatever goes wrong in this block, where code or files of others are used, into one line: `what`,
    the error, the place. A long traceback through Gymnasium and torch would hide it."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"{what}: {error}") from error
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        reason = str(error).split(". ")[0][:300]  # torch would go on with dangerous advice
        raise UsageError(f"{what}: {type(error).__name__}, {reason} ({Path(place.filename).name},"
                         f" line {place.lineno})") from error


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises its errors, so that all errors end in one place (`program`)."""

    def error(self, message):
        raise UsageError(f"{message}; --help names every flag")


def parse_config(argv):
    """({explicitly given name: value}, resume) of a command line. UsageError; only --help exits."""
    parser = Parser(usage="train.py [any setting below] [--resume]", epilog=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    # Each setting is explained once, by its comment above, which is its help text, too.
    helps = dict(re.findall(r"^    (\w+): .*  # (.*)", Path(__file__).read_text("utf-8"), re.MULTILINE))
    for field in dataclasses.fields(Config):
        values = {name: preset.get(field.name, field.default) for name, preset in PRESETS.items()}
        if len(set(values.values())) == 1:
            values = {"default": field.default}
        defaults = ", ".join(f"{name} {value}" for name, value in values.items() if value != "")
        parser.add_argument("--" + field.name, default=argparse.SUPPRESS, type=field.type,
                            choices=field.metadata["choices"],
                            help=helps[field.name] + f" ({defaults})" * bool(defaults))
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint in --logdir;"
                        " where there is none yet, begin: a job that is started again may always say it")
    given = vars(parser.parse_args(argv))
    return given, given.pop("resume")


def make_config(given):
    """The Config of the explicitly given values over the preset's. UsageError if a value makes no sense."""
    config = Config(**given)
    config.game = game_name(config.game)
    if config.device == "auto":
        config.device = "cuda" if torch.cuda.is_available() else "cpu"
    if config.preset == "auto":
        config.preset = "paper" if config.device.startswith("cuda") else "cpu"
        if config.game not in atari_games() and len(make_env(config.game).observation_space.shape) == 1:
            config.preset = "vector"
    vars(config).update({name: value for name, value in PRESETS[config.preset].items() if name not in given})
    for field in dataclasses.fields(Config):
        value, (low, high, choices) = getattr(config, field.name), field.metadata.values()
        if not isinstance(value, (int, float) if field.type is float else field.type) or (
                choices and value not in choices):  # from a checkpoint: of the command line argparse says it
            raise TypeError(f"{field.name} {value!r} is no such setting")
        if (low is not None and not low <= value < math.inf) or (high is not None and not value <= high):
            raise UsageError(f"--{field.name} {value} is out of range: "
                             + (f"at least {low}" if high is None else f"{low} to {high}"))
    if config.steps < config.warmup:
        raise UsageError(f"--steps {config.steps} ends before the first update, at --warmup {config.warmup}")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", config.device):
        raise UsageError(f"--device {config.device}: only cpu and cuda can; mps lacks complex numbers")
    with blaming(f"--device {config.device} cannot be used here"):
        torch.zeros(1, device=config.device)
    config.logdir = config.logdir or "runs/" + re.sub(r"[^\w.-]", "_", f"{config.game}-{config.seed}")
    return config


# ------------------------------------------------------------------------------------------------------------
# The game
# ------------------------------------------------------------------------------------------------------------

# Mean scores of a random policy and of a human tester on the 26 games of Atari 100k (published; they come
# with every Atari 100k paper, first in Mnih et al. 2015 and Wang et al. 2016).
REFERENCE = {  # game: (random, human)
    "alien": (227.8, 7127.7), "amidar": (5.8, 1719.5), "assault": (222.4, 742.0), "asterix": (210.0, 8503.3),
    "bank_heist": (14.2, 753.1), "battle_zone": (2360.0, 37187.5), "boxing": (0.1, 12.1),
    "breakout": (1.7, 30.5), "chopper_command": (811.0, 7387.8), "crazy_climber": (10780.5, 35829.4),
    "demon_attack": (152.1, 1971.0), "freeway": (0.0, 29.6), "frostbite": (65.2, 4334.7),
    "gopher": (257.6, 2412.5), "hero": (1027.0, 30826.4), "jamesbond": (29.0, 302.8),
    "kangaroo": (52.0, 3035.0), "krull": (1598.0, 2665.5), "kung_fu_master": (258.5, 22736.3),
    "ms_pacman": (307.3, 6951.6), "pong": (-20.7, 14.6), "private_eye": (24.9, 69571.3),
    "qbert": (163.9, 13455.0), "road_runner": (11.5, 7845.0), "seaquest": (68.4, 42054.7),
    "up_n_down": (533.4, 11693.2)}


@functools.cache
def atari_games():
    """{name: environment id} of every game that ale_py brings: {"ms_pacman": "ALE/MsPacman-v5", ...}."""
    gymnasium.register_envs(ale_py)
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # no banner
    return {re.sub(r"\B([A-Z])", r"_\1", id[4:-3]).lower(): id for id, spec in gymnasium.registry.items()
            if spec.namespace == "ALE" and spec.version == 5}


def game_name(game):
    """The one name of a game: ours for Atari, in whatever spelling; Gymnasium's for all else, which may begin
    with a module to import. Raises UsageError with the nearest names if there is none."""
    def letters(text):
        return "".join(c for c in text.lower() if c.isalnum())

    module, _, id = game.rpartition(":")
    if module:
        with blaming(f"--game {game}: importing {module} fails"):
            importlib.import_module(module)  # which registers its environments
    others = [id for id, spec in gymnasium.registry.items() if not str(spec.entry_point).startswith("ale_py")]
    if id in others:
        return game
    known = {letters(name): name for name in [*others, *atari_games()]}
    # The names under which ale_py registers a game, ALE/Pong-v5, PongNoFrameskip-v4, are spellings, too.
    plain = letters(re.sub(r"^ALE/|(NoFrameskip|Deterministic)?-v[045]$", "", game))
    if known.get(plain) in atari_games():
        return known[plain]
    near = ", ".join(known[name] for name in difflib.get_close_matches(letters(id), known)) or "none"
    raise UsageError(f"unknown game '{game}'; nearest: {near}; there are Atari's, such as pong, Gymnasium's,"
                     " such as CartPole-v1, and your own, my_module:MyEnv-v0")


def make_env(game, **options):
    """The environment of a `game_name`. options: for Gymnasium's, such as render_mode."""
    return Atari(game) if game in atari_games() else Registered(game, **options)


@functools.cache
def area_weights(inputs, outputs):
    """(outputs, inputs): how much of each input pixel falls into each output pixel; every row sums to one."""
    edges, pixel = np.arange(outputs + 1) * (inputs / outputs), np.arange(inputs)
    overlap = np.minimum(edges[1:, None], pixel + 1) - np.maximum(edges[:-1, None], pixel)
    return torch.from_numpy((overlap.clip(min=0) * (outputs / inputs)).astype(np.float32))


def shrink(image):
    """An image (height, width[, 1 or 3]) as (64,64,3) bytes: the exact mean over each area, in float32.

    By torch: NumPy's matmul has threads of its own, which fight torch's and make acting five times slower.
    """
    height, width = image.shape[:2]
    with torch.autocast("cpu", enabled=False):
        pixels = torch.from_numpy(np.ascontiguousarray(image, np.float32)).view(height, -1)
        rows = (area_weights(height, 64) @ pixels).view(64, width, -1)
        # Columns in front, so that it is one product again: 64 small ones take four times as long.
        columns = area_weights(width, 64) @ rows.transpose(0, 1).reshape(width, -1)
        return columns.view(64, 64, -1).transpose(0, 1).round().byte().expand(64, 64, 3).numpy()


IMAGE = Box(0, 255, (64, 64, 3), np.uint8)


class Atari(gymnasium.Env):
    """An Atari game by the PROTOCOL of Atari 100k, with the minimal action set; rewards are unclipped, and a
    lost life does not end the episode.

    Observations, (64,64,3) bytes, are the pixel-wise maximum of the last two frames (some games draw their
    sprites only on every other one), averaged down.
    """

    REPEAT, NOOPS, MAX_FRAMES = 4, 30, 108_000
    PROTOCOL = f"action repeat {REPEAT}, up to {NOOPS} no-ops, no sticky actions, at most {MAX_FRAMES} frames"

    def __init__(self, game):
        with blaming(f"{game} cannot be made"):
            self.game = gymnasium.make(atari_games()[game], frameskip=1, repeat_action_probability=0.0,
                                       full_action_space=False, disable_env_checker=True).unwrapped
        self.observation_space, self.action_space = IMAGE, self.game.action_space
        self.max_steps = self.MAX_FRAMES // self.REPEAT  # of an episode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.screen, _ = self.game.reset(seed=seed)
        self.previous, self.frames = self.screen, 0  # the frame before the last; frames of this episode
        for _ in range(self.np_random.integers(self.NOOPS + 1)):
            if self._frame(0)[1]:
                self.previous = self.screen = self.game.reset()[0]
        return self._observation(), {}

    def step(self, action):
        reward, terminated, truncated = 0.0, False, False
        for _ in range(self.REPEAT):
            r, terminated = self._frame(action)
            reward, truncated = reward + r, self.frames >= self.MAX_FRAMES
            if terminated or truncated:
                break
        return self._observation(), reward, terminated, truncated and not terminated, {}

    def _frame(self, action):
        # The screen is taken after *every* frame: also an episode that ends inside the repeat shows its end.
        self.previous = self.screen
        self.screen, reward, terminated, _, _ = self.game.step(action)
        self.frames += 1
        return reward, terminated

    def _observation(self):
        return shrink(np.maximum(self.previous, self.screen))

    def get_state(self):
        """Everything that a resumed run needs to go on with the very next frame."""
        return {"ale": np.frombuffer(self.game.ale.cloneState(include_rng=True).serialize(), np.uint8),
                "previous": self.previous, "screen": self.screen, "frames": self.frames,
                "rng": self.np_random.bit_generator.state}

    def set_state(self, state):
        """The inverse of get_state."""
        self.reset(seed=0)
        self.game.ale.restoreState(ale_py.ALEState(state["ale"].tobytes()))
        self.previous, self.screen, self.frames = state["previous"], state["screen"], int(state["frames"])
        self.np_random.bit_generator.state = state["rng"]
        self._observation()  # screens that do not fit each other are noticed now


class Registered(gymnasium.Wrapper):
    """Any other environment of Gymnasium with discrete actions, as the agent sees it. Its spaces decide:

        image of uint8, (height, width[, 1 or 3]) of any size    (64,64,3) bytes, as Atari's
        Box of one axis, floats or integers                      (D,) float32
        Discrete                                                 (n,) float32, one-hot

    The time limit is the environment's own; without one it is as long as Atari's: an evaluation must end.
    """

    def __init__(self, game, **options):
        self.name, self.t, id = game, 0, game.rpartition(":")[2]  # t: steps in this episode
        self.max_steps = gymnasium.spec(id).max_episode_steps or 27_000
        with blaming(f"{game} cannot be made"):
            super().__init__(gymnasium.make(id, max_episode_steps=self.max_steps, disable_env_checker=True,
                                            **options))
        seen, actions = self.env.observation_space, self.env.action_space
        shape = seen.shape or ()  # a Dict has None
        if isinstance(seen, Discrete) or isinstance(seen, Box) and len(shape) == 1:
            self.observation_space = Box(-np.inf, np.inf, (flatdim(seen),), np.float32)
        elif isinstance(seen, Box) and seen.dtype == np.uint8 and shape[2:] in ((), (1,), (3,)):
            self.observation_space = IMAGE
        else:
            wrapper = "TransformObservation" if len(shape) == 3 else "FlattenObservation"
            raise UsageError(f"{game} has the observations {seen}; supported: Box of one"
                             f" axis, images of uint8, Discrete; gymnasium.wrappers.{wrapper} converts them")
        if not isinstance(actions, Discrete) or actions.n > 256:  # the replay stores them as bytes
            raise UsageError(f"{game} has the actions {actions}; supported: Discrete, up to 256;"
                             " gymnasium.wrappers.TransformAction with a table of actions converts them")
        self.action_space = Discrete(int(actions.n))

    def _ask(self, method, *arguments, **options):
        """What the environment's reset or step returns, checked, the observation as the agent sees it."""
        with blaming(f"{self.name} fails at step {self.t} of an episode"):
            seen, *rest = method(*arguments, **options)
            array, space = np.asarray(seen), self.env.observation_space
            # Box.contains would refuse float64 where float32 is promised, as many environments do.
            if not (space.contains(seen) if isinstance(space, Discrete) else array.shape == space.shape
                    and ((space.low <= array) & (array <= space.high)).all()):  # NaN is not <= anything
                raise ValueError(f"an observation that is not in {space}")
            image = self.observation_space is IMAGE
            array = shrink(array) if image else flatten(space, seen).astype(np.float32)
            if not np.isfinite(array).all() or not np.isfinite(np.float32(rest[:-1])).all():
                raise ValueError("an observation or a reward that is not finite in float32")
            return array, *rest

    def reset(self, **options):
        self.t = 0
        return self._ask(self.env.reset, **options)

    def step(self, action):
        self.t += 1
        return self._ask(self.env.step, int(action) + int(self.env.action_space.start))

    def get_state(self):
        """What of any environment can be saved: its random numbers, where it has NumPy's."""
        return getattr(getattr(self.np_random, "bit_generator", None), "state", None)

    def set_state(self, state):
        """Goes on with these random numbers. The episode is lost: returns a new one's first observation."""
        self.reset(seed=0)
        if state:
            self.np_random.bit_generator.state = state
        return self.reset()[0]


# ------------------------------------------------------------------------------------------------------------
# Agent and checkpoint
# ------------------------------------------------------------------------------------------------------------

def make_agent(config, env):
    """The agent of a Config for an environment's spaces, on the Config's device."""
    # Said for the whole process: may a GPU shorten float32 to TF32, 10 bits of mantissa, in matrix products?
    # The recurrence of S5, in which errors would add up, is no such product: it keeps all of its bits.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.precision == "tf32"
    model = {name: getattr(config, name) for name in (
        "stoch", "classes", "hidden", "state_size", "s5_layers", "units", "mlp_layers", "depth",
        "first_stride", "sharpness", "kl_warmup", "decoded")} | {"memory": config.batch_length}
    behaviour = {name: getattr(config, name) for name in (
        "horizon", "starts", "gamma", "lam", "entropy_scale", "slow", "encoder_lr", "model_lr", "actor_lr",
        "critic_lr", "autoencoder_lr")}
    weights = {name: getattr(config, name + "_weight") for name in ("extrinsic", "subgoal", "novelty")}
    with torch.device(config.device):
        return Hieros(env.observation_space.shape, int(env.action_space.n), config.levels, config.k,
                      (config.subgoal_categoricals, config.subgoal_classes), weights, model, behaviour)


def autocast(config):
    """The context in which the agent of a Config computes. It keeps no cast weights: dreams would use those
    from before the model's step, and weights first cast under no_grad would get no gradient."""
    return torch.autocast(torch.device(config.device).type, torch.bfloat16, config.precision == "bf16",
                          cache_enabled=False)


# A checkpoint may come from a stranger or be edited by hand: it must neither execute anything nor end in a
# traceback. torch's safe loading knows tensors, numbers, texts, dicts and lists, so it is made of these.

def tree_map(change, tree):
    """change(node) of every node of nested dicts and lists, the inner ones first."""
    if isinstance(tree, dict):
        tree = {key: tree_map(change, value) for key, value in tree.items()}
    elif isinstance(tree, (list, tuple)):
        tree = [tree_map(change, value) for value in tree]
    return change(tree)


def pack(node):
    """A NumPy array as {"numpy": tensor}; anything else as it is."""
    return {"numpy": torch.tensor(node)} if isinstance(node, np.ndarray) else node


def unpack(node):
    """The inverse of pack."""
    return node["numpy"].cpu().numpy() if isinstance(node, dict) and set(node) == {"numpy"} else node


def load_checkpoint(path, device):
    """The dictionary that Run.save wrote."""
    with zipfile.ZipFile(path) as file:
        if file.testzip():  # torch.load would not look, and go on with other weights
            raise ValueError("a checksum is wrong")
    checkpoint = tree_map(unpack, torch.load(path, map_location=device, weights_only=True))
    # A run from before this was a setting goes on as it was, not as the preset is now.
    checkpoint["config"] = {"decoded": 1.0} | checkpoint["config"]
    return checkpoint


def history(checkpoint):
    """{"step", "seconds", "curve", "commits"} of a run so far, checked: it may have been edited by hand."""
    step, seconds = int(checkpoint["step"]), float(checkpoint["seconds"])
    curve = [[int(when), float(score)] for when, score in checkpoint["curve"]]
    times = [0, *(when for when, _ in curve), step]
    if times != sorted(times) or not seconds >= 0:
        raise ValueError(f"step {step}, {seconds} seconds and its curve cannot be true together")
    return {"step": step, "seconds": seconds, "curve": curve, "commits": [*map(str, checkpoint["commits"])]}


@contextlib.contextmanager
def alone_in(directory):
    """Keeps every other process out of the directory of a run: on a cluster a job is started again while the
    old one still lives, and two would write one log. The lock is the system's: it goes with this process,
    however that ends, so a killed one does not block the next."""
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / "lock", "a") as file:
        try:
            import fcntl
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"--logdir {directory} is in use: another process trains there")
        except (ImportError, OSError):  # Windows, or a file system without locks
            pass
        yield


# ------------------------------------------------------------------------------------------------------------
# The run: all that a checkpoint must hold
# ------------------------------------------------------------------------------------------------------------

def env_step(observation, reward=0.0, terminated=False, truncated=False, *_, is_first=False):
    """What an environment's step gave, as arrays of one environment: the arguments of Hieros.act."""
    # A time limit ends the episode, but not the world: only what is terminal has no future worth. (The
    # published code takes both for death, so an agent that survives learns that it will die.)
    return {"observation": observation[None], "reward": np.float32([reward]),
            "is_first": np.array([is_first]), "is_last": np.array([terminated or truncated]),
            "is_terminal": np.array([terminated])}


class Recorded:
    """The update of a level, on a GPU as one CUDA graph: the second call records it, later ones play it back.

    An update is thousands of kernels so small that a GPU has done each before the CPU has asked for the next;
    of a graph all are asked for at once. It holds addresses, not values: the batch is copied to where the
    recorded one lies, metrics come out where they came out then, and the weights stay in their places.
    """

    def __init__(self, update):
        self.update, self.batch, self.graph = update, None, None

    def __call__(self, batch):
        if self.batch is None or not batch["reward"].is_cuda:
            self.batch = batch  # the first call, in which Adam makes its moments, is not for recording
            return self.update(batch)
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            # In it nothing is computed yet. It records what its own GPU is asked to do: --device cuda:1, too.
            with torch.cuda.device(batch["reward"].device), torch.cuda.graph(self.graph):
                self.metrics = self.update(self.batch)
        for name, tensor in batch.items():
            self.batch[name].copy_(tensor)
        self.graph.replay()
        return self.metrics


class Run:
    """Agent, environment, replays and counters of one run, what it does in a step, how it is saved.

    Whatever the next step depends on is here, random numbers too, so that a resumed run gives the same bits
    as one that was never stopped. That can be tested; "about as good as" could not.
    """

    def __init__(self, config, env):
        self.config, self.env, self.directory = config, env, Path(config.logdir)
        torch.manual_seed(config.seed)
        self.rng = np.random.default_rng(config.seed)
        with blaming("the networks cannot be made"):
            self.agent = make_agent(config, env)
        self.discretised = self.agent.discretise()  # of the S5 layers: once an update, not once a step
        self.update = [Recorded(level.update) for level in self.agent.levels]
        # Level i stores k^i times more rarely: with k^i times less room its replay reaches back equally far.
        with blaming(f"--replay_size {config.replay_size}"):  # too little for a sequence, too much for memory
            self.replays = [Replay(spec, -(-config.replay_size // config.k ** i), config.batch_length,
                                   config.tau, self.rng) for i, spec in enumerate(self.agent.specs)]
        self.memory = self.agent.initial_memory(1)
        self.now = env_step(env.reset(seed=config.seed)[0], is_first=True)
        self.step, self.score = 0, 0.0  # agent steps so far, return of this episode so far
        self.curve = []  # [agent step, return] of every finished episode
        self.updates = [0] * config.levels
        self.commits = [origin()["commit"] + "+" * bool(origin()["dirty"])]  # of all code that has trained it
        self.metrics = self.directory / "metrics.jsonl"
        self.sums = {}  # {level: (names of its metrics, their sums, number of updates)} since the last line
        self.seconds, self.logged = 0.0, 0  # wall time of training and step, at the last line of the log
        self.began = time.perf_counter()
        self.directory.mkdir(parents=True, exist_ok=True)

    def act(self):
        """Every level that is due updates its state and chooses. Returns, from level 0 upwards, what each of
        them has to remember."""
        level = self.memory["levels"][0]
        with autocast(self.config):
            self.memory, ticks = self.agent.act(self.memory, **self.now, discretised=self.discretised)
            # At first it plays at random; where it changes its mind at each step, it may get nowhere. What is
            # held must stand in the memory, too: the world model is told it as the last action.
            if self.step < self.config.warmup and self.memory["t"][0] % self.config.warmup_hold:
                ticks[0]["action"] = self.memory["levels"][0]["action"] = level["action"]
            return self.agent.transitions(ticks)

    def remember(self, transitions):
        """Into the replays."""
        for replay, transition in zip(self.replays, transitions):
            replay.add(transition)

    def play(self, action):
        """One step of the game."""
        given = self.env.step(action)
        self.now = env_step(*given)
        self.step, self.score = self.step + 1, self.score + float(given[1])

    def restart(self):
        """The next episode."""
        self.log({"episode/score": self.score, "episode/length": int(self.memory["t"][0])})
        self.curve.append([self.step, self.score])
        self.score = 0.0
        self.now = env_step(self.env.reset()[0], is_first=True)

    def learn(self):
        """One update of every level that is due and has enough to learn from. Level i is due k^i times more
        rarely, as it acts: so each level draws what it has stored equally often."""
        c = self.config
        for i, (level, replay) in enumerate(zip(self.agent.levels, self.replays)):
            if self.step >= c.warmup and self.step % (c.train_every * c.k ** i) == 0 and replay.starts:
                with autocast(c):
                    metrics = self.update[i](self.batch(i))
                # Summed on the device and fetched only for a line of the log: to fetch a number from a GPU is
                # to wait until it has done all that it was told to do before.
                values = torch.stack([value.float() for value in metrics.values()])
                _, sums, count = self.sums.get(i, (None, 0, 0))
                self.sums[i] = list(metrics), sums + values, count + 1
                with torch.no_grad():
                    self.discretised[i] = level.world_model.sequence.discretise()
                self.updates[i] += 1

    def batch(self, i):
        """A batch from the replay of level i, on the device. A GPU fetches pinned memory while the CPU goes
        on; from other memory each copy would wait until all updates before it are done."""
        batch = self.replays[i].sample(self.config.batch_size)
        batch = {name: torch.from_numpy(array) for name, array in batch.items()}
        if self.config.device.startswith("cuda"):
            batch = {name: tensor.pin_memory().to(self.config.device, non_blocking=True)
                     for name, tensor in batch.items()}
        return batch

    def log(self, values):
        """One more line of metrics.jsonl, a JSON object. The names are DreamerV3's where it has one."""
        with open(self.metrics, "a") as file:
            file.write(json.dumps({"step": self.step} | values) + "\n")

    def write_means(self):
        """The mean metrics of each level since the last time, and the speed. Raises FloatingPointError."""
        for level, (names, sums, count) in self.sums.items():
            means = {f"train/{name}": mean for name, mean in zip(names, (sums / count).tolist())}
            wrong = [name for name, mean in means.items() if not math.isfinite(mean)]
            if wrong:
                raise FloatingPointError(f"up to step {self.step}, level {level}: not finite: "
                                         f"{', '.join(wrong)}; the last checkpoint is from before")
            self.log({"level": level} | means)
        before, self.seconds = self.seconds, time.perf_counter() - self.began
        self.log({"seconds/total": self.seconds,
                  "fps/policy": (self.step - self.logged) / (self.seconds - before)})
        self.sums, self.logged = {}, self.step

    def save(self):
        """Write a checkpoint, such that a kill at any moment leaves one: first what the new one needs beside
        it, then itself under another name, then it takes the old one's name, and only then what the old one
        alone needed is deleted. Each file is on the disk before the next step."""
        if self.step > self.logged:
            self.write_means()  # which raises if a loss is not finite: that must not get into a checkpoint
        for i, replay in enumerate(self.replays):
            replay.save(self.directory / f"replay-{i}")
        with open(self.metrics, "a") as file:
            os.fsync(file.fileno())
            log = {"bytes": file.tell()}
        checkpoint = {
            "config": dataclasses.asdict(self.config), "weights": self.agent.state_dict(),
            "optimisers": [{name: o.adam.state_dict() for name, o in level.optimisers.items()}
                           for level in self.agent.levels],
            "env": self.env.get_state(), "log": log, "curve": self.curve,
            "rng": self.rng.bit_generator.state, "torch_rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all(), "memory": self.memory, "now": self.now,
            "replay_totals": [replay.total for replay in self.replays], "step": self.step,
            "seconds": self.seconds, "score": self.score, "updates": self.updates, "commits": self.commits}
        try:
            with replacing(self.directory / "checkpoint.pt") as file:
                torch.save(tree_map(pack, checkpoint), file)
        except RuntimeError as error:  # torch hides what the disk has said behind an error of its own
            raise error.__context__ or error
        for i, replay in enumerate(self.replays):
            replay.prune(self.directory / f"replay-{i}")

    def restore(self, checkpoint):
        """Continue where `save` was called. Returns whether within the same episode."""
        self.agent.load_state_dict(checkpoint["weights"])
        self.discretised = self.agent.discretise()
        for level, states in zip(self.agent.levels, checkpoint["optimisers"]):
            for name, state in states.items():
                adam = level.optimisers[name].adam
                # Its state alone: options, such as its learning rate, are of the settings and of the device.
                adam.load_state_dict(adam.state_dict() | {"state": state["state"]})
        past = history(checkpoint)
        vars(self).update(past, commits=list(dict.fromkeys(past["commits"] + self.commits)))
        self.logged, self.score = self.step, float(checkpoint["score"])
        self.updates = [int(count) for count in checkpoint["updates"]]
        self.memory, self.now = checkpoint["memory"], checkpoint["now"]
        observation = self.env.set_state(checkpoint["env"])
        if observation is not None:  # the episode of the checkpoint could not be saved
            self.now, self.score = env_step(observation, is_first=True), 0.0
        self.act()  # on trial: what does not fit is noticed now
        self.memory = checkpoint["memory"]
        # The random numbers after all that draws some.
        self.rng.bit_generator.state = checkpoint["rng"]
        torch.set_rng_state(checkpoint["torch_rng"].cpu())
        for i, state in enumerate(checkpoint["cuda_rng"][:torch.cuda.device_count()]):
            torch.cuda.set_rng_state(state.cpu(), i)
        # Last, since the rest deletes: what was written after the checkpoint will be written again.
        for i, (replay, total) in enumerate(zip(self.replays, checkpoint["replay_totals"], strict=True)):
            replay.load(self.directory / f"replay-{i}", total)
        with open(self.metrics, "a") as file:
            file.truncate(min(checkpoint["log"]["bytes"], file.tell()))
        return observation is None


# ------------------------------------------------------------------------------------------------------------
# The loop
# ------------------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def noting_signals():
    """The list of signals, Ctrl+C and SIGTERM, that have come, which do nothing else meanwhile: they would
    break off an update or a step of the game, and a checkpoint must not hold one half of it."""
    noted = []
    handlers = {number: signal.signal(number, lambda number, frame: noted.append(number))
                for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noted
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def train(run, progress=True):
    """Act, learn, log, save, until config.steps. Returns the number of the signal that ended it, else 0."""
    config = run.config
    run.began = time.perf_counter() - run.seconds  # as if it had never been interrupted
    with noting_signals() as stopped, tqdm(total=config.steps, initial=run.step, unit="step", mininterval=1.0,
                                           disable=not progress, dynamic_ncols=True) as bar:
        while run.step < config.steps and not stopped:
            transitions = run.act()
            run.remember(transitions)
            if run.now["is_last"][0]:
                run.restart()  # the last step is remembered, for its reward and its end; its action has no
                continue       # effect, so it is not one of config.steps
            run.play(int(transitions[0]["action"][0]))
            run.learn()
            bar.update()
            if run.step % config.log_every == 0:
                run.write_means()
                scores = [score for _, score in run.curve[-10:]] or [math.nan]
                bar.set_postfix(score=scores[-1], mean10=f"{np.mean(scores):.1f}", updates=sum(run.updates),
                                refresh=False)
            if run.step % config.save_every == 0:
                run.save()
        run.save()
    return stopped[0] if stopped else 0


# ------------------------------------------------------------------------------------------------------------
# The score
# ------------------------------------------------------------------------------------------------------------

def play(agent, make_env, episodes, seed=0, progress=True):
    """The returns of `episodes` episodes, played side by side by an agent that samples its actions; the agent
    None plays at random. Each environment plays equally many: those that end first are the short ones."""
    n = max(d for d in range(1, 17) if episodes % d == 0)
    # After an episode's end the next step resets, whatever the action: the agent sees the end, then a start.
    envs = SyncVectorEnv([make_env] * n, autoreset_mode=AutoresetMode.NEXT_STEP)
    envs.action_space.seed(seed)
    observation, _ = envs.reset(seed=seed)
    reward, first, last, terminal = np.zeros(n), np.ones(n, bool), np.zeros(n, bool), np.zeros(n, bool)
    returns, score, steps = [[] for _ in range(n)], np.zeros(n), 0
    limit = episodes * getattr(envs.envs[0], "max_steps", math.inf)
    if agent:
        memory, discretised = agent.initial_memory(n), agent.discretise()
    with tqdm(total=episodes, desc="evaluation" if agent else "random play", unit="episode", miniters=0,
              mininterval=1.0, disable=not progress, dynamic_ncols=True) as bar:
        while min(map(len, returns)) < episodes // n:
            action = envs.action_space.sample()
            if agent:
                memory, ticks = agent.act(memory, observation, reward, first, last, terminal, discretised)
                action = ticks[0]["action"].argmax(-1).cpu().numpy()
            observation, reward, terminal, truncated, _ = envs.step(action)
            first, last = last, terminal | truncated
            score, steps = score + reward, steps + n
            # The first episode may take an hour: the bar counts steps, too.
            bar.set_postfix_str(f"{steps:,} steps of at most {limit:,}", refresh=False)
            for i in np.flatnonzero(last):
                if len(returns[i]) < episodes // n:
                    returns[i].append(float(score[i]))
                score[i] = 0.0
            bar.update(sum(map(len, returns)) - bar.n)
    envs.close()
    return sum(returns, [])


@functools.cache  # asked when a run begins: that code is running, whatever is committed meanwhile
def origin():
    """What a result comes from: command, commit, whether files were changed since it ("dirty"), versions."""
    try:
        git = ["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty=+", "--exclude=*"]
        commit = subprocess.check_output(git, stderr=subprocess.DEVNULL, text=True).strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    versions = {"python": sys.version.split()[0], "torch": torch.__version__, "numpy": np.__version__,
                "gymnasium": gymnasium.__version__, "ale-py": ale_py.__version__}
    return {"command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]), "commit": commit.rstrip("+"),
            "dirty": commit.endswith("+"), "versions": versions}


def statistics(returns):
    """Mean and standard error of some returns: the error of one agent's episodes. Seeds differ by more."""
    error = float(np.std(returns, ddof=1) / len(returns) ** 0.5) if len(returns) > 1 else None
    return {"mean": float(np.mean(returns)), "standard_error": error, "returns": returns}


def evaluation(config, agent, past, episodes, seed):
    """Play for a score. Returns all that is known of a run, for a JSON file. past: what `history` returns."""
    make, device = functools.partial(make_env, config.game), config.device
    with autocast(config):
        returns = play(agent, make, episodes, seed)
    score, (random, human) = statistics(returns), REFERENCE.get(config.game, (None, None))
    # Where no score is published random play is measured, to compare.
    random_measured = statistics(play(None, make, 20, seed)) if random is None else None
    protocol = f"{episodes} episodes, sampled actions"
    if config.game in atari_games():
        protocol += ", " + Atari.PROTOCOL
    return {"game": config.game, "levels": config.levels, "seed": config.seed, "preset": config.preset,
            "agent_steps": past["step"], "hours": round(past["seconds"] / 3600, 3),
            **score, "median": float(np.median(returns)), "random": random, "human": human,
            "human_normalised": None if human is None else (score["mean"] - random) / (human - random),
            "random_measured": random_measured, "protocol": protocol, "evaluation_seed": seed,
            "threads": torch.get_num_threads(), "trained_by": past["commits"],
            "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
            "config": dataclasses.asdict(config), "curve": past["curve"], **origin()}


def report(summary):
    """The score as one line of text."""
    line = f"{summary['game']} after {summary['agent_steps']} steps: score {summary['mean']:.1f}"
    if summary["standard_error"] is not None:
        line += f" +- {summary['standard_error']:.1f} (standard error of {len(summary['returns'])} episodes)"
    if summary["human"] is not None:
        line += (f"; random {summary['random']}, human {summary['human']} (published): human-normalised"
                 f" {summary['human_normalised']:.3f}")
    if measured := summary["random_measured"]:
        line += f"; random play {measured['mean']:.1f} +- {measured['standard_error']:.1f} (20 episodes)"
    return line


def write_json(value, file):
    """To a file, or to the standard output where file is "-"."""
    if str(file) == "-":
        print(json.dumps(value, indent=1))
    else:
        with replacing(Path(file)) as opened:
            opened.write((json.dumps(value, indent=1) + "\n").encode())


# ------------------------------------------------------------------------------------------------------------
# The command line
# ------------------------------------------------------------------------------------------------------------

class Stream:
    """The standard output or error, on which nothing depends: where its reader is gone (a closed terminal, a
    broken pipe), the run goes on unseen."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        try:
            self.stream.write(text)
            self.stream.flush()  # now, where an error can be caught, and not when the program ends
        except OSError:
            self.stream = open(os.devnull, "w")


def program(main):
    """Run main(argv) as a program that ends with an exit code, and with one line where something is wrong."""
    name = Path(sys.argv[0]).name
    sys.stdout, sys.stderr = Stream(sys.stdout), Stream(sys.stderr)
    try:
        sys.exit(main(sys.argv[1:]))
    except UsageError as error:
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(2)
    except FloatingPointError as error:
        sys.exit(f"{name}: {error}")  # which is exit code 1
    except KeyboardInterrupt:  # while it trains, Ctrl+C saves first (noting_signals)
        print(f"{name}: interrupted; what was saved before stays", file=sys.stderr)
        sys.exit(130)


def keep_freed_memory():
    """Ask glibc to keep freed memory for the next tensor. Else every tensor over some hundred kB is mapped
    anew and zeroed page by page, which makes an update on the CPU a third slower."""
    with contextlib.suppress(OSError, AttributeError):  # no glibc
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX: map no blocks of their own
        libc.mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD: give back only above 2 GiB


def resumed(path, given, device):
    """(Run of a checkpoint, with what the command line may change; what to tell the user of it)."""
    with blaming(f"{path} cannot be used"):
        checkpoint = load_checkpoint(path, device)
        stored = checkpoint["config"]
        config = make_config(stored | given | {"logdir": str(path.parent), "device": device})
        for name, value in dataclasses.asdict(config).items():
            if name not in RESUMABLE and value != stored.get(name, value):
                raise UsageError(f"--{name} {value} contradicts the run, which has {stored[name]}")
        run = Run(config, make_env(config.game))
        lost = "" if run.restore(checkpoint) else ", in a new episode, its own is lost"
        return run, f", resumed at step {run.step}{lost}"


def main(argv):
    """The command line. Returns the exit code."""
    keep_freed_memory()
    given, resume = parse_config(argv)
    place = make_config({name: given[name] for name in given.keys() & {"game", "seed", "logdir", "device"}})
    directory, checkpoint = Path(place.logdir), Path(place.logdir) / "checkpoint.pt"
    again = f"python train.py --logdir {shlex.quote(place.logdir)} --resume"
    try:
        # Before the lock, so that a wrong setting leaves no directory behind; all else after it, since two
        # processes may begin at the same time.
        config = None if checkpoint.exists() else make_config(given)
        with alone_in(directory):
            if config is None:
                if not resume:
                    raise UsageError(f"{directory} already exists: add --resume to go on, or choose another"
                                     " --logdir")
                return finish(*resumed(checkpoint, given, place.device), again)
            # A first save that was killed, or met a full disk, leaves empty files and unfinished ones.
            if any(path.is_file() and path.stat().st_size and path.suffix != ".tmp"
                   for path in directory.rglob("*")):
                raise UsageError(f"{directory} has other files and no checkpoint.pt: choose another --logdir")
            run = Run(config, make_env(config.game))
            run.save()  # from now on there is something to resume
            return finish(run, "", again)
    except OSError as error:
        note = f"; its last checkpoint is intact: make room, then {again}" * os.path.exists(checkpoint)
        raise UsageError(f"--logdir {directory} cannot be used: {error.strerror or error}{note}")


def finish(run, note, again):
    """Train a run to its end and score it. Returns the exit code."""
    config, directory = run.config, run.directory
    parameters = sum(p.numel() for name, p in run.agent.named_parameters() if "slow" not in name)
    precision = "float32" if (config.precision, config.device) == ("tf32", "cpu") else config.precision
    print(f"Hieros: {config.game}, preset {config.preset}, {config.levels} levels, {parameters / 1e6:.1f} M"
          f" parameters, device {config.device}, {precision}, writing to {directory}{note}")
    number = train(run)
    if number:
        print(f"stopped at step {run.step}, saved; continue with: {again}")
        return 128 + number
    open(directory / "evaluation.json.tmp", "wb").close()  # to know before playing that it can be written
    summary = evaluation(config, run.agent, history(vars(run)), config.eval_episodes, config.seed)
    write_json(summary, directory / "evaluation.json")  # first: there may be no terminal to print to
    print(report(summary))
    return 0


if __name__ == "__main__":
    program(main)
