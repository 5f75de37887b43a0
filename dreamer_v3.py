"""DreamerV3 in one file: a world model learned from replay, an actor and a critic trained in it.

Paper: Hafner, Pasukonis, Ba, Lillicrap, "Mastering diverse control tasks through world models"
(Nature 2025). Equations are numbered as in arXiv:2301.04104v2. The tests compare results with those
of the authors' code, github.com/danijar/dreamerv3 at commit e3f0224 ("the reference"). [D1] ...
[D25] mark details of it that the paper does not spell out; docs/algorithm.md explains them.

    python dreamer_v3.py --preset atari100k --env-id ALE/MsPacman-v5
    python dreamer_v3.py --preset cpu --env-id CartPole-v1
    python dreamer_v3.py --evaluate runs/<run> --eval-episodes 20
    python dreamer_v3.py --resume runs/<run>

Dimensions: B replay batch, T replay time, H imagined steps, N = B*T imagined trajectories, A action
width, E embedding, D deter, S latent variables of K classes, F = D + S*K feature, G blocks of the
GRU, hidden width of the RSSM's layers, U units of the other ones, V two-hot bins, C channels, h and
w pixels. Batch comes before time.

Paper to code: x obs; enc(x) embed; a action; h deter; z stoch; s = {h, z} feat; r reward; c cont;
R returns; S return_scale; sg(.) detach(); eta ent_coef; phi world model, theta actor, psi critic.

The replay holds this table. One column is one agent step. A new episode begins at `|`.

    t            0    1    2    3  |  0
    obs          x0   x1   x2   x3 |  x0'    x3 is the last observation of its episode
    action       a0   a1   a2   -  |  a0'    chosen AT obs[t]; zeros at the last one
    reward       0    r1   r2   r3 |  0      received on ARRIVING at obs[t]
    is_first     1    0    0    0  |  1      the RSSM forgets its state and the action before
    is_last      0    0    0    1  |  0      the episode ends here, whatever the cause
    is_terminal  0    0    0    1  |  0      it ends by itself; 0 if it was cut off (truncated)

An agent step is one decision, or the last observation of an episode. It may take several
environment frames (--action-repeat, the frameskip of Atari).
"""

import contextlib
import copy
import ctypes
import datetime
import functools
import gc
import importlib
import io
import json
import math
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import sys
import tempfile
import time
import warnings
import zlib
from collections import Counter, deque
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

# From torchrun: the number of this process, its number on its machine, and how many there are.
RANK, LOCAL_RANK = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))

# ---- 1. Arguments (paper: Extended Data Tables 3 and 4) ------------------------------------------

# Sizes of the paper, and 1m, by their deter (D): the other widths follow from it.
SIZES = {
    "1m": 512, "12m": 2048, "25m": 3072, "50m": 4096, "100m": 6144, "200m": 8192, "400m": 12288,
}  # fmt: skip


# Flags of --preset: small tasks on a CPU, and the benchmarks of the paper. Explicit flags win.
DMC = dict(env_id="shimmy:dm_control/walker-walk-v0", action_repeat=2, num_envs=16, train_ratio=512)
PRESETS = {
    "cpu": dict(size="1m", num_envs=4, total_timesteps=10_000, train_ratio=256, learning_rate=5e-4,
        gamma=0.99, warmup_updates=200, beta_pred=10, eval_every=1_000, eval_episodes=20),
    "atari100k": dict(total_timesteps=100_000, num_envs=1, train_ratio=128,
        env_kwargs='{"repeat_action_probability": 0.0}'),
    "atari": dict(total_timesteps=50_000_000, num_envs=16, train_ratio=32,
        env_kwargs='{"repeat_action_probability": 0.25, "full_action_space": true}'),
    "dmc_proprio": DMC | dict(total_timesteps=250_000),
    "dmc_vision": DMC | dict(total_timesteps=500_000, pixels=True),
    "crafter": dict(env_id="crafter_env:Crafter-v0", total_timesteps=1_000_000, train_ratio=512),
}  # fmt: skip


@dataclass
class Args:
    """Hyperparameters; the comments are the help of the command line."""

    preset: Literal[*PRESETS] | None = None  # Flags of a task; `--preset NAME --help` shows them.
    exp_name: str = "dreamer_v3"  # Name of the experiment, part of the run folder's name.
    seed: int = 1  # Seed of environments, networks, sampling and replay.
    torch_deterministic: bool = False  # Prefer deterministic torch kernels; they are slower.
    cuda: bool = True  # Train on the GPU if there is one, otherwise on the CPU.
    # Type of matrix products and convolutions in an update. auto: bfloat16 where it is fast.
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    compile: bool = True  # Use torch.compile; the first update takes a minute or two longer.
    cudagraphs: bool = True  # On a GPU, capture updates and actions as CUDA graphs.
    run_dir: str = "runs"  # The run makes its own folder <env>__<exp>__<seed>__<time> in this one.
    track: bool = False  # Log to Weights & Biases too (pip install wandb tensorboard).
    wandb_project_name: str = "dreamer_v3"  # Project of Weights & Biases.
    wandb_entity: str | None = None  # Team of Weights & Biases; by default your own account.
    capture_video: bool = False  # Record an episode at every evaluation (pip install moviepy).
    evaluate: str | None = None  # Evaluate this run (its folder or checkpoint.pt), do not train.
    resume: str | None = None  # Go on with this run (its folder or checkpoint.pt), with its flags.

    env_id: str = "ALE/MsPacman-v5"  # Gymnasium id; `module:Name-v0` if a module registers it.
    # Arguments of the environment as JSON: '{"frameskip": 8}' (Windows: "{\"frameskip\": 8}").
    env_kwargs: str = "{}"
    pixels: bool = False  # Observe the rendered picture instead of what the environment gives.
    action_repeat: int = 1  # Environment frames per agent step; Atari has its own frameskip.
    num_envs: int = 1  # Environments stepped together.
    async_envs: bool = False  # Each environment in its own process (Atari: always in threads).

    total_timesteps: int = 100_000  # Agent steps to train for, over all environments.
    buffer_size: int = 5_000_000  # Capacity of the replay in agent steps.
    batch_size: int = 16  # Sequences in a batch (B).
    batch_length: int = 64  # Agent steps in a sequence (T); one more before them is context.
    train_ratio: float = 128.0  # Steps replayed per agent step; an update replays B * T of them.
    eval_every: int = 25_000  # Agent steps between evaluations; 0: only one, at the end.
    eval_episodes: int = 10  # Episodes of an evaluation; 0: never evaluate.
    eval_sample: bool = False  # Evaluate with sampled actions instead of the most likely ones.
    log_every: int = 250  # Agent steps between two lines of training metrics.
    save_every: int = 2_500  # Agent steps between checkpoints.
    report_every: int = 2_500  # Agent steps between predictions (pictures, losses); 0: never.

    size: Literal[*SIZES] = "12m"  # Parameters, roughly; the next five flags change one width each.
    deter: int | None = None  # Width of the recurrent state (D).
    hidden: int | None = None  # Width of the hidden layers of the RSSM.
    classes: int | None = None  # Classes of each latent variable (K).
    depth: int | None = None  # Base number of convolution channels.
    units: int | None = None  # Width of the multilayer perceptrons of vectors and heads (U).
    stoch: int = 32  # Latent variables (S).
    blocks: int = 8  # Blocks of the recurrent weights (G); G and 8 must divide deter.

    free_nats: float = 1.0  # Free bits: the KL of a step, summed over latents, is at least this.
    unimix: float = 0.01  # Fraction of uniform probability mixed into every latent categorical.
    beta_pred: float = 1.0  # Weight of the prediction losses: decoder, reward, continue.
    beta_dyn: float = 1.0  # Weight of the dynamics loss.
    beta_rep: float = 0.1  # Weight of the representation loss.
    imag_horizon: int = 15  # Steps of imagination from every replayed state (H).
    gamma: float = 1 - 1 / 333  # Discount for one agent step.
    return_lambda: float = 0.95  # Lambda of the returns: 0 trusts the critic after one step.
    ent_coef: float = 3e-4  # Weight of the actor's entropy, in normalised return per nat.
    actor_unimix: float = 0.01  # Uniform share of a discrete policy (reference: 0, by oversight).
    beta_val: float = 1.0  # Weight of the critic loss on imagined trajectories.
    beta_repval: float = 0.3  # Weight of the critic loss on replayed sequences.
    slow_reg: float = 1.0  # Weight of the slow critic as second target in both critic losses.
    tau: float = 0.02  # Rate at which the slow critic follows the critic, per update.
    return_rate: float = 0.01  # Rate at which the percentiles of returns follow the newest batch.

    learning_rate: float = 4e-5  # Learning rate of all networks.
    warmup_updates: int = 1_000  # Updates in which the learning rate rises linearly from 0.
    agc_clip: float = 0.3  # Largest gradient norm of a tensor, as a share of its own; 0: no limit.
    beta1: float = 0.9  # Decay of LaProp's momentum.
    beta2: float = 0.999  # Decay of LaProp's mean of squared gradients.
    laprop_eps: float = 1e-20  # Added to the root of the mean of squared gradients.

    def network(self):
        """The widths of --size, unless a flag sets them."""
        D = SIZES[self.size]
        row = dict(deter=D, hidden=D // 8, classes=D // 128, depth=D // 128, units=D // 8)
        return {k: row[k] if getattr(self, k) is None else getattr(self, k) for k in row}


class UserError(Exception):
    """What the user can put right: the command line prints one line and exits with status 2."""


def import_optional(module, package):
    """Import a package that only some uses need. A UserError names the command to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"this needs {module}: pip install '{package}'") from error


def first_line(error):
    """What an exception says, without the advice below it."""
    return (str(error).strip() or type(error).__name__).split("\n")[0]


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
    """The values symexp(-20 ... 20) of Eq. 10: (V,) float64, exactly antisymmetric. [D1]"""
    lower = symexp(torch.linspace(-limit, 0, count // 2 + 1, dtype=torch.float64))
    return torch.cat([lower, -lower[:-1].flip(0)])


def twohot_mean(logits, bins):
    """The value that logits (..., V) predict, softmax(logits) @ bins (Eq. 10): (...).

    Mirrored probabilities are subtracted first: equal logits predict exactly 0, not the rounding
    errors of bins as large as 5e8. [D1]
    """
    half = logits.shape[-1] // 2
    probs = f32(logits).softmax(-1)
    return ((probs[..., half + 1 :] - probs[..., :half].flip(-1)) * bins[half + 1 :]).sum(-1)


def twohot_loss(logits, target, bins):
    """Cross-entropy of softmax(logits) (..., V) with the two-hot `target` (...) (Eq. 11): (...).

    The weights of the last bin <= target and the first bin above it are linear in the original
    space; beyond the ends, all weight is on the end bin.
    """
    logits, target = f32(logits), target.detach().clamp(bins[0], bins[-1]).contiguous()
    above = torch.searchsorted(bins, target, right=True).clamp(1, len(bins) - 1)
    below = above - 1
    weight = (bins[above] - target) / (bins[above] - bins[below])  # of the bin below
    chosen = logits.gather(-1, torch.stack([below, above], -1))  # (..., 2)
    # The weights sum to 1: -sum(weight * log_softmax) needs the normaliser once.
    return logits.logsumexp(-1) - weight * chosen[..., 0] - (1 - weight) * chosen[..., 1]


# ---- 3. Distributions ----------------------------------------------------------------------------


def one_hot(index, classes):
    """(...) integers in [0, classes) -> (..., classes) floats; F.one_hot checks them on a CPU."""
    hot = index.unsqueeze(-1) == torch.arange(classes, device=index.device)
    return hot.to(torch.get_default_dtype())


def draw(random, shape, device):
    """Random numbers of a shape. Each process draws those of all, and keeps its own part.

    So their generators stay equal, and all processes together draw what one would.
    """
    return random(WORLD_SIZE, *shape, device=device)[RANK]


def mixed_probs(logits, unimix):
    """(1 - unimix) softmax(logits) + unimix / K over the last axis [D4]: (..., K)."""
    return (1 - unimix) * f32(logits).softmax(-1) + unimix / logits.shape[-1]


def mixed_log_probs(logits, unimix):
    """Logarithms of `mixed_probs`, also where those would round to 0: (..., K)."""
    return torch.log(mixed_probs(logits, unimix)) if unimix else f32(logits).log_softmax(-1)


def sample_one_hot(probs, uniform):
    """One-hot samples of categoricals (..., K) with the gradient of `probs` (straight-through).

    The class is the one whose slice of [0, 1) holds the random number `uniform` (...). [D6]
    """
    index = (probs.detach().cumsum(-1) <= uniform.unsqueeze(-1)).sum(-1)
    return one_hot(index.clamp(max=probs.shape[-1] - 1), probs.shape[-1]) + (probs - probs.detach())


def categorical_kl(log_p, log_q):
    """KL(p || q) in nats of categoricals (..., S, K), summed over the S variables: (...)."""
    return (log_p.exp() * (log_p - log_q)).sum((-2, -1))


class Categoricals:
    """Independent categoricals over one-hot vectors side by side: discrete actions, observations.

    log_prob and entropy (...) are in nats, sums over the variables. [D18]
    """

    def __init__(self, logits, classes, unimix):
        self.classes = classes
        self.log_probs = [mixed_log_probs(x, unimix) for x in logits.split(classes, -1)]

    def sample(self, greedy=False):
        """A sample with straight-through gradient, or the most likely action: (..., A)."""
        probs = [log_prob.exp() for log_prob in self.log_probs]
        if greedy:
            return torch.cat([one_hot(p.argmax(-1), p.shape[-1]) for p in probs], -1)
        uniforms = [draw(torch.rand, p.shape[:-1], p.device) for p in probs]
        return torch.cat(list(map(sample_one_hot, probs, uniforms)), -1)

    def log_prob(self, action):
        """(..., A) -> (...)."""
        parts = zip(self.log_probs, action.split(self.classes, -1), strict=True)
        return sum((log_prob * chosen).sum(-1) for log_prob, chosen in parts)

    def entropy(self):
        """(...)."""
        return sum(-(x.exp() * x).sum(-1) for x in self.log_probs)


class BoundedNormals:
    """Policy of continuous actions: normals with mean in [-1, 1], deviation in [0.1, 1]. [D25]

    Samples are not bounded: see `Environments.decode_action`. log_prob and entropy (...) are in
    nats, sums over the actions. [D18]
    """

    def __init__(self, raw_mean, raw_std):
        self.mean = torch.tanh(f32(raw_mean))
        self.std = 0.9 * torch.sigmoid(f32(raw_std) + 2) + 0.1

    def sample(self, greedy=False):
        """A sample, or the mean: (..., A), without gradient."""
        mean, std = self.mean.detach(), self.std.detach()
        return mean if greedy else mean + std * draw(torch.randn, mean.shape, mean.device)

    def log_prob(self, action):
        """(..., A) -> (...)."""
        z = (action - self.mean) / self.std
        return (-0.5 * z.square() - self.std.log() - 0.5 * math.log(2 * math.pi)).sum(-1)

    def entropy(self):
        """(...)."""
        return (self.std.log() + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)


# ---- 4. Layers -----------------------------------------------------------------------------------
# Parameters are float32. In an update, torch.autocast rounds the inputs of products to bfloat16.
# Norms and everything after the last product of a network stay float32. [D23]


def rounded(x):
    """x in the type of products: that of torch.autocast where it is on, otherwise x's own."""
    device = x.device.type
    on = torch.is_autocast_enabled(device)
    return x.to(torch.get_autocast_dtype(device)) if on else x


def init_(layer, inputs, outscale=1.0):
    """Weight: normal cut off at two deviations, variance outscale^2 / inputs. [D3] Bias: 0."""
    std = inputs**-0.5 / 0.8796256610342398  # which is the deviation of N(0, 1) cut off at +-2
    nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
    layer.weight.data.mul_(outscale)
    nn.init.zeros_(layer.bias)
    return layer


def linear_layer(in_dim, out_dim, outscale=1.0, kind=nn.Linear):
    """Linear layer: (..., in) -> (..., out)."""
    return init_(kind(in_dim, out_dim), in_dim, outscale)


class TwoHotLinear(nn.Linear):
    """Last layer of reward and critic: (..., in) -> (..., V), V odd. It computes V + 1, drops one.

    Libraries add up a batch in another order in columns that do not fill a vector register. With an
    odd number of them, mirrored bins, which learn the same at first, would soon differ by a
    rounding, and bins of 5e8 magnify it. [D1]
    """

    def forward(self, x):
        return F.linear(x, F.pad(self.weight, (0, 0, 0, 1)), F.pad(self.bias, (0, 1)))[..., :-1]


class BlockLinear(nn.Module):
    """Linear with a block-diagonal matrix: each of G groups of inputs feeds its group of outputs.

    (..., in) -> (..., out); the weight is (G, in/G, out/G). Its initial variance is 1/in as in the
    reference, not G/in: sqrt(G) smaller weights than in a linear layer of a block's size. [D3]
    """

    def __init__(self, in_dim, out_dim, blocks):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(blocks, in_dim // blocks, out_dim // blocks))
        self.bias = nn.Parameter(torch.empty(out_dim))
        init_(self, in_dim)

    def forward(self, x):
        x = x.unflatten(-1, (len(self.weight), -1))
        return torch.einsum("...gi,gio->...go", x, self.weight).flatten(-2) + self.bias


class Conv(nn.Conv2d):
    """5x5 convolution, same size: (n, h, w, in) -> (n, h, w, out), channels last as in memory."""

    def __init__(self, in_channels, out_channels):
        super().__init__(in_channels, out_channels, 5, padding=2)
        init_(self, 25 * in_channels)

    def forward(self, x):
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class MaxPool(torch.autograd.Function):
    """Maximum of 2x2 neighbours, (n, 2h, 2w, c) -> (n, h, w, c).

    Equal neighbours share the gradient evenly, as in the reference: flat regions of an image tie
    everywhere. (max_pool2d gives all to one; amax, which shares, is slow when compiled.)
    """

    @staticmethod
    def forward(ctx, x):
        a, b, c, d = (x[:, i::2, j::2] for i in (0, 1) for j in (0, 1))
        y = torch.maximum(torch.maximum(a, b), torch.maximum(c, d))
        ctx.save_for_backward(x, y)
        return y

    @staticmethod
    def backward(ctx, grad):
        x, y = ctx.saved_tensors
        ties = sum((x[:, i::2, j::2] == y).to(grad.dtype) for i in (0, 1) for j in (0, 1))
        x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # (n, h, 2, w, 2, c)
        same = lambda z: z[:, :, None, :, None]  # one number for the four neighbours
        return torch.where(x == same(y), same(grad / ties), 0).flatten(3, 4).flatten(1, 2)


# Upsampling by 2 repeats pixels: a 5x5 kernel after it covers only 3x3 different ones. Which of
# its weights share a pixel depends on the phase of the output (even or odd row and column), so each
# phase has a 3x3 kernel. Along an axis, PHASES[p, a, k] is 1 where weight k, at phase p, meets
# pixel a.
PHASES = torch.tensor(
    [[[float((p + k) // 2 == a) for k in range(5)] for a in range(3)] for p in range(2)]
)


class UpConv(Conv):
    """Upsampling by 2 (nearest), then Conv, as one: (n, h, w, in) -> (n, 2h, 2w, out)."""

    def __init__(self, in_channels, out_channels):
        super().__init__(in_channels, out_channels)
        self.register_buffer("phases", PHASES.to(self.weight), persistent=False)

    def forward(self, x):
        # p, q phase of row and column; a, b and k, l row and column of the 3x3 and the 5x5 kernel;
        # o output channel, i input channel.
        kernel = torch.einsum("pak,qbl,oikl->pqoiab", self.phases, self.phases, self.weight)
        bias = self.bias.repeat(4)
        x = F.conv2d(x.permute(0, 3, 1, 2), kernel.flatten(0, 2), bias, padding=1)
        x = x.permute(0, 2, 3, 1).unflatten(-1, (2, 2, -1))  # (n, h, w, p, q, out)
        return x.permute(0, 1, 3, 2, 4, 5).flatten(1, 2).flatten(2, 3)


class NormSiLU(nn.Module):
    """RMSNorm x / sqrt(mean(x^2) + 1e-4) * scale over the last axis, then SiLU; in float32."""

    def __init__(self, dim):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return F.silu(F.rms_norm(f32(x), self.scale.shape, self.scale, eps=1e-4))


def dense_layer(in_dim, out_dim):
    """Linear layer and NormSiLU: (..., in) -> (..., out)."""
    return nn.Sequential(linear_layer(in_dim, out_dim), NormSiLU(out_dim))


def mlp(in_dim, units, layers, *out):
    """`layers` dense layers of width `units`, and `linear_layer(units, *out)` if `out` is given."""
    net = [dense_layer(in_dim if i == 0 else units, units) for i in range(layers)]
    return nn.Sequential(*net, *([linear_layer(units, *out)] if out else []))


# ---- 5. Encoder and decoder (paper: World model learning) ----------------------------------------

IMAGE_SIZE = 64  # pixels; every image is resized to this before it is stored
CHANNEL_FACTORS = (2, 3, 4, 4)  # channels of the four resolutions, in units of `depth`
FINAL_SIZE = IMAGE_SIZE // 2 ** len(CHANNEL_FACTORS)  # pixels


@dataclass(frozen=True)
class Spaces:
    """What the networks need to know of an environment. Observations are sorted by name."""

    images: tuple[tuple[str, int], ...]  # (name, channels) of each 64x64 image
    # (name, width, classes) of each other observation. Discrete ones are one-hot vectors side by
    # side, of `classes` numbers each; `classes` is empty for continuous ones.
    vectors: tuple[tuple[str, int, tuple[int, ...]], ...]
    action_classes: tuple[int, ...]  # choices of each discrete action; empty if continuous
    action_width: int  # A: the sum of action_classes, or the number of continuous actions


class Encoder(nn.Module):
    """Observation -> embedding (Eq. 1): an MLP for vectors, convolutions for images. [D11]"""

    def __init__(self, spaces, depth, units):
        super().__init__()
        self.spaces, self.embed_dim = spaces, 0
        if spaces.vectors:
            self.mlp = mlp(sum(width for _, width, _ in spaces.vectors), units, 3)
            self.embed_dim += units
        if spaces.images:
            channels = sum(channels for _, channels in spaces.images)
            widths = [channels] + [depth * factor for factor in CHANNEL_FACTORS]
            self.convs = nn.ModuleList(map(Conv, widths[:-1], widths[1:]))
            self.norms = nn.ModuleList(map(NormSiLU, widths[1:]))
            self.embed_dim += widths[-1] * FINAL_SIZE**2

    def forward(self, obs):
        """Dict of images (B, T, h, w, C) uint8 and vectors (B, T, width), by name -> (B, T, E)."""
        embed, vectors = [], self.spaces.vectors
        if vectors:
            x = [obs[name] if classes else symlog(obs[name]) for name, _, classes in vectors]
            embed.append(self.mlp(torch.cat(x, -1)))  # [D10]
        if self.spaces.images:
            image = torch.cat([obs[name] for name, _ in self.spaces.images], -1)
            x = image.flatten(0, 1) / 255 - 0.5  # (B*T, h, w, C)
            for conv, norm in zip(self.convs, self.norms, strict=True):
                x = norm(MaxPool.apply(conv(x)))
            embed.append(x.flatten(1).unflatten(0, image.shape[:2]))
        return torch.cat(embed, -1)


class Decoder(nn.Module):
    """Model state -> reconstruction of the observation (Eq. 1)."""

    def __init__(self, spaces, deter, stoch, depth, units):
        super().__init__()
        self.spaces, self.to_pixels = spaces, torch.sigmoid  # variants/ have another
        if spaces.vectors:
            self.mlp = mlp(stoch + deter, units, 3)
            widths = [width for _, width, _ in spaces.vectors]
            self.vector_outs = nn.ModuleList(linear_layer(units, width) for width in widths)
        if spaces.images:
            widths = [depth * factor for factor in reversed(CHANNEL_FACTORS)]
            cells = FINAL_SIZE**2 * widths[0]
            self.from_deter = BlockLinear(deter, cells, 8)  # 8 blocks, whatever the GRU has
            self.from_stoch = mlp(stoch, 2 * units, 1, cells)
            self.norm = NormSiLU(widths[0])
            self.convs = nn.ModuleList(map(UpConv, widths[:-1], widths[1:]))
            self.norms = nn.ModuleList(map(NormSiLU, widths[1:]))
            self.image_outs = nn.ModuleList(UpConv(widths[-1], c) for _, c in spaces.images)

    def forward(self, deter, stoch):
        """deter (B, T, D), stoch (B, T, S, K) -> images (B, T, h, w, C) in (0, 1) and vectors
        (B, T, width), symlog values or logits, by name.
        """
        stoch, recon = stoch.flatten(-2), {}
        if self.spaces.vectors:
            x = self.mlp(torch.cat([stoch, deter], -1))
            for (name, _, _), out in zip(self.spaces.vectors, self.vector_outs, strict=True):
                recon[name] = f32(out(x))
        if self.spaces.images:
            # Every block writes all pixels of its own channels: (g h w c) -> h w (g c).
            x = self.from_deter(deter.flatten(0, 1))
            x = x.unflatten(-1, (8, FINAL_SIZE, FINAL_SIZE, -1)).permute(0, 2, 3, 1, 4).flatten(-2)
            x = self.norm(x + self.from_stoch(stoch.flatten(0, 1)).view_as(x))
            for conv, norm in zip(self.convs, self.norms, strict=True):
                x = norm(conv(x))
            for (name, _), out in zip(self.spaces.images, self.image_outs, strict=True):
                recon[name] = self.to_pixels(f32(out(x))).unflatten(0, deter.shape[:2])
        return recon

    def losses(self, recon, obs):
        """Negative log-likelihoods up to constants, for every observation: dict of (B, T).

        Squared errors (no factor 1/2) of images and of symlog vectors (Eq. 8), cross-entropies of
        discrete vectors, summed over all but batch and time. [D10]
        """
        losses = {}
        for name, _, classes in self.spaces.vectors:
            if classes:
                losses[name] = -Categoricals(recon[name], classes, unimix=0).log_prob(obs[name])
            else:
                losses[name] = (recon[name] - symlog(obs[name])).square().sum(-1)
        for name, _ in self.spaces.images:
            losses[name] = (recon[name] - obs[name] / 255).square().sum((-3, -2, -1))
        return losses


# ---- 6. RSSM: the recurrent state-space model (paper: World model learning, Eq. 1) ---------------


class StepLinear(torch.autograd.Function):
    """For a loop y[t] = x[t] @ weight + addend[t]: the gradient of the weight as one product.

    `apply(weight, addend, inputs)` returns the addend (T, ...). The loop uses weight.detach() and
    appends every x[t] to the list `inputs`. The backward pass then computes sum_t x[t].T @ dy[t]:
    one large product is faster than T small ones.
    """

    @staticmethod
    def forward(ctx, weight, addend, inputs):
        ctx.inputs = inputs
        return addend.view_as(addend)

    @staticmethod
    def backward(ctx, grad):
        x = torch.stack(ctx.inputs)  # (T, B, in), or (T, G, B, in) of blocks
        return torch.einsum("t...bi,t...bo->...io", x, grad.to(x.dtype)), grad, None


class RSSM(nn.Module):
    """Sequence model h' = f(h, z, a), prior p(z | h), posterior q(z | h, x) over S categoricals.

    The state is deter (B, D), in (-1, 1), and stoch (B, S, K), one-hot. Both start as zeros. [D9]
    """

    def __init__(self, action_width, embed_dim, deter, hidden, stoch, classes, blocks, unimix):
        super().__init__()
        self.deter_dim, self.stoch_shape = deter, (stoch, classes)
        self.blocks, self.unimix, self.random = blocks, unimix, torch.rand
        self.deter_in = dense_layer(deter, hidden)
        self.stoch_in = dense_layer(stoch * classes, hidden)
        self.action_in = dense_layer(action_width, hidden)
        self.hidden_layer = BlockLinear(deter + 3 * hidden * blocks, deter, blocks)
        self.hidden_norm = NormSiLU(deter)
        self.gru = BlockLinear(deter, 3 * deter, blocks)
        self.prior_net = mlp(deter, hidden, 2, stoch * classes)
        self.posterior_in = dense_layer(deter + embed_dim, hidden)
        self.posterior_out = linear_layer(hidden, stoch * classes)

    def initial(self, batch_size):
        """The state before the first step: deter (B, D), stoch (B, S, K), zeros."""
        zeros = self.posterior_out.bias.new_zeros
        return zeros(batch_size, self.deter_dim), zeros(batch_size, *self.stoch_shape)

    def feat(self, deter, stoch):
        """The model state s = {h, z} as the heads see it: (..., F)."""
        return rounded(torch.cat([deter, stoch.flatten(-2)], -1))

    def embed_action(self, action):
        """Embedding of the action for the sequence model: (..., A) -> (..., hidden)."""
        # A policy's samples may leave [-1, 1]. The environment clips them, and so does this. [D8]
        return self.action_in(action / action.abs().clamp(min=1).detach())

    def layers(self):
        """The linear layers of a step, rounded once for all steps: name -> (weight, bias).

        Weights are (in, out), or (G, in, out) of blocks; biases (out,), or (G, 1, out). `observe`
        adds the bias and the observation's share to the posterior's first layer.
        """
        dense = lambda layer: (rounded(layer.weight).T, layer.bias)
        block = lambda layer: (rounded(layer.weight), layer.bias.view(self.blocks, 1, -1))
        from_deter = self.posterior_in[0].weight[:, : self.deter_dim]
        return {
            "deter_in": dense(self.deter_in[0]),
            "stoch_in": dense(self.stoch_in[0]),
            "hidden": block(self.hidden_layer),
            "gru": block(self.gru),
            "posterior_in": (rounded(from_deter).T, None),
            "posterior_out": dense(self.posterior_out),
        }

    def sequence_model(self, deter, stoch, action_embed, linear):
        """h' = f(h, z, a) (Eq. 1): deter (B, D), stoch (B, S, K), (B, hidden) -> (B, D).

        linear(name, x) computes the layer of `layers` that has this name.
        """
        # Each hidden block sees its own slice of h, and the embeddings of all of h, z and a. [D7]
        deter_embed = self.deter_in[1](linear("deter_in", deter))
        stoch_embed = self.stoch_in[1](linear("stoch_in", stoch.flatten(-2)))
        embeds = torch.cat([deter_embed, stoch_embed, action_embed], -1)  # (B, 3 hidden)
        # Blocks: (B, G * n) <-> (G, B, n).
        split = lambda x: x.unflatten(-1, (self.blocks, -1)).transpose(0, 1)
        merge = lambda x: x.transpose(0, 1).flatten(-2)
        x = torch.cat([split(deter), embeds.expand(self.blocks, -1, -1)], -1)
        x = self.hidden_norm(merge(linear("hidden", x)))  # (B, D)
        # GRU. Each block gives (reset, candidate, update). The reset gate acts on the candidate,
        # inside the tanh. The update gate has a bias of -1: at first, h is mostly kept. [D7]
        gates = f32(linear("gru", split(x)))  # (G, B, 3 D/G)
        reset, candidate, update = map(merge, gates.chunk(3, -1))  # (B, D) each
        candidate = torch.tanh(torch.sigmoid(reset) * candidate)
        update = torch.sigmoid(update - 1)
        return update * candidate + (1 - update) * deter

    def prior(self, deter):
        """Logits of p(z | h) (Eq. 1): (..., D) -> (..., S, K)."""
        return f32(self.prior_net(deter)).unflatten(-1, (self.stoch_shape[0], -1))

    def sample(self, logits, noise):
        """z from the logits (..., S, K) of p or q, and random numbers (..., S): (..., S, K)."""
        return sample_one_hot(mixed_probs(logits, self.unimix), noise)

    def observe_step(self, deter, stoch, keep, noise, action_embed, layers):
        """One step of `observe`: new deter and stoch, the logits, the inputs of the products.

        layers: name -> (weight, what is added to the product at this step).
        """
        inputs = {}

        def linear(name, x):
            weight, addend = layers[name]
            inputs[name] = rounded(x)
            return inputs[name] @ weight + addend

        deter = self.sequence_model(deter * keep, stoch * keep[..., None], action_embed, linear)
        x = self.posterior_in[1](linear("posterior_in", deter))
        logits = f32(linear("posterior_out", x)).unflatten(-1, (self.stoch_shape[0], -1))
        return deter, self.sample(logits, noise), logits, inputs

    def observe(self, embed, prev_action, is_first, deter, stoch):
        """Filter a sequence: the posterior state q(z | h, x) (Eq. 1) at each of T steps.

        embed (B, T, E); prev_action (B, T, A), which led to the observations; is_first (B, T) bool;
        the state before the first step, deter (B, D), stoch (B, S, K). Returns deter (B, T, D),
        stoch (B, T, S, K) and the posterior's logits (B, T, S, K).
        """
        # Time comes first here: a step is then a slice. The action's embedding and the
        # observation's share of the posterior's first layer are computed for all steps at once.
        batch, length = is_first.shape
        # Where an episode begins, the previous action and the state are zeros, not class 0: `keep`
        # is 0 there. It masks the action here and the state in `observe_step`. [D9]
        keep = (~is_first).to(deter.dtype).T.unsqueeze(-1)  # (T, B, 1)
        action_embed = self.embed_action(prev_action.transpose(0, 1) * keep)  # (T, B, hidden)
        noise = draw(self.random, (batch, length, self.stoch_shape[0]), embed.device)
        layer = self.posterior_in[0]
        from_embed = F.linear(embed.transpose(0, 1), layer.weight[:, self.deter_dim :], layer.bias)
        layers, inputs = {}, {}
        for name, (weight, bias) in self.layers().items():
            inputs[name] = []  # the loop below fills it
            bias = from_embed if bias is None else bias.expand(length, *bias.shape[:-2], batch, -1)
            addends = StepLinear.apply(weight, bias, inputs[name]).unbind(0)
            layers[name] = weight.detach(), addends
        states, steps = [], zip(keep, noise.transpose(0, 1), action_embed, strict=True)
        for t, step in enumerate(steps):
            layers_t = {name: (weight, addends[t]) for name, (weight, addends) in layers.items()}
            *state, inputs_t = self.observe_step(deter, stoch, *step, layers_t)
            deter, stoch, _ = state
            states.append(state)
            for name, x in inputs_t.items():
                inputs[name].append(x.detach())
        return [torch.stack(x, 1) for x in zip(*states, strict=True)]

    def imagine_step(self, deter, stoch, action, layers):
        """One step without observation: deter (N, D), stoch (N, S, K), action (N, A) -> both."""

        def linear(name, x):
            weight, bias = layers[name]
            return rounded(x) @ weight + bias

        deter = self.sequence_model(deter, stoch, self.embed_action(action), linear)
        noise = draw(self.random, (len(deter), self.stoch_shape[0]), deter.device)
        return deter, self.sample(self.prior(deter), noise)


# ---- 7. All networks; the world model's loss (paper: World model learning, Eq. 2-3) --------------


class Actor(nn.Module):
    """pi(a | s) (Eq. 4): feat (..., F) -> a policy over the environment's actions."""

    def __init__(self, feat_dim, units, spaces, unimix):
        super().__init__()
        self.classes, self.unimix = spaces.action_classes, unimix
        self.mlp = mlp(feat_dim, units, 3)
        names = ("logits",) if self.classes else ("mean", "std")
        out = lambda: linear_layer(units, spaces.action_width, outscale=0.01)  # [D2]
        self.outs = nn.ModuleDict({name: out() for name in names})

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
        twohot = len(bins), 0.0, TwoHotLinear  # width, scale [D2] and kind of the output layer
        self.reward = mlp(deter + stoch, units, 1, *twohot)  # (Eq. 1)
        self.cont = mlp(deter + stoch, units, 1, 1)  # (Eq. 1)
        self.actor = Actor(deter + stoch, units, spaces, args.actor_unimix)
        self.critic = mlp(deter + stoch, units, 3, *twohot)  # v(s) (Eq. 4)
        self.slow_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.register_buffer("bins", bins.to(torch.get_default_dtype()), persistent=False)
        self.register_buffer("return_range", torch.zeros(2))  # 5th and 95th percentile

    def observe(self, batch):
        """The posterior states and logits for a batch of `Agent.loss`: see `RSSM.observe`."""
        deter = batch["deter"].to(torch.get_default_dtype())
        start = deter, one_hot(batch["stoch"], self.rssm.stoch_shape[1])
        embed, action = self.encoder(batch), batch["prev_action"]
        return self.rssm.observe(embed, action, batch["is_first"], *start)

    def imagine_step(self, deter, stoch, action, layers):
        """The next state, its features (N, F), and the actor's choice in it (N, A)."""
        deter, stoch = self.rssm.imagine_step(deter, stoch, action, layers)
        feat = self.rssm.feat(deter, stoch)
        # detach: V1 and V2 (variants/) imagine with gradient, but not through the actor's input.
        return deter, stoch, feat, self.actor(feat.detach()).sample()


def world_model_loss(model, batch, args):
    """Losses of encoder, RSSM, decoder, reward and continue predictor on replayed sequences.

    batch: T steps, see `Agent.loss`. Returns a dict of losses (B, T), the posterior states deter
    (B, T, D) and stoch (B, T, S, K) with gradient, and metrics.
    """
    deter, stoch, post_logits = model.observe(batch)
    feat = model.rssm.feat(deter, stoch)  # (B, T, F)

    # L_pred (Eq. 3). The discount is part of the continue flag: imagination needs no other. [D12]
    losses = model.decoder.losses(model.decoder(deter, stoch), batch)
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
    entropy = lambda log_p: -(log_p.exp() * log_p).sum((-2, -1)).mean()
    metrics = {"latents/kl": kl.mean(), "latents/prior_entropy": entropy(prior)}
    return losses, deter, stoch, metrics | {"latents/posterior_entropy": entropy(post)}


# ---- 8. Behaviour: actor and critic (paper: Critic learning, Actor learning, Eq. 4-7) ------------


def imagine(model, deter, stoch, horizon):
    """Dream from N states with the actor's actions: feat (N, H+1, F), action (N, H+1, A).

    deter (N, D), stoch (N, S, K). `Agent.loss` calls it without gradient: the actor learns by
    REINFORCE alone, and imagination teaches the world model nothing. [D13] [D18]

        t          0    1   ...   H
        feat       s0   s1  ...   sH      s0 is a state of the replay
        action     a0   a1  ...   aH      a[t] is chosen at s[t]; the last one is not carried out
        reward     -    r1  ...   rH      predicted from s[t]: received on arriving there
    """
    layers, feats = model.rssm.layers(), [model.rssm.feat(deter, stoch)]
    actions = [model.actor(feats[0]).sample()]
    for _ in range(horizon):
        deter, stoch, feat, action = model.imagine_step(deter, stoch, actions[-1], layers)
        feats.append(feat)
        actions.append(action)
    return torch.stack(feats, 1), torch.stack(actions, 1)


def lambda_return(reward, value, cont, last, return_lambda):
    """Lambda-returns (N, H), computed backwards (Eq. 5):

        R[t] = r[t+1] + c[t+1] ((1 - l[t+1]) v[t+1] + l[t+1] R[t+1]),  R[H] = v[H]

    with l = lambda (1 - last). The paper counts a reward with the action that earns it; here it
    belongs to the state it leads to. [D14] All arguments are (N, H+1). cont in [0, 1] has the
    discount inside; last is 1 where a trajectory is cut: the value stands for what follows.
    """
    assert reward.shape == value.shape == cont.shape == last.shape
    lambdas = return_lambda * (1 - last)
    without_next = reward + cont * (1 - lambdas) * value
    next_return, returns = value[:, -1], []
    for t in reversed(range(1, reward.shape[1])):
        next_return = without_next[:, t] + cont[:, t] * lambdas[:, t] * next_return
        returns.append(next_return)
    return torch.stack(returns[::-1], 1)


def critic_loss(logits, slow_value, returns, model, args):
    """Regression to the returns and, to steady it, to the slow critic (Eq. 5) [D15]: (...)."""
    to_slow = twohot_loss(logits, slow_value, model.bins)
    return twohot_loss(logits, returns, model.bins) + args.slow_reg * to_slow


def actor_critic_loss(model, feat, action, args):
    """Losses of actor and critic on imagined trajectories (Eq. 5-7).

    feat (N, H+1, F) and action (N, H+1, A) are those of `imagine`. Moves the return range. Returns
    the losses `actor` and `critic`, (N, H) each, the returns (N, H), and metrics.
    """
    logits = model.critic(feat)  # (N, H+1, V)
    with torch.no_grad():
        value = twohot_mean(logits, model.bins)  # target and baseline, not the slow critic [D15]
        slow_value = twohot_mean(model.slow_critic(feat), model.bins)
        reward = twohot_mean(model.reward(feat), model.bins)
        cont = torch.sigmoid(f32(model.cont(feat))).squeeze(-1)
        weight = cont.cumprod(1)  # with the prediction for the start itself [D16]
        returns = lambda_return(reward, value, cont, torch.zeros_like(cont), args.return_lambda)

        # Return range S (Eq. 7), over the whole batch. A range below 1 counts as 1. [D17]
        all_returns = returns
        if WORLD_SIZE > 1:  # the returns of all processes, as the sum of what each fills in
            all_returns = returns.new_zeros(WORLD_SIZE, *returns.shape)
            all_returns[RANK] = returns
            dist.all_reduce(all_returns)
        percentiles = torch.stack([torch.quantile(all_returns, q) for q in (0.05, 0.95)])
        model.return_range.lerp_(percentiles, args.return_rate)
        low, high = model.return_range.clone()
        return_scale = (high - low).clamp(min=1)
        advantage = (returns - value[:, :-1]) / return_scale

    # REINFORCE (Eq. 6). The weight is the predicted, discounted probability that the episode goes
    # on after this state. [D16]
    policy = model.actor(feat[:, :-1])
    entropy = policy.entropy()  # (N, H)
    log_prob = policy.log_prob(action[:, :-1])
    regression = critic_loss(logits[:, :-1], slow_value[:, :-1], returns, model, args)
    losses = {
        "actor": -weight[:, :-1] * (log_prob * advantage + args.ent_coef * entropy),
        "critic": weight[:, :-1] * regression,
    }
    assert all(loss.shape == returns.shape for loss in losses.values())
    metrics = dict(return_low=low, return_high=high, advantage_std=advantage.std(correction=0))
    metrics |= {"return": returns.mean(), "value": value.mean(), "slow_value": slow_value.mean()}
    metrics |= dict(reward=reward.mean(), cont=cont.mean(), weight=weight.mean())
    metrics |= dict(advantage=advantage.mean(), policy_entropy=entropy.mean())
    return losses, returns, {f"behaviour/{name}": x for name, x in metrics.items()}


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
    """

    def __init__(self, params, args):
        self.params, self.args = list(params), args
        self.nu = [torch.zeros_like(p) for p in self.params]
        self.mu = [torch.zeros_like(p) for p in self.params]
        self.updates = self.params[0].new_zeros(())
        self.state = [*self.nu, *self.mu, self.updates]  # what a checkpoint keeps

    @torch.no_grad()
    def step(self, grads):
        """Move the parameters by `grads`, which are in their order and overwritten: metrics."""
        args, grads = self.args, list(grads)
        norms = torch.stack(torch._foreach_norm(grads))
        if args.agc_clip:
            limits = args.agc_clip * torch.stack(torch._foreach_norm(self.params)).clamp(min=1e-3)
            torch._foreach_mul_(grads, list((limits / norms).clamp(max=1).unbind()))

        lr = torch.full_like(self.updates, args.learning_rate)
        if args.warmup_updates:
            lr *= (self.updates / args.warmup_updates).clamp(max=1)
        self.updates += 1
        torch._foreach_lerp_(self.nu, torch._foreach_mul(grads, grads), 1 - args.beta2)
        scale = torch._foreach_div(self.nu, 1 - args.beta2**self.updates)
        torch._foreach_sqrt_(scale)
        torch._foreach_add_(scale, args.laprop_eps)
        torch._foreach_div_(grads, scale)
        torch._foreach_lerp_(self.mu, grads, 1 - args.beta1)
        step = torch._foreach_mul(self.mu, lr / (1 - args.beta1**self.updates))
        torch._foreach_sub_(self.params, step)
        return {"losses/grad_norm": norms.norm(), "charts/lr": lr}


# ---- 10. Agent and device ------------------------------------------------------------------------


def to_device(arrays, device):
    """dict of numpy arrays -> dict of tensors, through pinned memory to a GPU."""
    tensors = {key: torch.from_numpy(np.ascontiguousarray(x)) for key, x in arrays.items()}
    if device.type == "cuda":
        tensors = {k: x.pin_memory().to(device, non_blocking=True) for k, x in tensors.items()}
    return tensors


def keep_freed_memory():
    """Have glibc keep freed memory: otherwise page faults are half of an update on images."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        mmap_max, trim_threshold = -4, -1  # names of glibc's malloc.h
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, -1)


def stored(deter, stoch):
    """A state as the replay stores it: deter (..., D) float16, classes of stoch (..., S) uint8."""
    return deter.half(), stoch.argmax(-1).to(torch.uint8)


class CudaGraph:
    """A function of tensors as one CUDA graph for each set of input shapes and types.

    Launching thousands of small kernels takes longer than running them. Three calls compile and
    warm up, the next one records, later ones replay. The function may depend on nothing but its
    input, random numbers, and tensors that stay in place.
    """

    def __init__(self, function):
        self.function, self.calls, self.graphs = function, Counter(), {}
        self.stream = torch.cuda.Stream()

    def __call__(self, *inputs):
        leaves = tree_leaves(inputs)
        key = tuple((x.shape, x.dtype) if isinstance(x, torch.Tensor) else x for x in leaves)
        self.calls[key] += 1
        if self.calls[key] == 4:
            self.record(key, inputs)
        if key not in self.graphs:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):  # the one that will record
                outputs = self.function(*inputs)
            torch.cuda.current_stream().wait_stream(self.stream)
            return outputs
        graph, static, outputs = self.graphs[key]
        for to, x in zip(static, leaves, strict=True):
            if isinstance(x, torch.Tensor):
                to.copy_(x, non_blocking=True)
        graph.replay()
        return tree_map(torch.clone, outputs)

    def record(self, key, inputs):
        """Capture the function for inputs like these. Raises UserError if that fails.

        The run then ends: before torch 2.13, random draws raise errors after a failed capture.
        """
        static, graph = tree_map_only(torch.Tensor, torch.clone, inputs), torch.cuda.CUDAGraph()
        gc.collect()  # to free a graph or a kernel while another graph is recorded would spoil it
        gc.disable()
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                outputs = self.function(*static)
        except RuntimeError as error:  # an error inside comes first; the end then fails, too
            cause = first_line(error.__context__ or error)
            raise UserError(f"cannot capture a CUDA graph: {cause}; try --no-cudagraphs") from error
        finally:
            gc.enable()
        self.graphs[key] = graph, tree_leaves(static), outputs


class Agent:
    """The networks with their optimizer: `act` in the environment, `train_step` on replay.

    dtype: the type of matrix products and convolutions in an update. Acting is float32: one action
    is not faster in bfloat16. [D23]
    """

    def __init__(self, args, spaces, device="cpu", dtype=torch.float32):
        self.args, self.spaces, self.device = args, spaces, torch.device(device)
        self.gpus = [self.device] if self.device.type == "cuda" else []
        if self.gpus:
            if self.device.index is not None:
                torch.cuda.set_device(self.device)  # graphs are captured on this one
            torch.backends.cudnn.allow_tf32 = False  # float32 means float32
        self.model = Dreamer(args, spaces).to(self.device)
        self.params = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = LaProp(self.params, args)
        mixed = dtype == torch.bfloat16
        self.autocast = torch.autocast(self.device.type, dtype, enabled=mixed, cache_enabled=False)
        self.behaviour_loss = actor_critic_loss
        if args.compile:
            self.compile()
        if args.cudagraphs and self.gpus:
            self.act, self.train_step = CudaGraph(self.act), CudaGraph(self.train_step)

    def compile(self):
        """Compile the pieces of an update; its loops over time, unrolled, would take minutes."""
        try:
            torch.compile(lambda x: x.sin() + 1)(torch.zeros(8, device=self.device))
        except Exception as error:
            print(f"torch.compile does not work here, going on without it: {first_line(error)}")
            return
        # Every agent of a process counts against this limit, beyond which nothing is compiled.
        torch._dynamo.config.recompile_limit = 1000
        model, rssm = self.model, self.model.rssm
        pieces = [(rssm, "observe_step"), (model, "imagine_step"), (self, "behaviour_loss")]
        if self.spaces.images:
            pieces += [(model.encoder, "forward"), (model.decoder, "forward")]
        for owner, name in pieces:
            setattr(owner, name, torch.compile(getattr(owner, name), dynamic=False))

    def initial(self, num_envs):
        """What `act` carries on: deter (n, D), stoch (n, S, K), previous action (n, A); zeros."""
        deter, stoch = self.model.rssm.initial(num_envs)
        return deter, stoch, deter.new_zeros(num_envs, self.spaces.action_width)

    @torch.compiler.set_stance("force_eager")  # too small to be worth compiling
    @torch.no_grad()
    def act(self, obs, carry, greedy=False):
        """One decision for n environments: obs dict of (n, ...) with is_first, carry -> new carry.

        That is the posterior state at this observation, and the action vector: sampled, or the
        most likely one if `greedy`.
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

        batch: observations by name (B, T, ...), prev_action (B, T, A), reward, is_first, is_last,
        is_terminal (B, T), and the state before the first step as the replay stores it.
        """
        args, model = self.args, self.model
        losses, deter, stoch, metrics = world_model_loss(model, batch, args)
        starts = deter.detach().flatten(0, 1), stoch.detach().flatten(0, 1)  # (N, ...)
        with torch.no_grad():
            feat, action = imagine(model, *starts, args.imag_horizon)
        behaviour, returns, behaviour_metrics = self.behaviour_loss(model, feat, action, args)
        bootstrap = returns[:, 0].unflatten(0, deter.shape[:2])  # (B, T)
        feat = model.rssm.feat(deter, stoch)  # with gradient into the world model
        losses |= behaviour
        losses["repval"] = replay_critic_loss(model, feat, bootstrap, batch, args)

        # One sum (Eq. 2 and the losses of actor and critic). [D20]
        scales = dict(dyn=args.beta_dyn, rep=args.beta_rep, actor=1.0)
        scales |= dict(critic=args.beta_val, repval=args.beta_repval)
        means = {name: loss.mean() for name, loss in losses.items()}
        # beta_pred is the weight of reward, cont, and every observation.
        total = sum(scales.get(name, args.beta_pred) * mean for name, mean in means.items())
        means["total"] = total
        metrics |= behaviour_metrics | {f"losses/{name}": mean for name, mean in means.items()}
        metrics = {name: value.detach() for name, value in metrics.items()}
        return total, metrics, deter.detach(), stoch.detach()

    def train_step(self, batch):
        """One update of everything: losses, gradients, optimizer, slow critic. batch as in `loss`.

        Returns the metrics and the posterior states as the replay stores them: deter (B, T, D)
        float16, stoch (B, T, S) uint8.
        """
        with self.autocast:
            total, metrics, deter, stoch = self.loss(batch)
        grads = torch.autograd.grad(total, self.params)
        if WORLD_SIZE > 1:  # the mean over all processes, in one message
            flat = torch.cat([grad.flatten() for grad in grads])
            dist.all_reduce(flat)
            nn.utils.vector_to_parameters(flat / WORLD_SIZE, grads)
        metrics |= self.optimizer.step(grads)
        self.update_slow_critic()
        return metrics, *stored(deter, stoch)

    @torch.no_grad()
    def update_slow_critic(self):
        """Let the slow critic follow the critic. [D15]"""
        slow, critic = self.model.slow_critic.parameters(), self.model.critic.parameters()
        torch._foreach_lerp_(list(slow), list(critic), self.args.tau)

    def state_dict(self):
        """Everything that learns, and the spaces that it belongs to."""
        learned = {"model": self.model.state_dict(), "optimizer": self.optimizer.state}
        return learned | {"spaces": astuple(self.spaces)}

    @torch.no_grad()
    def load_state_dict(self, state):
        """Take over a `state_dict`. Raises UserError if it belongs to other networks."""
        if state["spaces"] != astuple(self.spaces):
            raise UserError(f"the environment has other spaces than the checkpoint: {self.spaces}")
        try:
            self.model.load_state_dict(state["model"])
            if "optimizer" in state:  # which is left out of published networks
                torch._foreach_copy_(self.optimizer.state, state["optimizer"])
        except RuntimeError as error:
            raise UserError("the checkpoint is of other networks than this file's") from error


# ---- 11. Replay ----------------------------------------------------------------------------------


class Replay:
    """Ring of the last steps of every environment, with the latent state of each step.

    Sequences cross episodes: the RSSM resets at is_first. An entry is one step of all environments:
    arrays are (length, num_envs, ...). They are one file mapped into memory: what was written
    survives the process, and a checkpoint need not copy it. To resume, pass a checkpoint's `steps`
    and `online`: what was written after them is dropped. Of several processes, each keeps its own
    streams, and samples its part of a batch from them. Raises UserError if the file is damaged, or
    there is no room.
    """

    def __init__(self, path, length, spaces, rssm, args, steps=0, online=0):
        fields = [
            *((name, np.uint8, (IMAGE_SIZE, IMAGE_SIZE, c)) for name, c in spaces.images),
            *((name, np.float32, (width,)) for name, width, _ in spaces.vectors),
            ("action", np.float32, (spaces.action_width,)),
            ("reward", np.float32, ()),
            *((name, np.bool_, ()) for name in ("is_first", "is_last", "is_terminal")),
            ("deter", np.float16, (rssm.deter_dim,)),
            ("stoch", np.uint8, (rssm.stoch_shape[0],)),
        ]
        self.length, self.num_envs = length, args.num_envs // WORLD_SIZE
        self.batch_size, self.window = args.batch_size // WORLD_SIZE, args.batch_length + 1
        self.names = [name for name, _, _ in fields]
        fields = [(name, kind, (self.num_envs, *shape)) for name, kind, shape in fields]
        entry = np.dtype([("step", np.int64), *fields], align=True)
        self.steps = steps  # written to each stream so far; step i is at i % length
        self.online = online  # windows of the online queue sampled or skipped, over all streams
        before, size = path.stat().st_size if path.exists() else 0, length * entry.itemsize
        if before < min(steps, length) * entry.itemsize:
            raise UserError(f"the replay {path} is missing or too short")
        try:
            # Not "ab": where a file system lacks fallocate, the C library fails in append mode.
            with open(path, "r+b" if path.exists() else "wb") as file:
                if hasattr(os, "posix_fallocate"):  # elsewhere, a full disk is met later
                    os.posix_fallocate(file.fileno(), 0, size)
            self.data = np.memmap(path, entry, "r+", shape=(length,))
        except OSError as error:
            with contextlib.suppress(OSError):
                os.truncate(path, before)  # gives the room back
            text = f"no {size / 1e9:.2f} GB for the replay: {error.strerror}"
            raise UserError(f"{text}; lower --buffer-size?") from error
        # Steps written after the checkpoint are dropped: the run writes them again. In a full ring
        # they have overwritten the oldest steps, which are lost, and must not be read.
        # (Latent states from lost updates stay: stored ones always come from some older network.)
        wanted = np.arange(max(0, steps - length), steps)
        found = self.data["step"][wanted % length]
        if (found < wanted).any():
            raise UserError(f"the replay {path} is damaged")
        self.readable_from = max(wanted[found > wanted] + 1, default=0)

    @property
    def oldest(self):
        """The first step that can be read."""
        return max(self.readable_from, self.steps - self.length)

    def __len__(self):
        """Number of start positions of sequences."""
        return self.num_envs * max(0, self.steps - self.oldest - self.window + 1)

    def add(self, entry):
        """Append one step of every environment: dict of arrays (num_envs, ...)."""
        row = self.steps % self.length
        self.data["step"][row] = self.steps  # first: from here on, the old step is gone
        for name in self.names:
            self.data[name][row] = entry[name]
        self.steps += 1

    def sample(self):
        """A batch of T steps, dict of arrays (B, T, ...) without latents, and its index.

        The step before them is context: its action is their first prev_action. [D21] Every window
        of T+1 new steps comes once, as soon as it is complete (the online queue). The rest is drawn
        uniformly from all start positions.
        """
        starts, complete = [], self.steps // self.window * self.num_envs
        while self.online < complete and len(starts) < self.batch_size:
            window, env = divmod(self.online, self.num_envs)
            self.online += 1
            if window * self.window >= self.oldest:
                starts.append((env, window * self.window))
        picks = torch.randint(len(self), (WORLD_SIZE, self.batch_size - len(starts)))  # as `draw`
        for i in picks[RANK].tolist():
            starts.append((i % self.num_envs, self.oldest + i // self.num_envs))
        envs, first = np.array(starts).T[:, :, None]  # (B, 1) each
        rows = (first + np.arange(self.window)) % self.length  # (B, T+1)
        names = [name for name in self.names if name not in ("action", "deter", "stoch")]
        batch = {name: self.data[name][rows[:, 1:], envs] for name in names}
        batch["prev_action"] = self.data["action"][rows[:, :-1], envs]
        # An episode cut off by a restart ends where the next one begins.
        batch["is_last"][:, :-1] |= batch["is_first"][:, 1:]
        return batch, (rows, envs)

    def read_latents(self, index):
        """The state at a batch's context, where its sequences start: deter (B, D), stoch (B, S)."""
        rows, envs = index
        return {name: self.data[name][rows[:, 0], envs[:, 0]] for name in ("deter", "stoch")}

    def write_latents(self, index, deter, stoch):
        """Store the states an update computed, (B, T, D) and (B, T, S), for all but the context."""
        rows, envs = index
        self.data["deter"][rows[:, 1:], envs] = deter
        self.data["stoch"][rows[:, 1:], envs] = stoch


# ---- 12. Environments ----------------------------------------------------------------------------

tell = functools.cache(print)  # prints each text only once


def worker_signals(env):
    """In a process of --async-envs: ignore Ctrl-C, as the main one handles it; end at SIGTERM."""
    if multiprocessing.parent_process():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return env


def make_envs(args, num_envs, video=None):
    """Gymnasium vector environment with NEXT_STEP autoreset; `video`: folder to record in, or None.

    Raises UserError if it cannot be made.
    """
    try:
        kwargs = {**json.loads(args.env_kwargs)}
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"--env-kwargs must be a JSON object, not {args.env_kwargs}") from error
    gym.logger.min_level = 50  # silent: what matters is raised
    warnings.filterwarnings("ignore", module="gymnasium")
    wrappers, atari = [], args.env_id.split(":")[-1].startswith("ALE/")
    if atari:
        import_optional("ale_py", "gymnasium[atari]")  # registers its environments
        if args.action_repeat > 1:
            raise UserError("--action-repeat: Atari has its own, --env-kwargs '{\"frameskip\": 4}'")
    if video:
        kwargs["render_mode"] = "rgb_array"
        wrappers.append(lambda env: gym.wrappers.RecordVideo(env, video_folder=str(video)))
    elif atari:
        # The C++ environment takes the maximum over two frames and resizes (the plain one, of
        # videos, does not). Rewards are not clipped; a lost life does not end an episode.
        defaults = dict(img_height=IMAGE_SIZE, img_width=IMAGE_SIZE, grayscale=False, stack_num=1)
        defaults |= dict(use_fire_reset=False, reward_clipping=False, episodic_life=False)
        kwargs = defaults | kwargs
    if args.action_repeat > 1:
        wrappers.append(lambda env: gym.wrappers.RepeatAction(env, args.action_repeat))
    if args.pixels and not atari:
        kwargs["render_mode"] = "rgb_array"
        wrappers.append(gym.wrappers.AddRenderObservation)
    mode, options = "sync", {}
    if (atari and not video) or not (args.async_envs or wrappers):
        mode = None  # the environment's own vector version, if it has one
    elif args.async_envs and not video:
        # (Shared memory would cast values of a wrong type or shape without a word.)
        mode, options = "async", {"shared_memory": False}
        wrappers.append(worker_signals)
    try:
        if atari and kwargs.get("stack_num", 1) < 1:
            raise ValueError("stack_num must be at least 1")  # ale-py would wait forever
        envs = gym.make_vec(args.env_id, num_envs, mode, options, wrappers, **kwargs)
    except Exception as error:
        raise UserError(f"cannot make --env-id {args.env_id}: {error}") from error
    if envs.metadata.get("autoreset_mode") != gym.vector.AutoresetMode.NEXT_STEP:
        raise UserError(f"{args.env_id} does not reset in NEXT_STEP mode: try --async-envs")
    return envs


def discrete_classes(space):
    """Number of classes of each variable of a discrete space: a tuple; empty for other spaces."""
    if isinstance(space, gym.spaces.Discrete):
        return (int(space.n),)
    if isinstance(space, gym.spaces.MultiDiscrete):
        return tuple(map(int, space.nvec.flat))
    return (2,) * math.prod(space.shape) if isinstance(space, gym.spaces.MultiBinary) else ()


def encode_vector(value, space):
    """(n, ...) values of a space -> (n, width) float32; discrete ones as one-hots side by side."""
    value, classes = value.reshape(len(value), -1), discrete_classes(space)
    if not classes:
        return value.astype(np.float32)
    index = value - np.reshape(getattr(space, "start", 0), -1)
    one_hots = [i[:, None] == np.arange(n) for i, n in zip(index.T, classes, strict=True)]
    if not all(x.any(1).all() for x in one_hots):
        raise ValueError(f"the observation {value.tolist()} is not in {space}")
    return np.concatenate(one_hots, 1, dtype=np.float32)


def encode_image(image):
    """(n, ...) uint8 -> (n, 64, 64, C) uint8, resized by averaging areas.

    One image may be (h, w), (h, w, C) or (C, h, w). A stack of k of the last two gets k*C channels.
    """
    if image.ndim == 3:
        image = image[..., None]
    if image.shape[-3] < min(image.shape[-2:]):  # the smallest is the colour
        image = np.moveaxis(image, -3, -1)
    if image.ndim == 5:
        image = np.moveaxis(image, 1, -2).reshape(len(image), *image.shape[2:4], -1)
    if image.shape[1:3] == (IMAGE_SIZE, IMAGE_SIZE):
        return image
    x = torch.from_numpy(np.ascontiguousarray(image)).permute(0, 3, 1, 2).float()
    x = F.interpolate(x, (IMAGE_SIZE, IMAGE_SIZE), mode="area").round().to(torch.uint8)
    return x.permute(0, 2, 3, 1).numpy()


def encode(space, value, name="obs"):
    """Take batched values of a space apart: [(name, discrete classes, array)], sorted by name.

    Arrays are images (n, 64, 64, C) uint8 and vectors (n, width) float32. Raises UserError for
    spaces that cannot be encoded.
    """
    if isinstance(space, (gym.spaces.Dict, gym.spaces.Tuple)):
        items = space.items() if isinstance(space, gym.spaces.Dict) else enumerate(space)
        parts = [encode(inner, value[key], f"{name}/{key}") for key, inner in items]
        return sorted(sum(parts, []), key=lambda part: part[0])
    is_box, classes = isinstance(space, gym.spaces.Box), discrete_classes(space)
    if not (is_box or classes) and isinstance(space.sample(), str):
        tell(f"{name} is text, which is left out")
        return []
    if 0 in (space.shape or ()) or not (is_box or classes):
        raise UserError(f"{name}: cannot encode the space {space}")
    if is_box and space.dtype == np.uint8 and 2 <= len(space.shape) <= 4:
        return [(name, (), encode_image(np.asarray(value)))]
    return [(name, classes, encode_vector(np.asarray(value), space))]


class Environments:
    """A vector environment in the agent's terms: observations by name, action vectors.

    `spaces` describes them to the networks. `entry` is the newest column of the table at the head
    of this file, without the action. Raises UserError for whatever the environments do wrong.
    """

    longest_episode = 100_000  # agent steps after which an episode is reported as it stands

    def __init__(self, args, num_envs, seed, video=None):
        self.envs, self.video = make_envs(args, num_envs, video), video
        self.num_envs, self.seed = num_envs, seed
        self.action_space = self.envs.single_action_space
        classes, shape = discrete_classes(self.action_space), self.action_space.shape
        if not (classes or isinstance(self.action_space, gym.spaces.Box)) or 0 in shape:
            raise UserError(f"actions of the space {self.action_space} are not supported")
        parts = encode(self.envs.single_observation_space, self.envs.observation_space.sample())
        names = [name for name, _, _ in parts]
        if not names:
            raise UserError(f"nothing to observe in {self.envs.single_observation_space}")
        if len(set(names)) < len(names):
            raise UserError(f"two observations have the same name: {', '.join(names)}")
        images = tuple((name, x.shape[-1]) for name, _, x in parts if x.ndim == 4)
        vectors = tuple((name, x.shape[-1], kinds) for name, kinds, x in parts if x.ndim == 2)
        self.spaces = Spaces(images, vectors, classes, sum(classes) or math.prod(shape))

    def reset(self):
        """Begin an episode in every environment."""
        self.steps, n = 0, self.num_envs
        self.returns, self.lengths, no = np.zeros(n), np.zeros(n, int), np.zeros(n, bool)
        with self.faults():
            obs, _ = self.envs.reset(seed=self.seed)
            self.arrive(obs, np.zeros(n), is_first=~no, terminal=no, truncated=no)

    def step(self, action):
        """Carry out action vectors (n, A): [(environment, return, length)] of episodes to report.

        After an end, the next step leads to the next episode's first observation.
        """
        self.steps += 1
        with self.faults():
            obs, *results, _ = self.envs.step(self.decode_action(action))
            reward, *ends = (np.asarray(x).reshape(self.num_envs) for x in results)
            self.arrive(obs, reward, self.entry["is_last"], *(x.astype(bool) for x in ends))
        self.returns += self.entry["reward"]
        self.lengths += ~self.entry["is_first"]
        due = self.entry["is_last"] | (self.lengths >= self.longest_episode)
        episodes = [(i, self.returns[i], self.lengths[i]) for i in np.flatnonzero(due)]
        self.returns[due] = self.lengths[due] = 0
        return episodes

    def arrive(self, obs, reward, is_first, terminal, truncated):
        """Set `entry` to what was observed. Raises ValueError for a number that is not finite."""
        parts = encode(self.envs.single_observation_space, obs)
        self.entry = {name: x for name, _, x in parts}
        reward = np.where(is_first, 0, reward).astype(np.float32)  # some give one at a reset
        self.entry |= dict(reward=reward, is_first=is_first)
        self.entry |= dict(is_last=terminal | truncated, is_terminal=terminal)
        for name, x in self.entry.items():
            if x.dtype == np.float32 and not np.isfinite(x).all():
                raise ValueError(f"{name} is not finite")

    @contextlib.contextmanager
    def faults(self):
        """Turn whatever fails in the environments into a UserError."""
        try:
            yield
        except (Exception, SystemExit) as error:  # such as EOFError: a worker has died
            problem = f"{type(error).__name__}: {error}"
            raise UserError(f"the environments failed at step {self.steps}: {problem}") from error

    def decode_action(self, action):
        """Action vectors (n, A) -> the environment's actions.

        Continuous ones with two finite bounds are clipped to [-1, 1] and scaled to the bounds.
        """
        space = self.action_space
        if classes := self.spaces.action_classes:
            parts = np.split(action, np.cumsum(classes)[:-1], -1)
            index = np.stack([part.argmax(-1) for part in parts], -1).reshape(-1, *space.shape)
            return index.astype(space.dtype) + getattr(space, "start", 0)
        action = action.reshape(-1, *space.shape)
        bounded = np.isfinite(space.low) & np.isfinite(space.high)
        low, high = np.where(bounded, (space.low, space.high), 0.0).astype(np.float64)
        scaled = low + (np.clip(action, -1, 1) + 1) / 2 * (high - low)
        action = np.clip(np.where(bounded, scaled, action), space.low, space.high)
        return (np.rint(action) if space.dtype.kind in "iu" else action).astype(space.dtype)

    def close(self):
        """End the environments. Errors of processes that have died are ignored.

        Raises UserError if the video, which is written now, cannot be.
        """
        workers = isinstance(self.envs, gym.vector.AsyncVectorEnv)  # which may never answer
        try:
            self.envs.close(**({"timeout": 5} if workers else {}))
        except Exception as error:
            if self.video:
                raise UserError(f"cannot write {self.video}: {first_line(error)}") from error
        finally:
            self.envs.closed = True  # or it would try again when it is deleted


# ---- 13. Logging, training, evaluation, pictures, checkpoint -------------------------------------


class Logger:
    """Metrics to metrics.jsonl, and to TensorBoard if it is installed; from there to W&B (--track).

    Locks the run's folder. checkpoint: that of the run in `folder`, to go on with; lines written
    after it are dropped. A terminal shows one status line; elsewhere there is one every 10 s.
    """

    def __init__(self, args, folder, checkpoint=None):
        start = checkpoint or dict(step=0, size=0, seconds=0.0)
        self.file, self.tensorboard = open(folder / "metrics.jsonl", "ab", buffering=0), None
        with contextlib.suppress(ImportError, OSError):  # no fcntl (Windows), or no locks (NFS)
            import fcntl

            try:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(f"{folder} is in use by another process") from error
        self.file.truncate(min(start["size"], os.fstat(self.file.fileno()).st_size))
        self.wandb = import_optional("wandb", "wandb") if args.track else None
        if self.wandb:
            run = dict(id=re.sub(r"\W", "-", folder.name), name=folder.name, resume="allow")
            run |= dict(project=args.wandb_project_name, entity=args.wandb_entity)
            self.wandb.init(**run, config=asdict(args), sync_tensorboard=True)
        with contextlib.suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(folder, purge_step=start["step"] + 1)
        self.began, self.terminal = time.time() - start["seconds"], sys.stdout.isatty()
        self.returns, self.total = deque(maxlen=20), args.total_timesteps
        self.marks = deque(maxlen=20)  # (time, step, updates) of the last status lines
        self.rates = 0.0, 0.0  # agent steps, updates a second

    def write(self, step, metrics, picture=None):
        """One line of scalars, those that are finite: dict of name -> number or 0-d tensor."""
        metrics = {name: float(value) for name, value in metrics.items()}
        metrics = {name: value for name, value in metrics.items() if math.isfinite(value)}
        line = {"step": step, "time": round(time.time() - self.began, 3)} | metrics
        self.file.write(json.dumps(line).encode() + b"\n")
        if self.tensorboard:
            for name, value in metrics.items():
                self.tensorboard.add_scalar(name, value, step)
            if picture is not None:
                self.tensorboard.add_image("dreams", picture, step, dataformats="HWC")

    def status(self, step, updates):
        """Show the status line if it is time for it."""
        now = time.time()
        if self.marks and now - self.marks[-1][0] < (0.5 if self.terminal else 10):
            return
        self.marks.append((now, step, updates))
        seconds, steps, trained = np.subtract(self.marks[-1], self.marks[0])
        if not steps:
            return
        self.rates = steps / seconds, trained / seconds
        text = f"step {step:,}/{self.total:,}  {self.rates[0]:.1f} steps/s"
        if trained:  # before the first updates, the speed says nothing
            left = datetime.timedelta(seconds=max(0, int((self.total - step) / self.rates[0])))
            text += f"  {self.rates[1]:.2f} updates/s  {left} left"
        if self.returns:
            text += f"  return {self.returns[-1]:.1f}, mean {np.mean(self.returns):.1f}"
        self.show(text, end="" if self.terminal else "\n")

    def show(self, text, end="\n"):
        """Print a line in place of the status line."""
        with contextlib.suppress(BrokenPipeError):  # `| head` does not end a run
            print(f"\r\x1b[2K{text}" if self.terminal else text, end=end, flush=True)

    def close(self):
        """Close the files."""
        self.file.close()
        if self.tensorboard:
            self.tensorboard.close()
        if self.wandb:
            self.wandb.finish()


class Trainer:
    """Collection and training: what a run carries from one step to the next.

    checkpoint: that of the run in `folder`, to go on with. Raises UserError if it does not fit.
    """

    counters = ("step", "updates", "credit", "evaluated")

    def __init__(self, args, envs, agent, folder, checkpoint=None):
        self.args, self.envs, self.agent = args, envs, agent
        if agent.device.type == "cpu":
            keep_freed_memory()
        self.step = self.updates = self.evaluated = 0  # evaluated: step of the last evaluation
        self.updates_per_step = args.train_ratio / (args.batch_size * args.batch_length)
        self.credit = float(self.updates_per_step > 0)  # updates owed; the first one at once
        self.batch, self.metrics = None, {}  # of the latest update
        self.pending = None  # index and latent states of the latest update, not yet stored
        path, written = folder / f"replay{RANK or ''}.bin", ()
        if checkpoint:
            for name in self.counters:
                setattr(self, name, checkpoint[name])
            agent.load_state_dict(checkpoint["agent"])
            torch.set_rng_state(checkpoint["random"])
            if agent.device.type == "cuda" and checkpoint["random_cuda"] is not None:
                torch.cuda.set_rng_state(checkpoint["random_cuda"], agent.device)
            if checkpoint["processes"] == WORLD_SIZE:  # otherwise the replay fills anew
                written = checkpoint["replay"]
        envs.reset()
        self.carry = agent.initial(envs.num_envs)
        total = max(args.total_timesteps, self.step) + args.num_envs
        length = math.ceil(min(args.buffer_size, total) / args.num_envs)  # of each stream
        self.replay = Replay(path, length, envs.spaces, agent.model.rssm, args, *written)
        self.starts_needed = self.replay.batch_size * args.batch_length  # for training [D22]
        if WORLD_SIZE > 1:  # all begin to train at the same step
            dist.all_reduce(first := torch.tensor(self.replay.readable_from), dist.ReduceOp.MAX)
            self.replay.readable_from = first.item()

    def collect_and_train(self):
        """Step every environment and make the updates due. Returns as `Environments.step`."""
        entry = self.envs.entry
        self.carry = self.agent.act(to_device(entry, self.agent.device), self.carry)
        *state, action = self.carry
        deter, stoch, action = (x.cpu().numpy() for x in (*stored(*state), action))
        action = action * ~entry["is_last"][:, None]  # zeros at an end [D24]
        self.finish_update()  # before the ring moves on
        self.replay.add(entry | dict(deter=deter, stoch=stoch, action=action))
        self.step += self.args.num_envs
        if len(self.replay) >= self.starts_needed:  # [D22]
            while self.credit >= 1:
                self.train()
                self.credit -= 1
            self.credit += self.args.num_envs * self.updates_per_step
        return self.envs.step(action)

    def train(self):
        """One update. A GPU may still be busy with it when this returns: see `finish_update`."""
        batch, index = self.replay.sample()
        batch = to_device(batch, self.agent.device)  # while a GPU computes the latest update
        self.finish_update()  # now: the latent states that follow may be that update's
        self.batch = batch | to_device(self.replay.read_latents(index), self.agent.device)
        self.metrics, *latents = self.agent.train_step(self.batch)
        self.pending = index, latents
        self.updates += 1

    def finish_update(self):
        """Wait for the latest update and put the states that it computed into the replay.

        Raises UserError if it was not finite: it would spoil the replay and the checkpoint.
        """
        if self.pending:
            losses = {name: x for name, x in self.metrics.items() if name.startswith("losses/")}
            if bad := [name for name, x in losses.items() if not math.isfinite(x)]:
                raise UserError(f"update {self.updates} was not finite: {', '.join(bad)}")
            index, latents = self.pending
            self.replay.write_latents(index, *(x.cpu().numpy() for x in latents))
            self.pending = None


def evaluate(agent, args, episodes, video=None, stop=()):
    """Returns of `episodes` episodes in environments of their own; `video`: folder to record in.

    Each environment plays a fixed number of episodes: taking the first ones to finish would favour
    short episodes. Ends at once, with fewer, when something is put into the list `stop`.
    """
    num_envs = 1 if video else min(episodes, 8)
    remaining = np.bincount(np.arange(episodes) % num_envs)  # episodes that each has to play
    envs, returns = Environments(args, num_envs, args.seed + 10_000, video), []
    with contextlib.closing(envs), torch.random.fork_rng(agent.gpus):  # keeps the run's draws
        envs.reset()
        carry = agent.initial(num_envs)
        while remaining.any() and not stop:
            carry = agent.act(to_device(envs.entry, agent.device), carry, not args.eval_sample)
            for env, episode_return, _ in envs.step(carry[-1].cpu().numpy()):
                if remaining[env]:
                    returns.append(episode_return)
                    remaining[env] -= 1
    return np.array(returns)


def summary(returns):
    """Mean, standard error and range of returns as text."""
    error = returns.std() / max(1, len(returns) - 1) ** 0.5  # std(ddof=1) / sqrt(n)
    text = f"mean {returns.mean():.1f} +- {error:.1f} (standard error), min {returns.min():.1f}"
    return f"{text}, max {returns.max():.1f}, {len(returns)} episodes"


class Player:
    """A trained agent as a policy: most likely actions, or samples if not `greedy`.

        player = Player("runs/RUN")  # or a checkpoint.pt
        action = player(observation, first=True)  # `first` where an episode begins

    It keeps the recurrent state: take one Player for each environment, or batch of them. `changes`
    are Args to set anew. Raises UserError as `load_checkpoint`.
    """

    def __init__(self, path, greedy=True, device="cpu", **changes):
        self.checkpoint, self.greedy, self.carry = load_checkpoint(path), greedy, None
        self.args = replace(self.checkpoint["args"], **{"compile": False} | changes)
        self.envs = Environments(self.args, 1, 0)  # for its spaces
        self.envs.close()
        self.agent = Agent(self.args, self.envs.spaces, device)
        self.agent.load_state_dict(self.checkpoint["agent"])

    def __call__(self, observation, first=False):
        """The action for one observation; n actions for a batch (arrays of n) with n flags."""
        batched, is_first = np.ndim(first) > 0, np.atleast_1d(first).astype(bool)
        if not batched:
            is_list = lambda x: isinstance(x, list)
            observation = tree_map(lambda x: np.asarray(x)[None], observation, is_leaf=is_list)
        parts = encode(self.envs.envs.single_observation_space, observation)
        obs = {name: x for name, _, x in parts} | {"is_first": is_first}
        if self.carry is None or len(self.carry[0]) != len(is_first):
            self.carry = self.agent.initial(len(is_first))
        self.carry = self.agent.act(to_device(obs, self.agent.device), self.carry, self.greedy)
        actions = self.envs.decode_action(self.carry[-1].cpu().numpy())
        return actions if batched else actions[0]


def evaluate_checkpoint(args, device, stop):
    """--evaluate: play with a run's networks in its environment. Gives the returns."""
    kept = "evaluate eval_episodes eval_sample capture_video seed".split()
    kept += "torch_deterministic cuda cudagraphs".split()
    for name, value in asdict(args).items():
        if name not in [*kept, "compile"] and value != getattr(Args, name):
            raise UserError(f"--evaluate takes no --{name}: leave it out".replace("_", "-"))
    player = Player(args.evaluate, device=device, **{name: getattr(args, name) for name in kept})
    args, checkpoint = player.args, player.checkpoint
    returns = evaluate(player.agent, args, args.eval_episodes, stop=stop)
    if len(returns):
        print(f"{args.env_id} after {checkpoint['step']:,} agent steps: {summary(returns)}")
    if args.capture_video and not stop:
        videos = checkpoint["folder"] / f"videos/step_{checkpoint['step']}"
        evaluate(player.agent, args, 1, videos, stop)
        print(f"video in {videos}")
    return returns


@torch.compiler.set_stance("force_eager")  # too rare to be worth compiling
@torch.no_grad()
def open_loop(model, batch, seen):
    """What the model predicts for T replayed steps of which it sees the first `seen`.

    From then on the prior takes the posterior's place, with the recorded actions. batch as in
    `Agent.loss`. Returns reconstructions as of `Decoder.forward`: dict of (B, T, ...).
    """
    deter, stoch, _ = model.observe(batch)
    states = list(zip(deter[:, :seen].unbind(1), stoch[:, :seen].unbind(1), strict=True))
    layers = model.rssm.layers()
    for t in range(seen, deter.shape[1]):
        states.append(model.rssm.imagine_step(*states[-1], batch["prev_action"][:, t], layers))
    return model.decoder(*(torch.stack(x, 1) for x in zip(*states, strict=True)))


def report(trainer, path):
    """What the model, seeing half of the latest batch, predicts for the other half.

    Returns the losses of each observation there as metrics, and a picture (h, w, 3) of the first
    image, which is also written to `path`; None without images.
    """
    trainer.finish_update()
    agent, batch, seen = trainer.agent, trainer.batch, trainer.args.batch_length // 2
    with torch.random.fork_rng(agent.gpus):  # the run goes on undisturbed
        recon = open_loop(agent.model, batch, seen)
    losses = agent.model.decoder.losses(recon, batch)
    same_episode = batch["is_first"][:, seen:].cumsum(1) == 0  # nobody can predict the next one
    metrics = {f"dreams/{k}": loss[:, seen:][same_episode].mean() for k, loss in losses.items()}
    if not agent.spaces.images:
        return metrics, None
    name, _ = agent.spaces.images[0]
    prediction = recon[name].clamp(0, 1).cpu().numpy()  # variants/ do not bound it
    picture = film_strip(batch[name].cpu().numpy() / 255, prediction, seen)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(png(picture))
    return metrics, picture


def film_strip(truth, prediction, seen, count=4, columns=16):
    """Images (B, T, h, w, C) in [0, 1] of some steps as one picture (h, w, 3) uint8.

    Truth, prediction and error stand below each other. A white line divides what the model sees
    from what it dreams.
    """
    channels = 1 if truth.shape[-1] % 3 else 3  # of a stack the last frame: grey, or colours
    times = np.linspace(0, truth.shape[1] - 1, columns).round().astype(int)
    truth, prediction = (x[:count, times, ..., -channels:] for x in (truth, prediction))
    rows = np.stack([truth, prediction, (prediction - truth + 1) / 2], 1)
    rows = np.repeat(rows, 3 // channels, -1)  # (count, 3, columns, h, w, 3)
    rows[:, :, (times >= seen).argmax(), :, :2] = 1
    rows = rows.transpose(0, 1, 3, 2, 4, 5)  # (count, 3, h, columns, w, 3)
    return np.rint(255 * rows).astype(np.uint8).reshape(-1, columns * IMAGE_SIZE, 3)


def png(image):
    """The bytes of a PNG file of an image (h, w, 3) uint8."""
    h, w, _ = image.shape
    rows = np.insert(image.reshape(h, -1), 0, 0, 1)  # each row begins with 0: no filter
    number = lambda x: x.to_bytes(4, "big")
    header = number(w) + number(h) + bytes([8, 2, 0, 0, 0])  # 8 bits each of red, green and blue
    chunks = b"IHDR" + header, b"IDAT" + zlib.compress(rows.tobytes()), b"IEND"
    chunks = (number(len(chunk) - 4) + chunk + number(zlib.crc32(chunk)) for chunk in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def save_checkpoint(path, trainer, logger):
    """Write all that a resumed run needs beside the replay's file. Raises UserError.

    The file appears in one step: a run that is killed leaves the old checkpoint or the new one,
    never half of one. What a broken update left is not saved.
    """
    trainer.finish_update()
    if not logger:
        return  # the first process writes it
    cuda = trainer.agent.device.type == "cuda"
    state = {
        "args": asdict(trainer.args),
        "agent": trainer.agent.state_dict(),
        "replay": (trainer.replay.steps, trainer.replay.online),
        "processes": WORLD_SIZE,
        "size": os.fstat(logger.file.fileno()).st_size,
        "seconds": time.time() - logger.began,
        "random": torch.get_rng_state(),
        "random_cuda": torch.cuda.get_rng_state(trainer.agent.device) if cuda else None,
    }
    state |= {name: getattr(trainer, name) for name in trainer.counters}
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
    """What `save_checkpoint` wrote, on the CPU; path: a run's folder or the file itself.

    Executes no code from it. Raises UserError if it cannot be read.
    """
    path = Path(path) / "checkpoint.pt" if Path(path).is_dir() else Path(path)
    try:
        with warnings.catch_warnings(action="ignore"):  # torch warns of foreign pickles
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        needed = "agent replay processes size seconds random random_cuda".split()
        [checkpoint[name] for name in (*needed, *Trainer.counters)]  # raises KeyError
        return checkpoint | {"args": Args(**checkpoint["args"]), "folder": path.resolve().parent}
    except OSError as error:
        raise UserError(f"cannot read the checkpoint {path}: {error.strerror}") from error
    except Exception as error:
        text = f"{path} is damaged, of another version, or not a checkpoint of {Args.exp_name}.py"
        raise UserError(text) from error


# ---- 14. Main ------------------------------------------------------------------------------------


HUGE = 10**11  # not infinity: sizes and times would overflow
LIMITS = {  # least and largest value; of numbers that are not here, 0 and HUGE
    "action_repeat total_timesteps num_envs batch_size log_every save_every": (1, HUGE),
    "stoch blocks deter hidden depth units imag_horizon": (1, HUGE),
    "gamma return_lambda unimix actor_unimix tau return_rate": (0, 1),
    "beta1 beta2": (0, 0.9999),
    "laprop_eps": (1e-30, 1),
    "classes": (2, 256),
    "batch_length": (2, HUGE),
    "seed": (0, 10**9),
}


def check_args(args):
    """Raise UserError for numbers that cannot work, alone or together."""
    smallest_buffer = (args.batch_size + args.num_envs) * args.batch_length
    limits = {name: pair for names, pair in LIMITS.items() for name in names.split()}
    limits["buffer_size"] = smallest_buffer, HUGE
    values = asdict(args) | args.network()
    for name, value in values.items():
        least, most = limits.get(name, (0, HUGE))
        if type(value) in (int, float) and not least <= value <= most:  # nor may it be nan
            text = f"at least {least}" if most == HUGE else f"in [{least}, {most}]"
            raise UserError(f"--{name} must be {text}, not {value}".replace("_", "-"))
    if (deter := values["deter"]) % math.lcm(8, args.blocks):
        raise UserError(f"--deter {deter} must be divisible by 8 and by --blocks {args.blocks}")
    if args.evaluate and WORLD_SIZE > 1:
        raise UserError("--evaluate is for one process: start it without torchrun")
    if args.num_envs % WORLD_SIZE or args.batch_size % WORLD_SIZE:
        raise UserError(f"{WORLD_SIZE} processes must divide --num-envs and --batch-size")
    if "" in (args.evaluate, args.resume) or (args.evaluate and args.resume):
        raise UserError("--evaluate and --resume need a path, and cannot go together")
    if args.evaluate and not args.eval_episodes:
        raise UserError("--evaluate needs --eval-episodes of at least 1")
    for package in ["wandb", "tensorboard"] * args.track + ["moviepy"] * args.capture_video:
        import_optional(package, package)


def choose_device(args):
    """The device, and the type of matrix products in an update."""
    gpu = args.cuda and torch.cuda.is_available()
    device = torch.device(f"cuda:{LOCAL_RANK}" if gpu else "cpu")
    if gpu:
        if LOCAL_RANK >= torch.cuda.device_count():
            raise UserError("more processes than GPUs: lower --nproc-per-node, or use --no-cuda")
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        # (Intel's avx512_bf16 without AMX was slower than float32 where we measured: docs/speed.md)
        cpu = torch.cpu.get_capabilities()
        amd = "AMD" in cpu.get("cpu_name", "")
        fast = cpu.get("amx_bf16", False) or (cpu.get("avx512_bf16", False) and amd)
    auto = "bfloat16" if fast else "float32"
    return device, getattr(torch, auto if args.dtype == "auto" else args.dtype)


# Flags that --resume may change. Another value of any other flag is an error.
FREE_TO_CHANGE = """
    resume total_timesteps eval_every eval_episodes eval_sample log_every save_every report_every
    capture_video track wandb_project_name wandb_entity cuda dtype compile cudagraphs
    torch_deterministic async_envs run_dir
""".split()


def open_run(args, device, dtype):
    """The folder, Trainer and Logger of a new run, or of the one to --resume. Raises UserError."""
    name = f"{args.env_id}__{args.exp_name}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
    folder = Path(args.run_dir) / re.sub(r"[^\w.-]+", "-", name)
    checkpoint, seed = None, args.seed
    if args.resume:
        checkpoint = load_checkpoint(args.resume)
        folder = checkpoint["folder"]
        for name, old in asdict(checkpoint["args"]).items():
            if name not in FREE_TO_CHANGE and getattr(args, name) != old:
                flag = name.replace("_", "-")
                raise UserError(f"--{flag} is {old} in this run, and must not become another")
        seed += 100_000 + checkpoint["step"]  # new episodes: not those of the start
    with tempfile.TemporaryDirectory() as videos:  # fail before there is a folder
        trial = Environments(args, 1, seed, videos if args.capture_video else None)
        with contextlib.closing(trial):
            trial.reset()
            trial.step(np.zeros((1, trial.spaces.action_width)))
    n = args.num_envs // WORLD_SIZE
    envs = Environments(args, n, seed + RANK * n)
    with contextlib.ExitStack() as undo:  # what was begun, if there is an error below
        undo.callback(envs.close)
        agent = Agent(args, envs.spaces, device, dtype)
        if not checkpoint:
            if not RANK:
                folder.mkdir(parents=True)
                undo.callback(shutil.rmtree, folder, ignore_errors=True)
            if WORLD_SIZE > 1:
                dist.broadcast_object_list(shared := [folder])  # waits for the first process
                folder = shared[0]
        trainer = Trainer(args, envs, agent, folder, checkpoint)
        logger = None if RANK else Logger(args, folder, checkpoint)
        if not checkpoint:
            save_checkpoint(folder / "checkpoint.pt", trainer, logger)
        undo.pop_all()
    size, room = sum(p.numel() for p in agent.params), trainer.replay.data.nbytes / 1e9
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    after = f", resumed after step {trainer.step:,}" if checkpoint else ""
    if checkpoint and checkpoint["processes"] != WORLD_SIZE:
        after += f"; {checkpoint['processes']} processes filled the replay: it begins anew"
    devices = f"{WORLD_SIZE} x {gpu}" if WORLD_SIZE > 1 else gpu
    words, shown = [], PRESETS.get(args.preset, {})
    for k, v in asdict(args).items():
        if v != getattr(Args, k) or k in shown:
            flag = f"--{'no-' if v is False else ''}{k}".replace("_", "-")
            words += [flag] if isinstance(v, bool) else [flag, str(v)]
    print("flags       ", shlex.join(words))
    print(f"environment  {args.env_id} x {args.num_envs}: {envs.spaces}")
    print(f"networks     {size:,} parameters on {devices}, {dtype}")
    print(f"schedule     {trainer.updates_per_step:.3g} updates per agent step")
    print(f"run          {folder}, {room:.2f} GB of replay{after}", flush=True)
    return folder, trainer, logger


def is_due(every, before, step):
    """Whether a multiple of `every` lies after `before`, up to `step`; never if `every` is 0."""
    return every and step // every > before // every


def exchange(episodes, stop):
    """All processes' ended episodes, and whether any is to stop. Waits for all of them."""
    everyone = [(episodes, list(stop))] * WORLD_SIZE
    if WORLD_SIZE > 1:
        dist.all_gather_object(everyone, everyone[0])
    return sum((episodes for episodes, _ in everyone), []), any(stop for _, stop in everyone)


def main(args, stop=()):
    """Train as `args` say, or evaluate. Returns the returns of the last evaluation.

    Ends after the step it is in, with a checkpoint, when something is put into the list `stop`.
    With torchrun, this is one of several processes. They compute together what one would, and go
    through this loop in step; the first one evaluates, logs and saves for all.
    """
    check_args(args)
    device, dtype = choose_device(args)
    if WORLD_SIZE > 1 and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(days=1))
    torch.manual_seed(args.seed)
    if args.torch_deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs for it
    torch.use_deterministic_algorithms(args.torch_deterministic, warn_only=True)
    if args.evaluate:
        return evaluate_checkpoint(args, device, stop)
    folder, trainer, logger = open_run(args, device, dtype)
    agent, step, n, returns = trainer.agent, trainer.step, args.num_envs, None
    stopped, path = False, folder / "checkpoint.pt"
    before = step  # at the end of the previous round
    try:
        while not stopped:
            finished = step >= args.total_timesteps
            due = is_due(1 if finished else args.eval_every, trainer.evaluated, step)
            if logger and args.eval_episodes and due:
                returns = evaluate(agent, args, args.eval_episodes, stop=stop)
                if not stop:  # otherwise a resumed run makes up for it
                    trainer.evaluated = step
                    metrics = {"eval/episodic_return": returns.mean()}
                    logger.write(step, metrics | {"eval/episodic_return_std": returns.std()})
                    logger.show(f"step {step:,}  evaluation: {summary(returns)}")
                if args.capture_video and not stop:
                    evaluate(agent, args, 1, folder / f"videos/step_{step}", stop)
            if is_due(args.save_every, before, step):  # last: keeps what was logged above
                save_checkpoint(path, trainer, logger)
            if finished:
                break

            episodes, stopped = exchange(trainer.collect_and_train(), stop)
            before, step = step, trainer.step
            if not logger:
                continue
            for _, episode_return, length in episodes:
                logger.returns.append(episode_return)
                metrics = {"charts/episodic_return": episode_return}
                logger.write(step, metrics | {"charts/episodic_length": length})
            logger.status(step, trainer.updates)
            if trainer.updates and is_due(args.log_every, before, step):
                speed = {"charts/SPS": logger.rates[0], "charts/UPS": logger.rates[1]}
                logger.write(step, trainer.metrics | speed | {"charts/updates": trainer.updates})
            final = args.report_every and step >= args.total_timesteps
            if trainer.batch and (final or is_due(args.report_every, before, step)):
                metrics, picture = report(trainer, folder / f"dreams/step_{step}.png")
                logger.write(step, metrics, picture)
    finally:
        trainer.replay.steps -= (trainer.step - step) // n  # a step that failed is made again
        trainer.step = step
        try:
            save_checkpoint(path, trainer, logger)
            if logger:
                logger.show(f"saved {path} at step {trainer.step:,}")
        finally:
            getattr(agent.train_step, "graphs", {}).clear()  # NCCL's end waits for them
            trainer.envs.close()
            if logger:
                logger.close()
    return returns


# First flag of each group of --help.
GROUPS = dict(exp_name="run", env_id="environment", total_timesteps="schedule", size="network")
GROUPS |= dict(free_nats="loss", learning_rate="optimizer")


def parse():
    """The command line as Args; an error ends the program. UserError: no run to --resume."""
    output = io.StringIO()
    try:
        with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
            # --preset and --resume are read first: they give the defaults of the other flags.
            args, _ = tyro.cli(Args, add_help=False, return_unknown_args=True)
            default = Args(preset=args.preset, **PRESETS.get(args.preset, {}))
            if args.resume and not args.evaluate:
                default = load_checkpoint(args.resume)["args"]
            return tyro.cli(Args, description=__doc__.split("\n\n")[0], default=default)
    except SystemExit as done:
        text = output.getvalue()
        if done.code:  # tyro prints a title, a rule, the message, a rule, and advice
            fail(re.split("-{9,}", text)[1])
        for name, group in GROUPS.items():
            flag = f"  --{name} ".replace("_", "-")
            text = text.replace(f"\n{flag}", f"\n\n {group}\n {'-' * 78}\n{flag}")
        print(text, end="")
        raise


def fail(message, status=2):
    """Say in one line what the user can put right, and leave."""
    print(f"{Args.exp_name}.py: error:", *str(message).split(), file=sys.stderr)
    sys.exit(status)


def cli():
    """The command line."""
    sys.path.insert(0, os.getcwd())  # where module:Name-v0 is looked for first
    if RANK:
        sys.stdout = open(os.devnull, "w")  # the first process speaks for all
    stop = []

    def on_signal(number, frame):
        """Ask the loop to end; the second time, end the process."""
        if stop:
            for child in multiprocessing.active_children():
                child.kill()
            os._exit(128 + number)
        stop.append(number)
        os.write(2, b"\nstopping after this step; once more, and it stops at once\n")

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    try:
        main(parse(), stop)
    except (UserError, OSError, MemoryError) as error:
        fail(error, 128 + stop[0] if stop else 2)
    except RuntimeError as error:
        if stop:  # Ctrl-C ends a C++ compiler, too
            fail(f"stopped: {first_line(error)}", 128 + stop[0])
        if re.search("out of memory|allocate memory|ALLOC_FAILED|overflowed", str(error)):
            fail(f"{first_line(error)}; lower --batch-size or --size")
        if not re.search("gloo|NCCL", str(error)):
            raise
        fail(f"another process has ended: {first_line(error)}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if stop:
        sys.exit(128 + stop[0])


if __name__ == "__main__":
    cli()
