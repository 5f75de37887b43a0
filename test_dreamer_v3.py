"""Tests of dreamer_v3.py: parity with the authors, numerics, alignment, wiring, use, learning.

    python -m pytest -q                 # all of it
    python -m pytest -q -k mutation     # the tests whose names have this word

References are written from the paper with explicit loops in float64. A `check_*` function is called
twice: by its test, and by group H, which plants a known mistake and requires that the check fails.
Groups: A numerics, B alignment, C wiring, D spaces, E checkpoints and command line, F learning,
G documents, H mutations, P parity. On two CPU cores everything takes a few minutes.
"""

import ast
import contextlib
import copy
import functools
import importlib
import importlib.util
import inspect
import itertools
import json
import math
import os
import pickle
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
import zlib
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import tyro
from gymnasium import spaces as gs
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dreamer_v3
from dreamer_v3 import Agent, Args, Dreamer, Replay, Spaces, UserError

torch.set_num_threads(1)
# float64 against float64: only the order of the sums differs.
EXACT = dict(rtol=1e-9, atol=1e-9)

TINY = dict(
    compile=False,
    cuda=False, size="1m", deter=32, hidden=16, units=16, classes=4, depth=2, stoch=3, blocks=4,
    batch_size=2, batch_length=4, imag_horizon=2, warmup_updates=0, learning_rate=1e-3,
    eval_every=0, eval_episodes=0, num_envs=1, total_timesteps=40, buffer_size=1000,
    train_ratio=2.0, seed=1,
)  # fmt: skip
MIXED = Spaces(3, (("a", 4, ()), ("b", 5, (2, 3)), ("c", 2, ())), (3,), 3)  # images and vectors
VECTOR = Spaces(0, (("a", 4, ()), ("b", 5, (2, 3))), (3, 2), 5)  # two discrete actions
CONTINUOUS = Spaces(0, (("a", 4, ()),), (), 3)


def tiny(**changes):
    """Args of the smallest useful network."""
    return Args(**(TINY | changes))


def in_float64(function):
    """Run a function with float64 as torch's default type, from one seed."""

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        torch.set_default_dtype(torch.float64)
        torch.manual_seed(0)
        try:
            return function(*args, **kwargs)
        finally:
            torch.set_default_dtype(torch.float32)

    return wrapped


def randomize(module, scale=0.3):
    """Make all parameters random: zero biases, unit scales and zero heads would hide mistakes."""
    for p in module.parameters():
        p.data.add_(torch.randn_like(p) * scale)
    return module


def make_agent(spaces, **changes):
    """An agent with random parameters, the slow critic unlike the critic."""
    agent = Agent(tiny(**changes), spaces)
    randomize(agent.model)
    return agent


def make_batch(spaces, args, batch=3, length=4):
    """A random batch as `Agent.loss` takes it."""
    flags = {
        name: torch.rand(batch, length) < 0.3 for name in ("is_first", "is_last", "is_terminal")
    }
    obs = {"image": torch.randint(0, 256, (batch, length, 64, 64, spaces.channels)).byte()}
    vector = [make_vector(classes, width, (batch, length)) for _, width, classes in spaces.vectors]
    obs = (obs if spaces.channels else {}) | {"vector": torch.cat(vector, -1)}
    stoch = torch.randint(0, args.classes, (batch, args.stoch))
    return flags | {
        "obs": obs,
        "prev_action": make_vector(spaces.action_classes, spaces.action_width, (batch, length)),
        "reward": torch.randn(batch, length) * 3,
        "deter": torch.rand(batch, args.deter) * 2 - 1,
        "stoch": F.one_hot(stoch, args.classes).to(torch.get_default_dtype()),
    }


def make_vector(classes, width, shape):
    """Random one-hot vectors side by side, or normals up to +-10."""
    if not classes:
        return torch.randn(*shape, width) * 4
    parts = [F.one_hot(torch.randint(0, n, shape), n) for n in classes]
    return torch.cat(parts, -1).to(torch.get_default_dtype())


def close(actual, expected, **tolerance):
    """Assert that two arrays have the same shape and nearly the same numbers."""
    actual = actual.detach().numpy() if isinstance(actual, torch.Tensor) else np.asarray(actual)
    expected = np.asarray(expected)
    assert actual.shape == expected.shape, f"shape {actual.shape}, expected {expected.shape}"
    np.testing.assert_allclose(actual, expected, **(tolerance or EXACT))


def to_numpy(x):
    """A tensor as a float64 array."""
    return x.detach().double().numpy().copy()


# ---- References: the paper in numpy, float64 -----------------------------------------------------


def ref_symlog(x):
    return math.copysign(math.log(1 + abs(x)), x)


def ref_symexp(x):
    return math.copysign(math.exp(abs(x)) - 1, x)


def ref_bins():
    """Eq. 10: 127 negative bins, 0, and their mirror images."""
    lower = [ref_symexp(-20 + 20 * i / 127) for i in range(127)]
    return np.array(lower + [0.0] + [-x for x in reversed(lower)])


def ref_softmax(logits):
    e = np.exp(logits - logits.max())
    return e / e.sum()


def ref_mixed(logits, unimix):
    """Softmax with a share of the uniform distribution, for one variable."""
    return (1 - unimix) * ref_softmax(logits) + unimix / len(logits)


def ref_twohot(y, bins):
    """Eq. 11: the weights of one target."""
    weights = np.zeros(len(bins))
    if y <= bins[0] or y >= bins[-1]:
        weights[0 if y <= bins[0] else -1] = 1
        return weights
    k = max(i for i in range(len(bins)) if bins[i] <= y)
    weights[k + 1] = (y - bins[k]) / (bins[k + 1] - bins[k])
    weights[k] = 1 - weights[k + 1]
    return weights


def ref_twohot_loss(logits, y):
    return -(ref_twohot(y, ref_bins()) * np.log(ref_softmax(logits))).sum()


def ref_twohot_mean(logits):
    return math.fsum(ref_softmax(logits) * ref_bins())


def ref_kl(p_logits, q_logits, unimix):
    """KL of the mixed distributions, summed over the variables (S, K)."""
    total = 0.0
    for p_row, q_row in zip(p_logits, q_logits, strict=True):
        p, q = ref_mixed(p_row, unimix), ref_mixed(q_row, unimix)
        total += sum(p[k] * math.log(p[k] / q[k]) for k in range(len(p)))
    return total


def ref_norm_silu(x, scale):
    """RMSNorm over the last axis with eps 1e-4, then SiLU."""
    y = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-4) * scale
    return y / (1 + np.exp(-y))


def ref_linear(layer, x):
    return x @ to_numpy(layer.weight).T + to_numpy(layer.bias)


def ref_dense(block, x):
    """Linear, RMSNorm, SiLU."""
    linear, norm = block
    return ref_norm_silu(ref_linear(linear, x), to_numpy(norm.scale))


def ref_mlp(blocks, x):
    for block in blocks:
        x = ref_dense(block, x)
    return x


def ref_block_linear(layer, inputs):
    """Each block's own inputs times its own matrix; list of (n, in/G) -> list of (n, out/G)."""
    weight, bias = to_numpy(layer.weight), np.split(to_numpy(layer.bias), len(inputs))
    return [x @ weight[k] + bias[k] for k, x in enumerate(inputs)]


def ref_cell(rssm, h, z, a):
    """One recurrent step, inputs joined block by block: (n, D), (n, SK), (n, A) -> (n, D)."""
    a = np.array([[x / max(1, abs(x)) for x in row] for row in a])
    x0, x1, x2 = (
        ref_dense(rssm.deter_in, h),
        ref_dense(rssm.stoch_in, z),
        ref_dense(rssm.action_in, a),
    )
    blocks = np.split(h, rssm.blocks, -1)
    x = ref_block_linear(rssm.hidden_layer, [np.concatenate([b, x0, x1, x2], -1) for b in blocks])
    x = ref_norm_silu(np.concatenate(x, -1), to_numpy(rssm.hidden_norm.scale))
    sigmoid = lambda y: 1 / (1 + np.exp(-y))
    new = []
    for gates, old in zip(
        ref_block_linear(rssm.gru, np.split(x, rssm.blocks, -1)), blocks, strict=True
    ):
        reset, cand, update = np.split(gates, 3, -1)
        cand, update = np.tanh(sigmoid(reset) * cand), sigmoid(update - 1)
        new.append(update * cand + (1 - update) * old)
    return np.concatenate(new, -1)


def ref_prior(rssm, h):
    """Logits (n, S*K) of the prior."""
    return ref_linear(rssm.prior_net[-1], ref_mlp(rssm.prior_net[:-1], h))


def ref_posterior(rssm, h, tokens):
    """Logits (n, S*K) of the posterior."""
    return ref_linear(
        rssm.posterior_out, ref_dense(rssm.posterior_in, np.concatenate([h, tokens], -1))
    )


def ref_return(reward, value, cont, last, lam, t):
    """R_t of one trajectory by the recursion of spec section 9 and 10."""
    if t == len(reward) - 1:
        return value[t]
    mix = lam * (1 - last[t + 1])
    after = ref_return(reward, value, cont, last, lam, t + 1)
    return reward[t + 1] + cont[t + 1] * ((1 - mix) * value[t + 1] + mix * after)


def ref_returns(reward, value, cont, last, lam):
    """(N, H+1) each -> (N, H)."""
    rows = zip(reward, value, cont, last, strict=True)
    return np.array([[ref_return(*row, lam, t) for t in range(len(row[0]) - 1)] for row in rows])


def ref_percentile(x, q):
    """Percentile with linear interpolation between the sorted values."""
    x = sorted(x.flatten())
    position = q * (len(x) - 1)
    low = math.floor(position)
    return x[low] + (position - low) * (x[min(low + 1, len(x) - 1)] - x[low])


def ref_apply(function, *arrays):
    """Apply a function of vectors (first array) and numbers (other arrays) everywhere."""
    shape = arrays[-1].shape if len(arrays) > 1 else arrays[0].shape[:-1]
    return np.array([function(*(x[i] for x in arrays)) for i in np.ndindex(shape)]).reshape(shape)


# ---- A. Numerics ---------------------------------------------------------------------------------


def check_symlog():
    """Both transformations and their inverse relation."""
    x = [-1e6, -7.5, -1.0, -1e-3, 0.0, 1e-3, 1.0, 7.5, 1e6]
    close(dreamer_v3.symlog(torch.tensor(x)), [ref_symlog(v) for v in x])
    small = [-20.0, -3.0, -0.1, 0.0, 0.1, 3.0, 20.0]
    close(dreamer_v3.symexp(torch.tensor(small)), [ref_symexp(v) for v in small])
    close(dreamer_v3.symlog(dreamer_v3.symexp(torch.tensor(small))), small)


def check_twohot_loss():
    """Targets between bins, on bins, at both ends and beyond them."""
    bins = dreamer_v3.twohot_bins()
    close(bins, ref_bins())
    assert (bins == -bins.flip(0)).all() and bins[127] == 0
    on_bins = [float(bins[i]) for i in (0, 1, 60, 126, 127, 128, 200, 253, 254)]
    targets = torch.tensor([0.05, -0.05, 0.5, -1.0, 3.7, -120.0, 4e5, -4e8, 1e10, -1e10, *on_bins])
    logits = torch.randn(len(targets), 255) * 3
    loss = dreamer_v3.twohot_loss(logits, targets, bins)
    expected = [
        ref_twohot_loss(x, y) for x, y in zip(logits.numpy(), targets.tolist(), strict=True)
    ]
    close(loss, expected)


def check_twohot_mean():
    """The prediction, and that a symmetric distribution predicts exactly 0 in float32."""
    logits, bins = torch.randn(20, 255) * 3, dreamer_v3.twohot_bins()
    # Bins up to 5e8 cancel: the error is relative to them, not to the sum.
    close(
        dreamer_v3.twohot_mean(logits, bins),
        ref_apply(ref_twohot_mean, logits.numpy()),
        rtol=1e-9,
        atol=1e-6,
    )
    half = torch.randn(50, 127, dtype=torch.float32) * 3
    symmetric = torch.cat([half, torch.zeros(50, 1), half.flip(-1)], -1).float()
    assert (dreamer_v3.twohot_mean(symmetric, bins.float()) == 0).all()
    assert (dreamer_v3.twohot_mean(torch.zeros(3, 255).float(), bins.float()) == 0).all()


def check_unimix():
    """Log-probabilities with and without the uniform share; extreme logits stay finite."""
    logits = torch.randn(6, 5) * 4
    for unimix in (0.0, 0.01, 0.3):
        expected = [np.log(ref_mixed(x, unimix)) for x in logits.numpy()]
        close(dreamer_v3.mixed_log_probs(logits, unimix), expected)
    extreme = dreamer_v3.mixed_log_probs(torch.tensor([[1000.0, 0.0]]), 0.01)
    close(extreme, [[math.log(0.995), math.log(0.005)]])


def stub_world_model(args):
    """A model whose posterior and prior logits (B, T, S, K) are leaves, and a batch."""
    model = make_agent(CONTINUOUS, **args).model
    batch = make_batch(CONTINUOUS, tiny(**args))
    shape = (3, 4, TINY["stoch"], TINY["classes"])
    post = (torch.randn(shape) * 1.5).requires_grad_()
    prior = (torch.randn(shape) * 1.5).requires_grad_()
    deter, stoch = torch.randn(3, 4, TINY["deter"]), torch.randn(shape)
    model.rssm.observe = lambda *_: [deter, stoch, post]
    model.rssm.prior = lambda _: prior
    return model, post, prior, batch


def check_kl():
    """Both KL losses: value, free nats on the sum over variables, and who gets the gradient."""
    args = dict(free_nats=2.7, unimix=0.05)
    model, post, prior, batch = stub_world_model(args)
    losses = dreamer_v3.world_model_loss(model, batch, tiny(**args))[0]
    q, p = to_numpy(post), to_numpy(prior)
    kl = np.array([[ref_kl(q[b, t], p[b, t], 0.05) for t in range(4)] for b in range(3)])
    assert 3 <= (kl < 2.7).sum() <= 9, "the example must lie on both sides of the free nats"
    for name, moving, fixed in (("dyn", prior, post), ("rep", post, prior)):
        close(losses[name], np.maximum(kl, 2.7))
        grads = torch.autograd.grad(
            losses[name].sum(), [moving, fixed], allow_unused=True, retain_graph=True
        )
        assert grads[1] is None or not grads[1].any(), f"{name} moves the wrong distribution"
        close(grads[0], finite_differences(q, p, kl > 2.7, name), rtol=1e-4, atol=1e-6)


def finite_differences(q, p, active, name, step=1e-5):
    """Gradient of the clipped KL for one of the logits; the error is of order step^2."""
    grad = np.zeros_like(q)
    for i in np.ndindex(q.shape):
        values = []
        for sign in (1, -1):
            moved = (p if name == "dyn" else q).copy()
            moved[i] += sign * step
            pair = (q[i[:2]], moved[i[:2]]) if name == "dyn" else (moved[i[:2]], p[i[:2]])
            values.append(ref_kl(*pair, 0.05))
        grad[i] = active[i[:2]] * (values[0] - values[1]) / (2 * step)
    return grad


def check_prediction_losses():
    """Reconstruction, reward and continue losses from the networks' own outputs."""
    agent = make_agent(MIXED)
    batch, model = make_batch(MIXED, agent.args), agent.model
    losses, deter, stoch = dreamer_v3.world_model_loss(model, batch, agent.args)[:3]
    feat = torch.cat([deter, stoch.flatten(-2)], -1)
    rewards = ref_apply(ref_twohot_loss, to_numpy(model.reward(feat)), to_numpy(batch["reward"]))
    close(losses["reward"], rewards)
    prob = 1 / (1 + np.exp(-to_numpy(model.cont(feat))[..., 0]))
    target = (1 - to_numpy(batch["is_terminal"])) * (1 - 1 / 333)
    close(losses["cont"], -(target * np.log(prob) + (1 - target) * np.log(1 - prob)))
    recon = {k: to_numpy(v) for k, v in model.decoder(deter, stoch).items()}
    vector = to_numpy(batch["obs"]["vector"])
    logs = np.vectorize(ref_symlog)(vector)
    close(losses["a"], ((recon["a"] - logs[..., :4]) ** 2).sum(-1))
    close(losses["c"], ((recon["c"] - logs[..., 9:]) ** 2).sum(-1))
    cross = lambda logits, hot: -(np.log(ref_softmax(logits)) * hot).sum()
    pairs = [(slice(0, 2), slice(4, 6)), (slice(2, 5), slice(6, 9))]
    discrete = [
        [sum(cross(recon["b"][b, t, i], vector[b, t, j]) for i, j in pairs) for t in range(4)]
        for b in range(3)
    ]
    close(losses["b"], discrete)
    image = ((recon["image"] - to_numpy(batch["obs"]["image"]) / 255) ** 2).sum((-3, -2, -1))
    close(losses["image"], image)


def check_straight_through():
    """A sample is one-hot, has the right frequency, and hands its gradient to the probabilities."""
    probs, uniform = torch.softmax(torch.randn(4, 3, 5), -1).requires_grad_(), torch.rand(4, 3)
    weight, sample = torch.randn(4, 3, 5), dreamer_v3.sample_one_hot(probs, uniform)
    assert np.array_equal(np.sort(to_numpy(sample), -1), np.tile([0, 0, 0, 0, 1], (4, 3, 1)))
    close(torch.autograd.grad((sample * weight).sum(), probs)[0], weight)
    p, n = torch.tensor([0.05, 0.15, 0.8]), 20_000
    drawn = dreamer_v3.sample_one_hot(p.expand(n, 3), torch.rand(n)).mean(0)
    close(drawn, p.numpy(), rtol=0, atol=5 * math.sqrt(0.25 / n))  # five standard errors


def check_policies():
    """Log-probability, entropy and mode of both kinds of policy."""
    mean, std, action = torch.randn(6, 3), torch.randn(6, 3), torch.randn(6, 3) * 2
    policy = dreamer_v3.BoundedNormals(mean, std)
    m, s = np.tanh(to_numpy(mean)), 0.9 / (1 + np.exp(-(to_numpy(std) + 2))) + 0.1
    density = np.exp(-0.5 * ((to_numpy(action) - m) / s) ** 2) / (s * math.sqrt(2 * math.pi))
    close(policy.log_prob(action), np.log(density).sum(-1))
    close(policy.entropy(), (0.5 * np.log(2 * math.pi * math.e * s**2)).sum(-1))
    close(policy.sample(greedy=True), m)
    many = dreamer_v3.BoundedNormals(torch.full((20_000, 1), 1.0), torch.zeros(20_000, 1)).sample()
    assert not many.requires_grad and (many > 1).float().mean() > 0.2, "samples must not be clipped"
    close(many.std(), 0.9 / (1 + math.exp(-2)) + 0.1, rtol=0.03)  # six standard errors
    logits = torch.randn(6, 5) * 2
    policy = dreamer_v3.Categoricals(logits, (3, 2), 0.1)
    probs = [[ref_mixed(x[:3], 0.1), ref_mixed(x[3:], 0.1)] for x in to_numpy(logits)]
    sample = policy.sample()
    assert sample.view(6, 5)[:, :3].sum() == sample[:, 3:].sum() == 6
    joint = [
        math.log(p @ to_numpy(x)[:3]) + math.log(q @ to_numpy(x)[3:])
        for (p, q), x in zip(probs, sample, strict=True)
    ]
    close(policy.log_prob(sample), joint)
    close(policy.entropy(), [-(p @ np.log(p)) - (q @ np.log(q)) for p, q in probs])
    close(
        policy.sample(greedy=True),
        [np.concatenate([np.eye(3)[p.argmax()], np.eye(2)[q.argmax()]]) for p, q in probs],
    )


def check_block_linear():
    """Against one dense matrix with the blocks on its diagonal."""
    layer = randomize(dreamer_v3.BlockLinear(12, 8, 4))
    dense = np.zeros((12, 8))
    for k in range(4):
        dense[3 * k : 3 * k + 3, 2 * k : 2 * k + 2] = to_numpy(layer.weight)[k]
    x = torch.randn(2, 5, 12)
    close(layer(x), x.numpy() @ dense + to_numpy(layer.bias))


def make_rssm():
    """A random RSSM: actions of 3, embeddings of 5, 3 variables of 4 classes, 2 blocks."""
    return randomize(dreamer_v3.RSSM(3, 5, 8, 6, 3, 4, 2, 0.01), 0.5)


def check_cell():
    """One imagined step and the prior; actions beyond 1 are scaled down."""
    model = make_agent(CONTINUOUS).model
    rssm, start = model.rssm, make_state(7)
    feat, action = dreamer_v3.imagine(model, *start, 1)
    assert (action.abs() > 1).any() and not (feat.requires_grad or action.requires_grad)
    close(feat[:, 0], np.concatenate([to_numpy(x.flatten(1)) for x in start], -1))
    expected = ref_cell(rssm, *(to_numpy(x.flatten(1)) for x in start), to_numpy(action[:, 0]))
    close(feat[:, 1, :32], expected)
    close(rssm.prior(feat[:, 1, :32]).flatten(1), ref_prior(rssm, expected))
    close(feat[:, 1, 32:].unflatten(1, (3, 4)).sum(-1), np.ones((7, 3)))


def make_state(n):
    """A random state of the TINY network: deter (n, D), stoch (n, S, K)."""
    return torch.rand(n, 32) * 2 - 1, F.one_hot(torch.randint(0, 4, (n, 3)), 4).double()


def torch_observe(rssm, embed, action, is_first, deter, stoch, samples):
    """`observe` in plain torch, one product for each matrix; `samples` are the classes drawn."""
    states = []
    for t in range(is_first.shape[1]):
        keep = ~is_first[:, t, None]
        deter, stoch, a = deter * keep, stoch * keep[..., None], action[:, t] * keep
        x = (
            rssm.deter_in(deter),
            rssm.stoch_in(stoch.flatten(1)),
            rssm.action_in(a / a.abs().clamp(min=1)),
        )
        x = [torch.cat([part, *x], -1) for part in deter.chunk(rssm.blocks, -1)]
        x = rssm.hidden_norm(rssm.hidden_layer(torch.cat(x, -1)))
        gates = [part.chunk(3, -1) for part in rssm.gru(x).chunk(rssm.blocks, -1)]
        reset, cand, update = (torch.cat(x, -1) for x in zip(*gates, strict=True))
        update, cand = torch.sigmoid(update - 1), torch.tanh(torch.sigmoid(reset) * cand)
        deter = update * cand + (1 - update) * deter
        x = rssm.posterior_in(torch.cat([deter, embed[:, t]], -1))
        logits = rssm.posterior_out(x).view(stoch.shape)
        probs = (1 - rssm.unimix) * logits.softmax(-1) + rssm.unimix / logits.shape[-1]
        stoch = samples[:, t] + probs - probs.detach()
        states.append((deter, stoch, logits))
    return [torch.stack(x, 1) for x in zip(*states, strict=True)]


def check_observe_gradient():
    """Gradients of parameters and inputs, through time, against automatic differentiation."""
    rssm, (batch, length) = make_rssm(), (4, 5)
    embed = torch.randn(batch, length, 5, requires_grad=True)
    action, is_first = torch.randn(batch, length, 3) * 2, torch.rand(batch, length) < 0.2
    start = torch.rand(batch, 8, requires_grad=True), torch.rand(batch, 3, 4, requires_grad=True)
    actual = rssm.observe(embed, action, is_first, *start)
    expected = torch_observe(rssm, embed, action, is_first, *start, actual[1].detach().round())
    weights = [torch.randn_like(x) for x in actual]
    params = [(n, p) for n, p in rssm.named_parameters() if not n.startswith("prior_net")]
    inputs = [embed, *start, *(p for _, p in params)]
    grads = [
        torch.autograd.grad(
            sum((x * w).sum() for x, w in zip(states, weights, strict=True)), inputs
        )
        for states in (actual, expected)
    ]
    for g, e in zip(*grads, strict=True):
        close(g, to_numpy(e), rtol=1e-8, atol=1e-8 * float(e.abs().max()))


def check_observe():
    """State and action are zeroed exactly where an episode starts, before the step."""
    rssm, (batch, length) = make_rssm(), (4, 5)
    embed, action = torch.randn(batch, length, 5), torch.randn(batch, length, 3)
    is_first = torch.tensor(
        [[0, 0, 1, 0, 0], [1, 0, 0, 0, 1], [0, 1, 1, 0, 0], [0, 0, 0, 0, 0]]
    ).bool()
    h, z = torch.rand(batch, 8), F.one_hot(torch.randint(0, 4, (batch, 3)), 4).double()
    deter, stoch, logits = rssm.observe(embed, action, is_first, h, z)
    h, z = h.numpy(), z.flatten(1).numpy()
    for t in range(length):
        keep = 1 - is_first[:, t, None].double().numpy()
        h = ref_cell(rssm, h * keep, z * keep, action[:, t].numpy() * keep)
        close(deter[:, t], h)
        close(logits[:, t].flatten(1), ref_posterior(rssm, h, embed[:, t].numpy()))
        z = to_numpy(stoch[:, t].flatten(1))
        assert np.array_equal(np.sort(z.reshape(batch, 3, 4), -1)[..., -1:], np.ones((batch, 3, 1)))


def check_lambda_return():
    """An end (cont 0) and a cut (last 1) at every step of a trajectory of its own."""
    steps = 6
    cont, last = np.full((2 * steps + 2, steps), 0.97), np.zeros((2 * steps + 2, steps))
    for t in range(steps):
        cont[t, t] = 0
        last[t, t] = last[steps + t, t] = 1
    last[-1] = 1
    reward, value = np.random.default_rng(0).normal(size=(2, *cont.shape))
    for lam in (0.0, 0.95, 1.0):
        got = dreamer_v3.lambda_return(*map(torch.tensor, (reward, value, cont, last)), lam)
        close(got, ref_returns(reward, value, cont, last, lam))


def narrow(model, width):
    """Let the value heads predict numbers of the order of `width` instead of 1e7."""
    centre = -((torch.arange(255.0) - 127) ** 2) / (50 * max(1, width))
    for head in (model.reward, model.critic, model.slow_critic):
        head[-1].weight.data.mul_(width)
        head[-1].bias.data.copy_(centre + width * torch.randn(255))


def behaviour_reference(model, feat, args, low, high):
    """Spec section 9 in numpy: weight, value, slow value, returns, return range and advantage."""
    arrays = [to_numpy(head(feat)) for head in (model.reward, model.critic, model.slow_critic)]
    reward, value, slow = (ref_apply(ref_twohot_mean, x) for x in arrays)
    cont = 1 / (1 + np.exp(-to_numpy(model.cont(feat))[..., 0]))
    weight = np.array([[math.prod(row[: t + 1]) for t in range(len(row) - 1)] for row in cont])
    returns = ref_returns(reward, value, cont, np.zeros_like(cont), args.return_lambda)
    low += args.return_rate * (ref_percentile(returns, 0.05) - low)
    high += args.return_rate * (ref_percentile(returns, 0.95) - high)
    advantage = (returns - value[:, :-1]) / max(1, high - low)
    return weight, slow[:, :-1], returns, low, high, advantage


def check_actor_critic(spaces=VECTOR):
    """Losses, returns and return range, below and above its limit of 1, over two calls."""
    for width, rate, limited in ((0.03, 0.01, True), (5.0, 0.7, False)):
        agent = make_agent(spaces, return_rate=rate, ent_coef=0.1)
        model, args, low, high = agent.model, agent.args, 0.0, 0.0
        narrow(model, width)
        for _ in range(2):
            feat = torch.randn(6, 4, TINY["deter"] + TINY["stoch"] * TINY["classes"])
            action = make_vector(spaces.action_classes, spaces.action_width, (6, 4))
            losses, returns = dreamer_v3.actor_critic_loss(model, feat, action, args)[:2]
            weight, slow, expected, low, high, advantage = behaviour_reference(
                model, feat, args, low, high
            )
            assert (high - low < 1) == limited, "the example must lie on its side of the limit"
            close(returns, expected)
            close(model.return_range, [low, high])
            policy = model.actor(feat[:, :-1])
            log_prob, entropy = (
                to_numpy(policy.log_prob(action[:, :-1])),
                to_numpy(policy.entropy()),
            )
            close(losses["actor"], -weight * (log_prob * advantage + 0.1 * entropy))
            logits = to_numpy(model.critic(feat[:, :-1]))
            critic = [ref_apply(ref_twohot_loss, logits, target) for target in (expected, slow)]
            close(losses["critic"], weight * (critic[0] + critic[1]))


def check_replay_critic():
    """Spec section 10 with random ends; the bootstrap is the imagined return of the next step."""
    agent = make_agent(VECTOR)
    narrow(agent.model, 0.5)
    batch = make_batch(VECTOR, agent.args, 12, 6)
    batch["is_last"] |= batch["is_terminal"]
    assert (batch["is_last"] & ~batch["is_terminal"]).any() and batch["is_terminal"].any()
    feat = torch.randn(12, 6, TINY["deter"] + TINY["stoch"] * TINY["classes"])
    bootstrap = torch.randn(12, 6)
    loss = dreamer_v3.replay_critic_loss(agent.model, feat, bootstrap, batch, agent.args)
    last, cont = to_numpy(batch["is_last"]), (1 - to_numpy(batch["is_terminal"])) * (1 - 1 / 333)
    returns = ref_returns(to_numpy(batch["reward"]), bootstrap.numpy(), cont, last, 0.95)
    logits = to_numpy(agent.model.critic(feat[:, :-1]))
    slow = ref_apply(ref_twohot_mean, to_numpy(agent.model.slow_critic(feat[:, :-1])))
    expected = ref_apply(ref_twohot_loss, logits, returns) + ref_apply(
        ref_twohot_loss, logits, slow
    )
    close(loss, (1 - last[:, :-1]) * expected)


def ref_laprop(p, grads, args):
    """Spec section 11 for one tensor: yields it after every update."""
    nu, mu = np.zeros_like(p), np.zeros_like(p)
    for t, g in enumerate(grads, start=1):
        limit = args.agc_clip * max(1e-3, math.sqrt((p**2).sum()))
        norm = math.sqrt((g**2).sum())
        g = g * limit / norm if norm > limit else g
        nu = 0.999 * nu + 0.001 * g**2
        mu = 0.9 * mu + 0.1 * g / (np.sqrt(nu / (1 - 0.999**t)) + 1e-20)
        lr = args.learning_rate * min(1, (t - 1) / args.warmup_updates)
        p = p - lr * mu / (1 - 0.9**t)
        yield p


def check_optimizer():
    """Twelve updates through a warm-up of 5: clipped, unclipped and from a norm of zero."""
    args, rng = tiny(learning_rate=0.02, warmup_updates=5), np.random.default_rng(0)
    starts = [rng.normal(size=(4, 3)), rng.normal(size=7), np.zeros(5)]
    grads = [
        rng.normal(size=(12, *x.shape)) * s for x, s in zip(starts, (1.0, 0.01, 1.0), strict=True)
    ]
    params = [torch.nn.Parameter(torch.tensor(x)) for x in starts]
    optimizer = dreamer_v3.LaProp(["net"] * len(params), params, params, args)
    references = zip(
        *(ref_laprop(x, g, args) for x, g in zip(starts, grads, strict=True)), strict=True
    )
    for t, expected in enumerate(references):
        for p, g in zip(params, grads, strict=True):
            p.grad = torch.tensor(g[t])
        optimizer.step()
        for p, start, x in zip(params, starts, expected, strict=True):
            close(p, x)
            assert t or np.array_equal(to_numpy(p), start), (
                "the first update must have learning rate 0"
            )


def check_slow_critic():
    """The slow critic starts as a copy and moves by tau towards the updated critic."""
    agent = Agent(tiny(), VECTOR)
    slow = [to_numpy(p) for p in agent.model.slow_critic.parameters()]
    for p, s in zip(agent.model.critic.parameters(), slow, strict=True):
        close(p, s)
    for _ in range(3):
        agent.update(make_batch(VECTOR, agent.args))
        critic = [to_numpy(p) for p in agent.model.critic.parameters()]
        slow = [s + 0.02 * (c - s) for s, c in zip(slow, critic, strict=True)]
        for p, s in zip(agent.model.slow_critic.parameters(), slow, strict=True):
            close(p, s)


def expected_std(name, module):
    """Initial standard deviation of a layer's weight by spec sections 2 and 6."""
    if name.split(".")[0] in ("reward", "critic", "slow_critic") and len(module.weight) == 255:
        return 0.0
    shape = module.weight.shape
    if isinstance(module, dreamer_v3.BlockLinear):
        return (shape[0] * shape[1]) ** -0.5
    fan_in = 25 * shape[1] if isinstance(module, dreamer_v3.Conv) else shape[1]
    return fan_in**-0.5 * (0.01 if name.startswith("actor.out") else 1)


def check_initialisation():
    """Spread and cut of every weight, zero biases, unit scales, heads that start at zero."""
    convs = (dreamer_v3.PoolConv, dreamer_v3.UpConv)
    seen, layers = Counter(), (dreamer_v3.Linear, dreamer_v3.BlockLinear, *convs)
    for spaces in (MIXED, CONTINUOUS):
        for name, module in dreamer_v3.Dreamer(Args(size="1m"), spaces).named_modules():
            if isinstance(module, dreamer_v3.RMSNorm):
                assert (module.scale == 1).all()
            if not isinstance(module, layers):
                continue
            std, weight = expected_std(name, module), module.weight
            seen["zero" if std == 0 else "small" if "actor.out" in name else type(module)] += 1
            assert not module.bias.any(), name
            # Five standard errors of a standard deviation estimated from all weights of the layer.
            error = 5 * std / math.sqrt(2 * weight.numel())
            assert abs(weight.std(correction=0) - std) <= error, name
            # Cut at two deviations of the normal; large layers come near the cut.
            assert weight.abs().max() <= 2 * 1.1369 * std, name
            assert weight.numel() < 2000 or weight.abs().max() >= 1.9 * 1.1368 * std, name
    assert min(seen[kind] for kind in layers) > 2 and seen["zero"] == 6 and seen["small"] == 3


def ref_conv(layer, x):
    """5x5 convolution, same size, of (n, h, w, c) by F.conv2d."""
    return F.conv2d(x.permute(0, 3, 1, 2), layer.weight, layer.bias, padding=2).permute(0, 2, 3, 1)


def torch_norm_silu(x, norm):
    """`ref_norm_silu` with gradient."""
    return F.silu(x / torch.sqrt((x**2).mean(-1, keepdim=True) + 1e-4) * norm.scale)


def ref_pool(x):
    """2x2 maximum of (n, h, w, c); the gradient is shared evenly by the entries that attain it."""
    corners = torch.stack([x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)])
    best = (corners == corners.max(0).values).to(x.dtype)
    return (corners * best / best.sum(0)).sum(0)


def check_encoder():
    """Values, and the gradient through the pooling where maxima tie, in flat regions."""
    model, batch = make_agent(MIXED).model, make_batch(MIXED, tiny(), 2, 3)
    image = batch["obs"]["image"]
    image[:, :, :40] = 77
    embed = model.encoder(batch["obs"])
    vector = np.vectorize(ref_symlog)(to_numpy(batch["obs"]["vector"]))
    vector[..., 4:9] = to_numpy(batch["obs"]["vector"])[..., 4:9]
    x = image.flatten(0, 1).double() / 255 - 0.5
    for conv, norm in zip(model.encoder.convs, model.encoder.norms, strict=True):
        x = torch_norm_silu(ref_pool(ref_conv(conv, x)), norm)
    x = x.flatten(1).unflatten(0, (2, 3))
    close(embed, np.concatenate([ref_mlp(model.encoder.mlp, vector), to_numpy(x)], -1))
    weight = torch.randn_like(x)
    wrt = [conv.weight for conv in model.encoder.convs]
    actual = torch.autograd.grad((embed[..., -x.shape[-1] :] * weight).sum(), wrt)
    for g, e in zip(actual, torch.autograd.grad((x * weight).sum(), wrt), strict=True):
        close(g, to_numpy(e), rtol=1e-8, atol=1e-8 * float(e.abs().max()))


def check_decoder():
    """Both parts; the first layer of images gives (g h w c), read as h w (g c)."""
    decoder = make_agent(MIXED).model.decoder
    deter, stoch = torch.randn(2, 3, 32), torch.randn(2, 3, 3, 4)
    recon, z = decoder(deter, stoch), stoch.flatten(-2)
    hidden = ref_mlp(decoder.mlp, np.concatenate([z.numpy(), deter.numpy()], -1))
    for (name, _, _), out in zip(MIXED.vectors, decoder.outs, strict=True):
        close(recon[name], ref_linear(out, hidden))
    cells = ref_block_linear(decoder.from_deter, np.split(deter.flatten(0, 1).numpy(), 8, -1))
    x = np.zeros((6, 4, 4, 8))
    for n, i, j, c in np.ndindex(x.shape):
        x[n, i, j, c] = cells[c][n, 4 * i + j]  # depth 2: one channel for each of the eight blocks
    first, last = decoder.from_stoch
    x = x + ref_linear(last, ref_dense(first, z.flatten(0, 1).numpy())).reshape(x.shape)
    x = torch.tensor(ref_norm_silu(x, to_numpy(decoder.norm.scale)))
    double = lambda y: y[:, torch.arange(2 * y.shape[1]) // 2][
        :, :, torch.arange(2 * y.shape[2]) // 2
    ]
    for conv, norm in zip(decoder.convs, decoder.norms, strict=True):
        x = torch_norm_silu(ref_conv(conv, double(x)), norm)
    x = 1 / (1 + torch.exp(-ref_conv(decoder.image_out, double(x))))
    close(recon["image"], to_numpy(x).reshape(2, 3, 64, 64, 3))


def check_decoder_many_channels():
    """The channel order once more, with several channels in a block."""
    decoder = randomize(dreamer_v3.Decoder(Spaces(1, (), (2,), 2), 16, 6, 4, 8))
    seen = []
    decoder.norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    for p in decoder.from_stoch.parameters():
        p.data.zero_()
    deter = torch.randn(1, 1, 16)
    decoder(deter, torch.zeros(1, 1, 2, 3))
    flat = np.concatenate(
        ref_block_linear(decoder.from_deter, np.split(deter[0].numpy(), 8, -1)), -1
    )[0]
    for g, h, w, c in np.ndindex(8, 4, 4, 2):
        close(seen[0][0, h, w, 2 * g + c], flat[((g * 4 + h) * 4 + w) * 2 + c])


NUMERICS = [
    check_symlog, check_twohot_loss, check_twohot_mean, check_unimix, check_kl,
    check_prediction_losses, check_straight_through, check_policies, check_block_linear, check_cell,
    check_observe, check_observe_gradient, check_lambda_return, check_actor_critic,
    check_replay_critic, check_optimizer, check_slow_critic, check_initialisation, check_encoder,
    check_decoder,
    check_decoder_many_channels,
]  # fmt: skip


@pytest.mark.parametrize("check", NUMERICS, ids=lambda check: check.__name__[6:])
def test_numerics(check):
    """Group A: every formula against its reference, in float64."""
    in_float64(check)()


def test_actor_critic_continuous():
    """The same losses with a continuous policy."""
    in_float64(check_actor_critic)(CONTINUOUS)


# ---- B. Alignment --------------------------------------------------------------------------------


class Counting(gym.Env):
    """Shows (stream, episode, t, last action), from which everything else follows."""

    observation_space = gs.Box(-np.inf, np.inf, (4,), np.float32)
    action_space = gs.Discrete(3)
    episode = -1

    def observe(self, action):
        return np.array([self.stream, self.episode, self.t, action], np.float32)

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.stream = seed
        self.episode, self.t = self.episode + 1, 0
        return self.observe(-1), {}

    def step(self, action):
        self.t += 1
        end = self.t == episode_end(self.stream, self.episode)
        terminal = episode_terminates(self.stream, self.episode)
        return (
            self.observe(action),
            counting_reward(self.episode, self.t),
            end and terminal,
            end and not terminal,
            {},
        )


def episode_end(stream, episode):
    """Number of the last step: 1 to 6."""
    return 1 + (3 * stream + 2 * episode) % 6


def episode_terminates(stream, episode):
    """Whether an episode ends by itself or is cut off."""
    return (stream + episode) % 2 == 0


def counting_reward(episode, t):
    """The reward of arriving at step t; 0 only at a reset."""
    return 0.0 if t == 0 else t + 0.125 * episode


gym.register("TestCounting-v0", entry_point=Counting)


def check_row(obs, action, reward, is_first, is_last, is_terminal):
    """One entry of the replay against dreamer_v3's table. Returns what must follow."""
    stream, episode, t, last_action = (int(x) for x in obs)
    end = t == episode_end(stream, episode)
    assert is_first == (t == 0) and is_last == end
    assert is_terminal == (end and episode_terminates(stream, episode))
    assert reward == counting_reward(episode, t)
    assert (last_action == -1) == (t == 0)
    if end:
        assert not action.any(), "nothing is chosen at an episode's last step"
        return stream, episode + 1, 0, -1
    assert sorted(action) == [0, 0, 1]
    return stream, episode, t + 1, int(action.argmax())


def check_batch(batch):
    """Every sequence of a batch, step by step."""
    names = ("vector", "action", "reward", "is_first", "is_last", "is_terminal")
    for sequence in zip(*(np.asarray(batch[name]) for name in names), strict=True):
        expected = None
        for obs, *rest in zip(*sequence, strict=True):
            assert expected is None or tuple(obs) == expected, "the sequence has a gap"
            expected = check_row(obs, *rest)


class Spy:
    """Watches a run of `main`: checks every batch and every stored latent state, and counts."""

    def __init__(self, patch):
        self.latents, self.adds, self.updates, self.starts, self.batches = {}, 0, Counter(), [], []
        self.wrap(patch, Agent, "act", self.act)
        self.wrap(patch, Agent, "train_step", self.train_step)
        self.wrap(patch, Agent, "loss", self.loss)
        self.wrap(patch, Replay, "add", self.add)

    def wrap(self, patch, owner, name, spy):
        original = getattr(owner, name)
        patch.setattr(owner, name, lambda *args, **kwargs: spy(original, *args, **kwargs))

    def remember(self, obs, deter, stoch):
        """The state last computed for a step, under the step's observation."""
        for key, h, z in zip(obs.tolist(), deter, stoch, strict=True):
            self.latents[tuple(key)] = np.asarray(h, np.float64), np.asarray(z)

    def act(self, original, agent, obs, *args, **kwargs):
        carry = original(agent, obs, *args, **kwargs)
        self.remember(obs["vector"], carry[0].numpy(), carry[1].argmax(-1).numpy())
        return carry

    def add(self, original, *args):
        self.adds += 1
        return original(*args)

    def train_step(self, original, agent, batch):
        check_batch(batch)
        self.updates[self.adds] += 1
        self.batches.append(batch["vector"].clone())
        obs = batch["vector"][:, 0].tolist()
        for key, h, z in zip(obs, batch["deter"], batch["stoch"], strict=True):
            # Stored as float16, and numbers below 1: half a unit in the last place is 2.5e-4.
            close(h.double(), self.latents[tuple(key)][0], rtol=0, atol=1e-3)
            assert np.array_equal(z, self.latents[tuple(key)][1])
        metrics, deter, stoch = original(agent, batch)
        for row in range(len(deter)):
            self.remember(batch["vector"][row, 1:], deter[row].numpy(), stoch[row].numpy())
        return metrics, deter, stoch

    def loss(self, original, agent, batch):
        shown = batch["obs"]["vector"][..., 3]
        came = torch.where(batch["is_first"], -1, batch["prev_action"].argmax(-1))
        assert torch.equal(shown.long(), came), "prev_action is not the action before"
        return original(agent, batch)


def run_counting(tmp_path, **changes):
    """A run of `main` in the counting environment under a `Spy`."""
    settings = dict(env_id="TestCounting-v0", run_dir=str(tmp_path), num_envs=3, buffer_size=36)
    with pytest.MonkeyPatch.context() as patch:
        spy = Spy(patch)
        spy.args = tiny(**(settings | dict(total_timesteps=200, train_ratio=1.5) | changes))
        dreamer_v3.main(spy.args)
    return spy


def check_alignment(tmp_path):
    """The whole table, over autoresets, 5 turns of the ring and 3 unlike environments."""
    spy = run_counting(tmp_path)
    seen = torch.cat(spy.batches).flatten(0, 1)
    ends = {tuple(x) for x in seen[:, :3].long().tolist() if x[2] == episode_end(*x[:2])}
    assert {s for s, _, _ in ends} == {1, 2, 3} and len(ends) > 15
    assert {episode_terminates(s, e) for s, e, _ in ends} == {True, False}
    assert {1, 6} <= {t for _, _, t in ends}


def expected_schedule(args, adds):
    """Updates after each add: one when B*T starts are there, then in proportion to steps."""
    length = -(-min(args.buffer_size, args.total_timesteps + args.num_envs) // args.num_envs)
    credit, result = None, Counter()
    for add in range(1, adds + 1):
        starts = args.num_envs * max(0, min(add, length) - args.batch_length)
        if starts < args.batch_size * args.batch_length:
            continue
        per_step = args.train_ratio / (args.batch_size * args.batch_length)
        credit = 1 if credit is None else credit + per_step * args.num_envs
        result[add], credit = int(credit), credit % 1
    return +result


def check_schedule(tmp_path):
    """Updates come when they should: fewer than one for a step, and several."""
    for ratio, total in ((1.25, 120), (14.0, 60)):
        spy = run_counting(tmp_path / str(ratio), train_ratio=ratio, total_timesteps=total)
        assert spy.adds == total // 3
        assert spy.updates == expected_schedule(spy.args, spy.adds)
        steps_trained = total - 3 * min(spy.updates)
        assert abs(sum(spy.updates.values()) - 1 - steps_trained * ratio / 8) < 1


def fill(replay, steps, first=lambda i: i == 0):
    """Append steps whose reward is their number and whose vector is their stream."""
    n = replay.num_envs
    for i in range(replay.steps, replay.steps + steps):
        flags = dict(
            is_first=np.full(n, first(i)), is_last=np.zeros(n, bool), is_terminal=np.zeros(n, bool)
        )
        vector, reward = np.arange(n, dtype=np.float32)[:, None], np.full(n, i, np.float32)
        latent = dict(deter=np.zeros((n, 8), np.float16), stoch=np.zeros((n, 2), np.uint8))
        replay.add(
            flags | latent | dict(vector=vector, reward=reward, action=np.zeros((n, 2), np.float32))
        )
    return replay


def make_replay(length, envs, folder=None):
    """A replay for batches of 4 sequences of 3 + 1 steps."""
    rssm = SimpleNamespace(deter_dim=8, stoch_shape=(2, 4))
    args = tiny(batch_size=4, batch_length=3)
    return Replay(length, envs, Spaces(0, (("x", 1, ()),), (2,), 2), rssm, args, folder)


def draw(replay):
    """A batch as (stream, first step); every sequence must be consecutive and in the ring."""
    batch = replay.sample()[0]
    for row in batch["reward"]:
        assert np.array_equal(row, row[0] + np.arange(4)), "the sequence crosses the write pointer"
        assert replay.steps - replay.length <= row[0] and row[-1] < replay.steps
    assert (batch["vector"] == batch["vector"][:, :1]).all(), "the sequence changes its stream"
    return [
        (int(v), int(r))
        for v, r in zip(batch["vector"][:, 0, 0], batch["reward"][:, 0], strict=True)
    ]


def check_online_queue():
    """Every window exactly once, before uniform draws; overwritten ones are dropped."""
    replay = fill(make_replay(100, 2), 13)
    drawn = draw(replay) + draw(replay)
    assert sorted(drawn[:6]) == sorted(itertools.product(range(2), (0, 4, 8)))
    fill(replay, 3)
    assert sorted(draw(replay)[:2]) == [(0, 12), (1, 12)]
    replay = fill(make_replay(9, 2), 20)
    assert sorted(draw(replay)[:4]) == sorted(itertools.product(range(2), (12, 16)))


def check_uniform():
    """All start positions that the ring holds are equally likely, and no others are drawn."""
    replay = fill(make_replay(11, 2), 30)
    draw(replay), draw(replay)
    counts = Counter(start for _ in range(2000) for start in draw(replay))
    assert set(counts) == set(itertools.product(range(2), range(19, 27)))
    assert len(replay) == 16
    mean = 8000 / 16
    chi_square = sum((c - mean) ** 2 / mean for c in counts.values())
    assert chi_square < 15 + 5 * math.sqrt(30)  # mean of the statistic plus five deviations


def check_forced_last():
    """A step before an is_first counts as the last of its episode."""
    replay = fill(make_replay(40, 2), 30, first=lambda i: i % 7 == 0)
    for _ in range(20):
        batch = replay.sample()[0]
        number = batch["reward"].astype(int)
        expected = number % 7 == 6
        expected[:, -1] = False
        assert np.array_equal(batch["is_last"], expected) and not batch["is_terminal"].any()


def check_act_equals_observe():
    """Acting step by step gives the states of filtering the sequence; argmax for samples."""
    agent, steps = make_agent(MIXED), 5
    obs = make_batch(MIXED, agent.args, 2, steps)["obs"]
    is_first = torch.tensor([[1, 0, 0, 1, 0], [1, 0, 1, 0, 0]]).bool()
    with pytest.MonkeyPatch.context() as patch:
        hot = lambda probs: F.one_hot(probs.argmax(-1), probs.shape[-1]).to(probs.dtype)
        patch.setattr(dreamer_v3, "sample_one_hot", lambda probs, noise: hot(probs))
        carry, carries = agent.initial(2), []
        for t in range(steps):
            here = {k: x[:, t] for k, x in obs.items()} | {"is_first": is_first[:, t]}
            carry = agent.act(here, carry)
            carries.append(carry)
        deter, stoch, action = (torch.stack(x, 1) for x in zip(*carries, strict=True))
        shifted = torch.cat([torch.full_like(action[:, :1], 9.0), action[:, :-1]], 1)
        start = [torch.ones_like(x) for x in agent.model.rssm.initial(2)]
        states = agent.model.rssm.observe(agent.model.encoder(obs), shifted, is_first, *start)
    close(deter, to_numpy(states[0]))
    close(stoch, to_numpy(states[1]))
    assert (deter[:, 1:] - deter[:, :-1]).abs().amax(-1).min() > 1e-3, "the states must differ"


def check_evaluation(tmp_path):
    """An evaluation resets the state at first observations only, and counts whole episodes."""
    args = tiny(env_id="TestCounting-v0", run_dir=str(tmp_path))
    agent = Agent(args, Spaces(0, (("observation", 4, ()),), (3,), 3))
    act, modes = agent.act, []

    def spy(obs, carry, greedy=False):
        assert torch.equal(obs["is_first"], obs["vector"][:, 2] == 0), "reset at another step"
        carry = act(obs, carry, greedy)
        modes.append(greedy)
        return carry

    agent.act = spy
    returns = dreamer_v3.evaluate(agent, args, 11)
    expected = []
    for i in range(8):  # environments; the first three play two episodes
        stream = args.seed + 10_000 + i
        for episode in range(2 if i < 3 else 1):
            steps = range(1, episode_end(stream, episode) + 1)
            expected.append(sum(counting_reward(episode, t) for t in steps))
    assert sorted(returns) == sorted(expected) and all(modes)


@pytest.mark.parametrize(
    "check",
    [check_alignment, check_evaluation, check_schedule],
    ids=lambda check: check.__name__[6:],
)
def test_run(check, tmp_path):
    """Group B, on whole runs of `main`."""
    check(tmp_path)


@pytest.mark.parametrize(
    "check",
    [check_online_queue, check_uniform, check_forced_last],
    ids=lambda check: check.__name__[6:],
)
def test_replay(check):
    """Group B, on the replay alone."""
    check()


def test_act_equals_observe():
    """Group B: one filter, used in two ways."""
    in_float64(check_act_equals_observe)()


def test_greedy_actions_are_modes():
    """`act` with greedy takes the most likely action, and otherwise samples."""
    agent = make_agent(CONTINUOUS)
    obs = {"vector": torch.zeros(500, 4), "is_first": torch.ones(500, dtype=torch.bool)}
    deter, stoch, action = agent.act(obs, agent.initial(500), greedy=True)
    mode = agent.model.actor(torch.cat([deter, stoch.flatten(-2)], -1)).sample(greedy=True)
    close(action, to_numpy(mode), rtol=0, atol=1e-6)
    sampled = agent.act(obs, agent.initial(500))[2]
    assert sampled.std(0).min() > 0.1  # the smallest deviation a policy can have


# ---- C. Wiring -----------------------------------------------------------------------------------

PARTS = {
    "encoder": ["encoder"],
    "dynamics": [
        "rssm." + x
        for x in ("deter_in", "stoch_in", "action_in", "hidden_layer", "hidden_norm", "gru")
    ],
    "prior": ["rssm.prior_net"],
    "posterior": ["rssm.posterior_in", "rssm.posterior_out"],
    "decoder": ["decoder"],
    **{name: [name] for name in ("reward", "cont", "actor", "critic", "slow_critic")},
}
INFER = ["encoder", "dynamics", "posterior"]  # what a gradient into the features reaches
REACHES = {
    **{name: [*INFER, "decoder"] for name in ("image", "a", "b", "c")},
    "reward": [*INFER, "reward"],
    "cont": [*INFER, "cont"],
    "dyn": [*INFER, "prior"],  # the posterior through the samples of the steps before
    "rep": INFER,
    "repval": [*INFER, "critic"],
    "actor": ["actor"],
    "critic": ["critic"],
}
ONE_STEP = (
    "image",
    "a",
    "b",
    "c",
    "reward",
    "cont",
    "rep",
)  # the world model's, alike with a single step
REACHES_ONE_STEP = {name: REACHES[name] for name in ONE_STEP} | {"dyn": ["dynamics", "prior"]}


def collect_losses(agent, batch):
    """All losses that `Agent.loss` computes, unreduced, by name."""
    losses = {}
    with pytest.MonkeyPatch.context() as patch:

        def spy(name, keep):
            original = getattr(dreamer_v3, name)

            def wrapped(*args):
                result = original(*args)
                losses.update(keep(result))
                return result

            patch.setattr(dreamer_v3, name, wrapped)

        spy("world_model_loss", lambda result: dict(result[0]))
        spy("actor_critic_loss", lambda result: dict(result[0]))
        spy("replay_critic_loss", lambda result: {"repval": result})
        agent.loss(batch)
    return losses


def check_wiring(length=4):
    """Which loss moves which networks: most of their tensors, or none."""
    torch.manual_seed(0)
    agent = make_agent(MIXED, free_nats=0.0)
    names, params = zip(*agent.model.named_parameters(), strict=True)
    batch = make_batch(MIXED, agent.args, 3, length)
    batch["is_first"][:] = batch["is_last"][:] = batch["is_terminal"][:] = False
    table = REACHES if length > 1 else REACHES_ONE_STEP
    losses = (
        collect_losses(agent, batch)
        if length > 1
        else dreamer_v3.world_model_loss(agent.model, batch, agent.args)[0]
    )
    assert set(losses) == set(table)
    for loss, reached in table.items():
        grads = differentiate(losses[loss], params)
        for part, prefixes in PARTS.items():
            inside = [
                g
                for n, g in zip(names, grads, strict=True)
                if n.startswith(tuple(x + "." for x in prefixes))
            ]
            assert inside, f"no parameters in {part}"
            moved = [g is not None and bool(g.any()) for g in inside]
            # A decoder loss moves only its own key's output layer.
            assert any(moved) == (part in reached), f"{loss} reaches {part}: {any(moved)}"
            if part == loss or part in INFER and part in reached and loss != "dyn" and length > 1:
                assert sum(moved) >= 0.6 * len(moved), f"{loss} reaches only a part of {part}"


def differentiate(loss, params):
    """Gradient of a loss for all parameters that want one; None for others."""
    grads = iter(
        torch.autograd.grad(
            loss.sum(), [p for p in params if p.requires_grad], allow_unused=True, retain_graph=True
        )
    )
    return [next(grads) if p.requires_grad else None for p in params]


@in_float64
def check_total():
    """The total is the weighted sum of the means; the actor's weight is 1."""
    weights = dict(beta_pred=0.7, beta_dyn=0.6, beta_rep=0.5, beta_val=0.4, beta_repval=0.3)
    agent = make_agent(MIXED, **weights)
    batch = make_batch(MIXED, agent.args)
    own = {"dyn": 0.6, "rep": 0.5, "actor": 1.0, "critic": 0.4, "repval": 0.3}
    original, kept = agent.loss, []
    agent.loss = lambda b: kept.append(original(b))
    losses = collect_losses(agent, batch)
    expected = sum(own.get(name, 0.7) * to_numpy(x).mean() for name, x in losses.items())
    close(kept[0][0], expected)


def test_wiring():
    """Group C: sequences of several steps."""
    check_wiring()


def test_wiring_of_one_step():
    """Group C: without a step before, the dynamics loss does not reach the posterior at all."""
    check_wiring(1)


def test_total_loss():
    """Group C: every loss counts once, with its own weight."""
    check_total()


def test_every_argument_is_read():
    """Group C: a field of Args that nothing reads is a broken promise."""
    tree = ast.parse(Path(dreamer_v3.__file__).read_text())
    read = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }
    sizes = set(dreamer_v3.SIZES["1m"])  # read together by getattr
    assert {field.name for field in fields(Args)} <= read | sizes


MACHINE = ("time", "charts/SPS", "charts/UPS", "charts/memory_gb")  # not of the algorithm


def run_metrics(tmp_path, seed):
    """The metrics of a short run without times."""
    args = tiny(
        env_id="TestCounting-v0",
        run_dir=str(tmp_path),
        seed=seed,
        num_envs=2,
        log_every=10,
        eval_episodes=2,
    )
    dreamer_v3.main(args)
    (path,) = tmp_path.glob("*/metrics.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) > 5 and any("losses/total" in line for line in lines)
    return [{k: v for k, v in line.items() if k not in MACHINE} for line in lines]


def test_equal_seeds_give_equal_runs(tmp_path):
    """Group C: bitwise on the CPU; another seed gives another run."""
    first, second, other = (
        run_metrics(tmp_path / str(i), seed) for i, seed in enumerate((1, 1, 2))
    )
    assert first == second != other


@in_float64
def check_resizing(in_channels=20):
    """Outputs and gradients are those of a 5x5 convolution beside a pooling or an upsampling."""
    x = torch.randn(2, 6, 10, in_channels)
    x[0] = 1  # a flat image: neighbours tie
    x.requires_grad_()
    up, pool = dreamer_v3.UpConv(in_channels, 5), dreamer_v3.PoolConv(in_channels, 5)
    large = x.repeat_interleave(2, 1).repeat_interleave(2, 2)
    pooled = dreamer_v3.Conv.forward(pool, x).unflatten(2, (5, 2)).unflatten(1, (3, 2)).amax((2, 4))
    for layer, expected in ((up, dreamer_v3.Conv.forward(up, large)), (pool, pooled)):
        cotangent = torch.randn_like(expected)
        # With phases, the rounding of ties differs. It moves gradient between equal inputs only.
        wrt = (layer.weight, layer.bias) + (() if in_channels == 3 else (x,))
        close(layer(x), expected.detach())
        actual = torch.autograd.grad((layer(x) * cotangent).sum(), wrt)
        for a, b in zip(
            actual, torch.autograd.grad((expected * cotangent).sum(), wrt), strict=True
        ):
            close(a, b)


@pytest.mark.parametrize("in_channels", [3, 20])
def test_resizing_convolutions(in_channels):
    """Both ways of PoolConv: phases for few channels, the plain order for many."""
    check_resizing(in_channels)


def updates_by_name(compile, dtype=torch.float32):
    """Metrics of three updates of the same agent on the same batch, by name."""
    torch.manual_seed(0)
    agent = Agent(tiny(compile=compile), MIXED, dtype=dtype)
    batch = make_batch(MIXED, agent.args)
    runs = [agent.update(batch)[0] for _ in range(3)]
    return {f"{name} {i}": float(x) for i, run in enumerate(runs) for name, x in run.items()}


@pytest.fixture
def no_randomness(monkeypatch):
    """Samples of categoricals are the most likely class."""
    monkeypatch.setattr(dreamer_v3, "sample_class", lambda probs, uniform: probs.argmax(-1))


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compiled_equals_eager(no_randomness):
    """The compiled pieces compute what the eager ones do, up to the rounding of float32."""
    eager, compiled = updates_by_name(False), updates_by_name(True)
    assert compiled.keys() == eager.keys()
    for name in eager:
        assert compiled[name] == pytest.approx(eager[name], rel=1e-3, abs=1e-5), name


def test_bfloat16_is_near_float32(no_randomness):
    """Losses computed with bfloat16 matrices stay within 3%, beyond a rounding of 0.01."""
    exact, rounded = updates_by_name(False), updates_by_name(False, torch.bfloat16)
    for name in exact:
        if name.startswith("losses/") and "actor" not in name and "clipped" not in name:
            assert rounded[name] == pytest.approx(exact[name], rel=0.03, abs=0.01), name


def test_no_compiler(monkeypatch, capsys):
    """Without a compiler, one line says so and the agent trains all the same."""
    message = "no working C++ compiler\nand much more"
    monkeypatch.setattr(torch, "compile", lambda *a, **k: (_ for _ in ()).throw(OSError(message)))
    agent = Agent(tiny(compile=True), MIXED)
    assert capsys.readouterr().out.count("\n") == 1
    agent.update(make_batch(MIXED, agent.args))


# ---- D. Spaces -----------------------------------------------------------------------------------


def box(low, high, shape, dtype=np.float32):
    """A Box of equal bounds."""
    return gs.Box(low, high, shape, dtype)


NESTED = gs.Dict(
    {
        "x": gs.Tuple([box(-1, 1, (2,)), gs.Dict({"y": gs.Discrete(4, start=2)})]),
        "i": box(0, 255, (8, 8, 3), np.uint8),
    }
)
SENSORS = gs.Dict(
    {
        "image": box(0, 255, (20, 30, 3), np.uint8),
        "grey": box(0, 255, (64, 64), np.uint8),
        "vector": box(-5, 5, (3, 2)),
        "choice": gs.Discrete(3, start=-1),
        "many": gs.MultiDiscrete([2, 4]),
        "bits": gs.MultiBinary(3),
    }
)
PAIR = gs.Discrete(2)
WIDE = gs.Box(np.array([-0.3, 0.1, -7.0], np.float32), np.array([0.7, 0.2, 1000.0], np.float32))
CASES = {
    "vector": (box(-np.inf, np.inf, (4,)), PAIR),
    "float64": (box(-1, 1, (2, 2), np.float64), PAIR),
    "scalar": (box(-1, 1, ()), PAIR),
    "bytes": (box(0, 255, (5,), np.uint8), PAIR),
    "grey": (box(0, 255, (32, 48), np.uint8), PAIR),
    "grey_last": (box(0, 255, (64, 64, 1), np.uint8), PAIR),
    "channels_first": (box(0, 255, (3, 40, 40), np.uint8), PAIR),
    "stacked": (box(0, 255, (4, 30, 30, 3), np.uint8), PAIR),
    "big": (box(0, 255, (210, 160, 3), np.uint8), PAIR),
    "sensors": (SENSORS, PAIR),
    "nested": (NESTED, PAIR),
    "same_name": (gs.Dict({"a/b": gs.Discrete(2), "a": gs.Dict(b=gs.Discrete(3))}), PAIR),
    "discrete": (gs.Discrete(5, start=3), gs.Discrete(4, start=7)),
    "multi_discrete": (box(-1, 1, (2,)), gs.MultiDiscrete([2, 3, 4])),
    "multi_discrete_start": (
        gs.MultiDiscrete([3, 2], start=[5, -1]),
        gs.MultiDiscrete([[2, 3], [4, 2]], start=[[1, 2], [3, 4]]),
    ),
    "multi_binary": (box(-1, 1, (2,)), gs.MultiBinary(4)),
    "box": (box(-1, 1, (2,)), WIDE),
    "box_matrix": (box(-1, 1, (2,)), box(-2, 3, (2, 2))),
    "box_unbounded": (box(-1, 1, (2,)), box(-np.inf, np.inf, (2,))),
    "box_half_bounded": (
        box(-1, 1, (2,)),
        gs.Box(np.array([0, -np.inf], np.float32), np.array([np.inf, -0.5], np.float32)),
    ),
    "box_integer": (box(-1, 1, (2,)), box(-3, 9, (2,), np.int64)),
    "text": (gs.Text(5), PAIR),
    "graph": (gs.Graph(box(-1, 1, (2,)), None), PAIR),
    "sequence": (gs.Sequence(box(-1, 1, (2,))), PAIR),
    "sequence_inside": (
        gs.Dict({"v": box(-1, 1, (2,)), "deep": gs.Sequence(gs.Discrete(2))}),
        PAIR,
    ),
    "dict_action": (box(-1, 1, (2,)), gs.Dict({"a": PAIR})),
    "tuple_action": (box(-1, 1, (2,)), gs.Tuple([PAIR, PAIR])),
    "text_action": (box(-1, 1, (2,)), gs.Text(5)),
}
UNSUPPORTED = {
    "text": "Text", "graph": "Graph", "sequence": "Sequence", "sequence_inside": "deep.*Sequence",
    "same_name": "same name: obs/a/b", "dict_action": "Dict", "tuple_action": "Tuple",
    "text_action": "Text",
}  # fmt: skip


class SpaceEnv(gym.Env):
    """Random observations of a case; refuses actions outside its space."""

    def __init__(self, case, render_mode=None):
        self.observation_space, self.action_space = CASES[case]

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.received = 0, None
        return self.observation_space.sample(), {}

    def step(self, action):
        if not self.action_space.contains(action):
            raise ValueError(f"{action!r} is not in {self.action_space}")
        self.t, self.received = self.t + 1, action
        return self.observation_space.sample(), 1.0, self.t == 4, False, {}


gym.register("TestSpaces-v0", entry_point=SpaceEnv)


def space_args(case, **changes):
    """Args of a run of a case."""
    settings = dict(
        env_id="TestSpaces-v0",
        env_kwargs=json.dumps({"case": case}),
        total_timesteps=20,
        log_every=1,
    )
    return tiny(**(settings | changes))


def run_case(case, tmp_path, **changes):
    """Train and evaluate in a case; every loss must be finite."""
    returns = dreamer_v3.main(space_args(case, run_dir=str(tmp_path), eval_episodes=2, **changes))
    assert returns.tolist() == [4.0, 4.0]
    (path,) = tmp_path.glob("*/metrics.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    updates = [line for line in lines if "losses/total" in line]
    assert updates and updates[-1]["charts/updates"] >= 1
    assert all(math.isfinite(value) for line in updates for value in line.values())


@pytest.mark.parametrize("case", [case for case in CASES if case not in UNSUPPORTED])
def test_spaces(case, tmp_path):
    """Group D: every kind of space trains and evaluates."""
    run_case(case, tmp_path)


@pytest.mark.parametrize("case", ["sensors", "box", "multi_discrete_start"])
@pytest.mark.parametrize("async_envs", [False, True])
def test_several_environments(case, async_envs, tmp_path):
    """Group D: three environments, in this process and in processes of their own."""
    run_case(case, tmp_path, num_envs=3, async_envs=async_envs, total_timesteps=21)


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_unsupported_spaces(case):
    """Group D: a space that cannot be encoded is named."""
    with pytest.raises(UserError, match=UNSUPPORTED[case]):
        dreamer_v3.Environments(space_args(case), 1, 0)


def make_environments(case, num_envs=1):
    """`Environments` of a case, after a reset."""
    envs = dreamer_v3.Environments(space_args(case), num_envs, 0)
    envs.reset()
    return envs


def received(case, vectors):
    """What the environments get for action vectors."""
    envs = make_environments(case, len(vectors))
    envs.send(np.array(vectors, np.float32))
    envs.receive()
    return [np.asarray(env.unwrapped.received).tolist() for env in envs.envs.envs]


def test_action_values():
    """Group D: class 0 is the space's start; bounds belong to -1 and 1, then clipped."""
    assert received("discrete", np.eye(4)) == [7, 8, 9, 10]
    assert received("multi_discrete", [[0, 1, 0, 0, 1, 1, 0, 0, 0]]) == [[1, 2, 0]]
    assert received("multi_discrete_start", [[0, 1, 1, 0, 0, 0, 0, 0, 1, 0, 1]]) == [
        [[2, 2], [6, 5]]
    ]
    assert received("multi_binary", [[1, 0, 0, 1, 0, 1, 1, 0]]) == [[0, 1, 1, 0]]
    got = received("box", [[-1, -1, -1], [1, 1, 1], [9, -9, 0]])
    close(got, [[-0.3, 0.1, -7], [0.7, 0.2, 1000], [0.7, 0.1, 496.5]], rtol=1e-6, atol=0)  # float32
    assert received("box_integer", [[-1, 1], [0, 5]]) == [[-3, 9], [3, 9]]
    assert all(
        math.isfinite(x) for row in received("box_unbounded", [[-9, 9], [0.5, 0]]) for x in row
    )
    assert received("box_unbounded", [[0.5, 0.25]]) == [[0.5, 0.25]]


def test_action_bounds_are_never_left_by_rounding():
    """Group D: the ends of 2000 random boxes in float32."""
    rng = np.random.default_rng(0)
    low = rng.normal(size=2000).astype(np.float32)
    high = low + rng.exponential(size=2000).astype(np.float32)
    envs = make_environments("box")
    envs.action_space = gs.Box(low, high)
    for end in (-1.0, 1.0):
        assert envs.action_space.contains(
            envs.decode_action(np.full((1, 2000), end, np.float32))[0]
        )


def encoded(case, observation):
    """What `Environments` make of one observation, as the networks see it."""
    envs = make_environments(case)
    batched = lambda x: (
        {k: batched(v) for k, v in x.items()}
        if isinstance(x, dict)
        else (tuple(map(batched, x)) if isinstance(x, tuple) else np.asarray(x)[None])
    )
    return {key: x[0] for key, x in envs.encode_obs(batched(observation)).items()}


def test_image_values():
    """Group D: axes, resizing by averaging areas, and the order of several images."""
    image = np.zeros((3, 40, 40), np.uint8)
    image[0], image[1, :20], image[2, :, 20:] = 10, 100, 200
    x = encoded("channels_first", image)["image"]
    assert x.shape == (64, 64, 3) and x.dtype == np.uint8
    assert (x[..., 0] == 10).all() and (x[:31, :, 1] == 100).all() and (x[33:, :, 1] == 0).all()
    assert (x[:, 33:, 2] == 200).all() and (x[:, :31, 2] == 0).all()
    grey = np.random.default_rng(0).integers(0, 256, (64, 64, 1)).astype(np.uint8)
    assert np.array_equal(encoded("grey_last", grey)["image"], grey)
    chess = np.indices((210, 160)).sum(0)[..., None] % 2 * np.full(3, 200)
    mean = encoded("big", chess.astype(np.uint8))["image"].astype(float)
    assert abs(mean.mean() - 100) < 2 and mean.std() < 30, "large images are averaged, not sampled"
    frames = np.stack(
        [np.full((30, 30, 3), 10 * i, np.uint8) + np.arange(3, dtype=np.uint8) for i in range(4)]
    )
    assert encoded("stacked", frames)["image"][5, 5].tolist() == [
        10 * i + c for i in range(4) for c in range(3)
    ]


def test_vector_values():
    """Group D: keys in order of their names, discrete values one-hot from their start."""
    observation = {
        "image": np.full((20, 30, 3), 9, np.uint8), "grey": np.full((64, 64), 5, np.uint8),
        "bits": np.array([1, 0, 1]), "choice": 1,
        "vector": np.arange(6, dtype=np.float32).reshape(3, 2),
        "many": np.array([1, 2]),
    }  # fmt: skip
    x = encoded("sensors", observation)
    bits, choice, many = [0, 1, 1, 0, 0, 1], [0, 0, 1], [0, 1, 0, 0, 1, 0]
    assert x["vector"].tolist() == bits + choice + many + [0, 1, 2, 3, 4, 5]
    assert x["vector"].dtype == np.float32
    assert x["image"].shape == (64, 64, 4) and x["image"][3, 3].tolist() == [5, 9, 9, 9]
    nested = {"x": (np.array([0.5, -1], np.float32), {"y": 4}), "i": np.zeros((8, 8, 3), np.uint8)}
    assert encoded("nested", nested)["vector"].tolist() == [0.5, -1, 0, 0, 1, 0]


@pytest.mark.parametrize("env_id", ["ALE/Pong-v5", "ale_py:ALE/Pong-v5"])
@pytest.mark.parametrize("async_envs", [False, True])
def test_atari(env_id, async_envs):
    """Atari is 64x64 RGB of one frame, with raw rewards, however it is asked for."""
    args = tiny(env_id=env_id, async_envs=async_envs)
    envs = dreamer_v3.Environments(args, 2, seed=0)
    assert envs.spaces == Spaces(3, (), (6,), 6)
    assert envs.reset()["image"].shape == (2, 64, 64, 3)
    options = envs.envs.spec.kwargs
    assert not options["reward_clipping"] and not options["use_fire_reset"]
    assert options["repeat_action_probability"] == 0.25 and options["frameskip"] == 4
    envs.envs.close()


class Names(gym.Env):
    """Observations named like losses."""

    observation_space = gs.Dict({k: gs.Box(-1, 1, (2,)) for k in ("reward", "image", "actor")})
    action_space = gs.Discrete(2)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), 0.0, False, False, {}


def test_observations_named_like_losses(tmp_path):
    """They keep losses of their own."""
    gym.register("TestNames-v0", Names, max_episode_steps=5)
    dreamer_v3.main(tiny(env_id="TestNames-v0", run_dir=str(tmp_path), log_every=1))
    (path,) = tmp_path.glob("*/metrics.jsonl")
    names = set().union(*map(json.loads, path.read_text().splitlines()))
    for name in ("reward", "image", "actor"):
        assert f"losses/obs/{name}" in names
    assert {"losses/reward", "losses/actor"} <= names and "losses/image" not in names


def test_no_updates_without_a_train_ratio(tmp_path, monkeypatch):
    """--train-ratio 0 collects and never trains."""
    monkeypatch.delattr(Agent, "train_step")
    dreamer_v3.main(tiny(env_id="CartPole-v1", run_dir=str(tmp_path), train_ratio=0.0))


# ---- E. Checkpoints and command line -------------------------------------------------------------


def test_checkpoint_roundtrip(tmp_path):
    """Group E: a loaded agent is the saved one: parameters, actions, and next update."""
    first, second = make_agent(VECTOR, seed=1), make_agent(VECTOR, seed=1)
    batch = make_batch(VECTOR, first.args)
    for _ in range(3):
        first.update(batch)
    dreamer_v3.save_checkpoint(tmp_path / "checkpoint.pt", holder(first, step=123))
    assert [x.name for x in tmp_path.iterdir()] == ["checkpoint.pt"], "no temporary file stays"
    checkpoint = dreamer_v3.load_checkpoint(tmp_path / "checkpoint.pt")
    assert (checkpoint["step"], checkpoint["args"]) == (123, first.args)
    second.load_state_dict(checkpoint["agent"])
    for _ in range(2):
        for (name, p), q in zip(
            first.model.state_dict().items(), second.model.state_dict().values(), strict=True
        ):
            assert torch.equal(p, q), name
        acts = [act_once(agent, batch) for agent in (first, second)]
        assert all(torch.equal(a, b) for a, b in zip(*acts, strict=True))
        for agent in (first, second):
            torch.manual_seed(7)
            agent.update(batch)


def holder(agent, **state):
    """In place of a Trainer: what `save_checkpoint` reads of it."""
    others = dict.fromkeys(("replay", "random", "spaces", *dreamer_v3.COUNTERS), 0)
    state_dict = lambda: others | {"agent": agent.state_dict()} | state
    return SimpleNamespace(agent=agent, args=agent.args, state_dict=state_dict)


def act_once(agent, batch):
    """One greedy decision from the batch's first step, with fixed noise."""
    torch.manual_seed(5)
    obs = {key: x[:, 0] for key, x in (batch["obs"] | {"is_first": batch["is_first"]}).items()}
    return agent.act(obs, agent.initial(3), greedy=True)


def test_checkpoint_of_other_networks():
    """Group E: a checkpoint that does not fit is refused."""
    with pytest.raises(UserError):
        make_agent(VECTOR).load_state_dict(make_agent(CONTINUOUS).state_dict())
    with pytest.raises(UserError):
        make_agent(VECTOR).load_state_dict({})


class Evil:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_malicious_checkpoint(writer, tmp_path):
    """Group E: code in a checkpoint is not executed."""
    path, mark = tmp_path / "evil.pt", tmp_path / "executed"
    content = {"args": {}, "step": 0, "agent": Evil(mark)}
    if writer == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    with pytest.raises(UserError):
        dreamer_v3.load_checkpoint(path)
    assert not mark.exists()
    torch.load(path, weights_only=False) if writer == "torch" else pickle.loads(path.read_bytes())
    assert mark.exists(), "the file must be able to do harm"


def test_damaged_checkpoints(tmp_path):
    """Group E: half a file, no file, a folder and other files are refused."""
    agent, path = make_agent(VECTOR), tmp_path / "checkpoint.pt"
    dreamer_v3.save_checkpoint(path, holder(agent))
    content = path.read_bytes()
    (tmp_path / "half.pt").write_bytes(content[: len(content) // 2])
    (tmp_path / "empty.pt").write_bytes(b"")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"args": {"nonsense": 1}}, tmp_path / "other.pt")
    for name in ("half.pt", "empty.pt", "list.pt", "other.pt", "missing.pt", "."):
        with pytest.raises(UserError):
            dreamer_v3.load_checkpoint(tmp_path / name)


def command(*args):
    """Start dreamer_v3.py as a user would."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([sys.executable, dreamer_v3.__file__, *args], env=env, **pipes)


def flags(args):
    """Args as command-line flags, where they differ from the defaults."""
    changed = {
        f.name: getattr(args, f.name) for f in fields(Args) if getattr(args, f.name) != f.default
    }
    named = [(f"--{k.replace('_', '-')}", v) for k, v in changed.items() if not isinstance(v, bool)]
    switches = [
        f"--{'' if v else 'no-'}{k.replace('_', '-')}"
        for k, v in changed.items()
        if isinstance(v, bool)
    ]
    return [str(x) for pair in named for x in pair] + switches


def test_command_line_trains_and_evaluates(tmp_path):
    """Group E: train CartPole for a moment, then evaluate the checkpoint it leaves."""
    process = command(*flags(tiny(env_id="CartPole-v1", run_dir=str(tmp_path))))
    out, err = process.communicate()
    assert process.returncode == 0, err
    (path,) = tmp_path.glob("*/checkpoint.pt")
    process = command("--evaluate", str(path), "--eval-episodes", "2", "--no-cuda")
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert "CartPole-v1 after 40 steps" in out and "2 episodes" in out


# Wrong invocations: name -> (a word of the answer, flags); `+` stands for a small CartPole.
ERRORS = {
    "unknown environment": ("NoSuchGame", "--env-id NoSuchGame-v3"),
    "near match": ("CartPole", "--env-id CartPoel-v1"),
    "near match in Atari": ("MsPacman", "--env-id ALE/MsPackman-v5"),
    "old version": ("version", "--env-id CartPole-v7"),
    "no environment": ("--env-id", "--env-id ''"),
    "unknown module": ("no_such_module", "--env-id no_such_module:Game-v0"),
    "malformed id": ("--env-id", "--env-id ///"),
    "text observations": ("Text", "--env-id TestText-v0"),
    "sequence of actions": ("Sequence", "--env-id TestSequence-v0"),
    "not JSON": ("--env-kwargs", "+ --env-kwargs '{frameskip: 4}'"),
    "not an object": ("--env-kwargs", "+ --env-kwargs [1]"),
    "empty options": ("--env-kwargs", "+ --env-kwargs ''"),
    "wrong option": ("no_such_option", """+ --env-kwargs '{"no_such_option": 1}'"""),
    "deter not in blocks": ("--deter", "+ --deter 100"),
    "blocks that do not divide": ("--blocks", "+ --size 1m --blocks 7"),
    "one class": ("--classes", "+ --classes 1"),
    "classes beyond a byte": ("--classes", "+ --classes 300"),
    "no units": ("--units", "+ --units 0"),
    "no channels": ("--depth", "+ --depth -4"),
    "negative ratio": ("--train-ratio", "+ --train-ratio -1"),
    "infinite ratio": ("--train-ratio", "+ --train-ratio inf"),
    "rate not a number": ("--learning-rate", "+ --learning-rate nan"),
    "negative rate": ("--learning-rate", "+ --learning-rate -1e-4"),
    "rate as a word": ("--learning-rate", "--learning-rate fast"),
    "gamma above 1": ("--gamma", "+ --gamma 1.01"),
    "negative gamma": ("--gamma", "+ --gamma -0.5"),
    "unimix above 1": ("--unimix", "+ --unimix 1.5"),
    "tau above 1": ("--tau", "+ --tau 2"),
    "beta2 of 1": ("--beta2", "+ --beta2 1"),
    "negative weight": ("--beta-rep", "+ --beta-rep -0.1"),
    "no epsilon": ("--laprop-eps", "+ --laprop-eps 0"),
    "no environments": ("--num-envs", "+ --num-envs 0"),
    "no steps": ("--total-timesteps", "+ --total-timesteps 0"),
    "no horizon": ("--imag-horizon", "+ --imag-horizon 0"),
    "sequences of 1": ("--batch-length", "+ --batch-length 1"),
    "empty batch": ("--batch-size", "+ --batch-size 0"),
    "batch larger than the buffer": ("--buffer-size", "+ --buffer-size 10"),
    "negative seed": ("--seed", "+ --seed -1"),
    "huge seed": ("--seed", "+ --seed 99999999999"),
    "never saved": ("--save-every", "+ --save-every 0"),
    "negative interval": ("--eval-every", "+ --eval-every -5"),
    "negative report interval": ("--report-every", "+ --report-every -1"),
    "no repeat": ("--action-repeat", "+ --action-repeat 0"),
    "repeat in Atari": ("frameskip", "--env-id ALE/Pong-v5 --action-repeat 2"),
    "unknown size": ("13m", "--size 13m"),
    "unknown type": ("float16", "--dtype float16"),
    "unknown flag": ("--no-such-flag", "--no-such-flag 1"),
    "flag without value": ("--seed", "--seed"),
    "float for int": ("1e5", "--total-timesteps 1e5"),
    "a word too many": ("MsPacman", "MsPacman"),
    "wandb is missing": ("pip install 'wandb'", "+ --track"),
    "moviepy is missing": ("pip install 'moviepy'", "+ --capture-video"),
    "nothing to evaluate": ("--eval-episodes", "--evaluate x.pt --eval-episodes 0"),
    "no checkpoint": ("no_such_checkpoint.pt", "--evaluate no_such_checkpoint.pt"),
    "evaluate a folder": ("folder", "--evaluate folder"),
    "evaluate a text": ("file", "--evaluate file"),
    "evaluate nothing": ("--evaluate", "--evaluate ''"),
    "evaluate and resume": ("--evaluate and --resume", "--evaluate x.pt --resume folder"),
    "resume and benchmark": ("--resume and --benchmark", "--resume folder --benchmark"),
    "resume nothing": ("--resume", "--resume ''"),
    "resume no folder": ("no_such_run", "--resume no_such_run"),
    "resume an empty folder": ("folder", "--resume folder"),
    "resume a file": ("file", "--resume file"),
    "benchmark without updates": ("--train-ratio", "+ --benchmark --train-ratio 0"),
    "run folder is a file": ("file", "+ --run-dir file"),
    "run folder in a file": ("file", "+ --run-dir file/runs"),
    "no right to write": ("/proc/no", "+ --run-dir /proc/no"),
}


class Texts(gym.Env):
    """Observes text."""

    observation_space, action_space = gs.Text(5), gs.Discrete(2)


class Sequences(gym.Env):
    """Takes sequences of actions."""

    observation_space, action_space = gs.Discrete(2), gs.Sequence(gs.Discrete(2))


gym.register("TestText-v0", entry_point=Texts)
gym.register("TestSequence-v0", entry_point=Sequences)


@pytest.mark.parametrize("case", ERRORS)
def test_command_line_errors(case, tmp_path, monkeypatch, capsys):
    """Group E: exit status 2, one line that names what is wrong, and no files."""
    word, line = ERRORS[case]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("a text\n")
    words = shlex.split(line.replace("+", "--env-id CartPole-v1 --size 1m --no-compile", 1))
    monkeypatch.setattr(sys, "argv", ["dreamer_v3.py", "--no-cuda", *words])
    import_module = importlib.import_module
    hidden = lambda name: import_module("no_" + name if name in ("wandb", "moviepy") else name)
    monkeypatch.setattr(importlib, "import_module", hidden)
    with pytest.raises(SystemExit) as exit_info:
        dreamer_v3.cli()
    assert exit_info.value.code == 2
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    assert len(err.strip().splitlines()) == 1 and err.startswith("dreamer_v3.py: error: ")
    assert word in err
    assert not set("│─╭╯") & set(err), "tyro's box"
    assert sorted(x.name for x in tmp_path.iterdir()) == ["file", "folder"]
    assert not list((tmp_path / "folder").iterdir())
    assert (tmp_path / "file").read_text() == "a text\n"


def test_command_line_error_as_a_process(tmp_path):
    """Group E: the same in a process of its own."""
    process = command("--env-id", "NoSuchGame-v3", "--no-cuda", "--run-dir", str(tmp_path))
    out, err = process.communicate()
    assert process.returncode == 2 and "NoSuchGame" in err and "Traceback" not in err
    assert not list(tmp_path.iterdir())


# ---- F. Learning ---------------------------------------------------------------------------------


class Cue(gym.Env):
    """Shows a cue at step 0 only; two blank steps later the action must match it, and then it pays.

    The cue also says what is at stake, 1 or 2, and alternates: 1.5 an episode at most, 0.75 at
    random, and 1 for always taking the better action.
    """

    observation_space = gs.Box(-1, 1, (3,), np.float32)
    action_space = gs.Discrete(2)
    cue = 0

    def observe(self):
        cue = [self.t == 0 and self.cue == 0, self.t == 0 and self.cue == 1]
        return np.array([*cue, self.t == 3], np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.cue = 0, 1 - self.cue
        return self.observe(), {}

    def step(self, action):
        self.t += 1
        end = self.t == 4
        reward = (1.0 + self.cue) * (end and action == self.cue)
        return self.observe(), reward, end, False, {}


gym.register("TestCue-v0", entry_point=Cue)


def learn(folder, seed=1):
    """Greedy mean return, out of 1.5, after a training run in the cue environment."""
    network = dict(deter=128, hidden=64, units=64, classes=4, stoch=4, blocks=4)
    schedule = dict(batch_size=16, batch_length=16, train_ratio=32.0, num_envs=16)
    behaviour = dict(imag_horizon=5, ent_coef=0.1, warmup_updates=100)
    args = tiny(
        env_id="TestCue-v0", run_dir=str(folder), seed=seed, total_timesteps=6400,
        buffer_size=10_000, eval_episodes=64, **network, **schedule, **behaviour,
    )  # fmt: skip
    returns = dreamer_v3.main(args)
    assert len(returns) == 64
    return returns.mean()


def test_learning(tmp_path):
    """Group F: memory and delayed reward; 90% of the maximum. No policy without memory has 70%."""
    assert learn(tmp_path) >= 0.9 * 1.5


# ---- G. Documents --------------------------------------------------------------------------------

README = (Path(__file__).parent / "README.md").read_text()
SOURCE = Path(dreamer_v3.__file__).read_text()


def readme_commands():
    """Every `python dreamer_v3.py ...` of the README, as a list of arguments."""
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    return re.findall(r"python dreamer_v3.py(.*)", "".join(blocks))


def test_readme_commands_parse():
    """The commands of the README, and of the file's docstring, are accepted by the parser."""
    commands = readme_commands() + re.findall(r"^ +python dreamer_v3.py(.*)", SOURCE, re.MULTILINE)
    assert len(commands) >= 8
    for command in commands:
        words = shlex.split(command, comments=True)
        if "--help" not in words:
            dreamer_v3.check_args(replace(tyro.cli(Args, args=words), capture_video=False))


def readme_blocks(language):
    """The README's blocks of code in a language."""
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def readme_diff(name, folder):
    """Apply the diff whose first line has the name, to a copy of dreamer_v3.py in the folder."""
    (diff,) = (block for block in readme_blocks("diff") if name in block)
    shutil.copy(dreamer_v3.__file__, folder)
    command = ["git", "apply", "-p0", "-"]
    done = subprocess.run(command, input=diff, text=True, capture_output=True, cwd=folder)
    assert done.returncode == 0, done.stderr


def load_module(path, monkeypatch):
    """Import a file under a name of its own."""
    spec = importlib.util.spec_from_file_location(f"copy_{path.parent.name}_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def short_run(module, tmp_path, **settings):
    """A short run of the smallest network in any copy of the file: the run's folder."""
    args = module.Args(**(TINY | {"run_dir": str(tmp_path), "log_every": 1} | settings))
    module.main(args)
    (folder,) = tmp_path.glob("*/metrics.jsonl")
    return folder.parent


COMMANDS = readme_commands()


@pytest.mark.parametrize("command", COMMANDS, ids=range(len(COMMANDS)))
def test_readme_commands_run(command, tmp_path, monkeypatch, capsys):
    """Every command of the README does what it says: as it stands, only shorter and smaller."""
    short = TINY | dict(run_dir=str(tmp_path), eval_episodes=1, batch_size=2, batch_length=4)
    short |= dict(total_timesteps=24, buffer_size=1000, eval_every=20, report_every=20, log_every=4)
    words = shlex.split(command, comments=True)
    if "--help" in words:
        with pytest.raises(SystemExit) as caught:
            tyro.cli(Args, args=words)
        assert caught.value.code == 0
        return
    if "RUN" in command:
        folder = short_run(dreamer_v3, tmp_path, env_id="CartPole-v1", total_timesteps=20)
        words = [word.replace("runs/RUN", str(folder)) for word in words]
    args = tyro.cli(Args, args=words)
    if "shimmy" in args.env_id:
        pytest.importorskip("shimmy", reason="pip install 'shimmy[dm-control]' 'mujoco<4'")
    if args.capture_video and not importlib.util.find_spec("moviepy"):
        with pytest.raises(UserError, match="pip install 'moviepy'"):
            dreamer_v3.main(args)
        args = replace(args, capture_video=False)
    if args.env_id.startswith("my_module"):
        readme_diff("my_module", tmp_path)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))  # for --async-envs
    monkeypatch.setattr(dreamer_v3, "BENCHMARK_SECONDS", 0.1)
    if args.resume:
        old = dreamer_v3.load_checkpoint(Path(args.resume) / "checkpoint.pt")["args"]
        dreamer_v3.main(replace(old, resume=args.resume, total_timesteps=30))
        assert {line["step"] for line in read_metrics(folder)} >= {20, 30}
    elif args.evaluate:
        returns = dreamer_v3.main(args)
        assert len(returns) == args.eval_episodes == 100
        text = capsys.readouterr().out.splitlines()[-1]
        assert all(word in text for word in ("mean", "standard error", "median", "min", "max"))
    elif args.benchmark:
        assert dreamer_v3.main(replace(args, **short))["update_ms"] > 0
    else:
        short |= dict(num_envs=args.num_envs, total_timesteps=24 * args.num_envs, eval_sample=True)
        dreamer_v3.main(replace(args, **short))
        (folder,) = (path.parent for path in tmp_path.glob("*/metrics.jsonl"))
        lines = read_metrics(folder)
        assert any("losses/total" in line for line in lines)
        assert any("eval/episodic_return" in line for line in lines)
        assert list(folder.glob("dreams/*.txt"))


def test_readme_snippet(tmp_path, capsys):
    """The README's snippet loads a checkpoint, acts, and prints a return."""
    folder = short_run(dreamer_v3, tmp_path, env_id="CartPole-v1", total_timesteps=20)
    (snippet,) = readme_blocks("python")
    assert "runs/RUN" in snippet
    capsys.readouterr()
    exec(snippet.replace("runs/RUN", str(folder)), {})
    word, number = capsys.readouterr().out.split()
    assert word == "return" and 8 <= float(number) <= 500  # CartPole falls after 8 steps at least


def test_readme_encoder(tmp_path, monkeypatch):
    """The README's other encoder trains, and is the one that is used."""
    readme_diff("self.patch", tmp_path)
    module = load_module(tmp_path / "dreamer_v3.py", monkeypatch)
    folder = short_run(
        module,
        tmp_path,
        **vars(space_args("grey", total_timesteps=20)) | {"run_dir": str(tmp_path)},
    )
    state = module.load_checkpoint(folder / "checkpoint.pt")["agent"]["model"]
    assert any(name.startswith("encoder.patch") for name in state)
    assert not any(name.startswith("encoder.convs") for name in state)
    # An entry of the embedding sees one patch and no other.
    spaces = Spaces(3, (), (2,), 2)
    encoder = module.Encoder(spaces, depth=4, units=8)
    image = torch.zeros(1, 1, 64, 64, 3, dtype=torch.uint8)
    before = encoder({"image": image})
    image[0, 0, 8:16, 24:32] = 200
    changed = (encoder({"image": image}) - before).abs().unflatten(-1, (8, 8, -1)).sum(
        (0, 1, -1)
    ) > 0
    assert changed.nonzero().tolist() == [[1, 3]] and before.shape[-1] == encoder.embed_dim


def test_readme_normaliser(tmp_path, monkeypatch):
    """The README's other normaliser trains, and the range is mean -+ deviation."""
    readme_diff("returns.std()", tmp_path)
    module = load_module(tmp_path / "dreamer_v3.py", monkeypatch)
    args = replace(tiny(), return_rate=1.0)
    agent = module.Agent(module.Args(**vars(args)), VECTOR)
    randomize(agent.model)
    feat = torch.randn(6, 5, agent.model.rssm.deter_dim + math.prod(agent.model.rssm.stoch_shape))
    action = make_vector(VECTOR.action_classes, VECTOR.action_width, (6, 5))
    _, returns, _ = module.actor_critic_loss(agent.model, feat, action, args)
    expected = torch.stack([returns.mean() - returns.std(), returns.mean() + returns.std()])
    close(agent.model.return_range, expected, rtol=1e-5)


def test_readme_environment(tmp_path, monkeypatch):
    """The README's environment is remembered: 1 for the sign that was shown, else 0."""
    readme_diff("my_module", tmp_path)
    module = load_module(tmp_path / "my_module.py", monkeypatch)
    env = module.Guess()
    for right in (0, 1, 0, 1):
        obs, _ = env.reset()
        assert env.observation_space.contains(obs)
        answer = obs["sign"] if right else 1 - obs["sign"]
        results = [env.step(answer) for _ in range(5)]
        assert all(env.observation_space.contains(x[0]) and x[0]["sign"] == 2 for x in results)
        assert [x[1] for x in results] == [0, 0, 0, 0, right] and results[-1][2]


def load_results_script():
    """results/make.py as a module."""
    path = Path(dreamer_v3.__file__).parent / "results/make.py"
    spec = importlib.util.spec_from_file_location("make", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_readme_tables():
    """Every table made from results/ is in the README as the script makes it now."""
    make = load_results_script()
    assert make.write_tables(README) == README
    assert README.count("<!-- table ") == len([name for name in vars(make) if name[:6] == "table_"])
    for name in re.findall(r"\]\((results/[\w.]*)\)", README):
        assert (Path(dreamer_v3.__file__).parent / name).exists(), name


def test_results_script(tmp_path):
    """A run becomes a curve, and a command that is the same run; tables and figure are made."""
    here = Path(dreamer_v3.__file__).parent
    for name in ("README.md", "dreamer_v3.py", "results"):
        copy_of = shutil.copytree if name == "results" else shutil.copy
        copy_of(here / name, tmp_path / name)

    def make(*words):
        """Run the script."""
        command = [sys.executable, "results/make.py", *map(str, words)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    make("tables")
    assert (tmp_path / "README.md").read_text() == README
    changes = dict(num_envs=2, seed=7, action_repeat=2, async_envs=True, save_replay=False)
    changes |= dict(eval_episodes=2, gamma=0.9, env_id="CartPole-v1", total_timesteps=60)
    run = short_run(dreamer_v3, tmp_path / "runs", **changes)
    make("add", run, "--commit", "abc", "--hardware", "a machine")
    make("add", run, "--commit", "abc", "--hardware", "a machine")  # once, not twice
    entries = json.loads((tmp_path / "results/cartpole.json").read_text())
    (entry,) = (entry for entry in entries if entry["commit"] == "abc")
    lines = [line for line in read_metrics(run) if "charts/episodic_return" in line]
    assert entry["xs"] == [2 * line["step"] for line in lines] and len(lines) > 1
    close(entry["ys"], [line["charts/episodic_return"] for line in lines], atol=1e-4)
    expected = dict(task="cartpole", seed=7, steps=60, frames=120, asked=60, hardware="a machine")
    assert expected.items() <= entry.items()
    ((frame, mean, _, episodes),) = entry["evaluations"]
    assert (frame, episodes) == (120, 2) and mean > 0 and entry["updates"] > 0
    words = shlex.split(entry["command"])
    assert words[:2] == ["python", "dreamer_v3.py"]
    args = dreamer_v3.load_checkpoint(run / "checkpoint.pt")["args"]
    assert tyro.cli(Args, args=words[2:]) == replace(args, run_dir="runs")
    make("tables")
    assert entry["command"].replace(" --seed 7", "") in (tmp_path / "README.md").read_text()
    if importlib.util.find_spec("matplotlib"):  # pip install matplotlib
        (tmp_path / "results/curves.png").unlink()
        make("figures")
        assert (tmp_path / "results/curves.png").stat().st_size > 10_000


def test_results_against_the_authors():
    """Frames are put into the authors' bins, tasks get the authors' names."""
    make = load_results_script()
    names = {
        "ALE/MsPacman-v5": "atari_ms_pacman",
        "ALE/UpNDown-v5": "atari_up_n_down",
        "ALE/KungFuMaster-v5": "atari_kung_fu_master",
        "shimmy:dm_control/ball_in_cup-catch-v0": "dmc_ball_in_cup_catch",
        "my-vehicle-v3": "my_vehicle",
    }
    assert {name: make.task_name(name) for name in names} == names
    xs, ys = [1, 10_000, 10_001, 25_000, 40_000, 999_999], [1.0, 3.0, 5.0, 7.0, 9.0, 11.0]
    assert make.binned(xs, ys, 50_000) == [2.0, 5.0, 7.0, 9.0, None]


def test_equations_are_found():
    """`grep "Eq. n"` finds each equation, also in every function of the README's table."""
    rows = re.findall(r"^\| ([\d, ]+) \| [^|]+ \| (`[^|]+) \|$", README, re.MULTILINE)
    assert [int(n) for numbers, _ in rows for n in numbers.split(",")] == list(range(1, 12))
    for numbers, places in rows:
        cited = ""
        for place in re.findall(r"`([\w.]+)`", places):
            item = functools.reduce(getattr, place.split("."), dreamer_v3)
            source = inspect.getsource(item)
            assert re.search(rf"Eq\. ({numbers.replace(', ', '|')})\b", source), (numbers, place)
            cited += source
        for n in numbers.split(", "):
            assert re.search(rf"Eq\. {n}\b", cited), n


def test_metrics_are_explained(tmp_path):
    """Each metric that a run writes is in the README's table, and none else."""
    for case in ("sensors", "box"):
        args = space_args(case, run_dir=str(tmp_path / case), eval_episodes=1, report_every=10)
        dreamer_v3.main(replace(args, batch_size=2, batch_length=4))
    written = {
        name
        for path in tmp_path.glob("*/*/metrics.jsonl")
        for line in read_metrics(path.parent)
        for name in line
    } - {"step", "time"}
    table = README.split("## Metrics")[1].split("## ")[0]
    listed = {
        x for row in table.splitlines() for x in re.findall(r"`([\w./<>]+)`", row.split(" | ")[0])
    }
    listed = {x.replace("..._", "behaviour/normed_return_") for x in listed}
    general = {
        r"(losses|report/error_)/?obs/\w+": "losses/obs/<name>",
        r"report/error_.*": "report/error_<name>",
        r"report/constant_.*": "report/constant_<name>",
        r"losses/(obs|image)": None,
        r"grad_norm/\w+": "grad_norm/<module>",
        r"grad_clipped/\w+": "grad_clipped/<module>",
    }
    for name in written - listed:
        match = [to for pattern, to in general.items() if re.fullmatch(pattern, name)]
        assert match and match[0] in listed, f"{name} is not explained"
    assert len(written) > 50
    plain = {name for name in listed if "<" not in name}
    seldom = {"losses/obs", "report/critic_correlation"}
    assert plain - written <= seldom


def test_readme_table_of_hyperparameters():
    """Its defaults are those of Args, and every hyperparameter after --size is in it."""
    rows = re.findall(r"^\| `--([\w-]+)` \| (\S+) \|", README, re.MULTILINE)
    table = {flag.replace("-", "_"): default for flag, default in rows}
    defaults = {field.name: str(field.default) for field in fields(Args)}
    assert table == {name: defaults[name] for name in table}
    names = list(defaults)
    expected = set(names[names.index("stoch") :]) | {"size", "train_ratio", "batch_size"}
    assert expected <= set(table)


def test_details_are_numbered_alike():
    """Every [Dn] of the README stands in the code, and the other way round."""
    listed = set(re.findall(r"^\| D(\d+) \|", README, re.MULTILINE))
    tagged = set(re.findall(r"\[D(\d+)\]", SOURCE.split('"""', 2)[2]))
    assert listed == tagged == {str(i) for i in range(1, 26)}


def test_help_explains_every_flag(capsys):
    """--help has a text for every flag."""
    with pytest.raises(SystemExit) as caught:
        tyro.cli(Args, args=["--help"])
    text = capsys.readouterr().out
    assert caught.value.code == 0
    for field in fields(Args):
        flag = f"--{field.name.replace('_', '-')}"
        after = text.split(f" {flag} ", 1)[-1] if f" {flag} " in text else text.split(flag, 1)[1]
        assert re.search(r"[A-Z][^│]{8}", after.split("(default", 1)[0]), flag


def test_no_code_at_import_and_docstrings():
    """Importing prints nothing; every public class and function says what it does."""
    command = [sys.executable, "-c", "import dreamer_v3"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    kinds = (ast.FunctionDef, ast.ClassDef)
    for node in ast.walk(ast.parse(SOURCE)):
        if isinstance(node, kinds) and not node.name.startswith("_"):
            inner = node.name in ("forward", "backward", "product")
            assert inner or ast.get_docstring(node), f"{node.name} has no docstring"


# ---- H. The tests bite ---------------------------------------------------------------------------
# Every mutation plants one mistake into dreamer_v3; the check named beside it must fail.


def wrap(patch, owner, name, mutated):
    """Replace owner.name by mutated(original, *args)."""
    original = getattr(owner, name)
    patch.setattr(owner, name, lambda *args, **kwargs: mutated(original, *args, **kwargs))


def function(name, mutated):
    """A mutation that wraps a function of dreamer_v3."""
    return lambda patch: wrap(patch, dreamer_v3, name, mutated)


def method(owner, name, mutated):
    """A mutation that wraps a method of a class of dreamer_v3."""
    return lambda patch: wrap(patch, getattr(dreamer_v3, owner), name, mutated)


def twohot_in_symlog_space(original, logits, target, bins):
    """DreamerV3 of 2023: weights linear in symlog space."""
    return original(logits, dreamer_v3.symlog(target), dreamer_v3.symlog(bins))


def plain_sum(original, logits, bins):
    """The expectation in plain order: rounding leaves a random value."""
    return (logits.softmax(-1) * bins).sum(-1)


def kl_per_variable(original, log_p, log_q):
    """Free nats for every variable before the sum."""
    return (log_p.exp() * (log_p - log_q)).sum(-1).clamp(min=1.0).sum(-1)


def gumbel(original, probs, uniform):
    """A relaxed sample instead of straight-through."""
    return ((probs.log() - torch.empty_like(probs).exponential_().log()) / 0.5).softmax(-1)


def detached_sample(original, probs, uniform):
    """A sample without gradient."""
    return original(probs, uniform).detach() + 0 * probs


def no_reset(original, self, embed, prev_action, is_first, deter, stoch):
    """The state survives the start of an episode."""
    return original(self, embed, prev_action, torch.zeros_like(is_first), deter, stoch)


def action_survives(original, self, embed, prev_action, is_first, deter, stoch):
    """At the start of an episode the action is class 0 instead of a zero vector."""
    action = torch.where(is_first[..., None], torch.eye(prev_action.shape[-1])[0], prev_action)
    result = []
    for t in range(is_first.shape[1]):
        keep = 1 - is_first[:, t, None].to(deter.dtype)
        state = deter * keep, stoch * keep[..., None]
        step = original(
            self,
            embed[:, t : t + 1],
            action[:, t : t + 1],
            torch.zeros_like(is_first[:, :1]),
            *state,
        )
        deter, stoch = step[0][:, 0], step[1][:, 0]
        result.append(step)
    return [torch.cat(x, 1) for x in zip(*result, strict=True)]


def no_update_bias(original, model, *args):
    """sigmoid(update) instead of sigmoid(update - 1)."""
    rssm = model.rssm
    shift = torch.zeros(rssm.blocks, 3, rssm.deter_dim // rssm.blocks)
    shift[:, 2] = 1
    rssm.gru.bias.data += shift.flatten()
    result = original(model, *args)
    rssm.gru.bias.data -= shift.flatten()
    return result


def no_gradient_through_time(original, self, embed, prev_action, is_first, deter, stoch):
    """Every step of `observe` starts from a detached state."""
    result = []
    for t in range(is_first.shape[1]):
        now = slice(t, t + 1)
        step = original(self, embed[:, now], prev_action[:, now], is_first[:, now], deter, stoch)
        deter, stoch = step[0][:, 0].detach(), step[1][:, 0].detach()
        result.append(step)
    return [torch.cat(x, 1) for x in zip(*result, strict=True)]


def max_pool(original, self, x):
    """max_pool2d gives the whole gradient to one of equal entries."""
    x = dreamer_v3.Conv.forward(self, x).permute(0, 3, 1, 2)
    return F.max_pool2d(x, 2).permute(0, 2, 3, 1)


def reward_shifted(original, reward, value, cont, last, lam):
    """r_t instead of r_{t+1}."""
    return original(reward.roll(1, 1), value, cont, last, lam)


def value_not_shifted(original, reward, value, cont, last, lam):
    """Bootstrapped with v_t instead of v_{t+1}."""
    return original(reward, value.roll(1, 1), cont, last, lam)


def discount_twice(original, reward, value, cont, last, lam):
    """The discount on top of a continue probability that has it already."""
    return original(reward, value, cont * (1 - 1 / 333), last, lam)


def last_ignored(original, reward, value, cont, last, lam):
    """The lambda-return runs on into the next episode."""
    return original(reward, value, cont, torch.zeros_like(last), lam)


def last_cuts_value(original, reward, value, cont, last, lam):
    """A cut trajectory counts as one that ended by itself."""
    return original(reward, value, cont * (1 - last), last, lam)


def entropy_outside(original, model, feat, action, args):
    """The entropy bonus without the trajectory's weight."""
    losses, *rest = original(model, feat, action, args)
    weight = torch.sigmoid(model.cont(feat)).squeeze(-1).cumprod(1)[:, :-1].detach()
    bonus = args.ent_coef * model.actor(feat[:, :-1]).entropy()
    return {**losses, "actor": losses["actor"] + (weight - 1) * bonus}, *rest


def weight_without_start(original, model, feat, action, args):
    """The weight of the first step is 1 instead of its own continue probability."""
    losses, *rest = original(model, feat, action, args)
    start = torch.sigmoid(model.cont(feat)).detach()[:, 0]
    return {name: loss / start for name, loss in losses.items()}, *rest


def slow_critic_as_target(original, model, feat, action, args):
    """Returns bootstrapped with the slow critic."""
    slow = dreamer_v3.twohot_mean(model.slow_critic(feat), model.bins)
    with pytest.MonkeyPatch.context() as patch:
        wrap(
            patch,
            dreamer_v3,
            "lambda_return",
            lambda f, reward, value, *rest: f(reward, slow, *rest),
        )
        return original(model, feat, action, args)


def returns_not_limited(original, model, feat, action, args):
    """Small return ranges are blown up to 1: advantages grow by 1 / range."""
    losses, returns, *rest = original(model, feat, action, args)
    scale = (model.return_range[1] - model.return_range[0]).clamp(max=1)
    return {**losses, "actor": losses["actor"] / scale}, returns, *rest


def gradient_in_imagination(original, *args):
    """The trajectory keeps its gradient: `imagine` without its torch.no_grad."""
    return original.__wrapped__(*args)


def detached_replay_critic(original, model, feat, *rest):
    """The critic on replayed sequences does not train the world model."""
    return original(model, feat.detach(), *rest)


def without_clipping(original, self, owners, params, exact, args):
    """No adaptive gradient clipping."""
    original(self, owners, params, exact, dreamer_v3.replace(args, agc_clip=1e9))


def adam(original, self):
    """Adam: the momentum is taken before the normalisation."""
    args, n = self.args, int(self.updates) + 1
    for p, nu, mu in zip(self.params, self.nu, self.mu, strict=True):
        limit = args.agc_clip * p.detach().norm().clamp(min=1e-3)
        g = p.grad / (p.grad.norm() / limit).clamp(min=1)
        nu.lerp_(g * g, 1 - args.beta2)
        mu.lerp_(g, 1 - args.beta1)
        lr = args.learning_rate * min(1, (n - 1) / args.warmup_updates)
        p.data -= lr * (mu / (1 - args.beta1**n)) / ((nu / (1 - args.beta2**n)).sqrt() + 1e-20)
    self.updates += 1


def stored_late(original, self, entry):
    """The replay stores the reward of the step before."""
    late = getattr(self, "late_reward", np.zeros_like(entry["reward"]))
    self.late_reward = entry["reward"]
    return original(self, entry | {"reward": late})


def action_at_the_end(original, self, entry):
    """The action of an episode's last step is stored though nothing was chosen."""
    action = entry["action"].copy()
    action[entry["is_last"], 0] = 1
    return original(self, entry | {"action": action})


def truncation_is_terminal(original, self, entry):
    """An episode that was cut off counts as ended by itself."""
    return original(self, entry | {"is_terminal": entry["is_last"]})


def window_too_short(original, self):
    """Start positions whose sequences run over the write pointer."""
    return original(self) + self.num_envs * (self.window - 1)


def latents_shifted(original, self, place, deter, stoch):
    """Latent states written one step early."""
    steps, envs = place
    self.data["deter"][steps[:, :-1], envs] = deter
    self.data["stoch"][steps[:, :-1], envs] = stoch


def latents_never_refreshed(original, self, place, deter, stoch):
    """Latent states stay as they were at acting time."""


def end_not_forced(original, self):
    """An abandoned episode has no end."""
    batch, place = original(self)
    return batch | {"is_last": self.data["is_last"][place]}, place


def newest_only(original, self):
    """No online queue: uniform draws only."""
    self.fresh.clear()
    return original(self)


def window_used_twice(original, self):
    """The online queue does not forget what it gave."""
    fresh = self.fresh.copy()
    batch = original(self)
    self.fresh.extendleft(reversed(fresh))
    return batch


def previous_action_not_shifted(original, self, batch):
    """The RSSM gets the action chosen at a step instead of the one before it."""
    return original(self, batch | {"action": batch["action"].roll(-1, 1)})


def without_unimix(original, logits, unimix):
    """The plain distribution."""
    return original(logits, 0.0)


MUTATIONS = {
    "two-hot in symlog space": (function("twohot_loss", twohot_in_symlog_space), check_twohot_loss),
    "two-hot mean summed in order": (function("twohot_mean", plain_sum), check_twohot_mean),
    "KL without unimix": (function("mixed_log_probs", without_unimix), check_kl),
    "KL clipped for each variable": (function("categorical_kl", kl_per_variable), check_kl),
    "KL the other way round": (function("categorical_kl", lambda f, p, q: f(q, p)), check_kl),
    "relaxed sample": (function("sample_one_hot", gumbel), check_straight_through),
    "no straight-through": (function("sample_one_hot", detached_sample), check_straight_through),
    "no reset": (method("RSSM", "observe", no_reset), check_observe),
    "reset to class 0": (method("RSSM", "observe", action_survives), check_observe),
    "no gradient through time": (
        method("RSSM", "observe", no_gradient_through_time),
        check_observe_gradient,
    ),
    "no update bias": (function("imagine", no_update_bias), check_cell),
    "max-pool without ties": (method("PoolConv", "forward", max_pool), check_resizing),
    "vectors without symlog": (function("symlog", lambda f, x: x), check_encoder),
    "reward shifted": (function("lambda_return", reward_shifted), check_actor_critic),
    "value not shifted": (function("lambda_return", value_not_shifted), check_actor_critic),
    "discount twice": (function("lambda_return", discount_twice), check_actor_critic),
    "returns over cuts": (function("lambda_return", last_ignored), check_replay_critic),
    "cut counts as end": (function("lambda_return", last_cuts_value), check_replay_critic),
    "entropy outside the weight": (
        function("actor_critic_loss", entropy_outside),
        check_actor_critic,
    ),
    "weight without the start": (
        function("actor_critic_loss", weight_without_start),
        check_actor_critic,
    ),
    "slow critic as target": (
        function("actor_critic_loss", slow_critic_as_target),
        check_actor_critic,
    ),
    "no limit on the return range": (
        function("actor_critic_loss", returns_not_limited),
        check_actor_critic,
    ),
    "gradient in imagination": (function("imagine", gradient_in_imagination), check_wiring),
    "replay critic detached": (
        function("replay_critic_loss", detached_replay_critic),
        check_wiring,
    ),
    "no gradient clipping": (method("LaProp", "__init__", without_clipping), check_optimizer),
    "Adam": (method("LaProp", "step", adam), check_optimizer),
    "act keeps the old action": (method("RSSM", "observe", no_reset), check_act_equals_observe),
    "sequences over the write pointer": (
        method("Replay", "__len__", window_too_short),
        check_uniform,
    ),
    "no online queue": (method("Replay", "sample", newest_only), check_online_queue),
    "windows used twice": (method("Replay", "sample", window_used_twice), check_online_queue),
    "end not forced": (method("Replay", "sample", end_not_forced), check_forced_last),
    "reward stored late": (method("Replay", "add", stored_late), check_alignment),
    "action at the end": (method("Replay", "add", action_at_the_end), check_alignment),
    "truncation is terminal": (method("Replay", "add", truncation_is_terminal), check_alignment),
    "latents shifted": (method("Replay", "write_latents", latents_shifted), check_alignment),
    "latents never refreshed": (
        method("Replay", "write_latents", latents_never_refreshed),
        check_alignment,
    ),
    "previous action not shifted": (
        method("Agent", "train_step", previous_action_not_shifted),
        check_alignment,
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation(name, tmp_path, monkeypatch):
    """Group H: the check that guards against a mistake fails when it is made."""
    plant, check = MUTATIONS[name]
    run = functools.partial(check, tmp_path) if check is check_alignment else in_float64(check)
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        run()


# ---- I. Speed: what is captured, what is measured ------------------------------------------------


def make_train_batch(spaces, args, batch=2, length=4):
    """A random batch as `Agent.train_step` takes it."""
    steps = make_batch(spaces, args, batch, length + 1)
    names = ("reward", "is_first", "is_last", "is_terminal")
    context = dict(deter=steps["deter"].half(), stoch=steps["stoch"].argmax(-1).to(torch.uint8))
    flat = {name: steps[name] for name in names} | steps["obs"] | context
    return flat | {"action": steps["prev_action"]}


class Ops(TorchDispatchMode):
    """Notes the name of every operation."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


WAITING = {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select"}


def check_no_waiting(spaces=MIXED):
    """Neither an update nor an action reads a value of the device on the host."""
    agent = make_agent(spaces)
    batch = make_train_batch(spaces, agent.args)
    obs = {key: batch[key][:, 0] for key in ("image", "vector", "is_first") if key in batch}
    with Ops() as ops:
        agent.train_step(batch)
        agent.act(obs, agent.initial(2))
    assert len(ops.names) > 50
    assert not ops.names & WAITING


@pytest.mark.parametrize("spaces", [MIXED, CONTINUOUS], ids=["mixed", "continuous"])
def test_no_host_synchronisation(spaces):
    """Group I: what a CUDA graph captures must not wait for the host."""
    check_no_waiting(spaces)


def fake_graph(patch, agent, function):
    """A CudaGraph with stand-ins for torch.cuda: recording changes nothing, replaying computes.

    Also returns the list of calls of the function itself: (inputs, outputs).
    """
    calls = []

    def spy(*inputs):
        outputs = function(*inputs)
        calls.append((inputs, outputs))
        return outputs

    class Graph:
        def replay(self):
            inputs, outputs = self.recorded
            new = function(*inputs)
            for old, x in zip(tree_leaves(outputs), tree_leaves(new), strict=True):
                old.copy_(x)

    @contextlib.contextmanager
    def record(graph, stream):
        state, random = copy.deepcopy(agent.state_dict()), torch.get_rng_state()
        yield
        agent.load_state_dict(state)
        torch.set_rng_state(random)
        graph.recorded = calls[-1]

    stream = lambda: SimpleNamespace(wait_stream=lambda other: None)
    patch.setattr(torch.cuda, "Stream", stream)
    patch.setattr(torch.cuda, "current_stream", stream)
    patch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    patch.setattr(torch.cuda, "CUDAGraph", Graph)
    patch.setattr(torch.cuda, "graph", record)
    return dreamer_v3.CudaGraph(spy), calls


def test_graph_of_an_update(monkeypatch):
    """Group I: warm-up, recording and replays are the same updates as without a graph."""
    plain, graphed = make_agent(VECTOR), make_agent(VECTOR)
    graphed.load_state_dict(plain.state_dict())
    graphed.train_step, calls = fake_graph(monkeypatch, graphed, graphed.train_step)
    for i in range(7):
        torch.manual_seed(i)
        batch = make_train_batch(VECTOR, plain.args)
        results = []
        for agent in (plain, graphed):
            torch.manual_seed(100 + i)
            results.append(agent.train_step({key: x.clone() for key, x in batch.items()}))
        for a, b in zip(*map(tree_leaves, results), strict=True):
            assert torch.equal(a, b)
    assert len(calls) == 4, "three calls to warm up, one to record"
    for (name, p), q in zip(
        plain.model.state_dict().items(), graphed.model.state_dict().values(), strict=True
    ):
        assert torch.equal(p, q), name


def test_graphs_of_actions(monkeypatch):
    """Group I: one graph for each number of environments and mode; results stay what they were."""
    agent = make_agent(VECTOR)
    act, calls = fake_graph(monkeypatch, agent, agent.act)
    batch = make_batch(VECTOR, agent.args, batch=4)
    for greedy, n in ((True, 2), (True, 4), (False, 2)):
        steps = batch["obs"] | {"is_first": batch["is_first"]}
        obs, carry = {key: x[:n, 0] for key, x in steps.items()}, agent.initial(n)
        for i in range(6):
            torch.manual_seed(i)
            expected = agent.act(obs, carry, greedy)
            torch.manual_seed(i)
            before = [x.clone() for x in carry]
            carry, old = act(obs, carry, greedy), carry
            assert all(torch.equal(a, b) for a, b in zip(carry, expected, strict=True))
            assert all(torch.equal(a, b) for a, b in zip(before, old, strict=True))
    assert len(act.graphs) == 3 and len(calls) == 12


def test_benchmark(tmp_path, monkeypatch, capsys):
    """Group I: the last line is the JSON object; the arithmetic grows with the batch."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dreamer_v3, "BENCHMARK_SECONDS", 0.1)
    results = {}
    for size in (2, 4):
        args = tiny(benchmark=True, env_id="CartPole-v1", batch_size=size, dtype="float32")
        results[size] = dreamer_v3.main(args)
        assert json.loads(capsys.readouterr().out.splitlines()[-1]) == results[size]
    result = results[2]
    assert result["update_ms_min"] <= result["update_ms"] <= result["update_ms_max"]
    agent = make_agent(Spaces(0, (("obs", 4, ()),), (2,), 2))
    assert result["params"] == sum(p.numel() for p in agent.model.parameters() if p.requires_grad)
    assert results[4]["flops_per_update"] == 2 * result["flops_per_update"] > 1e6
    for name in ("act_ms", "env_steps_per_s", "peak_share", "peak_memory_mb", "warmup_s"):
        assert result[name] > 0, name
    assert (result["device"], result["dtype"], result["size"]) == ("cpu", "float32", "1m")
    assert not list(tmp_path.iterdir())


# ---- J. Runs that survive ------------------------------------------------------------------------

slow = pytest.mark.skipif(not os.environ.get("SLOW"), reason="takes long: set SLOW=1")


def read_metrics(folder):
    """The lines of a run's metrics."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


CONTINUE = """
import sys
from pathlib import Path
import torch
import dreamer_v3, test_dreamer_v3

torch.set_num_threads(1)
folder, updates = Path(sys.argv[1]), int(sys.argv[2])
checkpoint = dreamer_v3.load_checkpoint(folder / "checkpoint.pt")
args = checkpoint["args"]
path = folder / "replay.bin"
trainer = dreamer_v3.Trainer(args, *dreamer_v3.choose_device(args), path, checkpoint)
for _ in range(updates):
    trainer.train()
dreamer_v3.save_checkpoint(folder / "checkpoint.pt", trainer)
"""


@pytest.mark.parametrize("buffer_size", [1000, 36])
def test_resume_is_exact(buffer_size, tmp_path):
    """Group J: N + M updates are N updates, a new process, and M updates, bit for bit."""
    args = tiny(env_id="TestCounting-v0", num_envs=3, buffer_size=buffer_size, dtype="float32")
    device, dtype = torch.device("cpu"), torch.float32
    (tmp_path / "a").mkdir()
    trainer = dreamer_v3.Trainer(args, device, dtype, tmp_path / "a" / "replay.bin")
    for _ in range(30):
        trainer.collect_and_train()
    assert trainer.updates > 5
    dreamer_v3.save_checkpoint(tmp_path / "a" / "checkpoint.pt", trainer)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for _ in range(4):
        trainer.train()
    dreamer_v3.save_checkpoint(tmp_path / "a" / "checkpoint.pt", trainer)
    command = [sys.executable, "-c", CONTINUE, str(tmp_path / "b"), "4"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, second = (dreamer_v3.load_checkpoint(tmp_path / x / "checkpoint.pt") for x in "ab")
    assert first.keys() == second.keys() >= {"agent", "random", "replay", "credit", "updates"}
    for a, b in zip(tree_leaves(first), tree_leaves(second), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    replays = [(tmp_path / x / "replay.bin").read_bytes() for x in "ab"]
    assert replays[0] == replays[1]


def test_resume_continues(tmp_path):
    """Group J: a run in two parts has one set of metrics and the updates of its steps."""
    common = dict(env_id="TestCounting-v0", run_dir=str(tmp_path), log_every=10, save_every=20)
    dreamer_v3.main(tiny(**common, total_timesteps=70))
    (folder,) = tmp_path.iterdir()
    first = dreamer_v3.load_checkpoint(folder / "checkpoint.pt")
    with open(folder / "metrics.jsonl", "a") as file:  # what a killed run may leave
        file.write('{"step": 75, "charts/updates": 99}\n{"step": 8')
    before = read_metrics_until(folder, 70)
    dreamer_v3.main(replace(first["args"], resume=str(folder), total_timesteps=150))
    last = dreamer_v3.load_checkpoint(folder / "checkpoint.pt")
    assert (first["step"], last["step"]) == (70, 150)
    assert last["updates"] - first["updates"] == 80 * 2 / 8  # train_ratio / (B T) for each step
    lines = read_metrics(folder)
    assert lines[: len(before)] == before
    logged = [line["step"] for line in lines if "charts/updates" in line]
    assert logged == list(range(logged[0], 151, 10)) and logged[0] <= 20
    assert [x["step"] for x in lines] == sorted(x["step"] for x in lines)


def read_metrics_until(folder, step):
    """The lines of a run's metrics up to a step; later ones may be broken."""
    lines = []
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        with contextlib.suppress(ValueError):
            lines.append(json.loads(line))
    return [line for line in lines if line["step"] <= step]


@pytest.mark.parametrize("kept, lost", [(3, 4), (14, 6), (30, 9), (30, 11), (30, 40)])
def test_steps_after_the_checkpoint_are_dropped(kept, lost, tmp_path):
    """Group J: what later steps overwrote in the ring is not read, before and after new steps."""
    path = tmp_path / "replay.bin"
    replay = fill(make_replay(11, 2, path), kept)
    state = json.loads(json.dumps(replay.state_dict()))
    fill(replay, lost)
    resumed = make_replay(11, 2, path)
    resumed.load_state_dict(state)
    oldest = min(max(0, kept + lost - 11), kept)
    for step in range(kept, kept + 15):
        assert len(resumed) == 2 * max(0, min(step - oldest, 11) - 3)
        if len(resumed):
            starts = {start for _ in range(20) for _, start in draw(resumed)}
            assert min(starts) >= max(oldest, step - 11)
        fill(resumed, 1)
        if step == kept + 5:  # a second resume, in the middle of what was overwritten
            state, resumed = resumed.state_dict(), make_replay(11, 2, path)
            resumed.load_state_dict(state)
    assert len(resumed) == 2 * 8


def test_replay_must_be_whole(tmp_path):
    """Group J: a missing and a short file of the replay are named."""
    path = tmp_path / "replay.bin"
    replay = fill(make_replay(11, 2, path), 9)
    for damage in (lambda path: os.truncate(path, 3), os.remove):
        damage(path)
        with pytest.raises(UserError, match="replay.bin is missing or too short"):
            make_replay(11, 2, path).load_state_dict(replay.state_dict())


def test_replay_in_memory(tmp_path):
    """Group J: with --no-save-replay a resumed run fills its replay anew."""
    settings = dict(env_id="TestCounting-v0", run_dir=str(tmp_path), save_replay=False)
    dreamer_v3.main(tiny(**settings))
    (folder,) = tmp_path.iterdir()
    files = {"args.json", "checkpoint.pt", "dreams", "metrics.jsonl"}
    assert {x.name for x in folder.iterdir()} == files
    args = replace(tiny(**settings), resume=str(folder), total_timesteps=80)
    dreamer_v3.main(args)
    assert dreamer_v3.load_checkpoint(folder / "checkpoint.pt")["step"] == 80


def test_resume_refuses_changes(tmp_path):
    """Group J: what a run is made of stays; each refusal names the flag."""
    args = tiny(env_id="TestCounting-v0", run_dir=str(tmp_path))
    dreamer_v3.main(args)
    (folder,) = tmp_path.iterdir()
    args = replace(args, resume=str(folder))
    with pytest.raises(UserError, match="complete"):
        dreamer_v3.main(args)
    args.total_timesteps = 60
    for name, value in dict(
        size="12m", env_id="CartPole-v1", num_envs=2, batch_size=3, buffer_size=500, gamma=0.9,
        seed=2, deter=64, train_ratio=1.0, save_replay=False,
    ).items():  # fmt: skip
        with pytest.raises(UserError, match=f"--{name.replace('_', '-')} "):
            dreamer_v3.main(replace(args, **{name: value}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Counting, "action_space", gs.Discrete(4))
        with pytest.raises(UserError, match="spaces"):
            dreamer_v3.main(args)
    dreamer_v3.main(args)


class Faulty(gym.Env):
    """Does one thing wrong at its 20th step."""

    observation_space = gs.Dict({"a": gs.Box(-9, 9, (2,), np.float32), "b": gs.Discrete(3)})
    action_space = gs.Discrete(2)

    def __init__(self, fault):
        self.fault, self.t = fault, 0

    def reset(self, *, seed=None, options=None):
        return self.observe(), {}

    def observe(self):
        return {"a": np.zeros(2, np.float32), "b": 0}

    def step(self, action):
        self.t += 1
        obs, reward = self.observe(), 0.0
        if self.t == 20:
            match self.fault:
                case "raises":
                    raise RuntimeError("the simulator broke\nin two lines")
                case "nan":
                    obs["a"][1] = np.nan
                case "infinite reward":
                    reward = np.inf
                case "shape":
                    obs["a"] = np.zeros(3, np.float32)
                case "dtype":
                    obs["b"] = 0.5
                case "range":
                    obs["b"] = 3
                case "reward array":
                    reward = np.zeros(2)
                case "no end":
                    return obs, reward, None, False, {}
                case "exits":
                    sys.exit(3)
                case "missing":
                    del obs["a"]
        return obs, reward, self.fault == "ends at once", self.t % 5 == 0, {}


gym.register("TestFaulty-v0", entry_point=Faulty)
FAULTS = {
    "raises": "RuntimeError: the simulator broke",
    "nan": "obs/a is not finite",
    "infinite reward": "the reward is not finite",
    "shape": r"obs/a has shape \(3,\), its space \(2,\)",
    "dtype": "obs/b is float64, its space int64",
    "range": r"obs/b is 3, not in Discrete\(3\)",
    "reward array": "reward ",
    "no end": "ends None",
    "exits": "SystemExit: 3",
    "missing": "KeyError: 'a'",
}


@pytest.mark.parametrize("async_envs", [False, True])
@pytest.mark.parametrize("fault", FAULTS)
def test_environment_faults(fault, async_envs, tmp_path):
    """Group J: one line says which environment, what and when; the run can be resumed."""
    kwargs = json.dumps({"fault": fault})
    args = tiny(env_id="TestFaulty-v0", env_kwargs=kwargs, run_dir=str(tmp_path), num_envs=2)
    # A step that resets does not count for the environment: 20 of its own, 4 resets, the first.
    with pytest.raises(UserError, match=rf"environment [01],( its)? step 2\d: .*{FAULTS[fault]}"):
        dreamer_v3.main(replace(args, async_envs=async_envs, total_timesteps=100))
    (folder,) = tmp_path.iterdir()
    assert 40 < dreamer_v3.load_checkpoint(folder / "checkpoint.pt")["step"] < 60
    with pytest.raises(UserError, match="environment"):
        resumed = replace(args, async_envs=async_envs, total_timesteps=200, resume=str(folder))
        dreamer_v3.main(resumed)
    assert 80 < dreamer_v3.load_checkpoint(folder / "checkpoint.pt")["step"] < 120


def test_episodes_of_one_step(tmp_path):
    """Group J: an environment that ends at its first step trains and is evaluated."""
    kwargs = json.dumps({"fault": "ends at once"})
    args = tiny(env_id="TestFaulty-v0", env_kwargs=kwargs, run_dir=str(tmp_path), eval_episodes=3)
    assert len(dreamer_v3.main(args)) == 3


class Endless(Counting):
    """Never ends an episode."""

    def step(self, action):
        self.t += 1
        return self.observe(action), 1.0, False, False, {}


gym.register("TestEndless-v0", entry_point=Endless)


def test_episodes_without_end(tmp_path, monkeypatch, capsys):
    """Group J: training says so once, an evaluation counts what it has seen."""
    monkeypatch.setattr(dreamer_v3, "LONGEST_EPISODE", 15)
    args = tiny(env_id="TestEndless-v0", run_dir=str(tmp_path), eval_episodes=10)
    assert list(dreamer_v3.main(args)) == [15] * 10
    assert capsys.readouterr().out.count("no end of an episode in 15 steps") == 1


def test_non_finite_updates(tmp_path, monkeypatch):
    """Group J: the loss that failed first is named, and the last good checkpoint stays."""
    original, calls = dreamer_v3.categorical_kl, []

    def broken(*args):
        calls.append(0)
        return original(*args) * (math.nan if len(calls) == 12 else 1)  # two calls an update

    monkeypatch.setattr(dreamer_v3, "categorical_kl", broken)
    args = tiny(env_id="TestCounting-v0", run_dir=str(tmp_path), save_every=10)
    with pytest.raises(
        UserError, match="update 6 was not finite: losses/rep, losses/total, losses/grad_norm$"
    ):
        dreamer_v3.main(args)
    (folder,) = tmp_path.iterdir()
    state = dreamer_v3.load_checkpoint(folder / "checkpoint.pt")
    assert 2 <= state["updates"] <= 5
    floats = [
        x for x in tree_leaves(state) if isinstance(x, torch.Tensor) and x.is_floating_point()
    ]
    assert len(floats) > 50 and all(x.isfinite().all() for x in floats)
    assert not list(folder.glob("*.tmp"))
    dreamer_v3.main(replace(args, resume=str(folder)))  # calls go on counting: no failure now


class Wide(gym.Env):
    """Large observations: the replay grows fast."""

    observation_space = gs.Box(-1, 1, (2000,), np.float32)
    action_space = gs.Discrete(2)

    def reset(self, *, seed=None, options=None):
        return np.zeros(2000, np.float32), {}

    def step(self, action):
        return np.zeros(2000, np.float32), 0.0, False, False, {}


gym.register("TestWide-v0", entry_point=Wide)


def start(*arguments, limit=None):
    """Start dreamer_v3.py with this file's environments; files may not be larger than `limit`."""
    code = "import test_dreamer_v3, dreamer_v3; dreamer_v3.cli()"
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    env["PYTHONPATH"] = str(Path(__file__).parent)
    full = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], env=env, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, preexec_fn=full if limit else None,
    )  # fmt: skip


def test_files_that_cannot_grow(tmp_path):
    """Group J: when the replay or a checkpoint does not fit, one line says so; both stay whole."""
    settings = tiny(
        env_id="TestWide-v0",
        run_dir=str(tmp_path),
        total_timesteps=3000,
        buffer_size=5000,
        train_ratio=0.1,
    )
    process = start(*flags(settings), limit=12 * 2**20)  # 1,024 steps take 8 MB
    out, err = process.communicate()
    assert process.returncode == 2 and len(err.strip().splitlines()) == 1, err
    assert "cannot grow the replay" in err
    (folder,) = tmp_path.iterdir()
    step = dreamer_v3.load_checkpoint(folder / "checkpoint.pt")["step"]
    assert step == 1024
    # Even less room: the next checkpoint does not fit, and the old one stays.
    before = (folder / "checkpoint.pt").read_bytes()
    process = start("--resume", str(folder), "--save-every", "1", limit=len(before) // 2)
    out, err = process.communicate()
    assert process.returncode == 2 and len(err.strip().splitlines()) == 1, err
    assert "cannot" in err
    assert (folder / "checkpoint.pt").read_bytes() == before
    assert not list(folder.glob("checkpoint.tmp"))
    process = start("--resume", str(folder), "--total-timesteps", "1100")
    out, err = process.communicate()
    assert process.returncode == 0 and "resumed after step 1,024" in out, err


@slow
def test_full_disk(tmp_path):
    """Group J: the same on a file system that is really full. Needs the right to mount one."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=11m", "tmpfs", str(tmp_path)])
    if mounted.returncode:
        pytest.skip("cannot mount a small file system here")
    try:
        settings = tiny(env_id="TestWide-v0", run_dir=str(tmp_path), total_timesteps=3000)
        settings = replace(settings, buffer_size=5000)
        process = start(*flags(replace(settings, train_ratio=0.1, save_every=100)))
        out, err = process.communicate()
        assert process.returncode == 2 and len(err.strip().splitlines()) == 1, err
        assert "No space left" in err
        (folder,) = tmp_path.iterdir()
        assert dreamer_v3.load_checkpoint(folder / "checkpoint.pt")["step"] == 1024, "the end"
        filler = tmp_path / "filler"
        with contextlib.suppress(OSError), open(filler, "wb") as file:
            while True:
                file.write(bytes(4096))
        process = start("--resume", str(folder), "--save-every", "1")
        out, err = process.communicate()
        assert process.returncode == 2 and "No space left" in err, err
        filler.unlink()
        subprocess.run(["mount", "-o", "remount,size=40m", str(tmp_path)], check=True)
        process = start("--resume", str(folder), "--total-timesteps", "1100")
        out, err = process.communicate()
        assert process.returncode == 0, err
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def killed(arguments, seconds):
    """Start a run, kill it after some seconds; what it printed."""
    process = start(*arguments)
    time.sleep(seconds)
    process.kill()
    return process.communicate()


def kill_at_random_moments(tmp_path, kills):
    """Kill a run again and again; each time it must go on from its last checkpoint."""
    settings = tiny(env_id="CartPole-v1", run_dir=str(tmp_path), num_envs=2, total_timesteps=10**6)
    settings = replace(settings, save_every=10, log_every=10, buffer_size=300, train_ratio=0.5)
    arguments, step, random = flags(settings), 0, np.random.default_rng(0)
    while not list(tmp_path.glob("*/checkpoint.pt")):  # the first kills may come before the run
        out, err = killed(arguments, random.uniform(3, 6))
    (folder,) = (path.parent for path in tmp_path.glob("*/checkpoint.pt"))
    for kill in range(kills):
        out, err = killed(("--resume", str(folder)), random.uniform(2, 6))
        assert not err.strip(), err
        state = dreamer_v3.load_checkpoint(folder / "checkpoint.pt")
        assert state["step"] >= step
        step = state["step"]
        args = replace(state["args"], resume=str(folder))
        path = folder / "replay.bin"
        trainer = dreamer_v3.Trainer(args, torch.device("cpu"), torch.float32, path, state)
        if len(trainer.replay) > 0:
            batch, place = trainer.replay.sample()
            assert np.isfinite(batch["vector"]).all()
            assert (batch["is_first"][:, 1:] | (batch["action"][:, :-1].sum(-1) == 1)).all()
            assert np.isfinite(trainer.replay.read_latents(place)["deter"]).all()
        print(f"kill {kill + 1}: checkpoint of step {step}, {len(trainer.replay)} starts")
    lines = read_metrics_until(folder, step)
    logged = [line["step"] for line in lines if "charts/updates" in line]
    assert logged == list(range(logged[0], step + 1, 10)), "metrics without gaps or repetitions"
    assert step > 100
    return step


def test_kill(tmp_path):
    """Group J: kill -9 a few times."""
    kill_at_random_moments(tmp_path, 3)


@slow
def test_fifty_kills(tmp_path):
    """Group J: kill -9 at fifty random moments."""
    print(f"reached step {kill_at_random_moments(tmp_path, 50)}")


def test_signal_during_an_evaluation(tmp_path):
    """Group J: an evaluation that a signal cut short is made up for, also the last one."""
    settings = dict(env_id="TestCounting-v0", run_dir=str(tmp_path), eval_every=20, eval_episodes=9)
    args, stop = tiny(**settings), []
    with pytest.MonkeyPatch.context() as patch:
        evaluate = dreamer_v3.evaluate
        patch.setattr(
            dreamer_v3, "evaluate", lambda *a, stop: (stop.append(2), evaluate(*a, stop=stop))
        )
        dreamer_v3.main(args, stop)
    (folder,) = tmp_path.iterdir()
    assert dreamer_v3.load_checkpoint(folder / "checkpoint.pt")["step"] == 20
    args = replace(args, resume=str(folder))
    stops = iter(([], [2]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            dreamer_v3,
            "evaluate",
            lambda *a, stop: (stop.extend(next(stops)), evaluate(*a, stop=stop))[1],
        )
        dreamer_v3.main(args, [])
    assert dreamer_v3.load_checkpoint(folder / "checkpoint.pt")["step"] == 40
    assert len(dreamer_v3.main(args)) == 9
    evaluated = [x["step"] for x in read_metrics(folder) if "eval/episodic_return" in x]
    assert evaluated == [20, 40]
    with pytest.raises(UserError, match="complete"):
        dreamer_v3.main(args)


def test_one_process_for_a_run(tmp_path):
    """Group J: a run that goes on cannot be resumed, and does not notice the attempt."""
    settings = tiny(env_id="CartPole-v1", run_dir=str(tmp_path), total_timesteps=10**6)
    process = start(*flags(settings))
    path = wait_for_steps(tmp_path, process)
    out, err = start("--resume", str(path.parent)).communicate(timeout=60)
    assert err.startswith("dreamer_v3.py: error: ") and "in use by another process" in err
    process.terminate()
    process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
    steps = [line["step"] for line in read_metrics(path.parent)]
    assert steps == sorted(steps) and steps[-1] <= dreamer_v3.load_checkpoint(path)["step"]


def test_worker_that_dies(tmp_path):
    """Group J: a killed process of --async-envs is one line, and the run is saved."""
    settings = tiny(env_id="TestCounting-v0", run_dir=str(tmp_path), total_timesteps=10**6)
    process = start(*flags(replace(settings, async_envs=True, num_envs=2)))
    path = wait_for_steps(tmp_path, process)
    workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    for worker in workers.stdout.split():
        os.kill(int(worker), signal.SIGKILL)
    out, err = process.communicate()
    assert process.returncode == 2 and len(err.strip().splitlines()) == 1, err
    assert "the environments failed at step" in err
    assert dreamer_v3.load_checkpoint(path)["step"] > 0


def test_metrics_that_are_not_ours(tmp_path):
    """Group J: lines of metrics.jsonl that cannot be read do not keep a run from going on."""
    args = tiny(env_id="TestCounting-v0", run_dir=str(tmp_path))
    dreamer_v3.main(args)
    (folder,) = tmp_path.iterdir()
    before = read_metrics(folder)
    with open(folder / "metrics.jsonl", "ab") as file:
        file.write(b'\xff\xfe\n3\n{"a": 1}\n{"step": 1}\n')
    dreamer_v3.main(replace(args, resume=str(folder), total_timesteps=60))
    assert read_metrics(folder)[: len(before)] == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals(number, tmp_path):
    """Group J: the first signal saves and leaves, soon; the run goes on from there."""
    settings = tiny(
        env_id="CartPole-v1", run_dir=str(tmp_path), total_timesteps=10**6, save_every=10**6
    )
    process = start(*flags(settings))
    path = wait_for_steps(tmp_path, process)
    process.send_signal(number)
    begin = time.time()
    out, err = process.communicate()
    assert process.returncode == 128 + number and time.time() - begin < 5
    assert err.split() == "stopping after this step; once more, and it stops at once".split()
    step = dreamer_v3.load_checkpoint(path)["step"]
    assert step > 0 and f"saved {path} at step {step:,}" in out
    resumed = start("--resume", str(path.parent), "--total-timesteps", str(step + 10))
    out, err = resumed.communicate()
    assert resumed.returncode == 0 and f"resumed after step {step:,}" in out, err


def wait_for_steps(tmp_path, process):
    """The checkpoint's path, once a run in `tmp_path` has ended its first episodes."""
    while process.poll() is None:
        paths = [p for p in tmp_path.glob("*/metrics.jsonl") if p.stat().st_size]
        if paths:
            return paths[0].parent / "checkpoint.pt"
        time.sleep(0.1)
    raise AssertionError(process.communicate()[1])


class Stuck(Counting):
    """Takes very long over a step."""

    def step(self, action):
        if self.episode == 3:
            time.sleep(1000)
        self.t += 1
        return self.observe(action), 1.0, self.t % 10 == 0, False, {}


gym.register("TestStuck-v0", entry_point=Stuck)


def test_second_signal(tmp_path):
    """Group J: a second signal ends a run at once, whatever it is doing."""
    settings = tiny(env_id="TestStuck-v0", run_dir=str(tmp_path), total_timesteps=10**6)
    process = start(*flags(settings))
    wait_for_steps(tmp_path, process)
    time.sleep(2)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=5) == 128 + signal.SIGTERM
    process.communicate()


@slow
def test_memory(tmp_path):
    """Group J: the memory of a run of many episodes does not grow beyond the replay."""
    minutes = float(os.environ.get("MINUTES", 30))
    settings = tiny(env_id="CartPole-v1", run_dir=str(tmp_path), total_timesteps=10**9)
    settings = replace(settings, num_envs=4, buffer_size=10_000, train_ratio=0.5, save_every=2000)
    process, resident = start(*flags(settings)), []
    pipe = threading.Thread(target=process.communicate, daemon=True)  # or the pipe fills up
    pipe.start()
    begin = time.time()
    while time.time() - begin < 60 * minutes:
        time.sleep(min(10, 6 * minutes))
        status = Path(f"/proc/{process.pid}/status").read_text()
        resident.append(int(re.search(r"RssAnon:\s+(\d+)", status).group(1)) / 1024)
    process.terminate()
    pipe.join(timeout=20)
    (folder,) = tmp_path.iterdir()
    episodes = sum("charts/episodic_return" in line for line in read_metrics(folder))
    tenth = len(resident) // 10
    print(f"{episodes} episodes, MB at 10%, 50%, 100% of {minutes} minutes:")
    print(resident[tenth], resident[len(resident) // 2], resident[-1])
    assert episodes > 30 * minutes
    assert np.mean(resident[-tenth:]) < np.mean(resident[tenth : 2 * tenth]) * 1.02 + 2


# ---- K. Looking inside a run ---------------------------------------------------------------------


def foreseen(agent, steps, seen):
    """`open_loop` from one seed: name -> prediction."""
    torch.manual_seed(3)
    pairs, feat = dreamer_v3.open_loop(agent.model, steps, seen)
    assert feat.shape[:2] == steps["reward"].shape
    return {name: prediction for name, (_, prediction) in pairs.items()}


@in_float64
def check_open_loop():
    """Group K: what comes after the seen steps changes no prediction, the actions change it."""
    agent, seen, length = make_agent(MIXED), 3, 7
    for p in agent.model.parameters():  # heads that start at zero would hide everything
        p.data.add_(0.05 * torch.randn_like(p))
    steps = make_batch(MIXED, agent.args, 2, length)
    steps["is_first"][:] = False
    before = foreseen(agent, steps, seen)
    assert before.keys() == {name for name, _, _ in MIXED.vectors} | {"image", "reward"}
    other = make_batch(MIXED, agent.args, 2, length)
    unseen = {
        k: torch.cat([x[:, :seen], other["obs"][k][:, seen:]], 1) for k, x in steps["obs"].items()
    }
    after = foreseen(agent, steps | {"obs": unseen}, seen)
    assert all(torch.equal(before[name], x) for name, x in after.items())
    action = steps["prev_action"].clone()
    action[:, 4:] = action[:, 4:].roll(1, -1)  # leads to step 4
    after = foreseen(agent, steps | {"prev_action": action}, seen)
    for name, x in after.items():
        assert torch.equal(before[name][:, :4], x[:, :4])
        assert not torch.equal(before[name][:, 4:], x[:, 4:])
    # While it sees, and when it sees all: the reconstruction of the posterior.
    torch.manual_seed(3)
    agent.model.requires_grad_(False)
    embed = agent.model.encoder(steps["obs"])
    keys = ("prev_action", "is_first", "deter", "stoch")
    deter, stoch, _ = agent.model.rssm.observe(embed, *(steps[key] for key in keys))
    recon = agent.model.decoder(deter, stoch)
    close(before["image"][:, :seen], recon["image"][:, :seen])
    close(foreseen(agent, steps, length)["image"], recon["image"])
    # From the last seen state on: the prior, step by step.
    torch.manual_seed(3)
    agent.model.rssm.observe(embed, *(steps[key] for key in keys))
    state = deter[:, seen - 1], stoch[:, seen - 1]
    weights = agent.model.rssm.weights()
    for t in range(seen, length):
        state = agent.model.rssm.imagine_step(*state, steps["prev_action"][:, t], weights)
        feat = agent.model.rssm.feat(*state)
        reward = dreamer_v3.twohot_mean(agent.model.reward(feat), agent.model.bins)
        close(before["reward"][:, t], reward)


def test_open_loop():
    """Group K."""
    check_open_loop()


@in_float64
def test_truth_and_prediction():
    """Group K: both are in the observation's own units, and the loss is zero where they agree."""
    agent = make_agent(MIXED)
    steps = make_batch(MIXED, agent.args)
    recon, start = {}, 0
    for name, width, classes in MIXED.vectors:
        x = steps["obs"]["vector"][..., start : start + width]
        recon[name], start = 40 * x if classes else dreamer_v3.symlog(x), start + width
    recon["image"] = steps["obs"]["image"] / 255
    pairs = agent.model.decoder.truth_and_prediction(recon, steps["obs"])
    assert pairs.keys() == recon.keys() and len({len(c) > 0 for _, _, c in MIXED.vectors}) == 2
    for truth, prediction in pairs.values():
        close(prediction, truth, rtol=1e-12, atol=1e-12)
    losses = agent.model.decoder.losses(recon, steps["obs"])
    assert all(loss.abs().max() < 1e-12 for loss in losses.values())


@in_float64
def check_calibration():
    """Group K: explicit loops over windows of half the sequence, ends, and cut episodes."""
    agent = make_agent(VECTOR)
    for p in agent.model.critic.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    steps = make_batch(VECTOR, agent.args, 4, 9)
    for name in ("is_last", "is_terminal"):
        steps[name] &= torch.rand(4, 9) < 0.5
    steps["is_last"] |= steps["is_terminal"]
    feat = torch.randn(4, 9, agent.args.deter + agent.args.stoch * agent.args.classes)
    metrics = dreamer_v3.critic_calibration(agent.model, feat, steps, agent.args)
    values = dreamer_v3.twohot_mean(agent.model.critic(feat), agent.model.bins)
    pairs = []
    for b, t in itertools.product(range(4), range(5)):
        if steps["is_last"][b, t]:
            continue
        rewards, discount, after = 0.0, 1.0, 0.0
        for k in range(t + 1, t + 5):
            rewards += discount * steps["reward"][b, k].item()
            discount *= agent.args.gamma
            if steps["is_terminal"][b, k]:
                break
            after = discount * values[b, k].item()
            if steps["is_last"][b, k]:
                break
            after = after if k == t + 4 else 0.0
        pairs.append((values[b, t].item() - after, rewards))
    predicted, realised = np.array(pairs).T
    assert 5 < len(pairs) < 20 and steps["is_last"].any()
    expected = {
        "predicted": predicted.mean(),
        "realised": realised.mean(),
        "error": np.sqrt(((predicted - realised) ** 2).mean()),
        "correlation": np.corrcoef(predicted, realised)[0, 1],
    }
    for name, x in expected.items():
        close(metrics[f"report/critic_{name}"], x, rtol=1e-9, atol=1e-9)
    nothing = steps | {"is_last": torch.ones(4, 9, dtype=torch.bool)}
    assert dreamer_v3.critic_calibration(agent.model, feat, nothing, agent.args) == {}


def test_critic_calibration():
    """Group K."""
    check_calibration()


def read_png(data):
    """A PNG file of 8-bit RGB without filters -> (h, w, 3), by its specification."""
    assert data[:8] == bytes([137, 80, 78, 71, 13, 10, 26, 10])
    chunks, at = [], 8
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        kind, content = data[at + 4 : at + 8], data[at + 8 : at + 8 + size]
        assert int.from_bytes(data[at + 8 + size : at + 12 + size], "big") == zlib.crc32(
            kind + content
        )
        chunks.append((kind, content))
        at += 12 + size
    assert [kind for kind, _ in chunks] == [b"IHDR", b"IDAT", b"IEND"]
    header, pixels, _ = (content for _, content in chunks)
    width, height = int.from_bytes(header[:4], "big"), int.from_bytes(header[4:8], "big")
    assert header[8:] == bytes([8, 2, 0, 0, 0])
    rows = np.frombuffer(zlib.decompress(pixels), np.uint8).reshape(height, 1 + 3 * width)
    assert not rows[:, 0].any()
    return rows[:, 1:].reshape(height, width, 3)


def test_png():
    """Group K: a decoder written from the PNG specification reads what was written."""
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    assert np.array_equal(read_png(dreamer_v3.png(image)), image)


@pytest.mark.parametrize("channels", [1, 3, 4, 6])
def test_film(channels, tmp_path, monkeypatch):
    """Group K: truth, prediction and error stand where they should; the GIF has every step."""
    pillow, saved = types.ModuleType("PIL.Image"), []
    pillow.fromarray = lambda x: SimpleNamespace(
        x=x,
        save=lambda path, append_images, **_: saved.append(
            (path, [x, *[y.x for y in append_images]])
        ),
    )
    monkeypatch.setitem(sys.modules, "PIL", types.ModuleType("PIL"))
    monkeypatch.setitem(sys.modules, "PIL.Image", pillow)
    truth, prediction = np.random.default_rng(0).random((2, 3, 6, 64, 64, channels))
    files = dreamer_v3.film(truth, prediction, 2, tmp_path / "step_5.txt")
    assert [path.name for path in files] == ["step_5.png", "step_5.gif"]
    strip = read_png(files[0].read_bytes()).reshape(3, 3, 68, 6, 68, 3)
    ((path, stills),) = saved
    assert path == files[1] and len(stills) == 6
    shown = slice(-3, None) if channels % 3 == 0 else slice(-1, None)
    for b, t in itertools.product(range(3), range(6)):
        p, q = prediction[b, t, :, :, shown], truth[b, t, :, :, shown]
        still = stills[t].reshape(3, 68, 3, 68, 3)
        for row, x in enumerate((q, p, (p - q + 1) / 2)):
            for tile in (strip[b, row, :, t], still[row, :, b]):
                assert np.abs(tile[2:-2, 2:-2] - 255 * x).max() <= 0.51
                assert (tile[0, 0] == ((0, 160, 0) if t < 2 else (220, 40, 0))).all()
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    assert [path.suffix for path in dreamer_v3.film(truth, prediction, 2, path)] == [".png"]


def test_report_of_a_run(tmp_path, capsys):
    """Group K: a run's table is that of its arrays, without what nobody can foresee."""
    args = space_args("sensors", run_dir=str(tmp_path), eval_episodes=0, batch_size=6)
    args = replace(args, batch_length=10)
    dreamer_v3.main(replace(args, total_timesteps=90, report_every=80, buffer_size=500))
    (folder,) = tmp_path.iterdir()
    assert {path.stem for path in (folder / "dreams").iterdir()} == {"step_80", "step_90"}
    assert f"{folder / 'dreams/step_90'} (.txt, .png" in capsys.readouterr().out
    lines = read_metrics(folder)
    (report,) = (line for line in lines if line["step"] == 80 and "report/critic_error" in line)
    rows = (folder / "dreams/step_80.txt").read_text().split("\n\n")[0].splitlines()
    table = {row.split()[0]: row.split()[1:] for row in rows}
    assert table["key"] == ["constant", "1", "2", "4"]
    arrays = np.load(folder / "dreams/step_80.npz", allow_pickle=False)
    assert arrays["seen"] == 5 and arrays["unforeseeable"].shape == (args.batch_size, 5)
    assert arrays["unforeseeable"].any() and not arrays["unforeseeable"].all()
    for name in table.keys() - {"key", "obs/image", "image"}:
        truth, prediction = arrays[f"{name}/truth"], arrays[f"{name}/prediction"]
        errors, seen = [[], [], [], [], []], []
        for b, k in itertools.product(range(args.batch_size), range(5)):
            if not arrays["unforeseeable"][b, k]:
                errors[k].append(np.abs(truth - prediction)[b, 5 + k].mean())
                seen.append(truth[b, 5 + k])
        constant = np.abs(np.array(seen) - np.median(seen, 0)).mean()
        assert math.isclose(float(table[name][0]), constant, rel_tol=1e-3)
        close(report[f"report/constant_{name}"], constant, rtol=1e-5)
        shown = [float(x) for x in table[name][1:]]
        for x, k in zip(shown, (0, 1, 3), strict=True):
            assert (
                math.isnan(x)
                if not errors[k]
                else math.isclose(x, np.mean(errors[k]), rel_tol=1e-3)
            )
        close(report[f"report/error_{name}"], np.mean(sum(errors, [])), rtol=1e-5, atol=1e-5)
    assert len(table) == 7 and (folder / "dreams/step_80.png").stat().st_size > 1000


def test_report_changes_nothing(tmp_path):
    """Group K: a run that is looked into is the same run, bit for bit."""
    runs = []
    for every in (0, 10):
        args = tiny(env_id="TestCounting-v0", run_dir=str(tmp_path / str(every)), log_every=5)
        dreamer_v3.main(replace(args, report_every=every, total_timesteps=60, eval_episodes=0))
        (folder,) = (tmp_path / str(every)).iterdir()
        assert (folder / "dreams").exists() == bool(every)
        for path in folder.glob("dreams/*.npz"):  # the next episodes cannot be foreseen
            arrays = np.load(path, allow_pickle=False)
            episode, seen = arrays["obs/truth"][..., 1], arrays["seen"]
            next_one = episode[:, seen:] != episode[:, seen - 1, None]
            assert np.array_equal(next_one, arrays["unforeseeable"])
        lines = [line for line in read_metrics(folder) if "report/critic_error" not in line]
        runs.append([{k: v for k, v in x.items() if k not in MACHINE} for x in lines])
    assert runs[0] == runs[1] and any("losses/total" in line for line in runs[0])


def test_pictures_reach_the_loggers(tmp_path, monkeypatch):
    """Group K: TensorBoard gets the files' bytes, W&B the files."""
    proto = types.ModuleType("tensorboard.compat.proto.summary_pb2")
    proto.Summary = type("Summary", (SimpleNamespace,), {})
    proto.Summary.Image = proto.Summary.Value = dict
    for name in ("tensorboard", "tensorboard.compat", "tensorboard.compat.proto"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, proto.__name__, proto)
    logger, written, logged = dreamer_v3.Logger(tiny(), tmp_path), [], []
    if logger.tensorboard:
        logger.tensorboard.close()
    add = lambda summary, step: written.append((summary.value[0], step))
    logger.tensorboard = SimpleNamespace(
        file_writer=SimpleNamespace(add_summary=add), add_scalar=lambda *_: None, close=lambda: None
    )
    logger.wandb = SimpleNamespace(
        Image=lambda path: ("image", path),
        Video=lambda path: ("video", path),
        log=lambda values, step: logged.append((values, step)),
        finish=lambda: None,
    )
    files = [tmp_path / f"step_7.{kind}" for kind in ("txt", "png", "gif")]
    for path in files:
        path.write_bytes(path.suffix.encode())
    logger.report(7, {"report/error_x": 1.0, "report/y": math.nan, "report/z": -math.inf}, files)
    logger.close()
    assert [(x["tag"], x["image"]["encoded_image_string"], step) for x, step in written] == [
        ("dreams/png", b".png", 7),
        ("dreams/gif", b".gif", 7),
    ]
    assert logged == [
        ({"report/error_x": 1.0}, 7),
        ({"dreams/png": ("image", str(files[1]))}, 7),
        ({"dreams/gif": ("video", str(files[2]))}, 7),
    ]


@in_float64
def check_metrics():
    """Group K: the metrics that judge a run, from what they are defined by."""
    agent = make_agent(MIXED, free_nats=0.5, agc_clip=0.2)
    steps = make_batch(MIXED, agent.args)
    torch.manual_seed(1)
    total, _, _, _ = agent.loss(steps)
    total.backward()
    grads = {n: p.grad for n, p in agent.exact.named_parameters() if p.grad is not None}
    params = dict(agent.exact.named_parameters())
    limit = {n: 0.2 * max(1e-3, params[n].norm().item()) for n in grads}
    agent.exact.zero_grad()
    agent.model.return_range.zero_()
    torch.manual_seed(1)
    metrics, _, _ = agent.update(steps)
    modules = {name.split(".")[0] for name in grads}
    assert {k[10:] for k in metrics if k.startswith("grad_norm/")} == modules
    assert {"encoder", "rssm", "decoder", "reward", "cont", "actor", "critic"} == modules
    for module in modules:
        own = {n: g.norm().item() for n, g in grads.items() if n.split(".")[0] == module}
        close(metrics[f"grad_norm/{module}"], math.hypot(*own.values()), rtol=1e-6, atol=1e-6)
        clipped = np.mean([norm > limit[n] for n, norm in own.items()])
        close(metrics[f"grad_clipped/{module}"], clipped, rtol=1e-6, atol=1e-6)
    assert 0 < metrics["losses/grad_clipped"] < 1
    low, high = metrics["behaviour/return_low"], metrics["behaviour/return_high"]
    close(metrics["behaviour/return_scale"], max(1.0, high - low), rtol=1e-12, atol=1e-12)
    normed = (metrics["behaviour/return"] - low) / metrics["behaviour/return_scale"]
    close(metrics["behaviour/normed_return"], normed, rtol=1e-9, atol=1e-9)
    least, most = (metrics[f"behaviour/normed_return_{x}"] for x in ("min", "max"))
    assert least < metrics["behaviour/normed_return"] < most
    # KL and its floor: the clipped loss is at least both.
    kl, share = metrics["latents/kl"], metrics["latents/free_share"]
    floor = metrics["losses/dyn"]
    assert 0 <= share <= 1 and max(kl, 0.5) <= floor <= kl + 0.5 * share + 1e-12


def test_metrics():
    """Group K."""
    check_metrics()


@in_float64
def test_kl_metrics():
    """Group K: mean KL and the share of steps below the floor, step by step."""
    agent = make_agent(VECTOR)
    steps = make_batch(VECTOR, agent.args, 4, 6)
    torch.manual_seed(2)
    losses, _, _, metrics = dreamer_v3.world_model_loss(
        agent.model, steps, replace(agent.args, free_nats=0.0)
    )
    kl = losses["dyn"].detach()
    floor = kl.median().item() + 1e-9
    torch.manual_seed(2)
    _, _, _, above = dreamer_v3.world_model_loss(
        agent.model, steps, replace(agent.args, free_nats=floor)
    )
    close(metrics["latents/kl"], kl.mean(), rtol=1e-12, atol=1e-12)
    close(above["latents/kl"], kl.mean(), rtol=1e-12, atol=1e-12)
    assert metrics["latents/free_share"] == 0 and above["latents/free_share"] == 0.5


@in_float64
def test_entropy_shares():
    """Group K: 1 for a uniform policy or latent, 0 for a certain one."""
    flat, sure = torch.zeros(2, 7), torch.zeros(2, 7)
    sure[:, 1] = sure[:, 4] = 1000.0
    for logits, share in ((flat, 1.0), (sure, 0.0)):
        policy = dreamer_v3.Categoricals(logits, (3, 4), unimix=0)
        least, most = policy.entropy_limits()
        close((policy.entropy() - least) / (most - least), np.full(2, share), rtol=1e-9, atol=1e-9)
    for raw, share in ((1000.0, 1.0), (-1000.0, 0.0)):
        policy = dreamer_v3.BoundedNormals(torch.zeros(2, 3), torch.full((2, 3), raw))
        least, most = policy.entropy_limits()
        close((policy.entropy() - least) / (most - least), np.full(2, share), rtol=1e-9, atol=1e-9)


def test_usage():
    """Group K: filled share and size of the replay, from empty to a full ring; peak memory."""
    args = tiny(env_id="TestCounting-v0", num_envs=2, buffer_size=20, total_timesteps=100)
    trainer = dreamer_v3.Trainer(args, torch.device("cpu"), torch.float32)
    entry = 2 * (4 + 3 + 1) * 4 + 2 * 3 + 2 * 2 * 32 + 2 * 3  # vector, action, reward, flags, state
    for _ in range(13):
        usage = trainer.usage()
        rows = min(10, trainer.step // 2)
        assert usage["charts/replay_fill"] == rows / 10
        assert rows * entry <= usage["charts/replay_gb"] * 1e9 <= rows * (entry + 32)  # aligned
        assert usage["charts/updates"] == trainer.updates
        trainer.collect_and_train()
    with open("/proc/self/status") as file:
        peak = int(re.search(r"VmHWM:\s+(\d+)", file.read())[1]) * 1024 / 1e9
    assert math.isclose(usage["charts/memory_gb"], peak, rel_tol=0.1)
    trainer.envs.close()


def test_action_repeat(tmp_path):
    """Group K: rewards add up, the last observation counts, an end ends it; Atari is refused."""
    env = dreamer_v3.ActionRepeat(gym.make("TestCounting-v0"), 3)
    plain = gym.make("TestCounting-v0")
    for _ in range(2):
        env.reset(seed=0), plain.reset(seed=0)
        ended = False
        while not ended:
            rewards = []
            for _ in range(3):
                expected, reward, terminated, truncated, _ = plain.step(1)
                rewards.append(reward)
                if terminated or truncated:
                    break
            obs, total, *ends, _ = env.step(1)
            assert total == sum(rewards) and ends == [terminated, truncated]
            assert np.array_equal(obs, expected)
            ended = terminated or truncated
    args = tiny(env_id="CartPole-v1", action_repeat=2, num_envs=2)  # has a vector form of its own
    envs = dreamer_v3.Environments(args, 2, seed=1)
    assert isinstance(envs.envs, gym.vector.SyncVectorEnv)
    envs.reset()
    envs.send(np.eye(2, dtype=np.float32))
    assert (envs.receive()[1] == 2).all()
    envs.close()


# ---- P. Parity with the authors' code -----------------------------------------------------------
# The numbers at the end of this file come from github.com/danijar/dreamerv3 at commit e3f0224, run
# with JAX 0.4.33 on a CPU, float64 in place of float32. A formula fills in parameters and inputs; a
# sample is the most likely class, or the mean plus a constant; so nothing is random.

IMAGE, VECTORS = 3, (("extra", 5, ()), ("mode", 4, (4,)), ("position", 3, ()))
SPACES = {
    "B": Spaces(IMAGE, (), (5,), 5),
    "B1m": Spaces(IMAGE, (), (5,), 5),
    "C": Spaces(0, VECTORS, (), 2),
    "Cm": Spaces(0, VECTORS, (), 2),
    "D": Spaces(IMAGE, (("vector", 5, ()),), (5,), 5),
}
PARITY_SIZES = dict(
    deter=32, hidden=16, stoch=4, classes=4, blocks=4, depth=4, units=16, imag_horizon=5
)


@pytest.fixture
def most_likely(monkeypatch):
    """Samples of categoricals are the most likely class."""
    monkeypatch.setattr(dreamer_v3, "sample_class", lambda probs, uniform: probs.argmax(-1))


@pytest.fixture
def float64():
    """Run a test in float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(params=["float64", "float32"])
def precision(request):
    """Run a test in both precisions; the name of it."""
    torch.set_default_dtype(getattr(torch, request.param))
    yield request.param
    torch.set_default_dtype(torch.float32)


def set_normal_noise(monkeypatch, deviations):
    """Samples of two-dimensional normals lie this many deviations above and below the mean."""
    noise = lambda like: torch.tensor([deviations, -deviations]).expand_as(like)
    monkeypatch.setattr(dreamer_v3, "normal_noise", noise)


@functools.cache
def unit(name, n):
    """n float64 numbers of mean 0 and variance 1 that depend on nothing but the name."""
    mask, seed = 0xFFFFFFFF, zlib.crc32(name.encode()) ^ 0x1B873593
    x = (torch.arange(n) * 2654435761 + seed) & mask
    x = ((x ^ (x >> 16)) * 73244475) & mask
    x = ((x ^ (x >> 16)) * 73244475) & mask
    x = x ^ (x >> 16)
    return 3**0.5 * ((x.double() + 0.5) / 2**31 - 1)


def U(name, shape, amp=1.0):
    """`unit` in a shape, rounded to float32, in the default type."""
    x = (amp * unit(name, math.prod(shape))).float()
    return x.reshape(shape).to(torch.get_default_dtype())


def fill_parameter(name, shape):
    """The value of a parameter, by its name and shape in the authors' code."""
    v, (*_, parent, leaf) = unit(name, math.prod(shape)), name.split("/")
    if leaf == "kernel":
        fan_in = shape[0] if len(shape) == 2 else math.prod(shape[:-1])
        x = {"dyngru": 4, "logits": 2, "logit": 2}.get(parent, 1) * v / fan_in**0.5
    elif leaf == "scale":
        x = 1 + 0.1 * v
    elif re.match("(rew|val|slowval)/head", name):
        middle = 127 + {"rew": 4, "val": 8, "slowval": 10}[name.split("/")[0]]
        x = 0.05 * v - 1.2 * (torch.arange(255, dtype=torch.float64) - middle).abs() * 20 / 127
    else:
        x = 0.05 * v + (2.5 if name == "con/head/logit/bias" else 0)
    return x.float().reshape(shape).to(torch.get_default_dtype())


NETWORKS = ("con", "dec", "dyn", "enc", "pol", "rew", "val", "slowval")
MLPS = {
    "reward": "rew", "cont": "con", "critic": "val", "slow_critic": "slowval", "actor.mlp": "pol",
    "decoder.mlp": "dec",
}  # fmt: skip
MODULES = {
    "rssm.hidden_layer": "dyn/dynhid0",
    "rssm.hidden_norm": "dyn/dynhid0norm",
    "rssm.gru": "dyn/dyngru",
    "rssm.prior_net.2": "dyn/priorlogit",
    "rssm.posterior_out": "dyn/obslogit",
    "decoder.from_deter": "dec/sp0",
    "decoder.from_stoch.1": "dec/sp2",
    "decoder.norm": "dec/spnorm",
    "decoder.image_out": "dec/imgout",
    "reward.1": "rew/head/logits",
    "cont.1": "con/head/logit",
    "critic.3": "val/head/logits",
    "slow_critic.3": "slowval/head/logits",
    "actor.outs.logits": "pol/head/action/logits",
    "actor.outs.mean": "pol/head/action/mean",
    "actor.outs.std": "pol/head/action/stddev",
}
DENSE = {
    "rssm.deter_in": "dyn/dynin0",
    "rssm.stoch_in": "dyn/dynin1",
    "rssm.action_in": "dyn/dynin2",
    "rssm.prior_net.0": "dyn/prior0",
    "rssm.prior_net.1": "dyn/prior1",
    "rssm.posterior_in": "dyn/obs0",
    "decoder.from_stoch.0": "dec/sp1",
} | {f"encoder.mlp.{i}": f"enc/mlp{i}" for i in range(3)}


def official_modules(spaces):
    """Name of our module -> the authors' name of it."""
    names = dict(MODULES)
    for ours, theirs in DENSE.items():
        names |= {f"{ours}.0": theirs, f"{ours}.1": f"{theirs}norm"}
    for i in range(3):
        for ours, theirs in MLPS.items():
            names[f"{ours}.{i}.0"] = f"{theirs}/mlp/linear{i}"
            names[f"{ours}.{i}.1"] = f"{theirs}/mlp/norm{i}"
        names[f"decoder.convs.{i}"] = f"dec/conv{2 - i}"
        names[f"decoder.norms.{i}"] = f"dec/conv{2 - i}norm"
    for i in range(4):
        names |= {f"encoder.convs.{i}": f"enc/cnn{i}", f"encoder.norms.{i}": f"enc/cnn{i}norm"}
    for i, (key, _, classes) in enumerate(spaces.vectors):
        names[f"decoder.outs.{i}"] = f"dec/vec/{key}/{'logits' if classes else 'pred'}"
    return names


def official_params(model, spaces):
    """The authors' name of every parameter -> ours."""
    modules, params = official_modules(spaces), {}
    for name, p in model.named_parameters():
        path, leaf = name.rsplit(".", 1)
        params[modules[path] + "/" + leaf.replace("weight", "kernel")] = p
    return params


def official_layout(x):
    """Our layout -> theirs: (out, in) -> (in, out), OIHW -> HWIO; blocks are the same."""
    return x.mT if x.ndim == 2 else x.permute(2, 3, 1, 0) if x.ndim == 4 else x


def our_layout(x):
    """Their layout -> ours."""
    return x.mT if x.ndim == 2 else x.permute(3, 2, 0, 1) if x.ndim == 4 else x


@torch.no_grad()
def fill_params(params):
    """Fill parameters, given by the authors' names, in place: the optimizer shares their memory."""
    for name, p in params.items():
        p.copy_(our_layout(fill_parameter(name, official_layout(p).shape)))


def checksum(x):
    """[l2, dot] of a tensor in the authors' layout: the dot product tells permutations apart."""
    x = x.detach().double().flatten()
    return [x.norm().item(), (x @ unit("check", len(x))).item()]


def checksums(tensors):
    """Tensors by the authors' names -> for each network (enc, dyn, ...) its [l2, sum of dot]."""
    sums = {}
    for name, x in tensors.items():
        l2, dot = checksum(official_layout(x))
        a, b = sums.get(name.split("/")[0], (0.0, 0.0))
        sums[name.split("/")[0]] = [math.hypot(a, l2), b + dot]
    return {name: sums[name] for name in NETWORKS if name in sums}


def inputs(case, B=3, T=8):
    """Replay of a case: obs (B, T, ...), action (B, T, A), reward and the three flags (B, T)."""
    spaces = SPACES[case]
    b, t = torch.arange(B)[:, None], torch.arange(T)[None]
    obs = {}
    if spaces.channels:
        b_, t_, h, w, c = torch.meshgrid(*map(torch.arange, (B, T, 64, 64, 3)), indexing="ij")
        slope_h, slope_w = (3 * b_ + 5 * t_ + 2 * c) % 7 - 3, (5 * b_ + 3 * t_ + 4 * c) % 9 - 4
        image = 37 * b_ + 53 * t_ + 91 * c + slope_h * h + slope_w * w + (h * w) // (8 + t_)
        obs["image"] = (image % 256).to(torch.uint8)
    amp = torch.tensor([0.01, 1, 50, 1000, 5], dtype=torch.float64)
    vectors = []
    for key, n, classes in spaces.vectors:
        if classes:
            vectors.append(one_hot((5 * b + t * t + 2 * t) % 4, 4))
        else:
            x = unit(f"data/{key}", B * T * n).reshape(B, T, n) * amp[torch.arange(n) % 5]
            vectors.append(x.float().to(torch.get_default_dtype()))
    if vectors:
        obs["vector"] = torch.cat(vectors, -1)
    if spaces.action_classes:
        action = one_hot((3 * b + 2 * t + b * t) % 5, 5)
    else:
        action = U("data/action", (B, T, 2), 0.8)
    reward = U("data/reward", (B, T)).clone()
    reward[0, 2], reward[1 % B, 1], reward[B - 1, T - 2] = 100, 0, -3
    is_first, is_last, is_terminal = torch.zeros(3, B, T, dtype=torch.bool)
    is_first[0, [0, 4]] = is_last[0, 3] = is_terminal[0, 3] = True
    is_first[1, 3] = is_last[1, 2] = True
    if B > 2:
        is_first[2, 0] = is_last[2, -1] = True
    flags = dict(is_first=is_first, is_last=is_last, is_terminal=is_terminal)
    return dict(obs=obs, action=action, reward=reward, **flags)


def one_hot(index, classes):
    """Integers as vectors of the default type."""
    return torch.nn.functional.one_hot(index, classes).to(torch.get_default_dtype())


def initial_carry(case, run, model):
    """deter, stoch, action before the first step. Run `zero` has action class 0, not zeros."""
    B = 2 if case == "B1m" else 3
    discrete = bool(SPACES[case].action_classes)
    deter, stoch = model.rssm.initial(B)
    if run == "zero":
        action = torch.zeros(B, 2)
        return deter, stoch, one_hot(torch.zeros(B, dtype=int), 5) if discrete else action
    b, s = torch.arange(B), torch.arange(stoch.shape[1])
    deter = U("carry/deter", tuple(deter.shape), 0.5)
    stoch = one_hot((2 * b[:, None] + s) % stoch.shape[2], stoch.shape[2])
    action = one_hot((2 * b + 1) % 5, 5) if discrete else U("carry/action", (B, 2), 0.8)
    return deter, stoch, action


def make_args(case, **options):
    """The authors' configuration of a case. Their actor mixes in no uniform distribution."""
    net = dict(size="1m") if case == "B1m" else PARITY_SIZES
    return Args(**net, actor_unimix=0.0, compile=False, **options)


def official_agent(case, run="zero", **options):
    """A filled agent; its return range is that of the run."""
    agent = Agent(make_args(case, **options), SPACES[case])
    fill_params(official_params(agent.model, SPACES[case]))
    if run == "carry":
        agent.model.return_range.copy_(torch.tensor([-0.4, 1.9]))
    return agent


def official_batch(case, run, model):
    """The batch of a case as `Agent.update` takes it."""
    batch = inputs(case, *((2, 6) if case == "B1m" else (3, 8)))
    deter, stoch, action = initial_carry(case, run, model)
    actions = batch.pop("action")
    batch["prev_action"] = torch.cat([action[:, None], actions[:, :-1]], 1)
    return batch | dict(deter=deter, stoch=stoch)


def agrees(ours, theirs, tol, size=None):
    """Assert |ours - theirs| <= tol * size; numbers, or two nests of the same shape."""
    ours = torch.as_tensor(ours, dtype=torch.float64)
    theirs = torch.as_tensor(theirs, dtype=torch.float64)
    size = theirs.abs() if size is None else torch.as_tensor(size)
    error = (ours - theirs).abs()
    assert (error <= tol * size).all(), f"{ours} is not {theirs}: error {error / size}"


def close_sums(ours, theirs, tol, dot_tol=None):
    """Assert that [l2, dot] agree, both relative to l2. `ours` may be a dict of such pairs by
    network; `theirs` has the numbers of all pairs in one list."""
    ours = ours if isinstance(ours, dict) else {"": ours}
    assert len(theirs) == 2 * len(ours)
    for (name, pair), l2, dot in zip(ours.items(), theirs[::2], theirs[1::2], strict=True):
        assert abs(pair[0] - l2) <= tol * l2, (name, "l2", pair[0], l2)
        assert abs(pair[1] - dot) <= (dot_tol or 5 * tol) * l2, (name, "dot", pair[1], dot, l2)


def authors_rate(update, rate, warmup):
    """Learning rate of the authors' update 0, 1, ...: XLA's float32 schedule, even in float64."""
    if not warmup:
        return rate
    rate, update = np.float32(rate), np.float32(min(update, warmup))
    rest = np.float32(1) - update * (np.float32(1) / np.float32(warmup))
    return float(np.float32(float(rate) - float(rate) * float(rest)))  # fused: rounded once


def step_as_authors(step, optimizer, update, rate, warmup):
    """Call `step` with the learning rate set so that the schedule gives exactly the authors'."""
    if update and warmup:
        rate = authors_rate(update, rate, warmup) * warmup / min(update, warmup)
    optimizer.args.learning_rate = rate
    return step()


def test_formula():
    """The formula gives the published numbers."""
    expected = [0.6268253394467873, -0.03501556584833538, -1.480133039747141, 1.2768453350351474]
    agrees(unit("dyn/dynin0/kernel", 4), expected, 1e-15)
    expected = {
        ("dyn/dynin0/kernel", (32, 16)): [0.11080811, -0.00618994, -0.26165304],
        ("dyn/dyngru/kernel", (4, 8, 24)): [-1.19410574, -1.17998433, -0.84653038],
        ("dyn/obs0norm/scale", (16,)): [1.00762713, 1.03103745, 1.15729856],
    }
    for (name, shape), numbers in expected.items():
        agrees(fill_parameter(name, shape).flatten()[:3], numbers, 1e-7, 1)  # 8 decimals are given


@pytest.mark.parametrize("case", ["B", "B1m", "C", "D"])
def test_parameters_are_the_authors(case, float64):
    """Every parameter is one of theirs, with its shape and, once filled, its checksum."""
    model = official_agent(case).model
    params = official_params(model, SPACES[case])
    assert len(params) == len(list(model.parameters()))
    shapes = {name: list(official_layout(p).shape) for name, p in params.items()}
    listing = "\n".join(f"{name} {shape}" for name, shape in sorted(shapes.items()))
    count, crc, sums = PARAMS[case]
    assert sum(p.numel() for p in params.values() if p.requires_grad) == count
    assert zlib.crc32(listing.encode()) == crc, listing
    close_sums(checksums(params), sums, 1e-12)


RUNS = [(case, run) for case in SPACES for run in ("zero", "carry")]
# In float64 both sides round at 1e-16; 1e-9 leaves room for cancellation and other libraries.
# In float32 the authors' own code differs from its float64 version by up to 7e-6 (gradients).
TOLERANCE = {"float64": 1e-9, "float32": 1e-5}
METRICS = [  # the order of PARITY[case][run]["metrics"]
    "behaviour/return", "behaviour/value", "behaviour/slow_value", "behaviour/reward",
    "behaviour/cont", "behaviour/advantage", "behaviour/policy_entropy",
    "latents/posterior_entropy", "latents/prior_entropy",
]  # fmt: skip
LOSSES = {"reward": "rew", "cont": "con", "actor": "policy", "critic": "value"}


def in_nats(metrics, model):
    """Metrics with the authors' entropies: ours are shares of their ranges."""
    policy = model.actor(torch.zeros(model.actor.mlp[0][0].in_features))
    stoch, classes = model.rssm.stoch_shape
    limits = {"behaviour/policy_entropy": policy.entropy_limits()}
    limits |= dict.fromkeys(
        ("latents/posterior_entropy", "latents/prior_entropy"), (0.0, stoch * math.log(classes))
    )
    nats = {name: least + metrics[name] * (most - least) for name, (least, most) in limits.items()}
    return metrics | nats


@pytest.mark.parametrize("case, run", RUNS)
def test_losses_and_gradients(case, run, precision, most_likely, monkeypatch):
    """Each loss, the metrics, the return range and each network's gradient are the authors'."""
    set_normal_noise(monkeypatch, 0.0 if case == "Cm" else -0.5)
    agent, tol, golden = official_agent(case, run), TOLERANCE[precision], PARITY[case][run]
    batch = official_batch(case, run, agent.model)
    total, metrics, _, _ = agent.loss(batch)
    total.backward()
    losses = {k[7:]: x.item() for k, x in metrics.items() if re.match("losses/(?!total)", k)}
    losses = {LOSSES.get(name, name): x for name, x in losses.items()}
    assert losses.keys() == golden["loss"].keys()
    for name, x in golden["loss"].items():
        agrees(losses[name], x, tol)
    metrics = in_nats(metrics, agent.model)
    for name, x in zip(METRICS, golden["metrics"], strict=True):
        agrees(metrics[name].item(), x, tol)
    agrees(total.item(), golden["total"][0], tol)
    agrees(agent.model.return_range, golden["range"], tol)
    params = official_params(agent.model, SPACES[case])
    assert all((p.grad is None) == (name[:4] == "slow") for name, p in params.items())
    grads = {name: p.grad for name, p in params.items() if p.grad is not None}
    close_sums(checksums(grads), golden["grad"], tol)
    agrees(math.hypot(*[x.norm().item() for x in grads.values()]), golden["grad_norm"][0], tol)
    if case == "Cm":  # at the mean the gradient of the mean is exactly zero
        assert all(x.abs().max() < 1e-6 for name, x in grads.items() if "action/mean" in name)


@pytest.mark.parametrize("warmup", [0, 1000])
@pytest.mark.parametrize("case, run", [x for x in RUNS if x[0] != "Cm"])
def test_three_updates(case, run, warmup, precision, most_likely, monkeypatch):
    """Losses and gradient norms of three updates, and what they leave behind, are the authors'."""
    set_normal_noise(monkeypatch, -0.5)
    agent = official_agent(case, run, warmup_updates=warmup)
    golden = PARITY[case][run]
    after, double = golden[f"warmup{warmup}"], precision == "float64"
    batch, params = (
        official_batch(case, run, agent.model),
        official_params(agent.model, SPACES[case]),
    )
    before = {name: p.detach().clone() for name, p in params.items()}
    for i in range(3):
        update = lambda: agent.update(batch)
        metrics, _, _ = step_as_authors(update, agent.optimizer, i, 4e-5, warmup)
        # Updates are about +-lr whatever the size of a gradient: entries at the level of float32
        # rounding take another sign, so that later losses differ more than the first.
        tol = TOLERANCE[precision] * (1 if i == 0 or double else 3)
        agrees(metrics["losses/total"].item(), (golden["total"][:1] + after["total"])[i], tol)
        norm = (golden["grad_norm"][:1] + after["grad_norm"])[i]
        agrees(metrics["losses/grad_norm"].item(), norm, tol)
        if i == 0 and warmup:
            trained = [name for name in params if not name.startswith("slow")]
            assert all(torch.equal(params[name], before[name]) for name in trained)
    agrees(agent.model.return_range, after["range"], TOLERANCE[precision] * (1 if double else 5))
    sums = checksums(params)
    if double:  # three updates change a network by 1e-4 of its norm, with warm-up by 1e-7 of it
        close_sums(sums, after["params"], 1e-13, 1e-12)
    elif not warmup:  # (the updates of a warm-up are lost in float32's rounding of the parameters)
        l2, dot = zip(*sums.values(), strict=True)
        agrees(l2, after["params"][::2], 1e-6)
        agrees(dot, after["params"][1::2], 1, 3e-4)  # two entries of another sign: 2 * 2 lr * 1.7


@pytest.mark.parametrize("case", ["B", "B1m", "C", "D"])
def test_acting(case, float64, most_likely, monkeypatch):
    """Five decisions for two environments, the second reset again at the fourth one."""
    set_normal_noise(monkeypatch, 0.0)
    agent, replay = official_agent(case), inputs(case, 2, 6)
    carry = agent.initial(2)
    for t, (deter, stoch, action) in enumerate(ACTING[case]):
        obs = {key: x[:, t] for key, x in replay["obs"].items()}
        carry = agent.act(obs | {"is_first": torch.tensor([t == 0, t in (0, 3)])}, carry)
        close_sums(checksum(carry[0]), deter, 1e-11)
        assert "".join(map(str, carry[1].argmax(-1).flatten().tolist())) == stoch
        if isinstance(action, str):
            assert "".join(map(str, carry[2].argmax(-1).tolist())) == action
        else:
            close_sums(checksum(carry[2]), action, 1e-11)


def test_replay_context(float64, most_likely, monkeypatch):
    """`train_step` starts from the first step's stored state and action; that step is no target."""
    set_normal_noise(monkeypatch, -0.5)
    agent, batch = official_agent("C", "carry", warmup_updates=0), inputs("C")
    b, t, s = torch.meshgrid(*map(torch.arange, (3, 8, 4)), indexing="ij")
    batch |= batch.pop("obs")
    batch["deter"] = U("data/dyn/deter", (3, 8, 32), 0.5).clone()
    batch["stoch"] = ((b + 3 * t + s) % 4).to(torch.uint8)
    # Row 1 goes on from the batch before, as theirs can: its carry takes the stored state's place.
    deter, stoch, _ = initial_carry("C", "carry", agent.model)
    batch["deter"][1, 0], batch["stoch"][1, 0] = deter[1], stoch[1].argmax(-1)
    batch["deter"], batch["stoch"] = batch["deter"][:, 0], batch["stoch"][:, 0]
    metrics, deter, stoch = agent.train_step(batch)
    metrics = in_nats(metrics, agent.model)
    for name, x in CONTEXT["metrics"].items():
        agrees(metrics[name].item(), x, 1e-9)
    assert deter.dtype == torch.float16 and stoch.dtype == torch.uint8
    # Half precision rounds by at most 2^-12 in (-1, 1), 672 entries at random: |error| < 2^-12 l2.
    close_sums(checksum(deter), CONTEXT["deter"], 2.0**-12, 1e-3)
    close_sums(checksum(one_hot(stoch.long(), 4)), CONTEXT["stoch"], 1e-12)


def gradients(y, *inputs):
    """Gradients of sum(y * w), w a fixed weight, for the inputs."""
    return torch.autograd.grad((y * U("check", tuple(y.shape))).sum(), inputs)


def test_symlog(float64):
    """symlog, symexp and the bins."""
    x = torch.tensor([-1e9, -1.0, -0.5, 0.0, 0.5, 10.0, 1000.0])
    expected = [math.copysign(math.log1p(abs(v)), v) for v in x.tolist()]
    agrees(dreamer_v3.symlog(x), expected, 1e-14)
    agrees(dreamer_v3.symexp(dreamer_v3.symlog(x)), x, 1e-12)
    bins = dreamer_v3.twohot_bins()
    agrees(bins[[63, 126, 127, 128, 253, 254]], PARITY_PARTS["bins"], 1e-13)
    assert torch.equal(bins, -bins.flip(0))


def test_twohot(float64):
    """Prediction, loss and its gradient, at targets inside, on and beyond the bins."""
    slope = 1.5 * (torch.arange(255.0) - 130).abs() * 20 / 127
    logits = (unit("A/twohot/logits", 9 * 255).reshape(9, 255) - slope).float().double()
    logits[1] = 0
    bins, golden = dreamer_v3.twohot_bins(), PARITY_PARTS["twohot"]
    logits.requires_grad_()
    agrees(dreamer_v3.twohot_mean(logits, bins), golden["mean"], 1e-9)
    loss = dreamer_v3.twohot_loss(logits, torch.tensor(golden["target"]), bins)
    agrees(loss, golden["loss"], 1e-12)
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    for row, expected in zip(grad, golden["grad"], strict=True):
        close_sums(checksum(row), expected, 1e-11)


def test_categorical(float64, most_likely):
    """Mixing with the uniform, entropy, KL with free bits, and the straight-through gradient."""
    a, b = (U(f"A/cat/{name}", (3, 2, 4)).clone() for name in "ab")
    a[0, 0] = torch.tensor([30.0, 0, 0, -30])
    golden, w = PARITY_PARTS["categorical"], U("A/cat/w", (3, 2, 4))
    event = torch.tensor([[0, 1], [2, 3], [1, 0]])
    policy = dreamer_v3.Categoricals(a.flatten(1), (4, 4), 0.01)
    action = one_hot(event, 4).flatten(1)
    agrees(policy.log_prob(action), golden["log_prob"], 1e-12)
    agrees(policy.entropy(), golden["entropy"], 1e-12)
    plain = dreamer_v3.Categoricals(a.flatten(1), (4, 4), 0.0).log_prob(action)
    agrees(plain, golden["log_prob_plain"], 1e-12)
    a.requires_grad_(), b.requires_grad_()
    log_a, log_b = (dreamer_v3.mixed_log_probs(x, 0.01) for x in (a, b))
    kl = dreamer_v3.categorical_kl(log_a, log_b)
    agrees(kl, golden["kl"], 1e-12)
    grads = torch.autograd.grad(kl.clamp(min=1).sum(), (a, b), retain_graph=True)
    for grad, expected in zip(grads, golden["grad_kl"], strict=True):
        close_sums(checksum(grad), expected, 1e-11)
    sample = dreamer_v3.sample_one_hot(log_a.exp(), torch.zeros(3, 2))
    assert "".join(map(str, sample.argmax(-1).flatten().tolist())) == golden["sample"]
    (grad,) = torch.autograd.grad((sample * w).sum(), a)
    close_sums(checksum(grad), golden["grad_sample"], 1e-11)


def test_normal(float64):
    """The continuous policy: range of mean and deviation, log-probability, entropy."""
    x, event = U("A/normal/x", (4, 8), 2.0), U("A/normal/event", (4, 2), 0.8)
    raw = []
    for name in ("mean", "stddev"):
        path = f"A_normal/action/{name}"
        raw.append(
            x @ fill_parameter(f"{path}/kernel", (8, 2)) + fill_parameter(f"{path}/bias", (2,))
        )
    policy, golden = dreamer_v3.BoundedNormals(*raw), PARITY_PARTS["normal"]
    for name, ours in (("mean", policy.mean), ("std", policy.std)):
        close_sums(checksum(ours), golden[name], 1e-12)
    agrees(policy.log_prob(event), golden["log_prob"], 1e-11)
    agrees(policy.entropy(), golden["entropy"], 1e-11)


def test_lambda_return(float64):
    """Returns of replay (ends, truncations, bootstrap) and of imagination (soft ends)."""
    shape = 3, 8
    reward = U("A/lam/rew", shape)
    value, boot = U("A/lam/val", shape, 3.0), U("A/lam/boot", shape, 3.0)
    last, terminal = torch.zeros(2, 3, 8)
    last[[0, 1, 2], [3, 2, 7]] = terminal[0, 3] = 1
    cont = (1 - terminal) * (1 - 1 / 333)
    returns = dreamer_v3.lambda_return(reward, boot, cont, last, 0.95)
    close_sums(checksum(returns), PARITY_PARTS["lambda_return"]["replay"], 1e-12)
    soft = torch.sigmoid(2 + unit("A/lam/con", 24)).float().double().reshape(shape)
    returns = dreamer_v3.lambda_return(reward, value, soft, torch.zeros(shape), 0.95)
    close_sums(checksum(returns), PARITY_PARTS["lambda_return"]["imagined"], 1e-12)


LAYERS = {  # our layer, the authors' name, shapes of kernel and input, name of the input
    "linear": (lambda: dreamer_v3.Linear(8, 6), "A_lin", (8, 6), (3, 8)),
    "blocklinear": (lambda: dreamer_v3.BlockLinear(8, 12, 4), "A_blk", (4, 2, 3), (3, 8)),
    "conv5same": (lambda: dreamer_v3.Conv(3, 4), "A_conv", (5, 5, 3, 4), (2, 8, 8, 3)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layer(name, float64):
    """Output and gradients of a layer."""
    make, path, kernel, shape = LAYERS[name]
    layer, x = make(), U(f"A/{name}/x", shape).requires_grad_()
    assert official_layout(layer.weight).shape == kernel
    fill_params({f"{path}/kernel": layer.weight, f"{path}/bias": layer.bias})
    y = layer(x)
    grads = gradients(y, x, layer.weight, layer.bias)
    grads = [grads[0], official_layout(grads[1]), grads[2]]
    for ours, theirs in zip([y, *grads], PARITY_PARTS[name], strict=True):
        close_sums(checksum(ours), theirs, 1e-12)


def test_rmsnorm(float64):
    """RMSNorm; ours goes on with a SiLU."""
    norm = dreamer_v3.RMSNorm(8)
    fill_params({"A_rms/scale": norm.scale})
    y = norm(U("A/rmsnorm/x", (3, 8), 2.0))[0, :4]
    agrees(y, torch.nn.functional.silu(torch.tensor(PARITY_PARTS["rmsnorm"])), 1e-12)


def test_pooling_shares_gradients_among_ties(float64):
    """Mirror images have mirrored gradients, also where all four pixels of a window are equal."""
    encoder = dreamer_v3.Encoder(Spaces(1, (), (5,), 5), 1, 4)
    for i, conv in enumerate(encoder.convs):  # only the centre counts: equal pixels stay equal
        centre = conv.weight[:, :, 2:3, 2:3].detach().clone()
        conv.weight.data.zero_()[:, :, 2:3, 2:3] = centre
        conv.bias.data.copy_(U(f"bias{i}", tuple(conv.bias.shape)))
    half = torch.randint(0, 256, (1, 1, 32, 16, 1)).to(torch.uint8)
    image = torch.cat([half, half.flip(3)], 3).repeat_interleave(2, 2).repeat_interleave(2, 3)
    encoder({"image": image}).square().sum().backward()
    grad = encoder.convs[0].weight.grad
    agrees(grad, grad.flip(3), 1e-6, grad.abs().mean().item())


@pytest.mark.parametrize("kind, width", [("disc", 5), ("cont", 2)])
def test_rssm(kind, width, float64, most_likely):
    """One step of the sequence model with its gradients, the prior, and one filtering step."""
    rssm, golden = dreamer_v3.RSSM(width, 24, 32, 16, 4, 4, 4, 0.01), PARITY_PARTS[f"core_{kind}"]
    params = official_params(torch.nn.ModuleDict({"rssm": rssm}), SPACES["C"])
    fill_params(params)
    deter = U("A/core/deter", (3, 32), 0.5).requires_grad_()
    stoch = U("A/core/stoch", (3, 4, 4), 0.5).requires_grad_()
    action = U("A/core/action", (3, width), 1.5).requires_grad_()
    embed, never = U("A/core/tokens", (3, 1, 24)), torch.zeros(3, 1, dtype=torch.bool)
    new = rssm.observe(embed, action[:, None], never, deter, stoch)[0][:, 0]
    close_sums(checksum(new), golden["deter"], 1e-12)
    core = {name: p for name, p in params.items() if name.startswith("dyn/dyn")}
    grads = gradients(new, deter, stoch, action, *core.values())
    for name, ours in zip(("grad_deter", "grad_stoch", "grad_action"), grads[:3], strict=True):
        close_sums(checksum(ours), golden[name], 1e-11)
    close_sums(checksums(dict(zip(core, grads[3:], strict=True))), golden["grads"], 1e-11)
    close_sums(checksum(rssm.prior(deter)), golden["prior"], 1e-12)

    discrete, continuous = one_hot(torch.tensor([0, 3, 4]), 5), U("A/core/prevact", (3, 2), 1.5)
    action = discrete if kind == "disc" else continuous
    second = torch.tensor([[False], [True], [False]])
    states = rssm.observe(embed, action[:, None], second, deter, stoch)
    for ours, theirs in zip(states, golden["observe"], strict=True):
        close_sums(checksum(ours), theirs, 1e-12)


def test_behaviour_losses(float64):
    """Actor and critic losses and the return range on given network outputs."""
    H, N, golden = 5, 4, PARITY_PARTS["imag_loss"]
    bins = dreamer_v3.twohot_bins()
    slope = lambda m: -1.5 * (torch.arange(255.0) - 127 - m).abs() * 20 / 127
    shaped = lambda name, m: (unit(name, N * 6 * 255).reshape(N, 6, 255) + slope(m)).float()
    value = shaped("A/imag/val", 8).double().requires_grad_()
    slow = shaped("A/imag/slow", 10).double()
    policy = U("A/imag/pol", (N, 6, 5)).requires_grad_()
    reward = U("A/imag/rew", (N, 6))
    cont = torch.sigmoid(2 + unit("A/imag/con", N * 6)).float().double().reshape(N, 6)
    # Two bins, 0 and the one at +-23830, predict any reward between.
    far = torch.where(reward > 0, 191, 63)
    share = (reward / bins[far]).unsqueeze(-1)
    reward_logits = torch.full((N, 6, 255), -torch.inf)
    reward_logits[..., 127:128] = (1 - share).log()
    reward_logits.scatter_(-1, far.unsqueeze(-1), share.log())
    model = types.SimpleNamespace(
        bins=bins, return_range=torch.tensor([-0.4, 1.9]), critic=lambda feat: value,
        slow_critic=lambda feat: slow, reward=lambda feat: reward_logits,
        cont=lambda feat: torch.logit(cont).unsqueeze(-1),
        actor=lambda feat: dreamer_v3.Categoricals(policy[:, :H], (5,), 0.0),
    )  # fmt: skip
    index = 3 * (torch.arange(N)[:, None] + torch.arange(6)) % 5
    feat, action = torch.zeros(N, 6, 1), one_hot(index, 5)
    losses, returns, _ = dreamer_v3.actor_critic_loss(model, feat, action, Args())
    for name, ours in (("returns", returns), *losses.items()):
        close_sums(checksum(ours), golden[name], 1e-9)  # rewards of 1 from bins of 2e4
    agrees(model.return_range, golden["range"], 1e-9)
    for name, x in (("actor", policy), ("critic", value)):
        (grad,) = torch.autograd.grad(losses[name].sum(), x)
        close_sums(checksum(grad), golden[f"grad_{name}"], 1e-9)


@pytest.mark.parametrize("warmup", [0, 3])
def test_optimizer(warmup, float64):
    """Five updates, gradients of very different sizes; one tensor is tiny, one has none."""
    amps = {"p0": ((4, 5), 1.0), "p1": ((7,), 1e-5), "p2": ((3,), 0.5)}
    params = [torch.nn.Parameter(U(f"A/opt/{k}", *spec).clone()) for k, spec in amps.items()]
    args = Args(learning_rate=1e-2, warmup_updates=warmup)
    optimizer = dreamer_v3.LaProp(["net"] * len(params), params, params, args)
    for i, amp in enumerate([1.0, 0.01, 30.0, 0.3, 1e-6]):
        for k, p in enumerate(params):
            p.grad = torch.zeros_like(p)
            if k < 2:
                p.grad = U(f"A/opt/g{k}/{i}", tuple(p.shape), amp)
        step_as_authors(optimizer.step, optimizer, i, 1e-2, warmup)
    for p, expected in zip(params, PARITY_PARTS[f"optimizer{warmup}"], strict=True):
        close_sums(checksum(p), expected, 1e-12)


def test_warmup_rates():
    """The authors' float32 learning rates, which `step_as_authors` follows."""
    expected = {1: 3.9999484613417735e-08, 2: 7.999896922683547e-08, 3: 1.20000834158418e-07}
    for update, rate in ({0: 0.0} | expected).items():
        agrees(authors_rate(update, 4e-5, 1000), rate, 1e-15)


@pytest.mark.parametrize("size", dreamer_v3.SIZES)
def test_parameter_counts(size):
    """Trainable parameters of every size, counted without memory for them."""
    spaces = Spaces(3, (), (9,), 9), Spaces(0, (("observation", 4, ()),), (2,), 2)
    for space, expected in zip(spaces, COUNTS[size], strict=True):
        with torch.device("meta"):
            model = Dreamer(Args(size=size), space)
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected


# Numbers of the authors' code at commit e3f0224, in float64. [l2, dot] is the norm of a tensor and
# its product with unit('check'); of all tensors of a network, one pair in the order of NETWORKS.
# fmt: off
PARAMS = {
    "B": (
        61703, 4244723276,
        [
            6.59260824835829, 1.95565571992094, 21.0041928167735, 14.4833333714522, 25.537307573993,
            -26.8653769676633, 10.2645722275977, -2.96950511626921, 10.9387137530946,
            2.89488719420849, 224.780100983172, 147.787862381527, 225.867092470413,
            134.668970631373, 226.643530053942, 192.480198952102,
        ],
    ),
    "B1m": (
        686327, 2302887812,
        [
            11.8297890640571, -1.44791821114045, 25.3459066911644, 5.14424452756603,
            68.5293338041796, 66.0749363341701, 10.2645722275977, -2.96950511626921,
            20.306281201837, 21.6431470056991, 225.012210622951, 156.178656436895, 226.499808953361,
            160.49749215352, 227.261888374181, 148.546484348394,
        ],
    ),
    "C": (
        21279, 186292535,
        [
            6.59260824835829, 1.95565571992094, 11.0454199817008, -3.56924330194052,
            25.5697163569285, -29.778410315289, 9.95658748923675, 2.74221641862504,
            10.0757049207385, -5.07486951227084, 224.780100983172, 147.787862381527,
            225.867092470413, 134.668970631373, 226.643530053942, 192.480198952102,
        ],
    ),
    "D": (
        64108, 2844994624,
        [
            6.59260824835829, 1.95565571992094, 23.3236683497452, 10.0978928757165,
            25.5367476534692, -24.6131430501401, 14.3372202214628, 7.14379543417656,
            10.9387137530946, 2.89488719420849, 224.780100983172, 147.787862381527,
            225.867092470413, 134.668970631373, 226.643530053942, 192.480198952102,
        ],
    ),
}
PARITY = {
    "B": {
        "zero": {
            "loss": {
                "con": 0.189255652972, "dyn": 1.12695023831, "image": 1278.58160449,
                "policy": 7.20896244585, "rep": 1.12695023831, "repval": 9.47313796551,
                "rew": 3.93430653336, "value": 7.54474149547,
            },
            "metrics": [
                19.5129236652, 9.2510875003, 20.8163019555, 4.17413033648, 0.940763355834,
                10.2999038331, 1.34728162269, 4.95317811387, 4.96627553001,
            ],
            "total": [1301.54045726], "range": [0.125123110228, 0.269380230986],
            "grad": [
                0.688119865296, 0.632226090594, 2360.2579553, -3458.62460125, 265.679052147,
                316.127651441, 278.531914148, -7.05048449211, 13.9969839941, -23.3443314978,
                2.86559149473, 1.6202062606, 8.40648031308, -12.4986109688,
            ],
            "grad_norm": [2391.49707737],
            "warmup0": {
                "total": [1295.85418677, 1288.26662925],
                "grad_norm": [2315.89455896, 2231.58595126],
                "range": [0.365649991029, 0.798283660849],
                "params": [
                    6.59274053714936, 1.95861115799962, 21.0039528636186, 14.5094426732504,
                    25.5369436401811, -26.8628901561721, 10.2644310210916, -2.98532737031424,
                    10.9390181785412, 2.90167857488372, 224.781557745132, 147.775671059069,
                    225.868496387254, 134.66949849206, 226.332536242329, 189.080456092507,
                ],
            },
            "warmup1000": {
                "total": [1301.5331825, 1301.52317662], "grad_norm": [2391.50059605, 2391.42551595],
                "range": [0.371627857586, 0.800084889467],
                "params": [
                    6.59260836726114, 1.95565870752197, 21.0041925521753, 14.4833549185866,
                    25.5373072104113, -26.8653751984267, 10.2645720911417, -2.96952400249609,
                    10.9387140805476, 2.89489427944758, 224.780102449951, 147.787849300291,
                    225.867093875999, 134.668972952818, 226.332472790375, 189.080436294849,
                ],
            },
        },
        "carry": {
            "loss": {
                "con": 0.193230576972, "dyn": 1.0917941786, "image": 1278.66372828,
                "policy": 2.94869030025, "rep": 1.0917941786, "repval": 9.61014797286,
                "rew": 4.00855441507, "value": 7.53992927743,
            },
            "metrics": [
                19.6717896685, 9.24643505632, 20.7460771408, 4.31762193633, 0.937371124398,
                4.29713217575, 1.33465742247, 4.97640544821, 5.05928825207,
            ],
            "total": [1297.43815084], "range": [-0.27103923314, 2.16024727568],
            "grad": [
                0.692749282149, 0.64433594581, 2338.56872456, -3382.98074818, 252.638731842,
                280.621371421, 269.22100302, 4.86057466802, 5.39030311463, -10.1603994746,
                3.06671428888, 1.61528569882, 8.17487071218, -10.4028994125,
            ],
            "grad_norm": [2367.5547988],
            "warmup0": {
                "total": [1289.58662428, 1285.27624236],
                "grad_norm": [2293.34106204, 2237.42769383],
                "range": [-0.0226074279563, 2.67134259306],
                "params": [
                    6.59281668374587, 1.95693725625073, 21.0039108120041, 14.5183269037661,
                    25.5370068062287, -26.8620529380401, 10.2644586636056, -2.98223660741271,
                    10.9390502116756, 2.90030801863204, 224.781529533503, 147.784098161634,
                    225.868487045415, 134.6737328412, 226.332536297639, 189.080631415661,
                ],
            },
            "warmup1000": {
                "total": [1297.27684114, 1297.13284799],
                "grad_norm": [2367.55735675, 2367.48411317],
                "range": [-0.0169737603554, 2.67296012509],
                "params": [
                    6.59260846001437, 1.95565710514552, 21.0041925325237, 14.4833664637597,
                    25.5373072713903, -26.865372696842, 10.2645721055076, -2.96952024720837,
                    10.9387140752468, 2.89489260814966, 224.78010241509, 147.787858400418,
                    225.867093865463, 134.668975659701, 226.332472790387, 189.080436371577,
                ],
            },
        },
    },
    "B1m": {
        "zero": {
            "loss": {
                "con": 0.431477055739, "dyn": 6.30448007328, "image": 1293.23903952,
                "policy": 8.77405083596, "rep": 6.30448007328, "repval": 8.11878768258,
                "rew": 4.23513354123, "value": 5.24496961878,
            },
            "metrics": [
                33.171434717, 11.1576071863, 14.6749817317, 4.33345190095, 0.945033850376,
                22.000367895, 1.2462991154, 41.1471882565, 40.2153972965,
            ],
            "total": [1321.29523496], "range": [0.154753431154, 0.47304691111],
            "grad": [
                6.04335896584, 4.02466819214, 2642.53462301, -5117.56441905, 379.935067645,
                -121.301782808, 258.512498866, 83.2332098812, 147.337324404, 134.972917872,
                9.70879965093, 0.132940217343, 15.3636916791, -29.6100347132,
            ],
            "grad_norm": [2686.30670525],
            "warmup0": {
                "total": [1301.18838645, 1284.14971813],
                "grad_norm": [2621.79165504, 2589.90838326],
                "range": [0.442145039516, 1.39972051348],
                "params": [
                    11.8297958258335, -1.45654943771283, 25.3456581167808, 5.2120073228803,
                    68.5293269402667, 66.0103267621746, 10.2645604097828, -2.97007710072442,
                    20.3061196287516, 21.6411954187242, 225.013827102755, 156.205507781348,
                    226.501357024152, 160.486251128763, 226.917340727978, 149.248991165004,
                ],
            },
            "warmup1000": {
                "total": [1321.30052763, 1321.29353621],
                "grad_norm": [2686.30648742, 2686.24198475],
                "range": [0.459634542274, 1.40500271991],
                "params": [
                    11.829789055447, -1.44793079401611, 25.3459063819071, 5.14430475650873,
                    68.5293337505288, 66.0748483881571, 10.2645722130515, -2.96950406718191,
                    20.3062810444464, 21.6431440755201, 225.01221222607, 156.178681152292,
                    226.499810487165, 160.497491737928, 226.917278961284, 149.249299202453,
                ],
            },
        },
        "carry": {
            "loss": {
                "con": 0.365321116314, "dyn": 6.46994480301, "image": 1267.03484143,
                "policy": 2.94566770885, "rep": 6.46994480301, "repval": 8.05439619835,
                "rew": 4.42569788697, "value": 5.41254925632,
            },
            "metrics": [
                31.3619135747, 11.0782838623, 14.9236343467, 4.19075595357, 0.942168036845,
                7.8846180216, 1.1773656288, 41.0988226429, 40.3740052796,
            ],
            "total": [1289.71733554], "range": [-0.241246568846, 2.33065097981],
            "grad": [
                4.65157727139, 2.60486924236, 2502.01898663, -4335.75507645, 336.864243275,
                -303.431977136, 229.461607958, 18.1562967325, 48.9331933572, 39.9557433153,
                10.248238399, 7.61900303194, 14.381374918, -30.9995414389,
            ],
            "grad_norm": [2535.53881893],
            "warmup0": {
                "total": [1265.86815993, 1251.95025021],
                "grad_norm": [2440.29752947, 2368.77896006],
                "range": [0.0588763359662, 3.16637290777],
                "params": [
                    11.8298349218374, -1.45720667628002, 25.345787364505, 5.17485192928345,
                    68.5292564387898, 66.0591799152633, 10.2645458643355, -2.95761453776509,
                    20.3062198139353, 21.6468116947321, 225.013791113074, 156.185580673146,
                    226.5013245793, 160.51076937614, 226.917340834769, 149.249912719268,
                ],
            },
            "warmup1000": {
                "total": [1289.44089418, 1289.20348075],
                "grad_norm": [2535.45402937, 2535.31737601],
                "range": [0.0715140391136, 3.17908501479],
                "params": [
                    11.8297890997458, -1.44792956519908, 25.3459065178033, 5.14427612537387,
                    68.5293336545187, 66.0749060807552, 10.2645722205778, -2.96949097512217,
                    20.306281094734, 21.6431442849413, 225.012212191528, 156.178666453271,
                    226.499810454104, 160.497514180656, 226.917278961273, 149.249299800167,
                ],
            },
        },
    },
    "C": {
        "zero": {
            "loss": {
                "con": 0.181278612503, "dyn": 1.01468286768, "extra": 57.3384144194,
                "mode": 2.3448440126, "policy": 14.1561910022, "position": 15.6774892756,
                "rep": 1.01468286768, "repval": 9.72224732019, "rew": 3.94125796335,
                "value": 8.77190237054,
            },
            "metrics": [
                16.9357357815, 8.47193033347, 17.9501732223, 3.16346748885, 0.975357252036,
                8.56037416076, 2.54070559043, 5.19634241868, 5.0048494305,
            ],
            "total": [106.444203007], "range": [0.115520879957, 0.226681027849],
            "grad": [
                0.221509002623, -0.113138737481, 58.94393103, 2.20973017831, 108.487526239,
                -9.90619464087, 6.07602117372, 3.44385536558, 15.7342460928, -23.8127053152,
                3.14408394524, 1.35260162677, 10.8741781354, -7.77899513157,
            ],
            "grad_norm": [125.126324042],
            "warmup0": {
                "total": [106.237171993, 105.383661699],
                "grad_norm": [126.661175362, 113.316773043],
                "range": [0.34286106123, 0.671880106076],
                "params": [
                    6.59274566755681, 1.95885231769142, 11.0451911995098, -3.57312820168312,
                    25.5696897004474, -29.7887689585715, 9.95690054461868, 2.74393940907943,
                    10.0756948976647, -5.07267727276521, 224.781595941158, 147.777193298273,
                    225.868602985145, 134.66827455805, 226.332537042135, 189.080417783716,
                ],
            },
            "warmup1000": {
                "total": [106.421599011, 106.403079053],
                "grad_norm": [125.071979403, 125.033439823],
                "range": [0.343108798515, 0.673265342145],
                "params": [
                    6.5926083828534, 1.95565902577119, 11.0454197160218, -3.56924719083899,
                    25.5697163090289, -29.7784195180924, 9.95658780571499, 2.74221712756286,
                    10.0757049155047, -5.0748680719087, 224.780102474339, 147.787851003895,
                    225.86709397793, 134.668969785791, 226.332472790801, 189.080436217166,
                ],
            },
        },
        "carry": {
            "loss": {
                "con": 0.179006739298, "dyn": 1.01468286768, "extra": 57.4828555741,
                "mode": 2.227459525, "policy": 6.18730193012, "position": 16.1762297181,
                "rep": 1.01468286768, "repval": 9.55184332798, "rew": 3.89879965942,
                "value": 8.73940176688,
            },
            "metrics": [
                17.5168246225, 8.6218185898, 17.9459677426, 3.37898831554, 0.974756805612,
                3.71259471653, 2.5443489732, 5.17570548828, 5.06126201099,
            ],
            "total": [98.8727590658], "range": [-0.280479120043, 2.13357850798],
            "grad": [
                0.209109680673, -0.107200489497, 55.5545772724, 6.28425441314, 78.1935577372,
                57.7894186439, 5.17928225207, -0.103609995952, 6.89689602518, -8.71122315983,
                2.90844074479, 1.15068830032, 10.4638272957, -6.06673559267,
            ],
            "grad_norm": [96.9171300805],
            "warmup0": {
                "total": [98.4200656967, 97.5171280842],
                "grad_norm": [98.8648613103, 102.663124905],
                "range": [-0.0454105812413, 2.59474907372],
                "params": [
                    6.59280037043501, 1.96107148575798, 11.0451629652479, -3.56998611801223,
                    25.5697141839602, -29.7946624035696, 9.95677690177683, 2.74395418054115,
                    10.0756843882005, -5.06911432915271, 224.78151723584, 147.781940013282,
                    225.868562452226, 134.666831509594, 226.332536712101, 189.080351067112,
                ],
            },
            "warmup1000": {
                "total": [98.5725620456, 98.3046863716],
                "grad_norm": [96.8476386261, 96.7986677666],
                "range": [-0.0450108247761, 2.59375186302],
                "params": [
                    6.59260844304335, 1.95566120646717, 11.0454196958207, -3.5692443246467,
                    25.5697163281349, -29.7784269352099, 9.95658768211607, 2.742217929689,
                    10.0757049038125, -5.0748643665607, 224.780102395481, 147.787856079273,
                    225.867093936651, 134.668967932913, 226.332472790587, 189.080436165074,
                ],
            },
        },
    },
    "Cm": {
        "zero": {
            "loss": {
                "con": 0.181278612503, "dyn": 1.01468286768, "extra": 57.3384144194,
                "mode": 2.3448440126, "policy": 12.318744431, "position": 15.6774892756,
                "rep": 1.01468286768, "repval": 9.84921733347, "rew": 3.94125796335,
                "value": 8.76603179936,
            },
            "metrics": [
                17.5333036333, 8.92813996828, 18.0548516736, 3.36829826478, 0.958070452882,
                8.7557883397, 2.527926876, 5.19634241868, 5.0048494305,
            ],
            "total": [104.638976868], "range": [0.1204824596, 0.224541960579],
            "grad": [
                0.221509002623, -0.113138737481, 58.94393103, 2.20973017831, 108.200303459,
                -5.6516465135, 6.10700106502, 3.44745253762, 6.37115178777, -2.26841554995,
                3.14408394524, 1.35260162677, 11.3108088202, -10.7684455039,
            ],
            "grad_norm": [124.086455495],
        },
        "carry": {
            "loss": {
                "con": 0.179006739298, "dyn": 1.01468286768, "extra": 57.4828555741,
                "mode": 2.227459525, "policy": 5.28916253351, "position": 16.1762297181,
                "rep": 1.01468286768, "repval": 9.67243453863, "rew": 3.89879965942,
                "value": 8.69596595289,
            },
            "metrics": [
                17.8453807387, 9.02104105586, 17.9614003791, 3.55559668758, 0.955113908776,
                3.74286106737, 2.53229211087, 5.17570548828, 5.06126201099,
            ],
            "total": [97.9673612184], "range": [-0.2755175404, 2.11767788324],
            "grad": [
                0.209109680673, -0.107200489497, 55.5545772724, 6.28425441314, 77.9170109784,
                61.97876994, 5.19449442226, -0.0986544814573, 2.57040003658, -1.1614598359,
                2.90844074479, 1.15068830032, 10.5147086059, -9.06630363788,
            ],
            "grad_norm": [96.4884616722],
        },
    },
    "D": {
        "zero": {
            "loss": {
                "con": 0.136919457538, "dyn": 1.08673064628, "image": 1274.01966528,
                "policy": 7.06491803351, "rep": 1.08673064628, "repval": 9.5093098574,
                "rew": 3.99826498474, "value": 8.56346983181, "vector": 65.7473250966,
            },
            "metrics": [
                18.6060595906, 8.99465142698, 20.1173078307, 3.94051070048, 0.963094561693,
                9.60938600952, 1.31761368818, 5.10799722506, 4.99924071436,
            ],
            "total": [1363.57875935], "range": [0.120966497853, 0.254269094092],
            "grad": [
                0.200097615675, -0.124414611172, 2222.38493896, -4414.07702878, 143.899523481,
                27.1947660525, 175.958300034, 66.3797161387, 13.8840325097, -13.5155462369,
                2.11037866731, -0.815168894907, 9.45664956846, -16.5653197757,
            ],
            "grad_norm": [2234.04339739],
            "warmup0": {
                "total": [1352.53493324, 1341.0015688], "grad_norm": [2142.53960214, 2023.74036669],
                "range": [0.35612237784, 0.754961223858],
                "params": [
                    6.59276360379427, 1.96031977945652, 23.3235754018818, 10.1268076952807,
                    25.5366148414504, -24.6091815672863, 14.3371565009486, 7.15386613036913,
                    10.9388060153253, 2.90519643294054, 224.781505727287, 147.781903143034,
                    225.86852320757, 134.676266070926, 226.332536411848, 189.080750059498,
                ],
            },
            "warmup1000": {
                "total": [1363.57518334, 1363.56528883],
                "grad_norm": [2234.04300157, 2233.98909404],
                "range": [0.359282687079, 0.755204359873],
                "params": [
                    6.59260843396791, 1.9556606183758, 23.323668287756, 10.0979256169807,
                    25.536747489394, -24.6131359540102, 14.3372200700623, 7.14380424181282,
                    10.9387138859012, 2.89489629218413, 224.780102377336, 147.787851632719,
                    225.867093902129, 134.668979206248, 226.332472790532, 189.080436466563,
                ],
            },
        },
        "carry": {
            "loss": {
                "con": 0.14090992017, "dyn": 1.06155138245, "image": 1272.9418053,
                "policy": 2.89612645975, "rep": 1.06155138245, "repval": 9.54916833647,
                "rew": 4.02415246958, "value": 8.54750538813, "vector": 65.8926151651,
            },
            "metrics": [
                18.8747496027, 9.07114627084, 19.8867268673, 4.11017269354, 0.957977905937,
                4.04696437122, 1.30711159167, 5.12132619241, 5.06379910622,
            ],
            "total": [1358.47557172], "range": [-0.272238664466, 2.14764636238],
            "grad": [
                0.216974914344, -0.0697812302707, 2189.68878201, -4362.10708635, 147.832198753,
                3.53702418915, 181.894766104, 95.0332072972, 5.1145736749, -6.75006901339,
                2.18905230202, -0.867560407016, 9.07111260374, -15.7698475351,
            ],
            "grad_norm": [2202.22394637],
            "warmup0": {
                "total": [1347.35122111, 1335.87475433], "grad_norm": [2113.47151614, 1997.0934838],
                "range": [-0.0288989299256, 2.6429783055],
                "params": [
                    6.59264229504813, 1.96277664316079, 23.3235125469155, 10.1440197070055,
                    25.536626921042, -24.6075054273333, 14.3372089390875, 7.15196146430274,
                    10.9388423339263, 2.90603984855315, 224.781487952571, 147.779366083325,
                    225.868520668295, 134.675723853281, 226.33253650545, 189.080728592049,
                ],
            },
            "warmup1000": {
                "total": [1358.33724745, 1358.20710845],
                "grad_norm": [2202.22297268, 2202.17081311],
                "range": [-0.0205360585388, 2.63553441104],
                "params": [
                    6.59260824323707, 1.9556637517005, 23.323668202761, 10.0979456526752,
                    25.5367475296253, -24.6131289862332, 14.3372201035697, 7.1438061653641,
                    10.9387139532665, 2.89489744525408, 224.780102359143, 147.787846724381,
                    225.867093901979, 134.66897886685, 226.332472790613, 189.08043645785,
                ],
            },
        },
    },
}
ACTING = {
    "B": [
        ([1.50583646113, 0.906992272122], "23302331", "44"),
        ([1.65455057692, -1.9320732597], "33312331", "24"),
        ([1.98564857586, -3.24883323708], "30003330", "22"),
        ([1.95271603728, -1.3390522392], "30310331", "22"),
        ([2.35797069012, -1.64645192579], "03312331", "32"),
    ],
    "B1m": [
        (
            [3.96740028639, 4.88548240354],
            "2032030220132122100233012322123020332301210321201002030112211100", "11",
        ),
        (
            [4.77072912187, 5.57705528694],
            "2013330121002120101203012221200020122300211321201013332122221000", "11",
        ),
        (
            [5.94114427116, 6.81331334561],
            "2013230120222132100333012202001020132321301321301013332122222010", "11",
        ),
        (
            [5.65573236027, 7.68910464375],
            "2013232121122230100233122222002220131000201222201002030123211100", "41",
        ),
        (
            [6.37075512144, 7.42608325358],
            "2030202200012233101223002221011020102301201321221002232122210010", "41",
        ),
    ],
    "C": [
        ([1.50583646113, 0.906992272122], "33213321", [1.05145081073, -0.433734166174]),
        ([1.79886877097, 0.7765463672], "32303321", [0.805912503517, 0.48303086039]),
        ([2.00575926169, 1.19605420565], "22301211", [0.805477535983, -0.13880308812]),
        ([1.73438001277, 0.787423034543], "22301321", [0.664515462069, 0.41483449844]),
        ([1.85385434408, 0.797064930277], "12233331", [0.978057752361, 0.33187733488]),
    ],
    "D": [
        ([1.50583646113, 0.906992272122], "30211332", "12"),
        ([1.92153504689, 1.9531224202], "20322032", "22"),
        ([1.96065727099, 2.02402584693], "30033003", "22"),
        ([2.05144283697, 0.898654352293], "30003122", "21"),
        ([2.27786545891, 0.254237570166], "03123001", "32"),
    ],
}
CONTEXT = {
    "metrics": {
        "losses/cont": 0.185261973192, "losses/dyn": 1.09246414924, "losses/extra": 60.7430331308,
        "losses/mode": 2.32314619601, "losses/actor": 6.00490570431,
        "losses/position": 16.7398532295, "losses/rep": 1.09246414924,
        "losses/repval": 9.00457534488, "losses/reward": 4.21669239096,
        "losses/critic": 8.53436294294, "losses/total": 102.650338735,
        "losses/grad_norm": 69.1436368135, "behaviour/return": 17.2314683064,
        "behaviour/value": 8.70905410017, "behaviour/slow_value": 18.7401582253,
        "behaviour/reward": 3.34784068816, "behaviour/cont": 0.978873568135,
        "behaviour/advantage": 3.55427700319, "behaviour/policy_entropy": 2.57912495722,
        "latents/posterior_entropy": 5.175506722, "latents/prior_entropy": 4.84458384628,
    },
    "deter": [9.03924484336, 7.85837124963], "stoch": [9.16515138991, -11.2288538107],
}
PARITY_PARTS = {
    "bins": [
        -23829.9433861177, -0.170557715280186, 0.0, 0.170557715280186, 414473535.055982,
        485165194.40979,
    ],
    "twohot": {
        "mean": [
            1.22323417918357, 0.0, 2.0807535544061, 1.7484301879697, 1.85794946361689,
            1.61084555596226, 1.41926311409709, 1.22825583816471, 1.57705535230396,
        ],
        "target": [
            0.0, 0.603904461287247, 485165194.40979, -485165194.40979, 1000000000.0, -1000000000.0,
            100.0, -3.0, 0.00100000004749745,
        ],
        "loss": [
            4.03395157604529, 5.54126354515843, 30.2674736707086, 33.9403804259656,
            32.6876975387045, 32.7429201901765, 8.3627833257992, 6.42644222996608, 4.1609012155309,
        ],
        "grad": [
            [1.04181072735898, -0.804042703687177], [0.998037289570159, -0.917341729570983],
            [1.06828714996032, 1.35697002600211], [1.0753525354892, 1.77993285240744],
            [1.04816669022317, 1.68250166016968], [1.04749402536967, 1.88526854451556],
            [0.822258730891588, 1.44105310005793], [0.877962520623782, 0.67597737042524],
            [1.02329089119667, -1.28667656706826],
        ],
    },
    "categorical": {
        "log_prob": [-3.35868460714145, -2.60452929204887, -3.69435224503257],
        "entropy": [0.995734158797259, 2.28947998355092, 2.29584646525904],
        "log_prob_plain": [-3.4151178205093, -2.60290175755255, -3.70670309974488],
        "kl": [3.75498998639713, 0.494246551279901, 1.55633287344718],
        "grad_kl": [[0.729587334299872, -0.133820683892149], [1.4260081211165, 1.4812999608379]],
        "sample": "020133", "grad_sample": [1.39543481767212, 0.807517109643322],
    },
    "normal": {
        "mean": [2.03291512789754, -1.47272495026997], "std": [2.1742315189872, 0.250449624596158],
        "log_prob": [-3.62306700659575, -12.6981687093782, -1.22935225515704, -4.81721177825132],
        "entropy": [2.67797561719709, -0.157425249188532, 1.81398573517176, 2.80296016338094],
    },
    "lambda_return": {
        "replay": [11.5015037984305, 9.25218782380162],
        "imagined": [9.36616852514102, 2.7293237248209],
    },
    "linear": [
        [3.75384372092034, -6.65607152856741], [4.29790710740848, -3.51369218663164],
        [13.4571403233873, -8.40828164611262], [2.70839460126095, -2.35752606254975],
    ],
    "blocklinear": [
        [2.56960301650269, -0.866656044639547], [3.43915066874188, -0.214037304390319],
        [5.61472536641853, 1.41502967700845], [5.55389584142397, 12.1986651333503],
    ],
    "conv5same": [
        [18.5752494024168, -38.5894930332973], [20.2191538665976, -24.428627740857],
        [164.277042606944, 111.909939799798], [10.7193149016851, 10.9451804494789],
    ],
    "rmsnorm": [-0.045492820710657, -1.67356472936816, -1.7815324717474, -0.243805217885005],
    "core_disc": {
        "deter": [3.9235952657399, 3.49970065548901],
        "grad_deter": [6.96064981051871, 60.1408022784305],
        "grad_stoch": [2.88966741514812, -5.11123145943646],
        "grad_action": [1.64879475381697, -0.463763388749918],
        "grads": [42.5937308487008, 19.5760052285806],
        "prior": [5.57226078119244, 3.20171249603636],
        "observe": [
            [3.42454016200434, 5.70738669143483], [3.46410161513775, 0.0671197510970165],
            [3.77890907480237, 1.01113666735715],
        ],
    },
    "core_cont": {
        "deter": [3.78749324486521, 2.31009048494292],
        "grad_deter": [6.97813409942799, 60.2883214272554],
        "grad_stoch": [2.47476898156774, -2.41170346471216],
        "grad_action": [0.975832704504615, 1.02612495697652],
        "grads": [46.682933590629, -48.1047337132616],
        "prior": [5.57226078119244, 3.20171249603636],
        "observe": [
            [3.37653625133075, 4.79717281158534], [3.46410161513775, 0.0671197510970165],
            [3.8185376092018, 1.64152434080811],
        ],
    },
    "imag_loss": {
        "returns": [17.4187500841041, -3.55056666866617],
        "actor": [7.19884318584912, -0.36490508745241],
        "critic": [18.0028773063545, 3.46622376500974],
        "range": [-0.381045747608544, 1.93240526974302],
        "grad_actor": [2.87712863668169, 0.302768793874396],
        "grad_critic": [3.0914553102944, -3.62695792945636],
    },
    "optimizer0": [
        [4.65860362388344, 0.836045036964945], [0.0817346370111199, -0.0314117759155912],
        [1.09428247412333, -0.526481447813526],
    ],
    "optimizer3": [
        [4.66239784149326, 1.00179299431106], [0.0394256596035826, 0.00432379996798606],
        [1.09428247412333, -0.526481447813526],
    ],
}
COUNTS = {
    "1m": (686843, 637381), "12m": (10494155, 9724165), "25m": (23489323, 21762181),
    "50m": (41650059, 38584325), "100m": (93468235, 86580997), "200m": (165948683, 153714181),
    "400m": (372896395, 345390085),
}
# fmt: on
