"""Images per second of this DCGAN beside a plain PyTorch one: `python benchmarks/bench_gan.py`.

Same architecture, batch, losses, optimizer and data resident in memory; PyTorch with channels last,
under bfloat16 autocast and in float32, in the environment that --torch-python names.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import turns

IMAGES = 1000  # random images to train on


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--widths", type=int, nargs=4, default=[512, 256, 128, 64])
    options.add_argument("--batch", type=int, default=64)
    options.add_argument("--steps", type=int, default=20, help="updates in one turn")
    options.add_argument("--torch-python", type=Path, default=turns.PEER)
    turns.taken(options, turns.SIDES + turns.COMPILED)
    args = options.parse_args()
    if args.side:
        turns.take(SIDES[args.side.split()[0]], args)
    else:
        compare(args)


def compare(args: argparse.Namespace) -> None:
    """Runs all sides in turns and prints the table."""
    pythons = {"jax": sys.executable, "torch": str(args.torch_python)}
    commands = {
        side: [pythons[side.split()[0]], __file__, *sys.argv[1:], "--side", side]
        for side in args.sides
    }
    answers = turns.take_turns(commands, args.turns)
    columns = {"images/s": lambda a: args.steps * args.batch / a["seconds"]}
    turns.keep(
        f"{turns.circumstances()}\n"
        f"settings  widths {args.widths}, batch {args.batch}, turns of {args.steps} updates\n"
        f"versions  {turns.versions(answers)}\n"
        f"\n{turns.table(answers, columns)}\n\n"
        f"{turns.over_faster(answers, columns)}",
        args.output,
    )
    named = {f"DCGAN, batch {args.batch}, images/s": columns["images/s"]}
    turns.keep_rows(turns.summary(answers, named), args.rows)


def timed(turn: Callable[[], None]) -> turns.Answer:
    """Seconds that the second of two turns took."""
    turn()
    began = time.perf_counter()
    turn()
    return {"seconds": time.perf_counter() - began}


def jax_side(args: argparse.Namespace):
    """The library's compiled step."""
    import jax
    import numpy as np

    from gan_jax import GANConfig, training

    precision = turns.precision(args)
    cfg = GANConfig(widths=tuple(args.widths), batch=args.batch, precision=precision)
    networks, state = training.initial(cfg, channels=3)
    random = np.random.default_rng(0)
    images = jax.device_put(random.integers(256, size=(IMAGES, 28, 28, 3), dtype=np.uint8))
    order = random.integers(IMAGES, size=(args.steps, args.batch), dtype=np.int32)
    key = jax.random.key(0)

    def turn():
        nonlocal state
        state, metrics = training.updates(state, images, order, 0, key, networks=networks, cfg=cfg)
        jax.block_until_ready((state, metrics))

    return {"version": f"jax {jax.__version__} on {jax.devices()[0].platform}"} | timed(turn)


def torch_side(args: argparse.Namespace):
    """The same networks in plain PyTorch, in the order of pytorch/examples/dcgan, and with the
    same economy: the generator runs forward once."""
    import torch
    from torch import nn
    from torch.nn.functional import binary_cross_entropy_with_logits as entropy

    device = "cuda" if torch.cuda.is_available() else "cpu"
    layers, inputs = [], 100
    for index, width in enumerate(args.widths):
        place = (2, 1) if index else (1, 0)
        layers += [nn.ConvTranspose2d(inputs, width, 4, *place, bias=False)]
        layers += [nn.BatchNorm2d(width), nn.ReLU(True)]
        inputs = width
    last = nn.ConvTranspose2d(inputs, 3, 5, 1, 4, bias=False)
    generator = nn.Sequential(*layers, last, nn.Tanh()).to(device)
    layers, inputs = [], 3
    for index, width in enumerate(reversed(args.widths)):
        padding = nn.ZeroPad2d((1, 2, 1, 2) if index == 2 else 1)  # 7 pixels become 4
        layers += [padding, nn.Conv2d(inputs, width, 4, 2, bias=False)]
        layers += [nn.BatchNorm2d(width), nn.LeakyReLU(0.2, True)]
        inputs = width
    logit = [nn.Conv2d(inputs, 1, 2, bias=False), nn.Flatten(0)]
    discriminator = nn.Sequential(*layers, *logit).to(device)
    networks = (generator, discriminator)
    optimizers = [torch.optim.Adam(net.parameters(), 2e-4, (0.5, 0.999)) for net in networks]
    images = torch.randint(256, (IMAGES, 3, 28, 28), dtype=torch.uint8, device=device)
    half = turns.precision(args) == "bfloat16"
    layout = torch.channels_last
    for network in networks:
        network.to(memory_format=layout)
        if args.side in turns.COMPILED:
            network.compile()
    ones, zeros = (torch.full((args.batch,), value, device=device) for value in (1.0, 0.0))

    def passed(network, inputs):
        """A network's float32 output of inputs with channels last."""
        with torch.autocast(device, torch.bfloat16, enabled=half):
            return network(inputs.to(memory_format=layout)).float()

    def update():
        real = images[torch.randint(IMAGES, (args.batch,), device=device)] / 127.5 - 1
        fake = passed(generator, torch.randn(args.batch, 100, 1, 1, device=device))
        optimizers[1].zero_grad()
        loss = entropy(passed(discriminator, real), ones)
        loss = loss + entropy(passed(discriminator, fake.detach()), zeros)
        loss.backward()
        optimizers[1].step()
        optimizers[0].zero_grad()
        entropy(passed(discriminator, fake), ones).backward()
        optimizers[0].step()

    def turn():
        for _ in range(args.steps):
            update()
        if device == "cuda":
            torch.cuda.synchronize()

    return {"version": f"torch {torch.__version__} on {device}"} | timed(turn)


SIDES = {"jax": jax_side, "torch": torch_side}

if __name__ == "__main__":
    main()
