"""Samples follow the distribution they claim, and the terminal says them: one shot, several, from a pipe, in turns, as a chat."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny_models import save_folder, tiny_model, tiny_tokenizer

from smollm2 import Tokenizer
from smollm2.conversation import Conversation, read_prompt, render_chat
from smollm2.errors import CheckpointError, UserError
from smollm2.generate import main
from smollm2.sampling import generate, next_token_probabilities

ROOT = Path(__file__).parent.parent
DRAWS = 20_000
SETTINGS = [
    {"temperature": 1.0},
    {"temperature": 0.7},
    {"temperature": 1.6},
    {"top_k": 7},
    {"top_p": 0.8},
    {"min_p": 0.1},
    {"temperature": 0.7, "top_k": 12},
    {"temperature": 1.3, "top_p": 0.9},
    {"top_k": 20, "top_p": 0.7},
    {"temperature": 1.5, "min_p": 0.05},
    {"temperature": 0.8, "top_k": 25, "top_p": 0.85, "min_p": 0.08},
]


def warped(
    logits: torch.Tensor, temperature: float = 1.0, top_k=None, top_p=None, min_p=None
) -> torch.Tensor:
    """transformers' own distribution for the same settings, in its own order."""
    from transformers.generation import logits_process as theirs

    scores = theirs.TemperatureLogitsWarper(temperature)(None, logits)
    for warper, value in (
        (theirs.TopKLogitsWarper, top_k),
        (theirs.TopPLogitsWarper, top_p),
        (theirs.MinPLogitsWarper, min_p),
    ):
        scores = warper(value)(None, scores) if value is not None else scores
    return scores.softmax(-1)


@pytest.fixture(scope="module")
def peaked():
    """A model whose next token is neither certain nor uniform, and its logits after a fixed prompt."""
    model = tiny_model(vocab_size=60, initializer_range=0.2)
    prompt = torch.tensor([[5, 17, 33]])
    with torch.no_grad():
        return model, prompt, model(prompt)[:, -1]


def draw(model, prompt, seed: int, **settings) -> torch.Tensor:
    """Counts (V,) of the first token of 20,000 samples, drawn by `generate` itself."""
    rows = prompt.expand(DRAWS, -1)
    fresh = generate(model, rows, 1, stop_ids=(), seed=seed, **({"temperature": 1.0} | settings))[:, -1]
    return torch.bincount(fresh, minlength=model.config.vocab_size)


def chi_square_p_value(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """Probability of counts at least this far from `expected` (both (V,)) when they were drawn from it.

    Tokens that are expected fewer than 5 times share one bin, as the approximation needs.
    """
    rare = expected < 5
    bins = torch.cat((counts[~rare].double(), counts[rare].double().sum()[None]))
    means = torch.cat((expected[~rare].double(), expected[rare].double().sum()[None]))
    if means[-1] < 5:
        bins, means = (
            torch.cat((bins[:-2], bins[-2:].sum()[None])),
            torch.cat((means[:-2], means[-2:].sum()[None])),
        )
    statistic = ((bins - means) ** 2 / means).sum()
    return float(
        torch.special.gammaincc(torch.tensor((len(bins) - 1) / 2, dtype=torch.float64), statistic / 2)
    )


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_20000_draws_follow_transformers_distribution(peaked, settings):
    model, prompt, logits = peaked
    expected = warped(logits, **settings)[0] * DRAWS
    counts = draw(model, prompt, seed=11, **settings)
    assert int((expected > 0).sum()) >= 3  # a distribution, not a single token
    assert counts[expected == 0].sum() == 0  # what is filtered out never comes
    assert chi_square_p_value(counts, expected) > 1e-3


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_filters_equal_transformers_warpers_token_by_token(settings):
    logits = torch.randn(64, 500, generator=torch.Generator().manual_seed(3)) * 3
    ours = next_token_probabilities(logits, **({"temperature": 1.0} | settings))
    assert torch.allclose(ours, warped(logits, **settings), atol=1e-6)


def test_the_chi_square_notices_a_slightly_wrong_temperature(peaked):
    model, prompt, logits = peaked
    counts = draw(model, prompt, seed=11, temperature=1.1)
    assert chi_square_p_value(counts, warped(logits)[0] * DRAWS) < 1e-6


# --- the command line -------------------------------------------------------------------------------------------------

CHAT_TEMPLATE = (  # the form of the official Instruct models
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe brief<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def chat_tokenizer() -> Tokenizer:
    fields = json.loads(tiny_tokenizer(380).raw)
    for offset, word in enumerate(("<|im_start|>", "<|im_end|>")):
        fields["added_tokens"].append(dict(fields["added_tokens"][0], id=380 + offset, content=word))
    return Tokenizer(json.dumps(fields).encode())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return save_folder(tmp_path_factory.mktemp("made") / "tiny.ckpt", tiny_model())


@pytest.fixture(scope="module")
def chat_checkpoint(tmp_path_factory) -> Path:
    model = tiny_model(bos_token_id=380, eos_token_id=381, pad_token_id=381)
    folder = save_folder(tmp_path_factory.mktemp("made") / "instruct", model, chat_tokenizer())
    fields = json.loads((folder / "tokenizer_config.json").read_text()) | {"chat_template": CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))
    return folder


def command(checkpoint: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "smollm2.generate", "--checkpoint", str(checkpoint), *arguments]


def say(checkpoint: Path, *arguments: str, stdin: str | bytes | None = None) -> subprocess.CompletedProcess:
    data = stdin.encode() if isinstance(stdin, str) else stdin
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}
    return subprocess.run(
        command(checkpoint, *arguments),
        input=data or b"",
        capture_output=True,
        cwd=ROOT,
        env=environment,
        timeout=120,
    )


def test_the_same_seed_says_the_same_in_another_process_and_another_seed_does_not(checkpoint, capsys):
    common = ["--prompt", "The king", "--max_new_tokens", "12", "--seed"]
    first = say(checkpoint, *common, "7").stdout.decode()
    main(["--checkpoint", str(checkpoint), *common, "7"])
    again = capsys.readouterr().out
    main(["--checkpoint", str(checkpoint), *common, "8"])
    assert first == again != capsys.readouterr().out and first.startswith("The king")


def test_several_samples_differ_and_each_repeats_alone(checkpoint, capsys):
    common = ["--checkpoint", str(checkpoint), "--prompt", "The", "--max_new_tokens", "8"]
    main([*common, "--seed", "5", "--num_samples", "3"])
    parts = capsys.readouterr().out.split("--- sample ")
    assert [part.split(" ---\n")[0] for part in parts[1:]] == ["1 of 3", "2 of 3", "3 of 3"]
    texts = [part.split(" ---\n", 1)[1] for part in parts[1:]]
    assert len(set(texts)) == 3
    main([*common, "--seed", "6"])
    assert capsys.readouterr().out == texts[1]


def test_the_prompt_can_come_from_a_pipe(checkpoint, capsys):
    settings = ("--max_new_tokens", "6", "--temperature", "0")
    main(["--checkpoint", str(checkpoint), "--prompt", "Once upon déjà", *settings])
    assert say(checkpoint, *settings, stdin="Once upon déjà\n").stdout.decode() == capsys.readouterr().out


def test_a_pipe_that_is_not_text_is_one_line(monkeypatch):
    monkeypatch.setattr(
        "sys.stdin",
        io.TextIOWrapper(io.BytesIO(b"caf\xe9 au lait"), encoding="utf-8", errors="surrogateescape"),
    )
    with pytest.raises(UserError, match=r"standard input: not UTF-8 text \(byte 3\)"):
        read_prompt()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num_samples", "0"], "expected at least 1"),
        (["--num_samples", "2", "--temperature", "0"], "all samples would be the same"),
        (["--num_samples", "2", "--interactive"], "does not go with --interactive"),
        (["--temperature", "nan"], "temperature is nan"),
        (["--chat"], "has no chat template"),
    ],
)
def test_mistakes_are_one_line(checkpoint, arguments, message):
    with pytest.raises(UserError) as caught:
        main(["--checkpoint", str(checkpoint), "--prompt", "a", *arguments])
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_turns_grow_one_text_until_ctrl_d(checkpoint):
    done = say(
        checkpoint, "--interactive", "--max_new_tokens", "5", "--seed", "1", stdin="The king\n\n/new\nOnce\n"
    )
    assert done.returncode == 0 and b"Traceback" not in done.stderr
    assert done.stdout.decode().count("> ") == 5 and done.stdout.endswith(b"\n")


def test_a_conversation_continues_its_text_and_forgets_the_oldest():
    model, tokenizer = tiny_model(max_position_embeddings=64), tiny_tokenizer()
    talk = Conversation(model, tokenizer, room=16)
    ids = talk.ask("The king")
    talk.answer(" said")
    longer = talk.ask("come")
    assert (
        tokenizer.decode(longer) == "<|endoftext|>The king said\ncome" and ids[0] == tokenizer.end_of_text_id
    )
    talk.answer(" and speak of the year 1599" * 20)
    assert len(talk.ask("")) == 48 and talk.forgotten > 0


def test_a_chat_reads_what_transformers_template_writes(chat_checkpoint):
    from transformers import PreTrainedTokenizerFast

    messages = [
        {"role": "user", "content": "Hi <b>you</b>"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "1+1?"},
    ]
    theirs = PreTrainedTokenizerFast.from_pretrained(chat_checkpoint)
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert render_chat(CHAT_TEMPLATE, messages) == expected
    talk = Conversation.chat(
        tiny_model(bos_token_id=380, eos_token_id=381), chat_tokenizer(), chat_checkpoint
    )
    talk.ask(messages[0]["content"])
    talk.answer("Hello")
    assert talk.ask("1+1?") == theirs(expected, add_special_tokens=False).input_ids
    assert talk.stop_ids == (381,)


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no') }}",
        "{{ ''.__class__.__mro__ }}",
        "{% for %}",
        "{{ messages.append(1) }}",
        "{{ 1 / 0 }}",
    ],
)
def test_a_hostile_chat_template_is_an_error_and_not_code(template):
    with pytest.raises(CheckpointError, match="chat template does not run"):
        render_chat(template, [{"role": "user", "content": "a"}])


def test_a_chat_answers_from_the_command_line(chat_checkpoint, capsys):
    main(
        [
            "--checkpoint",
            str(chat_checkpoint),
            "--chat",
            "--prompt",
            "Hello",
            "--max_new_tokens",
            "5",
            "--temperature",
            "0",
        ]
    )
    said = capsys.readouterr().out
    assert said.strip() and "im_start" not in said and "Hello\n" not in said
    turns = say(
        chat_checkpoint,
        "--chat",
        "--interactive",
        "--max_new_tokens",
        "5",
        "--seed",
        "1",
        stdin="Hi\nAnd you?\n",
    )
    assert turns.returncode == 0 and turns.stdout.decode().count("> ") == 3


def test_ctrl_c_stops_an_answer_and_then_the_program_without_a_traceback(checkpoint):
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        command(checkpoint, "--interactive", "--max_new_tokens", "100000", "--seed", "1"),
        stdin=follower, stdout=follower, stderr=follower, cwd=ROOT, start_new_session=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    os.close(follower)
    seen = bytearray()

    def read_until(is_enough, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not is_enough(bytes(seen)):
            assert select.select([leader], [], [], deadline - time.monotonic())[0], bytes(seen[-500:])
            try:
                seen.extend(os.read(leader, 4096))
            except OSError:  # the other end closed
                return

    try:
        read_until(lambda said: said.endswith(b"> "))
        os.write(leader, b"The king\n")
        seen.clear()
        read_until(lambda said: len(said) > 200)  # it is writing
        process.send_signal(signal.SIGINT)
        read_until(lambda said: b" [stopped]" in said and said.endswith(b"> "))
        seen.clear()
        while not select.select([leader], [], [], 3)[
            0
        ]:  # a signal between the prompt and the first look at the keyboard waits for the next one
            process.send_signal(signal.SIGINT)
        read_until(lambda _: False)  # until the program closes its side
        assert process.wait(60) == 130
        assert b"stopped" in seen and b"Traceback" not in seen
    finally:
        process.kill()
        os.close(leader)
