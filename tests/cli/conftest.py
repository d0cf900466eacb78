"""A small model with a tokenizer of letters."""

import pytest
import torch


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("models") / "llama"
    tiny("llama", dtype=torch.bfloat16).save_pretrained(path)
    vocabulary = {"<unk>": 0, **{chr(97 + i): i + 3 for i in range(26)}}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>").save_pretrained(path)
    torch.set_num_threads(1)
    return path
