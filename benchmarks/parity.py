"""Whether the accelerator computes what a CPU computes: `python benchmarks/parity.py`.

Log-probabilities and their gradient by the profile's model, in float32 with exact products and in
bfloat16, beside float32 on the CPU of the same machine; log-probabilities as sampled beside those
of reading the samples; the DCGAN's losses. Writes parity.json into the logs of the results, with
the peak rate of a matrix product, and fails where a difference is larger than rounding explains.
What the same code found on the same device stands.
"""

import dataclasses
import functools
import json
import sys
import time
from pathlib import Path

import accelerator
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiment_runs.compilation import keep_programs
from experiment_runs.files import fingerprint
from experiment_runs.provenance import code_fingerprint
from gan_jax import GANConfig
from gan_jax import training as gan_training
from rlhf_jax.experiment import from_environment
from rlhf_jax.language_model.logprobs import response_states, token_logprobs
from rlhf_jax.language_model.sampling import draw_keys, sample
from rlhf_jax.pretrained.model import Pretrained, model_fingerprint
from rlhf_jax.pretrained.prompt_rows import prompt_rows

LENGTH, WIDTH = 32, 64  # of responses and of prompts, tokens
LIMITS = {  # largest differences that rounding explains
    "float32_logprob_max_nats": 2e-3,
    "float32_gradient_error": 2e-3,  # norm of the difference over the norm
    "compute_logprob_mean_nats": 0.05,
    "compute_gradient_error": 0.1,
    "sampled_logprob_mean_nats": 0.05,
    "dcgan_loss_error": 5e-3,
}


def main() -> int:
    keep_programs()
    pretrained, device = from_environment().pretrained, jax.devices()[0]
    of = {
        "device": device.device_kind,
        "jax": jax.__version__,
        "model": model_fingerprint(pretrained),
        "code": fingerprint(code_fingerprint(), Path(__file__).read_text()),
    }
    path = Path(accelerator.circumstances()["RLHF_RESULTS"]) / "logs" / "parity.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    if not of.items() <= found.items():
        found = of | compared(pretrained, device)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    wrong = [name for name, limit in LIMITS.items() if not found[name] <= limit]
    print(f"larger than rounding explains: {', '.join(wrong)}" if wrong else "as on the CPU")
    return 1 if wrong else 0


def compared(pretrained: Pretrained, device: jax.Device) -> dict[str, float]:
    """How far the device is from the CPU, and the peak rate of its products."""
    cpu = jax.devices("cpu")[0]
    prompts = ["Why is the sky blue?", "What is a tax?", "How do bees fly?", "Who reads maps?"]
    rows, masks, _ = prompt_rows(prompts * 4, pretrained.tokenizer, length=WIDTH)
    keys = draw_keys(jax.random.key(0), range(len(rows)))
    responses = sample(
        pretrained.state, rows, masks, keys, 1.0, decoder_def=pretrained.definition,
        length=LENGTH, end=pretrained.tokenizer.ends, pad=pretrained.tokenizer.pad,
    )  # fmt: skip
    reads = functools.partial(read, pretrained, rows, masks, jax.device_get(responses))
    with jax.default_matmul_precision("highest"):
        reference, exact = reads("float32", cpu), reads("float32", device)
        losses = [dcgan_losses(where) for where in (cpu, device)]
    computed = reads(pretrained.config.dtype, device)
    real = np.asarray(responses.mask)
    sampled = np.abs(np.asarray(responses.logprobs) - computed[0])[real]
    rounded = np.abs(reference[0] - computed[0])[real]
    found = {
        "float32_logprob_max_nats": np.abs(reference[0] - exact[0])[real].max(),
        "float32_gradient_error": gradient_error(exact[1], reference[1]),
        "compute_logprob_mean_nats": rounded.mean(),
        "compute_logprob_p99_nats": np.quantile(rounded, 0.99),
        "compute_gradient_error": gradient_error(computed[1], reference[1]),
        "sampled_logprob_mean_nats": sampled.mean(),
        "sampled_logprob_p99_nats": np.quantile(sampled, 0.99),
        "sampled_logprob_max_nats": sampled.max(),
        "dcgan_loss_error": np.abs(losses[0] - losses[1]).max(),
        "product_tflops": product_tflops(8192 if device.platform != "cpu" else 1024),
    }
    return {name: float(value) for name, value in found.items()}


def read(pretrained: Pretrained, rows, masks, responses, dtype: str, device) -> tuple:
    """Log-probability of each response token, nats, and the gradient of their mean."""
    config = dataclasses.replace(pretrained.config, dtype=dtype)
    definition = dataclasses.replace(pretrained, config=config).definition
    tokens = np.concatenate([rows, responses.tokens], axis=1)
    mask = np.concatenate([masks, responses.mask], axis=1)
    width = rows.shape[1]

    def mean(state, tokens, mask, targets):
        decoder = nnx.merge(definition, state)
        states = response_states(decoder, tokens, mask, width)
        found = token_logprobs(decoder, states, targets, 1.0)
        return jnp.where(mask[:, width:], found, 0.0).sum() / mask[:, width:].sum(), found

    arguments = jax.device_put((pretrained.state, tokens, mask, responses.tokens), device)
    (_, found), grads = jax.jit(jax.value_and_grad(mean, has_aux=True))(*arguments)
    return jax.device_get((found, grads))


def gradient_error(grads, reference) -> float:
    """Norm of the difference over the norm of the reference, all parameters together."""
    difference = optax.tree.sub(grads, reference)
    return float(optax.tree.norm(difference) / optax.tree.norm(reference))


def dcgan_losses(device) -> np.ndarray:
    """Both losses of a few updates from one start."""
    cfg = GANConfig(batch=32, dispatch_steps=3)
    random = np.random.default_rng(0)
    images = random.integers(256, size=(96, 28, 28, 3), dtype=np.uint8)
    order = np.arange(96, dtype=np.int32).reshape(3, 32)
    networks, state = gan_training.initial(cfg, channels=3)
    arguments = jax.device_put((state, images, order, np.int32(0), jax.random.key(0)), device)
    _, metrics = gan_training.updates(*arguments, networks=networks, cfg=cfg)
    return np.array([metrics["loss_d"], metrics["loss_g"]])


def product_tflops(size: int) -> float:
    """Rate of a bfloat16 product of square matrices, 1e12 operations a second: the peak."""
    random = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
    multiply = jax.jit(lambda x: x @ random)
    product = jax.block_until_ready(multiply(random))
    began = time.perf_counter()
    for _ in range(10):
        product = multiply(random)
    jax.block_until_ready(product)
    return 10 * 2 * size**3 / (time.perf_counter() - began) / 1e12


if __name__ == "__main__":
    sys.exit(main())
