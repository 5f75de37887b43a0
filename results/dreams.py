"""A film and a strip of what a trained model imagines (pip install pillow).

    python results/dreams.py runs/RUN --out results/dream

Writes dream.gif and dream.png: the truth, the model's picture, and their difference. Prints the
root mean square of the difference, and after how many imagined steps it is above OFF. The model
observes the first steps of a sequence from the run's replay. From then on it imagines, with the
recorded actions. A label under each picture says which; a bar in its colour says it again.
"""

import argparse
import importlib
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import dreamer_v3  # noqa: E402

SEEN = 16  # steps that the model observes
OFF = 12  # of 255; a pole beside the true one makes about 20
ZOOM = 3
COLORS = {"observes": (0, 114, 178), "imagines": (213, 94, 0)}  # blue and vermilion: Okabe and Ito


def foresee(folder, seed):
    """Pictures of one sequence without an end: truth and model (T, 64, 64, 3) uint8."""
    args = replace(dreamer_v3.load_checkpoint(folder)["args"], resume=str(folder), compile=False)
    _, trainer, logger = dreamer_v3.open_run(args, torch.device("cpu"), torch.float32)
    logger.close()
    trainer.envs.close()
    torch.manual_seed(seed)
    agent, replay = trainer.agent, trainer.replay
    replay.online = replay.steps * replay.num_envs  # uniform draws only
    for _ in range(1000):
        batch, index = replay.sample()
        whole = ~batch["is_first"][:, 1:].any(1)
        if whole.any():
            break
    else:
        sys.exit("every sequence of the replay has an episode's end inside")
    steps = dreamer_v3.to_device(batch | replay.read_latents(index), agent.device)
    recon = dreamer_v3.open_loop(agent.model, steps, SEEN)
    name, row = agent.spaces.images[0][0], int(whole.argmax())
    model = np.rint(255 * recon[name][row].numpy()).astype(np.uint8)
    return batch[name][row][..., -3:], model[..., -3:]


def error(truth, model):
    """Root mean square of the difference in imagined steps, and the steps until it is above OFF."""
    rms = np.sqrt(np.square(truth.astype(float) - model).mean((1, 2, 3)))[SEEN:]
    return rms.mean(), int((np.append(rms, np.inf) > OFF).argmax())


def panel(images, step, label):
    """One step: truth, model and difference side by side, and a line of text under them."""
    image, draw = (importlib.import_module(f"PIL.{name}") for name in ("Image", "ImageDraw"))
    truth, model = (x.astype(int) for x in images)
    pictures = np.concatenate([truth, model, (model - truth) // 2 + 127], 1).astype(np.uint8)
    height, width = ZOOM * pictures.shape[0], ZOOM * pictures.shape[1]
    canvas = image.new("RGB", (width, height + 34), "white")
    resized = image.fromarray(pictures).resize((width, height), image.Resampling.NEAREST)
    canvas.paste(resized, (0, 0))
    pen = draw.Draw(canvas)
    pen.rectangle((0, height, width, height + 5), fill=COLORS[label])
    for i, text in enumerate(("truth", f"model {label}", "difference")):
        color = COLORS[label] if i == 1 else (0, 0, 0)
        pen.text((ZOOM * 64 * i + 6, height + 10), text, fill=color, font_size=16)
    pen.text((width - 62, height + 10), f"step {step}", fill=(0, 0, 0), font_size=16)
    return canvas


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("run")
    parser.add_argument("--out", default="dream")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    truth, model = foresee(args.run, args.seed)
    label = lambda t: "observes" if t < SEEN else "imagines"
    frames = [panel((truth[t], model[t]), t, label(t)) for t in range(len(truth))]
    film = [frame.quantize(128) for frame in frames]
    film[0].save(f"{args.out}.gif", save_all=True, append_images=film[1:], duration=120, loop=0)
    shown = [0, SEEN // 2, SEEN - 1, SEEN + 4, (len(truth) + SEEN) // 2, len(truth) - 1]
    image = importlib.import_module("PIL.Image")
    width, height = frames[0].size
    strip = image.new("RGB", (2 * width + 12, 3 * height + 24), "white")
    for i, t in enumerate(shown):
        strip.paste(frames[t], ((i % 2) * (width + 12), (i // 2) * (height + 12)))
    strip.save(f"{args.out}.png")
    rms, good = error(truth, model)
    print(
        f"{args.out}.gif, {args.out}.png: off by {rms:.1f} of 255, above {OFF} after {good} steps"
    )


if __name__ == "__main__":
    try:
        main()
    except ModuleNotFoundError as error:
        sys.exit(f"this needs {error.name}: pip install pillow")
