"""Models with a real architecture and random weights, for memory and speed.

They are written as 4-bit checkpoints, like those for a T4. The tokenizer has
one token per byte, and the models say nothing sensible: they (nearly) never end a turn
themselves, so every turn has exactly the length that a benchmark asks for.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from bitsandbytes.functional import quantize_4bit
from conftest import dummy_tokenizer
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
)

CHATML = """\
{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
FOUR_BIT = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "bfloat16",
}


def shape(kind, hidden, inner, layers, heads, kv_heads, vocabulary, tied, **more):
    return kind(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        max_position_embeddings=32768,
        **more,
    )


SHAPES = {  # sizes from the models' published config.json; Phi-4 in its Llama form
    "Qwen2.5-1.5B": shape(Qwen2Config, 1536, 8960, 28, 12, 2, 151936, True),
    "Qwen3-4B": shape(Qwen3Config, 2560, 9728, 36, 32, 8, 151936, True, head_dim=128),
    "Llama-3.1-8B": shape(LlamaConfig, 4096, 14336, 32, 32, 8, 128256, False),
    "Phi-4": shape(LlamaConfig, 5120, 17920, 40, 40, 10, 100352, False),
}


def write_model(name, folder, layers=None, seed=0):
    """A checkpoint of `SHAPES[name]` in `folder`, layers in NF4; `layers` cuts it."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = AutoConfig.for_model(**SHAPES[name].to_dict())
    config.num_hidden_layers = layers or config.num_hidden_layers
    config.layer_types = None
    tokenizer = dummy_tokenizer(CHATML, ["<|im_start|>"], "<|im_end|>")
    config.pad_token_id, config.eos_token_id = (
        tokenizer.pad_token_id,
        tokenizer.eos_token_id,
    )
    config.bos_token_id = None
    config = type(config)(**config.to_dict())
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tensors = {}
    for key, value in model.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if value.dim() == 1:
            fill = torch.ones if "norm" in key else torch.zeros
            tensors[key] = fill(value.shape, dtype=torch.bfloat16)
            continue
        weight = 0.02 * torch.randn(value.shape, device=device, dtype=torch.bfloat16)
        if ".layers." in key:
            packed, state = quantize_4bit(
                weight, blocksize=64, compress_statistics=True, quant_type="nf4"
            )
            tensors[key] = packed.cpu()
            for part, more in state.as_dict(packed=True).items():
                tensors[f"{key}.{part}"] = more.cpu()
        else:
            tensors[key] = weight.cpu()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    text = {**config.to_dict(), "quantization_config": FOUR_BIT, "dtype": "bfloat16"}
    text["architectures"] = [type(model).__name__]
    (folder / "config.json").write_text(json.dumps(text, default=str))
    tokenizer.save_pretrained(folder)
    return folder
