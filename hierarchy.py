"""The hierarchy: what one level learns to do in its imagination, and how the levels act together.

Level 0 sees the game and plays it. Level i+1 sees the states of level i, acts k = 4 times more rarely, and
its action is a *subgoal* for level i: a point in level i's own state space where it should go. Step by step:

    t        0  1  2  3  4  5  6  7  8 ... 16
    level 0  *  *  *  *  *  *  *  *  *      *      sees o_t, acts in the game
    level 1  *           *           *      *      sees its last 4 level-0 states, up to and including t
    level 2  *                              *      sees its last 4 level-1 states

A level *ticks* where it has a star. Within one env step information first flows up (each ticking level
updates its state), then intentions flow down (each ticking level chooses; its choice is held by the level
below until the next tick; level 0 acts).

Papers: Hieros (Mattes et al. 2024, arXiv 2310.05167); Director (Hafner et al. 2022, arXiv 2206.04114) for
subgoal autoencoder and cosine-max; DreamerV3 (arXiv 2301.04104) for the actor-critic. Read world_model.py
before, replay.py after.

Symbols (the same in every file; those of world_model.py beside these):
    L, k       number of levels; a level ticks every k ticks of the level below
    N          rollouts imagined side by side
    g, g_h     (N,8*8) subgoal code, 8 one-hots of 8 classes; (N,H) the same decoded into the level's h-space
    R          rewards of a level: extrinsic, subgoal (not at the top), novelty and `reached` (not at level 0)
"""

import copy

import numpy as np
import torch
from torch import nn

from world_model import (MLP, TwoHot, WorldModel, entropy, log_prob, sample_onehot, straight_through, symexp,
                         symlog, unimix)


# ------------------------------------------------------------------------------------------------------------
# Rewards and returns
# ------------------------------------------------------------------------------------------------------------

def cosine_max(goal, h):
    """max(0, goal . h) / max(|goal|, |h|)^2 over the last dimension: 1 only where h *is* the goal.

    This is Director's max-cosine. A plain cosine would be satisfied by the right direction at any length.
    """
    longer = torch.maximum(goal.square().sum(-1), h.square().sum(-1))
    return (goal * h).sum(-1).clamp(min=0) / longer.clamp(min=1e-8)


def lambda_return(reward, discount, value, lam):
    """R_t = r_{t+1} + d_{t+1} ((1 - lam) v_{t+1} + lam R_{t+1}), R_horizon = v_horizon (as in DreamerV3).

    reward, discount, value: (horizon, ...) at states 1 ... horizon. Returns R at states 0 ... horizon-1.
    """
    R, returns = value[-1], []
    for r, d, v in zip(reward.flip(0), discount.flip(0), value.flip(0)):
        R = r + d * ((1 - lam) * v + lam * R)
        returns.append(R)
    return torch.stack(returns).flip(0)


class ReturnNormaliser(nn.Module):
    """Scale of each reward's returns: a running mean of their 5-95 percentile range, at least `floors` (R,).
    Without a floor, returns that are all alike would have their noise blown up to full size."""

    def __init__(self, floors, decay=0.99):
        super().__init__()
        self.decay = decay
        self.register_buffer("floors", torch.tensor(floors), persistent=False)
        self.register_buffer("percentiles", torch.tensor([0.05, 0.95]), persistent=False)
        self.register_buffer("range", torch.zeros(len(floors)))
        self.register_buffer("updates", torch.zeros(()))

    def update(self, returns):
        """Let the scale follow the returns (..., R) of one update. Returns the scale (R,) to divide by."""
        low, high = torch.quantile(returns.flatten(0, -2), self.percentiles, dim=0)
        self.updates += 1
        # A plain mean at first: the initial zero is forgotten at once and not over 1/(1 - decay) updates.
        self.range.lerp_(high - low, self.updates.reciprocal().clamp(min=1 - self.decay))
        return torch.maximum(self.range, self.floors)


# ------------------------------------------------------------------------------------------------------------
# Networks of a level
# ------------------------------------------------------------------------------------------------------------

class SubgoalAutoencoder(nn.Module):
    """Compresses h, or a change of it (see Level), to a code of 8 x 8 one-hots and back. Two jobs (Director).

    *Decoding*: the level above acts by choosing a code; this decoder says which h it stands for.
    *Novelty*: h is reconstructed badly where the level has seldom been.
    """

    def __init__(self, hidden, code_shape, units, mlp_layers):
        super().__init__()
        self.code_shape = code_shape
        size = code_shape[0] * code_shape[1]
        self.encoder = MLP(hidden, size, units, mlp_layers)
        self.decoder = MLP(size, hidden, units, mlp_layers)  # ends linear: h may have any sign and size

    def encode(self, h):
        """h (..., H) -> probabilities of its code (..., 8, 8)."""
        return unimix(self.encoder(h).float().unflatten(-1, self.code_shape))

    def code(self, h):
        """h (..., H) -> its code (..., 8*8), drawn."""
        return sample_onehot(self.encode(h)).flatten(-2)

    def decode(self, code):
        """(..., 8*8) -> g_h (..., H)."""
        return self.decoder(code).float()

    def loss(self, h):
        """Returns (squared error + 0.5 KL(code || uniform), novelty (...): mean squared error of a state).

        The first error is in units of the variance of this h (..., H). A level's h varies by 0.3 in one game
        and by 0.8 in another; where it is little, the KL alone would count, and all codes mean the same.
        """
        q = self.encode(h)
        error = (self.decode(straight_through(q).flatten(-2)) - h).square()
        # KL to the uniform distribution = its entropy minus ours. It keeps all codes in use, so that whatever
        # the level above chooses means something.
        uniform = self.code_shape[0] * np.log(self.code_shape[1])
        variance = h.flatten(0, -2).var(0, correction=0).mean().clamp(min=1e-8)  # of one h: 0
        loss = error.sum(-1) / variance + 0.5 * (uniform - entropy(q))
        return loss.mean(), error.mean(-1).detach()


class Actor(nn.Module):
    """A policy of n independent categoricals of `classes`: (1, game actions) at level 0, (8, 8) above."""

    def __init__(self, inputs, action_shape, units, mlp_layers):
        super().__init__()
        self.action_shape = action_shape
        self.net = MLP(inputs, action_shape[0] * action_shape[1], units, mlp_layers, zero_init=True)

    def forward(self, feature):
        """(..., inputs) -> probabilities (..., n, classes)."""
        return unimix(self.net(feature).float().unflatten(-1, self.action_shape))


class Critics(nn.Module):
    """One two-hot critic a reward: one alone could not tell steps to the subgoal from steps to the score."""

    def __init__(self, inputs, rewards, units, mlp_layers):
        super().__init__()
        self.twohot = TwoHot()
        self.nets = nn.ModuleList(MLP(inputs, len(self.twohot.values), units, mlp_layers, zero_init=True)
                                  for _ in range(rewards))
        for net in self.nets:
            net[-1].bias.data.copy_(self.twohot.first_logits())

    def forward(self, feature):
        """(..., inputs) -> two-hot logits (..., R, bins)."""
        return torch.stack([net(feature).float() for net in self.nets], -2)


class Optimiser:
    """Adam with clipped gradient norm, of groups (parameters, their learning rate). No weight decay (the
    published AdamW has it)."""

    def __init__(self, eps, clip, *groups):
        groups = [{"params": list(parameters), "lr": lr} for parameters, lr in groups]
        self.parameters, self.clip = [p for group in groups for p in group["params"]], clip
        fused = self.parameters[0].device.type != "meta"  # one kernel for all parameters
        # capturable: a CUDA graph (train.Recorded) may hold the step.
        self.adam = torch.optim.Adam(groups, eps=eps, fused=fused, foreach=not fused, capturable=fused)

    def step(self):
        """Apply the gradients and drop them. Returns their norm before it was clipped."""
        norm = nn.utils.clip_grad_norm_(self.parameters, self.clip)
        self.adam.step()
        self.adam.zero_grad()
        return norm


def onehot(index, classes, first=0):
    """(...) integers -> (..., classes): class c is the number first + c; a number outside gives zeros."""
    return (index[..., None] == torch.arange(first, first + classes, device=index.device)).float()


def another(rollouts, dim):
    """For each of the rollouts along a dimension another one, mostly of another sequence."""
    return rollouts.roll(rollouts.shape[dim] // 2, dim)


# ------------------------------------------------------------------------------------------------------------
# One level
# ------------------------------------------------------------------------------------------------------------

class Level(nn.Module):
    """World model, subgoal autoencoder, actor, critics of one level, and how they learn from a replay batch.

    observation_shape: as for WorldModel. action_shape, subgoal_shape: (categoricals, classes) of the action
    and of the subgoal that it is given; (0, 8) at the top, where no one gives any; code_shape: of every
    subgoal. rewards: {name: weight}. model: keyword arguments of WorldModel. horizon: imagined steps; starts:
    imagined rollouts an update (at most B*T). gamma, lam: discount a tick (so a higher level, whose ticks are
    longer, looks further ahead) and lambda of the returns. slow: share by which the slow critics follow, an
    update. *_lr: learning rates. k: ticks that a subgoal lives. below: the Level under this one, or None.

    hindsight: 0 is the paper's rule, a subgoal is a place in h. It leads into a circle: goals that no one
    follows change nothing; so the level above learns that its actions are idle and chooses at random; of
    random goals few can be reached; so none is worth following. A share above 0 leads out, by five rules:

    - A goal is a *change* of h since it was set (FeUdal Networks, arXiv 1703.01161), and pays for k ticks. As
      places all goals are near each other, for most of h is common to all: to stay in the middle would pay.
    - It is a change *beyond what comes anyway*, which `foresee` learns to tell from the first h. In Freeway
      that is 97%, the traffic: a goal of traffic is reached whatever one does.
    - *Hindsight goals* (HER, arXiv 1707.01495): that share of the dreams has for its goal what the replayed
      sequence did next. It can be done from here, whatever the level above asks for.
    - *reached* pays the level above (as HAC tests subgoals, arXiv 1712.00948) for goals that the level below,
      by the upper one's own model, will come near. Most codes stand for nothing that can be done here.
    - Both rewards are *beyond another's* (arXiv 1611.07507): less what another dream's goal would have paid,
      and less what another dream's outcome would. Else two levels settle on one goal, which is always done.

    Both have the weight `subgoal_weight`. Where nothing else is rewarded, 1; beside a game's reward 0.1: at 1
    an agent that had found a reward went back to following goals for their own sake, and lost it for good.
    """

    # Returns that differ by less than this are taken for noise. DreamerV3 has 1 for the game's. But where
    # points are rare, a beginner's differ by 0.02, and the entropy, which is weighed against them, keeps the
    # policy uniform: in Freeway for 58,000 steps; with 0.1 it crosses by then 22 times an episode. Novelty,
    # an error of h, is smaller still.
    FLOORS = {"extrinsic": 0.1, "subgoal": 0.1, "novelty": 0.01, "reached": 0.1}

    def __init__(self, observation_shape, action_shape, subgoal_shape, code_shape, rewards, model, *, horizon,
                 starts, gamma, lam, entropy_scale, slow, model_lr, encoder_lr, actor_lr, critic_lr,
                 autoencoder_lr, k, hindsight=0.0, below):
        super().__init__()
        self.action_shape, self.subgoal_shape, self.rewards = action_shape, subgoal_shape, rewards
        self.horizon, self.starts, self.gamma, self.lam = horizon, starts, gamma, lam
        self.k, self.hindsight, self.entropy_scale, self.slow = k, hindsight, entropy_scale, slow
        self.below = [below]  # in a list, or nn.Module would train and save it as a part of this level
        self.relative = hindsight > 0 and subgoal_shape[0] > 0  # are the subgoals it is given changes of h?
        self.world_model = WorldModel(observation_shape, action_shape[0] * action_shape[1], **model)
        units, mlp_layers = model["units"], model["mlp_layers"]
        inputs = self.world_model.feature_size + subgoal_shape[0] * subgoal_shape[1]
        self.actor = Actor(inputs, action_shape, units, mlp_layers)
        self.critics = Critics(inputs, len(rewards), units, mlp_layers)
        self.slow_critics = copy.deepcopy(self.critics).requires_grad_(False)
        self.autoencoder = SubgoalAutoencoder(self.world_model.hidden, code_shape, units, mlp_layers)
        self.normaliser = ReturnNormaliser([self.FLOORS[name] for name in rewards])
        # Each reward's weight in what is done in states 0 ... horizon-1, and its own discount in states 1 ...
        # horizon, beside gamma: both (horizon,1,R). A goal lives k ticks, its choice is judged by the next
        # state. In state k its time is up: nothing done from then on tells how well it was followed.
        stays = {"subgoal": 1 - 1 / k, "reached": 0.0} if hindsight else {}
        stays = torch.tensor([stays.get(name, 1.0) for name in rewards]).repeat(horizon, 1, 1)
        weights = torch.tensor(list(rewards.values())).repeat(horizon, 1, 1)
        if self.relative:
            goal = list(rewards).index("subgoal")
            stays[k - 1:, :, goal] = weights[k:, :, goal] = 0
        self.register_buffer("stays", stays, persistent=False)
        self.register_buffer("weights", weights, persistent=False)
        encoder, others = self.world_model.encoder.parameters(), [
            p for name, p in self.world_model.named_parameters() if not name.startswith("encoder.")]
        self.optimisers = {
            "model": Optimiser(1e-8, 1000, (encoder, encoder_lr), (others, model_lr)),
            "actor": Optimiser(1e-5, 100, (self.actor.parameters(), actor_lr)),
            "critic": Optimiser(1e-5, 100, (self.critics.parameters(), critic_lr)),
            "autoencoder": Optimiser(1e-6, 100, (self.autoencoder.parameters(), autoencoder_lr))}
        if self.relative:
            self.foresee = MLP(self.world_model.hidden + k, self.world_model.hidden, units, mlp_layers)
            self.optimisers["foresee"] = Optimiser(1e-6, 100, (self.foresee.parameters(), autoencoder_lr))

    def policy(self, state, subgoal):
        """Draw an action (N, n*classes) for N States and subgoal codes (N, 8*8)."""
        return sample_onehot(self.actor(state.feature(subgoal))).flatten(-2)

    def observation(self, batch):
        """The observation of a replay batch as the world model takes it: floats, one-hot, stacked."""
        if "observation" in batch:  # level 0: an image as bytes, channels last, or a vector
            o = batch["observation"]
            return o.movedim(-1, -3) / 255 if o.dtype == torch.uint8 else o
        # Number 0, where there was no state yet, becomes zeros.
        z = onehot(batch["z"], self.world_model.z_shape[1], first=1).flatten(-2)
        return torch.cat([z, batch["h"]], -1).flatten(-2)

    def origin(self, start, ticks=None):
        """The h (...,H) from which a subgoal set at h = `start` counts: what comes anyway `ticks` (...) later
        (k at most, and by default). Zero at the top and by the paper's rule, where it is a place."""
        if not self.relative:
            return torch.zeros_like(start)
        ticks = torch.full(start.shape[:-1], self.k, device=start.device) if ticks is None else ticks
        ticks = onehot(ticks.clamp(max=self.k), self.k, first=1).expand(*start.shape[:-1], -1)
        return start + self.foresee(torch.cat([start, ticks], -1)).float()

    @torch.no_grad()
    def hindsight_goals(self, subgoal, h, is_first):
        """Subgoals (B,T,8*8), a share of them replaced by the code of what came 1 ... k ticks later."""
        now = torch.arange(h.shape[1], device=h.device).expand(is_first.shape)
        later = (now + 1 + (self.k * torch.rand_like(h[..., 0])).long()).clamp(max=h.shape[1] - 1)
        episode = is_first.cumsum(1)
        known = (later > now) & (episode.gather(1, later) == episode)
        swap = known & (torch.rand_like(h[..., 0]) < self.hindsight)
        there = h.gather(1, later[..., None].expand_as(h))
        done = self.autoencoder.code(there - self.origin(h, later - now))
        return torch.where(swap[..., None], done, subgoal)

    def update(self, batch):
        """One training step of everything in this level, on a replay batch of tensors (B,T,...). Returns
        metrics {name: scalar tensor}, still on the device."""
        observation = self.observation(batch)  # (B,T,*observation_shape)
        action = onehot(batch["action"], self.action_shape[1]).flatten(-2)  # (B,T,A)
        subgoal = onehot(batch["subgoal"], self.subgoal_shape[1]).flatten(-2)  # (B,T,8*8)

        # 1. The world model, on real sequences.
        self.world_model.update_statistics(observation)
        loss, states, metrics = self.world_model.loss(observation, action, batch["reward"],
                                                      batch["is_first"], batch["is_terminal"])
        loss.backward()
        metrics["opt/model_grad_norm"] = self.optimisers["model"].step()

        told = subgoal.flatten(0, 1)  # by the level above; what hindsight may replace below
        if "subgoal" in self.rewards and self.hindsight:
            subgoal = self.hindsight_goals(subgoal, states.h, batch["is_first"])

        # 2. Imagine from the states of the batch, each with its subgoal for the whole rollout: longer than k
        # ticks, but which goal comes after is known to no one (as published). Nothing comes after a terminal
        # state: what is imagined from one has weight zero.
        states = states.map(lambda field: field.flatten(0, 1))  # (B*T,...)
        subgoal, alive = subgoal.flatten(0, 1), 1 - batch["is_terminal"].flatten().float()
        if self.starts < len(alive):  # the rest is left out: (N,...)
            pick = torch.randperm(len(alive), device=alive.device)[:self.starts]
            states, alive = states.map(lambda field: field[pick]), alive[pick]
            subgoal, told = subgoal[pick], told[pick]
        states, actions = self.world_model.imagine(states, lambda state: self.policy(state, subgoal),
                                                   self.horizon)

        # 3. Rewards of the states 1 ... horizon. A flat agent has no use for the autoencoder.
        reward = {"extrinsic": states.reward[1:]}
        if len(self.rewards) > 1:
            reward["novelty"], learned = self.update_autoencoder(states.h)
            metrics |= learned
        if "subgoal" in self.rewards:
            reward["subgoal"] = self.subgoal_reward(states.h, subgoal, told)
        if "reached" in self.rewards:
            reward["reached"] = self.reached_reward(states, actions)
        reward = torch.stack([reward[name] for name in self.rewards], -1)  # (horizon, N, R)

        # 4. Actor and critics.
        feature = states.feature(subgoal.expand(len(states.h), -1, -1))  # (horizon+1, N, F)
        return metrics | self.update_behaviour(feature, actions, reward, self.gamma * states.cont[1:], alive)

    def update_autoencoder(self, h):
        """One training step of the autoencoder, and of `foresee`, on imagined h (horizon+1,N,H). Returns the
        novelty (horizon,N) of states 1 ... horizon, and metrics."""
        ticks, k = torch.arange(1, len(h), device=h.device)[:, None], min(self.k, self.horizon)
        # What a goal may name: the change in the last k ticks, or in all, where there were fewer.
        start = torch.cat([h[:1].expand(k, -1, -1), h[1:-k]])
        named = h[1:] - self.origin(start, ticks)
        loss, novelty = self.autoencoder.loss(named.detach())
        losses = {"autoencoder": loss}
        if self.relative:
            losses["foresee"] = named.square().sum(-1).mean()
        sum(losses.values()).backward()  # they share no parameter, so one pass serves both
        metrics = {f"loss/{name}": each.detach() for name, each in losses.items()}
        return novelty, metrics | {f"opt/{name}_grad_norm": self.optimisers[name].step() for name in losses}

    @torch.no_grad()
    def subgoal_reward(self, h, subgoal, told):
        """(horizon,N): how well subgoals (N,8*8) are followed in imagined h (horizon+1,N,H), as if all were
        set when the dream began. told: the level above's own, also where hindsight has replaced them."""
        ticks = torch.arange(1, len(h), device=h.device)[:, None]
        made = h[1:] - self.origin(h[:1].expand_as(h[1:]), ticks)
        reward = cosine_max(self.autoencoder.decode(subgoal), made)
        if self.relative:
            other = cosine_max(self.autoencoder.decode(another(told, 0)), made)
            reward = (reward - other) * (ticks <= self.k)
        return reward

    @torch.no_grad()
    def reached_reward(self, states, actions):
        """(horizon,N): how near the level below will come to actions (horizon,N,8*8), each a goal set at the
        state before. This level's decoder tells: it shows the last k states of that level, newest last."""
        below, = self.below
        h = symexp(self.world_model.decode(states.z, states.h)[..., -below.world_model.hidden:])
        goal, made = below.autoencoder.decode(actions), h[1:] - below.origin(h[:-1])
        return cosine_max(goal, made) - cosine_max(goal, another(made, 1))

    def update_behaviour(self, feature, actions, reward, discount, alive):
        """One training step of actor and critics on imagined rollouts: REINFORCE, and two-hot regression.

        feature (horizon+1,N,F) of states 0 ... horizon; actions (horizon,N,A) taken in 0 ... horizon-1;
        reward (horizon,N,R) and discount (horizon,N) of states 1 ... horizon; alive (N,): 0 for rollouts that
        start at an episode's end. Returns metrics.
        """
        twohot = self.critics.twohot
        logits = self.critics(feature)  # (horizon+1, N, R, bins): evaluated once, with gradients
        with torch.no_grad():
            value = twohot.mean(logits)  # (horizon+1, N, R)
            returns = lambda_return(reward, discount[..., None] * self.stays, value[1:], self.lam)
            scale = self.normaliser.update(returns)  # (R,): rewards of any size count by their weights
            advantage = ((returns - value[:-1]) / scale * self.weights).sum(-1)  # (horizon, N)
            # gamma^t, and how likely it is that the episode has not ended before state t.
            weight = torch.cumprod(torch.cat([alive[None], discount[:-1]]), 0)
            slow_value = twohot.mean(self.slow_critics(feature[:-1]))  # (horizon, N, R)

        p = self.actor(feature[:-1])  # (horizon, N, n, classes)
        # The joint probability of n independent choices: their log-probabilities are summed.
        log_p = log_prob(p, actions.unflatten(-1, self.action_shape))  # (horizon, N)
        policy_entropy = entropy(p)  # (horizon, N)
        actor_loss = -(weight * (log_p * advantage + self.entropy_scale * policy_entropy)).mean()
        # The slow copy holds the critic back, or it would chase its own bootstrapped predictions.
        critic_loss = twohot.loss(logits[:-1], returns) + twohot.loss(logits[:-1], slow_value)
        critic_loss = weight[..., None] * (self.weights > 0) * critic_loss  # (horizon, N, R)
        critic_loss = critic_loss.mean((0, 1))  # (R,)

        (actor_loss + critic_loss.sum()).backward()  # they share no parameter, so one pass serves both
        metrics = {f"opt/{name}_grad_norm": self.optimisers[name].step() for name in ("actor", "critic")}
        with torch.no_grad():
            for slow, fast in zip(self.slow_critics.parameters(), self.critics.parameters()):
                slow.lerp_(fast, self.slow)

        metrics |= {"loss/policy": actor_loss.detach(), "ent/action": policy_entropy.detach().mean(),
                    "adv_std": advantage.std()}
        for kind, values in {"rew/": reward.mean((0, 1)), "ret/": returns.mean((0, 1)), "ret_scale/": scale,
                             "val/": value.mean((0, 1)), "loss/value_": critic_loss.detach()}.items():
            metrics |= {kind + name: values[i] for i, name in enumerate(self.rewards)}
        return metrics


# ------------------------------------------------------------------------------------------------------------
# The stack of levels
# ------------------------------------------------------------------------------------------------------------

class Hieros(nn.Module):
    """L levels that play together. With L = 1 it is a flat agent: no subgoal, no novelty, the same code.

    observation_shape: what the environment gives, (64,64,3) bytes or (D,) floats. actions: of the game.
    code_shape: (categoricals, classes) of a subgoal. weights: of the rewards {extrinsic, subgoal, novelty}.
    model, behaviour: keyword arguments of WorldModel and of Level.
    """

    def __init__(self, observation_shape, actions, levels, k, code_shape, weights, model, behaviour):
        super().__init__()
        self.k, self.levels, self.specs = k, nn.ModuleList(), []
        image = len(observation_shape) == 3
        shape = (3, 64, 64) if image else tuple(observation_shape)
        stored = {"observation": (tuple(observation_shape), np.uint8 if image else np.float32)}
        for i in range(levels):
            # Who is given goals is paid for following them; who sets them, for where it has seldom been: to
            # explore is the upper levels' work, on their longer time scales (Hieros).
            names = ["extrinsic"] + ["subgoal"] * (i < levels - 1) + ["novelty"] * (i > 0)
            names += ["reached"] * (i > 0 and behaviour.get("hindsight", 0.0) > 0)
            rewards = {name: weights["subgoal" if name == "reached" else name] for name in names}
            level = Level(shape, (1, actions) if i == 0 else code_shape,
                          code_shape if i < levels - 1 else (0, code_shape[1]), code_shape,
                          rewards, model | {"scaled": i == 0 and not image}, k=k,
                          below=self.levels[-1] if i else None, **behaviour)
            self.levels.append(level)
            self.specs.append(stored | {  # what the level's replay holds of each tick: {name: (shape, dtype)}
                "action": (level.action_shape[:1], np.uint8), "subgoal": (level.subgoal_shape[:1], np.uint8),
                "reward": ((), np.float32), "is_first": ((), np.bool_), "is_last": ((), np.bool_),
                "is_terminal": ((), np.bool_)})
            # What the next level sees of this one: k states [z, symlog h]. The replay keeps z's classes.
            stoch, classes = level.world_model.z_shape
            shape = (k * (stoch * classes + level.world_model.hidden),)
            stored = {"z": ((k, stoch), np.uint8), "h": ((k, level.world_model.hidden), np.float32)}

    def initial_memory(self, n):
        """The acting state of n environments: what `act` takes and returns. No weights, no training in it."""
        memory = {"t": np.full(n, -1), "levels": []}
        for level in self.levels:
            world, device = level.world_model, level.weights.device
            x, z = world.initial(n, device)
            memory["levels"].append({
                "x": x, "z": z, "action": torch.zeros(n, world.action_size, device=device),
                # The last k states [z, symlog h], oldest first.
                "recent": torch.zeros(n, self.k, z[0].numel() + world.hidden, device=device),
                "subgoal": torch.zeros(n, level.subgoal_shape[0] * level.subgoal_shape[1], device=device),
                "reward": np.zeros(n, np.float32)})  # env rewards since the last tick
        return memory

    @torch.no_grad()
    def discretise(self):
        """For each level what S5Stack.discretise returns. `act` takes it, valid until the weights change."""
        return [level.world_model.sequence.discretise() for level in self.levels]

    @torch.inference_mode()
    def act(self, memory, observation, reward, is_first, is_last, is_terminal, discretised):
        """One env step of n environments, at any stage of their episodes each.

        memory: of the previous step, left as it is. observation (n, ...) as the environment gives it, reward
        (n,) that came with it, is_first, is_last, is_terminal (n,): numpy arrays. discretised: what
        `discretise` returned for the present weights. Every level ticks at an episode's last step, on the
        grid or not, or else the rewards since its last tick and the end itself would be lost to it.

        Returns the new memory and a list of ticks from level 0 upwards, one for each level in which some
        environment ticks: {"ticked": (n,) which ones, "state": State, and what `transitions` stores, all
        choices one-hot}. Level 0's "action" is the game's.
        """
        t = np.where(is_first, 0, memory["t"] + 1)
        levels, ticks = [], []
        for before in memory["levels"]:  # at an episode's start every level starts afresh, from zeros
            now = {name: _where(is_first, torch.zeros_like(value), value) for name, value in before.items()
                   if name != "reward"}
            levels.append(now | {"reward": np.where(is_first, 0, before["reward"] + np.float32(reward))})

        # Bottom-up: each ticking level updates its state.
        for i, (level, now) in enumerate(zip(self.levels, levels)):
            ticked = (t % self.k ** i == 0) | is_last
            if not ticked.any():
                break
            tick = {"ticked": ticked, "reward": now["reward"], "is_first": is_first, "is_last": is_last,
                    "is_terminal": is_terminal}
            if i == 0:
                tick["observation"] = observation
                seen = level.observation({"observation": torch.as_tensor(observation).to(now["z"].device)})
            else:
                tick["recent"] = levels[i - 1]["recent"]
                seen = tick["recent"].flatten(1)  # (n, k*(Z+H)), as the replay will show it
            tick["state"] = state = level.world_model.observe_step(now["x"], now["z"], now["action"], seen,
                                                                   discretised[i])
            newest = torch.cat([state.z.flatten(-2), symlog(state.h)], -1)[:, None]  # (n, 1, Z+H)
            recent = torch.cat([now["recent"][:, 1:], newest], 1)  # (n, k, Z+H): the oldest goes
            for name, value in (("x", state.x), ("z", state.z), ("recent", recent)):
                now[name] = _where(ticked, value, now[name])
            now["reward"] = np.where(ticked, 0, now["reward"])  # it is in this tick, and counts once
            ticks.append(tick)

        # Top-down: each ticking level chooses; the one below, which ticks whenever it does, holds the choice.
        for i, tick in reversed(list(enumerate(ticks))):
            tick["subgoal"] = levels[i]["subgoal"]
            tick["action"] = self.levels[i].policy(tick["state"], tick["subgoal"])
            levels[i]["action"] = _where(tick["ticked"], tick["action"], levels[i]["action"])
            if i > 0:
                levels[i - 1]["subgoal"] = levels[i]["action"]
        return {"t": t, "levels": levels}, ticks

    def transitions(self, ticks):
        """The ticks of a single environment as the steps that the replays store: [{name: array}], a level
        each. All come from the device in one copy: on a GPU each copy waits for it."""
        fields = []  # (level, name, tensor)
        for i, (level, tick) in enumerate(zip(self.levels, ticks)):
            for name, shape in (("action", level.action_shape), ("subgoal", level.subgoal_shape)):
                fields.append((i, name, tick[name].unflatten(-1, shape).argmax(-1)))
            if i > 0:
                below = self.levels[i - 1].world_model
                z, h = tick["recent"].split([np.prod(below.z_shape), below.hidden], -1)
                z = z.unflatten(-1, below.z_shape)
                # The number of z's class, from 1 on; 0 where there is no state yet: a z of zeros.
                fields += [(i, "z", (z.argmax(-1) + 1) * z.sum(-1)), (i, "h", h)]
        copied = torch.cat([tensor.flatten().float() for *_, tensor in fields]).cpu().numpy()
        ends = np.cumsum([tensor.numel() for *_, tensor in fields])
        # What the environment gave, and whether an episode began or ended, are arrays already.
        steps = [{name: tick[name][0] for name in self.specs[i] if isinstance(tick.get(name), np.ndarray)}
                 for i, tick in enumerate(ticks)]
        for (i, name, _), part in zip(fields, np.split(copied, ends)):
            shape, dtype = self.specs[i][name]
            steps[i][name] = part.reshape(shape).astype(dtype)
        return steps


def _where(rows, new, old):
    """`new` (n, ...) in these rows, (n,) booleans, `old` in the others; neither is changed."""
    if rows.all() or not rows.any():
        return new if rows.all() else old
    return torch.where(torch.as_tensor(rows, device=old.device).view(-1, *[1] * (old.ndim - 1)), new, old)


def small(levels=3, observation_shape=(4,), actions=3, **behaviour):
    """A small agent for demonstrations and tests."""
    model = dict(stoch=8, classes=8, hidden=64, state_size=32, s5_layers=2, memory=64, units=64, mlp_layers=1,
                 depth=24, first_stride=2, sharpness=1.0, kl_warmup=0, decoded=1.0)
    behaviour = dict(horizon=16, starts=1024, gamma=0.997, lam=0.95, entropy_scale=3e-4, slow=0.02,
                     model_lr=1e-4, encoder_lr=1e-4, actor_lr=3e-5, critic_lr=3e-5, autoencoder_lr=1e-4,
                     hindsight=0.0) | behaviour
    weights = {"extrinsic": 1.0, "subgoal": 0.3, "novelty": 0.1}
    return Hieros(observation_shape, actions, levels, 4, (8, 8), weights, model, behaviour)


if __name__ == "__main__":  # a demonstration: one episode of 18 steps of three levels
    torch.manual_seed(0)
    agent, last = small(), 18
    memory, discretised = agent.initial_memory(1), agent.discretise()
    print("reward 1 a step, the episode ends at t = 18. Each tick: reward since the last one, states seen (1)"
          "\nor not yet (0)\n   t   " + "".join(f"{f'level {i}':>18}" for i in range(3))
          + "   first number of each held subgoal")
    for t in range(last + 1):
        flags = [np.array([flag]) for flag in (t == 0, t == last, t == last)]
        observation, reward = np.zeros((1, 4), np.float32), np.float32([t > 0])
        memory, ticks = agent.act(memory, observation, reward, *flags, discretised)
        row = ""
        for i, step in enumerate(agent.transitions(ticks)):
            seen = "".join(str(int(z.any())) for z in step["z"]) if i else "o_t"
            row += f"r={step['reward']:.0f} sees {seen}".rjust(18)
        held = [int(level["subgoal"][0, :8].argmax()) for level in memory["levels"][:2]]
        print(f"{t:4d}   {row:<54}   {held}")
