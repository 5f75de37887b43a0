"""DreamerV1: what it does otherwise than DreamerV2. All the rest is that of dreamer_v2.py.

Paper: Hafner, Lillicrap, Ba, Norouzi, "Dream to Control: Learning Behaviors by Latent Imagination"
(ICLR 2020), arXiv:1912.01603. "d:" is a file of the released code, github.com/danijar/dreamer at
56d4d44, whose numbers these are; the paper's differ in places, above all for discrete actions. The
model is that of PlaNet, arXiv:1811.04551.

    python variants/dreamer_v1.py --preset cpu --env-id Pendulum-v1

    here (V1)                                          V2
    30 normal latent variables                         32 categorical ones of 32 classes
    one KL for both ends, no gradient below 3 nats     balanced: more gradient to the prior
    Keras' GRU, plain                                  with LayerNorm and a bias, for Atari wider
    the actor learns through the dynamics, always      by REINFORCE if its actions are discrete
    continuous actions: tanh of a normal               a normal cut off at +-1
    noise on the actions, no entropy                   entropy in the actor's loss, no noise
    returns go on with the critic's value              with that of a copy, every 100 updates
    the critic has no loss where imagination starts    it has
    2 hidden layers (reward), 3 (discount, value)      4
    Adam                                               Adam with weight decay

Left out, beside what dreamer_v2.py leaves out: ReLU in the convolutions, the most likely one of 100
samples for the greedy action (the tanh of the mean is taken), a share of random actions that falls
with time. A sequence begins after an action of zeros; theirs, after the recorded one. The discount
is always predicted; the authors' flag for that is off. They observe images only; vectors are
treated as in V2. Their tasks repeat an action twice: `--action-repeat 2` here.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import dreamer_v2 as v2
import torch
import torch.nn.functional as F
from dreamer_v2 import imagined_returns, normal_loss, v3

PRESETS = {
    "cpu": dict(num_envs=4, total_timesteps=10_000, train_ratio=256, depth=4, deter=256, hidden=128,
        units=128, batch_size=16, batch_length=64, free_nats=1, beta_cont=1, gamma=0.97,
        learning_rate=6e-4, actor_lr=3e-4, critic_lr=3e-4),
}  # fmt: skip
LIMITS = v2.LIMITS | {"classes": (1, 1)}


@dataclass
class Args(v2.Args):
    """Hyperparameters; the defaults are the authors' for control (d:dreamer.py:28)."""

    exp_name: str = "dreamer_v1"  # Name of the experiment, part of the run folder's name.
    eval_sample: bool = False  # Evaluate with sampled actions and their noise.
    batch_size: int = 50  # Sequences in a batch (B).
    train_ratio: float = 500.0  # Steps replayed per agent step; an update replays B * T of them.
    deter: int = 200  # Width of the recurrent state (D).
    hidden: int = 200  # Width of the hidden layers of the RSSM.
    depth: int = 32  # Base number of convolution channels.
    stoch: int = 30  # Latent variables (S).
    free_nats: float = 3.0  # Free bits: the mean KL counts as at least this.
    gamma: float = 0.99  # Discount for one agent step.
    learning_rate: float = 6e-4  # Learning rate of the world model.
    actor_lr: float = 8e-5  # Learning rate of the actor.
    critic_lr: float = 8e-5  # Learning rate of the critic.
    beta_kl: float = 1.0  # Weight of the KL.
    beta_cont: float = 10.0  # Weight of the loss of the predicted discount.
    tanh_rewards: bool = False  # Learn tanh(reward) instead of the reward.
    # Deviation of the noise on continuous actions; the share of discrete ones that are random.
    expl_noise: float = 0.3
    # No flags. V1 has no target critic: a copy after every update is the critic, without gradient.
    slow_every: ClassVar = 1; weight_decay: ClassVar = 0.0; adam_eps: ClassVar = 1e-7  # fmt: skip
    classes: ClassVar = 1; kl_balance: ClassVar; ent_coef: ClassVar  # fmt: skip


class RSSM(v2.RSSM):
    """As PlaNet's (d:models.py:10): the state is deter (B, D) and stoch (B, S, 1), normal.

    Where V2 has logits (..., S, K) of p or q, here are outputs (..., S, 2): mean and deviation.
    """

    def __init__(self, action_width, embed_dim, deter, hidden, stoch, classes):
        super().__init__(action_width, embed_dim, deter, hidden, stoch, classes)
        del self.gru, self.gru_norm
        self.random = torch.randn
        self.step_layers = "gru_x", "gru_h", "posterior_out"
        self.gru_x = v3.linear_layer(hidden, 3 * deter)
        self.gru_h = v3.linear_layer(deter, 3 * deter)
        self.prior_net = v3.mlp(deter, hidden, 1, 2 * stoch)
        self.posterior_out = v3.linear_layer(hidden, 2 * stoch)

    def sequence_model(self, deter, stoch, action_embed, linear):
        """h' = f(h, z, a): deter (B, D), stoch (B, S, 1), (B, hidden) -> (B, D)."""
        x = F.elu(linear("stoch_in", stoch.flatten(-2)) + action_embed)
        from_x, from_h = v3.f32(linear("gru_x", x)), v3.f32(linear("gru_h", deter))
        (r, u, c), (from_r, from_u, from_c) = from_x.chunk(3, -1), from_h.chunk(3, -1)
        candidate = torch.tanh(c + torch.sigmoid(r + from_r) * from_c)
        return torch.lerp(candidate, deter, torch.sigmoid(u + from_u))  # u keeps h, as in Keras

    def normals(self, outputs):
        """Mean and deviation of p or q: (..., S, 2) -> (..., S) each (d:models.py:63)."""
        return outputs[..., 0], F.softplus(outputs[..., 1]) + 0.1

    def sample(self, outputs, noise):
        """z from the outputs of p or q, with the gradient of mean and deviation: (..., S, 1)."""
        mean, std = self.normals(outputs)
        return (mean + std * noise).unsqueeze(-1)

    def kl_loss(self, post, prior, args):
        """KL(q || p), free nats on its mean (d:dreamer.py:174): a scalar, and metrics."""
        (mean, std), (prior_mean, prior_std) = self.normals(post), self.normals(prior)
        squares = (std.square() + (mean - prior_mean).square()) / prior_std.square()
        kl = ((prior_std / std).log() + 0.5 * (squares - 1)).sum(-1).mean()
        return kl.clamp(min=args.free_nats), {"latents/kl": kl}


class TanhNormals:
    """Policy of continuous actions: tanh of normals, deviation 5 at first (d:models.py:161)."""

    def __init__(self, raw_mean, raw_std):
        self.mean = 5 * torch.tanh(v3.f32(raw_mean) / 5)
        self.std = F.softplus(v3.f32(raw_std) + math.log(math.exp(5) - 1)) + 1e-4

    def sample(self, greedy=False):
        """A sample with gradient, or the tanh of the mean: (..., A)."""
        noise = 0 if greedy else v3.draw(torch.randn, self.mean.shape, self.mean.device)
        return torch.tanh(self.mean + self.std * noise)


class Dreamer(v2.Dreamer):
    """All networks."""

    rssm_class, heads = RSSM, dict(reward=2, cont=3, critic=3)  # hidden layers of each


def actor_critic_loss(model, feat, action, args):
    """Losses (N, H-1) of actor and critic on imagined trajectories (paper: Eq. 7-8).

    The actor climbs the return itself, whose gradient passes through values, rewards, predicted
    discounts and dynamics. feat (N, H+1, F): states 1 to H-1 have losses, H gives its value
    (d:dreamer.py:270). The start's discount weighs them: it may be an end. (Where they predict the
    discount, the authors leave out the last step of a sequence: d:dreamer.py:271.) action is not
    read.
    """
    returns, weight, _, metrics = imagined_returns(model, feat, args)
    returns, weight = returns[:, 1:], weight[:, 1:]
    critic = normal_loss(model.critic(feat[:, 1:-1].detach()).squeeze(-1) - returns.detach())
    return {"actor": -weight * returns, "critic": weight * critic}, metrics


def explore(action, classes, noise):
    """Action vectors (n, A) with noise: normal, or a share of random choices (d:dreamer.py:246)."""
    if not classes:
        return (action + noise * v3.draw(torch.randn, action.shape, action.device)).clamp(-1, 1)
    parts = []
    for part in action.split(classes, -1):
        draws = v3.draw(torch.rand, (len(part), 2), part.device)
        choice = v3.one_hot((draws[:, 0] * part.shape[-1]).long(), part.shape[-1])
        parts.append(torch.where(draws[:, 1:] < noise, choice, part))
    return torch.cat(parts, -1)


class Agent(v2.Agent):
    """An agent that explores by noise, and learns through the dynamics in every case."""

    reinforce = False

    def act(self, obs, carry, greedy=False):
        """One decision, as V3's; with noise if not `greedy`."""
        deter, stoch, action = super().act(obs, carry, greedy)
        if not greedy:
            action = explore(action, self.spaces.action_classes, self.args.expl_noise)
        return deter, stoch, action


NAMES = v2.NAMES | dict(
    __doc__=__doc__, Args=Args, PRESETS=PRESETS, LIMITS=LIMITS, Agent=Agent, Dreamer=Dreamer,
    BoundedNormals=TanhNormals, actor_critic_loss=actor_critic_loss,
)  # fmt: skip

if __name__ == "__main__":
    vars(v3).update(NAMES)
    v3.cli()
