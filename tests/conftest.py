"""Shared pieces of the tests: the bank, and a dummy tokenizer for any chat template."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

import grpodx_utils as gx

gx.notebook("01")  # imports Unsloth, which must come before transformers
three = gx.notebook("03")
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


@pytest.fixture(scope="session")
def bank():
    return gx.load_bank()


def dummy_tokenizer(template: str, special: list[str], eos: str):
    """A byte-level tokenizer (one token per byte) with a model's special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(
        models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[])
    )
    core.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=eos,
        pad_token="<dummy_pad>",
        bos_token="<dummy_bos>",
        additional_special_tokens=special,
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture(scope="session")
def tiny_tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(gx.DATA / "tiny_doctor"))


@pytest.fixture(scope="session")
def model():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(gx.DATA / "tiny_doctor").float().eval()


@pytest.fixture
def chat(tiny_tokenizer):
    return three.ChatTokens(tiny_tokenizer)
