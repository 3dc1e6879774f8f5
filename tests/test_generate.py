"""What a real trained model says, with the cache and without; and the terminal: once, in turns, as a chat."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import earlier_cell, random_ids, tiny_model, transformers_twin
from tiny_models import CHAT_TEMPLATE, instruct, save_folder, tiny_tokenizer
from tiny_models import tiny_model as wide_model  # of 400 entries, as `tiny_tokenizer`
from transformers import LlamaForCausalLM

from smollm2 import conversation
from smollm2.checkpoint import commit
from smollm2.conversation import Conversation, render_chat, stop_ids
from smollm2.cpu_decoder import fast_decoder
from smollm2.errors import CheckpointError, UserError, run_command
from smollm2.export import chatml_system
from smollm2.generate import main
from smollm2.model import SmolLM2
from smollm2.sampling import complete, prompt_ids, stream, stream_text
from smollm2.tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def stories(test_data):
    """A real, trained model of 656,000 parameters, and its tokenizer."""
    folder = test_data / "stories-656k"
    return SmolLM2.from_pretrained(folder), Tokenizer.from_file(folder)


def test_a_real_models_prompt_and_text_are_those_of_transformers(stories, test_data):
    """Its tokenizer marks blanks and asks for a begin token: neither may be lost, however long the text."""
    from transformers import AutoTokenizer

    model, tokenizer = stories
    theirs = AutoTokenizer.from_pretrained(test_data / "stories-656k")
    expected = theirs("The cat", return_tensors="pt")
    assert prompt_ids(model, tokenizer, "The cat") == expected.input_ids[0].tolist() == [1, 80, 247, 476]
    assert prompt_ids(model, tokenizer, "") == theirs("").input_ids
    settings = {"max_new_tokens": 200, "do_sample": False, "pad_token_id": 0}
    ids = transformers_twin(model).generate(expected.input_ids, attention_mask=None, **settings)[0]
    said = "The cat" + complete(model, tokenizer, "The cat", 200, temperature=0.0)
    assert said == theirs.decode(ids, skip_special_tokens=True)


def lively_model(**changes) -> SmolLM2:
    """A random model whose greedy text does not soon fall into one repeated token, as a tied one's does."""
    return tiny_model(tie_word_embeddings=False, initializer_range=0.3, eos_token_id=None, **changes)


FILTERED = {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.02, "seed": 4}


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 3}, FILTERED], ids=str)
@pytest.mark.parametrize("new", [1, 90])  # 90: the context of 40 overflows twice
@pytest.mark.parametrize("time", [9, 39, 40, 70])
def test_the_cache_changes_no_token(options, new, time):
    model = lively_model(max_position_embeddings=40).double()  # in fp32 a draw may fall between two roundings
    ids = random_ids(model, batch=3, time=time)
    cached = model.generate(ids, max_new_tokens=new, use_cache=True, **options)
    assert torch.equal(cached, model.generate(ids, max_new_tokens=new, use_cache=False, **options))
    assert cached.shape == (3, time + new) and torch.equal(cached[:, :time], ids) and not cached.requires_grad
    assert new == 1 or len(cached[:, time:].unique()) > 10  # or there was little to compare


def test_every_end_that_a_folder_names_ends_a_text_and_is_kept(tmp_path):
    """generation_config.json may name more of them than config.json, as that of an Instruct model."""
    model = tiny_model(bos_token_id=1, eos_token_id=2)
    ids = random_ids(model, batch=1, time=7)
    model.end_ids = (2, model.generate(ids, 12)[0, 12].item())
    model.save_pretrained(tmp_path)
    theirs = LlamaForCausalLM.from_pretrained(tmp_path)
    expected = theirs.generate(ids, max_new_tokens=12, do_sample=False)
    assert expected.shape[1] <= 7 + 6
    ours = SmolLM2.from_pretrained(tmp_path)
    assert torch.equal(ours.generate(ids, 12), expected) and ours.end_ids == model.end_ids
    assert torch.equal(fast_decoder(ours)[0].generate(ids, 12), expected)


def test_a_stream_comes_token_by_token_and_a_text_piece_by_piece():
    model, tokenizer = wide_model(eos_token_id=None), tiny_tokenizer()
    ids = torch.tensor([[0]])
    assert len([token for (token, _), _ in zip(stream(model, ids, 10**9), range(4), strict=False)]) == 4
    assert isinstance(next(stream_text(model, tokenizer, "", 10**9, temperature=1.0, seed=0)), str)
    eight = tokenizer.decode(model.generate(ids, max_new_tokens=8)[0, 1:], skip_special_tokens=True)
    assert complete(model, tokenizer, "", 8) == eight  # an empty prompt begins a new document
    with pytest.raises(UserError, match="the model's context is 512"):
        complete(model, tokenizer, "cat mat " * 300)
    for wrong in (torch.zeros(1, 0, dtype=torch.long), torch.zeros(3, dtype=torch.long)):
        with pytest.raises(ValueError, match="expected \\(batch, time\\)"):
            model.generate(wrong)


def add_fields(folder: Path, name: str, **fields) -> None:
    (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | fields))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return save_folder(tmp_path_factory.mktemp("made") / "tiny.ckpt", wide_model())


@pytest.fixture(scope="module")
def chat_checkpoint(tmp_path_factory) -> Path:
    return instruct(tmp_path_factory.mktemp("made") / "instruct")


@pytest.fixture
def say(monkeypatch, capsys):
    """What the command prints, run in this process with `stdin` as its standard input."""

    def run(checkpoint: Path, *arguments: str, stdin: bytes | None = None) -> str:
        given = stdin if stdin is None else io.TextIOWrapper(io.BytesIO(stdin), "ascii")
        monkeypatch.setattr(sys, "stdin", given)
        assert main(["--checkpoint", str(checkpoint), *arguments]) == 0
        return capsys.readouterr().out

    return run


def test_the_same_seed_says_the_same_from_a_pipe_and_another_seed_does_not(checkpoint, say):
    settings, prompt = ("--max_new_tokens", "12", "--seed"), "Once upon déjà"
    argv = [sys.executable, "-m", "smollm2.generate", "--checkpoint", str(checkpoint), *settings, "7"]
    environment = os.environ | {"PYTHONUTF8": "1"}
    first = subprocess.check_output(argv, input=prompt.encode() + b"\n", cwd=ROOT, env=environment).decode()
    assert first == say(checkpoint, "--prompt", prompt, *settings, "7")
    assert first != say(checkpoint, "--prompt", prompt, *settings, "8")


INTERACTIVE = ("--interactive", "--max_new_tokens", "5", "--seed", "1")


@pytest.mark.parametrize("stray", ["bfloat16", "meta", "with meta"])
@pytest.mark.parametrize("dtype", ["fp32", "int8"])
def test_a_default_set_in_an_earlier_cell_changes_no_word(checkpoint, say, stray, dtype):
    words = ("--prompt", "Once", "--max_new_tokens", "9", "--seed", "1", "--dtype", dtype)
    expected = say(checkpoint, *words)
    with earlier_cell(stray):
        assert say(checkpoint, *words) == expected


@pytest.mark.parametrize("arguments", [(), INTERACTIVE], ids=len)
def test_input_that_is_closed_or_not_text_is_one_line(checkpoint, say, arguments):
    with pytest.raises(UserError, match="standard input is closed: pass the text with --prompt"):
        say(checkpoint, *arguments)
    with pytest.raises(UserError, match=r"standard input: not UTF-8 text \(byte 3\)"):
        say(checkpoint, *arguments, stdin=b"caf\xe9 au lait\n")


def test_output_may_be_closed_or_an_object_with_write_and_flush_alone(checkpoint, say, monkeypatch):
    tee = SimpleNamespace(write=sys.stdout.write, flush=sys.stdout.flush)
    monkeypatch.setattr(sys, "stdout", tee)
    assert say(checkpoint, *INTERACTIVE, stdin=b"The king\n").count("> ") == 2
    monkeypatch.setattr(sys, "stdout", None)
    assert say(checkpoint, "--prompt", "a", "--max_new_tokens", "2") == ""


def test_a_conversation_continues_its_text_and_forgets_the_oldest(checkpoint):
    tokenizer = tiny_tokenizer()
    talk = Conversation(wide_model(max_position_embeddings=64), tokenizer, checkpoint, room=16)
    talk.ask("The king")
    talk.messages.append({"role": "assistant", "content": " said"})
    assert tokenizer.decode(talk.ask("come")) == "<|endoftext|>The king said\ncome" and not talk.forgotten
    talk.messages.append({"role": "assistant", "content": " and speak of the year 1599" * 20})
    assert len(talk.ask("")) == 48 and talk.forgotten


def test_a_chat_forgets_its_oldest_turns_and_refuses_a_message_that_never_fits(chat_checkpoint):
    talk = Conversation(wide_model(), Tokenizer.from_file(chat_checkpoint), chat_checkpoint, chat=True)
    talk.ask("one " * 8)
    talk.messages.append({"role": "assistant", "content": "yes"})
    talk.limit = len(talk.ask("two")) - 1  # one token too few: the question goes, and its answer with it
    talk.messages.pop()
    assert len(talk.ask("two")) < talk.limit and talk.forgotten
    assert talk.messages == [{"role": "user", "content": "two"}]
    with pytest.raises(UserError, match=f"tokens, {talk.limit} fit; shorten it"):
        talk.ask("far too long " * 60)
    assert len(talk.messages) == 1  # what was refused was not said


def test_of_a_short_context_half_is_for_the_question(checkpoint):
    """As that of an export whose model was trained on rows of 64 tokens: all but two tokens were forgotten."""
    talk = Conversation(wide_model(max_position_embeddings=64), tiny_tokenizer(), checkpoint)
    assert len(talk.ask("word " * 20)) == 32 and talk.forgotten


TURN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}\n{% endfor %}"
TEMPLATES = {
    "instruct": CHAT_TEMPLATE,
    "tools": TURN + "{% if tools is none %}no tools{% endif %}{{ unk_token }}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "functions": "{{ strftime_now('%Y') }}{{ messages | tojson }}",
    "several": [{"name": "rag", "template": "x"}, {"name": "default", "template": TURN}],
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("own_file", [True, False])
def test_a_chat_reads_what_transformers_template_writes(chat_checkpoint, name, own_file, tmp_path):
    from transformers import PreTrainedTokenizerFast

    folder = shutil.copytree(chat_checkpoint, tmp_path / "model")
    add_fields(folder, "tokenizer_config.json", eos_token={"__type": "AddedToken", "content": "<|im_end|>"})
    if own_file and name != "several":
        (folder / "chat_template.jinja").write_text(TEMPLATES[name])
    else:
        (folder / "chat_template.jinja").unlink()
        add_fields(folder, "tokenizer_config.json", chat_template=TEMPLATES[name])
    messages = [{"role": "user", "content": "Hi <b>you</b> é"}, {"role": "assistant", "content": "Hello"}]
    messages += [{"role": "user", "content": "1+1?"}]
    theirs = PreTrainedTokenizerFast.from_pretrained(folder)
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    special = conversation.special_tokens(conversation.tokenizer_config(folder))
    assert render_chat(conversation.chat_template(folder), messages, special) == expected
    talk = Conversation(wide_model(), Tokenizer.from_file(chat_checkpoint), folder, chat=True)
    talk.ask(messages[0]["content"])
    talk.messages.append({"role": "assistant", "content": "Hello"})
    assert talk.ask("1+1?") == theirs(expected, add_special_tokens=False).input_ids


HOSTILE = ["raise_exception('no')", "''.__class__.__mro__", "messages.append(1)", "1 / 0", "("]
HOSTILE += ["lipsum.__globals__['os'].popen('touch canary').read()"]
HOSTILE += ["cycler.__init__.__globals__.os.system('touch canary')", "raise_exception.__globals__.os"]


@pytest.mark.parametrize("template", HOSTILE)
def test_a_hostile_chat_template_is_an_error_and_not_code(template, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="chat template does not run"):
        render_chat("{{ " + template + " }}", [{"role": "user", "content": "a"}])
    assert not list(tmp_path.iterdir())


def test_names_in_a_tokenizer_config_are_texts(tmp_path):
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps({"chat_template": [{"name": ["a"], "template": "x"}], "eos_token": "\ud800"}))
    assert conversation.chat_template(tmp_path) is None
    with pytest.raises(UserError, match="eos_token: not UTF-8"):
        conversation.stop_ids(tmp_path, tiny_tokenizer())


def test_jinja_that_is_too_old_is_no_fault_of_the_template(monkeypatch):
    """Nor may an export take the template for one that is not ChatML."""
    monkeypatch.setattr("jinja2.__version__", "3.1.2")
    with pytest.raises(UserError, match=r"cannot be run here: .*jinja2>=") as caught:
        chatml_system(CHAT_TEMPLATE + "{# read by no other test, for transformers keeps them #}", {})
    assert not isinstance(caught.value, CheckpointError)


@pytest.mark.parametrize("template", [5, True, "\ud800", {"default": [1]}])
def test_a_chat_template_is_a_text(template, tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    with pytest.raises(UserError, match="the chat template"):
        conversation.chat_template(tmp_path)


@pytest.mark.parametrize("template", ["", "{# nothing #}"])
def test_a_chat_template_that_writes_nothing_is_one_line(chat_checkpoint, say, template, tmp_path):
    folder = shutil.copytree(chat_checkpoint, tmp_path / "copy")
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(UserError, match="--chat: "):
        say(folder, "--chat", "--prompt", "Hello")


def test_a_chat_answers_from_the_command_line(chat_checkpoint, say):
    said = say(chat_checkpoint, "--chat", "--prompt", "Hello", "--max_new_tokens", "5")
    assert said.strip() and "im_start" not in said and "Hello\n" not in said
    assert say(chat_checkpoint, "--chat", *INTERACTIVE, stdin=b"Hi\nAnd you?\n").count("> ") == 3


def test_only_where_an_empty_line_goes_on_it_is_said_to(checkpoint, chat_checkpoint, say, monkeypatch):
    """In a chat it is an empty question."""
    monkeypatch.setattr(conversation, "tell", (heard := []).append)
    say(checkpoint, *INTERACTIVE, stdin=b"")
    say(chat_checkpoint, "--chat", *INTERACTIVE, stdin=b"")
    assert ["Empty line: go on." in words for words in heard] == [True, False]


@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_every_end_token_that_the_folder_names_stops_a_text(checkpoint, name, tmp_path, say):
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    greedy = ["--prompt", "The", "--max_new_tokens", "9", "--temperature", "0"]
    tokenizer = Tokenizer.from_file(folder)
    start = torch.tensor([[0, *tokenizer.encode("The")]])
    ids = SmolLM2.from_pretrained(folder).generate(start, 9)[0].tolist()
    add_fields(folder, name, eos_token_id=[399, ids[5]])
    stopped = tokenizer.decode(ids[: ids.index(ids[5])], skip_special_tokens=True)
    assert say(folder, *greedy) == stopped + "\n"
    add_fields(folder, "tokenizer_config.json", eos_token=tokenizer.token(7))
    assert set(stop_ids(folder, tokenizer)) == {7, 0, 399, ids[5]}  # 0: the other file's
    add_fields(folder, name, eos_token_id="</s>")
    with pytest.raises(CheckpointError, match="eos_token_id"):
        say(folder, *greedy)


def test_a_damaged_byte_in_the_chat_template_is_said(chat_checkpoint, tmp_path, say):
    """The other files are those of test_corruption.py."""
    files = {path.name: path.read_bytes() for path in chat_checkpoint.iterdir()}
    folder = commit(tmp_path, "step-00000001.ckpt", files, "run", 1, {}).folder
    assert say(folder, "--chat", "--prompt", "a", "--max_new_tokens", "1")
    (folder / "chat_template.jinja").write_bytes(files["chat_template.jinja"].replace(b"e", b"f", 1))
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja: .*damaged"):
        say(folder, "--chat", "--prompt", "a", "--max_new_tokens", "1")


def test_ctrl_c_stops_an_answer_and_then_the_program(checkpoint, say, monkeypatch, capsys):
    def answer(*_, **__):
        yield "and "
        signal.raise_signal(signal.SIGINT)

    typed = iter(["The king"])
    monkeypatch.setattr("smollm2.sampling.stream_continuation", answer)
    monkeypatch.setattr("builtins.input", lambda _: next(typed, None) or signal.raise_signal(signal.SIGINT))
    with pytest.raises(SystemExit) as end:
        run_command(lambda: say(checkpoint, *INTERACTIVE, stdin=b""))
    said = capsys.readouterr()
    assert end.value.code == 130 and said.out == "and  [stopped]\n" and said.err.endswith("stopped\n")
