"""Learning from conversations: only answers are learned, exactly as transformers masks them."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import Heard
from tiny_models import instruct, real_data
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from smollm2 import chat_data as chat
from smollm2.config import SmolLM2Config
from smollm2.conversation import Conversation
from smollm2.errors import DataError
from smollm2.loss import inputs_and_targets
from smollm2.model import SmolLM2
from smollm2.sampling import SamplingOptions
from smollm2.tokenizer import Tokenizer
from smollm2.training import train
from tests.soak import small_config

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
    marked = {"return_dict": True, "return_assistant_tokens_mask": True}
    said = theirs.apply_chat_template(TALK, chat_template=WITH_GENERATION, **marked)
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


def test_an_answer_ends_as_the_models_own_template_ends_it(tokenizer, tmp_path):
    """Also where documents end otherwise, as those of a base model do."""
    (tmp_path / "chat_template.jinja").write_text(chat.CHATML)
    talks = chat.ChatFile("talk.jsonl", 0.1, tmp_path)
    end = tokenizer.token_id("<|im_end|>")
    assert talks.template_and_end(tokenizer, tokenizer.end_of_text_id) == (chat.CHATML, end)


def test_a_template_reads_the_same_special_tokens_in_training_as_when_it_answers(tokenizer, tmp_path):
    """One that begins with `bos_token` trained without it, and was then asked with it."""
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}" + chat.CHATML)
    (tmp_path / "tokenizer_config.json").write_text(
        '{"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"}'
    )
    path = tmp_path / "talk.jsonl"
    path.write_text(3 * (json.dumps({"messages": TALK[1:3]}) + "\n"))
    data = chat.ChatFile(str(path), 0.1, tmp_path).prepare(tokenizer, None, lambda _: None, lambda _: None)
    ids = data.train.tokens.tolist()
    asked = ids[: next(place for place, i in enumerate(ids) if i >= 0)]
    stand_in = SimpleNamespace(config=SmolLM2Config(), end_ids=())
    talk = Conversation(stand_in, tokenizer, tmp_path, chat=True)
    assert [~i for i in asked] == talk.ask(TALK[1]["content"]) and ~asked[0] == 0


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer):
    last_only = "{% for m in messages[-2:] %}{{ m['content'] }}<|im_end|>{% endfor %}"
    with pytest.raises(DataError, match="rewrites earlier turns"):
        chat.encode_conversation(tokenizer, TALK, last_only, {})


BAD_LINES = {
    "not json": "'not json'", '{"text": "a"}': "expected {",
    '{"messages": [{"role": "user", "content": null}]}': "None",
    '{"messages": [{"role": "robot", "content": "a"}]}': "robot",
    '{"messages": [{"role": "user", "content": "a"}]}': "nobody answers",
    '{"messages": [{"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}]}': "tool_calls",
}  # fmt: skip


@pytest.mark.parametrize("line, found", BAD_LINES.items())
def test_a_bad_line_is_named(tmp_path, line, found):
    path = tmp_path / "talk.jsonl"
    path.write_text(json.dumps({"messages": TALK}) + "\n\n" + line + "\n")
    conversations = chat.read_conversations(path)
    assert next(conversations) == TALK
    with pytest.raises(DataError, match=rf"line 3: .*{re.escape(found)}"):
        next(conversations)


def test_half_a_character_in_a_conversation_is_none(tokenizer, tmp_path):
    (path := tmp_path / "talk.ndjson").write_text(
        json.dumps({"messages": [TALK[1], {"role": "assistant", "content": "a\ud800", "tool_calls": None}]})
    )
    talk = next(chat.read_conversations(path))
    assert talk == [TALK[1], {"role": "assistant", "content": "a?"}]
    chat.encode_conversation(tokenizer, talk, chat.CHATML, {})


def test_the_pieces_of_a_text_become_pairs(tmp_path):
    path = tmp_path / "pieces.txt"
    path.write_text("Why Rain Falls\n\nIt is heavy.\n<|endoftext|>\n\n\nThe Hat\n\nOnce.\n\nTwice.\n")
    pairs = [tuple(said["content"] for said in messages) for messages in chat.read_conversations(path)]
    assert pairs == [
        ("Explain: Why Rain Falls", "It is heavy."),
        ("Tell me the story called The Hat", "Once.\n\nTwice."),
    ]


def test_a_piece_without_a_title_is_left_out_but_not_in_silence(tokenizer, tmp_path):
    (path := tmp_path / "pieces.txt").write_text(
        "".join(f"The Hat {n}\n\nOnce.\n<|endoftext|>\n" for n in range(3)) + "No title,\nbut words.\n"
    )
    said: list[str] = []
    chat.ChatFile(str(path), 0.1, None).prepare(tokenizer, None, lambda identity: None, said.append)
    assert (
        said[0]
        == "note: 1 pieces are left out for want of a title and a blank line: 'No title,\\nbut words.'"
    )
    assert "3 conversations" in said[1]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("chat") / "talk.jsonl"
    asked = [(f"What is {a} and {b}?", f"It is {a + b}.") for a in range(2, 14) for b in range(2, 14)]
    said = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in asked]
    lines = [{"messages": messages} for messages in said]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def chatting(path: Path, folder: Path, **train):
    return small_config(path, folder, data={"chat_file": str(path)}, **train)


def test_a_run_on_conversations_resumes_bit_for_bit_and_its_folder_answers(pairs, tmp_path):
    often = {"val_every": 10, "sample_every": 10}
    whole = train(chatting(pairs, tmp_path / "a", max_steps=30, **often))
    parts = train(chatting(pairs, tmp_path / "b", max_steps=20, continue_steps=10, **often))
    for file in ("model.safetensors", "optim.safetensors", "state.json", "chat_template.jinja"):
        assert (whole.checkpoint / file).read_bytes() == (parts.checkpoint / file).read_bytes(), file
    first, last = whole.validations[0][1], whole.validations[-1][1]
    assert last < 0.75 * first  # nats a token of held-out answers
    model = SmolLM2.from_pretrained(whole.checkpoint)
    talk = Conversation(model, Tokenizer.from_file(whole.checkpoint), whole.checkpoint, chat=True, room=16)
    assert talk.stop_ids == (model.config.eos_token_id,)
    greedy = SamplingOptions(max_new_tokens=12, temperature=0)
    answer = "".join(talk.stream(talk.ask("What is 2 and 3?"), greedy))
    assert answer and "Question" not in answer


def test_a_base_whose_files_disagree_on_bos_gives_a_resumed_run_the_same_text(pairs, tmp_path):
    """Its template is asked with the one that it was trained with, too."""
    base = instruct(tmp_path / "base", "{{ bos_token }}" + chat.CHATML)
    said = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps(said | {"bos_token": "<|endoftext|>"}))
    run = train(chatting(pairs, tmp_path / "a", place={"init_from": str(base)}, max_steps=1))
    tokenizer = Tokenizer.from_file(base)
    first, again = (
        chat.ChatFile(str(pairs), 0.1, folder).prepare(tokenizer, None, lambda _: None, lambda _: None)
        for folder in (base, run.checkpoint)
    )
    assert first.train.tokens.tolist() == again.train.tokens.tolist()
    assert "<|endoftext|>" in tokenizer.decode([~first.train.tokens[0]])


def test_bytes_of_answers_are_not_told_as_those_of_the_file(pairs, tmp_path):
    run = train(chatting(pairs, tmp_path / "a", max_steps=1), heard := Heard())
    answers = [json.loads(line)["messages"][1]["content"] for line in pairs.read_text().splitlines()]
    size, held_out = len("".join(answers)), len("".join(answers[-14:]))
    told = rf"talk.jsonl, {size:,} bytes of answers; .* held out \({held_out} bytes of answers\)"
    assert run.step == 1 and any(re.search(told, line) for line in heard.messages)


def test_micro_batches_and_the_whole_batch_give_the_same_mean_over_answers(pairs, tmp_path):
    """Rows hold different numbers of answer tokens: a mean of means would weigh them wrongly."""
    whole = train(chatting(pairs, tmp_path / "a", max_steps=5))
    parts = train(chatting(pairs, tmp_path / "b", max_steps=5, micro_batch_size=2))
    assert np.allclose([loss for _, loss in whole.losses], [loss for _, loss in parts.losses], rtol=2e-5)


def test_a_chat_file_of_one_conversation_is_refused_and_nothing_is_left(tmp_path):
    path = tmp_path / "one.jsonl"
    path.write_text(json.dumps({"messages": TALK}))
    with pytest.raises(DataError, match="1 conversations; expected at least 2"):
        train(chatting(path, tmp_path / "a"))
    assert not (tmp_path / "a").exists()
