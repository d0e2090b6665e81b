"""Train Hieros on a game, then play it for a score.

Read hierarchy.py and replay.py first. `train` is the loop, `Run` is what happens in a step, `main` leads from
a command line to a score. A run may be killed at any moment and goes on as if it had not been.

examples:
  python train.py --game pong                            writes runs/pong-0
  python train.py --game breakout --levels 1 --seed 3    the flat agent, in runs/breakout-3
  python train.py --logdir runs/pong-0 --resume          goes on where it was stopped or killed
  python train.py --game CartPole-v1 --preset debug      does it work at all? in under a minute

exit codes: 0 done; 1 a loss was not finite; 2 the command, a file or your environment is wrong: the last line
says what; 129, 130, 143 stopped by a signal (SIGHUP, Ctrl+C, SIGTERM), and saved unless a second one came
"""

import argparse
import codecs
import contextlib
import csv
import ctypes
import dataclasses
import difflib
import functools
import inspect
import io
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import ale_py
import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box, Discrete, MultiDiscrete
from tqdm import tqdm

from hierarchy import Hieros, Level, env_step
from replay import Replay, replacing
from world_model import WorldModel


# ---- Settings ----------------------------------------------------------------------------------------------

def setting(paper, low=-1e99, high=1e99, choices=None, **presets):
    """A field of Config: its value in the preset `paper` and in others, the values that make sense."""
    return dataclasses.field(default=paper, metadata={"range": (low, high), "choices": choices, **presets})


@dataclasses.dataclass
class Config:
    """Every setting of a run; each is a flag of the command line. Presets: `paper`, for Atari on a GPU, has
    the values of Hieros unless the comment says otherwise. `cpu` is an hour of Atari on one core: smaller
    networks, a tenth of the updates, higher rates. `vector` is for observations that are no images, `debug`
    learns nothing in its minute."""
    # The run.
    game: str = setting("pong")  # Atari game in any spelling, CartPole-v1, my_module:MyEnv-v0
    preset: str = setting("auto", choices=["auto", "paper", "cpu", "vector", "debug"])  # auto takes what fits
    seed: int = setting(0, 0, 2 ** 63 - 1)  # seed of everything random
    device: str = setting("auto")  # auto, cpu, cuda, cuda:1, ...
    logdir: str = setting("")  # where the run is written, by default runs/GAME-SEED
    levels: int = setting(3, 1, 6)  # L, levels of the hierarchy; 1 is the flat agent
    k: int = setting(4, 2, 64)  # a level acts every k ticks of the level below
    steps: int = setting(100_000, 1, vector=20_000, debug=1200)  # agent steps; on Atari each is 4 frames
    # Experience.
    warmup: int = setting(1000, 0, vector=2500, debug=300)  # agent steps before the first update
    warmup_hold: int = setting(1, 1, vector=4)  # steps for which each action is held before the first update
    train_every: int = setting(1, 1, cpu=10, vector=6, debug=10)  # agent steps an update of level 0
    batch_size: int = setting(16, 1, cpu=8, vector=8, debug=4)  # B, sequences in a batch
    batch_length: int = setting(64, 2, cpu=32, vector=32, debug=16)  # T, steps in a sequence
    replay_size: int = setting(100_000, 1, debug=2000)  # steps that level 0 keeps; level i k^i times fewer
    tau: float = setting(0.3, 0, 1)  # temperature of time-balanced sampling; 0 is uniform
    # World model.
    stoch: int = setting(32, 1, vector=16, debug=8)  # categoricals in the stochastic state z
    classes: int = setting(32, 2, 255, cpu=16, vector=16, debug=8)  # classes of each of them
    hidden: int = setting(256, 1, cpu=128, vector=64, debug=64)  # H, size of h and features of the S5 layers
    state_size: int = setting(128, 8, cpu=64, vector=32, debug=32)  # P, state size of an S5 layer, 8 n
    s5_layers: int = setting(8, 1, cpu=2, vector=2, debug=2)  # S5 layers
    units: int = setting(256, 1, cpu=128, vector=64, debug=64)  # units of every MLP layer
    mlp_layers: int = setting(2, 1, debug=1)  # hidden layers of the MLPs
    depth: int = setting(24, 1, debug=8)  # channels of the first convolution
    first_stride: int = setting(2, choices=[2, 4], cpu=4, debug=4)  # of the first convolution, 4 to save cost
    sharpness: float = setting(10.0, 0)  # factor of the initial posterior's logits (Hieros: 1)
    kl_warmup: int = setting(200, 0, vector=100, debug=20)  # updates before the KL pulls at z (Hieros: 0)
    decoded: float = setting(1.0, 0, 1, cpu=0.25)  # share of a batch's observations that is decoded to learn
    # Behaviour.
    horizon: int = setting(16, 2, cpu=10, vector=15, debug=5)  # imagined steps
    starts: int = setting(1024, 1, cpu=128, vector=96, debug=32)  # imagined rollouts an update, up to B * T
    gamma: float = setting(0.997, 0, 1, cpu=0.99, vector=0.99)  # discount of a tick
    lam: float = setting(0.95, 0, 1)  # lambda of the returns
    entropy_scale: float = setting(3e-4, 0, cpu=1e-3, vector=1e-3)  # weight of the policy's entropy
    slow: float = setting(0.02, 0, 1, cpu=0.1, vector=0.1)  # share by which slow critics follow, an update
    extrinsic_weight: float = setting(1.0, 0)  # weight of the game's reward
    subgoal_weight: float = setting(0.3, 0, cpu=0.03, vector=0.03)  # weight of the subgoal reward
    novelty_weight: float = setting(0.1, 0)  # weight of the novelty reward
    subgoal_categoricals: int = setting(8, 1)  # categoricals of a subgoal code
    subgoal_classes: int = setting(8, 2, 255)  # classes of each of them
    encoder_lr: float = setting(1e-4, 0, cpu=3e-4, vector=1e-3)  # learning rate of the encoders
    model_lr: float = setting(1e-4, 0, cpu=1e-3, vector=1e-3)  # learning rate of the rest of the world models
    actor_lr: float = setting(3e-5, 0, cpu=3e-4, vector=5e-4)  # learning rate of the actors
    critic_lr: float = setting(3e-5, 0, cpu=1e-3, vector=3e-3)  # learning rate of the critics
    autoencoder_lr: float = setting(1e-4, 0, cpu=1e-3, vector=1e-3)  # of the subgoal autoencoders
    # The machine.
    precision: str = setting("tf32", choices=["tf32", "float32"])  # of matrix products
    log_every: int = setting(500, 1, debug=100)  # agent steps between lines of metrics.jsonl
    save_every: int = setting(2500, 1, debug=400)  # agent steps between checkpoints
    eval_episodes: int = setting(100, 1, debug=2)  # episodes of the final evaluation


PRESETS = {preset: {field.name: field.metadata[preset] for field in dataclasses.fields(Config)
                    if preset in field.metadata} for preset in ("paper", "cpu", "vector", "debug")}
# What --resume may change, since it touches no number that is learned.
RESUMABLE = {"steps", "logdir", "device", "log_every", "save_every", "eval_episodes"}


class UsageError(Exception):
    """The user can mend this: one line says what is wrong and what would be right; exit code 2."""


@contextlib.contextmanager
def blaming(what, show=False):
    """Turns an error of this block, in code or files of others, into one line; show: after its traceback."""
    try:
        yield
    except Exception as error:  # torch's messages go on with dangerous advice after their first sentence
        if show:
            traceback.print_exc()
        raise UsageError(f"{what}: {type(error).__name__}, {str(error).split('. ')[0][:300]}") from error


def parse_config(argv):
    """({explicitly given name: value}, resume) of a command line. A wrong one exits, with one line and 2."""
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, epilog=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    # The comment that explains a setting above is its help text, too.
    helps = dict(re.findall(r"^    (\w+): .*  # (.*)", Path(__file__).read_text("utf-8"), re.MULTILINE))
    for field in dataclasses.fields(Config):
        parser.add_argument("--" + field.name, type=field.type, choices=field.metadata["choices"],
                            default=argparse.SUPPRESS, help=f"{helps[field.name]} (default {field.default})")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint, if any")
    given = vars(parser.parse_args(argv))
    return given, given.pop("resume")


def make_config(given):
    """The Config of `given` over its preset's values, auto resolved. UsageError if a value makes no sense."""
    config = Config(**given)
    config.game = game_name(config.game)
    name = re.sub(r"[^\w.-]", "_", f"{config.game}-{config.seed}")
    config.logdir = os.path.expanduser(config.logdir or f"runs/{name}")
    if config.device == "auto":
        config.device = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", config.device):
        raise UsageError(f"--device {config.device}: only cpu and cuda can; mps lacks complex numbers")
    with blaming(f"--device {config.device} cannot be used here"):
        torch.zeros(1, device=config.device)
    if config.preset == "auto":
        with make_env(config.game) as env:
            image = "cpu" if config.device == "cpu" else "paper"
            config.preset = image if env.observation_space is IMAGE else "vector"
    vars(config).update({name: value for name, value in PRESETS[config.preset].items() if name not in given})
    for field in dataclasses.fields(Config):
        value, (low, high) = vars(config)[field.name], field.metadata["range"]
        if field.type is not str and not low <= value <= high:
            raise UsageError(f"--{field.name} {value} is out of range: "
                             + (f"{low} to {high}" if high < 1e99 else f"at least {low}"))
    return config


# ---- The game ----------------------------------------------------------------------------------------------

IMAGE = Box(0, 255, (64, 64, 3), np.uint8)


def read_published():
    """{column: {game: score}} of results/published.csv, whose head names the sources: random play, humans,
    other methods. {} without the file. A column more is a method more."""
    path = Path(__file__).parent / "results" / "published.csv"
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    rows = list(csv.DictReader(line for line in lines if not line.startswith("#")))
    return {name: {row["game"]: float(row[name]) for row in rows if row[name]}
            for name in (rows[0] if rows else ()) if name != "game"}


@functools.cache
def atari_games():
    """{name: environment id} of every game that ale_py brings: {"ms_pacman": "ALE/MsPacman-v5", ...}."""
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # no banner
    return {re.sub(r"\B([A-Z])", r"_\1", id[4:-3]).lower(): id for id, spec in gymnasium.registry.items()
            if spec.namespace == "ALE" and spec.version == 5}


def game_name(game):
    """The one name of a game: ours for Atari, in whatever spelling; Gymnasium's for all else, behind the
    module that registers it. Raises UsageError with the nearest names."""
    module, _, id = game.rpartition(":")
    if module:
        sys.path += [""] * ("" not in sys.path)  # the working directory, for a train.py that lies elsewhere
        with blaming(f"--game {game}: importing {module} fails"):
            __import__(module)
    others = [id for id, spec in gymnasium.registry.items() if not str(spec.entry_point).startswith("ale_py")]
    known = {re.sub(r"[\W_]", "", name.lower()): name for name in [*others, *atari_games()]}
    # ale_py's own names, such as ALE/Pong-v5 and PongNoFrameskip-v4, are spellings, too.
    letters = re.sub(r"^ALE/|(NoFrameskip|Deterministic)?-v[045]$|[\W_]", "", game).lower()
    if id in others or known.get(letters) in atari_games():
        return game if id in others else known[letters]
    near = ", ".join(known[name] for name in difflib.get_close_matches(letters, known)) or "none"
    raise UsageError(f"unknown game '{game}'; nearest: {near}; your own games are my_module:MyEnv-v0")


def make_env(game, **options):
    """The environment of a `game_name`. options: for Gymnasium's, such as render_mode."""
    with blaming(f"{game} cannot be made"):
        return Atari(game) if game in atari_games() else Registered(game, **options)


@functools.cache  # a game's screens all have one size
def area_weights(inputs):
    """(64, inputs): how much of each input pixel falls into each of 64 areas. Rows sum to one."""
    edges, pixel = np.arange(65) * (inputs / 64), np.arange(inputs)
    overlap = np.minimum(edges[1:, None], pixel + 1) - np.maximum(edges[:-1, None], pixel)
    return torch.from_numpy((overlap.clip(min=0) * (64 / inputs)).astype(np.float32))


def shrink(image):
    """An image (height, width[, 1 or 3]) as (64,64,3) bytes: the exact mean over each area, in float32. By
    torch: NumPy's matmul has threads of its own, which fight torch's and make acting five times slower."""
    height, width = image.shape[:2]
    pixels = torch.from_numpy(np.ascontiguousarray(image, np.float32)).view(height, -1)
    rows = (area_weights(height) @ pixels).view(64, width, -1)
    # Columns in front: one product again, which takes a quarter of the time of 64 small ones.
    columns = area_weights(width) @ rows.transpose(0, 1).reshape(width, -1)
    return columns.view(64, 64, -1).transpose(0, 1).round().byte().expand(64, 64, 3).numpy()


class Atari(gymnasium.Env):
    """An Atari game by the PROTOCOL of Atari 100k, with the minimal action set; rewards are unclipped, a lost
    life ends nothing. Observations, (64,64,3) bytes, are the pixel-wise maximum of the last two frames, since
    some games draw their sprites only on every other one, averaged down."""

    REPEAT, NOOPS, MAX_FRAMES = 4, 30, 108_000
    PROTOCOL = f"action repeat {REPEAT}, up to {NOOPS} no-ops, no sticky actions, at most {MAX_FRAMES} frames"
    observation_space = IMAGE

    def __init__(self, game):
        self.game = gymnasium.make(atari_games()[game], frameskip=1, repeat_action_probability=0.0,
                                   full_action_space=False, disable_env_checker=True).unwrapped
        self.action_space = self.game.action_space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.screens, self.frames = 2 * [self.game.reset(seed=seed)[0]], 0  # the last two; of this episode
        for _ in range(self.np_random.integers(self.NOOPS + 1)):
            if self.frame(0)[1]:
                self.screens = 2 * [self.game.reset()[0]]
        return shrink(np.maximum(*self.screens)), {}

    def step(self, action):
        total, terminated, last = 0.0, False, min(self.frames + self.REPEAT, self.MAX_FRAMES)
        while self.frames < last and not terminated:
            reward, terminated = self.frame(action)
            total += reward
        truncated = self.frames == self.MAX_FRAMES and not terminated
        return shrink(np.maximum(*self.screens)), total, terminated, truncated, {}

    def frame(self, action):
        """Returns (reward, terminated). Every frame's screen is taken: an early end is seen, too."""
        screen, reward, terminated, *_ = self.game.step(action)
        self.screens, self.frames = [self.screens[1], screen], self.frames + 1
        return reward, terminated

    def get_state(self):
        """Everything that a resumed run needs to go on with the very next frame."""
        return {"ale": np.frombuffer(self.game.ale.cloneState(include_rng=True).serialize(), np.uint8),
                "screens": self.screens, "frames": self.frames, "rng": self.np_random.bit_generator.state}

    def set_state(self, state):
        self.reset(seed=0)
        self.game.ale.restoreState(ale_py.ALEState(state["ale"].tobytes()))
        self.screens, self.frames = state["screens"], state["frames"]
        self.np_random.bit_generator.state = state["rng"]


class Registered(gymnasium.Wrapper):
    """Any other environment of Gymnasium with discrete actions, as the agent sees it. Its space decides:

        image of uint8, (height, width[, 1 or 3]) of any size    (64,64,3) bytes, 255 for the space's high
        Box of one axis, floats or integers                      (D,) float32
        Discrete, Dict, ...: what Gymnasium can flatten          (D,) float32, choices one-hot

    An observation may leave its Box, `info` is never read. Without a time limit it gets Atari's."""

    def __init__(self, game, **options):
        self.name, id = game, game.rpartition(":")[2]
        limit = gymnasium.spec(id).max_episode_steps or Atari.MAX_FRAMES // Atari.REPEAT
        super().__init__(gymnasium.make(id, max_episode_steps=limit, disable_env_checker=True, **options))
        if not isinstance(self.env.observation_space, Box):
            self.env = gymnasium.wrappers.FlattenObservation(self.env)
        self.seen, actions = self.env.observation_space, self.env.action_space
        shape = self.seen.shape if isinstance(self.seen, Box) else (0, 0)  # what changes its size is no Box
        image = shape[1:] and shape[2:] in ((), (1,), (3,)) and self.seen.dtype == np.uint8
        if not (image or len(shape) < 2) or not isinstance(actions, Discrete) or actions.n > 256:  # a byte
            self.close()
            raise ValueError("supported: Box of one axis, images of uint8, what Gymnasium can flatten;"
                             " Discrete actions up to 256; its wrappers TransformObservation, TransformAction"
                             f" convert others, here {self.seen} with {actions}")
        self.observation_space = IMAGE if image else Box(-np.inf, np.inf, shape or (1,), np.float32)
        self.action_space = Discrete(int(actions.n))

    def _ask(self, t, method, *arguments, **options):
        """What reset (t = 0) or step t of an episode returns: with the agent's observation, without info."""
        self.t = t
        with blaming(f"{self.name} fails at step {t} of an episode", show=True):
            array, *numbers = method(*arguments, **options)
            numbers = [np.asarray(number).item() for number in numbers[:-1]]
            array = np.reshape(array, self.seen.shape or 1)
            if self.observation_space is IMAGE:
                if array.dtype.kind == "f" or not ((0 <= array) & (array <= self.seen.high)).all():
                    raise ValueError(f"{array.dtype} up to {array.max()} cannot be scaled by {self.seen}")
                array = shrink(array * (255 / np.maximum(self.seen.high, 1)))
            array = array.astype(self.observation_space.dtype)
            if not np.isfinite(array).all() or not np.isfinite(np.float32(numbers)).all():
                raise ValueError("an observation or a reward that is not finite in float32")
            return array, *numbers, {}

    def reset(self, *, seed=None, **options):
        if seed is not None:  # these numbers are the whole process's: an environment may use them, too
            random.seed(seed)
            np.random.seed(seed % 2 ** 32)
        return self._ask(0, self.env.reset, seed=seed, **options)

    def step(self, action):
        return self._ask(self.t + 1, self.env.step, int(action) + int(self.env.action_space.start))

    def close(self):
        with contextlib.suppress(UsageError), blaming("", show=True):  # it must not cost a score
            super().close()


# ---- The run -----------------------------------------------------------------------------------------------

def make_agent(config, env):
    """The agent of a Config for an environment's spaces, on the Config's device."""
    # These switches are the whole process's. TF32 shortens float32 to 10 bits of mantissa in matrix products.
    # The recurrence of S5 is no such product and keeps all bits: in it errors would add up.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.precision == "tf32"
    settings = vars(config)
    model, behaviour = ({name: settings[name] for name in inspect.signature(kind).parameters
                         if name in settings} for kind in (WorldModel, Level))
    weights = {name: settings[name + "_weight"] for name in ("extrinsic", "subgoal", "novelty")}
    with torch.device(config.device):
        return Hieros(env.observation_space.shape, int(env.action_space.n), config.levels, config.k,
                      (config.subgoal_categoricals, config.subgoal_classes), weights, model, behaviour)


class Recorded:
    """The update of a level, on a GPU as one CUDA graph: the second call records it, later ones play it back.
    An update is thousands of kernels, each done before the CPU has asked for the next; of a graph all are
    asked for at once. It holds addresses, not values: the batch is copied to where the recorded one lies,
    metrics come out where they came out then, and the weights stay in their places."""

    def __init__(self, update):
        self.update, self.batch, self.graph = update, None, None

    def __call__(self, batch):
        if self.batch is None or not batch["reward"].is_cuda:
            self.batch = batch  # the first call, in which Adam makes its moments, is not for recording
            return self.update(batch)
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            # Recording computes nothing. Only the current GPU is recorded, so it must be the batch's: cuda:1.
            with torch.cuda.device(batch["reward"].device), torch.cuda.graph(self.graph):
                self.metrics = self.update(self.batch)
        for name, tensor in batch.items():
            self.batch[name].copy_(tensor)
        self.graph.replay()
        return self.metrics


def load_checkpoint(path, device):
    """The dictionary that Run.save wrote. It may come from a stranger, but nothing in it is executed: beside
    numbers, texts, tensors, dicts and lists torch loads only NumPy's arrays."""
    kinds = [type(np.dtype(name)) for name in ("bool", "uint8", "int64", "float32", "float64")]
    arrays = [np.ndarray, np.dtype, np.zeros(0).__reduce__()[0], codecs.encode]  # what they are pickled by
    torch.serialization.add_safe_globals(arrays + kinds)
    return torch.load(path, map_location=device, weights_only=True)


class Run:
    """Agent, environment, replays and counters of one run, what it does in a step, how it is saved. All that
    the next step depends on is here, random numbers too: a resumed run is bit for bit one never stopped."""

    SAVED = "step", "seconds", "score", "curve", "updates", "commits", "memory", "now"  # as they are

    def __init__(self, config, env):
        if config.steps < config.warmup:
            raise UsageError(f"--steps {config.steps} ends before the first update, --warmup {config.warmup}")
        self.config, self.env, self.directory = config, env, Path(config.logdir)
        torch.manual_seed(config.seed)
        self.rng = np.random.default_rng(config.seed)
        with blaming("the agent cannot be made"):  # for want of memory, for example
            self.agent = make_agent(config, env)
            # Level i stores k^i times more rarely: with k^i times less room it remembers as long.
            self.replays = [Replay(spec, -(-config.replay_size // config.k ** i), config.batch_length,
                                   config.tau, self.rng) for i, spec in enumerate(self.agent.specs)]
        self.discretised = self.agent.discretise()  # of the S5 layers: once an update, not once a step
        self.update = [Recorded(level.update) for level in self.agent.levels]
        self.memory = self.agent.initial_memory(1)
        self.now = env_step(env.reset(seed=config.seed))
        self.step, self.score, self.updates = 0, 0.0, [0] * config.levels  # score: of this episode so far
        self.curve = []  # [agent step, return] of every finished episode
        self.commits = [origin()["commit"] + "+" * origin()["dirty"]]  # of all code that has trained it
        self.gathered = {}  # {level: {name: array (B,T,...)}}, see `batch`
        self.measured = {}  # {(level, *names of metrics): [their values, a tensor an update]} since last line
        self.seconds, self.logged = 0.0, 0  # wall time of training and step, at the last line of the log
        self.began, self.metrics = time.perf_counter(), self.directory / "metrics.jsonl"
        self.directory.mkdir(parents=True, exist_ok=True)

    def act(self):
        """Every level that is due updates its state, chooses and remembers. Returns the action to play."""
        level = self.memory["levels"][0]
        self.memory, ticks = self.agent.act(self.memory, **self.now, discretised=self.discretised)
        # Random play that changes its mind at each step may get nowhere. What is held must stand in the
        # memory, too: the world model is told it as the last action.
        if self.step < self.config.warmup and self.memory["t"][0] % self.config.warmup_hold:
            ticks[0]["action"] = self.memory["levels"][0]["action"] = level["action"]
        transitions = self.agent.transitions(ticks)
        for replay, transition in zip(self.replays, transitions):
            replay.add(transition)
        return int(transitions[0]["action"][0])

    def play(self, action):
        """One step of the game."""
        self.now = env_step(self.env.step(action))
        self.score += self.now["reward"].item()

    def restart(self):
        """The next episode."""
        self.log({"episode/score": self.score, "episode/length": int(self.memory["t"][0])})
        self.curve.append([self.step, self.score])
        self.now, self.score = env_step(self.env.reset()), 0.0

    def learn(self):
        """One update of every level that is due and has enough to learn from. Level i is due k^i times more
        rarely, and stores k^i times more rarely: so a stored step is drawn equally often at every level."""
        c = self.config
        for i, (level, replay) in enumerate(zip(self.agent.levels, self.replays)):
            if self.step >= c.warmup and self.step % (c.train_every * c.k ** i) == 0 and replay.starts:
                metrics = self.update[i](self.batch(i))
                # They stay on the device: to fetch a number from a GPU is to wait for all that it has to do.
                self.measured.setdefault((i, *metrics), []).append(torch.stack(list(metrics.values())))
                with torch.no_grad():
                    self.discretised[i] = level.world_model.sequence.discretise()
                self.updates[i] += 1

    def batch(self, i):
        """A batch from the replay of level i, on the device. On the CPU it takes the place of the last one.
        That one has been copied to the GPU by then: `act` comes between two draws and waits for the GPU."""
        drawn = self.replays[i].sample(self.config.batch_size, self.gathered.get(i))
        if i not in self.gathered and self.config.device != "cpu":
            # From memory that is not pinned a copy to a GPU would wait for all updates before it.
            drawn = {name: torch.from_numpy(array).pin_memory().numpy() for name, array in drawn.items()}
        self.gathered[i] = drawn
        return {name: torch.from_numpy(array).to(self.config.device, non_blocking=True)
                for name, array in drawn.items()}

    def log(self, values):
        """One more line of metrics.jsonl, a JSON object. The names are DreamerV3's where it has one."""
        with open(self.metrics, "a") as file:
            file.write(json.dumps({"step": self.step} | values) + "\n")

    def write_means(self):
        """The mean metrics of each level since the last time, and the speed. Raises FloatingPointError."""
        for (level, *names), values in self.measured.items():
            means = {f"train/{name}": mean for name, mean in zip(names, (sum(values) / len(values)).tolist())}
            if wrong := ", ".join(name for name, mean in means.items() if not np.isfinite(mean)):
                raise FloatingPointError(f"up to step {self.step}, level {level}: not finite: {wrong}")
            self.log({"level": level} | means)
        now = time.perf_counter() - self.began
        self.log({"seconds/total": now, "fps/policy": (self.step - self.logged) / (now - self.seconds)})
        self.measured, self.logged, self.seconds = {}, self.step, now

    def save(self):
        """Write a checkpoint, such that a kill at any moment leaves one: what it needs beside it is on the
        disk before it takes the old one's name, and what only the old one needed is deleted by the next."""
        if self.step > self.logged:
            self.write_means()  # which raises if a loss is not finite: that must not get into a checkpoint
        for i, replay in enumerate(self.replays):
            replay.save(self.directory / f"replay-{i}")
        with open(self.metrics, "a") as file:
            os.fsync(file.fileno())
        checkpoint = {name: vars(self)[name] for name in self.SAVED} | {
            "config": vars(self.config), "weights": self.agent.state_dict(),
            "optimisers": [{name: o.adam.state_dict() for name, o in level.optimisers.items()}
                           for level in self.agent.levels],
            "env": self.env.get_state() if hasattr(self.env, "get_state") else None,
            "replay_totals": [replay.total for replay in self.replays], "log": self.metrics.stat().st_size,
            "rng": self.rng.bit_generator.state, "torch_rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all()}
        torch.save(checkpoint, buffer := io.BytesIO())  # to a full disk torch would raise an error of its own
        with replacing(self.directory / "checkpoint.pt") as file:
            file.write(buffer.getbuffer())

    def restore(self, checkpoint):
        """Continue where `save` was called. An episode of an environment without get_state is lost."""
        commits = dict.fromkeys(checkpoint["commits"] + self.commits)
        vars(self).update({name: checkpoint[name] for name in self.SAVED}, commits=list(commits))
        self.logged, self.began = self.step, time.perf_counter() - self.seconds
        self.agent.load_state_dict(checkpoint["weights"])
        self.discretised = self.agent.discretise()
        for level, states in zip(self.agent.levels, checkpoint["optimisers"]):
            for name, state in states.items():
                level.optimisers[name].adam.load_state_dict(state)
        if checkpoint["env"] is None:  # a new episode, of a seed that has not been played
            self.now, self.score = env_step(self.env.reset(seed=self.config.seed + self.step)), 0.0
        else:
            self.env.set_state(checkpoint["env"])
        self.rng.bit_generator.state = checkpoint["rng"]
        torch.set_rng_state(checkpoint["torch_rng"].cpu())
        torch.cuda.set_rng_state_all([x.cpu() for x in checkpoint["cuda_rng"][:torch.cuda.device_count()]])
        # Last, since the rest deletes: what was written after the checkpoint will be written again.
        for i, (replay, total) in enumerate(zip(self.replays, checkpoint["replay_totals"], strict=True)):
            replay.load(self.directory / f"replay-{i}", total)
        with open(self.metrics, "a") as file:
            file.truncate(min(checkpoint["log"], file.tell()))


def train(run, progress=True):
    """Act, learn, log, save, until config.steps. Returns the number of the signal that ended it, else 0."""
    c, stopped = run.config, []

    def stop(number, frame):  # asks for an end only: a checkpoint must not hold one half of a step
        stopped.append(number)
        for again in (signal.SIGINT, signal.SIGTERM):  # one more ends it at once; SIGHUP often comes twice
            signal.signal(again, signal.SIG_DFL)

    with contextlib.ExitStack() as after, tqdm(total=c.steps, initial=run.step, unit="step", mininterval=1.0,
                                               disable=not progress, dynamic_ncols=True) as bar:
        for number in {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}:
            if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
                after.callback(signal.signal, number, signal.signal(number, stop))
        while run.step < c.steps and not stopped:
            action = run.act()
            if run.now["is_last"][0]:
                run.restart()  # the last step is remembered, for its reward and its end; its action has no
                continue       # effect, so it is not one of config.steps
            run.step += 1
            # The update first: a GPU computes it while the CPU plays the game, and the next `act` waits for
            # both. What it learns from is in the replay already.
            run.learn()
            run.play(action)
            bar.disable = not progress or bool(stopped)  # Ctrl+C may have ended its reader, too: `| tee log`
            bar.update()
            if run.step % c.log_every == 0:
                run.write_means()
                mean = np.mean([score for _, score in run.curve[-10:]] or [np.nan])
                bar.set_postfix(mean10=f"{mean:.1f}", updates=sum(run.updates), refresh=False)
            if run.step % c.save_every == 0:
                run.save()
        run.save()
    return sum(stopped[:1])


# ---- The score and the command line ------------------------------------------------------------------------

def play(agent, game, episodes, seed=0, progress=True):
    """The returns of `episodes` episodes, played side by side by an agent, at random if it is None. How many
    each environment plays is fixed: those that end first are the short ones. One that fails keeps its own."""
    envs, now = [], []  # now: an env_step of each
    with contextlib.ExitStack() as opened:
        try:
            for i in range(min(episodes, 10)):
                envs.append(opened.enter_context(make_env(game)))
                now.append(env_step(envs[i].reset(seed=seed + i)))
        except UsageError as error:
            print(error, file=sys.stderr)  # then with fewer: of some emulators a process can have one only
        n = len(now)
        score, returns, playing = [0.0] * n, [[] for _ in now], list(range(n))
        wanted = [len(range(i, episodes, n)) for i in playing]
        chance = MultiDiscrete([env.action_space.n for env in envs[:n]], seed=seed)
        memory, discretised = agent and agent.initial_memory(n), agent and agent.discretise()
        bar = opened.enter_context(tqdm(total=episodes, desc="evaluation" if agent else "random play",
                                        unit="episode", disable=not progress, dynamic_ncols=True))
        while any(len(returns[i]) < wanted[i] for i in playing):
            action = chance.sample()
            if agent:
                batch = {name: np.concatenate([step[name] for step in now]) for name in now[0]}
                memory, ticks = agent.act(memory, **batch, discretised=discretised)
                action = ticks[0]["action"].argmax(-1).cpu().numpy()
            for i in list(playing):
                try:
                    ended = now[i]["is_last"][0]  # and the agent has seen it: now comes a start
                    now[i] = env_step(envs[i].reset() if ended else envs[i].step(action[i]))
                    score[i] = now[i]["reward"].item() + (0.0 if ended else score[i])
                    if now[i]["is_last"][0] and len(returns[i]) < wanted[i]:
                        returns[i].append(score[i])
                        bar.update()
                except UsageError as error:
                    print(error, file=sys.stderr)
                    playing.remove(i)
    return sum(returns, [])


@functools.cache  # asked when a run begins: that code is running, whatever is committed meanwhile
def origin():
    """What a result comes from: command, commit, whether files were changed since it ("dirty"), versions."""
    commit, git = "", ["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty=+", "--exclude=*"]
    with contextlib.suppress(OSError):  # no git
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    versions = {"python": sys.version.split()[0], "torch": torch.__version__, "numpy": np.__version__,
                "gymnasium": gymnasium.__version__, "ale-py": ale_py.__version__}
    return {"command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]), "versions": versions,
            "commit": commit.rstrip("+") or "unknown", "dirty": commit.endswith("+")}


def statistics(returns):
    """Mean and standard error of some returns: the error of one agent's episodes. Seeds differ by more."""
    n, mean = len(returns), float(np.mean(returns))
    error = float(np.std(returns, ddof=1) / n ** 0.5) if n > 1 else None
    text = f"{mean:.1f}" + (f" +- {error:.1f} (standard error of {n} episodes)" if n > 1 else "")
    return {"mean": mean, "standard_error": error, "returns": returns, "text": text}


def evaluation(config, agent, past, episodes, seed, file):
    """Play for a score. Writes all that is known of a run to a file of JSON, complete or not at all, and
    returns the score as one line of text. past: a checkpoint, or vars(run)."""
    returns = play(agent, config.game, episodes, seed)
    if not returns:
        raise UsageError(f"{config.game}: no episode came to its end")
    score, published = statistics(returns), read_published()
    lowest, human = (published.get(name, {}).get(config.game) for name in ("random", "human"))
    normalised = None if human is None else (score["mean"] - lowest) / (human - lowest)
    measured = play(None, config.game, 20, seed) if human is None else []  # to compare, if none is published
    measured, failed = statistics(measured) if measured else None, episodes - len(returns)
    summary = {name: vars(config)[name] for name in ("game", "levels", "seed", "preset")} | score | {
        "agent_steps": past["step"], "hours": round(past["seconds"] / 3600, 3),
        "median": float(np.median(returns)), "random": lowest, "human": human,
        "human_normalised": normalised, "random_measured": measured, "failed": failed,
        "protocol": "sampled actions" + f", {Atari.PROTOCOL}" * (config.game in atari_games()),
        "evaluation_seed": seed, "threads": torch.get_num_threads(), "trained_by": past["commits"],
        "device": config.device if config.device == "cpu" else torch.cuda.get_device_name(config.device),
        "config": vars(config), "curve": past["curve"], **origin()}
    with replacing(Path(file)) as opened:
        opened.write(json.dumps(summary, indent=1).encode() + b"\n")
    line = f"{config.game} after {past['step']} steps: score {score['text']}"
    line += f", {failed} more failed" * (failed > 0)
    if human is not None:
        return f"{line}; random {lowest}, human {human} (published): human-normalised {normalised:.3f}"
    return line + (f"; random play {measured['text']}" if measured else "")


def program(main):
    """Run main(argv) as a program that ends with an exit code, and with one line where something is wrong."""
    with contextlib.suppress(OSError, AttributeError):  # glibc only
        libc = ctypes.CDLL("libc.so.6")  # keep freed memory: to map it anew makes an update a third slower
        libc.mallopt(-4, 0)  # M_MMAP_MAX: map no blocks of their own
        libc.mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD: give back only above 2 GiB
    sys.stdout, sys.stderr = (file or open(os.devnull, "w") for file in (sys.stdout, sys.stderr))  # if closed
    try:
        sys.exit(main(sys.argv[1:]))
    except (UsageError, OSError, FloatingPointError, KeyboardInterrupt) as error:
        line = str(error) or "interrupted; what was saved before stays"  # while it trains, Ctrl+C saves first
        code = {FloatingPointError: 1, KeyboardInterrupt: 130}.get(type(error), 2)
    print(f"{Path(sys.argv[0]).name}: {' '.join(line.split())}", file=sys.stderr)
    sys.exit(code)


def main(argv):
    """A run from its command line to its score. Returns the exit code."""
    given, resume = parse_config(argv)
    config = make_config(given)  # first: a value out of range leaves no directory behind
    directory, again = Path(config.logdir), f"python train.py --logdir {shlex.quote(config.logdir)} --resume"
    path, score = directory / "checkpoint.pt", directory / "evaluation.json"
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / "lock", "a") as lock, contextlib.ExitStack() as playing:
        with blaming(f"--logdir {directory} is in use, or cannot be"), contextlib.suppress(ImportError):
            import fcntl  # not on Windows
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # however this process ends, it is gone then
        if resume := resume and path.exists():
            with blaming(f"{path} cannot be used"):
                past = load_checkpoint(path, config.device)
                place = {"logdir": config.logdir, "device": config.device}
                config = make_config(past["config"] | given | place)
            if "optimisers" not in past:
                raise UsageError(f"{path} is an exported agent: it can be played, not trained on")
            for name in given.keys() - RESUMABLE:
                if vars(config)[name] != past["config"][name]:
                    raise UsageError(f"--{name}: the run has {past['config'][name]}, and cannot change that")
        # A first save that was killed, or met a full disk, leaves empty files and unfinished ones.
        elif any(f.is_file() and f.stat().st_size and f.suffix != ".tmp" for f in directory.rglob("*")):
            raise UsageError(f"{directory} has files: {'add --resume or ' * path.exists()}change --logdir")
        run = Run(config, playing.enter_context(make_env(config.game)))
        with blaming(f"{path} cannot be used"):
            run.restore(past) if resume else run.save()  # from now on there is something to resume
        print("{game}, preset {preset}, {levels} levels, on {device}, in {logdir}".format(**vars(config))
              + f", resumed at step {run.step}" * resume + "; Ctrl+C saves and stops, twice stops at once")
        if run.step < config.steps and score.exists():  # that of the run before it was extended
            score.replace(directory / f"evaluation-step{run.step}.json")
        try:
            if number := train(run):
                print(f"stopped at step {run.step}, saved; continue with: {again}")
                return 128 + number
            playing.close()  # of some emulators a process can have one only
            open(f"{score}.tmp", "wb").close()  # to know before playing that it can be written
            line = evaluation(config, run.agent, vars(run), config.eval_episodes, config.seed, score)
        except (OSError, UsageError) as error:
            raise UsageError(f"{error}; the last checkpoint is intact, go on with: {again}") from error
    print(line)  # last: there may be no terminal to print to
    return 0


if __name__ == "__main__":
    program(main)
