"""GGUF files: mixtures, metadata, tokenizer, writing and reading. No algorithm; blocks are `qkern.ops`'s."""

from qkern.gguf.architectures import ARCHITECTURES, GGUFArchitecture, architecture_for
from qkern.gguf.imatrix import Imatrix, ImatrixEntry, read_imatrix, write_imatrix
from qkern.gguf.mixture import MIXTURES, Mixture, mixture_for
from qkern.gguf.read_tokenizer import read_tokenizer
from qkern.gguf.reader import GGUFFile
from qkern.gguf.tensors import GGUFTensor
from qkern.gguf.tokenizer import add_tokenizer
from qkern.gguf.writer import PlannedTensor, write_gguf

__all__ = [
    "ARCHITECTURES",
    "MIXTURES",
    "GGUFArchitecture",
    "GGUFFile",
    "GGUFTensor",
    "Imatrix",
    "ImatrixEntry",
    "Mixture",
    "PlannedTensor",
    "add_tokenizer",
    "architecture_for",
    "mixture_for",
    "read_imatrix",
    "read_tokenizer",
    "write_gguf",
    "write_imatrix",
]
