"""Small 16-bit models in folders, checkpoints that were changed, and transformers as it was before."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import qkern
from qkern.integrations.hf_methods import disable, enable

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


SPELLINGS = {"w4g32z": "awq", "w4g32": "gptq", "w3g32": "compressed-tensors", "w8": "compressed-tensors"}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Small models run fastest on one thread, and a busy machine makes several wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def enabled() -> Iterator[None]:
    enable()
    yield
    disable()


@pytest.fixture(scope="session")
def originals(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Maker of folders with small 16-bit models, each written once."""
    made: dict[Any, Path] = {}

    def folder(kind: str, **sizes: int) -> Path:
        key = kind, *sizes.items()
        if key not in made:
            made[key] = tmp_path_factory.mktemp(kind)
            tiny(kind, dtype=torch.bfloat16, **sizes).save_pretrained(made[key])
        return made[key]

    return folder


@pytest.fixture(scope="session")
def rewrite() -> Any:
    """Copy a checkpoint into one file, its tensors changed on the way."""

    def rewrite(folder: Path, target: Path, change: Any) -> Path:
        shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.safetensors*"))
        tensors = {
            name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()
        }
        save_file(change(tensors), target / "model.safetensors", metadata={"format": "pt"})
        return target

    return rewrite


@pytest.fixture(scope="session")
def folders(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folder of a quantized Llama by scheme, each in another format or width."""
    made = {}
    for spelling, format in SPELLINGS.items():
        made[spelling] = tmp_path_factory.mktemp(spelling) / "model"
        model = tiny("llama", dtype=torch.bfloat16)
        qkern.replace_linears(model, spelling)
        qkern.save(model, made[spelling], format=format)
    return made
