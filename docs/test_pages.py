"""Tests of README.md, docs/ and results/README.md; part of `python -m pytest -q` in the root."""

import ast
import functools
import importlib
import importlib.util
import inspect
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import fields, replace

import pytest
import torch
import tyro
from test_dreamer_v3 import (
    ENVIRONMENTS, HERE, PAGES, README, SOURCE, TINY, VECTOR, Args, Spaces, UserError, close,
    dreamer_v3, load_module, make_vector, page_blocks, parse_words, randomize, read_metrics,
    short_run, tiny,
)  # fmt: skip

if not os.environ.get("DISPLAY"):
    os.environ.setdefault("MUJOCO_GL", "egl")  # read when DeepMind Control is imported


def page_commands():
    """Every `python dreamer_v3.py ...` of the pages, once."""
    blocks = "".join(block for page in PAGES.values() for block in page_blocks("bash", page))
    return list(dict.fromkeys(re.findall(r"python dreamer_v3.py(.*)", blocks)))


def test_commands_parse(monkeypatch):
    """The commands of the pages, and of the file's docstring, are accepted by the parser."""
    commands = page_commands() + re.findall(r"^ +python dreamer_v3.py(.*)", SOURCE, re.MULTILINE)
    several = re.findall(r"torchrun .* dreamer_v3.py (.*)", PAGES["docs/distributed.md"])
    assert len(commands) >= 15 and len(several) == 5
    commands += several
    monkeypatch.setattr(dreamer_v3, "load_checkpoint", lambda path: {"args": Args(resume=path)})
    for command in commands:
        words = shlex.split(command, comments=True)
        if "--help" not in words:
            args = parse_words(monkeypatch, *words)
            dreamer_v3.check_args(replace(args, capture_video=False))


def readme_diff(name, folder):
    """Apply the diff whose first line has the name, to a copy of dreamer_v3.py in the folder."""
    (diff,) = (block for block in page_blocks("diff", PAGES["docs/modifying.md"]) if name in block)
    shutil.copy(dreamer_v3.__file__, folder)
    command = ["git", "apply", "-p0", "-"]
    done = subprocess.run(command, input=diff, text=True, capture_output=True, cwd=folder)
    assert done.returncode == 0, done.stderr


COMMANDS = [command for command in page_commands() if "--help" not in command]
NEEDS = {"shimmy": "'shimmy[dm-control]' 'mujoco<4'", "crafter": "crafter", "minigrid": "minigrid"}
NEEDS["pygame"] = "pygame"


@pytest.mark.parametrize("command", COMMANDS, ids=range(len(COMMANDS)))
def test_commands_run(command, tmp_path, monkeypatch, capsys):
    """Every command of the pages does what it says: as it stands, only shorter and smaller."""
    short = TINY | dict(run_dir=str(tmp_path), eval_episodes=1, batch_size=2, batch_length=4)
    short |= dict(total_timesteps=24, buffer_size=1000, eval_every=20, report_every=20, log_every=4)
    words = shlex.split(command, comments=True)
    if "RUN" in command:
        folder = short_run(dreamer_v3, tmp_path, env_id="CartPole-v1", total_timesteps=20)
        words = [word.replace("runs/RUN", str(folder)) for word in words]
    args = parse_words(monkeypatch, *words)
    for module in NEEDS:
        if module in args.env_id or module == "pygame" and args.pixels:
            pytest.importorskip(module, reason=f"pip install {NEEDS[module]}")
    if args.capture_video and not importlib.util.find_spec("moviepy"):
        with pytest.raises(UserError, match="pip install 'moviepy'"):
            dreamer_v3.main(args)
        args = replace(args, capture_video=False)
    modules = {"my_module": 0, "crafter_env": 2}
    if (module := args.env_id.split(":")[0]) in modules:
        code = page_blocks("python", ENVIRONMENTS)[modules[module]]
        (tmp_path / f"{module}.py").write_text(code)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))  # for --async-envs
    if args.resume:
        old = dreamer_v3.load_checkpoint(args.resume)["args"]
        dreamer_v3.main(replace(old, resume=args.resume, total_timesteps=30))
        assert {line["step"] for line in read_metrics(folder)} >= {20, 30}
    elif args.evaluate:
        returns = dreamer_v3.main(args)
        assert len(returns) == args.eval_episodes
        text = capsys.readouterr().out.splitlines()[-1]
        assert all(word in text for word in ("mean", "standard error", "min", "max"))
    else:
        short |= dict(num_envs=args.num_envs, total_timesteps=24 * args.num_envs, eval_sample=True)
        dreamer_v3.main(replace(args, **short))
        (path,) = tmp_path.glob("*/metrics.jsonl")
        names = set().union(*read_metrics(path.parent))
        assert {"losses/total", "eval/episodic_return"} <= names
        assert any(name.startswith("dreams/") for name in names)


def test_readme_snippet(tmp_path, capsys):
    """The README's snippet loads a checkpoint, acts, and prints a return."""
    folder = short_run(dreamer_v3, tmp_path, env_id="CartPole-v1", total_timesteps=20)
    (snippet,) = page_blocks("python")
    assert "runs/RUN" in snippet
    capsys.readouterr()
    exec(snippet.replace("runs/RUN", str(folder)), {})
    word, number = capsys.readouterr().out.split()
    assert word == "return" and 8 <= float(number) <= 500  # CartPole falls after 8 steps at least


def test_readme_encoder(tmp_path, monkeypatch):
    """The README's other encoder trains, and is the one that is used."""
    readme_diff("self.patch", tmp_path)
    module = load_module(tmp_path / "dreamer_v3.py", monkeypatch)
    settings = dict(env_id="TestSpaces-v0", env_kwargs='{"case": "grey"}', total_timesteps=20)
    folder = short_run(module, tmp_path, **settings)
    state = module.load_checkpoint(folder / "checkpoint.pt")["agent"]["model"]
    assert any(name.startswith("encoder.patch") for name in state)
    assert not any(name.startswith("encoder.convs") for name in state)
    # An entry of the embedding sees one patch and no other.
    encoder = module.Encoder(Spaces((("obs", 3),), (), (2,), 2), depth=4, units=8)
    image = torch.zeros(1, 1, 64, 64, 3, dtype=torch.uint8)
    before = encoder({"obs": image})
    image[0, 0, 8:16, 24:32] = 200
    change = (encoder({"obs": image}) - before).abs().unflatten(-1, (8, 8, -1)).sum((0, 1, -1))
    assert change.nonzero().tolist() == [[1, 3]] and before.shape[-1] == encoder.embed_dim


def test_readme_normaliser(tmp_path, monkeypatch):
    """The README's other normaliser trains, and the range is mean -+ deviation."""
    readme_diff("all_returns.std()", tmp_path)
    module = load_module(tmp_path / "dreamer_v3.py", monkeypatch)
    args = replace(tiny(), return_rate=1.0)
    agent = module.Agent(module.Args(**vars(args)), VECTOR)
    randomize(agent.model)
    feat = torch.randn(6, 5, agent.model.rssm.deter_dim + math.prod(agent.model.rssm.stoch_shape))
    action = make_vector(VECTOR.action_classes, VECTOR.action_width, (6, 5))
    _, returns, _ = module.actor_critic_loss(agent.model, feat, action, args)
    expected = torch.stack([returns.mean() - returns.std(), returns.mean() + returns.std()])
    close(agent.model.return_range, expected, rtol=1e-5)


def test_readme_flag(tmp_path, monkeypatch):
    """The page's new flag: the replay holds signs, the returns are the environment's."""
    readme_diff("sign_rewards", tmp_path)
    module = load_module(tmp_path / "dreamer_v3.py", monkeypatch)
    settings = dict(env_id="TestCounting-v0", total_timesteps=30, sign_rewards=True)
    folder = short_run(module, tmp_path, **settings)
    args = module.load_checkpoint(folder)["args"]
    envs = module.Environments(args, 1, 0)
    agent = module.Agent(args, envs.spaces)
    trainer = module.Trainer(args, envs, agent, folder, module.load_checkpoint(folder))
    assert set(trainer.replay.data["reward"][:30].flat) == {0.0, 1.0}
    returns = [line.get("charts/episodic_return", 0) for line in read_metrics(folder)]
    assert max(returns) > 9, "an episode has 6 steps at most"


def test_page_environment(tmp_path, monkeypatch):
    """The page's environment is remembered: 1 for the sign that was shown, else 0. A notebook."""
    definition, notebook, _ = page_blocks("python", ENVIRONMENTS)
    names = {}
    exec(definition, names)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(dreamer_v3.PRESETS, "cpu", TINY)
    exec(notebook.replace("2000", "40, eval_episodes=2"), names)
    assert len(names["returns"]) == 2
    env = names["Guess"]()
    for right in (0, 1, 0, 1):
        obs, _ = env.reset()
        assert env.observation_space.contains(obs)
        answer = obs["sign"] if right else 1 - obs["sign"]
        results = [env.step(answer) for _ in range(5)]
        assert all(env.observation_space.contains(x[0]) and x[0]["sign"] == 2 for x in results)
        assert [x[1] for x in results] == [0, 0, 0, 0, right] and results[-1][2]


def test_readme_tables(monkeypatch):
    """Every table made from results/ is in the README as the script makes it now."""
    make = load_module(HERE / "results/make.py", monkeypatch)
    for page in PAGES.values():
        assert make.write_tables(page) == page
    written = [path.relative_to(HERE).as_posix() for path in make.PAGES]
    tables = sum(PAGES[name].count("<!-- table ") for name in written)
    assert tables == len([name for name in vars(make) if name[:6] == "table_"])


def test_links():
    """Every link of a page to a file, and to a heading of a page, has an end."""
    anchor = lambda title: re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-")
    for name, page in PAGES.items():
        for target, heading in re.findall(r"\]\((?!http)([\w./-]*)(?:#([\w-]+))?\)", page):
            path = ((HERE / name).parent / target).resolve() if target else HERE / name
            assert path.exists(), (name, target)
            titles = re.findall(r"^#+ (.*)", path.read_text(), re.M) if heading else []
            assert not heading or heading in map(anchor, titles), (name, target, heading)


def test_page_of_processes():
    """The table of messages follows from the parameters and the arithmetic, as the page says."""
    sizes = re.findall(r"^\| `--size (\w+)` \| ([\d,]+) \| ([\d.]+) ", PAGES["docs/speed.md"], re.M)
    rows = []
    for size, parameters, flop in sizes[1:]:
        size_mb = 4 * int(parameters.replace(",", "")) / 1e6
        update = max(14, float(flop) / (0.35 * 0.989))  # ms, TFLOP at 35% of 989 TFLOP/s
        row = [size, f"{size_mb:,.0f}", f"{update:.0f}"]
        ring = lambda n, rate, wait, mb=size_mb: 2 * (n - 1) / n * mb / rate + wait
        for message, text in ((ring(8, 400, 0.05), "{:.1f}"), (ring(16, 12.5, 0.1), "{:.0f}")):
            row += [text.format(message), f"{update / (update + message):.0%}"]
        rows.append(f"| {' | '.join(row)} |")
    assert len(rows) == 6 and "\n".join(rows) in PAGES["docs/distributed.md"]


def test_first_page():
    """The first page is short."""
    assert len(README.splitlines()) <= 230


def test_equations_are_found():
    """`grep "Eq. n"` finds each equation, also in every function of the README's table."""
    rows = re.findall(r"^\| ([\d, ]+) \| [^|]+ \| (`[^|]+) \|$", README, re.MULTILINE)
    assert [int(n) for numbers, _ in rows for n in numbers.split(",")] == list(range(1, 12))
    for numbers, places in rows:
        cited = ""
        for place in re.findall(r"`([\w.]+)`", places):
            item = functools.reduce(getattr, place.split("."), dreamer_v3)
            source = inspect.getsource(item)
            assert re.search(rf"Eq\. ({numbers.replace(', ', '|')})\b", source), (numbers, place)
            cited += source
        for n in numbers.split(", "):
            assert re.search(rf"Eq\. {n}\b", cited), n


def test_metrics_are_explained(tmp_path):
    """Each metric that a run writes is in the README's table, and none else."""
    written = set()
    for case in ("sensors", "box"):
        settings = dict(env_kwargs=json.dumps({"case": case}), eval_episodes=1, report_every=10)
        run = short_run(dreamer_v3, tmp_path / case, env_id="TestSpaces-v0", **settings)
        written = written.union(*read_metrics(run)) - {"step", "time"}
    rows = PAGES["docs/metrics.md"].splitlines()
    listed = {name for row in rows for name in re.findall(r"`([\w./<>]+)`", row.split(" | ")[0])}
    # A <name> is that of an observation: obs, or obs/... for one of several.
    patterns = [name.replace("obs/<name>", "<name>") for name in listed]
    patterns = [name.replace("<name>", r"obs(/\w+)?") for name in patterns]
    for name in written:
        assert any(re.fullmatch(x, name) for x in patterns), f"{name} is not explained"
    for name in patterns:
        assert any(re.fullmatch(name, x) for x in written), f"{name} is not written"
    assert {"losses/obs/grey", "dreams/obs/grey", "dreams/obs", "behaviour/return"} <= written


def test_readme_table_of_hyperparameters():
    """Its defaults are those of Args, and every hyperparameter after --size is in it."""
    rows = re.findall(r"^\| `--([\w-]+)` \| (\S+) \|", PAGES["docs/algorithm.md"], re.MULTILINE)
    table = {flag.replace("-", "_"): default for flag, default in rows}
    defaults = {field.name: str(field.default) for field in fields(Args)}
    assert table == {name: defaults[name] for name in table}
    names = list(defaults)
    expected = set(names[names.index("stoch") :]) | {"size", "train_ratio", "batch_size"}
    assert expected <= set(table)


def test_details_are_numbered_alike():
    """Every [Dn] of the README stands in the code, and the other way round."""
    listed = set(re.findall(r"^\| D(\d+) \|", PAGES["docs/algorithm.md"], re.MULTILINE))
    tagged = set(re.findall(r"\[D(\d+)\]", SOURCE.split('"""', 2)[2]))
    assert listed == tagged == {str(i) for i in range(1, 26)}


def test_help_explains_every_flag(capsys):
    """--help has a text for every flag."""
    with pytest.raises(SystemExit) as caught:
        tyro.cli(Args, args=["--help"])
    text = capsys.readouterr().out
    assert caught.value.code == 0
    for field in fields(Args):
        flag = f"--{field.name.replace('_', '-')}"
        after = text.split(f" {flag} ", 1)[-1] if f" {flag} " in text else text.split(flag, 1)[1]
        assert re.search(r"[A-Z][^│]{8}", after.split("(default", 1)[0]), flag


def test_no_code_at_import_and_docstrings():
    """Importing prints nothing; every public class and function says what it does."""
    command = [sys.executable, "-c", "import dreamer_v3"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    kinds = (ast.FunctionDef, ast.ClassDef)
    for node in ast.walk(ast.parse(SOURCE)):
        if isinstance(node, kinds) and not node.name.startswith("_"):
            inner = node.name in ("forward", "backward", "linear")
            assert inner or ast.get_docstring(node), f"{node.name} has no docstring"
