"""From runs to the pages' figures and tables.

    python results/make.py add runs/RUN ... --commit 1234567 --hardware "2 cores of ..."
    python results/make.py add runs/RUN ... --family ...   # V1, V2 and V3, for docs/family.md
    python results/make.py authors FOLDER   # the authors' curves, summed up
    python results/make.py beside acrobot runs/RUN ... --commit ... --hardware ...  # or LOGDIR
    python results/make.py network runs/RUN results/acrobot.pt  # its weights, without the optimizer
    python results/make.py random                        # returns of random policies: random.json
    python results/make.py tables                        # writes them into the pages
    python results/make.py figures                       # pip install matplotlib
    python results/make.py plot runs/A runs/B ...        # your own runs: plot.png

`add` puts each run into results/<task>.json, a list in the authors' format: task, method, seed, xs
(environment frames, all environments together) and ys (returns of training episodes), and beside it
what it takes to repeat the run; with --family, into family.json. The authors' curves are the folder
`scores` of their repository, github.com/danijar/dreamerv3; authors.json keeps what the figure needs
of them. If results/watch.py wrote a cpu.jsonl beside a run's folder, its CPU time is kept, too.
"""

import argparse
import gzip
import importlib
import itertools
import json
import re
import shlex
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import tyro

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "variants")]
import dreamer_v3  # noqa: E402

PAGES = [HERE.parent / name for name in ("README.md", "results/README.md", "docs/speed.md")]
DMC = "--action-repeat 2 --env-id shimmy:dm_control/"
ATARI = """--env-kwargs '{"repeat_action_probability": 0.0}' --env-id ALE/"""
RANDOM = {  # the flags that set the environment of each task
    "acrobot": "--env-id Acrobot-v1 --action-repeat 4",
    "cartpole": "--env-id CartPole-v1",
    "pendulum": "--env-id Pendulum-v1",
    "pendulum_pixels": "--env-id Pendulum-v1 --action-repeat 2",
    "atari_breakout": ATARI + "Breakout-v5",
    "atari_ms_pacman": ATARI + "MsPacman-v5",
    "atari_ms_pacman_sticky": "--env-id ALE/MsPacman-v5",
    "dmc_ball_in_cup_catch": DMC + "ball_in_cup-catch-v0",
    "dmc_cartpole_balance": DMC + "cartpole-balance-v0",
    "dmc_cartpole_swingup": DMC + "cartpole-swingup-v0",
    "dmc_walker_walk": DMC + "walker-walk-v0",
    "dmc_cheetah_run": DMC + "cheetah-run-v0",
    "dmc_cartpole_swingup_no_repeat": "--env-id shimmy:dm_control/cartpole-swingup-v0",
    "dmc_cheetah_run_no_repeat": "--env-id shimmy:dm_control/cheetah-run-v0",
    "dmc_walker_walk_no_repeat": "--env-id shimmy:dm_control/walker-walk-v0",
}
VARIANTS = "dreamer_v1", "dreamer_v2"  # in variants/
BIN = 10_000  # frames; the authors' curves of control tasks are averages over so many
ENOUGH = 100_000  # frames of the authors' curves that are kept


# ---- Runs -> <task>.json -------------------------------------------------------------------------


def task_name(env_id, pixels=False):
    """The authors' name of a task they have, otherwise the environment's id without a version."""
    name = re.sub(r"-v\d+$", "", env_id.split(":")[-1])
    if name.startswith("ALE/"):
        name = "atari_" + re.sub(r"(?<!^)(?=[A-Z])", "_", name.removeprefix("ALE/"))
    name = name.replace("dm_control/", "dmc_").replace("-", "_").lower()
    return f"{name}_pixels" if pixels else name


def flag(name, value):
    """A setting as the command line takes it."""
    name = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name} {shlex.quote(f'{value:g}' if isinstance(value, float) else str(value))}"


def load_run(folder):
    """A run's checkpoint with its arguments as a dict, and those to repeat it: not the preset's."""
    checkpoint = torch.load(Path(folder) / "checkpoint.pt", map_location="cpu", weights_only=True)
    args = checkpoint["args"]
    program = args["exp_name"] if args["exp_name"] in VARIANTS else "dreamer_v3"
    program = importlib.import_module(program)
    defaults = asdict(program.Args(**program.PRESETS.get(args["preset"], {})))
    kept = {k: v for k, v in args.items() if k in ("preset", "env_id") or v != defaults[k]}
    return checkpoint, kept


def cpu_seconds(folder):
    """CPU seconds of a run when each step was first seen, as results/watch.py wrote them."""
    seconds, watched = {}, Path(folder).parent / "cpu.jsonl"
    for line in watched.read_text().splitlines() if watched.exists() else ():
        line = json.loads(line)
        seconds.setdefault(line["step"], line["cpu"])
    return seconds


def read_run(folder, commit, hardware):
    """A run's folder -> its entry in <task>.json."""
    checkpoint, changed = load_run(folder)
    args, name = checkpoint["args"], checkpoint["args"]["exp_name"]
    elsewhere = (
        "exp_name run_dir resume track wandb_project_name wandb_entity capture_video".split()
    )
    changed = {k: v for k, v in changed.items() if k not in elsewhere and v is not None}
    program = f"variants/{name}.py" if name in VARIANTS else "dreamer_v3.py"
    frameskip = json.loads(args["env_kwargs"]).get("frameskip", 4)
    frames = frameskip if "ALE/" in args["env_id"] else args["action_repeat"]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    episodes = [line for line in lines if "charts/episodic_return" in line]
    key, spread = "eval/episodic_return", "eval/episodic_return_std"
    evaluations = [line for line in lines if key in line]
    spent = cpu_seconds(folder)
    return {
        "task": task_name(args["env_id"], args["pixels"]),
        "method": Path(program).name,
        "seed": args["seed"],
        "xs": [frames * line["step"] for line in episodes],
        "ys": [round(line["charts/episodic_return"], 4) for line in episodes],
        "evaluations": [  # frames, mean, standard deviation, episodes; greedy
            [
                frames * line["step"],
                round(line[key], 4),
                round(line[spread], 4),
                args["eval_episodes"],
            ]
            for line in evaluations
        ],
        "sampled": args["eval_sample"],
        "steps": checkpoint["step"],
        "asked": args["total_timesteps"],
        "frames": frames * checkpoint["step"],
        "updates": checkpoint["updates"],
        "seconds": round(lines[-1]["time"]),
        "cpu_seconds": round(max(spent.values())) if spent else None,
        "size": args.get("size"),
        "command": f"python {program} {' '.join(flag(*item) for item in changed.items())}",
        "commit": commit,
        "hardware": hardware,
    }


def add(folders, commit, hardware, family=False):
    """Append runs to their tasks' files; a run of the same task, seed and command is replaced."""
    for folder in folders:
        run = read_run(Path(folder), commit, hardware)
        path = HERE / f"{'family' if family else run['task']}.json"
        key = lambda run: (run["task"], run["method"], run["command"], run["seed"])
        runs = json.loads(path.read_text()) if path.exists() else []
        runs = sorted([other for other in runs if key(other) != key(run)] + [run], key=key)
        path.write_text("[\n" + ",\n".join(map(json.dumps, runs)) + "\n]\n")
        print(path, run["seed"], len(run["ys"]), "episodes")


def beside(task, folders, commit, hardware):
    """side_by_side.json: returns of training episodes, of our runs or of the authors' code.

    A folder is a run of ours, or a `--logdir` of theirs; xs are agent steps. minutes: CPU time at
    each of them, if it is known. greedy: mean of the last evaluation, of ours.
    """
    path = HERE / "side_by_side.json"
    curves = json.loads(path.read_text()) if path.exists() else []
    for folder in map(Path, folders):
        ours = (folder / "metrics.jsonl").exists() and (folder / "checkpoint.pt").exists()
        name, key = ("metrics", "charts/episodic_return") if ours else ("scores", "episode/score")
        lines = list(map(json.loads, (folder / f"{name}.jsonl").read_text().splitlines()))
        points = [(line["step"], round(line[key], 2)) for line in lines if key in line]
        config = (folder / "config.yaml").read_text() if not ours else ""
        seed = (
            load_run(folder)[0]["args"]["seed"]
            if ours
            else re.search(r"(?m)^seed: (\d+)", config)[1]
        )
        curve = dict(task=task, method="dreamer_v3.py" if ours else "authors", seed=int(seed))
        curves = [other for other in curves if not curve.items() <= other.items()]
        xs, ys = zip(*points, strict=True)
        curve |= dict(commit=commit, hardware=hardware, xs=xs, ys=ys)
        if spent := cpu_seconds(folder):
            seconds = np.interp(xs, list(spent), list(spent.values()))
            curve["minutes"] = (seconds / 60).round(2).tolist()
        if ends := [
            line["eval/episodic_return"] for line in lines if "eval/episodic_return" in line
        ]:
            curve["greedy"] = round(ends[-1], 2)
        curves.append(curve)
    curves.sort(key=lambda curve: (curve["task"], curve["method"], curve["seed"]))
    path.write_text("[\n" + ",\n".join(map(json.dumps, curves)) + "\n]\n")


def network(run, file):
    """The checkpoint of a run without its optimizer: for --evaluate and Player."""
    checkpoint = torch.load(Path(run) / "checkpoint.pt", map_location="cpu", weights_only=True)
    del checkpoint["agent"]["optimizer"]
    torch.save(checkpoint, file)
    print(f"{file}: {Path(file).stat().st_size / 1e6:.2f} MB")


# ---- Random policies -----------------------------------------------------------------------------


class Uniform:
    """Uniform actions, in place of an Agent."""

    def __init__(self, spaces):
        self.spaces, self.gpus, self.device = spaces, [], torch.device("cpu")

    def initial(self, num_envs):
        """Nothing to carry."""
        return ()

    def act(self, obs, carry, greedy):
        """A carry whose last part are the actions (n, A)."""
        n, classes = len(obs["is_first"]), self.spaces.action_classes
        if not classes:
            return (2 * torch.rand(n, self.spaces.action_width) - 1,)
        draws = [dreamer_v3.one_hot(torch.randint(count, (n,)), count) for count in classes]
        return (torch.cat(draws, -1),)


def random_returns(episodes=None):
    """random.json: task -> mean and deviation of the returns of uniform actions, and the score that
    counts as solved, if Gymnasium names one. In the environments of the runs; by default, 600
    episodes of the quick tasks and 100 of the others."""
    result = {}
    for task, flags in RANDOM.items():
        args = tyro.cli(dreamer_v3.Args, args=shlex.split(flags))
        torch.manual_seed(0)
        envs = dreamer_v3.Environments(args, 1, 0)
        solved = getattr(envs.envs.spec, "reward_threshold", None)
        envs.close()
        count = episodes or (100 if "/" in args.env_id else 600)
        returns = dreamer_v3.evaluate(Uniform(envs.spaces), args, count)
        mean, std = (round(float(x), 1) for x in (returns.mean(), returns.std()))
        result[task] = dict(env_id=args.env_id, action_repeat=args.action_repeat)
        result[task] |= dict(episodes=count, mean=mean, std=std, solved=solved)
    text = ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in result.items())
    (HERE / "random.json").write_text("{\n" + text + "\n}\n")


# ---- The authors' curves -------------------------------------------------------------------------


def binned(xs, ys, end=ENOUGH):
    """Means of the ys of (0, BIN], (BIN, 2 BIN], ... up to `end` frames; None: there is none."""
    bins = np.ceil(np.array(xs) / BIN).astype(int)
    values = [np.array(ys)[bins == i] for i in range(1, end // BIN + 1)]
    return [round(float(x.mean()), 4) if len(x) else None for x in values]


def returns(run):
    """Frames and returns of a run's training episodes.

    Of its evaluations with sampled actions, up to the last full span, if none ended: --resume
    begins new episodes.
    """
    if run["xs"] or not run["sampled"]:
        return run["xs"], run["ys"]
    full = run["frames"] // BIN * BIN
    points = [(x, y) for x, y, *_ in run["evaluations"] if x <= full]
    return zip(*points, strict=True) if points else ([], [])


def authors(folder):
    """authors.json: of each task that was run, mean, least and most of the seeds in each bin."""
    tasks = {path.stem for path in HERE.glob("*.json")}
    summary = {}
    for name in ("atari100k-dreamerv3", "dmc_proprio-dreamerv3"):
        curves = json.loads(gzip.decompress((Path(folder) / f"{name}.json.gz").read_bytes()))
        for task in sorted(tasks & {curve["task"] for curve in curves}):
            seeds = [binned(x["xs"], x["ys"]) for x in curves if x["task"] == task]
            columns = [[y for y in column if y is not None] for column in zip(*seeds, strict=True)]
            summary[task] = {
                "source": f"danijar/dreamerv3, scores/{name}.json.gz",
                "seeds": len(seeds),
                "frames": [BIN * (i + 1) for i in range(len(columns))],
                "mean": [round(float(np.mean(x)), 2) if x else None for x in columns],
                "least": [round(min(x), 2) if x else None for x in columns],
                "most": [round(max(x), 2) if x else None for x in columns],
            }
    text = ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in summary.items())
    (HERE / "authors.json").write_text("{\n" + text + "\n}\n")


# ---- Tables --------------------------------------------------------------------------------------


def load():
    """Tasks in order: name -> runs, and the authors' summary."""
    others = "authors speed updates random side_by_side family".split()
    paths = sorted(path for path in HERE.glob("*.json") if path.stem not in others)
    tasks = {path.stem: json.loads(path.read_text()) for path in paths}
    return tasks, json.loads((HERE / "authors.json").read_text())


def minutes(runs):
    """Wall-clock of runs as text."""
    times = sorted(round(run["seconds"] / 60) for run in runs)
    return f"{times[0]}" if times[0] == times[-1] else f"{times[0]} - {times[-1]}"


def stopped(runs):
    """Where runs were stopped before the end that their command asks for, as text."""
    ends = [f"{run['steps']:,}" for run in runs if run["steps"] < run["asked"]]
    return f", stopped at agent step {', '.join(ends)}" if ends else ""


def by_command(runs):
    """Runs that differ in nothing but the seed: command without seed -> runs."""
    groups = {}
    for run in runs:
        groups.setdefault(re.sub(r" --seed \d+", "", run["command"]), []).append(run)
    return groups


def numbers(tasks):
    """The number of each command in the list of results/README.md."""
    commands = [command for runs in tasks.values() for command in by_command(runs)]
    return {command: i for i, command in enumerate(commands, 1)}


def table_authors():
    """Training returns beside the authors', in the last bin that all seeds have."""
    rows = ["| task | frames | authors, mean (range) | this file, each seed | at the end, greedy |"]
    rows[0] += " random | updates | minutes | commit | command |"
    rows += ["| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"]
    tasks, published = load()
    chance = json.loads((HERE / "random.json").read_text())
    for task, curve in published.items():
        for command, runs in by_command(tasks[task]).items():
            ours = [binned(*returns(run)) for run in runs]
            full = [i for i, column in enumerate(zip(*ours, strict=True)) if None not in column]
            if not full:
                continue
            last = full[-1]
            low, mean, high = (f"{curve[name][last]:.4g}" for name in ("least", "mean", "most"))
            greedy = (
                f"{run['evaluations'][-1][1]:.4g}{' (sampled)' if run['sampled'] else ''}"
                for run in runs
                if run["evaluations"]
            )
            rows.append(
                f"| {task} | {BIN * last:,} - {BIN * (last + 1):,} | {mean} ({low} - {high}), "
                f"{curve['seeds']} seeds | {' / '.join(f'{x[last]:.4g}' for x in ours)} "
                f"| {' / '.join(greedy)} | {at_random(chance, task, runs[0], '.4g')} "
                f"| {runs[0]['updates']:,} | {minutes(runs)} "
                f"| {', '.join(sorted({run['commit'] for run in runs}))} "
                f"| {numbers(tasks)[command]}{stopped(runs)} |"
            )
    return rows


def at_random(chance, task, run, form=".0f"):
    """Mean return of a random policy with the action repeat of the run; empty if not measured."""
    flags = dict(re.findall(r"--(preset|action-repeat) (\w+)", run["command"]))
    repeat = dreamer_v3.PRESETS.get(flags.get("preset"), {}).get("action_repeat", 1)
    same = {"env_id": chance[plain(task)]["env_id"]}
    same["action_repeat"] = int(flags.get("action-repeat", repeat))
    return next((format(x["mean"], form) for x in chance.values() if same.items() <= x.items()), "")


def fifths(curve, end):
    """Mean return of the episodes in each fifth of the steps up to `end`: 5, nan if none ended."""
    fifth = np.ceil(5 * np.array(curve["xs"]) / end)
    parts = [np.array(curve["ys"])[fifth == number] for number in range(1, 6)]
    return [part.mean() if len(part) else np.nan for part in parts]


def mean_and_range(values):
    """An array as text: its mean, and its least and largest number."""
    spread = f" ({values.min():.0f} to {values.max():.0f})" if len(values) > 1 else ""
    return f"{values.mean():.0f}{spread}" if len(values) else ""


def by_chance(ours, theirs):
    """Share of the ways to deal the seeds to two programs that set their means as far apart.

    An exact permutation test of (n,) and (m,) returns: 0.1 is the least that 3 and 3 seeds can say.
    """
    both, n = np.concatenate([ours, theirs]), len(ours)
    dealt = both[np.array(list(itertools.combinations(range(len(both)), n)))].sum(1)
    apart = abs(dealt / n - (both.sum() - dealt) / len(theirs))
    return (apart > abs(ours.mean() - theirs.mean()) - 1e-6).mean()


def beside_groups():
    """The curves of the side by side and their fifths, (task, program) -> (curves, (n, 5))."""
    curves, groups = json.loads((HERE / "side_by_side.json").read_text()), {}
    for task in dict.fromkeys(curve["task"] for curve in curves):
        end = max(x for c in curves if plain(c["task"]) == plain(task) for x in c["xs"])
        for method in sorted({curve["method"] for curve in curves if curve["task"] == task}):
            seeds = [c for c in curves if (c["task"], c["method"]) == (task, method)]
            groups[task, method] = seeds, np.array([fifths(curve, end) for curve in seeds])
    return groups


def table_beside():
    """Mean return in each fifth of training, and the range of the seeds, of both programs.

    Below them, how often chance sets two equal programs as far apart. CPU minutes are those to the
    last step that all curves of a task have.
    """
    rows = ["| task | program | seeds | first fifth | second | third | fourth | last | random |"]
    rows[0] += " at the end, greedy | CPU minutes |"
    rows += ["| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"]
    chance, groups = json.loads((HERE / "random.json").read_text()), beside_groups()
    for (task, method), (seeds, parts) in groups.items():
        cells = " | ".join(mean_and_range(means[~np.isnan(means)]) for means in parts.T)
        text = f"| {TITLES[task]} | {PROGRAMS[method][0]} | {len(seeds)} | {cells} "
        greedy = mean_and_range(np.array([c["greedy"] for c in seeds if "greedy" in c]))
        # The last step that all curves of the task have.
        step = min(c["xs"][-1] for key, group in groups.items() if key[0] == task for c in group[0])
        known = [np.interp(step, c["xs"], c["minutes"]) for c in seeds if "minutes" in c]
        spent = f"{np.mean(known):.0f}" if known else ""
        rows.append(f"{text}| {chance[plain(task)]['mean']:.0f} | {greedy} | {spent} |")
        if method != "authors":
            pairs = zip(parts.T, groups[task, "authors"][1].T, strict=True)
            cells = (f"{by_chance(*pair):.2f}" * (not np.isnan(pair).any()) for pair in pairs)
            rows.append(f"| {TITLES[task]} | *by chance* |  | {' | '.join(cells)} |  |  |  |")
    return rows


def table_provenance():
    """Commit and machine of the curves of the side by side."""
    rows = ["| task | program | seeds | commit | machine |", "| --- | --- | --- | --- | --- |"]
    for (task, method), (curves, _) in beside_groups().items():
        place = lambda curve: (curve["commit"], curve["hardware"])
        for (commit, hardware), same in itertools.groupby(curves, place):
            seeds = ", ".join(str(curve["seed"]) for curve in same)
            text = f"| {TITLES[task]} | {PROGRAMS[method][0]} | {seeds} "
            rows.append(f"{text}| {commit} | {hardware} |")
    return rows


def table_family():
    """Evaluations of DreamerV1, V2 and V3 at the end of training."""
    rows = [
        "| task | algorithm | agent steps | updates | at the end, each seed | best on the way |"
    ]
    rows[0] += " random | CPU minutes | commit | command |"
    rows += ["| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"]
    chance = json.loads((HERE / "random.json").read_text())
    for command, same in by_command(family_runs()).items():
        task, ends = uniform(same[0]), [run["evaluations"][-1] for run in same]
        best = max(y for run in same for _, y, *_ in run["evaluations"])
        means = " / ".join(f"{y:.0f} +- {std / (n - 1) ** 0.5:.0f}" for _, y, std, n in ends)
        means += " (sampled)" * same[0]["sampled"]
        known = [run["cpu_seconds"] / 60 for run in same if run.get("cpu_seconds")]
        rows.append(
            f"| {TITLES[same[0]['task']]} | {FAMILY[same[0]['method']][0]} | {same[0]['steps']:,} "
            f"| {same[0]['updates']:,} | {means} | {best:.0f} | {chance[task]['mean']:.0f} "
            f"| {f'{np.mean(known):.0f}' if known else ''} "
            f"| {', '.join(sorted({run['commit'] for run in same}))} | `{command}`{stopped(same)} |"
        )
    return rows


def table_classic():
    """Greedy evaluations of tasks that the authors have not published."""
    rows = [
        "| task | seed | environment frames: return | last, +- standard error | best | random |"
    ]
    rows[0] += " updates | minutes | commit | command |"
    rows += ["| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"]
    tasks, published = load()
    chance = json.loads((HERE / "random.json").read_text())
    for task, runs in tasks.items():
        for run in () if task in published else runs:
            steps = ", ".join(f"{x:,}: {y:.0f}" for x, y, _, _ in run["evaluations"])
            _, mean, std, episodes = run["evaluations"][-1]
            best = max(y for _, y, _, _ in run["evaluations"])
            number = numbers(tasks)[re.sub(r" --seed \d+", "", run["command"])]
            rows.append(
                f"| {task} | {run['seed']} | {steps} | **{mean:.0f}** +- "
                f"{std / (episodes - 1) ** 0.5:.1f} | {best:.0f} | {at_random(chance, task, run)} "
                f"| {run['updates']:,} "
                f"| {minutes([run])} | {run['commit']} | {number}{stopped([run])} |"
            )
    return rows


def table_commands():
    """The exact command of each task."""
    tasks, rows = load()[0], []
    for runs in tasks.values():
        for command, same in by_command(runs).items():
            seeds = ", ".join(str(run["seed"]) for run in same)
            rows.append(f"{numbers(tasks)[command]}. `{command}`, `--seed` {seeds}")
    return rows


def table_speed():
    """Speed by size and kind of observation."""
    rows = ["| with | parameters | TFLOP an update | update, s | matrix rate |"]
    rows[0] += " action, ms | steps/s | memory, GB |"
    rows += ["| --- | --- | --- | --- | --- | --- | --- | --- |"]
    for x in json.loads((HERE / "speed.json").read_text())["runs"]:
        spread = f" ({x['update_ms_min'] / 1e3:.2f} - {x['update_ms_max'] / 1e3:.2f})"
        rows.append(
            f"| `{x['flags']}` | {x['params']:,} | {x['flops_per_update'] / 1e12:.3g} "
            f"| {x['update_ms'] / 1e3:.2f}{spread} | {x['peak_share']:.2f} | {x['act_ms']:.1f} "
            f"| {x['env_steps_per_s']:.2g} | {x['peak_memory_mb'] / 1e3:.1f} |"
        )
    return rows


def table_updates():
    """Median seconds of an update in all programs, of what `benchmark_others.py` printed."""
    runs = json.loads((HERE / "updates.json").read_text())["runs"]
    names = {"authors": "authors' JAX", "r2dreamer": "r2dreamer", "ours": "this file"}
    cases = {}  # (kind, size, dtype) -> program -> seconds
    for run in runs:
        case = cases.setdefault((run["kind"], run["size"], run["dtype"]), {})
        case.setdefault(run["program"], []).extend(run["seconds"])
    rows = [f"| seconds an update | {' | '.join(names.values())} | JAX, r2dreamer / this file |"]
    rows += ["| --- | --- | --- | --- | --- |"]
    for (kind, size, dtype), seconds in cases.items():
        theirs, r2dreamer, ours = (np.median(seconds[name]) for name in names)
        ratios = f"{theirs / ours:.1f}, {r2dreamer / ours:.1f}"
        cells = f"{theirs:#.3g} | {r2dreamer:#.3g} | {ours:#.3g} | {ratios}"
        rows.append(f"| {kind}s, size {size}, {dtype} | {cells} |")
    return rows


def table_growth():
    """Speed by size, and by batch, length and horizon."""
    rows = ["| with | parameters | TFLOP an update | update, s | matrix rate | memory, GB |"]
    rows += ["| --- | --- | --- | --- | --- | --- |"]
    show = lambda x, form: "" if x is None else format(x, form)
    for x in json.loads((HERE / "speed.json").read_text())["growth"]:
        rows.append(
            f"| `{x['flags']}` | {show(x['params'], ',')} | {x['tflop']:.3g} "
            f"| {show(x['update_s'], '.2f')} "
            f"| {show(x['peak_share'], '.2f')} | {show(x['memory_gb'], '.1f')} |"
        )
    return rows


def table_quick():
    """Minutes and returns of one command for each task."""
    rows = ["| task | agent steps | minutes | random | return of each seed | solved | command |"]
    rows += ["| --- | --- | --- | --- | --- | --- | --- |"]
    tasks, published = load()
    chance = json.loads((HERE / "random.json").read_text())
    for task, runs in tasks.items():
        # The command with the most seeds; of equals, the one that the first page has.
        rank = lambda item: (len(item[1]), "--preset cpu" in item[0])
        command, same = max(by_command(runs).items(), key=rank)
        if task not in published and len(same) > 1:  # the other tables have what was tried once
            last = " / ".join(f"{run['evaluations'][-1][1]:.0f}" for run in same)
            row = f"| {task} | {same[0]['steps']:,} | {minutes(same)} "
            solved = chance[plain(task)]["solved"]
            row += f"| {at_random(chance, task, same[0])} | {last} "
            row += f"| {'none' if solved is None else f'{solved:.0f}'} "
            rows.append(f"{row}| [{numbers(tasks)[command]}](results/README.md#commands) |")
    return rows


def write_tables(text):
    """A page with every <!-- table NAME --> ... <!-- end --> made anew."""

    def table(match):
        rows = globals()[f"table_{match[1]}"]()
        return "\n".join([f"<!-- table {match[1]} -->", "", *rows, "", "<!-- end -->"])

    return re.sub(r"<!-- table (\w+) -->.*?<!-- end -->", table, text, flags=re.DOTALL)


# ---- Figures -------------------------------------------------------------------------------------


TITLES = {
    "acrobot": "Acrobot",
    "cartpole": "CartPole",
    "pendulum": "Pendulum",
    "pendulum_pixels": "Pendulum from pixels",
    "atari_breakout": "Breakout",
    "atari_ms_pacman": "Ms. Pac-Man",
    "dmc_ball_in_cup_catch": "Ball in cup",
    "dmc_cartpole_balance": "Cartpole balance",
    "dmc_cartpole_swingup": "Cartpole swingup",
    "dmc_cheetah_run": "Cheetah run",
    "dmc_walker_walk": "Walker walk",
    "cartpole_unweighted": "CartPole, not weighted",
    "pendulum_unweighted": "Pendulum, not weighted, discount 0.997",
}
PROGRAMS = {
    "authors": ("authors' code (JAX)", "#0072b2"),
    "dreamer_v3.py": ("this file", "#d55e00"),
}


FAMILY = {
    "dreamer_v1.py": ("DreamerV1", "#009e73"),
    "dreamer_v2.py": ("DreamerV2", "#0072b2"),
    "dreamer_v3.py": ("DreamerV3", "#d55e00"),
}


def plain(task):
    """The task whose random policy is that of a task with other settings."""
    return task.removesuffix("_unweighted")


def uniform(run):
    """The key of random.json for a run; sticky: by default, Atari repeats actions at random."""
    sticky = run["task"].startswith("atari") and "repeat_action_prob" not in run["command"]
    return plain(run["task"]) + "_sticky" * sticky


def marks(axis, chance):
    """Dashed lines: the return of uniform actions, and the score that counts as solved."""
    for text, y, x in (("random", chance["mean"], 0.99), ("solved", chance["solved"], 0.01)):
        if y is not None:
            axis.axhline(y, color="0.4", ls="--", lw=1)
            place = dict(xycoords=("axes fraction", "data"), va="bottom", fontsize=8)
            axis.annotate(text, (x, y), ha="right" if x > 0.5 else "left", **place)


def figures():
    """curves.png: our runs, one line each; on the authors' mean and range where they have them."""
    plt = importlib.import_module("matplotlib.pyplot")
    (tasks, published), chance = load(), json.loads((HERE / "random.json").read_text())
    seen = lambda task: max(len(run["evaluations"]) for run in tasks[task])  # two are no curve
    order = [task for task in tasks if task in published or seen(task) > 2]
    order.sort(key=lambda task: task not in published)
    fig, axes = plt.subplots(-(-len(order) // 3), 3, figsize=(10.5, 9), squeeze=False)
    for axis in axes.flat[len(order) :]:
        axis.axis("off")
    (theirs, blue), (ours, orange), lines = *PROGRAMS.values(), {}
    for axis, task in zip(axes.flat, order, strict=False):
        curve, runs = published.get(task), tasks[task]
        if curve:
            end = BIN + 2 * max(run["frames"] for run in runs)
            columns = zip(*(curve[x] for x in ("frames", "mean", "least", "most")), strict=True)
            columns = [column for column in columns if column[0] <= end and None not in column]
            xs, mean, least, most = zip(*columns, strict=True)
            axis.fill_between(xs, least, most, color=blue, alpha=0.2, lw=0)
            label = f"{theirs}, published: mean and range of {curve['seeds']} seeds"
            (lines[label],) = axis.plot(xs, mean, color=blue, lw=2)
        # The settings that were tried with the most seeds, then the rest behind them.
        groups = sorted(by_command(runs).values(), key=len)
        for same in groups:
            for run in same:
                if curve and run["xs"]:
                    means = enumerate(binned(run["xs"], run["ys"]), 1)
                    points = [(min(BIN * i, run["frames"]), y) for i, y in means if y is not None]
                else:
                    points = [(frames, mean) for frames, mean, _, _ in run["evaluations"]]
                main = same is groups[-1]
                style = dict(color=orange, lw=1.8) if main else dict(color="0.7", lw=1)
                label = f"{ours}, each seed" if main else f"{ours}, other settings"
                (lines[label],) = axis.plot(*zip(*points, strict=True), "o-", ms=3, **style)
        marks(axis, chance[plain(task)])
        axis.set_title(TITLES[task], fontsize=11)
        axis.set_xlabel("environment frames", fontsize=9)
        axis.set_ylabel("training return" if curve else "evaluation return", fontsize=9)
        axis.xaxis.set_major_locator(plt.MaxNLocator(4))
        axis.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
        axis.tick_params(labelsize=8)
    fig.legend(lines.values(), lines.keys(), loc="lower center", ncol=3, frameon=False)
    fig.tight_layout(rect=(0, 0.04, 1, 1))
    fig.savefig(HERE / "curves.png", dpi=110)
    side_by_side()
    family()


def side_by_side():
    """side_by_side.png: both programs, over agent steps and, where it is known, over CPU time."""
    plt = importlib.import_module("matplotlib.pyplot")
    curves = json.loads((HERE / "side_by_side.json").read_text())
    chance = json.loads((HERE / "random.json").read_text())
    tasks = dict.fromkeys(curve["task"] for curve in curves)
    tasks = [task for task in tasks if task != "pendulum_unweighted"]  # the table has it
    rows = ("xs", "agent steps"), ("minutes", "minutes of one core")
    fig, axes = plt.subplots(2, len(tasks), figsize=(0.4 + 2.6 * len(tasks), 5.4), squeeze=False)
    for (i, task), (row, (x, unit)) in itertools.product(enumerate(tasks), enumerate(rows)):
        axis = axes[row, i]
        same = [curve for curve in curves if curve["task"] == task and x in curve]
        for method, (label, color) in PROGRAMS.items():
            runs = [
                [
                    dict(step=step, x=where, y=y)
                    for step, where, y in zip(c["xs"], c[x], c["ys"], strict=True)
                ]
                for c in same
                if c["method"] == method
            ]
            band(axis, runs, "x", "y", by="step", count=8, label=label, color=color)
        marks(axis, chance[plain(task)])
        axis.set_title(TITLES[task])
        axis.set_xlabel(unit)
        axis.set_xlim(0)
        axis.xaxis.set_major_locator(plt.MaxNLocator(4))
        axis.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
        axis.yaxis.set_major_formatter(lambda y, _: f"{y:,.0f}")
    for row in axes:
        row[0].set_ylabel("return of training episodes")
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="lower center", ncol=2, frameon=False)
    fig.tight_layout(rect=(0, 0.05, 1, 1))
    fig.savefig(HERE / "side_by_side.png", dpi=120)


def family_runs():
    """The runs of family.json, in the order of TITLES."""
    runs = json.loads((HERE / "family.json").read_text())
    return sorted(runs, key=lambda run: list(TITLES).index(run["task"]))


def family():
    """family.png: evaluations of DreamerV1, V2 and V3 over agent steps."""
    plt = importlib.import_module("matplotlib.pyplot")
    # On Atari the most likely action is one and the same: only sampled ones make a curve.
    runs = [run for run in family_runs() if run["sampled"] or "atari" not in run["task"]]
    chance = json.loads((HERE / "random.json").read_text())
    tasks = list(dict.fromkeys(run["task"] for run in runs))
    size = max(5, 0.5 + 3.2 * len(tasks)), 3.4
    fig, axes = plt.subplots(1, len(tasks), figsize=size, squeeze=False)
    for axis, task in zip(axes[0], tasks, strict=True):
        here = [run for run in runs if run["task"] == task]
        for method, (label, color) in FAMILY.items():
            same = [run for run in here if run["method"] == method]
            groups = sorted(by_command(same).values(), key=len, reverse=True)
            for i, group in enumerate(groups):
                points = [
                    [{"x": x * r["steps"] / r["frames"], "y": y} for x, y, *_ in r["evaluations"]]
                    for r in group
                ]
                style = dict(ls="--") if i else dict(label=label)  # dashed: other settings
                band(axis, points, "x", "y", color=color, **style)
        marks(axis, chance[uniform(here[0])])
        axis.set_title(TITLES[task] + ", sampled" * here[0]["sampled"])
        axis.set_xlabel("agent steps")
        axis.set_xlim(0)
        axis.xaxis.set_major_locator(plt.MaxNLocator(4))
        axis.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    axes[0, 0].set_ylabel("return of evaluations")
    axes[0, 0].plot([], [], color="gray", lw=2.5, ls="--", label="the other learning rate")
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="lower center", ncol=4, frameon=False)
    fig.tight_layout(rect=(0, 0.08, 1, 1))
    fig.savefig(HERE / "family.png", dpi=120)


def series(folder):
    """A run's folder -> (what its curve is called, lines of metrics)."""
    checkpoint, changed = load_run(folder)
    ignored = ("exp_name", "env_id", "seed", "run_dir", "resume", "total_timesteps")
    words = [flag(k, v) for k, v in changed.items() if k not in ignored and v is not None]
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    args = checkpoint["args"]
    return " ".join([args["exp_name"], args["env_id"], *words]), list(map(json.loads, lines))


def band(axis, runs, x, y, by=None, count=30, **style):
    """Means of `y` in intervals of `by` (or `x`): a thin line for each run, a thick one for all.

    A point stands at the mean `x` of its interval. The thick line has the intervals that every run
    has: a mean of fewer would jump.
    """
    points = [[(line[by or x], line[x], line[y]) for line in lines if y in line] for lines in runs]
    points = [run for run in points if run]
    if not points:
        return
    end = max(point[0] for run in points for point in run)
    edges = np.linspace(0, end, min(count, min(map(len, points))) + 1)
    means = np.full((len(points), 2, len(edges) - 1), np.nan)
    for row, run in zip(means, points, strict=True):
        where, *values = np.array(run).T
        which = np.clip(np.searchsorted(edges, where) - 1, 0, len(edges) - 2)
        for i in set(which):
            row[:, i] = [value[which == i].mean() for value in values]
    thin = dict(color=style["color"], alpha=0.45, lw=1)
    for row in means if len(points) > 1 else ():
        axis.plot(*row[:, ~np.isnan(row[1])], **thin)
    whole = ~np.isnan(means).any((0, 1))
    axis.plot(*means.mean(0)[:, whole], lw=2.2, **style)


def plot(folders, out):
    """Returns over steps and over minutes, and losses: a curve is the mean of a command's seeds."""
    plt = importlib.import_module("matplotlib.pyplot")
    groups = {}
    for folder in folders:
        name, lines = series(folder)
        lines = [line | {"minutes": line["time"] / 60} for line in lines]
        groups.setdefault(name, []).append(lines)
    fig, axes = plt.subplots(1, 3, figsize=(13, 4))
    for i, (name, runs) in enumerate(groups.items()):
        label = f"{name} ({len(runs)} seed{'s' * (len(runs) > 1)})"
        style = dict(color=f"C{i}", label=label, marker="o", ms=3)
        band(axes[0], runs, "step", "charts/episodic_return", **style)
        band(axes[1], runs, "minutes", "charts/episodic_return", **style)
        band(axes[2], runs, "step", "losses/total", **style)
    for axis, x in zip(axes, ("agent steps", "minutes", "agent steps"), strict=True):
        axis.set_xlabel(x)
    axes[0].set_ylabel("return of training episodes")
    axes[2].set_ylabel("sum of all losses")
    axes[2].set_yscale("log")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="lower center", fontsize=8, frameon=False)
    fig.tight_layout(rect=(0, 0.05 * (1 + len(groups)), 1, 1))
    fig.savefig(out, dpi=110)
    print(out)


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(required=True, dest="command")
    adding = commands.add_parser("add")
    adding.add_argument("runs", nargs="+")
    adding.add_argument("--family", action="store_true")
    commands.add_parser("authors").add_argument("folder")
    comparing = commands.add_parser("beside")
    comparing.add_argument("task")
    comparing.add_argument("folders", nargs="+")
    for command in (adding, comparing):
        command.add_argument("--commit", required=True)
        command.add_argument("--hardware", required=True)
    publishing = commands.add_parser("network")
    publishing.add_argument("run")
    publishing.add_argument("file")
    commands.add_parser("random")
    commands.add_parser("tables")
    commands.add_parser("figures")
    plotting = commands.add_parser("plot")
    plotting.add_argument("runs", nargs="+")
    plotting.add_argument("--out", default="plot.png")
    args = parser.parse_args()
    if args.command == "add":
        add(args.runs, args.commit, args.hardware, args.family)
    elif args.command == "authors":
        authors(args.folder)
    elif args.command == "beside":
        beside(args.task, args.folders, args.commit, args.hardware)
    elif args.command == "network":
        network(args.run, args.file)
    elif args.command == "random":
        random_returns()
    elif args.command == "tables":
        for page in PAGES:
            page.write_text(write_tables(page.read_text()))
    elif args.command == "plot":
        plot(args.runs, args.out)
    else:
        figures()


if __name__ == "__main__":
    try:
        main()
    except ModuleNotFoundError as error:
        sys.exit(f"this needs {error.name}: pip install {error.name}")
    except OSError as error:
        sys.exit(f"cannot read {error.filename}: {error.strerror}")
