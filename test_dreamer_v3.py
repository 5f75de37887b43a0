# ---- Parity with the authors' code ---------------------------------------------------------------
# The numbers at the end of this file come from github.com/danijar/dreamerv3 at commit e3f0224, run
# with JAX 0.4.33 on a CPU, float64 in place of float32. A formula fills in parameters and inputs; a
# sample is the most likely class, or the mean plus a constant; so nothing is random.

import functools
import math
import re
import types
import zlib

import dreamer_v3
import numpy as np
import pytest
import torch
from dreamer_v3 import Agent, Args, Dreamer, Spaces

torch.set_num_threads(1)  # these networks are too small for more; threads would only wait

IMAGE, VECTORS = 3, (("extra", 5, ()), ("mode", 4, (4,)), ("position", 3, ()))
SPACES = {
    "B": Spaces(IMAGE, (), (5,), 5),
    "B1m": Spaces(IMAGE, (), (5,), 5),
    "C": Spaces(0, VECTORS, (), 2),
    "Cm": Spaces(0, VECTORS, (), 2),
    "D": Spaces(IMAGE, (("vector", 5, ()),), (5,), 5),
}
TINY = dict(deter=32, hidden=16, stoch=4, classes=4, blocks=4, depth=4, units=16, imag_horizon=5)


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


def fill(name, shape):
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
        p.copy_(our_layout(fill(name, official_layout(p).shape)))


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
    net = dict(size="1m") if case == "B1m" else TINY
    return Args(**net, actor_unimix=0.0, **options)


def make_agent(case, run="zero", **options):
    """A filled agent; its return range is that of the run."""
    agent = Agent(make_args(case, **options), SPACES[case])
    fill_params(official_params(agent.model, SPACES[case]))
    if run == "carry":
        agent.model.return_range.copy_(torch.tensor([-0.4, 1.9]))
    return agent


def make_batch(case, run, model):
    """The batch of a case as `Agent.update` takes it."""
    batch = inputs(case, *((2, 6) if case == "B1m" else (3, 8)))
    deter, stoch, action = initial_carry(case, run, model)
    actions = batch.pop("action")
    batch["prev_action"] = torch.cat([action[:, None], actions[:, :-1]], 1)
    return batch | dict(deter=deter, stoch=stoch)


def close(ours, theirs, tol, size=None):
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
    close(unit("dyn/dynin0/kernel", 4), expected, 1e-15)
    expected = {
        ("dyn/dynin0/kernel", (32, 16)): [0.11080811, -0.00618994, -0.26165304],
        ("dyn/dyngru/kernel", (4, 8, 24)): [-1.19410574, -1.17998433, -0.84653038],
        ("dyn/obs0norm/scale", (16,)): [1.00762713, 1.03103745, 1.15729856],
    }
    for (name, shape), numbers in expected.items():
        close(fill(name, shape).flatten()[:3], numbers, 1e-7, 1)  # 8 decimals are given


@pytest.mark.parametrize("case", ["B", "B1m", "C", "D"])
def test_parameters_are_the_authors(case, float64):
    """Every parameter is one of theirs, with its shape and, once filled, its checksum."""
    model = make_agent(case).model
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


@pytest.mark.parametrize("case, run", RUNS)
def test_losses_and_gradients(case, run, precision, most_likely, monkeypatch):
    """Each loss, the metrics, the return range and each network's gradient are the authors'."""
    set_normal_noise(monkeypatch, 0.0 if case == "Cm" else -0.5)
    agent, tol, golden = make_agent(case, run), TOLERANCE[precision], PARITY[case][run]
    batch = make_batch(case, run, agent.model)
    total, metrics, _, _ = agent.loss(batch)
    total.backward()
    losses = {k[7:]: x.item() for k, x in metrics.items() if re.match("losses/(?!total)", k)}
    losses = {LOSSES.get(name, name): x for name, x in losses.items()}
    assert losses.keys() == golden["loss"].keys()
    for name, x in golden["loss"].items():
        close(losses[name], x, tol)
    for name, x in zip(METRICS, golden["metrics"], strict=True):
        close(metrics[name].item(), x, tol)
    close(total.item(), golden["total"][0], tol)
    close(agent.model.return_range, golden["range"], tol)
    params = official_params(agent.model, SPACES[case])
    assert all((p.grad is None) == (name[:4] == "slow") for name, p in params.items())
    grads = {name: p.grad for name, p in params.items() if p.grad is not None}
    close_sums(checksums(grads), golden["grad"], tol)
    close(math.hypot(*[x.norm().item() for x in grads.values()]), golden["grad_norm"][0], tol)
    if case == "Cm":  # at the mean the gradient of the mean is exactly zero
        assert all(x.abs().max() < 1e-6 for name, x in grads.items() if "action/mean" in name)


@pytest.mark.parametrize("warmup", [0, 1000])
@pytest.mark.parametrize("case, run", [x for x in RUNS if x[0] != "Cm"])
def test_three_updates(case, run, warmup, precision, most_likely, monkeypatch):
    """Losses and gradient norms of three updates, and what they leave behind, are the authors'."""
    set_normal_noise(monkeypatch, -0.5)
    agent = make_agent(case, run, warmup_updates=warmup)
    golden = PARITY[case][run]
    after, double = golden[f"warmup{warmup}"], precision == "float64"
    batch, params = make_batch(case, run, agent.model), official_params(agent.model, SPACES[case])
    before = {name: p.detach().clone() for name, p in params.items()}
    for i in range(3):
        update = lambda: agent.update(batch)
        metrics, _, _ = step_as_authors(update, agent.optimizer, i, 4e-5, warmup)
        # Updates are about +-lr whatever the size of a gradient: entries at the level of float32
        # rounding take another sign, so that later losses differ more than the first.
        tol = TOLERANCE[precision] * (1 if i == 0 or double else 3)
        close(metrics["losses/total"].item(), (golden["total"][:1] + after["total"])[i], tol)
        norm = (golden["grad_norm"][:1] + after["grad_norm"])[i]
        close(metrics["losses/grad_norm"].item(), norm, tol)
        if i == 0 and warmup:
            trained = [name for name in params if not name.startswith("slow")]
            assert all(torch.equal(params[name], before[name]) for name in trained)
    close(agent.model.return_range, after["range"], TOLERANCE[precision] * (1 if double else 5))
    sums = checksums(params)
    if double:  # three updates change a network by 1e-4 of its norm, with warm-up by 1e-7 of it
        close_sums(sums, after["params"], 1e-13, 1e-12)
    elif not warmup:  # (the updates of a warm-up are lost in float32's rounding of the parameters)
        l2, dot = zip(*sums.values(), strict=True)
        close(l2, after["params"][::2], 1e-6)
        close(dot, after["params"][1::2], 1, 3e-4)  # two entries of another sign: 2 * 2 lr * 1.7


@pytest.mark.parametrize("case", ["B", "B1m", "C", "D"])
def test_acting(case, float64, most_likely, monkeypatch):
    """Five decisions for two environments, the second reset again at the fourth one."""
    set_normal_noise(monkeypatch, 0.0)
    agent, replay = make_agent(case), inputs(case, 2, 6)
    carry = agent.initial(2)
    for t, (deter, stoch, action) in enumerate(ACTING[case]):
        obs = {key: x[:, t] for key, x in replay["obs"].items()}
        carry = agent.act(obs, torch.tensor([t == 0, t in (0, 3)]), carry)
        close_sums(checksum(carry[0]), deter, 1e-11)
        assert "".join(map(str, carry[1].argmax(-1).flatten().tolist())) == stoch
        if isinstance(action, str):
            assert "".join(map(str, carry[2].argmax(-1).tolist())) == action
        else:
            close_sums(checksum(carry[2]), action, 1e-11)


def test_replay_context(float64, most_likely, monkeypatch):
    """`train_step` starts from the first step's stored state and action; that step is no target."""
    set_normal_noise(monkeypatch, -0.5)
    agent, batch = make_agent("C", "carry", warmup_updates=0), inputs("C")
    b, t, s = torch.meshgrid(*map(torch.arange, (3, 8, 4)), indexing="ij")
    batch |= batch.pop("obs")
    batch["deter"] = U("data/dyn/deter", (3, 8, 32), 0.5).clone()
    batch["stoch"] = ((b + 3 * t + s) % 4).to(torch.uint8)
    # Row 1 goes on from the batch before, as theirs can: its carry takes the stored state's place.
    deter, stoch, _ = initial_carry("C", "carry", agent.model)
    batch["deter"][1, 0], batch["stoch"][1, 0] = deter[1], stoch[1].argmax(-1)
    metrics, deter, stoch = agent.train_step(batch)
    for name, x in CONTEXT["metrics"].items():
        close(metrics[name].item(), x, 1e-9)
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
    close(dreamer_v3.symlog(x), expected, 1e-14)
    close(dreamer_v3.symexp(dreamer_v3.symlog(x)), x, 1e-12)
    bins = dreamer_v3.twohot_bins()
    close(bins[[63, 126, 127, 128, 253, 254]], PARTS["bins"], 1e-13)
    assert torch.equal(bins, -bins.flip(0))


def test_twohot(float64):
    """Prediction, loss and its gradient, at targets inside, on and beyond the bins."""
    slope = 1.5 * (torch.arange(255.0) - 130).abs() * 20 / 127
    logits = (unit("A/twohot/logits", 9 * 255).reshape(9, 255) - slope).float().double()
    logits[1] = 0
    bins, golden = dreamer_v3.twohot_bins(), PARTS["twohot"]
    logits.requires_grad_()
    close(dreamer_v3.twohot_mean(logits, bins), golden["mean"], 1e-9)
    loss = dreamer_v3.twohot_loss(logits, torch.tensor(golden["target"]), bins)
    close(loss, golden["loss"], 1e-12)
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    for row, expected in zip(grad, golden["grad"], strict=True):
        close_sums(checksum(row), expected, 1e-11)


def test_categorical(float64, most_likely):
    """Mixing with the uniform, entropy, KL with free bits, and the straight-through gradient."""
    a, b = (U(f"A/cat/{name}", (3, 2, 4)).clone() for name in "ab")
    a[0, 0] = torch.tensor([30.0, 0, 0, -30])
    golden, w = PARTS["categorical"], U("A/cat/w", (3, 2, 4))
    event = torch.tensor([[0, 1], [2, 3], [1, 0]])
    policy = dreamer_v3.Categoricals(a.flatten(1), (4, 4), 0.01)
    action = one_hot(event, 4).flatten(1)
    close(policy.log_prob(action), golden["log_prob"], 1e-12)
    close(policy.entropy(), golden["entropy"], 1e-12)
    plain = dreamer_v3.Categoricals(a.flatten(1), (4, 4), 0.0).log_prob(action)
    close(plain, golden["log_prob_plain"], 1e-12)
    a.requires_grad_(), b.requires_grad_()
    log_a, log_b = (dreamer_v3.mixed_log_probs(x, 0.01) for x in (a, b))
    kl = dreamer_v3.categorical_kl(log_a, log_b)
    close(kl, golden["kl"], 1e-12)
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
        raw.append(x @ fill(f"{path}/kernel", (8, 2)) + fill(f"{path}/bias", (2,)))
    policy, golden = dreamer_v3.BoundedNormals(*raw), PARTS["normal"]
    for name, ours in (("mean", policy.mean), ("std", policy.std)):
        close_sums(checksum(ours), golden[name], 1e-12)
    close(policy.log_prob(event), golden["log_prob"], 1e-11)
    close(policy.entropy(), golden["entropy"], 1e-11)


def test_lambda_return(float64):
    """Returns of replay (ends, truncations, bootstrap) and of imagination (soft ends)."""
    shape = 3, 8
    reward = U("A/lam/rew", shape)
    value, boot = U("A/lam/val", shape, 3.0), U("A/lam/boot", shape, 3.0)
    last, terminal = torch.zeros(2, 3, 8)
    last[[0, 1, 2], [3, 2, 7]] = terminal[0, 3] = 1
    cont = (1 - terminal) * (1 - 1 / 333)
    returns = dreamer_v3.lambda_return(reward, boot, cont, last, 0.95)
    close_sums(checksum(returns), PARTS["lambda_return"]["replay"], 1e-12)
    soft = torch.sigmoid(2 + unit("A/lam/con", 24)).float().double().reshape(shape)
    returns = dreamer_v3.lambda_return(reward, value, soft, torch.zeros(shape), 0.95)
    close_sums(checksum(returns), PARTS["lambda_return"]["imagined"], 1e-12)


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
    for ours, theirs in zip([y, *grads], PARTS[name], strict=True):
        close_sums(checksum(ours), theirs, 1e-12)


def test_rmsnorm(float64):
    """RMSNorm; ours goes on with a SiLU."""
    norm = dreamer_v3.RMSNorm(8)
    fill_params({"A_rms/scale": norm.scale})
    y = norm(U("A/rmsnorm/x", (3, 8), 2.0))[0, :4]
    close(y, torch.nn.functional.silu(torch.tensor(PARTS["rmsnorm"])), 1e-12)


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
    close(grad, grad.flip(3), 1e-6, grad.abs().mean().item())


@pytest.mark.parametrize("kind, width", [("disc", 5), ("cont", 2)])
def test_rssm(kind, width, float64, most_likely):
    """One step of the sequence model with its gradients, the prior, and one filtering step."""
    rssm, golden = dreamer_v3.RSSM(width, 24, 32, 16, 4, 4, 4, 0.01), PARTS[f"core_{kind}"]
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
    H, N, golden = 5, 4, PARTS["imag_loss"]
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
    close(model.return_range, golden["range"], 1e-9)
    for name, x in (("actor", policy), ("critic", value)):
        (grad,) = torch.autograd.grad(losses[name].sum(), x)
        close_sums(checksum(grad), golden[f"grad_{name}"], 1e-9)


@pytest.mark.parametrize("warmup", [0, 3])
def test_optimizer(warmup, float64):
    """Five updates, gradients of very different sizes; one tensor is tiny, one has none."""
    amps = {"p0": ((4, 5), 1.0), "p1": ((7,), 1e-5), "p2": ((3,), 0.5)}
    params = [torch.nn.Parameter(U(f"A/opt/{k}", *spec).clone()) for k, spec in amps.items()]
    args = Args(learning_rate=1e-2, warmup_updates=warmup)
    optimizer = dreamer_v3.LaProp(params, params, args)
    for i, amp in enumerate([1.0, 0.01, 30.0, 0.3, 1e-6]):
        for k, p in enumerate(params):
            p.grad = torch.zeros_like(p)
            if k < 2:
                p.grad = U(f"A/opt/g{k}/{i}", tuple(p.shape), amp)
        step_as_authors(optimizer.step, optimizer, i, 1e-2, warmup)
    for p, expected in zip(params, PARTS[f"optimizer{warmup}"], strict=True):
        close_sums(checksum(p), expected, 1e-12)


def test_warmup_rates():
    """The authors' float32 learning rates, which `step_as_authors` follows."""
    expected = {1: 3.9999484613417735e-08, 2: 7.999896922683547e-08, 3: 1.20000834158418e-07}
    for update, rate in ({0: 0.0} | expected).items():
        close(authors_rate(update, 4e-5, 1000), rate, 1e-15)


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
PARTS = {
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
