#!/usr/bin/env bash
# First look at the CUDA path, in the project's root, 37 minutes at most:
#     bash results/gpu_first_minutes.sh [env exact vector image run]
# Each stage prints its exit status, its seconds and its last lines; a failure stops nothing.
# The lent machine lacks packages: download gymnasium, farama-notifications, tyro, docstring-parser, typeguard and ale-py as its
# README says (Python 3.12), carry .whl, install them first in each call. A call has 600 s, so take four, less than 30 s apart:
# `env exact` (580 s at most), `vector` (460), `image` (560), `run` (570). The whole logs come back as one file in $OUT.
[ -f dreamer_v3.py ] || { echo "run this where dreamer_v3.py is"; exit 1; }
export PY=${PYTHON:-python3} T=$(mktemp -d) PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 PYTHONWARNINGS=ignore
want=" ${*:-env exact vector image run} " bench=(-c 'import sys; sys.path.insert(0, "results"); import benchmark as b; b.benchmark(b.parse(), 15)')
stage() {  # name, limit in seconds, command: prints its exit status, duration and last lines; a failure stops nothing
  [[ $want == *" ${1%%_*} "* ]] || return; local start=$SECONDS
  timeout -k 5 "$2" "${@:3}" >"$T/$1.log" 2>&1; echo "== $1: exit $?, $((SECONDS - start)) s"
  tr '\r' '\n' <"$T/$1.log" | grep -v '^$' | tail -n 26 | cut -c1-220
  cat "$T/$1.log" >>"${OUT:-$T}/log"
}
cat >"$T/check.py" <<'PYTHON'
import sys, time, traceback, numpy as np, torch, dreamer_v3 as d
image, dtype, cuda = sys.argv[1] == "image", getattr(torch, sys.argv[2]), torch.device("cuda")
torch.backends.cudnn.deterministic = True  # otherwise its gradients need not repeat bit by bit
spaces, args = d.Spaces((("obs", 3),), (), (9,), 9) if image else d.Spaces((), (("obs", 4, ()),), (2,), 2), d.Args(size="12m" if image else "1m", warmup_updates=0)
def check(name, f):
    try: good, text = f()
    except Exception: good, text = False, "".join(traceback.format_exc(limit=-3)[-900:])
    print("ok  " if good else "FAIL", name, text, flush=True)
def arrays(i):
    r, s, n, a = np.random.default_rng(i), (args.batch_size, args.batch_length + 1), args.network(), spaces.action_width
    b = {"obs": r.integers(0, 256, (*s, 64, 64, 3), np.uint8) if image else r.normal(size=(*s, 4)).astype("f4")}
    b |= {"action": np.eye(a, dtype="f4")[r.integers(0, a, s)], "reward": r.normal(size=s).astype("f4"), "deter": r.uniform(-1, 1, (s[0], n["deter"])).astype("f2")}
    b = {k: x if k == "deter" else x[:, 1:] for k, x in (b | {k: r.random(s) < 0.02 for k in ("is_first", "is_last", "is_terminal")}).items()}
    return b | {"prev_action": b.pop("action"), "stoch": r.integers(0, n["classes"], (s[0], args.stoch), np.uint8)}
def update(a, i): return a.train_step(d.to_device(arrays(i), a.device))
def agent(compile, device=cuda, graphs=None): torch.manual_seed(0); return d.Agent(d.replace(args, compile=compile, cudagraphs=compile if graphs is None else graphs), spaces, device, dtype)
def losses(a, n): return [{k: float(v) for k, v in update(a, i)[0].items() if k[:6] == "losses" and "clip" not in k} for i in range(n)]
def gap(x, y): return np.max([abs(a[k] - b[k]) / (abs(b[k]) + 0.01) for a, b in zip(x, y) for k in b])  # np.max: nan counts
def exact():  # float32, the most likely classes for samples: CPU, GPU, compiled and captured must agree
    d.sample_one_hot, a, b = lambda probs, uniform: d.one_hot(probs.argmax(-1), probs.shape[-1]) + (probs - probs.detach()), agent(False), d.to_device(arrays(0), cuda)
    a.train_step(b); torch.cuda.set_sync_debug_mode("error")
    check("an update never waits for the host", lambda: (a.train_step(b), "")); torch.cuda.set_sync_debug_mode("default")
    eager = losses(agent(False), 8); check("3 updates, GPU beside CPU: gap", lambda: ((x := gap(losses(agent(False, "cpu"), 3), eager)) < 5e-3, x))
    check("captured, not compiled, beside eager: gap", lambda: ((x := gap(losses(agent(False, graphs=True), 8), eager)) < 5e-3, x))
    check("compiled, not captured, beside eager: gap", lambda: ((x := gap(losses(agent(True, graphs=False), 8), eager)) < 5e-3, x))
    def gradients(a): kept, step = [], a.optimizer.step; a.optimizer.step = lambda grads: kept.extend(x.double().clone() for x in grads) or step(grads); update(a, 0); return kept
    one, two = gradients(agent(True)), gradients(agent(False)); least = 1e-6 * max(x.norm() for x in two)  # below it, rounding errors
    check("gradient of each tensor, compiled beside eager: gap", lambda: ((x := np.max([((p - q).norm() / (q.norm() + least)).item() for p, q in zip(one, two, strict=True)])) < 0.01, x))
    check("compiled, captured beside eager: gaps", lambda: (np.max(g := (gap((x := losses(agent(True), 8))[:3], eager), gap(x[3:], eager[3:]))) < 5e-3, g))
def production():  # as in a run: compiled, captured, sampled
    g, start, b = agent(True), time.time(), d.to_device(arrays(0), cuda); state = lambda: [*g.model.state_dict().values(), *g.optimizer.state]
    check("6 updates near eager ones, other samples", lambda: ((x := gap(losses(g, 6), losses(agent(False), 6))) < 0.3, f"{x:.2f}, {time.time() - start:.0f} s"))
    mirrored = lambda: [torch.equal(x[:60], x[-60:].flip(0)) for x in g.model.parameters() if len(x) == 255]  # all that heads of bins have
    check("bins that no target came near are mirror images", lambda: (len(x := mirrored()) == 6 and all(x), x)); check("replays differ", lambda: (not torch.equal(g.train_step(b)[2], g.train_step(b)[2]), ""))
    def replays(kept=[x.clone() for x in state()], rng=torch.cuda.get_rng_state()):
        [x.copy_(y) for x, y in zip(state(), kept)]; torch.cuda.set_rng_state(rng)
        return [x.clone() for x in torch.utils._pytree.tree_leaves([update(g, i) for i in range(3)]) + state()]
    check("replays repeat bit by bit", lambda: (all(x := [torch.equal(*p) for p in zip(replays(), replays())]), f"{sum(x)} of {len(x)} tensors"))
    def imagined(n=1024):  # what a captured, compiled step draws beside its probabilities, in standard errors
        m, w = g.model, g.model.rssm.layers(); step = d.CudaGraph(lambda *x: m.imagine_step(*x, w)[:2]); x = [step(*g.initial(n)) for _ in range(20)][4:]
        p = d.mixed_probs(m.rssm.prior(x[-1][0][:1]), args.unimix)[0].double(); f = torch.stack([y[1] for y in x]).double().mean((0, 1))
        return (z := ((f - p) / (p * (1 - p) / (16 * n)).sqrt()).abs().max().item()) < 5.5 and not torch.equal(x[0][1], x[1][1]), z
    check("frequencies of imagined samples", torch.no_grad()(imagined)); used, host = torch.cuda.memory_allocated, arrays(0); g.train_step(b); before = used()
    def ms(f, n=30): f(); torch.cuda.synchronize(); t = time.perf_counter(); [f() for _ in range(n)]; torch.cuda.synchronize(); return round(1e3 * (time.perf_counter() - t) / n, 2)
    graph, obs = next(iter(g.train_step.graphs.values()))[0], {k: b[k][:1, 0] for k in ("obs", "is_first")}; [g.act(obs, g.initial(1)) for _ in range(5)]
    calls = dict(replay=graph.replay, train_step=lambda: g.train_step(b), to_device=lambda: d.to_device(host, cuda), act=lambda: g.act(obs, g.initial(1))[2].cpu())
    check("milliseconds; memory:", lambda: (x := {k: ms(f) for k, f in calls.items()}, f"{x} +{used() - before} bytes, peak {torch.cuda.max_memory_allocated() / 1e9:.2f} GB"))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as prof: graph.replay(); torch.cuda.synchronize()
    rows = sorted(((e.self_device_time_total / 1e3, e.count, e.key[:90]) for e in prof.key_averages() if e.self_device_time_total), reverse=True)
    print(sum(r[1] for r in rows), f"kernels, {sum(r[0] for r in rows):.2f} ms busy", *("%6.2f ms %5d x %s" % r for r in rows[:12]), sep="\n  ")
exact() if dtype == torch.float32 else production()
PYTHON
stage env 60 $PY -c 'import torch, triton, dreamer_v3 as d; print(torch.__version__, triton.__version__, torch.cuda.get_device_name()); torch.compile(torch.sin)(torch.zeros(8, device="cuda")); print("torch.compile works")'
stage exact 220 $PY "$T/check.py" vector float32; stage exact_image 300 $PY "$T/check.py" image float32
stage vector 220 $PY "$T/check.py" vector bfloat16; stage vector_speed 240 $PY "${bench[@]}" --env-id CartPole-v1 --size 1m
stage image 280 $PY "$T/check.py" image bfloat16; stage image_speed 280 $PY "${bench[@]}" --env-id ALE/MsPacman-v5
stage run 320 bash -c 'r="--run-dir $T/runs --env-id CartPole-v1 --size 1m --num-envs 4 --train-ratio 512 --eval-every 1500 --eval-episodes 8 --report-every 1500 --save-every 500"; $PY dreamer_v3.py $r --total-timesteps 2500 | tail -6
  again="timeout -s KILL 60 $PY dreamer_v3.py --resume $(echo $T/runs/*) --total-timesteps 900000"; $again | tail -2; ${again/KILL/INT} | tail -3; tail -n 1 $T/runs/*/metrics.jsonl'
stage run_more 250 bash -c '$PY dreamer_v3.py --evaluate $T/runs/* --eval-episodes 8 | tail -2
  $PY dreamer_v3.py --run-dir $T/one --env-id CartPole-v1 --size 1m --torch-deterministic --train-ratio 512 --total-timesteps 1500 --eval-episodes 8 | tail -4'
