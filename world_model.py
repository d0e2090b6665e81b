"""S5WM, the world model of one level: it compresses what a level sees, and imagines what comes next.

    posterior    z_t ~ q(z_t | o_t)                      from the observation *alone*
    sequence     (m_t, x_t) = S5(x_{t-1}, [z_{t-1}, a_{t-1}])
    state        h_t = symlog(Linear(x_t))
    prior        z^_t ~ p(z_t | m_t)
    heads        o^_t, r^_t, c^_t from (h_t, z_t)        decoder, reward, continue

Why the posterior does not see h_t. In Dreamer's RSSM it does: z_t needs h_t, and h_t needs z_{t-1}, so
training walks through time. Here all z_t come from the observations at once, and the S5 stack turns them into
all h_t at once: training is parallel over time.

Two verbs. To *observe* is to draw z_t from the posterior, in training and while acting. To *imagine* is to
draw z^_t from the prior, without an observation. `observe` and `imagine` do so for many steps, `observe_step`
and `imagine_step` for one.

Papers: Hieros, Section 3.2 (Mattes et al. 2024, arXiv 2310.05167) for the equations above; DreamerV3 (Hafner
et al. 2023, arXiv 2301.04104) for loss, KL balance and unimix ("World model learning"), and for symlog and
two-hot ("Robust predictions" in its last version). Read s5.py before, hierarchy.py after.

Symbols (the same in every file; those of s5.py beside these):
    o        (B,T,3,64,64) image in [0, 1], or (B,T,D) vector
    z        (B,T,32,32) stochastic state: 32 categoricals of 32 classes, one-hot
    x, m     (B,T,layers,P/2) complex state and (B,T,H) output of the S5 stack
    h        (B,T,H) deterministic state; heads, actor and critics see it
    a        (B,T,A) action, one-hot (several one-hots side by side at higher levels); a_{t-1} precedes o_t
    r, c     (B,T) reward that came with o_t, probability that the episode goes on after o_t
    q, p     (B,T,32,32) probabilities of z: of the posterior, of the prior
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from s5 import S5Stack, real_view


# ------------------------------------------------------------------------------------------------------------
# Distributions and numbers of any size
# ------------------------------------------------------------------------------------------------------------

def symlog(x):
    """sign(x) log(1 + |x|): linear near zero and logarithmic far out, so that one network fits any scale."""
    return torch.copysign(torch.log1p(torch.abs(x)), x)


def symexp(x):
    """The inverse of symlog."""
    return torch.copysign(torch.expm1(torch.abs(x)), x)


class TwoHot(nn.Module):
    """A number predicted as a distribution over 255 values, evenly spaced in symlog, up to 4.9e8 (DreamerV3).

    The code of a target puts weight on the two nearest values, such that its mean is the target. The gradient
    of the cross-entropy does not grow with the target; that of a squared error would.
    """

    def __init__(self, bins=255, low=-20.0, high=20.0):
        super().__init__()
        self.low, self.width = low, (high - low) / (bins - 1)
        self.register_buffer("values", symexp(torch.linspace(low, high, bins)), persistent=False)

    def first_logits(self, zero=0.0):
        """(bins,) logits to start with: the larger a number, the rarer; `zero` is the logit of 0. With equal
        logits the outermost value (4.9e8) would dominate the mean even at a probability of 0.001."""
        logits = -2.0 * symlog(self.values).abs()
        logits[len(logits) // 2] = zero
        return logits

    def mean(self, logits):
        """(..., bins) -> (...): the expected number, as in the last version of DreamerV3.

        Hieros takes symexp of the mean symlog instead. For a reward of 100 in one case of ten that is 0.6 and
        not 10: large, uncertain rewards would hardly count in imagination.
        """
        return torch.softmax(logits, -1) @ self.values

    def loss(self, logits, target):
        """Cross-entropy (...) of logits (..., bins) to the two-hot code of the target (...)."""
        # clamp() keeps the index legal even if the target is NaN; the loss then stays NaN and is reported.
        below = ((symlog(target) - self.low) / self.width).long().clamp(0, len(self.values) - 2)
        low, high = self.values[below], self.values[below + 1]
        weight = ((target - low) / (high - low)).clamp(0, 1)  # of `high`; the rest is that of `low`
        log_p = torch.log_softmax(logits, -1)
        log_low, log_high = (log_p.gather(-1, i[..., None]).squeeze(-1) for i in (below, below + 1))
        return -((1 - weight) * log_low + weight * log_high)


def unimix(logits):
    """Probabilities, 1% of them uniform (DreamerV3): no class is ever impossible, no KL infinite."""
    return 0.01 / logits.shape[-1] + 0.99 * torch.softmax(logits, -1)


def sample_onehot(p):
    """One-hot samples of categoricals p (..., classes), from one uniform number u each.

    The class is the number of cumulative probabilities below u. The usual Gumbel trick draws a random number
    per *class*, and on a CPU no operation costs more than that.
    """
    u = torch.rand_like(p[..., :1])  # (..., 1)
    # Without the last cumulative sum, which rounding may leave below 1: a larger u would name no class.
    index = torch.searchsorted(p[..., :-1].cumsum(-1), u)  # (..., 1)
    return torch.zeros_like(p).scatter_(-1, index, 1.0)


def straight_through(p):
    """A sample with the gradient of its probabilities: p - sg(p) is zero, and its gradient is that of p."""
    return sample_onehot(p.detach()) + (p - p.detach())


def entropy(p):
    """Entropy in nats of categoricals (..., n, classes), none of p zero, summed over the n: (...)."""
    return -torch.xlogy(p, p).sum((-2, -1))


def kl_balance(q, p, share):
    """0.5 max(1, KL(sg q || p)) + share * 0.1 max(1, KL(q || sg p)), and the KL in nats: (...) each.

    q, p: categoricals (..., n, classes), their KL summed over the n; sg stops the gradient. The first term
    trains the prior to predict z, the second keeps z predictable. Below one nat neither has a gradient.
    """
    def kl(q, p):
        return (q * (q.log() - p.log())).sum((-2, -1))

    dynamics, representation = kl(q.detach(), p), kl(q, p.detach())
    return 0.5 * dynamics.clamp(min=1) + share * 0.1 * representation.clamp(min=1), dynamics.detach()


# ------------------------------------------------------------------------------------------------------------
# Encoders, decoders, heads
# ------------------------------------------------------------------------------------------------------------

class MLP(nn.Sequential):
    """`layers` times Linear -> LayerNorm -> SiLU, then a plain Linear. With zero_init this last one starts at
    zero: at first it says the same of every input."""

    def __init__(self, inputs, outputs, units, layers, zero_init=False):
        hidden = []
        for i in range(layers):
            hidden += [nn.Linear(units if i else inputs, units, bias=False), nn.LayerNorm(units), nn.SiLU()]
        super().__init__(*hidden, nn.Linear(units if layers else inputs, outputs))
        if zero_init:
            nn.init.zeros_(self[-1].weight)
            nn.init.zeros_(self[-1].bias)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (n,C,height,width): in channels-last memory this moves no data."""

    def forward(self, image):
        return super().forward(image.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Patches(nn.Linear):
    """(n,C,height,width) -> (n,3,s*height,s*width): every place paints its own s x s pixels.

    It equals nn.PixelShuffle after a 1x1 convolution, and is faster: as in channels-last memory, colours are
    innermost, so whole runs of pixels move together.
    """

    def __init__(self, inputs, s):
        super().__init__(inputs, s * s * 3)
        self.s = s

    def forward(self, image):
        pixels = super().forward(image.permute(0, 2, 3, 1)).unflatten(-1, (self.s, self.s, 3))
        return pixels.transpose(2, 3).flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)


class ImageEncoder(nn.Sequential):
    """(n,3,64,64) -> (n,features): convolutions of stride 2 to 4x4, with depth * 1, 2, 4, 8 channels.

    first_stride 4 saves the most expensive layer: one of kernel 8 and stride 4 leads from 64 to 16 at once.
    """

    def __init__(self, depth, first_stride):
        strides = [2] * 4 if first_stride == 2 else [4, 2, 2]
        channels, layers = [3] + [depth * 2 ** i for i in range(len(strides))], []
        for inputs, outputs, s in zip(channels, channels[1:], strides):
            convolution = nn.Conv2d(inputs, outputs, 2 * s, s, s // 2, bias=False)
            layers += [convolution, ChannelNorm(outputs), nn.SiLU()]
        super().__init__(*layers, nn.Flatten())
        self.features = channels[-1] * 16
        self.to(memory_format=torch.channels_last)  # as images are, or each call would convert the weights


class ImageDecoder(nn.Sequential):
    """(n,inputs) -> (n,3,64,64), the encoder mirrored; the last layer starts at zero (see `normalise`).

    With first_stride 4 each of 16x16 places paints its own 4x4 patch by a matrix product. Overlapping kernels
    of 8x8 would cost more than all other layers together.
    """

    def __init__(self, inputs, depth, first_stride):
        strides = [2] * 4 if first_stride == 2 else [2, 2, 4]
        channels = [depth * 2 ** i for i in reversed(range(len(strides)))]
        layers = [nn.Linear(inputs, channels[0] * 16), nn.Unflatten(-1, (channels[0], 4, 4))]
        for inputs, outputs in zip(channels, channels[1:]):
            convolution = nn.ConvTranspose2d(inputs, outputs, 4, 2, 1, bias=False)
            layers += [convolution, ChannelNorm(outputs), nn.SiLU()]
        last = Patches(depth, 4) if first_stride == 4 else nn.ConvTranspose2d(depth, 3, 4, 2, 1)
        super().__init__(*layers, last)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)


# ------------------------------------------------------------------------------------------------------------
# The world model
# ------------------------------------------------------------------------------------------------------------

class State(NamedTuple):
    """One state of a world model, or (B,T) or (horizon+1,N) of them: the fields share these dimensions."""
    x: torch.Tensor        # (..., layers, P/2) complex  what the recurrence carries on
    z: torch.Tensor        # (..., 32, 32)               one-hot
    h: torch.Tensor        # (..., H)
    entropy: torch.Tensor  # (...)  of the distribution that z was drawn from, in nats
    reward: torch.Tensor   # (...)  r^
    cont: torch.Tensor     # (...)  c^

    def map(self, function):
        """The function applied to every field."""
        return State(*map(function, self))

    def feature(self, subgoal):
        """The input of actor and critics: [z, h, symlog(r^), symlog(c^), symlog(entropy), subgoal code]."""
        scalars = symlog(torch.stack([self.reward, self.cont, self.entropy], -1))
        return torch.cat([self.z.flatten(-2), self.h, scalars, subgoal], -1)


class WorldModel(nn.Module):
    """S5WM for observations of `observation_shape`, (3,64,64) or (D,), one-hot actions (..., action_size).

    stoch, classes: categoricals in z, classes of each. hidden: H, the size of h and the features of the S5
    layers. state_size, s5_layers, batch_length: P, the S5 layers, T. units, mlp_layers: of the MLPs. depth,
    first_stride: of the CNN, where the observation is an image. sharpness: a factor of the first posterior's
    logits. kl_warmup, decoded: see `loss`. scaled: see `normalise`. Raises ValueError for another
    observation_shape.
    """

    # Sum of the variances of a scaled vector, chosen such that the four numbers of CartPole have a deviation
    # of about 3: at 1 the KL outweighed their error. No comparison with other values is recorded.
    VARIANCE = 40.0

    def __init__(self, observation_shape, action_size, *, stoch, classes, hidden, state_size, s5_layers,
                 batch_length, units, mlp_layers, depth, first_stride, sharpness, kl_warmup, decoded, scaled):
        super().__init__()
        self.observation_shape, self.action_size = tuple(observation_shape), action_size
        self.z_shape, self.hidden = (stoch, classes), hidden
        self.kl_warmup, self.decoded, self.scaled = kl_warmup, decoded, scaled
        inputs = stoch * classes + hidden  # of the heads: (h, z)
        self.feature_size = inputs + 3  # of State.feature, without a subgoal
        if self.observation_shape == (3, 64, 64):
            cnn = ImageEncoder(depth, first_stride)
            self.encoder = nn.Sequential(cnn, nn.Linear(cnn.features, stoch * classes))
            self.decoder = ImageDecoder(inputs, depth, first_stride)
        elif len(self.observation_shape) == 1:
            self.encoder = MLP(*self.observation_shape, stoch * classes, units, mlp_layers)
            self.decoder = MLP(inputs, *self.observation_shape, units, mlp_layers, zero_init=True)
        else:
            raise ValueError(f"observations are (3, 64, 64) or (D,), got {self.observation_shape}")
        # At its usual scale the first posterior is almost uniform: z is noise, which the decoder learns to
        # ignore. With larger logits z is a random hash of the observation, informative from the start.
        self.encoder[-1].weight.data *= sharpness
        self.register_buffer("mean", torch.zeros(self.observation_shape))  # of the observations trained on
        self.register_buffer("deviation", torch.ones(self.observation_shape))
        self.unit = math.sqrt(self.VARIANCE / math.prod(self.observation_shape)) if scaled else 1.0
        self.register_buffer("updates", torch.zeros(()))
        self.inputs = nn.Linear(stoch * classes + action_size, hidden)
        self.sequence = S5Stack(hidden, state_size, s5_layers, batch_length)
        self.h_from_x = nn.Linear(2 * math.prod(self.sequence.state_shape), hidden)
        self.prior_head = MLP(hidden, stoch * classes, units, layers=1)
        self.twohot = TwoHot()
        # Reward and continue depend on the same events: one trunk serves both, at half the work. They start
        # at the outcome of most steps: no reward, and the episode goes on. With zero biases their first
        # gradients would be the largest, alike at every step, and could push z to a constant for good.
        self.outcome_head = MLP(inputs, len(self.twohot.values) + 1, units, mlp_layers, zero_init=True)
        with torch.no_grad():
            self.outcome_head[-1].bias[:-1] = self.twohot.first_logits(zero=8.0)
            self.outcome_head[-1].bias[-1] = 5.0

    def initial(self, batch, device):
        """The (x, z) before an episode, zeros, for `batch` sequences."""
        return (torch.zeros(batch, *self.sequence.state_shape, dtype=torch.cfloat, device=device),
                torch.zeros(batch, *self.z_shape, device=device))

    def update_statistics(self, observation):
        """Move the running mean and deviation of all observations towards those of a batch (B,T,...)."""
        self.updates += 1
        share = self.updates.reciprocal().clamp(min=1e-3)  # a plain mean at first, then exponential
        self.mean.lerp_(observation.mean(0).mean(0), share)  # over both at once takes three times as long
        if self.scaled:
            variance = (observation - self.mean).square().mean((0, 1))
            self.deviation.copy_(self.deviation.square().lerp(variance, share).sqrt().clamp(min=1e-6))

    def normalise(self, observation):
        """(..., *observation_shape) less the running mean: what the encoder reads and the decoder returns.

        The decoder starts at zero, so it paints the mean at once. Otherwise the decoder first learns the
        background, ignores z, and the encoder gets no gradient.

        Where `scaled`, each number is divided by its own standard deviation, then multiplied so that all
        variances sum to VARIANCE: in any unit, few numbers or many, their error weighs the same against the
        KL. A number that was constant until now counts 10 deviations at most.
        """
        if self.scaled:
            return ((observation - self.mean) / self.deviation).clamp(-10, 10) * self.unit
        return observation - self.mean

    def decode(self, z, h, normalised=False):
        """(...,32,32), (...,H) -> observations (..., *observation_shape)."""
        inputs = torch.cat([z.flatten(-2), h], -1)
        output = self.decoder(inputs.flatten(0, -2)).unflatten(0, inputs.shape[:-1])
        return output if normalised else output / self.unit * self.deviation + self.mean

    def posterior(self, observation):
        """Probabilities q(z | o): (n, *observation_shape) -> (n, 32, 32)."""
        return unimix(self.encoder(self.normalise(observation)).unflatten(-1, self.z_shape))

    def prior(self, m):
        """Probabilities p(z | m): (..., H) -> (..., 32, 32)."""
        return unimix(self.prior_head(m).unflatten(-1, self.z_shape))

    def deterministic(self, x):
        """h = symlog(Linear(x)): (..., layers, P/2) -> (..., H). Hieros reads h from the state x, which holds
        the memory, and not from the output m of the stack."""
        return symlog(self.h_from_x(real_view(x.flatten(-2))))

    def outcome(self, z, h):
        """(...,32,32), (...,H) -> two-hot logits of the reward (..., bins), logit of the continue (...)."""
        output = self.outcome_head(torch.cat([z.flatten(-2), h], -1))
        return output[..., :-1], output[..., -1]

    def _state(self, x, z, h, probs):
        reward_logits, cont_logit = self.outcome(z, h)
        return State(x, z, h, entropy(probs), self.twohot.mean(reward_logits), torch.sigmoid(cont_logit))

    # ---- training: all steps at once ----

    def observe(self, observation, action, is_first):
        """All states of (B,T) observations in parallel. Returns (z, h, x, q, p), each (B,T,...).

        action[:, t] was chosen *after* observation t, as the replay stores it. It is shifted here, once, so
        that training sees the same a_{t-1} as acting and imagining (the published code feeds a_t). At the
        first step of an episode, and of the sequence, z_{t-1}, a_{t-1} and x_{t-1} are zero.
        """
        q = self.posterior(observation.flatten(0, 1)).unflatten(0, is_first.shape)
        z = straight_through(q)  # (B,T,32,32)
        inputs = F.pad(torch.cat([z.flatten(-2), action], -1)[:, :-1], (0, 0, 1, 0))  # [z_{t-1}, a_{t-1}]
        m, x = self.sequence(self.inputs(inputs * ~is_first[..., None]), is_first)
        return z, self.deterministic(x), x, q, self.prior(m)

    def loss(self, observation, action, reward, is_first, is_terminal):
        """The loss of S5WM on a batch of sequences, and the posterior states from which to imagine.

            -log p(o) - log p(r) - log p(c) + 0.5 max(1, KL(sg q || p)) + 0.1 max(1, KL(q || sg p))

        Means over (B,T); the weights are those of DreamerV3's first version. -log p(o) is the squared error,
        summed over an observation. A truncated episode has not ended: only is_terminal teaches the continue
        head 0. Returns (loss, states (B,T) without gradients, metrics).
        """
        z, h, x, q, p = self.observe(observation, action, is_first)
        reward_logits, cont_logit = self.outcome(z, h)
        target, some_z, some_h = (field.flatten(0, 1) for field in (observation, z, h))
        if self.decoded < 1:
            # The decoder takes half of this loss's time on a CPU. It decodes a random share of the
            # observations, whose expected error is that of all.
            n = max(1, round(self.decoded * len(target)))
            pick = torch.randperm(len(target), device=target.device)[:n]
            target, some_z, some_h = target[pick], some_z[pick], some_h[pick]
        # At higher levels the observation contains *samples* of z. A sample is best predicted by its
        # probabilities, so most of this error is noise: no decoder can reduce it.
        error = F.mse_loss(self.decode(some_z, some_h, normalised=True), self.normalise(target),
                           reduction="sum") / len(target)
        losses = {"image" if observation.ndim == 5 else "vector": error,
                  "rew": self.twohot.loss(reward_logits, reward).mean(),
                  "con": F.binary_cross_entropy_with_logits(cont_logit, (~is_terminal).float())}
        # The representation term asks for a predictable z, and a constant z is the most predictable. So it
        # waits until the decoder reads z: off for kl_warmup updates, it then rises for as many.
        share = torch.clamp(self.updates / self.kl_warmup - 1, 0, 1) if self.kl_warmup else 1.0
        kl_loss, kl = kl_balance(q, p, share)
        metrics = {f"loss/{name}": value.detach() for name, value in losses.items()}  # DreamerV3's names
        with torch.no_grad():
            states = State(x, z, h, entropy(q), self.twohot.mean(reward_logits), torch.sigmoid(cont_logit))
            metrics |= {"loss/dyn": kl.clamp(min=1).mean(),  # its loss/rep is the same number
                        "kl": kl.mean(), "rep_ent": states.entropy.mean(), "dyn_ent": entropy(p).mean()}
        return sum(losses.values()) + kl_loss.mean(), states.map(torch.Tensor.detach), metrics

    # ---- acting and imagining: step by step. `discretised`: the result of S5Stack.discretise ----

    def sequence_step(self, x, z, action, discretised):
        """(x_{t-1}, z_{t-1}, a_{t-1}) of N states -> (m_t, x_t, h_t)."""
        m, x = self.sequence.step(self.inputs(torch.cat([z.flatten(-2), action], -1)), x, discretised)
        return m, x, self.deterministic(x)

    def observe_step(self, x, z, action, observation, discretised):
        """From (x_{t-1}, z_{t-1}, a_{t-1}), zeros at an episode's start, and o_t to the State at t."""
        _, x, h = self.sequence_step(x, z, action, discretised)
        q = self.posterior(observation)
        return self._state(x, sample_onehot(q), h, q)

    def imagine_step(self, state, action, discretised):
        """From a State and an action (N,A) to the next State, by the prior in place of the posterior."""
        m, x, h = self.sequence_step(state.x, state.z, action, discretised)
        p = self.prior(m)
        return self._state(x, sample_onehot(p), h, p)

    @torch.no_grad()
    def imagine(self, start, policy, horizon):
        """Imagine `horizon` steps from N states.

        policy: State -> action (N,A). Returns the States s_0 ... s_horizon, (horizon+1,N,...) without x, and
        the actions a_0 ... a_{horizon-1}, (horizon,N,A). The actor learns by REINFORCE, so no gradient flows
        through the dynamics, and no step is stored for a backward pass.
        """
        discretised = self.sequence.discretise()  # once a rollout, not once a step
        states, actions = [start], []
        for _ in range(horizon):
            actions.append(policy(states[-1]))
            states.append(self.imagine_step(states[-1], actions[-1], discretised))
        _, *fields = zip(*states)
        return State(None, *map(torch.stack, fields)), torch.stack(actions)

    @torch.no_grad()
    def open_loop(self, observation, action, is_first, context=5):
        """Observe `context` steps, then imagine the rest with the true actions: (B,T,...) each -> decoded
        observations (B,T,...), of which the first `context` are reconstructions."""
        z, h, x, _, _ = self.observe(observation[:, :context], action[:, :context], is_first[:, :context])
        start = State(x[:, -1], z[:, -1], h[:, -1], *torch.zeros(3, len(z), device=z.device))
        actions = iter(action[:, context - 1:].unbind(1))
        imagined, _ = self.imagine(start, lambda state: next(actions), observation.shape[1] - context)
        observed, imagined = self.decode(z, h), self.decode(imagined.z[1:], imagined.h[1:])
        return torch.cat([observed, imagined.transpose(0, 1)], 1)


if __name__ == "__main__":  # a demonstration: a dot runs round a ring; which way, the action decides
    torch.manual_seed(0)
    size, T, first = 8, 16, torch.arange(16).eq(0).expand(16, 16)
    model = WorldModel((size,), 2, stoch=4, classes=8, hidden=64, state_size=32, s5_layers=2, batch_length=T,
                       units=64, mlp_layers=2, depth=0, first_stride=2, sharpness=1, kl_warmup=0, decoded=1,
                       scaled=False)
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    for i in range(301):
        action = torch.randint(2, (16, T))
        position = torch.cat([torch.randint(size, (16, 1)), 2 * action[:, :-1] - 1], 1).cumsum(1) % size
        batch = F.one_hot(position, size).float(), F.one_hot(action, 2).float()
        loss, _, metrics = model.loss(*batch, torch.zeros(16, T), first, torch.zeros_like(first))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if i % 100 == 0:
            print(f"update {i:3d}   reconstruction {metrics['loss/vector']:.3f}   KL {metrics['kl']:.2f}")
    imagined = model.open_loop(*batch, first)[0].argmax(-1)
    print("\naction   ", *("<>"[i] for i in action[0]), "\ntruth    ", *position[0].tolist(),
          "\nimagined ", *imagined.tolist(), "  (the first 5 are observed)")
