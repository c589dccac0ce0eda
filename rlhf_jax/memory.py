"""How much memory each stage takes on one device, said before anything is trained.

A model of what the compiled programs hold at their peak, from the sizes of the decoder and the
configurations alone. `benchmarks/bench_memory.py` compares it with measured peaks. Not counted: the
process without a model, what compiling takes for a while, and what the C library keeps.
"""

import dataclasses
import functools
import os
from typing import NamedTuple

import jax
from flax import nnx

from experiment_runs import devices, settings
from rlhf_jax.config import (
    LINEAR_LAYERS,
    DPOConfig,
    EvaluationConfig,
    LoRAConfig,
    PPOConfig,
    RewardConfig,
)
from rlhf_jax.language_model import layer_loop
from rlhf_jax.language_model.attention import QUERIES, WHOLE
from rlhf_jax.language_model.decoder_config import DecoderConfig
from rlhf_jax.language_model.logprobs import CHUNK
from rlhf_jax.pretrained.tensor_names import abstract
from rlhf_jax.profiles import Profile

FLOAT, HALF = 4, 2  # bytes of a number
MOMENTS = 2  # of Adam


class Use(NamedTuple):
    """Bytes of one device at the peak of a program."""

    weights: float = 0.0  # trained and frozen ones
    optimizer: float = 0.0
    gradients: float = 0.0  # summed over forward batches
    activations: float = 0.0  # and the matrices of one layer, gathered
    cache: float = 0.0  # keys and values
    logits: float = 0.0  # and the matrix that they are made with, gathered

    @property
    def total(self) -> float:
        return sum(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """What the programs of a decoder take on each device of a mesh."""

    decoder: DecoderConfig
    data: int = 1
    model: int = 1
    remat: bool = False
    looped: bool = False  # all blocks in one loop, as on accelerators: their weights are stacked

    @property
    def parameters(self) -> int:
        """Numbers in the decoder."""
        return counted(self.decoder)

    def adapters(self, lora: LoRAConfig) -> int:
        """Numbers in the adapters of all layers."""
        cfg = self.decoder
        query, kv = cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
        ends = (query, kv, kv, query, cfg.mlp_dim, cfg.mlp_dim, cfg.mlp_dim)
        sums = {name: cfg.embed_dim + end for name, end in zip(LINEAR_LAYERS, ends, strict=True)}
        return cfg.num_layers * lora.rank * sum(sums[name] for name in lora.targets)

    def held(self, frozen: int, lora: LoRAConfig | None) -> Use:
        """A trained model, with so many frozen ones beside it, and what trains it."""
        trained = self.adapters(lora) if lora else self.parameters
        weights = self.weights(frozen, decoders=1) + self.share(trained)
        return Use(weights=weights, optimizer=self.share(MOMENTS * trained))

    def weights(self, models: int, *, decoders: int) -> float:
        """Bytes of whole models, and of those decoders again that a program rounds for products, or
        of one that it stacks."""
        rounded = 0.0 if self.decoder.products == "float32" else decoders / 2
        return self.share((models + max(rounded, self.looped)) * self.parameters)

    def share(self, numbers: int | float) -> float:
        """Bytes of one device's part of so many numbers."""
        return FLOAT * numbers / (self.data * self.model)

    @property
    def activation(self) -> int:
        """Bytes of a number that goes from layer to layer or into the cache."""
        return HALF if self.decoder.activations == "bfloat16" else FLOAT

    def activations(self, tokens: int, time: int) -> float:
        """Bytes that the gradient keeps of so many tokens in rows of `time`."""
        cfg, model = self.decoder, self.model
        query, kv = cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
        split = 3 * query + 2 * kv + 3 * cfg.mlp_dim
        split += (query + kv) * cfg.qk_norm
        weights = cfg.num_heads * time / model  # of attention, over all keys
        together = QUERIES / time if time > WHOLE else 0.0  # made, used and given up
        one_layer = 4 * cfg.embed_dim + split / model + (0.0 if together else weights)
        kept = (
            cfg.num_layers * cfg.embed_dim + one_layer if self.remat else cfg.num_layers * one_layer
        )
        kept += 3 * weights * together  # with their gradients
        matrices = self.parameters / cfg.num_layers / model if self.data > 1 else 0
        return self.activation * tokens / self.data * kept + FLOAT * 2 * matrices

    def gathered(self, copies: int) -> float:
        """Bytes of the matrix of embeddings or of logits, which `data` divides, as it is used."""
        matrix = self.decoder.vocab_size * self.decoder.embed_dim / self.model
        return FLOAT * copies * matrix if self.data > 1 else 0.0

    def logits(self, copies: int) -> float:
        """Bytes of the logits of one chunk of tokens."""
        return FLOAT * copies * CHUNK * self.decoder.vocab_size / self.model

    def reward_update(self, cfg: RewardConfig) -> Use:
        """Of the reward model beside the pretrained one; its gradients take the places of
        activations one by one."""
        held = self.held(1, cfg.lora)
        return held._replace(
            activations=self.activations(cfg.batch_rows * cfg.max_tokens, cfg.max_tokens)
        )

    def ppo_update(self, cfg: PPOConfig) -> Use:
        """Of the policy; reference and reward model are there, the first within LoRA's base."""
        time = cfg.prompt_tokens + cfg.response_tokens
        return self.policy_update(self.held(2, cfg.lora), cfg.forward_batch, time)

    def dpo_update(self, cfg: DPOConfig) -> Use:
        """Of the policy beside the reference."""
        return self.policy_update(self.held(1, None), 2 * cfg.forward_pairs, cfg.max_tokens)

    def policy_update(self, held: Use, rows: int, time: int) -> Use:
        """Of a policy on so many rows at a time, beside what is held."""
        return held._replace(
            gradients=held.optimizer / MOMENTS,
            activations=self.activations(rows * time, time),
            logits=self.logits(3) + self.gathered(4),  # both matrices and their gradients
        )

    def sampling(self, cfg: PPOConfig) -> Use:
        """Of the policy beside all that is there for its update."""
        time = cfg.prompt_tokens + cfg.response_tokens
        return self.drawing(self.held(2, cfg.lora), cfg.batch, time)

    def drawing(self, held: Use, rows: int, time: int) -> Use:
        """Of so many rows of prompt and response at once, beside what is held."""
        decoder, rows = self.decoder, rows / self.data
        numbers = 2 * decoder.num_layers * decoder.num_kv_heads * decoder.head_dim * time
        return held._replace(
            cache=self.activation * rows * numbers / self.model,
            logits=FLOAT * 3 * rows * decoder.vocab_size + self.gathered(2),
        )

    def evaluation(self, cfg: EvaluationConfig, lengths: PPOConfig) -> Use:
        """Of a policy beside the pretrained one and two reward models: the larger part."""
        held = Use(weights=self.weights(4, decoders=2))
        time = lengths.prompt_tokens + (cfg.response_tokens or lengths.response_tokens)
        sampled = self.drawing(held, max(cfg.batch, lengths.forward_batch), time)
        return max(sampled, held._replace(logits=self.logits(2)), key=sum)

    def stages(self, profile: Profile) -> dict[str, Use]:
        """By the name of stage and program, what each takes."""
        found = {"reward": self.reward_update(profile.reward)}
        for name, cfg in profile.different_policies.items():
            found[f"{name}: sampling"] = self.sampling(cfg)
            found[f"{name}: update"] = self.ppo_update(cfg)
        if profile.dpo:
            found["dpo"] = self.dpo_update(profile.dpo)
        return found | {"evaluate": self.evaluation(profile.evaluation, profile.ppo)}


@functools.cache
def counted(decoder: DecoderConfig) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(abstract(decoder))))


def available() -> float:
    """Bytes of one device: an accelerator's own, or its share of the machine's memory."""
    device, count = jax.local_devices()[0], jax.local_device_count()
    if statistics := device.memory_stats():
        return float(statistics["bytes_limit"])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / count


def dry_run(decoder: DecoderConfig, profile: Profile) -> str:
    """A table of what each stage takes on the mesh as it is, and what to change where it is more
    than there is."""
    sizes = dict(devices.mesh().shape)
    memory = Memory(
        decoder=decoder, **sizes, remat=settings.rematerialized(), looped=layer_loop.looped()
    )
    lines = [
        f"{'GB on each device':28}" + "".join(f"{name:>12}" for name in (*Use._fields, "total"))
    ]
    there = available()
    stages = memory.stages(profile)
    for name, use in stages.items():
        lines.append(f"{name:28}" + "".join(f"{part / 1e9:12.2f}" for part in (*use, use.total)))
    lines.append(f"there are {there / 1e9:.1f} GB")
    for name, use in stages.items():
        if use.total > there:
            lines.append(f"{name} does not fit; {remedies(memory, profile, name, there)}")
    return "\n".join(lines)


def remedies(memory: Memory, profile: Profile, stage: str, there: float) -> str:
    """What would make a stage fit, the least change first."""

    def fits(changed: Memory, profile: Profile = profile) -> bool:
        return changed.stages(profile)[stage].total <= there

    def smallest(cfg: PPOConfig) -> PPOConfig:
        even = (n for n in range(memory.data, cfg.batch + 1, memory.data) if cfg.batch % n == 0)
        return dataclasses.replace(cfg, forward_batch=next(even, cfg.forward_batch))

    rematerialised = dataclasses.replace(memory, remat=True)
    found = []
    if fits(rematerialised):
        found.append("--remat")
    others = {name: smallest(cfg) for name, cfg in profile.others.items()}
    two = {"ppo": smallest(profile.ppo), "lora": smallest(profile.lora)}
    small = dataclasses.replace(profile, **two, others=others)
    if fits(memory, small):
        found.append("a smaller forward_batch")
    more = (n for n in (2, 4, 8, 16, 32, 64, 128) if n > memory.data)
    for data in more:
        if fits(dataclasses.replace(rematerialised, data=data)):
            found.append(f"--remat and data={data} devices (--mesh)")
            break
    return "these would: " + "; ".join(found) if found else "use a smaller model"
