"""Speed and memory of dreamer_v3.py on this machine, with real steps of an environment.

    python results/benchmark.py --env-id ALE/MsPacman-v5 --size 12m

Takes the flags of dreamer_v3.py. The last line printed is a JSON object:

    update_ms, update_ms_min, update_ms_max    one update, waited for: median, fastest, slowest
    updates_per_s       updates that follow each other as in a run, without waiting in between
    act_ms              one action in one environment, median
    env_steps_per_s     agent steps a second at the run's train ratio
    params, flops_per_update, peak_share       arithmetic, and its share of a large product's rate
    peak_memory_mb, warmup_s                   memory; seconds to compile and warm up
"""

import importlib
import json
import math
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))
from dreamer_v3 import (  # noqa: E402
    Agent, Environments, Trainer, UserError, check_args, choose_device, fail, parse, to_device,
)  # fmt: skip


def peak_memory(device):
    """The most memory taken so far, on the GPU or in this process: MB; 0 where nobody tells."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    try:
        resource = importlib.import_module("resource")  # which Windows does not have
    except ImportError:
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def measure(function, least, seconds, most=1000, cuda=False):
    """Milliseconds of each call: at least `least` calls, and more for some seconds."""
    times, begin = [], time.perf_counter()
    while len(times) < least or len(times) < most and time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        function()
        if cuda:
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return np.array(times)


def arithmetic(trainer):
    """Floating-point operations of one update, counted from the shapes of its products."""
    batch, index = trainer.replay.sample()
    batch = to_device(batch | trainer.replay.read_latents(index), trainer.agent.device)
    with FlopCounterMode(display=False) as flops, torch.compiler.set_stance("force_eager"):
        Agent.train_step(trainer.agent, batch)
    return flops.get_total_flops()


def benchmark(args, seconds=60):
    """Measure; `seconds` for the updates, the rest takes less. Prints and returns a dict."""
    check_args(args)
    if not args.train_ratio:
        raise UserError("a benchmark needs a --train-ratio above 0")
    device, dtype = choose_device(args)
    cuda = device.type == "cuda"
    torch.manual_seed(args.seed)
    least = (args.batch_length + 3 * args.batch_size) * args.num_envs
    args = replace(args, total_timesteps=max(args.total_timesteps, least))
    args = replace(args, buffer_size=min(args.buffer_size, 20_000 + least))
    envs = Environments(args, args.num_envs, args.seed)
    agent = Agent(args, envs.spaces, device, dtype)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(args, envs, agent, Path(folder))
        trainer.starts_needed = math.inf
        print("collecting steps, then compiling (a minute or two) ...", flush=True)
        while len(trainer.replay) < 2 * args.batch_size:
            trainer.collect_and_train()
        warmup = measure(trainer.train, 5, 0, cuda=cuda).sum() / 1e3
        print("measuring updates, actions, then both ...", flush=True)
        update = measure(trainer.train, 5, seconds, 50, cuda)
        pipeline = measure(lambda: [trainer.train() for _ in range(10)], 1, seconds / 3, 20, cuda)
        one, carry = {key: x[:1] for key, x in envs.entry.items()}, agent.initial(1)
        one = to_device(one, device)
        act = measure(lambda: agent.act(one, carry)[-1].cpu(), 100, 0)[10:]
        # Whole cycles of the schedule: the steps from one update to the next.
        trainer.starts_needed, trainer.credit = 1, 1.0
        cycle = math.ceil(1 / (args.num_envs * trainer.updates_per_step))
        run = lambda: [trainer.collect_and_train() for _ in range(cycle)]
        steps = measure(run, 2, seconds / 3, cuda=cuda)
        memory = peak_memory(device)
        width = 8192 if cuda else 2048
        matrix = torch.randn(width, width, device=device).to(dtype)
        products = measure(lambda: matrix @ matrix, 20, 0, cuda=cuda)
        flops = arithmetic(trainer)
        envs.close()
    result = {
        "update_ms": np.median(update),
        "update_ms_min": update.min(),
        "update_ms_max": update.max(),
        "updates_per_s": 1e4 / np.median(pipeline),
        "act_ms": np.median(act),
        "env_steps_per_s": 1e3 * cycle * args.num_envs / np.median(steps),
        "params": sum(p.numel() for p in agent.params),
        "flops_per_update": flops,
        "peak_share": flops / np.median(update) * products.min() / (2 * width**3),
        "peak_memory_mb": memory,
        "warmup_s": warmup,
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "dtype": str(dtype).removeprefix("torch."),
        "size": args.size,
    }
    result = {k: float(f"{x:.4g}") if isinstance(x, float) else x for k, x in result.items()}
    print(json.dumps(result), flush=True)
    return result


if __name__ == "__main__":
    try:
        benchmark(parse())
    except (UserError, OSError) as error:
        fail(error)
