"""Goals in hindsight: subgoals that can be done, an extension of the paper's rule.

    python results/hindsight.py --game kung_fu_master --preset cpu --steps 25000 --subgoal_weight 1
    python results/hindsight.py rooms AGENT SEED STEPS

The first takes the flags of train.py and trains with HindsightLevel in place of Level. Such a run is resumed
by this script, too. The second asks whether two levels learn goals for their own sake, in four rooms without
any reward. AGENT is paper or hindsight. It prints a line of what results/subgoals.py measures; 4,800 steps
take three CPU minutes.

By the paper's rule a subgoal is a place in h, and that leads into a circle. Goals that no one follows change
nothing. So the level above learns that its actions are idle, and chooses at random. Of random goals few can
be reached. So none is worth following. Five rules lead out:

1. A goal is a *change* of h since it was set (FeUdal Networks, arXiv 1703.01161), and it pays for k ticks. As
   places all goals are near each other, for most of h is common to all: to stay in the middle would pay.
2. It is a change *beyond what comes anyway*, which a network `foresee` learns to tell from the first h. In
   Freeway 97% of the change is the traffic: a goal of traffic is reached whatever one does.
3. *Hindsight goals* (HER, arXiv 1707.01495): the goal of half of the dreams is what the replayed sequence did
   next. That can be done from here, whatever the level above asks for.
4. *reached* pays the level above (as HAC tests subgoals, arXiv 1712.00948) for goals that the level below, by
   the upper one's own model, will come near. Most codes stand for nothing that can be done here.
5. Both rewards are *beyond another's* (arXiv 1611.07507): less what another dream's goal would have paid, and
   less what another dream's outcome would. Else two levels settle on one goal, which is always done.

Both have the weight `subgoal_weight`. Where nothing else is rewarded, 1; beside a game's reward 0.1: at 1 an
agent that had found a reward went back to following goals for their own sake, and lost it for good. That was
found when the zeros after a goal's end still counted in the normaliser, so that a weight was two to three
times as strong as it says.
"""
import json
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from unittest.mock import patch

sys.path[0] = str(Path(__file__).parents[1])  # the project's root in place of results/
sys.path.append(str(Path(__file__).parent))  # last: results/profile.py hides Python's own

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box, Discrete
from torch import nn

import evaluate
import train
from hierarchy import Hieros, Level, Optimiser, ReturnNormaliser, cosine_max, lambda_return, onehot
from world_model import MLP, sample_onehot, symexp

SHARE = 0.5  # of the dreams that have a goal in hindsight


def draw_code(autoencoder, h):
    """h (..., H) -> its subgoal code (..., 8*8)."""
    return sample_onehot(autoencoder.encode(h)).flatten(-2)


class GoalNormaliser(nn.Module):
    """ReturnNormaliser for levels with goals that live `k` ticks: `goal` (R,) says which returns end then.

    Later entries of these are all zero and do not count. They would make the range smaller than that of the
    returns that do, and so the reward's weight larger than it says.
    """

    def __init__(self, floors, k, goal):
        super().__init__()
        self.k, self.whole, self.alive = k, ReturnNormaliser(floors), ReturnNormaliser(floors)
        self.register_buffer("goal", torch.tensor(goal), persistent=False)

    def update(self, returns):
        """As ReturnNormaliser.update, of returns (horizon,N,R)."""
        return torch.where(self.goal, self.alive.update(returns[:self.k]), self.whole.update(returns))


class HindsightLevel(Level):
    """A Level by the rules above. k: ticks that a goal lives. below: the HindsightLevel under it, or None."""

    FLOORS = Level.FLOORS | {"reached": 0.1}

    def __init__(self, *, k, below, **settings):
        super().__init__(**settings)
        self.k, self.below = k, [below]  # in a list, or nn.Module would save it as a part of this level
        names, hidden = list(self.rewards), self.world_model.hidden
        self.led = "subgoal" in names  # is there a level above, which sets goals?
        # Both (horizon,1,R): a reward's weight in what is done in states 0 ... horizon-1, and whether its
        # return goes on after states 1 ... horizon. In state k a goal's time is up, and nothing done from
        # then on tells how well it was followed. A choice of goals is judged by the next state alone.
        weights, goes_on = self.weights.repeat(self.horizon, 1, 1), torch.ones(self.horizon, 1, len(names))
        if "reached" in names:
            goes_on[..., names.index("reached")] = 0
        if self.led:
            goal, units = names.index("subgoal"), settings["model"]["units"]
            weights[k:, :, goal] = goes_on[k - 1:, :, goal] = 0
            self.normaliser = GoalNormaliser([self.FLOORS[name] for name in names], k,
                                             [name == "subgoal" for name in names])
            self.foresee = MLP(hidden + k, hidden, units, settings["model"]["mlp_layers"])
            self.optimisers["foresee"] = Optimiser(
                1e-6, 100, (self.foresee.parameters(), settings["autoencoder_lr"]))
        self.register_buffer("weights", weights, persistent=False)
        self.register_buffer("goes_on", goes_on, persistent=False)

    def origin(self, start, ticks=None):
        """The h (...,H) from which a goal set at h = `start` counts: what comes anyway `ticks` (...) later
        (k at most, and by default). Zero at the top, where nobody sets any."""
        if not self.led:
            return torch.zeros_like(start)
        ticks = torch.full(start.shape[:-1], self.k, device=start.device) if ticks is None else ticks
        ticks = onehot(ticks.clamp(max=self.k), self.k, first=1).expand(*start.shape[:-1], -1)
        return start + self.foresee(torch.cat([start, ticks], -1))

    @torch.no_grad()
    def goals(self, batch, states):
        """(B,T,8*8): the goals held at that time, a SHARE of them replaced by the code of what came 1 ... k
        ticks later in the same episode."""
        held, h, is_first = super().goals(batch, states), states.h, batch["is_first"]
        if not self.led:
            return held
        self.told = held.flatten(0, 1)  # by the level above: see imagined_rewards
        now = torch.arange(h.shape[1], device=h.device).expand(is_first.shape)
        later = (now + 1 + (self.k * torch.rand_like(h[..., 0])).long()).clamp(max=h.shape[1] - 1)
        episode = is_first.cumsum(1)
        known = (later > now) & (episode.gather(1, later) == episode)
        swap = known & (torch.rand_like(h[..., 0]) < SHARE)
        there = h.gather(1, later[..., None].expand_as(h))
        done = draw_code(self.autoencoder, there - self.origin(h, later - now))
        return torch.where(swap[..., None], done, held)

    def update_autoencoder(self, h):
        """The code names what a goal is about: the change in the last k ticks, or in all where there were
        fewer, beyond what was foreseen of so many."""
        if not self.led:
            return super().update_autoencoder(h)
        ticks, k = torch.arange(1, len(h), device=h.device)[:, None], min(self.k, self.horizon)
        start = torch.cat([h[:1].expand(k, -1, -1), h[1:-k]])
        change = h[1:] - self.origin(start, ticks)
        loss = change.square().sum(-1).mean()
        loss.backward()
        self.optimisers["foresee"].step()
        novelty, metrics = super().update_autoencoder(torch.cat([h[:1], change.detach()]))
        return novelty, metrics | {"loss/foresee": loss.detach()}

    @torch.no_grad()
    def imagined_rewards(self, states, actions, goal, novelty):
        """As Level's, with the rewards of rules 1, 4 and 5. Goals count as set when the dream began."""
        reward, h = {"extrinsic": states.reward[1:], "novelty": novelty}, states.h
        if self.led:
            ticks = torch.arange(1, len(h), device=h.device)[:, None]
            made = h[1:] - self.origin(h[:1].expand_as(h[1:]), ticks)
            # Another's is one that the level above has set, mostly in another sequence. It is none in
            # hindsight: beside those it would still pay to follow one goal on which both levels have settled.
            other = self.told.roll(len(self.told) // 2, 0)[:len(goal)]
            paid, usual = (cosine_max(self.autoencoder.decode(code), made) for code in (goal, other))
            reward["subgoal"] = (paid - usual) * (ticks <= self.k)
        if "reached" in self.rewards:
            below, = self.below
            # This level's decoder shows the last k states [z, symlog(h)] of the level below, the newest last.
            h = symexp(self.world_model.decode(states.z, h)[..., -below.world_model.hidden:])
            goal, made = below.autoencoder.decode(actions), h[1:] - below.origin(h[:-1])
            reward["reached"] = cosine_max(goal, made) - cosine_max(goal, made.roll(made.shape[1] // 2, 1))
        return reward

    def returns(self, reward, discount, value):
        """As Level's; a goal's return stops when its time is up."""
        return lambda_return(reward, discount[..., None] * self.goes_on, value, self.lam)


class HindsightHieros(Hieros):
    """Hieros with HindsightLevels."""

    def make_level(self, rewards, **settings):
        below = self.levels[-1] if self.levels else None
        if below:  # who sets goals is paid like who follows them
            rewards = rewards | {"reached": below.rewards["subgoal"]}
        return HindsightLevel(rewards=rewards, k=self.k, below=below, **settings)


def load_run(directory, device):
    """evaluate.load_run of a run with either kind of levels."""
    try:
        return evaluate.load_run(directory, device)
    except train.UsageError:  # its weights may be those of the other kind
        with suppress(train.UsageError), patch.object(train, "Hieros", HindsightHieros):
            return evaluate.load_run(directory, device)
        raise


class GridRooms(gymnasium.Env):
    """Four rooms of 5 x 5 cells, doors between them. Five actions: stay, or go one cell. Seen are row and
    column, one-hot. An episode has 200 steps and begins in any cell."""

    MOVES = ((0, 0), (0, 1), (0, -1), (1, 0), (-1, 0))

    def __init__(self):
        self.observation_space, self.action_space = Box(0, 1, (22,), np.float32), Discrete(5)
        self.free = np.ones((11, 11), bool)
        self.free[5] = self.free[:, 5] = False
        self.free[[5, 5, 2, 8], [2, 8, 5, 5]] = True

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.cell = 0, tuple(self.np_random.choice(np.argwhere(self.free)))
        return self.observe(), {}

    def step(self, action):
        to = tuple(np.add(self.cell, self.MOVES[int(action)]))
        if 0 <= min(to) and max(to) < 11 and self.free[to]:
            self.cell = to
        self.t += 1
        return self.observe(), 0.0, False, self.t == 200, {}

    def observe(self):
        return np.concatenate([np.eye(11, dtype=np.float32)[i] for i in self.cell])

    def get_state(self):  # a run saves at its end; no one goes on from there
        return {}


SETTINGS = dict(
    game="rooms", preset="debug", device="cpu", levels=2, warmup=800, train_every=2, stoch=8, classes=8,
    hidden=64, state_size=32, s5_layers=2, units=64, mlp_layers=1, sharpness=10.0, kl_warmup=100,
    batch_size=8, batch_length=32, replay_size=20_000, horizon=6, starts=96, entropy_scale=0.02,
    subgoal_weight=1.0, encoder_lr=1e-3, model_lr=1e-3, actor_lr=1e-3, critic_lr=1e-3, autoencoder_lr=1e-3,
    save_every=10 ** 9)


def trained(env, agent, **settings):
    """The train.Run of an agent of this class, trained in an environment."""
    with tempfile.TemporaryDirectory() as directory, patch.object(train, "Hieros", agent):
        run = train.Run(train.Config(**settings, logdir=directory), env)
        if train.train(run, progress=False):  # a signal has come: half a training is no result
            sys.exit(f"stopped at step {run.step}, nothing printed")
    return run


def print_line(**values):
    """A result as a line of JSON, with the command and the commit that made it."""
    origin = train.origin()
    commit = origin["commit"] + "+" * origin["dirty"]
    print(json.dumps(values | {"command": origin["command"], "commit": commit}))


def rooms(agent, seed, steps):
    """Train in the four rooms, measure, print."""
    from subgoals import subgoal_study
    settings = SETTINGS | {"seed": int(seed), "steps": int(steps)}
    run = trained(GridRooms(), {"paper": Hieros, "hindsight": HindsightHieros}[agent], **settings)
    study, = subgoal_study(run.agent, GridRooms(), 1, steps=2000)
    print_line(task="rooms", agent=agent, seed=int(seed), steps=int(steps), **study)


def main(argv):
    """train.main with HindsightLevels, or the four rooms. Returns the exit code, or what is wrong."""
    if argv[:1] == ["rooms"]:
        return rooms(*argv[1:]) if len(argv) == 4 and argv[1] in ("paper", "hindsight") else __doc__
    origin = train.origin
    with patch.object(train, "Hieros", HindsightHieros), patch.object(
            train, "origin", lambda: origin() | {"change": "goals in hindsight"}):
        return train.main(argv)


if __name__ == "__main__":
    train.program(main)
