"""A PPO step as one writes it with transformers and PEFT: the second peer of `bench_ppo`.

It is written for speed: one trunk for policy and values, logits of the responses alone, AdamW in
one kernel; under bfloat16 autocast it samples with a copy of the policy in bfloat16.
"""

import argparse
import contextlib
import copy
import os
import time

import peft
import torch
import transformers
import turns

CLIP, VALUE_WEIGHT, KL_WEIGHT, DECAY = 0.2, 0.1, 0.05, 0.95


def measure(args: argparse.Namespace, rows: list[list[int]], lora: dict | None) -> turns.Answer:
    """Two steps, of which the second is measured.

    Args:
      args: of `bench_ppo`.
      rows: prompts, padded on the left, of both steps.
      lora: the settings of adapters, None to train every weight.
    """
    torch.set_num_threads(os.cpu_count())
    torch.manual_seed(0)
    half = turns.precision(args) == "bfloat16"
    read = {"dtype": torch.float32, "local_files_only": True}
    causal = transformers.AutoModelForCausalLM.from_pretrained(args.folder / "policy", **read)
    reward_model = transformers.AutoModelForSequenceClassification.from_pretrained(
        args.folder / "reward", **read
    ).eval()
    reference = contextlib.nullcontext
    if lora:
        policy = peft.get_peft_model(causal, peft.LoraConfig(**lora, task_type="CAUSAL_LM"))
        frozen, reference = causal, policy.disable_adapter
    else:
        policy, frozen = causal, copy.deepcopy(causal).eval()
    sampler = copy.deepcopy(policy).to(torch.bfloat16) if half else policy
    head = torch.nn.Linear(causal.config.hidden_size, 1)
    torch.nn.init.zeros_(head.weight)
    trained = [p for p in policy.parameters() if p.requires_grad] + list(head.parameters())
    optimizer = torch.optim.AdamW(trained, lr=1e-5, eps=1e-5, weight_decay=0.0, fused=True)
    pad, end = causal.config.pad_token_id, causal.config.eos_token_id
    width, length = len(rows[0]), args.response_tokens

    def states(model, tokens, mask):
        """Of the places before each of the response's tokens."""
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        inputs = {"attention_mask": mask, "position_ids": positions, "use_cache": False}
        return model.model(tokens, **inputs).last_hidden_state[:, width - 1 : -1]

    def logprobs(model, hidden, tokens):
        return -torch.nn.functional.cross_entropy(
            model.lm_head(hidden).float().transpose(1, 2), tokens[:, width:], reduction="none"
        )

    def step(prompts) -> turns.Answer:
        marks = [time.perf_counter()]
        with torch.inference_mode():
            policy.eval()
            if half:
                for kept, now in zip(sampler.parameters(), policy.parameters(), strict=True):
                    kept.copy_(now)
            tokens = sampler.generate(
                input_ids=prompts, attention_mask=(prompts != pad).long(), do_sample=True,
                temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=length,
            )  # fmt: skip
        tokens = torch.nn.functional.pad(tokens, (0, width + length - tokens.shape[1]), value=pad)
        marks.append(time.perf_counter())
        ended = (tokens[:, width:] == end).cumsum(1) - (tokens[:, width:] == end).int()
        valid = ended == 0
        mask = torch.cat([prompts != pad, valid], 1).long()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=half):
            hidden = states(causal, tokens, mask)
            old, values = logprobs(causal, hidden, tokens), head(hidden)[..., 0].float()
            with reference():
                fixed = logprobs(frozen, states(frozen, tokens, mask), tokens)
            scores = reward_model(
                tokens.where(mask.bool(), torch.tensor(pad)), attention_mask=mask
            ).logits[:, 0].float()  # fmt: skip
        rewards = -KL_WEIGHT * (old - fixed) * valid
        rewards[torch.arange(len(rewards)), valid.sum(1) - 1] += scores
        values = values * valid
        advantages = generalized_advantages(rewards, values)
        returns = advantages + values
        over = valid.sum()
        mean = (advantages * valid).sum() / over
        spread = (((advantages - mean) ** 2 * valid).sum() / over).sqrt()
        advantages = (advantages - mean) / (spread + 1e-8)
        marks.append(time.perf_counter())
        policy.train()
        for epoch in range(args.inner_epochs):
            for part in torch.arange(len(tokens)).split(args.forward_batch):
                with torch.autocast("cpu", torch.bfloat16, enabled=half):
                    hidden = states(causal, tokens[part], mask[part])
                    now = logprobs(causal, hidden, tokens[part])
                    value = head(hidden)[..., 0].float()
                ratio = (now - old[part]).exp()
                if epoch == 0 and not lora:  # adapters have their dropout here
                    assert (ratio[valid[part]].log().abs() < 0.5).all(), "not the same policy"
                gain = advantages[part]
                gains = torch.minimum(gain * ratio, gain * ratio.clamp(1 - CLIP, 1 + CLIP))
                near = values[part] + (value - values[part]).clamp(-CLIP, CLIP)
                misses = torch.maximum((value - returns[part]) ** 2, (near - returns[part]) ** 2)
                losses = -gains + 0.5 * VALUE_WEIGHT * misses
                ((losses * valid[part]).sum() / over).backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        marks.append(time.perf_counter())
        phases = ("sampling", "scoring", "update")
        return dict(zip(phases, map(float.__sub__, marks[1:], marks[:-1]), strict=True))

    first, second = torch.tensor(rows).chunk(2)
    step(first)
    return step(second)


def generalized_advantages(rewards: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """GAE without discount (Schulman et al., 2016), [batch, time]."""
    following = torch.nn.functional.pad(values[:, 1:], (0, 1))
    errors, after, kept = rewards + following - values, 0.0, []
    for error in reversed(errors.unbind(1)):
        after = error + DECAY * after
        kept.append(after)
    return torch.stack(kept[::-1], 1)
