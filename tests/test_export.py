"""An export is read alike by transformers, llama.cpp and Ollama, and never overwrites what is not its own."""

import json
import os
import re
import urllib.request
from pathlib import Path

import pytest
import torch
from check_export_compat import HARD_STRINGS, compare
from tiny_models import (
    CHAT_TEMPLATE,
    instruct,
    metaspace_tokenizer,
    real_data,
    save_folder,
    tiny_model,
    tiny_tokenizer,
    with_tokens,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from smollm2 import SmolLM2, Tokenizer
from smollm2.chat_data import PLAIN
from smollm2.conversation import chat_template, render_chat, special_tokens, stop_ids, tokenizer_config
from smollm2.errors import ConfigError, UserError
from smollm2.export import export, main
from smollm2.files import dump_json
from smollm2.sampling import prompt_ids


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return save_folder(tmp_path_factory.mktemp("made") / "tiny.ckpt", tiny_model(rope_theta=1e5))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("theta", [1e4, 1e5])
def test_transformers_computes_the_same_logits_and_ids(tmp_path, theta, tied):
    source = save_folder(tmp_path / "in", tiny_model(rope_theta=theta, tie_word_embeddings=tied))
    out = export(source, tmp_path / "out")
    result = compare(out, length=256)
    assert result["length"] == 256 and result["scale"] > 1.0 and result["logits"] <= 1e-5
    assert result["tokens"] == []
    fields = json.loads((out / "config.json").read_text())
    # transformers 4's form and 5's
    assert fields["rope_theta"] == fields["rope_parameters"]["rope_theta"] == theta
    assert fields["dtype"] == fields["torch_dtype"] == "float32"


def test_bf16_halves_the_file_and_stays_bf16(checkpoint, tmp_path):
    out = export(checkpoint, tmp_path / "out", dtype="bf16")
    assert AutoModelForCausalLM.from_pretrained(out, dtype="auto").dtype == torch.bfloat16
    full, half = ((folder / "model.safetensors").stat().st_size for folder in (checkpoint, out))
    assert half < 0.6 * full
    again = export(out, tmp_path / "again")  # as stored: bf16 in, bf16 out, to the bit
    assert (again / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


WITHOUT_SYSTEM = re.sub(r"{% if loop.first .*?{% endif %}", "", CHAT_TEMPLATE, flags=re.DOTALL)
OTHER = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}<|assistant|>\n"
REFUSES = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + WITHOUT_SYSTEM


def test_an_instruct_folder_keeps_its_chat_template_and_special_tokens(tmp_path):
    source = instruct(tmp_path / "in")
    theirs = PreTrainedTokenizerFast.from_pretrained(export(source, tmp_path / "out"))
    assert theirs.bos_token == "<|im_start|>" and theirs.eos_token == theirs.pad_token == "<|im_end|>"
    asked = [{"role": "system", "content": "be"}, {"role": "user", "content": "hi"}]
    shown = theirs.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    turns = "<|im_start|>system\nbe<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
    assert shown == turns + "<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("template", "end", "system"),
    [
        pytest.param(CHAT_TEMPLATE, "<|im_end|>", "Be brief", id="default system turn"),
        pytest.param(WITHOUT_SYSTEM, "<|im_end|>", None, id="none"),
        pytest.param(OTHER, "<|end|>", None, id="not ChatML"),
        pytest.param(REFUSES, "<|im_end|>", None, id="no system turn"),
    ],
)
def test_ollamas_recipe_follows_the_models_template_or_says_that_it_cannot(tmp_path, template, end, system):
    source = instruct(tmp_path / "in", template, "<|start|>", end)
    recipe = (export(source, tmp_path / "out") / "Modelfile").read_text()
    assert re.findall('PARAMETER stop "(.*)"', recipe) == [end]
    assert re.findall('SYSTEM """(.*)"""', recipe) == ([system] if system else [])
    if template in (OTHER, REFUSES):
        assert 'TEMPLATE "' not in recipe
        assert "# No TEMPLATE: the model's chat template is not ChatML" in recipe
    else:
        turn = "{{- range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}"
        assert f'TEMPLATE """{turn}<|im_start|>assistant\n"""' in recipe


def test_ollamas_recipe_says_the_template_of_plain_words_in_its_own_language(tmp_path):
    source = instruct(tmp_path / "in", PLAIN, "<|start|>", "<|end|>")
    recipe = (export(source, tmp_path / "out") / "Modelfile").read_text()
    jinja = re.search('TEMPLATE """(.*?)"""', recipe, re.DOTALL)[1]
    words = {
        "{{- range .Messages }}": "{% for message in messages %}",
        '{{ if eq .Role "assistant" }}': "{% if message['role'] == 'assistant' %}",
        "{{ .Content }}": "{{ message['content'] }}", "{{ else }}": "{% else %}",
        "{{ end }}{{ end }}": "{% endif %}{% endfor %}", "<|end|>": "{{ eos_token }}",
    }  # fmt: skip
    for go, word in words.items():
        jinja = jinja.replace(go, word)
    assert jinja == PLAIN


@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_all_end_tokens_of_a_model_are_kept_and_the_first_is_the_same_everywhere(tmp_path, name):
    gguf = pytest.importorskip("gguf")
    source = save_folder(tmp_path / "in", tiny_model(eos_token_id=381), with_tokens("<|eot|>", "<|end|>"))
    fields = json.loads((source / name).read_text()) | {"eos_token_id": [381, 380, 381, -1]}
    (source / name).write_bytes(dump_json(fields))
    for out in (export(source, tmp_path / "out", gguf="f16"), export(tmp_path / "out", tmp_path / "again")):
        read = {path.name: json.loads(path.read_text()) for path in out.glob("*.json")}
        assert read["generation_config.json"]["eos_token_id"] == [381, 380]
        assert read["config.json"]["eos_token_id"] == 381
        assert read["tokenizer_config.json"]["eos_token"] == "<|end|>"
        stops = re.findall('PARAMETER stop "(.*)"', (out / "Modelfile").read_text())
        assert stops == ["<|end|>", "<|eot|>"]
    reader = gguf.GGUFReader(tmp_path / "out" / "model-f16.gguf")
    assert reader.fields["tokenizer.ggml.eos_token_id"].contents() == 381


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
def test_what_the_tokenizer_names_ends_a_text_and_fills_the_template_behind_an_export_as_before_it(
    tmp_path, name
):
    """As fine-tunes often are: the tokenizer says <|im_end|>, config.json still the base model's end."""
    gguf = pytest.importorskip("gguf")
    tokenizer = with_tokens("<|im_start|>", "<|im_end|>", "<|stop|>")
    source = save_folder(tmp_path / "in", tiny_model(), tokenizer)
    own = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "[PAD]"}
    (source / name).write_text(json.dumps(json.loads((source / "tokenizer_config.json").read_text()) | own))
    (source / "chat_template.jinja").write_text(
        "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    )
    talk = [{"role": "user", "content": "hi"}]
    theirs = PreTrainedTokenizerFast.from_pretrained(source).apply_chat_template(talk, tokenize=False)
    assert theirs == "<|im_start|>hi<|im_end|>"
    out = export(source, tmp_path / "out", gguf="f16")
    for folder in (source, out):
        named = special_tokens(tokenizer_config(folder))
        assert render_chat(chat_template(folder), talk, named) == theirs
        assert set(stop_ids(folder, tokenizer)) == {0, 381}
    reader = PreTrainedTokenizerFast.from_pretrained(out)
    assert reader.apply_chat_template(talk, tokenize=False) == theirs and len(reader) == tokenizer.vocab_size
    assert set(json.loads((out / "generation_config.json").read_text())["eos_token_id"]) == {0, 381}
    assert re.findall('stop "(.*)"', (out / "Modelfile").read_text()) == ["<|im_end|>", "<|endoftext|>"]
    fields = gguf.GGUFReader(out / "model-f16.gguf").fields
    ids = {role: fields[f"tokenizer.ggml.{role}_token_id"].contents() for role in ("bos", "eos", "unknown")}
    assert ids == {"bos": 380, "eos": 381, "unknown": 0}


def test_ollama_is_offered_the_gguf_alone(checkpoint, tmp_path):
    """A folder it converts by itself, and then reads "it's" and " =" as other tokens than were learned."""
    pytest.importorskip("gguf")
    alone, beside = (export(checkpoint, tmp_path / str(gguf), gguf=gguf) for gguf in (None, "f16"))
    first, second = ((out / "Modelfile").read_text().split("\n")[0] for out in (alone, beside))
    assert "other tokens than the model learned" in first and second == "FROM ./model-f16.gguf"
    assert ["ollama create" in (out / "README.md").read_text() for out in (alone, beside)] == [False, True]


def test_a_llama_tokenizer_keeps_its_special_tokens_and_its_size(tmp_path):
    """Its normaliser marks blanks, in the names of special tokens too: under those names they would be new entries
    beyond the embedding."""
    tokenizer = metaspace_tokenizer()
    model = tiny_model(vocab_size=tokenizer.vocab_size, bos_token_id=1, eos_token_id=2)
    out = export(save_folder(tmp_path / "in", model, tokenizer), tmp_path / "out")
    for reader in (AutoTokenizer, PreTrainedTokenizerFast):
        theirs = reader.from_pretrained(out)
        assert (theirs.bos_token_id, theirs.eos_token_id, len(theirs)) == (1, 2, model.config.vocab_size)
        assert theirs("the king").input_ids == prompt_ids(model, tokenizer, "the king")
    assert 'PARAMETER stop "<end>"' in (out / "Modelfile").read_text()


def test_the_card_of_a_folder_that_is_current_has_its_name(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(checkpoint)
    assert f"\n# {checkpoint.stem}\n" in (export(".", tmp_path / "out") / "README.md").read_text()


def test_the_current_folder_is_not_replaced_under_ones_feet(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="is the current folder; expected another one"):
        export(checkpoint, ".")
    assert export(checkpoint, "out").is_dir()


def test_a_foreign_folder_is_never_overwritten(checkpoint, tmp_path, capsys):
    out = tmp_path / "out of it #2"
    out.mkdir()
    for foreign in ("thesis.txt", "export.json"):
        (out / foreign).write_text("{}")
        with pytest.raises(ConfigError, match=f"{foreign} is no unchanged part of an export"):
            export(checkpoint, out)
        (out / foreign).unlink()
    export(checkpoint, out)  # empty: fine
    first = (out / "export.json").read_bytes()
    assert main(["--checkpoint", str(checkpoint), "--out", str(out)]) == 0  # replaced, with equal bytes
    assert f"hf upload OWNER/NAME '{out}'\n" in capsys.readouterr().out  # as a shell reads it
    assert (out / "export.json").read_bytes() == first
    for foreign in ("notes.txt", "README.md"):  # added, and edited
        (out / foreign).write_text("mine")
        with pytest.raises(ConfigError, match=f"{foreign} is no unchanged part"):
            export(checkpoint, out)
        assert (out / foreign).read_text() == "mine"
        (out / foreign).unlink()
    with pytest.raises(ConfigError, match="inside the checkpoint"):
        export(checkpoint, checkpoint / "out")
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


@pytest.mark.parametrize("files", [["a.txt"], {"a.txt": 5}, {"a.txt": {}}, "a.txt", 5])
def test_a_receipt_of_another_program_makes_no_folder_ours(checkpoint, tmp_path, files):
    (tmp_path / "a.txt").write_text("mine")
    (tmp_path / "export.json").write_text(json.dumps({"files": files}))
    with pytest.raises(ConfigError, match="is no unchanged part of an export"):
        export(checkpoint, tmp_path)


def test_a_failed_export_leaves_the_earlier_one_and_no_leftovers(checkpoint, tmp_path, monkeypatch):
    out = export(checkpoint, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("smollm2.export.write_tensors", full_disk)
    with pytest.raises(UserError, match="No space left on device; nothing was changed"):
        export(checkpoint, out, dtype="bf16")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_export_that_was_killed_between_its_two_renames_is_not_lost(checkpoint, tmp_path, monkeypatch):
    out = export(checkpoint, tmp_path / "out")
    before = (out / "export.json").read_bytes()
    os.rename(out, tmp_path / "out.old-0123abcd")
    theirs = {"out.old-2025", "out.old-20251127", "x.tmp-0123abcd"}  # somebody's
    for name in ("out.tmp-0123abcd", *theirs):
        (tmp_path / name).mkdir()
    monkeypatch.setattr("smollm2.export.commit_folder", lambda *_: None)
    export(checkpoint, out, dtype="bf16")
    assert (out / "export.json").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"out", *theirs}


WIDE = {"hidden_size": 128, "intermediate_size": 160, "initializer_range": 0.09}


@pytest.mark.parametrize(("kind", "theta", "tolerance"), [("f16", 1e4, 0.01), ("q8_0", 1e5, 0.15)])
def test_gguf_says_what_we_say_within_its_rounding(tmp_path, kind, theta, tolerance):
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    source, file = save_folder(tmp_path / "in", tiny_model(rope_theta=theta, **WIDE)), f"model-{kind}.gguf"
    out = export(source, tmp_path / "out", gguf=kind)
    theirs = AutoModelForCausalLM.from_pretrained(out, gguf_file=file, dtype=torch.float32).eval()
    ours = SmolLM2.from_pretrained(source)
    ids = torch.randint(1, 400, (1, 200), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        difference = (theirs(ids).logits.log_softmax(-1) - ours(ids).log_softmax(-1)).abs().max()
        settings = {"max_new_tokens": 32, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        continued = theirs.generate(ids, **settings)
    assert 0 < difference < tolerance
    expected = ours.generate(ids, 32, stop_ids=())
    assert len(set(expected[0, 200:].tolist())) > 3  # not one token over and over
    assert kind == "q8_0" or torch.equal(continued, expected)
    size, whole = ((out / name).stat().st_size for name in (file, "model.safetensors"))
    assert size < (0.65 if kind == "f16" else 0.5) * whole
    assert f"FROM ./{file}" in (out / "Modelfile").read_text()


@pytest.mark.parametrize("id_in_the_file", [380, 390, 5000])
def test_gguf_ids_are_those_that_the_model_was_trained_with(tmp_path, id_in_the_file):
    """The tokenizers library numbers added tokens itself, behind the entries that there are."""
    gguf = pytest.importorskip("gguf")
    tokenizer = with_tokens("<|user|>", first_id=id_in_the_file)
    source = save_folder(tmp_path / "in", tiny_model(vocab_size=400), tokenizer)
    fields = gguf.GGUFReader(export(source, tmp_path / "out", gguf="f16") / "model-f16.gguf").fields
    tokens, types = (fields[f"tokenizer.ggml.{what}"].contents() for what in ("tokens", "token_type"))
    assert tokens[: tokenizer.vocab_size] == [tokenizer.token(i) for i in range(tokenizer.vocab_size)]
    kind = gguf.TokenType
    assert types == [kind.CONTROL] + [kind.NORMAL] * 379 + [kind.CONTROL] + [kind.UNUSED] * 19


def test_gguf_adds_what_the_tokenizers_own_post_processor_adds(tmp_path):
    gguf = pytest.importorskip("gguf")
    fields = json.loads(tiny_tokenizer().raw)
    end = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    tokens = {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}}
    for number, single in enumerate([[text], [end, text], [end, text, end]]):
        fields["post_processor"] = {"type": "TemplateProcessing", "single": single, "pair": single}
        fields["post_processor"]["special_tokens"] = tokens
        tokenizer = Tokenizer(json.dumps(fields).encode())
        source = save_folder(tmp_path / f"in{number}", tiny_model(vocab_size=400), tokenizer)
        out = export(source, tmp_path / f"out{number}", gguf="f16")
        found = gguf.GGUFReader(out / "model-f16.gguf").fields
        adds = [found[f"tokenizer.ggml.add_{which}_token"].contents() for which in ("bos", "eos")]
        ids = AutoTokenizer.from_pretrained(out)("a").input_ids
        assert adds == [ids[0] == 0, ids[-1] == 0]


def test_gguf_refuses_a_tokenizer_it_cannot_name(tmp_path):
    pytest.importorskip("gguf")
    with pytest.raises(UserError, match="not split as SmolLM2's"):
        export(real_data("stories-656k"), tmp_path / "out", gguf="f16")
    assert not (tmp_path / "out").exists()


@pytest.mark.llama_cpp
@pytest.mark.parametrize(("kind", "tolerance"), [("f16", 0.01), ("q8_0", 0.15)])
@pytest.mark.parametrize("which", ["trained here", "SmolLM2's own"])
def test_llama_cpp_reads_the_same_tokens_and_says_the_same(tmp_path, which, kind, tolerance):
    xllamacpp = pytest.importorskip("xllamacpp", reason="pip install xllamacpp")
    tokenizer = tiny_tokenizer() if which == "trained here" else Tokenizer.from_file(real_data("tokenizer"))
    model = tiny_model(rope_theta=1e5, vocab_size=tokenizer.vocab_size, **WIDE)
    out = export(save_folder(tmp_path / "in", model, tokenizer), tmp_path / "out", gguf=kind)
    params = xllamacpp.CommonParams()
    params.model.path = str(out / f"model-{kind}.gguf")
    params.n_ctx, params.n_parallel, params.cpuparams.n_threads, params.warmup = 512, 1, 1, False
    server = xllamacpp.Server(params)

    def post(path: str, body: dict) -> dict:
        header = {"Content-Type": "application/json"}
        request = urllib.request.Request(server.listening_address + path, json.dumps(body).encode(), header)
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)

    for text in HARD_STRINGS:
        read = post("/tokenize", {"content": text, "add_special": False, "parse_special": True})
        assert read["tokens"] == tokenizer.encode(text), repr(text)
    ids = torch.randint(17, tokenizer.vocab_size, (1, 200), generator=torch.Generator().manual_seed(1))
    settings = {"n_predict": 32, "temperature": 0.0, "n_probs": 5, "ignore_eos": True}
    steps = post("/completion", {"prompt": ids[0].tolist(), **settings})["completion_probabilities"]
    tokens = [step["id"] for step in steps]
    assert kind != "f16" or tokens == model.generate(ids, 32, stop_ids=())[0, 200:].tolist()
    with torch.no_grad():  # along llama.cpp's own text
        logprobs = model(torch.cat((ids, torch.tensor([tokens[:-1]])), dim=1)).log_softmax(-1)[0, 199:]
    theirs = torch.tensor([[top["logprob"] for top in step["top_logprobs"]] for step in steps])
    places = torch.tensor([[top["id"] for top in step["top_logprobs"]] for step in steps])
    assert float((logprobs.gather(1, places) - theirs).abs().max()) < tolerance
