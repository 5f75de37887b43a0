"""The numbers in the JSON files beside this script, made again from the authors' code.

    python results/parity/make.py FOLDER           # writes the files
    python results/parity/make.py FOLDER --check   # writes nothing, tells the largest differences

FOLDER is a checkout of github.com/danijar/dreamerv3 at commit e3f0224. The packages it needs are in
results/README.md; PyTorch is not among them. It takes six minutes of one CPU core.

Their files stay as they are. In memory float32 becomes float64, which leaves no doubt about
rounding; a sample becomes the most likely class, or the mean plus a constant; and their optimizer
keeps the gradients it gets. A formula that knows only names and shapes fills in parameters and
inputs. So nothing is random.

A tensor is kept as [l2, dot], its norm and its product with unit("check"); the tensors of a network
are kept as one such pair. test_dreamer_v3.py computes the same numbers with dreamer_v3.py.
"""

import argparse
import contextlib
import functools
import importlib
import itertools
import json
import math
import os
import re
import subprocess
import sys
import zlib
from pathlib import Path

LARGEST = 1e-9  # relative difference that passes --check
COMMIT = "e3f02248693a79dc8b0ebd62c93683888ddaccfe"
MODULES = """numpy jax jax.numpy ninjax optax elements ruamel.yaml dreamerv3.agent embodied.jax.nets
embodied.jax.outs embodied.jax.heads embodied.jax.utils embodied.jax.opt dreamerv3.rssm""".split()
NETWORKS = "con dec dyn enc pol rew val slowval".split()
TINY = {
    r".*\.rssm": {"deter": 32, "hidden": 16, "stoch": 4, "classes": 4, "blocks": 4},
    r".*\.depth": 4, r".*\.units": 16, "agent.imag_length": 5,
}  # fmt: skip
# A tuple is the shape of an image or a vector; a number counts the classes of an integer.
PIXELS, VECTORS = {"image": (64, 64, 3)}, {"position": (3,), "extra": (5,), "mode": 4}
CASES = {  # observations, action, settings or the name of theirs, batch and time
    "B": (PIXELS, 5, TINY, (3, 8)),
    "B1m": (PIXELS, 5, "size1m", (2, 6)),
    "C": (VECTORS, (2,), TINY, (3, 8)),
    "Cm": (VECTORS, (2,), TINY, (3, 8)),
    "D": (PIXELS | {"vector": (5,)}, 5, TINY, (3, 8)),
}
LOSSES = {"con": "cont", "policy": "actor", "rew": "reward", "value": "critic"}  # theirs: ours
METRICS = {
    "tar": "behaviour/return", "val": "behaviour/value", "slowval": "behaviour/slow_value",
    "rew": "behaviour/reward", "con": "behaviour/cont", "adv": "behaviour/advantage",
    "ent/action": "behaviour/policy_entropy", "rep_ent": "latents/posterior_entropy",
    "dyn_ent": "latents/prior_entropy",
}  # fmt: skip


# ---- Their code ----------------------------------------------------------------------------------


def fail(*message):
    """Say in one line what the user can put right, and leave."""
    print("make.py: error:", *message, file=sys.stderr)
    sys.exit(2)


def load(folder):
    """Import the authors' code from a folder, with float64 in place of float32."""
    global np, jax, jnp, nj, optax, elements, yaml, agent, nets, outs, heads
    if not (folder / "dreamerv3/agent.py").is_file():
        fail(f"{folder} is not a checkout of github.com/danijar/dreamerv3")
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.stdout.strip() != COMMIT:
        found = (done.stdout + done.stderr).strip().split("\n")[0]
        fail(f"{folder} is not at commit {COMMIT[:7]}, unchanged; git says: {found}")
    # One thread adds numbers in the same order on every machine.
    os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_X64": "1"}
    sys.path.insert(0, str(folder.resolve()))
    sys.dont_write_bytecode = True
    try:
        modules = [importlib.import_module(name) for name in MODULES]
    except ImportError as error:
        fail(f"{error}; results/README.md says what to install")
    np, jax, jnp, nj, optax, elements, yaml, agent, nets, outs, heads, *_ = modules
    nets.COMPUTE_DTYPE = jnp.float64
    for module in modules[MODULES.index("dreamerv3.agent") :]:
        module.f32 = jnp.float64


def fix_samples(deviations):
    """A sample is the most likely class; of normals, the mean plus and minus some deviations."""
    outs.Categorical.sample = lambda self, seed, shape=(): jnp.argmax(self.logits, -1)
    noise = np.float64([deviations, -deviations])
    outs.Normal.sample = lambda self, seed, shape=(): self.mean + noise * self.stddev


def make_model(obs, action, settings, shape, **options):
    """Their agent without what goes around it, and a batch of replay."""
    number = lambda x: elements.Space(np.uint8 if len(x) == 3 else np.float64, x)
    space = lambda x: elements.Space(np.int32, (), 0, x) if isinstance(x, int) else number(x)
    configs = (Path(agent.__file__).parent / "configs.yaml").read_text()
    configs = yaml.YAML(typ="safe").load(configs)
    settings = configs[settings] if isinstance(settings, str) else settings
    config = elements.Config(configs["defaults"]).update({"replay_context": 0} | settings | options)
    spaces = {key: space(x) for key, x in obs.items()} | {"reward": space(())}
    spaces |= dict.fromkeys(("is_first", "is_last", "is_terminal"), elements.Space(bool))
    model = object.__new__(agent.Agent)
    config = elements.Config(**config.agent, replay_context=config.replay_context)
    model.__init__(spaces, {"action": space(action)}, config)
    # A first link of their optimizer's chain changes nothing and keeps the gradients as its state.
    first = lambda params: {name: jnp.zeros(x.shape) for name, x in params.items()}
    keep = optax.GradientTransformation(first, lambda gradients, *_: (gradients, gradients))
    model.opt.opt = optax.chain(keep, model.opt.opt)
    return model, inputs(obs, action, *shape)


def layout(function, *inputs):
    """Name -> shape and type of everything that a function of theirs keeps; takes no memory."""
    make = functools.partial(nj.pure(function), create=True, ignore=True, seed=0)
    with contextlib.redirect_stdout(None):  # they print numbers of parameters
        return jax.eval_shape(lambda *x: make({}, *x)[0], *inputs)


def filled(function, *inputs):
    """The same, filled by the formula."""
    return {name: fill(name, x) for name, x in layout(function, *inputs).items()}


def differentiate(function, *inputs):
    """Output of a function with filled networks; and the way back from weights of the output to
    gradients for the parameters, by name, and for the inputs."""
    call = lambda params, *x: nj.pure(function)(params, *x, seed=0)[1]
    return jax.vjp(jax.jit(call), filled(function, *inputs), *inputs)


# ---- Parameters and inputs by a formula ----------------------------------------------------------


def unit(name, shape):
    """float64 numbers of mean 0 and variance 1 that depend on nothing but the name."""
    mask, seed = 0xFFFFFFFF, zlib.crc32(name.encode()) ^ 0x1B873593
    x = (np.arange(math.prod(shape)) * 2654435761 + seed) & mask
    x = ((x ^ (x >> 16)) * 73244475) & mask
    x = ((x ^ (x >> 16)) * 73244475) & mask
    x = x ^ (x >> 16)
    return 3**0.5 * ((x + 0.5) / 2**31 - 1).reshape(shape)


def single(x):
    """float64, rounded to float32: what is tested in both precisions starts from the same."""
    return np.asarray(x, np.float32).astype(np.float64)


def U(name, shape, amp=1.0):
    """`unit`, rounded to float32."""
    return single(amp * unit(name, shape))


def slope(middle):
    """Logits of two-hot bins that fall from the middle: the huge outer bins hardly count."""
    return -abs(np.arange(255) - middle) * 20 / 127


def fill(name, like):
    """The value of a parameter; zeros for what else they keep."""
    x, (*path, leaf) = unit(name, like.shape), name.split("/")
    if path[0] in ("opt", "retnorm", "slowval_count"):
        return np.zeros(like.shape, like.dtype)
    if leaf == "kernel":
        fan_in = x.shape[0] if x.ndim == 2 else math.prod(x.shape[:-1])
        x = {"dyngru": 4, "logits": 2, "logit": 2}.get(path[-1], 1) * x / np.sqrt(fan_in)
    elif leaf == "scale":
        x = 1 + 0.1 * x
    elif re.match("(rew|val|slowval)/head", name):
        x = 0.05 * x + 1.2 * slope({"rew": 131, "val": 135, "slowval": 137}[path[0]])
    else:
        x = 0.05 * x + (2.5 if name == "con/head/logit/bias" else 0)
    return single(x)


def flags(B, T):
    """is_first, is_last, is_terminal (B, T): an end in row 0, a cut in row 1, one after row 2."""
    first, last, terminal = np.zeros((3, B, T), bool)
    first[0, [0, 4]] = last[0, 3] = terminal[0, 3] = True
    first[1, 3] = last[1, 2] = True
    first[2:, 0] = last[2:, -1] = True
    return {"is_first": first, "is_last": last, "is_terminal": terminal}


def inputs(obs, action, B, T):
    """Replay (B, T, ...): observations, action, reward, flags, and the names of steps."""
    (b, t), batch = np.ogrid[:B, :T], flags(B, T) | {"reward": U("data/reward", (B, T))}
    batch["reward"][[0, 1, B - 1], [2, 1, T - 2]] = 100, 0, -3
    for key, x in obs.items():
        if isinstance(x, int):
            batch[key] = np.int32((5 * b + t * t + 2 * t) % x)
        elif len(x) == 1:
            batch[key] = U(f"data/{key}", (B, T, *x), np.resize([0.01, 1, 50, 1000, 5], x))
        else:
            i, j, h, w, c = np.ogrid[:B, :T, :64, :64, :3]
            slopes = (3 * i + 5 * j + 2 * c) % 7 - 3, (5 * i + 3 * j + 4 * c) % 9 - 4
            image = 37 * i + 53 * j + 91 * c + slopes[0] * h + slopes[1] * w + h * w // (8 + j)
            batch[key] = np.uint8(image % 256)
    batch["action"] = np.int32((3 * b + 2 * t + b * t) % 5)
    if not isinstance(action, int):
        batch["action"] = U("data/action", (B, T, *action), 0.8)
    return batch | {"stepid": np.zeros((B, T, 20), np.uint8), "consec": np.zeros((B, T), np.int32)}


def start(model, run, B):
    """What is carried into a batch (nothing, or what the formula gives), and their return range."""
    encoder, state, decoder, action = model.init_train(B)
    if run == "carry":
        b, (_, stoch, classes) = np.arange(B), state["stoch"].shape
        latent = np.eye(classes)[(2 * b[:, None] + np.arange(stoch)) % classes]
        state = {"deter": U("carry/deter", state["deter"].shape, 0.5), "stoch": latent}
        shape = action["action"].shape
        value = U("carry/action", shape, 0.8) if len(shape) > 1 else np.int32((2 * b + 1) % 5)
        action = {"action": value}
    low, high = np.float64((-0.4, 1.9) if run == "carry" else (0, 0))
    return (encoder, state, decoder, action), {"retnorm/lo/value": low, "retnorm/hi/value": high}


# ---- What is kept of a result --------------------------------------------------------------------


def floats(x):
    """A tensor, or several numbers, as JSON has them."""
    return np.asarray(x, np.float64).tolist()


def digits(x):
    """Integers below 10 as text."""
    return "".join(map(str, np.ravel(x)))


def checksum(x):
    """[l2, dot] of a tensor: the dot product tells permutations apart."""
    x = np.asarray(x, np.float64).flatten()
    return floats([np.linalg.norm(x), x @ unit("check", x.shape)])


def checksums(tensors):
    """Tensors by name -> l2 and sum of dot for each network, in one list."""
    result = []
    for network in NETWORKS:
        pairs = [checksum(x) for name, x in tensors.items() if name.split("/")[0] == network]
        if pairs:
            l2, dot = zip(*pairs, strict=True)
            result += [math.hypot(*l2), math.fsum(dot)]
    return result


def return_range(state):
    """Low and high percentile of returns."""
    return floats([state["retnorm/lo/value"], state["retnorm/hi/value"]])


# ---- The files -----------------------------------------------------------------------------------


def losses():
    """Losses, metrics and gradients of a first update; and what three leave, with the same batch
    and start, without and with warm-up."""
    result = {case: {"zero": {}, "carry": {}} for case in CASES}
    for case, warmup in itertools.product(CASES, (0, 1000)):
        if case == "Cm" and warmup:
            continue
        fix_samples(0.0 if case == "Cm" else -0.5)
        model, batch = make_model(*CASES[case], **{"agent.opt.warmup": warmup})
        train, B = jax.jit(nj.pure(model.train)), len(batch["reward"])
        fresh = filled(model.train, model.init_train(B), batch)
        for run, kept in result[case].items():
            carry, bounds = start(model, run, B)
            state, steps = fresh | bounds, []
            for _ in range(3):
                state, (_, _, metrics) = train(state, carry, batch, seed=0)
                steps.append((state, metrics))
            total, norm = ([float(x[f"opt/{k}"]) for _, x in steps] for k in ("loss", "grad_norm"))
            if warmup == 0:
                first, metrics = steps[0]
                gradients = {k[12:]: x for k, x in first.items() if k[:12] == "opt/state/0/"}
                kept["loss"] = {k[5:]: float(x) for k, x in metrics.items() if k[:5] == "loss/"}
                kept["metrics"] = [float(metrics[k]) for k in METRICS]
                kept |= {"total": total[:1], "range": return_range(first)}
                kept |= {"grad": checksums(gradients), "grad_norm": norm[:1]}
            if case != "Cm":  # at the mean its gradient is rounding, which updates make large
                after = {"total": total[1:], "grad_norm": norm[1:], "range": return_range(state)}
                kept[f"warmup{warmup}"] = after | {"params": checksums(state)}
    return result


def acting():
    """Five decisions of two environments; the second is reset again at the fourth."""
    fix_samples(0.0)
    result = {case: [] for case in CASES if case != "Cm"}
    for case, rows in result.items():
        model, batch = make_model(*CASES[case][:3], (2, 6))
        carry, decide = model.init_policy(2), jax.jit(nj.pure(model.policy))
        state = filled(model.train, carry, batch)
        for t in range(5):
            obs = {key: batch[key][:, t] for key in model.obs_space}
            obs["is_first"] = np.array([t == 0, t in (0, 3)])
            _, (carry, action, _) = decide(state, carry, obs, seed=0)
            latent, action = carry[1]["stoch"].argmax(-1), action["action"]
            action = digits(action) if action.ndim == 1 else checksum(action)
            rows.append([checksum(carry[1]["deter"]), digits(latent), action])
    return result


def replay_context():
    """One update of sequences that start from the stored state of the step before them."""
    fix_samples(-0.5)
    model, batch = make_model(*CASES["C"], **{"replay_context": 1, "agent.opt.warmup": 0})
    b, t, s = np.ogrid[:3, :8, :4]
    batch["dyn/deter"] = U("data/dyn/deter", (3, 8, 32), 0.5)
    batch["dyn/stoch"] = np.eye(4)[(b + 3 * t + s) % 4]
    batch["consec"][1] = 1  # this row goes on from the batch before
    carry, bounds = start(model, "carry", 3)
    state = filled(model.train, carry, batch) | bounds
    _, (_, output, metrics) = jax.jit(nj.pure(model.train))(state, carry, batch, seed=0)
    names = {f"loss/{k}": f"losses/{LOSSES.get(k, k)}" for k in sorted(model.scales)}
    names |= {"opt/loss": "losses/total", "opt/grad_norm": "losses/grad_norm"} | METRICS
    kept = {ours: float(metrics[theirs]) for theirs, ours in names.items()}
    stored = {k: checksum(output["replay"][f"dyn/{k}"]) for k in ("deter", "stoch")}
    return {"metrics": kept} | stored


def parameters():
    """Of each case: how many are trained, crc32 of all names and shapes, checksums. Of each size:
    how many are trained with pictures and 9 actions, and with 4 numbers and 2 actions."""

    def describe(*case):
        """The number, and what holds the shapes by name."""
        model, batch = make_model(*case)
        prepare = model._apply_replay_context
        loss = lambda *x: model.loss(*prepare(*x)[:3], training=True)  # it knows all networks
        kept = layout(loss, model.init_train(len(batch["reward"])), batch)
        kept = {k: x for k, x in sorted(kept.items()) if k.split("/")[0] in NETWORKS}
        return sum(math.prod(x.shape) for k, x in kept.items() if k[:4] != "slow"), kept

    result = {"cases": {}, "counts": {}}
    for case in ("B", "B1m", "C", "D"):
        count, kept = describe(*CASES[case])
        crc = zlib.crc32("\n".join(f"{k} {list(x.shape)}" for k, x in kept.items()).encode())
        sums = checksums({k: fill(k, x) for k, x in kept.items()})
        result["cases"][case] = [count, crc, sums]
    for size in ("1m", "12m", "25m", "50m", "100m", "200m", "400m"):
        kinds = (PIXELS, 9), ({"obs": (4,)}, 2)
        result["counts"][size] = [describe(*kind, f"size{size}", (2, 6))[0] for kind in kinds]
    return result


def parts():
    """Functions and layers on inputs of their own."""
    fix_samples(0.0)
    model, _ = make_model(*CASES["B"])
    head = lambda x: model.rew(x, 1).bins
    bins = np.asarray(differentiate(head, np.zeros((1, 48)))[0])
    result = {"bins": floats(bins[[63, 126, 127, 128, 253, 254]]), "twohot": twohot(bins)}
    result |= {"categorical": categorical(), "normal": normal(), "lambda_return": lambda_return()}
    result |= layers() | {"core_disc": core("B", 5, np.int32([0, 3, 4]))}
    result |= {"core_cont": core("C", 2, U("A/core/prevact", (3, 2), 1.5))}
    result |= {"imag_loss": imag_loss(model, bins)}
    return result | {f"optimizer{warmup}": optimizer(model, warmup) for warmup in (0, 3)}


# ---- The parts -----------------------------------------------------------------------------------


def twohot(bins):
    """Prediction, loss and its gradient, at targets inside, on and beyond the bins."""
    logits = single(unit("A/twohot/logits", (9, 255)) + 1.5 * slope(130))
    logits[1] = 0  # predicts exactly 0
    target = np.float64([0, bins[130], bins[254], bins[0], 1e9, -1e9, 100, -3, single(1e-3)])
    loss, back = jax.vjp(lambda x: outs.TwoHot(x, bins).loss(target), logits)
    result = {"mean": floats(outs.TwoHot(logits, bins).pred()), "target": floats(target)}
    return result | {"loss": floats(loss), "grad": [checksum(x) for x in back(np.ones(9))[0]]}


def categorical():
    """Mixing with the uniform, entropy, KL with free bits, and the straight-through gradient."""
    a, b, event = U("A/cat/a", (3, 2, 4)), U("A/cat/b", (3, 2, 4)), [[0, 1], [2, 3], [1, 0]]
    a[0, 0] = 30, 0, 0, -30  # here mixing matters
    latent = lambda x, unimix=0.01: outs.Agg(outs.OneHot(x, unimix), 1, jnp.sum)
    kl, back = jax.vjp(lambda a, b: latent(a).kl(latent(b)), a, b)
    sample, back_sample = jax.vjp(lambda x: latent(x).sample(None), a)
    return {
        "log_prob": floats(latent(a).logp(np.eye(4)[event])),
        "entropy": floats(latent(a).entropy()),
        "log_prob_plain": floats(latent(a, 0.0).logp(np.eye(4)[event])),
        "kl": floats(kl),
        "grad_kl": [checksum(x) for x in back(np.float64(kl > 1))],
        "sample": digits(sample.argmax(-1)),
        "grad_sample": checksum(back_sample(U("A/cat/w", (3, 2, 4)))[0]),
    }


def normal():
    """The continuous policy: mean, deviation, log-probability, entropy."""
    kind = {"action": elements.Space(np.float64, (2,))}, {"action": "bounded_normal"}
    head = heads.DictHead(*kind, minstd=0.1, maxstd=1.0, name="A_normal")
    event = U("A/normal/event", (4, 2), 0.8)
    read = lambda p: (p.output.mean, p.output.stddev, p.logp(event), p.entropy())
    x, _ = differentiate(lambda x: read(head(x)["action"]), U("A/normal/x", (4, 8), 2.0))
    result = {"mean": checksum(x[0]), "std": checksum(x[1])}
    return result | {"log_prob": floats(x[2]), "entropy": floats(x[3])}


def soft(name, shape):
    """Probabilities to continue."""
    return single(1 / (1 + np.exp(-2 - unit(name, shape))))


def lambda_return():
    """Returns of replay (ends, cuts, bootstrap) and of imagination (soft ends)."""
    _, last, terminal = flags(3, 8).values()
    reward, value = U("A/lam/rew", (3, 8)), U("A/lam/val", (3, 8), 3.0)
    boot, end = U("A/lam/boot", (3, 8), 3.0), 1 - soft("A/lam/con", (3, 8))
    replay = agent.lambda_return(last, terminal, reward, value, boot, 1 - 1 / 333, 0.95)
    imagined = agent.lambda_return(np.zeros((3, 8)), end, reward, value, value, 1, 0.95)
    return {"replay": checksum(replay), "imagined": checksum(imagined)}


def layers():
    """Output of layers, and gradients for input, kernel and bias; output of RMSNorm."""
    result = {}
    for name, layer, shape in (
        ("linear", nets.Linear(6, name="A_lin"), (3, 8)),
        ("blocklinear", nets.BlockLinear(12, 4, name="A_blk"), (3, 8)),
        ("conv5same", nets.Conv2D(4, 5, name="A_conv"), (2, 8, 8, 3)),
    ):
        y, back = differentiate(layer, U(f"A/{name}/x", shape))
        params, x = back(U("check", y.shape))
        bias, kernel = params.values()
        result[name] = [checksum(tensor) for tensor in (y, x, kernel, bias)]
    y, _ = differentiate(nets.Norm("rms", name="A_rms"), U("A/rmsnorm/x", (3, 8), 2.0))
    return result | {"rmsnorm": floats(y[0, :4])}


def core(case, width, action):
    """One step of the sequence model with its gradients, the prior, and one filtering step."""
    dyn = make_model(*CASES[case])[0].dyn
    deter, stoch = U("A/core/deter", (3, 32), 0.5), U("A/core/stoch", (3, 4, 4), 0.5)
    new, back = differentiate(dyn._core, deter, stoch, U("A/core/action", (3, width), 1.5))
    params, *grads = back(U("check", new.shape))
    result = {"deter": checksum(new)}
    for name, x in zip(("deter", "stoch", "action"), grads, strict=True):
        result[f"grad_{name}"] = checksum(x)
    result |= {"grads": checksums(params), "prior": checksum(differentiate(dyn._prior, deter)[0])}
    rest = {"action": action}, np.array([False, True, False]), False, True
    observe = lambda deter, stoch, x: dyn.observe({"deter": deter, "stoch": stoch}, x, *rest)[2]
    feat, _ = differentiate(observe, deter, stoch, U("A/core/tokens", (3, 24)))
    return result | {"observe": [checksum(feat[k]) for k in ("deter", "stoch", "logit")]}


def imag_loss(model, bins):
    """Actor and critic losses and the return range on given outputs of the networks."""
    given = {"action": np.arange(24).reshape(4, 6) * 3 % 5}, U("A/imag/rew", (4, 6))
    value, slow = (
        single(unit(f"A/imag/{name}", (4, 6, 255)) + 1.5 * slope(middle))
        for name, middle in (("val", 135), ("slow", 137))
    )
    norms, (_, bounds) = (model.retnorm, model.valnorm, model.advnorm), start(model, "carry", 4)
    imagine = nj.pure(functools.partial(agent.imag_loss, update=True, **model.config.imag_loss))

    def run(policy, value):
        """Losses; then returns and return range."""
        heads = {"action": outs.Categorical(policy)}, *(outs.TwoHot(x, bins) for x in (value, slow))
        args = *given, soft("A/imag/con", (4, 6)), *heads, *norms
        state, (loss, out, _) = imagine(bounds, *args, seed=0)
        return (loss["policy"], loss["value"]), (out["ret"], state)

    policy = U("A/imag/pol", (4, 6, 5))
    (actor, critic), back, (returns, state) = jax.vjp(run, policy, value, has_aux=True)
    ones, zeros = np.ones(actor.shape), np.zeros(actor.shape)
    result = {"returns": checksum(returns), "actor": checksum(actor), "critic": checksum(critic)}
    result |= {"range": return_range(state), "grad_actor": checksum(back((ones, zeros))[0])}
    return result | {"grad_critic": checksum(back((zeros, ones))[1])}


def optimizer(model, warmup):
    """Three tensors after five updates, gradients of very different sizes; the last has none."""
    chain = model._make_opt(**dict(model.config.opt) | {"lr": 1e-2, "warmup": warmup})
    params = [U("A/opt/p0", (4, 5)), U("A/opt/p1", (7,), 1e-5), U("A/opt/p2", (3,), 0.5)]
    state, update = chain.init(params), jax.jit(chain.update)
    for i, amp in enumerate((1.0, 0.01, 30.0, 0.3, 1e-6)):
        grads = [U(f"A/opt/g{k}/{i}", params[k].shape, amp) for k in (0, 1)]
        changes, state = update([*grads, np.zeros(3)], state, params)
        params = [p + change for p, change in zip(params, changes, strict=True)]
    return [checksum(p) for p in params]


# ---- Command line --------------------------------------------------------------------------------


def rounded(x, precision):
    """Floats with so many digits; parameters have 15, because updates are small beside them."""
    if isinstance(x, dict):
        return {k: rounded(v, 15 if k == "params" else precision) for k, v in x.items()}
    if isinstance(x, list):
        return [rounded(v, precision) for v in x]
    return float(f"{x:.{precision}g}") if isinstance(x, float) else x


def text(result, name):
    """A file of that name: JSON, a list of numbers in one line."""
    result = rounded(result, 15 if name in ("parameters", "parts") else 12)
    lines = json.dumps(result, indent=1) + "\n"
    return re.sub(r"\[([^][{}]*)\]", lambda x: f"[{' '.join(x[1].split())}]", lines)


def leaves(x, path=""):
    """Nested lists and dicts -> path: what is there."""
    if not isinstance(x, (dict, list)):
        return {path: x}
    items = x.items() if isinstance(x, dict) else enumerate(x)
    return {k: v for key, y in items for k, v in leaves(y, f"{path}/{key}").items()}


def largest_difference(new, old):
    """The largest relative difference of floats, and where; infinite if anything else differs."""
    new, old = leaves(new), leaves(old)

    def difference(path):
        """At one place, which may be missing."""
        a, b = new.get(path), old.get(path)
        if a == b:
            return 0.0
        comparable = isinstance(a, float) and isinstance(b, float) and math.isfinite(a - b)
        return abs(a - b) / max(abs(a), abs(b)) if comparable else math.inf

    return max((difference(path), path) for path in new | old)


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path, help="a checkout of github.com/danijar/dreamerv3")
    parser.add_argument("--check", action="store_true", help="compare and write nothing")
    args, worst = parser.parse_args(), 0.0
    load(args.folder)
    for make in (parts, parameters, acting, replay_context, losses):
        path, result = Path(__file__).with_name(f"{make.__name__}.json"), make()
        if args.check:
            difference, where = largest_difference(result, json.loads(path.read_text()))
            print(f"{path.name}: {difference:.0e} at {where[1:]}", flush=True)
            worst = max(worst, difference)
        else:
            path.write_text(text(result, make.__name__))
            print(path, flush=True)
    sys.exit(worst > LARGEST)


if __name__ == "__main__":
    main()
