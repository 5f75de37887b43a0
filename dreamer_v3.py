"""DreamerV3 in one file: a world model learned from replay, an actor and a critic trained in it.

Paper: Hafner, Pasukonis, Ba, Lillicrap, "Mastering diverse control tasks through world models"
(Nature 2025). Equations are numbered as in arXiv:2301.04104v2. The numbers are checked against the
authors' JAX code, github.com/danijar/dreamerv3 at commit e3f0224 ("the reference"). [D1] ... [D25]
mark details of it that the paper does not spell out; the README explains them.

    python dreamer_v3.py --env-id ALE/MsPacman-v5
    python dreamer_v3.py --env-id CartPole-v1 --size 1m --num-envs 4 --total-timesteps 10000
    python dreamer_v3.py --evaluate runs/<run>/checkpoint.pt --eval-episodes 20
    python dreamer_v3.py --resume runs/<run>

Dimensions: B replay batch, T replay time, H imagined steps, N = B*T imagined trajectories, A action
width, E embedding, D deter, S latent variables of K classes, F = D + S*K feature, G blocks of the
GRU, hidden width of the RSSM's layers, U units of the other ones, V two-hot bins, C channels, h and
w pixels. Batch comes before time.

Paper to code: x obs; enc(x) embed; a action; h deter; z stoch; s = {h, z} feat; r reward; c cont;
R returns; S return_scale; sg(.) detach(); eta ent_coef; phi world model, theta actor, psi critic.

What the replay holds: one column is one entry, a new episode begins at `|`.

    t            0    1    2    3  |  0
    obs          x0   x1   x2   x3 |  x0'    x3 is the last observation of its episode
    action       a0   a1   a2   -  |  a0'    chosen AT obs[t]; nothing (zeros) at the last one
    reward       0    r1   r2   r3 |  0      received on ARRIVING at obs[t]
    is_first     1    0    0    0  |  1      the RSSM forgets its state and the action before
    is_last      0    0    0    1  |  0      the episode ends here, whatever the cause
    is_terminal  0    0    0    1  |  0      it ends by itself; 0 if it was cut off (truncated)

Sections: 1 arguments, 2 transformations, 3 distributions, 4 layers, 5 encoder and decoder, 6 RSSM,
7 world model, 8 behaviour, 9 optimizer, 10 agent, 11 replay, 12 environments, 13 logging, training,
evaluation, looking inside, checkpoint, 14 main.
"""

import contextlib
import copy
import ctypes
import datetime
import functools
import importlib
import io
import itertools
import json
import math
import multiprocessing
import operator
import os
import re
import shutil
import signal
import struct
import sys
import tempfile
import time
import warnings
import zlib
from collections import deque
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only
from torch.utils.flop_counter import FlopCounterMode

# ---- 1. Arguments (paper: Extended Data Tables 3 and 4) ------------------------------------------

# Network sizes of the paper; all have S = 32 latent variables and G = 8 blocks.
SIZES = {
    "1m": dict(deter=512, hidden=64, classes=4, depth=4, units=64),
    "12m": dict(deter=2048, hidden=256, classes=16, depth=16, units=256),
    "25m": dict(deter=3072, hidden=384, classes=24, depth=24, units=384),
    "50m": dict(deter=4096, hidden=512, classes=32, depth=32, units=512),
    "100m": dict(deter=6144, hidden=768, classes=48, depth=48, units=768),
    "200m": dict(deter=8192, hidden=1024, classes=64, depth=64, units=1024),
    "400m": dict(deter=12288, hidden=1536, classes=96, depth=96, units=1536),
}


@dataclass
class Args:
    """Hyperparameters; the comments are the help of the command line."""

    exp_name: str = "dreamer_v3"  # Name of the experiment, part of the run directory's name.
    seed: int = 1  # Seed of environments, networks, sampling and replay.
    # Prefer deterministic torch kernels: slower; equal seeds give more nearly equal runs on a GPU.
    torch_deterministic: bool = False
    cuda: bool = True  # Train on the GPU if there is one; otherwise on the CPU.
    # Type of matrix products and convolutions; auto: bfloat16 on devices that have it.
    # All else is float32: parameters, norms, distributions, losses, optimizer.
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    # Fuse the networks' elementwise work with torch.compile: the first update takes a minute or two
    # longer, the others a fraction of the time. Without a compiler, training runs without it. On a
    # GPU, also capture updates and actions as CUDA graphs.
    compile: bool = True
    run_dir: str = "runs"  # The run makes its own folder <env>__<exp>__<seed>__<time> in this one.
    track: bool = False  # Log to Weights & Biases too (pip install wandb).
    wandb_project_name: str = "dreamer_v3"  # Project of Weights & Biases.
    wandb_entity: str | None = None  # Team of Weights & Biases; by default your own account.
    # Record a video of one episode at every evaluation (pip install moviepy).
    capture_video: bool = False
    # Evaluate this checkpoint.pt, in the environment it was trained in, instead of training.
    evaluate: str | None = None
    # Go on with the run in this folder. Its arguments hold; the number of steps and what concerns
    # logging, evaluation and device may be given anew.
    resume: str | None = None
    # Measure speed and memory instead of training; the last line printed is a JSON object.
    benchmark: bool = False

    # Gymnasium id, after the module that registers it if it needs one: `module:Name-v0`.
    env_id: str = "ALE/MsPacman-v5"
    # Options of the environment, a JSON object: '{"repeat_action_probability": 0.0}'.
    env_kwargs: str = "{}"
    # Environment steps that each action lasts, their rewards added up; Atari has its own 4 frames.
    action_repeat: int = 1
    # Agent decisions to train for, over all environments, resets included.
    total_timesteps: int = 100_000
    num_envs: int = 1  # Environments stepped together.
    # Step each environment in a process of its own (Atari always runs in threads of ale-py).
    async_envs: bool = False

    buffer_size: int = 5_000_000  # Capacity of the replay in steps.
    # Keep the replay in a file of the run's folder, which grows as it fills; otherwise in memory.
    save_replay: bool = True
    batch_size: int = 16  # Sequences in a batch (B).
    batch_length: int = 64  # Steps in a sequence (T); one more before them serves as context.
    # Replayed steps per environment step: an update every batch_size * batch_length / train_ratio
    # steps.
    train_ratio: float = 128.0
    eval_every: int = 25_000  # Environment steps between evaluations; 0: only one, at the end.
    eval_episodes: int = 10  # Episodes of an evaluation; 0: never evaluate.
    eval_sample: bool = False  # Evaluate with sampled actions instead of the most likely ones.
    log_every: int = 1_000  # Environment steps between two lines of training metrics.
    save_every: int = 10_000  # Environment steps between checkpoints.
    # Environment steps between looks at what the model foresees (folder `dreams`); 0: never.
    report_every: int = 10_000

    # Network size: a row of the paper's table. The next five flags change one number of it.
    size: Literal["1m", "12m", "25m", "50m", "100m", "200m", "400m"] = "12m"
    deter: int | None = None  # Width of the recurrent state (D).
    hidden: int | None = None  # Width of the hidden layers of the RSSM.
    classes: int | None = None  # Classes of each latent variable (K).
    depth: int | None = None  # Base number of convolution channels.
    units: int | None = None  # Width of the multilayer perceptrons of vectors and heads (U).
    stoch: int = 32  # Latent variables (S).
    blocks: int = 8  # Blocks of the recurrent weights (G); must divide deter.
    free_nats: float = 1.0  # Nats below which dynamics and representation losses do not push.
    unimix: float = 0.01  # Share of the uniform distribution in those of the latent variables.
    beta_pred: float = 1.0  # Weight of the prediction losses: decoder, reward, continue.
    beta_dyn: float = 1.0  # Weight of the dynamics loss.
    beta_rep: float = 0.1  # Weight of the representation loss.

    imag_horizon: int = 15  # Steps of imagination from every replayed state (H).
    gamma: float = 1 - 1 / 333  # Discount for one step.
    return_lambda: float = 0.95  # Mix of returns: 0 trusts the critic after one step, 1 at the end.
    ent_coef: float = 3e-4  # Entropy bonus of the actor: normalised return per nat.
    # Share of the uniform distribution in a discrete actor (the reference has 0 by oversight).
    actor_unimix: float = 0.01
    beta_val: float = 1.0  # Weight of the critic loss on imagined trajectories.
    beta_repval: float = 0.3  # Weight of the critic loss on replayed sequences.
    slow_reg: float = 1.0  # Weight of the slow critic's prediction beside the return in these two.
    tau: float = 0.02  # Share of the critic that enters its slow copy at every update.
    return_rate: float = 0.01  # Share of the newest batch in the running percentiles of returns.

    learning_rate: float = 4e-5  # Learning rate of all networks.
    warmup_updates: int = 1_000  # Updates in which the learning rate rises linearly from 0.
    agc_clip: float = 0.3  # Largest norm of a tensor's gradient, relative to the tensor's norm.
    beta1: float = 0.9  # Decay of LaProp's momentum.
    beta2: float = 0.999  # Decay of LaProp's mean of squared gradients.
    laprop_eps: float = 1e-20  # Added to the root of the mean of squared gradients.

    def network(self):
        """The row of SIZES, with what the flags change of it."""
        row = SIZES[self.size]
        return {k: row[k] if getattr(self, k) is None else getattr(self, k) for k in row}


class UserError(Exception):
    """What the user can put right: the command line prints one line and exits with status 2."""


# ---- 2. Transformations (paper: Robust predictions, Eq. 8-11) ------------------------------------


def f32(x):
    """At least float32: distributions and losses are never computed in bfloat16. [D23]"""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def symlog(x):
    """sign(x) ln(1 + |x|): compresses large values, is the identity around 0 (Eq. 9)."""
    return torch.sign(x) * torch.log1p(torch.abs(x))


def symexp(x):
    """sign(x) (exp(|x|) - 1), the inverse of symlog (Eq. 9)."""
    return torch.sign(x) * torch.expm1(torch.abs(x))


def twohot_bins(count=255, limit=20.0):
    """The values symexp(-20 ... 20) that rewards and returns are spread over (Eq. 10).

    (V,) float64, ascending. One half mirrors the other: the bins are exactly antisymmetric. [D1]
    """
    lower = symexp(torch.linspace(-limit, 0, count // 2 + 1, dtype=torch.float64))
    return torch.cat([lower, -lower[:-1].flip(0)])


def twohot_mean(logits, bins):
    """The value that logits (..., V) predict, softmax(logits) @ bins (Eq. 10): (...).

    A bin and its mirror are subtracted before the sum: equal logits predict exactly 0. In plain
    order, the rounding of bins as large as 5e8 would be the prediction of an untrained head. [D1]
    """
    half = logits.shape[-1] // 2
    probs = f32(logits).softmax(-1)
    return ((probs[..., half + 1 :] - probs[..., :half].flip(-1)) * bins[half + 1 :]).sum(-1)


def twohot_loss(logits, target, bins):
    """Cross-entropy of softmax(logits) with the two-hot encoding of `target` (Eq. 11): (...).

    The weights of the last bin <= target and the first bin above it are linear in the original
    space; beyond the ends, all weight is on the end bin. logits (..., V), target (...) detached.
    """
    logits, target = f32(logits), target.detach()
    above = torch.searchsorted(bins, target.contiguous(), right=True)
    below = (above - 1).clamp(min=0)
    above = above.clamp(max=len(bins) - 1)
    to_below, to_above = (bins[below] - target).abs(), (bins[above] - target).abs()
    weight = torch.where(below == above, 1.0, to_above / (to_below + to_above))  # of the bin below
    chosen = logits.gather(-1, torch.stack([below, above], -1))  # (..., 2)
    # The weights sum to 1: -sum(weight * log_softmax) needs the normaliser once.
    return logits.logsumexp(-1) - weight * chosen[..., 0] - (1 - weight) * chosen[..., 1]


# ---- 3. Distributions ----------------------------------------------------------------------------


def one_hot(index, classes):
    """(...) integers in [0, classes) -> (..., classes) float32; F.one_hot checks on the host."""
    return (index.unsqueeze(-1) == torch.arange(classes, device=index.device)).float()


def mixed_probs(logits, unimix):
    """(1 - unimix) softmax(logits) + unimix / K over the last axis [D4]: (..., K)."""
    return (1 - unimix) * f32(logits).softmax(-1) + unimix / logits.shape[-1]


def mixed_log_probs(logits, unimix):
    """Logarithms of `mixed_probs`, also where those would round to 0: (..., K)."""
    return torch.log(mixed_probs(logits, unimix)) if unimix else f32(logits).log_softmax(-1)


def sample_class(probs, uniform):
    """The class whose slice of [0, 1) holds the number `uniform`: (..., K), (...) -> (...)."""
    below = probs.cumsum(-1) <= uniform.unsqueeze(-1)
    return below.sum(-1).clamp(max=probs.shape[-1] - 1)


def sample_one_hot(probs, uniform):
    """One-hot samples of categoricals (..., K) with the gradient of `probs` (straight-through).

    uniform: independent numbers in [0, 1), (...). [D6]
    """
    index = sample_class(probs.detach(), uniform)
    return one_hot(index, probs.shape[-1]) + (probs - probs.detach())


def categorical_kl(log_p, log_q):
    """KL(p || q) in nats of categoricals (..., S, K), summed over the S variables: (...)."""
    return (log_p.exp() * (log_p - log_q)).sum((-2, -1))


class Categoricals:
    """Policy of discrete actions: independent categoricals over one-hot vectors side by side.

    log_prob and entropy are in nats, sums over the actions. [D18]
    """

    def __init__(self, logits, classes, unimix):
        self.classes = classes
        self.log_probs = [mixed_log_probs(x, unimix) for x in logits.split(classes, -1)]

    def sample(self, greedy=False):
        """A sample, or the most likely action: (..., A), without gradient."""
        draw = lambda x: sample_class(x.exp(), torch.rand_like(x[..., 0]))
        choices = [(x.argmax(-1) if greedy else draw(x.detach())) for x in self.log_probs]
        pairs = zip(choices, self.classes, strict=True)
        return torch.cat([one_hot(choice, classes) for choice, classes in pairs], -1)

    def log_prob(self, action):
        """(..., A) -> (...)."""
        parts = zip(self.log_probs, action.split(self.classes, -1), strict=True)
        return sum((log_prob * chosen).sum(-1) for log_prob, chosen in parts)

    def entropy(self):
        """(...)."""
        return sum(-(x.exp() * x).sum(-1) for x in self.log_probs)

    def entropy_limits(self):
        """Bounds of the entropy, in nats: a certain policy (without unimix), a uniform one."""
        return 0.0, sum(map(math.log, self.classes))


class BoundedNormals:
    """Policy of continuous actions: normals with mean in [-1, 1], deviation in [0.1, 1]. [D25]

    Samples are not bounded: the environment clips them. log_prob and entropy are sums, in nats.
    """

    def __init__(self, mean, std):
        self.mean, self.std = torch.tanh(f32(mean)), 0.9 * torch.sigmoid(f32(std) + 2) + 0.1

    def sample(self, greedy=False):
        """A sample, or the mean: (..., A), without gradient."""
        mean, std = self.mean.detach(), self.std.detach()
        return mean if greedy else mean + std * normal_noise(mean)

    def log_prob(self, action):
        """(..., A) -> (...)."""
        z = (action - self.mean) / self.std
        return (-0.5 * z.square() - self.std.log() - 0.5 * math.log(2 * math.pi)).sum(-1)

    def entropy(self):
        """(...)."""
        return (self.std.log() + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)

    def entropy_limits(self):
        """Bounds of the entropy, in nats: at the smallest and at the largest deviation."""
        unit = 0.5 * math.log(2 * math.pi * math.e)
        return tuple(self.std.shape[-1] * (math.log(std) + unit) for std in (0.1, 1.0))


def normal_noise(like):
    """Independent standard normal numbers in the shape of `like`."""
    return torch.randn_like(like)


# ---- 4. Layers -----------------------------------------------------------------------------------
# A layer computes in the type of its own weight: `Agent` rounds matrices, norms stay float32. [D23]

# Standard deviation of a normal cut off at +-2; the reference multiplies by its inverse, 1.1368.
TRUNCATED_STD = 0.8796256610342398


def init_(layer, fan_in, outscale=1.0):
    """Weight: normal cut off at two deviations, variance outscale^2 / fan_in. [D3] Bias: 0."""
    nn.init.trunc_normal_(layer.weight, std=1.0, a=-2.0, b=2.0)
    layer.weight.data.mul_(outscale * fan_in**-0.5 / TRUNCATED_STD)
    nn.init.zeros_(layer.bias)


class Linear(nn.Linear):
    """(..., in) -> (..., out)."""

    def __init__(self, in_dim, out_dim, outscale=1.0):
        super().__init__(in_dim, out_dim)
        init_(self, in_dim, outscale)

    def forward(self, x):
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias)


class BlockLinear(nn.Module):
    """Linear with a block-diagonal matrix: each of G groups of inputs feeds its group of outputs.

    (..., in) -> (..., out); the weight is (G, in/G, out/G). Its initial variance is 1/in as in the
    reference, not G/in: every block starts sqrt(G) smaller than a Linear of its size. [D3]
    """

    def __init__(self, in_dim, out_dim, blocks):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(blocks, in_dim // blocks, out_dim // blocks))
        self.bias = nn.Parameter(torch.empty(out_dim))
        init_(self, in_dim)

    def forward(self, x):
        x = x.to(self.weight.dtype).unflatten(-1, (len(self.weight), -1))
        return torch.einsum("...gi,gio->...go", x, self.weight).flatten(-2) + self.bias


class Conv(nn.Conv2d):
    """5x5 convolution, same size: (n, h, w, in) -> (n, h, w, out), channels last as in memory."""

    def __init__(self, in_channels, out_channels):
        super().__init__(in_channels, out_channels, 5, padding=2)
        init_(self, 25 * in_channels)

    def forward(self, x):
        return super().forward(x.to(self.weight.dtype).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


# A 5x5 convolution of a large image is a 3x3 convolution of one of half its size that has a set of
# channels for each of the 2x2 phases of a pixel: along an axis, weight k (0 ... 4) of output 2i + p
# meets input 2(i + j - 1) + u, and PHASES[p, j, u, k] is 1 where that is so. Exact, at borders too.
PHASES = torch.zeros(2, 3, 2, 5)
for p, k in itertools.product(range(2), range(5)):
    PHASES[p, (p + k) // 2, (p + k) % 2, k] = 1


class PoolConv(Conv):
    """Conv, then 2x2 max-pool: (n, 2h, 2w, in) -> (n, h, w, out)."""

    def __init__(self, in_channels, out_channels):
        super().__init__(in_channels, out_channels)
        self.register_buffer("phases", PHASES.to(self.weight), persistent=False)

    def forward(self, x):
        if self.in_channels > 4:
            x = super().forward(x).unflatten(2, (-1, 2)).unflatten(1, (-1, 2))
            return MaxPool.apply(x.transpose(2, 3))
        # Convolutions of few channels are slow: take phases as channels, on both sides. Rounding
        # may then break ties between equal outputs, but an image needs no gradient, and that of
        # the weight is the same whichever of them has it.
        (n, h, w, in_dim), out_dim = x.shape, self.out_channels
        phases = self.phases
        weight = torch.einsum("pauk,qbvl,oikl->pqouviab", phases, phases, self.weight)
        weight = weight.reshape(4 * out_dim, 4 * in_dim, 3, 3)
        x = x.to(weight.dtype).view(n, h // 2, 2, w // 2, 2, in_dim).transpose(2, 3)
        x = x.reshape(n, h // 2, w // 2, 4 * in_dim).permute(0, 3, 1, 2)
        x = F.conv2d(x, weight, self.bias.repeat(4), padding=1).permute(0, 2, 3, 1)
        return MaxPool.apply(x.unflatten(-1, (2, 2, -1)))


class UpConv(Conv):
    """Upsampling by 2 (nearest neighbour), then Conv: (n, h, w, in) -> (n, 2h, 2w, out).

    Equal inputs meet sums of weights: 2.8 times fewer multiplications than at full size.
    """

    def __init__(self, in_channels, out_channels):
        super().__init__(in_channels, out_channels)
        self.register_buffer("phases", PHASES.sum(2).to(self.weight), persistent=False)

    def forward(self, x):
        phases = self.phases
        weight = torch.einsum("pak,qbl,oikl->pqoiab", phases, phases, self.weight).flatten(0, 2)
        x = x.to(weight.dtype).permute(0, 3, 1, 2)
        x = F.conv2d(x, weight, self.bias.repeat(4), padding=1).permute(0, 2, 3, 1)
        x = x.unflatten(-1, (2, 2, -1))  # (n, h, w, p, q, out)
        return x.permute(0, 1, 3, 2, 4, 5).flatten(1, 2).flatten(2, 3)


class MaxPool(torch.autograd.Function):
    """Maximum of 2x2 neighbours, (n, h, w, 2, 2, c) -> (n, h, w, c), for PoolConv.

    Equal neighbours share the gradient evenly, as in the reference: flat regions of an image tie
    everywhere. (max_pool2d gives all to one; `amax` shares, but takes longer.)
    """

    @staticmethod
    def forward(ctx, x):
        a, b, c, d = (x[:, :, :, i, j] for i in (0, 1) for j in (0, 1))
        y = torch.maximum(torch.maximum(a, b), torch.maximum(c, d))
        ctx.save_for_backward(x, y)
        return y

    @staticmethod
    def backward(ctx, grad):
        x, y = ctx.saved_tensors
        ties = sum((x[:, :, :, i, j] == y).to(grad.dtype) for i in (0, 1) for j in (0, 1))
        y, share = (z[:, :, :, None, None] for z in (y, grad / ties))
        return torch.where(x == y, share, 0)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + 1e-4) * scale over the last axis, then SiLU; always in float32."""

    def __init__(self, dim):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return F.silu(F.rms_norm(x.to(self.scale.dtype), self.scale.shape, self.scale, eps=1e-4))


class Dense(nn.Sequential):
    """Linear, RMSNorm, SiLU: (..., in) -> (..., out)."""

    def __init__(self, in_dim, out_dim):
        super().__init__(Linear(in_dim, out_dim), RMSNorm(out_dim))


def mlp(in_dim, units, layers, out_dim=None, outscale=1.0):
    """`layers` Dense layers of width `units`, and a Linear to `out_dim` where one is given. [D2]"""
    net = [Dense(in_dim if i == 0 else units, units) for i in range(layers)]
    return nn.Sequential(*net, *([Linear(units, out_dim, outscale)] if out_dim else []))


# ---- 5. Encoder and decoder (paper: World model learning) ----------------------------------------

IMAGE_SIZE = 64  # pixels; every image is resized to this before it is stored
CHANNEL_FACTORS = (2, 3, 4, 4)  # channels of the four resolutions, in units of `depth`
FINAL_SIZE = IMAGE_SIZE // 2 ** len(CHANNEL_FACTORS)  # pixels


@dataclass(frozen=True)
class Spaces:
    """What the networks need to know of an environment."""

    channels: int  # of the 64x64 image; 0 if there is none
    # (name, width, classes) of each other observation, sorted by name. Discrete ones are one-hot
    # vectors side by side, of `classes` numbers each; `classes` is empty for continuous ones.
    vectors: tuple[tuple[str, int, tuple[int, ...]], ...]
    action_classes: tuple[int, ...]  # choices of each discrete action; empty if continuous
    action_width: int  # A: the sum of action_classes, or the number of continuous actions


class Encoder(nn.Module):
    """Observation -> embedding (Eq. 1): an MLP for vectors, convolutions for images. [D11]"""

    def __init__(self, spaces, depth, units):
        super().__init__()
        self.embed_dim = 0
        if spaces.vectors:
            discrete = [bool(classes) for _, width, classes in spaces.vectors for _ in range(width)]
            self.register_buffer("discrete", torch.tensor(discrete), persistent=False)
            self.mlp = mlp(len(discrete), units, 3)
            self.embed_dim += units
        if spaces.channels:
            widths = [spaces.channels] + [depth * factor for factor in CHANNEL_FACTORS]
            self.convs = nn.ModuleList(map(PoolConv, widths[:-1], widths[1:]))
            self.norms = nn.ModuleList(map(RMSNorm, widths[1:]))
            self.embed_dim += widths[-1] * FINAL_SIZE**2

    def forward(self, obs):
        """Dict of `image` (B, T, h, w, C) uint8, `vector` (B, T, width), or both -> (B, T, E)."""
        embed = []
        if "vector" in obs:
            x = obs["vector"]
            embed.append(self.mlp(torch.where(self.discrete, x, symlog(x))))  # [D10]
        if "image" in obs:
            x = obs["image"].flatten(0, 1) / 255 - 0.5  # (B*T, h, w, C)
            for conv, norm in zip(self.convs, self.norms, strict=True):
                x = norm(conv(x))
            embed.append(x.flatten(1).unflatten(0, obs["image"].shape[:2]))
        return torch.cat(embed, -1)


class Decoder(nn.Module):
    """Model state -> reconstruction of the observation (Eq. 1)."""

    def __init__(self, spaces, deter, stoch, depth, units):
        super().__init__()
        self.spaces = spaces
        if spaces.vectors:
            self.mlp = mlp(stoch + deter, units, 3)
            self.outs = nn.ModuleList(Linear(units, width) for _, width, _ in spaces.vectors)
        if spaces.channels:
            widths = [depth * factor for factor in reversed(CHANNEL_FACTORS)]
            cells = FINAL_SIZE**2 * widths[0]
            self.from_deter = BlockLinear(deter, cells, 8)  # 8 blocks, whatever the GRU has
            self.from_stoch = mlp(stoch, 2 * units, 1, cells)
            self.norm = RMSNorm(widths[0])
            self.convs = nn.ModuleList(map(UpConv, widths[:-1], widths[1:]))
            self.norms = nn.ModuleList(map(RMSNorm, widths[1:]))
            self.image_out = UpConv(widths[-1], spaces.channels)

    def forward(self, deter, stoch):
        """deter (B, T, D), stoch (B, T, S, K) -> dict of (B, T, ...).

        `image` is (h, w, C) in (0, 1); vectors, by name, are (width): symlog values or logits.
        """
        stoch, recon = stoch.flatten(-2), {}
        if self.spaces.vectors:
            x = self.mlp(torch.cat([stoch, deter], -1))
            names = [name for name, _, _ in self.spaces.vectors]
            recon = {name: f32(out(x)) for name, out in zip(names, self.outs, strict=True)}
        if self.spaces.channels:
            # Every block writes all pixels of its own channels: (g h w c) -> h w (g c).
            x = self.from_deter(deter.flatten(0, 1))
            x = x.unflatten(-1, (8, FINAL_SIZE, FINAL_SIZE, -1)).permute(0, 2, 3, 1, 4).flatten(-2)
            x = self.norm(x + self.from_stoch(stoch.flatten(0, 1)).view_as(x))
            for conv, norm in zip(self.convs, self.norms, strict=True):
                x = norm(conv(x))
            recon["image"] = torch.sigmoid(f32(self.image_out(x))).unflatten(0, deter.shape[:2])
        return recon

    def targets(self, obs):
        """The observation in parts: dict of (B, T, ...); images in [0, 1]."""
        targets = {"image": obs["image"] / 255} if self.spaces.channels else {}
        if self.spaces.vectors:
            names, widths, _ = zip(*self.spaces.vectors, strict=True)
            targets |= zip(names, obs["vector"].split(widths, -1), strict=True)
        return targets

    def losses(self, recon, obs):
        """Negative log-likelihoods up to constants, for every observation: dict of (B, T).

        Squared errors (no factor 1/2) of images and of symlog vectors (Eq. 8), cross-entropies of
        discrete vectors, summed over all but batch and time. [D10]
        """
        targets, losses = self.targets(obs), {}
        for name, _, classes in self.spaces.vectors:
            if classes:
                losses[name] = -Categoricals(recon[name], classes, unimix=0).log_prob(targets[name])
            else:
                losses[name] = (recon[name] - symlog(targets[name])).square().sum(-1)
        if self.spaces.channels:
            losses["image"] = (recon["image"] - targets["image"]).square().sum((-3, -2, -1))
        return losses

    def truth_and_prediction(self, recon, obs):
        """Both in the observation's own units: dict of pairs (B, T, ...), for people.

        Images are in [0, 1]; discrete vectors are one-hots beside probabilities.
        """
        prediction = {"image": recon["image"]} if self.spaces.channels else {}
        for name, _, classes in self.spaces.vectors:
            if classes:
                log_probs = Categoricals(recon[name], classes, unimix=0).log_probs
                prediction[name] = torch.cat(log_probs, -1).exp()
            else:
                prediction[name] = symexp(recon[name])
        return {name: (truth, prediction[name]) for name, truth in self.targets(obs).items()}


# ---- 6. RSSM: the recurrent state-space model (paper: World model learning, Eq. 1) ---------------


class StepLinear(torch.autograd.Function):
    """y[t] = base[t] + x[t] @ weight for a loop over t in which x[t+1] depends on y[t].

    `apply(weight, base, x)` returns base; the loop adds the products with weight.detach() and
    appends its x[t] to the list x. The weight's gradient, sum_t x[t].T @ dy[t], is then one matrix
    product over all steps instead of T small ones. Exact, being the same sum.
    """

    @staticmethod
    def forward(ctx, weight, base, x):
        ctx.x = x
        return base.view_as(base)

    @staticmethod
    def backward(ctx, grad):
        equation = "tbi,tbo->io" if ctx.x[0].dim() == 2 else "tgbi,tgbo->gio"
        return torch.einsum(equation, torch.stack(ctx.x), grad), grad, None


class RSSM(nn.Module):
    """Sequence model h' = f(h, z, a), prior p(z | h), posterior q(z | h, x) over S categoricals.

    The state is deter (B, D), in (-1, 1), and stoch (B, S, K), one-hot. Both start as zeros. [D9]
    """

    def __init__(self, action_width, embed_dim, deter, hidden, stoch, classes, blocks, unimix):
        super().__init__()
        self.deter_dim, self.blocks, self.unimix = deter, blocks, unimix
        self.hidden_dim, self.stoch_shape = hidden, (stoch, classes)
        self.deter_in = Dense(deter, hidden)
        self.stoch_in = Dense(stoch * classes, hidden)
        self.action_in = Dense(action_width, hidden)
        self.hidden_layer = BlockLinear(deter + 3 * hidden * blocks, deter, blocks)
        self.hidden_norm = RMSNorm(deter)
        self.gru = BlockLinear(deter, 3 * deter, blocks)
        self.prior_net = mlp(deter, hidden, 2, stoch * classes)
        self.posterior_in = Dense(deter + embed_dim, hidden)
        self.posterior_out = Linear(hidden, stoch * classes)

    def initial(self, batch_size):
        """The state before the first step: deter (B, D), stoch (B, S, K), zeros."""
        zeros = self.hidden_norm.scale.new_zeros
        return zeros(batch_size, self.deter_dim), zeros(batch_size, *self.stoch_shape)

    def feat(self, deter, stoch):
        """The model state s = {h, z} as the heads see it, in the type they compute in: (..., F)."""
        return torch.cat([deter, stoch.flatten(-2)], -1).to(self.gru.weight.dtype)

    # Every block of the hidden layer sees its own slice of h and the embeddings of h, z and a [D7].
    # A linear layer of joined inputs is the sum of one linear layer each. So what the loop need not
    # wait for is computed for all steps at once: the action's share of the hidden layer, and the
    # observation's share of the posterior's first layer.

    def weights(self):
        """The products inside the loop: name -> weight (in, out), or (G, in, out) for blocks."""
        own, embeds, _ = self.hidden_layer.weight.split(
            [self.deter_dim // self.blocks, 2 * self.hidden_dim, self.hidden_dim], 1
        )
        return {
            "deter_in": self.deter_in[0].weight.T,
            "stoch_in": self.stoch_in[0].weight.T,
            "hidden_own": own,
            "hidden_embeds": embeds.transpose(0, 1).flatten(1),  # one dense product for all blocks
            "gru": self.gru.weight,
            "posterior_in": self.posterior_in[0].weight[:, : self.deter_dim].T,
            "posterior_out": self.posterior_out.weight.T,
        }

    def biases(self):
        """What is added to the products: name -> (out,), or (G, 1, out) for blocks."""
        return {
            "deter_in": self.deter_in[0].bias,
            "stoch_in": self.stoch_in[0].bias,
            "hidden_own": self.hidden_layer.bias.view(self.blocks, 1, -1),
            "gru": self.gru.bias.view(self.blocks, 1, -1),
            "posterior_out": self.posterior_out.bias,
        }

    def action_part(self, action):
        """The action's share of the hidden layer: (..., A) -> (..., D)."""
        action = action / action.abs().clamp(min=1).detach()  # [D8]
        weight = self.hidden_layer.weight[:, -self.hidden_dim :].transpose(0, 1).flatten(1)
        return self.action_in(action).to(weight.dtype) @ weight

    def embed_part(self, embed):
        """The observation's share of the posterior's first layer: (..., E) -> (..., hidden)."""
        layer = self.posterior_in[0]
        return F.linear(embed.to(layer.weight.dtype), layer.weight[:, self.deter_dim :], layer.bias)

    def sequence_model(self, deter, stoch, product):
        """h' = f(h, z, a) (Eq. 1): deter (B, D), stoch (B, S, K) -> (B, D).

        product(name, x) is x @ weights[name] + base, where the base of "hidden_embeds" is the
        action's share and the others are the biases.
        """
        # (B, D) -> (G, B, D/G), and back
        split = lambda x: x.unflatten(-1, (self.blocks, -1)).transpose(0, 1)
        merge = lambda x: x.transpose(0, 1).flatten(-2)
        embeds = [
            self.deter_in[1](product("deter_in", deter)),
            self.stoch_in[1](product("stoch_in", stoch.flatten(-2))),
        ]
        x = merge(product("hidden_own", split(deter)))
        x = self.hidden_norm(x + product("hidden_embeds", torch.cat(embeds, -1)))  # (B, D)
        # The outputs of each block are in this order, (B, G, D/G) each. Bias -1: at first, h is
        # mostly kept. [D7]
        reset, cand, update = f32(product("gru", split(x))).transpose(0, 1).chunk(3, -1)
        cand = torch.tanh(torch.sigmoid(reset) * cand)
        update = torch.sigmoid(update - 1)
        deter = deter.unflatten(-1, (self.blocks, -1))
        return (update * cand + (1 - update) * deter).flatten(-2)

    def prior(self, deter):
        """Logits of p(z | h) (Eq. 1): (..., D) -> (..., S, K)."""
        return f32(self.prior_net(deter)).unflatten(-1, self.stoch_shape)

    def sample(self, logits, uniform):
        """A straight-through sample of the mixed categoricals (..., S, K)."""
        return sample_one_hot(mixed_probs(logits, self.unimix), uniform)

    def observe_step(self, deter, stoch, keep, uniform, base, weights):
        """One step of `observe`: new deter and stoch, the logits, the inputs of the products."""
        inputs = {}

        def product(name, x):
            inputs[name] = x = x.to(weights[name].dtype)
            multiply_add = torch.addmm if x.dim() == 2 else torch.baddbmm
            return multiply_add(base[name], x, weights[name])

        # At the start of an episode the state is zeros; so is the action, and not class 0. [D9]
        deter, stoch = deter * keep, stoch * keep.unsqueeze(-1)
        deter = self.sequence_model(deter, stoch, product)
        x = self.posterior_in[1](product("posterior_in", deter))
        logits = f32(product("posterior_out", x)).unflatten(-1, self.stoch_shape)
        return deter, self.sample(logits, uniform), logits, inputs

    def observe(self, embed, prev_action, is_first, deter, stoch):
        """Filter a sequence: the posterior state q(z | h, x) (Eq. 1) at each of T steps.

        embed (B, T, E); prev_action (B, T, A), which led to the observations; is_first (B, T) bool;
        the state before the first step, deter (B, D), stoch (B, S, K). Returns deter (B, T, D),
        stoch (B, T, S, K) and the posterior's logits (B, T, S, K).
        """
        batch, length = is_first.shape
        # Here, time comes first: a step is then a slice.
        keep = (~is_first).to(deter.dtype).T.unsqueeze(-1)  # (T, B, 1)
        uniform = torch.rand(length, batch, self.stoch_shape[0], device=embed.device)
        weights, base = self.weights(), self.biases()
        base = {
            name: x.expand(length, batch, -1) if x.dim() == 1 else x.expand(length, -1, batch, -1)
            for name, x in base.items()
        }  # fmt: skip
        base["hidden_embeds"] = self.action_part(prev_action.transpose(0, 1) * keep)  # (T, B, D)
        base["posterior_in"] = self.embed_part(embed.transpose(0, 1))  # (T, B, hidden)
        inputs = {name: [] for name in weights}
        base = {k: StepLinear.apply(weights[k], x, inputs[k]).unbind(0) for k, x in base.items()}
        weights = {name: weight.detach() for name, weight in weights.items()}
        states = []
        for t in range(length):
            base_t = {name: x[t] for name, x in base.items()}
            *state, inputs_t = self.observe_step(deter, stoch, keep[t], uniform[t], base_t, weights)
            deter, stoch, _ = state
            states.append(state)
            for name, x in inputs_t.items():
                inputs[name].append(x.detach())
        return [torch.stack(x, 1) for x in zip(*states, strict=True)]

    def imagine_step(self, deter, stoch, action, weights):
        """One step without observation: deter (N, D), stoch (N, S, K), action (N, A) -> both."""
        uniform = torch.rand(stoch.shape[:2], device=stoch.device)
        base = self.biases() | {"hidden_embeds": self.action_part(action)}
        product = lambda name, x: x.to(weights[name].dtype) @ weights[name] + base[name]
        deter = self.sequence_model(deter, stoch, product)
        return deter, self.sample(self.prior(deter), uniform)


# ---- 7. All networks; the world model's loss (paper: World model learning, Eq. 2-3) --------------


class Actor(nn.Module):
    """pi(a | s) (Eq. 4): feat (..., F) -> a policy over the environment's actions."""

    def __init__(self, feat_dim, units, spaces, unimix):
        super().__init__()
        self.classes, self.unimix = spaces.action_classes, unimix
        self.mlp = mlp(feat_dim, units, 3)
        names = ("logits",) if self.classes else ("mean", "std")
        outs = {name: Linear(units, spaces.action_width, outscale=0.01) for name in names}  # [D2]
        self.outs = nn.ModuleDict(outs)

    def forward(self, feat):
        x = self.mlp(feat)
        outs = [out(x) for out in self.outs.values()]
        if self.classes:
            return Categoricals(*outs, self.classes, self.unimix)
        return BoundedNormals(*outs)


class Dreamer(nn.Module):
    """All networks, and the running percentiles of the returns."""

    def __init__(self, args, spaces):
        super().__init__()
        deter, hidden, classes, depth, units = args.network().values()
        stoch = args.stoch * classes
        bins = twohot_bins()
        self.encoder = Encoder(spaces, depth, units)
        sizes = deter, hidden, args.stoch, classes, args.blocks
        self.rssm = RSSM(spaces.action_width, self.encoder.embed_dim, *sizes, args.unimix)
        self.decoder = Decoder(spaces, deter, stoch, depth, units)
        self.reward = mlp(deter + stoch, units, 1, len(bins), outscale=0.0)  # (Eq. 1)
        self.cont = mlp(deter + stoch, units, 1, 1)  # (Eq. 1)
        self.actor = Actor(deter + stoch, units, spaces, args.actor_unimix)
        self.critic = mlp(deter + stoch, units, 3, len(bins), outscale=0.0)  # v(s) (Eq. 4)
        self.slow_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.register_buffer("bins", bins.to(torch.get_default_dtype()), persistent=False)
        self.register_buffer("return_range", torch.zeros(2))  # 5th and 95th percentile

    def choose(self, deter, stoch):
        """Features (N, F) of a state, and the actor's choice in it (N, A)."""
        feat = self.rssm.feat(deter, stoch)
        return feat, self.actor(feat).sample()

    def imagine_step(self, deter, stoch, action, weights):
        """Carry out `action`, choose the next one: deter, stoch, feat (N, F), action (N, A)."""
        deter, stoch = self.rssm.imagine_step(deter, stoch, action, weights)
        return deter, stoch, *self.choose(deter, stoch)


def world_model_loss(model, batch, args):
    """Losses of encoder, RSSM, decoder, reward and continue predictor on replayed sequences.

    batch: T steps, see `Agent.loss`. Returns a dict of losses (B, T), the posterior states deter
    (B, T, D) and stoch (B, T, S, K) with gradient, and metrics.
    """
    embed = model.encoder(batch["obs"])  # (B, T, E)
    deter, stoch, post_logits = model.rssm.observe(
        embed, batch["prev_action"], batch["is_first"], batch["deter"], batch["stoch"]
    )
    feat = model.rssm.feat(deter, stoch)  # (B, T, F)

    # L_pred (Eq. 3). The discount is part of the continue flag: imagination needs no other. [D12]
    losses = model.decoder.losses(model.decoder(deter, stoch), batch["obs"])
    losses["reward"] = twohot_loss(model.reward(feat), batch["reward"], model.bins)
    cont = (1 - batch["is_terminal"].to(deter.dtype)) * args.gamma
    cont_logit = f32(model.cont(feat)).squeeze(-1)
    losses["cont"] = F.binary_cross_entropy_with_logits(cont_logit, cont, reduction="none")

    # L_dyn moves the prior to the posterior, L_rep the posterior to the prior (Eq. 3). KL of the
    # mixed distributions, summed over the latent variables, then clipped, each step by itself. [D5]
    post = mixed_log_probs(post_logits, args.unimix)
    prior = mixed_log_probs(model.rssm.prior(deter), args.unimix)
    kl = categorical_kl(post.detach(), prior)
    losses["dyn"] = kl.clamp(min=args.free_nats)
    losses["rep"] = categorical_kl(post, prior.detach()).clamp(min=args.free_nats)
    assert all(loss.shape == deter.shape[:2] for loss in losses.values())
    share_of_maximum = lambda p: -(p.exp() * p).sum(-1).mean() / math.log(p.shape[-1])
    metrics = {
        "latents/kl": kl.mean(),
        "latents/free_share": (kl < args.free_nats).to(kl.dtype).mean(),
        "latents/posterior_entropy": share_of_maximum(post),
        "latents/prior_entropy": share_of_maximum(prior),
    }
    return losses, deter, stoch, metrics


# ---- 8. Behaviour: actor and critic (paper: Critic learning, Actor learning, Eq. 4-7) ------------


@torch.no_grad()
def imagine(model, deter, stoch, horizon):
    """Dream from N states with the actor's actions: feat (N, H+1, F), action (N, H+1, A).

    deter (N, D), stoch (N, S, K). Nothing carries a gradient: the actor learns by REINFORCE alone,
    and imagination teaches the world model nothing. [D13] [D18]

        t          0    1   ...   H
        feat       s0   s1  ...   sH      s0 is a state of the replay
        action     a0   a1  ...   aH      a[t] is chosen at s[t]; the last one is not carried out
        reward     -    r1  ...   rH      predicted from s[t]: received on arriving there
    """
    weights = model.rssm.weights()
    feat, action = model.choose(deter, stoch)
    feats, actions = [feat], [action]
    for _ in range(horizon):
        deter, stoch, feat, action = model.imagine_step(deter, stoch, action, weights)
        feats.append(feat)
        actions.append(action)
    return torch.stack(feats, 1), torch.stack(actions, 1)


def lambda_return(reward, value, cont, last, return_lambda):
    """Lambda-returns, computed backwards (Eq. 5):

        R[t] = r[t+1] + c[t+1] ((1 - l[t+1]) v[t+1] + l[t+1] R[t+1]),  R[H] = v[H]

    with l = lambda (1 - last). The paper counts a reward with the action that earns it; here it
    belongs to the state it leads to. [D14] reward, value, cont, last: (N, H+1); cont in [0, 1] has
    the discount inside; last is 1 where a trajectory is cut, and what follows is left to the value.
    Returns (N, H).
    """
    assert reward.shape == value.shape == cont.shape == last.shape
    mix = return_lambda * (1 - last)
    one_step = reward + cont * (1 - mix) * value
    returns = [value[:, -1]]
    for t in reversed(range(1, reward.shape[1])):
        returns.append(one_step[:, t] + cont[:, t] * mix[:, t] * returns[-1])
    return torch.stack(returns[:0:-1], 1)  # in order of time, without v[H]


def critic_loss(logits, slow_value, returns, model, args):
    """Regression to the returns and, to steady it, to the slow critic (Eq. 5) [D15]: (...)."""
    to_slow = twohot_loss(logits, slow_value, model.bins)
    return twohot_loss(logits, returns, model.bins) + args.slow_reg * to_slow


def actor_critic_loss(model, feat, action, args):
    """Losses of actor and critic on imagined trajectories (Eq. 5-7).

    feat (N, H+1, F), action (N, H+1, A) as of `imagine`. Updates the return range. Returns the
    losses `actor` and `critic`, (N, H) each, the returns (N, H), and metrics.
    """
    logits = model.critic(feat)  # (N, H+1, V)
    with torch.no_grad():
        value = twohot_mean(logits, model.bins)  # the fast critic: target and baseline [D15]
        slow_value = twohot_mean(model.slow_critic(feat), model.bins)
        reward = twohot_mean(model.reward(feat), model.bins)
        cont = torch.sigmoid(f32(model.cont(feat))).squeeze(-1)
        weight = cont.cumprod(1)  # the start's own prediction counts [D16]
        returns = lambda_return(reward, value, cont, torch.zeros_like(cont), args.return_lambda)

        # Return range S (Eq. 7), over the whole batch. Small returns are not blown up. [D17]
        percentiles = torch.stack([torch.quantile(returns, q) for q in (0.05, 0.95)])
        model.return_range.lerp_(percentiles, args.return_rate)
        return_scale = (model.return_range[1] - model.return_range[0]).clamp(min=1)
        normed_return = (returns - model.return_range[0]) / return_scale
        advantage = (returns - value[:, :-1]) / return_scale

    policy = model.actor(feat[:, :-1])
    entropy = policy.entropy()  # (N, H)
    log_prob = policy.log_prob(action[:, :-1])
    # REINFORCE (Eq. 6), as far as imagination believes the episode goes on. [D16]
    actor = -weight[:, :-1] * (log_prob * advantage + args.ent_coef * entropy)
    critic = critic_loss(logits[:, :-1], slow_value[:, :-1], returns, model, args)
    critic = weight[:, :-1] * critic
    assert actor.shape == critic.shape == returns.shape
    least, most = policy.entropy_limits()
    metrics = {
        "behaviour/return": returns.mean(),
        "behaviour/return_low": model.return_range[0].clone(),
        "behaviour/return_high": model.return_range[1].clone(),
        "behaviour/value": value.mean(),
        "behaviour/slow_value": slow_value.mean(),
        "behaviour/reward": reward.mean(),
        "behaviour/cont": cont.mean(),
        "behaviour/weight": weight.mean(),
        "behaviour/return_scale": return_scale,
        "behaviour/normed_return": normed_return.mean(),
        "behaviour/normed_return_min": normed_return.min(),
        "behaviour/normed_return_max": normed_return.max(),
        "behaviour/advantage": advantage.mean(),
        "behaviour/advantage_std": advantage.std(correction=0),
        "behaviour/policy_entropy": (entropy.mean() - least) / ((most - least) or 1.0),
    }
    return {"actor": actor, "critic": critic}, returns, metrics


def replay_critic_loss(model, feat, bootstrap, batch, args):
    """Critic loss (Eq. 5) on replayed sequences: (B, T-1), with gradient to the world model. [D19]

    feat (B, T, F) with gradient; bootstrap (B, T), the imagined return from each state. Rewards and
    ends are the real ones. The last step of an episode has no return of its own.
    """
    last = batch["is_last"].to(bootstrap.dtype)
    cont = (1 - batch["is_terminal"].to(bootstrap.dtype)) * args.gamma
    returns = lambda_return(batch["reward"], bootstrap, cont, last, args.return_lambda)
    with torch.no_grad():
        slow_value = twohot_mean(model.slow_critic(feat), model.bins)
    logits = model.critic(feat)
    loss = critic_loss(logits[:, :-1], slow_value[:, :-1], returns, model, args)
    return (1 - last[:, :-1]) * loss


# ---- 9. Optimizer: adaptive gradient clipping and LaProp (paper: Extended Data Table 4) ----------


class LaProp:
    """One optimizer for all networks [D20]. For each tensor, in this order, n = 1, 2, ...:

        g  <- g * min(1, clip * max(1e-3, |p|) / |g|)         adaptive gradient clipping, L2 norms
        nu <- beta2 nu + (1 - beta2) g^2;    u = g / (sqrt(nu / (1 - beta2^n)) + eps)
        mu <- beta1 mu + (1 - beta1) u;      p <- p - lr mu / (1 - beta1^n)

    lr rises linearly from exactly 0 at the first update. Adam would average g before the division.
    `params` compute the gradients; `exact`, the same tensors or float32 originals of rounded ones,
    are updated. `owners` names the module that each belongs to, for the metrics.
    """

    def __init__(self, owners, params, exact, args):
        self.params, self.exact, self.args = params, [p.detach() for p in exact], args
        self.modules = list(dict.fromkeys(owners))
        member = [[float(owner == module) for owner in owners] for module in self.modules]
        self.member = self.exact[0].new_tensor(member)  # (modules, tensors)
        self.nu = [torch.zeros_like(p) for p in self.exact]
        self.mu = [torch.zeros_like(p) for p in self.exact]
        self.updates = self.exact[0].new_zeros(())
        self.state = [*self.nu, *self.mu, self.updates]  # what a checkpoint keeps

    @torch.no_grad()
    def step(self):
        """Apply and clear the gradients. Returns metrics; no value leaves the device."""
        args = self.args
        grads = [p.grad.to(x.dtype) for p, x in zip(self.params, self.exact, strict=True)]
        norms = torch.stack(torch._foreach_norm(grads))
        limits = args.agc_clip * torch.stack(torch._foreach_norm(self.exact)).clamp(min=1e-3)
        torch._foreach_mul_(grads, list((limits / norms).clamp(max=1).unbind()))

        warmup = self.updates / args.warmup_updates if args.warmup_updates else self.updates + 1
        lr = args.learning_rate * warmup.clamp(max=1)
        self.updates += 1
        torch._foreach_lerp_(self.nu, torch._foreach_mul(grads, grads), 1 - args.beta2)
        scale = torch._foreach_div(self.nu, 1 - args.beta2**self.updates)
        torch._foreach_sqrt_(scale)
        torch._foreach_add_(scale, args.laprop_eps)
        torch._foreach_div_(grads, scale)
        torch._foreach_lerp_(self.mu, grads, 1 - args.beta1)
        step = torch._foreach_mul(self.mu, lr / (1 - args.beta1**self.updates))
        torch._foreach_sub_(self.exact, step)
        for p in self.params:
            p.grad = None
        clipped = (norms > limits).to(norms.dtype)
        metrics = {"losses/grad_norm": norms.norm(), "losses/grad_clipped": clipped.mean()}
        module_norms = (self.member @ norms.square()).sqrt()
        module_clipped = self.member @ clipped / self.member.sum(1)
        for name, norm, share in zip(self.modules, module_norms, module_clipped, strict=True):
            metrics |= {f"grad_norm/{name}": norm, f"grad_clipped/{name}": share}
        return metrics | {"charts/lr": lr}


# ---- 10. Agent -----------------------------------------------------------------------------------


def compiler_works(device):
    """Whether torch.compile can build for this device; says why not."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(8, device=device))
        return True
    except Exception as error:
        print(f"torch.compile does not work here, going on without it: {first_line(error)}")
        return False


class CudaGraph:
    """A function of tensors as one CUDA graph for each set of input shapes.

    Launching thousands of small kernels one by one takes longer than running them. The first three
    calls compile and warm up, the next one records, later ones replay. The function may depend on
    nothing but its input, random numbers, and tensors that stay in place.
    """

    def __init__(self, function):
        self.function, self.calls, self.graphs = function, {}, {}
        self.stream = torch.cuda.Stream()

    def __call__(self, *inputs):
        key = tuple(getattr(x, "shape", x) for x in tree_leaves(inputs))
        self.calls[key] = self.calls.get(key, 0) + 1
        if self.calls[key] <= 3:  # on the stream that will record
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                outputs = self.function(*inputs)
            torch.cuda.current_stream().wait_stream(self.stream)
            return outputs
        if key not in self.graphs:
            static = tree_map_only(torch.Tensor, torch.clone, inputs)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self.stream):
                outputs = self.function(*static)
            self.graphs[key] = graph, static, outputs
        graph, static, outputs = self.graphs[key]
        for to, x in zip(tree_leaves(static), tree_leaves(inputs), strict=True):
            if isinstance(x, torch.Tensor):
                to.copy_(x, non_blocking=True)
        graph.replay()
        return tree_map(torch.clone, outputs)


class Agent:
    """The networks with their optimizer: `act` in the environment, `train_step` on replay.

    `exact` holds the float32 parameters, which the optimizer moves and checkpoints keep. `model`,
    which computes, is the same module, or a copy with matrices rounded to bfloat16. [D23]
    """

    def __init__(self, args, spaces, device="cpu", dtype=torch.float32):
        self.args, self.spaces, self.device = args, spaces, torch.device(device)
        self.exact = self.model = Dreamer(args, spaces).to(self.device)
        if dtype == torch.bfloat16:
            self.model = copy.deepcopy(self.exact)
            for module in self.model.modules():
                if isinstance(module, (Linear, Conv, BlockLinear)):
                    module.to(dtype)
        self.fuse = lambda function: function
        if args.compile and compiler_works(self.device):
            # The pieces, not the loops over time around them: unrolled, those take minutes.
            self.fuse = functools.cache(functools.partial(torch.compile, dynamic=False))
            model, rssm = self.model, self.model.rssm
            model.encoder.forward = self.fuse(model.encoder.forward)
            model.decoder.forward = self.fuse(model.decoder.forward)
            rssm.observe_step = self.fuse(rssm.observe_step)
            model.imagine_step = self.fuse(model.imagine_step)
        owners = [name.split(".")[0] for name, _ in self.exact.named_parameters()]
        named = zip(owners, self.pairs(), strict=True)
        trained = [(owner, p, x) for owner, (p, x) in named if p.requires_grad]
        self.optimizer = LaProp(*zip(*trained, strict=True), args)
        if args.compile and self.device.type == "cuda":
            self.act, self.train_step = CudaGraph(self.act), CudaGraph(self.train_step)

    def pairs(self):
        """Each parameter that computes, with the exact one."""
        return zip(self.model.parameters(), self.exact.parameters(), strict=True)

    def initial(self, num_envs):
        """What `act` carries on: deter (n, D), stoch (n, S, K), previous action (n, A); zeros."""
        deter, stoch = self.model.rssm.initial(num_envs)
        return deter, stoch, deter.new_zeros(num_envs, self.spaces.action_width)

    @torch.compiler.set_stance("force_eager")  # too small to be worth compiling
    @torch.no_grad()
    def act(self, obs, carry, greedy=False):
        """One decision for n environments: obs dict of (n, ...) with is_first, carry -> new carry.

        The new carry is the posterior state at this observation and the action vector (n, A):
        sampled, or the most likely one if `greedy`.
        """
        deter, stoch, prev_action = carry
        obs = {key: x.unsqueeze(1) for key, x in obs.items()}  # sequences of one step
        embed, prev_action = self.model.encoder(obs), prev_action.unsqueeze(1)
        observe = self.model.rssm.observe
        deter, stoch, _ = observe(embed, prev_action, obs["is_first"], deter, stoch)
        deter, stoch = deter.squeeze(1), stoch.squeeze(1)
        policy = self.model.actor(self.model.rssm.feat(deter, stoch))
        return deter, stoch, policy.sample(greedy)

    def loss(self, batch):
        """The sum of all losses (scalar), metrics, and the posterior states (B, T, ...).

        batch: obs dict (B, T, ...), prev_action (B, T, A), reward, is_first, is_last, is_terminal
        (B, T), and the state before the first step, deter (B, D), stoch (B, S, K).
        """
        args, model = self.args, self.model
        losses, deter, stoch, metrics = world_model_loss(model, batch, args)
        starts = deter.detach().flatten(0, 1), stoch.detach().flatten(0, 1)  # (N, ...)
        feat, action = imagine(model, *starts, args.imag_horizon)
        behave = self.fuse(actor_critic_loss)
        behaviour, returns, behaviour_metrics = behave(model, feat, action, args)
        bootstrap = returns[:, 0].unflatten(0, deter.shape[:2])  # (B, T)
        losses |= behaviour
        feat = model.rssm.feat(deter, stoch)  # with gradient into the world model
        losses["repval"] = replay_critic_loss(model, feat, bootstrap, batch, args)

        # One sum (Eq. 2 and the losses of actor and critic). [D20]
        scales = dict.fromkeys(losses, args.beta_pred)  # reconstructions, reward, cont
        scales |= {"dyn": args.beta_dyn, "rep": args.beta_rep}
        scales |= {"actor": 1.0, "critic": args.beta_val, "repval": args.beta_repval}
        means = {name: loss.mean() for name, loss in losses.items()}
        total = sum(scales[name] * mean for name, mean in means.items())
        metrics |= behaviour_metrics | {f"losses/{name}": mean for name, mean in means.items()}
        metrics = {name: value.detach() for name, value in metrics.items()}
        return total, metrics, deter.detach(), stoch.detach()

    def update(self, batch):
        """Losses, gradients, optimizer, slow critic. batch as in `loss`; metrics, deter, stoch."""
        total, metrics, deter, stoch = self.loss(batch)
        total.backward()
        metrics |= {"losses/total": total.detach()} | self.optimizer.step()
        slow, critic = self.exact.slow_critic.parameters(), self.exact.critic.parameters()
        with torch.no_grad():
            torch._foreach_lerp_(list(slow), list(critic), self.args.tau)
        self.refresh()
        return metrics, deter, stoch

    @torch.no_grad()
    def refresh(self):
        """Round the exact parameters again for the model that computes."""
        if self.model is not self.exact:
            torch._foreach_copy_(*map(list, zip(*self.pairs(), strict=True)))

    def train_step(self, batch):
        """One update of everything. batch: T+1 steps as `Replay` gives them, as tensors.

        The first step is only context: its action and stored state, deter (B, D) and stoch (B, S),
        start the sequence [D21]. Returns the metrics and what the replay stores for the T steps:
        deter (B, T, D) float16 and the classes of stoch (B, T, S) uint8.
        """
        metrics, deter, stoch = self.update(self.after_context(batch))
        return metrics, deter.half(), stoch.argmax(-1).to(torch.uint8)

    def after_context(self, batch):
        """T+1 steps as in `train_step` -> the T steps that `loss` wants."""
        flags = ("reward", "is_first", "is_last", "is_terminal")
        steps = {key: batch[key][:, 1:] for key in flags}
        steps["obs"] = {key: batch[key][:, 1:] for key in ("image", "vector") if key in batch}
        steps["prev_action"] = batch["action"][:, :-1]
        steps["deter"] = batch["deter"].to(self.model.bins.dtype)
        steps["stoch"] = one_hot(batch["stoch"], self.model.rssm.stoch_shape[1])
        return steps

    def state_dict(self):
        """Everything that learns, as a dict of dicts of tensors (float32)."""
        self.exact.return_range.copy_(self.model.return_range)
        return {"model": self.exact.state_dict(), "optimizer": self.optimizer.state}

    @torch.no_grad()
    def load_state_dict(self, state):
        """Take over a `state_dict`. Raises UserError if it belongs to other networks."""
        try:
            self.exact.load_state_dict(state["model"])
            torch._foreach_copy_(self.optimizer.state, state["optimizer"])
        except (KeyError, RuntimeError) as error:
            raise UserError("the checkpoint's networks do not fit this environment") from error
        self.model.return_range.copy_(self.exact.return_range)
        self.refresh()


# ---- 11. Replay ----------------------------------------------------------------------------------


class Replay:
    """Ring of the last steps of every environment, with the latent state of each step.

    One stream per environment; all have the same length, as environments step together. Sequences
    cross episodes: the RSSM resets at is_first. Images are uint8; latents are float16 (|h| < 1) and
    class indices. An entry is one step of all environments: arrays are (rows, num_envs, ...). With
    a `path` they are one file mapped into memory, which grows as it fills: what was written
    survives the process at once, and a checkpoint need not copy it.
    """

    block = 1024  # steps by which the file grows

    def __init__(self, length, num_envs, spaces, rssm, args, path=None):
        vector = sum(width for _, width, _ in spaces.vectors)
        fields = [
            ("image", np.uint8, (IMAGE_SIZE, IMAGE_SIZE, spaces.channels)),
            ("vector", np.float32, (vector,)),
            ("action", np.float32, (spaces.action_width,)),
            ("reward", np.float32, ()),
            ("is_first", np.bool_, ()),
            ("is_last", np.bool_, ()),
            ("is_terminal", np.bool_, ()),
            ("deter", np.float16, (rssm.deter_dim,)),
            ("stoch", np.uint8, (rssm.stoch_shape[0],)),
        ]
        fields = [
            (name, kind, (num_envs, *shape)) for name, kind, shape in fields if 0 not in shape
        ]
        self.names = [name for name, _, _ in fields]
        self.entry = np.dtype([("step", np.int64), *fields], align=True)
        self.length, self.num_envs, self.path = length, num_envs, path
        self.batch_size, self.window = args.batch_size, args.batch_length + 1
        self.steps = 0  # written to each stream so far; step i is at i % length
        self.lost = 0  # steps before this one may not be read: see `load_state_dict`
        self.fresh = deque()  # (env, first step) of sequences to give out first: online queue
        self.rng = np.random.default_rng(args.seed)
        # In memory, zeros take no room until something is written.
        self.data = np.zeros(0 if path else length, self.entry)

    @property
    def oldest(self):
        """The first step that can be read."""
        return max(self.lost, self.steps - self.length)

    def __len__(self):
        """Number of start positions of sequences."""
        return self.num_envs * max(0, self.steps - self.oldest - self.window + 1)

    def grow(self, rows):
        """Make the file long enough for this many steps, and map it. Raises UserError."""
        size = rows * self.entry.itemsize
        before = self.path.stat().st_size if self.path.exists() else 0
        try:
            with open(self.path, "ab") as file:
                # Zeros, and not a hole: a full disk must fail here, where it can be caught.
                for start in range(before, size, 2**24):
                    file.write(bytes(min(2**24, size - start)))
        except OSError as error:
            with contextlib.suppress(OSError):
                os.truncate(self.path, before)  # room for a checkpoint
            raise UserError(f"cannot grow the replay {self.path}: {error}") from error
        self.data = np.memmap(self.path, self.entry, "r+", shape=(rows,))

    def add(self, entry):
        """Append one step of every environment: dict of arrays (num_envs, ...)."""
        row = self.steps % self.length
        if row >= len(self.data):
            self.grow(min(row + self.block, self.length))
        self.data["step"][row] = self.steps  # first: from here on, the old step is gone
        for name in self.names:
            self.data[name][row] = entry[name]
        self.steps += 1
        if self.steps % self.window == 0:
            self.fresh.extend((env, self.steps - self.window) for env in range(self.num_envs))

    def sample(self):
        """A batch of T+1 steps, dict of arrays (B, T+1, ...) without latents, and its place.

        Sequences that were just completed come first, each once; the rest is drawn uniformly.
        """
        starts = []
        while self.fresh and len(starts) < self.batch_size:
            env, start = self.fresh.popleft()
            if start >= self.oldest:
                starts.append((env, start))
        return self.read(starts + self.uniform(self.rng, self.batch_size - len(starts)))

    def uniform(self, rng, count):
        """Start positions [(env, first step)], each one equally likely."""
        indices = rng.integers(len(self), size=count)
        return [(i % self.num_envs, self.oldest + i // self.num_envs) for i in indices]

    def read(self, starts):
        """The sequences that begin there, as `sample` gives them."""
        envs, first = np.array(starts).T[:, :, None]  # (B, 1) each
        place = (first + np.arange(self.window)) % self.length, envs
        latents = ("deter", "stoch")
        batch = {name: self.data[name][place] for name in self.names if name not in latents}
        # An episode abandoned without is_last ends where the next one begins.
        batch["is_last"][:, :-1] |= batch["is_first"][:, 1:]
        return batch, place

    def read_latents(self, place):
        """The stored states at a batch's first step, its context: deter (B, D), stoch (B, S)."""
        steps, envs = place
        return {name: self.data[name][steps[:, 0], envs[:, 0]] for name in ("deter", "stoch")}

    def write_latents(self, place, deter, stoch):
        """Store the states an update computed, (B, T, D) and (B, T, S), for all but the context."""
        steps, envs = place
        self.data["deter"][steps[:, 1:], envs] = deter
        self.data["stoch"][steps[:, 1:], envs] = stoch

    def state_dict(self):
        """What the file does not hold; with the replay in memory, nothing."""
        rng = json.dumps(self.rng.bit_generator.state)
        state = {"steps": self.steps, "fresh": list(map(list, self.fresh)), "rng": rng}
        return state if self.path else None

    def load_state_dict(self, state):
        """Go on from the file as it was at a checkpoint. Raises UserError if it is damaged.

        Steps from after the checkpoint are dropped: the run writes them anew. Where they had
        overwritten the oldest steps of the ring, those are lost, and must not be read. (States
        that lost updates stored stay: every state is of some older network.)
        """
        self.steps, self.fresh = state["steps"], deque(map(tuple, state["fresh"]))
        self.rng.bit_generator.state = json.loads(state["rng"])
        if not self.steps:
            return
        rows = min(self.steps, self.length)
        if not self.path.exists() or self.path.stat().st_size < rows * self.entry.itemsize:
            raise UserError(f"the replay {self.path} is missing or too short")
        self.grow(rows)
        steps = np.arange(self.steps - rows, self.steps)
        lost = steps[self.data["step"][steps % self.length] != steps]
        self.lost = lost.max() + 1 if len(lost) else 0


# ---- 12. Environments ----------------------------------------------------------------------------


def make_envs(args, num_envs, video=None):
    """Gymnasium vector environment with NEXT_STEP autoreset; `video`: folder to record in, or None.

    Raises UserError if it cannot be made.
    """
    try:
        kwargs = json.loads(args.env_kwargs)
        if not isinstance(kwargs, dict):
            raise ValueError
    except (ValueError, RecursionError) as error:
        raise UserError(f"--env-kwargs must be a JSON object, not {args.env_kwargs}") from error
    atari = args.env_id.split(":")[-1].startswith("ALE/")
    if atari:
        import_optional("ale_py", "gymnasium[atari]")  # registers its environments
    if video:  # vector environments do not render
        kwargs["render_mode"] = "rgb_array"
    elif atari:
        # The C++ environment takes the maximum over two frames and resizes. Rewards and lives stay
        # as the game has them.
        defaults = dict(img_height=IMAGE_SIZE, img_width=IMAGE_SIZE, grayscale=False, stack_num=1)
        defaults |= dict(use_fire_reset=False, reward_clipping=False, episodic_life=False)
        kwargs = defaults | kwargs

    def make(index):
        """One environment of several."""
        if multiprocessing.parent_process():  # Ctrl-C reaches all: leave the answer to the parent
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        env = gym.make(args.env_id, disable_env_checker=True, **kwargs)  # `Guard` checks
        if video:
            env = gym.wrappers.RecordVideo(env, str(video), lambda episode: True)
        if args.action_repeat > 1:
            env = ActionRepeat(env, args.action_repeat)
        return Guard(env, index)

    try:
        module, _, name = args.env_id.rpartition(":")
        if module:
            importlib.import_module(module)
        own_vector = getattr(gym.registry.get(name), "vector_entry_point", None)
        single = args.async_envs or args.action_repeat > 1
        if own_vector and not video and (atari or not single):
            envs = gym.make_vec(args.env_id, num_envs, **kwargs)
        else:
            vector = gym.vector.SyncVectorEnv
            if args.async_envs:
                vector = gym.vector.AsyncVectorEnv
                gym.logger.min_level = 50  # off: it would print what `Guard` says
            envs = vector([functools.partial(make, index) for index in range(num_envs)])
    except Exception as error:
        raise UserError(f"cannot make --env-id {args.env_id}: {error}") from error
    if envs.metadata.get("autoreset_mode") != gym.vector.AutoresetMode.NEXT_STEP:
        raise UserError(f"{args.env_id} does not reset in NEXT_STEP mode: try --async-envs")
    return envs


class ActionRepeat(gym.Wrapper):
    """Takes each action `repeat` times, or until the episode ends; the rewards are added up."""

    def __init__(self, env, repeat):
        super().__init__(env)
        self.repeat = repeat

    def step(self, action):
        """As gymnasium.Env.step."""
        total = 0.0
        for _ in range(self.repeat):
            obs, reward, terminated, truncated, info = self.env.step(action)
            total += reward
            if terminated or truncated:
                break
        return obs, total, terminated, truncated, info


class Guard(gym.Wrapper):
    """Says in one line what an environment does wrong: which one, at which step, what."""

    def __init__(self, env, index):
        super().__init__(env)
        self.index, self.steps = index, 0

    def reset(self, **kwargs):
        """As gymnasium.Env.reset."""
        return self.check(lambda: self.env.reset(**kwargs))

    def step(self, action):
        """As gymnasium.Env.step."""
        return self.check(lambda: self.env.step(action))

    def check(self, call):
        """The result of `call`. Raises UserError if it fails or does not fit the space."""
        self.steps += 1
        try:
            obs, *rest = result = call()
            for name, (path, space) in leaves(self.observation_space).items():
                value = pick(obs, path)
                if value.shape != (space.shape or ()):
                    raise ValueError(f"{name} has shape {value.shape}, its space {space.shape}")
                if not np.can_cast(value.dtype, space.dtype, "same_kind"):
                    raise ValueError(f"{name} is {value.dtype}, its space {space.dtype}")
                if discrete_classes(space) and not space.contains(value):
                    raise ValueError(f"{name} is {value}, not in {space}")
            if len(rest) != 1:  # not of reset
                reward, terminated, truncated, _ = rest
                if np.shape(reward) or not {terminated, truncated} <= {0, 1}:
                    raise ValueError(f"reward {reward}, ends {terminated} and {truncated}")
            return result
        except (Exception, SystemExit) as error:
            problem = f"{type(error).__name__}: {error}"
            raise UserError(
                f"environment {self.index}, its step {self.steps}: {problem}"
            ) from error


def import_optional(module, package):
    """Import a package that only some uses need; a UserError names the command to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"this needs {module}: pip install '{package}'") from error


def leaves(space, path=()):
    """The simple spaces inside nested Dict and Tuple spaces: name -> (path, space), sorted."""
    if not isinstance(space, (gym.spaces.Dict, gym.spaces.Tuple)):
        return {"/".join(("obs", *map(str, path))): (path, space)}
    items = space.items() if isinstance(space, gym.spaces.Dict) else enumerate(space)
    found = [leaf for key, inner in items for leaf in leaves(inner, (*path, key)).items()]
    if len(dict(found)) < len(found):
        raise UserError(f"two observations have the same name: {', '.join(dict(found))}")
    return dict(sorted(found))


def pick(obs, path):
    """What a nested observation has at the end of a path, as an array."""
    return np.asarray(functools.reduce(operator.getitem, path, obs))


def discrete_classes(space):
    """Number of classes of each variable of a discrete space: a tuple; empty for other spaces."""
    if isinstance(space, gym.spaces.Discrete):
        return (int(space.n),)
    if isinstance(space, gym.spaces.MultiDiscrete):
        return tuple(map(int, space.nvec.flat))
    return (2,) * math.prod(space.shape) if isinstance(space, gym.spaces.MultiBinary) else ()


def encode_vector(value, space):
    """(n, ...) values of a space -> (n, width) float32; discrete ones as one-hots side by side."""
    classes = discrete_classes(space)
    if not classes:
        return value.reshape(len(value), -1).astype(np.float32)
    index = (value - getattr(space, "start", 0)).reshape(len(value), -1).astype(np.int64)
    encoded = np.zeros((len(value), sum(classes)), np.float32)
    np.put_along_axis(encoded, index + np.cumsum((0, *classes[:-1])), 1.0, 1)
    return encoded


def encode_image(image):
    """(n, ...) uint8 -> (n, 64, 64, C) uint8, resized by averaging areas.

    One image may be (h, w), (h, w, C), (C, h, w) or a stack (k, h, w, C), which gets k*C channels.
    """
    if image.ndim == 3:
        image = image[..., None]
    elif image.ndim == 5:
        image = np.moveaxis(image, 1, -2).reshape(len(image), *image.shape[2:4], -1)
    elif image.shape[1] < image.shape[3]:  # the smaller end is the colour
        image = np.moveaxis(image, 1, -1)
    if image.shape[1:3] == (IMAGE_SIZE, IMAGE_SIZE):
        return image
    x = torch.from_numpy(np.ascontiguousarray(image)).permute(0, 3, 1, 2).float()
    x = F.interpolate(x, (IMAGE_SIZE, IMAGE_SIZE), mode="area").round().to(torch.uint8)
    return x.permute(0, 2, 3, 1).numpy()


class Environments:
    """A vector environment in the agent's terms: 64x64 images, one flat vector, action vectors.

    `spaces` describes them to the networks. Raises UserError for spaces that cannot be encoded.
    """

    def __init__(self, args, num_envs, seed, video=None):
        self.envs, self.num_envs, self.seed = make_envs(args, num_envs, video), num_envs, seed
        self.images, self.vectors = {}, {}
        self.steps = 0
        for name, (path, space) in leaves(self.envs.single_observation_space).items():
            is_box = isinstance(space, gym.spaces.Box)
            if 0 in (space.shape or ()):
                raise UserError(f"{name}: the space is empty, {space}")
            if is_box and space.dtype == np.uint8 and 2 <= len(space.shape) <= 4:
                self.images[name] = path, space
            elif is_box or discrete_classes(space):
                self.vectors[name] = path, space
            else:
                raise UserError(f"{name}: cannot encode a {type(space).__name__} space")
        self.action_space = space = self.envs.single_action_space
        classes = discrete_classes(space)
        if not classes and not isinstance(space, gym.spaces.Box) or 0 in space.shape:
            raise UserError(f"actions of a {type(space).__name__} space are not supported")
        example = self.encode_obs(self.envs.observation_space.sample())
        vectors = []
        for name, (_, space) in self.vectors.items():
            classes_of = discrete_classes(space)
            vectors.append((name, sum(classes_of) or math.prod(space.shape), classes_of))
        channels = example["image"].shape[-1] if self.images else 0
        width = sum(classes) or math.prod(self.action_space.shape)
        self.spaces = Spaces(channels, tuple(vectors), classes, width)

    def reset(self):
        """First observations of all environments: dict of arrays (n, ...)."""
        return self.encode_obs(self.call(lambda: self.envs.reset(seed=self.seed))[0])

    def send(self, action):
        """Begin a step with action vectors (n, A); `receive` ends it.

        Between the two, environments that can (Atari, --async-envs) run beside the training.
        """
        self.action = self.decode_action(action)
        begin = getattr(self.envs, "send", getattr(self.envs, "step_async", None))
        if begin:
            self.call(begin, self.action)

    def receive(self):
        """obs, reward, terminated, truncated; after an end, the next episode's first obs."""
        end = getattr(self.envs, "recv", getattr(self.envs, "step_wait", None))
        result = self.call(end) if end else self.call(self.envs.step, self.action)
        obs, reward, terminated, truncated, _ = result
        self.steps += 1
        reward = np.asarray(reward, np.float32)
        self.check_finite("the reward", reward)
        return (
            self.encode_obs(obs),
            reward,
            np.asarray(terminated, bool),
            np.asarray(truncated, bool),
        )

    def call(self, function, *args):
        """The result of a function of the vector environment. Raises UserError for any failure."""
        try:
            return function(*args)
        except UserError:
            raise
        except Exception as error:  # such as EOFError: a process of --async-envs has died
            problem = f"{type(error).__name__}: {error}"
            raise UserError(f"the environments failed at step {self.steps}: {problem}") from error

    def close(self):
        """End the environments; those that have died already cannot say so."""
        with contextlib.suppress(Exception):
            self.envs.close()
        self.envs.closed = True  # or it would try again when it is deleted

    def check_finite(self, name, values):
        """Raise UserError if one of the values (n, ...) is not a finite number."""
        bad = ~np.isfinite(values).reshape(self.num_envs, -1).all(1)
        if bad.any():
            raise UserError(f"environment {bad.argmax()}, step {self.steps}: {name} is not finite")

    def encode_obs(self, obs):
        """Batched observations -> dict of `image` (n, 64, 64, C) and `vector` (n, width)."""
        encoded = {}
        if self.images:
            images = [encode_image(pick(obs, path)) for path, _ in self.images.values()]
            encoded["image"] = np.concatenate(images, -1)
        if self.vectors:
            vectors = []
            for name, (path, space) in self.vectors.items():
                vectors.append(encode_vector(pick(obs, path), space))
                self.check_finite(name, vectors[-1])
            encoded["vector"] = np.concatenate(vectors, -1)
        return encoded

    def decode_action(self, action):
        """Action vectors (n, A) -> the environment's actions.

        Continuous ones are clipped to [-1, 1] and scaled to the bounds, where there are any.
        """
        space = self.action_space
        if classes := self.spaces.action_classes:
            parts = np.split(action, np.cumsum(classes)[:-1], -1)
            index = np.stack([part.argmax(-1) for part in parts], -1).reshape(-1, *space.shape)
            return index.astype(space.dtype) + getattr(space, "start", 0)
        action = action.reshape(-1, *space.shape)
        bounded = np.isfinite(space.low) & np.isfinite(space.high)
        low = np.where(bounded, space.low, -1.0).astype(np.float64)  # high - low may be large
        high = np.where(bounded, space.high, 1.0).astype(np.float64)
        scaled = low + (np.clip(action, -1, 1) + 1) / 2 * (high - low)
        action = np.clip(np.where(bounded, scaled, action), space.low, space.high)
        return (np.rint(action) if space.dtype.kind in "iu" else action).astype(space.dtype)


# ---- 13. Logging, training, evaluation, looking inside, checkpoint -------------------------------


class Logger:
    """Metrics to metrics.jsonl, to TensorBoard if it is installed, to W&B with --track.

    Holds the run's folder against other processes. A resumed run begins at `step`.

    The status line is rewritten in place on a terminal, and printed every ten seconds elsewhere.
    """

    def __init__(self, args, folder, step=0, updates=0):
        self.lock = None
        with contextlib.suppress(ImportError):  # which Windows does not have
            fcntl, self.lock = importlib.import_module("fcntl"), os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(f"{folder} is in use by another process") from error
        path, lines = folder / "metrics.jsonl", []
        if step:  # a resumed run: drop what was written after its checkpoint
            for line in path.read_bytes().splitlines() if path.exists() else ():
                with contextlib.suppress(ValueError, TypeError, KeyError):  # the last may be torn
                    entry = json.loads(line)
                    lines += [entry] if entry["step"] <= step and entry["time"] >= 0 else []
        text = "".join(f"{json.dumps(entry)}\n" for entry in lines)
        path.with_suffix(".tmp").write_text(text)
        os.replace(path.with_suffix(".tmp"), path)
        self.file = open(path, "a", buffering=1)
        self.tensorboard = self.wandb = None
        with contextlib.suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(folder, purge_step=step + 1)
        if args.track:
            self.wandb = import_optional("wandb", "wandb")
            where = dict(project=args.wandb_project_name, entity=args.wandb_entity)
            same = dict(id=re.sub(r"\W", "-", folder.name), resume="allow")
            self.wandb.init(**where, **same, name=folder.name, config=asdict(args))
        self.total, self.terminal = args.total_timesteps, sys.stdout.isatty()
        self.began = time.time() - (lines[-1]["time"] if lines else 0)
        # (time, step, updates) of the last status lines
        self.marks = deque([(time.time(), step, updates)], maxlen=20)
        self.returns, self.rates = deque(maxlen=20), (0.0, 0.0)  # steps, updates a second

    def write(self, step, metrics):
        """One line of scalars, those that are finite: dict of name -> number or 0-d tensor."""
        metrics = {name: float(value) for name, value in metrics.items()}
        metrics = {name: value for name, value in metrics.items() if math.isfinite(value)}
        line = {"step": step, "time": round(time.time() - self.began, 3)} | metrics
        self.file.write(json.dumps(line) + "\n")
        if self.tensorboard:
            for name, value in metrics.items():
                self.tensorboard.add_scalar(name, value, step)
        if self.wandb:
            self.wandb.log(metrics, step=step)

    def report(self, step, metrics, files):
        """What `report` found: metrics, and files to look at, a table first, then pictures."""
        self.write(step, metrics)
        kinds = ", ".join(path.suffix for path in files)
        self.show(f"step {step:,}  what the model foresees: {files[0].with_suffix('')} ({kinds})")
        for path in files[1:]:  # the pictures
            name = f"dreams/{path.suffix[1:]}"
            if self.tensorboard:
                from tensorboard.compat.proto.summary_pb2 import Summary

                image = Summary.Image(colorspace=3, encoded_image_string=path.read_bytes())
                value = Summary.Value(tag=name, image=image)
                self.tensorboard.file_writer.add_summary(Summary(value=[value]), step)
            if self.wandb:
                kind = self.wandb.Image if path.suffix == ".png" else self.wandb.Video
                self.wandb.log({name: kind(str(path))}, step=step)

    def episode(self, step, episode_return, length):
        """A finished training episode: raw return, length in agent steps."""
        self.returns.append(episode_return)
        names = ("charts/episodic_return", "charts/episodic_length")
        self.write(step, dict(zip(names, (episode_return, length), strict=True)))

    def status(self, step, updates):
        """Show the status line if it is time for it."""
        now = time.time()
        if now - self.marks[-1][0] < (0.5 if self.terminal else 10):
            return
        self.marks.append((now, step, updates))
        seconds, steps, trained = np.subtract(self.marks[-1], self.marks[0])
        self.rates = steps / seconds, trained / seconds
        text = f"step {step:,}/{self.total:,}  {self.rates[0]:.1f} steps/s  "
        text += f"{self.rates[1]:.2f} updates/s  "
        if trained:  # before the first updates, the speed says nothing
            left = (self.total - step) / self.rates[0]
            text += f"{datetime.timedelta(seconds=int(left))} left  "
        if self.returns:
            text += f"return {self.returns[-1]:.1f}, mean {np.mean(self.returns):.1f}"
        self.show(text, end="" if self.terminal else "\n")

    def show(self, text, end="\n"):
        """Print a line in place of the status line."""
        with contextlib.suppress(BrokenPipeError):  # `| head` does not end a run
            print(f"\r\x1b[2K{text}" if self.terminal else text, end=end, flush=True)

    def close(self):
        """Flush and close everything."""
        with contextlib.suppress(OSError):  # what a full disk did not take
            self.file.close()
        if self.lock is not None:
            os.close(self.lock)
        if self.tensorboard:
            self.tensorboard.close()
        if self.wandb:
            self.wandb.finish()


def to_device(arrays, device):
    """dict of numpy arrays -> dict of tensors, through pinned memory to a GPU."""
    tensors = {key: torch.from_numpy(np.ascontiguousarray(x)) for key, x in arrays.items()}
    if device.type == "cpu":
        return tensors
    return {key: x.pin_memory().to(device, non_blocking=True) for key, x in tensors.items()}


def keep_freed_memory():
    """Have glibc keep freed memory for the next update instead of giving it back to the system.

    Getting large blocks again costs a page fault every 4 kB: half of an update on images.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        mmap_max, trim_threshold = -4, -1  # names of glibc's malloc.h
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, -1)


def peak_memory(device):
    """The most memory taken so far, on the GPU or in this process: GB; 0 where nobody tells."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    with contextlib.suppress(ImportError):  # which Windows does not have
        resource = importlib.import_module("resource")
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
    return 0.0


COUNTERS = ("step", "updates", "credit", "evaluated")


class Trainer:
    """Collection and training: what a run carries from one step to the next."""

    def __init__(self, args, device, dtype, replay_path=None, checkpoint=None):
        self.args, n = args, args.num_envs
        # A resumed run begins new episodes: not those of its start, nor those of evaluations.
        seed = args.seed + (100_000 + checkpoint["step"] if checkpoint else 0)
        self.envs = Environments(args, n, seed)
        try:
            self.agent = Agent(args, self.envs.spaces, device, dtype)
        except RuntimeError as error:
            raise UserError(f"cannot make networks of this size: {first_line(error)}") from error
        steps = args.buffer_size if replay_path else min(args.buffer_size, args.total_timesteps + n)
        sizes = -(-steps // n), n, self.envs.spaces, self.agent.model.rssm, args
        self.replay = Replay(*sizes, replay_path)
        if device.type == "cpu":
            keep_freed_memory()  # not before: the zeros of a replay in memory are to stay untouched
        self.step = self.updates = self.evaluated = 0  # steps, updates, step of the last evaluation
        self.updates_per_step = args.train_ratio / (args.batch_size * args.batch_length)
        self.credit = float(self.updates_per_step > 0)  # updates owed; the first one at once
        self.starts_needed = args.batch_size * args.batch_length  # before training begins [D22]
        self.metrics, self.pending = {}, None  # of the latest update; states not yet stored
        if checkpoint:
            self.load_state_dict(checkpoint)
        self.obs, self.carry = self.envs.reset(), self.agent.initial(n)
        self.is_first, self.is_last = np.ones(n, bool), np.zeros(n, bool)
        self.is_terminal, self.reward = np.zeros(n, bool), np.zeros(n, np.float32)
        self.episode_return, self.episode_length = np.zeros(n), np.zeros(n, int)

    def collect_and_train(self):
        """One step of every environment and the updates due: [(return, length)] of episodes."""
        # Act. Nothing is chosen at the last step of an episode: zeros. [D24]
        obs = to_device(self.obs | {"is_first": self.is_first}, self.agent.device)
        self.carry = self.agent.act(obs, self.carry)
        latents = self.carry[0].half(), self.carry[1].argmax(-1), self.carry[2]
        deter, stoch, action = (x.cpu().numpy() for x in latents)
        action = action * ~self.is_last[:, None]
        entry = dict(action=action, reward=self.reward, deter=deter, stoch=stoch)
        flags = dict(is_first=self.is_first, is_last=self.is_last, is_terminal=self.is_terminal)
        self.write_latents()  # before the ring moves on
        self.replay.add(self.obs | entry | flags)
        self.step += self.args.num_envs
        self.envs.send(action)

        # Train, while the environments step. [D22]
        if len(self.replay) >= self.starts_needed:
            while self.credit >= 1:
                self.train()
                self.credit -= 1
            self.credit += self.args.num_envs * self.updates_per_step

        # See what the action led to.
        self.obs, self.reward, self.is_terminal, truncated = self.envs.receive()
        self.is_first, self.is_last = self.is_last, self.is_terminal | truncated
        self.episode_return += self.reward
        self.episode_length += ~self.is_first
        ended = self.is_last
        episodes = list(zip(self.episode_return[ended], self.episode_length[ended], strict=True))
        self.episode_return[ended] = self.episode_length[ended] = 0
        return episodes

    def train(self):
        """One update. A GPU goes on with it when this returns."""
        batch, place = self.replay.sample()  # while a GPU is busy with an update just before
        self.write_latents()
        batch |= self.replay.read_latents(place)
        batch = to_device(batch, self.agent.device)
        self.metrics, *latents = self.agent.train_step(batch)
        self.pending = place, latents
        self.updates += 1

    def write_latents(self):
        """Put the states that the latest update computed into the replay; waits for the update.

        Raises UserError if it was not finite: its states would spoil the replay, and its networks
        the checkpoint.
        """
        if self.pending:
            losses = [name for name in self.metrics if name.startswith("losses/")]
            bad = [name for name in losses if not math.isfinite(self.metrics[name])]
            if bad:
                raise UserError(f"update {self.updates} was not finite: {', '.join(bad)}")
            place, latents = self.pending
            self.replay.write_latents(place, *(x.cpu().numpy() for x in latents))
            self.pending = None

    def usage(self):
        """What the run takes: updates, share and size of the filled replay, peak memory."""
        rows = min(self.replay.steps, self.replay.length)
        return {
            "charts/updates": self.updates,
            "charts/replay_fill": rows / self.replay.length,
            "charts/replay_gb": rows * self.replay.entry.itemsize / 1e9,
            "charts/memory_gb": peak_memory(self.agent.device),
        }

    def state_dict(self):
        """All that a resumed run needs beside the replay's file. Raises UserError, see above."""
        self.write_latents()
        counters = {name: getattr(self, name) for name in COUNTERS}
        random = {"cpu": torch.get_rng_state()}
        if self.agent.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self.agent.device)
        state = {"agent": self.agent.state_dict(), "replay": self.replay.state_dict()}
        return counters | state | {"random": random, "spaces": repr(self.envs.spaces)}

    def load_state_dict(self, state):
        """Take over a `state_dict`. Raises UserError if it does not fit."""
        if state["spaces"] != repr(self.envs.spaces):
            raise UserError(f"the environment has other spaces now: {self.envs.spaces}")
        self.agent.load_state_dict(state["agent"])
        for name in COUNTERS:
            setattr(self, name, state[name])
        if self.replay.path and state["replay"]:
            self.replay.load_state_dict(state["replay"])
        torch.set_rng_state(state["random"]["cpu"])
        if self.agent.device.type == "cuda" and "cuda" in state["random"]:
            torch.cuda.set_rng_state(state["random"]["cuda"], self.agent.device)


LONGEST_EPISODE = 100_000  # steps after which an evaluation counts an episode as it stands


def evaluate(agent, args, episodes, video=None, stop=()):
    """Returns of `episodes` episodes in environments of their own; `video`: folder to record in.

    Takes the most likely actions, or samples with --eval-sample. Each environment plays a fixed
    number of episodes: taking the first ones to finish would favour short episodes. Ends at once,
    with fewer, when something is put into the list `stop`.
    """
    num_envs = 1 if video else min(episodes, 8)
    envs = Environments(args, num_envs, seed=args.seed + 10_000, video=video)
    remaining = np.array([len(range(i, episodes, num_envs)) for i in range(num_envs)])
    obs, is_first, carry = envs.reset(), np.ones(num_envs, bool), agent.initial(num_envs)
    running, returns, is_last = np.zeros(num_envs), [], np.zeros(num_envs, bool)
    length = np.zeros(num_envs, int)
    try:
        while remaining.any() and not stop:
            tensors = to_device(obs | {"is_first": is_first}, agent.device)
            carry = agent.act(tensors, carry, not args.eval_sample)
            envs.send(carry[-1].cpu().numpy())
            obs, reward, terminated, truncated = envs.receive()
            running += reward
            is_first, is_last = is_last, terminated | truncated
            length += 1
            over = is_last | (length >= LONGEST_EPISODE)
            returns += list(running[over & (remaining > 0)])
            remaining -= over & (remaining > 0)
            running[over] = length[over] = 0
    finally:
        envs.close()
    return np.array(returns)


def summary(returns):
    """Mean, spread and range of returns as text."""
    text = f"mean {returns.mean():.1f}"
    if len(returns) > 1:
        text += f" +- {returns.std(ddof=1) / len(returns) ** 0.5:.1f} (standard error)"
    text += f", median {np.median(returns):.1f}, min {returns.min():.1f}, max {returns.max():.1f}"
    return f"{text}, {len(returns)} episodes"


@torch.compiler.set_stance("force_eager")  # too rare to be worth compiling
@torch.no_grad()
def open_loop(model, steps, seen):
    """What the model foresees of T replayed steps of which it sees the first `seen`.

    From then on the prior takes the posterior's place, with the recorded actions. steps as in
    `Agent.loss`. Returns name -> (truth, prediction), (B, T, ...) each, of every observation and
    the reward, and the posterior features of all steps (B, T, F).
    """
    actions, is_first = steps["prev_action"], steps["is_first"]
    embed = model.encoder(steps["obs"])
    deter, stoch, _ = model.rssm.observe(embed, actions, is_first, steps["deter"], steps["stoch"])
    states = list(zip(deter[:, :seen].unbind(1), stoch[:, :seen].unbind(1), strict=True))
    weights = model.rssm.weights()
    for t in range(seen, actions.shape[1]):
        states.append(model.rssm.imagine_step(*states[-1], actions[:, t], weights))
    foreseen = [torch.stack(x, 1) for x in zip(*states, strict=True)]
    pairs = model.decoder.truth_and_prediction(model.decoder(*foreseen), steps["obs"])
    reward = twohot_mean(model.reward(model.rssm.feat(*foreseen)), model.bins)
    return pairs | {"reward": (steps["reward"], reward)}, model.rssm.feat(deter, stoch)


@torch.no_grad()
def critic_calibration(model, feat, steps, args):
    """What the critic says of the next T // 2 replayed steps against their rewards: metrics.

    feat (B, T, F). Said of n steps is v[t] - gamma^n v[t+n], or what is left of it when the episode
    ends before; realised are the discounted rewards. All windows of n steps are taken.
    """
    value = twohot_mean(model.critic(feat), model.bins)
    last = steps["is_last"].to(value.dtype)
    cont = (1 - steps["is_terminal"].to(value.dtype)) * args.gamma
    n = value.shape[1] // 2
    windows = lambda x: x.unfold(1, n + 1, 1).flatten(0, 1)  # (B (T - n), n + 1)
    reward, value, cont, last = map(windows, (steps["reward"], value, cont, last))
    zeros = torch.zeros_like(value)
    realised = lambda_return(reward, zeros, cont, last, 1.0)[:, 0]
    predicted = value[:, 0] - lambda_return(zeros, value, cont, last, 1.0)[:, 0]
    pairs = torch.stack([predicted, realised])[:, last[:, 0] == 0]  # nothing follows an end
    if pairs.shape[1] < 2:
        return {}
    return {
        "report/critic_predicted": pairs[0].mean(),
        "report/critic_realised": pairs[1].mean(),
        "report/critic_error": (pairs[0] - pairs[1]).square().mean().sqrt(),
        "report/critic_correlation": torch.corrcoef(pairs)[0, 1],  # nan if one is constant
    }


def report(trainer, path):
    """Look inside: open-loop prediction and critic, on sequences drawn from the replay.

    Writes a table of errors to the `path`, vectors and rewards as arrays beside it (.npz), and of
    images a film strip (.png) and, if Pillow is installed, a film (.gif). Returns metrics, and the
    files for people.
    """
    args, agent, replay = trainer.args, trainer.agent, trainer.replay
    rng = np.random.default_rng([args.seed, trainer.step])
    trainer.write_latents()  # of a finite update
    batch, place = replay.read(replay.uniform(rng, args.batch_size))
    steps = agent.after_context(to_device(batch | replay.read_latents(place), agent.device))
    seen, cuda = args.batch_length // 2, agent.device.type == "cuda"
    with torch.random.fork_rng([agent.device] if cuda else []):  # the run goes on undisturbed
        pairs, feat = open_loop(agent.model, steps, seen)
    metrics = critic_calibration(agent.model, feat, steps, args)
    pairs = {name: [x.float().cpu().numpy() for x in pair] for name, pair in pairs.items()}
    path.parent.mkdir(exist_ok=True)

    # Nobody can foresee the next episode: what comes after its beginning does not count.
    unforeseeable = batch["is_first"][:, 1 + seen :].cumsum(1) > 0  # (B, T - seen)
    ahead = [k for k in (1, 2, 4, 8, 16, 32, 64, 128) if k <= args.batch_length - seen]
    table = [["key", "constant", *map(str, ahead)]]
    for name, (truth, prediction) in pairs.items() if not unforeseeable.all() else ():
        counts = truth[:, seen:][~unforeseeable]
        constant = np.abs(counts - np.median(counts, 0)).mean()
        error = np.abs(prediction - truth)[:, seen:].reshape(*unforeseeable.shape, -1).mean(-1)
        error = np.ma.masked_array(error, unforeseeable)
        by_step = error.mean(0).filled(np.nan)[np.subtract(ahead, 1)]
        table.append([name, *(f"{x:.4g}" for x in (constant, *by_step))])
        metrics |= {f"report/error_{name}": error.mean(), f"report/constant_{name}": constant}
    widths = [max(map(len, column)) + 2 for column in zip(*table, strict=True)]
    lines = ["".join(map(str.ljust, row, widths)).rstrip() for row in table]
    sequences = f"{args.batch_size} sequences at step {trainer.step:,}"
    lines += ["", f"Mean absolute error, 1, 2, 4 ... steps after the last of {seen} seen ones, of"]
    lines += [f"{sequences}; constant: that of the median."]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    arrays = {
        f"{name}/{kind}": x
        for name, pair in pairs.items()
        for kind, x in zip(("truth", "prediction"), pair, strict=True)
        if name != "image"
    }
    np.savez(path.with_suffix(".npz"), seen=seen, unforeseeable=unforeseeable, **arrays)
    files = film(*pairs["image"], seen, path) if "image" in pairs else []
    return metrics, [path, *files]


def film(truth, prediction, seen, path, count=4, columns=16):
    """Write images (B, T, h, w, C) in [0, 1] as a strip of some steps and a film of all.

    Truth, prediction and error stand below each other, framed green while the model sees and red
    when it dreams. The last three channels are taken for colours if their number is divisible by
    three, otherwise the last one for grey. Returns the paths.
    """
    channels = 1 if truth.shape[-1] % 3 else 3
    truth, prediction = truth[:count, ..., -channels:], prediction[:count, ..., -channels:]
    video = np.stack([truth, prediction, (prediction - truth + 1) / 2], 1)
    video = np.rint(255 * video)  # (count, 3, T, h, w, channels)
    frames = np.empty((*video.shape[:3], IMAGE_SIZE + 4, IMAGE_SIZE + 4, 3), np.uint8)
    frames[:, :, :seen], frames[:, :, seen:] = (0, 160, 0), (220, 40, 0)
    frames[..., 2:-2, 2:-2, :] = video
    chosen = np.linspace(0, frames.shape[2] - 1, min(columns, frames.shape[2])).round().astype(int)
    strip = frames[:, :, chosen].transpose(0, 1, 3, 2, 4, 5)  # (count, 3, h, columns, w, 3)
    strip = strip.reshape(strip.shape[0] * 3 * strip.shape[2], -1, 3)
    path.with_suffix(".png").write_bytes(png(strip))
    written = [path.with_suffix(".png")]
    with contextlib.suppress(ImportError):
        image = importlib.import_module("PIL.Image")
        stills = frames.transpose(2, 1, 3, 0, 4, 5)  # (T, 3, h, count, w, 3)
        stills = stills.reshape(len(stills), 3 * stills.shape[2], -1, 3)
        first, *rest = map(image.fromarray, stills)
        first.save(path.with_suffix(".gif"), append_images=rest, save_all=True, loop=0)
        written.append(path.with_suffix(".gif"))
    return written


def png(image):
    """The bytes of a PNG file of an image (h, w, 3) uint8."""
    h, w, _ = image.shape
    rows = np.concatenate([np.zeros((h, 1), np.uint8), image.reshape(h, -1)], 1)  # 0: no filter

    def chunk(kind, data):
        """Length, kind, data, check sum."""
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", w, h, 8, 2, 0, 0, 0)  # 8 bits each of red, green and blue
    chunks = (b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes())), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*x) for x in chunks)


def save_checkpoint(path, trainer):
    """Write what `load_checkpoint` needs. Raises UserError, and leaves what was there.

    First to a temporary file, then in place in one step: a run that is killed leaves the old
    checkpoint or the new one, never half of one. What a broken update left is not saved.
    """
    state = {"args": asdict(trainer.args)} | trainer.state_dict()
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as either
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise UserError(f"cannot save {path}: {first_line(error)}") from error


def load_checkpoint(path):
    """The dict of `save_checkpoint`, on the CPU. Executes no code from it. Raises UserError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch thinks of a foreign pickle
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        parts = {"args", "agent", "replay", "random", "spaces", *COUNTERS}
        if missing := sorted(parts - checkpoint.keys()):
            raise UserError(f"{path} is of another version: it lacks {', '.join(missing)}")
        return checkpoint | {"args": Args(**checkpoint["args"])}
    except OSError as error:
        raise UserError(f"cannot read the checkpoint {path}: {error.strerror}") from error
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path} is damaged or not a checkpoint of dreamer_v3.py") from error


def first_line(error):
    """What an exception says, without the advice below it."""
    return (str(error).strip() or type(error).__name__).split("\n")[0]


def evaluate_checkpoint(args, device, dtype):
    """--evaluate: play with the networks, in the environment, of a checkpoint. Returns returns."""
    checkpoint = load_checkpoint(args.evaluate)
    kept = "evaluate eval_episodes eval_sample capture_video seed cuda dtype".split()
    args = replace(checkpoint["args"], compile=False, **{k: getattr(args, k) for k in kept})
    envs = Environments(args, 1, args.seed)
    envs.close()
    agent = Agent(args, envs.spaces, device, dtype)
    agent.load_state_dict(checkpoint["agent"])
    returns = evaluate(agent, args, args.eval_episodes)
    if args.capture_video:
        evaluate(agent, args, 1, Path(args.evaluate).parent / f"videos/step_{checkpoint['step']}")
    print(f"{args.env_id} after {checkpoint['step']:,} steps: {summary(returns)}")
    return returns


# ---- 14. Main ------------------------------------------------------------------------------------


def check_args(args):
    """Raise UserError for numbers that cannot work, alone or together."""
    huge = 2**62  # not infinity, which is no number to compute with
    at_least_1 = (
        "action_repeat total_timesteps num_envs batch_size log_every save_every stoch blocks"
    )
    at_least_0 = """
        eval_every eval_episodes report_every train_ratio free_nats beta_pred beta_dyn beta_rep
        ent_coef beta_val beta_repval slow_reg learning_rate warmup_updates agc_clip
    """
    shares = "gamma return_lambda unimix actor_unimix tau return_rate"
    limits = dict.fromkeys(at_least_1.split(), (1, huge))
    limits |= dict.fromkeys(at_least_0.split(), (0, huge)) | dict.fromkeys(shares.split(), (0, 1))
    one_batch = (args.batch_size + args.num_envs) * args.batch_length
    limits |= {"batch_length": (2, huge), "buffer_size": (one_batch, huge), "seed": (0, 2**31)}
    limits |= dict.fromkeys(("beta1", "beta2"), (0, 0.9999))
    limits |= {"imag_horizon": (1, 10_000), "laprop_eps": (1e-30, 1)}
    for name, (least, most) in limits.items():
        if not least <= getattr(args, name) <= most:  # nor may it be nan
            text = f"a number of at least {least}" if most == huge else f"in [{least}, {most}]"
            flag, value = name.replace("_", "-"), getattr(args, name)
            raise UserError(f"--{flag} must be {text}, not {value}")
    if args.action_repeat > 1 and args.env_id.split(":")[-1].startswith("ALE/"):
        raise UserError(
            "--action-repeat: Atari has frames of its own, --env-kwargs '{\"frameskip\": 4}'"
        )
    net = args.network()
    if min(net.values()) < 1:
        name = min(net, key=net.get)
        raise UserError(f"--{name} must be at least 1, not {net[name]}")
    if net["deter"] % args.blocks or net["deter"] % 8:
        raise UserError(f"--deter {net['deter']} must be divisible by 8 and --blocks {args.blocks}")
    if not 2 <= net["classes"] <= 256:
        raise UserError(f"--classes must be in [2, 256], not {net['classes']}")
    if "" in (args.evaluate, args.resume):
        raise UserError("--evaluate and --resume need a path")
    modes = [name for name in ("evaluate", "resume", "benchmark") if getattr(args, name)]
    if len(modes) > 1:
        raise UserError(f"--{modes[0]} and --{modes[1]} cannot go together")
    if args.evaluate and not args.eval_episodes:
        raise UserError("--evaluate needs --eval-episodes of at least 1")
    if args.benchmark and not args.train_ratio:
        raise UserError("--benchmark needs a --train-ratio above 0")
    if args.track:
        import_optional("wandb", "wandb")
    if args.capture_video:
        import_optional("moviepy", "moviepy")


def choose_device(args):
    """The device, and the type of its matrix products."""
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        torch.backends.cudnn.allow_tf32 = False  # float32 means float32
    else:
        fast = torch.cpu.get_capabilities().get("avx512_bf16", False)
    auto = "bfloat16" if fast else "float32"
    return device, getattr(torch, auto if args.dtype == "auto" else args.dtype)


def describe(trainer, folder, dtype):
    """Print what was decided."""
    args, agent, replay = trainer.args, trainer.agent, trainer.replay
    count = lambda module: sum(p.numel() for p in module.parameters() if p.requires_grad)
    parts = [(name, count(module)) for name, module in agent.model.named_children()]
    parts = ", ".join(f"{name} {number:,}" for name, number in parts if number)
    spaces, ratio = agent.spaces, trainer.updates_per_step
    sees = [f"image 64x64x{spaces.channels}"] if spaces.channels else []
    sees += [f"{name} ({width})" for name, width, _ in spaces.vectors]
    kind = "discrete" if spaces.action_classes else "continuous"
    acts = f"{kind} {spaces.action_classes or spaces.action_width}"
    cpu = agent.device.type == "cpu"
    device = "CPU" if cpu else torch.cuda.get_device_name(agent.device)
    print(f"environment  {args.env_id} x {args.num_envs}: {', '.join(sees)}; actions {acts}")
    print(f"parameters   {count(agent.model):,}: {parts}")
    steps = min(replay.length, -(-args.total_timesteps // args.num_envs))
    where = replay.path or "memory"
    size = f"{args.num_envs} x {steps:,} steps, {steps * replay.entry.itemsize / 1e9:.2f} GB"
    print(f"replay       {size} at the end, in {where}")
    print(f"device       {device}, {str(dtype).removeprefix('torch.')}")
    print(f"schedule     {ratio:.3g} updates a step, {args.total_timesteps * ratio:,.0f} in all")
    if cpu:
        print("             slow on a CPU: the status line shows the time left once updates begin")
    if args.compile and ratio:
        print("             the first update compiles, for a minute or two")
    after = f", resumed after step {trainer.step:,}" if trainer.step else ""
    print(f"run          {folder}{after}", flush=True)


BENCHMARK_SECONDS = 60  # for the updates; the other measurements take less


def benchmark(args, device, dtype):
    """--benchmark: measure this machine with real steps of the environment. Returns a dict."""
    cuda = device.type == "cuda"

    def measure(function, least, seconds, most=1000):
        """Milliseconds of each call: at least `least` calls, and more for some seconds."""
        times, begin = [], time.perf_counter()
        while len(times) < least or len(times) < most and time.perf_counter() - begin < seconds:
            start = time.perf_counter()
            function()
            if cuda:
                torch.cuda.synchronize()
            times.append(1e3 * (time.perf_counter() - start))
        return np.array(times)

    least = (args.batch_length + 3 * args.batch_size) * args.num_envs
    args = replace(args, total_timesteps=max(args.total_timesteps, least))
    trainer = Trainer(args, device, dtype)
    agent, replay, trainer.starts_needed = trainer.agent, trainer.replay, math.inf
    print("collecting steps, then compiling (a minute or two) ...", flush=True)
    while len(replay) < 2 * args.batch_size:
        trainer.collect_and_train()
    warmup = measure(trainer.train, 5, 0).sum() / 1e3
    print("measuring updates, actions, then both ...", flush=True)
    update = measure(trainer.train, 5, BENCHMARK_SECONDS, 50)
    one, carry = trainer.obs | {"is_first": trainer.is_first}, agent.initial(1)
    one = to_device({key: x[:1] for key, x in one.items()}, device)
    act = measure(lambda: agent.act(one, carry)[-1].cpu(), 100, 0)[10:]
    # Whole cycles of the schedule: the steps from one update to the next.
    trainer.starts_needed, trainer.credit = 1, 1.0
    cycle = math.ceil(1 / (args.num_envs * trainer.updates_per_step))
    steps = measure(
        lambda: [trainer.collect_and_train() for _ in range(cycle)], 2, BENCHMARK_SECONDS / 3
    )
    memory = peak_memory(device) * 1e3
    matrix = torch.randn(8192 if cuda else 2048, 8192 if cuda else 2048, device=device).to(dtype)
    peak = 2 * len(matrix) ** 3 / measure(lambda: matrix @ matrix, 20, 0).min()  # FLOP a ms
    batch, place = replay.sample()
    batch = to_device(batch | replay.read_latents(place), device)
    with FlopCounterMode(display=False) as flops, torch.compiler.set_stance("force_eager"):
        Agent.train_step(agent, batch)
    trainer.envs.close()
    result = {
        "update_ms": np.median(update),
        "update_ms_min": update.min(),
        "update_ms_max": update.max(),
        "act_ms": np.median(act),
        "env_steps_per_s": 1e3 * cycle * args.num_envs / np.median(steps),
        "params": sum(p.numel() for p in agent.exact.parameters() if p.requires_grad),
        "flops_per_update": flops.get_total_flops(),
        "peak_share": flops.get_total_flops() / np.median(update) / peak,
        "peak_memory_mb": memory,
        "warmup_s": warmup,
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "dtype": str(dtype).removeprefix("torch."),
        "size": args.size,
    }
    result = {k: float(f"{x:.4g}") if isinstance(x, float) else x for k, x in result.items()}
    print(json.dumps(result), flush=True)
    return result


# What --resume takes from the command line; everything else stays as the run had it.
FREE_TO_CHANGE = """
    resume total_timesteps eval_every eval_episodes eval_sample log_every save_every report_every
    capture_video track wandb_project_name wandb_entity cuda dtype compile torch_deterministic
    async_envs run_dir
""".split()


def evaluation_due(args, step, evaluated):
    """Whether a run at `step`, last evaluated at step `evaluated`, is to be evaluated now."""
    passed = args.eval_every and step // args.eval_every > evaluated // args.eval_every
    return args.eval_episodes and evaluated < step and (passed or step >= args.total_timesteps)


def main(args, stop=()):
    """Train as `args` say, evaluate or measure. Returns the returns of the last evaluation.

    Ends after the step it is in, with a checkpoint, when something is put into the list `stop`.
    """
    check_args(args)
    device, dtype = choose_device(args)
    torch.manual_seed(args.seed)
    torch.use_deterministic_algorithms(args.torch_deterministic, warn_only=True)
    if args.evaluate:
        return evaluate_checkpoint(args, device, dtype)
    if args.benchmark:
        return benchmark(args, device, dtype)
    if args.capture_video:  # fail now rather than at the first evaluation
        with tempfile.TemporaryDirectory() as folder:
            Environments(args, 1, args.seed, video=folder).close()

    checkpoint = None
    if args.resume:
        folder = Path(args.resume)
        checkpoint = load_checkpoint(folder / "checkpoint.pt")
        for name, old in asdict(checkpoint["args"]).items():
            if name not in FREE_TO_CHANGE and getattr(args, name) != old:
                flag = name.replace("_", "-")
                raise UserError(f"--{flag} is {old} in this run, and must not become anything else")
        step, evaluated = checkpoint["step"], checkpoint["evaluated"]
        if step >= args.total_timesteps and not evaluation_due(args, step, evaluated):
            done = f"{step:,} steps of {args.total_timesteps:,}"
            raise UserError(f"the run is complete: {done}; more with a larger --total-timesteps")
    else:
        stamp = time.strftime("%Y%m%d-%H%M%S")
        name = f"{args.env_id}__{args.exp_name}__{args.seed}__{stamp}"
        folder = Path(args.run_dir) / re.sub(r"[^\w.-]+", "-", name)
    trainer = Trainer(
        args, device, dtype, folder / "replay.bin" if args.save_replay else None, checkpoint
    )
    if not args.resume:  # a run appears with a checkpoint inside: whatever is there can be resumed
        new = folder.with_name(f"{folder.name}.new")
        new.mkdir(parents=True)
        try:
            (new / "args.json").write_text(json.dumps(asdict(args), indent=2) + "\n")
            save_checkpoint(new / "checkpoint.pt", trainer)
            new.rename(folder)
        except BaseException:
            shutil.rmtree(new, ignore_errors=True)
            raise
    del checkpoint
    logger = Logger(args, folder, trainer.step, trainer.updates)
    describe(trainer, folder, dtype)

    agent, returns = trainer.agent, None
    due = lambda every: every and step // every > max(0, step - args.num_envs) // every
    try:
        while not stop:
            step, updates = trainer.step, trainer.updates
            if evaluation_due(args, step, trainer.evaluated):
                returns = evaluate(agent, args, args.eval_episodes, stop=stop)
                if stop:
                    break  # a resumed run makes up for it
                trainer.evaluated = step
                names = ("eval/episodic_return", "eval/episodic_return_std")
                logger.write(step, dict(zip(names, (returns.mean(), returns.std()), strict=True)))
                logger.show(f"step {step:,}  evaluation: {summary(returns)}")
                if args.capture_video:
                    evaluate(agent, args, 1, folder / f"videos/step_{step}", stop)
            if due(args.save_every):  # last: what is logged up to a checkpoint stays
                save_checkpoint(folder / "checkpoint.pt", trainer)
            if step >= args.total_timesteps:
                break

            episodes = trainer.collect_and_train()
            step, updates = trainer.step, trainer.updates
            for episode_return, length in episodes:
                logger.episode(step, episode_return, length)
            for env in np.flatnonzero(trainer.episode_length == LONGEST_EPISODE):
                logger.show(f"environment {env}: no end of an episode in {LONGEST_EPISODE:,} steps")
            logger.status(step, updates)
            if updates and due(args.log_every):
                speed = {"charts/SPS": logger.rates[0], "charts/UPS": logger.rates[1]}
                logger.write(step, trainer.metrics | trainer.usage() | speed)
            final = args.report_every and step >= args.total_timesteps
            if updates and len(trainer.replay) and (final or due(args.report_every)):
                metrics, files = report(trainer, folder / f"dreams/step_{step}.txt")
                logger.report(step, metrics, files)
    finally:
        try:
            save_checkpoint(folder / "checkpoint.pt", trainer)
            logger.show(f"saved {folder / 'checkpoint.pt'} at step {trainer.step:,}")
        finally:
            trainer.envs.close()
            logger.close()
    return returns


def parse(default=None):
    """The command line as Args, with one line and exit status 2 for what is wrong with it."""
    message = io.StringIO()
    try:
        with contextlib.redirect_stderr(message):
            return tyro.cli(Args, description=__doc__.split("\n\n")[0], default=default)
    except SystemExit as done:
        if done.code:  # tyro's message is in a box, with advice below a line
            text = re.split("─{9,} │|For full helptext", message.getvalue().split("╮", 1)[-1])[0]
            fail(re.sub("[│─]", " ", text))
        raise


def fail(message):
    """Say in one line what the user can put right, and leave."""
    print("dreamer_v3.py: error:", *str(message).split(), file=sys.stderr)
    sys.exit(2)


def cli():
    """The command line."""
    args, stop = parse(), []

    def on_signal(number, frame):
        """Ask the loop to end; the second time, end the process."""
        if stop:
            os._exit(128 + number)
        stop.append(number)
        os.write(2, b"\nstopping after this step; once more, and it stops at once\n")

    if not (args.evaluate or args.benchmark):
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, on_signal)
    try:
        if args.resume and not (args.evaluate or args.benchmark):  # other flags are the run's
            args = parse(load_checkpoint(Path(args.resume) / "checkpoint.pt")["args"])
        main(args, stop)
    except (UserError, OSError) as error:
        if not stop:
            fail(error)
        print("dreamer_v3.py:", *str(error).split(), file=sys.stderr)
    except MemoryError as error:
        fail(f"not enough memory: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    if stop:
        sys.exit(128 + stop[0])


if __name__ == "__main__":
    cli()
