"""The space in which image sets are compared: a small classifier's features where there are
labels, else the principal components of the pixels."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Key

from gan_jax.data import ImageSet
from gan_jax.dcgan import Convolution, drawn, normalization
from gan_jax.training import Network, evaluated, to_unit

WIDTHS = (32, 64, 64)  # the last one is the number of features
BATCH, LEARNING_RATE = 128, 1e-3
COMPONENTS = 64
COMPONENT_IMAGES = 1000  # principal components are fitted to so many training images


class FeatureSpace(NamedTuple):
    """Where image sets are compared."""

    name: str
    embed: Callable  # images in [-1, 1] to features and class probabilities, None without labels
    accuracy: dict[str, float]  # the classifier's, held out, with its 95 % interval; or empty


class Classifier(nnx.Module):
    """Three blocks of convolution, BatchNorm and ReLU, averaged over the image, then a linear
    layer."""

    def __init__(self, *, channels: int, classes: int):
        self.blocks = nnx.List(
            [
                Convolution(inputs, outputs, kernel=4, stride=2, padding=(1, 2))
                for inputs, outputs in zip((channels, *WIDTHS), WIDTHS, strict=False)
            ]
        )
        self.norms = nnx.List([normalization(width) for width in WIDTHS])
        self.logits = nnx.Linear(
            WIDTHS[-1], classes, kernel_init=nnx.initializers.zeros, rngs=nnx.Rngs(0)
        )

    def __call__(
        self, images: Float[Array, "batch height width channels"], *, train: bool
    ) -> tuple[Float[Array, "batch features"], Float[Array, "batch classes"]]:
        """Features and logits."""
        hidden = images
        for block, norm in zip(self.blocks, self.norms, strict=True):
            hidden = jax.nn.relu(norm(block(hidden), use_running_average=not train))
        features = hidden.mean(axis=(1, 2))
        return features, self.logits(features)


def feature_space(images: ImageSet, key: Key[Array, ""], *, steps: int) -> FeatureSpace:
    """The space that the labels allow."""
    if images.train_labels is None:
        return component_space(images)
    definition, classifier = fitted_classifier(images, key, steps=steps)

    def embed(batch):
        features, logits = evaluated(definition, classifier, batch)
        return features, np.asarray(jax.nn.softmax(logits))

    found = embed(to_unit(images.held_out))[1].argmax(axis=1)
    hits = images.held_out_labels[np.arange(len(found)), found]
    reach = 1.96 * hits.std() / np.sqrt(len(hits))
    accuracy = {
        "mean": hits.mean(), "low": hits.mean() - reach, "high": hits.mean() + reach,
        "majority": images.held_out_labels[:, images.train_labels.mean(axis=0).argmax()].mean(),
    }  # fmt: skip
    name = f"{WIDTHS[-1]} features of a classifier trained on the labels"
    return FeatureSpace(name, embed, accuracy)


def fitted_classifier(
    images: ImageSet, key: Key[Array, ""], *, steps: int
) -> tuple[nnx.GraphDef, Network]:
    """A classifier trained by cross-entropy with Adam, all steps in one compiled call."""
    module = Classifier(channels=images.train.shape[-1], classes=len(images.classes))
    definition, params, statistics = nnx.split(module, nnx.Param, nnx.BatchStat)
    optimizer = optax.adam(LEARNING_RATE)
    weights_key, order_key = jax.random.split(key)
    order = jax.random.randint(order_key, (steps, BATCH), 0, len(images.train))

    @functools.partial(jax.jit, donate_argnums=0)
    def fit(network, pixels, labels, order):
        def loss(params, statistics, chosen):
            module = nnx.merge(definition, params, statistics, copy=True)
            logits = module(to_unit(pixels[chosen]), train=True)[1]
            entropy = optax.softmax_cross_entropy(logits, labels[chosen]).mean()
            return entropy, nnx.state(module, nnx.BatchStat)

        def step(network, chosen):
            params, statistics, opt_state = network
            grads, statistics = jax.grad(loss, has_aux=True)(params, statistics, chosen)
            changes, opt_state = optimizer.update(grads, opt_state, params)
            return Network(optax.apply_updates(params, changes), statistics, opt_state), None

        return jax.lax.scan(step, network, order)[0]

    params = drawn(params, weights_key)
    network = Network(params, statistics, optimizer.init(params))
    return definition, fit(network, images.train, images.train_labels, order)


def component_space(images: ImageSet) -> FeatureSpace:
    """The first principal components of training images' pixels."""
    count = min(COMPONENT_IMAGES, len(images.train))
    chosen = np.linspace(0, len(images.train) - 1, count).astype(int)
    pixels = flat(to_unit(images.train[chosen]))
    centre = pixels.mean(axis=0)
    axes = np.linalg.svd(pixels - centre, full_matrices=False)[2][:COMPONENTS]
    name = f"the first {COMPONENTS} principal components of the pixels"
    return FeatureSpace(name, lambda batch: ((flat(batch) - centre) @ axes.T, None), {})


def flat(images):
    """Images as rows of pixels."""
    return images.reshape(len(images), -1)
