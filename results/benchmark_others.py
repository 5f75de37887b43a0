"""Seconds for one update of this file, of the authors' code, and of r2dreamer, on the same inputs.

    python results/benchmark_others.py ours vector 1m float32
    python results/benchmark_others.py authors image 12m bfloat16 --folder FOLDER
    python results/benchmark_others.py r2dreamer image 1m float32 --folder FOLDER --compile

Each runs in a process of its own, with the packages that docs/speed.md names, on the CPU.
FOLDER is a checkout of danijar/dreamerv3 at commit e3f0224, or of NM512/r2dreamer at 546e4fa; its
files stay as they are. An update goes from a batch of 16 x 64 in memory, already drawn from the
replay, to new parameters, losses and latent states. The last line is a JSON object: `first` is the
first update with all that is compiled for it, `seconds` the updates after two more.

Theirs are used as they are, but for this: the authors' report is not compiled, and r2dreamer's type
of matrix products, float16, is float32 or bfloat16 here, since a CPU is not faster in it. It runs
eagerly here; with --compile it compiles as it does by default, which takes a CPU many minutes.
"""

import argparse
import ctypes
import importlib
import itertools
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

B, T = 16, 64
SPACES = {"image": ("image", (64, 64, 3), 9), "vector": ("vector", (4,), 2)}  # name, shape, actions
SIZES = {  # as in the authors' configs.yaml: classes, deter, hidden, units, depth
    "1m": dict(discrete=4, deter=512, hidden=64, units=64, depth=4),
    "12m": dict(discrete=16, deter=2048, hidden=256, units=256, depth=16),
}


def make_batch(kind, length):
    """Random steps of the replay: dict of arrays (B, length, ...), actions as class numbers."""
    (name, shape, actions), rng = SPACES[kind], np.random.default_rng(0)
    obs = rng.integers(0, 256, (B, length, *shape)).astype(np.uint8)
    if kind == "vector":
        obs = rng.normal(size=(B, length, *shape)).astype(np.float32)
    flags = dict.fromkeys(("is_first", "is_last", "is_terminal"), np.zeros((B, length), bool))
    action = rng.integers(0, actions, (B, length)).astype(np.int32)
    return {name: obs, "action": action, "reward": np.ones((B, length), np.float32)} | flags


def ours(kind, size, dtype, **_):
    """One update of dreamer_v3.py as a function, and its number of parameters."""
    sys.path.insert(0, str(Path(__file__).parent.parent))
    torch, file = importlib.import_module("torch"), importlib.import_module("dreamer_v3")
    name, shape, actions = SPACES[kind]
    images = ((name, 3),) if kind == "image" else ()
    vectors = ((name, *shape, ()),) if kind == "vector" else ()
    spaces = file.Spaces(images, vectors, (actions,), actions)
    agent = file.Agent(file.Args(size=size), spaces, "cpu", getattr(torch, dtype))
    batch = make_batch(kind, T)
    batch["prev_action"] = np.eye(actions, dtype=np.float32)[batch.pop("action")]
    widths = agent.model.rssm.deter_dim, agent.model.rssm.stoch_shape[0]
    batch |= {"deter": np.zeros((B, widths[0]), np.float16)}
    batch |= {"stoch": np.zeros((B, widths[1]), np.uint8)}

    def update():
        metrics, *latents = agent.train_step(file.to_device(batch, agent.device))
        return [x.numpy() for x in latents], {name: float(x) for name, x in metrics.items()}

    return update, sum(p.numel() for p in agent.params)


def authors(kind, size, dtype, folder, **_):
    """The same of danijar/dreamerv3, by its interface for training."""
    sys.path.insert(0, folder)
    names = "jax", "elements", "ruamel.yaml", "dreamerv3.agent"
    jax, elements, yaml, module = map(importlib.import_module, names)
    jax.devices()  # reads the shell's XLA_FLAGS, which their setup overwrites
    configs = yaml.YAML(typ="safe").load((Path(folder) / "dreamerv3/configs.yaml").read_text())
    with tempfile.TemporaryDirectory() as logdir:
        config = elements.Config(configs["defaults"]).update(configs[f"size{size}"])
        device = {"jax.platform": "cpu", "jax.compute_dtype": dtype, "jax.prealloc": False}
        config = config.update({"logdir": logdir} | device)
        shared = "logdir seed batch_size batch_length replay_context report_length".split()
        shared = {key: getattr(config, key) for key in [*shared, "replica", "replicas"]}
        shared["jax"] = elements.Config(**config.jax, precompile=False, profiler=False)
        name, shape, actions = SPACES[kind]
        spaces = {name: elements.Space(np.uint8 if kind == "image" else np.float32, shape)}
        spaces |= {"reward": elements.Space(np.float32)}
        spaces |= dict.fromkeys(("is_first", "is_last", "is_terminal"), elements.Space(bool))
        action = {"action": elements.Space(np.int32, (), 0, actions)}
        agent = module.Agent(spaces, action, elements.Config(**config.agent, **shared))
    length = T + config.replay_context
    batch = agent._zeros(agent.spaces, (B, length)) | make_batch(kind, length)
    stream, carry = iter(agent.stream(itertools.repeat(batch))), agent.init_train(B)

    def update():
        nonlocal carry
        carry, *results = agent.train(carry, next(stream))
        jax.block_until_ready((agent.params, carry))
        return results

    trained = "dyn enc dec rew con pol val".split()
    sizes = {name: x.size for name, x in agent.params.items() if name.split("/")[0] in trained}
    return update, sum(sizes.values())


def r2dreamer(kind, size, dtype, folder, compile):
    """The same of NM512/r2dreamer with its loss `dreamer`, from its replay's answer on."""
    sys.path.insert(0, folder)
    names = "torch", "gymnasium", "tensordict", "omegaconf", "dreamer"
    torch, gym, tensordict, omegaconf, module = map(importlib.import_module, names)
    model = omegaconf.OmegaConf.load(Path(folder) / "configs/model/_base_.yaml")
    keys = {"mlp_keys": "$^", "cnn_keys": "image"} if kind == "image" else {}
    keys = keys or {"mlp_keys": ".*", "cnn_keys": "$^"}
    changes = dict(act="SiLU", norm=True, rep_loss="dreamer", compile=compile)
    model = omegaconf.OmegaConf.merge(model, SIZES[size], changes)
    whole = {"device": "cpu", "env": {"encoder": keys, "decoder": keys}, "model": model}
    name, shape, actions = SPACES[kind]
    limits = (0, 255, shape, np.uint8) if kind == "image" else (-np.inf, np.inf, shape)
    obs_space = gym.spaces.Dict({name: gym.spaces.Box(*limits)})
    act_space = gym.spaces.Box(0.0, 1.0, (actions,))
    act_space.discrete = True  # as in their wrapper for discrete actions
    agent = module.Dreamer(omegaconf.OmegaConf.create(whole).model, obs_space, act_space)
    low = getattr(torch, dtype)
    module.autocast = lambda **_: torch.autocast("cpu", low, enabled=low != torch.float32)
    batch = make_batch(kind, T)
    batch["action"] = np.eye(actions, dtype=np.float32)[batch["action"]]
    batch = {key: torch.from_numpy(x if x.ndim > 2 else x[..., None]) for key, x in batch.items()}
    initial = agent.rssm.initial(B)

    class Buffer:
        """In place of their replay: always the same answer; keeps the states it gets."""

        def sample(self):
            """A batch, its index, and the first latent states."""
            return tensordict.TensorDict(batch, (B, T)), None, tuple(x.detach() for x in initial)

        def update(self, index, stoch, deter):
            """The latent states of an update."""
            self.latents = stoch.numpy(), deter.numpy()

    buffer = Buffer()

    def update():
        return {name: float(x) for name, x in agent.update(buffer).items()}

    return update, sum(p.numel() for p in agent._named_params.values())


# Program -> its function, and a file of its checkout.
PROGRAMS = {"ours": (ours, "."), "authors": (authors, "dreamerv3/agent.py")}
PROGRAMS |= {"r2dreamer": (r2dreamer, "dreamer.py")}


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("program", choices=PROGRAMS)
    parser.add_argument("kind", choices=SPACES)
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("dtype", choices=["float32", "bfloat16"])
    parser.add_argument("--folder", default=".", help="checkout of the other program")
    parser.add_argument("--compile", action="store_true", help="of r2dreamer, its torch.compile")
    parser.add_argument("--keep-memory", action="store_true", help="set glibc as ours does")
    parser.add_argument("--updates", type=int, default=10)
    args = vars(parser.parse_args())
    if sys.platform != "linux":
        parser.error("the allocator's settings are those of Linux")
    program, count, seconds = args.pop("program"), args.pop("updates"), []
    make, file = PROGRAMS[program]
    settings = {"keep_memory": args.pop("keep_memory") or program == "ours"}
    settings |= {"threads": len(os.sched_getaffinity(0)), "xla": os.environ.get("XLA_FLAGS", "")}
    if settings["keep_memory"]:  # as keep_freed_memory of dreamer_v3.py, which its Trainer calls
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)
        libc.mallopt(-1, -1)
    if args["compile"] and program != "r2dreamer":
        parser.error("--compile is for r2dreamer: the other two always compile")
    if not (Path(args["folder"]) / file).exists():
        parser.error(f"--folder {args['folder']} is not a checkout of {program}: no {file}")
    try:
        update, parameters = make(**args)
    except ImportError as error:
        parser.error(f"{error}; docs/speed.md says what to install")
    for _ in range(count + 3):
        start = time.perf_counter()
        update()
        seconds.append(round(time.perf_counter() - start, 4))
    del args["folder"]
    result = dict(program=program, **args, parameters=parameters, first=seconds[0])
    print(json.dumps(result | settings | {"seconds": seconds[3:]}), flush=True)


if __name__ == "__main__":
    main()
