"""Learning from conversations: only answers are learned, exactly as transformers masks them."""

import json
import re

import numpy as np
import pytest
import torch
from tiny_models import real_data
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from smollm2 import chat
from smollm2.config import SmolLM2Config
from smollm2.errors import DataError
from smollm2.loss import inputs_and_targets
from smollm2.model import SmolLM2
from smollm2.tokenizer import Tokenizer

TALK = [
    {"role": "system", "content": "You are kind."},
    {"role": "user", "content": "Why is the sky blue?"},
    {"role": "assistant", "content": "Air scatters blue light most.\n\n1. That is all."},
    {"role": "user", "content": "And at dusk?"},
    {"role": "assistant", "content": "Red: the way is longer."},
]
WITH_GENERATION = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}{% else %}"
    "{{ message['content'] }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_file(real_data("tokenizer", "tokenizer.json"))


def test_answers_alone_are_learned_as_transformers_marks_them(tokenizer):
    """Its own mask needs a template that names the answers; the ids must be those of ours, too."""
    template, end = chat.default_template(tokenizer)
    ids, answer_bytes = chat.encode_conversation(tokenizer, TALK, template, {})
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(real_data("tokenizer", "tokenizer.json")))
    said = theirs.apply_chat_template(
        TALK, chat_template=WITH_GENERATION, return_dict=True, return_assistant_tokens_mask=True
    )
    assert [~i if i < 0 else i for i in ids.tolist()] == said["input_ids"]
    assert [int(i >= 0) for i in ids.tolist()] == said["assistant_masks"]
    assert answer_bytes == sum(len(m["content"]) for m in TALK if m["role"] == "assistant")
    assert ids.tolist().count(end) == 2  # the end of an answer is learned, or it would never end


def test_the_masked_loss_is_that_of_transformers(tokenizer):
    config = SmolLM2Config(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
                           num_key_value_heads=1, max_position_embeddings=128)  # fmt: skip
    torch.manual_seed(0)
    ours = SmolLM2(config)
    theirs = LlamaForCausalLM(LlamaConfig(**config.to_hf_dict()))
    theirs.load_state_dict(ours.state_dict())
    ids, _ = chat.encode_conversation(tokenizer, TALK, chat.CHATML, {})
    row = torch.from_numpy(ids.astype(np.int64))[None]
    inputs, targets = inputs_and_targets(row)
    whole = torch.where(row < 0, ~row, row)
    expected = theirs(input_ids=whole, labels=torch.where(row < 0, -100, row)).loss
    assert ours.loss(inputs, targets).item() == pytest.approx(expected.item(), abs=1e-5)
    assert ours.loss(inputs, whole[:, 1:]).item() != pytest.approx(expected.item(), abs=1e-3)


def test_a_tokenizer_without_turns_gets_a_template_of_plain_words():
    tokenizer = Tokenizer.train(["Question: why? Answer: because it is so. " * 40], 300)
    template, end = chat.default_template(tokenizer)
    ids, _ = chat.encode_conversation(tokenizer, TALK[1:3], template, {"eos_token": "<|endoftext|>"})
    text = tokenizer.decode([~i if i < 0 else i for i in ids.tolist()])
    assert text == f"Question: {TALK[1]['content']}\nAnswer: {TALK[2]['content']}<|endoftext|>"
    assert tokenizer.decode([i for i in ids.tolist() if i >= 0]) == TALK[2]["content"] + "<|endoftext|>"
    assert ids[-1] == end


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer):
    last_only = "{% for m in messages[-2:] %}{{ m['content'] }}<|im_end|>{% endfor %}"
    with pytest.raises(DataError, match="rewrites earlier turns"):
        chat.encode_conversation(tokenizer, TALK, last_only, {})


@pytest.mark.parametrize(
    "line, found",
    [
        ("not json", "'not json'"),
        ('{"text": "a"}', "expected {"),
        ('{"messages": [{"role": "user", "content": null}]}', "None"),
        ('{"messages": [{"role": "robot", "content": "a"}]}', "robot"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "nobody answers"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, found):
    path = tmp_path / "talk.jsonl"
    path.write_text(json.dumps({"messages": TALK}) + "\n\n" + line + "\n")
    conversations = chat.read_conversations(path)
    assert next(conversations) == TALK
    with pytest.raises(DataError, match=rf"line 3: .*{re.escape(found)}"):
        next(conversations)


def test_the_pieces_of_a_text_become_pairs(tmp_path):
    path = tmp_path / "pieces.txt"
    path.write_text(
        "Why Rain Falls\n\nIt is heavy.\n<|endoftext|>\nThe Hat\n\nOnce.\n\nTwice.\n<|endoftext|>\n"
    )
    pairs = [tuple(said["content"] for said in messages) for messages in chat.read_conversations(path)]
    assert pairs == [
        ("Explain: Why Rain Falls", "It is heavy."),
        ("Tell me the story called The Hat", "Once.\n\nTwice."),
    ]
