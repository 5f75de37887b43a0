"""How near this file's numbers are to the authors': a table of the largest relative differences.

    python results/parity/compare.py

A case is a kind of observation and action, with networks and inputs filled by a formula. The
authors' numbers are in the JSON files beside this script. Everything is computed in float64, with
the most likely classes in place of samples. A gradient, and a state, is compared by its norm and by
its product with a fixed vector, both relative to the norm.
"""

import functools
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
import test_dreamer_v3 as t  # noqa: E402

CASES = {
    "B": "image; discrete action",
    "B1m": "the same at size 1m",
    "C": "vectors, discrete; continuous actions",
    "Cm": "the same, actions at the mean",
    "D": "image and vector; discrete action",
}


def relative(ours, theirs):
    """|ours - theirs| / |theirs|."""
    return abs(float(ours) - float(theirs)) / abs(float(theirs))


def sums(ours, theirs):
    """The largest difference of [norm, product] pairs, relative to the norms."""
    pairs = ours.values() if isinstance(ours, dict) else [ours]
    theirs = zip(theirs[::2], theirs[1::2], strict=True)
    return max(
        max(abs(a[0] - norm), abs(a[1] - dot)) / norm
        for a, (norm, dot) in zip(pairs, theirs, strict=True)
    )


def updates(case, run, golden):
    """Differences of the losses and gradients of a first update, and of the totals of three."""
    agent = t.official_agent(case, run, warmup_updates=0)
    batch = t.official_batch(case, run, agent.model)
    total, metrics, _, _ = agent.loss(batch)
    grads = torch.autograd.grad(total, agent.params)
    losses = {name[7:]: x for name, x in metrics.items() if name[:7] == "losses/"}
    names = {t.LOSSES.get(name, name): name for name in losses}
    loss = max(relative(losses[names[name]], x) for name, x in golden["loss"].items())
    params = t.official_params(agent.model, t.SPACES[case])
    trained = [name for name, p in params.items() if p.requires_grad]
    gradient = sums(t.checksums(dict(zip(trained, grads, strict=True))), golden["grad"])
    if case == "Cm":
        return loss, gradient, None
    agent, three = t.official_agent(case, run, warmup_updates=0), 0.0
    batch = t.official_batch(case, run, agent.model)
    wanted = golden["total"][:1] + golden["warmup0"]["total"]
    for i in range(3):
        step = functools.partial(agent.train_step, batch)
        metrics, _, _ = t.step_as_authors(step, agent.optimizer, i, 4e-5, 0)
        three = max(three, relative(metrics["losses/total"], wanted[i]))
    params = t.official_params(agent.model, t.SPACES[case])
    return loss, gradient, max(three, sums(t.checksums(params), golden["warmup0"]["params"]))


def acting(case):
    """The largest difference of the state in five decisions."""
    agent, steps = t.official_agent(case), t.inputs(case, 2, 6)
    carry, largest = agent.initial(2), 0.0
    for i, (deter, _, _) in enumerate(t.ACTING[case]):
        obs = {key: x[:, i] for key, x in steps.items()}
        carry = agent.act(obs | {"is_first": torch.tensor([i == 0, i in (0, 3)])}, carry)
        largest = max(largest, sums(t.checksum(carry[0]), deter))
    return largest


def main():
    """Print the table."""
    torch.set_default_dtype(torch.float64)
    print("| case | start | losses | gradients | three updates | five decisions |")
    print("| --- | --- | --- | --- | --- | --- |")
    show = lambda x: "" if x is None else f"{x:.0e}"
    with pytest.MonkeyPatch.context() as patch:
        most_likely = lambda probs, uniform: (
            t.one_hot(probs.argmax(-1), probs.shape[-1]) + (probs - probs.detach())
        )
        patch.setattr(t.dreamer_v3, "sample_one_hot", most_likely)
        for case, text in CASES.items():
            for run, golden in t.PARITY[case].items():
                t.set_normal_noise(patch, 0.0 if case == "Cm" else -0.5)
                row = updates(case, run, golden)
                t.set_normal_noise(patch, 0.0)
                decisions = acting(case) if run == "zero" and case in t.ACTING else None
                start = {"zero": "zeros", "carry": "a carried state"}[run]
                print(f"| {text} | {start} |", " | ".join(map(show, (*row, decisions))), "|")


if __name__ == "__main__":
    main()
