"""The claims of this project, each a test: `pytest test_hieros.py`. A group a module; docstrings say what.

`-m "not slow"` takes about a minute. `-m gpu` runs what needs a CUDA device and is skipped without one.
"""

import ast
import copy
import dataclasses
import importlib.util
import itertools
import json
import os
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
import types
import warnings
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gymnasium import spaces

import evaluate
import train
from hierarchy import (Level, Optimiser, ReturnNormaliser, SubgoalAutoencoder, cosine_max, lambda_return,
                       onehot, small)
from replay import Replay, etbs_cdf, replacing
from s5 import S5Block, S5Layer, S5Stack, complex_view, hippo_n, scan, scan_sequential
from world_model import (Patches, State, TwoHot, WorldModel, entropy, kl_balance, sample_onehot,
                         straight_through, symexp, symlog, unimix)

HERE = Path(__file__).parent
warnings.filterwarnings("ignore", category=pytest.PytestUnknownMarkWarning)  # no file declares slow and gpu
slow = pytest.mark.slow
torch.set_num_threads(1)  # these networks are small: a second thread waits more than it works


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def fixed_draws(monkeypatch):
    """Every uniform draw is the same number, so that a sample is a function of its probabilities alone."""
    monkeypatch.setattr(torch, "rand_like", lambda p: torch.full_like(p, 0.43))


def awake(module):
    """The module without the zeros with which some of its layers start: they would hide mistakes."""
    for p in module.parameters():
        if not p.any():
            p.data.normal_(0, 0.05)
    return module


def parameters_of(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


# ---- s5.py -------------------------------------------------------------------------------------------------

def some_resets(B, T):
    """Resets at the first and at the last step, and at random, also in a row."""
    reset = torch.rand(B, T) < 0.3
    reset[0, 0] = reset[-1, -1] = True
    return reset


def assert_same_function(one, other, inputs, parameters=(), **tolerance):
    """Both functions have the same outputs and the same gradients by inputs and parameters."""
    results = []
    for function in (one, other):
        torch.manual_seed(1)  # the same random gradients of the outputs
        leaves = [each.clone().requires_grad_() for each in inputs]
        outputs = function(*leaves)
        loss = sum((each * torch.randn_like(each)).real.sum() for each in outputs)
        results.append([*outputs, *torch.autograd.grad(loss, [*leaves, *parameters])])
    for pair in zip(*results):
        assert torch.allclose(*pair, **tolerance)


@pytest.mark.parametrize("T", [1, 2, 3, 5, 8, 64, 100])
def test_parallel_scan_is_the_sequential_one(T):
    """The scan equals the five-line loop, values and gradients, for any T, also not a power of two."""
    factor, inputs = torch.randn(2, 3, T, 4, dtype=torch.cfloat)
    assert_same_function(lambda *ab: [scan(*ab)], lambda *ab: [scan_sequential(*ab)], (0.6 * factor, inputs),
                         atol=1e-5)


@pytest.mark.parametrize("T", [1, 2, 7, 64])
def test_stack_in_parallel_is_the_stack_step_by_step(T):
    """Training and acting run the same function: values, states, gradients agree; with resets anywhere."""
    stack, reset = S5Stack(12, 16, 2, 64), some_resets(3, T)

    def step_by_step(u):
        steps, x = [], torch.zeros(3, *stack.state_shape, dtype=torch.cfloat)
        for t in range(T):
            m, x = stack.step(u[:, t], x * ~reset[:, t, None, None], stack.discretise())
            steps.append((m, x))
        return [torch.stack(field, 1) for field in zip(*steps)]

    assert_same_function(lambda u: stack(u, reset), step_by_step, [torch.randn(3, T, 12)],
                         list(stack.parameters()), atol=2e-4, rtol=1e-3)


def test_nothing_leaks_over_a_reset():
    """After a reset neither values nor gradients depend on what came before."""
    stack, u, reset = S5Stack(4, 16, 2, 64), torch.randn(2, 9, 4, requires_grad=True), first_flags(2, 9, 5)
    m, x = stack(u, reset)
    (m[:, 5:].sum() + x[:, 5:].real.sum()).backward()
    assert (u.grad[:, :5] == 0).all() and (u.grad[:, 5:] != 0).any()
    assert torch.equal(stack(torch.cat([torch.randn(2, 5, 4), u[:, 5:]], 1), reset)[0][:, 5:], m[:, 5:])


def test_no_optimiser_step_makes_the_recurrence_explode():
    """|Lambda_bar| <= 1 by construction, whatever an optimiser makes of the parameters."""
    layer = S5Layer(4, 800, 64)
    for parameter in layer.parameters():
        parameter.data.normal_(0, 5)
    assert (layer.discretise()[0].abs() < 1 + 1e-6).all()  # but for rounding


def test_hippo_eigenvalues_rebuild_the_matrix():
    """Half the spectrum is enough: 2 Re(V Lambda V^H) is the normal part of HiPPO-LegS, entry by entry."""
    (Lambda, V), n = hippo_n(8), np.arange(8)
    root = np.sqrt((2 * n[:, None] + 1) * (2 * n + 1))
    legs = np.where(n[:, None] > n, -root, 0) - np.diag(n + 1)  # HiPPO-LegS, which root / 2 makes normal
    assert np.allclose(2 * (V * Lambda @ V.mH).real.numpy(), legs + root / 2)


def test_discretisation_holds_the_input_for_a_step():
    """One step is the exact solution of x' = Lambda x + B_tilde u over Delta, with u held constant."""
    layer = S5Layer(3, 8, 64)
    Lambda_bar, B_bar = layer.discretise()
    system = torch.zeros(4, 4, 4, dtype=torch.cfloat)  # of each state: (x, u)' = (Lambda x + B_tilde u, 0)
    system[:, 0, 0] = torch.complex(-layer.log_decay.exp(), layer.frequency)
    system[:, 0, 1:] = complex_view(layer.B_tilde).T
    exact = torch.matrix_exp(system * layer.log_Delta.exp()[:, None, None])[:, 0]
    assert torch.allclose(torch.cat([Lambda_bar[None], complex_view(B_bar)]).T, exact, atol=1e-5)


def test_half_of_the_eigenvectors_give_back_the_whole_state(monkeypatch):
    """2 Re(C_tilde x) is C times the real state of which x holds one eigenvector coordinate of each pair; the
    output is that and D u."""
    monkeypatch.setattr(torch, "randn", lambda *shape, **kind: (
        torch.eye(*shape, **kind) if len(shape) == 2 else torch.arange(1.0, 1 + shape[0])))
    layer = S5Layer(16, 16, 64, blocks=2)  # C is the identity, divided by sqrt(P); D is 1 ... 16
    V, state, u = torch.block_diag(*[hippo_n(8)[1]] * 2), torch.rand(16, dtype=torch.float64), torch.rand(16)
    x = (V.mH @ state.to(V.dtype)).to(torch.cfloat)
    assert torch.allclose(layer.output(x, u), state.float() / 4 + torch.arange(1, 17) * u, atol=1e-5)


def test_block_is_norm_s5_gelu_gate_residual():
    """A block is u + y sigmoid(W y) with y = GELU(S5(LayerNorm(u)))."""
    block, u, reset = S5Block(6, 16, 64), torch.randn(2, 5, 6), some_resets(2, 5)
    y = F.gelu(block.s5(F.layer_norm(u, (6,)), reset)[0])
    assert torch.allclose(block(u, reset)[0], u + y * torch.sigmoid(block.gate(y)), atol=1e-6)


@pytest.mark.parametrize("T", [16, 64])
def test_states_are_as_large_within_a_training_sequence_as_ever_after(T):
    """White input of unit variance drives every state to a variance near one. T steps from zero reach
    86% of it, so acting over whole episodes meets no larger states than training has shown."""
    layer = S5Layer(64, 128, T)
    missing = layer.discretise()[0].abs() ** (2 * T)  # share of its variance that a state lacks by then
    assert np.exp(-4) < missing.max() < np.exp(-2) + 1e-5  # the slowest state needs all of the sequence
    _, x = layer(torch.randn(8, 2000, 64), torch.zeros(8, 2000, dtype=torch.bool))
    variance = x[:, 500:].abs().square().mean((0, 1)).detach()
    assert 0.7 < variance.median() < 1.4 and variance.max() < 2


# ---- world_model.py ----------------------------------------------------------------------------------------

TINY = dict(stoch=4, classes=8, hidden=32, state_size=16, s5_layers=2, batch_length=64, units=32,
            mlp_layers=1, depth=4, first_stride=4, sharpness=1.0, kl_warmup=0, decoded=1.0, scaled=False)
BEHAVIOUR = dict(horizon=3, starts=8, gamma=0.9, lam=0.8, entropy_scale=0.05, slow=0.02, model_lr=0.0,
                 encoder_lr=0.0, actor_lr=0.05, critic_lr=0.05, autoencoder_lr=0.0)


def first_flags(B, T, *steps):
    flags = torch.zeros(B, T, dtype=torch.bool)
    flags[:, list(steps)] = True
    return flags


def tiny(**changes):
    """A world model of six numbers and three actions."""
    return WorldModel((6,), 3, **TINY | changes)


def sequences(B, T):
    """Arguments of WorldModel.loss: random, with an episode that ends at step 2 and one that begins at 3."""
    return (torch.rand(B, T, 6), F.one_hot(torch.randint(3, (B, T)), 3).float(), torch.randn(B, T),
            first_flags(B, T, 0, 3), first_flags(B, T, 2))


def test_training_acting_and_imagining_share_one_alignment():
    """`observe` (parallel) and the steps (recurrent) reach the same h from a_{t-1}, also over a reset."""
    model, (observation, action, _, is_first, _) = tiny(), sequences(2, 12)
    model.update_statistics(observation)
    discretised = model.sequence.discretise()
    z, h, x, q, p = model.observe(observation, action, is_first)
    last = *model.initial(2, "cpu"), torch.zeros(2, 3)  # (x, z, a)
    for t in range(12):
        last = [field * ~is_first[:, t].view(2, *[1] * (field.ndim - 1)) for field in last]
        state = model.observe_step(*last, observation[:, t], discretised)
        m, x_t, h_t = model.sequence_step(*last, discretised)
        pairs = (state.h, h), (state.entropy, entropy(q)), (h_t, h), (x_t, x), (model.prior(m), p)
        assert all(torch.allclose(one, sequence[:, t], atol=1e-4) for one, sequence in pairs)
        last = x_t, z[:, t], action[:, t]


def test_imagination_starts_where_observation_ends():
    """The first imagined state is the start state, the second follows from its z and the chosen action."""
    model, action = awake(tiny()), F.one_hot(torch.arange(10) % 3, 3).float()
    start = model.loss(*sequences(2, 5))[1].map(lambda field: field.flatten(0, 1))
    states, actions = model.imagine(start, lambda state: action, 4)
    assert torch.equal(states.h[0], start.h) and torch.equal(states.z[0], start.z)
    m, _, h = model.sequence_step(start.x, start.z, action, model.sequence.discretise())
    assert torch.allclose(states.h[1], h, atol=1e-6)
    assert torch.allclose(states.entropy[1], entropy(model.prior(m)), atol=1e-5)
    logits, cont_logit = model.outcome(states.z, states.h)  # the promises of each state are its own
    assert torch.allclose(states.reward, model.twohot.mean(logits), atol=1e-5)
    assert torch.allclose(states.cont, torch.sigmoid(cont_logit), atol=1e-5)
    assert states.h.shape == (5, 10, 32) and torch.equal(actions, action.expand(4, 10, 3))
    assert not states.h.requires_grad


def test_open_loop_sees_only_its_context(fixed_draws):
    """What the model imagines depends on the first frames and on the true actions, each at its step, never on
    the frames to come; the first frames it reconstructs."""
    model, (observation, action, _, first, _) = awake(tiny(sharpness=50.0)), sequences(2, 12)
    model.update_statistics(observation)
    dream = model.open_loop(observation, action, first, context=5)
    other = torch.cat([observation[:, :5], torch.rand(2, 7, 6)], 1)
    assert torch.equal(dream, model.open_loop(other, action, first, context=5))
    z, h, x, *_ = model.observe(observation[:, :5], action[:, :5], first[:, :5])
    assert torch.allclose(dream[:, :5], model.decode(z, h), atol=1e-5)
    state = State(x[:, 4], z[:, 4], h[:, 4], *torch.zeros(3, 2))
    for t in range(5, 12):
        state = model.imagine_step(state, action[:, t - 1], model.sequence.discretise())
        assert torch.allclose(dream[:, t], model.decode(state.z, state.h), atol=1e-5)


@pytest.mark.parametrize("scaled", [False, True])
def test_loss_by_hand(scaled, fixed_draws):
    """The squared error summed over the observation, in units of its deviation where `scaled`; two-hot
    cross-entropy of the reward, Bernoulli of going on, 0.5 and 0.1 of the KL with its free nat; means over
    all steps. A start state is the posterior's."""
    model, batch = awake(tiny(sharpness=50.0, scaled=scaled)), sequences(2, 5)
    observation, action, reward, first, terminal = batch
    observation *= torch.tensor([1, 10, 1, 1, 1, 0.1])
    model.update_statistics(observation)
    loss, states, metrics = model.loss(*batch)
    z, h, x, q, p = model.observe(observation, action, first)
    unit = observation.std((0, 1), correction=0) / (40 / 6) ** 0.5 if scaled else 1.0
    logits, cont_logit = model.outcome(z, h)
    cont = torch.sigmoid(cont_logit)
    kl = (q * (q / p).log()).sum((-2, -1))
    by_hand = {"loss/vector": ((model.decode(z, h) - observation) / unit).square().sum(-1),
               "loss/rew": model.twohot.loss(logits, reward), "loss/dyn": kl.clamp(min=1),
               "loss/con": -torch.where(terminal, 1 - cont, cont).log(), "kl": kl}
    for name, value in by_hand.items():
        assert torch.allclose(metrics[name], value.mean(), atol=1e-5), name
    parts = [by_hand[name].mean() for name in ("loss/vector", "loss/rew", "loss/con")]
    assert torch.allclose(loss, sum(parts) + 0.6 * by_hand["loss/dyn"].mean(), atol=1e-4)
    for field, value in zip(states, (x, z, h, entropy(q), model.twohot.mean(logits), cont)):
        assert torch.allclose(field, value, atol=1e-5) and not field.requires_grad


def test_some_decoded_observations_stand_for_all(monkeypatch, fixed_draws):
    """With decoded=0.25 a random quarter of a batch is decoded, each observation from its own state."""
    model, batch, order = awake(tiny(decoded=0.25)), sequences(4, 16), torch.randperm(64)
    monkeypatch.setattr(torch, "randperm", lambda n, device: order[:n])
    z, h, *_ = model.observe(*batch[:2], batch[3])
    error = (model.decode(z, h) - batch[0]).square().sum(-1).flatten()
    assert torch.allclose(model.loss(*batch)[2]["loss/vector"], error[order[:16]].mean())


def test_kl_balance_and_its_stop_gradients():
    """The prior gets 0.5 of the KL's gradient, the posterior a share of 0.1, below one nat neither any."""
    for scale, share, pulls in ((3.0, 1.0, True), (3.0, 0.3, True), (0.01, 1.0, False)):
        q, p = ((scale * torch.randn(1, 6, 8)).requires_grad_() for _ in range(2))
        exact = torch.distributions.kl_divergence(torch.distributions.Categorical(unimix(q)),
                                                  torch.distributions.Categorical(unimix(p)))
        exact_q, exact_p = torch.autograd.grad(exact.sum(), (q, p))
        loss, divergence = kl_balance(unimix(q), unimix(p), share)
        grad_q, grad_p = torch.autograd.grad(loss.sum(), (q, p))
        assert torch.allclose(divergence, exact.sum(-1), rtol=1e-4, atol=1e-5)
        assert torch.allclose(loss, (0.5 + share * 0.1) * divergence.clamp(min=1))
        assert (divergence > 1).all() == pulls
        assert torch.allclose(grad_q, share * 0.1 * pulls * exact_q, atol=1e-6)
        assert torch.allclose(grad_p, 0.5 * pulls * exact_p, atol=1e-6)


def test_the_kl_waits_until_z_is_read(fixed_draws):
    """For kl_warmup updates the representation's KL has no share in the loss, then a growing one."""
    model, batch, shares = tiny(sharpness=100.0), sequences(2, 8), []
    for update in range(1, 10):
        model.updates.fill_(update)  # as `update_statistics` counts
        losses = {}
        for model.kl_warmup in (0, 4):
            losses[model.kl_warmup], _, metrics = model.loss(*batch)
        shares.append(1 - (losses[0] - losses[4]).item() / (0.1 * metrics["loss/dyn"].item()))
    assert np.allclose(shares, [0, 0, 0, 0, 0.25, 0.5, 0.75, 1, 1], atol=1e-3)


def twohot_codes(numbers):
    """The codes of numbers: the gradient of a cross-entropy is the prediction minus the code."""
    logits = torch.zeros(len(numbers), 255, dtype=torch.double, requires_grad=True)
    gradient, = torch.autograd.grad(TwoHot().double().loss(logits, numbers.double()).sum(), logits)
    return 1 / 255 - gradient


def test_symlog_and_twohot_round_trip():
    """symexp undoes symlog; the code of any number, small or huge, has that number for its mean and is zero
    but at two neighbours; no huge value is a part of what untrained logits promise."""
    numbers, twohot = torch.tensor([-1e6, -21.0, -1.0, -0.01, 0.0, 0.3, 1.0, 17.0, 5e4]), TwoHot()
    assert torch.allclose(symexp(symlog(numbers)), numbers, rtol=1e-4)
    codes = twohot_codes(numbers)
    assert torch.allclose(codes.float() @ twohot.values, numbers, rtol=1e-4, atol=1e-4)
    assert ((codes.abs() > 1e-9).sum(-1) <= 2).all()
    assert (torch.softmax(twohot.first_logits(), -1) * twohot.values).abs().max() < 0.1


def test_rare_large_rewards_count_in_full():
    """100 in one case of ten is 10, the expected reward, not what is usual."""
    rare, usual = twohot_codes(torch.tensor([100.0, 0.0]))
    assert abs(TwoHot().mean((0.1 * rare + 0.9 * usual).clamp(min=1e-30).log().float()).item() - 10) < 1e-4


def test_samples_follow_the_probabilities():
    """One uniform number a categorical suffices: frequencies are the probabilities, unimix included."""
    p = unimix(torch.tensor([[2.0, -1.0, 0.5, -30.0]]))
    assert torch.allclose(p.sum(-1), torch.ones(1)) and torch.allclose(p.min(), torch.tensor(0.01 / 4))
    samples = sample_onehot(p.expand(200_000, 4))
    assert (samples.sum(-1) == 1).all() and torch.allclose(samples.mean(0), p[0], atol=0.005)


def test_straight_through_has_the_gradient_of_the_probabilities():
    """A drawn z is exactly one-hot, and learns as if it were its probabilities."""
    logits, weight = torch.randn(5, 3, 4, requires_grad=True), torch.randn(5, 3, 4)
    z, p = straight_through(unimix(logits)), unimix(logits)
    assert torch.allclose(z.max(-1).values, torch.ones(5, 3)) and torch.allclose(z.sum(-1), torch.ones(5, 3))
    sampled, exact = (torch.autograd.grad((each * weight).sum(), logits)[0] for each in (z, p))
    assert torch.allclose(sampled, exact, atol=1e-6)


def test_h_is_the_symlog_of_a_linear_map_of_the_state():
    """h is read from the state x, in symlog: what it stands for doubles with x."""
    model, x = tiny(), 5 * torch.randn(7, 2, 8, dtype=torch.cfloat)
    zero, once, twice = (symexp(model.deterministic(factor * x)) for factor in (0, 1, 2))
    assert torch.allclose(twice - zero, 2 * (once - zero), atol=1e-3) and (once - zero).abs().max() > 1


def test_actor_and_critics_see_all_that_is_known_of_a_state():
    """[z, h, symlog(reward), symlog(continue), symlog(entropy), subgoal], in this order."""
    state = State(None, torch.rand(5, 4, 8), torch.randn(5, 32), *10 * torch.rand(3, 5))
    subgoal = torch.rand(5, 64)
    scalars = symlog(torch.stack([state.reward, state.cont, state.entropy], -1))
    assert torch.equal(state.feature(subgoal), torch.cat([state.z.flatten(1), state.h, scalars, subgoal], -1))


def test_an_untrained_model_expects_an_ordinary_step():
    """Before its first update a world model promises no reward and no end, whatever it is shown."""
    model = tiny()
    reward_logits, cont_logit = model.outcome(torch.rand(5, 4, 8), torch.randn(5, 32))
    assert model.twohot.mean(reward_logits).abs().max() < 1e-5 and torch.sigmoid(cont_logit).min() > 0.99
    assert model.twohot.loss(reward_logits, torch.zeros(5)).max() < 0.1


def test_untrained_critics_promise_nothing_and_policies_prefer_nothing():
    """Before their first update critics foresee a return of zero, of which no huge value is a part, the slow
    ones are their copies, and every action is as likely as any other."""
    level = small(3).levels[1]
    feature = torch.randn(5, level.critics.nets[0][0].in_features)
    promises = torch.softmax(level.critics(feature), -1) * level.critics.twohot.values  # (5,3,255)
    assert promises.sum(-1).abs().max() < 1e-4 and promises.abs().max() < 0.1
    for fast, slow in zip(level.critics.parameters(), level.slow_critics.parameters()):
        assert torch.equal(fast, slow)
    assert torch.allclose(level.actor(feature), torch.full((5, 8, 8), 1 / 8))


def test_networks_have_the_layers_of_the_paper():
    """MLPs are Linear, LayerNorm, SiLU, and end linear; images shrink by half from layer to layer, to 4x4, as
    channels double; their norm is over the channels of a place."""
    level = Level((3, 64, 64), (1, 3), (8, 8), (8, 8), {"extrinsic": 1.0},
                  TINY | dict(mlp_layers=2, first_stride=2, depth=24), **BEHAVIOUR)
    layers = [*2 * ["Linear", "LayerNorm", "SiLU"], "Linear"]
    for mlp in (level.world_model.outcome_head, level.actor.net, *level.critics.nets,
                level.autoencoder.encoder, level.autoencoder.decoder):
        assert [type(layer).__name__ for layer in mlp] == layers
    cnn = level.world_model.encoder[0]
    assert [type(layer).__name__ for layer in cnn] == 4 * ["Conv2d", "ChannelNorm", "SiLU"] + ["Flatten"]
    assert [cnn[i].out_channels for i in (0, 3, 6, 9)] == [24, 48, 96, 192]
    image = torch.randn(2, 24, 5, 5)
    assert torch.allclose(cnn[1](image), F.layer_norm(image.movedim(1, -1), (24,)).movedim(-1, 1), atol=1e-5)


def test_every_place_paints_its_own_patch():
    """With first_stride 4 the last layer does what PixelShuffle after a 1x1 convolution does."""
    patches, image = Patches(5, 4), torch.randn(2, 5, 3, 3)
    outermost = lambda weights: weights.unflatten(0, (16, 3)).transpose(0, 1).flatten(0, 1)  # the colours
    convolved = F.conv2d(image, outermost(patches.weight)[:, :, None, None], outermost(patches.bias))
    assert torch.allclose(patches(image), F.pixel_shuffle(convolved, 4), atol=1e-5)


@pytest.mark.parametrize("shape", [(6,), (3, 64, 64)])
def test_an_untrained_model_paints_the_mean_of_what_it_has_seen(shape):
    """Encoder and decoder deal with what differs from the running mean, and start from exactly that mean: of
    all at first, after many updates of about the last thousand."""
    model, batches = WorldModel(shape, 3, **TINY), torch.rand(5, 2, 4, *shape)
    for batch in batches:
        model.update_statistics(batch)
    mean, q = batches.mean((0, 1, 2)), model.posterior(batches[0, 0])
    painted = model.decode(torch.rand(1, 4, 8), torch.randn(1, 32))
    assert torch.allclose(painted, mean[None], atol=1e-5)
    model.mean.zero_()
    assert torch.allclose(model.posterior(batches[0, 0] - mean), q, atol=1e-5)
    model.updates.fill_(5000)
    model.update_statistics(torch.ones(2, 4, *shape))
    assert torch.allclose(model.mean, torch.full(shape, 1e-3))


def test_numbers_of_any_unit_count_alike():
    """All numbers of an environment's vector get one deviation, together a variance of 40, whatever their
    units; one that has never varied counts ten deviations when it does; `decode` gives the units back."""
    model = WorldModel((4,), 3, **TINY | {"scaled": True})
    spread = torch.tensor([0.5, 1.75 ** 0.5]).repeat(150).view(300, 1, 1, 1)  # not alike; their variance is 1
    batches = torch.randn(300, 2, 8, 4) * spread * torch.tensor([1e-3, 1.0, 1e4, 0.0])
    batches += torch.tensor([5.0, 0, -1e5, 2])
    for batch in batches:
        model.update_statistics(batch)
    scaled = model.normalise(batches[-100:])
    assert torch.allclose(scaled[..., :3].std((0, 1, 2)), torch.full((3,), 10 ** 0.5), rtol=0.05)
    assert scaled[..., :3].mean((0, 1, 2)).abs().max() < 0.3 and (scaled[..., 3] == 0).all()
    assert model.normalise(batches[0, 0, 0] + torch.tensor([0, 0, 0, 1.0]))[3] == 10 * 10 ** 0.5
    model.decoder.forward = lambda inputs: scaled.flatten(0, 2)
    decoded = model.decode(torch.rand(100, 2, 8, 4, 8), torch.randn(100, 2, 8, 32))
    assert torch.allclose(decoded[..., :3], batches[-100:, ..., :3], rtol=1e-3, atol=1e-4)


# ---- hierarchy.py ------------------------------------------------------------------------------------------

def test_cosine_max_wants_direction_and_length():
    """1 only at the goal itself; less for half or twice its length; 0 when pointing away."""
    goal = torch.tensor([3.0, 4.0])
    h = torch.stack([goal, 0.5 * goal, 2 * goal, -goal, torch.tensor([-4.0, 3.0]), torch.zeros(2)])
    assert torch.allclose(cosine_max(goal, h), torch.tensor([1.0, 0.5, 0.5, 0.0, 0.0, 0.0]))


def test_lambda_return_by_brute_force():
    """The recursion equals the weighted mean of all n-step returns, written out."""
    horizon, lam = 6, 0.9
    reward, value, discount = torch.randn(horizon), torch.randn(horizon), torch.rand(horizon)
    returns = lambda_return(reward, discount, value, lam)
    for t in range(horizon):
        mean, total, d = 0.0, 0.0, 1.0
        for j in range(t, horizon):  # the rewards up to j, then the value
            total, d = total + d * reward[j], d * discount[j]
            mean += lam ** (j - t) * (1 - lam if j < horizon - 1 else 1) * (total + d * value[j])
        assert torch.allclose(returns[t], mean, atol=1e-5)


def test_normaliser_follows_the_percentiles_down_to_its_floor():
    """Returns are divided by their mean 5-95 percentile range over updates, never by less than the floor."""
    normaliser = ReturnNormaliser([1.0, 0.1])
    returns = torch.stack([torch.linspace(0, 200, 1001), torch.linspace(0, 1e-3, 1001)], -1)[None]
    assert normaliser.update(returns).tolist() == pytest.approx([180.0, 0.1], rel=1e-3)
    assert normaliser.update(returns / 2).tolist() == pytest.approx([135.0, 0.1], rel=1e-3)  # a mean at first
    for update in range(300):
        scale = normaliser.update(returns if update < 200 else returns / 2)
    assert scale.tolist() == pytest.approx([90 + 90 * 0.99 ** 100, 0.1], rel=0.01)  # forgotten over 100


def test_autoencoder_loss_by_hand(fixed_draws):
    """Squared error in units of the variance of these h, and 0.5 of the KL of the code to the uniform one,
    with gradients through the drawn code as if it were its probabilities. Novelty is the mean error."""
    autoencoder, h = SubgoalAutoencoder(16, (8, 8), 32, 1), 0.2 + 0.3 * torch.randn(3, 50, 16)
    q = autoencoder.encode(h)
    error = (autoencoder.decode((sample_onehot(q) + q - q.detach()).flatten(-2)) - h).square()
    variance = (h - h.mean((0, 1))).square().mean()
    by_hand = (error.sum(-1) / variance + 0.5 * (q * (8 * q).log()).sum((-2, -1))).mean()
    loss, novelty = autoencoder.loss(h)
    assert torch.allclose(loss, by_hand, rtol=1e-4) and torch.allclose(novelty, error.mean(-1), rtol=1e-4)
    parameters = list(autoencoder.parameters())
    for pair in zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(by_hand, parameters)):
        assert torch.allclose(*pair, rtol=1e-3, atol=1e-4)


def test_optimiser_takes_adams_step_and_nothing_else():
    """The first step is lr g / (|g| + eps), g the clipped gradient, in each group at its own rate; without a
    gradient no weight decays; gradients are used once."""
    a, b, still = (torch.nn.Parameter(torch.full((2,), 5.0)) for _ in range(3))
    a.grad, b.grad, still.grad = torch.tensor([3.0, 0.0]), torch.tensor([0.0, -4.0]), torch.zeros(2)
    optimiser = Optimiser(1.0, 2.5, ([a, still], 0.1), ([b], 0.01))
    assert optimiser.step() == 5.0  # the norm over both groups: twice what is allowed
    assert torch.allclose(a, torch.tensor([5 - 0.1 * 1.5 / 2.5, 5.0]))
    assert torch.allclose(b, torch.tensor([5.0, 5 + 0.01 * 2.0 / 3.0]))
    assert (still == 5).all() and a.grad is None


RATES = {"encoder_lr": "world_model.encoder.", "model_lr": "world_model.", "actor_lr": "actor.",
         "critic_lr": "critics.", "autoencoder_lr": "autoencoder."}


@pytest.mark.parametrize("rate", RATES)
def test_every_learning_rate_moves_its_own_network(rate):
    """With all other rates zero an update moves exactly the network that the rate is named after."""
    agent = small(3, **dict.fromkeys(RATES, 0.0) | {rate: 1e-2})
    level = awake(agent.levels[1])
    before = parameters_of(level)
    level.update(batch_of(agent, 1))
    for name, p in level.named_parameters():
        if not name.startswith("slow_critics"):
            owner = max((prefix for prefix in RATES.values() if name.startswith(prefix)), key=len)
            assert torch.equal(p, before[name]) != (owner == RATES[rate]), name


def test_optimisers_have_the_settings_of_the_paper():
    """eps and clipped norm: 1e-8 and 1000 of the model, 1e-5 and 100 of actor and critics, 1e-6 and 100 of
    the autoencoder."""
    found = {name: (o.adam.defaults["eps"], o.clip) for name, o in small(1).levels[0].optimisers.items()}
    assert found == dict(model=(1e-8, 1000), actor=(1e-5, 100), critic=(1e-5, 100), autoencoder=(1e-6, 100))


def test_every_level_has_the_rewards_of_its_place():
    """Subgoal reward where there is a level above, novelty where there is one below; each its own weight, and
    only a level that has one above is told a subgoal."""
    extrinsic, subgoal, novelty = {"extrinsic": 1.0}, {"subgoal": 0.3}, {"novelty": 0.1}
    expected = [(extrinsic, 0, (1, 3)), (extrinsic | subgoal, 8, (1, 3)),
                (extrinsic | subgoal | novelty, 8, (8, 8)), (extrinsic | novelty, 0, (8, 8))]
    for level, (rewards, categoricals, actions) in zip([*small(1).levels, *small(3).levels], expected):
        assert level.rewards == rewards and level.weights.tolist() == pytest.approx(list(rewards.values()))
        assert level.subgoal_shape == (categoricals, 8) and level.action_shape == actions


def plan(life):
    """[(episode, t, length), ...] of every step of a life, a list of lengths of episodes, which are negative
    where a time limit ends them."""
    return [(episode, t, length) for episode, length in enumerate(life) for t in range(abs(length) + 1)]


def drive(agent, *plans):
    """Environments side by side go through their plans: at step t the reward is t, the observation unlike
    any other's. Yields what Hieros.act returns for each step: (memory, ticks)."""
    memory, discretised = agent.initial_memory(len(plans)), agent.discretise()
    for now in zip(*plans):
        _, t, length = np.array(now).T
        seen = [np.random.default_rng([n, e, t]).random(4, np.float32) for n, (e, t, _) in enumerate(now)]
        flags = t == 0, t == abs(length), t == length
        memory, ticks = agent.act(memory, np.stack(seen), np.float32(t), *flags, discretised)
        yield memory, ticks


@pytest.fixture(scope="module", ids=str, params=[
    [37, 1, 16, 3], [-64, 65, -15, 9], [1, 1, -2, 4, 1, -5, 20, 2], [-3, 100, -1, 8, 17, -33, 4, 9]])
def lived(request):
    """(agent, plan, for each level its [(episode, t, step, tick)]), all but the last step of a life."""
    torch.manual_seed(0)
    agent, stored, steps = small(), [[], [], []], plan(request.param)[:-1]
    for (episode, t, _), (_, ticks) in zip(steps, drive(agent, steps)):
        for level, step, tick in zip(stored, agent.transitions(ticks), ticks):
            level.append((episode, t, step, tick))
    return agent, steps, stored


def test_levels_tick_on_the_grid_and_at_the_end(lived):
    """Level i ticks at t = 0, k^i, 2 k^i, ... of every episode and at its end, and starts afresh after it; a
    time limit ends the sequence, is_last, but does not teach the continue head that the world ends."""
    _, steps, stored = lived
    for i, ticks in enumerate(stored):
        found = [(e, t, step["is_first"], step["is_last"], step["is_terminal"]) for e, t, step, _ in ticks]
        assert found == [(e, t, t == 0, t == abs(length), t == length) for e, t, length in steps
                         if t % 4 ** i == 0 or t == abs(length)]


def test_no_reward_is_lost_at_any_level(lived):
    """At every tick of every level the rewards in its replay sum to the episode's true return so far."""
    for ticks in lived[-1]:
        for episode, t, *_ in ticks:
            rewards = [step["reward"] for e, u, step, _ in ticks if e == episode and u <= t]
            assert sum(rewards) == t * (t + 1) / 2


def test_a_level_sees_the_last_states_below_it_up_to_now(lived):
    """The k stacked states have ages 3, 2, 1, 0, with zeros in front before there are k of them."""
    for below, above in itertools.pairwise(lived[-1]):
        for episode, t, step, _ in above:
            states = [tick["state"] for e, u, _, tick in below if e == episode and u <= t][-4:]
            missing = 4 - len(states)
            assert not step["h"][:missing].any() and not step["z"][:missing].any()
            for h, z, state in zip(step["h"][missing:], step["z"][missing:], states):
                assert np.allclose(h, symlog(state.h[0]), atol=1e-6)
                assert (z == state.z[0].argmax(-1).numpy() + 1).all()


def test_subgoals_are_held_until_the_level_above_ticks_again(lived):
    """The subgoal stored at each step is the newest action of the level above, of this tick or before."""
    for below, above in itertools.pairwise(lived[-1]):
        for episode, t, step, _ in below:
            held = [s["action"] for e, u, s, _ in above if e == episode and u <= t][-1]
            assert (step["subgoal"] == held).all()


def test_the_replayed_observation_is_what_was_seen(lived):
    """A stored step has the fields, shapes and types of the level's replay. What it holds as class numbers
    becomes, bit for bit, what the world model saw and what the level chose when it acted."""
    agent, _, stored = lived
    for i, (level, spec, ticks) in enumerate(zip(agent.levels, agent.specs, stored)):
        for _, _, step, tick in ticks:
            assert {name: (value.shape, value.dtype) for name, value in step.items()} == spec
            batch = {name: torch.as_tensor(value)[None, None] for name, value in step.items()}
            seen = torch.as_tensor(tick["observation"]) if i == 0 else tick["recent"].flatten(1)
            assert torch.equal(level.observation(batch)[0], seen)
            for name, classes in (("action", level.action_shape[1]), ("subgoal", level.subgoal_shape[1])):
                assert torch.equal(onehot(batch[name], classes).flatten(), tick[name][0])


def test_acting_leaves_the_memory_it_was_given_alone():
    """`act` is a function of its arguments: evaluation between two steps cannot disturb training."""
    agent = small()
    memory, after, flags = agent.initial_memory(1), [], np.zeros((3, 1), bool)
    for _ in range(2):
        torch.manual_seed(5)
        new, _ = agent.act(memory, np.ones((1, 4), np.float32), np.zeros(1), *flags, agent.discretise())
        after.append(new["levels"][0]["x"])
    assert memory["t"] == -1 and not any(level["x"].any() for level in memory["levels"])
    assert torch.equal(*after) and after[0].any()


def test_an_episode_that_was_broken_off_leaves_nothing(fixed_draws):
    """A start that follows no end is a start: states, clocks, rewards, subgoals are those of a new agent."""
    agent, start = lively(small()), plan([9])[:1]
    outcomes = [list(drive(agent, steps + start))[-1] for steps in ([], plan([9])[:6])]
    one, two = ([new["t"], *(tick["reward"] for tick in ticks),
                 *(value for level in new["levels"] for value in level.values())] for new, ticks in outcomes)
    assert len(one) == len(two) == 1 + 3 + 3 * 6 and all(map(np.array_equal, one, two))


def test_acting_is_what_the_model_observes_over_episodes(fixed_draws):
    """At every level, in every environment, the states in which the agent acts over several episodes are
    those that the world model computes for the same sequence in training, with resets; and each action is
    the policy's for that state and the subgoal that the level above holds up now. Each has its own clock."""
    agent, rng, lives, held = lively(small()), np.random.default_rng(0), {}, {}
    plans = [plan([first, *rng.integers(1, 20, 40)])[:60] for first in (3, 9, 16)]
    for now, (_, ticks) in zip(zip(*plans), drive(agent, *plans)):
        _, t, length = np.array(now).T
        for i, tick in reversed(list(enumerate(ticks))):
            before = np.maximum((t - 1) // 4 ** i * 4 ** i, 0)  # the last tick
            assert (tick["ticked"] == (t % 4 ** i == 0) | (t == length)).all()
            assert (tick["reward"] == (t * (t + 1) - before * (before + 1)) / 2)[tick["ticked"]].all()
            seen = torch.as_tensor(tick["observation"]) if i == 0 else tick["recent"].flatten(1)
            fields = [seen, tick["action"], *(torch.as_tensor(tick[name]) for name in
                                              ("reward", "is_first", "is_terminal")), *tick["state"]]
            for e in np.flatnonzero(tick["ticked"]):
                lives.setdefault((i, e), []).append([field[e].clone() for field in fields])
                held[i - 1, e] = tick["action"][e]
                goal = held.get((i, e), torch.zeros(0))
                assert torch.equal(tick["subgoal"][e], goal)
                state = tick["state"].map(lambda field: field[e:e + 1])
                assert torch.equal(agent.levels[i].policy(state, goal[None])[0], tick["action"][e])
    for (i, _), life in lives.items():
        *batch, x, z, h, entropies, rewards, conts = (torch.stack(field)[None] for field in zip(*life))
        assert batch[3].sum() >= 3 and len(batch[1][0].unique(dim=0)) >= 3  # episodes, actions of many kinds
        _, states, _ = agent.levels[i].world_model.loss(*batch)
        for pair in zip(states, (x, z, h, entropies, rewards, conts)):
            assert torch.allclose(*pair, atol=1e-4)


def test_acting_fetches_its_results_in_one_copy(monkeypatch):
    """A step at which all levels tick takes one copy from the device: on a GPU each would wait for it."""
    agent, fetched = small(), []
    for name in ("cpu", "item", "tolist"):
        fetch = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda self, fetch=fetch: fetched.append(0) or fetch(self))
    (_, ticks), = drive(agent, plan([9])[:1])
    assert len(agent.transitions(ticks)) == 3 and len(fetched) == 1


def batch_of(agent, i, B=3, T=8, device="cpu"):
    """A random batch for level i, as its replay would give it."""
    rng, batch = np.random.default_rng(0), {}
    for name, (shape, dtype) in agent.specs[i].items():
        high = {"action": agent.levels[i].action_shape[1], "observation": 256}.get(name, 8)
        values = rng.random((B, T, *shape)) if dtype == np.float32 else rng.integers(0, high, (B, T, *shape))
        batch[name] = torch.from_numpy(values.astype(dtype)).to(device)
    flags = "is_first", "is_last", "is_terminal"
    return batch | {name: torch.zeros(B, T, dtype=torch.bool, device=device) for name in flags}


def lively(agent):
    """The agent with posteriors and policies that are far from uniform."""
    for level in awake(agent).levels:
        level.world_model.encoder[-1].weight.data *= 30
        level.actor.net[-1].weight.data *= 100
    return agent


def spy(monkeypatch, owner, name, calls):
    """Let calls[name] be the (arguments, result) of the last call of owner.name."""
    def recorded(*arguments, original=getattr(owner, name), **options):
        calls[name] = arguments, original(*arguments, **options)
        return calls[name][1]
    monkeypatch.setattr(owner, name, recorded)


@pytest.mark.parametrize("starts", [10, 10 ** 6])
def test_a_dream_follows_the_state_and_the_subgoal_of_its_start(starts, monkeypatch, fixed_draws):
    """Rollout n starts in a state of the batch, has for all its length the subgoal that was held there, and
    no weight if the episode ended there. What it pays at state t+1, discounted by gamma and the chance that
    the game goes on, belongs to the action at t."""
    agent = lively(small(starts=starts, gamma=0.9, horizon=4, **dict.fromkeys(RATES, 0.0)))
    level, batch, calls = agent.levels[1], batch_of(agent, 1), {}
    batch["is_first"], batch["is_terminal"] = torch.rand(2, 3, 8) < 0.2
    for name in "loss", "imagine", "update_behaviour":
        spy(monkeypatch, level if name == "update_behaviour" else level.world_model, name, calls)
    level.update(batch)
    trained_on, (_, states, _) = calls["loss"]
    action, subgoal = (F.one_hot(batch[name].long(), 8).float().flatten(-2) for name in ("action", "subgoal"))
    stored = level.observation(batch), action, batch["reward"], batch["is_first"], batch["is_terminal"]
    assert all(map(torch.equal, trained_on, stored))
    (start, _, horizon), (imagined, actions) = calls["imagine"]
    states = states.map(lambda field: field.flatten(0, 1))
    key, keys = (torch.cat([each.z.flatten(1), each.h], -1) for each in (start, states))
    index = (key[:, None] == keys).all(-1).int().argmax(1)  # which states of the batch they are
    assert len(set(index.tolist())) == len(start.h) == min(starts, 24) and horizon == 4
    assert all(torch.equal(field, every[index]) for field, every in zip(start, states))
    subgoal, dead = subgoal.flatten(0, 1)[index], batch["is_terminal"].flatten()[index]
    feature, taken, reward, discount, alive = calls["update_behaviour"][0]
    assert torch.equal(feature, imagined.feature(subgoal.expand(5, -1, -1))) and torch.equal(taken, actions)
    for t in range(4):
        now = State(None, *(field[t] for field in imagined[1:]))
        assert torch.equal(level.policy(now, subgoal), actions[t])
    after = State(None, *(field[1:] for field in imagined[1:]))
    paid = {"extrinsic": after.reward, "novelty": level.autoencoder.loss(after.h)[1],
            "subgoal": cosine_max(level.autoencoder.decode(subgoal), after.h)}
    assert torch.allclose(reward, torch.stack([paid[name] for name in level.rewards], -1), atol=1e-5)
    assert torch.allclose(discount, 0.9 * after.cont) and torch.equal(alive, 1.0 - dead.float())


def test_the_first_update_starts_from_the_mean():
    """The running mean follows before the loss is taken: at first the error is the variance about it."""
    agent = small(1, (64, 64, 3))
    batch = batch_of(agent, 0)
    observation = agent.levels[0].observation(batch)
    assert torch.allclose(observation[1, 2, 0, 3], batch["observation"][1, 2, 3, :, 0] / 255)
    metrics = agent.levels[0].update(batch)
    assert torch.allclose(metrics["loss/image"], observation.var((0, 1), correction=0).sum(), rtol=1e-4)


@pytest.mark.parametrize("levels", [1, 3])
def test_an_update_changes_every_parameter_and_nothing_is_on_the_wrong_device(levels, monkeypatch):
    """One update trains all networks of a level; on the meta device, where any tensor made elsewhere and any
    peek at a value is an error, the same update runs through: it neither mixes devices nor waits for one."""
    agent = small(levels, (64, 64, 3), actor_lr=1e-2, horizon=3)  # at 3e-5 two steps vanish
    with torch.device("meta"):
        ghost = small(levels, (64, 64, 3), horizon=3)
    draw = torch.randperm  # an index may be elsewhere, it is copied in silence: whoever draws one says where
    monkeypatch.setattr(torch, "randperm", lambda n, *, device: draw(n, device=device))
    for i, (level, other) in enumerate(zip(agent.levels, ghost.levels)):
        before = parameters_of(level)
        for _ in range(3):  # heads that start at zero pass on gradients only later
            metrics = level.update(batch_of(agent, i, 2, 4))
        assert np.isfinite([value.item() for value in metrics.values()]).all()
        for name, p in level.named_parameters():
            assert torch.equal(p, before[name]) == (levels == 1 and name.startswith("autoencoder")), name
        other.world_model.decoded = 0.5
        metrics = other.update(batch_of(ghost, i, device="meta"))
        assert {value.device.type for value in metrics.values()} == {"meta"}


def test_the_encoder_starts_sharp():
    """`sharpness` makes the first posterior say more of its frame."""
    model = [WorldModel((6,), 3, **TINY | dict(sharpness=sharpness)) for sharpness in (1.0, 10.0)]
    blunt, sharp = (entropy(each.posterior(torch.randn(50, 6))).mean() for each in model)
    assert sharp < 0.7 * blunt


def tabular(action_shape, rewards={"extrinsic": 1.0}, **behaviour):
    """A level whose actor and critics are tables: linear in a feature that is the one-hot number of a state.
    Returns it and a function from numbers of states to their features."""
    level = Level((4,), action_shape, (0, 8), (8, 8), rewards, TINY | dict(mlp_layers=0),
                  **BEHAVIOUR | behaviour)
    return level, lambda number: F.one_hot(number, level.world_model.feature_size).float()


def test_behaviour_by_hand(monkeypatch):
    """Losses and gradients of actor and critics are those of the equations, written out in loops: joint
    log-probability times the weighted sum of normalised advantages, entropy, two-hot cross-entropy to the
    lambda-return and to the slow critic, all weighted by the chance that the episode got that far."""
    H, N, weights = 3, 5, torch.tensor([1.0, 0.3, 0.1])
    level, features = tabular((2, 3), {"extrinsic": 1.0, "subgoal": 0.3, "novelty": 0.1})
    for p in itertools.chain(*(net.parameters() for net in (level.actor, level.critics, level.slow_critics))):
        p.data += torch.randn_like(p)  # the slow ones differ
    monkeypatch.setattr(Optimiser, "step", lambda self: torch.zeros(()))  # leaves the gradients to be seen
    feature, pick = features(torch.arange((H + 1) * N).view(H + 1, N)), torch.randint(3, (H, N, 2))
    reward, discount = torch.randn(H, N, 3) * torch.tensor([3.0, 0.5, 0.002]), torch.rand(H, N)
    alive = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0])
    p = 0.01 / 3 + 0.99 * torch.softmax(level.actor.net(feature).unflatten(-1, (2, 3)), -1)
    cross_entropy, logits = level.critics.twohot.loss, level.critics(feature)
    value, slow_value = (torch.softmax(each, -1).detach() @ symexp(torch.linspace(-20, 20, 255))
                         for each in (logits, level.slow_critics(feature)))
    returns, R = torch.empty(H, N, 3), value[H]
    for t in reversed(range(H)):
        R = returns[t] = reward[t] + discount[t][:, None] * (0.2 * value[t + 1] + 0.8 * R)
    low, high = np.percentile(returns.flatten(0, 1), [5, 95], axis=0)
    scale = torch.tensor(np.maximum(high - low, [0.1, 0.1, 0.01])).float()
    actor_loss, critic_loss = torch.zeros(()), torch.zeros(3)
    for t, n in itertools.product(range(H), range(N)):
        weight = alive[n] * discount[:t, n].prod() / (H * N)
        advantage = ((returns[t, n] - value[t, n]) / scale * weights).sum()
        log_p = sum(p[t, n, i, pick[t, n, i]].log() for i in range(2))
        actor_loss -= weight * (log_p * advantage - 0.05 * (p[t, n] * p[t, n].log()).sum())
        for target in (returns, slow_value):
            critic_loss += weight * cross_entropy(logits[t, n], target[t, n])
    parameters = [*level.actor.parameters(), *level.critics.parameters()]
    gradients = torch.autograd.grad(actor_loss + critic_loss.sum(), parameters)
    metrics = level.update_behaviour(feature, F.one_hot(pick, 3).float().flatten(-2), reward, discount, alive)
    assert torch.allclose(metrics["loss/policy"], actor_loss, rtol=1e-3)
    for name, loss in zip(level.rewards, critic_loss):
        assert torch.allclose(metrics["loss/value_" + name], loss, rtol=1e-3)
    for p, gradient in zip(parameters, gradients):
        assert torch.allclose(p.grad, gradient, rtol=1e-3, atol=1e-5)


def preferred(rewards, paid, **behaviour):
    """Actions 0 and 1, which end a dream, are tried equally often and pay what `paid` says, of each reward.
    Returns how likely a tabular level then takes action 0, and its values."""
    level, features = tabular((1, 2), rewards, actor_lr=0.1, **behaviour)
    start, action = features(torch.zeros(8, dtype=torch.long)), torch.arange(8) % 2
    reward = torch.tensor(paid)[action][None]  # (1,8,R)
    for _ in range(60):
        level.update_behaviour(torch.stack([start, start]), F.one_hot(action, 2).float()[None], reward,
                               torch.zeros(1, 8), torch.ones(8))
    return level.actor(start)[0, 0, 0].item(), level.critics.twohot.mean(level.critics(start))[0].tolist()


def test_the_better_action_becomes_likelier_and_entropy_holds_it_back():
    """Of two actions that pay 2 and 1 the first becomes likely, the less the more entropy is worth; the value
    moves to the return, which is 1.5 here, where both are taken equally often."""
    found, values = zip(*[preferred({"extrinsic": 1.0}, [[2.0], [1.0]], entropy_scale=scale, slow=0.5,
                                    critic_lr=0.1) for scale in (1e-3, 1.0, 10.0)])
    assert found[0] > 0.95 and found[0] > found[1] > found[2] > 0.5, found
    assert np.allclose(values, 1.5, atol=0.05)


def test_a_small_return_outweighs_the_entropy():
    """Where only a thousandth of a point can be won, the action that wins it becomes likely nevertheless."""
    assert preferred({"extrinsic": 1.0}, [[1e-3], [0.0]], entropy_scale=1e-3)[0] > 0.9  # floor of 1: 0.68


def test_the_reward_with_more_weight_decides():
    """Two actions are paid by a reward each, as much once it is normalised: the heavier one decides."""
    paid = [[3.0, 0.0], [0.0, 0.5]]
    assert preferred({"extrinsic": 1.0, "subgoal": 0.3}, paid)[0] > 0.9
    assert preferred({"extrinsic": 0.3, "subgoal": 1.0}, paid)[0] < 0.1


def test_a_reward_without_weight_changes_nothing():
    """It has no say in what is done, and its critic stays as it was."""
    likely, (_, value) = preferred({"extrinsic": 1.0, "subgoal": 0.0}, [[0.0, 1.0], [0.0, 0.0]])
    assert likely == pytest.approx(0.5, abs=1e-3) and value == pytest.approx(0.0, abs=1e-4)


def test_slow_critics_follow_by_slow():
    """After an update the slow critics have come nearer by the share `slow`: no copy, no standstill."""
    level, features = tabular((1, 2), slow=0.1)
    before = parameters_of(level.slow_critics)
    level.update_behaviour(features(torch.arange(4).view(2, 2)), torch.eye(2)[None], torch.ones(1, 2, 1),
                           torch.ones(1, 2), torch.ones(2))
    for (name, slow), fast in zip(level.slow_critics.named_parameters(), level.critics.parameters()):
        assert torch.allclose(slow, before[name] + 0.1 * (fast - before[name]), atol=1e-6), name
        assert (slow != fast).any() and (slow != before[name]).any() and not slow.requires_grad


# ---- replay.py ---------------------------------------------------------------------------------------------

def counting_replay(capacity, length, tau=0.3, steps=0):
    replay = Replay({"t": ((), np.int64)}, capacity, length, tau, np.random.default_rng(0))
    for t in range(steps):
        replay.add({"t": t})
    return replay


@pytest.mark.parametrize("held, capacity", [(50, 5000), (2000, 5000), (12_345, 5000)])
def test_draws_follow_the_law_while_the_ring_fills_and_after_it_wraps(held, capacity):
    """Start positions fall into tenths, old first, as the closed form says, at any fill, not only at full."""
    deciles = [0.053, 0.070, 0.080, 0.089, 0.097, 0.106, 0.113, 0.122, 0.130, 0.139]
    for tau, law in ((0.3, deciles), (0.0, [0.1] * 10)):
        replay = counting_replay(capacity, 11, tau, held)
        assert replay.starts == min(held, capacity) - 10
        draws = (replay.draw(200_000) + 0.5) / replay.starts  # 0.5: the middle of a position, also of forty
        assert np.abs(np.histogram(draws, 10, (0, 1))[0] / len(draws) - law).max() < 0.004


def test_the_law_is_the_distribution_of_expected_counts():
    """Uniform draws on a growing buffer give entry x of n about ln(n/x) draws: the density, integrated."""
    i = np.arange(1, 2001)
    expected = np.cumsum(1 / i[::-1])[::-1]  # 1/i + ... + 1/2000
    assert np.abs(np.cumsum(expected) / expected.sum() - etbs_cdf(i / 2000)).max() < 0.005
    assert etbs_cdf(np.array([0.0, 1.0])).tolist() == [0, 1]


@pytest.mark.parametrize("length, capacity", [(1, 1), (3, 3), (3, 4), (5, 18)])
def test_no_sequence_crosses_the_write_head(length, capacity):
    """Every sequence is consecutive in time, and every start can be drawn: for rings of any size, up to the
    smallest that holds a sequence, before they are full and after they have wrapped a hundred times."""
    replay, given = counting_replay(capacity, length), {"t": np.zeros((200, length), np.int64)}
    for t in range(100 * capacity + 5):
        replay.add({"t": t})
        if length <= t + 1 < 3 * capacity or t > 100 * capacity:
            out = given if t % 2 else None  # memory to draw into, as a GPU has
            batch = replay.sample(200, out)["t"]
            assert (batch is given["t"]) == bool(out)
            assert (np.diff(batch, axis=1) == 1).all()
            assert set(batch[:, 0]) == set(range(max(0, t + 1 - capacity), t + 2 - length))


@pytest.mark.parametrize("words, call", [
    ("holds 3 steps, a sequence needs 7", lambda: counting_replay(20, 7, steps=3).sample(1)),
    ("cannot hold one sequence", lambda: counting_replay(5, 7)),
    (r"\(D,\), got \(3, 32, 32\)", lambda: WorldModel((3, 32, 32), 2, **TINY)),
    (r"reset \(2,\); expected \(B,T,H\)", lambda: S5Stack(4, 8, 1, 64)(torch.zeros(1, 2, 4), torch.ones(2))),
    (r"\(1, 2, 3\) and \(1, 2, 4\)", lambda: scan(torch.zeros(1, 2, 3), torch.zeros(1, 2, 4))),
    ("not a multiple of 2", lambda: S5Layer(4, 12, 64))])
def test_what_does_not_fit_says_so(words, call):
    """Too small a replay, or a wrong shape, is an error that says what came and what was expected."""
    with pytest.raises(ValueError, match=words):
        call()


def test_saved_pieces_become_the_same_ring(tmp_path):
    """Each save writes only new steps, old files leave with their steps, loading gives the same ring; what an
    unfinished checkpoint saved is as if it had never been."""
    def loaded(total):
        replay = counting_replay(20, 5)
        replay.load(tmp_path, total)
        return replay

    replay = counting_replay(20, 5)
    for t in range(76):
        replay.add({"t": t})
        if t % 7 == 6 or t in (30, 31):
            files = set(tmp_path.iterdir())
            replay.save(tmp_path)
            assert len(set(tmp_path.iterdir()) - files) == 1 and len(list(tmp_path.iterdir())) <= 6
            drawn = loaded(t + 1).sample(50)["t"]
            assert (drawn == counting_replay(20, 5, steps=t + 1).sample(50)["t"]).all()
    replay.save(tmp_path)  # steps 70 ... 75: their checkpoint never came, and the run goes on from step 70
    resumed = loaded(70)
    for t in range(1070, 1075):
        resumed.add({"t": t})
    resumed.save(tmp_path)
    assert (loaded(75).arrays["t"] == resumed.arrays["t"]).all()
    with pytest.raises(ValueError, match="needs 99"):
        loaded(99)


def test_memory_is_taken_at_the_start_and_never_grows():
    """A ring has all its memory before the first step: too little shows at once, not after hours."""
    if not Path("/proc/self/statm").exists():
        pytest.skip("resident memory is read from /proc")
    script = """
import resource, numpy as np; from replay import Replay
resident = lambda: int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() / 1e6
before = resident(); replay = Replay({"o": ((10_000,), np.uint8)}, 5000, 8, 0.3, np.random.default_rng(0))
after = resident()
for t in range(12_000): replay.add({"o": t % 256}); t < 8 or replay.sample(2)
print(after - before, resident() - after)"""
    output = subprocess.check_output([sys.executable, "-c", script], cwd=HERE, text=True)
    taken, grown = map(float, output.split())
    assert taken >= 50 and grown < 2, (taken, grown)


def test_saving_and_loading_never_copy_the_ring(tmp_path, monkeypatch):
    """However much there is to write or to read: memory grows by one piece, not by the ring."""
    monkeypatch.setattr(Replay, "PIECE", 100)
    replay, other = (Replay({"o": ((1000,), np.uint8)}, 5000, 5, 0.3, np.random.default_rng(0)) for _ in "ab")
    for t in range(7000):
        replay.add({"o": t % 251})
    tracemalloc.start()
    replay.save(tmp_path)
    other.load(tmp_path, 7000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (other.arrays["o"] == replay.arrays["o"]).all() and peak < 0.1 * replay.arrays["o"].nbytes, peak


# ---- On a GPU: `pytest test_hieros.py -m gpu` --------------------------------------------------------------

GPU = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(),
                                                                      reason="no CUDA device")])
on_gpu = pytest.mark.parametrize("device", [GPU])
in_precisions = pytest.mark.parametrize("precision", ["float32", "tf32"])


@pytest.fixture
def agent_on():
    """A function that makes an agent for a device; what it says of TF32 is taken back in the end."""
    def make(device, **settings):
        config = train.make_config(dict(game="pong", preset="debug", device=device) | settings)
        spaces = types.SimpleNamespace(observation_space=train.IMAGE, action_space=Discrete(3))
        return awake(train.make_agent(config, spaces))

    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield make
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@on_gpu
def test_an_update_on_the_gpu_is_the_cpus(device, agent_on, fixed_draws):
    """From the same weights and batch an update of each level has the CPU's losses and gradients, to 1e-3."""
    reference, agent = (agent_on(at, precision="float32", starts=64) for at in ("cpu", device))
    agent.load_state_dict(reference.state_dict())
    for i, level in enumerate(reference.levels):
        found = agent.levels[i].update(batch_of(agent, i, device=device))
        for name, value in level.update(batch_of(reference, i)).items():
            assert torch.allclose(found[name].cpu(), value, rtol=1e-3, atol=1e-3), (i, name)
        for name, optimiser in level.optimisers.items():  # Adam's first mean is a tenth of the gradient
            gradient, other = (torch.cat([o.adam.state[p]["exp_avg"].flatten().cpu() for p in o.parameters])
                               for o in (optimiser, agent.levels[i].optimisers[name]))
            assert (gradient - other).norm() <= 1e-3 * gradient.norm(), (i, name)


@pytest.mark.parametrize("device", ["cpu", GPU])
@in_precisions
def test_every_network_learns_at_every_precision_and_dreams_know_it(device, precision, agent_on, monkeypatch):
    """No network is left without a gradient, and imagination uses the weights of after the model's step. TF32
    is allowed only where it was chosen."""
    agent = agent_on(device, precision=precision, levels=2, model_lr=1e-2)
    assert torch.backends.cuda.matmul.allow_tf32 is torch.backends.cudnn.allow_tf32 is (precision == "tf32")
    before = parameters_of(agent)
    for i, level in enumerate(agent.levels):
        calls, model = {}, level.world_model
        spy(monkeypatch, model, "imagine", calls)
        level.update(batch_of(agent, i, device=device))
        (start, _, _), (imagined, actions) = calls["imagine"]
        with torch.no_grad():
            h = model.sequence_step(start.x, start.z, actions[0], model.sequence.discretise())[2]
        assert torch.allclose(imagined.h[1], h, atol=1e-3)
    for name, p in agent.named_parameters():
        assert (p != before[name]).any(), name


@on_gpu
def test_a_checkpoint_changes_its_device(device, tmp_path):
    """A run that was saved on a GPU goes on on a CPU with the same weights, and back."""
    there = None
    for steps, place in ((120, device), (140, "cpu"), (160, device)):
        here = train.Run(catch_config(tmp_path, device=place, starts=32, steps=steps), Catch())
        if there:
            here.restore(train.load_checkpoint(tmp_path / "checkpoint.pt", place))
            assert same_bits(here.agent.state_dict(), there.agent.state_dict())
        assert {p.device.type for p in here.agent.parameters()} == {place}
        train.train(here, progress=False)
        assert here.step == steps and min(here.updates) > 0
        for before in [here.rng.bit_generator.state] * 2:  # the second batch comes in the memory of the first
            here.rng.bit_generator.state, batch = before, here.batch(0)
        here.rng.bit_generator.state, there = before, here
        drawn = here.replays[0].sample(8)
        assert all(np.array_equal(value.cpu(), drawn[name]) for name, value in batch.items())


@on_gpu
@in_precisions
def test_an_update_never_waits_for_the_gpu_and_recorded_is_the_same(device, precision, agent_on):
    """From batch to metrics nothing synchronises: the CPU can prepare while the GPU computes. Four updates,
    the later ones played back from a CUDA graph, have the losses of four that are not and move the weights as
    far: with new batches, new random numbers and what Adam knows by then."""
    losses, moved = [], []
    for wrap in (lambda update: update, train.Recorded):
        torch.manual_seed(0)
        agent = agent_on(device, precision=precision, levels=2)
        first, updates = copy.deepcopy(agent.state_dict()), [wrap(level.update) for level in agent.levels]
        batches = [batch_of(agent, i, device=device) for i in range(2)]
        torch.manual_seed(0)
        for shift, (batch, update) in itertools.product(range(4), zip(batches, updates)):
            batch = {name: value.roll(shift, 1) for name, value in batch.items()}
            try:  # the first update may wait, for compiled kernels and for memory; the second is recorded
                torch.cuda.set_sync_debug_mode("error" if shift > 1 else "default")
                found = update(batch)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            losses.append(torch.stack(list(found.values())).cpu())
        moved.append(torch.cat([(value - first[name]).float().flatten()
                                for name, value in agent.state_dict().items()]))
    assert all(torch.allclose(*pair, rtol=1e-2, atol=1e-2) for pair in zip(losses, losses[len(losses) // 2:]))
    assert (moved[0] - moved[1]).norm() <= 0.1 * moved[0].norm()


# ---- train.py ----------------------------------------------------------------------------------------------

Box, Discrete = spaces.Box, spaces.Discrete


class Catch(gymnasium.Env):
    """Three blocks fall, one after the other, through 6 rows of 5 columns; each one caught is a point.
    Perfect play earns 3; moving at random about 0.6, since a block must be followed for several steps."""

    COLUMNS, ROWS, DROPS = 5, 6, 3
    observation_space, action_space = Box(0, 1, (2 * COLUMNS + ROWS,)), Discrete(3)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.paddle, self.block = 0, self.COLUMNS // 2, int(self.np_random.integers(self.COLUMNS))
        return self.observe(), {}

    def step(self, action):
        self.paddle = min(max(self.paddle + int(action) - 1, 0), self.COLUMNS - 1)
        self.t, reward = self.t + 1, 0.0
        if self.t % self.ROWS == 0:
            reward, self.block = float(self.paddle == self.block), int(self.np_random.integers(self.COLUMNS))
        return self.observe(), reward, self.t == self.ROWS * self.DROPS, False, {}

    def observe(self):
        vector = np.zeros(2 * self.COLUMNS + self.ROWS, np.float32)
        vector[[self.block, self.COLUMNS + self.paddle, 2 * self.COLUMNS + self.t % self.ROWS]] = 1
        return vector

    def get_state(self):
        return {"now": [self.t, self.paddle, self.block], "rng": self.np_random.bit_generator.state}

    def set_state(self, state):
        self.reset(seed=0)
        self.t, self.paddle, self.block = state["now"]
        self.np_random.bit_generator.state = state["rng"]


class Scripted(gymnasium.Env):
    """Episodes of given lengths, which a time limit ends where `cut` of their number says so. It shows its
    step, a number drawn at the start and 0.5. What else it is and what goes wrong when, options tell."""

    metadata = {"render_modes": ["rgb_array"]}
    made = []  # every one, since the tests look at them

    def __init__(self, observations=Box(-1, 20, (3,), np.float64), actions=Discrete(2), reward=1.0,
                 give=lambda env: np.array([env.t, env.number, 0.5]), lengths=itertools.repeat(10), info=dict,
                 cut=lambda episode: False, end=bool, render_mode=None,
                 made=lambda env: None, step=lambda env: None, close=lambda env: None):
        given = dict(observation_space=observations, action_space=actions, render_mode=render_mode)
        vars(self).update({name: value for name, value in given.items() if value is not None})
        self.reward, self.give, self.info, self.end, self.faults = reward, give, info, end, (step, close)
        self.lengths, self.cut, self.episode, self.steps, self.taken = iter(lengths), cut, -1, 0, []
        made(self)
        self.closed = 0  # times
        self.made.append(self)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.seed, self.t, self.number = seed, 0, self.np_random.random()
        self.length, self.episode = next(self.lengths), self.episode + 1
        return self.give(self), self.info()

    def step(self, action):
        self.t, self.steps = self.t + 1, self.steps + 1
        self.taken.append(action)
        self.faults[0](self)
        last, cut = range(self.length + 1)[self.t] == self.length, self.cut(self.episode)  # never after it
        reward = self.reward(self) if callable(self.reward) else self.reward
        return self.give(self), reward, self.end(last and not cut), self.end(last and cut), self.info()

    def render(self):
        return np.full((40, 60, 3), self.t, np.uint8)

    def close(self):
        self.closed += 1
        self.faults[1](self)


@pytest.fixture
def registered():
    """Registers Scripted with options, or another environment, and returns its name."""
    def register(kind=Scripted, limit=None, **options):
        gymnasium.registry.pop("Tiny-v0", None)
        gymnasium.register("Tiny-v0", kind, max_episode_steps=limit, kwargs=options)
        return "Tiny-v0"

    Scripted.made = []
    yield register
    gymnasium.registry.pop("Tiny-v0", None)


QUICK = ("--preset debug --device cpu --levels 2 --steps 60 --warmup 0 --batch_length 8 --batch_size 2"
         " --starts 8 --train_every 20 --save_every 20 --log_every 20 --horizon 2").split()


def catch_config(directory, **settings):
    """Settings for Catch: small networks, large learning rates."""
    return train.Config(**train.PRESETS["debug"] | dict(
        game="catch", preset="debug", device="cpu", logdir=str(directory), levels=2, steps=400, warmup=100,
        train_every=2, batch_size=8, batch_length=32, replay_size=10_000, mlp_layers=2, first_stride=2,
        kl_warmup=200, horizon=12, starts=256, encoder_lr=1e-3, model_lr=1e-3, actor_lr=1e-3, critic_lr=1e-3,
        autoencoder_lr=1e-3, entropy_scale=1e-2, subgoal_weight=0.1, save_every=200) | settings)


def metrics_of(directory):
    """metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (Path(directory) / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if not any(name.startswith("seconds") for name in line)]


def same_bits(one, other):
    """Do two tensors, or lists and dicts of such, hold the same numbers?"""
    if isinstance(one, torch.Tensor):
        return torch.equal(one.cpu(), other.cpu())
    names = one.keys() if isinstance(one, dict) else range(len(one))
    return len(one) == len(other) and all(same_bits(one[name], other[name]) for name in names)


# A run.

@slow
def test_resumed_run_is_bitwise_the_undisturbed_one(tmp_path):
    """Stop at a checkpoint, start with all new objects, resume: metrics and weights are the same bits. What
    is kept of the layers between steps belongs to the present weights, level by level."""
    def begun(name, **settings):
        return train.Run(catch_config(tmp_path / name, starts=32, **settings), Catch())

    train.train(whole := begun("whole"), progress=False)
    train.train(first := begun("parts", steps=200), progress=False)
    first.log({"after": "the checkpoint"})  # will be written again
    second = begun("parts", seed=1)  # whatever it starts from is replaced
    second.restore(train.load_checkpoint(tmp_path / "parts" / "checkpoint.pt", "cpu"))
    assert second.step == 200 and same_bits(second.discretised, first.agent.discretise())
    train.train(second, progress=False)
    assert metrics_of(tmp_path / "whole") == metrics_of(tmp_path / "parts")
    assert all(vars(second)[name] == vars(whole)[name] for name in ("curve", "updates", "commits"))
    assert min(whole.updates) > 0 and same_bits(whole.agent.state_dict(), second.agent.state_dict())
    assert same_bits(whole.discretised, whole.agent.discretise())
    before, whole.step = list(whole.discretised), 402  # a multiple of train_every, not of train_every * k
    whole.learn()
    assert whole.discretised[0] is not before[0] and whole.discretised[1] is before[1]
    lines = [json.loads(line) for line in whole.metrics.read_text().splitlines()]
    assert {line["episode/length"] for line in lines if "episode/score" in line} == {18}
    names = {f"train/{name}" for name in (  # as users of DreamerV3 know them, a line a level
        "loss/vector", "loss/rew", "loss/con", "loss/dyn", "loss/policy", "loss/value_extrinsic", "rep_ent",
        "dyn_ent", "ent/action", "adv_std", "rew/extrinsic", "ret/extrinsic", "val/extrinsic")}
    assert {line["level"] for line in lines if names <= line.keys()} == {0, 1}
    times = [(100 / line["fps/policy"], line["seconds/total"]) for line in lines if "fps/policy" in line]
    assert np.allclose(np.cumsum(times, 0)[:, 0], np.array(times)[:, 1])


@slow
def test_killed_at_any_moment_a_run_ends_as_if_undisturbed(tmp_path):
    """SIGKILL at random moments, resume, again and again: in the end every line of metrics.jsonl is there
    exactly once and the weights are bitwise those of a run that nobody killed. That standard output and error
    are closed all the time costs no score."""
    def start(name, *flags):
        command = [sys.executable, "train.py", "--logdir", str(tmp_path / name), "--device", "cpu", *flags]
        return subprocess.Popen(["sh", "-c", 'exec "$@" >&- 2>&-', "sh", *command], cwd=HERE)

    def saved():
        return checkpoint.exists() and checkpoint.stat().st_mtime_ns

    flags = ("--game breakout --preset debug --steps 450 --warmup 200 --save_every 30 --log_every 50"
             " --eval_episodes 1").split()
    checkpoint, kills = tmp_path / "killed" / "checkpoint.pt", 0
    assert start("whole", *flags).wait() == 0
    for delay in np.random.default_rng(0).uniform(0.1, 1.5, 3):
        before, process = saved(), start("killed", *flags)
        while process.poll() is None and saved() == before:
            time.sleep(0.01)  # a first checkpoint of this process, so that every round gets further
        time.sleep(delay)
        kills += process.poll() is None
        process.kill()
        process.wait()
        flags = ["--resume"]
    assert start("killed", "--resume").wait() == 0 and kills
    assert metrics_of(tmp_path / "killed") == metrics_of(tmp_path / "whole")
    assert same_bits(*(train.load_checkpoint(tmp_path / name / "checkpoint.pt", "cpu")["weights"]
                       for name in ("whole", "killed")))
    assert len(json.loads((tmp_path / "killed" / "evaluation.json").read_text())["returns"]) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_save_first_and_the_second_ends_at_once(number, registered, tmp_path, capfd, request):
    """Ctrl+C, SIGTERM and a closed terminal save the run and say how to continue it; continued, it ends with
    a score. A second one is left to the system, which ends a game that hangs; but a terminal may say twice
    that it is closed, and to a run under nohup that is no matter."""
    def send(env):
        while pending and env.steps == 30:
            os.kill(os.getpid(), pending.pop())
            left.append([signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)])

    def unhandled(*_):
        pytest.fail("a signal that the run has not handled")

    command, pending, left = ["--game", registered(step=send), f"--logdir={tmp_path}", *QUICK], [number], []
    before = signal.signal(number, unhandled)  # where the tests run under nohup SIGHUP was ignored
    request.addfinalizer(lambda: signal.signal(number, before))
    assert train.main(command) == 128 + number and signal.getsignal(number) is unhandled
    assert "stopped at step 30, saved; continue with: python train.py --logdir" in capfd.readouterr().out
    assert train.load_checkpoint(tmp_path / "checkpoint.pt", "cpu")["step"] == 30
    assert left == [2 * [signal.SIG_DFL]] and train.main([*command, "--resume"]) == 0
    if number == signal.SIGHUP:
        pending, again = [number, number], [*command, "--resume", "--steps", "120"]
        assert train.main(again) == 128 + number
        pending, _ = [number], signal.signal(number, signal.SIG_IGN)
        assert train.main(again) == 0 and not pending


@pytest.mark.parametrize("step, flags", [(0, []), (0, ["--resume"]), (40, ["--resume"])])
def test_a_full_disk_leaves_the_checkpoint_intact_and_no_dead_end(step, flags, registered, tmp_path,
                                                                  monkeypatch):
    """When a checkpoint cannot be written, the one before stays whole, and one line says what to do. Where it
    would have been the first, the very same command works again, with or without --resume."""
    resource = pytest.importorskip("resource")  # not on Windows
    limits, save = resource.getrlimit(resource.RLIMIT_FSIZE), train.Run.save
    command = ["--game", registered(), "--logdir", str(tmp_path), *QUICK]
    words = "File too large" + ".*checkpoint is intact.*--resume" * (step > 0)
    with monkeypatch.context() as patch, pytest.raises((OSError, train.UsageError), match=words):
        # From `step` on the system refuses that a file grows beyond 100 kB.
        patch.setattr(train.Run, "save", lambda run: (run.step == step and resource.setrlimit(
            resource.RLIMIT_FSIZE, (100_000, limits[1]))) or save(run))
        try:
            train.main(command)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    if step:
        assert train.load_checkpoint(tmp_path / "checkpoint.pt", "cpu")["step"] == 20
    assert (tmp_path / "checkpoint.pt.tmp").exists() and (tmp_path / "checkpoint.pt").exists() == (step > 0)
    assert train.main([*command, *flags]) == 0 and metrics_of(tmp_path)[0]["step"] == 10


def test_all_that_a_checkpoint_needs_is_on_the_disk_when_it_takes_its_name(tmp_path, monkeypatch):
    """Not even a power cut leaves half a checkpoint: every file of it was handed over to the disk, whole. A
    file that is written at the same time, and half of one left by a killed save, do not meet it."""
    synced, stat = {}, os.fstat
    monkeypatch.setattr(os, "fsync", lambda file: synced.update({stat(file).st_ino: stat(file).st_size}))
    run = train.Run(catch_config(tmp_path), Catch())
    run.act()
    run.log({"a line": 1})
    (tmp_path / "replay-0").mkdir()
    (tmp_path / "replay-0" / "000000000-000000004.npz.tmp").write_bytes(b"half")
    with replacing(tmp_path / "evaluation.json") as score:
        run.save()
        score.write(b"score")
    files = [path.stat() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 5 and all(synced[file.st_ino] == file.st_size for file in files)


def test_a_non_finite_loss_stops_the_run(tmp_path):
    """NaN is never trained on silently: the run ends, names the level and losses, writes no checkpoint."""
    run = train.Run(catch_config(tmp_path), Catch())
    run.agent.levels[1].world_model.outcome_head[-1].bias.data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="up to step [0-9]+, level 1: not finite: .*train/loss/rew"):
        train.train(run, progress=False)
    assert not (tmp_path / "checkpoint.pt").exists()


# The command line.

@pytest.fixture
def refused(monkeypatch, capfd, tmp_path):
    """A command line, run in tmp_path, that must fail as it should: exit code 2, one line of error without a
    traceback, nothing written, changed or deleted but a lock and its directory. Returns that line."""
    def files():
        return {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")
                if path.is_file() and path.name != "lock"}

    def run(script, *flags):
        before, _ = files(), capfd.readouterr()
        monkeypatch.setattr(sys, "argv", [script, *map(str, flags)])
        with pytest.raises(SystemExit) as exit:  # in this process, which has torch imported: that is quicker
            runpy.run_path(str(HERE / script), run_name="__main__")
        line = capfd.readouterr().err
        assert exit.value.code == 2 and line.startswith(script + ": ") and line.count("\n") == 1, line
        assert files() == before
        return line

    monkeypatch.chdir(tmp_path)
    return run


def changed(change):
    """A damage: the checkpoint, loaded, changed and saved again."""
    def damage(path):
        change(checkpoint := train.load_checkpoint(path, "cpu"))
        torch.save(checkpoint, path)
    return damage


class Trap:
    """A pickle that creates a file when it is loaded carelessly."""

    def __reduce__(self):
        return open, ("trapped", "w")


BEGIN, RESUME = "train.py --preset debug --device cpu ", "train.py --resume --logdir run --device cpu "
EVALUATE, CANNOT = "evaluate.py run --episodes 1 --device cpu", "run/checkpoint.pt cannot be used: "


@pytest.mark.parametrize("command, damage, words", [
    (BEGIN + "--game pnog", None, "unknown game 'pnog'; nearest: pong"),
    (BEGIN + "--game xyz", None, "nearest: none; .*my_module:MyEnv-v0"),
    (BEGIN + "--game no_such:Game-v0", None, "--game no_such:Game-v0: importing no_such fails: Module"),
    (BEGIN + "--gmae pong", None, "error: unrecognized arguments: --gmae pong\n"),
    (BEGIN + "--batch_length 1", None, "--batch_length 1 is out of range: at least 2\n"),
    (BEGIN + "--model_lr nan", None, "--model_lr nan is out of range"),
    (BEGIN + "--steps 299", None, "--steps 299 ends before the first update, --warmup 300"),
    (BEGIN + "--state_size 12", None, "agent cannot be made: .*state_size 12.*multiple of"),
    (BEGIN + "--replay_size 240", None, "agent cannot be made: .*replay of .* steps cannot hold .* 16"),
    (BEGIN + "--device cuda:99", None, "--device cuda:99"),
    (BEGIN + "--device mps", None, "--device mps: only cpu and cuda can"),
    (BEGIN + "--logdir file/run", None, "Not a directory: 'file/run'"),
    (BEGIN + "--logdir full --resume", None, "full has files: change --logdir"),
    (BEGIN + "--logdir run", None, "run has files: add --resume or change --logdir"),
    (RESUME + "--levels 3", None, "--levels: the run has 2"),
    (RESUME, lambda path: path.write_bytes(path.read_bytes()[:9999]), CANNOT),
    (EVALUATE, lambda path: torch.save(Trap(), path), CANNOT + "UnpicklingError"),
    (EVALUATE, changed(lambda saved: saved["config"].update(levels=99)), CANNOT + ".*--levels 99"),
    (RESUME, changed(lambda saved: saved["config"].update(momentum=1)), CANNOT + "TypeError.*momentum"),
    (RESUME, changed(lambda saved: saved["config"].update(hidden=32)), CANNOT + "RuntimeError.*mismatch"),
    (RESUME, changed(lambda saved: saved.update(replay_totals=[2, 1])), CANNOT + ".*checkpoint needs 2"),
    (RESUME, changed(lambda saved: saved["env"].update(ale=np.zeros(9, np.uint8))), CANNOT),
    (RESUME, changed(lambda saved: saved.pop("optimisers")), "is an exported agent: it can be played"),
    (RESUME, lambda path: next(path.parent.glob("replay-0/*")).write_bytes(b""), CANNOT + ".* is damaged"),
    (RESUME, lambda path: next(path.parent.glob("replay-1/*")).unlink(), CANNOT + ".* up to step 0")],
    ids=lambda value: value[9:].replace(BEGIN[9:], "") if isinstance(value, str) else "")
def test_a_wrong_command_or_a_wrong_checkpoint_is_one_clear_line(command, damage, words, refused, saved_run,
                                                                 tmp_path):
    """A setting, name, directory or file that is wrong is named, with what would be right; nothing is
    written, and nothing in a checkpoint is executed."""
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("not a run")
    shutil.copytree(saved_run, tmp_path / "run")
    if damage:
        damage(tmp_path / "run" / "checkpoint.pt")
    line = refused(*command.split())
    assert re.search(words, line) and "weights_only" not in line, line


def test_games_may_be_spelled_as_people_do_and_need_their_rom(refused, monkeypatch, tmp_path):
    """Any spelling of a game finds it, others' names for it too; all 26 games of the benchmark are there. One
    whose ROM the emulator does not find is one clear line."""
    for spelling in ("ms_pacman", "MsPacman", "Ms-Pacman", "MS PACMAN", "ALE/MsPacman-v5", "MsPacman-v4",
                     "MsPacmanNoFrameskip-v4", "MsPacmanDeterministic-v0"):
        assert train.game_name(spelling) == "ms_pacman", spelling
    games = train.read_published()["human"]
    assert len(games) == 26 and all(train.game_name(game) == game for game in games)
    monkeypatch.setenv("ALE_ROMS_DIR", str(tmp_path))
    assert "pong cannot be made: " in refused("train.py", "--game", "pong", "--preset", "debug")


def test_a_second_process_is_refused(registered, refused, tmp_path, monkeypatch):
    """In the directory of a run, before it touches anything; the lock that a killed one leaves blocks nobody.
    --resume where there is nothing yet begins. ~ is the home folder."""
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setenv("HOME", str(tmp_path))
    command = ["--game", registered(), "--logdir=~/a run", *QUICK, "--resume"]
    (tmp_path / "a run").mkdir()
    with open(tmp_path / "a run" / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        assert "is in use" in refused("train.py", *command)
    assert train.main(command) == 0 and (tmp_path / "a run" / "evaluation.json").exists()


def test_a_score_is_on_the_disk_before_it_is_printed_and_a_run_keeps_its_settings(registered, tmp_path,
                                                                                  monkeypatch):
    """Whether a score can be written is known before it is played for. It survives an output that has gone
    away; when the run is extended, by no other flag than --steps, its file gets a name with its step. Where
    it cannot be written, the line says a command that works for any directory."""
    directory, calls = tmp_path / "it's a run", {}
    again = ["--logdir", str(directory), "--resume", "--steps"]
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr("builtins.print", lambda text: " after " in text and 1 / 0)
        train.main(["--game", registered(), *again[:2], *QUICK])
    first = json.loads((directory / "evaluation.json").read_text())
    assert train.main([*again, "70"]) == 0
    second = json.loads((directory / "evaluation.json").read_text())
    assert json.loads((directory / "evaluation-step60.json").read_text()) == first
    assert second["agent_steps"] == 70 and second["config"] == first["config"] | {"steps": 70}
    (directory / "evaluation.json.tmp").mkdir()
    spy(monkeypatch, train, "play", calls)
    words = re.escape(f"""{tmp_path}/it'"'"'s a run' --resume""")
    with pytest.raises(train.UsageError, match="checkpoint is intact.*--logdir '" + words):
        train.main([*again, "80"])
    assert not calls


# Atari.

class FakeGame:
    """An emulator whose frames are known. Left and right half of a screen are each of one shade, which rises
    and falls; as with real sprites, either is drawn on every other frame only."""

    def __init__(self, length=10 ** 9):
        self.length, self.shades = length, np.random.default_rng(0).integers(1, 256, (1000, 2))

    def reset(self, seed=None):
        self.frame, self.actions = -1, []
        return self.step(None)[0], {}

    def step(self, action):
        self.frame += 1
        self.actions.append(action)
        screen, half = np.zeros((210, 160, 3), np.uint8), self.frame % 2
        screen[:, 80 * half:80 * half + 80] = self.shades[self.frame % 1000, half]
        return screen, float(self.frame), self.frame == self.length, False, {}


def test_an_action_is_repeated_and_the_last_two_frames_are_seen():
    """One agent step is four frames with their rewards summed, or fewer where the game ends. Sprites drawn on
    alternate frames are all there, also those of the last frame; what was brighter earlier is not."""
    env = train.Atari("pong")
    env.game = game = FakeGame(203)
    env.reset(seed=1)
    while game.frame < 203:
        before = game.frame
        observation, reward, terminated, truncated, _ = env.step(3)
        last = min(before + 4, 203)
        assert game.frame == last and reward == sum(range(before + 1, last + 1))
        assert game.actions[before + 1:] == [3] * (last - before)
        assert (terminated, truncated) == (last == 203, False)
        for half in (0, 1):  # the one was drawn on the last frame, the other on the one before
            shade = game.shades[last if last % 2 == half else last - 1, half]
            assert (observation[:, 32 * half:32 * half + 32] == shade).all()


def test_an_episode_begins_with_0_to_30_no_ops_and_ends_after_108000_frames(monkeypatch):
    """As many no-ops as the environment's own random numbers say, each number occurs, and after an end among
    them the game is reset. The published limit, in frames of the emulator, no-ops included, truncates."""
    env, counts, ends = train.Atari("pong"), set(), (False, False)
    env.game = game = FakeGame()
    monkeypatch.setattr(train, "shrink", lambda image: None)
    for seed in [0] + 400 * [None]:
        env.reset(seed=seed)
        counts.add(env.frames)
        assert game.actions[1:] == [0] * env.frames
    assert counts == set(range(31))
    while not any(ends):
        ends = env.step(0)[2:4]
    assert ends == (False, True) and game.frame == 108_000
    game.length = 1  # it ends after a single frame
    env.reset()
    assert game.frame == 0 and env.screens[0] is env.screens[1]  # and not the old episode's


def test_screen_is_averaged_by_area():
    """Each of the 64x64 pixels is the mean of the screen over its area of 3.28 x 2.5 pixels, rounded."""
    screen = np.random.default_rng(0).integers(0, 256, (210, 160, 3), np.uint8)
    observation = train.shrink(screen)
    finer = screen.repeat(32, 0).repeat(2, 1)  # of which each area has 105 x 5 whole pixels
    assert np.abs(observation - finer.reshape(64, 105, 64, 5, 3).mean((1, 3))).max() <= 0.5 + 1e-3


def test_a_game_has_its_minimal_actions_none_sticks_and_restored_it_continues_bitwise():
    """A restored game shows the same frames, gives the same rewards, draws the same no-ops when reset."""
    (env, other), actions = map(train.Atari, 2 * ["breakout"]), np.random.default_rng(0).integers(4, size=40)
    assert env.action_space.n == 4 and env.game.ale.getFloat("repeat_action_probability") == 0
    env.reset(seed=3)
    for action in actions:
        env.step(action)
    other.set_state(env.get_state())
    for action in actions:
        one, two = env.step(action), other.step(action)
        assert (one[0] == two[0]).all() and one[1:] == two[1:]
    assert (env.reset()[0] == other.reset()[0]).all() and env.frames == other.frames


@slow
def test_all_games_play():
    """Each of the 104, whatever the size of its screen (some have 214, 220, 230 or 250 rows)."""
    envs = [train.make_env(game) for game in train.atari_games()]
    for env in envs:
        for seen in (env.reset()[0], env.step(env.action_space.n - 1)[0]):  # a seed would load it again
            assert env.observation_space.contains(seen), env.game.spec
    assert len(envs) == 104 and {210, 250} <= {len(env.screens[1]) for env in envs}


# Environments of other people.

def upright(shape, high=255):
    """An image, white above and black below, as renderers give it: its first row is the lowest in memory."""
    image = np.zeros(shape, np.uint8)
    image[shape[0] // 2:] = high
    return image[::-1]


@pytest.mark.parametrize("space, given, seen", [
    (Box(-9, 9, (2,), np.float64), np.array([1.5, -2]), [1.5, -2]), (Box(0, 9, (1,), np.int32), [7], [7]),
    (Box(-1, 1, (2,)), [1.0000002, -3], np.float32([1.0000002, -3])), (Box(0, 1, (1,)), 0.5, [0.5]),
    (Box(0, 1, ()), 0.25, [0.25]),
    (Box(0, 255, (2,), np.uint8), [0.5, 300], [0.5, 300]),
    (Discrete(4), 2, [0, 0, 1, 0]), (Discrete(4, start=-1), np.int64([2]), [0, 0, 0, 1]),
    (spaces.Tuple([Discrete(2), spaces.Dict(a=Box(0, 9, (1, 2)), b=spaces.MultiBinary([2, 1]))]),
     (1, {"a": [[7, 20.5]], "b": [[0], [1]]}), [0, 1, 7, 20.5, 0, 1]),
    *((Box(0, high, shape, np.uint8), upright(shape, high), upright((64, 64, 3))) for high in (1, 255)
      for shape in ((96, 96, 3), (210, 160, 3), (84, 84), (84, 84, 1), (30, 20, 3)))],
    ids=lambda value: str(value) if isinstance(value, spaces.Space) else "")
def test_spaces_of_all_kinds(registered, space, given, seen):
    """The agent gets vectors as float32, beyond their bounds too, choices as one-hot, all parts of a Dict or
    a Tuple, images of any size as 64x64 colours, as white as the space's brightest, and the preset that fits.
    It counts its actions from 0, the environment from its own. An episode without a limit has Atari's."""
    env = train.make_env(registered(observations=space, give=lambda env: given, actions=Discrete(3, start=5)))
    preset, dtype = ("cpu", np.uint8) if np.ndim(seen) > 1 else ("vector", np.float32)
    for observation in (env.reset(seed=0)[0], env.step(np.int64(2))[0]):
        assert observation.dtype == dtype and np.array_equal(observation, seen)
    assert env.observation_space.shape == observation.shape
    assert env.action_space == Discrete(3) and env.unwrapped.taken == [7]
    assert env.spec.max_episode_steps == 27_000
    assert train.make_config({"game": "Tiny-v0", "device": "cpu"}).preset == preset
    assert all(env.closed for env in Scripted.made[1:])


@pytest.mark.parametrize("limit, length", [(6, 6), (99, 10)])
def test_own_games_are_scored_and_a_time_limit_is_no_death(registered, tmp_path, capsys, limit, length):
    """A score has its error, 20 episodes of random play beside it, and all that it comes from, a commit once.
    Of a cut episode a run remembers the last step, and none that is terminal; of one that ended, both."""
    command = ["--game", registered(limit=limit), "--logdir", str(tmp_path), *QUICK]
    assert train.main(command) == train.main([*command, "--resume", "--steps", "61"]) == 0
    score = f"score {length}.0 +- 0.0 (standard error of 2 episodes); random play {length}.0 +- 0.0 (standard"
    assert f"Tiny-v0 after 61 steps: {score}" in capsys.readouterr().out
    for i in (0, 1):
        files = [dict(np.load(path)) for path in (tmp_path / f"replay-{i}").glob("*.npz")]
        last, terminal = (sum(file[name].sum() for file in files) for name in ("is_last", "is_terminal"))
        # The sixtieth step was lost with its episode when the run was resumed.
        assert last == 59 // length and terminal == (0 if limit == 6 else last)
    found = json.loads((tmp_path / "evaluation.json").read_text())
    assert found["random"] is found["human"] is found["human_normalised"] is None and found["failed"] == 0
    assert found["returns"] == 2 * [length] and found["random_measured"]["returns"] == 20 * [length]
    assert found["curve"] == [[step, length] for step in range(length, 60, length)]
    assert found["config"] == train.load_checkpoint(tmp_path / "checkpoint.pt", "cpu")["config"]
    assert found["trained_by"] == [found["commit"] + "+" * found["dirty"]] and found["agent_steps"] == 61


def test_a_module_of_ones_own(tmp_path, monkeypatch):
    """--game my_module:MyEnv-v0 imports the module from the working directory, wherever train.py is."""
    (tmp_path / "corridor.py").write_text(
        "import gymnasium\nfrom test_hieros import Scripted\ngymnasium.register('Corridor-v0', Scripted)\n")
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    monkeypatch.chdir(tmp_path)
    given, _ = train.parse_config(["--game", "corridor:Corridor-v0", "--device", "cpu"])
    config = train.make_config(given)
    assert config.logdir == "runs/corridor_Corridor-v0-0" and config.preset == "vector"
    assert train.make_env(config.game, render_mode="rgb_array").render_mode == "rgb_array"


def test_an_environment_that_cannot_be_saved_starts_a_new_episode(registered, tmp_path):
    """All else continues. Environments may draw from `random` and from NumPy's global numbers: a run of the
    same seed has the same ones again, and a run that was resumed has others."""
    def begun():
        run = train.Run(catch_config(tmp_path, seed=3), train.make_env(registered()))
        return run, (random.random(), np.random.random())

    (run, drawn), (other, again) = begun(), begun()
    for _ in range(3):
        run.play(0)
    run.step = 3
    run.save()
    other.restore(train.load_checkpoint(tmp_path / "checkpoint.pt", "cpu"))
    assert other.now["is_first"][0] and other.score == 0 and other.step == 3 and other.env.t == 0
    assert other.env.unwrapped.seed == 6 and drawn == again != (random.random(), np.random.random())


@pytest.mark.parametrize("quirk", [
    dict(give=lambda env: [1e3, -1e3, 0.5]), dict(info=object), dict(close=lambda env: 1 / 0),
    dict(reward=lambda env: np.array([1.0]), end=lambda flag: np.array([flag])), dict(reward=True),
    dict(made=lambda env: all(other.closed for other in Scripted.made) or 1 / 0)],
    ids=["outside its Box", "info", "close raises", "arrays", "bool", "one a process"])
def test_environments_are_taken_as_they_are(quirk, registered, tmp_path):
    """Whatever the agent has no need of may be wrong: a run trains, is scored, and closes all."""
    command = ["--game", registered(**quirk), "--logdir", str(tmp_path), *QUICK, "--preset", "auto"]
    assert train.main([*command, "--eval_episodes", "3", "--steps", "30"]) == 0
    assert json.loads((tmp_path / "evaluation.json").read_text())["returns"] == [10.0] * 3
    assert all(env.closed == 1 for env in Scripted.made)


@pytest.mark.parametrize("options, words", [
    (dict(observations=spaces.Dict(a=spaces.Sequence(Discrete(2)))), r"cannot be made: .*wrappers.*Dict\("),
    (dict(observations=spaces.Space((7, 7), np.uint8)), "cannot be made: .*Unknown space: .*Space"),
    (dict(observations=spaces.MultiBinary([4, 4]), give=lambda env: 9), "fails at step 0 .* reshape"),
    (dict(observations=Box(0, 1, (64, 64, 3))), r"cannot be made: .*images of uint8.*Transf.*float32\)"),
    (dict(observations=Box(0, 255, (3, 64, 64), np.uint8)), r"cannot be made: .*Box.*\(3, 64, 64\)"),
    (dict(observations=None), "cannot be made: .*no attribute 'observation_space'"),
    (dict(actions=Box(-1, 1, (2,))), r"cannot be made: .*TransformAction.* with Box\("),
    (dict(actions=Discrete(257)), r"cannot be made: .*up to 256.*Discrete\(257\)"),
    (dict(step=lambda env: env.t == 7 and 1 / 0), "fails at step 7 .* ZeroDivisionError, division by zero"),
    (dict(give=lambda env: [1.0, np.nan, 0]), "fails at step 0 .* not finite"),
    (dict(give=lambda env: [1.0, 0]), "fails at step 0 .* reshape"),
    (dict(reward=1e300), "fails at step 1 .* not finite"),
    (dict(reward="much"), "fails at step 1 .* ValueError"),
    *((dict(observations=Box(0, high, (8, 8), np.uint8), give=lambda env, value=value: [8 * [value]] * 8),
       "fails at step 0 .* scaled") for high, value in ((255, 0.9), (1, 2)))],
    ids=lambda value: value if isinstance(value, str) else "")
@pytest.mark.filterwarnings("ignore:overflow")
def test_an_environment_that_is_unsupported_or_fails_is_named(registered, tmp_path, capfd, options, words):
    """One line names the space, what is supported and what converts it; or, after the traceback, the step and
    what is wrong there, and a checkpoint that there is stays."""
    with pytest.raises(train.UsageError, match="Tiny-v0 " + words):
        train.main(["--game", registered(**options), "--logdir", str(tmp_path), *QUICK])
    assert ("Traceback" in capfd.readouterr().err) == ("fails" in words)
    assert all(env.closed for env in Scripted.made) or "attribute" in words or "Unknown" in words
    assert (tmp_path / "checkpoint.pt").exists() == bool(re.match("fails at step [17]", words))


def test_a_batch_is_what_the_replay_draws(tmp_path):
    """Each batch of a run holds the sequences of its own draw, though it lies where the last one lay."""
    train.train(run := train.Run(catch_config(tmp_path, steps=60, warmup=20), Catch()), progress=False)
    for _ in range(2):
        state = run.rng.bit_generator.state
        batch, run.rng.bit_generator.state = run.batch(0), state
        drawn = run.replays[0].sample(run.config.batch_size)
        assert all(np.array_equal(batch[name], drawn[name]) for name in drawn)


def test_episodes_before_a_failure_are_scored(registered, tmp_path, capfd):
    """Where an environment fails in the evaluation the episodes so far count, and are said to be fewer; if
    there are none, one line says so."""
    def score(**options):
        name = registered(step=lambda env: env.steps == 25 and 1 / 0, **options)
        config, file = catch_config(tmp_path, game=name), tmp_path / "score.json"
        return train.evaluation(config, None, vars(train.Run(config, train.make_env(name))), 32, 0, file)

    # 3 or 4 of each of ten environments
    assert "score 10.0 +- 0.0 (standard error of 20 episodes), 12 more failed" in score()
    error = capfd.readouterr().err
    assert "Traceback" in error and "Tiny-v0 fails at step 5 of an episode: ZeroDivisionError" in error
    with pytest.raises(train.UsageError, match="no episode came to its end"):
        score(lengths=itertools.repeat(99))


# The score.

def choosing(choose, told):
    """An agent for Catch or Scripted that notes what it is told, and chooses as `choose` says."""
    def act(memory, discretised, **now):
        told.append(now)
        return memory, [{"action": F.one_hot(torch.as_tensor(choose(now["observation"])), 3)}]
    return types.SimpleNamespace(initial_memory=lambda n: 0, discretise=list, act=act)


def test_scores_of_several_unequal_episodes(monkeypatch, registered):
    """Two environments play 17 and 16, every second one cut off, and each has its own seed: scores do not run
    on, surplus episodes do not count, and the agent is told of each start, each end and each reward. That
    there are no more than two is no obstacle."""
    lengths = np.random.default_rng(0).integers(1, 9, (2, 99)) * [[1], [3]]
    reset, seeds, told, scripts = Scripted.reset, [], [], iter(lengths.tolist())
    monkeypatch.setattr(Scripted, "reset", lambda env, *, seed, options: (
        seeds.append(seed) or reset(env, seed=seed)))
    name = registered(lambda: Scripted(lengths=next(scripts, None) or 1 / 0, cut=lambda episode: episode % 2))
    returns = train.play(choosing(lambda seen: [0, 0], told), name, 33, seed=5, progress=False)
    assert returns == [*lengths[0, :17], *lengths[1, :16]] and all(env.closed for env in Scripted.made)
    assert seeds[:2] == [5, 6] and set(seeds[2:]) == {None}
    told = {name: np.array([now[name] for now in told]) for name in told[0]}
    start = told["observation"][..., 0] == 0  # what it shows is its step
    assert (told["is_first"] == start).all() and (told["reward"] == ~start).all()
    for i, (last, terminal) in enumerate(zip(told["is_last"].T, told["is_terminal"].T)):
        ends = np.flatnonzero(last)
        assert len(ends) >= 15 and (np.diff(ends) == lengths[i, 1:len(ends)] + 1).all()
        assert (terminal[ends] == (np.arange(len(ends)) % 2 == 0)).all() and not terminal[~last].any()


def test_an_agent_is_scored_by_what_it_draws(registered):
    """Actions are drawn, not the likeliest: an untrained agent takes each as often; without one they are
    random. A seed gives the same scores, also where an environment draws from global random numbers."""
    for agent in (small(1, (3,), 2), None):
        train.play(agent, registered(), 40, progress=False)
        taken = [tuple(env.taken) for env in Scripted.made[-10:]]
        assert 0.4 < np.mean([*map(np.mean, taken)]) < 0.6 and len({*taken}) > 8
    name = registered(reward=lambda e: e.taken[-1] + random.random() + np.random.random())
    scores = [train.play(None, name, 2, seed=seed, progress=False) for seed in (0, 0, 1)]
    assert scores[0] == scores[1] != scores[2]
    perfect = choosing(lambda seen: 1 + np.sign(seen[:, :5].argmax(1) - seen[:, 5:10].argmax(1)), [])
    assert train.play(perfect, registered(Catch), 32, progress=False) == [3.0] * 32


@slow
def test_it_learns(tmp_path, registered):
    """Two levels learn Catch to 90% of the best return; an untrained agent is far below."""
    # Random play for a while first: an agent that has hardly ever seen a block caught in some column takes
    # that column for worthless, stays away from it, and so never learns better.
    run = train.Run(catch_config(tmp_path, levels=2, steps=4200, warmup=800, save_every=4200), Catch())
    scores = []
    for run.config.steps in (0, 2400, 3300, 4200):  # 2.98 of 3 after 2,400; it may take longer
        train.train(run, progress=False)
        scores.append(np.mean(train.play(run.agent, registered(Catch), 48, seed=1, progress=False)))
        if scores[-1] >= 0.9 * Catch.DROPS:
            break
    assert scores[0] < 1.0 and scores[-1] >= 0.9 * Catch.DROPS, scores


# ---- evaluate.py -------------------------------------------------------------------------------------------

def script(name):
    """A script of results/ as a module."""
    spec = importlib.util.spec_from_file_location(name, HERE / "results" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def untrained_run(directory, game="breakout", **settings):
    """A run that was saved in this directory before its first step."""
    settings = {"preset": "debug", "levels": 2, "device": "cpu"} | settings
    config = train.make_config(settings | {"game": game, "logdir": str(directory)})
    run = train.Run(config, train.make_env(game))
    run.save()
    return run


@pytest.fixture(scope="module")
def saved_run(tmp_path_factory):
    """The directory of a run that has just begun, to be copied."""
    run = untrained_run(tmp_path_factory.mktemp("saved") / "run")
    run.act()  # one step for every replay
    run.save()
    return run.directory


def write_result(path, given={}, **changes):
    """A result file as train.evaluation makes it, of a run with the `given` settings, its entries changed."""
    config = dataclasses.asdict(train.Config()) | {"preset": "paper", "device": "cpu"} | given
    entry = {name: config[name] for name in ("game", "preset", "levels", "seed")} | {
        "agent_steps": 100_000, "hours": 0.5, "returns": [1.0, 3.0], "curve": [[100, -21.0], [200, -20.0]],
        "config": config, "commit": "abc1234", "dirty": False, "trained_by": ["abc1234"]}
    path.write_text(json.dumps(entry | changes))
    return str(path)


def test_a_score_goes_to_a_file_of_its_own_before_it_is_printed(saved_run, tmp_path, monkeypatch, capsys):
    """It is of as many episodes and of the seed that were asked for, and in a file named after these even if
    the standard output has gone away; what training wrote stays."""
    shutil.copytree(saved_run, tmp_path / "run")
    path, played, before = tmp_path / "run" / "evaluation-step0-seed7-3.json", [], set(tmp_path.rglob("*"))
    monkeypatch.setattr(train, "play", lambda agent, game, episodes, seed: (
        played.append((torch.initial_seed(), seed)) or [1.0, 3.0, 8.0][:episodes]))
    command = [str(tmp_path / "run"), "--seed", "7", "--episodes", "3"]
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr("builtins.print", lambda *_: 1 / 0)
        evaluate.main(command)
    found = json.loads(path.read_text())
    assert played == [(7, 7)] and [found[name] for name in ("returns", "random", "human", "human_normalised")
                                   ] == [[1.0, 3.0, 8.0], 1.7, 30.5, 2.3 / 28.8]
    evaluate.main(command)
    assert re.search(f"breakout after 0 steps: score 4.0.*\nwritten to {path}", capsys.readouterr().out)
    assert set(tmp_path.rglob("*")) == before | {path}


def test_what_is_evaluated_are_the_weights_of_the_checkpoint(saved_run, tmp_path, refused):
    """A run's, and those of an exported agent: float16, without what only training needs. A checkpoint that
    lacks anything else is refused in one line."""
    saved, path = train.load_checkpoint(saved_run / "checkpoint.pt", "cpu"), tmp_path / "checkpoint.pt"
    saved["weights"] = {name: value + 1 for name, value in saved["weights"].items()}
    exported = {name: saved[name] for name in ("config", "step", "seconds", "curve", "commits")}
    exported["weights"] = {name: value.half() for name, value in saved["weights"].items()
                           if not re.search("critics|normaliser", name)}
    for content in (saved, exported):
        torch.save(content, path)
        weights = evaluate.load_run(tmp_path, "cpu")[1].state_dict()
        assert weights.keys() == content["weights"].keys()
        assert all(torch.equal(value, content["weights"][name].float()) for name, value in weights.items())
    del exported["weights"]["levels.0.actor.net.0.weight"]
    for content in (saved | {"weights": exported["weights"]}, exported):
        torch.save(content, path)
        assert "checkpoint.pt cannot be used: RuntimeError" in refused("evaluate.py", tmp_path)


MALFORMED = {"returns": []}, {"returns": [np.nan]}, {"preset": "fast"}, {"curve": [[1, 2, 3]]}, {"config": 3}


@pytest.mark.parametrize("command, says", [
    ("", "name one run"), ("run run", "name one run"), ("run --seed -1", "--seed -1"),
    ("run --episodes 0", "at least 1"), ("run --device mps", "--device mps"),
    ("nowhere", "nowhere/checkpoint.pt cannot be used: FileNotFoundError"),
    ("run --vidoe a.gif", "unrecognized arguments: --vidoe"), ("run --video a.mp4", "must end in .gif"),
    ("run --json run/checkpoint.pt", "end in .json"), ("run --video no/a.gif", "no/a.gif cannot be written"),
    ("--table a.json --json b.json", "are about one run"), ("--table run", "run cannot be read"),
    ("--table a.json a.json", "are the same run"), ("--table b.jsonl", "b.jsonl:2 is not a result"),
    *((f"--table {i}.json", f"{i}.json:1 is not a result") for i in range(len(MALFORMED)))])
def test_a_wrong_command_is_one_clear_line(saved_run, refused, tmp_path, command, says):
    """A command that cannot succeed says why, before anything is played; so does a malformed result."""
    line = Path(write_result(tmp_path / "a.json")).read_text()
    (tmp_path / "b.jsonl").write_text(f"{line}\n{line[:-9]}\n")
    for i, changes in enumerate(MALFORMED):
        write_result(tmp_path / f"{i}.json", **changes)
    (tmp_path / "run").symlink_to(saved_run)
    assert says in refused("evaluate.py", *command.split())


def test_subgoals_are_decoded_level_by_level():
    """A state of level 2 becomes pixels through level 1 and level 0: of each stacked observation the newest
    of the k states is taken, its z made one-hot, its h brought back from symlog."""
    agent, below = awake(small(levels=3, observation_shape=(64, 64, 3))), []
    for level in agent.levels[1:]:  # what its decoder is made to say: three states before, and this one
        z, h = onehot(torch.randint(8, (1, 8)), 8), 3 * torch.randn(1, 64)
        said = torch.cat([torch.randn(1, 3 * 128), 0.6 * z.flatten(1) + 0.1, symlog(h)], 1)
        level.world_model.decode = lambda z, h, said=said: said
        below.append((z, h))
    seen = agent.levels[0].world_model.decode(*below[0])[0]
    assert np.array_equal(evaluate.state_image(agent, 2, z, h), evaluate.image_bytes(seen))
    every = torch.arange(256).expand(3, 64, 256).unfold(-1, 64, 64).movedim(2, 0)  # all bytes come back
    assert np.array_equal(evaluate.image_bytes(every / 255), every.movedim(1, -1))


def record_film(monkeypatch, agent, env, **arguments):
    """What a film draws: [(title, [(image, captions) of each panel]) of each step]."""
    frames = []
    with monkeypatch.context() as patch, torch.inference_mode():
        patch.setattr(evaluate, "draw_frame", lambda title, panels: frames.append((title, panels)))
        patch.setattr(evaluate, "save_film", lambda path, frames: None)
        evaluate.film(agent, env, "pong", 0, "film.gif", **arguments)
    return frames


def test_film_draws_goals_and_dreams_from_their_states(monkeypatch, fixed_draws):
    """Level i's goal is drawn from its place in h-space and level i's z when level i + 1 chose it, and stands
    until that acts again; under it is the novelty of level i + 1's own h. A dream starts from the true state,
    and then it is told the actions and sees nothing."""
    agent, memories, drawn = small(3, (64, 64, 3), 6), [], []
    act, world = agent.act, agent.levels[0].world_model
    agent.act = lambda *args, **now: memories.append(act(*args, **now)) or memories[-1]
    for i, level in enumerate(agent.levels):
        level.autoencoder.loss = lambda h, i=i: (None, h.sum() + i)
    monkeypatch.setattr(evaluate, "state_image", lambda agent, *own: drawn.append(own) or len(drawn))
    film = record_film(monkeypatch, agent, train.Atari("pong"), steps=18, restart=6)
    for t, ((memory, ticks), (_, panels)) in enumerate(zip(memories, film)):
        assert t % 4 == 0 or panels[3:] == film[t - 1][1][3:]
        for i in (0, 1)[:len(ticks) - 1]:
            (level, z, h), held, own = drawn.pop(0), memory["levels"][i], ticks[i + 1]["state"].h
            g_h = agent.levels[i].autoencoder.decode(held["subgoal"].clone())
            assert level == i and z is held["z"] and torch.equal(h, g_h)
            assert f"novelty {own.sum() + i + 1:.3f}" in panels[3 + i][1][1]
        state = ticks[0]["state"]
        with torch.inference_mode():
            dream = state if t % 7 == 0 else world.imagine_step(dream, action, world.sequence.discretise())
        action = ticks[0]["action"]
        for (level, z, h), shown in zip((drawn.pop(0), drawn.pop(0)), (state, dream)):
            assert level == 0 and torch.equal(z, shown.z) and torch.equal(h, shown.h)


def test_every_game_can_be_filmed_or_one_line_says_why_not(saved_run, registered, tmp_path, monkeypatch):
    """A GIF of captioned panels or, where observations are numbers, of the environment's own frames, with the
    episode's score. Where there are none, or no pillow, this is said before anything is played."""
    Image = pytest.importorskip("PIL.Image")
    monkeypatch.setattr(evaluate.film, "__defaults__", (6, 45))  # steps, restart
    evaluate.main([str(saved_run), "--video", str(tmp_path / "a.gif")])
    with Image.open(tmp_path / "a.gif") as film:
        assert film.n_frames == 6 and film.size == (10 + 4 * 202, 264)
    env, agent = evaluate.film_env(registered()), small(1, (3,), 2)
    agent.levels[0].policy = lambda state, goal: torch.eye(2)[[1]]
    for t, (title, [(image, _)]) in enumerate(record_film(monkeypatch, agent, env, steps=20)):
        assert title.endswith(f"score {t % 11}") and (image == t % 11).all()  # it draws its step
    assert env.render_mode == "rgb_array" and set(env.unwrapped.taken) == {1}
    assert [bool(other.closed) for other in Scripted.made] == [True, False]
    monkeypatch.setattr(Scripted, "render", lambda self: None)
    with pytest.raises(train.UsageError, match="no film of Tiny-v0 .*NoneType"):
        evaluate.film_env("Tiny-v0")
    monkeypatch.setattr(evaluate, "evaluation", lambda *args: pytest.fail("played before it was known"))
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(train.UsageError, match="no film of breakout .*pillow"):
        evaluate.main([str(saved_run), "--video", str(tmp_path / "a.gif"), "--episodes", "2"])


def test_aggregates_and_intervals():
    """All games weigh the same, however many runs they have; the interquartile mean leaves out a quarter of
    all runs at each end. Published scores give the published aggregates; intervals are of 95%."""
    few, many = np.array([0.0, 0.2, 0.4, 0.6]), np.tile([0.8, 1.0, 1.4, 5.0], 3)
    assert np.allclose(evaluate.aggregate([few, many]), (2.35 / 2, 2.35 / 2, 2.8 / 4))
    assert np.allclose(evaluate.aggregate([[0.1], [0.2], [3.0]]), (1.1, 0.2, 1.1))  # a quarter of 3 is none
    for method, *known in (("SimPLe", 0.332, 0.134), ("SPR", 0.616, 0.396), ("BBF", 2.247, 0.917)):
        scores = evaluate.human_normalised(train.read_published()[method])
        assert len(scores) == 26
        assert np.allclose(evaluate.aggregate([*scores.values()])[:2], known, atol=6e-4)
    runs = np.random.default_rng(1).normal(size=400)
    ends = runs.mean() + np.array([-1.96, 1.96]) * runs.std() / 20
    assert np.allclose(evaluate.bootstrap([runs], 1000)[:, 0], ends, atol=0.015)


def test_table_says_what_it_knows(tmp_path, monkeypatch, capsys):
    """Each seed's score has the error of its own episodes. Aggregates are over the games that are there, for
    whoever knows all of these, with an interval where a game has several runs, redrawn within that game."""
    path, lines = tmp_path / "a.json", tmp_path / "b.jsonl"
    lines.write_text("\n".join(Path(write_result(path, given, **changes)).read_text() for given, changes in (
        ({"seed": 1}, {"returns": [0, 16]}), ({}, {"commit": "def5678"}),
        ({"game": "frostbite", "seed": 1}, {"returns": [2000]}),
        ({"game": "tennis"}, {"random_measured": {"mean": 6}}))))
    write_result(path, {"levels": 1}, returns=[7])
    evaluate.main(["--table", str(lines), str(path)])
    flat, full = re.sub(" +", " ", capsys.readouterr().out).split("### ")[1:]
    assert flat.startswith("preset paper, levels 1, agent_steps 100000\n\nCommits: abc1234.")
    assert "| pong | 7.0 ± - | 7.0 | 0.785 |" in flat and "95%" not in flat
    for text in ("Commits: abc1234, def5678.", "over 2 of the 26 games", "no interval shows: 1.",
                 "Not of Atari 100k, in no aggregate, random play measured here: tennis.",
                 "| game | seed 0 | seed 1 | mean | normalised | random* | human* | SimPLe* | DER* | CURL* |",
                 "| pong | 2.0 ± 1.0 | 8.0 ± 8.0 | 5.0 | 0.728 | -20.7 | 14.6 | 12.8 | -19.3 | -18.5 |",
                 "| frostbite | - | 2000.0 ± - |", "| tennis | 2.0 ± 1.0 | - | 2.0 | - | 6.0 | - |",
                 "| here | 0.591 |", "| 95% interval | 0.548 to 0.633 |", "| IRIS* | 0.523 |"):
        assert text in full, text
    assert "Hieros*" not in full  # whose score in Pong is not known
    monkeypatch.setattr(train, "__file__", str(tmp_path / "train.py"))  # without results/
    assert evaluate.main(["--table", str(path)]) == 0 and "SPR" not in capsys.readouterr().out


def test_only_seeds_are_averaged(tmp_path):
    """Every setting keeps two runs apart and is in the title, also one that a file lacks or that is gone; so
    do agent steps and changed code. In results/atari100k.jsonl only levels differ."""
    def titles(given={}, first={}, **changes):
        return [*evaluate.load_results([write_result(tmp_path / "a.json", **first),
                                        write_result(tmp_path / "b.json", {"seed": 1} | given, **changes)])]

    same = dict.fromkeys(("log_every", "save_every", "eval_episodes", "steps"), 7) | {"logdir": "runs/b"}
    assert titles(same) == ["preset paper, levels 3, agent_steps 100000"]
    config = dataclasses.asdict(train.Config())
    for name in config.keys() - same.keys() - {"game", "device", "seed"}:
        value = {"preset": "cpu", "precision": "float32"}.get(name) or config[name] + 1
        assert any(f"{name} {value}" in title for title in titles({name: value})), name
    del config["tau"]
    for changes in ({"trained_by": ["abc1234", "def5678+"]}, {"agent_steps": 50_000},
                    {"dirty": True}, {"given": {"gone": 1}}, {"config": config},
                    {"first": {"dirty": True}, "dirty": True, "commit": "def5678"}):
        assert len(titles(**changes)) == 2, changes
    kept = evaluate.load_results([HERE / "results" / "atari100k.jsonl"])
    assert [*kept] == [f"preset cpu, levels {levels}, agent_steps 100000" for levels in (1, 3)]


def test_two_groups_are_compared_by_pairs(tmp_path):
    """results/paired.py pairs runs of one game and seed, and each game counts once. Groups that differ in two
    settings, or share no run, are left alone."""
    paired = script("paired")
    assert [paired.sign_test(*n) for n in ((5, 0), (0, 5), (3, 3), (0, 0))] == [1 / 16, 1 / 16, 1, 1]
    runs = [("alien", 7, 7), ("boxing", 3, 5), ("hero", 1), ("krull", 1e3, 0), ("pong", 9, 0), ("pong", 5, 0)]
    files = [write_result(tmp_path / f"{seed}-{levels}.json", {"game": game, "seed": seed, "levels": levels},
                          returns=[score], hours=levels / 2)
             for seed, (game, *pair) in enumerate(runs) for levels, score in zip((3, 1), pair)]
    files.append(write_result(tmp_path / "a.json", {"levels": 1, "tau": 0.0, "seed": 4}))  # as a run of Pong
    flat, other, full = evaluate.load_results(files).values()
    title, signs, human, spr, hours = paired.compare(full, flat)
    assert title == "levels 3 against levels 1: 4 games, 5 pairs of runs"
    assert signs == "ahead in 2 games, behind in 1; two-sided sign test p = 1.000"
    assert hours.endswith("1.50 against 0.50")
    for line, units in ((human, [6899.9, 12, 1067.5, 35.3]), (spr, [614.09, 35.6, 2083.61, 15.29])):
        difference = np.array([0, -2, 1000, 7]) / units
        assert f" {difference.mean():+.3f} ± {difference.std(ddof=1) / 2:.3f} " in line, line
    assert not paired.compare(full, other) and not paired.compare(full, {"qbert": flat["pong"]})


def test_goals_are_measured_where_their_time_is_up(monkeypatch):
    """results/subgoals.py: a goal stands beside the state in which the next one is set, and so does another;
    one that was set at an episode's end counts for nothing; obeyed is what another goal changes."""
    subgoals, one, zero = script("subgoals"), torch.eye(4), torch.zeros(1)
    # An episode of goals 0, 1, 2 that ends when 2 is set, and another of 3 and 0. Here a code is its h.
    play = [({"is_first": np.array([first])}, {"levels": [{"subgoal": one[[goal]]}]},
             [{"state": subgoals.State(zero, one[:1, None], one[[h]], zero, zero, zero)}, None])
            for first, goal, h in ((True, 0, 2), (False, 1, 0), (False, 2, 0), (True, 3, 2), (False, 0, 3))]
    monkeypatch.setattr(subgoals, "rollout", lambda *_: play)
    level = types.SimpleNamespace(actor=lambda feature: (0.5 * feature[..., -4:] + 0.125)[:, None],
                                  autoencoder=types.SimpleNamespace(decode=lambda code: code))
    study, = subgoals.subgoal_study(types.SimpleNamespace(levels=[level, None]), None, 0)
    assert study == {"level": 0, "goals": 3, "obeyed": 0.5, "reached": 0.6667, "shuffled": 0.3333}


@slow
def test_a_level_remembers_what_lies_beyond_a_sequence_of_the_level_below(monkeypatch):
    """A cue pays 15 steps later: two sequences of level 0 with T = 8, and 5 ticks of level 1, which foresees
    in fresh episodes of random play which of them will pay (reward's loss 100 times as heavy)."""
    maze, n, names = script("memory"), 14, ("recent", "action", "reward", "is_first", "is_terminal")
    monkeypatch.setattr("world_model.TwoHot", maze.HeavyTwoHot)
    agent, rng = small(2, (6,), 2, model_lr=1e-3, encoder_lr=1e-3), np.random.default_rng(0)
    for level in agent.levels:
        level.world_model.encoder[-1].weight.data *= 10  # as in every preset: z says something from the start
    discretised, model = agent.discretise(), level.world_model

    def episodes(count):  # what level 1 learns from, (count,5,...)
        cue, arm, memory, steps = rng.integers(2, size=count), 0, agent.initial_memory(count), []
        for t in range(n + 2):
            first, end = np.full(count, t == 0), np.full(count, t > n)
            memory, ticks = agent.act(memory, maze.seen(t, n, cue, arm), end & (arm == cue), first, end, end,
                                      discretised)
            arm, steps = ticks[0]["action"].argmax(-1).numpy(), steps + ticks[1:]
        seen, *rest = (torch.stack([torch.as_tensor(step[name]) for step in steps], 1) for name in names)
        return seen.flatten(2), *rest

    for i in range(500):
        data = episodes(512) if i % 100 == 0 else data
        model.update_statistics(data[0])
        model.loss(*(field[64 * (i % 8):][:64] for field in data))[0].backward()
        level.optimisers["model"].step()
    assert maze.study(agent, n, 400, probed=False)[1]["recall"] > 0.9


def test_promises_are_compared_step_by_step(tmp_path, monkeypatch):
    """results/promises.py: n steps after a state, the dream's reward stands beside the game's of that step,
    `seen` beside that of its own; told the real actions, a model that knows what they bring is always right
    while an episode lasts; a tenth of training is one of its steps. Settings that have gone do not matter."""
    class Button(train.Atari):
        steps = 0
        def step(self, action):
            self.steps += 1
            return super().step(action)[0], float(action < 9), False, self.steps % 13 == 0, {}

    def imagine(self, start, policy, horizon):
        pressed = [policy(start)[:, :9].sum(1) for _ in range(horizon)]
        return State(*[torch.stack([start.reward, *pressed])] * 6), None

    run = untrained_run(tmp_path, "boxing", levels=1, gamma=0.9)
    run.step, run.config.gone, run.curve = 100, 0.0, [[80, 9.0], [81, 1.0], [90, 3.0], [91, 5.0], [100, 7.0]]
    monkeypatch.setattr(dataclasses, "asdict", lambda config: dict(vars(config)))
    run.save()
    monkeypatch.setattr(train, "make_env", Button)
    monkeypatch.setattr(WorldModel, "imagine", imagine)
    observe = WorldModel.observe_step  # what came with a frame is known by the action before it
    monkeypatch.setattr(WorldModel, "observe_step", lambda self, x, z, action, *others: observe(
        self, x, z, action, *others)._replace(reward=action[:, :9].sum(1)))
    found = script("promises").measure(tmp_path, 200)
    assert found["told_ahead"] == pytest.approx(dict.fromkeys((1, 2, 3, 5, 10), 1)) and found["step"] == 100
    assert found["seen"] == pytest.approx(1) and max(map(abs, found["dreamt_ahead"].values())) < 0.4
    assert found["tenth_before"] == [2, 1] and found["last_tenth"] == [6, 1]


def test_an_exported_agent_is_small_and_plays_as_before(tmp_path):
    """results/export.py: an unfinished run is one clear line; else what playing needs, in half the bytes, and
    the score. Numbers too large for float16 stay."""
    run, export, small = untrained_run(tmp_path / "run", "boxing"), script("export"), tmp_path / "small"
    with pytest.raises(train.UsageError, match="evaluation.json is missing"):
        export.main(tmp_path / "run", small)
    (tmp_path / "run" / "evaluation.json").write_text("{}")
    awake(run.agent).levels[0].world_model.mean += 1e6
    run.save()
    export.main(tmp_path / "run", small)
    _, agent, past = evaluate.load_run(small, "cpu")
    assert past["step"] == 0 and sorted(os.listdir(small)) == ["checkpoint.pt", "evaluation.json"]
    before, halved = run.agent.state_dict(), {name: p.half() for name, p in agent.named_parameters()}
    for name, value in agent.state_dict().items():
        assert torch.equal(value, before.pop(name).half().float() if name in halved else before.pop(name))
    assert {name.split(".")[2] for name in before} == {"critics", "slow_critics", "normaliser"}
    size = sum(p.nbytes for p in halved.values()) + sum(b.nbytes for b in agent.buffers())
    assert (small / "checkpoint.pt").stat().st_size < size + 100_000
    assert len(list(evaluate.rollout(agent, train.make_env("boxing"), 5, seed=0))) == 5


def test_keys_play_the_game_or_the_dream(tmp_path, monkeypatch):
    """results/play.py on no screen: awake, keys play the game and the model is told what was done; with
    closed eyes they reach the dream alone, and the game waits. R dreams the same again, A lets the agent
    play. A press counts for a step at least, and ends with its release."""
    pygame, _ = (pytest.importorskip(name) for name in ("pygame", "PIL"))
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    untrained_run(tmp_path, "pong", levels=3)
    play, done, seen, begun = script("play"), [], [], []

    def noted(where, name, action):
        original = getattr(where, name)
        monkeypatch.setattr(where, name, lambda self, *args: (
            done.append((name, action(*args))), original(self, *args))[1])

    noted(train.Atari, "step", lambda action: action)
    noted(WorldModel, "observe_step", lambda x, z, a, *_: int(a.argmax()) if a.shape == (1, 6) else None)
    noted(WorldModel, "imagine_step", lambda state, a, _: begun.append(state) or int(a.argmax()))
    policy, draw = Level.policy, play.Mind.draw
    noop, go_right, fire_right, fire_left = 0, 2, 4, 5
    monkeypatch.setattr(Level, "policy", lambda level, *args: (
        onehot(torch.tensor([fire_left]), 6) if level.action_shape == (1, 6) else policy(level, *args)))
    down, up, right, space = pygame.KEYDOWN, pygame.KEYUP, pygame.K_RIGHT, pygame.K_SPACE
    keys = iter([  # pressed after each picture
        [(down, right), (down, space)], [], [(up, space)], [(up, right), (down, pygame.K_TAB)],
        [(down, right), (up, right)], [(down, pygame.K_a)], [(down, pygame.K_a), (down, pygame.K_r)],
        [(down, pygame.K_RETURN)], [(pygame.QUIT, 0)]])

    def drawn(mind):
        seen.append((mind, len(mind.dream), mind.dream[-2:-1]))
        for kind, key in next(keys):
            pygame.event.post(pygame.event.Event(kind, key=key))
        return draw(mind)

    monkeypatch.setattr(play.Mind, "draw", drawn)
    play.main(tmp_path)
    pygame.quit()
    (mind, *_), lengths, befores = zip(*seen)
    assert lengths == (0, 0, 0, 0, 2, 3, 4, 2, 0)  # states dreamed, with the one in which it began
    assert all(state is before for state, before in zip(begun, sum(befores, []), strict=True))
    awake_steps = [(name, action) for action in (noop, fire_right, fire_right, go_right)
                   for name in ("step", "observe_step")]
    assert [each for each in done if each[1] is not None] == [
        ("observe_step", noop), *awake_steps, *[("imagine_step", action) for action in (
            noop, go_right, fire_left, noop)], ("step", noop), ("observe_step", noop)]


def test_every_script_of_results_says_how_it_is_run():
    """Its docstring has its command, and the modules have what it imports from them."""
    for path in (HERE / "results").glob("*.py"):
        tree = ast.parse(path.read_text("utf-8"))
        assert f"python results/{path.name}" in ast.get_docstring(tree), path.name
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (HERE / f"{node.module}.py").exists():
                module = importlib.import_module(node.module)
                assert not [each.name for each in node.names if not hasattr(module, each.name)], path.name
