"""Tests of the scripts in results/; part of `python -m pytest -q` in the project's root."""

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import tyro
from test_dreamer_v3 import (
    HERE, PAGES, README, Args, Spaces, close, dreamer_v3, fill_parameter, inputs, load_module,
    make_agent, read_metrics, short_run, tiny,
)  # fmt: skip


def test_results_script(tmp_path):
    """A run becomes a curve, and a command that is the same run; tables and figure are made."""
    for name in ("README.md", "dreamer_v3.py"):
        shutil.copy(HERE / name, tmp_path / name)
    for name in ("results", "docs"):
        shutil.copytree(HERE / name, tmp_path / name)
    page = tmp_path / "results/README.md"

    def make(*words):
        """Run the script."""
        command = [sys.executable, "results/make.py", *map(str, words)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    before = page.read_text()
    make("tables")
    assert (tmp_path / "README.md").read_text() == README and page.read_text() == before
    changes = dict(num_envs=2, seed=7, action_repeat=2, async_envs=True, cudagraphs=False)
    changes |= dict(eval_episodes=2, gamma=0.9, env_id="CartPole-v1", total_timesteps=60)
    run = short_run(dreamer_v3, tmp_path / "runs", **changes)
    for _ in range(2):  # it is added once, not twice
        make("add", run, "--commit", "abc", "--hardware", "a machine")
    entries = json.loads((tmp_path / "results/cartpole.json").read_text())
    (entry,) = (entry for entry in entries if entry["commit"] == "abc")
    lines = [line for line in read_metrics(run) if "charts/episodic_return" in line]
    assert entry["xs"] == [2 * line["step"] for line in lines] and len(lines) > 1
    close(entry["ys"], [line["charts/episodic_return"] for line in lines], atol=1e-4)
    expected = dict(task="cartpole", seed=7, steps=60, frames=120, asked=60, hardware="a machine")
    assert expected.items() <= entry.items()
    ((frame, mean, _, episodes),) = entry["evaluations"]
    assert (frame, episodes) == (120, 2) and mean > 0 and entry["updates"] > 0
    words = shlex.split(entry["command"])
    assert words[:2] == ["python", "dreamer_v3.py"]
    args = dreamer_v3.load_checkpoint(run / "checkpoint.pt")["args"]
    assert tyro.cli(Args, args=words[2:]) == replace(args, run_dir="runs")
    make("tables")
    assert entry["command"].replace(" --seed 7", "") in page.read_text()
    if importlib.util.find_spec("matplotlib"):  # pip install matplotlib
        make("plot", run, run, "--out", tmp_path / "plot.png")
        assert (tmp_path / "plot.png").stat().st_size > 10_000
        (tmp_path / "results/curves.png").unlink()
        make("figures")
        assert (tmp_path / "results/curves.png").stat().st_size > 10_000


def test_results_against_the_authors(monkeypatch):
    """Frames are put into the authors' bins, tasks get the authors' names."""
    make = load_module(HERE / "results/make.py", monkeypatch)
    names = {
        "ALE/MsPacman-v5": "atari_ms_pacman",
        "ALE/UpNDown-v5": "atari_up_n_down",
        "ALE/KungFuMaster-v5": "atari_kung_fu_master",
        "shimmy:dm_control/ball_in_cup-catch-v0": "dmc_ball_in_cup_catch",
        "my-vehicle-v3": "my_vehicle",
    }
    assert {name: make.task_name(name) for name in names} == names
    xs, ys = [1, 10_000, 10_001, 25_000, 40_000, 999_999], [1.0, 3.0, 5.0, 7.0, 9.0, 11.0]
    assert make.binned(xs, ys, 50_000) == [2.0, 5.0, 7.0, 9.0, None]
    # Sampled evaluations stand in for training episodes where none ended, up to a full span.
    points = [[16_000, 1.0, 0.5, 4], [20_000, 2.0, 0.5, 4], [24_000, 9.0, 0.5, 4]]
    run = dict(xs=[], ys=[], sampled=True, frames=25_000, evaluations=points)
    assert list(make.returns(run)) == [(16_000, 20_000), (1.0, 2.0)]
    assert make.returns(run | dict(sampled=False)) == ([], [])
    assert make.returns(run | dict(frames=15_000)) == ([], [])
    assert make.returns(run | dict(xs=[5], ys=[3.0])) == ([5], [3.0])


def test_side_by_side(tmp_path, monkeypatch):
    """A run of ours and one of theirs become curves with minutes and provenance, each once."""
    make = load_module(HERE / "results/make.py", monkeypatch)
    make.HERE = tmp_path
    shutil.copy(HERE / "results/random.json", tmp_path)
    settings = dict(env_id="CartPole-v1", seed=7, total_timesteps=60, eval_episodes=2)
    ours, theirs = short_run(dreamer_v3, tmp_path / "runs", **settings), tmp_path / "theirs/log"
    theirs.mkdir(parents=True)
    (theirs / "config.yaml").write_text("logdir: x\nseed: 4\n")
    lines = {"step": 10, "episode/score": 9.0}, {"step": 20}, {"step": 30, "episode/score": 15.0}
    (theirs / "scores.jsonl").write_text("\n".join(map(json.dumps, lines)))
    watched = '{"cpu": 60, "step": 10}\n{"cpu": 90, "step": 20}\n{"cpu": 120, "step": 20}\n'
    (theirs.parent / "cpu.jsonl").write_text(watched + '{"cpu": 180, "step": 40}\n')
    for _ in range(2):
        make.beside("cartpole", [ours], "abc", "one core of ours")
        make.beside("cartpole", [theirs], "def", "one core of theirs")
    other, curve = json.loads((tmp_path / "side_by_side.json").read_text())
    expected = dict(task="cartpole", method="authors", seed=4, commit="def", xs=[10, 30])
    assert expected.items() <= other.items() and other["ys"] == [9.0, 15.0]
    assert other["minutes"] == [1.0, 2.25] and "greedy" not in other  # between 90 and 180 s
    lines = read_metrics(ours)
    episodes = [line for line in lines if "charts/episodic_return" in line]
    assert curve["xs"] == [line["step"] for line in episodes] and len(episodes) > 1
    close(curve["ys"], [line["charts/episodic_return"] for line in episodes], atol=1e-2)
    close(curve["greedy"], lines[-1]["eval/episodic_return"], atol=1e-2)
    assert curve["seed"] == 7 and "minutes" not in curve
    rows = "\n".join(make.table_provenance())
    assert "| 4 | def | one core of theirs |" in rows and "| 7 | abc | one core of ours |" in rows
    theirs = make.table_beside()[-3]  # the fifths of 60 steps, each with one episode or none
    assert "| 1 | 9 |  | 15 |  |  |" in theirs


def test_fifths_that_are_apart(monkeypatch):
    """Shares by enumeration; the pages say in how many fifths they are 0.1 or less."""
    make = load_module(HERE / "results/make.py", monkeypatch)
    known = {((1, 2, 3), (6, 5, 4)): 0.1, ((1, 2, 4), (3, 5, 6)): 0.2, ((2, 1), (5, 6, 7)): 0.1}
    for (ours, theirs), share in known.items():
        assert make.by_chance(np.array(ours), np.array(theirs)) == share
    shares = [row.split(" | ")[4:8] for row in make.table_beside() if "*by chance*" in row]
    count, apart = 4 * len(shares), sum(float(x) <= 0.1 for row in shares for x in row)
    sentence = r"in (none|\d+) of (\d+) fifths"
    for page in ("README.md", "results/README.md"):
        said = re.search(sentence, " ".join(PAGES[page].split()))
        assert said.groups() == (str(apart or "none"), str(count)), page
    page = " ".join(PAGES["results/README.md"].split())
    assert count / 10 == float(re.search(r"Chance alone makes ([\d.]+)\. ", page)[1])


def test_benchmark(tmp_path, monkeypatch, capsys):
    """The last line is the JSON object; the arithmetic grows with the batch."""
    monkeypatch.chdir(tmp_path)
    benchmark = load_module(HERE / "results/benchmark.py", monkeypatch).benchmark
    results = {}
    for size in (2, 4):
        args = tiny(env_id="CartPole-v1", batch_size=size, dtype="float32")
        results[size] = benchmark(args, seconds=0.1)
        assert json.loads(capsys.readouterr().out.splitlines()[-1]) == results[size]
    result = results[2]
    assert result["update_ms_min"] <= result["update_ms"] <= result["update_ms_max"]
    agent = make_agent(Spaces((), (("obs", 4, ()),), (2,), 2))
    assert result["params"] == sum(p.numel() for p in agent.params)
    assert results[4]["flops_per_update"] == 2 * result["flops_per_update"] > 1e6
    names = "updates_per_s act_ms env_steps_per_s peak_share peak_memory_mb warmup_s".split()
    assert all(result[name] > 0 for name in names)
    assert (result["device"], result["dtype"], result["size"]) == ("cpu", "float32", "1m")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform != "linux", reason="the script needs Linux")
def test_benchmark_of_others(monkeypatch, capsys):
    """Our update on synthetic steps has the parameters that the page names; wrong folders."""
    script = load_module(HERE / "results/benchmark_others.py", monkeypatch)
    monkeypatch.setattr(dreamer_v3.Agent, "compile", lambda self: None)
    monkeypatch.setattr(script, "B", 2)
    monkeypatch.setattr(script, "T", 4)
    for kind, parameters in ("vector", 637_381), ("image", 686_843):
        words = ["ours", kind, "1m", "float32", "--updates", "2"]
        monkeypatch.setattr(sys, "argv", ["benchmark_others.py", *words])
        script.main()
        result = json.loads(capsys.readouterr().out)
        assert (result["kind"], result["parameters"]) == (kind, parameters)
        assert result["keep_memory"] and result["threads"] == len(os.sched_getaffinity(0))
        assert len(result["seconds"]) == 2 and min(result["seconds"]) > 0
    update, _ = script.ours("vector", "1m", "float32")
    (deter, stoch), losses = update()
    assert deter.shape == (2, 4, 512) and stoch.shape == (2, 4, 32)
    assert np.isfinite(losses["losses/total"]) and update()[1] != losses
    other = ["r2dreamer", *words[1:], "--keep-memory", "--folder"]
    refused = "is not a checkout of r2dreamer"
    for wrong, message in (
        ([*other, "."], refused), ([*other, "missing"], refused), ([*words, "--compile"], "always")
    ):  # fmt: skip
        monkeypatch.setattr(sys, "argv", ["benchmark_others.py", *wrong])
        with pytest.raises(SystemExit, match="2"):
            script.main()
        assert message in capsys.readouterr().err


def test_parity_table():
    """The script's table is that of docs/tests.md, but for the last digits; all is below 1e-10."""
    command = [sys.executable, "results/parity/compare.py"]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [row for row in done.stdout.splitlines() if row in PAGES["docs/tests.md"] or "e-" in row]
    assert len(rows) == 12
    for row in rows[2:]:
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert f"| {cells[0]} | {cells[1]} |" in PAGES["docs/tests.md"]
        numbers = [float(cell) for cell in cells[2:] if cell]
        assert len(numbers) >= 2 and max(numbers) < 1e-10


def test_parity_script_refuses_other_folders(tmp_path):
    """A folder that is missing, another one, and another commit: one line each, exit status 2."""
    script = HERE / "results/parity/make.py"

    def refused(folder):
        """What the script says."""
        command = [sys.executable, script, folder, "--check"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 2 and not done.stdout
        assert done.stderr.startswith("make.py: error: ") and done.stderr.count("\n") == 1
        return done.stderr

    for folder in (tmp_path / "missing", tmp_path):
        assert "is not a checkout of github.com/danijar/dreamerv3" in refused(folder)
    (tmp_path / "dreamerv3").mkdir()
    (tmp_path / "dreamerv3/agent.py").touch()
    git = ["git", "-C", tmp_path, "-c", "user.name=x", "-c", "user.email=x@x"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "another"]):
        subprocess.run([*git, *words], check=True)
    assert "is not at commit e3f0224" in refused(tmp_path)


def test_parity_script(monkeypatch):
    """Without JAX: its formula is that of the tests, its files are those here, it sees changes."""
    make = load_module(HERE / "results/parity/make.py", monkeypatch)
    make.np = np
    for case in ("B", "C", "D"):
        obs, action, _, shape = make.CASES[case]
        theirs, ours = make.inputs(obs, action, *shape), inputs(case, *shape)
        for name, x in ours.items():
            x = x.argmax(-1) if x.ndim == theirs[name].ndim + 1 else x
            assert (x.numpy() == theirs[name]).all(), name
    for name, shape in {"dyn/dyngru/kernel": (4, 8, 24), "val/head/logits/bias": (255,)}.items():
        assert (make.fill(name, np.empty(shape)) == fill_parameter(name, shape).numpy()).all()
    for file in (HERE / "results/parity").glob("*.json"):
        stored = json.loads(file.read_text())
        assert make.text(stored, file.stem) == file.read_text()
        assert make.largest_difference(stored, json.loads(file.read_text()))[0] == 0
    old = {"a": [2.0, 0.0, "1"], "b": 3}
    for new, difference in (
        ({"a": [2.0 + 2e-8, 0.0, "1"], "b": 3}, 1e-8),
        ({"a": [2.0, 0.0, "2"], "b": 3}, np.inf),
        ({"a": [2.0, np.nan, "1"], "b": 3}, np.inf),
        ({"a": [2.0, 0.0], "b": 3}, np.inf),
        ({"a": [2.0, 0.0, "1"], "b": 4}, np.inf),
    ):
        found, where = make.largest_difference(new, old)
        close(found, difference, rtol=1e-6)
        assert where


def test_random_returns(tmp_path, monkeypatch):
    """Uniform actions of both kinds: the returns that are known of CartPole and Pendulum."""
    make = load_module(HERE / "results/make.py", monkeypatch)
    make.HERE = tmp_path
    make.RANDOM = {task: make.RANDOM[task] for task in ("cartpole", "pendulum")}
    make.random_returns(episodes=60)
    result = json.loads((tmp_path / "random.json").read_text())
    assert 18 < result["cartpole"]["mean"] < 28 and result["cartpole"]["solved"] == 475
    assert -1400 < result["pendulum"]["mean"] < -1050 and result["pendulum"]["solved"] is None


def test_random_beside_a_run(monkeypatch):
    """A run stands beside uniform actions of its own action repeat, also if a preset sets that."""
    make = load_module(HERE / "results/make.py", monkeypatch)
    chance = {name: dict(env_id="E-v0", action_repeat=2, mean=5.0) for name in ("f", "e", "e_one")}
    chance["f"] |= dict(env_id="F-v0", mean=9.0)
    chance["e_one"] |= dict(action_repeat=1, mean=3.0)
    flags = {"--preset dmc_proprio": "5", "--action-repeat 2": "5", "--size 1m": "3"}
    flags |= {"--preset cpu": "3", "--preset dmc_proprio --action-repeat 1": "3"}
    flags["--action-repeat 4"] = ""
    for command, shown in flags.items():
        assert make.at_random(chance, "e", {"command": f"python x.py {command}"}) == shown


def test_watch(tmp_path):
    """CPU seconds of a process, beside the last whole line of its log."""
    log, out = tmp_path / "log.jsonl", tmp_path / "cpu.jsonl"
    log.write_text('{"step": 3}\n{"step": 7}\n{"st')
    code = "import time\nwhile time.process_time() < 1: pass\ntime.sleep(6)"
    with subprocess.Popen([sys.executable, "-c", code]) as process:
        time.sleep(4)
        command = [sys.executable, HERE / "results/watch.py", str(process.pid), log, out]
        watch = subprocess.Popen(command)
        process.wait()
    watch.wait(timeout=30)
    (line,) = map(json.loads, out.read_text().splitlines())
    assert line["step"] == 7 and 0.9 < line["cpu"] < 3


def test_dreams(tmp_path):
    """Film and strip of a run from pixels."""
    pytest.importorskip("PIL", reason="pip install pillow")
    settings = dict(env_id="TestPainted-v0", pixels=True, batch_length=6, total_timesteps=80)
    run = short_run(dreamer_v3, tmp_path, **settings)
    module = load_module(HERE / "results/dreams.py", pytest.MonkeyPatch())
    module.SEEN = 2
    truth, model = module.foresee(run, 0)
    assert truth.shape == model.shape == (6, 64, 64, 3)
    truth, model = np.zeros((2, 6, 64, 64, 3), np.uint8)
    model[:2], model[3], model[5] = 99, 4, 16  # what is observed does not count
    assert module.error(truth, model) == (5, 3)
    assert module.panel((truth[0], model[0]), 0, "observes").size == (3 * 3 * 64, 3 * 64 + 34)
