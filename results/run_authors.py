"""The authors' code, unchanged, on a Gymnasium environment: for the comparison in README.md here.

    python results/run_authors.py FOLDER Acrobot-v1 4 -- --logdir OUT --seed 1 --configs size1m ...

FOLDER is a checkout of danijar/dreamerv3 at commit e3f0224, with the packages it needs; 4 is the
action repeat. What follows `--` is their command line. Returns of training episodes land in
OUT/scores.jsonl. An episode that is cut off is not terminal, as in dreamer_v3.py.
"""

import importlib
import sys

import gymnasium as gym
import numpy as np


def main():
    """The command line."""
    (folder, env_id, repeat), theirs = sys.argv[1:4], sys.argv[5:]
    sys.path.insert(0, folder)
    elements, embodied, program = map(
        importlib.import_module, ("elements", "embodied", "dreamerv3.main")
    )
    space = elements.Space

    class Adapter(embodied.Env):
        """A Gymnasium environment behind their interface."""

        def __init__(self, seed):
            self.env, self.seed, self.ended = gym.make(env_id), seed, True
            inside, self.discrete = self.env.action_space, hasattr(self.env.action_space, "n")
            choices = space(np.int32, (), 0, int(inside.n)) if self.discrete else None
            action = choices or space(np.float32, inside.shape, inside.low, inside.high)
            self.act_space = {"action": action, "reset": space(bool)}
            flags = dict.fromkeys(("is_first", "is_last", "is_terminal"), space(bool))
            vector = space(np.float32, self.env.observation_space.shape)
            self.obs_space = {"vector": vector, "reward": space(np.float32)} | flags

        act_space = obs_space = None  # theirs are properties

        def step(self, action):
            """Reset where they ask for it, or one agent step."""
            reward, first, terminal = 0.0, bool(action["reset"]) or self.ended, False
            if first:
                (obs, _), self.seed, self.ended = self.env.reset(seed=self.seed), None, False
            for _ in range(0 if first else int(repeat)):
                chosen = int(action["action"]) if self.discrete else action["action"]
                obs, more, terminal, truncated, _ = self.env.step(chosen)
                reward, self.ended = reward + more, terminal or truncated
                if self.ended:
                    break
            flags = dict(is_first=first, is_last=self.ended, is_terminal=terminal)
            return flags | {"vector": np.float32(obs), "reward": np.float32(reward)}

    def make_env(config, index, **_):
        """In place of theirs, which knows no Gymnasium environments."""
        return program.wrap_env(Adapter(1000 * (config.seed + 1) + index), config)

    program.make_env = make_env
    program.main(theirs)


if __name__ == "__main__":
    main()
