"""The claims of this project, each a test: `pytest test_hieros.py`. A group a module; docstrings say what.

`-m "not slow"` takes about a minute. `-m gpu` runs what needs a CUDA device and is skipped without one.
"""

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
from world_model import (ImageDecoder, ImageEncoder, Patches, State, TwoHot, WorldModel, entropy, kl_balance,
                         log_prob, sample_onehot, straight_through, symexp, symlog, unimix)


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

def random_complex(*shape):
    return torch.randn(*shape, dtype=torch.cfloat)


def some_resets(B, T):
    """Resets at the first and at the last step, several in a row, and at random."""
    reset = torch.rand(B, T) < 0.2
    reset[0, 0] = reset[-1, -1] = True
    reset[-1, T // 2:T // 2 + 3] = True
    return reset


@pytest.mark.parametrize("T", [1, 2, 3, 5, 8, 31, 64, 100])
def test_parallel_scan_is_the_sequential_one(T):
    """The scan equals the five-line loop, values and gradients, for any T, also not a power of two."""
    a, b, weight = 0.9 * random_complex(3, T, 4) / 2 ** 0.5, random_complex(3, T, 4), random_complex(3, T, 4)
    results = []
    for function in (scan, scan_sequential):
        leaves = [each.clone().requires_grad_() for each in (a, b)]
        x = function(*leaves)
        (x * weight).real.sum().backward()
        results.append([x.detach(), *(leaf.grad for leaf in leaves)])
    for parallel, sequential in zip(*results):
        assert torch.allclose(parallel, sequential, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("T", [1, 2, 7, 64])
def test_stack_in_parallel_is_the_stack_step_by_step(T):
    """Training and acting run the same function: values, states, gradients agree; with resets anywhere."""
    stack, u, weight = S5Stack(12, 16, 2, 64), torch.randn(3, T, 12), torch.randn(3, T, 12)
    reset = some_resets(3, T)

    def sequential(u):
        outputs, states, state = [], [], torch.zeros(3, *stack.state_shape, dtype=torch.cfloat)
        for t in range(T):
            y, state = stack.step(u[:, t], state * ~reset[:, t, None, None], stack.discretise())
            outputs.append(y)
            states.append(state)
        return torch.stack(outputs, 1), torch.stack(states, 1)

    results = []
    for function in (lambda u: stack(u, reset), sequential):
        leaf = u.clone().requires_grad_()
        stack.zero_grad()
        y, states = function(leaf)
        ((y * weight).sum() + states.abs().square().sum()).backward()
        results.append([y, states, leaf.grad, *(p.grad for p in stack.parameters())])
    for parallel, step in zip(*results):
        assert torch.allclose(parallel, step, atol=2e-4, rtol=1e-3)


def test_nothing_leaks_over_a_reset():
    """After a reset neither values nor gradients know anything of what came before."""
    stack, u, reset = S5Stack(4, 16, 2, 64), torch.randn(2, 9, 4), torch.zeros(2, 9, dtype=torch.bool)
    reset[:, 5] = True
    u.requires_grad_()
    y, states = stack(u, reset)
    (y[:, 5:].sum() + states[:, 5:].real.sum()).backward()
    assert (u.grad[:, :5] == 0).all() and (u.grad[:, 5:] != 0).any()
    changed, _ = stack(torch.cat([torch.randn(2, 5, 4), u[:, 5:]], 1), reset)
    assert torch.equal(changed[:, 5:], y[:, 5:])


def test_no_optimiser_step_makes_the_recurrence_explode():
    """|Lambda_bar| <= 1 after absurdly large optimiser steps in any direction, by construction."""
    stack = S5Stack(4, 16, 2, 64)
    optimiser = torch.optim.Adam(stack.parameters(), 1.0)
    for _ in range(20):
        y, _ = stack(torch.randn(2, 30, 4), torch.zeros(2, 30, dtype=torch.bool))
        optimiser.zero_grad()
        (-y.square().mean()).backward()  # rewarded for being as large as it can
        optimiser.step()
        for Lambda_bar, _ in stack.discretise():
            assert (Lambda_bar.abs() < 1 + 1e-6).all()  # but for rounding


def test_hippo_eigenvalues_rebuild_the_matrix():
    """Half the spectrum is enough: 2 Re(V Lambda V^H) is the normal part of HiPPO-LegS, entry by entry."""
    Lambda, V = hippo_n(8)
    rebuilt = 2 * (V * Lambda @ V.mH).real
    n = np.arange(8)
    root = np.sqrt((2 * n[:, None] + 1) * (2 * n[None] + 1))
    legs = np.where(n[:, None] > n[None], -root, 0) - np.diag(n + 1)  # HiPPO-LegS itself
    low_rank = np.sqrt(n[:, None] + 0.5) * np.sqrt(n[None] + 0.5)
    assert np.allclose(rebuilt.numpy(), legs + low_rank)


def test_discretisation_holds_the_input_for_a_step():
    """One step is the exact solution of x' = Lambda x + B_tilde u over Delta, with u held constant."""
    layer = S5Layer(3, 8, 64)
    Lambda_bar, B_bar = layer.discretise()
    Lambda, Delta = torch.complex(-layer.log_decay.exp(), layer.frequency), layer.log_Delta.exp()
    for i in range(4):
        system = torch.zeros(4, 4, dtype=torch.cfloat)  # (x, u)' = (Lambda x + B_tilde u, 0)
        system[0, 0], system[0, 1:] = Lambda[i], complex_view(layer.B_tilde)[:, i]
        exact = torch.matrix_exp(system * Delta[i])[0]
        assert torch.allclose(Lambda_bar[i], exact[0], atol=1e-5)
        assert torch.allclose(complex_view(B_bar)[:, i], exact[1:], atol=1e-5)


def test_half_of_the_eigenvectors_give_back_the_whole_state(monkeypatch):
    """2 Re(C_tilde x) is C times the real state of which x holds one eigenvector coordinate of each pair; the
    output is that and D u."""
    monkeypatch.setattr(torch, "randn", lambda *shape, **kind: (
        torch.eye(*shape, **kind) if len(shape) == 2 else torch.arange(1.0, 1 + shape[0])))
    layer = S5Layer(16, 16, 64, blocks=2)  # C is the identity, divided by sqrt(P)
    V, state, u = torch.block_diag(*[hippo_n(8)[1]] * 2), torch.rand(16, dtype=torch.float64), torch.rand(16)
    x = (V.mH @ state.to(V.dtype)).to(torch.cfloat)
    assert torch.allclose(layer.output(x, u), state.float() / 4 + torch.arange(1, 17) * u, atol=1e-5)


def test_block_is_norm_s5_gelu_gate_residual():
    """A block is u + y sigmoid(W y) with y = GELU(S5(LayerNorm(u)))."""
    block, u, reset = S5Block(6, 16, 64), torch.randn(2, 5, 6), some_resets(2, 5)
    y = F.gelu(block.s5(F.layer_norm(u, (6,)), reset)[0])
    assert torch.allclose(block(u, reset)[0], u + y * torch.sigmoid(block.gate(y)), atol=1e-6)


def test_state_starts_on_unit_scale():
    """White input of unit variance drives the states to a variance near one, whatever their step sizes."""
    stack = S5Stack(64, 64, 1, 64)  # its LayerNorm hands on unit variance
    _, x = stack(torch.randn(8, 4000, 64), torch.zeros(8, 4000, dtype=torch.bool))
    spread = x[:, 2000:].abs().square().mean((0, 1)).detach()
    assert 0.7 < spread.median() < 1.4 and spread.max() < 2


@pytest.mark.parametrize("memory", [16, 64])
def test_states_are_as_large_within_a_training_sequence_as_ever_after(memory):
    """After `memory` steps from zero every state has at least 86% of the variance that it ever reaches, so
    acting over whole episodes meets no larger ones than training on sequences of that length has shown."""
    Lambda_bar = torch.stack([Lambda_bar for Lambda_bar, _ in S5Stack(8, 128, 2, memory).discretise()])
    assert (Lambda_bar.abs() ** (2 * memory)).max() < np.exp(-2) + 1e-5
    assert (Lambda_bar.abs() ** (2 * memory)).max() > np.exp(-4)  # and it uses them all


def test_the_recurrence_stays_float32_under_bfloat16():
    """Rounding errors add up in a recurrence: inside autocast the stack computes what it does outside."""
    stack, u, reset = S5Stack(12, 16, 2, 64), torch.randn(3, 9, 12), some_resets(3, 9)
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled):
            y, x = stack(u, reset)
            results.append([y, x, *stack.step(u[:, 0], x[:, 0], stack.discretise())])
    assert all(torch.equal(*pair) for pair in zip(*results))


def test_shapes_that_do_not_fit_name_both():
    """A wrong shape is a ValueError that says what came and what was expected."""
    stack = S5Stack(4, 16, 1, 64)
    good = torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.bool)
    bad = torch.zeros(2, 3, 5), torch.zeros(2, 4, dtype=torch.bool)
    for i, wrong in enumerate(bad):
        with pytest.raises(ValueError, match=re.escape(str(tuple(wrong.shape)))):
            stack(*good[:i], wrong, *good[i + 1:])
    with pytest.raises(ValueError, match=r"\(1, 2, 3\) and \(1, 2, 4\)"):
        scan(torch.zeros(1, 2, 3), torch.zeros(1, 2, 4))
    with pytest.raises(ValueError, match="multiple"):
        S5Layer(4, 12, 64)


# ------------------------------------------------------------------------------------------------------------
# world_model.py
# ------------------------------------------------------------------------------------------------------------

TINY = dict(stoch=4, classes=8, hidden=32, state_size=16, s5_layers=2, memory=64, units=32, mlp_layers=1,
            depth=4, first_stride=4, sharpness=1.0, kl_warmup=0, decoded=1.0, scaled=False)
BEHAVIOUR = dict(horizon=3, starts=8, gamma=0.9, lam=0.8, entropy_scale=0.05, slow=0.02, model_lr=0.0,
                 encoder_lr=0.0, actor_lr=0.05, critic_lr=0.05, autoencoder_lr=0.0, k=4, hindsight=0.0,
                 below=None)


def first_flags(B, T, *steps):
    flags = torch.zeros(B, T, dtype=torch.bool)
    flags[:, list(steps)] = True
    return flags


def test_symlog_and_twohot_round_trip():
    """symexp undoes symlog, and a two-hot code of any number, small or huge, gives that number back."""
    numbers = torch.tensor([-1e6, -21.0, -1.0, -0.01, 0.0, 0.3, 1.0, 17.0, 5e4])
    assert torch.allclose(symexp(symlog(numbers)), numbers, rtol=1e-4)
    twohot = TwoHot()
    logits = twohot.first_logits().repeat(len(numbers), 1)
    assert twohot.mean(logits).abs().max() < 1e-4  # untrained, it promises nothing
    optimiser = torch.optim.Adam([logits.requires_grad_()], 0.5)
    for _ in range(300):  # the loss alone must lead there
        optimiser.zero_grad()
        twohot.loss(logits, numbers).sum().backward()
        optimiser.step()
    assert torch.allclose(twohot.mean(logits), numbers, rtol=0.02, atol=0.01)
    # The loss's gradient is prediction minus code: the mean of the code is the target, not only nearly.
    twohot, logits = twohot.double(), torch.zeros(len(numbers), 255, dtype=torch.double, requires_grad=True)
    gradient, = torch.autograd.grad(twohot.loss(logits, numbers.double()).sum(), logits)
    code_mean = twohot.mean(logits) - gradient @ twohot.values
    assert torch.allclose(code_mean, numbers.double(), rtol=1e-4, atol=1e-4)


def test_rare_large_rewards_count_in_full():
    """What is learned from 100 in one case of ten is 10, the expected reward, not what is usual; bfloat16,
    as coarse as the numbers are apart, does not round it."""
    twohot = TwoHot()
    logits, rewards = twohot.first_logits(zero=8.0), torch.tensor([100.0] + 9 * [0.0])
    optimiser = torch.optim.Adam([logits.requires_grad_()], 0.1)
    for _ in range(500):
        optimiser.zero_grad()
        twohot.loss(logits.expand(10, -1), rewards).mean().backward()
        optimiser.step()
    with torch.autocast("cpu", torch.bfloat16):
        coarse = twohot.mean(logits)
    assert abs(twohot.mean(logits).item() - 10) < 0.2 and torch.equal(coarse, twohot.mean(logits))


def test_samples_follow_the_probabilities():
    """One uniform number a categorical suffices: frequencies are the probabilities, unimix included."""
    p = unimix(torch.tensor([[2.0, -1.0, 0.5, -30.0]]))
    assert torch.allclose(p.sum(-1), torch.ones(1)) and torch.allclose(p.min(), torch.tensor(0.01 / 4))
    samples = sample_onehot(p.expand(200_000, 4))
    assert (samples.sum(-1) == 1).all()
    assert torch.allclose(samples.mean(0), p[0], atol=0.005)


def test_straight_through_has_the_gradient_of_the_probabilities():
    """A drawn z is exactly one-hot, and learns as if it were its probabilities."""
    logits = torch.randn(5, 3, 4, requires_grad=True)
    weight = torch.randn(5, 3, 4)
    z = straight_through(unimix(logits))
    assert torch.allclose(z.max(-1).values, torch.ones(5, 3)) and torch.allclose(z.sum(-1), torch.ones(5, 3))
    sampled, = torch.autograd.grad((z * weight).sum(), logits)
    exact, = torch.autograd.grad((unimix(logits) * weight).sum(), logits)
    assert torch.allclose(sampled, exact, atol=1e-6)


def test_kl_balance_and_its_stop_gradients():
    """The prior gets 0.5 of the KL's gradient, the posterior a share of 0.1, below one nat neither any."""
    for scale, pulls in ((3.0, True), (0.01, False)):
        q, p = ((scale * torch.randn(1, 6, 8)).requires_grad_() for _ in range(2))
        exact = torch.distributions.kl_divergence(torch.distributions.Categorical(unimix(q)),
                                                  torch.distributions.Categorical(unimix(p)))
        exact_q, exact_p = torch.autograd.grad(exact.sum(), (q, p))
        for share in (1.0, 0.3):
            loss, divergence = kl_balance(unimix(q), unimix(p), share)
            grad_q, grad_p = torch.autograd.grad(loss.sum(), (q, p))
            assert torch.allclose(divergence, exact.sum(-1), rtol=1e-4, atol=1e-5)
            assert torch.allclose(loss, (0.5 + share * 0.1) * divergence.clamp(min=1))
            assert (divergence > 1).all() == pulls
            assert torch.allclose(grad_q, share * 0.1 * pulls * exact_q, atol=1e-6)
            assert torch.allclose(grad_p, 0.5 * pulls * exact_p, atol=1e-6)


def test_training_acting_and_imagining_share_one_alignment():
    """`observe` (parallel) and the steps (recurrent) reach the same h from a_{t-1}, also over a reset."""
    model, T = WorldModel((6,), 3, **TINY), 12
    observation, action = torch.rand(2, T, 6), F.one_hot(torch.randint(3, (2, T)), 3).float()
    is_first = first_flags(2, T, 0, 7)
    model.update_statistics(observation)
    discretised = model.sequence.discretise()
    z, h, x_all, q, p = model.observe(observation, action, is_first)
    x, z_before, a_before = *model.initial(2, "cpu"), torch.zeros(2, 3)
    for t in range(T):
        keep = (~is_first[:, t]).float()[:, None]
        before = x * keep[..., None], z_before * keep[..., None], a_before * keep
        state = model.observe_step(*before, observation[:, t], discretised)  # what acting does
        assert torch.allclose(state.h, h[:, t], atol=1e-5)
        assert torch.allclose(state.entropy, entropy(q[:, t]), atol=1e-4)
        m, x, h_t = model.sequence_step(*before, discretised)
        assert torch.allclose(h_t, h[:, t], atol=1e-5) and torch.allclose(x, x_all[:, t], atol=1e-4)
        assert torch.allclose(model.prior(m), p[:, t], atol=1e-4)
        z_before, a_before = z[:, t], action[:, t]


def test_imagination_starts_where_observation_ends():
    """The first imagined state is the start state, the second follows from its z and the chosen action."""
    model = awake(WorldModel((6,), 3, **TINY))
    batch = torch.rand(2, 5, 6), F.one_hot(torch.randint(3, (2, 5)), 3).float(), torch.zeros(2, 5)
    _, states, _ = model.loss(*batch, first_flags(2, 5, 0), torch.zeros(2, 5).bool())
    start = states.map(lambda field: field.flatten(0, 1))
    action = F.one_hot(torch.arange(10) % 3, 3).float()
    imagined, actions = model.imagine(start, lambda state: action, 4)
    assert torch.equal(imagined.h[0], start.h) and torch.equal(imagined.z[0], start.z)
    second = model.sequence_step(start.x, start.z, action, model.sequence.discretise())
    assert torch.allclose(imagined.h[1], second[2], atol=1e-6)
    assert torch.allclose(imagined.entropy[1], entropy(model.prior(second[0])), atol=1e-5)
    logits, cont_logit = model.outcome(imagined.z, imagined.h)  # what it promises belongs to each state
    assert torch.allclose(imagined.reward, model.twohot.mean(logits), atol=1e-5)
    assert torch.allclose(imagined.cont, torch.sigmoid(cont_logit), atol=1e-5)
    assert imagined.h.shape == (5, 10, 32) and torch.equal(actions, action.expand(4, 10, 3))
    assert not imagined.h.requires_grad


@pytest.mark.parametrize("scaled", [False, True])
def test_loss_by_hand(scaled, fixed_draws):
    """The squared error summed over the observation, in units of its deviation where `scaled`; two-hot
    cross-entropy of the reward, Bernoulli of going on, 0.5 and 0.1 of the KL with its free nat; means over
    all steps. A start state is the posterior's."""
    model = awake(WorldModel((6,), 3, **TINY | dict(sharpness=50.0, scaled=scaled)))
    observation = torch.rand(2, 5, 6) * torch.tensor([1, 10, 1, 1, 1, 0.1])
    action = F.one_hot(torch.randint(3, (2, 5)), 3).float()
    reward, first, terminal = torch.randn(2, 5), first_flags(2, 5, 0, 3), first_flags(2, 5, 2)
    model.update_statistics(observation)
    loss, states, metrics = model.loss(observation, action, reward, first, terminal)
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


def test_some_decoded_observations_stand_for_all(monkeypatch):
    """With decoded=0.25 only a quarter of a batch is decoded, another one each time, each from its own state
    and beside its own observation, and the mean of their error is that of all."""
    model, errors, calls = WorldModel((6,), 3, **TINY), {}, {}
    zeros = torch.zeros(4, 16).bool()
    batch = 9 * torch.randn(4, 16, 6), torch.rand(4, 16, 3), zeros.float(), first_flags(4, 16, 0), zeros
    for name in "observe", "decode", "normalise":
        spy(monkeypatch, model, name, calls)
    for model.decoded, times in (1.0, 1), (0.25, 400):
        errors[model.decoded] = [model.loss(*batch)[2]["loss/vector"].item() for _ in range(times)]
        assert len(calls["decode"][0][0]) == 64 * model.decoded
    step = (batch[0].flatten(0, 1) == calls["normalise"][0][0][:, None]).all(-1).float().argmax(-1)
    for decoded, all_of_them in zip(calls["decode"][0], calls["observe"][1]):
        assert torch.equal(decoded, all_of_them.flatten(0, 1)[step])
    assert len(set(errors[0.25])) > 300
    assert np.isclose(np.mean(errors[0.25]), errors[1.0][0], rtol=0.02)


def test_h_is_the_symlog_of_a_linear_map_of_the_state():
    """h is read from the state x, in symlog: what it stands for doubles with x."""
    model, x = WorldModel((6,), 3, **TINY), 5 * random_complex(7, 2, 8)
    zero, once, twice = (symexp(model.deterministic(factor * x)) for factor in (0, 1, 2))
    assert torch.allclose(twice - zero, 2 * (once - zero), atol=1e-3) and (once - zero).abs().max() > 1


def test_actor_and_critics_see_all_that_is_known_of_a_state():
    """[z, h, symlog(reward), symlog(continue), symlog(entropy), subgoal], in this order."""
    state = State(None, torch.rand(5, 4, 8), torch.randn(5, 32), *10 * torch.rand(3, 5))
    z, h, scalars, subgoal = state.feature(torch.rand(5, 64)).split([32, 32, 3, 64], -1)
    assert torch.equal(z, state.z.flatten(1)) and torch.equal(h, state.h) and subgoal.shape == (5, 64)
    for found, field in zip(symexp(scalars).T, (state.reward, state.cont, state.entropy)):
        assert torch.allclose(found, field, rtol=1e-4)


def jump_batch(n, T=12, size=8):
    """A dot on a ring jumps as far as the action says: of 8, so ignoring it costs more than the free nat."""
    action = torch.randint(size, (n, T))
    position = torch.cat([torch.randint(size, (n, 1)), action[:, :-1]], 1).cumsum(1) % size
    return F.one_hot(position, size).float(), F.one_hot(action, size).float(), first_flags(n, T, 0)


@slow
def test_actions_are_aligned_with_what_they_cause():
    """A model foresees what its actions do; trained and asked with actions shifted by one step, it cannot."""
    accuracy = {}
    for shift in (0, 1):
        torch.manual_seed(1)
        model = WorldModel((8,), 8, **TINY | dict(hidden=64, units=64))
        optimiser = torch.optim.Adam(model.parameters(), 4e-3)
        for _ in range(250):
            observation, action, first = jump_batch(16)
            loss, _, _ = model.loss(observation, action.roll(-shift, 1), torch.zeros(16, 12), first,
                                    torch.zeros(16, 12).bool())
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        observation, action, first = jump_batch(64)
        _, h, _, _, p = model.observe(observation, action.roll(-shift, 1), first)
        foreseen = model.decode(onehot(p.argmax(-1), 8), h)  # the likeliest z of the prior, decoded
        accuracy[shift] = (foreseen.argmax(-1) == observation.argmax(-1))[:, 1:].float().mean().item()
    assert accuracy[0] > 0.9 and accuracy[1] < 0.5, accuracy


def test_open_loop_sees_only_its_context(fixed_draws):
    """What the model imagines depends on the first frames and on the true actions, each at its step, never on
    the frames to come; the first frames it reconstructs."""
    model = awake(WorldModel((8,), 8, **TINY | dict(sharpness=50.0)))
    observation, action, first = jump_batch(2)
    model.update_statistics(observation)
    other = observation.clone()
    other[:, 5:] = torch.rand(2, 7, 8)
    results = [model.open_loop(frames, action, first, context=5) for frames in (observation, other)]
    assert torch.equal(*results) and results[0].shape == observation.shape
    z, h, x, *_ = model.observe(observation[:, :5], action[:, :5], first[:, :5])
    assert torch.allclose(results[0][:, :5], model.decode(z, h), atol=1e-5)
    state = State(x[:, 4], z[:, 4], h[:, 4], *torch.zeros(3, 2))
    for t in range(5, 12):
        state = model.imagine_step(state, action[:, t - 1], model.sequence.discretise())
        assert torch.allclose(results[0][:, t], model.decode(state.z, state.h), atol=1e-5)


def test_the_kl_waits_until_z_is_read():
    """For kl_warmup updates the representation's KL has no share in the loss, then a growing one."""
    zeros, shares = torch.zeros(2, 8).bool(), []
    for update in range(9):
        losses = []
        for warmup in (0, 4):
            torch.manual_seed(update)
            model = WorldModel((6,), 3, **TINY | dict(sharpness=100.0, kl_warmup=warmup))
            model.updates.fill_(update + 1)  # as `update_mean` counts
            batch = torch.randn(2, 8, 6), torch.rand(2, 8, 3), torch.zeros(2, 8), zeros, zeros
            loss, _, metrics = model.loss(*batch)
            losses.append(loss.detach())
        shares.append(1 - (losses[0] - losses[1]) / (0.1 * metrics["loss/dyn"]))
    assert torch.allclose(torch.stack(shares), torch.tensor([0, 0, 0, 0, .25, .5, .75, 1, 1]), atol=1e-3)


def test_an_untrained_model_expects_an_ordinary_step():
    """Before its first update a world model promises no reward and no end, whatever it is shown."""
    model = WorldModel((6,), 3, **TINY)
    reward_logits, cont_logit = model.outcome(torch.rand(5, 4, 8), torch.randn(5, 32))
    assert model.twohot.mean(reward_logits).abs().max() < 1e-5 and torch.sigmoid(cont_logit).min() > 0.99
    assert model.twohot.loss(reward_logits, torch.zeros(5)).max() < 0.1


def test_untrained_critics_promise_nothing_and_policies_prefer_nothing():
    """Before their first update critics foresee a return of zero, of which no huge value is a part, the slow
    ones are their copies, and every action is as likely as any other."""
    level = small(3).levels[1]
    feature = torch.randn(5, level.critics.nets[0][0].in_features)
    for critics in (level.critics, level.slow_critics):
        logits = critics(feature)
        assert logits.shape == (5, 3, 255) and critics.twohot.mean(logits).abs().max() < 1e-4
        assert (torch.softmax(logits, -1) * critics.twohot.values).abs().max() < 0.1
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
    deviation = (image.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    assert torch.allclose(cnn[1](image), (image - image.mean(1, keepdim=True)) / deviation, atol=1e-5)


@pytest.mark.parametrize("first_stride", [2, 4])
def test_image_networks_mirror_each_other(first_stride):
    """64x64 images go in and come out, at both strides, and other sizes are refused by name."""
    encoder, decoder = ImageEncoder(4, first_stride), ImageDecoder(10, 4, first_stride)
    assert encoder(torch.zeros(2, 3, 64, 64)).shape == (2, encoder.features)
    assert decoder(torch.zeros(2, 10)).shape == (2, 3, 64, 64)
    with pytest.raises(ValueError, match=r"\(3, 32, 32\)"):
        WorldModel((3, 32, 32), 2, **TINY)


def test_every_place_paints_its_own_patch():
    """With first_stride 4 the last layer does what PixelShuffle after a 1x1 convolution does."""
    patches, image = Patches(5, 4), torch.randn(2, 5, 3, 3)
    weight = patches.weight.unflatten(0, (16, 3)).transpose(0, 1).reshape(48, 5, 1, 1)  # colours outermost
    shuffled = F.pixel_shuffle(F.conv2d(image, weight), 4)
    bias = patches.bias.view(4, 4, 3).permute(2, 0, 1).repeat(1, 3, 3)
    assert torch.allclose(patches(image), shuffled + bias, atol=1e-5)


@pytest.mark.parametrize("shape", [(6,), (3, 64, 64)])
def test_an_untrained_model_paints_the_mean_of_what_it_has_seen(shape):
    """Encoder and decoder deal with what differs from the running mean, and start from exactly that mean: of
    all at first, after many updates of about the last thousand."""
    model, batches = WorldModel(shape, 3, **TINY), torch.rand(5, 2, 4, *shape)
    for batch in batches:
        model.update_statistics(batch)
    mean = batches.mean((0, 1, 2))
    painted = model.decode(torch.rand(1, 4, 8), torch.randn(1, 32))
    assert torch.allclose(painted[0], mean, atol=1e-5) and painted.shape == (1, *shape)
    q = model.posterior(batches[0, 0])
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
    z, h = torch.rand(100, 2, 8, 4, 8), torch.randn(100, 2, 8, 32)
    assert torch.allclose(model.decode(z, h)[..., :3], batches[-100:, ..., :3], rtol=1e-3, atol=1e-4)


@slow
def test_world_model_overfits_one_batch_of_images():
    """Every head can learn: on one batch of images, rewards and ends all losses fall to nearly nothing."""
    model = WorldModel((3, 64, 64), 3, **TINY | dict(units=64, hidden=64, depth=16))
    image = torch.rand(2, 8, 3, 4, 4).repeat_interleave(16, -1).repeat_interleave(16, -2)
    action = F.one_hot(torch.randint(3, (2, 8)), 3).float()
    reward, ends = torch.zeros(2, 8), torch.zeros(2, 8).bool()
    reward[0, 4], reward[1, 7], ends[1, 7] = 1.0, -20.0, True
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    for i in range(300):
        loss, states, metrics = model.loss(image, action, reward, first_flags(2, 8, 0), ends)
        start = metrics if i == 0 else start
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    for name in ("loss/image", "loss/rew", "loss/con"):
        assert metrics[name] < 0.1 * start[name], name
    assert torch.allclose(states.reward, reward, atol=0.5)
    assert (states.cont.round() == (~ends).float()).all()


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
    reward, value = torch.randn(horizon), torch.randn(horizon)
    discount = torch.rand(horizon)
    returns = lambda_return(reward, discount, value, lam)
    for t in range(horizon):
        n_step = []
        for n in range(1, horizon - t + 1):  # n rewards, then the value
            total, d = 0.0, 1.0
            for j in range(t, t + n):
                total, d = total + d * reward[j], d * discount[j]
            n_step.append(total + d * value[t + n - 1])
        weights = [(1 - lam) * lam ** i for i in range(len(n_step) - 1)] + [lam ** (len(n_step) - 1)]
        assert torch.allclose(returns[t], sum(w * r for w, r in zip(weights, n_step)), atol=1e-5)


def test_normaliser_follows_the_percentiles_down_to_its_floor():
    """Returns are divided by their mean 5-95 percentile range over updates, never by less than the floor."""
    normaliser = ReturnNormaliser([1.0, 0.1])
    returns = torch.stack([torch.linspace(0, 200, 1001), torch.linspace(0, 1e-3, 1001)], -1)[None]
    assert torch.allclose(normaliser.update(returns), torch.tensor([180.0, 0.1]), rtol=1e-3)
    second = normaliser.update(returns / 2)
    assert torch.allclose(second, torch.tensor([135.0, 0.1]), rtol=1e-3)  # a plain mean at first
    for update in range(800):
        scale = normaliser.update(returns if update < 200 else returns / 2)
    assert torch.allclose(scale, torch.tensor([90.0, 0.1]), rtol=0.01)  # what was long ago is forgotten


def test_novelty_is_zero_at_perfect_reconstruction():
    """Novelty is the mean squared reconstruction error of h, nothing else."""
    autoencoder, h = SubgoalAutoencoder(16, (8, 8), 32, 1), torch.randn(5, 16)
    autoencoder.decode = lambda code: h
    assert (autoencoder.loss(h)[1] == 0).all()
    assert torch.allclose(autoencoder.loss(h + 0.5)[1], torch.full((5,), 0.25))


def test_autoencoder_loss_by_hand(fixed_draws):
    """Squared error in units of the variance of these h, and 0.5 of the KL of the code to the uniform one,
    with gradients through the drawn code as if it were its probabilities."""
    autoencoder, h = SubgoalAutoencoder(16, (8, 8), 32, 1), 0.2 + 0.3 * torch.randn(3, 50, 16)
    q = autoencoder.encode(h)
    code = sample_onehot(q) + q - q.detach()
    error = (autoencoder.decode(code.flatten(-2)) - h).square()
    variance = (h - h.mean((0, 1))).square().mean()
    by_hand = error.sum(-1) / variance + 0.5 * (q * (8 * q).log()).sum((-2, -1))
    loss, _ = autoencoder.loss(h)
    assert torch.allclose(loss, by_hand.mean(), rtol=1e-4)
    parameters = list(autoencoder.parameters())
    for pair in zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(by_hand.mean(), parameters)):
        assert torch.allclose(*pair, rtol=1e-3, atol=1e-4)


def test_autoencoder_learns_signs_sizes_and_all_codes():
    """Decoded goals reach negative values, and the KL to uniform keeps the codes in use."""
    autoencoder, centres = SubgoalAutoencoder(16, (8, 8), 64, 1), 2 * torch.randn(20, 16)
    optimiser = Optimiser(1e-6, 100, (autoencoder.parameters(), 3e-3))
    for _ in range(300):
        loss, novelty = autoencoder.loss(centres[torch.randint(20, (128,))])
        loss.backward()
        optimiser.step()
    goals = autoencoder.decode(sample_onehot(unimix(torch.zeros(500, 8, 8))).flatten(-2))
    assert novelty.mean() < 0.5 * centres.square().mean() and goals.min() < -1
    assert autoencoder.loss(3 * torch.randn(128, 16))[1].mean() > 2 * novelty.mean()  # the unseen is novel


@slow
def test_subgoals_mean_something_however_little_h_varies():
    """The autoencoder tells states apart whether h varies much or little: the KL does not silence codes."""
    for spread in (0.1, 2.0):
        torch.manual_seed(0)
        autoencoder, centres = SubgoalAutoencoder(16, (8, 8), 64, 1), 1 + spread * torch.randn(20, 16)
        optimiser = Optimiser(1e-6, 100, (autoencoder.parameters(), 3e-3))
        for _ in range(600):
            loss, novelty = autoencoder.loss(centres[torch.randint(20, (128,))])
            loss.backward()
            optimiser.step()
        assert novelty.mean() < 0.5 * centres.var(0).mean(), spread


def test_actions_of_higher_levels_have_the_joint_probability():
    """The log-probability and the entropy of 8 independent choices are sums, not means."""
    actor, feature = Actor(5, (8, 8), 16, 1), torch.randn(3, 5)
    torch.nn.init.normal_(actor.net[-1].weight)
    p = actor(feature)
    action = sample_onehot(p)
    reference = torch.distributions.Independent(torch.distributions.OneHotCategorical(p), 1)
    assert torch.allclose(log_prob(p, action), reference.log_prob(action), atol=1e-4)
    assert torch.allclose(entropy(p), reference.entropy(), atol=1e-4)


def test_optimiser_takes_adams_step_and_nothing_else():
    """The first step is lr g / (|g| + eps), g the clipped gradient, in each group at its own rate; without a
    gradient no weight decays; gradients are used once."""
    a, b, still = (torch.nn.Parameter(torch.full((2,), 5.0)) for _ in range(3))
    optimiser = Optimiser(1.0, 2.5, ([a, still], 0.1), ([b], 0.01))
    a.grad, b.grad, still.grad = torch.tensor([3.0, 0.0]), torch.tensor([0.0, -4.0]), torch.zeros(2)
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
    the autoencoder; Adam's betas as they are, no weight decay."""
    found = {name: (o.adam.defaults["eps"], o.clip, o.adam.defaults["betas"], o.adam.defaults["weight_decay"])
             for name, o in small(1).levels[0].optimisers.items()}
    settings = {"model": (1e-8, 1000), "actor": (1e-5, 100), "critic": (1e-5, 100),
                "autoencoder": (1e-6, 100)}
    assert found == {name: (*pair, (0.9, 0.999), 0) for name, pair in settings.items()}


def test_every_level_has_the_rewards_of_its_place():
    """Subgoal reward where there is a level above, novelty where there is one below; each its own weight, and
    only a level that has one above is told a subgoal."""
    flat, three = small(1), small(3)
    extrinsic, subgoal, novelty = {"extrinsic": 1.0}, {"subgoal": 0.3}, {"novelty": 0.1}
    assert flat.levels[0].rewards == extrinsic and flat.levels[0].subgoal_shape[0] == 0
    expected = extrinsic | subgoal, extrinsic | subgoal | novelty, extrinsic | novelty
    for level, rewards, categoricals in zip(three.levels, expected, (8, 8, 0)):
        assert level.rewards == rewards
        assert level.weights[-1, 0].tolist() == pytest.approx(list(rewards.values()))
        assert level.subgoal_shape == (categoricals, 8)
    assert [level.action_shape for level in three.levels] == [(1, 3), (8, 8), (8, 8)]


def moments(lengths, steps=None):
    """(episode, t) of the first `steps` steps of episodes of the given lengths."""
    every = ((episode, t) for episode, length in enumerate(lengths) for t in range(length + 1))
    return list(itertools.islice(every, steps))


def life(agent, lengths, terminal=itertools.repeat(True), steps=None):
    """Play episodes of the given lengths, whose steps t = 1, 2, ... give the reward t. Each ends by itself
    or, where not `terminal`, by a time limit; after `steps` steps that is all. Returns for each level the
    list of (episode, t, stored step, tick)."""
    rng, memory, stored = np.random.default_rng(0), agent.initial_memory(1), [[] for _ in agent.levels]
    discretised = agent.discretise()
    ends = list(zip(lengths, terminal))
    for episode, t in moments(lengths, steps):
        last = t == lengths[episode]
        flags = [np.array([flag]) for flag in (t == 0, last, last and ends[episode][1])]
        observation, reward = rng.random((1, 4), np.float32), np.float32([t])
        memory, ticks = agent.act(memory, observation, reward, *flags, discretised)
        for i, (step, tick) in enumerate(zip(agent.transitions(ticks), ticks)):
            stored[i].append((episode, t, step, tick))
    return stored


def random_life(seed):
    """(lengths, terminal) of episodes: many of one step, some long, one that does not end in time."""
    rng = np.random.default_rng(seed)
    lengths = [1, 1, *(1 + rng.geometric(rng.choice([0.5, 0.1, 0.02], 8))), 10 ** 9]
    return [*map(int, rng.permutation(lengths[:-1])), lengths[-1]], rng.random(len(lengths)) < 0.5


@pytest.fixture(scope="module", ids=lambda life: str(life[0])[1:20], params=[
    ([37, 1, 16, 3], [True] * 4), ([64, 65, 15], [False, True, False]), *map(random_life, range(4))])
def lived(request):
    """(lengths, terminal, moments, what `life` stored) of episodes of odd and of random lengths."""
    torch.manual_seed(0)
    lengths, terminal = request.param
    steps = sum(lengths[:-1]) + len(lengths) + min(lengths[-1], 40)
    return lengths, terminal, moments(lengths, steps), life(small(), lengths, terminal, steps)


def test_levels_tick_on_the_grid_and_at_the_end(lived):
    """Level i ticks at t = 0, k^i, 2 k^i, ... of every episode and at its end, and starts afresh after it; a
    time limit ends the sequence, is_last, but does not teach the continue head that the world ends."""
    lengths, terminal, when, stored = lived
    for i, steps in enumerate(stored):
        due = [(e, t) for e, t in when if t % 4 ** i == 0 or t == lengths[e]]
        assert [(e, t) for e, t, *_ in steps] == due
        for e, t, step, _ in steps:
            assert step["is_first"] == (t == 0) and step["is_last"] == (t == lengths[e])
            assert step["is_terminal"] == (t == lengths[e] and terminal[e])


def test_no_reward_is_lost_at_any_level(lived):
    """At every tick of every level the rewards in its replay sum to the episode's true return so far."""
    for steps in lived[-1]:
        for _, group in itertools.groupby(steps, lambda entry: entry[0]):
            total = 0
            for _, t, step, _ in group:
                total += step["reward"]
                assert total == t * (t + 1) / 2


def test_a_level_sees_the_last_states_below_it_up_to_now(lived):
    """The k stacked states have ages 3, 2, 1, 0, with zeros in front before there are k of them."""
    stored = lived[-1]
    for below, above in zip(stored, stored[1:]):
        for episode, t, step, _ in above:
            states = [tick["state"] for e, u, _, tick in below if e == episode and u <= t][-4:]
            expected_h = torch.zeros(4, 64)
            expected_h[4 - len(states):] = torch.stack([symlog(state.h[0]) for state in states])
            expected_z = torch.zeros(4, 8)
            expected_z[4 - len(states):] = torch.stack([state.z[0].argmax(-1) + 1.0 for state in states])
            assert np.allclose(step["h"], expected_h, atol=1e-6) and (step["z"] == expected_z.numpy()).all()


def test_subgoals_are_held_until_the_level_above_ticks_again(lived):
    """The subgoal stored at each step is the newest action of the level above, of this tick or before."""
    stored = lived[-1]
    for below, above in zip(stored, stored[1:]):
        for episode, t, step, _ in below:
            held = [s["action"] for e, u, s, _ in above if e == episode and u <= t][-1]
            assert (step["subgoal"] == held).all()
    assert stored[-1][0][2]["subgoal"].shape == (0,)  # no one stands above the top level


def test_the_replayed_observation_is_what_was_seen():
    """What the replay stores as class numbers becomes, bit for bit, what the world model saw when acting."""
    agent = small()
    for i, steps in enumerate(life(agent, [9])):
        for _, _, step, tick in steps:
            batch = {name: torch.as_tensor(value)[None, None] for name, value in step.items()}
            seen = torch.as_tensor(tick["observation"]) if i == 0 else tick["recent"].flatten(1)
            assert torch.equal(agent.levels[i].observation(batch)[0], seen)


def test_acting_leaves_the_memory_it_was_given_alone():
    """`act` is a function of its arguments: evaluation between two steps cannot disturb training."""
    agent = small()
    memory = agent.initial_memory(1)
    arguments = np.ones((1, 4), np.float32), np.float32([0]), *(np.array([False]) for _ in range(3))
    outcomes = []
    for _ in range(2):
        torch.manual_seed(5)
        outcomes.append(agent.act(memory, *arguments, agent.discretise()))
    assert memory["t"] == -1 and all((level["x"] == 0).all() for level in memory["levels"])
    first, second = (new["levels"] for new, _ in outcomes)
    assert all(torch.equal(a["x"], b["x"]) for a, b in zip(first, second))
    assert (first[0]["x"] != 0).any()


def test_an_episode_that_was_broken_off_leaves_nothing(fixed_draws):
    """A start that follows no end is a start: states, clocks, rewards, subgoals are those of a new agent."""
    agent, after = lively(small()), []
    for steps in (0, 6):
        memory, reward = agent.initial_memory(1), np.float32([1])
        for t in range(steps + 1):
            flags = [np.array([flag]) for flag in (t in (0, steps), False, False)]
            observation = np.full((1, 4), t == steps, np.float32)
            memory, ticks = agent.act(memory, observation, reward * (t < steps), *flags, agent.discretise())
        after.append([memory["t"], *(tick["reward"] for tick in ticks),
                      *(value for level in memory["levels"] for value in level.values())])
    assert len(after[0]) == len(after[1]) == 1 + 3 + 3 * 6
    assert all(np.array_equal(*pair) for pair in zip(*after))


def test_environments_side_by_side_do_not_mix():
    """Environments at different stages of their episodes keep their own clocks, states and rewards."""
    agent, n = small(), 3
    memory, lengths, t = agent.initial_memory(n), np.array([5, 7, 16]), np.zeros(3, int)
    for _ in range(40):
        memory, ticks = agent.act(memory, np.zeros((n, 4), np.float32), np.float32(t > 0), t == 0,
                                  t == lengths, t == lengths, agent.discretise())
        for i, tick in enumerate(ticks):
            assert (tick["ticked"] == (t % 4 ** i == 0) | (t == lengths)).all()
            since = np.where(t % 4 ** i == 0, np.minimum(t, 4 ** i), t % 4 ** i)
            assert np.allclose(tick["reward"][tick["ticked"]], since[tick["ticked"]])
        t = np.where(t == lengths, 0, t + 1)


def test_acting_is_what_the_model_observes_over_episodes(fixed_draws):
    """At every level, in every environment, the states in which the agent acts over several episodes are
    those that the world model computes for the same sequence in training, with resets; and each action is
    the policy's for that state and the subgoal that the level above holds up now."""
    agent, n, rng = lively(small()), 3, np.random.default_rng(0)
    memory, discretised, lives = agent.initial_memory(n), agent.discretise(), {}
    t, lengths, held = np.zeros(n, int), np.array([3, 9, 16]), {}
    for _ in range(60):
        last, reward = t == lengths, rng.normal(size=n).astype(np.float32)
        observation = rng.random((n, 4), np.float32)
        memory, ticks = agent.act(memory, observation, reward, t == 0, last, last, discretised)
        for i, tick in reversed(list(enumerate(ticks))):
            seen = torch.as_tensor(tick["observation"]) if i == 0 else tick["recent"].flatten(1)
            now = [seen, tick["action"], *(torch.as_tensor(tick[name]) for name in
                                           ("reward", "is_first", "is_terminal")), *tick["state"]]
            for e in np.flatnonzero(tick["ticked"]):
                lives.setdefault((i, e), []).append([field[e].clone() for field in now])
                held[i - 1, e] = tick["action"][e]
                goal = held.get((i, e), torch.zeros(0))
                assert torch.equal(tick["subgoal"][e], goal)
                state = tick["state"].map(lambda field: field[e:e + 1])
                assert torch.equal(agent.levels[i].policy(state, goal[None])[0], tick["action"][e])
        lengths, t = np.where(last, rng.integers(1, 20, n), lengths), np.where(last, 0, t + 1)
    for (i, _), life in lives.items():
        *batch, x, z, h, entropies, rewards, conts = (torch.stack(field)[None] for field in zip(*life))
        assert batch[3].sum() >= 3 and len(batch[1][0].unique(dim=0)) >= 3  # episodes, actions of many kinds
        _, states, _ = agent.levels[i].world_model.loss(*batch)
        for pair in zip(states, (x, z, h, entropies, rewards, conts)):
            assert torch.allclose(*pair, atol=1e-4)


def test_transitions_are_what_the_ticks_hold(lived):
    """A stored step has the fields, shapes and types of the level's replay, and says what its tick says."""
    agent = small()
    for level, spec, steps in zip(agent.levels, agent.specs, lived[-1]):
        for _, _, step, tick in steps:
            assert {name: (value.shape, value.dtype) for name, value in step.items()} == spec
            for name, classes in (("action", level.action_shape[1]), ("subgoal", level.subgoal_shape[1])):
                assert torch.equal(onehot(torch.as_tensor(step[name]), classes).flatten(), tick[name][0])
            for name in {"observation", "reward", "is_first", "is_last", "is_terminal"} & step.keys():
                assert (step[name] == tick[name][0]).all()


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
    original = getattr(owner, name)

    def recorded(*arguments, **options):
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
    for owner, name in ((level.world_model, "loss"), (level.world_model, "imagine"),
                        (level, "update_behaviour")):
        spy(monkeypatch, owner, name, calls)
    level.update(batch)

    trained_on, (_, states, _) = calls["loss"]
    action, subgoal = (F.one_hot(batch[name].long(), 8).float().flatten(-2) for name in ("action", "subgoal"))
    stored = level.observation(batch), action, batch["reward"], batch["is_first"], batch["is_terminal"]
    assert all(torch.equal(*pair) for pair in zip(trained_on, stored))

    (start, _, horizon), (imagined, actions) = calls["imagine"]
    states = states.map(lambda field: field.flatten(0, 1))
    key, keys = (torch.cat([each.z.flatten(1), each.h], -1) for each in (start, states))
    index = (key[:, None] == keys).all(-1).int().argmax(1)
    assert len(set(index.tolist())) == len(start.h) == min(starts, 24) and horizon == 4
    assert all(torch.equal(field, all_of[index]) for field, all_of in zip(start, states))

    subgoal, dead = subgoal.flatten(0, 1)[index], batch["is_terminal"].flatten()[index]
    feature, taken, reward, discount, alive = calls["update_behaviour"][0]
    assert torch.equal(feature, imagined.feature(subgoal.expand(5, -1, -1)))
    assert torch.equal(taken, actions)
    for t in range(4):
        now = State(None, *(field[t] for field in imagined[1:]))
        assert torch.equal(level.policy(now, subgoal), actions[t])
    after = State(None, *(field[1:] for field in imagined[1:]))
    paid = (after.reward, cosine_max(level.autoencoder.decode(subgoal), after.h),
            level.autoencoder.loss(after.h)[1])
    assert list(level.rewards) == ["extrinsic", "subgoal", "novelty"]
    assert torch.allclose(reward, torch.stack(paid, -1), atol=1e-5)
    assert torch.allclose(discount, 0.9 * after.cont) and torch.equal(alive, 1.0 - dead.float())


def test_the_first_update_starts_from_the_mean():
    """The running mean follows before the loss is taken: at first the error is the variance about it."""
    agent = small(1, (64, 64, 3))
    batch = batch_of(agent, 0)
    observation = agent.levels[0].observation(batch)
    assert torch.allclose(observation[1, 2, 0, 3], batch["observation"][1, 2, 3, :, 0] / 255)
    metrics = agent.levels[0].update(batch)
    assert torch.allclose(agent.levels[0].world_model.mean, observation.mean((0, 1)), atol=1e-6)
    assert torch.allclose(metrics["loss/image"], observation.var((0, 1), correction=0).sum(), rtol=1e-4)


@pytest.mark.parametrize("levels, hindsight", [(1, 0.0), (3, 0.0), (3, 0.5)])
def test_an_update_changes_every_parameter_and_nothing_is_on_the_wrong_device(levels, hindsight, monkeypatch):
    """One update trains all networks of a level; on the meta device, where any tensor made elsewhere and any
    peek at a value is an error, the same update runs through: it neither mixes devices nor waits for one."""
    shape = (64, 64, 3)
    agent = small(levels, shape, actor_lr=1e-2, horizon=3, hindsight=hindsight)  # at 3e-5 two steps vanish
    with torch.device("meta"):
        ghost = small(levels, shape, horizon=3, hindsight=hindsight)
    for i, level in enumerate(agent.levels):
        before = parameters_of(level)
        for _ in range(3):  # heads that start at zero pass on gradients only later
            metrics = level.update(batch_of(agent, i, 2, 4))
        unused = ("autoencoder",) if levels == 1 else ()
        for name, p in level.named_parameters():
            assert torch.equal(p, before[name]) == name.startswith(unused or "none"), name
        assert all(np.isfinite(value.item()) for value in metrics.values())
        ghost.levels[i].world_model.decoded = 0.5
        # An index may be elsewhere, it is copied in silence: whoever draws one must say where.
        draw = torch.randperm
        monkeypatch.setattr(torch, "randperm", lambda n, *, device, draw=draw: draw(n, device=device))
        metrics = ghost.levels[i].update(batch_of(ghost, i, device="meta"))
        assert all(value.device.type == "meta" for value in metrics.values())


def test_the_encoder_starts_sharp():
    """`sharpness` makes the first posterior say more of its frame."""
    model = [WorldModel((6,), 3, **TINY | dict(sharpness=sharpness)) for sharpness in (1.0, 10.0)]
    blunt, sharp = (entropy(each.posterior(torch.randn(50, 6))).mean() for each in model)
    assert sharp < 0.7 * blunt


# One update of each level in plain code. A guard for work on speed, which must not move them; what is *right*
# the other tests say. Where the mathematics changes they are taken anew, after a look at which should move.
PINNED = [
    {"loss/image": 2061.79663, "loss/rew": 8.19391, "loss/con": 2.49940, "kl": 0.81844, "loss/policy":
     0.05331, "loss/autoencoder": 281.73654, "loss/value_extrinsic": 1.75907, "loss/value_subgoal":
     1.96336, "opt/model_grad_norm": 3139.22095, "opt/actor_grad_norm": 0.05360, "opt/critic_grad_norm":
     3.97729},
    {"loss/vector": 302.18979, "loss/rew": 8.39510, "loss/con": 2.80004, "kl": 0.94712, "loss/policy":
     1.38666, "loss/autoencoder": 221.98692, "loss/value_extrinsic": 1.70197, "loss/value_subgoal":
     1.89633, "loss/value_novelty": 2.12512, "opt/model_grad_norm": 68.45995, "opt/critic_grad_norm":
     3.71669},
    {"loss/vector": 295.67361, "loss/rew": 7.98241, "loss/con": 2.06628, "kl": 0.76203, "loss/policy":
     0.67619, "loss/autoencoder": 262.16806, "loss/value_extrinsic": 2.27359, "loss/value_novelty":
     2.70420}]


def test_hindsight_takes_what_was_done():
    """A goal in hindsight is the code of how h changed within 1 ... k ticks of the same episode, beyond what
    was foreseen of so many ticks. At an episode's end, and where nothing follows, it stays; a share is taken.
    """
    below, T = small(2, hindsight=1.0).levels[0], 12
    below.foresee.forward = lambda inputs: -9 * inputs[..., -4:] @ torch.arange(1.0, 5)[:, None]
    below.autoencoder.code = lambda h: h  # tells what it is asked
    h, first = torch.arange(T).float()[None, :, None].repeat(3, 1, 64), first_flags(3, T, 0, 5)
    kept = torch.full_like(h, -1.0)
    goals = torch.stack([below.hindsight_goals(kept, h, first)[..., 0] for _ in range(50)])
    assert set(goals[:, :, 0].flatten().tolist()) == {10, 20, 30, 40} and (goals[..., 4] == -1).all()
    assert set(goals[:, :, 3].flatten().tolist()) == {10, -1} and (goals[..., T - 1] == -1).all()
    below.hindsight = 0.25
    taken = torch.cat([below.hindsight_goals(kept, h, first)[:, 0, 0] for _ in range(300)]) > 0
    assert 0.15 < taken.float().mean() < 0.35


def test_a_goal_is_a_change_and_pays_both_levels(monkeypatch):
    """With hindsight the subgoal reward is the cosine-max of the change asked for and the change since the
    dream began, beyond what was foreseen, less that for a goal that another dream was told, for k ticks. The
    level above is paid for each goal by what its own model expects of h below, less by what it expects in
    another dream. Codes are taught the changes of k ticks, of fewer at first."""
    agent = lively(small(2, hindsight=0.5, horizon=6, starts=5, autoencoder_lr=0.0))
    below, level = agent.levels
    order = torch.randperm(24)
    monkeypatch.setattr(torch, "randperm", lambda n, device: order)
    for each in agent.levels:
        calls = {}
        spy(monkeypatch, each.world_model, "imagine", calls)
        spy(monkeypatch, each, "update_behaviour", calls)
        spy(monkeypatch, each.autoencoder, "loss", calls)
        each.update(batch := batch_of(agent, int(each is level)))
        states, actions = calls["imagine"][1]
        feature, _, reward, *_ = calls["update_behaviour"][0]
        if each is below:
            asked, start = below.autoencoder.decode(feature[1:, :, -64:]), states.h[:1].expand(6, -1, -1)
            made = states.h[1:] - below.origin(start, torch.tensor([1, 2, 3, 4, 4, 4])[:, None])
            made[4:] = 0
            told = onehot(batch["subgoal"], 8).flatten(-2).flatten(0, 1)[order[:5]].roll(2, 0)
            other = cosine_max(below.autoencoder.decode(told), made)
            assert not torch.allclose(below.origin(start), start)
            named, = calls["loss"][0]
            for t in range(1, 7):
                origin = below.origin(states.h[max(0, t - 4)], torch.tensor(min(t, 4)))
                assert torch.allclose(named[t - 1], states.h[t] - origin, atol=1e-5)
        else:
            h = symexp(level.world_model.decode(states.z, states.h)[..., -64:])
            asked, made = below.autoencoder.decode(actions), h[1:] - below.origin(h[:-1])
            other = cosine_max(asked, made.roll(2, 1))
        column = list(each.rewards).index("subgoal" if each is below else "reached")
        paid = cosine_max(asked, made) - other
        assert torch.allclose(reward[..., column], paid, atol=1e-5)
    assert list(small(2).levels[1].rewards) == ["extrinsic", "novelty"]


def test_both_levels_are_paid_for_a_goal_alike():
    """With hindsight: the weight of `subgoal` for who follows a goal and who sets it; the one is paid for k
    ticks, the other at once, and by the level just below."""
    bottom, middle, top = small(3, hindsight=0.5).levels
    assert bottom.rewards == {"extrinsic": 1.0, "subgoal": 0.3}
    assert top.rewards == {"extrinsic": 1.0, "novelty": 0.1, "reached": 0.3}
    assert middle.rewards == bottom.rewards | top.rewards
    for t in range(16):  # in state t + 1 the return goes on, in state t an action is judged
        assert dict(zip(middle.rewards, middle.stays[t, 0].tolist())) == {
            "extrinsic": 1.0, "subgoal": 0.75 * (t < 3), "novelty": 1.0, "reached": 0.0}
        assert middle.weights[t, 0].tolist() == pytest.approx([1.0, 0.3 * (t < 4), 0.1, 0.3])
    assert middle.below == [bottom] and top.below == [middle]
    assert (small(3).levels[1].stays == 1).all()


def test_what_comes_anyway_is_foreseen():
    """Where no action matters the network that foresees comes to know how h changes in 1 ... k ticks."""
    torch.manual_seed(0)
    level = small(2, hindsight=0.5, horizon=6, autoencoder_lr=3e-3).levels[0]
    drift, starts = torch.randn(64), []

    def imagine(start, policy, horizon):
        h = start.h + drift * torch.arange(horizon + 1.0)[:, None, None]
        starts.append(start.h)
        fields = [field.expand(horizon + 1, *field.shape) for field in start[1:]]
        return State(start.x, *fields)._replace(h=h), torch.ones(horizon, len(start.h), 3) / 3

    level.world_model.imagine = imagine
    agent = small(2, hindsight=0.5)
    errors = [level.update(batch_of(agent, 0))["loss/foresee"].item() for _ in range(150)]
    assert errors[-1] < 0.03 * errors[0]
    for ticks in 1, 4:
        wrong = level.origin(starts[-1], torch.tensor(ticks)) - starts[-1] - ticks * drift
        assert wrong.square().mean() < 0.1 * (ticks * drift).square().mean()


def test_speed_work_moves_no_number():
    """Losses and gradient norms of one update at every level are those that the plainest code had."""
    agent = small(3, (64, 64, 3), horizon=5, starts=24)
    for i, (level, pinned) in enumerate(zip(agent.levels, PINNED)):
        rng, batch = np.random.default_rng(i), {}
        for name, (shape, dtype) in agent.specs[i].items():
            high = {"observation": 256, "action": 8 if i else 3}.get(name, 2 if dtype == np.bool_ else 8)
            values = (rng.normal(size=(3, 8, *shape)) if dtype == np.float32
                      else rng.integers(0, high, (3, 8, *shape)))
            batch[name] = torch.from_numpy(values.astype(dtype))
        level.normaliser.floors[0] = 1.0  # as it was when these were noted
        metrics = awake(level).update(batch)
        for name, value in pinned.items():
            assert abs(metrics[name].item() - value) < 1e-4 * max(1, abs(value)), (i, name)


def test_bfloat16_learns_the_same_in_coarser_numbers():
    """Under bfloat16 an update has the losses of float32, and still changes every network."""
    losses = {}
    for enabled in (False, True):
        torch.manual_seed(0)
        agent = awake(small(2, (64, 64, 3), starts=16, horizon=5))
        before = parameters_of(agent)
        with torch.autocast("cpu", torch.bfloat16, enabled, cache_enabled=False):
            losses[enabled] = [level.update(batch_of(agent, i)) for i, level in enumerate(agent.levels)]
        assert all((p != before[name]).any() for name, p in agent.named_parameters())
    for plain, coarse in zip(losses[False], losses[True]):
        for name in plain.keys() & {"loss/image", "loss/vector", "loss/rew", "loss/con", "loss/dyn"}:
            assert torch.allclose(plain[name], coarse[name].float(), rtol=0.05), name
        assert all(np.isfinite(value.item()) for value in coarse.values())


def test_acting_fetches_its_results_in_one_copy(monkeypatch):
    """A step at which all levels tick takes one copy from the device: on a GPU each would wait for it."""
    agent, fetched = small(), []
    memory, flags = agent.initial_memory(1), [np.array([flag]) for flag in (True, False, False)]
    for name in ("cpu", "item", "tolist"):
        fetch = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda self, fetch=fetch: fetched.append(0) or fetch(self))
    _, ticks = agent.act(memory, np.zeros((1, 4), np.float32), np.zeros(1), *flags, agent.discretise())
    assert len(agent.transitions(ticks)) == 3 and len(fetched) == 1


def tabular(action_shape, rewards=("extrinsic",), **behaviour):
    """A level whose actor and critics are tables: linear in a feature that is the one-hot number of a state.
    Returns it and a function from numbers of states to their features."""
    weights = {"extrinsic": 1.0, "subgoal": 0.3, "novelty": 0.1}
    level = Level((4,), action_shape, (0, 8), (8, 8), {name: weights[name] for name in rewards},
                  TINY | dict(mlp_layers=0), **BEHAVIOUR | behaviour)
    return level, lambda number: F.one_hot(number, level.world_model.feature_size).float()


def test_behaviour_by_hand(monkeypatch):
    """Losses and gradients of actor and critics are those of the equations, written out in loops: joint
    log-probability times the weighted sum of normalised advantages, entropy, two-hot cross-entropy to the
    lambda-return and to the slow critic, all weighted by the chance that the episode got that far; nothing of
    a reward that has no weight in that state."""
    H, N, rewards = 3, 5, ("extrinsic", "subgoal", "novelty")
    level, features = tabular((2, 3), rewards)
    weights, stays = torch.tensor([[1.0, 0.3, 0.1], [1.0, 0.3, 0.1], [1.0, 0.0, 0.1]]), torch.rand(H, 3)
    level.weights, level.stays = weights[:, None], stays[:, None]
    for module in (level.actor, level.critics, level.slow_critics):  # the slow ones differ
        for p in module.parameters():
            p.data += torch.randn_like(p)
    monkeypatch.setattr(Optimiser, "step", lambda self: torch.zeros(()))  # leaves the gradients to be seen
    feature, pick = features(torch.arange((H + 1) * N).view(H + 1, N)), torch.randint(3, (H, N, 2))
    reward, discount = torch.randn(H, N, 3) * torch.tensor([3.0, 0.5, 0.002]), torch.rand(H, N)
    alive = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0])

    p = 0.01 / 3 + 0.99 * torch.softmax(level.actor.net(feature).unflatten(-1, (2, 3)), -1)
    numbers, cross_entropy = symexp(torch.linspace(-20, 20, 255)), level.critics.twohot.loss
    logits, slow_logits = (torch.stack([net(feature) for net in critics.nets], -2)
                           for critics in (level.critics, level.slow_critics))
    value, slow_value = (torch.softmax(each, -1).detach() @ numbers for each in (logits, slow_logits))
    returns = torch.empty(H, N, 3)
    for n, r in itertools.product(range(N), range(3)):
        R = value[H, n, r]
        for t in reversed(range(H)):
            after = 0.2 * value[t + 1, n, r] + 0.8 * R
            R = returns[t, n, r] = reward[t, n, r] + discount[t, n] * stays[t, r] * after
    low, high = np.percentile(returns.flatten(0, 1), [5, 95], axis=0)
    scale = torch.tensor(np.maximum(high - low, [0.1, 0.1, 0.01])).float()
    actor_loss, critic_loss = torch.zeros(()), torch.zeros(3)
    for t, n in itertools.product(range(H), range(N)):
        weight = alive[n] * discount[:t, n].prod() / (H * N)
        advantage = ((returns[t, n] - value[t, n]) / scale * weights[t]).sum()
        log_p = sum(p[t, n, i, pick[t, n, i]].log() for i in range(2))
        actor_loss -= weight * (log_p * advantage - 0.05 * (p[t, n] * p[t, n].log()).sum())
        for target in (returns, slow_value):
            critic_loss += weight * (weights[t] > 0) * cross_entropy(logits[t, n], target[t, n])
    by_hand = {"loss/policy": actor_loss, "ent/action": -(p[:-1] * p[:-1].log()).sum((-2, -1)).mean()}
    for i, name in enumerate(rewards):
        by_hand |= {f"loss/value_{name}": critic_loss[i], f"ret/{name}": returns[..., i].mean(),
                    f"rew/{name}": reward[..., i].mean(), f"ret_scale/{name}": scale[i],
                    f"val/{name}": value[..., i].mean()}
    gradients = [torch.autograd.grad(loss, list(module.parameters())) for loss, module in
                 ((actor_loss, level.actor), (critic_loss.sum(), level.critics))]

    metrics = level.update_behaviour(feature, F.one_hot(pick, 3).float().flatten(-2), reward, discount, alive)
    for name, value in by_hand.items():
        assert torch.allclose(metrics[name], value, rtol=1e-3, atol=1e-5), name
    for module, gradient in zip((level.actor, level.critics), gradients):
        for p, exact in zip(module.parameters(), gradient):
            assert torch.allclose(p.grad, exact, rtol=1e-3, atol=1e-5)


def test_the_better_action_becomes_likelier_and_entropy_holds_it_back():
    """Of two actions that pay 2 and 1 the first becomes likely, the less the more entropy is worth; the value
    moves to the return, which is 1.5 here, where both are taken equally often."""
    found = []
    for entropy_scale in (1e-3, 1.0, 10.0):
        level, features = tabular((1, 2), entropy_scale=entropy_scale, slow=0.5, actor_lr=0.1, critic_lr=0.1)
        start, end = (features(torch.full((8,), number)) for number in (0, 1))
        feature, action = torch.stack([start, end]), torch.arange(8) % 2
        for _ in range(60):
            level.update_behaviour(feature, F.one_hot(action, 2).float()[None], 2.0 - action[None, :, None],
                                   torch.zeros(1, 8), torch.ones(8))
        found.append(level.actor(start)[0, 0, 0].item())
        assert abs(level.critics.twohot.mean(level.critics(start))[0, 0] - 1.5) < 0.05
    assert found[0] > 0.95 and found[0] > found[1] > found[2] > 0.5, found


def test_a_small_return_outweighs_the_entropy():
    """Where only a thousandth of a point can be won, the action that wins it becomes likely nevertheless."""
    level, features = tabular((1, 2), entropy_scale=train.PRESETS["cpu"]["entropy_scale"], actor_lr=0.1)
    start, action = features(torch.zeros(8, dtype=torch.long)), torch.arange(8) % 2
    for _ in range(60):
        level.update_behaviour(torch.stack([start, start]), F.one_hot(action, 2).float()[None],
                               1e-3 * (action[None, :, None] == 0), torch.zeros(1, 8), torch.ones(8))
    assert level.actor(start)[0, 0, 0] > 0.9  # with a floor of 1: 0.68


def test_slow_critics_follow_by_slow():
    """After an update the slow critics have come nearer by the share `slow`: no copy, no standstill."""
    level, features = tabular((1, 2), slow=0.1)
    before = parameters_of(level.slow_critics)
    for _ in range(2):
        level.update_behaviour(features(torch.arange(4).view(2, 2)), torch.eye(2)[None], torch.ones(1, 2, 1),
                               torch.ones(1, 2), torch.ones(2))
        for (name, slow), fast in zip(level.slow_critics.named_parameters(), level.critics.parameters()):
            before[name] += 0.1 * (fast - before[name])
            assert torch.allclose(slow, before[name], atol=1e-6) and (slow != fast).any()
            assert not slow.requires_grad


# ------------------------------------------------------------------------------------------------------------
# replay.py
# ------------------------------------------------------------------------------------------------------------

def counting_replay(capacity, length, tau, steps=0, seed=0):
    replay = Replay({"t": ((), np.int64)}, capacity, length, tau, np.random.default_rng(seed))
    for t in range(steps):
        replay.add({"t": t})
    return replay


# The law at tau 0.3, old to new.
DECILES = [0.053, 0.070, 0.080, 0.089, 0.097, 0.106, 0.113, 0.122, 0.130, 0.139]


@pytest.mark.parametrize("held, capacity", [(50, 5000), (2000, 5000), (12_345, 5000)])
def test_draws_follow_the_law_while_the_ring_fills_and_after_it_wraps(held, capacity):
    """Start positions fall into tenths, old first, as the closed form says, at any fill, not only at full."""
    replay = counting_replay(capacity, 11, 0.3, held)
    draws = replay.draw(200_000) / replay.starts
    assert replay.starts == min(held, capacity) - 10
    if replay.starts >= 1000:
        counts = np.histogram(draws, 10, (0, 1))[0] / len(draws)
        assert np.abs(counts - DECILES).max() < 0.004
    uniform = counting_replay(capacity, 11, 0.0, held)
    assert abs((uniform.draw(200_000) / uniform.starts).mean() - 0.5) < 0.02
    assert abs(draws.mean() - 0.575) < 0.02  # the law's mean: 0.3 * 3/4 + 0.7 * 1/2


def test_the_law_is_the_distribution_of_expected_counts():
    """Uniform draws on a growing buffer give entry x of n about ln(n/x) draws: the density, integrated."""
    n = 2000
    expected = np.cumsum((1 / np.arange(1, n + 1))[::-1])[::-1]  # 1/i + ... + 1/n
    u = np.arange(1, n + 1) / n
    assert np.abs(np.cumsum(expected) / expected.sum() - etbs_cdf(u)).max() < 0.005
    assert etbs_cdf(np.array([0.0, 1.0])).tolist() == [0, 1]


@pytest.mark.parametrize("seed", range(8))
def test_no_sequence_crosses_the_write_head(seed):
    """Every sequence is consecutive in time, and every start can be drawn: for rings of any size, up to the
    smallest that holds a sequence, before they are full and after they have wrapped a hundred times."""
    rng = np.random.default_rng(seed)
    length = int(rng.integers(1, 9))
    capacity = length + int(rng.choice([0, 1, 13]))
    replay = counting_replay(capacity, length, 0.3)
    for t in range(100 * capacity + 5):
        replay.add({"t": t})
        if length <= t + 1 < 3 * capacity or t > 100 * capacity:
            batch = replay.sample(200)["t"]
            assert (np.diff(batch, axis=1) == 1).all()
            assert set(batch[:, 0]) == set(range(max(0, t + 1 - capacity), t + 2 - length))


def test_a_replay_that_is_too_small_says_so():
    """Too little in it, or too little room, is an error in words."""
    with pytest.raises(ValueError, match="holds 3 steps, a sequence needs 7"):
        counting_replay(20, 7, 0.3, 3).sample(1)
    with pytest.raises(ValueError, match="cannot hold one sequence"):
        counting_replay(5, 7, 0.3)


def test_saved_pieces_become_the_same_ring(tmp_path):
    """Each save writes only new steps, old files leave with their steps, loading gives the same ring."""
    replay = counting_replay(20, 5, 0.3)
    for t in range(73):
        replay.add({"t": t})
        if t % 7 == 6 or t in (30, 31):
            written = set(tmp_path.iterdir())
            replay.save(tmp_path)
            replay.prune(tmp_path)
            assert len(set(tmp_path.iterdir()) - written) == 1
            loaded = counting_replay(20, 5, 0.3)
            loaded.load(tmp_path, replay.total)
            assert (loaded.arrays["t"] == replay.arrays["t"]).all() or replay.total < 20
            assert (loaded.sample(50)["t"] == counting_replay(20, 5, 0.3, t + 1).sample(50)["t"]).all()
    assert len(list(tmp_path.iterdir())) <= 5
    total, kept = replay.total, replay.saved
    replay.add({"t": 73})
    replay.save(tmp_path)  # a save whose checkpoint never came: undone by loading the one before
    older = counting_replay(20, 5, 0.3)
    older.load(tmp_path, kept)
    assert older.total == kept < total + 1 and older.sample(20)["t"].max() < kept
    for t in range(1073, 1078):  # and what comes instead is saved as if it had never been
        older.add({"t": t})
    older.save(tmp_path)
    again = counting_replay(20, 5, 0.3)
    again.load(tmp_path, older.total)
    assert (again.arrays["t"] == older.arrays["t"]).all()
    with pytest.raises(ValueError, match="needs 99"):
        counting_replay(20, 5, 0.3).load(tmp_path, 99)


def test_memory_is_taken_at_the_start_and_never_grows():
    """A ring has all its memory before the first step: too little shows at once, not after hours."""
    script = """
import resource, numpy as np; from replay import Replay
resident = lambda: int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() / 1e6
before = resident(); replay = Replay({"o": ((10_000,), np.uint8)}, 5000, 8, 0.3, np.random.default_rng(0))
after = resident()
for t in range(12_000): replay.add({"o": t % 256}); t < 8 or replay.sample(2)
print(after - before, resident() - after)"""
    if not Path("/proc/self/statm").exists():
        pytest.skip("resident memory is read from /proc")
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
        self.closed = 0  # times
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
        self.closed += 1
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
    run.remember(run.act())
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


@pytest.mark.parametrize("lengths", [itertools.repeat(1), [3, 25, 1, 11, 8, 1, 2, 30, 10 ** 9]],
                         ids=["of one step", "of all lengths, one without an end"])
def test_a_run_survives_odd_episodes_and_a_time_limit_is_no_death(lengths, registered, tmp_path):
    """All rewards and ends reach all replays, and no sequence is torn, in rings wrapped many times; an end by
    a time limit is none of the world. Level i is updated every train_every k^i steps, once it has enough."""
    config = catch_config(tmp_path, levels=3, k=2, steps=150, warmup=0, train_every=4, batch_size=4,
                          batch_length=6, replay_size=24, starts=8, horizon=3)
    name = registered(lengths=lengths, reward=lambda env: float(env.steps), cut=lambda episode: episode % 2)
    run, stored = train.Run(config, train.make_env(name)), [[] for _ in range(3)]
    for replay, steps in zip(run.replays, stored):
        replay.add = lambda step, add=replay.add, steps=steps: (
            steps.append(step | {"at": run.step}), add(step))
    train.train(run, progress=False)
    for i, (replay, steps) in enumerate(zip(run.replays, stored)):
        field = {name: np.array([step[name] for step in steps]) for name in steps[0]}
        ends = np.flatnonzero(field["is_last"])
        assert (np.flatnonzero(field["is_first"]) == np.append(0, ends + 1)[:field["is_first"].sum()]).all()
        assert (field["is_terminal"][ends] == (np.arange(len(ends)) % 2 == 0)).all()
        assert not field["is_terminal"][~field["is_last"]].any()
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
    (BEGIN + "--batch_length 1", None, "--batch_length 1 is out of range: 2 to "),
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
    commits = train.load_checkpoint(directory / "checkpoint.pt", "cpu")["commits"]
    assert commits == json.loads(first)["trained_by"]  # the same commit is not named twice
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


def test_a_module_of_ones_own(tmp_path, monkeypatch, refused):
    """--game my_module:MyEnv-v0 imports the module from the working directory, wherever train.py is."""
    (tmp_path / "corridor.py").write_text(
        "import gymnasium\nfrom test_hieros import Scripted\ngymnasium.register('Corridor-v0', Scripted)\n")
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    config = train.make_config({"game": "corridor:Corridor-v0", "device": "cpu"})
    assert (config.game, config.preset) == ("corridor:Corridor-v0", "vector")
    assert config.logdir == "runs/corridor_Corridor-v0-0"
    env = train.make_env(config.game, render_mode="rgb_array")
    env.reset(seed=0)
    assert env.render().shape == (40, 60, 3) and train.make_env(config.game).render_mode is None
    assert "nearest: Corridor-v0" in refused("train.py", "--game", "corridor:Coridor-v0")


def test_own_games_are_scored_beside_random_play(registered, tmp_path, capsys):
    """A run of one ends with mean, error and episodes, and with 20 episodes of random play from the same
    evaluation; its result says all that is known of where it comes from."""
    assert train.main(["--game", registered(limit=6), "--logdir", str(tmp_path), *QUICK]) == 0
    score = "6.0 +- 0.0 (standard error of {} episodes)"
    assert f"score {score.format(2)}; random play {score.format(20)}" in capsys.readouterr().out
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
    for _ in range(3):
        run.play(0)
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
    assert all(env.closed == 1 for env in Scripted.made)
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
    assert "(standard error of 2 episodes), 15 more failed" in out and "Traceback" in error
    assert "Tiny-v0 fails at step 5 of an episode: ZeroDivisionError, division by zero\n" in error
    found = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert found["returns"] == [10.0, 10.0] and found["failed"] == 15
    registered(lengths=itertools.repeat(99), step=lambda env: env.steps == 25 and 1 / 0)
    with pytest.raises(train.UsageError, match="no episode came to its end; the last checkpoint is intact"):
        train.main([*command, "--logdir", str(tmp_path / "other")])


def test_seeds_are_those_of_global_random_numbers_too(registered, tmp_path):
    """An environment that draws from `random` or from NumPy's global numbers gives the same run again."""
    name, found = registered(reward=lambda env: random.random() + np.random.random()), []
    for seed in (0, 0, 1):
        run = train.Run(catch_config(tmp_path, seed=seed), train.make_env(name))
        run.play(0)
        found.append([run.score, *train.play(None, lambda: train.make_env(name), 2, seed, progress=False)])
    assert found[0] == found[1] and not set(found[1]) & set(found[2])


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
    rooms = script("grid_rooms")
    run, _ = rooms.trained(rooms.GridRooms(), steps=2800)
    with torch.inference_mode():
        study, = script("subgoals").subgoal_study(run.agent, rooms.GridRooms(), 1, steps=1200)
    # Measured: obeyed 0.60, reached 0.10 above shuffled, able 0.20 above unled.
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
    """A result file as train.evaluation makes it, of a run with the `given` settings, its entries changed;
    those that are None are left out."""
    config = dataclasses.asdict(train.Config()) | {"preset": "paper", "device": "cpu"} | given
    entry = {name: config[name] for name in ("game", "preset", "levels", "seed")} | {
        "agent_steps": 100_000, "returns": [1.0, 3.0], "curve": [[1000 * i, i - 21.0] for i in range(1, 30)],
        "config": config, "commit": "abc1234", "dirty": False, "trained_by": ["abc1234"]} | changes
    path.write_text(json.dumps({name: value for name, value in entry.items() if value is not None}))
    return str(path)


def groups(*files):
    """The titles of the groups that `--table` makes of result files."""
    return list(evaluate.load_results(files))


@slow
def test_evaluation_of_a_run(tmp_path, capsys):
    """A saved run plays as many episodes as asked; its score goes to a file named after what was played, and
    what training wrote stays as it is; with --json - the standard output is that JSON and nothing else. The
    same seed gives the same score. The checkpoint itself may be named."""
    untrained_run(tmp_path)
    (tmp_path / "evaluation.json").write_text("written by training")
    assert evaluate.main([str(tmp_path), "--episodes", "1", "--seed", "1"]) == 0
    path, printed = tmp_path / "evaluation-step0-seed1-1.json", capsys.readouterr().out
    assert "breakout after 0 steps: score" in printed and f"written to {path}" in printed
    summary = json.loads(path.read_text())
    assert len(summary["returns"]) == 1 and summary["mean"] == np.mean(summary["returns"])
    assert summary["config"]["levels"] == summary["levels"] == 2 and summary["evaluation_seed"] == 1
    path.unlink()
    evaluate.main([str(tmp_path / "checkpoint.pt"), "--episodes", "1", "--seed", "1", "--json", "-"])
    assert json.loads(capsys.readouterr().out)["returns"] == summary["returns"]
    assert not path.exists() and (tmp_path / "evaluation.json").read_text() == "written by training"


def test_a_score_is_written_before_it_is_printed_and_its_file_tried_before_it_is_played(
        tmp_path, monkeypatch, capsys):
    """A score survives a standard output that has gone away; a place where nothing can be written is named
    before the first episode."""
    untrained_run(tmp_path)
    played = []
    monkeypatch.setattr(train, "play", lambda agent, make, episodes, seed: (
        played.append(torch.initial_seed()) or [1.0] * episodes))
    monkeypatch.setattr("builtins.print", lambda *args: (_ for _ in ()).throw(BrokenPipeError(32, "gone")))
    with pytest.raises(train.UsageError, match="gone"):
        evaluate.main([str(tmp_path), "--episodes", "3", "--seed", "7"])
    assert json.loads((tmp_path / "evaluation-step0-seed7-3.json").read_text())["mean"] == 1.0
    assert played == [7]  # actions are drawn by the seed that was asked for
    monkeypatch.undo()
    monkeypatch.setattr(evaluate, "evaluation", lambda *args: pytest.fail("played for nothing"))
    for place in ("/proc/a.json", str(tmp_path / "nowhere" / "a.json")):
        with pytest.raises(train.UsageError, match="a.json cannot be written"):
            evaluate.main([str(tmp_path), "--json", place])
    (tmp_path / "evaluation-step0-seed0-100.json").mkdir()
    with pytest.raises(train.UsageError, match="it is a directory"):
        evaluate.main([str(tmp_path)])


def test_evaluation_loads_the_trained_weights(tmp_path):
    """What is evaluated are the weights of the checkpoint, not freshly drawn ones."""
    run = untrained_run(tmp_path)
    with torch.no_grad():
        for parameter in run.agent.parameters():
            parameter.add_(1.0)
    run.save()
    _, agent, _ = evaluate.load_run(tmp_path, "cpu")
    for name, value in agent.state_dict().items():
        assert torch.equal(value, run.agent.state_dict()[name]), name


@slow
def test_the_modules_work_without_results(tmp_path):
    """The .py files alone are enough: evaluate.py is imported, gives help and a table, and says in the table
    why no published methods stand there."""
    for path in HERE.glob("*.py"):
        shutil.copy(path, tmp_path)
    write_result(tmp_path / "a.json")
    command = [sys.executable, "evaluate.py"]
    for flags, says in ((["--help"], "usage"), (["--table", "a.json"], "without results/published.csv")):
        done = subprocess.run(command + flags, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0 and says in done.stdout and not done.stderr, done.stderr


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


class Undrawn(Echo):
    """Has nothing to show."""
    metadata = {"render_modes": []}


class Undrawable(Echo):
    """Cannot be drawn since a library is missing."""

    def render(self):
        raise gymnasium.error.DependencyNotInstalled("pygame is not installed")


@pytest.fixture
def own_games(monkeypatch):
    """Three environments that observe numbers, known to Gymnasium."""
    monkeypatch.setattr(gymnasium.envs.registration, "registry", dict(gymnasium.registry))
    monkeypatch.setattr(gymnasium, "registry", gymnasium.envs.registration.registry)
    for kind in (Echo, Undrawn, Undrawable):
        gymnasium.register(f"{kind.__name__}-v0", kind)


@slow
def test_own_games_are_evaluated_and_filmed(own_games, tmp_path, monkeypatch, capsys):
    """An environment that observes numbers gets a score beside that of random play, measured in the same
    evaluation, also in the table; its film shows its own frames, and where it has none, one line says why."""
    pytest.importorskip("PIL")
    titles, frames, drawn = [], [], evaluate.draw_frame
    monkeypatch.setattr(evaluate, "draw_frame", lambda title, panels: (
        titles.append(title) or frames.append(panels) or drawn(title, panels)))
    untrained_run(tmp_path / "run", "Echo-v0")
    evaluate.main([str(tmp_path / "run"), "--video", str(tmp_path / "a.gif"), "--episodes", "2"])
    assert "Echo-v0 after 0 steps: score 6.0" in capsys.readouterr().out
    assert [panels[0][0].shape for panels in frames[:8]] == 8 * [(40, 80, 3)] and len(frames) == 300
    assert [panels[0][0][0, 0, 0] for panels in frames[:9]] == [0, 1, 2, 3, 4, 5, 6, 0, 1]
    assert [title.split("score ")[1] for title in titles[:9]] == ["0", "1", "2", "3", "4", "5", "6", "0", "1"]
    evaluate.main(["--table", str(tmp_path / "run" / "evaluation-step0-seed0-2.json")])
    assert "Echo-v0 is not of Atari 100k and in no aggregate; random play, measured here: 6.0" in (
        capsys.readouterr().out)
    monkeypatch.setattr(evaluate, "evaluation", lambda *args: pytest.fail("played before it was known"))
    for game, says in (("Undrawn-v0", "no render_mode rgb_array"),
                       ("Undrawable-v0", "pygame is not installed")):
        untrained_run(tmp_path / game, game)
        with pytest.raises(train.UsageError, match=f"no film .*{says}"):
            evaluate.main([str(tmp_path / game), "--video", str(tmp_path / "b.gif"), "--episodes", "2"])


@pytest.fixture(scope="module")
def saved_run(tmp_path_factory):
    """The directory of a run that has just begun, to be copied."""
    directory = tmp_path_factory.mktemp("saved") / "run"
    run = untrained_run(directory)
    run.remember(run.act())  # one step for every replay
    run.save()
    return directory


@pytest.mark.parametrize("command, says", [
    ("", "name one directory"), ("run run", "name one directory"), ("--episodes 3", "name one directory"),
    ("nowhere", "nowhere/checkpoint.pt cannot be used: FileNotFoundError"),
    ("a.json", "a.json/checkpoint.pt cannot be used"),
    ("empty", "empty/checkpoint.pt cannot be used: FileNotFoundError"),
    ("empty/checkpoint.pt", "empty/checkpoint.pt cannot be used: FileNotFoundError"),
    ("run --vidoe film.gif", "unrecognized arguments: --vidoe"), ("run --video film.mp4", "must end in .gif"),
    ("run --json run/checkpoint.pt", "must end in .json"), ("run --json run.json", "it is a directory"),
    ("run --video nowhere/a.gif", "nowhere/a.gif cannot be written: FileNotFoundError"),
    ("run --json nowhere/a.json", "nowhere/a.json cannot be written: FileNotFoundError"),
    ("run --episodes 0", "at least 1"), ("run --episodes many", "invalid int"),
    ("run --seed -1", "--seed -1"), ("run --device cuda:99", "--device cuda:99"),
    ("run --strip a.png", "unrecognized arguments: --strip"),
    ("--table", "needs result files"), ("--table a.json --video film.gif", "use two commands"),
    ("--table a.json --episodes 3", "use two commands"),
    ("--table a.json nowhere.json", "nowhere.json is not a result"), ("--table run", "run is not a result"),
    ("--table a.json a.json", "are the same run"), ("--table run/checkpoint.pt", "is not a result"),
])
def test_a_wrong_command_is_one_clear_line(saved_run, refused, tmp_path, command, says):
    """A command that cannot succeed says why, before anything is played."""
    write_result(tmp_path / "a.json")
    (tmp_path / "empty").mkdir()
    (tmp_path / "run.json").mkdir()
    (tmp_path / "run").symlink_to(saved_run)
    assert says in refused("evaluate.py", *command.split())


@pytest.mark.parametrize("content", [
    "", "[" * 100_000, "3", "[]", "NaN", "{}", b"\xff\xfe", {"returns": []}, {"returns": [1.0, float("nan")]},
    {"returns": ["high"]}, {"returns": 3}, {"returns": [[1.0]]}, {"returns": [10 ** 400]}, {"game": None},
    {"seed": "0"}, {"curve": [[1, 2, 3]]}, {"curve": {}}, {"config": 3}, {"config": {}}, {"config": None},
    {"trained_by": 3}],
    ids=lambda content: str(content)[:20])
def test_a_malformed_result_is_one_clear_line(refused, tmp_path, content):
    """A file that is no JSON, without finite returns or with missing or wrong entries is refused by name."""
    path = tmp_path / "a.json"
    if isinstance(content, dict):
        write_result(path, **content)
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert "a.json is not a result" in refused("evaluate.py", "--table", path)


def test_help_names_every_flag_and_valid_examples(capsys):
    """--help of both programs exits 0, knows every setting, and each example that it gives can be parsed."""
    for program, parse in ((train, train.parse_config), (evaluate, evaluate.parse)):
        with pytest.raises(SystemExit) as end:
            parse(["--help"])
        text = capsys.readouterr().out
        examples = [re.split(r"   | \| ", line[2:])[0].split() for line in text.splitlines()
                    if line.startswith("  python ")]
        assert end.value.code == 0 and len(examples) > 3
        for _, name, *flags in examples:
            assert name == Path(program.__file__).name
            parse(flags)
        if program is train:
            assert all(f"--{field.name} " in text for field in dataclasses.fields(train.Config))
            assert re.search(r"\(paper 16, cpu 8, .*debug 4\)", " ".join(text.split()))


def test_matplotlib_and_pillow_are_optional(tmp_path, monkeypatch, capsys, saved_run):
    """Without them scores and tables work as ever, and a film says in one line what is missing."""
    for name in ("PIL", "matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(train.UsageError, match="pip install pillow"):
        evaluate.main([str(saved_run), "--video", str(tmp_path / "a.gif")])
    assert evaluate.main(["--table", write_result(tmp_path / "a.json")]) == 0


def painting(agent):
    """The agent with decoders that paint something: untrained ones are all zero."""
    for level in agent.levels:
        for parameter in level.world_model.decoder.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    return agent


def test_subgoals_are_decoded_level_by_level():
    """A state of level 2 becomes pixels through level 1 and level 0: of each stacked observation the newest
    of the k states is taken, its z made one-hot, its h brought back from symlog."""
    torch.manual_seed(0)
    agent = painting(small(levels=3, observation_shape=(64, 64, 3)))
    states = [(onehot(torch.randint(8, (1, 8)), 8), 3 * torch.randn(1, 64)) for _ in range(3)]
    for above, (z, h) in zip(agent.levels[1:], states):  # what each higher decoder is made to say
        newest = torch.cat([0.6 * z.flatten(1) + 0.1, symlog(h)], 1)
        stacked = torch.cat([torch.randn(1, 3 * newest.shape[1]), newest], 1)
        above.world_model.decode = lambda z, h, stacked=stacked: stacked
    expected = evaluate.image_bytes(agent.levels[0].world_model.decode(*states[0])[0])
    with torch.no_grad():
        assert np.array_equal(evaluate.state_image(agent, 2, *states[2]), expected)
    assert expected.shape == (64, 64, 3) and expected.dtype == np.uint8
    every = torch.arange(256).expand(3, 64, 256).unfold(-1, 64, 64).movedim(2, 0)  # all bytes come back
    assert np.array_equal(evaluate.image_bytes(every / 255), every.movedim(1, -1))


def record_film(monkeypatch, agent, env, **arguments):
    """The panels' images of a film: [[image of each panel] of each step]."""
    frames = []
    monkeypatch.setattr(evaluate, "draw_frame",
                        lambda title, panels: frames.append([image for image, _ in panels]))
    monkeypatch.setattr(evaluate, "save_film", lambda path, frames: None)
    with torch.inference_mode():
        evaluate.film(agent, env, "pong", 0, "film.gif", **arguments)
    return frames


@slow
def test_film_shows_subgoals_at_their_own_pace(monkeypatch):
    """In a film level i's goal changes when level i + 1 acts, every k^(i+1) steps, and stands until then."""
    torch.manual_seed(0)
    frames = record_film(monkeypatch, small(3, (64, 64, 3), 6), train.Atari("pong"), steps=40, restart=5)
    assert {len(panels) for panels in frames} == {5}
    for panel, pace in ((3, 4), (4, 16)):
        changes = [t for t in range(1, 40) if frames[t][panel] is not frames[t - 1][panel]]
        assert changes == list(range(pace, 40, pace))


def test_film_draws_each_goal_from_the_state_in_which_it_was_set(monkeypatch):
    """The picture of level i's goal is decoded from level i's z of that moment and from its goal's place in
    h-space, by level i's own autoencoder."""
    agent, memories, drawn = small(3, (64, 64, 3), 6), [], []
    act = agent.act
    agent.act = lambda *args, **now: memories.append(act(*args, **now)) or memories[-1]
    monkeypatch.setattr(evaluate, "state_image",
                        lambda agent, i, z, h: drawn.append((len(memories), i, z, h)))
    record_film(monkeypatch, agent, train.Atari("pong"), steps=17)
    for t, (memory, _) in enumerate(memories):
        *goals, reconstruction, dream = [own for when, *own in drawn if when == t + 1]
        assert [i for i, _, _ in goals] == [0] * (t % 4 == 0) + [1] * (t % 16 == 0)
        for i, z, h in goals:
            held = memory["levels"][i]
            with torch.inference_mode():
                g_h = agent.levels[i].autoencoder.decode(held["subgoal"])
            assert z is held["z"] and torch.equal(h, g_h)


def test_film_novelty_is_of_what_came_in_three_ticks(monkeypatch):
    """With hindsight the novelty of a level is the autoencoder's error of a change beyond what was foreseen,
    of as many ticks as there are between the states that the film has: k - 1."""
    agent, asked, seen = small(3, (64, 64, 3), 6, hindsight=0.5), [], []
    level, act = agent.levels[1], agent.act
    agent.act = lambda *args, **now: seen.append(act(*args, **now)) or seen[-1]
    level.origin = lambda start, ticks=None: asked.append((start, ticks)) or start
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "state_image", lambda *_: None)
        record_film(patch, agent, train.Atari("pong"), steps=21)
    h = [ticks[1]["state"].h for _, ticks in seen if len(ticks) > 1]  # of ticks 0 ... 5
    start, ticks = [each for each in asked if each[1] is not None][-1]
    assert ticks.tolist() == [3] and torch.allclose(start, h[2], atol=1e-5)


@slow
def test_film_dream_starts_from_the_truth_and_then_sees_nothing(monkeypatch):
    """The dream of the film equals the reconstruction where it restarts, and whatever the game shows
    afterwards leaves it unchanged; the actions do change it."""
    class Garbled(train.Atari):
        def step(self, action):
            return 255 - super().step(action)[0], 0.0, False, False, {}

    def filmed(env, restart=100, actions=None):
        torch.manual_seed(0)
        agent = painting(small(1, (64, 64, 3), 6))
        torch.manual_seed(1)  # an untrained actor is uniform: the same random numbers give the same actions
        if actions is not None:
            agent.levels[0].policy = lambda state, goal: torch.rand(state.h.shape[:-1] + (1,)) * 0 + actions
        return record_film(monkeypatch, agent, env, steps=12, restart=restart)

    truth, garbled = filmed(train.Atari("pong")), filmed(Garbled("pong"))
    assert np.array_equal(truth[0][1], truth[0][2])
    assert not np.array_equal(truth[11][1], garbled[11][1])
    for t in range(12):
        assert np.array_equal(truth[t][2], garbled[t][2])
    left, right = (filmed(train.Atari("pong"), actions=torch.eye(6)[a]) for a in (2, 3))
    assert not np.array_equal(left[11][2], right[11][2])
    always = filmed(train.Atari("pong"), restart=0)
    assert all(np.array_equal(panels[1], panels[2]) for panels in always)


@slow
def test_film_file(tmp_path, capsys):
    """--video writes a GIF of captioned panels, three for a flat agent and two more for three levels, and
    less than its limit of bytes even of pure noise."""
    Image = pytest.importorskip("PIL.Image")
    pytest.importorskip("matplotlib")
    for levels, panels in ((1, 3), (3, 5)):
        path = tmp_path / f"{levels}.gif"
        with torch.inference_mode():
            evaluate.film(small(levels, (64, 64, 3), 6), train.Atari("pong"), "pong", 0, path, steps=6)
        with Image.open(path) as film:
            assert film.n_frames == 6 and film.width == 10 + panels * 202 and film.height >= 192
    rng = np.random.default_rng(0)
    noise = [Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)) for _ in range(30)]
    evaluate.save_film(path, noise, limit=60_000)
    assert 10_000 < path.stat().st_size < 60_000 and "of 30 steps" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("method, mean, median", [
    ("SimPLe", 0.332, 0.134), ("TWM", 0.956, 0.505), ("IRIS", 1.046, 0.289), ("STORM", 1.266, 0.580),
    ("DIAMOND", 1.459, 0.373), ("BBF", 2.247, 0.917)])
def test_aggregates_agree_with_published_ones(method, mean, median):
    """Fed with the published scores of the 26 games, mean and median come out as published."""
    scores = evaluate.human_normalised(evaluate.read_published()[method])
    assert scores.keys() == train.REFERENCE.keys()
    assert np.allclose(evaluate.aggregate(list(scores.values()))[:2], (mean, median), atol=6e-4)


def test_aggregates_by_hand():
    """Mean and median are those of the games' means, the interquartile mean leaves out a quarter of all runs
    at each end, the optimality gap counts what is missing to 1; all games weigh the same, however many runs
    they have."""
    scores = [np.array([0.0, 0.2, 0.4, 0.6]), np.array([0.8, 1.0, 1.4, 5.0])]
    expected = [(0.3 + 2.05) / 2, (0.3 + 2.05) / 2,
                (0.4 + 0.6 + 0.8 + 1.0) / 4, (1.0 + 0.8 + 0.6 + 0.4 + 0.2) / 8]
    assert np.allclose(evaluate.aggregate(scores), expected)
    assert np.allclose(evaluate.aggregate([scores[0], np.tile(scores[1], 3)]), expected)
    three = [np.array([0.1]), np.array([0.2]), np.array([3.0])]
    assert np.allclose(evaluate.aggregate(three), (1.1, 0.2, 1.1, 1.7 / 3))  # a quarter of three runs is none


def test_bootstrap_is_stratified():
    """Intervals come from redrawing runs within each game: games whose runs agree give none, however much the
    games differ; for many runs of one game the mean's interval is the textbook's +-1.96 standard errors."""
    same = [np.full(3, value) for value in (0.1, 0.5, 2.0)]
    assert np.allclose(evaluate.bootstrap(same, 200), evaluate.aggregate(same))
    runs = np.random.default_rng(1).normal(size=400)
    low, high = evaluate.bootstrap([runs], 1000)[:, 0]
    assert np.allclose((low, high), runs.mean() + np.array([-1.96, 1.96]) * runs.std() / 20, atol=0.015)


def test_table_says_what_it_knows(tmp_path, capsys):
    """The table marks published figures, aggregates over the games that are there and says so, gives no
    interval to single runs, and keeps games without a human score out. As JSON it says the same."""
    files = [write_result(tmp_path / "a.json"), write_result(tmp_path / "b.json", {"levels": 1}),
             write_result(tmp_path / "c.json", {"game": "frostbite"}, returns=[2000], commit="def5678",
                          trained_by=None),
             write_result(tmp_path / "d.json", {"game": "tennis"})]
    evaluate.main(["--table", *files])
    flat, full = capsys.readouterr().out.split("### ")[1:]
    assert flat.startswith("preset paper, levels 1, 100,000 agent steps\n") and "frostbite" not in flat
    assert "Commits: abc1234.\n" in flat and "Commits: abc1234, def5678.\n" in full
    assert "over 2 of the 26 games; intervals need several runs" in full and "95%" not in full
    assert "tennis is not of Atari 100k and in no aggregate" in full and " 2901.0 |" in full
    assert all(name + "*" in full for name in ("random", "human", *evaluate.read_published()))
    assert f"{(2 + 20.7) / (14.6 + 20.7):.3f}" in full
    evaluate.main(["--table", *files, write_result(tmp_path / "e.json", {"seed": 1}, returns=[8]),
                   "--json", "-"])
    flat, full = json.loads(capsys.readouterr().out)
    assert full["games"]["pong"]["scores"] == [2.0, 8.0] and full["commits"] == ["abc1234", "def5678"]
    assert flat["games"]["pong"]["scores"] == [2.0] and flat["interval"] is None
    expected = ((5 + 20.7) / 35.3 + (2000 - 65.2) / (4334.7 - 65.2)) / 2
    assert np.isclose(full["aggregates"]["here"]["mean"], expected)
    low, high = full["interval"]["mean"]
    assert low < expected < high
    assert np.isclose(full["aggregates"]["IRIS*"]["mean"], (1 + (259.12 - 65.2) / (4334.7 - 65.2)) / 2)
    assert "Hieros*" not in full["aggregates"]  # of Pong its score is not known


def test_errors_of_episodes_and_spread_of_seeds_are_two_columns(tmp_path, capsys):
    """The standard deviation of the runs' scores and the standard error of one run's score over its episodes,
    mean over runs, stand in columns of their own; neither is made up where one number is all there is."""
    def columns(*files):
        evaluate.main(["--table", *files])
        lines = [line.split("|") for line in capsys.readouterr().out.splitlines() if "|" in line]
        cells = dict(zip(map(str.strip, lines[0]), map(str.strip, lines[2])))
        return cells["runs"], cells["score"], cells["seeds' s.d."], cells["episodes' s.e."]

    returns = [[0.0, 8.0], [10.0, 20.0]]  # means 4 and 15; deviations 32 ** 0.5, 50 ** 0.5 of two episodes
    files = [write_result(tmp_path / f"{i}.json", {"seed": i}, returns=r) for i, r in enumerate(returns)]
    assert columns(*files) == ("2", "9.5", f"{11 / 2 ** 0.5:.1f}", "4.5")
    assert columns(files[0]) == ("1", "4.0", "-", "4.0")
    assert columns(write_result(tmp_path / "2.json", returns=[7.0])) == ("1", "7.0", "-", "-")


def test_only_seeds_are_averaged(tmp_path):
    """Two runs share a group if nothing that touches learning differs but the seed: every other setting keeps
    them apart, and its value is in the title, where it is not the preset's; so do agent steps, the code that
    was changed, and what a file says of such changes."""
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    write_result(first)
    same = {"seed": 1, "logdir": "runs/b", "log_every": 7, "save_every": 7, "eval_episodes": 7, "steps": 7}
    assert groups(first, write_result(second, same)) == ["preset paper, levels 3, 100,000 agent steps"]
    for field in dataclasses.fields(train.Config):
        if field.name in same or field.name in ("game", "device", "precision"):
            continue
        usual = getattr(train.Config(), field.name)
        value = "cpu" if field.name == "preset" else usual + 1 if field.type in (int, float) else not usual
        titles = groups(first, write_result(second, {field.name: value, "seed": 1}))
        assert len(titles) == 2 and any(f"{field.name} {value}" in title for title in titles), titles
    for changes in ({"dirty": True}, {"trained_by": ["abc1234", "def5678+"]}, {"agent_steps": 50_000},
                    {"change": "the goal is hidden"}):
        assert len(groups(first, write_result(second, {"seed": 1}, **changes))) == 2, changes
    changed = [write_result(tmp_path / f"{commit}.json", {"seed": i}, dirty=True, trained_by=[commit])
               for i, commit in enumerate(("abc1234", "def5678"))]
    assert len(groups(*changed)) == 2  # how, nobody knows


def test_settings_that_a_file_lacks_keep_it_apart_unless_they_were_neutral(tmp_path):
    """A setting that came after a run is unknown, which is not the same as any value; one that was removed
    since does not separate at the value at which it did nothing, and does at any other. On a CPU tf32 is
    float32."""
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    write_result(first)

    def together(second_config, **changes):
        write_result(second, second_config | {"seed": 1}, **changes)
        return len(groups(first, second)) == 1

    old = {"observation_variance": 0.0, "sequence": "s5", "compile": False, "precision": "float32"}
    assert together(old) and together({})
    for name, value in (("observation_variance", 60.0), ("sequence", "gru"), ("compile", True),
                        ("precision", "bf16"), ("made_up", 1)):
        assert not together(old | {name: value})
    write_result(second, {"seed": 1})
    content = json.loads(second.read_text())
    del content["config"]["tau"]
    second.write_text(json.dumps(content))
    assert groups(first, second)[1].endswith("100,000 agent steps, tau unknown")
    gpu = [write_result(tmp_path / f"{name}.json", {"device": "cuda", "precision": name, "seed": seed})
           for seed, name in enumerate(("tf32", "float32"))]
    assert len(groups(*gpu)) == 2


def test_kept_results_have_certain_origins():
    """Each result in results/cpu holds its commit and all of its settings, and runs that were trained by
    unlike code or settings are in different groups, as of Boxing with other scales of the pixels, and of
    Kung-Fu Master with the goal hidden."""
    files = [path for path in (HERE / "results" / "cpu").glob("*.json") if "subgoals" not in path.name]
    found = evaluate.load_results(files)
    assert len(files) >= 41 and not any("unknown" in group for group in found)
    group_of = {path.stem: group for group, games in found.items() for runs in games.values()
                for path in (run["path"] for run in runs)}
    boxing = {group_of[f"boxing-levels3-{name}"]
              for name in ("seed1", "deviation-febc4ec", "deviation-14b22b9")}
    assert len(boxing) == 3 and group_of["boxing-levels3-seed0"] == group_of["boxing-levels3-seed1"]
    hidden = {group_of[f"kung_fu_master-levels3-{name}"]
              for name in ("nogoal-seed1", "hidden1", "seed1-25000")}
    assert len(hidden) == 3 and group_of["krull-levels1-seed0"] != group_of["krull-levels1-gru"]
    assert group_of["crazy_climber-levels3-seed0"] != group_of["crazy_climber-levels3-seed0-93ce823"]


def test_the_same_run_twice_is_refused(tmp_path):
    """A run given twice would count twice: the message has both file names. Another seed is another run."""
    a, b = write_result(tmp_path / "a.json"), write_result(tmp_path / "b.json", returns=[0])
    with pytest.raises(train.UsageError, match="b.json and .*a.json are the same run: pong, seed 0"):
        evaluate.main(["--table", a, b])
    assert evaluate.main(["--table", a, write_result(tmp_path / "b.json", {"seed": 1})]) == 0


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
    level.autoencoder.encode = lambda h: F.one_hot(h[:, :8].long(), 8).float()
    level.autoencoder.decode = lambda code: code

    def compare(goal, h):
        if goal.ndim == 1 or h.unique().tolist() == [0, 1]:  # one goal with all that was done; with a goal
            return cosine_max(goal, h)
        return compared.append((goal, h[:, 0].tolist())) or torch.ones(len(h))

    monkeypatch.setattr(subgoals, "cosine_max", compare)
    level.autoencoder.code = lambda h: level.autoencoder.encode(h).flatten(-2)
    monkeypatch.setattr(subgoals, "controllable", lambda level, state, actions: {"actions": len(actions)})
    with torch.inference_mode():
        study, = subgoals.subgoal_study(agent, Echo(6), 0, steps=5 * 7)  # an episode: ticks at 0, 4 and 6
        told, alike = study.pop("told"), study.pop("alike")
        assert 0 <= told <= 1 and study == {
            "level": 0, "goals": 10, "reached": 1, "before": 1, "shuffled": 1, "possible": 1, "obeyed": 0,
            "able": 1, "unled": 1, "actions": 3}
        (goal, end), (same, start), (other, _), (best, last), *dreamed = compared
        assert len(dreamed) == 2 and all(torch.equal(dream[0], best) for dream in dreamed)
        assert end == last == 5 * [4, 6] and start == 5 * [0, 4]
        assert best.unflatten(-1, (8, 8)).argmax(-1)[:, 0].tolist() == last
        assert torch.equal(goal, same) and torch.equal(goal.roll(5, 0), other)
        assert alike == pytest.approx((goal * other).sum(-1).mean().item() / 8, abs=1e-3)  # 8 of 8 classes
        torch.nn.init.normal_(level.actor.net[-1].weight)  # from now on what it does depends on everything
        assert subgoals.subgoal_study(agent, Echo(6), 0, steps=35)[0]["obeyed"] > 0.1


def test_what_can_be_steered():
    """results/subgoals.py: variance is shared out between scene, action and chance. Where h is, of equal
    variance, a number of the scene, one of the action and noise, each has a third."""
    torch.manual_seed(0)
    level = small(levels=2).levels[0]
    scene, effect = torch.randn(32, 64), torch.randn(12, 64)

    def imagine(start, policy, ticks):
        assert ticks == level.k
        action = policy(None)
        return State(None, *[torch.stack([start.h + action @ effect + torch.randn_like(start.h)])] * 5), None

    level.world_model.imagine, level.origin = imagine, torch.zeros_like
    level.autoencoder.code, level.autoencoder.decode = lambda h: h, lambda code: 0.5 * code
    shares = script("subgoals").controllable(level, State(*[scene] * 6), torch.eye(12))
    assert np.allclose(shares["controllable"], 1 / 3, atol=0.05)
    assert np.allclose(shares["named"], np.array(shares["controllable"]) / 4, atol=2e-3)


def test_open_loop_sequences_stay_inside_an_episode():
    """results/open_loop.py: a sequence is consecutive steps of one episode, each with the action chosen after
    it; episodes that are too short are one clear line."""
    torch.manual_seed(0)
    open_loop, agent = script("open_loop"), small(levels=2)
    o, a, first = open_loop.fresh_sequences(agent, Echo(17), 0, count=6, length=8)
    assert o.shape == (6, 8, 4) and a.shape == (6, 8, 3) and first.shape == (6, 8)
    assert torch.equal(o[:, 1:, 3], o[:, :-1, 3] + 1) and not first[:, 1:].any() and first[:, 0].any()
    assert torch.equal(o[:, 1:, :3], a[:, :-1])
    with pytest.raises(train.UsageError, match="too short"):
        open_loop.fresh_sequences(agent, Echo(6), 0, count=2, length=8)


def test_open_loop_error_against_its_baselines(tmp_path, capsys):
    """results/open_loop.py: the error at horizon n is that of the n-th step after the context; a still game
    is foreseen perfectly by its last frame, and the mean frame's error is the variance of the frames. Both
    pictures are written, and four errors printed."""
    torch.manual_seed(0)
    open_loop = script("open_loop")
    T = open_loop.CONTEXT + open_loop.HORIZON
    truth = torch.rand(3, 1, 3, 64, 64).repeat(1, T, 1, 1, 1)
    dreamed = truth.clone()
    dreamed[:, open_loop.CONTEXT + 9] += 0.5  # the tenth step is wrong
    errors = open_loop.open_loop_error(truth, dreamed)
    assert np.flatnonzero(errors["dream"]).tolist() == [9] and np.isclose(errors["dream"][9], 0.25)
    assert not errors["last frame, repeated"].any()
    assert np.allclose(errors["mean frame"], truth[:, 0].var(0, unbiased=False).mean(), atol=1e-6)
    truth[:, open_loop.CONTEXT - 1] = 0  # the last frame seen
    errors = open_loop.open_loop_error(truth, dreamed)
    assert np.allclose(errors["last frame, repeated"], truth[:, -1].square().mean())
    pytest.importorskip("matplotlib")
    open_loop.draw(truth, dreamed, "pong", tmp_path / "error.png", tmp_path / "strip.png")
    assert (tmp_path / "error.png").stat().st_size > 5000 and (tmp_path / "strip.png").stat().st_size > 50_000
    assert [line.count(" steps 0.") for line in capsys.readouterr().out.splitlines()] == [4, 4, 4]


def test_dream_film_runs_without_the_game():
    """results/dream.py: the game is played for the context only, then all levels play on in the world model
    alone, and the film ends where the model believes that the episode is over."""
    pytest.importorskip("PIL")
    steps = []

    class Counted(train.Atari):
        def step(self, action):
            steps.append(action)
            return super().step(action)

    torch.manual_seed(0)
    dream, agent, ticked = script("dream").dream, small(2, (64, 64, 3), 6), []
    act = agent.act
    agent.act = lambda *args, **now: (ticked.append(now), act(*args, **now))[1]
    with torch.inference_mode():
        frames = dream(agent, Counted("pong"), context=8, steps=12)
        assert len(steps) == 8 and len(frames) == len(ticked) == 8 + 11
        agent.levels[0].world_model.outcome_head[-1].bias.data[-1] = -9.0  # the continue logit
        assert len(dream(agent, train.Atari("pong"), context=8, steps=12)) == 8 + 1


@pytest.mark.filterwarnings("ignore:invalid value")  # what is constant has no correlation
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


@slow
def test_novelty_is_measured_on_states_of_each_level(tmp_path):
    """results/novelty.py: the loss of each level's autoencoder over its own ticks, of the own game, of others
    with fewer actions, and of random play."""
    novelty, seen = script("novelty"), []
    run = untrained_run(tmp_path, "boxing", levels=2)
    rows = novelty.study(tmp_path, games=("boxing", "pong"), steps=9)
    assert list(rows) == ["itself", "pong", "at random"] and all(len(values) == 2 for values in rows.values())
    for level in run.agent.levels:
        level.autoencoder.loss = lambda h: (None, seen.append(len(h)) or torch.tensor([1.0, 2.0]))
    with torch.inference_mode():
        assert novelty.novelty(run.agent, train.Atari("boxing"), 9) == [1.5, 1.5] and seen == [9, 3]


def test_what_can_be_foreseen_is_taken_away_from_a_change(tmp_path):
    """results/remainder.py: of a change that is mostly the start's, an action's and chance's shares rise when
    that part is taken away; together they are all of it, before and after."""
    agent = untrained_run(tmp_path, "boxing", levels=2).agent
    model = agent.levels[0].world_model
    states = State(*[torch.randn(64, 1, 64)] * 6)

    def imagine(start, policy, k):
        h, random = start.h, torch.eye(18)[torch.randint(18, (len(start.h),))]
        action = random if len(h) == 128 else policy(start)  # while it learns to foresee; then held ones
        end = h + 2 * h[:, :1] + 4 * action @ torch.eye(18, 64) + 0.5 * torch.randn_like(h)
        return State(*[torch.stack([h, end])] * 6), None

    remainder, model.imagine = script("remainder"), imagine
    remainder.rollout = lambda *others, **options: [
        (None, {"levels": [{"subgoal": torch.zeros(1, 64)}]}, [{"state": State(*each)}])
        for each in zip(*states)]
    torch.manual_seed(0)
    shares = remainder.study(train.Config(hidden=64, units=64), agent, updates=80)
    (scene, action, _), (rest, more, _) = (shares[name]["controllable"] for name in ("change", "remainder"))
    assert scene > 0.8 and rest < 0.5 and more > 2 * action and shares["kept"] < 0.5, shares
    assert all(abs(sum(shares[name]["controllable"]) - 1) < 0.05 for name in ("change", "remainder"))


def test_goals_alone_train_the_actor_of_level_0_and_nothing_that_dreams(tmp_path, monkeypatch):
    """results/goals_alone.py: new actors and critics of level 0 learn for the subgoal reward alone; the model
    and its codes stay as they were."""
    alone, seen = script("goals_alone"), []
    run = untrained_run(tmp_path, "boxing", levels=2, hindsight=0.5)
    for _ in range(run.config.batch_length):
        run.remember(run.act())
    run.save()
    monkeypatch.setattr(alone, "subgoal_study", lambda agent, *args, **options: seen.extend(
        [agent.levels[0], parameters_of(agent.levels[0])]) or [{}])
    alone.main(tmp_path, tmp_path / "out.jsonl", 3)
    level, before = seen
    assert level.weights[:5, 0].tolist() == 4 * [[0, 1]] + [[0, 0]] and level.hindsight == 1
    assert torch.equal(level.world_model.inputs.weight, run.agent.levels[0].world_model.inputs.weight)
    for name, p in level.named_parameters():
        changed = name.startswith(("actor", "critics.nets.1", "slow_critics.nets.1"))
        assert torch.equal(p, before[name]) != changed, name
    assert json.loads((tmp_path / "out.jsonl").read_text())["updates"] == 0
    with pytest.raises(train.UsageError, match="without --hindsight"):
        alone.main(untrained_run(tmp_path / "other", "boxing", levels=2).directory, "-", 3)


@slow
def test_bars_stand_beside_published_ones(tmp_path):
    """results/bars.py shows each game's human-normalised score of each of our groups, then those published
    for the game; aggregates only over games that all groups have; a whisker only where a game has several
    runs."""
    pytest.importorskip("matplotlib")
    files = [write_result(tmp_path / "a.json"), write_result(tmp_path / "b.json", {"seed": 1}, returns=[8]),
             write_result(tmp_path / "c.json", {"game": "frostbite"}, returns=[2000]),
             write_result(tmp_path / "d.json", {"levels": 1})]
    for count, titles in ((3, ["frostbite", "pong", "mean, 2 games", "median, 2 games", "IQM, 2 games",
                               "optimality gap, 2 games"]), (4, ["frostbite", "pong"])):
        figure = script("bars").main(tmp_path / "bars.png", *files[:count])
        axes = {axis.get_title(): axis for axis in figure.axes}
        assert list(axes) == titles
    assert (tmp_path / "bars.png").stat().st_size > 5000
    published = evaluate.read_published()
    labels = [label.get_text() for label in axes["pong"].get_yticklabels()]
    assert labels == ["here", "here", *(name + "*" for name in published if name != "Hieros")]
    assert axes["frostbite"].get_yticklabels()[-1].get_text() == "Hieros*"
    bars = dict(zip(labels[2:], axes["pong"].patches[2:]))
    flat, full = axes["pong"].patches[:2]
    widths = [bar.get_width() for bar in (flat, full, bars["IRIS*"])]
    assert np.allclose(widths, [(2 + 20.7) / 35.3, (5 + 20.7) / 35.3, 1])
    ends = [len(segment) for segment in axes["pong"].collections[0].get_segments()]  # of the whiskers
    assert ends[:3] == [0, 2, 0] and not any(ends[3:])


def test_curves_show_mean_and_range(tmp_path):
    """results/curves.py: a line a group with the mean over runs of the last ten episodes' mean, a band of
    their range; a run that ended no episode is left out."""
    pytest.importorskip("matplotlib")
    curves = [[1000 * i, -20.0] for i in range(1, 30)], [[1000 * i, -10.0] for i in range(1, 30)], []
    files = [write_result(tmp_path / f"{seed}.json", {"seed": seed}, curve=curve)
             for seed, curve in enumerate(curves)]
    ramp = write_result(tmp_path / "3.json", {"levels": 1}, curve=[[i, float(i)] for i in range(1, 30)])
    figure = script("curves").main(tmp_path / "curves.png", *files, ramp)
    axis, = figure.axes
    lines = {line.get_label(): line.get_ydata() for line in axis.get_lines()}
    assert np.allclose(lines["runs: 2"], -15) and np.isclose(lines["runs: 1"][-1], 24.5)  # of 20 ... 29
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        f"preset paper, levels {levels}, 100,000 agent steps" for levels in (1, 3)]
    band = axis.collections[1].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == (-20, -10)


@slow
def test_pictures_of_s5_and_of_sampling(tmp_path):
    """results/s5_kernels.py: kernels are what the layers answer to an impulse. results/etbs.py: with uniform
    draws early steps are drawn most; tau = 0.3 comes nearer to equally often."""
    pytest.importorskip("matplotlib")
    run = untrained_run(tmp_path, levels=1)
    figure = script("s5_kernels").main(tmp_path, tmp_path / "s5.png")
    layer = run.agent.levels[0].world_model.sequence.blocks[0].s5
    impulse = torch.zeros(1, 32, 64)
    impulse[0, 0, 0] = 1
    with torch.no_grad():
        answer = layer(impulse, torch.zeros(1, 32, dtype=torch.bool))[0][0]
        answer[0, 0] -= layer.D[0]
    before, after = figure.axes[1].get_lines()[0], figure.axes[1].get_lines()[3]
    assert np.allclose(before.get_ydata(), answer[:, 0], atol=1e-5)
    assert np.allclose(after.get_ydata(), answer[:, 0], atol=1e-5)  # the run has not begun
    figure = script("etbs").main(tmp_path / "etbs.png", steps=2000)
    uniform, hieros, _ = (line.get_ydata() for line in figure.axes[1].get_lines())
    assert uniform[0] > 3 * uniform[-1] and np.ptp(hieros) < 0.8 * np.ptp(uniform)
    assert np.isclose(uniform.mean(), 1) and np.isclose(hieros.mean(), 1)


@slow
def test_a_gru_in_parallel_is_the_gru_step_by_step(tmp_path, monkeypatch):
    """results/gru.py: its stack has S5Stack's interface, forgets at resets, and trains in the place of S5;
    the result says so."""
    gru, (B, T) = script("gru"), (3, 7)
    stack, u, reset = gru.GRUStack(12, 16, 2), torch.randn(B, T, 12), some_resets(B, T)
    m, states = stack(u, reset)
    state = torch.zeros(B, *stack.state_shape, dtype=torch.cfloat)
    for t in range(T):
        m_t, state = stack.step(u[:, t], state * ~reset[:, t, None, None], stack.discretise())
        assert torch.allclose(m_t, m[:, t], atol=1e-6) and torch.allclose(state, states[:, t], atol=1e-6)
    monkeypatch.chdir(tmp_path)
    flags = "--preset debug --device cpu --game Echo-v0 --levels 1 --steps 310 --eval_episodes 2 --logdir run"
    monkeypatch.setattr(gymnasium.envs.registration, "registry", dict(gymnasium.registry))
    monkeypatch.setattr(gymnasium, "registry", gymnasium.envs.registration.registry)
    gymnasium.register("Echo-v0", Echo)
    assert gru.main(flags.split()) == 0
    result = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert result["change"] == "GRU layers instead of S5's"
    with pytest.raises(train.UsageError, match="checkpoint.pt cannot be used"):  # it has no S5 layers
        evaluate.load_run(tmp_path / "run", "cpu")


def test_s5_speed_is_measured_and_drawn(tmp_path, capsys):
    """results/s5_speed.py: a row a length, of three ways to train and to step, and the picture of them."""
    pytest.importorskip("matplotlib")
    speed = script("s5_speed")
    rows = speed.measure([4, 8])
    assert [row[0] for row in rows] == [4, 8] and all(number > 0 for row in rows for number in row)
    assert len(capsys.readouterr().out.splitlines()) == 3 and len(rows[0]) == 7
    speed.draw(rows, tmp_path / "s5.png")
    assert (tmp_path / "s5.png").stat().st_size > 5000


def test_the_door_opens_to_who_has_the_key():
    """results/key_door.py: no way into the second room without the key; with it, the end pays 1, once."""
    right, left, down, up = 1, 2, 3, 4
    env = script("key_door").KeyDoor()
    env.reset()
    assert [env.step(right)[0].argmax() for _ in range(4)] == [2] * 4
    assert env.cell == (2, 4)  # the door is shut
    path = [up, up, down, down, *[right] * 6, down]
    assert [env.step(action)[1:4] for action in path] == [(0.0, False, False)] * len(path)
    assert env.step(down)[1:4] == (1.0, True, False) and env.cell == env.GOAL
    observation, _ = env.reset()
    assert np.flatnonzero(observation).tolist() == [2, 5 + 2, 16]
    assert [env.step(left)[3] for _ in range(100)] == [False] * 99 + [True]


@pytest.mark.parametrize("part", ["changes", "foreseen", "goals", "reached", "life"])
def test_one_part_of_hindsight_is_left_out(part, monkeypatch):
    """results/without.py: that part of Level and no other; results/key_door.py: novelty at level 0."""
    without = script("without")
    monkeypatch.setattr(without, "PART", part, raising=False)
    monkeypatch.setattr(sys.modules["hierarchy"], "Level", without.Without)
    lower, upper = (agent := small(hindsight=1.0)).levels[:2]
    goal, h, start = torch.zeros(2, 3, 64), torch.randn(2, 3, 64), torch.zeros(2, 3, dtype=torch.bool)
    assert part in without.PARTS and {
        "changes": not lower.relative, "foreseen": lower.origin(h).equal(h),
        "goals": lower.hindsight_goals(goal, h, start) is goal,
        "reached": upper.weights[0, 0, -1] == 0,
        "life": lower.stays[:, 0].tolist() == 16 * [[1, 1]] and (lower.weights > 0).all()
    } == {name: name == part for name in without.PARTS}
    monkeypatch.setattr(sys.modules["hierarchy"], "Level", script("key_door").CuriousLevel)
    agent = small(levels=1)
    assert agent.levels[0].update(batch_of(agent, 0))["rew/novelty"] > 0


def test_every_script_of_results_says_how_it_is_run():
    """Its docstring has its command, and it is short."""
    for path in (HERE / "results").glob("*.py"):
        text = path.read_text()
        assert f"python results/{path.name}" in text.split('"""')[1], path.name
        assert text.count("\n") <= 90, path.name
