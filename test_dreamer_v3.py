"""Tests of dreamer_v3.py: parity with the authors, numerics, alignment, wiring, use, learning.

    python -m pytest -q                 # all of it
    python -m pytest -q -k mutation     # the tests whose names have this word

References are written from the paper with explicit loops in float64. A `check_*` function is called
twice: by its test, and by group H, which plants a known mistake and requires that the check fails.
Groups: A numerics, B alignment, C wiring, D spaces, E checkpoints and command line, F learning,
G documents (docs/test_pages.py), H mutations, I speed, J runs that survive, K looking inside,
L processes, P parity. Two cores take ten minutes.
"""

import ast
import contextlib
import copy
import errno
import fcntl
import functools
import gc
import importlib
import importlib.util
import inspect
import itertools
import json
import math
import multiprocessing
import os
import pickle
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
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

HERE = Path(dreamer_v3.__file__).parent
SOURCE = (HERE / "dreamer_v3.py").read_text()
PATHS = [HERE / "README.md", HERE / "results/README.md", *sorted((HERE / "docs").glob("*.md"))]
PAGES = {path.relative_to(HERE).as_posix(): path.read_text() for path in PATHS}
README, ENVIRONMENTS = PAGES["README.md"], PAGES["docs/environments.md"]

torch.set_num_threads(1)
# float64 against float64: only the order of the sums differs.
EXACT = dict(rtol=1e-9, atol=1e-9)

TINY = dict(
    compile=False, cuda=False, size="1m", deter=32, hidden=16, units=16, classes=4, depth=2,
    stoch=3, blocks=4, batch_size=2, batch_length=4, imag_horizon=2, warmup_updates=0,
    learning_rate=1e-3, eval_every=0, eval_episodes=0, num_envs=1, total_timesteps=40,
    buffer_size=1000, train_ratio=2.0, seed=1,
)  # fmt: skip
MIXED = Spaces((("image", 3),), (("a", 4, ()), ("b", 5, (2, 3)), ("c", 2, ())), (3,), 3)


IMAGES = Spaces((("left", 1), ("right", 3)), MIXED.vectors, (3,), 3)  # two images, and vectors
VECTOR = Spaces((), (("a", 4, ()), ("b", 5, (2, 3))), (3, 2), 5)  # two discrete actions
CONTINUOUS = Spaces((), (("a", 4, ()),), (), 3)


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


def short_run(module, tmp_path, **settings):
    """A short run of the smallest network in any copy of the file: the run's folder."""
    args = module.Args(**(TINY | {"run_dir": str(tmp_path), "log_every": 1} | settings))
    module.main(args)
    (path,) = tmp_path.glob("*/metrics.jsonl")
    return path.parent


def read_metrics(folder):
    """The lines of a run's metrics."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def make_batch(spaces, args, batch=3, length=4):
    """A random batch as `Agent.loss` takes it."""
    shape, flags = (batch, length), ("is_first", "is_last", "is_terminal")
    return {
        **{name: torch.randint(0, 256, (*shape, 64, 64, c)).byte() for name, c in spaces.images},
        **{name: make_vector(classes, width, shape) for name, width, classes in spaces.vectors},
        **{name: torch.rand(shape) < 0.3 for name in flags},
        "prev_action": make_vector(spaces.action_classes, spaces.action_width, shape),
        "reward": torch.randn(shape) * 3,
        "deter": (torch.rand(batch, args.deter) * 2 - 1).half(),
        "stoch": torch.randint(0, args.classes, (batch, args.stoch), dtype=torch.uint8),
    }


def make_vector(classes, width, shape):
    """Random one-hot vectors side by side, or normals up to +-10."""
    if not classes:
        return torch.randn(*shape, width) * 4
    parts = [F.one_hot(torch.randint(0, n, shape), n) for n in classes]
    return torch.cat(parts, -1).to(torch.get_default_dtype())


def wrap(patch, owner, name, mutated):
    """Replace owner.name by mutated(original, *args)."""
    original = getattr(owner, name)
    patch.setattr(owner, name, lambda *args, **kwargs: mutated(original, *args, **kwargs))


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
    """RMSNorm over the last axis with eps 1e-4, then SiLU; also of tensors, with gradient."""
    y = x / ((x**2).mean(-1, keepdims=True) + 1e-4) ** 0.5 * scale
    return y / (1 + math.e**-y)


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
    layers = (rssm.deter_in, h), (rssm.stoch_in, z), (rssm.action_in, a)
    embeds, blocks = [ref_dense(*x) for x in layers], np.split(h, rssm.blocks, -1)
    x = ref_block_linear(rssm.hidden_layer, [np.concatenate([b, *embeds], -1) for b in blocks])
    x = ref_norm_silu(np.concatenate(x, -1), to_numpy(rssm.hidden_norm.scale))
    sigmoid, new = lambda y: 1 / (1 + np.exp(-y)), []
    gates = ref_block_linear(rssm.gru, np.split(x, rssm.blocks, -1))
    for gate, old in zip(gates, blocks, strict=True):
        reset, cand, update = np.split(gate, 3, -1)
        cand, update = np.tanh(sigmoid(reset) * cand), sigmoid(update - 1)
        new.append(update * cand + (1 - update) * old)
    return np.concatenate(new, -1)


def ref_prior(rssm, h):
    """Logits (n, S*K) of the prior."""
    return ref_linear(rssm.prior_net[-1], ref_mlp(rssm.prior_net[:-1], h))


def ref_return(reward, value, cont, last, lam, t):
    """R_t of one trajectory by the recursion of Eq. 5."""
    if t == len(reward) - 1:
        return value[t]
    mix = lam * (1 - last[t + 1])
    after = ref_return(reward, value, cont, last, lam, t + 1)
    return reward[t + 1] + cont[t + 1] * ((1 - mix) * value[t + 1] + mix * after)


def ref_returns(reward, value, cont, last, lam):
    """(N, H+1) each -> (N, H)."""
    rows = zip(reward, value, cont, last, strict=True)
    return np.array([[ref_return(*row, lam, t) for t in range(len(row[0]) - 1)] for row in rows])


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
    expected = ref_apply(ref_twohot_loss, logits.numpy(), targets.numpy())
    close(dreamer_v3.twohot_loss(logits, targets, bins), expected)


def check_twohot_mean():
    """The prediction, and that a symmetric distribution predicts exactly 0 in float32."""
    logits, bins = torch.randn(20, 255) * 3, dreamer_v3.twohot_bins()
    expected = ref_apply(ref_twohot_mean, logits.numpy())
    # Bins up to 5e8 cancel: the error is relative to them, not to the sum.
    close(dreamer_v3.twohot_mean(logits, bins), expected, rtol=1e-9, atol=1e-6)
    half = torch.randn(50, 127, dtype=torch.float32) * 3
    symmetric = torch.cat([half, torch.zeros(50, 1), half.flip(-1)], -1).float()
    assert (dreamer_v3.twohot_mean(symmetric, bins.float()) == 0).all()
    assert (dreamer_v3.twohot_mean(torch.zeros(3, 255).float(), bins.float()) == 0).all()


def check_twohot_gradients():
    """Mirrored bins far from all targets learn the same, bit for bit, or their sum is noise."""
    model, bins = make_agent(CONTINUOUS).model.float(), dreamer_v3.twohot_bins().float()
    for head in (model.reward[-1], model.critic[-1]):
        x = torch.randn(256, 4, head.in_features).float()
        close(head(x).detach(), ref_linear(head, x.numpy()), rtol=1e-5, atol=1e-5)
        for p in (head.weight, head.bias):
            p.data.add_(p.data.flip(0))
        loss = dreamer_v3.twohot_loss(head(x), torch.rand(256, 4).float(), bins).mean()
        for grad in torch.autograd.grad(loss, [head.weight, head.bias]):
            assert (grad[:100] != 0).all() and torch.equal(grad[:100], grad.flip(0)[:100])


def check_unimix():
    """Log-probabilities with and without the uniform share; extreme logits stay finite."""
    logits = torch.randn(6, 5) * 4
    for unimix in (0.0, 0.01, 0.3):
        expected = [np.log(ref_mixed(x, unimix)) for x in logits.numpy()]
        close(dreamer_v3.mixed_log_probs(logits, unimix), expected)
    extreme = dreamer_v3.mixed_log_probs(torch.tensor([[1000.0, 0.0]]), 0.01)
    close(extreme, [[math.log(0.995), math.log(0.005)]])


def check_kl():
    """Both KL losses: value, free nats on the sum over variables, and who gets the gradient."""
    agent = make_agent(CONTINUOUS, free_nats=2.7, unimix=0.05)
    batch, shape = make_batch(CONTINUOUS, agent.args), (3, 4, TINY["stoch"], TINY["classes"])
    post, prior = ((torch.randn(shape) * 1.5).requires_grad_() for _ in range(2))
    states = [torch.randn(3, 4, TINY["deter"]), torch.randn(shape), post]
    agent.model.rssm.observe, agent.model.rssm.prior = lambda *_: states, lambda _: prior
    losses = dreamer_v3.world_model_loss(agent.model, batch, agent.args)[0]
    q, p = to_numpy(post), to_numpy(prior)
    kl = np.array([[ref_kl(q[b, t], p[b, t], 0.05) for t in range(4)] for b in range(3)])
    assert 3 <= (kl < 2.7).sum() <= 9, "the example must lie on both sides of the free nats"
    for name, moving, fixed in (("dyn", prior, post), ("rep", post, prior)):
        close(losses[name], np.maximum(kl, 2.7))
        grads = differentiate(losses[name], [moving, fixed])
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
    agent = make_agent(IMAGES)
    batch, model = make_batch(IMAGES, agent.args), agent.model
    losses, deter, stoch = dreamer_v3.world_model_loss(model, batch, agent.args)[:3]
    feat = torch.cat([deter, stoch.flatten(-2)], -1)
    rewards = ref_apply(ref_twohot_loss, to_numpy(model.reward(feat)), to_numpy(batch["reward"]))
    close(losses["reward"], rewards)
    prob = 1 / (1 + np.exp(-to_numpy(model.cont(feat))[..., 0]))
    target = (1 - to_numpy(batch["is_terminal"])) * (1 - 1 / 333)
    close(losses["cont"], -(target * np.log(prob) + (1 - target) * np.log(1 - prob)))
    recon = {k: to_numpy(v) for k, v in model.decoder(deter, stoch).items()}
    for name in ("a", "c"):
        symlog = np.vectorize(ref_symlog)(to_numpy(batch[name]))
        close(losses[name], ((recon[name] - symlog) ** 2).sum(-1))
    cross = lambda logits, label: -np.log(ref_softmax(logits))[label]
    parts = [
        (recon["b"][..., i], to_numpy(batch["b"])[..., i].argmax(-1)) for i in ([0, 1], [2, 3, 4])
    ]
    close(losses["b"], sum(ref_apply(cross, x, y) for x, y in parts))
    for name in ("left", "right"):
        error = recon[name] - to_numpy(batch[name]) / 255
        close(losses[name], (error**2).sum((-3, -2, -1)))


def check_straight_through():
    """A sample is one-hot, has the right frequency, and hands its gradient to the probabilities."""
    probs, uniform = torch.softmax(torch.randn(4, 3, 5), -1).requires_grad_(), torch.rand(4, 3)
    weight, sample = torch.randn(4, 3, 5), dreamer_v3.sample_one_hot(probs, uniform)
    assert np.array_equal(np.sort(to_numpy(sample), -1), np.tile([0, 0, 0, 0, 1], (4, 3, 1)))
    close(torch.autograd.grad((sample * weight).sum(), probs)[0], weight)
    p, n = torch.tensor([0.05, 0.15, 0.8]), 20_000
    drawn = dreamer_v3.sample_one_hot(p.expand(n, 3), torch.rand(n)).mean(0)
    close(drawn, p.numpy(), rtol=0, atol=5 * math.sqrt(0.25 / n))  # five standard errors
    short = dreamer_v3.sample_one_hot(torch.tensor([0.5, 0.5 - 1e-6]), torch.tensor(1 - 1e-7))
    close(short, [0, 1])  # rounding may leave the sum of probabilities below 1


def independent(samples, probs):
    """Assert that (n, S, K) one-hot samples have the frequencies `probs` (K), in pairs, too."""
    n, variables, _ = samples.shape
    pairs = to_numpy(torch.einsum("nik,njl->ijkl", samples, samples) / n)
    for i, j in itertools.product(range(variables), repeat=2):
        expected = np.diag(probs) if i == j else np.outer(probs, probs)
        close(pairs[i, j], expected, rtol=0, atol=5 * math.sqrt(0.25 / n))  # five standard errors


def check_independent_samples():
    """Every latent variable, step and discrete action is drawn by itself."""
    n, logits = 10_000, torch.tensor([0.0, 1.0, -1.0])
    probs = ref_mixed(logits.numpy(), 0.01)
    rssm = dreamer_v3.RSSM(2, 5, 8, 6, 3, 3, 2, 0.01)
    for layer in (rssm.prior_net[-1], rssm.posterior_out):
        layer.weight.data.zero_()
        layer.bias.data.copy_(logits.repeat(3))
    start, action = rssm.initial(n), torch.randn(n, 2, 2)
    with torch.no_grad():
        never = torch.zeros(n, 2, dtype=torch.bool)
        observed = rssm.observe(torch.randn(n, 2, 5), action, never, *start)[1]
        independent(observed.flatten(1, 2), probs)
        independent(rssm.imagine_step(*start, action[:, 0], rssm.layers())[1], probs)
        policy = dreamer_v3.Categoricals(logits.repeat(n, 2), (3, 3), 0.01)
        independent(policy.sample().unflatten(-1, (2, 3)), probs)


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
    rows = zip(probs, to_numpy(sample), strict=True)
    log_probs = [math.log(p @ x[:3]) + math.log(q @ x[3:]) for (p, q), x in rows]
    close(policy.log_prob(sample), log_probs)
    close(policy.entropy(), [-(p @ np.log(p)) - (q @ np.log(q)) for p, q in probs])
    modes = [np.concatenate([np.eye(3)[p.argmax()], np.eye(2)[q.argmax()]]) for p, q in probs]
    close(policy.sample(greedy=True), modes)


def check_block_linear():
    """Against one dense matrix with the blocks on its diagonal."""
    layer = randomize(dreamer_v3.BlockLinear(12, 8, 4))
    dense = np.zeros((12, 8))
    for k in range(4):
        dense[3 * k : 3 * k + 3, 2 * k : 2 * k + 2] = to_numpy(layer.weight)[k]
    x = torch.randn(2, 5, 12)
    close(layer(x), x.numpy() @ dense + to_numpy(layer.bias))


def check_cell():
    """One imagined step and the prior; actions beyond 1 are scaled down."""
    model = make_agent(CONTINUOUS).model
    rssm, hot = model.rssm, F.one_hot(torch.randint(0, 4, (7, 3)), 4).double()
    start = torch.rand(7, 32) * 2 - 1, hot
    with torch.no_grad():
        feat, action = dreamer_v3.imagine(model, *start, 1)
    assert (action.abs() > 1).any()
    close(feat[:, 0], np.concatenate([to_numpy(x.flatten(1)) for x in start], -1))
    expected = ref_cell(rssm, *(to_numpy(x.flatten(1)) for x in start), to_numpy(action[:, 0]))
    close(feat[:, 1, :32], expected)
    close(rssm.prior(feat[:, 1, :32]).flatten(1), ref_prior(rssm, expected))
    close(feat[:, 1, 32:].unflatten(1, (3, 4)).sum(-1), np.ones((7, 3)))


def torch_observe(rssm, embed, action, is_first, deter, stoch, samples):
    """`observe` in plain torch, one product for each matrix; `samples` are the classes drawn."""
    states = []
    for t in range(is_first.shape[1]):
        keep = ~is_first[:, t, None]
        deter, stoch, a = deter * keep, stoch * keep[..., None], action[:, t] * keep
        x = [rssm.deter_in(deter), rssm.stoch_in(stoch.flatten(1))]
        x.append(rssm.action_in(a / a.abs().clamp(min=1)))
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


def close_gradients(actual, expected, inputs):
    """Assert that two outputs have the same gradients for the inputs, up to the order of sums."""
    weight = torch.randn_like(expected)
    grads = [torch.autograd.grad((x * weight).sum(), inputs) for x in (actual, expected)]
    for g, e in zip(*grads, strict=True):
        close(g, to_numpy(e), rtol=1e-8, atol=1e-8 * float(e.abs().max()))


def check_observe():
    """States, and gradients through time, of sequences in which episodes start."""
    rssm, (batch, length) = randomize(dreamer_v3.RSSM(3, 5, 8, 6, 3, 4, 2, 0.01), 0.5), (4, 5)
    embed, action = torch.randn(batch, length, 5), torch.randn(batch, length, 3) * 2
    rows = [0, 0, 1, 0, 0], [1, 0, 0, 0, 1], [0, 1, 1, 0, 0], [0, 0, 0, 0, 0]
    is_first = torch.tensor(rows).bool()
    inputs = [embed, torch.rand(batch, 8), torch.rand(batch, 3, 4)]
    embed, *start = (x.requires_grad_() for x in inputs)
    actual = rssm.observe(embed, action, is_first, *start)
    samples = actual[1].detach().round()
    assert np.array_equal(np.sort(samples)[..., -2:], np.ones((4, 5, 3, 2)) * [0, 1])
    expected = torch_observe(rssm, embed, action, is_first, *start, samples)
    for a, b in zip(actual, expected, strict=True):
        close(a, to_numpy(b))
    params = [p for n, p in rssm.named_parameters() if not n.startswith("prior_net")]
    joined = [torch.cat([x.flatten(2) for x in states], -1) for states in (actual, expected)]
    close_gradients(*joined, [*inputs, *params])


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
    """Eq. 5 to 7 in numpy: weight, value, slow value, returns, return range and advantage."""
    arrays = [to_numpy(head(feat)) for head in (model.reward, model.critic, model.slow_critic)]
    reward, value, slow = (ref_apply(ref_twohot_mean, x) for x in arrays)
    cont = 1 / (1 + np.exp(-to_numpy(model.cont(feat))[..., 0]))
    weight = np.array([[math.prod(row[: t + 1]) for t in range(len(row) - 1)] for row in cont])
    returns = ref_returns(reward, value, cont, np.zeros_like(cont), args.return_lambda)
    low += args.return_rate * (np.quantile(returns, 0.05) - low)
    high += args.return_rate * (np.quantile(returns, 0.95) - high)
    advantage = (returns - value[:, :-1]) / max(1, high - low)
    return weight, slow[:, :-1], returns, low, high, advantage


def check_actor_critic():
    """Losses, returns and return range, below and above its limit of 1, over two calls."""
    ranges = (0.03, 0.01, True), (5.0, 0.7, False)
    for spaces, (width, rate, limited) in itertools.product((VECTOR, CONTINUOUS), ranges):
        agent = make_agent(spaces, return_rate=rate, ent_coef=0.1, slow_reg=0.6)
        model, args, low, high = agent.model, agent.args, 0.0, 0.0
        narrow(model, width)
        for _ in range(2):
            feat = torch.randn(6, 4, TINY["deter"] + TINY["stoch"] * TINY["classes"])
            action = make_vector(spaces.action_classes, spaces.action_width, (6, 4))
            losses, returns, metrics = dreamer_v3.actor_critic_loss(model, feat, action, args)
            reference = behaviour_reference(model, feat, args, low, high)
            weight, slow, expected, low, high, advantage = reference
            assert (high - low < 1) == limited, "the example must lie on its side of the limit"
            close(returns, expected)
            close(model.return_range, [low, high])
            policy = model.actor(feat[:, :-1])
            log_prob, entropy = map(to_numpy, (policy.log_prob(action[:, :-1]), policy.entropy()))
            close(losses["actor"], -weight * (log_prob * advantage + 0.1 * entropy))
            logits = to_numpy(model.critic(feat[:, :-1]))
            critic = [ref_apply(ref_twohot_loss, logits, target) for target in (expected, slow)]
            close(losses["critic"], weight * (critic[0] + 0.6 * critic[1]))
            close(metrics["behaviour/advantage_std"], advantage.std())


def check_replay_critic():
    """Random ends; the bootstrap is the imagined return of the next step."""
    agent = make_agent(VECTOR, slow_reg=0.6)
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
    losses = [ref_apply(ref_twohot_loss, logits, target) for target in (returns, slow)]
    close(loss, (1 - last[:, :-1]) * (losses[0] + 0.6 * losses[1]))


def ref_laprop(p, grads, args):
    """LaProp and clipping of one tensor: yields it after every update."""
    nu, mu = np.zeros_like(p), np.zeros_like(p)
    for t, g in enumerate(grads, start=1):
        limit = args.agc_clip * max(1e-3, math.sqrt((p**2).sum()))
        norm = math.sqrt((g**2).sum())
        g = g * limit / norm if args.agc_clip and norm > limit else g
        nu = 0.999 * nu + 0.001 * g**2
        mu = 0.9 * mu + 0.1 * g / (np.sqrt(nu / (1 - 0.999**t)) + 1e-20)
        lr = args.learning_rate * min(1, (t - 1) / args.warmup_updates)
        p = p - lr * mu / (1 - 0.9**t)
        yield p


def check_optimizer():
    """Twelve updates through a warm-up of 5: clipped, unclipped and from a norm of zero.

    With --agc-clip 0, gradients of any size are taken as they are.
    """
    for agc_clip in (0.3, 0.0):
        args = tiny(learning_rate=0.02, warmup_updates=5, agc_clip=agc_clip)
        rng = np.random.default_rng(0)
        starts = [rng.normal(size=(4, 3)), rng.normal(size=7), np.zeros(5)]
        grads = [
            rng.normal(size=(12, *starts[i].shape)) * s for i, s in enumerate((1.0, 0.01, 1.0))
        ]
        params = [torch.nn.Parameter(torch.tensor(x)) for x in starts]
        optimizer = dreamer_v3.LaProp(params, args)
        references = [ref_laprop(x, g, args) for x, g in zip(starts, grads, strict=True)]
        for t, expected in enumerate(zip(*references, strict=True)):
            metrics = optimizer.step([torch.tensor(g[t]) for g in grads])
            close(metrics["losses/grad_norm"], math.sqrt(sum((g[t] ** 2).sum() for g in grads)))
            close(metrics["charts/lr"], 0.02 * min(1, t / 5))
            for p, start, x in zip(params, starts, expected, strict=True):
                close(p, x)
                message = "the first update must have learning rate 0"
                assert t or np.array_equal(to_numpy(p), start), message


def check_slow_critic():
    """The slow critic starts as a copy and moves by tau towards the updated critic."""
    agent = Agent(tiny(), VECTOR)
    slow = [to_numpy(p) for p in agent.model.slow_critic.parameters()]
    for p, s in zip(agent.model.critic.parameters(), slow, strict=True):
        close(p, s)
    for _ in range(3):
        agent.train_step(make_batch(VECTOR, agent.args))
        critic = [to_numpy(p) for p in agent.model.critic.parameters()]
        slow = [s + 0.02 * (c - s) for s, c in zip(slow, critic, strict=True)]
        for p, s in zip(agent.model.slow_critic.parameters(), slow, strict=True):
            close(p, s)


def expected_std(name, module):
    """Initial standard deviation of a layer's weight. [D2] [D3]"""
    if name.split(".")[0] in ("reward", "critic", "slow_critic") and len(module.weight) == 255:
        return 0.0
    shape = module.weight.shape
    if isinstance(module, dreamer_v3.BlockLinear):
        return (shape[0] * shape[1]) ** -0.5
    fan_in = 25 * shape[1] if isinstance(module, dreamer_v3.Conv) else shape[1]
    return fan_in**-0.5 * (0.01 if name.startswith("actor.out") else 1)


def check_initialisation():
    """Spread and cut of every weight, zero biases, unit scales, heads that start at zero."""
    layers = (torch.nn.Linear, dreamer_v3.BlockLinear, dreamer_v3.Conv, dreamer_v3.UpConv)
    seen = Counter()
    for spaces in (MIXED, CONTINUOUS):
        for name, module in dreamer_v3.Dreamer(Args(size="1m"), spaces).named_modules():
            if isinstance(module, dreamer_v3.NormSiLU):
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


def ref_pool(x):
    """2x2 maximum of (n, h, w, c); the gradient is shared evenly by the entries that attain it."""
    corners = torch.stack([x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)])
    best = (corners == corners.max(0).values).to(x.dtype)
    return (corners * best / best.sum(0)).sum(0)


def check_encoder():
    """Values, and the gradient through the pooling where maxima tie, in flat regions."""
    encoder, batch = make_agent(IMAGES).model.encoder, make_batch(IMAGES, tiny(), 2, 3)
    for name in ("left", "right"):
        batch[name][:, :, :40] = 77
        batch[name] = batch[name].double().requires_grad_()  # to see who gets the gradient
    embed, (a, b, c) = encoder(batch), (to_numpy(batch[name]) for name in "abc")
    symlog = np.vectorize(ref_symlog)
    vector = ref_mlp(encoder.mlp, np.concatenate([symlog(a), b, symlog(c)], -1))
    x = torch.cat([batch["left"], batch["right"]], -1).flatten(0, 1) / 255 - 0.5
    for conv, norm in zip(encoder.convs, encoder.norms, strict=True):
        x = ref_norm_silu(ref_pool(ref_conv(conv, x)), norm.scale)
    x = x.flatten(1).unflatten(0, (2, 3))
    close(embed, np.concatenate([vector, to_numpy(x)], -1))
    close_gradients(
        embed[..., -x.shape[-1] :], x, [*encoder.convs.parameters(), batch["left"], batch["right"]]
    )


def check_decoder():
    """All parts; the first layer of images gives (g h w c), read as h w (g c)."""
    decoder = make_agent(IMAGES, depth=4).model.decoder
    deter, stoch = torch.randn(2, 3, 32), torch.randn(2, 3, 3, 4)
    recon, z = decoder(deter, stoch), stoch.flatten(-2)
    assert set(recon) == {"a", "b", "c", "left", "right"}
    hidden = ref_mlp(decoder.mlp, np.concatenate([z.numpy(), deter.numpy()], -1))
    for name, out in zip("abc", decoder.vector_outs, strict=True):
        close(recon[name], ref_linear(out, hidden))
    cells = ref_block_linear(decoder.from_deter, np.split(deter.flatten(0, 1).numpy(), 8, -1))
    x = np.zeros((6, 4, 4, 16))
    for n, i, j, c in np.ndindex(x.shape):
        block, channel = divmod(c, 2)  # depth 4: two channels for each of the eight blocks
        x[n, i, j, c] = cells[block][n, (4 * i + j) * 2 + channel]
    first, last = decoder.from_stoch
    x = x + ref_linear(last, ref_dense(first, z.flatten(0, 1).numpy())).reshape(x.shape)
    x = torch.tensor(ref_norm_silu(x, to_numpy(decoder.norm.scale)))
    double = lambda y: y.repeat_interleave(2, 1).repeat_interleave(2, 2)
    for conv, norm in zip(decoder.convs, decoder.norms, strict=True):
        x = ref_norm_silu(ref_conv(conv, double(x)), norm.scale)
    for (name, channels), out in zip(IMAGES.images, decoder.image_outs, strict=True):
        image = 1 / (1 + torch.exp(-ref_conv(out, double(x))))
        close(recon[name], to_numpy(image).reshape(2, 3, 64, 64, channels))


def check_upsampling():
    """Outputs and gradients are those of a 5x5 convolution of the larger image."""
    x, up = torch.randn(2, 6, 10, 20, requires_grad=True), dreamer_v3.UpConv(20, 5)
    actual, expected = up(x), ref_conv(up, x.repeat_interleave(2, 1).repeat_interleave(2, 2))
    close(actual, expected.detach())
    close_gradients(actual, expected, [x, *up.parameters()])


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
        terminal = end and episode_terminates(self.stream, self.episode)
        reward = counting_reward(self.episode, self.t)
        return self.observe(action), reward, terminal, end and not terminal, {}


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


def follow_row(obs, action, reward, is_first, is_last, is_terminal):
    """One entry of the replay against dreamer_v3's table. Returns what must follow."""
    stream, episode, t, last_action = (int(x) for x in obs)
    end = t == episode_end(stream, episode)
    assert is_first == (t == 0) and is_last == end
    assert is_terminal == (end and episode_terminates(stream, episode))
    assert reward == counting_reward(episode, t)
    assert (last_action == -1) == (t == 0)
    if action is None:
        return None
    if end:
        assert not action.any(), "nothing is chosen at an episode's last step"
        return stream, episode + 1, 0, -1
    assert sorted(action) == [0, 0, 1]
    return stream, episode, t + 1, int(action.argmax())


def follow_batch(batch):
    """Every sequence of a batch, step by step; the action of a step is the next prev_action."""
    names = ("prev_action", "obs", "reward", "is_first", "is_last", "is_terminal")
    for actions, *sequence in zip(*(np.asarray(batch[name]) for name in names), strict=True):
        expected = None
        for action, obs, *rest in zip([*actions[1:], None], *sequence, strict=True):
            assert expected is None or tuple(obs) == expected, "the sequence has a gap"
            expected = follow_row(obs, action, *rest)


def step_before(stream, episode, t):
    """The step before a step, which may belong to the episode before."""
    return (
        (stream, episode, t - 1) if t else (stream, episode - 1, episode_end(stream, episode - 1))
    )


class Spy:
    """Watches a run of `main`: checks every batch and every stored latent state, and counts."""

    def __init__(self, patch):
        self.latents, self.adds, self.updates, self.batches = {}, 0, Counter(), []
        for owner, name in (Agent, "act"), (Agent, "train_step"), (Agent, "loss"), (Replay, "add"):
            wrap(patch, owner, name, getattr(self, name))

    def remember(self, obs, deter, stoch):
        """The state last computed for a step, under its stream, episode and number."""
        for key, h, z in zip(obs[:, :3].tolist(), deter, stoch, strict=True):
            self.latents[tuple(key)] = np.asarray(h, np.float64), np.asarray(z)

    def act(self, original, agent, obs, *args, **kwargs):
        carry = original(agent, obs, *args, **kwargs)
        self.remember(obs["obs"], carry[0].numpy(), carry[1].argmax(-1).numpy())
        return carry

    def add(self, original, *args):
        self.adds += 1
        return original(*args)

    def train_step(self, original, agent, batch):
        follow_batch(batch)
        self.updates[self.adds] += 1
        self.batches.append(batch["obs"].clone())
        obs = batch["obs"][:, 0, :3].tolist()
        for first, h, z in zip(obs, batch["deter"], batch["stoch"], strict=True):
            context = self.latents[step_before(*first)]
            # Stored as float16, and numbers below 1: half a unit in the last place is 2.5e-4.
            close(h.double(), context[0], rtol=0, atol=1e-3)
            assert np.array_equal(z, context[1])
        metrics, deter, stoch = original(agent, batch)
        for row in range(len(deter)):
            self.remember(batch["obs"][row], deter[row].numpy(), stoch[row].numpy())
        return metrics, deter, stoch

    def loss(self, original, agent, batch):
        shown = batch["obs"][..., 3]
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
    """Append steps whose reward is their number and whose observation is their stream."""
    n = replay.num_envs
    for i in range(replay.steps, replay.steps + steps):
        flags = dict.fromkeys(("is_last", "is_terminal"), np.zeros(n, bool))
        latents = dict(deter=np.zeros((n, 8), np.float16), stoch=np.zeros((n, 2), np.uint8))
        x, reward = np.arange(n, dtype=np.float32)[:, None], np.full(n, i, np.float32)
        action, is_first = np.zeros((n, 2), np.float32), np.full(n, first(i))
        replay.add(flags | latents | dict(x=x, reward=reward, action=action, is_first=is_first))
    return replay


def make_replay(length, envs, folder=None, *written):
    """A replay for batches of 4 sequences of 3 + 1 steps; by default, its file has no name."""
    rssm = SimpleNamespace(deter_dim=8, stoch_shape=(2, 4))
    args = tiny(batch_size=4, batch_length=3, num_envs=envs)
    spaces = Spaces((), (("x", 1, ()),), (2,), 2)
    with tempfile.TemporaryDirectory() as unnamed:
        path = Path(folder or unnamed) / "replay.bin"
        return Replay(path, length, spaces, rssm, args, *written)


def draw(replay):
    """A batch as (stream, context step); every sequence must be consecutive and in the ring."""
    batch, index = replay.sample()
    contexts = replay.data["reward"][index][:, 0]
    for context, row in zip(contexts, batch["reward"], strict=True):
        assert np.array_equal(row, context + np.arange(1, 4)), "it crosses the write pointer"
        assert replay.steps - replay.length <= context and row[-1] < replay.steps
    assert (batch["x"] == batch["x"][:, :1]).all(), "the sequence changes its stream"
    starts = zip(batch["x"][:, 0, 0], contexts, strict=True)
    return [(int(stream), int(number)) for stream, number in starts]


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
    batch = make_batch(MIXED, agent.args, 2, steps)
    is_first = batch["is_first"] = torch.tensor([[1, 0, 0, 1, 0], [1, 0, 1, 0, 0]]).bool()
    with pytest.MonkeyPatch.context() as patch:
        hot = lambda probs: F.one_hot(probs.argmax(-1), probs.shape[-1]).to(probs.dtype)
        patch.setattr(dreamer_v3, "sample_one_hot", lambda probs, uniform: hot(probs))
        carry, carries = agent.initial(2), []
        for t in range(steps):
            carry = agent.act(observation(MIXED, batch, t), carry)
            carries.append(carry)
        deter, stoch, action = (torch.stack(x, 1) for x in zip(*carries, strict=True))
        shifted = torch.cat([torch.full_like(action[:, :1], 9.0), action[:, :-1]], 1)
        start = [torch.ones_like(x) for x in agent.model.rssm.initial(2)]
        states = agent.model.rssm.observe(agent.model.encoder(batch), shifted, is_first, *start)
    close(deter, to_numpy(states[0]))
    close(stoch, to_numpy(states[1]))
    assert (deter[:, 1:] - deter[:, :-1]).abs().amax(-1).min() > 1e-3, "the states must differ"


def observation(spaces, batch, t=0):
    """What `Agent.act` gets at step t of a batch."""
    names = [name for name, *_ in spaces.images + spaces.vectors]
    return {name: batch[name][:, t] for name in (*names, "is_first")}


def check_evaluation(tmp_path):
    """An evaluation resets the state at first observations only, and counts whole episodes."""
    for eval_sample in (False, True):
        settings = dict(run_dir=str(tmp_path), eval_sample=eval_sample)
        evaluation_of_eleven(tiny(env_id="TestCounting-v0", **settings))


def evaluation_of_eleven(args):
    """Assert what `check_evaluation` says of eleven episodes in eight environments."""
    agent = Agent(args, Spaces((), (("obs", 4, ()),), (3,), 3))
    act, modes = agent.act, []

    def spy(obs, carry, greedy=False):
        assert torch.equal(obs["is_first"], obs["obs"][:, 2] == 0), "reset at another step"
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
    assert sorted(returns) == sorted(expected) and set(modes) == {not args.eval_sample}


CHECKS = {name[6:]: x for name, x in globals().copy().items() if name.startswith("check_")}


def run_check(check, tmp_path):
    """Run a check: in the folder if it wants one, otherwise in float64."""
    wants_folder = "tmp_path" in inspect.signature(check).parameters
    check(tmp_path) if wants_folder else in_float64(check)()


@pytest.mark.parametrize("name", CHECKS)
def test_check(name, tmp_path):
    """Groups A and B: every formula, every row of the replay, against its reference."""
    run_check(CHECKS[name], tmp_path)


def test_greedy_actions_are_modes():
    """`act` with greedy takes the most likely action, and otherwise samples."""
    agent = make_agent(CONTINUOUS)
    obs = {"a": torch.zeros(500, 4), "is_first": torch.ones(500, dtype=torch.bool)}
    deter, stoch, action = agent.act(obs, agent.initial(500), greedy=True)
    mode = agent.model.actor(torch.cat([deter, stoch.flatten(-2)], -1)).sample(greedy=True)
    close(action, to_numpy(mode), rtol=0, atol=1e-6)
    sampled = agent.act(obs, agent.initial(500))[2]
    assert sampled.std(0).min() > 0.1  # the smallest deviation a policy can have


# ---- C. Wiring -----------------------------------------------------------------------------------

DYNAMICS = ("deter_in", "stoch_in", "action_in", "hidden_layer", "hidden_norm", "gru")
PARTS = {
    "dynamics": ["rssm." + name for name in DYNAMICS],
    "prior": ["rssm.prior_net"],
    "posterior": ["rssm.posterior_in", "rssm.posterior_out"],
    **{x: [x] for x in "encoder decoder reward cont actor critic slow_critic".split()},
}
INFER = ["encoder", "dynamics", "posterior"]  # what a gradient into the features reaches
REACHES = {
    **{name: [*INFER, "decoder"] for name in ("image", "a", "b", "c")},
    **{name: [*INFER, name] for name in ("reward", "cont")},
    "dyn": [*INFER, "prior"],  # the posterior through the samples of the steps before
    "rep": INFER,
    "repval": [*INFER, "critic"],
    **{name: [name] for name in ("actor", "critic")},
}


def collect_losses(agent, batch):
    """All losses that `Agent.loss` computes, unreduced, by name."""
    losses = {}
    with pytest.MonkeyPatch.context() as patch:

        def spy(owner, name, keep):
            original = getattr(owner, name)

            def wrapped(*args):
                result = original(*args)
                losses.update(keep(result))
                return result

            patch.setattr(owner, name, wrapped)

        spy(dreamer_v3, "world_model_loss", lambda result: dict(result[0]))
        spy(agent, "behaviour_loss", lambda result: dict(result[0]))
        spy(dreamer_v3, "replay_critic_loss", lambda result: {"repval": result})
        agent.loss(batch)
    return losses


def check_wiring(length=4):
    """Which loss moves which networks: most of their tensors, or none."""
    torch.manual_seed(0)
    agent = make_agent(MIXED, free_nats=0.0)
    names, params = zip(*agent.model.named_parameters(), strict=True)
    batch = make_batch(MIXED, agent.args, 3, length)
    batch["is_first"][:] = batch["is_last"][:] = batch["is_terminal"][:] = False
    if length > 1:
        table, losses = REACHES, collect_losses(agent, batch)
    else:  # the world model's losses; the others need a second step
        losses = dreamer_v3.world_model_loss(agent.model, batch, agent.args)[0]
        names_of_one = ("image", "a", "b", "c", "reward", "cont", "rep")
        table = {x: REACHES[x] for x in names_of_one} | {"dyn": ["dynamics", "prior"]}
    assert set(losses) == set(table)
    for loss, reached in table.items():
        grads = dict(zip(names, differentiate(losses[loss], params), strict=True))
        for part, prefixes in PARTS.items():
            starts = tuple(x + "." for x in prefixes)
            inside = [g for name, g in grads.items() if name.startswith(starts)]
            assert inside, f"no parameters in {part}"
            moved = [g is not None and bool(g.any()) for g in inside]
            # A decoder loss moves only its own key's output layer.
            assert any(moved) == (part in reached), f"{loss} reaches {part}: {any(moved)}"
            if part == loss or part in INFER and part in reached and loss != "dyn" and length > 1:
                assert sum(moved) >= 0.6 * len(moved), f"{loss} reaches only a part of {part}"


def differentiate(loss, params):
    """Gradient of a loss for all parameters that want one; None for others."""
    wanted = [p for p in params if p.requires_grad]
    grads = torch.autograd.grad(loss.sum(), wanted, allow_unused=True, retain_graph=True)
    grads = iter(grads)
    return [next(grads) if p.requires_grad else None for p in params]


@pytest.mark.parametrize("length", [4, 1])
def test_wiring(length):
    """Group C. With one step only, the dynamics loss does not reach the posterior at all."""
    check_wiring(length)


@in_float64
def test_total_loss():
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


def test_every_argument_is_read():
    """Group C: a field of Args that nothing reads is a broken promise."""
    nodes = ast.walk(ast.parse(SOURCE))
    loads = (x for x in nodes if isinstance(x, ast.Attribute) and isinstance(x.ctx, ast.Load))
    others = {*Args().network(), "preset"}  # read by getattr; read by `parse`
    assert {field.name for field in fields(Args)} <= {x.attr for x in loads} | others


MACHINE = ("time", "charts/SPS", "charts/UPS")  # not of the algorithm


def run_metrics(tmp_path, seed, env_id="TestCounting-v0"):
    """The metrics of a short run without times."""
    settings = dict(seed=seed, num_envs=2, log_every=10, eval_episodes=2)
    lines = read_metrics(short_run(dreamer_v3, tmp_path, env_id=env_id, **settings))
    assert len(lines) > 5 and any("losses/total" in line for line in lines)
    return [{k: v for k, v in line.items() if k not in MACHINE} for line in lines]


def test_equal_seeds_give_equal_runs(tmp_path):
    """Group C: bitwise on the CPU; another seed gives other episodes, and other networks."""
    first, second, other = (run_metrics(tmp_path / name, int(name[0])) for name in ("1", "1b", "2"))
    assert first == second != other
    same_episodes = [run_metrics(tmp_path / f"p{seed}", seed, "TestPainted-v0") for seed in (1, 2)]
    assert same_episodes[0] != same_episodes[1]


def updates_by_name(**changes):
    """Metrics of three updates of the same agent on the same batch, by name."""
    torch.manual_seed(0)
    dtype = changes.pop("dtype", torch.float32)
    agent = Agent(tiny(**changes), MIXED, dtype=dtype)
    batch = make_batch(MIXED, agent.args)
    runs = [agent.train_step(batch)[0] for _ in range(3)]
    return {f"{name} {i}": float(x) for i, run in enumerate(runs) for name, x in run.items()}


@pytest.fixture
def no_randomness(monkeypatch):
    """Samples are classes that depend on nothing: rounding cannot change them."""

    def class_in_turn(probs, uniform):
        """In place of `sample_one_hot`, with its gradient."""
        index = torch.arange(uniform.numel()).view(uniform.shape) % probs.shape[-1]
        return dreamer_v3.one_hot(index, probs.shape[-1]) + (probs - probs.detach())

    monkeypatch.setattr(dreamer_v3, "sample_one_hot", class_in_turn)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compiled_equals_eager(no_randomness):
    """The compiled pieces compute what the eager ones do, up to the rounding of float32."""
    torch._dynamo.utils.counters.clear()
    eager, compiled = updates_by_name(), updates_by_name(compile=True)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 6, "five pieces and the probe"
    assert compiled.keys() == eager.keys()
    for name in eager:
        assert compiled[name] == pytest.approx(eager[name], rel=1e-3, abs=1e-5), name


def test_bfloat16_is_near_float32(no_randomness):
    """Losses computed with bfloat16 matrices stay within 3%, beyond a rounding of 0.01."""
    exact, rounded = updates_by_name(), updates_by_name(dtype=torch.bfloat16)
    assert exact != rounded
    for name in exact:
        if name.startswith("losses/") and "actor" not in name:
            assert rounded[name] == pytest.approx(exact[name], rel=0.03, abs=0.01), name


def test_distributions_are_in_float32():
    """Of bfloat16 numbers, distributions, losses and norms are those of the same float32 ones."""
    bins, target = dreamer_v3.twohot_bins().float(), torch.randn(40) * 9
    norm = randomize(dreamer_v3.NormSiLU(255))
    functions = {
        "twohot_mean": lambda x: dreamer_v3.twohot_mean(x, bins),
        "twohot_loss": lambda x: dreamer_v3.twohot_loss(x, target, bins),
        "mixed_log_probs": lambda x: dreamer_v3.mixed_log_probs(x, 0.01),
        "log_probs": lambda x: dreamer_v3.mixed_log_probs(x, 0.0),
        "mean": lambda x: dreamer_v3.BoundedNormals(x, x).mean,
        "std": lambda x: dreamer_v3.BoundedNormals(x, x).std,
        "norm": norm,
    }
    x = torch.randn(40, 255).bfloat16()
    for name, function in functions.items():
        low, exact = function(x), function(x.float())
        assert low.dtype == torch.float32 and torch.equal(low, exact), name
    agent = Agent(tiny(), MIXED, dtype=torch.bfloat16)
    with agent.autocast:
        _, metrics, deter, stoch = agent.loss(make_batch(MIXED, agent.args))
    assert {x.dtype for x in (*metrics.values(), deter, stoch)} == {torch.float32}


def test_acting_is_in_float32(no_randomness):
    """An action and its state do not depend on the type of updates; parameters are float32."""
    carries = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        agent = Agent(tiny(), MIXED, dtype=dtype)
        randomize(agent.model)
        obs = observation(MIXED, make_batch(MIXED, agent.args, 20))
        carries.append(agent.act(obs, agent.initial(20), greedy=True))
        assert all(x.dtype == torch.float32 for x in [*carries[-1], *agent.params])
    assert all(torch.equal(a, b) for a, b in zip(*carries, strict=True))
    with agent.autocast:  # as in an update
        deter = agent.act(obs, agent.initial(20), greedy=True)[0]
    assert not torch.equal(deter, carries[0][0]), "the types must make a difference"


def test_no_compiler(monkeypatch, capsys):
    """Without a compiler, one line says so and the agent trains all the same."""
    message = "no working C++ compiler\nand much more"
    monkeypatch.setattr(torch, "compile", lambda *a, **k: (_ for _ in ()).throw(OSError(message)))
    agent = Agent(tiny(compile=True), MIXED)
    assert capsys.readouterr().out.count("\n") == 1
    agent.train_step(make_batch(MIXED, agent.args))


# ---- D. Spaces -----------------------------------------------------------------------------------


box = gs.Box


SHORT = box(-1, 1, (2,))
SMALL_IMAGE = box(0, 255, (8, 8, 3), np.uint8)
NESTED = gs.Dict(x=gs.Tuple([SHORT, gs.Dict(y=gs.Discrete(4, start=2))]), i=SMALL_IMAGE)
SENSORS = gs.Dict(
    image=box(0, 255, (20, 30, 3), np.uint8),
    grey=box(0, 255, (64, 64), np.uint8),
    vector=box(-5, 5, (3, 2)),
    choice=gs.Discrete(3, start=-1),
    many=gs.MultiDiscrete([2, 4]),
    bits=gs.MultiBinary(3),
)
PAIR = gs.Discrete(2)
WIDE = gs.Box(np.array([-0.3, 0.1, -7.0], np.float32), np.array([0.7, 0.2, 1000.0], np.float32))


INFINITE = np.array([0, -np.inf], np.float32), np.array([np.inf, -0.5], np.float32)


STARTS = gs.MultiDiscrete([[2, 3], [4, 2]], start=[[1, 2], [3, 4]])


SAME_NAME = gs.Dict({"a/b": gs.Discrete(2), "a": gs.Dict(b=gs.Discrete(3))})


CASES = {
    "vector": (box(-np.inf, np.inf, (4,)), PAIR),
    "float64": (box(-1, 1, (2, 2), np.float64), PAIR),
    "scalar": (box(-1, 1, ()), PAIR),
    "bytes": (box(0, 255, (5,), np.uint8), PAIR),
    "grey": (box(0, 255, (32, 48), np.uint8), PAIR),
    "grey_last": (box(0, 255, (64, 64, 1), np.uint8), PAIR),
    "channels_first": (box(0, 255, (3, 40, 40), np.uint8), PAIR),
    "stacked": (box(0, 255, (4, 30, 30, 3), np.uint8), PAIR),
    "stacked_first": (box(0, 255, (4, 3, 30, 30), np.uint8), PAIR),
    "board": (box(0, 255, (7, 7, 20), np.uint8), PAIR),
    "big": (box(0, 255, (210, 160, 3), np.uint8), PAIR),
    "sensors": (SENSORS, PAIR),
    "nested": (NESTED, PAIR),
    "names": (gs.Dict({name: SHORT for name in ("reward", "image", "actor")}), PAIR),
    "same_name": (SAME_NAME, PAIR),
    "discrete": (gs.Discrete(5, start=3), gs.Discrete(4, start=7)),
    "multi_discrete": (SHORT, gs.MultiDiscrete([2, 3, 4])),
    "multi_discrete_start": (gs.MultiDiscrete([3, 2], start=[5, -1]), STARTS),
    "multi_binary": (SHORT, gs.MultiBinary(4)),
    "box": (SHORT, WIDE),
    "box_matrix": (SHORT, box(-2, 3, (2, 2))),
    "box_unbounded": (SHORT, box(-np.inf, np.inf, (2,))),
    "box_half_bounded": (SHORT, gs.Box(*INFINITE)),
    "box_integer": (SHORT, box(-3, 9, (2,), np.int64)),
    "mission": (gs.Dict(mission=gs.Text(5), v=SHORT), PAIR),
    "text": (gs.Text(5), PAIR),
    "graph": (gs.Graph(SHORT, None), PAIR),
    "sequence": (gs.Sequence(SHORT), PAIR),
    "sequence_inside": (gs.Dict(v=SHORT, deep=gs.Sequence(gs.Discrete(2))), PAIR),
    "dict_action": (SHORT, gs.Dict({"a": PAIR})),
    "tuple_action": (SHORT, gs.Tuple([PAIR, PAIR])),
    "text_action": (SHORT, gs.Text(5)),
}
UNSUPPORTED = {
    "text": "nothing to observe", "graph": "Graph", "sequence": "Sequence",
    "sequence_inside": "deep.*Sequence", "same_name": "same name: obs/a/b", "dict_action": "Dict",
    "tuple_action": "Tuple", "text_action": "Text",
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
    settings = dict(env_id="TestSpaces-v0", env_kwargs=json.dumps({"case": case}))
    return tiny(**(settings | dict(total_timesteps=20, log_every=1) | changes))


def run_case(case, tmp_path, **changes):
    """Train and evaluate in a case; every loss must be finite. Returns the lines of metrics."""
    returns = dreamer_v3.main(space_args(case, run_dir=str(tmp_path), eval_episodes=2, **changes))
    assert returns.tolist() == [4.0, 4.0]
    (path,) = tmp_path.glob("*/metrics.jsonl")
    updates = [line for line in read_metrics(path.parent) if "losses/total" in line]
    assert updates and updates[-1]["charts/updates"] >= 1
    assert all(math.isfinite(value) for line in updates for value in line.values())
    return updates


@pytest.mark.parametrize("case", [case for case in CASES if case not in UNSUPPORTED])
def test_spaces(case, tmp_path):
    """Group D: every kind of space trains and evaluates."""
    run_case(case, tmp_path)


@pytest.mark.parametrize("case", ["sensors", "box", "multi_discrete_start"])
@pytest.mark.parametrize("async_envs", [False, True])
def test_several_environments(case, async_envs, tmp_path):
    """Group D: three environments, in this process and in processes of their own."""
    run_case(case, tmp_path, num_envs=3, async_envs=async_envs, total_timesteps=21)


@pytest.mark.parametrize("value", [0.5, 4, 1, -1])
def test_values_outside_a_space(value):
    """Group D: what is no class of a discrete observation is refused, and not rounded."""
    with pytest.raises(ValueError, match=r"is not in Discrete\(2, start=2\)"):
        dreamer_v3.encode_vector(np.array([2, value]), gs.Discrete(2, start=2))


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
    envs.step(np.array(vectors, np.float32))
    return [np.asarray(env.unwrapped.received).tolist() for env in envs.envs.envs]


def test_action_values():
    """Group D: class 0 is the space's start; bounds belong to -1 and 1, then clipped."""
    assert received("discrete", np.eye(4)) == [7, 8, 9, 10]
    assert received("multi_discrete", [[0, 1, 0, 0, 1, 1, 0, 0, 0]]) == [[1, 2, 0]]
    matrix = received("multi_discrete_start", [[0, 1, 1, 0, 0, 0, 0, 0, 1, 0, 1]])
    assert matrix == [[[2, 2], [6, 5]]]
    assert received("multi_binary", [[1, 0, 0, 1, 0, 1, 1, 0]]) == [[0, 1, 1, 0]]
    got = received("box", [[-1, -1, -1], [1, 1, 1], [9, -9, 0]])
    close(got, [[-0.3, 0.1, -7], [0.7, 0.2, 1000], [0.7, 0.1, 496.5]], rtol=1e-6, atol=0)  # float32
    integers = received("box_integer", [[-1, 1], [0, 5], [0.1, -0.4]])  # 3.6 and 0.6 are rounded
    assert integers == [[-3, 9], [3, 9], [4, 1]]
    assert np.isfinite(received("box_unbounded", [[-9, 9], [0.5, 0]])).all()
    assert received("box_unbounded", [[0.5, 0.25]]) == [[0.5, 0.25]]


def test_action_bounds_are_never_left_by_rounding():
    """Group D: the ends of 2000 random boxes in float32."""
    rng = np.random.default_rng(0)
    low = rng.normal(size=2000).astype(np.float32)
    high = low + rng.exponential(size=2000).astype(np.float32)
    envs = make_environments("box")
    envs.action_space = gs.Box(low, high)
    for end in (-1.0, 1.0):
        (action,) = envs.decode_action(np.full((1, 2000), end, np.float32))
        assert envs.action_space.contains(action)


def encoded(case, observation):
    """What `Environments` make of one observation, as the networks see it."""

    def batched(x):
        """With an axis of one environment before every array."""
        if isinstance(x, dict):
            return {key: batched(value) for key, value in x.items()}
        return tuple(map(batched, x)) if isinstance(x, tuple) else np.asarray(x)[None]

    envs = make_environments(case)
    envs.arrive(batched(observation), *np.zeros((4, 1), bool))
    return {key: x[0] for key, x in envs.entry.items() if key.startswith("obs")}


def test_image_values():
    """Group D: axes, and resizing by averaging areas."""
    image = np.zeros((3, 40, 40), np.uint8)
    image[0], image[1, :20], image[2, :, 20:] = 10, 100, 200
    x = encoded("channels_first", image)["obs"]
    assert x.shape == (64, 64, 3) and x.dtype == np.uint8
    assert (x[..., 0] == 10).all() and (x[:31, :, 1] == 100).all() and (x[33:, :, 1] == 0).all()
    assert (x[:, 33:, 2] == 200).all() and (x[:, :31, 2] == 0).all()
    grey = np.random.default_rng(0).integers(0, 256, (64, 64, 1)).astype(np.uint8)
    assert np.array_equal(encoded("grey_last", grey)["obs"], grey)
    chess = np.indices((210, 160)).sum(0)[..., None] % 2 * np.full(3, 200)
    mean = encoded("big", chess.astype(np.uint8))["obs"].astype(float)
    assert abs(mean.mean() - 100) < 2 and mean.std() < 30, "large images are averaged, not sampled"
    three_of_four = np.tile(np.array([[1, 1], [1, 0]], np.uint8), (64, 64))
    assert (dreamer_v3.encode_image(three_of_four[None]) == 1).all(), "0.75 is rounded"
    numbers = 10 * np.arange(4)[:, None] + np.arange(3)  # of frames and channels
    frames = np.broadcast_to(numbers[:, None, None], (4, 30, 30, 3)).astype(np.uint8)
    for case, x in {"stacked": frames, "stacked_first": np.moveaxis(frames, -1, 1)}.items():
        assert encoded(case, x)["obs"][5, 5].tolist() == numbers.flatten().tolist()
    board = np.broadcast_to(np.arange(20), (7, 7, 20)).astype(np.uint8)  # more planes than rows
    assert encoded("board", board)["obs"][9, 9].tolist() == list(range(20))


def test_values_by_name():
    """Group D: every part has its name and its loss, several images too; classes are one-hot."""
    observation = {
        "image": np.full((20, 30, 3), 9, np.uint8), "grey": np.full((64, 64), 5, np.uint8),
        "bits": np.array([1, 0, 1]), "choice": 1, "many": np.array([1, 2]),
        "vector": np.arange(6, dtype=np.float32).reshape(3, 2),
    }  # fmt: skip
    x = encoded("sensors", observation)
    assert list(x) == ["obs/bits", "obs/choice", "obs/grey", "obs/image", "obs/many", "obs/vector"]
    expected = dict(bits=[0, 1, 1, 0, 0, 1], choice=[0, 0, 1], many=[0, 1, 0, 0, 1, 0])
    for name, values in (expected | dict(vector=[0, 1, 2, 3, 4, 5])).items():
        assert x[f"obs/{name}"].tolist() == values and x[f"obs/{name}"].dtype == np.float32
    assert x["obs/grey"].shape == (64, 64, 1) and x["obs/grey"][3, 3].tolist() == [5]
    assert x["obs/image"].shape == (64, 64, 3) and x["obs/image"][3, 3].tolist() == [9, 9, 9]
    nested = {"x": (np.array([0.5, -1], np.float32), {"y": 4}), "i": np.zeros((8, 8, 3), np.uint8)}
    x = encoded("nested", nested)
    assert list(x) == ["obs/i", "obs/x/0", "obs/x/1/y"]
    assert x["obs/x/0"].tolist() == [0.5, -1] and x["obs/x/1/y"].tolist() == [0, 0, 1, 0]
    spaces = make_environments("sensors").spaces
    assert spaces.images == (("obs/grey", 1), ("obs/image", 3))
    discrete = (("obs/bits", 6, (2, 2, 2)), ("obs/choice", 3, (3,)), ("obs/many", 6, (2, 4)))
    assert spaces.vectors == (*discrete, ("obs/vector", 6, ()))
    agent = make_agent(spaces)
    losses = agent.loss(make_batch(spaces, agent.args))[1]
    names = [name for name, *_ in spaces.images + spaces.vectors]
    assert {f"losses/{name}" for name in names} <= set(losses)


@pytest.mark.parametrize("env_id", ["ALE/Pong-v5", "ale_py:ALE/Pong-v5"])
@pytest.mark.parametrize("async_envs", [False, True])
def test_atari(env_id, async_envs):
    """Atari is 64x64 RGB of one frame, with raw rewards, however it is asked for."""
    args = tiny(env_id=env_id, async_envs=async_envs)
    seed = dreamer_v3.LIMITS["seed"][1] + 10**8  # evaluations and --resume count on from the flag
    envs = dreamer_v3.Environments(args, 2, seed)
    assert envs.spaces == Spaces((("obs", 3),), (), (6,), 6)
    envs.reset()
    assert envs.entry["obs"].shape == (2, 64, 64, 3)
    options = envs.envs.spec.kwargs
    assert not any(options[x] for x in ("reward_clipping", "use_fire_reset", "episodic_life"))
    assert options["repeat_action_probability"] == 0.25 and options["frameskip"] == 4
    envs.close()


def test_observations_named_like_losses(tmp_path):
    """They keep losses of their own."""
    names = set().union(*run_case("names", tmp_path))
    assert {f"losses/obs/{name}" for name in ("reward", "image", "actor")} <= names
    assert {"losses/reward", "losses/actor"} <= names and "losses/image" not in names


def test_no_updates_without_a_train_ratio(tmp_path, monkeypatch):
    """--train-ratio 0 collects and never trains."""
    monkeypatch.setattr(Agent, "train_step", None)
    dreamer_v3.main(tiny(env_id="CartPole-v1", run_dir=str(tmp_path), train_ratio=0.0))


# ---- E. Checkpoints and command line -------------------------------------------------------------


def test_checkpoint_roundtrip(tmp_path):
    """Group E: a loaded agent is the saved one: parameters, actions, and next update."""
    first, second = make_agent(VECTOR, seed=1), make_agent(VECTOR, seed=1)
    batch = make_batch(VECTOR, first.args)
    for _ in range(3):
        first.train_step(batch)
    save(tmp_path / "checkpoint.pt", first, step=123)
    assert [x.name for x in tmp_path.iterdir()] == ["checkpoint.pt"], "no temporary file stays"
    checkpoint = dreamer_v3.load_checkpoint(tmp_path / "checkpoint.pt")
    assert (checkpoint["step"], checkpoint["args"]) == (123, first.args)
    second.load_state_dict(checkpoint["agent"])
    for _ in range(2):
        others = second.model.state_dict()
        for name, p in first.model.state_dict().items():
            assert torch.equal(p, others[name]), name
        carries = []
        for agent in (first, second):
            torch.manual_seed(5)
            carries.append(agent.act(observation(VECTOR, batch), agent.initial(3), greedy=True))
        assert all(torch.equal(a, b) for a, b in zip(*carries, strict=True))
        for agent in (first, second):
            torch.manual_seed(7)
            agent.train_step(batch)
    for other in (make_agent(CONTINUOUS), make_agent(VECTOR, deter=64)):
        with pytest.raises(UserError):
            other.load_state_dict(checkpoint["agent"])


def save(path, agent, **state):
    """`save_checkpoint` with stand-ins for the Trainer and the Logger: what it reads of them."""
    counters = dict.fromkeys(dreamer_v3.Trainer.counters, 0) | state
    trainer = SimpleNamespace(
        **counters, args=agent.args, agent=agent, counters=dreamer_v3.Trainer.counters,
        replay=SimpleNamespace(steps=0, online=0), finish_update=lambda: None,
    )  # fmt: skip
    with open(os.devnull, "wb") as file:
        dreamer_v3.save_checkpoint(path, trainer, SimpleNamespace(file=file, began=time.time()))


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
    save(path, agent)
    content, checkpoint = path.read_bytes(), torch.load(path)
    (tmp_path / "half.pt").write_bytes(content[: len(content) // 2])
    (tmp_path / "empty.pt").write_bytes(b"")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"args": {"nonsense": 1}}, tmp_path / "other.pt")
    (tmp_path / "folder.pt").mkdir()
    names = ["half", "empty", "list", "other", "missing", "folder"]
    for part in checkpoint:
        torch.save({k: x for k, x in checkpoint.items() if k != part}, tmp_path / f"no {part}.pt")
        names.append(f"no {part}")
    for name in names:
        with pytest.raises(UserError):
            dreamer_v3.load_checkpoint(tmp_path / f"{name}.pt")
    assert dreamer_v3.load_checkpoint(path)["args"] == agent.args


def command(*args, cwd=None):
    """Start dreamer_v3.py as a user would."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd)
    return subprocess.Popen([sys.executable, dreamer_v3.__file__, *args], env=env, **pipes)


def flags(args):
    """Args as command-line flags, where they differ from the defaults."""
    values = {f.name.replace("_", "-"): (getattr(args, f.name), f.default) for f in fields(Args)}
    words = []
    for name, (value, default) in values.items():
        if value != default and isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        elif value != default:
            words += [f"--{name}", str(value)]
    return words


def test_presets(tmp_path, monkeypatch, capsys):
    """Group E: a preset sets flags, others win, --help and the start show it, runs keep it."""
    parse = lambda *words: parse_words(monkeypatch, *words)
    for name, values in dreamer_v3.PRESETS.items():
        assert parse("--preset", name) == parse(f"--preset={name}") == Args(preset=name, **values)
        dreamer_v3.check_args(parse("--preset", name))
    assert parse("--num-envs", "2", "--preset", "cpu").num_envs == 2
    with pytest.raises(SystemExit):
        parse("--preset", "cpu", "--help")
    text = " ".join(capsys.readouterr().out.split())
    assert "Environments stepped together. (default: 4)" in text
    groups = [text.index(f" {name} ---") for name in dreamer_v3.GROUPS.values()]
    assert groups == sorted(groups) and len(groups) == 6
    small = flags(tiny(env_id="CartPole-v1", run_dir=str(tmp_path), eval_every=7))
    words = ["--preset", "crafter", "--preset", "cpu", *small, "--train-ratio", "2"]
    args = parse(*words, "--gamma", str(Args.gamma), "--exp-name", "two words")
    assert args.beta_pred == 10 and args.gamma == Args.gamma
    dreamer_v3.main(args)
    (line,) = (x for x in capsys.readouterr().out.splitlines() if x.startswith("flags"))
    assert parse(*shlex.split(line)[1:]) == args, "the line can be pasted"
    (folder,) = tmp_path.iterdir()
    monkeypatch.setattr(sys, "argv", ["x", "--resume", str(folder), "--total-timesteps", "50"])
    dreamer_v3.cli()
    checkpoint = dreamer_v3.load_checkpoint(folder / "checkpoint.pt")
    assert checkpoint["step"] == 52 and checkpoint["args"].preset == "cpu"


def test_preset_of_the_readme():
    """Group G: README.md says what `--preset cpu` stands for."""
    words = re.search(r"`--preset cpu` stands for `(.*?)`", PAGES["README.md"], re.DOTALL)[1]
    args = tyro.cli(Args, args=words.split())
    assert args == Args(**dreamer_v3.PRESETS["cpu"])


def test_table_of_presets():
    """Group G: the column "ours" of docs/benchmarks.md is PRESETS, in environment frames."""
    table, name = {}, ""
    for line in (HERE / "docs/benchmarks.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 5 and cells[2][:1].isalnum() and cells[2] != "ours":
            name = cells[0] or name
            table[name, cells[1].split(" (")[0]] = cells[2].replace(",", "")
    assert {name for name, _ in table} == set(dreamer_v3.PRESETS) - {"cpu"}
    for (name, quantity), text in table.items():
        args = Args(**dreamer_v3.PRESETS[name])
        kwargs, sticky = json.loads(args.env_kwargs), "repeat_action_probability"
        expected = {
            "agent steps": args.total_timesteps,
            "environment frames": args.total_timesteps * args.action_repeat,
            "environments": args.num_envs,
            "train ratio": int(args.train_ratio),
            "action repeat": args.action_repeat,
            "size": args.size,
            "sticky actions": {0.0: "no", 0.25: "yes"}.get(kwargs.get(sticky)),
            "all 18 actions": "yes" if kwargs.get("full_action_space") else "no",
            "picture": "64x64 RGB",
        }
        assert text == str(expected[quantity]), (name, quantity)


def test_player(tmp_path, most_likely, monkeypatch):
    """Group E: a Player chooses what `act` does, for one environment and a batch, from a folder."""
    folder = short_run(dreamer_v3, tmp_path, env_id="CartPole-v1")
    batch, one = dreamer_v3.Player(folder), dreamer_v3.Player(folder / "checkpoint.pt")
    agent, carry = batch.agent, batch.agent.initial(3)
    randomize(agent.model)
    one.agent.model.load_state_dict(agent.model.state_dict())
    for step in range(9):
        obs, first = np.random.randn(3, 4).astype(np.float32), np.full(3, step in (0, 5))
        first[1] |= step == 3
        entry = {"obs": torch.tensor(obs), "is_first": torch.tensor(first)}
        carry = agent.act(entry, carry, greedy=True)
        expected = carry[-1].argmax(-1).tolist()
        assert batch(obs, first.astype(step % 2 and int or float)).tolist() == expected
        action = one(obs[0].tolist() if step % 2 else obs[0], first=int(first[0]))
        assert action == expected[0] and gs.Discrete(2).contains(action)
    monkeypatch.undo()
    sampler = dreamer_v3.Player(folder, greedy=False)
    assert {int(sampler(obs[0], True)) for _ in range(50)} == {0, 1}


class Painted(gym.Env):
    """The picture shows the number of the environment's frame."""

    metadata = {"render_modes": ["rgb_array"]}
    observation_space, action_space = gs.Box(-1, 1, (2,)), gs.Discrete(2)

    def __init__(self, render_mode=None):
        self.render_mode, self.t = render_mode, 0

    def reset(self, *, seed=None, options=None):
        self.t = 0
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.t += 1
        return np.zeros(2, np.float32), 1.0, False, self.t == 10, {}

    def render(self):
        return np.full((96, 128, 3), self.t, np.uint8)


def same_step(num_envs, **kwargs):
    """Vector environment that returns the first observation of an episode in place of the last."""
    make, mode = lambda: Painted(**kwargs), gym.vector.AutoresetMode.SAME_STEP
    return gym.vector.SyncVectorEnv([make] * num_envs, autoreset_mode=mode)


gym.register("TestPainted-v0", entry_point=Painted)
gym.register("TestSameStep-v0", entry_point=Painted, vector_entry_point=same_step)


def test_pixels(tmp_path):
    """Group D: with --pixels the rendered picture, resized, is all that an agent observes."""
    args = tiny(env_id="TestPainted-v0", pixels=True, action_repeat=2, run_dir=str(tmp_path))
    envs = dreamer_v3.Environments(args, 2, seed=1)
    assert envs.spaces == Spaces((("obs", 3),), (), (2,), 2)
    envs.reset()
    for t in range(4):
        assert (envs.entry["obs"] == np.full((2, 64, 64, 3), 2 * t)).all()
        envs.step(np.eye(2, dtype=np.float32))
    assert short_run(dreamer_v3, tmp_path, **vars(args)).exists()


def test_vector_environment_that_is_refused():
    """Group D: the advice works: an environment whose own vector version is refused, one by one."""
    args = tiny(env_id="TestSameStep-v0")
    with pytest.raises(UserError, match="NEXT_STEP mode: try --async-envs"):
        dreamer_v3.Environments(args, 1, seed=1)
    dreamer_v3.Environments(replace(args, async_envs=True), 1, seed=1).close()


def test_command_line_trains_and_evaluates(tmp_path):
    """Group E: train an environment of the current folder, evaluate its run, make a mistake."""
    (tmp_path / "my_module.py").write_text(page_blocks("python", ENVIRONMENTS)[0])
    process = command(*flags(tiny(env_id="my_module:MyEnv-v0", run_dir="runs")), cwd=tmp_path)
    out, err = process.communicate()
    assert process.returncode == 0, err
    (path,) = tmp_path.glob("runs/*/checkpoint.pt")
    for run in (path, path.parent):
        words = "--evaluate", str(run), "--eval-episodes", "2", "--no-cuda"
        process = command(*words, "--eval-sample", "--seed", "5", cwd=tmp_path)
        out, err = process.communicate()
        assert process.returncode == 0, err
        assert "my_module:MyEnv-v0 after 40 agent steps: mean" in out and "2 episodes" in out
    process = command("--env-id", "NoSuchGame-v3", "--no-cuda", "--run-dir", str(tmp_path / "new"))
    out, err = process.communicate()
    assert process.returncode == 2 and "NoSuchGame" in err and "Traceback" not in err
    assert not (tmp_path / "new").exists()


CASE = """--env-id TestSpaces-v0 --env-kwargs '{{"case": "{}"}}'"""
# Wrong invocations: name -> (a word of the answer, flags); `+` stands for a small CartPole.
ERRORS = {
    "unknown environment": ("NoSuchGame", "--env-id NoSuchGame-v3"),
    "near match": ("CartPole", "--env-id CartPoel-v1"),
    "near match in Atari": ("MsPacman", "--env-id ALE/MsPackman-v5"),
    "old version": ("version", "--env-id CartPole-v7"),
    "no environment": ("--env-id", "--env-id ''"),
    "unknown module": ("no_such_module", "--env-id no_such_module:Game-v0"),
    "malformed id": ("--env-id", "--env-id ///"),
    "text observations": ("nothing to observe", CASE.format("text")),
    "tuple of actions": ("Tuple", CASE.format("tuple_action")),
    "not JSON": ("--env-kwargs", "+ --env-kwargs '{frameskip: 4}'"),
    "not an object": ("--env-kwargs", "+ --env-kwargs [1]"),
    "empty options": ("--env-kwargs", "+ --env-kwargs ''"),
    "wrong option": ("no_such_option", """+ --env-kwargs '{"no_such_option": 1}'"""),
    "rate as a word": ("--learning-rate", "--learning-rate fast"),
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
    "evaluation of other settings": ("--num-envs", "--evaluate folder --num-envs 3"),
    "unknown preset": ("--preset", "--preset pong"),
    "frames of none": ("stack_num", """--env-id ALE/Pong-v5 --env-kwargs '{"stack_num": 0}'"""),
    "frames as a word": ("Pong", """--env-id ALE/Pong-v5 --env-kwargs '{"stack_num": "4"}'"""),
    "too large": ("lower", "+ --units 99999999999"),
    "no room": (
        "GB for the replay",
        "+ --run-dir folder --buffer-size 99999999999 --total-timesteps 99999999999",
    ),
    "deprecated": ("Taxi-v4", "--env-id Taxi-v3"),
    "no picture to render": ("render", "--pixels " + CASE.format("vector")),
    "first step fails": ("simulator broke", "--env-id TestBroken-v0 --run-dir new"),
    "no checkpoint": ("no_such_checkpoint.pt", "--evaluate no_such_checkpoint.pt"),
    "evaluate a folder": ("folder", "--evaluate folder"),
    "evaluate a text": ("file", "--evaluate file"),
    "evaluate nothing": ("--evaluate", "--evaluate ''"),
    "evaluate and resume": ("--evaluate and --resume", "--evaluate x.pt --resume folder"),
    "resume nothing": ("--resume", "--resume ''"),
    "resume no folder": ("no_such_run", "--resume no_such_run"),
    "resume an empty folder": ("folder", "--resume folder"),
    "resume a file": ("file", "--resume file"),
    "run folder is a file": ("file", "+ --run-dir file"),
    "run folder in a file": ("file", "+ --run-dir file/runs"),
    "run folder in /proc": ("/proc/no", "+ --run-dir /proc/no"),
}
# Numbers that cannot work; the answer names the flag.
NUMBERS = """
    --deter 100, --blocks 7, --classes 1, --classes 300, --units 0, --depth -4, --train-ratio -1,
    --train-ratio inf, --learning-rate nan, --learning-rate -1e-4, --gamma 1.01, --gamma -0.5,
    --unimix 1.5, --tau 2, --beta2 1, --beta-rep -0.1, --laprop-eps 0, --num-envs 0,
    --total-timesteps 0, --imag-horizon 0, --batch-length 1, --batch-size 0, --buffer-size 10,
    --seed -1, --seed 1000000001, --total-timesteps 1000000000000, --save-every 0, --eval-every -5,
    --report-every -1, --action-repeat 0, --return-lambda 1.5, --actor-unimix 2, --return-rate 2,
    --beta1 1, --log-every 0, --stoch 0, --blocks 0, --deter 0, --hidden 0, --buffer-size 1087
"""
ERRORS |= {case: (case.split()[0], f"+ {case}") for case in map(str.strip, NUMBERS.split(","))}


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


def test_learning(tmp_path):
    """Group F: memory and delayed reward; 90% of the maximum. No policy without memory has 70%."""
    network = dict(deter=128, hidden=64, units=64, classes=4, stoch=4, blocks=4)
    schedule = dict(batch_size=16, batch_length=16, train_ratio=32.0, num_envs=16)
    behaviour = dict(imag_horizon=5, ent_coef=0.1, warmup_updates=100)
    length = dict(total_timesteps=6400, buffer_size=10_000, eval_episodes=64)
    settings = network | schedule | behaviour | length
    returns = dreamer_v3.main(tiny(env_id="TestCue-v0", run_dir=str(tmp_path), **settings))
    assert len(returns) == 64 and returns.mean() >= 0.9 * 1.5


# ---- G. Documents: docs/test_pages.py; here is what other groups need of it -------------------


def page_blocks(language, page=README):
    """A page's blocks of code in a language."""
    return re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)


def parse_words(monkeypatch, *words):
    """Args of a command line."""
    monkeypatch.setattr(sys, "argv", ["dreamer_v3.py", *words])
    return dreamer_v3.parse()


def load_module(path, monkeypatch):
    """Import a file under a name of its own."""
    spec = importlib.util.spec_from_file_location(f"copy_{path.parent.name}_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


# ---- H. The tests bite ---------------------------------------------------------------------------
# Every function here is a mistake that is put into dreamer_v3; the check named beside it must fail.


MISTAKES = {}  # name -> (what makes it, the check that must fail)


def mistake(where, check, name=None):
    """Decorates what a function of dreamer_v3, or a `Class.method`, does instead.

    It is called with the original function, and with the arguments.
    """

    def decorate(mutated):
        *owner, target = where.split(".")
        owner = getattr(dreamer_v3, *owner) if owner else dreamer_v3
        key = f"{name or mutated.__name__}-{check.__name__[6:]}"
        MISTAKES[key] = lambda patch: wrap(patch, owner, target, mutated), check
        return mutated

    return decorate


@mistake("twohot_loss", check_twohot_loss)
def twohot_in_symlog_space(original, logits, target, bins):
    """DreamerV3 of 2023: weights linear in symlog space."""
    return original(logits, dreamer_v3.symlog(target), dreamer_v3.symlog(bins))


@mistake("categorical_kl", check_kl)
def kl_per_variable(original, log_p, log_q):
    """Free nats for every variable before the sum."""
    return (log_p.exp() * (log_p - log_q)).sum(-1).clamp(min=1.0).sum(-1)


@mistake("sample_one_hot", check_straight_through)
def gumbel(original, probs, uniform):
    """A relaxed sample instead of straight-through."""
    return ((probs.log() - torch.empty_like(probs).exponential_().log()) / 0.5).softmax(-1)


@mistake("RSSM.observe", check_observe)
@mistake("RSSM.observe", check_act_equals_observe)
def no_reset(original, self, embed, prev_action, is_first, *state):
    """The state survives the start of an episode."""
    return original(self, embed, prev_action, torch.zeros_like(is_first), *state)


@mistake("RSSM.observe", check_observe)
def action_survives(original, self, embed, prev_action, is_first, deter, stoch):
    """At the start of an episode the action is class 0 instead of a zero vector."""
    action = torch.where(is_first[..., None], torch.eye(prev_action.shape[-1])[0], prev_action)
    result, never = [], torch.zeros_like(is_first[:, :1])
    for t in range(is_first.shape[1]):
        now, keep = slice(t, t + 1), 1 - is_first[:, t, None].to(deter.dtype)
        state = deter * keep, stoch * keep[..., None]
        step = original(self, embed[:, now], action[:, now], never, *state)
        deter, stoch = step[0][:, 0], step[1][:, 0]
        result.append(step)
    return [torch.cat(x, 1) for x in zip(*result, strict=True)]


@mistake("imagine", check_cell)
def no_update_bias(original, model, *args):
    """sigmoid(update) instead of sigmoid(update - 1)."""
    rssm = model.rssm
    shift = torch.zeros(rssm.blocks, 3, rssm.deter_dim // rssm.blocks)
    shift[:, 2] = 1
    rssm.gru.bias.data += shift.flatten()
    result = original(model, *args)
    rssm.gru.bias.data -= shift.flatten()
    return result


@mistake("RSSM.observe", check_observe)
def cut_in_time(original, self, embed, prev_action, is_first, deter, stoch):
    """Every step of `observe` starts from a detached state."""
    result = []
    for t in range(is_first.shape[1]):
        now = slice(t, t + 1)
        step = original(self, embed[:, now], prev_action[:, now], is_first[:, now], deter, stoch)
        deter, stoch = step[0][:, 0].detach(), step[1][:, 0].detach()
        result.append(step)
    return [torch.cat(x, 1) for x in zip(*result, strict=True)]


def max_pool(x):
    """max_pool2d gives the whole gradient to one of equal entries."""
    return F.max_pool2d(x.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)


@mistake("actor_critic_loss", check_actor_critic)
def entropy_outside(original, model, feat, action, args):
    """The entropy bonus without the trajectory's weight."""
    losses, *rest = original(model, feat, action, args)
    weight = torch.sigmoid(model.cont(feat)).squeeze(-1).cumprod(1)[:, :-1].detach()
    bonus = args.ent_coef * model.actor(feat[:, :-1]).entropy()
    return {**losses, "actor": losses["actor"] + (weight - 1) * bonus}, *rest


@mistake("actor_critic_loss", check_actor_critic)
def weight_without_start(original, model, feat, action, args):
    """The weight of the first step is 1 instead of its own continue probability."""
    losses, *rest = original(model, feat, action, args)
    start = torch.sigmoid(model.cont(feat)).detach()[:, 0]
    return {name: loss / start for name, loss in losses.items()}, *rest


@mistake("actor_critic_loss", check_actor_critic)
def slow_critic_as_target(original, model, feat, action, args):
    """Returns bootstrapped with the slow critic."""
    slow = dreamer_v3.twohot_mean(model.slow_critic(feat), model.bins)
    mutated = lambda f, reward, value, *rest: f(reward, slow, *rest)
    with pytest.MonkeyPatch.context() as patch:
        wrap(patch, dreamer_v3, "lambda_return", mutated)
        return original(model, feat, action, args)


@mistake("actor_critic_loss", check_actor_critic)
def returns_not_limited(original, model, feat, action, args):
    """Small return ranges are blown up to 1: advantages grow by 1 / range."""
    losses, returns, *rest = original(model, feat, action, args)
    scale = (model.return_range[1] - model.return_range[0]).clamp(max=1)
    return {**losses, "actor": losses["actor"] / scale}, returns, *rest


@mistake("LaProp.step", check_optimizer)
def without_clipping(original, self, grads):
    """No adaptive gradient clipping."""
    self.args = replace(self.args, agc_clip=0.0)
    return original(self, grads)


@mistake("LaProp.step", check_optimizer)
def clip_of_nothing(original, self, grads):
    """--agc-clip 0 is a limit of 0: nothing moves."""
    norm = torch.stack([g.norm() for g in grads]).norm()
    metrics = original(self, grads if self.args.agc_clip else [0 * g for g in grads])
    return metrics | {"losses/grad_norm": norm}


@mistake("LaProp.step", check_optimizer)
def adam(original, self, grads):
    """Adam: the momentum is taken before the normalisation."""
    args, n = self.args, int(self.updates) + 1
    for p, g, nu, mu in zip(self.params, grads, self.nu, self.mu, strict=True):
        limit = args.agc_clip * p.detach().norm().clamp(min=1e-3)
        g = g / (g.norm() / limit).clamp(min=1)
        nu.lerp_(g * g, 1 - args.beta2)
        mu.lerp_(g, 1 - args.beta1)
        lr = args.learning_rate * min(1, (n - 1) / args.warmup_updates)
        p.data -= lr * (mu / (1 - args.beta1**n)) / ((nu / (1 - args.beta2**n)).sqrt() + 1e-20)
    self.updates += 1
    norm = torch.stack([g.norm() for g in grads]).norm()
    return {"losses/grad_norm": norm, "charts/lr": torch.tensor(lr)}


@mistake("Replay.add", check_alignment)
def stored_late(original, self, entry):
    """The replay stores the reward of the step before."""
    late = getattr(self, "late_reward", np.zeros_like(entry["reward"]))
    self.late_reward = entry["reward"]
    return original(self, entry | {"reward": late})


@mistake("Replay.add", check_alignment)
def action_at_the_end(original, self, entry):
    """The action of an episode's last step is stored though nothing was chosen."""
    action = entry["action"].copy()
    action[entry["is_last"], 0] = 1
    return original(self, entry | {"action": action})


@mistake("Replay.__len__", check_uniform)
def window_too_short(original, self):
    """Start positions whose sequences run over the write pointer."""
    return original(self) + self.num_envs * (self.window - 1)


@mistake("Replay.write_latents", check_alignment)
def latents_shifted(original, self, index, deter, stoch):
    """Latent states written one step early."""
    rows, envs = index
    self.data["deter"][rows[:, :-1], envs] = deter
    self.data["stoch"][rows[:, :-1], envs] = stoch


@mistake("Replay.sample", check_forced_last)
def end_not_forced(original, self):
    """An abandoned episode has no end."""
    batch, (rows, envs) = original(self)
    return batch | {"is_last": self.data["is_last"][rows[:, 1:], envs]}, (rows, envs)


@mistake("Replay.sample", check_online_queue)
def newest_only(original, self):
    """No online queue: uniform draws only."""
    self.online = self.steps // self.window * self.num_envs
    return original(self)


@mistake("Replay.sample", check_online_queue)
def window_used_twice(original, self):
    """The online queue does not forget what it gave."""
    online = self.online
    batch = original(self)
    self.online = online
    return batch


@mistake("Encoder.forward", check_encoder)
def image_left_out(original, self, obs):
    """Of several images the encoder sees the first one only."""
    (first, _), *others = self.spaces.images
    return original(self, obs | {name: torch.zeros_like(obs[name]) for name, _ in others})


@mistake("Decoder.forward", check_decoder)
def first_image_twice(original, self, *state):
    """Every image is decoded as the first one."""
    recon = original(self, *state)
    return recon | {"right": recon["left"].expand_as(recon["right"])}


@mistake("Agent.train_step", check_alignment)
def action_not_shifted(original, self, batch):
    """The RSSM gets the action chosen at a step instead of the one before it."""
    return original(self, batch | {"prev_action": batch["prev_action"].roll(-1, 1)})


# Small ones: name -> (where, the check, what is done instead).
SMALL = {
    "plain order": ("twohot_mean", check_twohot_mean,
        lambda f, x, bins: (x.softmax(-1) * bins).sum(-1)),
    "sum of another order": ("TwoHotLinear.forward", check_twohot_gradients,
        lambda f, self, x: torch.nn.functional.linear(x, self.weight, self.bias)),
    "no unimix": ("mixed_log_probs", check_kl, lambda f, x, unimix: f(x, 0.0)),
    "other way round": ("categorical_kl", check_kl, lambda f, p, q: f(q, p)),
    "no straight-through": ("sample_one_hot", check_straight_through,
        lambda f, p, uniform: f(p, uniform).detach() + 0 * p),
    "ties": ("MaxPool.apply", check_encoder, lambda f, x: max_pool(x)),
    "no symlog": ("symlog", check_encoder, lambda f, x: x),
    "reward shifted": ("lambda_return", check_actor_critic,
        lambda f, reward, *x: f(reward.roll(1, 1), *x)),
    "value not shifted": ("lambda_return", check_actor_critic,
        lambda f, reward, value, *x: f(reward, value.roll(1, 1), *x)),
    "discount twice": ("lambda_return", check_actor_critic,
        lambda f, reward, value, cont, *x: f(reward, value, cont * (1 - 1 / 333), *x)),
    "returns over cuts": ("lambda_return", check_replay_critic,
        lambda f, reward, value, cont, last, lam: f(reward, value, cont, 0 * last, lam)),
    "cut counts as end": ("lambda_return", check_replay_critic,
        lambda f, reward, value, cont, last, lam: f(reward, value, cont * (1 - last), last, lam)),
    "gradient in imagination": ("imagine", check_wiring, lambda f, *x: torch.enable_grad()(f)(*x)),
    "no gradient to the model": ("replay_critic_loss", check_wiring,
        lambda f, model, feat, *x: f(model, feat.detach(), *x)),
    "truncated is terminal": ("Replay.add", check_alignment,
        lambda f, self, entry: f(self, entry | {"is_terminal": entry["is_last"]})),
    "latents not refreshed": ("Replay.write_latents", check_alignment, lambda *_: None),
}  # fmt: skip
for name, (where, check, mutated) in SMALL.items():
    mistake(where, check, name)(mutated)


@pytest.mark.parametrize("name", MISTAKES)
def test_mutation(name, tmp_path, monkeypatch):
    """Group H: the check that guards against a mistake fails when it is made."""
    plant, check = MISTAKES[name]
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        run_check(check, tmp_path)


# ---- I. Speed: what is captured, what is measured ------------------------------------------------


class OnDevice(TorchDispatchMode):
    """Fails at an operation that takes a tensor of the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        assert all(x.device.type == "meta" for x in tensors), f"{func} takes a tensor of the host"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("spaces", [MIXED, CONTINUOUS], ids=["mixed", "continuous"])
def test_no_host_synchronisation(spaces, monkeypatch):
    """Group I: an update and an action neither read the device nor send anything to it.

    A tensor on "meta" has a shape and no values: item, tolist, cpu, a mask as index and `if` fail.
    """
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)  # unknown to "meta"
    agent = Agent(tiny(), spaces, "meta")
    batch = {name: x.to("meta") for name, x in make_batch(spaces, agent.args).items()}
    names = [name for name, *_ in spaces.images + spaces.vectors] + ["is_first"]
    obs = {name: batch[name][:, 0] for name in names}
    with OnDevice():
        agent.train_step(batch)
        agent.act(obs, agent.initial(3))


def fake_graph(patch, function, agent):
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
    graphed.train_step, calls = fake_graph(monkeypatch, graphed.train_step, graphed)
    for i in range(7):
        torch.manual_seed(i)
        batch = make_batch(VECTOR, plain.args)
        results = []
        for agent in (plain, graphed):
            torch.manual_seed(100 + i)
            results.append(agent.train_step({key: x.clone() for key, x in batch.items()}))
        for a, b in zip(*map(tree_leaves, results), strict=True):
            assert torch.equal(a, b)
    assert len(calls) == 4, "three calls to warm up, one to record"
    states = plain.state_dict(), graphed.state_dict()
    for a, b in zip(*map(tree_leaves, states), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("inside", [True, False])
def test_graph_that_fails(inside, monkeypatch):
    """Group I: one line says why a graph could not be recorded, and what to do.

    An error inside also breaks the end of the recording, which then has an error of its own.
    """
    calls = 0

    def function(x):
        nonlocal calls
        calls += 1
        assert gc.isenabled() == (calls < 4), "a graph freed while another is recorded spoils it"
        if inside and calls == 4:
            raise RuntimeError("operation not permitted\nCompile with TORCH_USE_CUDA_DSA")
        return 2 * x

    @contextlib.contextmanager
    def record(graph, stream):
        try:
            yield
        finally:
            raise RuntimeError("previous error" if inside else "operation not permitted\nadvice")

    graph, _ = fake_graph(monkeypatch, function, make_agent(VECTOR))
    monkeypatch.setattr(torch.cuda, "graph", record)
    for _ in range(3):
        assert graph(torch.ones(2)).tolist() == [2, 2]
    said = "cannot capture a CUDA graph: operation not permitted; try --no-cudagraphs"
    with pytest.raises(dreamer_v3.UserError) as error:
        graph(torch.ones(2))
    assert str(error.value) == said and not graph.graphs and gc.isenabled()


def test_graphs_of_actions(monkeypatch):
    """Group I: one graph for each number of environments and mode; results stay what they were."""
    agent = make_agent(VECTOR)
    act, calls = fake_graph(monkeypatch, agent.act, agent)
    batch = make_batch(VECTOR, agent.args, batch=4)
    for greedy, n in ((True, 2), (True, 4), (False, 2)):
        obs, carry = {key: batch[key][:n, 0] for key in ("a", "b", "is_first")}, agent.initial(n)
        for i in range(6):
            torch.manual_seed(i)
            expected = agent.act(obs, carry, greedy)
            torch.manual_seed(i)
            before = [x.clone() for x in carry]
            carry, old = act(obs, carry, greedy), carry
            assert all(torch.equal(a, b) for a, b in zip(carry, expected, strict=True))
            assert all(torch.equal(a, b) for a, b in zip(before, old, strict=True))
    assert len(act.graphs) == 3 and len(calls) == 12


def test_graphs_of_types(monkeypatch):
    """Group I: inputs of another type have a graph of their own, and are not rounded."""
    double, calls = fake_graph(monkeypatch, lambda x: 2 * x, make_agent(VECTOR))
    for i in range(6):
        for dtype in (torch.float32, torch.float64, torch.uint8):
            x = torch.full((3,), 7 + i / 3, dtype=dtype)
            result = double(x)
            assert result.dtype == dtype and torch.equal(result, 2 * x)
    assert len(double.graphs) == 3 and len(calls) == 12


def test_staging_overlaps_an_update(tmp_path, monkeypatch):
    """Group I: a batch is on its way before the update before it is waited for; its start is not.

    The states where the sequences start may be those that this update computes.
    """
    args = tiny(env_id="TestCounting-v0", run_dir=str(tmp_path), train_ratio=0)
    _, trainer, logger = dreamer_v3.open_run(args, *CPU)
    for _ in range(40):
        trainer.collect_and_train()
    calls, to_device, finish = [], dreamer_v3.to_device, trainer.finish_update
    spy = lambda arrays, device: (calls.append("deter" in arrays), to_device(arrays, device))[1]
    monkeypatch.setattr(dreamer_v3, "to_device", spy)
    trainer.finish_update = lambda: (calls.append("waits"), finish())
    for _ in range(2):
        trainer.train()
        assert calls == [False, "waits", True] and {"deter", "obs"} < set(trainer.batch)
        calls.clear()
    logger.close()


def test_graphs_end_before_their_communicator(tmp_path, monkeypatch):
    """Group I: a run leaves no captured graph, also when it fails: NCCL would wait for it."""
    agents = []

    class Graphed(dreamer_v3.Agent):
        def __init__(self, *args):
            super().__init__(*args)
            self.train_step = functools.partial(self.train_step)
            self.train_step.graphs = {"shapes": "a graph"}
            agents.append(self)

    monkeypatch.setattr(dreamer_v3, "Agent", Graphed)
    args = tiny(env_id="TestCounting-v0", run_dir=str(tmp_path), total_timesteps=10)
    dreamer_v3.main(args)
    odd = dict(env_id="TestOdd-v0", env_kwargs='{"fault": "raises"}', total_timesteps=40)
    with pytest.raises(UserError, match="simulator broke"):
        dreamer_v3.main(replace(args, **odd))
    assert [agent.train_step.graphs for agent in agents] == [{}, {}]


def test_gpu_of_an_agent(monkeypatch):
    """Group I: graphs are captured on the agent's GPU; there is one for each process."""

    class Reached(Exception):
        pass

    chosen, dreamer = [], lambda *args: (_ for _ in ()).throw(Reached)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(dreamer_v3, "Dreamer", dreamer)  # what comes after it needs a GPU
    for device in ("cuda", "cuda:1"):  # the first is that of the program, whatever it is
        with pytest.raises(Reached):
            Agent(tiny(), VECTOR, device)
    assert chosen == [torch.device("cuda:1")] and not torch.backends.cudnn.allow_tf32
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    capability = {"cuda:0": (7, 5), "cuda:1": (8, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda x: capability[str(x)])
    for rank, dtype in enumerate((torch.float32, torch.bfloat16)):
        monkeypatch.setattr(dreamer_v3, "LOCAL_RANK", rank)
        assert dreamer_v3.choose_device(Args()) == (torch.device(f"cuda:{rank}"), dtype)
    monkeypatch.setattr(dreamer_v3, "LOCAL_RANK", 2)
    with pytest.raises(UserError, match="more processes than GPUs"):
        dreamer_v3.choose_device(Args())
    assert dreamer_v3.choose_device(Args(cuda=False))[0] == torch.device("cpu")


@pytest.mark.parametrize(
    ("cpu", "dtype"),
    [
        ({"avx512_bf16": False}, torch.float32),
        ({"avx512_bf16": True, "cpu_name": "AMD EPYC"}, torch.bfloat16),
        ({"avx512_bf16": True}, torch.float32),
        ({"avx512_bf16": True, "cpu_name": "Intel Xeon", "amx_bf16": False}, torch.float32),
        ({"avx512_bf16": True, "cpu_name": "Intel Xeon", "amx_bf16": True}, torch.bfloat16),
        ({"neon": True}, torch.float32),
    ],
)
def test_dtype_of_a_cpu(cpu, dtype, monkeypatch):
    """Group I: on a CPU, auto is bfloat16 where its products are faster than those of float32."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cpu)
    device = torch.device("cpu")
    assert dreamer_v3.choose_device(Args(cuda=False)) == (device, dtype)
    for name in ("float32", "bfloat16"):  # asked for, whatever the CPU has
        chosen = dreamer_v3.choose_device(Args(cuda=False, dtype=name))
        assert chosen == (device, getattr(torch, name))


def test_deterministic_kernels(tmp_path, monkeypatch):
    """Group I: --torch-deterministic asks for them, and gives cuBLAS the memory that they need."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # to be as it was after the test
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    args = tiny(env_id="TestCounting-v0", total_timesteps=4)
    try:
        for wanted in (False, True):
            folder = str(tmp_path / str(wanted))
            dreamer_v3.main(replace(args, run_dir=folder, torch_deterministic=wanted))
            assert torch.are_deterministic_algorithms_enabled() == wanted
            memory = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
            assert memory == (":4096:8" if wanted else None)
            torch.use_deterministic_algorithms(not wanted)
            (run,) = Path(folder).iterdir()
            words = dict(eval_episodes=1, cuda=False, torch_deterministic=wanted)
            dreamer_v3.main(Args(evaluate=str(run), **words))
            assert torch.are_deterministic_algorithms_enabled() == wanted
    finally:
        torch.use_deterministic_algorithms(False)


# ---- J. Runs that survive ------------------------------------------------------------------------

slow = pytest.mark.skipif(not os.environ.get("SLOW"), reason="takes long: set SLOW=1")
CPU = torch.device("cpu"), torch.float32


def read_checkpoint(folder):
    """The checkpoint of a run."""
    return dreamer_v3.load_checkpoint(folder / "checkpoint.pt")


def train_short(tmp_path, **settings):
    """A short run in the counting environment: its folder and its Args."""
    args = tiny(**(dict(env_id="TestCounting-v0", run_dir=str(tmp_path)) | settings))
    dreamer_v3.main(args)
    (folder,) = tmp_path.iterdir()
    return folder, args


def start(*arguments, code="dreamer_v3.cli()", limit=None, group=False, **variables):
    """Start dreamer_v3.py, or other code, in a new process that has this file's environments.

    Files may not become larger than `limit`. `group`: signals can be sent to it and its children.
    variables: of its environment.
    """
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | variables
    env["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    full = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    code = f"import sys, dreamer_v3, {Path(__file__).stem}\n{code}"
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], env=env, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, preexec_fn=full if limit else None, start_new_session=group,
    )  # fmt: skip


def failed(process):
    """The one line in which a process says what is wrong."""
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2 and len(err.strip().splitlines()) == 1, err
    assert err.startswith("dreamer_v3.py: error: ")
    return err


def goes_on(folder, step, total):
    """Resume a run in a new process; it must begin at this step and become complete."""
    process = start("--resume", str(folder), "--total-timesteps", str(total))
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and f"resumed after step {step:,}\n" in out, err
    assert not err and read_checkpoint(folder)["step"] == total


CONTINUE = """
from dataclasses import replace
from pathlib import Path
import torch

torch.set_num_threads(1)
args = dreamer_v3.load_checkpoint(Path(sys.argv[1]) / "checkpoint.pt")["args"]
args = replace(args, resume=sys.argv[1])
folder, trainer, logger = dreamer_v3.open_run(args, *dreamer_v3.choose_device(args))
for _ in range(4):
    trainer.train()
dreamer_v3.save_checkpoint(folder / "checkpoint.pt", trainer, logger)
"""


@pytest.mark.parametrize("buffer_size", [1000, 36])
def test_resume_is_exact(buffer_size, tmp_path):
    """Group J: N + M updates are N updates, a new process, and M updates, bit for bit."""
    args = tiny(env_id="TestCounting-v0", num_envs=3, buffer_size=buffer_size, dtype="float32")
    args = replace(args, run_dir=str(tmp_path / "run"), total_timesteps=200)
    folder, trainer, logger = dreamer_v3.open_run(args, *CPU)
    for _ in range(30):
        trainer.collect_and_train()
    assert trainer.updates > 5
    assert (trainer.replay.steps > trainer.replay.length) == (buffer_size == 36), "the ring wraps"
    dreamer_v3.save_checkpoint(folder / "checkpoint.pt", trainer, logger)
    other = shutil.copytree(folder, tmp_path / "other")
    for _ in range(4):
        trainer.train()
    dreamer_v3.save_checkpoint(folder / "checkpoint.pt", trainer, logger)
    process = start(str(other), code=CONTINUE)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    first, second = read_checkpoint(folder), read_checkpoint(other)
    same_state(first, second)
    assert (folder / "replay.bin").read_bytes() == (other / "replay.bin").read_bytes()


def same_state(first, second):
    """Require that two checkpoints are the same, bit for bit."""
    assert first.keys() == second.keys() >= {"agent", "random", "replay", "credit", "updates"}
    for state in (first, second):
        del state["args"], state["size"], state["seconds"], state["folder"]
    for a, b in zip(tree_leaves(first), tree_leaves(second), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_resume_continues(tmp_path):
    """Group J: a run in two parts has one set of metrics and the updates of its steps."""
    folder, args = train_short(tmp_path, log_every=10, save_every=20, total_timesteps=70)
    first, before = read_checkpoint(folder), read_metrics(folder)
    with open(folder / "metrics.jsonl", "ab") as file:  # what a killed run, or somebody, may leave
        file.write(b'{"step": 75, "charts/updates": 99}\n\xff\xfe\n3\n{"step": 8')
    dreamer_v3.main(replace(args, resume=str(folder), total_timesteps=150))
    last = read_checkpoint(folder)
    assert (first["step"], last["step"]) == (70, 150)
    assert last["updates"] - first["updates"] == 80 * 2 / 8  # train_ratio / (B T) for each step
    lines = read_metrics(folder)
    assert lines[: len(before)] == before
    logged = [line["step"] for line in lines if "charts/updates" in line]
    assert logged == list(range(logged[0], 151, 10)) and logged[0] <= 20
    assert [x["step"] for x in lines] == sorted(x["step"] for x in lines)
    assert [x["time"] for x in lines] == sorted(x["time"] for x in lines)


def test_longer_run(tmp_path):
    """Group J: with more --total-timesteps the file of the replay grows, and its content stays."""
    folder, args = train_short(tmp_path, num_envs=2, total_timesteps=40)
    before = (folder / "replay.bin").read_bytes()
    args = replace(args, resume=str(folder), total_timesteps=100)
    _, trainer, logger = dreamer_v3.open_run(args, *CPU)
    seeds = trainer.envs.entry["obs"][:, 0].tolist()
    assert seeds == [args.seed + 100_040, args.seed + 100_041], "not the episodes of the start"
    after, replay = (folder / "replay.bin").read_bytes(), trainer.replay
    assert after[: len(before)] == before and len(after) * 21 == len(before) * 51
    assert (replay.steps, replay.oldest, len(replay)) == (20, 0, 2 * (20 - 4))
    logger.close()
    dreamer_v3.main(args)
    assert read_checkpoint(folder)["step"] == 100


def test_shorter_run(tmp_path):
    """Group J: with fewer --total-timesteps than it has done, a run is complete."""
    folder, args = train_short(tmp_path, total_timesteps=40)
    dreamer_v3.main(replace(args, resume=str(folder), total_timesteps=30))
    assert read_checkpoint(folder)["step"] == 40
    args = replace(args, resume=str(folder), total_timesteps=60)
    _, trainer, logger = dreamer_v3.open_run(args, *CPU)
    logger.close()
    assert len(trainer.replay) == 40 - 4, "nothing is lost"


@pytest.mark.parametrize("kept, lost", [(3, 4), (14, 6), (30, 9), (30, 11), (30, 40)])
def test_steps_after_the_checkpoint_are_dropped(kept, lost, tmp_path):
    """Group J: what later steps overwrote in the ring is not read, before and after new steps."""
    replay = fill(make_replay(11, 2, tmp_path), kept)
    online = replay.online
    fill(replay, lost)
    resumed = make_replay(11, 2, tmp_path, kept, online)
    oldest = min(max(0, kept + lost - 11), kept)
    for step in range(kept, kept + 15):
        assert len(resumed) == 2 * max(0, min(step - oldest, 11) - 3)
        if len(resumed):
            starts = {start for _ in range(20) for _, start in draw(resumed)}
            assert min(starts) >= max(oldest, step - 11)
        fill(resumed, 1)
        if step == kept + 5:  # a second resume, in the middle of what was overwritten
            resumed = make_replay(11, 2, tmp_path, step + 1, resumed.online)
    assert len(resumed) == 2 * 8


def zeros(path):
    """Overwrite a file with zeros."""
    path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize("damage", [os.remove, lambda path: os.truncate(path, 1000), zeros])
def test_replay_must_be_whole(damage, tmp_path):
    """Group J: a missing, a short and a wrong file of the replay are named; the rest stays."""
    folder, args = train_short(tmp_path)
    damage(folder / "replay.bin")
    content = lambda: {path.name: path.read_bytes() for path in folder.iterdir()}
    before = content()
    with pytest.raises(UserError, match="replay.bin is (missing|damaged)"):
        dreamer_v3.main(replace(args, resume=str(folder)))
    assert content() == before


# Flags that a resumed run may have otherwise (and --track, --capture-video, tested elsewhere).
FREE = dict(
    total_timesteps=60, eval_every=7, eval_episodes=2, eval_sample=True, log_every=3, save_every=11,
    report_every=0, wandb_project_name="b", wandb_entity="b", cuda=True, dtype="bfloat16",
    compile=True, cudagraphs=False, torch_deterministic=True, async_envs=True, run_dir="elsewhere",
)  # fmt: skip


def test_resume_refuses_changes(tmp_path, monkeypatch):
    """Group J: what a run is made of stays; each refusal names the flag. The rest may change."""
    monkeypatch.chdir(tmp_path)
    folder, args = train_short(tmp_path, eval_episodes=1)
    args, lines = replace(args, resume=str(folder)), read_metrics(folder)
    assert dreamer_v3.main(args) is None, "a complete run has nothing to do"
    assert read_metrics(folder) == lines
    args.total_timesteps = 60
    other = dict(preset="cpu", exp_name="b", env_id="b", env_kwargs="[]", size="12m")
    other |= dict(pixels=True, warmup_updates=7)
    for name in vars(args).keys() - {*FREE, "resume", "evaluate", "track", "capture_video"}:
        old = getattr(args, name)
        new = other.get(name) or (old / 2 if isinstance(old, float) else old * 2)
        with pytest.raises(UserError, match=f"--{name.replace('_', '-')} is {old} in this run"):
            dreamer_v3.main(replace(args, **{name: new}))
    with monkeypatch.context() as patch:
        patch.setattr(Counting, "action_space", gs.Discrete(4))
        with pytest.raises(UserError, match="spaces"):
            dreamer_v3.main(args)
    assert read_metrics(folder) == lines
    monkeypatch.setattr(Agent, "compile", lambda agent: None)  # takes long
    dreamer_v3.main(replace(args, **FREE))
    checkpoint = read_checkpoint(folder)
    assert checkpoint["step"] == 60 and vars(checkpoint["args"]).items() >= FREE.items()
    assert list(tmp_path.iterdir()) == [folder]


def broken(obs):
    """What a simulator may do."""
    raise RuntimeError("the simulator broke\nin two lines")


# What goes wrong: a function from a good observation to a bad one and a reward; what is said.
FAULTS = {
    "raises": (broken, "RuntimeError: the simulator broke"),
    "exits": (lambda obs: sys.exit(3), "(SystemExit: 3|EOFError|ConnectionResetError)"),
    "missing": (lambda obs: ({"b": 0}, 1.0), "KeyError: .*'a'"),
    "nan": (
        lambda obs: (obs | {"a": np.float32([0, np.nan])}, 1.0),
        "ValueError: obs/a is not finite",
    ),
    "shape": (lambda obs: (obs | {"a": np.zeros(3)}, 1.0), "ValueError: .*(shape|broadcast)"),
    "dtype": (lambda obs: (obs | {"b": 0.5}, 1.0), r"\w*Error: .*float64"),
    "range": (lambda obs: (obs | {"b": 3}, 1.0), r"ValueError: .*3.* is not in Discrete\(3\)"),
    "infinite reward": (
        lambda obs: (obs, np.inf),
        "ValueError: reward is not finite",
    ),
    "reward array": (lambda obs: (obs, np.zeros(2)), r"\w*Error: "),
}


class Odd(gym.Env):
    """Episodes of 5 steps, or of 1, or without end; does one thing wrong at its 20th step."""

    action_space = gs.Discrete(2)

    def __init__(self, fault="", length=5, width=2):
        self.fault = fault or os.environ.get("FAULT", "")
        self.length, self.t = length, 0
        a = gs.Box(-9, 9, (width,), np.float32)
        self.observation_space = gs.Dict({"a": a, "b": gs.Discrete(3)})

    def observe(self):
        return {"a": np.zeros(self.observation_space["a"].shape, np.float32), "b": 0}

    def reset(self, *, seed=None, options=None):
        return self.observe(), {}

    def step(self, action):
        self.t += 1
        obs, reward = self.observe(), 1.0
        if self.t == 20 and self.fault == "stuck":
            time.sleep(1000)
        elif self.t == 20 and self.fault:
            obs, reward = FAULTS[self.fault][0](obs)
        return obs, reward, False, self.length > 0 and self.t % self.length == 0, {}


class Broken(Odd):
    """Fails at its first step."""

    def step(self, action):
        broken(None)


gym.register("TestOdd-v0", entry_point=Odd)
gym.register("TestBroken-v0", entry_point=Broken)


def odd_args(tmp_path, settings=None, **kwargs):
    """Args of a run in the odd environment, made with these arguments."""
    odd = dict(env_id="TestOdd-v0", env_kwargs=json.dumps(kwargs), run_dir=str(tmp_path))
    return tiny(**(odd | (settings or {})))


@pytest.mark.parametrize("async_envs", [False, True])
@pytest.mark.parametrize("fault", FAULTS)
def test_environment_faults(fault, async_envs, tmp_path):
    """Group J: one error says what failed and when; the run can be resumed."""
    settings = dict(num_envs=2, async_envs=async_envs, total_timesteps=200)
    args = odd_args(tmp_path, settings, fault=fault)
    # 20 steps of its own, and 3 that reset.
    match = "^the environments failed at step 23: " + FAULTS[fault][1]
    for failure in (1, 2):
        with pytest.raises(UserError, match=match):
            dreamer_v3.main(args)
        (folder,) = tmp_path.iterdir()
        assert read_checkpoint(folder)["step"] == 44 * failure, "without the step that failed"
        args = replace(args, resume=str(folder))


def test_fault_on_the_command_line(tmp_path):
    """Group J: a fault is one line and exit status 2, whatever the environment says."""
    args = odd_args(tmp_path, fault="raises")
    assert "RuntimeError: the simulator broke in two lines" in failed(start(*flags(args)))


def test_a_start_that_fails(tmp_path, monkeypatch):
    """Group J: it leaves no folder, whether a first observation is wrong or the process ends."""
    nothing, closed = {"a": np.full(2, np.nan, np.float32), "b": 0}, []
    close_envs = lambda original, envs: closed.append(envs) or original(envs)
    wrap(monkeypatch, dreamer_v3.Environments, "close", close_envs)
    with monkeypatch.context() as patch:
        patch.setattr(Odd, "observe", lambda self: nothing)
        with pytest.raises(UserError, match="step 0: ValueError: obs/a is not finite"):
            dreamer_v3.main(odd_args(tmp_path))
    monkeypatch.setattr(dreamer_v3, "save_checkpoint", lambda *args: broken(None))
    for folder in (tmp_path, tmp_path / "new"):
        with pytest.raises(RuntimeError):
            dreamer_v3.main(odd_args(folder))
    assert not list(tmp_path.rglob("*TestOdd*")) and len(closed) == 5  # of which 3 had tried it


def test_what_is_due():
    """Group C: every multiple is met once, also where environments step over it; never at 0."""
    for every, n in itertools.product((1, 3, 4, 10), (1, 3, 4, 7)):
        for step in range(0, 200, n):
            passed = [x for x in range(step + 1, step + n + 1) if x % every == 0]
            assert dreamer_v3.is_due(every, step, step + n) == bool(passed)
            assert not dreamer_v3.is_due(every, step, step)  # a run that has just been resumed
    assert not any(dreamer_v3.is_due(0, step, step + 1) for step in range(9))


def test_results_of_other_types():
    """Group D: a vector environment may give lists, integers, and arrays (n, 1)."""
    envs = make_environments("vector", 2)
    obs = envs.envs.observation_space.sample()
    envs.envs.step = lambda action: (obs, [1, 2], np.array([[0], [1]]), (1, 0), {})
    assert [x[:2] for x in envs.step(np.eye(2, envs.spaces.action_width))] == [(0, 1), (1, 2)]
    for name, expected in dict(reward=[1, 2], is_last=[1, 1], is_terminal=[0, 1]).items():
        x = envs.entry[name]
        assert x.tolist() == expected and x.dtype == (np.float32 if name == "reward" else bool)
    envs.step(np.eye(2, envs.spaces.action_width))
    assert envs.entry["is_first"].all() and not envs.entry["reward"].any(), "none at a reset"


@pytest.mark.parametrize("async_envs", [False, True])
def test_episodes_of_one_step(async_envs, tmp_path):
    """Group J: an environment that ends at its first step trains and is evaluated."""
    settings = dict(eval_episodes=3, async_envs=async_envs)
    args = odd_args(tmp_path, settings, length=1)
    assert list(dreamer_v3.main(args)) == [1, 1, 1]
    (folder,) = tmp_path.iterdir()
    _, trainer, logger = dreamer_v3.open_run(replace(args, resume=str(folder)), *CPU)
    trainer.envs.close()
    logger.close()
    stored = [trainer.replay.data[name][:40, 0].tolist() for name in ("is_first", "is_last")]
    assert stored == [[True, False] * 20, [False, True] * 20]


def test_episodes_without_end(tmp_path, monkeypatch):
    """Group J: after `longest_episode` steps an episode is counted as it stands, and goes on."""
    monkeypatch.setattr(dreamer_v3.Environments, "longest_episode", 15)
    assert list(dreamer_v3.main(odd_args(tmp_path, dict(eval_episodes=9), length=0))) == [15] * 9
    (folder,) = tmp_path.iterdir()
    names = "step", "charts/episodic_return", "charts/episodic_length"
    episodes = [[x[k] for k in names] for x in read_metrics(folder) if names[1] in x]
    assert episodes == [[15, 15, 15], [30, 15, 15]]


def test_non_finite_updates(tmp_path, monkeypatch):
    """Group J: the losses that failed are named, and the last good checkpoint stays."""
    original, calls = dreamer_v3.categorical_kl, []

    def broken(*args):
        calls.append(0)
        return original(*args) * (math.nan if len(calls) == 12 else 1)  # two calls an update

    monkeypatch.setattr(dreamer_v3, "categorical_kl", broken)
    args = tiny(env_id="TestCounting-v0", run_dir=str(tmp_path), save_every=10)
    match = "^update 6 was not finite: losses/rep, losses/total, losses/grad_norm$"
    with pytest.raises(UserError, match=match):
        dreamer_v3.main(args)
    (folder,) = tmp_path.iterdir()
    state = read_checkpoint(folder)
    assert 2 <= state["updates"] <= 5
    tensors = [x for x in tree_leaves(state) if isinstance(x, torch.Tensor)]
    floats = [x for x in tensors if x.is_floating_point()]
    assert len(floats) > 50 and all(x.isfinite().all() for x in floats)
    assert not list(folder.glob("*.tmp"))
    dreamer_v3.main(replace(args, resume=str(folder)))  # calls go on counting: no failure now


def wide_args(tmp_path, **settings):
    """Args of a run whose replay takes 8 kB for each step."""
    settings = dict(train_ratio=0.1, buffer_size=5000) | settings
    return odd_args(tmp_path, settings, width=2000, length=0)


def sizes_and_checkpoint(folder):
    """What must stay when there is no room: the size of the replay, the checkpoint's bytes."""
    assert not list(folder.glob("*.tmp"))
    return (folder / "replay.bin").stat().st_size, (folder / "checkpoint.pt").read_bytes()


def test_files_that_cannot_grow(tmp_path):
    """Group J: when the replay or a checkpoint does not fit, one line says so; both stay whole."""
    settings = flags(wide_args(tmp_path, total_timesteps=3000))
    assert "0.02 GB for the replay" in failed(start(*settings, limit=12 * 2**20))
    assert not list(tmp_path.iterdir()), "a run that cannot begin leaves nothing"
    folder, _ = train_short(tmp_path, **vars(wide_args(tmp_path)))
    before = sizes_and_checkpoint(folder)
    resume = "--resume", str(folder), "--save-every", "1", "--total-timesteps"
    assert "GB for the replay" in failed(start(*resume, "3000", limit=12 * 2**20))
    assert sizes_and_checkpoint(folder) == before
    # The replay fits, and the next checkpoint does not.
    assert before[0] * 50 // 40 < len(before[1]) // 2
    assert "cannot save" in failed(start(*resume, "50", limit=len(before[1]) // 2))
    assert sizes_and_checkpoint(folder)[1] == before[1]
    goes_on(folder, 40, 50)


def test_file_systems_without_fallocate_or_locks(tmp_path, monkeypatch):
    """Group J: where the kernel cannot allocate, the C library writes; a run needs no lock."""

    def allocate(file, offset, length):  # as glibc does it
        if fcntl.fcntl(file, fcntl.F_GETFL) & os.O_APPEND:
            raise OSError(errno.EBADF, "Bad file descriptor")
        calls.append(os.fstat(file).st_size)

    def lock(*args):
        raise OSError(errno.ENOSYS, "Function not implemented")

    calls = []
    monkeypatch.setattr(os, "posix_fallocate", allocate)
    monkeypatch.setattr(fcntl, "flock", lock)
    folder, args = train_short(tmp_path)
    before = (folder / "replay.bin").read_bytes()
    dreamer_v3.main(replace(args, resume=str(folder)))
    assert len(calls) == 2 and (folder / "replay.bin").read_bytes() == before and any(before)


def test_no_room_without_fallocate(tmp_path, monkeypatch):
    """Group J: where nothing can allocate, a replay that cannot grow keeps its size."""

    def grow(path, *args, **kwargs):
        os.truncate(path, size + 1000)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.delattr(os, "posix_fallocate")
    folder, args = train_short(tmp_path)
    size = (folder / "replay.bin").stat().st_size
    monkeypatch.setattr(np, "memmap", grow)
    with pytest.raises(UserError, match="GB for the replay: No space left on device"):
        dreamer_v3.main(replace(args, resume=str(folder), total_timesteps=3000))
    assert (folder / "replay.bin").stat().st_size == size


def test_video_that_cannot_be_written(tmp_path, monkeypatch):
    """Group J: one line says so, at the start or at an evaluation."""

    class NoVideo(gym.Wrapper):
        def __init__(self, env, **options):
            super().__init__(env)

        def close(self):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(gym.wrappers, "RecordVideo", NoVideo)
    args = tiny(env_id="CartPole-v1", run_dir=str(tmp_path))
    agent = Agent(args, dreamer_v3.Environments(args, 1, 0).spaces)
    for async_envs in (False, True):
        args = replace(args, async_envs=async_envs)
        with pytest.raises(UserError, match="cannot write .*: .*No space left on device"):
            dreamer_v3.open_run(replace(args, capture_video=True), *CPU)
        assert not list(tmp_path.iterdir())
        with pytest.raises(UserError, match=f"cannot write {tmp_path}"):
            dreamer_v3.evaluate(agent, args, 1, tmp_path)


@slow
def test_full_disk(tmp_path):
    """Group J: the same on a file system that is really full. Needs the right to mount one."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=11m", "tmpfs", str(tmp_path)])
    if mounted.returncode:
        pytest.skip("cannot mount a small file system here")
    try:
        err = failed(start(*flags(wide_args(tmp_path, total_timesteps=3000))))
        assert "GB for the replay" in err and "No space left" in err
        assert not list(tmp_path.iterdir())
        folder, _ = train_short(tmp_path, **vars(wide_args(tmp_path, buffer_size=30)))
        before = sizes_and_checkpoint(folder)
        filler = tmp_path / "filler"
        with contextlib.suppress(OSError), open(filler, "wb") as file:
            while True:
                file.write(bytes(4096))
        err = failed(start("--resume", str(folder), "--save-every", "1", "--total-timesteps", "50"))
        assert "No space left" in err and "cannot save" in err
        assert sizes_and_checkpoint(folder) == before
        filler.unlink()
        goes_on(folder, 40, 1100)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_signal_during_an_evaluation(tmp_path, monkeypatch):
    """Group J: an evaluation that a signal cut short is made up for, also the last one."""
    evaluate, signals, counts = dreamer_v3.evaluate, [[2], [], [2], []], []

    def interrupted(*args, stop):
        stop.extend(signals.pop(0))
        returns = evaluate(*args, stop=stop)
        counts.append(len(returns))
        return returns

    monkeypatch.setattr(dreamer_v3, "evaluate", interrupted)
    settings = dict(env_id="TestCounting-v0", run_dir=str(tmp_path), eval_every=20, eval_episodes=9)
    args = tiny(**settings)
    dreamer_v3.main(args, [])
    (folder,) = tmp_path.iterdir()
    assert read_checkpoint(folder)["step"] == 21
    args.resume = str(folder)
    dreamer_v3.main(args, [])
    assert read_checkpoint(folder)["step"] == 40
    returns = dreamer_v3.main(args, [])
    lines = [x for x in read_metrics(folder) if "eval/episodic_return" in x]
    assert [x["step"] for x in lines] == [21, 40] and counts == [0, 9, 0, 9]
    assert lines[-1]["eval/episodic_return"] == pytest.approx(returns.mean())
    assert lines[-1]["eval/episodic_return_std"] == pytest.approx(returns.std()) and returns.std()
    assert dreamer_v3.main(args, []) is None, "complete, and evaluated"
    signals.append([])
    assert len(dreamer_v3.main(Args(evaluate=str(folder), cuda=False), [2])) == 0


def test_summary():
    """The standard error of a mean is that of a sample's deviation."""
    text = "mean 3.0 +- 1.5 (standard error), min 1.0, max 6.0, 3 episodes"
    assert dreamer_v3.summary(np.array([1.0, 2.0, 6.0])) == text


def start_endless(tmp_path, env_id="CartPole-v1", group=False, **changes):
    """Start a run that goes on until something happens: it, and its folder, after some episodes."""
    settings = dict(env_id=env_id, run_dir=str(tmp_path), total_timesteps=10**6, save_every=10**6)
    settings = tiny(**(settings | dict(buffer_size=1000) | changes))
    process = start(*flags(settings), group=group)
    while process.poll() is None:
        for path in tmp_path.glob("*/metrics.jsonl"):
            if path.stat().st_size:
                return process, path.parent
        time.sleep(0.1)
    raise AssertionError(process.communicate()[1])


@pytest.mark.parametrize("kills", [3, pytest.param(50, marks=slow)])
def test_kill(kills, tmp_path):
    """Group J: a run that is killed at random moments goes on from its last checkpoint."""
    settings = dict(num_envs=2, save_every=10, log_every=10, buffer_size=300, train_ratio=0.5)
    begin, step, random = time.time(), 0, np.random.default_rng(0)
    process, folder = start_endless(tmp_path, **settings)
    seconds = time.time() - begin  # to start; more on a busy machine
    for kill in range(kills):
        process.kill()
        assert not process.communicate()[1]
        args = replace(read_checkpoint(folder)["args"], resume=str(folder))
        _, trainer, logger = dreamer_v3.open_run(args, *CPU)
        logger.close()
        assert trainer.step >= step
        step, replay = trainer.step, trainer.replay
        if len(replay) > 0:
            batch, index = replay.sample()
            assert np.isfinite(batch["obs"]).all() and batch["obs"].any()
            assert (batch["is_first"] | (batch["prev_action"].sum(-1) == 1)).all()
            assert np.isfinite(replay.read_latents(index)["deter"]).all()
        print(f"kill {kill + 1}: checkpoint of step {step}, {len(replay)} starts")
        process = start("--resume", str(folder))
        time.sleep(seconds * random.uniform(0.6, 2))
    process.terminate()
    process.communicate()
    step, lines = read_checkpoint(folder)["step"], read_metrics(folder)
    assert step > 100 and all(line["step"] <= step for line in lines)
    logged = [line["step"] for line in lines if "charts/updates" in line]
    assert logged == list(range(logged[0], step + 1, 10)), "metrics without gaps or repetitions"


def test_one_process_for_a_run(tmp_path):
    """Group J: a run that goes on cannot be resumed, and does not notice the attempt."""
    process, folder = start_endless(tmp_path)
    assert "in use by another process" in failed(start("--resume", str(folder)))
    process.terminate()
    process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
    steps = [line["step"] for line in read_metrics(folder)]
    assert steps == sorted(steps) and steps[-1] <= read_checkpoint(folder)["step"]


def test_worker_that_dies(tmp_path):
    """Group J: a killed process of --async-envs is one line, and the run is saved."""
    process, folder = start_endless(tmp_path, "TestCounting-v0", async_envs=True, num_envs=2)
    workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    for worker in workers.stdout.split():
        os.kill(int(worker), signal.SIGKILL)
    assert "the environments failed at step" in failed(process)
    assert read_checkpoint(folder)["step"] > 0


@pytest.mark.parametrize("async_envs", [False, True])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals(number, async_envs, tmp_path):
    """Group J: the first signal saves and leaves, soon; the run goes on from there.

    A terminal sends Ctrl-C to the processes of --async-envs too. All of them end in order.
    """
    settings = dict(async_envs=async_envs, num_envs=2)
    process, folder = start_endless(tmp_path, group=True, **settings)
    begin = time.time()
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number and time.time() - begin < 5
    assert err.strip() == "stopping after this step; once more, and it stops at once"
    step = read_checkpoint(folder)["step"]
    assert step > 0 and f"saved {folder / 'checkpoint.pt'} at step {step:,}" in out
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)  # nobody is left
    goes_on(folder, step, step + 10)


@pytest.mark.parametrize("async_envs", [False, True])
def test_second_signal(async_envs, tmp_path):
    """Group J: a second signal ends a run at once, whatever it is doing, and its workers."""
    odd = dict(env_kwargs='{"fault": "stuck"}', async_envs=async_envs)
    process, _ = start_endless(tmp_path, "TestOdd-v0", **odd)
    time.sleep(2)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=5) == 128 + signal.SIGTERM
    assert "Traceback" not in process.communicate(timeout=5)[1]  # until the last one has ended


STOPPED = """
def compiler(args, stop):
    stop.append(2)
    raise RuntimeError("g++ was interrupted\\nand much more")
dreamer_v3.main = compiler
dreamer_v3.cli()
"""


def test_signal_that_ends_a_compiler(tmp_path):
    """Group J: a terminal's Ctrl-C ends the C++ compiler of the first update, too: one line."""
    process = start(*flags(tiny(run_dir=str(tmp_path))), code=STOPPED)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == "dreamer_v3.py: error: stopped: g++ was interrupted\n"


NO_MEMORY = """
import torch
def full(args, stop):
    if args.seed == 1:
        torch.empty(1 << 55)
    if args.seed == 2:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB.\\nand much more")
    raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`")
dreamer_v3.main = full
dreamer_v3.cli()
"""


@pytest.mark.parametrize(
    ("seed", "said"), [(1, "can't allocate memory"), (2, "CUDA out of memory"), (3, "CUBLAS")]
)
def test_memory_runs_out(seed, said, tmp_path):
    """Group J: where an update does not fit into memory, one line says what to lower."""
    err = failed(start(*flags(tiny(run_dir=str(tmp_path), seed=seed)), code=NO_MEMORY))
    assert said in err and err.endswith("; lower --batch-size or --size\n") and "more" not in err


def test_signals_of_workers():
    """Group J: a process of --async-envs ignores Ctrl-C, however it began, and can be ended."""

    def worker(number):
        for known in (signal.SIGINT, signal.SIGTERM):
            signal.signal(known, lambda *args: os._exit(3))
        assert dreamer_v3.worker_signals("env") == "env"
        os.kill(os.getpid(), number)
        os._exit(7)

    for number, code in {signal.SIGINT: 7, signal.SIGTERM: -signal.SIGTERM}.items():
        process = multiprocessing.get_context("fork").Process(target=worker, args=(number,))
        process.start()
        process.join(20)
        assert process.exitcode == code
    before = signal.getsignal(signal.SIGINT)
    assert dreamer_v3.worker_signals("env") == "env" and signal.getsignal(signal.SIGINT) == before


@slow
def test_memory(tmp_path):
    """Group J: the memory of a run of many episodes does not grow beyond the replay."""
    minutes = float(os.environ.get("MINUTES", 30))
    settings = dict(num_envs=4, buffer_size=10_000, train_ratio=0.5, save_every=2000)
    process, folder = start_endless(tmp_path, total_timesteps=10**9, **settings)
    resident, begin = [], time.time()
    pipe = threading.Thread(target=process.communicate, daemon=True)  # or the pipe fills up
    pipe.start()
    while time.time() - begin < 60 * minutes:
        time.sleep(min(10, 6 * minutes))
        status = Path(f"/proc/{process.pid}/status").read_text()
        resident.append(int(re.search(r"RssAnon:\s+(\d+)", status).group(1)) / 1024)
    process.terminate()
    pipe.join(timeout=20)
    episodes = sum("charts/episodic_return" in line for line in read_metrics(folder))
    tenth = len(resident) // 10
    print(f"{episodes} episodes, MB at 10%, 50%, 100% of {minutes} minutes:")
    print(resident[tenth], resident[len(resident) // 2], resident[-1])
    assert episodes > 30 * minutes
    assert np.mean(resident[-tenth:]) < np.mean(resident[tenth : 2 * tenth]) * 1.02 + 2


# ---- K. Looking inside a run ---------------------------------------------------------------------


@in_float64
def test_open_loop():
    """Group K: what comes after the seen steps changes no prediction, the actions change it."""
    agent, seen, length = make_agent(MIXED), 3, 7
    model = agent.model.requires_grad_(False)
    steps, other = (make_batch(MIXED, agent.args, 2, length) for _ in range(2))
    steps["is_first"][:] = False

    def foreseen(seen=seen, **changes):
        """The predictions, always from one seed."""
        torch.manual_seed(3)
        return dreamer_v3.open_loop(model, steps | changes, seen)

    before = foreseen()
    assert before.keys() == {"a", "b", "c", "image"}
    unseen = {k: torch.cat([steps[k][:, :seen], other[k][:, seen:]], 1) for k in before}
    assert all(torch.equal(before[name], x) for name, x in foreseen(**unseen).items())
    action = steps["prev_action"].clone()
    action[:, 4:] = action[:, 4:].roll(1, -1)  # leads to step 4
    for name, x in foreseen(prev_action=action).items():
        assert torch.equal(before[name][:, :4], x[:, :4])
        assert not torch.equal(before[name][:, 4:], x[:, 4:])
    # While it sees, and when it sees all: the reconstruction of the posterior.
    torch.manual_seed(3)
    deter, stoch, _ = model.observe(steps)
    seeing_all = foreseen(length)
    for name, x in model.decoder(deter, stoch).items():
        close(before[name][:, :seen], x[:, :seen])
        close(seeing_all[name], x)
    # From the last seen state on: the prior, step by step.
    torch.manual_seed(3)
    model.observe(steps)
    state, layers = (deter[:, seen - 1], stoch[:, seen - 1]), model.rssm.layers()
    for t in range(seen, length):
        state = model.rssm.imagine_step(*state, steps["prev_action"][:, t], layers)
        recon = model.decoder(*(x[:, None] for x in state))
        for name, x in recon.items():
            close(before[name][:, t], x[:, 0])


def read_png(data):
    """A PNG file of 8-bit RGB without filters -> (h, w, 3), by its specification."""
    assert data[:8] == bytes([137, 80, 78, 71, 13, 10, 26, 10])
    chunks, at = [], 8
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        kind, content = data[at + 4 : at + 8], data[at + 8 : at + 8 + size]
        check_sum = int.from_bytes(data[at + 8 + size : at + 12 + size], "big")
        assert check_sum == zlib.crc32(kind + content)
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
@pytest.mark.parametrize("length", [6, 31, 64])
def test_film_strip(length, channels):
    """Group K: truth, prediction and error stand where they should; a line where dreams begin."""
    seen, random = length // 2, np.random.default_rng(0)
    truth, prediction = random.random((2, 2, length, 64, 64, channels), np.float32)
    strip = dreamer_v3.film_strip(truth, prediction, seen)
    assert strip.shape == (2 * 3 * 64, 16 * 64, 3) and strip.dtype == np.uint8
    strip, lines = strip.reshape(2, 3, 64, 16, 64, 3), []
    shown = slice(-3, None) if channels % 3 == 0 else slice(-1, None)
    for column in range(16):
        t = round(column * (length - 1) / 15)
        p, q = prediction[:, t, ..., shown], truth[:, t, ..., shown]
        tiles = strip[:, :, :, column]
        lines.append((tiles[:, :, :, :2] == 255).all())
        for row, x in enumerate((q, p, (p - q + 1) / 2)):
            assert np.abs(tiles[:, row, :, 2:] - 255 * x[:, :, 2:]).max() <= 0.51
    first = min(column for column in range(16) if round(column * (length - 1) / 15) >= seen)
    assert lines[first] and not any(lines[:first])
    many = dreamer_v3.film_strip(*(np.repeat(x, 3, 0) for x in (truth, prediction)), seen)
    assert len(many) == 4 * 3 * 64, "four sequences at most"


def test_report_of_a_run(tmp_path, monkeypatch):
    """Group K: metrics of the unseen half, within an episode; the picture is written and logged."""
    pictures, seen, open_loop = {}, [], dreamer_v3.open_loop

    def spy(*inputs):
        seen.append((*inputs[1:], open_loop(*inputs)))
        return seen[-1][-1]

    class Writer:
        """In place of TensorBoard's."""

        def __init__(self, *_, **__):
            self.add_scalar, self.close = (lambda *_: None), (lambda: None)

        def add_image(self, name, picture, step, dataformats):
            assert (name, dataformats) == ("dreams", "HWC")
            pictures[step] = picture

    tensorboard = SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", tensorboard)
    monkeypatch.setattr(dreamer_v3, "open_loop", spy)
    args = space_args("sensors", run_dir=str(tmp_path), batch_size=6, batch_length=10)
    dreamer_v3.main(replace(args, total_timesteps=90, report_every=80, buffer_size=500))
    (folder,) = tmp_path.iterdir()
    assert {path.name for path in (folder / "dreams").iterdir()} == {"step_80.png", "step_90.png"}
    lines = [line for line in read_metrics(folder) if "dreams/obs/grey" in line]
    assert [line["step"] for line in lines] == list(pictures) == [80, 90]
    for (steps, number, recon), line in zip(seen, lines, strict=True):
        picture = read_png((folder / f"dreams/step_{line['step']}.png").read_bytes())
        assert np.array_equal(picture, pictures[line["step"]])
        grey = to_numpy(steps["obs/grey"])[0, 0, :, :]  # the first image by name
        assert number == 5 and (picture[:64, :64] == grey).all()
        first = steps["is_first"]
        same = [(b, t) for b in range(6) for t in range(5, 10) if not first[b, 5 : t + 1].any()]
        assert 0 < len(same) < 30
        for name in ("obs/grey", "obs/image", "obs/vector"):
            x = to_numpy(steps[name])
            x = np.sign(x) * np.log1p(np.abs(x)) if name == "obs/vector" else x / 255
            errors = [((to_numpy(recon[name]) - x)[i] ** 2).sum() for i in same]
            close(line[f"dreams/{name}"], np.mean(errors), rtol=1e-4)
        others = {"dreams/obs/bits", "dreams/obs/choice", "dreams/obs/many"}
        assert others < line.keys() and sum(name.startswith("dreams/") for name in line) == 6


def test_report_changes_nothing(tmp_path):
    """Group K: a run that is looked into and evaluated is the same run, bit for bit."""
    runs = []
    for every in (0, 10):
        settings = dict(log_every=5, report_every=every, total_timesteps=60)
        settings |= dict(eval_every=every, eval_episodes=every // 5, eval_sample=True)
        folder, _ = train_short(tmp_path / str(every), **settings)
        extra = {"dreams/obs", "eval/episodic_return"}
        lines = [x for x in read_metrics(folder) if not extra & x.keys()]
        assert (len(read_metrics(folder)) - len(lines) > 9) == bool(every)
        lines = [{k: v for k, v in x.items() if k not in MACHINE} for x in lines]
        state = read_checkpoint(folder)
        state = {k: state[k] for k in ("agent", "replay", "random", "updates", "credit")}
        state = [x.tolist() if isinstance(x, torch.Tensor) else x for x in tree_leaves(state)]
        runs.append((lines, state, (folder / "replay.bin").read_bytes()))
    assert runs[0] == runs[1] and any("losses/total" in line for line in runs[0][0])


def test_logger_writes_what_is_finite(tmp_path):
    """Group K: metrics.jsonl and TensorBoard get the same scalars, TensorBoard the picture."""
    logger, calls = dreamer_v3.Logger(tiny(), tmp_path), []
    note = lambda *args, **kwargs: calls.append((*args, kwargs))
    logger.tensorboard = SimpleNamespace(add_scalar=note, add_image=note, close=lambda: None)
    logger.wandb = SimpleNamespace(finish=lambda: note("finished"))
    logger.write(7, {"x": torch.tensor(1.5), "y": math.nan, "z": -math.inf}, "picture")
    logger.close()
    picture = ("dreams", "picture", 7, {"dataformats": "HWC"})
    assert calls == [("x", 1.5, 7, {}), picture, ("finished", {})]
    (line,) = read_metrics(tmp_path)
    assert line == {"step": 7, "time": line["time"], "x": 1.5}


def test_status_line(tmp_path, capsys, monkeypatch):
    """Group K: step, speed, time left and returns; a terminal has one line, which is updated."""
    clock, wandb = [100.0], []
    monkeypatch.setattr(dreamer_v3.time, "time", lambda: clock[0])
    fake = SimpleNamespace(init=lambda **words: wandb.append(words), finish=lambda: None)
    monkeypatch.setattr(dreamer_v3, "import_optional", lambda *names: fake)
    args = tiny(total_timesteps=1000, track=True, wandb_project_name="p", wandb_entity="e")
    logger = dreamer_v3.Logger(args, tmp_path)
    same = dict(project="p", entity="e", name=tmp_path.name, sync_tensorboard=True)
    assert same.items() <= wandb[0].items()
    logger.returns.extend([1, 3])
    logger.status(0, 0)
    clock[0] += 10
    logger.status(40, 5)
    assert logger.rates == (4, 0.5)
    out = "step 40/1,000  4.0 steps/s  0.50 updates/s  0:04:00 left  return 3.0, mean 2.0"
    assert capsys.readouterr().out == out + "\n"
    logger.terminal = True
    clock[0] += 10
    logger.status(80, 10)
    out = out.replace("40/", "80/").replace("4:00", "3:50")
    assert capsys.readouterr().out == "\r\x1b[2K" + out
    logger.close()


@in_float64
def test_metrics():
    """Group K: the metrics that judge a run, from what they are defined by."""
    agent = make_agent(MIXED, free_nats=0.5, agc_clip=0.2)
    steps = make_batch(MIXED, agent.args)
    torch.manual_seed(1)
    grads = torch.autograd.grad(agent.loss(steps)[0], agent.params)
    norm = math.hypot(*(grad.norm().item() for grad in grads))
    agent.model.return_range.zero_()
    torch.manual_seed(1)
    metrics, _, _ = agent.train_step(steps)
    close(metrics["losses/grad_norm"], norm, rtol=1e-6, atol=1e-6)
    low, high = metrics["behaviour/return_low"], metrics["behaviour/return_high"]
    assert torch.equal(torch.stack([low, high]), agent.model.return_range) and low < high
    # KL and its floor: the clipped loss is at least both.
    kl, floor = metrics["latents/kl"], metrics["losses/dyn"]
    assert max(kl, 0.5) <= floor <= kl + 0.5


@in_float64
def test_latent_metrics():
    """Group K: the mean KL, without the floor, and the entropies of both distributions in nats."""
    model, steps = make_agent(CONTINUOUS).model, make_batch(CONTINUOUS, tiny())
    post, prior = torch.randn(2, 3, 4, 3, 4) * 2
    states = torch.randn(3, 4, 32), torch.randn(3, 4, 3, 4)
    model.rssm.observe, model.rssm.prior = (lambda *_: [*states, post]), (lambda _: prior)
    q, p = (np.apply_along_axis(ref_mixed, -1, to_numpy(x), 0.05) for x in (post, prior))
    for free_nats in (0.0, 2.0):
        args = tiny(unimix=0.05, free_nats=free_nats)
        metrics = dreamer_v3.world_model_loss(model, steps, args)[-1]
        close(metrics["latents/kl"], (q * np.log(q / p)).sum((-2, -1)).mean())
        close(metrics["latents/posterior_entropy"], -(q * np.log(q)).sum((-2, -1)).mean())
        close(metrics["latents/prior_entropy"], -(p * np.log(p)).sum((-2, -1)).mean())


def test_action_repeat():
    """Group K: rewards add up, the last observation counts, an end ends it."""
    envs = dreamer_v3.Environments(tiny(env_id="TestCounting-v0", action_repeat=3), 1, seed=1)
    envs.reset()
    names = "reward", "is_first", "is_last", "is_terminal"
    for time_step, values, episodes in (
        (3, (1 + 2 + 3, False, False, False), []),
        (4, (4, False, True, False), [(0, 10, 2)]),  # in the middle of a repetition
        (0, (0, True, False, False), []),
        (3, (6 + 3 / 8, False, False, False), []),
        (6, (15 + 3 / 8, False, True, True), [(0, 21.75, 2)]),
    ):
        assert envs.step(np.eye(3, dtype=np.float32)[[1]]) == episodes
        assert envs.entry["obs"][0, 2] == time_step
        assert tuple(envs.entry[name][0] for name in names) == values
    envs.close()
    args = tiny(env_id="CartPole-v1", action_repeat=2)  # has a vector form of its own
    envs = dreamer_v3.Environments(args, 2, seed=1)
    assert isinstance(envs.envs, gym.vector.SyncVectorEnv)
    envs.reset()
    envs.step(np.eye(2, dtype=np.float32))
    assert (envs.entry["reward"] == 2).all()
    envs.close()


# ---- L. Several processes ------------------------------------------------------------------------


def start_two(*arguments, code="dreamer_v3.cli()", fault=""):
    """Start two processes as torchrun does; `fault`: of the second one's odd environment."""
    with socket.create_server(("localhost", 0)) as free:
        shared = dict(MASTER_ADDR="localhost", MASTER_PORT=str(free.getsockname()[1]))
    shared |= dict(WORLD_SIZE="2")
    ranks = [dict(RANK=str(i), LOCAL_RANK=str(i), FAULT=i * fault) for i in range(2)]
    return [start(*arguments, code=code, **shared, **rank) for rank in ranks]


def finish(processes):
    """What the first process says; all of them must end well."""
    outputs = [process.communicate(timeout=200) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    return outputs[0][0]


@in_float64
def three_updates(path):
    """Three updates on this process's part of a batch: writes all that they computed."""
    results, rank, size = {}, dreamer_v3.RANK, dreamer_v3.WORLD_SIZE
    if size > 1:
        dreamer_v3.dist.init_process_group("gloo")
    for name, spaces in {"mixed": MIXED, "continuous": CONTINUOUS}.items():
        torch.manual_seed(3)
        agent = make_agent(spaces, return_rate=0.5, agc_clip=0.05)
        batch = make_batch(spaces, agent.args, batch=6)
        own = {key: x.chunk(size)[rank] for key, x in batch.items()}
        grads, step = [], agent.optimizer.step
        agent.optimizer.step = lambda g, step=step, grads=grads: step(grads.append(g) or g)
        parts = [agent.train_step(own)[1:] for _ in range(3)]
        results[name] = {"all": (agent.state_dict(), grads), "part": parts}
    torch.save(results, f"{path}/{size}-{rank}.pt")
    if size > 1:
        dreamer_v3.dist.destroy_process_group()


def test_processes_compute_what_one_would(tmp_path):
    """Group L: gradients, return range, three updates and random numbers of two are those of one.

    Both processes end with the same bits.
    """
    finish(start_two(str(tmp_path), code="test_dreamer_v3.three_updates(sys.argv[1])"))
    three_updates(tmp_path)
    one, first, second = (torch.load(tmp_path / f"{x}.pt") for x in ("1-0", "2-0", "2-1"))
    for name in one:
        everything = [tree_leaves(x[name]["all"]) for x in (one, first, second)]
        for a, b, c in zip(*everything, strict=True):
            if isinstance(a, torch.Tensor):
                assert torch.equal(b, c)
                close(b, a, rtol=1e-8, atol=1e-12)  # LaProp divides small numbers by themselves
        parts = [tree_leaves(x[name]["part"]) for x in (one, first, second)]
        for whole, b, c in zip(*parts, strict=True):
            assert torch.equal(torch.cat([b, c]), whole)


def test_processes_of_torchrun(tmp_path):
    """Group L: a run of two processes has the steps, updates and episodes of one; one goes on."""
    settings = dict(num_envs=2, total_timesteps=240, log_every=8, eval_every=120, eval_episodes=1)
    settings |= dict(env_id="CartPole-v1", run_dir=str(tmp_path / "runs"))
    torchrun = [sys.executable, *"-m torch.distributed.run --standalone --nproc-per-node 2".split()]
    words = [*torchrun, dreamer_v3.__file__, *flags(tiny(**settings))]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and done.stdout.count("parameters on 2 x CPU") == 1, done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    files = {"checkpoint.pt", "metrics.jsonl", "replay.bin", "replay1.bin"}
    assert {path.name for path in folder.iterdir() if "tfevents" not in path.name} == files
    assert (folder / "replay.bin").read_bytes() != (folder / "replay1.bin").read_bytes()
    state, lines = read_checkpoint(folder), read_metrics(folder)
    assert (state["step"], state["processes"]) == (240, 2)
    one = short_run(dreamer_v3, tmp_path / "one", **settings | {"run_dir": str(tmp_path / "one")})
    assert state["updates"] == read_checkpoint(one)["updates"]
    for name in ("losses/total", "eval/episodic_return"):
        steps = [line["step"] for line in read_metrics(one) if name in line]
        assert [line["step"] for line in lines if name in line] == steps and len(steps) > 1
    ended = sum(x["charts/episodic_length"] for x in lines if "charts/episodic_length" in x)
    assert ended > 130, "episodes of both processes, which have 120 steps each"

    process = start("--resume", str(folder), "--total-timesteps", "260")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and "2 processes filled the replay: it begins anew" in out, err
    state = read_checkpoint(folder)
    assert (state["step"], state["processes"], state["replay"][0]) == (260, 1, 10)
    goes_on(folder, 260, 270)
    for wrong in (["--num-envs", "3"], ["--batch-size", "3"]):
        assert "2 processes must divide" in failed(start_two(*words[8:], *wrong)[0])
    assert "for one process" in failed(start_two("--evaluate", str(folder))[0])


PROCESSES = """
import shutil, torch
dreamer_v3.dist.init_process_group("gloo")
args, cpu = test_dreamer_v3.tiny(**eval(sys.argv[1])), (torch.device("cpu"), torch.float32)
torch.manual_seed(args.seed)
folder, trainer, logger = dreamer_v3.open_run(args, *cpu)
for _ in range(0 if args.resume else 20):
    streams = trainer.envs.entry["obs"][:, 0].tolist()
    assert streams == [args.seed + 2 * dreamer_v3.RANK + i for i in (0, 1)]
    trainer.collect_and_train()
if not args.resume:
    rows = [trainer.replay.sample()[1][0].tolist() for _ in range(20)]
    dreamer_v3.dist.all_gather_object(both := [None, None], rows)
    assert both[0] != both[1]
assert trainer.updates > 2
dreamer_v3.save_checkpoint(folder / "checkpoint.pt", trainer, logger)
dreamer_v3.dist.barrier()
if not args.resume and not dreamer_v3.RANK:
    shutil.copytree(folder, folder.parent / "other")
dreamer_v3.dist.barrier()
for _ in range(4):
    trainer.train()
dreamer_v3.save_checkpoint(folder / "checkpoint.pt", trainer, logger)
dreamer_v3.dist.destroy_process_group()
"""


def test_processes_resume_exactly(tmp_path):
    """Group L: N + M updates are N updates, two new processes, and M updates, bit for bit."""
    settings = dict(env_id="TestCounting-v0", num_envs=4, total_timesteps=80, dtype="float32")
    settings |= dict(run_dir=str(tmp_path))
    finish(start_two(str(settings), code=PROCESSES))
    other = tmp_path / "other"
    (folder,) = set(tmp_path.iterdir()) - {other}
    finish(start_two(str(settings | dict(resume=str(other))), code=PROCESSES))
    same_state(read_checkpoint(folder), read_checkpoint(other))
    for name in ("replay.bin", "replay1.bin"):
        assert (folder / name).read_bytes() == (other / name).read_bytes()


def start_two_endless(tmp_path, **settings):
    """Start a run of two processes without end: they and its folder, after some updates."""
    endless = dict(num_envs=2, total_timesteps=10**6, save_every=10**6, run_dir=str(tmp_path))
    processes = start_two(*flags(tiny(**(endless | settings))))
    while processes[0].poll() is None:
        for path in tmp_path.glob("*/metrics.jsonl"):
            if path.stat().st_size:
                return processes, path.parent
        time.sleep(0.1)
    raise AssertionError(processes[0].communicate()[1])


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=slow)])
def test_processes_end_together(kills, tmp_path):
    """Group L: when one is killed or told to stop, both end soon; the run goes on from there."""
    settings = dict(env_id="CartPole-v1", buffer_size=300, save_every=10, train_ratio=0.5)
    processes, folder = start_two_endless(tmp_path, **settings)
    step, random = 0, np.random.default_rng(0)
    for kill in range(kills):
        victim = kill % 2 if kills == 2 else random.integers(2)
        processes[victim].kill()
        begin, other = time.time(), processes[1 - victim]
        assert "another process has ended" in failed(other) and time.time() - begin < 10
        processes[victim].communicate()
        assert read_checkpoint(folder)["step"] >= step
        step, size = read_checkpoint(folder)["step"], (folder / "metrics.jsonl").stat().st_size
        print(f"kill {kill + 1}: process {victim}, checkpoint of step {step}")
        processes = start_two("--resume", str(folder))
        while (folder / "metrics.jsonl").stat().st_size <= size:
            assert all(process.poll() is None for process in processes)
            time.sleep(0.1)
        time.sleep(random.uniform(0, 2))
    processes[1].terminate()
    outputs = [process.communicate(timeout=20) for process in processes]
    assert [process.returncode for process in processes] == [0, 128 + signal.SIGTERM]
    assert f"saved {folder / 'checkpoint.pt'} at step" in outputs[0][0]
    assert read_checkpoint(folder)["step"] > step > 0


NOT_FINITE = """
calls, kl = [], dreamer_v3.categorical_kl
def broken(*args):
    calls.append(0)  # twice an update
    return kl(*args) * (float("nan") if dreamer_v3.RANK and len(calls) == 12 else 1)
dreamer_v3.categorical_kl = broken
dreamer_v3.cli()
"""


def test_processes_share_what_is_not_finite(tmp_path):
    """Group L: a loss that is not finite in one process ends both at the same update."""
    settings = tiny(
        env_id="TestOdd-v0", num_envs=2, run_dir=str(tmp_path), total_timesteps=80, save_every=10
    )
    first, second = start_two(*flags(settings), code=NOT_FINITE)
    assert "update 6 was not finite: losses/rep" in failed(second)
    assert "update 6 was not finite: losses/grad_norm" in failed(first)
    (folder,) = tmp_path.iterdir()
    assert 2 <= read_checkpoint(folder)["updates"] <= 5


GONE = """
add = dreamer_v3.Replay.add
def gone(self, entry):
    if dreamer_v3.RANK and self.steps == 12:
        dreamer_v3.os._exit(9)
    add(self, entry)
dreamer_v3.Replay.add = gone
dreamer_v3.cli()
"""


READABLE = """
dreamer_v3.dist.init_process_group("gloo")
args = dreamer_v3.load_checkpoint(sys.argv[1])["args"]
args.resume = sys.argv[1]
_, trainer, _ = dreamer_v3.open_run(args, *test_dreamer_v3.CPU)
assert trainer.replay.oldest == 5, trainer.replay.oldest
dreamer_v3.dist.destroy_process_group()
"""


def test_process_that_is_behind(tmp_path):
    """Group L: a step that a killed process has not stored is not in the checkpoint either.

    The other one stored it in place of its oldest, which no process reads from then on.
    """
    settings = dict(num_envs=2, run_dir=str(tmp_path), total_timesteps=80, buffer_size=16)
    first, second = start_two(*flags(tiny(env_id="TestOdd-v0", **settings)), code=GONE)
    assert "another process has ended" in failed(first) and second.wait(60) == 9
    (folder,) = tmp_path.iterdir()
    state = read_checkpoint(folder)
    assert (state["step"], state["replay"][0]) == (24, 12)
    finish(start_two(str(folder), code=READABLE))
    finish(start_two("--resume", str(folder)))
    assert read_checkpoint(folder)["step"] == 80


def test_process_that_fails(tmp_path):
    """Group L: the process whose environment fails says why; all end, with a checkpoint."""
    settings = tiny(env_id="TestOdd-v0", num_envs=2, run_dir=str(tmp_path), total_timesteps=80)
    first, second = start_two(*flags(settings), fault="raises")
    assert "the environments failed at step 23" in failed(second)
    assert "another process has ended" in failed(first)
    (folder,) = tmp_path.iterdir()
    assert read_checkpoint(folder)["step"] == 44
    finish(start_two("--resume", str(folder)))
    assert read_checkpoint(folder)["step"] == 80


# ---- P. Parity with the authors' code -----------------------------------------------------------
# The numbers in results/parity come from github.com/danijar/dreamerv3 at commit e3f0224, run with
# JAX 0.4.33 on a CPU, float64 in place of float32. A formula fills in parameters and inputs; a
# sample is the most likely class, or the mean plus a constant; so nothing is random. [l2, dot] is
# the norm of a tensor and its product with unit("check"); of all tensors of a network, one pair in
# the order of NETWORKS.


def numbers(name):
    """The authors' numbers of a file in results/parity."""
    return json.loads((Path(__file__).parent / f"results/parity/{name}.json").read_text())


PARAMETERS, PARITY, ACTING = map(numbers, ("parameters", "losses", "acting"))
CONTEXT, PARITY_PARTS = map(numbers, ("replay_context", "parts"))
IMAGE = (("image", 3),)
VECTORS = (("extra", 5, ()), ("mode", 4, (4,)), ("position", 3, ()))
SPACES = {
    "B": Spaces(IMAGE, (), (5,), 5),
    "B1m": Spaces(IMAGE, (), (5,), 5),
    "C": Spaces((), VECTORS, (), 2),
    "Cm": Spaces((), VECTORS, (), 2),
    "D": Spaces(IMAGE, (("vector", 5, ()),), (5,), 5),
}
PARITY_SIZES = dict(
    deter=32, hidden=16, stoch=4, classes=4, blocks=4, depth=4, units=16, imag_horizon=5
)


@pytest.fixture
def most_likely(monkeypatch):
    """Samples of categoricals are the most likely class."""

    def sample(probs, uniform):
        return one_hot(probs.argmax(-1), probs.shape[-1]) + (probs - probs.detach())

    monkeypatch.setattr(dreamer_v3, "sample_one_hot", sample)


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
    noise = lambda *shape, device: torch.tensor([deviations, -deviations]).expand(shape)
    monkeypatch.setattr(torch, "randn", noise)


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
    "rssm.hidden_layer": "dyn/dynhid0", "rssm.hidden_norm": "dyn/dynhid0norm", "rssm.gru":
    "dyn/dyngru", "rssm.prior_net.2": "dyn/priorlogit", "rssm.posterior_out": "dyn/obslogit",
    "decoder.from_deter": "dec/sp0", "decoder.from_stoch.1": "dec/sp2", "decoder.norm":
    "dec/spnorm", "decoder.image_outs.0": "dec/imgout", "reward.1": "rew/head/logits", "cont.1":
    "con/head/logit", "critic.3": "val/head/logits", "slow_critic.3": "slowval/head/logits",
    "actor.outs.logits": "pol/head/action/logits", "actor.outs.mean": "pol/head/action/mean",
    "actor.outs.std": "pol/head/action/stddev",
}  # fmt: skip
DENSE = {
    "rssm.deter_in": "dyn/dynin0", "rssm.stoch_in": "dyn/dynin1", "rssm.action_in": "dyn/dynin2",
    "rssm.prior_net.0": "dyn/prior0", "rssm.prior_net.1": "dyn/prior1",
    "rssm.posterior_in": "dyn/obs0", "decoder.from_stoch.0": "dec/sp1",
} | {f"encoder.mlp.{i}": f"enc/mlp{i}" for i in range(3)}  # fmt: skip


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
        names[f"decoder.vector_outs.{i}"] = f"dec/vec/{key}/{'logits' if classes else 'pred'}"
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
    """Replay of a case: observations (B, T, ...), action, reward and the three flags, by name."""
    spaces = SPACES[case]
    b, t = torch.arange(B)[:, None], torch.arange(T)[None]
    batch = {}
    if spaces.images:
        b_, t_, h, w, c = torch.meshgrid(*map(torch.arange, (B, T, 64, 64, 3)), indexing="ij")
        slope_h, slope_w = (3 * b_ + 5 * t_ + 2 * c) % 7 - 3, (5 * b_ + 3 * t_ + 4 * c) % 9 - 4
        image = 37 * b_ + 53 * t_ + 91 * c + slope_h * h + slope_w * w + (h * w) // (8 + t_)
        batch["image"] = (image % 256).to(torch.uint8)
    amp = torch.tensor([0.01, 1, 50, 1000, 5], dtype=torch.float64)
    for key, n, classes in spaces.vectors:
        if classes:
            batch[key] = one_hot((5 * b + t * t + 2 * t) % 4, 4)
        else:
            x = unit(f"data/{key}", B * T * n).reshape(B, T, n) * amp[torch.arange(n) % 5]
            batch[key] = x.float().to(torch.get_default_dtype())
    if spaces.action_classes:
        batch["action"] = one_hot((3 * b + 2 * t + b * t) % 5, 5)
    else:
        batch["action"] = U("data/action", (B, T, 2), 0.8)
    reward = U("data/reward", (B, T)).clone()
    reward[0, 2], reward[1 % B, 1], reward[B - 1, T - 2] = 100, 0, -3
    is_first, is_last, is_terminal = torch.zeros(3, B, T, dtype=torch.bool)
    is_first[0, [0, 4]] = is_last[0, 3] = is_terminal[0, 3] = True
    is_first[1, 3] = is_last[1, 2] = True
    if B > 2:
        is_first[2, 0] = is_last[2, -1] = True
    flags = dict(is_first=is_first, is_last=is_last, is_terminal=is_terminal)
    return batch | flags | {"reward": reward}


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
    """The batch of a case as `Agent.loss` takes it. A stored latent of no class (255) is zeros."""
    batch = inputs(case, *((2, 6) if case == "B1m" else (3, 8)))
    deter, stoch, action = initial_carry(case, run, model)
    actions = batch.pop("action")
    batch["prev_action"] = torch.cat([action[:, None], actions[:, :-1]], 1)
    return batch | dict(deter=deter, stoch=torch.where(stoch.any(-1), stoch.argmax(-1), 255))


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
    count, crc, sums = PARAMETERS["cases"][case]
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


@pytest.mark.parametrize("case, run", RUNS)
def test_losses_and_gradients(case, run, precision, most_likely, monkeypatch):
    """Each loss, the metrics, the return range and each network's gradient are the authors'."""
    set_normal_noise(monkeypatch, 0.0 if case == "Cm" else -0.5)
    agent, tol, golden = official_agent(case, run), TOLERANCE[precision], PARITY[case][run]
    batch = official_batch(case, run, agent.model)
    total, metrics, _, _ = agent.loss(batch)
    grads = torch.autograd.grad(total, agent.params)
    losses = {k[7:]: x.item() for k, x in metrics.items() if re.match("losses/(?!total)", k)}
    losses = {LOSSES.get(name, name): x for name, x in losses.items()}
    assert losses.keys() == golden["loss"].keys()
    for name, x in golden["loss"].items():
        agrees(losses[name], x, tol)
    for name, x in zip(METRICS, golden["metrics"], strict=True):
        agrees(metrics[name].item(), x, tol)
    agrees(total.item(), golden["total"][0], tol)
    agrees(agent.model.return_range, golden["range"], tol)
    params = official_params(agent.model, SPACES[case])
    assert all(p.requires_grad == (name[:4] != "slow") for name, p in params.items())
    grads = dict(zip([n for n, p in params.items() if p.requires_grad], grads, strict=True))
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
    batch = official_batch(case, run, agent.model)
    params = official_params(agent.model, SPACES[case])
    before = {name: p.detach().clone() for name, p in params.items()}
    for i in range(3):
        update = lambda: agent.train_step(batch)
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
    agent, steps = official_agent(case), inputs(case, 2, 6)
    carry = agent.initial(2)
    for t, (deter, stoch, action) in enumerate(ACTING[case]):
        obs = {key: x[:, t] for key, x in steps.items()}
        carry = agent.act(obs | {"is_first": torch.tensor([t == 0, t in (0, 3)])}, carry)
        close_sums(checksum(carry[0]), deter, 1e-11)
        assert "".join(map(str, carry[1].argmax(-1).flatten().tolist())) == stoch
        if isinstance(action, str):
            assert "".join(map(str, carry[2].argmax(-1).tolist())) == action
        else:
            close_sums(checksum(carry[2]), action, 1e-11)


def test_replay_context(float64, most_likely, monkeypatch):
    """A sequence starts from the stored state and action of the step before it."""
    set_normal_noise(monkeypatch, -0.5)
    agent, batch = official_agent("C", "carry", warmup_updates=0), inputs("C")
    b, t, s = torch.meshgrid(*map(torch.arange, (3, 8, 4)), indexing="ij")
    batch["deter"] = U("data/dyn/deter", (3, 8, 32), 0.5).clone()
    batch["stoch"] = ((b + 3 * t + s) % 4).to(torch.uint8)
    # Row 1 goes on from the batch before, as theirs can: its carry takes the stored state's place.
    deter, stoch, _ = initial_carry("C", "carry", agent.model)
    batch["deter"][1, 0], batch["stoch"][1, 0] = deter[1], stoch[1].argmax(-1)
    start = {name: batch.pop(name)[:, 0] for name in ("deter", "stoch")}
    start["prev_action"] = batch.pop("action")[:, :-1]
    batch = {name: x[:, 1:] for name, x in batch.items()} | start
    metrics, deter, stoch = agent.train_step(batch)
    for name, x in CONTEXT["metrics"].items():
        agrees(metrics[name].item(), x, 1e-9)
    assert deter.dtype == torch.float16 and stoch.dtype == torch.uint8
    # Half precision rounds by at most 2^-12 in (-1, 1), 672 entries at random: |error| < 2^-12 l2.
    close_sums(checksum(deter), CONTEXT["deter"], 2.0**-12, 1e-3)
    close_sums(checksum(one_hot(stoch.long(), 4)), CONTEXT["stoch"], 1e-12)


def gradients(y, *inputs):
    """Gradients of sum(y * w), w a fixed weight, for the inputs."""
    return torch.autograd.grad((y * U("check", tuple(y.shape))).sum(), inputs)


def test_twohot(float64):
    """Prediction, loss and its gradient, at targets inside, on and beyond the bins."""
    slope = 1.5 * (torch.arange(255.0) - 130).abs() * 20 / 127
    logits = (unit("A/twohot/logits", 9 * 255).reshape(9, 255) - slope).float().double()
    logits[1] = 0
    bins, golden = dreamer_v3.twohot_bins(), PARITY_PARTS["twohot"]
    agrees(bins[[63, 126, 127, 128, 253, 254]], PARITY_PARTS["bins"], 1e-13)
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
    "linear": (lambda: dreamer_v3.linear_layer(8, 6), "A_lin", (8, 6), (3, 8)),
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
    norm = dreamer_v3.NormSiLU(8)
    fill_params({"A_rms/scale": norm.scale})
    y = norm(U("A/rmsnorm/x", (3, 8), 2.0))[0, :4]
    agrees(y, torch.nn.functional.silu(torch.tensor(PARITY_PARTS["rmsnorm"])), 1e-12)


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
    optimizer = dreamer_v3.LaProp(params, args)
    for i, amp in enumerate([1.0, 0.01, 30.0, 0.3, 1e-6]):
        grads = [U(f"A/opt/g{k}/{i}", tuple(params[k].shape), amp).clone() for k in (0, 1)]
        step = functools.partial(optimizer.step, [*grads, torch.zeros(3)])
        step_as_authors(step, optimizer, i, 1e-2, warmup)
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
    spaces = Spaces(IMAGE, (), (9,), 9), Spaces((), (("obs", 4, ()),), (2,), 2)
    for space, expected in zip(spaces, PARAMETERS["counts"][size], strict=True):
        with torch.device("meta"):
            model = Dreamer(Args(size=size), space)
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected
