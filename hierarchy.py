"""The hierarchy: how one level learns in its imagination, and how the levels act together.

Level 0 sees the game and plays it. Level i+1 sees the states of level i and acts k = 4 times more rarely. Its
action is a *subgoal* for level i: a point in level i's own state space where it should go.

    t        0  1  2  3  4  5  6  7  8 ... 16
    level 0  *  *  *  *  *  *  *  *  *      *      sees o_t, acts in the game
    level 1  *           *           *      *      sees its last 4 level-0 states, up to and including t
    level 2  *                              *      sees its last 4 level-1 states

A level *ticks* where it has a star. Within one env step information first flows up: each ticking level
updates its state. Then intentions flow down: each ticking level chooses, and the level below holds the choice
until the next tick. Level 0 acts.

Symbols (the same in every file; those of world_model.py beside these):
    L, k       number of levels; a level ticks every k ticks of the level below
    N          rollouts imagined side by side
    g, g_h     (N,8*8) subgoal code, 8 one-hots of 8 classes; (N,H) the same decoded into the level's h-space
    R          number of rewards of a level: extrinsic, subgoal (not at the top), novelty (not at level 0)

Papers: Hieros (Mattes et al. 2024, arXiv 2310.05167), Section 3.1, for the levels; Director (Hafner et al.
2022, arXiv 2206.04114) for the subgoal autoencoder and the subgoal reward; DreamerV3 (Hafner et al. 2023,
arXiv 2301.04104) for actor and critic. Read world_model.py before, replay.py after.
"""

import copy

import numpy as np
import torch
from torch import nn

from world_model import (MLP, TwoHot, WorldModel, entropy, sample_onehot, straight_through, symlog, unimix)


# ------------------------------------------------------------------------------------------------------------
# The parts of a level
# ------------------------------------------------------------------------------------------------------------

def cosine_max(goal, h):
    """max(0, goal . h) / max(|goal|, |h|)^2 over the last dimension: the max-cosine of Director.

    It is 1 only where h *is* the goal. A plain cosine would be 1 in the right direction at any length.
    """
    longer = torch.maximum(goal.square().sum(-1), h.square().sum(-1))
    return (goal * h).sum(-1).clamp(min=0) / longer.clamp(min=1e-8)


def lambda_return(reward, discount, value, lam):
    """G_t = r_{t+1} + d_{t+1} ((1 - lam) v_{t+1} + lam G_{t+1}), G_horizon = v_horizon (DreamerV3, "Critic
    learning"). reward, discount, value: (horizon, ...) of states 1 ... horizon; returns G of 0 ... horizon-1.
    """
    G, returns = value[-1], []
    for r, d, v in zip(reward.flip(0), discount.flip(0), value.flip(0)):
        G = r + d * ((1 - lam) * v + lam * G)
        returns.append(G)
    return torch.stack(returns).flip(0)


class ReturnNormaliser(nn.Module):
    """Scale of each reward's returns: a running mean of their 5-95 percentile range (DreamerV3), at least
    `floors` (R,). Without a floor, the noise of returns that are all alike would be blown up to full size."""

    def __init__(self, floors):
        super().__init__()
        self.register_buffer("floors", torch.tensor(floors), persistent=False)
        self.register_buffer("percentiles", torch.tensor([0.05, 0.95]), persistent=False)
        self.register_buffer("range", torch.zeros(len(floors)))
        self.register_buffer("updates", torch.zeros(()))

    def update(self, returns):
        """Let the scale follow the returns (..., R) of one update. Returns the scale (R,) to divide by."""
        low, high = torch.quantile(returns.flatten(0, -2), self.percentiles, dim=0)
        self.updates += 1
        # A plain mean at first: the initial zero is forgotten at once and not over 100 updates.
        self.range.lerp_(high - low, self.updates.reciprocal().clamp(min=0.01))
        return torch.maximum(self.range, self.floors)


class SubgoalAutoencoder(nn.Module):
    """Compresses h to a code of 8 x 8 one-hots and back. Two jobs (Director, Section 2.2).

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
        return unimix(self.encoder(h).unflatten(-1, self.code_shape))

    def decode(self, code):
        """(..., 8*8) -> g_h (..., H)."""
        return self.decoder(code)

    def loss(self, h):
        """|dec(g) - h|^2 / var(h) + 0.5 KL(q(g | h) || uniform) of h (...,H), and the novelty (...), the mean
        squared error. var(h) makes up for games in which h varies little: there the KL alone would count, and
        all codes would come to mean the same."""
        q = self.encode(h)  # (..., 8, 8)
        error = (self.decode(straight_through(q).flatten(-2)) - h).square()
        # KL to the uniform distribution = its entropy minus q's. It keeps all codes in use: the level above
        # may choose any of them, and each should stand for some h.
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
        return unimix(self.net(feature).unflatten(-1, self.action_shape))


class Critics(nn.Module):
    """One two-hot critic a reward (Hieros), so that each reward's returns can be normalised and weighted."""

    def __init__(self, inputs, rewards, units, mlp_layers):
        super().__init__()
        self.twohot = TwoHot()
        self.nets = nn.ModuleList(MLP(inputs, len(self.twohot.values), units, mlp_layers, zero_init=True)
                                  for _ in range(rewards))
        for net in self.nets:
            net[-1].bias.data.copy_(self.twohot.first_logits())

    def forward(self, feature):
        """(..., inputs) -> two-hot logits (..., R, bins)."""
        return torch.stack([net(feature) for net in self.nets], -2)


class Optimiser:
    """Adam with clipped gradient norm, of groups (parameters, their learning rate). No weight decay."""

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


# ------------------------------------------------------------------------------------------------------------
# One level
# ------------------------------------------------------------------------------------------------------------

class Level(nn.Module):
    """World model, subgoal autoencoder, actor, critics of one level, and how they learn from a replay batch.

    observation_shape: as for WorldModel. action_shape, subgoal_shape: (categoricals, classes) of the action
    and of the subgoal that it is given; (0, 8) at the top, where no one gives any. code_shape: of every
    subgoal. rewards: {name: weight}. model: keyword arguments of WorldModel. horizon: imagined steps. starts:
    imagined rollouts an update (at most B*T). gamma, lam: discount a tick (so a higher level, whose ticks are
    longer, looks further ahead) and lambda of the returns. entropy_scale: weight of the policy's entropy.
    slow: share by which the slow critics follow, an update. *_lr: learning rates.
    """

    # DreamerV3 has 1. Early returns in sparse games differ by about 0.02. Divided by 1, they lose to the
    # entropy bonus: in Freeway the policy stayed uniform for 58,000 steps. With 0.1 it crosses by then 22
    # times an episode. Novelty, an error of h, is smaller still.
    FLOORS = {"extrinsic": 0.1, "subgoal": 0.1, "novelty": 0.01}

    def __init__(self, observation_shape, action_shape, subgoal_shape, code_shape, rewards, model, *, horizon,
                 starts, gamma, lam, entropy_scale, slow, model_lr, encoder_lr, actor_lr, critic_lr,
                 autoencoder_lr):
        super().__init__()
        self.action_shape, self.subgoal_shape, self.rewards = action_shape, subgoal_shape, rewards
        self.horizon, self.starts, self.gamma, self.lam = horizon, starts, gamma, lam
        self.entropy_scale, self.slow = entropy_scale, slow
        self.world_model = WorldModel(observation_shape, action_shape[0] * action_shape[1], **model)
        units, mlp_layers = model["units"], model["mlp_layers"]
        inputs = self.world_model.feature_size + subgoal_shape[0] * subgoal_shape[1]
        self.actor = Actor(inputs, action_shape, units, mlp_layers)
        self.critics = Critics(inputs, len(rewards), units, mlp_layers)
        self.slow_critics = copy.deepcopy(self.critics).requires_grad_(False)
        self.autoencoder = SubgoalAutoencoder(self.world_model.hidden, code_shape, units, mlp_layers)
        self.normaliser = ReturnNormaliser([self.FLOORS[name] for name in rewards])
        self.register_buffer("weights", torch.tensor(list(rewards.values())), persistent=False)  # (R,)
        encoder, others = self.world_model.encoder.parameters(), [
            p for name, p in self.world_model.named_parameters() if not name.startswith("encoder.")]
        self.optimisers = {
            "model": Optimiser(1e-8, 1000, (encoder, encoder_lr), (others, model_lr)),
            "actor": Optimiser(1e-5, 100, (self.actor.parameters(), actor_lr)),
            "critic": Optimiser(1e-5, 100, (self.critics.parameters(), critic_lr)),
            "autoencoder": Optimiser(1e-6, 100, (self.autoencoder.parameters(), autoencoder_lr))}

    def policy(self, state, subgoal):
        """Draw an action (N, n*classes) for N States and subgoal codes (N, 8*8)."""
        return sample_onehot(self.actor(state.feature(subgoal))).flatten(-2)

    def observation(self, batch):
        """The observation of a replay batch as the world model takes it: floats, one-hot, stacked."""
        if "observation" in batch:  # level 0: an image as bytes, channels last, or a vector
            o = batch["observation"]
            return o.movedim(-1, -3) / 255 if o.dtype == torch.uint8 else o
        # Class 0 stands for a state that was not there yet; it becomes zeros.
        z = onehot(batch["z"], self.world_model.z_shape[1], first=1).flatten(-2)  # (B,T,k,Z), Z = 32*32
        return torch.cat([z, batch["h"]], -1).flatten(-2)  # (B,T,k*(Z+H))

    def update(self, batch):
        """One training step of everything in this level, on a replay batch of tensors (B,T,...). Returns
        metrics {name: scalar tensor}, still on the device."""
        observation = self.observation(batch)  # (B,T,*observation_shape)
        action = onehot(batch["action"], self.action_shape[1]).flatten(-2)  # (B,T,A)

        # 1. The world model, on real sequences.
        self.world_model.update_statistics(observation)
        loss, states, metrics = self.world_model.loss(observation, action, batch["reward"],
                                                      batch["is_first"], batch["is_terminal"])
        loss.backward()
        metrics["opt/model_grad_norm"] = self.optimisers["model"].step()

        # 2. Imagine from the states of the batch. The subgoal is held fixed for the whole rollout, longer
        # than k ticks: the next one cannot be known (as published). Nothing comes after a terminal state, so
        # what is imagined from one has weight zero.
        subgoal = onehot(batch["subgoal"], self.subgoal_shape[1]).flatten(-2).flatten(0, 1)  # (B*T,8*8)
        states = states.map(lambda field: field.flatten(0, 1))  # (B*T,...)
        alive = 1 - batch["is_terminal"].flatten().float()
        if self.starts < len(alive):  # the rest is left out: (N,...)
            pick = torch.randperm(len(alive), device=alive.device)[:self.starts]
            states, subgoal, alive = states.map(lambda field: field[pick]), subgoal[pick], alive[pick]
        states, actions = self.world_model.imagine(states, lambda state: self.policy(state, subgoal),
                                                   self.horizon)

        # 3. What the states 1 ... horizon pay, (horizon,N) each. Novelty is the error on them of the
        # autoencoder, for which a flat agent has no use.
        pays = {"extrinsic": states.reward[1:]}
        if len(self.rewards) > 1:
            loss, pays["novelty"] = self.autoencoder.loss(states.h[1:])
            loss.backward()
            metrics |= {"loss/autoencoder": loss.detach(),
                        "opt/autoencoder_grad_norm": self.optimisers["autoencoder"].step()}
        if "subgoal" in self.rewards:
            with torch.no_grad():
                pays["subgoal"] = cosine_max(self.autoencoder.decode(subgoal), states.h[1:])
        reward = torch.stack([pays[name] for name in self.rewards], -1)  # (horizon,N,R)

        # 4. Actor and critics.
        feature = states.feature(subgoal.expand(len(states.h), -1, -1))  # (horizon+1,N,inputs)
        discount = self.gamma * states.cont[1:]  # (horizon,N)
        return metrics | self.update_behaviour(feature, actions, reward, discount, alive)

    def update_behaviour(self, feature, actions, reward, discount, alive):
        """One training step of actor and critics on imagined rollouts (DreamerV3, "Actor learning").

            advantage  sum of weight (return - v) / scale over the rewards
            actor     -w (log pi(a) sg(advantage) + entropy_scale * entropy)
            critics    w (-log p(return) - log p(v_slow)), one a reward, two-hot

        feature (horizon+1,N,inputs) of states 0 ... horizon; actions (horizon,N,A) taken in 0 ... horizon-1;
        reward (horizon,N,R) and discount (horizon,N) of states 1 ... horizon; alive (N,): 0 for rollouts that
        start in a terminal state. Returns metrics.
        """
        twohot = self.critics.twohot
        logits = self.critics(feature)  # (horizon+1,N,R,bins): evaluated once, with gradients
        with torch.no_grad():
            value = twohot.mean(logits)  # (horizon+1,N,R)
            returns = lambda_return(reward, discount[..., None], value[1:], self.lam)  # (horizon,N,R)
            scale = self.normaliser.update(returns)  # (R,): rewards of any size count by their weights
            advantage = ((returns - value[:-1]) / scale * self.weights).sum(-1)  # (horizon,N)
            # w: gamma^t, and how likely it is that the episode goes on after state t.
            w = torch.cumprod(torch.cat([alive[None], discount[:-1]]), 0)  # (horizon,N)
            slow_value = twohot.mean(self.slow_critics(feature[:-1]))  # (horizon,N,R)

        p = self.actor(feature[:-1])  # (horizon,N,n,classes)
        # The joint probability of n independent choices: their log-probabilities are summed.
        log_p = (p.log() * actions.unflatten(-1, self.action_shape)).sum((-2, -1))  # (horizon,N)
        policy_entropy = entropy(p)  # (horizon,N)
        actor_loss = -(w * (log_p * advantage + self.entropy_scale * policy_entropy)).mean()
        # The slow copy holds the critic back, or it would chase its own bootstrapped predictions.
        critic_loss = twohot.loss(logits[:-1], returns) + twohot.loss(logits[:-1], slow_value)
        # The critic of a reward of weight 0 is never used: it must not take a share of the clipped gradient.
        critic_loss = (w[..., None] * (self.weights > 0) * critic_loss).mean((0, 1))  # (R,)
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
    """L levels that play together (Hieros, Section 3.1). With L = 1 it is a flat agent, by the same code.

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
            # Levels with a level above get the subgoal reward; levels above 0 get novelty. So exploring is
            # left to the upper levels, on their longer time scales (Hieros).
            names = ["extrinsic"] + ["subgoal"] * (i < levels - 1) + ["novelty"] * (i > 0)
            level = Level(
                observation_shape=shape, action_shape=(1, actions) if i == 0 else code_shape,
                subgoal_shape=code_shape if i < levels - 1 else (0, code_shape[1]), code_shape=code_shape,
                rewards={name: weights[name] for name in names},
                model=model | {"scaled": i == 0 and not image}, **behaviour)
            self.levels.append(level)
            self.specs.append(stored | {  # what the level's replay holds of each tick: {name: (shape, dtype)}
                "action": (level.action_shape[:1], np.uint8), "subgoal": (level.subgoal_shape[:1], np.uint8),
                "reward": ((), np.float32), "is_first": ((), np.bool_), "is_last": ((), np.bool_),
                "is_terminal": ((), np.bool_)})
            # The next level sees k states [z, symlog(h)] of this one. h is already a symlog; this is a second
            # one, by which DreamerV3 treats every vector that is observed. The replay stores it as "h", and z
            # by the numbers of its classes.
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
                # The last k states [z, symlog(h)], oldest first; see __init__.
                "recent": torch.zeros(n, self.k, z.shape[1:].numel() + world.hidden, device=device),
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

        Returns the new memory and a list of ticks, one for each level in which some environment ticks, from
        level 0 upwards: {"ticked": (n,), "state": State, what `transitions` stores, choices one-hot}.
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
                seen = tick["recent"].flatten(1)  # (n,k*(Z+H)), as the replay will show it
            tick["state"] = state = level.world_model.observe_step(now["x"], now["z"], now["action"], seen,
                                                                   discretised[i])
            newest = torch.cat([state.z.flatten(-2), symlog(state.h)], -1)[:, None]  # (n,1,Z+H); see __init__
            recent = torch.cat([now["recent"][:, 1:], newest], 1)  # (n,k,Z+H): the oldest goes
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
        """A single environment's ticks as the steps that the replays store: [{name: array}], a level each."""
        names, steps = ("action", "subgoal", "recent"), []
        tensors = [tick[name].flatten() for tick in ticks for name in names if name in tick]
        # On a GPU every copy waits for all work before it. So all tensors come side by side, in one.
        numbers = torch.cat(tensors).cpu().numpy()
        parts = iter(np.split(numbers, np.cumsum([len(tensor) for tensor in tensors])))
        for tick, level, spec in zip(ticks, self.levels, self.specs):
            step = {name: tick[name][0] for name in spec if name not in names and name in tick}
            step["action"] = next(parts).reshape(level.action_shape).argmax(-1)
            step["subgoal"] = next(parts).reshape(level.subgoal_shape).argmax(-1)
            if "recent" in tick:
                z, step["h"] = np.split(next(parts).reshape(self.k, -1), [-spec["h"][0][1]], 1)
                z = z.reshape(*spec["z"][0], -1)  # (k,stoch,classes)
                step["z"] = (z.argmax(-1) + 1) * z.any(-1)  # classes from 1 on; 0: no state yet
            steps.append({name: step[name].astype(dtype) for name, (_, dtype) in spec.items()})
        return steps


def _where(rows, new, old):
    """`new` (n, ...) in these rows, (n,) booleans, `old` in the others; neither is changed."""
    if rows.all() or not rows.any():
        return new if rows.all() else old
    return torch.where(torch.as_tensor(rows, device=old.device).view(-1, *[1] * (old.ndim - 1)), new, old)


def env_step(given):
    """What an environment's reset or step gave, as arrays of one environment: the arguments of Hieros.act."""
    is_first = len(given) == 2  # observation, info
    observation, reward, terminated, truncated = (given[0], 0.0, False, False) if is_first else given[:4]
    # A time limit is no death: only what is terminal has no future worth. (The published code takes both for
    # death, so an agent that survives learns that it will die.)
    return {"observation": observation[None], "reward": np.array([reward], float),
            "is_first": np.array([is_first]), "is_last": np.array([terminated or truncated], bool),
            "is_terminal": np.array([terminated], bool)}


def small(levels=3, observation_shape=(4,), actions=3, **behaviour):
    """A small agent for demonstrations and tests."""
    model = dict(stoch=8, classes=8, hidden=64, state_size=32, s5_layers=2, batch_length=64, units=64,
                 mlp_layers=1, depth=24, first_stride=2, sharpness=1.0, kl_warmup=0, decoded=1.0)
    weights = {"extrinsic": 1.0, "subgoal": 0.3, "novelty": 0.1}
    usual = dict(horizon=16, starts=1024, gamma=0.997, lam=0.95, entropy_scale=3e-4, slow=0.02, model_lr=1e-4,
                 encoder_lr=1e-4, actor_lr=3e-5, critic_lr=3e-5, autoencoder_lr=1e-4)
    return Hieros(observation_shape, actions, levels, 4, (8, 8), weights, model, usual | behaviour)


if __name__ == "__main__":  # a demonstration: one episode of 18 steps of three levels
    torch.manual_seed(0)
    agent, last = small(), 18
    memory, discretised = agent.initial_memory(1), agent.discretise()
    print("Each step has the reward 1. Of a level that ticks: its reward, and which of k states it sees (1).")
    print("   t   " + "".join(f"{f'level {i}':>18}" for i in range(3)) + "   first number of held subgoals")
    for t in range(last + 1):
        o = np.zeros(4, np.float32)
        now = env_step((o, 1.0, t == last, False, {}) if t else (o, {}))  # as step and reset give it
        memory, ticks = agent.act(memory, **now, discretised=discretised)
        row = ""
        for i, step in enumerate(agent.transitions(ticks)):
            seen = "".join(str(int(z.any())) for z in step["z"]) if i else "o_t"
            row += f"r={step['reward']:.0f} sees {seen}".rjust(18)
        held = [int(level["subgoal"][0, :8].argmax()) for level in memory["levels"][:2]]
        print(f"{t:4d}   {row:<54}   {held}")
