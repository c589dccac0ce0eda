"""Training of both networks: many updates in one compiled call, resumable to the bit."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, Key, UInt8

from experiment_runs import devices
from experiment_runs.checkpoints import Checkpoints
from experiment_runs.process import progress
from experiment_runs.run import Run
from gan_jax.augmentation import augmented
from gan_jax.config import GANConfig
from gan_jax.data import ImageSet
from gan_jax.dcgan import Discriminator, Generator, drawn

INITIAL, LATENTS, GRID, ORDER, AUGMENTATION = range(5)  # random streams of a run
CHUNK = 128  # inputs at a time outside training
BOTH = ("data", "model")  # a batch, and every kernel, is divided over all devices
RULES = (
    (r"generator.*blocks\.\d+\.kernel$", (None, None, BOTH, None)),
    (r"generator.*image\.kernel$", (None, None, None, BOTH)),
    (r"discriminator.*blocks\.\d+\.kernel$", (None, None, None, BOTH)),
    (r"discriminator.*logit\.kernel$", (None, None, BOTH, None)),
)
GRID_SHAPE = (4, 8)  # rows and columns of the grids of images


class Network(NamedTuple):
    """What changes in one network during training."""

    params: Any
    statistics: Any  # BatchNorm's running means and variances; spectral norm's directions
    opt_state: Any


class State(NamedTuple):
    generator: Network
    discriminator: Network


class Definitions(NamedTuple):
    """The networks without their arrays: hashable, so that a compiled function can depend on it."""

    generator: nnx.GraphDef
    discriminator: nnx.GraphDef


def initial(cfg: GANConfig, channels: int) -> tuple[Definitions, State]:
    """Both networks, freshly drawn."""
    products = "bfloat16" if cfg.precision == "mixed" else "float32"
    shape = {"side": cfg.side, "channels": channels, "products": products}
    modules = (
        Generator(latents=cfg.latents, widths=cfg.widths, **shape),
        Discriminator(widths=cfg.widths[::-1], **shape, spectral=cfg.spectral_norm),
    )
    keys = jax.random.split(jax.random.fold_in(jax.random.key(cfg.seed), INITIAL))
    definitions, networks = [], []
    for module, key in zip(modules, keys, strict=True):
        definition, params, statistics = nnx.split(module, nnx.Param, nnx.BatchStat)
        params = drawn(params, key)
        definitions.append(definition)
        networks.append(Network(params, statistics, adam(cfg).init(params)))
    return Definitions(*definitions), State(*networks)


def adam(cfg: GANConfig) -> optax.GradientTransformation:
    return optax.adam(cfg.learning_rate, b1=cfg.momentum, b2=cfg.variance_decay)


def placed(state: State, images: UInt8[np.ndarray, "..."]) -> tuple[State, Array]:
    """The state divided over the devices, the images whole on every one."""
    return devices.sharded(state, RULES, own=True), devices.replicated(images)


def used(name: str, params: Any) -> Any:
    """The parameters of a network as it is applied."""
    return devices.gathered({name: params}, RULES)[name]


def applied(definition: nnx.GraphDef, params, statistics, inputs: Array) -> tuple[Array, Any]:
    """A network's output on a training batch, and its running statistics afterwards."""
    module = nnx.merge(definition, params, statistics, copy=True)
    return module(inputs, train=True), nnx.state(module, nnx.BatchStat)


def power_iterated(definition: nnx.GraphDef, network: Network) -> Any:
    """The discriminator's statistics after one power iteration of its spectral norms, if any."""
    module = nnx.merge(definition, *network[:2], copy=True)
    module.power_iteration()
    return nnx.state(module, nnx.BatchStat)


def update(
    state: State,
    real: Float[Array, "batch height width channels"],
    latents: Float[Array, "batch latent"],
    key: Key[Array, ""],
    *,
    networks: Definitions,
    cfg: GANConfig,
) -> tuple[State, dict[str, Float[Array, ""]]]:
    """One step of the discriminator, then one of the generator against it (@eq-gan).

    The discriminator descends -log D(x) - log(1 - D(G(z))), the generator -log D(G(z)), on the
    same latents: the generator runs forward once. Real and generated images are normalised as
    separate batches. The discriminator's running statistics move in its own step only. Every
    image that it judges is augmented first, by its own draw from `key`.

    Returns:
      The new state and both losses (nats), with D(x) and D(G(z)) as they were in the
      discriminator's step, averaged over the batch.
    """
    generator, discriminator = state
    keys = jax.random.split(key, 3)
    before = power_iterated(networks.discriminator, discriminator)

    def generated(params):
        own = used("generator", params)
        return applied(networks.generator, own, generator.statistics, latents)

    def judged(params, statistics, images, key):
        seen = augmented(images, key, cfg.augmentation)
        return applied(networks.discriminator, used("discriminator", params), statistics, seen)

    def discriminator_loss(params):
        on_real, statistics = judged(params, before, real, keys[0])
        on_fake, statistics = judged(params, statistics, fake, keys[1])
        loss = cross_entropy(on_real, 1 - cfg.label_smoothing) + cross_entropy(on_fake, 0.0)
        return loss, (statistics, jax.nn.sigmoid(on_real).mean(), jax.nn.sigmoid(on_fake).mean())

    def generator_loss(images):
        return cross_entropy(judged(stepped.params, stepped.statistics, images, keys[2])[0], 1.0)

    fake, pull_back, generator_statistics = jax.vjp(generated, generator.params, has_aux=True)
    (loss_d, (statistics, d_real, d_fake)), grads = jax.value_and_grad(
        discriminator_loss, has_aux=True
    )(discriminator.params)
    stepped = descend(discriminator, grads, statistics, cfg)
    loss_g, image_grads = jax.value_and_grad(generator_loss)(fake)
    generator = descend(generator, *pull_back(image_grads), generator_statistics, cfg)
    metrics = {"loss_d": loss_d, "loss_g": loss_g, "d_real": d_real, "d_fake": d_fake}
    return devices.kept(State(generator, stepped), RULES), metrics


def cross_entropy(logits: Float[Array, " batch"], target: float) -> Float[Array, ""]:
    """Mean of -target log D - (1 - target) log(1 - D), where D is the logit's sigmoid; nats."""
    return jnp.mean(jax.nn.softplus(logits) - target * logits)


def descend(network: Network, grads, statistics, cfg: GANConfig) -> Network:
    """One step of Adam."""
    updates, opt_state = adam(cfg).update(grads, network.opt_state, network.params)
    return Network(optax.apply_updates(network.params, updates), statistics, opt_state)


@functools.partial(jax.jit, static_argnames=("networks", "cfg"), donate_argnames="state")
def updates(
    state: State,
    images: UInt8[Array, "images height width channels"],
    order: Int[Array, "steps batch"],
    first_step: Int[Array, ""],
    key: Key[Array, ""],
    *,
    networks: Definitions,
    cfg: GANConfig,
) -> tuple[State, dict[str, Float[Array, ""]]]:
    """Many updates in one call, on images that stay on the device; metrics are their means.

    Random numbers come from streams of the run's `key`, by the step's number.
    """
    latent_key, augmentation_key = (jax.random.fold_in(key, s) for s in (LATENTS, AUGMENTATION))

    def step(state, inputs):
        number, chosen = inputs
        latents = jax.random.normal(
            jax.random.fold_in(latent_key, number), (cfg.batch, cfg.latents)
        )
        own = jax.random.fold_in(augmentation_key, number)
        real, latents = (
            devices.constrained(x, BOTH, *(None,) * (x.ndim - 1))
            for x in (to_unit(images[chosen]), latents)
        )
        return update(state, real, latents, own, networks=networks, cfg=cfg)

    numbers = first_step + jnp.arange(order.shape[0])
    state, metrics = jax.lax.scan(step, state, (numbers, order))
    return state, jax.tree.map(jnp.mean, metrics)


def to_unit(images: UInt8[Array | np.ndarray, "*shape"]) -> Float[Array | np.ndarray, "*shape"]:
    """Bytes as numbers in [-1, 1], the range of tanh."""
    return images.astype(np.float32) / 127.5 - 1


def to_bytes(images: Float[np.ndarray, "*shape"]) -> UInt8[np.ndarray, "*shape"]:
    return np.uint8(np.round((np.asarray(images) + 1) * 127.5))


def evaluated(
    definition: nnx.GraphDef, network: Network, inputs: Float[np.ndarray, "item ..."]
) -> list[Float[np.ndarray, "item ..."]]:
    """A network's outputs for each input, independent of the others: BatchNorm uses the running
    statistics. In chunks of one size, to compile once and to bound memory."""
    chunks = []
    for start in range(0, len(inputs), CHUNK):
        chunk = inputs[start : start + CHUNK]
        padding = [(0, CHUNK - len(chunk)), *[(0, 0)] * (inputs.ndim - 1)]
        outputs = chunk_evaluated(definition, *network[:2], np.pad(chunk, padding))
        chunks.append(
            [devices.on_host(output)[: len(chunk)] for output in jax.tree.leaves(outputs)]
        )
    return [np.concatenate(parts) for parts in zip(*chunks, strict=True)]


@functools.partial(jax.jit, static_argnames="definition")
def chunk_evaluated(definition: nnx.GraphDef, params, statistics, inputs):
    return nnx.merge(definition, params, statistics)(inputs, train=False)


def order_of(
    first_step: int, steps: int, images: int, cfg: GANConfig
) -> Int[np.ndarray, "steps batch"]:
    """Which images each of `steps` updates sees: a new permutation every epoch, the rest of
    less than a batch left out."""
    per_epoch = max(1, images // cfg.batch)
    rows = []
    for step in range(first_step, first_step + steps):
        epoch, batch = divmod(step, per_epoch)
        shuffled = permutation(cfg.seed, epoch, images)
        rows.append(shuffled[batch * cfg.batch : (batch + 1) * cfg.batch])
    return np.stack(rows).astype(np.int32)


@functools.lru_cache(maxsize=2)
def permutation(seed: int, epoch: int, images: int) -> np.ndarray:
    return np.random.default_rng([seed, ORDER, epoch]).permutation(images)


@devices.on_mesh
def train(run: Run, cfg: GANConfig, images: ImageSet) -> tuple[Definitions, State, np.ndarray]:
    """Trains both networks, continuing from the run's newest checkpoint.

    Returns:
      The networks, their state and the grids of images that the fixed latents gave over time
      (uint8, [frames, rows, columns, height, width, channels]).

    Raises:
      FloatingPointError: a loss is not finite; the message names the step.
    """
    devices.check_divisible("GANConfig.batch", cfg.batch, BOTH)
    networks, state = initial(cfg, images.train.shape[-1])
    state, resident = placed(state, images.train)
    key = jax.random.key(cfg.seed)
    count = GRID_SHAPE[0] * GRID_SHAPE[1]
    random = np.random.default_rng([cfg.seed, GRID])
    grid_latents = random.normal(size=(count, cfg.latents)).astype(np.float32)
    total = cfg.steps(len(images.train))
    shown = frame_steps(cfg, total)
    frames = np.zeros((len(shown), *GRID_SHAPE, *images.train.shape[1:]), np.uint8)
    checkpoints = Checkpoints(run.checkpoints, run.identity)
    start = 0
    if restored := checkpoints.restore(kept(state, frames)):
        start, tree, _ = restored
        state = jax.tree.unflatten(jax.tree.structure(state), tree["state"])
        frames = np.array(tree["frames"])
    run.rewind(start)
    with progress(label="GAN", total=total, initial=start) as bar:
        for first in range(start, total, cfg.dispatch_steps):
            order = order_of(first, cfg.dispatch_steps, len(images.train), cfg)
            state, metrics = updates(state, resident, order, first, key, networks=networks, cfg=cfg)
            step = first + cfg.dispatch_steps
            log(run, step, step * cfg.batch / len(images.train), metrics)
            if step in shown:
                (grid,) = evaluated(networks.generator, state.generator, grid_latents)
                frames[shown.index(step)] = to_bytes(grid).reshape(frames.shape[1:])
            if step % cfg.checkpoint_steps < cfg.dispatch_steps or step == total:
                checkpoints.save(step, kept(state, frames), {})
            checkpoints.maybe_save(step, kept(state, frames), {})
            bar.update(cfg.dispatch_steps)
    checkpoints.close()
    return networks, devices.together(state), frames


def kept(state: State, frames: np.ndarray) -> dict[str, Any]:
    """What a checkpoint holds."""
    return {"state": jax.tree.leaves(state), "frames": frames.copy()}


def frame_steps(cfg: GANConfig, total: int) -> list[int]:
    """Steps at which a grid is kept: close together early, when images change fastest."""
    dispatches = np.geomspace(1, total // cfg.dispatch_steps, cfg.frames)
    return sorted({int(number) * cfg.dispatch_steps for number in np.round(dispatches)})


def log(run: Run, step: int, epoch: float, metrics: dict[str, Array]) -> None:
    values = {name: float(value) for name, value in metrics.items()}
    for name, value in values.items():
        if not np.isfinite(value):
            raise FloatingPointError(f"step {step}: {name} is {value}; lower the learning rate")
    run.log(step=step, epoch=round(epoch, 3), **values)
