"""Models and files that the GGUF tests share."""

from pathlib import Path

import pytest
import torch

import qkern


@pytest.fixture(autouse=True, scope="package")
def one_thread():
    """Small models: a second thread only waits for the first, and llama.cpp's spin while they wait."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def shipped():
    """Folder of the model that lies in the package."""
    return Path(qkern.__file__).parent / "demo" / "data" / "bible"


@pytest.fixture(scope="session")
def exported(shipped, tmp_path_factory):
    """Maker of GGUF files of the shipped model: ``exported("q4_k_m")``; each is made once."""
    from qkern.pipelines import export_gguf

    folder = tmp_path_factory.mktemp("gguf")
    made = {}

    def make(kind, **options):
        key = (kind, *sorted(options.items()))
        if key not in made:
            made[key] = folder / f"{len(made)}-{kind}.gguf"
            export_gguf(shipped, made[key], kind, **options)
        return made[key]

    return make


@pytest.fixture(scope="session")
def model_folder(tiny, shipped, tmp_path_factory):
    """Maker of folders with a tiny random model and the shipped tokenizer: ``model_folder("llama")``."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shipped)

    def make(model_type, **overrides):
        folder = tmp_path_factory.mktemp(model_type)
        settings = {
            "vocab_size": len(tokenizer),
            "eos_token_id": tokenizer.eos_token_id,
            "bos_token_id": None,
        }
        model = tiny(model_type, **{**settings, "pad_token_id": None, "sliding_window": None, **overrides})
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder, model

    return make


@pytest.fixture
def changed():
    """Maker of copies with other metadata: ``changed(path, to, qwen2__block_count=3)``; None leaves out."""
    import gguf

    def change(path, to, **metadata):
        reader = gguf.GGUFReader(path)
        name = reader.fields["general.architecture"].contents()
        writer = gguf.GGUFWriter(to, metadata.pop("architecture", name))
        edits = {key.replace("__", "."): value for key, value in metadata.items()}
        for field in reader.fields.values():
            if field.name.startswith("GGUF.") or field.name in {"general.architecture", *edits}:
                continue
            kind = field.types[0]
            of = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), kind, sub_type=of)
        for key, value in edits.items():
            if value is not None:
                kind = gguf.GGUFValueType.get_type(value)
                # llama.cpp wants its integers without a sign.
                kind = gguf.GGUFValueType.UINT32 if kind == gguf.GGUFValueType.INT32 else kind
                writer.add_key_value(key, value, kind)
        for tensor in reader.tensors:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return to

    return change


@pytest.fixture
def run_gguf():
    """Maker of llama.cpp runners with an fp32 cache; the proof of this package is another's reading."""
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: pip install 'qkern[llama]'")
    from qkern.evaluation.llama_cpp import LlamaCpp

    return lambda path, context=512: LlamaCpp(path, context=context, threads=1, f32_cache=True)
