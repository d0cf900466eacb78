"""What quantizing costs the shipped model: KL on held-out books, float compute, fp32 arithmetic."""

import copy

import pytest
import torch

from qkern.demo import CALIBRATION, HELDOUT, MODEL
from qkern.evaluation import kl_divergence, paired_bootstrap, window_logits
from qkern.models import inject
from qkern.pipelines import quantize

WINDOW = 512
WINDOWS = 30  # 15,360 tokens


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Every thread there is: the directory's fixture is for models without work to share."""


@pytest.fixture(scope="module")
def model():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def measure(model, tokenizer):
    """Quantize and return the KL at every position of the held-out text."""
    text = HELDOUT.read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])[: WINDOWS * WINDOW]
    reference = window_logits(model, ids, window=WINDOW)

    def run(method, scheme, source=model, samples=48, compute="float", **more):
        options = {"calibration": CALIBRATION, "tokenizer": tokenizer, "samples": samples, **more}
        quantized = quantize(source, method=method, scheme=scheme, **options)
        return kl_divergence(reference, quantized, ids, window=WINDOW, compute=compute)

    return run


# At 4 bits the ratio is 0.484 with the default of 128 sequences and 0.495 with 64; at 3 and 2 bits it is
# 0.40 and 0.30 with 64, so fewer do.
@pytest.mark.parametrize(("scheme", "samples"), [("w4g128", 128), ("w3g128", 48), ("w2g64", 48)])
def test_gptq_has_at_most_half_the_divergence_of_rounding(measure, scheme, samples):
    rounded, gptq = measure("rtn", scheme), measure("gptq", scheme, samples=samples)
    assert gptq.size >= 15_000
    assert gptq.mean() <= 0.5 * rounded.mean()
    assert paired_bootstrap(gptq, rounded).is_below


def test_awq_restores_what_outlier_channels_take(measure, model):
    injected = inject(copy.deepcopy(model))
    plain, spoilt = measure("rtn", "w4g128z"), measure("rtn", "w4g128z", injected)
    awq = measure("awq", "w4g128z", injected)
    assert awq.mean() <= 1.1 * plain.mean()
    # There was something to restore.
    assert paired_bootstrap(awq, spoilt).is_below


@pytest.mark.parametrize("activations", ["dynamic", "static"])
def test_smoothquant_restores_what_outlier_channels_take(measure, model, activations):
    injected = inject(copy.deepcopy(model))
    options = {"compute": "int8", "activations": activations}
    plain, spoilt = measure("rtn", "w8a8", **options), measure("rtn", "w8a8", injected, **options)
    smooth = measure("smoothquant", "w8a8", injected, **options)
    assert smooth.mean() <= 1.5 * plain.mean()
    assert paired_bootstrap(smooth, spoilt).is_below


def test_eight_bits_cost_next_to_nothing(measure):
    assert 0 < measure("rtn", "w8").mean() <= 2e-4
