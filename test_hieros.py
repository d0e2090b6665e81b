"""The claims of this project, each a test: `pytest test_hieros.py`. A group a module; docstrings say what.

`-m "not slow"` takes about a minute. `-m gpu` runs what needs a CUDA device and is skipped without one.
"""

import ast
import copy
import dataclasses
import functools
import importlib.util
import inspect
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
import threading
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
from hierarchy import (Actor, Level, Optimiser, ReturnNormaliser, SubgoalAutoencoder, cosine_max,
                       lambda_return, onehot, small)
from replay import Replay, etbs_cdf, replacing
from s5 import S5Block, S5Layer, S5Stack, complex_view, hippo_n, scan, scan_sequential
from world_model import (Patches, State, TwoHot, WorldModel, entropy, kl_balance, log_prob, sample_onehot,
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


# ------------------------------------------------------------------------------------------------------------
# s5.py
# ------------------------------------------------------------------------------------------------------------

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


@pytest.mark.parametrize("memory", [16, 64])
def test_states_are_as_large_within_a_training_sequence_as_ever_after(memory):
    """White input of unit variance drives every state to a variance near one. `memory` steps from zero reach
    86% of it, so acting over whole episodes meets no larger states than training has shown."""
    layer = S5Layer(64, 128, memory)
    missing = layer.discretise()[0].abs() ** (2 * memory)  # share of its variance that a state lacks by then
    assert np.exp(-4) < missing.max() < np.exp(-2) + 1e-5  # the slowest state needs all of the sequence
    _, x = layer(torch.randn(8, 2000, 64), torch.zeros(8, 2000, dtype=torch.bool))
    variance = x[:, 500:].abs().square().mean((0, 1)).detach()
    assert 0.7 < variance.median() < 1.4 and variance.max() < 2


def test_the_recurrence_stays_float32_under_bfloat16():
    """Rounding errors add up in a recurrence: inside autocast the stack computes what it does outside."""
    stack, u, reset = S5Stack(12, 16, 2, 64), torch.randn(3, 9, 12), some_resets(3, 9)
    m, x = stack(u, reset)
    m_t, x_t = stack.step(u[:, 0], x[:, 0], stack.discretise())
    with torch.autocast("cpu", torch.bfloat16):
        inside = *stack(u, reset), *stack.step(u[:, 0], x[:, 0], stack.discretise())
    assert all(torch.equal(*pair) for pair in zip(inside, (m, x, m_t, x_t)))


# ------------------------------------------------------------------------------------------------------------
# world_model.py
# ------------------------------------------------------------------------------------------------------------

TINY = dict(stoch=4, classes=8, hidden=32, state_size=16, s5_layers=2, memory=64, units=32, mlp_layers=1,
            depth=4, first_stride=4, sharpness=1.0, kl_warmup=0, decoded=1.0, scaled=False)
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
    """100 in one case of ten is 10, the expected reward, not what is usual; bfloat16 does not round it."""
    twohot, (rare, usual) = TwoHot(), twohot_codes(torch.tensor([100.0, 0.0]))
    logits = (0.1 * rare + 0.9 * usual).clamp(min=1e-30).log().float()
    with torch.autocast("cpu", torch.bfloat16):
        coarse = twohot.mean(logits)
    assert abs(coarse.item() - 10) < 1e-4 and torch.equal(coarse, twohot.mean(logits))


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


# ------------------------------------------------------------------------------------------------------------
# hierarchy.py
# ------------------------------------------------------------------------------------------------------------

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
    for update in range(800):
        scale = normaliser.update(returns if update < 200 else returns / 2)
    assert scale.tolist() == pytest.approx([90.0, 0.1], rel=0.01)  # what was long ago is forgotten


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
            total = sum(step["reward"] for e, u, step, _ in ticks if e == episode and u <= t)
            assert total == t * (t + 1) / 2


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
    for name in ("is_first", "is_last", "is_terminal"):
        batch[name] = torch.zeros(B, T, dtype=torch.bool, device=device)
    return batch


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
    for module in (level.actor, level.critics, level.slow_critics):  # the slow ones differ
        for p in module.parameters():
            p.data += torch.randn_like(p)
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


def preferred(rewards, paid, updates=60, **behaviour):
    """Actions 0 and 1, which end a dream, are tried equally often and pay what `paid` says, of each reward.
    Returns how likely a tabular level then takes action 0, and its values."""
    level, features = tabular((1, 2), rewards, actor_lr=0.1, **behaviour)
    start, action = features(torch.zeros(8, dtype=torch.long)), torch.arange(8) % 2
    reward = torch.tensor(paid)[action][None]  # (1,8,R)
    for _ in range(updates):
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


# ------------------------------------------------------------------------------------------------------------
# replay.py
# ------------------------------------------------------------------------------------------------------------

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
    for t in range(73):
        replay.add({"t": t})
        if t % 7 == 6 or t in (30, 31):
            files = set(tmp_path.iterdir())
            replay.save(tmp_path)
            replay.prune(tmp_path)
            assert len(set(tmp_path.iterdir()) - files) == 1 and len(list(tmp_path.iterdir())) <= 5
            drawn = loaded(t + 1).sample(50)["t"]
            assert (drawn == counting_replay(20, 5, steps=t + 1).sample(50)["t"]).all()
    replay.save(tmp_path)  # steps 70, 71, 72: their checkpoint never came, and the run goes on from step 70
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


# ------------------------------------------------------------------------------------------------------------
# On a GPU: `pytest test_hieros.py -m gpu`. Where a CPU can stand in for it, it does, as a test of the test
# ------------------------------------------------------------------------------------------------------------

GPU = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(),
                                                                      reason="no CUDA device")])
on_devices = pytest.mark.parametrize("device", ["cpu", GPU])
in_precisions = pytest.mark.parametrize("precision", ["float32", "tf32", "bf16"])


@pytest.fixture
def agent_on(tmp_path):
    """A function that makes agent and Config for a device; what it says of TF32 is taken back in the end."""
    def make(device, **settings):
        config = train.make_config(dict(game="pong", preset="debug", device=device) | settings)
        spaces = types.SimpleNamespace(observation_space=train.IMAGE, action_space=Discrete(3))
        return awake(train.make_agent(config, spaces)), config

    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield make
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize("device", [GPU])
def test_an_update_on_the_gpu_is_the_cpus(device, agent_on, fixed_draws):
    """From the same weights and batch an update of each level has the CPU's losses and gradients, to 1e-3."""
    reference, _ = agent_on("cpu", precision="float32", starts=64)
    agent, _ = agent_on(device, precision="float32", starts=64)
    agent.load_state_dict(reference.state_dict())
    for i, level in enumerate(reference.levels):
        found = agent.levels[i].update(batch_of(agent, i, device=device))
        for name, value in level.update(batch_of(reference, i)).items():
            assert torch.allclose(found[name].cpu(), value, rtol=1e-3, atol=1e-3), (i, name)
        for name, optimiser in level.optimisers.items():  # Adam's first mean is a tenth of the gradient
            gradient, other = (torch.cat([o.adam.state[p]["exp_avg"].flatten().cpu() for p in o.parameters])
                               for o in (optimiser, agent.levels[i].optimisers[name]))
            assert (gradient - other).norm() <= 1e-3 * gradient.norm(), (i, name)


@on_devices
@in_precisions
def test_in_any_precision_an_update_changes_every_network_and_dreams_know_it(device, precision, agent_on,
                                                                            monkeypatch):
    """No network is left without a gradient, and imagination uses the weights of after the model's step. TF32
    is allowed only where it was chosen."""
    agent, config = agent_on(device, precision=precision, levels=2, model_lr=1e-2)
    assert torch.backends.cuda.matmul.allow_tf32 is torch.backends.cudnn.allow_tf32 is (precision == "tf32")
    before = parameters_of(agent)
    for i, level in enumerate(agent.levels):
        calls, model = {}, level.world_model
        spy(monkeypatch, model, "imagine", calls)
        with train.autocast(config):
            level.update(batch_of(agent, i, device=device))
        (start, _, _), (imagined, actions) = calls["imagine"]
        with train.autocast(config), torch.no_grad():
            h = model.sequence_step(start.x, start.z, actions[0], model.sequence.discretise())[2]
        assert torch.allclose(imagined.h[1], h, atol=1e-3)
    for name, p in agent.named_parameters():
        assert (p != before[name]).any(), name


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=slow), GPU])
def test_a_checkpoint_changes_its_device(device, tmp_path):
    """A run that was saved on a GPU goes on on a CPU with the same weights, and back."""
    there = train.Run(catch_config(tmp_path, device=device, starts=32, steps=120), Catch())
    train.train(there, progress=False)
    for steps, other in ((140, "cpu"), (160, device)):
        here = train.Run(catch_config(tmp_path, device=other, starts=32, steps=steps), Catch())
        here.restore(train.load_checkpoint(tmp_path / "checkpoint.pt", other))
        for (name, p), q in zip(here.agent.state_dict().items(), there.agent.state_dict().values()):
            assert torch.equal(p.cpu(), q.cpu()) and p.device.type == other, name
        train.train(here, progress=False)
        assert here.step == steps and min(here.updates) > 0
        there = here


@pytest.mark.parametrize("device", [GPU])
@in_precisions
def test_no_update_waits_for_the_gpu(device, precision, agent_on):
    """From batch to metrics nothing synchronises: the CPU can prepare while the GPU computes."""
    agent, config = agent_on(device, precision=precision)
    batches = [batch_of(agent, i, device=device) for i in range(3)]
    try:
        for mode in ("default", "error"):  # the first update may wait: for compiled kernels, for memory
            torch.cuda.set_sync_debug_mode(mode)
            for level, batch in zip(agent.levels, batches):
                with train.autocast(config):
                    level.update(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_devices
@in_precisions
def test_a_recorded_update_is_the_update(device, precision, agent_on):
    """Four updates, the later ones played back from a CUDA graph, have the losses of four that are not and
    move the weights as far: with new batches, new random numbers and what Adam knows by then."""
    losses, moved = [], []
    for wrap in (lambda update: update, train.Recorded):
        torch.manual_seed(0)
        agent, config = agent_on(device, precision=precision, levels=2)
        first, updates = copy.deepcopy(agent.state_dict()), [wrap(level.update) for level in agent.levels]
        torch.manual_seed(0)
        for shift, (i, update) in itertools.product(range(4), enumerate(updates)):
            batch = batch_of(agent, i, device=device).items()
            with train.autocast(config):
                found = update({name: value.roll(shift, 1) for name, value in batch})
            losses.append(torch.stack([value.float() for value in found.values()]).cpu())
        moved.append(torch.cat([(value - first[name]).float().flatten().cpu()
                                for name, value in agent.state_dict().items()]))
    assert all(torch.allclose(*pair, rtol=1e-2, atol=1e-2) for pair in zip(losses, losses[len(losses) // 2:]))
    assert (moved[0] - moved[1]).norm() <= 0.1 * moved[0].norm()


# ------------------------------------------------------------------------------------------------------------
# train.py
# ------------------------------------------------------------------------------------------------------------

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
                 cut=lambda episode: False, end=bool, render_mode=None, **faults):
        if not faults.keys() <= {"made", "step", "close"}:
            raise TypeError(f"unexpected {faults}")
        given = dict(observation_space=observations, action_space=actions, render_mode=render_mode)
        vars(self).update({name: value for name, value in given.items() if value is not None})
        self.reward, self.give, self.info, self.end, self.faults = reward, give, info, end, faults
        self.lengths, self.cut, self.episode, self.steps, self.taken = iter(lengths), cut, -1, 0, []
        self.fault("made")
        self.closed = False
        self.made.append(self)

    def fault(self, name):
        self.faults.get(name, lambda env: None)(self)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.seed, self.t, self.number = seed, 0, self.np_random.random()
        self.length, self.episode = next(self.lengths), self.episode + 1
        return self.give(self), self.info()

    def step(self, action):
        self.t, self.steps = self.t + 1, self.steps + 1
        self.taken.append(action)
        self.fault("step")
        last, cut = self.t >= self.length, self.cut(self.episode)
        reward = self.reward(self) if callable(self.reward) else self.reward
        return self.give(self), reward, self.end(last and not cut), self.end(last and cut), self.info()

    def render(self):
        return np.full((40, 60, 3), self.t, np.uint8)

    def close(self):
        self.closed = True
        self.fault("close")


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


# A run.

@slow
def test_resumed_run_is_bitwise_the_undisturbed_one(tmp_path):
    """Stop at a checkpoint, start with all new objects, resume: metrics and weights are the same bits. What
    is kept of the layers between steps belongs to the present weights, level by level."""
    whole = train.Run(catch_config(tmp_path / "whole", starts=32), Catch())
    train.train(whole, progress=False)
    first = train.Run(catch_config(tmp_path / "parts", starts=32, steps=200), Catch())
    train.train(first, progress=False)
    config = catch_config(tmp_path / "parts", starts=32, seed=1)  # whatever it starts from is replaced
    second = train.Run(config, Catch())
    second.restore(train.load_checkpoint(tmp_path / "parts" / "checkpoint.pt", "cpu"))
    assert second.step == 200
    for kept, present in zip(second.discretised, first.agent.discretise()):
        assert all(map(torch.equal, itertools.chain(*kept), itertools.chain(*present)))
    train.train(second, progress=False)
    assert metrics_of(tmp_path / "whole") == metrics_of(tmp_path / "parts")
    assert second.curve == whole.curve and second.updates == whole.updates and min(whole.updates) > 0
    for name, value in whole.agent.state_dict().items():
        assert torch.equal(value, second.agent.state_dict()[name]), name
    for kept, present in zip(whole.discretised, whole.agent.discretise()):
        assert all(map(torch.equal, itertools.chain(*kept), itertools.chain(*present)))
    before, whole.step = list(whole.discretised), 402  # a multiple of train_every, not of train_every * k
    whole.learn()
    assert whole.discretised[0] is not before[0] and whole.discretised[1] is before[1]
    # Scores, lengths, losses and speed stand under the names that users of DreamerV3 know, a line a level.
    lines = [json.loads(line) for line in whole.metrics.read_text().splitlines()]
    assert {line["episode/length"] for line in lines if "episode/score" in line} == {Catch.ROWS * Catch.DROPS}
    common = {f"train/{name}" for name in (
        "loss/vector", "loss/rew", "loss/con", "loss/dyn", "loss/policy", "loss/value_extrinsic", "rep_ent",
        "dyn_ent", "ent/action", "adv_std", "rew/extrinsic", "ret/extrinsic", "val/extrinsic")}
    assert {line["level"] for line in lines if common <= line.keys()} == {0, 1}
    times = [(100 / line["fps/policy"], line["seconds/total"]) for line in lines if "fps/policy" in line]
    assert np.allclose(np.cumsum(times, 0)[:, 0], np.array(times)[:, 1])


@slow
def test_killed_at_any_moment_a_run_ends_as_if_undisturbed(tmp_path):
    """SIGKILL at random moments, resume, again and again: in the end every line of metrics.jsonl is there
    exactly once and the weights are bitwise those of a run that nobody killed."""
    def start(name, *flags):
        command = [sys.executable, "train.py", "--logdir", str(tmp_path / name), "--device", "cpu", *flags]
        return subprocess.Popen(command, cwd=HERE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    flags = ("--game breakout --preset debug --steps 450 --warmup 200 --save_every 30 --log_every 50"
             " --eval_episodes 1").split()
    assert start("whole", *flags).wait() == 0
    checkpoint, kills = tmp_path / "killed" / "checkpoint.pt", 0
    for delay in np.random.default_rng(0).uniform(0.1, 1.5, 3):
        process = start("killed", *flags)
        before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        while process.poll() is None and not (checkpoint.exists() and checkpoint.stat().st_mtime_ns > before):
            time.sleep(0.01)  # a first checkpoint of this process, so that every round gets further
        time.sleep(delay)
        kills += process.poll() is None
        process.kill()
        process.wait()
        flags = ["--resume"]
    assert start("killed", "--resume").wait() == 0
    assert kills and metrics_of(tmp_path / "killed") == metrics_of(tmp_path / "whole")
    whole, killed = (train.load_checkpoint(tmp_path / name / "checkpoint.pt", "cpu")["weights"]
                     for name in ("whole", "killed"))
    assert all(torch.equal(whole[name], killed[name]) for name in whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_save_first_and_the_second_ends_at_once(number, registered, tmp_path, monkeypatch, capfd):
    """Ctrl+C, SIGTERM and a closed terminal save the run and say how to continue it; continued, it ends with
    a score. A second one ends a game that hangs; but a terminal may say twice that it is closed, and to a run
    under nohup that is no matter."""
    pending = []

    def send(env):
        while pending and env.steps == 30:
            os.kill(os.getpid(), pending.pop())

    command = ["--game", registered(step=send), "--logdir", str(tmp_path / "run"), *QUICK]
    before, pending[:] = signal.getsignal(number), [number]
    assert train.main(command) == 128 + number and signal.getsignal(number) is before
    assert "stopped at step 30, saved; continue with: python train.py --logdir" in capfd.readouterr().out
    assert train.load_checkpoint(tmp_path / "run" / "checkpoint.pt", "cpu")["step"] == 30
    assert train.main([*command, "--resume"]) == 0
    monkeypatch.setattr(os, "_exit", lambda code: (_ for _ in ()).throw(SystemExit(code)))
    pending[:], again = [number, number], [*command, "--resume", "--steps", "120"]
    if number == signal.SIGHUP:
        assert train.main(again) == 128 + number
        monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_IGN)
        assert train.main(again) == 0
    else:
        with pytest.raises(SystemExit, match=str(128 + number)):
            train.main(again)
        assert "ended at once" in capfd.readouterr().err


@slow
def test_a_full_disk_leaves_the_checkpoint_intact(registered, tmp_path, monkeypatch):
    """When a checkpoint cannot be written, the one before stays whole, and one line says what to do."""
    resource = pytest.importorskip("resource")  # not on Windows
    limits, save = resource.getrlimit(resource.RLIMIT_FSIZE), train.Run.save
    command = ["--game", registered(), "--logdir", str(tmp_path), *QUICK]
    with monkeypatch.context() as patch, pytest.raises(train.UsageError) as error:
        # At step 40 the system begins to refuse that a file grows beyond 100 kB.
        patch.setattr(train.Run, "save", lambda run: (run.step == 40 and resource.setrlimit(
            resource.RLIMIT_FSIZE, (100_000, limits[1]))) or save(run))
        try:
            train.main(command)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert re.search("File too large.*checkpoint is intact.*--resume", str(error.value))
    assert len(list((tmp_path / "replay-0").glob("*.npz"))) == 2  # the second is of no checkpoint
    assert train.load_checkpoint(tmp_path / "checkpoint.pt", "cpu")["step"] == 20
    assert train.main([*command, "--resume"]) == 0


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


@slow
@pytest.mark.parametrize("lengths", [
    itertools.repeat(1), [10 ** 9], np.random.default_rng(0).geometric(0.1, 200)],
    ids=["of one step", "endless", "of random lengths"])
def test_a_run_survives_odd_episodes(lengths, registered, tmp_path):
    """Episodes of one step, of any length, without an end, every second cut by a time limit; rings wrapped
    many times; levels that have too little to learn from yet: all rewards and ends reach all replays, no
    sequence is torn, and level i is updated every train_every k^i steps once it holds one sequence."""
    config = catch_config(tmp_path, levels=3, k=2, steps=150, warmup=0, train_every=4, batch_size=4,
                          batch_length=6, replay_size=24, starts=8, horizon=3)
    name = registered(lengths=lengths, reward=lambda env: float(env.steps), cut=lambda episode: episode % 2)
    run, stored = train.Run(config, train.make_env(name)), [[] for _ in range(3)]
    for replay, steps in zip(run.replays, stored):
        def add(step, add=replay.add, steps=steps):
            steps.append(step | {"at": run.step})
            add(step)
        replay.add = add
    train.train(run, progress=False)
    for i, (replay, steps) in enumerate(zip(run.replays, stored)):
        field = {name: np.array([step[name] for step in steps]) for name in steps[0]}
        ends = np.flatnonzero(field["is_last"])
        assert (np.flatnonzero(field["is_first"]) == np.append(0, ends + 1)[:field["is_first"].sum()]).all()
        assert (field["is_terminal"][ends] == (np.arange(len(ends)) % 2 == 0)).all()
        rewards = [rewards.sum() for rewards in np.split(field["reward"], ends + 1)[:len(ends)]]
        assert rewards == [score for _, score in run.curve][:len(ends)] and len(ends) == len(run.curve)
        sequences = np.lib.stride_tricks.sliding_window_view(field["reward"][-replay.capacity:], 6)
        assert set(map(tuple, replay.sample(100)["reward"])) <= set(map(tuple, sequences))
        stride = 4 * 2 ** i
        assert run.updates[i] == sum((field["at"] < step).sum() >= 6 for step in range(stride, 151, stride))
    assert run.replays[0].total > 6 * run.replays[0].capacity


def test_every_setting_is_read(registered, tmp_path, monkeypatch):
    """No setting is without effect: a run asks for each, or the constructors of a level do. No other name is
    in a preset, and all presets pass the checks."""
    asked = {name for kind in (Level, WorldModel) for name in inspect.signature(kind).parameters}

    class Asked(train.Config):
        def __getattribute__(self, name):
            asked.add(name)
            return super().__getattribute__(name)

    monkeypatch.setattr(train, "Config", Asked)
    assert train.main(["--game", registered(), "--logdir", str(tmp_path), *QUICK, "--warmup", "1"]) == 0
    names = {field.name for field in dataclasses.fields(Asked)}
    # The weights of rewards are read by the names of the rewards.
    assert names - asked == {"extrinsic_weight", "subgoal_weight", "novelty_weight"}
    for name, preset in train.PRESETS.items():
        assert preset.keys() <= names and train.make_config({"preset": name, "device": "cpu"}).preset == name


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


def changed(**entries):
    """A damage: a checkpoint with other entries; config_... are those of its settings."""
    def damage(path):
        checkpoint = torch.load(path, weights_only=True)
        settings = {name[7:]: value for name, value in entries.items() if name.startswith("config_")}
        checkpoint["config"] |= settings
        torch.save(checkpoint | {name: entries[name] for name in entries if name[7:] not in settings}, path)
    return damage


class Trap:
    """A pickle that creates a file when it is loaded carelessly."""

    def __reduce__(self):
        return open, ("trapped", "w")


BEGIN, RESUME = "train.py --preset debug --device cpu ", "train.py --resume --logdir run --device cpu "
EVALUATE = "evaluate.py run --episodes 1 --device cpu"


@pytest.mark.parametrize("command, damage, words", [
    (BEGIN + "--game pnog", None, "unknown game 'pnog'; nearest: pong"),
    (BEGIN + "--game CartPole-v7", None, "nearest: CartPole-v1"),
    (BEGIN + "--game xyz", None, "nearest: none; .*my_module:MyEnv-v0"),
    (BEGIN + "--game no_such:Game-v0", None, "--game no_such:Game-v0: importing no_such fails: Module"),
    (BEGIN + "--game json:Game-v0", None, "unknown game 'json:Game-v0'"),
    (BEGIN + "--gmae pong", None, "unrecognized arguments: --gmae pong; --help"),
    (BEGIN + "--logdir", None, "--logdir: expected one argument"),
    (BEGIN + "--preset quick", None, "--preset: invalid choice: 'quick'"),
    (BEGIN + "--batch_length 1", None, "--batch_length 1 is out of range: at least 2\n"),
    (BEGIN + "--subgoal_classes 256", None, "--subgoal_classes 256 is out of range: 2 to 255"),
    (BEGIN + "--model_lr nan", None, "--model_lr nan is out of range"),
    (BEGIN + "--model_lr inf", None, "--model_lr inf is out of range"),
    (BEGIN + "--steps many", None, "--steps: invalid int value: 'many'"),
    (BEGIN + "--steps 299", None, "--steps 299 ends before the first update, at --warmup 300"),
    (BEGIN + "--state_size 12", None, "agent cannot be made: .*state_size 12.*multiple of"),
    (BEGIN + "--replay_size 240", None, "agent cannot be made: .*replay of .* steps cannot hold .* 16"),
    (BEGIN + "--replay_size 1000000000000", None, "agent cannot be made: .*Unable to allocate"),
    (BEGIN + "--device cuda:99", None, "--device cuda:99"),
    (BEGIN + "--device mps", None, "--device mps: only cpu and cuda can"),
    (BEGIN + "--logdir file/run", None, "--logdir file/run .*NotADirectoryError"),
    (BEGIN + "--logdir /proc/run", None, "--logdir /proc/run"),
    (BEGIN + "--logdir full", None, "full has other files and no checkpoint.pt: choose another --logdir"),
    (BEGIN + "--logdir full --resume", None, "full has other files and no checkpoint.pt"),
    (BEGIN + "--logdir run", None, "run already exists: add --resume"),
    (RESUME + "--levels 3", None, "--levels: the run has 2"),
    (RESUME + "--game boxing", None, "--game: the run has breakout"),
    (RESUME, lambda path: path.write_bytes(b"no checkpoint"), "run/checkpoint.pt cannot be used: "),
    (RESUME, lambda path: path.write_bytes(path.read_bytes()[:9999]), "run/checkpoint.pt cannot be used: "),
    (RESUME, lambda path: torch.save(Trap(), path), "run/checkpoint.pt cannot be used: UnpicklingError"),
    (EVALUATE, lambda path: torch.save(Trap(), path), "run/checkpoint.pt cannot be used: UnpicklingError"),
    (EVALUATE, changed(config_levels=99), "run/checkpoint.pt cannot be used: .*--levels 99"),
    (RESUME, changed(config_momentum=1), "run/checkpoint.pt cannot be used: TypeError.*momentum"),
    (RESUME, changed(config_hidden=32), "run/checkpoint.pt cannot be used: RuntimeError.*size mismatch"),
    (RESUME, changed(replay_totals=[2, 1]), "run/checkpoint.pt cannot be used: .*the checkpoint needs 2"),
    (RESUME, changed(optimisers=[3]), "run/checkpoint.pt cannot be used: AttributeError"),
    (RESUME, changed(env={"ale": np.zeros(9, np.uint8), "rng": {}}), "run/checkpoint.pt cannot be used: "),
    (RESUME, lambda path: torch.save({n: v for n, v in torch.load(path, weights_only=True).items()
                                      if n != "optimisers"}, path), "is an exported agent: it can be played"),
    (RESUME, lambda path: path.with_name("replay-0").joinpath("000000000-000000001.npz").write_bytes(b"ring"),
     "run/checkpoint.pt cannot be used: ValueError, run/replay-0.* is damaged"),
    (RESUME, lambda path: path.with_name("replay-1").joinpath("000000000-000000001.npz").unlink(),
     "run/checkpoint.pt cannot be used: ValueError, run/replay-1 holds the replay up to step 0")],
    ids=lambda value: value[9:].replace(BEGIN[9:], "") if isinstance(value, str) else "")
def test_what_a_user_can_mend_is_one_clear_line(command, damage, words, refused, saved_run, tmp_path):
    """A wrong command, setting, name, directory or file is named, with what would be right; nothing is
    written, and nothing in a checkpoint is executed."""
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("not a run")
    shutil.copytree(saved_run, tmp_path / "run")
    if damage:
        damage(tmp_path / "run" / "checkpoint.pt")
    line = refused(*command.split())
    assert re.search(words, line) and "weights_only" not in line, line


def test_a_game_without_its_rom_is_one_clear_line(refused, monkeypatch, tmp_path):
    """Where the emulator finds no ROM of a game that it knows, that is said."""
    monkeypatch.setenv("ALE_ROMS_DIR", str(tmp_path))
    assert "pong cannot be made: " in refused("train.py", "--game", "pong", "--preset", "debug")


@pytest.mark.parametrize("spelling", ["ms_pacman", "MsPacman", "Ms-Pacman", "MS PACMAN", "ALE/MsPacman-v5",
                                      "MsPacmanNoFrameskip-v4", "MsPacmanDeterministic-v0", "MsPacman-v4"])
def test_games_may_be_spelled_as_people_do(spelling):
    """Any spelling of a game finds it, others' names for it too; all 26 games of the benchmark are there."""
    assert train.game_name(spelling) == "ms_pacman"
    assert len(train.REFERENCE) == 26 and all(train.game_name(game) == game for game in train.REFERENCE)


@slow
def test_a_closed_output_costs_no_score(tmp_path):
    """With standard output and error closed a run trains to its end, writes its score and exits with 0."""
    command = [sys.executable, "train.py", "--game", "CartPole-v1", "--logdir", str(tmp_path / "run"), *QUICK]
    assert subprocess.run(["sh", "-c", 'exec "$@" >&- 2>&-', "sh", *command], cwd=HERE).returncode == 0
    assert len(json.loads((tmp_path / "run" / "evaluation.json").read_text())["returns"]) == 2


def test_a_run_directory_is_for_one_run(registered, refused, tmp_path, monkeypatch):
    """The very same command works again after a first save that met a full disk, with or without --resume;
    --resume where there is nothing yet begins. A second process is refused before it touches anything; the
    lock that a killed one leaves blocks nobody. ~ is the home folder."""
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setenv("HOME", str(tmp_path))
    for flags in ([], ["--resume"]):
        command = ["--game", registered(), f"--logdir=~/run {len(flags)}", *QUICK, *flags]
        directory = tmp_path / f"run {len(flags)}"
        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
            patch.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
            train.main(command)
        assert (directory / "checkpoint.pt.tmp").exists() and not (directory / "checkpoint.pt").exists()
        with open(directory / "lock") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            assert "is in use" in refused("train.py", *command)
        assert train.main(command) == 0 and metrics_of(directory)[0]["step"] == 10
        (directory / "checkpoint.pt").unlink()  # there is a result: more than such remains
        assert "has other files and no checkpoint.pt" in refused("train.py", *command)
    assert not (tmp_path / "~").exists()


def test_a_score_is_on_the_disk_before_it_is_printed_and_is_kept(registered, tmp_path, monkeypatch):
    """Whether a score can be written is known before it is played for. It survives an output that has gone
    away; when the run is extended, its file gets a name with its step. Where it cannot be written, the line
    says a command that works for any directory."""
    directory, played, evaluation = tmp_path / "it's a run", [], train.evaluation
    command = ["--game", registered(), "--logdir", str(directory), *QUICK]
    monkeypatch.setattr(train, "evaluation", lambda *given: played.append(0) or evaluation(*given))
    with monkeypatch.context() as patch, pytest.raises(BrokenPipeError):
        patch.setattr(train, "report", lambda _: (_ for _ in ()).throw(BrokenPipeError(32, "gone")))
        train.main(command)
    first = (directory / "evaluation.json").read_text()
    assert train.main([*command, "--resume", "--steps", "70"]) == 0 and len(played) == 2
    assert (directory / "evaluation-step60.json").read_text() == first
    assert json.loads((directory / "evaluation.json").read_text())["agent_steps"] == 70
    (directory / "evaluation.json.tmp").mkdir()
    again = re.escape(f"""{tmp_path}/it'"'"'s a run' --resume""")
    with pytest.raises(train.UsageError, match="checkpoint is intact.*--logdir '" + again):
        train.main([*command, "--resume", "--steps", "80"])
    assert len(played) == 2


# Atari.

class FakeGame:
    """An emulator whose frames are known. Left and right half of a screen are each of one shade, which rises
    and falls; as with real sprites, either is drawn on every other frame only."""

    SHADES = np.random.default_rng(0).integers(1, 256, (1000, 2))

    def __init__(self, length=10 ** 9):
        self.length, self.frame, self.actions = length, 0, []

    def screen(self):
        screen, half = np.zeros((210, 160, 3), np.uint8), self.frame % 2
        screen[:, 80 * half:80 * half + 80] = self.SHADES[self.frame % 1000, half]
        return screen

    def reset(self, seed=None):
        self.frame, self.actions = 0, []
        return self.screen(), {}

    def step(self, action):
        self.frame += 1
        self.actions.append(int(action))
        return self.screen(), float(self.frame), self.frame == self.length, False, {}


def fake_atari(**options):
    env = train.Atari("pong")
    env.game = FakeGame(**options)
    return env


def test_an_action_is_repeated_and_the_last_two_frames_are_seen():
    """One agent step is four frames with their rewards summed, or fewer where the game ends. Sprites drawn on
    alternate frames are all there, also those of the last frame; what was brighter earlier is not."""
    env = fake_atari(length=203)
    env.reset(seed=1)
    terminated, steps = False, 0
    while not terminated:
        before, steps = env.game.frame, steps + 1
        observation, reward, terminated, truncated, _ = env.step(3)
        last = env.game.frame
        assert last == min(before + 4, 203) and reward == sum(range(before + 1, last + 1)) and not truncated
        assert env.game.actions[before - last:] == [3] * (last - before) and terminated == (last == 203)
        for half in (0, 1):  # the one was drawn on the last frame, the other on the one before
            shade = env.game.SHADES[(last if last % 2 == half else last - 1) % 1000, half]
            assert (observation[:, 32 * half:32 * half + 32] == shade).all()
    assert steps > 40


def test_an_episode_begins_with_0_to_30_no_ops_and_ends_after_108000_frames(monkeypatch):
    """As many no-ops as the environment's own random numbers say, each number occurs, and after an end among
    them the game is reset. The published limit, in frames of the emulator, no-ops included, truncates."""
    env, counts = fake_atari(), []
    monkeypatch.setattr(train, "shrink", lambda image: None)
    env.reset(seed=0)
    for _ in range(400):
        env.reset()
        counts.append(len(env.game.actions))
        assert set(env.game.actions) <= {0} and env.frames == counts[-1]
    assert set(counts) == set(range(31))
    ends, steps = (False, False), 0
    while not any(ends):
        ends, steps = env.step(0)[2:4], steps + 1
    assert ends == (False, True) and env.game.frame == 108_000 and 27_000 - 8 <= steps <= 27_000
    env.game.length = 1  # it ends after a single frame
    env.reset()
    assert env.game.frame == 0 and env.screens[0] is env.screens[1]  # and not the old episode's


def test_screen_is_averaged_by_area():
    """Each of the 64x64 pixels is the mean of the screen over its area of 3.28 x 2.5 pixels, rounded, in
    float32 also where the agent beside it computes in bfloat16."""
    screen = np.random.default_rng(0).integers(0, 256, (210, 160, 3), np.uint8)
    with torch.autocast("cpu", torch.bfloat16):
        observation = train.shrink(screen)
    assert observation.shape == (64, 64, 3) and observation.dtype == np.uint8
    for row, column in ((0, 0), (5, 7), (31, 32), (50, 13), (63, 63)):
        top, left = row * 210 / 64, column * 160 / 64
        rows = [max(0, min(top + 210 / 64, r + 1) - max(top, r)) for r in range(210)]
        columns = [max(0, min(left + 2.5, c + 1) - max(left, c)) for c in range(160)]
        mean = np.einsum("r,c,rcd->d", rows, columns, screen.astype(float)) / (210 / 64 * 2.5)
        assert np.abs(observation[row, column] - mean).max() <= 0.5 + 1e-3


def test_emulator_continues_bitwise_after_it_is_restored():
    """A restored game shows the same frames, gives the same rewards, draws the same no-ops when reset."""
    env, other = train.Atari("breakout"), train.Atari("breakout")
    env.reset(seed=3)
    actions = np.random.default_rng(0).integers(4, size=60)
    for action in actions[:20]:
        env.step(action)
    other.set_state(env.get_state())
    for action in actions[20:]:
        a, b = env.step(action), other.step(action)
        assert (a[0] == b[0]).all() and a[1:4] == b[1:4]
    assert (env.reset()[0] == other.reset()[0]).all() and env.frames == other.frames


@pytest.mark.parametrize("game, actions", [("pong", 6), ("breakout", 4), ("freeway", 3), ("boxing", 18)])
def test_minimal_actions_and_none_of_them_sticks(game, actions):
    """The agent chooses among the actions that the game has, and its choice is what the game gets."""
    env = train.make_env(game)
    assert env.action_space.n == actions == len(env.game.ale.getMinimalActionSet())
    assert env.game.ale.getFloat("repeat_action_probability") == 0 and env.game.ale.getInt("frame_skip") == 1


@slow
def test_all_games_play():
    """Each of the 104, whatever the size of its screen (some have 214, 220, 230 or 250 rows)."""
    rows = set()
    assert len(train.atari_games()) == 104
    for game in train.atari_games():
        env = train.make_env(game)
        assert env.observation_space.contains(env.reset()[0]), game  # a seed would load it again
        assert env.observation_space.contains(env.step(env.action_space.n - 1)[0]), game
        rows.add(len(env.screens[1]))
    assert {210, 250} <= rows


# Environments of other people.

@pytest.mark.parametrize("space, given, seen", [
    (Box(-9, 9, (2,), np.float64), np.array([1.5, -2]), [1.5, -2]), (Box(0, 9, (1,), np.int32), [7], [7]),
    (Box(-1, 1, (2,)), [1.0000002, -3], np.float32([1.0000002, -3]).tolist()),
    (Box(0, 255, (2,), np.uint8), [0.5, 300], [0.5, 300]), (Box(0, 1, (1,)), 0.5, [0.5]),
    (Discrete(4), 2, [0, 0, 1, 0]), (Discrete(4, start=-1), np.int64([2]), [0, 0, 0, 1])], ids=str)
def test_vectors_of_all_kinds_reach_the_agent(registered, space, given, seen):
    """Boxes of one axis as float32, beyond their bounds too; Discrete as one-hot. `auto` is then `vector`."""
    env = train.make_env(registered(observations=space, give=lambda env: given))
    for observation in (env.reset(seed=0)[0], env.step(0)[0]):
        assert observation.dtype == np.float32 and observation.tolist() == seen
        assert env.observation_space.shape == observation.shape
    assert train.make_config({"game": "Tiny-v0", "device": "cpu"}).preset == "vector"
    assert all(env.closed for env in Scripted.made[1:])


@pytest.mark.parametrize("shape", [(96, 96, 3), (210, 160, 3), (84, 84), (84, 84, 1), (30, 20, 3)])
@pytest.mark.parametrize("high", [255, 1])
def test_images_of_any_size_reach_the_agent(registered, shape, high):
    """As 64x64 colours, averaged by the code that Atari uses; what the space calls the brightest is white."""
    image = np.zeros(shape, np.uint8)
    image[shape[0] // 2:] = high
    image = image[::-1]  # as renderers give it, whose first row is the lowest
    env = train.make_env(registered(observations=Box(0, high, shape, np.uint8), give=lambda env: image))
    for observation in (env.reset(seed=0)[0], env.step(1)[0]):
        assert observation.shape == (64, 64, 3) and observation.dtype == np.uint8
        assert (observation[:32] == 255).all() and (observation[32:] == 0).all()
    assert train.make_config({"game": "Tiny-v0", "device": "cpu"}).preset == "cpu"


@pytest.mark.parametrize("options, words", [
    (dict(observations=spaces.Dict({"a": Discrete(2)})), ["Dict(", "FlattenObservation"]),
    (dict(observations=spaces.MultiBinary(3)), ["MultiBinary(3)", "FlattenObservation"]),
    (dict(observations=Box(0, 1, (4, 4))), ["Box(", "FlattenObservation"]),
    (dict(observations=Box(0, 1, (64, 64, 3))), ["float32", "images of uint8", "TransformObservation"]),
    (dict(observations=Box(0, 255, (3, 64, 64), np.uint8)), ["(3, 64, 64)", "TransformObservation"]),
    (dict(observations=None), ["observations None"]), (dict(actions=None), ["actions None"]),
    (dict(actions=Box(-1, 1, (2,))), ["actions Box(", "TransformAction"]),
    (dict(actions=Discrete(257)), ["actions Discrete(257)", "up to 256"]),
    (dict(nonsense=1), ["Tiny-v0 cannot be made: TypeError", "nonsense"])])
def test_unsupported_spaces_are_one_clear_line(registered, refused, options, words):
    """The line names the space found, what is supported and the wrapper that converts it."""
    line = refused("train.py", "--game", registered(**options))
    assert all(word in line for word in ["Tiny-v0", *words]), line
    assert all(env.closed for env in Scripted.made)


def test_actions_may_start_anywhere_and_every_episode_has_a_limit(registered):
    """The environment gets its own numbers, the agent counts from 0. A time limit cuts an episode without
    ending it, with its last observation and reward; without one it is Atari's."""
    env = train.make_env(registered(limit=3, actions=Discrete(3, start=5)))
    env.reset(seed=0)
    steps = [env.step(np.int64(action)) for action in range(3)]
    assert env.action_space == Discrete(3) and env.unwrapped.taken == [5, 6, 7]
    assert [step[2:4] for step in steps] == [(False, False)] * 2 + [(False, True)]
    assert steps[-1][0][0] == 3 and steps[-1][1] == 1
    assert train.make_env(registered()).spec.max_episode_steps == 27_000


@pytest.mark.parametrize("limit, ends", [(6, 0), (99, 2)])
def test_a_time_limit_is_no_death(registered, tmp_path, limit, ends):
    """Of an episode that was cut a run remembers the last step, and none that is terminal; of one that
    ended, both. A run goes on under the same commit without naming it twice."""
    command = ["--game", registered(limit=limit), "--logdir", str(tmp_path / "run"), *QUICK]
    assert train.main([*command, "--steps", "25"]) == train.main([*command, "--resume", "--steps", "26"]) == 0
    for i in (0, 1):
        files = [dict(np.load(path)) for path in (tmp_path / "run" / f"replay-{i}").glob("*.npz")]
        last, terminal = (sum(file[name].sum() for file in files) for name in ("is_last", "is_terminal"))
        assert terminal == ends and last == 24 // min(limit, 10)
    checkpoint = train.load_checkpoint(tmp_path / "run" / "checkpoint.pt", "cpu")
    assert checkpoint["commits"] == [train.origin()["commit"] + "+" * train.origin()["dirty"]]


def test_a_module_of_ones_own(tmp_path, monkeypatch, refused):
    """--game my_module:MyEnv-v0 imports the module from the working directory, wherever train.py is."""
    (tmp_path / "corridor.py").write_text(
        "import gymnasium\nfrom test_hieros import Scripted\ngymnasium.register('Corridor-v0', Scripted)\n")
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    config = train.make_config({"game": "corridor:Corridor-v0", "device": "cpu"})
    assert (config.game, config.preset) == ("corridor:Corridor-v0", "vector")
    given, _ = train.parse_config(["--game", "corridor:Corridor-v0", "--seed", "3"])
    assert given["logdir"] == "runs/corridor_Corridor-v0-3"
    env = train.make_env(config.game, render_mode="rgb_array")
    env.reset(seed=0)
    assert env.render().shape == (40, 60, 3) and train.make_env(config.game).render_mode is None
    assert "nearest: Corridor-v0" in refused("train.py", "--game", "corridor:Coridor-v0")


def test_own_games_are_scored_beside_random_play(registered, tmp_path, capsys):
    """A run of one ends with mean, error and episodes, and with 20 episodes of random play from the same
    evaluation; its result says all that is known of where it comes from."""
    assert train.main(["--game", registered(limit=6), "--logdir", str(tmp_path), *QUICK]) == 0
    said = capsys.readouterr().out
    assert "score 6.0 +- 0.0 (2 episodes); random play 6.0 +- 0.0 (20 episodes)" in said
    found = json.loads((tmp_path / "evaluation.json").read_text())
    assert found["random"] is found["human"] is found["human_normalised"] is None and found["failed"] == 0
    assert found["random_measured"]["returns"] == [6.0] * 20 and found["returns"] == [6.0, 6.0]
    config = train.load_checkpoint(tmp_path / "checkpoint.pt", "cpu")["config"]
    assert found["config"] == config and config["game"] == "Tiny-v0" and config["precision"] == "tf32"
    assert found["versions"].keys() == {"python", "torch", "gymnasium", "ale-py", "numpy"}
    assert found["evaluation_seed"] == 0 and found["device"] == "cpu" and found["agent_steps"] == 60
    assert found["trained_by"] == [found["commit"] + "+" * found["dirty"]] and found["hours"] >= 0
    assert found["curve"] == [[6 * i, 6.0] for i in range(1, 10)] and "command" in found


def test_an_environment_that_cannot_be_saved_starts_a_new_episode(registered, tmp_path):
    """All else continues, and what it draws is none of what it drew before."""
    config = train.make_config({"preset": "debug", "game": registered(), "device": "cpu", "seed": 3,
                                "logdir": str(tmp_path)})
    run, other = (train.Run(config, train.make_env("Tiny-v0")) for _ in range(2))
    drawn = random.random(), np.random.random()
    run.play(0)
    run.step = 3
    run.save()
    other.restore(train.load_checkpoint(tmp_path / "checkpoint.pt", "cpu"))
    assert other.now["is_first"][0] and other.score == 0 and other.step == 3 and other.env.t == 0
    assert other.env.unwrapped.seed == 6 and drawn != (random.random(), np.random.random())


def only_one(env):
    if not all(other.closed for other in Scripted.made):
        raise RuntimeError("one at a time")


class Untouchable:
    """An `info` that raises, whatever is done with it."""

    def __getattribute__(self, name):
        raise RuntimeError(f"info is asked for {name}")


def helped(env):
    env.over = threading.Event()
    threading.Thread(target=env.over.wait, name="helper").start()


@pytest.mark.parametrize("quirk", [
    dict(give=lambda env: [1e3, -1e3, 0.5]), dict(info=Untouchable), dict(close=lambda env: 1 / 0),
    dict(reward=lambda env: np.array([1.0]), end=lambda flag: np.array([flag])), dict(reward=True),
    dict(made=only_one), dict(made=helped, close=lambda env: env.over.set())],
    ids=["outside its Box", "info", "close raises", "arrays", "bool", "one a process", "a thread of its own"])
def test_environments_are_taken_as_they_are(quirk, registered, tmp_path):
    """Whatever the agent has no need of may be wrong: a run trains, is scored, and closes all, so that the
    process can end."""
    command = ["--game", registered(**quirk), "--logdir", str(tmp_path), *QUICK, "--preset", "auto"]
    assert train.main([*command, "--eval_episodes", "3", "--steps", "30"]) == 0
    assert json.loads((tmp_path / "evaluation.json").read_text())["returns"] == [10.0] * 3
    assert all(env.closed for env in Scripted.made)
    assert not [thread for thread in threading.enumerate() if thread.name == "helper"]


@pytest.mark.parametrize("options, words", [
    (dict(step=lambda env: env.t == 7 and 1 / 0), "step 7 .* ZeroDivisionError, division by zero"),
    (dict(give=lambda env: [1.0, np.nan, 0]), "step 0 .* not finite"),
    (dict(give=lambda env: [1.0, 0]), "step 0 .* reshape"), (dict(reward=1e300), "step 1 .* not finite"),
    (dict(reward="much"), "step 1 .* ValueError"),
    (dict(observations=Box(0, 255, (8, 8), np.uint8), give=lambda env: [[0.9] * 8] * 8), "step 0 .* scaled"),
    (dict(observations=Box(0, 1, (8, 8), np.uint8), give=lambda env: [[2] * 8] * 8), "step 0 .* scaled")],
    ids=lambda value: value if isinstance(value, str) else "")
@pytest.mark.filterwarnings("ignore:overflow")
def test_an_environment_that_fails_is_named_after_its_traceback(registered, tmp_path, capfd, options, words):
    """One line with the environment, the step and what is wrong; a checkpoint that there is stays."""
    with pytest.raises(train.UsageError, match=f"Tiny-v0 fails at {words}"):
        train.main(["--game", registered(**options), "--logdir", str(tmp_path), *QUICK])
    assert "Traceback" in capfd.readouterr().err and Scripted.made[-1].closed
    assert "step 0" in words or train.load_checkpoint(tmp_path / "checkpoint.pt", "cpu")["step"] == 0


def test_episodes_before_a_failure_are_scored(registered, tmp_path, capfd):
    """Where an environment fails in the evaluation the episodes so far count, and are said to be fewer; if
    there are none, one line says so."""
    command = ["--game", registered(step=lambda env: env.steps == 25 and 1 / 0), *QUICK, "--steps", "20"]
    assert train.main([*command, "--logdir", str(tmp_path / "run"), "--eval_episodes", "17"]) == 0
    out, error = capfd.readouterr()
    assert "(2 episodes), 15 more failed" in out and "Traceback" in error
    assert "Tiny-v0 fails at step 5 of an episode: ZeroDivisionError, division by zero\n" in error
    found = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert found["returns"] == [10.0, 10.0] and found["failed"] == 15
    registered(lengths=itertools.repeat(99), step=lambda env: env.steps == 25 and 1 / 0)
    with pytest.raises(train.UsageError, match="no episode came to its end; the last checkpoint is intact"):
        train.main([*command, "--logdir", str(tmp_path / "other")])


def test_seeds_are_those_of_global_random_numbers_too(registered, tmp_path):
    """An environment that draws from `random` or from NumPy's global numbers gives the same run again."""
    name = registered(reward=lambda env: random.random() + np.random.random())
    make = functools.partial(train.make_env, name)
    played = [train.play(None, make, 2, seed=seed, progress=False) for seed in (0, 0, 1)]
    assert played[0] == played[1] != played[2]
    rewards = []
    for seed in (0, 0, 1):
        run = train.Run(catch_config(tmp_path, seed=seed), make())
        run.play(0)
        rewards.append(run.score)
    assert rewards[0] == rewards[1] != rewards[2]


# The score.

class Chooser:
    """An agent that notes what it is told, and chooses as `choose` says."""

    def __init__(self, choose=lambda observation: np.zeros(len(observation), int)):
        self.choose, self.told = choose, []

    def initial_memory(self, n):
        return 0

    def discretise(self):
        return []

    def act(self, memory, observation, reward, is_first, is_last, is_terminal, discretised):
        self.told.append([observation[:, 0], reward, is_first, is_last, is_terminal])
        return memory + 1, [{"action": F.one_hot(torch.as_tensor(self.choose(observation)), 3)}]


def perfect(observation):
    """Perfect play of Catch."""
    return 1 + np.sign(observation[:, :5].argmax(1) - observation[:, 5:10].argmax(1))


def test_scores_of_several_unequal_episodes(monkeypatch):
    """Two environments of 17 episodes each, of unequal lengths, every second one cut off: scores do not run
    on, unfinished and surplus episodes do not count, each environment has a seed of its own, and the agent is
    told of each start, each end and each reward."""
    lengths = np.random.default_rng(0).integers(1, 9, (2, 99)) * [[1], [3]]
    monkeypatch.setattr(Scripted, "made", [])
    agent, reset = Chooser(), Scripted.reset
    seeds, scripts = [], iter(lengths)
    monkeypatch.setattr(Scripted, "reset", lambda env, seed=None: (
        seeds.append(seed) or reset(env, seed=seed)))
    returns = train.play(agent, lambda: Scripted(lengths=next(scripts), cut=lambda episode: episode % 2), 34,
                         seed=5, progress=False)
    assert returns == lengths[:, :17].flatten().tolist() and all(env.closed for env in Scripted.made)
    assert seeds[:2] == [5, 6] and set(seeds[2:]) == {None}
    step, reward, first, last, terminal = map(np.array, zip(*agent.told))
    assert (first == (step == 0)).all() and (reward == (step > 0)).all()
    for i in range(2):
        ends = np.flatnonzero(last[:, i])
        assert len(ends) >= 16 and (np.diff(ends) == lengths[i, 1:len(ends)] + 1).all()
        assert (terminal[ends, i] == (np.arange(len(ends)) % 2 == 0)).all() and not terminal[~last].any()


def test_an_agent_is_scored_by_what_it_draws(monkeypatch):
    """Actions are the agent's, and drawn, not the likeliest: an untrained one, which prefers nothing, takes
    each as often. The same seed gives the same scores, and without an agent the actions are random."""
    monkeypatch.setattr(Scripted, "made", [])
    for agent in (small(1, (3,), 2), None):
        make = functools.partial(Scripted, give=lambda env: np.float32([env.t, env.number, 0.5]))
        train.play(agent, make, 16, progress=False)
        taken = np.concatenate([env.taken for env in Scripted.made])
        assert 0.4 < np.mean(taken) < 0.6 and len({tuple(env.taken) for env in Scripted.made}) > 9
    found = [train.play(None, Catch, 48, seed=seed, progress=False) for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2] and np.mean(found) < 1.2
    scores = [train.play(Chooser(choose), Catch, 32, progress=False)
              for choose in (perfect, lambda o: np.argmax(o[:, :5], 1).clip(0, 2))]
    assert scores[0] == [3.0] * 32 and np.mean(scores[1]) < 3


@slow
def test_it_learns(tmp_path):
    """Two levels learn Catch to 90% of the best return; an untrained agent is far below."""
    # Random play for a while first: an agent that has hardly ever seen a block caught in some column takes
    # that column for worthless, stays away from it, and so never learns better.
    run = train.Run(catch_config(tmp_path, levels=2, steps=4200, warmup=800, save_every=4200), Catch())
    scores = [np.mean(train.play(run.agent, Catch, 48, seed=1, progress=False))]
    for run.config.steps in (2400, 3300, 4200):  # 2.98 of 3 after 2,400; it may take longer
        train.train(run, progress=False)
        scores.append(np.mean(train.play(run.agent, Catch, 48, seed=1, progress=False)))
        if scores[-1] >= 0.9 * Catch.DROPS:
            break
    assert scores[0] < 1.0 and scores[-1] >= 0.9 * Catch.DROPS, scores


@slow
def test_goals_are_obeyed_and_reached():
    """In four rooms without any reward two levels learn that goals are there to be followed: another goal
    changes what level 0 does, what it then does is nearer to its goal than to that of another time, and it
    comes nearer to what can be done from here than under another goal."""
    hindsight = script("hindsight")
    settings = hindsight.SETTINGS | {"steps": 2800}
    run = hindsight.trained(hindsight.GridRooms(), hindsight.HindsightHieros, **settings)
    study, = script("subgoals").subgoal_study(run.agent, hindsight.GridRooms(), 1, steps=1200)
    # Measured: obeyed 0.58, reached 0.14 above shuffled, able 0.26 above unled.
    assert study["obeyed"] > 0.4 and study["reached"] > study["shuffled"] + 0.03, study
    assert study["able"] > study["unled"] + 0.1, study


# ------------------------------------------------------------------------------------------------------------
# evaluate.py
# ------------------------------------------------------------------------------------------------------------

def script(name):
    """A script of results/ as a module."""
    spec = importlib.util.spec_from_file_location(name, HERE / "results" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def untrained_run(directory, game="breakout", levels=2, seed=0, **settings):
    """A run that was saved in this directory before its first step."""
    config = train.make_config({"preset": "debug", "game": game, "levels": levels, "seed": seed,
                                "device": "cpu", "logdir": str(directory)} | settings)
    run = train.Run(config, train.make_env(game))
    run.save()
    return run


def write_result(path, given={}, **changes):
    """A result file as train.evaluation makes it, of a run with the `given` settings, its entries changed."""
    config = dataclasses.asdict(train.Config()) | {"preset": "paper", "device": "cpu"} | given
    entry = {name: config[name] for name in ("game", "preset", "levels", "seed")} | {
        "agent_steps": 100_000, "hours": 0.5, "returns": [1.0, 3.0], "curve": [[100, -21.0], [200, -20.0]],
        "config": config, "commit": "abc1234", "dirty": False, "trained_by": ["abc1234"]}
    path.write_text(json.dumps(entry | changes))
    return str(path)


def test_a_score_goes_to_a_file_of_its_own_before_it_is_printed(saved_run, tmp_path, monkeypatch, capsys):
    """A saved run plays as many episodes as asked, by the seed asked for. The score is in a file named after
    what was played even if the standard output has gone away; what training wrote stays. With --json - the
    standard output is that JSON and nothing else."""
    shutil.copytree(saved_run, tmp_path / "run")
    path, played, before = tmp_path / "run" / "evaluation-step0-seed7-3.json", [], set(tmp_path.rglob("*"))
    monkeypatch.setattr(train, "play", lambda agent, make, episodes, seed: (
        played.append((torch.initial_seed(), seed)) or [1.0, 3.0, 8.0][:episodes]))
    command = [str(tmp_path / "run"), "--seed", "7", "--episodes", "3"]
    with monkeypatch.context() as patch, pytest.raises(BrokenPipeError, match="gone"):
        patch.setattr("builtins.print", lambda *_: (_ for _ in ()).throw(BrokenPipeError(32, "gone")))
        evaluate.main(command)
    assert json.loads(path.read_text())["returns"] == [1.0, 3.0, 8.0] and played == [(7, 7)]
    assert evaluate.main(command) == 0 and set(tmp_path.rglob("*")) == before | {path}
    assert re.search(f"breakout after 0 steps: score 4.0.*\nwritten to {path}", capsys.readouterr().out)
    evaluate.main([*command[:-1], "1", "--json", "-"])
    assert json.loads(capsys.readouterr().out)["returns"] == [1.0]
    assert set(tmp_path.rglob("*")) == before | {path}


def test_what_is_evaluated_are_the_weights_of_the_checkpoint(saved_run, tmp_path, refused):
    """A run's, and those of an exported agent: float16, without what only training needs. A checkpoint that
    lacks anything else is refused in one line."""
    saved, path = torch.load(saved_run / "checkpoint.pt", weights_only=True), tmp_path / "checkpoint.pt"
    saved["weights"] = {name: value + 1 for name, value in saved["weights"].items()}
    weights = {name: value.half() for name, value in saved["weights"].items()
               if not re.search("critics|normaliser", name)}
    exported = {name: saved[name] for name in ("config", "step", "seconds", "curve", "commits")}
    for content, own in ((saved, saved["weights"]), (exported | {"weights": weights}, weights)):
        torch.save(content, path)
        _, agent, past = evaluate.load_run(tmp_path, "cpu")
        assert past["step"] == 0 and agent.state_dict().keys() == own.keys()
        for name, value in agent.state_dict().items():
            assert value.dtype == torch.float32 and torch.equal(value, own[name].float()), name
    del exported["config"], weights["levels.0.actor.net.0.weight"]
    for content in (saved | {"weights": weights}, exported | {"config": saved["config"], "weights": weights}):
        torch.save(content, path)
        assert "checkpoint.pt cannot be used: RuntimeError" in refused("evaluate.py", tmp_path)


class Echo(gymnasium.Env):
    """Shows [last action one-hot, step of the episode]; an episode has `length` steps. Drawn, it is of one
    colour, which is its step."""
    observation_space = gymnasium.spaces.Box(-1, 99, (4,), np.float32)
    action_space = gymnasium.spaces.Discrete(3)
    metadata = {"render_modes": ["rgb_array"]}

    def __init__(self, length=6, render_mode=None):
        self.length, self.render_mode = length, render_mode

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.zeros(4, np.float32), {}

    def step(self, action):
        self.t += 1
        return np.append(np.eye(3)[action], self.t).astype(np.float32), 1.0, self.t == self.length, False, {}

    def render(self):
        return np.full((40, 80, 3), self.t, np.uint8)


@pytest.fixture(scope="module")
def saved_run(tmp_path_factory):
    """The directory of a run that has just begun, to be copied."""
    directory = tmp_path_factory.mktemp("saved") / "run"
    run = untrained_run(directory)
    run.act()  # one step for every replay
    run.save()
    return directory


@pytest.mark.parametrize("command, says", [
    ("", "name one run"), ("run run", "name one run"), ("run --seed -1", "--seed -1"),
    ("run --episodes 0", "at least 1"), ("run --device mps", "--device mps"),
    ("nowhere", "nowhere/checkpoint.pt cannot be used: FileNotFoundError"),
    ("run --vidoe a.gif", "unrecognized arguments: --vidoe"), ("run --video a.mp4", "must end in .gif"),
    ("run --json run/checkpoint.pt", "end in .json"), ("run --video no/a.gif", "no/a.gif cannot be written"),
    ("--table a.json --json b.json", "are about one run"), ("--table run", "run cannot be read"),
    ("--table a.json a.json", "are the same run"), ("--table b.jsonl", "b.jsonl:2 is not a result")])
def test_a_wrong_command_is_one_clear_line(saved_run, refused, tmp_path, command, says):
    """A command that cannot succeed says why, before anything is played."""
    line = Path(write_result(tmp_path / "a.json")).read_text()
    (tmp_path / "b.jsonl").write_text(f"{line}\n{line[:-9]}\n")
    (tmp_path / "run").symlink_to(saved_run)
    assert says in refused("evaluate.py", *command.split())


def test_a_malformed_result_is_one_clear_line(refused, tmp_path):
    """A file that is no JSON, without finite returns or with missing or wrong entries is refused by name."""
    for changes in ({"returns": []}, {"returns": [float("nan")]}, {"returns": ["high"]}, {"returns": [[1.0]]},
                    {"preset": "fast"}, {"curve": [[1, 2, 3]]}, {"config": 3}, "", "[]", "{}"):
        path = tmp_path / "a.json"
        path.write_text(changes) if isinstance(changes, str) else write_result(path, **changes)
        assert "a.json:1 is not a result" in refused("evaluate.py", "--table", path), changes


def test_help_names_every_flag_and_valid_examples(capsys):
    """--help of both programs exits 0, knows every setting, and each example that it gives can be parsed."""
    for program, parse in (("evaluate.py", evaluate.parse), ("train.py", train.parse_config)):
        with pytest.raises(SystemExit, match="0"):
            parse(["--help"])
        text = capsys.readouterr().out
        examples = re.findall(rf"^  python {program} (.*?)(?:   | \| |$)", text, re.MULTILINE)
        assert len(examples) > 3 and all(parse(flags.split()) for flags in examples)
    assert all(f"--{field.name} " in text for field in dataclasses.fields(train.Config))


def test_subgoals_are_decoded_level_by_level():
    """A state of level 2 becomes pixels through level 1 and level 0: of each stacked observation the newest
    of the k states is taken, its z made one-hot, its h brought back from symlog."""
    agent = awake(small(levels=3, observation_shape=(64, 64, 3)))
    states = [(onehot(torch.randint(8, (1, 8)), 8), 3 * torch.randn(1, 64)) for _ in range(3)]
    for above, (z, h) in zip(agent.levels[1:], states):  # what each higher decoder is made to say
        newest = torch.cat([0.6 * z.flatten(1) + 0.1, symlog(h)], 1)
        above.world_model.decode = lambda z, h, newest=newest: torch.cat(
            [torch.randn(1, 3 * newest.shape[1]), newest], 1)
    expected = evaluate.image_bytes(agent.levels[0].world_model.decode(*states[0])[0])
    assert np.array_equal(evaluate.state_image(agent, 2, *states[2]), expected)
    every = torch.arange(256).expand(3, 64, 256).unfold(-1, 64, 64).movedim(2, 0)  # all bytes come back
    assert np.array_equal(evaluate.image_bytes(every / 255), every.movedim(1, -1))


def record_film(monkeypatch, agent, env, **arguments):
    """What a film draws: [(title, [(image, captions) of each panel]) of each step]."""
    frames = []
    monkeypatch.setattr(evaluate, "draw_frame", lambda title, panels: frames.append((title, panels)))
    monkeypatch.setattr(evaluate, "save_film", lambda path, frames: None)
    with torch.inference_mode():
        evaluate.film(agent, env, "pong", 0, "film.gif", **arguments)
    return frames


def test_film_draws_each_goal_from_the_state_in_which_it_was_set(monkeypatch):
    """The picture of level i's goal is decoded from level i's z of the moment when level i + 1 chose it, and
    from the goal's place in h-space, by level i's own autoencoder. It stands for k^(i+1) steps. The novelty
    under it is the error of level i + 1's autoencoder over its own h."""
    agent, memories, drawn = small(3, (64, 64, 3), 6), [], []
    act = agent.act
    agent.act = lambda *args, **now: memories.append(act(*args, **now)) or memories[-1]
    for i, level in enumerate(agent.levels):
        level.autoencoder.loss = lambda h, i=i: (None, h.sum() + i)
    monkeypatch.setattr(evaluate, "state_image", lambda agent, *own: drawn.append(own) or len(drawn))
    frames = [panels for _, panels in record_film(monkeypatch, agent, train.Atari("pong"), steps=18)]
    for t, (memory, ticks) in enumerate(memories):
        assert t % 4 == 0 or frames[t][3:] == frames[t - 1][3:]
        for i in (0, 1)[:len(ticks) - 1]:
            (level, z, h), held, done = drawn.pop(0), memory["levels"][i], ticks[i + 1]["state"].h
            g_h = agent.levels[i].autoencoder.decode(held["subgoal"].clone())
            assert level == i and z is held["z"] and torch.equal(h, g_h)
            assert f"novelty {done.sum() + i + 1:.3f}" in frames[t][3 + i][1][1]
        level, z, h = drawn.pop(0)
        assert level == 0 and z is ticks[0]["state"].z and h is ticks[0]["state"].h  # the reconstruction
        drawn.pop(0)  # the dream


@slow
def test_film_dream_starts_from_the_truth_and_then_sees_nothing(monkeypatch):
    """The dream of the film equals the reconstruction where it restarts, and whatever the game shows
    afterwards leaves it unchanged; an action does change it, from the next step on."""
    class Garbled(train.Atari):
        def step(self, action):
            return 255 - super().step(action)[0], 0.0, False, False, {}

    def filmed(game=train.Atari, restart=100, actions=12 * [0]):
        torch.manual_seed(0)
        agent = small(1, (64, 64, 3), 6)
        awake(agent.levels[0].world_model.decoder)
        left = iter(actions)
        agent.levels[0].policy = lambda state, goal: torch.eye(6)[[next(left)]]
        frames = record_film(monkeypatch, agent, game("pong"), steps=12, restart=restart)
        return np.array([[image for image, _ in panels[1:]] for _, panels in frames]).swapaxes(0, 1)

    (seen, dream), (garbled, same) = filmed(), filmed(Garbled)
    assert (seen[0] == dream[0]).all() and (seen[11] != garbled[11]).any() and (dream == same).all()
    other = filmed(actions=10 * [0] + [3, 3])[1]
    assert (dream[:11] == other[:11]).all() and (dream[11] != other[11]).any()
    assert np.equal(*filmed(restart=0)).all()


def test_every_game_can_be_filmed_or_one_line_says_why_not(saved_run, tmp_path, monkeypatch):
    """--video writes a GIF of captioned panels. Where observations are numbers, a film has the environment's
    own frames, with the score of the episode. Where there are none, or no pillow, this is said before
    anything is played."""
    Image, drawn, game = pytest.importorskip("PIL.Image"), itertools.count(), "CartPole-v1"
    monkeypatch.setattr(evaluate.film, "__defaults__", (6, 45))  # steps, restart
    evaluate.main([str(saved_run), "--video", str(tmp_path / "a.gif")])
    with Image.open(tmp_path / "a.gif") as film:
        assert film.n_frames == 6 and film.size == (10 + 4 * 202, 264)
    cart = type(gymnasium.make(game).unwrapped)
    with monkeypatch.context() as patch:
        patch.setattr(cart, "render", lambda self: (
            np.full((40, 80, 3), next(drawn), np.uint8) if self.render_mode == "rgb_array" else None))
        env, agent = evaluate.film_env(game), small(1, actions=2)
        agent.levels[0].policy = lambda state, goal: torch.eye(2)[[1]]  # to the right: soon the pole falls
        frames = record_film(patch, agent, env, steps=20)
    assert all((panels[0][0] == t + 1).all() for t, (_, panels) in enumerate(frames))
    assert env.unwrapped.state[1] > 0  # the cart's speed
    scores = [int(title.split("score")[1]) for title, _ in frames]
    assert 0 in scores[8:12] and all(after in (0, before + 1) for before, after in zip(scores, scores[1:]))
    monkeypatch.setattr(cart, "render", lambda self: None)
    with pytest.raises(train.UsageError, match="no film of CartPole-v1 .*NoneType"):
        evaluate.film_env(game)
    monkeypatch.setattr(evaluate, "evaluation", lambda *args: pytest.fail("played before it was known"))
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(train.UsageError, match="no film of breakout .*pillow"):
        evaluate.main([str(saved_run), "--video", str(tmp_path / "a.gif"), "--episodes", "2"])


def test_aggregates_and_intervals():
    """Mean and median are those of the games' means, the interquartile mean leaves out a quarter of all runs
    at each end; all games weigh the same, however many runs they have. Published scores give the published
    mean and median. For many runs of one game the interval of the mean is +-1.96 standard errors."""
    few, many = np.array([0.0, 0.2, 0.4, 0.6]), np.tile([0.8, 1.0, 1.4, 5.0], 3)
    assert np.allclose(evaluate.aggregate([few, many]), (2.35 / 2, 2.35 / 2, 2.8 / 4))
    assert np.allclose(evaluate.aggregate([[0.1], [0.2], [3.0]]), (1.1, 0.2, 1.1))  # a quarter of 3 is none
    for method, mean, median in (("SimPLe", 0.332, 0.134), ("SPR", 0.616, 0.396), ("TWM", 0.956, 0.505),
                                 ("IRIS", 1.046, 0.289), ("STORM", 1.266, 0.580), ("BBF", 2.247, 0.917)):
        scores = evaluate.human_normalised(evaluate.read_published()[method])
        assert scores.keys() == train.REFERENCE.keys()
        assert np.allclose(evaluate.aggregate(list(scores.values()))[:2], (mean, median), atol=6e-4)
    runs = np.random.default_rng(1).normal(size=400)
    ends = runs.mean() + np.array([-1.96, 1.96]) * runs.std() / 20
    assert np.allclose(evaluate.bootstrap([runs], 1000)[:, 0], ends, atol=0.015)


def test_table_says_what_it_knows(tmp_path, monkeypatch, capsys):
    """A row a game: each seed's score with the error of its own episodes, published scores beside it. Then
    aggregates over the games that are there, for whoever knows all of these, with an interval where a game
    has several runs, redrawn within that game. A .jsonl file has a run a line, in any order."""
    def rows(text):  # {first cell: the others}
        lines = [re.split(r" *\| *", line)[1:-1] for line in text.splitlines() if "|" in line]
        return {first: others for first, *others in lines}

    path = tmp_path / "a.json"
    lines = [Path(write_result(path, given, **changes)).read_text() for given, changes in (
        ({"seed": 1}, {"returns": [0, 16]}), ({}, {"commit": "def5678"}),
        ({"game": "frostbite", "seed": 1}, {"returns": [2000]}),
        ({"game": "tennis"}, {"random_measured": {"mean": 6}}))]
    (tmp_path / "b.jsonl").write_text("\n".join(lines))
    write_result(path, {"levels": 1}, returns=[7])
    evaluate.main(["--table", str(tmp_path / "b.jsonl"), str(path)])
    flat, text = capsys.readouterr().out.split("### ")[1:]
    assert flat.startswith("preset paper, levels 1, agent_steps 100000\n\nCommits: abc1234.")
    assert rows(flat)["pong"][:3] == ["7.0 ± -", "7.0", "0.785"] and "95%" not in flat
    assert "Commits: abc1234, def5678." in text and "over 2 of the 26 games" in text and "shows: 1." in text
    assert "Not of Atari 100k, in no aggregate, random play measured here: tennis." in text
    full, names = rows(text), ("random", "human", "SimPLe", "DER", "CURL", "DrQ(eps)", "SPR")
    assert full["game"] == ["seed 0", "seed 1", "mean", "normalised", *(name + "*" for name in names)]
    assert full["pong"] == "2.0 ± 1.0,8.0 ± 8.0,5.0,0.728,-20.7,14.6,12.8,-19.3,-18.5,-9.1,-5.4".split(",")
    assert full["frostbite"][:2] == ["-", "2000.0 ± -"] and full["tennis"][3:6] == ["-", "6.0", "-"]
    assert "Hieros*" not in full  # whose score in Pong is not known
    low, mean, high = ((np.array([2, 5, 8]) + 20.7) / 35.3 + (2000 - 65.2) / 4269.5) / 2
    assert full["here"][0] == f"{mean:.3f}" and full["95% interval"][0] == f"{low:.3f} to {high:.3f}"
    assert full["IRIS*"][0] == f"{(1 + (259.12 - 65.2) / 4269.5) / 2:.3f}"
    monkeypatch.setattr(evaluate, "__file__", str(tmp_path / "evaluate.py"))  # without results/
    assert evaluate.main(["--table", str(path)]) == 0 and "SPR" not in capsys.readouterr().out


def test_only_seeds_are_averaged(tmp_path):
    """Two runs share a group if nothing that touches learning differs but the seed: every other setting keeps
    them apart, also one that a file lacks or that is gone, and its value is in the title, where it is not the
    preset's. So do agent steps, code that was changed, and a file's own word on it. Of the runs in
    results/atari100k.jsonl only the levels differ, and all else is as the preset `cpu` is now."""
    def titles(given={}, first={}, **changes):
        return [*evaluate.load_results([write_result(tmp_path / "a.json", **first),
                                        write_result(tmp_path / "b.json", {"seed": 1} | given, **changes)])]

    same = dict.fromkeys(("log_every", "save_every", "eval_episodes", "steps"), 7) | {"logdir": "runs/b"}
    assert titles(same) == ["preset paper, levels 3, agent_steps 100000"]
    for field in dataclasses.fields(train.Config):
        if field.name not in same.keys() | {"game", "device", "seed"}:
            value = {"preset": "cpu", "precision": "bf16"}.get(field.name) or field.default + 1
            assert any(f"{field.name} {value}" in title for title in titles({field.name: value})), field.name
    config = {name: value for name, value in dataclasses.asdict(train.Config()).items() if name != "tau"}
    for changes in ({"trained_by": ["abc1234", "def5678+"]}, {"agent_steps": 50_000}, {"change": "no goals"},
                    {"dirty": True}, {"given": {"gone": 1}}, {"config": config},
                    {"first": {"dirty": True}, "dirty": True, "commit": "def5678"}):
        assert len(titles(**changes)) == 2, changes
    kept = evaluate.load_results([HERE / "results" / "atari100k.jsonl"])
    assert [*kept] == [f"preset cpu, levels {levels}, agent_steps 100000" for levels in (1, 3)]


def test_two_groups_are_compared_by_pairs(tmp_path):
    """results/paired.py: runs of one game and seed are paired, and each game counts once, whatever its number
    of runs; groups that differ in two settings, or share no run, are left alone."""
    paired = script("paired")
    assert [paired.sign_test(*n) for n in ((5, 0), (0, 5), (3, 3), (0, 0))] == [1 / 16, 1 / 16, 1, 1]
    runs = [("alien", 7, 7), ("boxing", 3, 5), ("hero", 1), ("krull", 1e3, 0), ("pong", 9, 0), ("pong", 5, 0)]
    flat, full = evaluate.load_results([
        write_result(tmp_path / f"{seed}-{levels}.json", {"game": game, "seed": seed, "levels": levels},
                     returns=[score], hours=levels / 2)
        for seed, (game, *pair) in enumerate(runs) for levels, score in zip((3, 1), pair)]).values()
    title, signs, human, spr, hours = paired.compare(full, flat)
    assert title == "levels 3 against levels 1: 4 games, 5 pairs of runs"
    assert signs == "ahead in 2 games, behind in 1; two-sided sign test p = 1.000"
    assert hours.endswith("1.50 against 0.50")
    for line, units in ((human, [6899.9, 12, 1067.5, 35.3]), (spr, [614.09, 35.6, 2083.61, 15.29])):
        difference = np.array([0, -2, 1000, 7]) / units
        assert f" {difference.mean():+.3f} ± {difference.std(ddof=1) / 2:.3f} " in line, line
    two = {"levels": 1, "tau": 0.0, "seed": 4}  # the first of Pong
    other, = evaluate.load_results([write_result(tmp_path / "a.json", two)]).values()
    assert not paired.compare(full, other) and not paired.compare(full, {"qbert": flat["pong"]})


# The scripts of results/, one cheap test each.

def test_subgoals_are_judged_where_their_time_is_up(monkeypatch):
    """results/subgoals.py: a goal counts from the tick that sets it until the next is set or the episode
    ends; what a level does under another goal is compared in the same states."""
    torch.manual_seed(0)
    subgoals, agent, compared = script("subgoals"), small(levels=2), []
    level = agent.levels[0]
    step = level.world_model.observe_step
    level.world_model.observe_step = lambda x, z, a, o, d: (
        step(x, z, a, o, d)._replace(h=o[:, 3:].repeat(1, 64)))  # h: the time
    level.autoencoder.decode = lambda code: code
    monkeypatch.setattr(subgoals, "draw_code", lambda autoencoder, h: h)
    monkeypatch.setattr(subgoals, "cosine_max", lambda goal, h: (
        compared.append((goal, h[:, 0].tolist())) or torch.ones(len(h))))
    study, = subgoals.subgoal_study(agent, Echo(6), 0, steps=5 * 7)  # an episode: ticks at 0, 4 and 6
    assert study == {"level": 0, "goals": 10, "obeyed": 0, "reached": 1, "shuffled": 1, "able": 1, "unled": 1}
    (goal, end), (other, same), (done, _), (again, _) = compared
    assert end == same == done[:, 0].tolist() == 5 * [4, 6]
    assert torch.equal(goal.roll(5, 0), other) and torch.equal(done, again)
    torch.nn.init.normal_(level.actor.net[-1].weight)  # from now on what it does depends on everything
    assert subgoals.subgoal_study(agent, Echo(6), 0, steps=35)[0]["obeyed"] > 0.1


def test_goals_in_hindsight_end_once_and_nothing_after_them_counts(monkeypatch, tmp_path):
    """results/hindsight.py: a goal's return is what its k ticks pay, discounted by gamma alone; only these
    returns make the scale. Runs of both kinds can be loaded."""
    hindsight = script("hindsight")
    monkeypatch.setattr("hierarchy.Hieros", hindsight.HindsightHieros)
    below, above = small(2, horizon=10, lam=1.0).levels
    reward, discount = torch.rand(10, 500, 3), torch.full((10, 500), 0.9)
    returns = below.returns(reward[..., :2], discount, torch.ones(10, 500, 2))
    for t in range(4):
        assert torch.allclose(returns[t, :, 1], sum(0.9 ** (j - t) * reward[j, :, 1] for j in range(t, 4)))
    low, high = np.percentile(returns[:4, :, 1], [5, 95])
    returns[4:, :, 1] = 0  # as they are, for nothing is paid by then
    assert below.normaliser.update(returns)[1].item() == pytest.approx(high - low, rel=1e-4)
    assert below.weights[:, 0, 1].tolist() == pytest.approx(4 * [0.3] + 6 * [0.0])
    assert torch.equal(above.returns(reward, discount, torch.ones(10, 500, 3))[..., 2], reward[..., 2])
    for kind in (train.Hieros, hindsight.HindsightHieros):
        with monkeypatch.context() as patch:
            patch.setattr(train, "Hieros", kind)
            directory = untrained_run(tmp_path / kind.__name__, "boxing", levels=2).directory
        assert type(hindsight.load_run(directory, "cpu")[1]) is kind


def test_promises_are_compared_with_what_came(tmp_path, monkeypatch):
    """results/promises.py: what came after a step is discounted, up to the episode's end and not beyond it;
    an agent that promises one point a step in a game that gives one is right in both numbers."""
    promises = script("promises")
    reward, last = [9.0, 1.0, 2.0, 4.0, 8.0], [False, False, True, False, False]
    assert promises.to_come(reward, last, 0.5).tolist() == [2.0, 2.0, 0.0, 8.0, 0.0]

    class Generous(train.Atari):
        def step(self, action):
            seen, _, *rest = super().step(action)
            return seen, 1.0, *rest

    run = untrained_run(tmp_path, "boxing", levels=1, gamma=0.9)
    level, values = run.agent.levels[0], run.agent.levels[0].critics.twohot.values
    ten, one = ((values - number).abs().argmin() for number in (10, 1))  # 1 / (1 - gamma) is 10
    level.critics.nets[0][-1].bias.data[ten] = level.world_model.outcome_head[-1].bias.data[one] = 50.0
    run.save()
    monkeypatch.setattr(train, "make_env", Generous)
    found = promises.measure(tmp_path, 200)
    assert found["value"] == pytest.approx(values[ten]) and abs(found["return"] - 10) < 0.6, found
    assert found["dreamt"] == pytest.approx(5 * values[one]) and found["real"] == 5, found  # the horizon is 5
    assert found["rewarded"] == 199 / 200 and found["policy"] == pytest.approx(1) and not found["last_tenth"]


def test_promises_are_compared_step_by_step(tmp_path, monkeypatch):
    """results/promises.py: n steps after a state, the dream's reward stands beside the game's of that step;
    told the real actions, a model that knows what they bring is always right, as long as an episode lasts; a
    tenth of training is one of its steps. Settings that have gone since a run was trained are no obstacle."""
    class Button(train.Atari):
        steps = 0

        def step(self, action):
            self.steps += 1
            return super().step(action)[0], float(action < 9), False, self.steps % 13 == 0, {}

    def imagine(self, start, policy, horizon):
        pressed = [policy(start)[:, :9].sum(1) for _ in range(horizon)]
        return State(*[torch.stack([start.reward, *pressed])] * 6), None

    run = untrained_run(tmp_path, "boxing", levels=1, gamma=0.9)
    run.step, run.curve = 100, [[80, 9.0], [81, 1.0], [90, 3.0], [91, 5.0], [100, 7.0]]
    run.config.gone = 0.0
    monkeypatch.setattr(dataclasses, "asdict", lambda config: dict(vars(config)))
    run.save()
    monkeypatch.setattr(train, "make_env", Button)
    monkeypatch.setattr(WorldModel, "imagine", imagine)
    found = script("promises").measure(tmp_path, 200)
    assert list(found["told_ahead"]) == [1, 2, 3, 5, 10] and found["step"] == 100
    assert np.allclose(list(found["told_ahead"].values()), 1)
    assert all(abs(number) < 0.4 for number in found["dreamt_ahead"].values())
    assert found["tenth_before"] == [2, 1] and found["last_tenth"] == [6, 1]


def test_a_world_model_alone_is_judged_by_what_it_was_not_trained_on(tmp_path, monkeypatch, capsys):
    """results/world_model_alone.py: a candidate trains on random play, whose actions are held, or on what a
    run has played; no held-out step is among those that it trains on."""
    monkeypatch.setattr(sys.modules["hierarchy"], "WorldModel", WorldModel)  # what the script replaces
    alone, seen = script("world_model_alone"), {True: set(), False: set()}

    class Candidate(WorldModel):
        def loss(self, observation, action, *rest):
            seen[torch.is_grad_enabled()] |= {tuple(o) for o in observation.flatten(0, 1).tolist()}
            assert (action[:, 1:] != action[:, :-1]).any(-1).sum(1).max() <= 4  # of 16 steps
            return super().loss(observation, action, *rest)

    flags = "--preset debug --device cpu --warmup 200 --warmup_hold 4".split()
    alone.main(["CartPole-v1", "10", *flags], Candidate)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["updates"] for line in lines] == [*range(1, 11)] and lines[0]["model"] == "Candidate"
    assert len(seen[True]) > 100 and len(seen[False]) == 48 and not seen[True] & seen[False]
    assert lines[-1]["reward"] < lines[0]["reward"] and lines[0]["6 ahead"] is None  # CartPole gives 1 always
    run = untrained_run(tmp_path, "boxing", levels=2)
    for _ in range(70):
        run.act()
        run.play(0)
    run.save()
    alone.main([str(tmp_path), "1"])
    assert json.loads(capsys.readouterr().out)["KL"] > 0


def test_a_world_model_alone_dreams_with_the_real_actions():
    """results/world_model_alone.py: n steps ahead a dream has been told the n actions that led there, and is
    not compared with what came after an episode's end."""
    action, first = torch.eye(2)[torch.randint(2, (8, 12))], torch.zeros(8, 12, dtype=torch.bool)
    first[:, 0] = first[:4, 7] = True
    reward = F.pad(action[:, :-1, 0], (1, 0))  # what the action before it brings
    reward[:4, 7] = 5  # but where an episode begins, it is another

    class Model:
        def loss(self, observation, action, reward, *others):
            states = State(*[reward] * 6)
            return None, states, {name: torch.tensor(2.0) for name in ("loss/vector", "loss/rew", "kl")}

        def imagine(self, start, policy, horizon):
            told = [policy(start)[:, 0] for _ in range(horizon)]
            return State(*[torch.stack([start.reward, *told])] * 6), None

    row = script("world_model_alone").measure(Model(), reward[..., None], action, reward, first, first, 3)
    assert [*row.values()] == 3 * [2] + 4 * [1] and [*row][3:] == "seen,1 ahead,2 ahead,3 ahead".split(",")


@slow
def test_curves_of_runs_and_of_games(tmp_path):
    """results/curves.py: of a run in progress every whole line of its log, a line a level; of many runs a
    panel a game, a colour a number of levels, a human score in digits where its line would flatten all."""
    Figure, curves = pytest.importorskip("matplotlib.figure").Figure, script("curves")
    rows = [{"step": i, "level": i % 3, "train/kl": float(i), "episode/score": float(i)} for i in range(6)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + '\n{"step": 30, "ep')
    curves.main([str(tmp_path), "-o", str(tmp_path / "curves.png")])
    assert 5000 < (tmp_path / "curves.png").stat().st_size < 250_000
    labels = curves.draw_runs(figure := Figure(), {"a": rows, "b": rows[:1]})
    assert list(labels) == ["a", "level 1", "level 2", "b"]
    lines = {axis.get_title(): [line.get_ydata().tolist() for line in axis.lines] for axis in figure.axes}
    assert lines["train/kl"] == [[0, 3], [1, 4], [2, 5], [0]] and lines["episode/score"][0] == [0, 1.5]
    runs = [{"game": game, "levels": levels, "preset": "cpu", "agent_steps": 9000, "mean": 3.0,
             "curve": [[1000 * i, i] for i in range(9)], "random": human and 0.0, "human": human}
            for game, human in (("own", None), ("pong", 6.0), ("qbert", 900.0)) for levels in (1, 3)]
    curves.draw_games(figure := Figure(), runs)
    assert [len(axis.lines) for axis in figure.axes] == [4, 6, 5]
    assert figure.axes[2].texts[0].get_text() == "human 900" and not figure.axes[1].texts
    colours = [line.get_color() for line in figure.axes[1].lines]
    assert colours[0] == colours[1] != colours[2] == colours[3]


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
    play. A press counts for a step at least, and ends with its release; game and dream end where they end."""
    pygame, _ = (pytest.importorskip(name) for name in ("pygame", "PIL"))
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    untrained_run(tmp_path, "pong", levels=3)
    play, done, seen, begun = script("play"), [], [], []

    def noted(where, name, action):
        """Note the number of the action that it gets, where it is one of the game."""
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
    mind.now["is_last"][0], steps = True, len(done)
    mind.step(set())
    mind.dream = [mind.state._replace(cont=torch.zeros(1))]
    mind.step(set())
    assert len(done) == steps


@pytest.mark.parametrize("agent, rewards", [
    ("flat", [[]]), ("curious", [["novelty"]]), ("paper", [["subgoal"], ["novelty"]]),
    ("hindsight", [["subgoal"], ["novelty", "reached"]])])
def test_four_agents_look_for_the_key(agent, rewards, monkeypatch, capsys):
    """results/key_door.py: each prints a line of JSON, and learns for the rewards that its name says."""
    door, calls = script("key_door"), {}
    spy(monkeypatch, door, "trained", calls)
    door.main(agent, 0, 250)
    line, = map(json.loads, capsys.readouterr().out.splitlines())
    assert (line["task"], line["agent"], line["steps"]) == ("key_door", agent, 250) and len(line["returns"]) > 1
    made = calls["trained"][1].agent
    assert [[*level.rewards][1:] for level in made.levels] == rewards
    for i, level in enumerate(made.levels):
        metrics = level.update(batch_of(made, i))
        assert all(abs(metrics[f"rew/{name}"]) > 0 for name in rewards[i])


def test_every_script_of_results_says_how_it_is_run():
    """Its docstring has its command, and the modules have what it imports from them."""
    for path in (HERE / "results").glob("*.py"):
        tree = ast.parse(path.read_text("utf-8"))
        assert f"python results/{path.name}" in ast.get_docstring(tree), path.name
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (HERE / f"{node.module}.py").exists():
                module = importlib.import_module(node.module)
                assert not [each.name for each in node.names if not hasattr(module, each.name)], path.name
