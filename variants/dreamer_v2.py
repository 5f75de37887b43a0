"""DreamerV2: what it does otherwise than dreamer_v3.py. The names in NAMES replace that file's.

Paper: Hafner, Lillicrap, Norouzi, Ba, "Mastering Atari with Discrete World Models" (ICLR 2021),
arXiv:2010.02193. Numbers: the released code's, github.com/danijar/dreamerv2 at 07d906e ("v2:").

    here (V2)                                          what V3 made of it
    raw vectors, tanh of rewards, unbounded pixels     symlog, two-hot reward, value; sigmoid pixels
    ELU, no norm; a GRU with LayerNorm                 SiLU and RMSNorm; a GRU of blocks
    1 hidden layer before the prior, 4 in the heads    2 before the prior, 1 or 3 in the heads
    one KL, 0.8 for the prior; free nats on its mean   two, 1 and 0.1; free nats a step; 1% uniform
    continuous actions from a normal cut off at +-1    from a normal that the environment clips
    v(s) counts the reward received on arriving at s   rewards after s only
    a copy of the critic: end of returns, baseline     the critic, held near its moving average
    returns or advantages as they are                  advantages divided by the range of returns
    continuous actions learn through the dynamics      all actions learn by REINFORCE
    the critic learns in imagination only              from the replay too
    three Adams, each clipped by its gradient's norm   one LaProp, clipped relative to the weights
    sequences start from zeros                         from the state that the replay has stored

As in V3, not as in V2: the convolutions, cross-entropies of discrete observations, three layers
around vectors (V2: four), initialisation, capacity and sampling of the replay (sequences go on into
the next episode), evenly spread updates, colour, a discount that is always predicted (V2: true for
imagination's first state, constant in control). No prefill, no pretraining. float32 (V2: float16).
"""

import copy
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import dreamer_v3 as v3

PRESETS = {
    "cpu": dict(num_envs=4, total_timesteps=10_000, train_ratio=256, depth=4, deter=256, hidden=128,
        classes=8, units=128, free_nats=1, beta_kl=1, beta_cont=1, gamma=0.97, learning_rate=6e-4,
        actor_lr=3e-4, critic_lr=3e-4, tanh_rewards=False, batch_length=64),
}  # fmt: skip
normal_loss = lambda error: 0.5 * v3.f32(error).square()  # -log N(error; 0, 1), less its constant
LIMITS = v3.LIMITS | dict(kl_balance=(0, 1), slow_every=(1, v3.HUGE), imag_horizon=(2, v3.HUGE))


@dataclass
class Args(v3.Args):
    """Hyperparameters; the defaults are the authors' for Atari (v2:configs.yaml)."""

    preset: Literal["cpu"] | None = None  # Flags of a task; `--preset NAME --help` shows them.
    exp_name: str = "dreamer_v2"  # Name of the experiment, part of the run folder's name.
    batch_length: int = 50  # Agent steps in a sequence (T).
    train_ratio: float = 50.0  # Steps replayed per agent step; an update replays B * T of them.
    deter: int = 600  # Width of the recurrent state (D).
    hidden: int = 600  # Width of the hidden layers of the RSSM.
    classes: int = 32  # Classes of each latent variable (K).
    depth: int = 48  # Base number of convolution channels.
    units: int = 400  # Width of the multilayer perceptrons of vectors and heads (U).
    free_nats: float = 0.0  # Free bits: the mean KL counts as at least this.
    gamma: float = 0.999  # Discount for one agent step.
    ent_coef: float = 1e-3  # Weight of the actor's entropy, in return per nat.
    learning_rate: float = 2e-4  # Learning rate of the world model.
    actor_lr: float = 4e-5  # Learning rate of the actor.
    critic_lr: float = 1e-4  # Learning rate of the critic.
    beta_kl: float = 0.1  # Weight of the KL.
    kl_balance: float = 0.8  # Share of the KL that moves the prior; the rest moves the posterior.
    beta_cont: float = 5.0  # Weight of the loss of the predicted discount.
    tanh_rewards: bool = True  # Learn tanh(reward) instead of the reward.
    slow_every: int = 100  # Updates between two copies of the critic; a copy gives the targets.
    # No flags: constants (bfloat16 is coarse for raw values), V3's betas; the rest has no effect.
    adam_eps: ClassVar = 1e-5; weight_decay: ClassVar = 1e-6; grad_clip: ClassVar = 100  # fmt: skip
    dtype: ClassVar = "float32"; beta1: ClassVar; beta2: ClassVar  # fmt: skip
    size: ClassVar; blocks: ClassVar; unimix: ClassVar; actor_unimix: ClassVar  # fmt: skip
    beta_pred: ClassVar; beta_dyn: ClassVar; beta_rep: ClassVar; beta_val: ClassVar  # fmt: skip
    beta_repval: ClassVar; slow_reg: ClassVar; tau: ClassVar; return_rate: ClassVar  # fmt: skip
    warmup_updates: ClassVar; agc_clip: ClassVar; laprop_eps: ClassVar  # fmt: skip


class RSSM(v3.RSSM):
    """h' = GRU(ELU(Linear(z, a)), h) (v2:common/nets.py:114, 317). NormSiLU is ELU: see NAMES."""

    def __init__(self, action_width, embed_dim, deter, hidden, stoch, classes):
        nn.Module.__init__(self)  # V3's layers are not made
        self.deter_dim, self.stoch_shape, self.unimix = deter, (stoch, classes), 0.0
        self.random, self.step_layers = torch.rand, ("gru", "posterior_out")
        self.cell_in = v3.linear_layer(stoch * classes + action_width, hidden)
        self.gru = v3.linear_layer(hidden + deter, 3 * deter)
        self.gru_norm = nn.LayerNorm(3 * deter, eps=1e-3)  # Keras' default
        self.prior_net = v3.mlp(deter, hidden, 1, stoch * classes)
        self.posterior_in = v3.dense_layer(deter + embed_dim, hidden)
        self.posterior_out = v3.linear_layer(hidden, stoch * classes)

    def embed_action(self, action):
        """The action's share of Linear(z, a): (..., A) -> (..., hidden)."""
        return F.linear(action, self.cell_in.weight[:, math.prod(self.stoch_shape) :])

    def layers(self):
        """Layers of a step, name -> (weight, bias): of cell_in z's columns, of posterior_in h's."""
        dense = lambda layer, width=None: (layer.weight[:, :width].T, layer.bias)
        layers = {name: dense(getattr(self, name)) for name in self.step_layers}
        layers["stoch_in"] = dense(self.cell_in, math.prod(self.stoch_shape))
        return layers | {"posterior_in": (dense(self.posterior_in[0], self.deter_dim)[0], None)}

    def sequence_model(self, deter, stoch, action_embed, linear):
        """h' = f(h, z, a): (B, D), (B, S, K), (B, hidden) -> (B, D); linear as in V3."""
        x = F.elu(linear("stoch_in", stoch.flatten(-2)) + action_embed)
        gates = self.gru_norm(v3.f32(linear("gru", torch.cat([x, deter], -1))))
        reset, candidate, update = gates.chunk(3, -1)  # (B, D) each
        candidate = torch.tanh(torch.sigmoid(reset) * candidate)
        return torch.lerp(deter, candidate, torch.sigmoid(update - 1))  # at first, h is mostly kept

    def kl_loss(self, post, prior, args):
        """0.8 KL(sg(q) || p) + 0.2 KL(q || sg(p)) (paper: Algorithm 2): a scalar, and metrics."""
        post, prior = post.log_softmax(-1), prior.log_softmax(-1)
        at_least = lambda kl: kl.mean().clamp(min=args.free_nats)
        dyn, rep = v3.categorical_kl(post.detach(), prior), v3.categorical_kl(post, prior.detach())
        loss = args.kl_balance * at_least(dyn) + (1 - args.kl_balance) * at_least(rep)
        return loss, {"latents/kl": dyn.mean()}


class TruncatedNormals:
    """Policy of continuous actions: normals cut off at +-1 (v2:common/dists.py:72, nets.py:383)."""

    def __init__(self, raw_mean, raw_std):
        self.mean = torch.tanh(v3.f32(raw_mean))
        self.std = 2 * torch.sigmoid(v3.f32(raw_std) / 2) + 0.1
        self.low, self.high = (-1 - self.mean) / self.std, (1 - self.mean) / self.std
        self.below = torch.special.ndtr(self.low)  # the mass that is cut off at -1
        self.mass = torch.special.ndtr(self.high) - self.below  # the mass that is left

    def sample(self, greedy=False):
        """A sample by the inverse distribution function, with its gradient; or the likeliest."""
        if greedy:
            return self.mean
        uniform = v3.draw(torch.rand, self.mean.shape, self.mean.device)
        eps = torch.finfo(self.mean.dtype).eps  # the inverse of 0 and of 1 is infinite
        quantile = (self.below + uniform * self.mass).clamp(eps, 1 - eps)
        action = self.mean + self.std * torch.special.ndtri(quantile)
        return action + (action.clamp(-1 + 1e-6, 1 - 1e-6) - action).detach()

    def entropy(self):
        """In nats, summed over the actions: (...)."""
        phi = lambda x: torch.exp(-0.5 * x.square()) / math.sqrt(2 * math.pi)  # density of N(0, 1)
        cut = (self.low * phi(self.low) - self.high * phi(self.high)) / (2 * self.mass)
        return (cut + (self.std * self.mass).log() + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)


class Dreamer(v3.Dreamer):
    """All networks. The heads of reward, discount and value give one number each."""

    rssm_class, heads = RSSM, dict(reward=4, cont=4, critic=4)  # layers

    def __init__(self, args, spaces):
        nn.Module.__init__(self)  # V3's networks are not made
        deter, hidden, classes, depth, units = args.network().values()
        stoch, sizes = args.stoch * classes, (deter, hidden, args.stoch, classes)
        self.encoder = v3.Encoder(spaces, depth, units)
        self.rssm = self.rssm_class(spaces.action_width, self.encoder.embed_dim, *sizes)
        self.decoder = v3.Decoder(spaces, deter, stoch, depth, units)
        self.decoder.to_pixels = lambda x: x + 0.5  # a mean without bounds
        for name, layers in self.heads.items():  # reward and critic begin at 0, as V3's
            setattr(self, name, v3.mlp(deter + stoch, units, layers, 1, float(name == "cont")))
        self.actor = v3.Actor(deter + stoch, units, spaces, unimix=0.0)
        self.actor.mlp = v3.mlp(deter + stoch, units, 4)
        self.slow_critic = copy.deepcopy(self.critic).requires_grad_(False)  # the target critic

    def observe(self, batch):
        """The posterior states and logits for a batch, after a state and an action of zeros."""
        is_first = F.pad(batch["is_first"][:, 1:], (1, 0), value=True)  # v2:common/replay.py:113
        inputs = self.encoder(batch), batch["prev_action"], is_first
        return self.rssm.observe(*inputs, *self.rssm.initial(len(is_first)))


def world_model_loss(model, batch, args):
    """Losses of the world model (paper: Eq. 2), as V3's, but for `kl`, which is a scalar."""
    deter, stoch, post = model.observe(batch)
    feat = model.rssm.feat(deter, stoch)  # (B, T, F)
    discrete = {name for name, _, classes in model.decoder.spaces.vectors if classes}
    losses = model.decoder.losses(model.decoder(deter, stoch), batch).items()
    losses = {name: loss if name in discrete else 0.5 * loss for name, loss in losses}  # normals
    reward = torch.tanh(batch["reward"]) if args.tanh_rewards else batch["reward"]
    losses["reward"] = normal_loss(model.reward(feat).squeeze(-1) - reward)
    cont = (1 - batch["is_terminal"].to(deter.dtype)) * args.gamma
    cont_logit = v3.f32(model.cont(feat)).squeeze(-1)
    losses["cont"] = F.binary_cross_entropy_with_logits(cont_logit, cont, reduction="none")
    losses["kl"], metrics = model.rssm.kl_loss(post, model.rssm.prior(deter), args)
    return losses, deter, stoch, metrics


def imagined_returns(model, feat, args):
    """The returns G and weights w of states 0 to H-1, (N, H) each, from feat (N, H+1, F):

        G[t] = r[t] + c[t] ((1 - lambda) v[t+1] + lambda G[t+1]),  G[H] = v[H]
        w[t] = w[t-1] c[t-1],  w[0] = 1                (V3: w[t] = w[t-1] c[t],  w[0] = c[0])

    (paper: Eq. 4) with v (N, H+1) of the target critic, returned too. V3's return counts r and c
    of t+1: here both move one step. The 1 before r is not read; that before c becomes w[0].
    """
    head = lambda net: v3.f32(net(feat)).squeeze(-1)  # (N, H+1)
    value, reward, cont = head(model.slow_critic), head(model.reward), head(model.cont).sigmoid()
    reward, cont = (F.pad(x[:, :-1], (1, 0), value=1.0) for x in (reward, cont))
    returns = v3.lambda_return(reward, value, cont, torch.zeros_like(cont), args.return_lambda)
    return returns, cont.detach().cumprod(1)[:, :-1], value, {"behaviour/return": returns.mean()}


def actor_critic_loss(model, feat, action, args):
    """Losses of actor (N, H-1) and critic (N, H) on imagined trajectories (paper: Eq. 6 and 5).

    Action t earns G[t+1]. Discrete ones learn by REINFORCE (the authors' baseline v[t] has r[t] in
    it, G[t+1] has not), others by G's own gradient, through the dynamics (v2:agent.py:268).
    """
    returns, weight, value, metrics = imagined_returns(model, feat, args)
    policy, objective = model.actor(feat[:, :-2].detach()), returns[:, 1:]
    if model.actor.classes:
        objective = policy.log_prob(action[:, :-2]) * (objective - value[:, :-2]).detach()
    entropy = policy.entropy()
    critic = model.critic(feat[:, :-1].detach()).squeeze(-1)
    actor = -weight[:, :-1] * (objective + args.ent_coef * entropy)
    losses = {"actor": actor, "critic": weight * normal_loss(critic - returns.detach())}
    return losses, metrics | {"behaviour/entropy": entropy.mean()}


class Adam(v3.LaProp):
    """Adam; the gradient of each group is clipped by its norm (v2:common/tfutils.py:124)."""

    def __init__(self, groups, rates, args):
        super().__init__(sum(groups, []), args)  # for its state
        self.sizes = [len(group) for group in groups]
        self.rates = [rate for n, rate in zip(self.sizes, rates, strict=True) for _ in range(n)]

    @torch.no_grad()
    def step(self, grads):
        """Move the parameters by `grads`, which are in their order and overwritten: metrics."""
        args, grads = self.args, list(grads)
        norms = torch.stack(torch._foreach_norm(grads)).split(self.sizes)
        scales = [(args.grad_clip / norm.norm()).clamp(max=1).expand_as(norm) for norm in norms]
        torch._foreach_mul_(grads, list(torch.cat(scales)))
        n = self.updates.add_(1)
        torch._foreach_lerp_(self.mu, grads, 1 - args.beta1)
        torch._foreach_lerp_(self.nu, torch._foreach_mul(grads, grads), 1 - args.beta2)
        scale = torch._foreach_add(torch._foreach_sqrt(self.nu), args.adam_eps)  # as in Keras
        step = torch._foreach_mul(torch._foreach_div(self.mu, scale), self.rates)
        torch._foreach_mul_(step, (1 - args.beta2**n).sqrt() / (1 - args.beta1**n))
        torch._foreach_mul_(self.params, 1 - args.weight_decay)  # not times the rate
        torch._foreach_sub_(self.params, step)
        return {"losses/grad_norm": torch.cat(norms).norm()}


class Agent(v3.Agent):
    """World model, actor and critic, with a loss and a learning rate each."""

    reinforce = True  # where actions are discrete

    def __init__(self, args, spaces, device="cpu", dtype=torch.float32):
        super().__init__(args, spaces, device, dtype)
        m = self.model
        self.world = nn.ModuleList([m.encoder, m.rssm, m.decoder, m.reward, m.cont])
        groups = [list(part.parameters()) for part in (self.world, m.actor, m.critic)]
        self.optimizer = Adam(groups, (args.learning_rate, args.actor_lr, args.critic_lr), args)
        self.params = self.optimizer.params

    def loss(self, batch):
        """The sum of all losses, metrics, and the posterior states: each loss trains one group."""
        args, model = self.args, self.model
        self.world.requires_grad_(True)  # also after a call that failed
        losses, deter, stoch, metrics = world_model_loss(model, batch, args)
        deter, stoch = deter.detach(), stoch.detach()
        self.world.requires_grad_(False)  # gradients pass through it, and do not train it
        starts = deter.flatten(0, 1), stoch.flatten(0, 1)
        with torch.set_grad_enabled(not (self.reinforce and self.spaces.action_classes)):
            dream = v3.imagine(model, *starts, args.imag_horizon)
        behaviour, behaviour_metrics = self.behaviour_loss(model, *dream, args)
        self.world.requires_grad_(True)
        means = {name: loss.mean() for name, loss in (losses | behaviour).items()}
        scales = dict(kl=args.beta_kl, cont=args.beta_cont)
        means["total"] = sum(scales.get(name, 1.0) * mean for name, mean in means.items())
        metrics |= behaviour_metrics | {f"losses/{name}": mean for name, mean in means.items()}
        return means["total"], {k: x.detach() for k, x in metrics.items()}, deter, stoch

    @torch.no_grad()
    def update_slow_critic(self):
        """Copy the critic after updates 1, 101, 201 ... (v2:agent.py:327): graphs cannot branch."""
        now = ((self.optimizer.updates - 1) % self.args.slow_every == 0).to(self.params[0].dtype)
        networks = self.model.slow_critic, self.model.critic
        for target, p in zip(*(network.parameters() for network in networks), strict=True):
            target.lerp_(p, now)


NAMES = dict(
    __doc__=__doc__, Args=Args, PRESETS=PRESETS, LIMITS=LIMITS, Agent=Agent, Dreamer=Dreamer,
    BoundedNormals=TruncatedNormals, actor_critic_loss=actor_critic_loss, symlog=lambda x: x,
    NormSiLU=lambda dim: nn.ELU(), GROUPS=v3.GROUPS | dict(deter="network", actor_lr="variant"),
)  # fmt: skip

if __name__ == "__main__":
    vars(v3).update(NAMES)
    v3.cli()
