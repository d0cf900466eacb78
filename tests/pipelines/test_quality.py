"""What quantizing costs the shipped model: KL on held-out books, float compute, fp32 arithmetic."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from qkern.demo import CALIBRATION, HELDOUT, MODEL
from qkern.evaluation import kl_divergence, paired_bootstrap, read_text, token_ids, window_logits
from qkern.models import inject
from qkern.nn import compute_mode
from qkern.pipelines import convert_qat, prepare_qat, quantize

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
def judge(model, tokenizer):
    """Return the KL at every position of the held-out text."""
    ids = token_ids(tokenizer, read_text(HELDOUT))[: WINDOWS * WINDOW]
    reference = window_logits(model, ids, window=WINDOW)
    return partial(kl_divergence, reference, ids=ids, window=WINDOW)


@pytest.fixture(scope="module")
def measure(model, tokenizer, judge):
    """Quantize and return the KL at every position of the held-out text."""

    def run(method, scheme, source=model, samples=48, compute="float", **more):
        options = {"calibration": CALIBRATION, "tokenizer": tokenizer, "samples": samples, **more}
        quantized = quantize(source, method=method, scheme=scheme, **options)
        return judge(quantized, compute=compute)

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


def test_training_on_the_grid_beats_gptq(measure, judge, model, tokenizer):
    text, generator = token_ids(tokenizer, read_text(CALIBRATION)), torch.Generator().manual_seed(0)
    student = copy.deepcopy(model).train()
    prepare_qat(student, "w2g64", learn_scales=True)
    steps = 100
    optimizer = torch.optim.AdamW(student.parameters(), lr=5e-4, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, steps)
    for _ in range(steps):
        starts = torch.randint(len(text) - 256, (4,), generator=generator)
        batch = torch.stack([text[start : start + 256] for start in starts])
        with torch.no_grad():
            target = model(batch).logits.flatten(0, 1).log_softmax(-1)
        found = student(batch).logits.flatten(0, 1).log_softmax(-1)
        F.kl_div(found, target, log_target=True, reduction="batchmean").backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    student.eval()
    with torch.inference_mode():
        fake = student(batch).logits
        convert_qat(student)
        with compute_mode(student, "float"):
            torch.testing.assert_close(student(batch).logits, fake, rtol=1e-4, atol=1e-4)
    trained, gptq = judge(student), measure("gptq", "w2g64")
    assert gptq.size >= 15_360
    # Measured: 0.19 beside 0.25; before the first step 0.43.
    assert paired_bootstrap(trained, gptq).is_below
