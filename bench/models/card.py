"""The model card (README.md) of a trained test model."""

from __future__ import annotations

SOURCES = {
    "bible": """\
The King James Version as Debian's `bible-kjv-text` holds it; its copyright file says that the
copyright of the text, made in 1611, is expired (public domain). One paragraph a chapter, no verse
numbers. Held out are Esther, Job, Ecclesiastes, Daniel, Jonah and James: whole books without a
parallel account in the rest. `calibration.txt` and `search.txt` are chapters at a fixed stride
from the other books, and no chapter is in two of the four texts.""",
    "technical": """\
Prose of manuals that Debian ships: `postgresql-doc-15` (PostgreSQL licence), `git-doc` (GPL-2),
`python3.11-doc` (PSF licence), and, held out whole, `debian-policy` and `developers-reference`
(GPL-2+). `calibration.txt` and `search.txt` are pages at a fixed stride from the first three, and
no page is in two of the four texts.""",
    "sample": "The search text of the shipped model, for tests of the script.",
}


def model_card(preset: str, corpus: str, context: int, figures: dict[str, float], machine: str) -> str:
    """Return the card as Markdown."""
    f = figures
    return f"""\
# A small causal LM for tests of quantization ({preset})

{f["parameters"]:,.0f} parameters in bf16, trained from scratch by `bench/models/train.py`.
It exists to measure quantization on a trained model, not to be talked to.

## Data

{SOURCES[corpus]}

| text | tokens |
|---|---|
| training (not shipped) | {f["train_tokens"]:,.0f} |
| `calibration.txt` | {f["calibration_tokens"]:,.0f} |
| `search.txt` | {f["search_tokens"]:,.0f} |
| `heldout.txt` | {f["heldout_tokens"]:,.0f} |

## Figures

Perplexity per token, after rounding to bf16, in windows of {context} tokens that do not overlap; the first
token of a window is not scored. The n-grams (interpolated modified Kneser-Ney, same training
tokens) score the same held-out tokens.

| model | text | perplexity |
|---|---|---|
| this model | `heldout.txt` | {f["heldout_perplexity"]:.2f} |
| Kneser-Ney trigram | `heldout.txt` | {f["kneser_ney_3"]:.2f} |
| Kneser-Ney 5-gram | `heldout.txt` | {f["kneser_ney_5"]:.2f} |
| this model | `search.txt` | {f["search_perplexity"]:.2f} |
| this model | start of the training text | {f["train_perplexity"]:.2f} |

Ratio to the trigram: **{f["ratio"]:.3f}**.

## Command

```
python bench/models/train.py {preset} --output DIR --threads {f["threads"]:.0f}
```

{f["steps"]:.0f} steps of AdamW and Muon, {f["minutes"]:.0f} minutes on {f["threads"]:.0f} \
{machine} thread(s), seed 0.
bf16 autocast; another CPU or thread count gives slightly different weights.
"""
