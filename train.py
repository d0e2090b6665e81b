"""Train Hieros on an Atari game: `python train.py --game pong`.

In this file: every setting (Config), the game as the agent sees it (Atari), the run with its checkpoints
(Run), the loop (train), the score of a trained agent (play, result). Read hierarchy.py and replay.py first.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import difflib
import json
import math
import os
import pickle
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import ale_py
import gymnasium
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from hierarchy import Hieros
from replay import Replay, replacing


# ------------------------------------------------------------------------------------------------------------
# Settings
# ------------------------------------------------------------------------------------------------------------

def setting(default, help, low=None, high=None, choices=None):
    """A field of Config: its help text and the values that make sense."""
    return dataclasses.field(default=default, metadata=dict(help=help, low=low, high=high, choices=choices))


@dataclasses.dataclass
class Config:
    """Every setting of a run; each is a flag of the command line. The defaults are the preset `paper`: the
    values of Hieros, unless the help text says otherwise."""

    game: str = setting("pong", "Atari game, in any spelling: pong, ms_pacman, MsPacman")
    preset: str = setting("auto", "paper, cpu (about an hour on two cores), debug (under a minute), or auto:"
                          " paper on a CUDA device, cpu otherwise", choices=["auto", "paper", "cpu", "debug"])
    seed: int = setting(0, "seed of everything random", 0, 2 ** 63 - 1)
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, ...")
    logdir: str = setting("", "where the run is written (default runs/GAME-SEED)")
    levels: int = setting(3, "L, levels of the hierarchy; 1 is the flat agent", 1, 6)
    k: int = setting(4, "a level acts every k ticks of the level below", 2, 64)

    steps: int = setting(100_000, "agent steps; each is 4 frames", 1)
    warmup: int = setting(1000, "agent steps before the first update", 0)
    train_every: int = setting(
        1, "agent steps per update of level 0; level i updates k^i times more rarely", 1)
    batch_size: int = setting(16, "B, sequences in a batch", 1)
    batch_length: int = setting(64, "T, steps in a sequence", 2)
    replay_size: int = setting(100_000, "steps that level 0 keeps; level i keeps k^i times fewer", 1)
    tau: float = setting(0.3, "temperature of time-balanced sampling; 0 is uniform", 0, 1)

    stoch: int = setting(32, "categoricals in the stochastic state z", 1)
    classes: int = setting(32, "classes of each of them", 2, 255)
    hidden: int = setting(256, "H, size of h and features of the S5 layers", 1)
    state_size: int = setting(128, "P, state size of an S5 layer, a multiple of 8", 8)
    s5_layers: int = setting(8, "S5 layers", 1)
    units: int = setting(256, "units of every MLP layer", 1)
    mlp_layers: int = setting(2, "hidden layers of the MLPs", 1)
    depth: int = setting(24, "channels of the first convolution", 1)
    first_stride: int = setting(2, "stride of the first convolution: 2, or 4 to save its cost",
                                choices=[2, 4])
    sharpness: float = setting(1.0, "factor of the initial posterior's logits", 0)
    kl_warmup: int = setting(0, "updates of a level without the KL that makes z foreseeable;"
                             " then it rises for as many", 0)
    observation_variance: float = setting(
        0.0, "scale each pixel by its deviation, and all to this variance together; 0: as they are. 60, with"
        " --sharpness 30 --encoder_lr 1e-4 at preset cpu, finds small balls", 0)
    sequence: str = setting("s5", "sequence model of the world models; gru: to compare",
                            choices=["s5", "gru"])

    horizon: int = setting(16, "imagined steps", 2)
    starts: int = setting(1024, "imagined rollouts an update, at most batch_size * batch_length", 1)
    gamma: float = setting(0.997, "discount of a tick", 0, 1)
    lam: float = setting(0.95, "lambda of the returns", 0, 1)
    entropy_scale: float = setting(3e-4, "weight of the policy's entropy", 0)
    slow: float = setting(0.02, "share by which the slow critics follow, an update", 0, 1)
    extrinsic_weight: float = setting(1.0, "weight of the game's reward", 0)
    subgoal_weight: float = setting(0.3, "weight of the subgoal reward", 0)
    novelty_weight: float = setting(0.1, "weight of the novelty reward", 0)
    subgoal_categoricals: int = setting(8, "categoricals of a subgoal code", 1)
    subgoal_classes: int = setting(8, "classes of each of them", 2, 255)

    encoder_lr: float = setting(1e-4, "learning rate of the encoders, which belong to the world models", 0)
    model_lr: float = setting(1e-4, "learning rate of the world models", 0)
    actor_lr: float = setting(3e-5, "learning rate of the actors", 0)
    critic_lr: float = setting(3e-5, "learning rate of the critics", 0)
    autoencoder_lr: float = setting(1e-4, "learning rate of the subgoal autoencoders", 0)

    precision: str = setting("float32", "arithmetic of the matrix products", choices=["float32", "bf16"])
    compile: bool = setting(False, "torch.compile dreams and losses: takes a minute, saves nothing on a CPU")
    log_every: int = setting(500, "agent steps between lines of metrics.jsonl", 1)
    save_every: int = setting(2500, "agent steps between checkpoints", 1)
    eval_episodes: int = setting(100, "episodes of the final evaluation", 1)


PRESETS = {
    "paper": {},
    "cpu": dict(train_every=12, batch_size=8, batch_length=32, stoch=32, classes=16, hidden=128,
                state_size=64, s5_layers=2, units=128, first_stride=4, sharpness=10.0, kl_warmup=200,
                horizon=10, starts=128, gamma=0.99, slow=0.1, entropy_scale=1e-3, subgoal_weight=0.03,
                encoder_lr=3e-4, model_lr=1e-3, actor_lr=3e-4, critic_lr=1e-3, autoencoder_lr=1e-3),
    "debug": dict(steps=1200, replay_size=2000, train_every=10, warmup=300, batch_size=4, batch_length=16,
                  stoch=8, classes=8, hidden=64, state_size=32, s5_layers=2, units=64, mlp_layers=1, depth=8,
                  first_stride=4, horizon=5, starts=32, log_every=100, save_every=400, eval_episodes=2),
}
# What --resume may change.
RESUMABLE = {"steps", "logdir", "device", "log_every", "save_every", "eval_episodes", "compile"}


class UsageError(Exception):
    """The user can mend this: one line that says what is wrong and what would be right; exit code 2."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are UsageErrors: one line; an unknown flag gets the nearest known."""

    def error(self, message):
        if message.startswith("unrecognized arguments: --"):
            flag = message.split(": ", 1)[1].split()[0].split("=")[0]
            near = difflib.get_close_matches(flag, self._option_string_actions, 1)
            advice = f", did you mean {near[0]}?" if near else "; --help lists them all"
            message = f"unknown flag {flag}" + advice
        raise UsageError(message)


EXAMPLES = """examples:
  python train.py --game pong                            writes runs/pong-0
  python train.py --game breakout --levels 1 --seed 3    the flat agent, in runs/breakout-3
  python train.py --logdir runs/pong-0 --resume          goes on where it was stopped or killed
  python train.py --preset debug --logdir runs/try       does it work at all? in under a minute
  python train.py --preset paper --profile               how long would it take on this machine?

exit codes: 0 done; 1 a loss was not finite; 2 the command or a file is wrong, one line on the standard error
says what; 130 or 143 stopped by Ctrl+C or SIGTERM, and saved
"""


def parse_config(argv):
    """({explicitly given name: value}, resume, profile) of a command line. UsageError; only --help exits."""
    parser = Parser(description="Train Hieros on an Atari game, then play it for a score.", epilog=EXAMPLES,
                    usage="train.py [--game str] [--seed int] [any setting below] [--resume|--profile]",
                    formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    for field in dataclasses.fields(Config):
        values = {name: preset.get(field.name, field.default) for name, preset in PRESETS.items()}
        if len(set(values.values())) == 1:
            values = {"default": field.default}
        defaults = ", ".join(f"{name} {value}" for name, value in values.items() if value != "")
        choices = field.metadata["choices"]
        kind = dict(action="store_true") if field.type is bool else dict(
            type=field.type, choices=choices,
            metavar="|".join(map(str, choices)) if choices else field.type.__name__)
        parser.add_argument("--" + field.name, default=argparse.SUPPRESS, **kind,
                            help=field.metadata["help"] + f" ({defaults})" * bool(defaults))
    parser.add_argument("--resume", action="store_true",
                        help="continue the run in --logdir from its last checkpoint")
    parser.add_argument("--profile", action="store_true",
                        help="do not train: measure what an update costs and how long the whole run would"
                        " take here, and write that to LOGDIR/profile.json (default runs/GAME-SEED-profile)")
    given = vars(parser.parse_args(argv))
    return given, given.pop("resume"), given.pop("profile")


def make_config(given):
    """The Config of the explicitly given values over the preset's. UsageError if a value makes no sense."""
    config = Config(**given)
    if config.device == "auto":
        config.device = "cuda" if torch.cuda.is_available() else "cpu"
    if config.preset == "auto":
        config.preset = "paper" if config.device.startswith("cuda") else "cpu"
    explicit = {key: getattr(config, key) for key in given if key not in ("preset", "device")}
    config = dataclasses.replace(config, **(PRESETS[config.preset] | explicit))
    for field in dataclasses.fields(Config):
        value, low, high = getattr(config, field.name), field.metadata["low"], field.metadata["high"]
        if (low is not None and not low <= value < math.inf) or (high is not None and not value <= high):
            raise UsageError(f"--{field.name} {value} is out of range: "
                             + (f"at least {low}" if high is None else f"{low} to {high}"))
    if config.state_size % 8:
        raise UsageError(f"--state_size {config.state_size} must be a multiple of 8"
                         " (4 blocks of conjugate pairs)")
    if config.starts > config.batch_size * config.batch_length:
        raise UsageError(f"--starts {config.starts} is more than the"
                         f" {config.batch_size} x {config.batch_length} states of a batch")
    if config.replay_size < config.batch_length * config.k ** (config.levels - 1):
        raise UsageError(f"--replay_size {config.replay_size} is too small:"
                         f" the top level keeps a k^{config.levels - 1}th of it"
                         f" and needs {config.batch_length} steps for one sequence")
    first = -(-max(config.warmup, config.batch_length) // config.train_every) * config.train_every
    if config.steps < first:
        raise UsageError(f"--steps {config.steps} ends before the first update, at step {first}, the first"
                         " multiple of --train_every that is at least --warmup and --batch_length")
    try:
        torch.zeros(1, device=config.device).item()  # .item(): the device "meta" holds no values
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {config.device} cannot be used here: {str(error).splitlines()[0]}")
    config.game = atari_name(config.game)
    config.logdir = config.logdir or f"runs/{config.game}-{config.seed}"
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
    "ms_pacman": (307.3, 6951.6), "pong": (-20.7, 14.6),
    "private_eye": (24.9, 69571.3), "qbert": (163.9, 13455.0), "road_runner": (11.5, 7845.0),
    "seaquest": (68.4, 42054.7), "up_n_down": (533.4, 11693.2),
}


def atari_games():
    """{name: environment id} of every game that ale_py brings: {"ms_pacman": "ALE/MsPacman-v5", ...}."""
    gymnasium.register_envs(ale_py)
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # no banner
    ids = [id for id, spec in gymnasium.registry.items() if spec.namespace == "ALE" and spec.version == 5]
    return {"".join("_" * (i > 0 and c.isupper()) + c.lower() for i, c in enumerate(id[4:-3])): id
            for id in ids}


def atari_name(game):
    """The name of a game in our spelling. Raises UsageError with the nearest names if there is none."""
    def letters(text):
        return "".join(c for c in text.lower() if c.isalnum())

    names = {letters(name): name for name in atari_games()}
    if letters(game) not in names:
        near = (difflib.get_close_matches(letters(game), names, 3)
                or [name.replace("_", "") for name in REFERENCE])
        raise UsageError(f"unknown game '{game}'; nearest: " + ", ".join(names[key] for key in near))
    return names[letters(game)]


def area_weights(inputs, outputs):
    """(outputs, inputs): how much of each input pixel falls into each output pixel; every row sums to one."""
    edges, pixel = np.arange(outputs + 1) * (inputs / outputs), np.arange(inputs)
    overlap = np.minimum(edges[1:, None], pixel + 1) - np.maximum(edges[:-1, None], pixel)
    return torch.from_numpy((overlap.clip(min=0) * (outputs / inputs)).astype(np.float32))


class Atari(gymnasium.Env):
    """An Atari game by the protocol of Atari 100k: observations (64,64,3) bytes, the minimal action set.

    Each action is repeated for 4 frames; the observation is the pixel-wise maximum of the last two (some
    games draw their sprites only on every other frame), averaged down to 64x64. Up to 30 random no-ops after
    a reset; no sticky actions; rewards unclipped; a lost life does not end the episode; at most 108,000
    frames.
    """

    REPEAT, NOOPS, MAX_FRAMES = 4, 30, 108_000
    ROWS, COLUMNS = area_weights(210, 64), area_weights(160, 64)

    def __init__(self, game):
        try:
            self.game = gymnasium.make(atari_games()[game], frameskip=1, repeat_action_probability=0.0,
                                       full_action_space=False, disable_env_checker=True).unwrapped
        except OSError as error:
            raise UsageError(f"there is no ROM of '{game}': {' '.join(str(error).split())};"
                             " ale-py brings them all: unset ALE_ROMS_DIR, or install it anew")
        self.observation_space = gymnasium.spaces.Box(0, 255, (64, 64, 3), np.uint8)
        self.action_space = self.game.action_space
        self.previous = self.screen = None  # the last two frames
        self.frames = 0  # of this episode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.screen, _ = self.game.reset(seed=seed)
        self.previous, self.frames = self.screen, 0
        for _ in range(self.np_random.integers(self.NOOPS + 1)):
            if self._frame(0)[1]:
                self.screen, _ = self.game.reset()
        return self._observation(), {}

    def step(self, action):
        reward, terminated, truncated = 0.0, False, False
        for _ in range(self.REPEAT):
            r, terminated = self._frame(action)
            reward += r
            truncated = self.frames >= self.MAX_FRAMES
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
        # Area average without an image library: rows @ screen @ columns with fractional weights, exactly. By
        # torch: NumPy's matmul has threads of its own, which fight torch's for the cores and make acting five
        # times slower.
        screen = torch.from_numpy(np.maximum(self.previous, self.screen)).float()
        narrow = (self.ROWS @ screen.view(210, -1)).view(64, 160, 3)
        return (self.COLUMNS @ narrow).round().byte().numpy()

    def get_state(self):
        """Everything that a resumed run needs to go on with the very next frame."""
        return {"ale": np.frombuffer(self.game.ale.cloneState(include_rng=True).serialize(), np.uint8),
                "previous": self.previous, "screen": self.screen, "frames": self.frames,
                "rng": self.np_random.bit_generator.state}

    def set_state(self, state):
        """The inverse of get_state."""
        self.reset(seed=0)
        self.game.ale.restoreState(ale_py.ALEState(state["ale"].tobytes()))
        self.previous, self.screen, self.frames = state["previous"], state["screen"], state["frames"]
        self.np_random.bit_generator.state = state["rng"]


# ------------------------------------------------------------------------------------------------------------
# The run: all that a checkpoint must hold
# ------------------------------------------------------------------------------------------------------------

def make_agent(config, env):
    """The agent of a Config for an environment's spaces, on the Config's device."""
    model = {key: getattr(config, key) for key in (
        "stoch", "classes", "hidden", "state_size", "s5_layers", "units", "mlp_layers", "depth",
        "first_stride", "sharpness", "kl_warmup", "observation_variance", "sequence")}
    model["memory"] = config.batch_length
    behaviour = {key: getattr(config, key) for key in (
        "horizon", "starts", "gamma", "lam", "entropy_scale", "slow", "encoder_lr", "model_lr", "actor_lr",
        "critic_lr", "autoencoder_lr")}
    weights = {name: getattr(config, name + "_weight") for name in ("extrinsic", "subgoal", "novelty")}
    with torch.device(config.device):
        agent = Hieros(env.observation_space.shape, int(env.action_space.n), config.levels, config.k,
                       (config.subgoal_categoricals, config.subgoal_classes), weights, model, behaviour)
    for level in agent.levels if config.compile else ():
        level.world_model.dream = torch.compile(level.world_model.dream)
        level.world_model.loss = torch.compile(level.world_model.loss)
        level.behaviour_loss = torch.compile(level.behaviour_loss)
    return agent


def autocast(config):
    """The context in which the agent of a Config computes."""
    return torch.autocast(torch.device(config.device).type, torch.bfloat16, config.precision == "bf16")


def pack(tree):
    """NumPy arrays in nested dicts and lists become {"numpy": tensor}, for torch.load with weights_only."""
    if isinstance(tree, dict):
        return {key: pack(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [pack(value) for value in tree]
    return {"numpy": torch.from_numpy(tree.copy())} if isinstance(tree, np.ndarray) else tree


def unpack(tree):
    """The inverse of pack."""
    if isinstance(tree, dict):
        if set(tree) == {"numpy"}:
            return tree["numpy"].cpu().numpy()
        return {key: unpack(value) for key, value in tree.items()}
    return [unpack(value) for value in tree] if isinstance(tree, list) else tree


def env_step(observation, reward=0.0, *, is_first=False, is_last=False, is_terminal=False):
    """What an environment gave, as arrays of one environment: the arguments of Hieros.act."""
    return {"observation": observation[None], "reward": np.float32([reward]),
            "is_first": np.array([is_first]), "is_last": np.array([is_last]),
            "is_terminal": np.array([is_terminal])}


def load_checkpoint(path, device):
    """The dictionary that Run.save wrote. weights_only: a stranger's checkpoint cannot execute anything."""
    with zipfile.ZipFile(path) as file:
        if file.testzip():  # torch.load would not look, and go on with other weights
            raise ValueError("a checksum is wrong")
    return unpack(torch.load(path, map_location=device, weights_only=True))


@contextlib.contextmanager
def trusting(path):
    """Turns what a missing, damaged, foreign or hand-edited checkpoint breaks in this block into one line."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist:"
                         " this is not the directory of a run, or it has no checkpoint yet")
    except (zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, EOFError, LookupError, TypeError,
            ValueError, ArithmeticError, AttributeError, OSError) as error:
        reason = " ".join(str(error).split()).split(". ")[0][:200]  # torch goes on with dangerous advice
        raise UsageError(f"{path} is damaged or not a checkpoint of this program:"
                         f" {type(error).__name__}, {reason}") from error


class Run:
    """Agent, environment, replays and counters of one run, and how they are saved and restored."""

    def __init__(self, config, env):
        self.config, self.env, self.directory = config, env, Path(config.logdir)
        torch.manual_seed(config.seed)
        self.rng = np.random.default_rng(config.seed)
        self.agent = make_agent(config, env)
        self.discretised = self.agent.discretise()  # once an update, not once a step
        try:
            self.replays = [Replay(spec, -(-config.replay_size // config.k ** i), config.batch_length,
                                   config.tau, self.rng) for i, spec in enumerate(self.agent.specs)]
        except MemoryError as error:
            raise UsageError(f"--replay_size {config.replay_size} does not fit into memory: {error}")
        self.memory = self.agent.initial_memory(1)
        observation, _ = env.reset(seed=config.seed)
        self.now = env_step(observation, is_first=True)
        self.step, self.seconds = 0, 0.0  # agent steps, wall time so far
        self.score = 0.0  # return of this episode so far
        self.curve = []  # [agent step, return] of every finished episode
        self.updates = [0] * config.levels
        self.log = Log(self.directory)

    def act(self):
        """One tick of acting: every level that is due updates, chooses, remembers. Returns the action."""
        with autocast(self.config):
            self.memory, action, ticks = self.agent.act(self.memory, **self.now, discretised=self.discretised)
        for i, tick in enumerate(ticks):
            self.replays[i].add(self.agent.transition(i, tick))
        return action[0]

    def interact(self, action):
        """One step of the environment."""
        observation, reward, terminated, truncated, _ = self.env.step(action)
        self.now = env_step(observation, reward, is_terminal=terminated, is_last=terminated or truncated)
        self.step, self.score = self.step + 1, self.score + float(reward)

    def restart(self):
        """The next episode."""
        self.log.write(self.step, {"episode/score": self.score, "episode/length": int(self.memory["t"][0])})
        self.curve.append([self.step, self.score])
        self.score = 0.0
        observation, _ = self.env.reset()
        self.now = env_step(observation, is_first=True)

    def train(self):
        """One update of every level that is due and has enough to learn from."""
        c = self.config
        for i, (level, replay) in enumerate(zip(self.agent.levels, self.replays)):
            if self.step >= c.warmup and self.step % (c.train_every * c.k ** i) == 0 and replay.starts:
                with autocast(self.config):
                    self.log.add(self.step, i, level.update(self.batch(i)))
                self.discretised = self.agent.discretise()
                self.updates[i] += 1

    def batch(self, i):
        """A batch from the replay of level i, on the device."""
        return {name: torch.from_numpy(array).to(self.config.device, non_blocking=True)
                for name, array in self.replays[i].sample(self.config.batch_size).items()}

    def save(self):
        """Write a checkpoint. The old one stays valid until the new one is complete and takes its name."""
        self.log.means(self.step)  # nothing that is not finite gets into a checkpoint
        self.directory.mkdir(parents=True, exist_ok=True)
        for i, replay in enumerate(self.replays):
            replay.save(self.directory / f"replay-{i}")
        checkpoint = {
            "config": dataclasses.asdict(self.config), "weights": self.agent.state_dict(),
            "optimisers": [{name: o.adam.state_dict() for name, o in level.optimisers.items()}
                           for level in self.agent.levels],
            "memory": self.memory, "now": self.now, "env": self.env.get_state(), "log": self.log.state(),
            "rng": self.rng.bit_generator.state, "torch_rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "replay_totals": [replay.total for replay in self.replays], "step": self.step,
            "seconds": self.seconds, "score": self.score, "curve": self.curve, "updates": self.updates,
        }
        try:
            with replacing(self.directory / "checkpoint.pt") as file:
                torch.save(pack(checkpoint), file)
        except RuntimeError as error:  # torch hides what the disk has said behind an error of its own
            raise error.__context__ or error
        for i, replay in enumerate(self.replays):
            replay.prune(self.directory / f"replay-{i}")

    def restore(self, checkpoint):
        """Continue where `save` was called."""
        self.agent.load_state_dict(checkpoint["weights"])
        self.discretised = self.agent.discretise()
        for level, states in zip(self.agent.levels, checkpoint["optimisers"]):
            for name, state in states.items():
                level.optimisers[name].adam.load_state_dict(state)
        for i, (replay, total) in enumerate(zip(self.replays, checkpoint["replay_totals"])):
            replay.load(self.directory / f"replay-{i}", total)
        for name in ("memory", "now", "step", "seconds", "score", "curve", "updates"):
            setattr(self, name, checkpoint[name])
        self.env.set_state(checkpoint["env"])
        self.log.restore(checkpoint["log"])
        self.rng.bit_generator.state = checkpoint["rng"]
        torch.set_rng_state(checkpoint["torch_rng"].cpu())
        for i, state in enumerate(checkpoint["cuda_rng"][:torch.cuda.device_count()]):
            torch.cuda.set_rng_state(state.cpu(), i)


class Log:
    """metrics.jsonl, one JSON object a line, and TensorBoard events if `tensorboard` is installed. Names are
    DreamerV3's where it has one.

    Metrics of updates are summed on the device and fetched only when a line is written: fetching waits for
    the device.
    """

    def __init__(self, directory):
        self.path, self.file, self.board = directory / "metrics.jsonl", None, None
        self.sums = {}  # {level: (names, sums of their values, number of updates)}

    def add(self, step, level, metrics):
        """Sum the metrics {name: scalar tensor} of one update of a level. On the CPU they are checked at
        once; on a GPU looking would mean waiting, so there `flush` checks their sums."""
        values = torch.stack([value.float() for value in metrics.values()])
        if values.device.type == "cpu":
            self.check(f"at step {step}", level, dict(zip(metrics, values.tolist())))
        _, total, count = self.sums.get(level, (None, 0, 0))
        self.sums[level] = list(metrics), total + values, count + 1

    def write(self, step, values, level=None):
        """One line: {"step", "level" where there is one, name: value, ...}."""
        if self.file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(self.path, "a")
            try:
                from torch.utils.tensorboard import SummaryWriter
                self.board = SummaryWriter(self.path.parent)
            except ImportError:  # tensorboard is optional
                pass
        labels = {"step": step} if level is None else {"step": step, "level": level}
        self.file.write(json.dumps(labels | values) + "\n")
        self.file.flush()
        for name, value in values.items() if self.board else ():
            self.board.add_scalar(name if level is None else f"level_{level}/{name}", value, step)

    def check(self, when, level, values):
        """Raises FloatingPointError, with the level and the names, if one of {name: number} is not finite."""
        wrong = [name for name, value in values.items() if not np.isfinite(value)]
        if wrong:
            raise FloatingPointError(f"{when}, level {level}: not finite: {', '.join(wrong)};"
                                     f" the last checkpoint in {self.path.parent} was saved before,"
                                     " --resume repeats what led here")

    def means(self, step):
        """{level: {name: mean since the last flush}}, checked."""
        result = {}
        for level, (names, total, count) in self.sums.items():
            result[level] = dict(zip([f"train/{name}" for name in names], (total / count).tolist()))
            self.check(f"in the updates up to step {step}", level, result[level])
        return result

    def flush(self, step):
        """Write the mean metrics since the last flush, one line a level."""
        for level, values in self.means(step).items():
            self.write(step, values, level)
        self.sums = {}

    def state(self):
        """What `restore` needs: the file's length and the sums not yet written."""
        if self.file:
            os.fsync(self.file.fileno())
        return {"bytes": self.path.stat().st_size if self.path.exists() else 0,
                "sums": self.sums}

    def restore(self, state):
        """Cut off the lines written after the checkpoint: the resumed run writes them again."""
        if self.path.exists():
            os.truncate(self.path, min(state["bytes"], self.path.stat().st_size))
        self.sums = state["sums"]


# ------------------------------------------------------------------------------------------------------------
# The loop
# ------------------------------------------------------------------------------------------------------------

def train(run, progress=True):
    """Act, learn, log, save, until config.steps. Returns the number of the signal that ended it, else 0."""
    config, stopped = run.config, []
    handlers = {number: signal.signal(number, lambda number, frame: stopped.append(number))
                for number in (signal.SIGINT, signal.SIGTERM)}
    bar = tqdm(total=config.steps, initial=run.step, unit="step", disable=not progress, dynamic_ncols=True,
               mininterval=1.0)
    phases = dict.fromkeys(("act", "env", "train", "save"), 0.0)
    since, logged = time.perf_counter(), run.step
    try:
        while run.step < config.steps and not stopped:
            times = [time.perf_counter()]
            action = run.act()
            times.append(time.perf_counter())
            if run.now["is_last"][0]:
                run.restart()  # the last step has been stored; its action has no effect
                continue
            run.interact(action)
            times.append(time.perf_counter())
            run.train()
            times.append(time.perf_counter())

            for name, begin, end in zip(phases, times, times[1:]):
                phases[name] += end - begin
            bar.update()
            if run.step % config.log_every == 0 or run.step == config.steps:
                run.log.flush(run.step)
                now = time.perf_counter()
                run.log.write(run.step, {f"seconds/{name}": value for name, value in phases.items()}
                              | {"seconds/total": run.seconds + now - since,
                                 "fps/policy": (run.step - logged) / (now - since)})
                run.seconds, since, logged = run.seconds + now - since, now, run.step
                phases = dict.fromkeys(phases, 0.0)
                scores = [score for _, score in run.curve[-10:]]
                bar.set_postfix(score=scores[-1] if scores else "-",
                                mean10=f"{np.mean(scores):.1f}" if scores else "-",
                                updates=sum(run.updates), refresh=False)
            if run.step % config.save_every == 0 or run.step == config.steps:
                begin = time.perf_counter()
                run.save()
                phases["save"] += time.perf_counter() - begin  # shows up in the next line
    finally:
        bar.close()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if stopped:
        run.seconds += time.perf_counter() - since
        run.save()
    return stopped[0] if stopped else 0


# ------------------------------------------------------------------------------------------------------------
# How long will it take?
# ------------------------------------------------------------------------------------------------------------

class Operations(TorchDispatchMode):
    """Counts the tensor operations within it, backward passes included: on a GPU each is a kernel launch.
    Views and bare allocations are not counted."""

    FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view"}

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.overloadpacket.__name__
        self.count += operation.namespace == "aten" and not operation.is_view and name not in self.FREE
        return operation(*args, **(kwargs or {}))


def clock(device):
    """Seconds; on a GPU once all that it was told to do is done."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter()


def memory(device, reset=False):
    """(held now, most held since the last reset) in MiB: by tensors on a GPU, else by the whole process;
    zeros where the system does not tell. With reset, memory kept for later is given back first."""
    if device.startswith("cuda"):
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
        return tuple(number / 2 ** 20 for number in held)
    try:
        if reset:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text()
        return tuple(int(status.split(name)[1].split()[0]) / 1024 for name in ("VmRSS:", "VmHWM:"))
    except (OSError, AttributeError):
        return 0, 0


PHASES = ["world model", "imagination", "autoencoder", "actor-critic"]


def by_phase(level, batch, measure):
    """Make an update and return by how much measure(), a tuple of numbers, has grown in each of PHASES."""
    marks, imagine, behaviour_loss = [measure()], level.world_model.imagine, level.behaviour_loss

    def marked_imagine(*arguments):
        marks.append(measure())
        value = imagine(*arguments)
        marks.append(measure())
        return value

    def marked_loss(*arguments):
        marks.append(measure())
        return behaviour_loss(*arguments)

    level.world_model.imagine, level.behaviour_loss = marked_imagine, marked_loss
    level.update(batch)
    level.world_model.imagine, level.behaviour_loss = imagine, behaviour_loss
    return np.diff(marks + [measure()], axis=0)


def profile(run, updates=5):
    """Measure updates of every level on real batches. Prints a table, returns all of it {name: value}.

    The cost of an update in peak-GFLOP is its seconds times the speed of this machine's matrix product in the
    same minute: a number that means the same on every machine. Medians, after two updates for warming up.
    """
    config, device = run.config, run.config.device
    run.log.write = lambda *_: None  # this is no training: metrics.jsonl stays as it is
    times = []  # [seconds of acting, of the game]
    while not all(replay.starts for replay in run.replays) or len(times) < 200:
        begin = clock(device)
        action = run.act()
        middle = clock(device)
        run.restart() if run.now["is_last"][0] else run.interact(action)
        times.append([middle - begin, clock(device) - middle])
    act, env = np.mean(times[len(times) // 2:], 0)
    a, b = torch.rand(2, 1024, 1024, device=device)

    def matmul_gflops():
        marks = [clock(device)]
        for _ in range(5):
            a @ b
            marks.append(clock(device))
        return 2 * 1024 ** 3 / np.median(np.diff(marks)) / 1e9

    levels, hours = [], config.steps * (act + env) / 3600
    print(f"{'level':>5}  {'phase':<12} {'seconds':>8} {'GFLOP':>7} {'of peak':>7} {'operations':>10}")
    for i, level in enumerate(run.agent.levels):
        samples, spent, speeds = [], [], []
        before, _ = memory(device, reset=True)
        for repeat in range(2 + updates):
            begin = clock(device)
            batch = run.batch(i)
            samples.append(clock(device) - begin)
            speeds.append(matmul_gflops())
            with autocast(config):
                spent.append(by_phase(level, batch, lambda: (clock(device),))[:, 0])
        peak = memory(device)[1] - before
        with autocast(config), FlopCounterMode(display=False) as flops, Operations() as operations:
            work = by_phase(level, batch, lambda: (flops.get_total_flops() / 1e9, operations.count))
        parts, speed = np.median(spent[2:], 0), float(np.median(speeds[2:]))
        total, (gflop, count) = float(np.median(np.sum(spent[2:], 1))), work.sum(0)
        rows = [*zip(PHASES, parts, *work.T), ("all", total, gflop, count)]
        for name, seconds, part_gflop, part_count in rows:
            share = part_gflop / max(seconds, 1e-9) / speed
            print(f"{i:>5}  {name:<12} {seconds:>8.3f} {part_gflop:>7.1f} {share:>7.0%} {part_count:>10.0f}")
        levels.append({
            "seconds": total, "gflop": gflop, "matmul_gflops": speed, "cost": total * speed,
            "dispatched_ops": int(count), "peak_mib": round(peak),
            "sample_seconds": float(np.median(samples)),
            "phases": {name: {"seconds": seconds, "gflop": part_gflop, "dispatched_ops": int(part_count)}
                       for name, seconds, part_gflop, part_count in rows[:-1]}})
        print(f"       level {i}: {total * speed:.0f} peak-GFLOP an update (peak {speed:.0f} GFLOP/s), memory"
              f" {peak:.0f} MiB, sampling {1e3 * np.median(samples):.1f} ms")
        due = (config.steps - config.warmup) / (config.train_every * config.k ** i)  # updates in all
        hours += due * (total + float(np.median(samples))) / 3600
    print(f"acting {1e3 * act:.1f} ms and the game {1e3 * env:.1f} ms a step; {config.steps} steps would take"
          f" about {hours:.1f} hours on this machine, without the final evaluation")
    return {"preset": config.preset, "device": device, "threads": torch.get_num_threads(),
            "compile": config.compile, "precision": config.precision, "act_seconds": act, "env_seconds": env,
            "levels": levels, "projected_hours": hours} | origin()


def keep_freed_memory():
    """Ask glibc to keep freed memory for the next tensor instead of returning it to the system.

    By default every tensor over some hundred kB is mapped anew and zeroed page by page, which makes an update
    on the CPU a third slower. Where there is no glibc nothing happens; on a GPU it does not matter.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX: map no blocks of their own
        libc.mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD: give back only above 2 GiB
    except (OSError, AttributeError):
        pass


# ------------------------------------------------------------------------------------------------------------
# The score
# ------------------------------------------------------------------------------------------------------------

def play(agent, make_env, episodes, seed=0, progress=True):
    """The returns of `episodes` episodes, played side by side by an agent that samples its actions.

    Every environment plays equally many episodes: taking the first so many that end would favour short ones.
    """
    n = max(d for d in range(1, 17) if episodes % d == 0)
    # After an episode's end the next step resets, whatever the action: the agent sees the end, then a start.
    envs = SyncVectorEnv([make_env] * n, autoreset_mode=AutoresetMode.NEXT_STEP)
    observation, _ = envs.reset(seed=seed)
    memory, returns, score = agent.initial_memory(n), [[] for _ in range(n)], np.zeros(n)
    discretised = agent.discretise()
    reward, first, last, terminal = np.zeros(n), np.ones(n, bool), np.zeros(n, bool), np.zeros(n, bool)
    with tqdm(total=episodes, desc="evaluation", unit="episode", disable=not progress,
              dynamic_ncols=True) as bar:
        while min(map(len, returns)) < episodes // n:
            memory, action, _ = agent.act(memory, observation, reward, first, last, terminal, discretised)
            observation, reward, terminal, truncated, _ = envs.step(action)
            first, last = last, terminal | truncated
            score += reward
            for i in np.flatnonzero(last):
                if len(returns[i]) < episodes // n:
                    returns[i].append(float(score[i]))
                    bar.update()
                score[i] = 0.0
    envs.close()
    return sum(returns, [])


def origin():
    """The command and the commit that a result comes from."""
    try:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent,
                                capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    return {"command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]), "commit": commit}


def result(config, step, seconds, curve, returns):
    """What is known of a run, ready for a JSON file: settings other than the preset's, learning curve, final
    returns, command."""
    usual = dataclasses.asdict(Config()) | PRESETS[config.preset]
    settings = {name: value for name, value in dataclasses.asdict(config).items() if value != usual[name]
                and name not in RESUMABLE | {"game", "preset", "seed", "logdir", "levels"}}
    random, human = REFERENCE.get(config.game, (None, None))
    mean = float(np.mean(returns))
    error = float(np.std(returns, ddof=1) / len(returns) ** 0.5) if len(returns) > 1 else None
    return {"game": config.game, "levels": config.levels, "seed": config.seed, "preset": config.preset,
            "settings": settings, "agent_steps": step, "hours": round(seconds / 3600, 3),
            "mean": mean, "median": float(np.median(returns)), "standard_error": error,
            "random": random, "human": human,
            "human_normalised": None if human is None else (mean - random) / (human - random),
            "protocol": f"{len(returns)} episodes, sampled actions, action repeat {Atari.REPEAT},"
                        f" up to {Atari.NOOPS} no-ops, no sticky actions, at most {Atari.MAX_FRAMES} frames",
            "returns": returns, "curve": curve} | origin()


def report(summary):
    """The score as one line of text."""
    line = f"{summary['game']} after {summary['agent_steps']} steps: score {summary['mean']:.1f}"
    if summary["standard_error"] is not None:
        line += f" +- {summary['standard_error']:.1f} (standard error of {len(summary['returns'])} episodes)"
    if summary["human"] is not None:
        line += (f"; random {summary['random']}, human {summary['human']} (published): human-normalised"
                 f" {summary['human_normalised']:.3f}")
    return line


def write_json(value, file):
    """To a file, or to the standard output where file is "-"."""
    if str(file) == "-":
        print(json.dumps(value, indent=1))
    else:
        with replacing(Path(file)) as opened:
            opened.write((json.dumps(value, indent=1) + "\n").encode())


def main(argv):
    """The command line. Returns the exit code."""
    keep_freed_memory()
    given, resume, profiling = parse_config(argv)
    if resume:
        where = {name: given[name] for name in given.keys() & {"game", "seed", "logdir", "device"}}
        where = make_config(where)
        path = Path(where.logdir) / "checkpoint.pt"
        with trusting(path):
            checkpoint = load_checkpoint(path, where.device)
            stored = checkpoint["config"]
            config = make_config(stored | given | {"logdir": where.logdir, "device": where.device})
            for name, value in dataclasses.asdict(config).items():
                if name not in RESUMABLE and value != stored.get(name, value):
                    raise UsageError(f"--{name} {value} contradicts the run, which has {stored[name]}")
            run = Run(config, Atari(config.game))
            run.restore(checkpoint)
            del checkpoint  # all of it is in the run now
    else:
        config = make_config(given)
        if profiling and "logdir" not in given:
            config.logdir += "-profile"
        if Path(config.logdir).is_dir() and any(Path(config.logdir).iterdir()):
            raise UsageError(f"{config.logdir} already exists:"
                             " add --resume to continue it, or choose another --logdir")
        run = Run(config, Atari(config.game))
        try:
            # From now on there is something to resume.
            run.directory.mkdir(parents=True, exist_ok=True) if profiling else run.save()
        except OSError as error:
            raise UsageError(f"--logdir {config.logdir} cannot be used: {error.strerror}")
    parameters = sum(p.numel() for name, p in run.agent.named_parameters() if "slow" not in name)
    print(f"Hieros: {config.game}, preset {config.preset}, {config.levels} levels,"
          f" {parameters / 1e6:.1f} M parameters, device {config.device}, writing to {config.logdir}"
          + (f", resumed at step {run.step}" if resume else ""))
    if profiling:
        summary = profile(run)
        write_json(summary, run.directory / "profile.json")
        return 0
    try:
        number = train(run)
        if number:
            print(f"stopped at step {run.step}, saved;"
                  f" continue with: python train.py --logdir {config.logdir} --resume")
            return 128 + number
        with autocast(config):
            returns = play(run.agent, lambda: Atari(config.game), config.eval_episodes, config.seed)
        summary = result(config, run.step, run.seconds, run.curve, returns)
        print(report(summary))
        write_json(summary, run.directory / "evaluation.json")
    except OSError as error:
        raise UsageError(f"{config.logdir} cannot be written ({error.strerror});"
                         " its last checkpoint is intact: make room, then"
                         f" python train.py --logdir {config.logdir} --resume")
    except FloatingPointError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UsageError as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:  # before training, or in the evaluation: what there was to save is saved
        print("train.py: interrupted; --resume continues from the last checkpoint", file=sys.stderr)
        sys.exit(130)
