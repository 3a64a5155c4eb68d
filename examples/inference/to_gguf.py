"""Writes a Hugging Face Llama folder as a Q4_0 GGUF file, in an environment that has llama.cpp.

    python to_gguf.py FOLDER OUT.gguf      # needs: pip install llama-cpp-python gguf

Knows both formats' names. Does not need torch or symbiont: the weights are read as safetensors by
hand (an 8-byte length, a JSON header, the bytes). llama.cpp quantizes; where a row does not fit its
blocks it takes a finer type of its own choice, for the embedding of a 576-wide model 8 bits.

llama.cpp turns neighbouring pairs of q and k, Hugging Face the two halves of a head: the rows are
put in its order. The file carries no tokenizer; token ids are all that is compared.
"""

import ctypes
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import gguf
import llama_cpp
import numpy as np

Q4_0 = 2  # llama_ftype LLAMA_FTYPE_MOSTLY_Q4_0


def tensors(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Names and float32 values of a safetensors file."""
    raw = np.memmap(path, np.uint8, "r")
    start = 8 + int(raw[:8].view("<u8")[0])
    for name, entry in json.loads(bytes(raw[8:start])).items():
        if name == "__metadata__":
            continue
        if entry["dtype"] != "F32":
            sys.exit(f"{name} is {entry['dtype']}; only float32 weights are converted")
        begin, end = entry["data_offsets"]
        yield name, raw[start + begin : start + end].view("<f4").reshape(entry["shape"])


def in_pairs(rows: np.ndarray, heads: int) -> np.ndarray:
    """(heads * d, in) with each head's halves interleaved."""
    halves = rows.reshape(heads, 2, -1, rows.shape[-1])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows.shape))


def write(folder: Path, out: Path) -> None:
    """Write the float32 GGUF file `out`."""
    config = json.loads((folder / "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(str(out), "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    rope = config.get("rope_parameters") or config
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, value in tensors(folder / "model.safetensors"):
        if "q_proj" in name or "k_proj" in name:
            value = in_pairs(value, heads if "q_proj" in name else kv_heads)
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), np.array(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    """Convert, quantize, and leave only the quantized file."""
    folder, out = Path(sys.argv[1]), Path(sys.argv[2])
    whole = out.with_suffix(".f32.gguf")
    write(folder, whole)
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = Q4_0, 2
    fault = llama_cpp.llama_model_quantize(
        str(whole).encode(), str(out).encode(), ctypes.byref(params)
    )
    whole.unlink()
    if fault:
        sys.exit(f"llama.cpp could not quantize {folder}")


if __name__ == "__main__":
    main()
