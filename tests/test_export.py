"""An export is read alike by transformers, llama.cpp and Ollama, and never overwrites what is not its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import torch
from check_export_compat import HARD_STRINGS, compare
from tiny_models import metaspace_tokenizer, real_data, save_folder, tiny_model, tiny_tokenizer

from smollm2 import SmolLM2, Tokenizer
from smollm2.checkpoint import commit
from smollm2.errors import CheckpointError, ConfigError, UserError
from smollm2.export import export, main
from smollm2.files import dump_json
from smollm2.gguf_file import halves_to_pairs
from smollm2.sampling import prompt_ids
from smollm2.saver import tensor_file
from smollm2.weights import model_files


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return save_folder(tmp_path_factory.mktemp("made") / "tiny.ckpt", tiny_model(rope_theta=1e5))


def run_checkpoint(root: Path, template: str | None = None) -> Path:
    """A checkpoint as training commits it: state, manifest, and the run's log beside it."""
    model, tokenizer = tiny_model(), tiny_tokenizer()
    state = {
        "step": 30, "init_from": None, "base_model": None, "best": {"step": 20, "bits_per_byte": 2.125},
        "config": {"data": {"sequence_length": 128}, "train": {"learning_rate": 0.003, "batch_size": 16, "seed": 7}},
    }  # fmt: skip
    files = model_files(model.config) | tokenizer.files(512) | {"state.json": dump_json(state)}
    files["model.safetensors"] = tensor_file({name: p.detach() for name, p in model.named_parameters()})
    (root / "checkpoints").mkdir(parents=True)
    commit(root / "checkpoints", "step-00000030.ckpt", files, "run", 30, {})
    (root / "logs").mkdir()
    lines = [
        f"2026-11-23T19:00:00Z step={step} train_loss={5 - step / 10} lr=0.003 tokens={step * 2048}"
        for step in range(10, 60, 10)
    ]
    lines.insert(3, "2026-11-23T19:00:01Z step=30 val_loss=2.5 val_bits_per_byte=2.3456 val_tokens=1000")
    lines.append("2026-11-23T19:00:09Z step=60 train_lo")  # torn by a kill
    (root / "logs" / "training_loss.txt").write_text("\n".join(lines))
    return root / "checkpoints" / "step-00000030.ckpt"


def test_every_file_has_the_mode_that_umask_gives(tmp_path):
    """Others in a lab's folder, or the Ollama service, read what the person's umask lets them read."""
    before = os.umask(0o027)
    try:
        checkpoint = run_checkpoint(tmp_path / "run")
        written = [*checkpoint.iterdir(), *export(checkpoint, tmp_path / "out").iterdir()]
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in written} == {0o640} and len(written) > 10


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("theta", [1e4, 1e5])
def test_transformers_computes_the_same_logits_and_ids(tmp_path, theta, tied):
    source = save_folder(tmp_path / "in", tiny_model(rope_theta=theta, tie_word_embeddings=tied))
    result = compare(export(source, tmp_path / "out"), length=256)
    assert result["length"] == 256 and result["scale"] > 1.0
    assert result["logits"] <= 1e-5
    assert result["tokens"] == []


def test_the_wrong_theta_would_be_noticed(checkpoint, tmp_path):
    out = export(checkpoint, tmp_path / "out")
    fields = json.loads((out / "config.json").read_text())
    assert fields["rope_theta"] == fields["rope_parameters"]["rope_theta"] == 1e5
    assert fields["dtype"] == fields["torch_dtype"] == "float32"
    fields["rope_theta"] = fields["rope_parameters"]["rope_theta"] = 1e4
    from transformers import AutoModelForCausalLM

    theirs_as_saved = AutoModelForCausalLM.from_pretrained(out)
    (out / "config.json").write_text(json.dumps(fields))
    theirs_wrong = AutoModelForCausalLM.from_pretrained(out)
    ids = torch.arange(256)[None] % 400
    with torch.no_grad():
        assert (theirs_as_saved(ids).logits - theirs_wrong(ids).logits).abs().max() > 0.1


def test_the_real_tokenizer_keeps_its_ids_and_its_bytes(tmp_path):
    tokenizer = Tokenizer.from_file(real_data("tokenizer"))
    source = save_folder(
        tmp_path / "in",
        tiny_model(vocab_size=49152, hidden_size=16, num_attention_heads=2, num_key_value_heads=1),
        tokenizer,
    )
    out = export(source, tmp_path / "out")
    assert (out / "tokenizer.json").read_bytes() == tokenizer.raw
    assert compare(out, length=64)["tokens"] == []
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(out)("\n\n1.").input_ids == [1116, 33, 30]


def test_bf16_halves_the_file_and_loads_as_bf16(checkpoint, tmp_path):
    out = export(checkpoint, tmp_path / "out", dtype="bf16")
    from transformers import AutoModelForCausalLM

    assert AutoModelForCausalLM.from_pretrained(out, dtype="auto").dtype == torch.bfloat16
    full, half = ((folder / "model.safetensors").stat().st_size for folder in (checkpoint, out))
    assert half < 0.6 * full
    again = export(out, tmp_path / "again")  # as stored: bf16 in, bf16 out, to the bit
    assert (again / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def test_the_card_holds_the_runs_own_figures(tmp_path):
    out = export(run_checkpoint(tmp_path / "run"), tmp_path / "out")
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\n")
    for figure in (
        "| optimizer steps | 30 |",
        "| tokens seen | 61,440 |",
        "2.3456",
        "2.1250",
        "| last training loss (nats a token) | 2 |",
        "0.003",
    ):
        assert figure in card
    assert "step=40" not in card and str(tmp_path) not in card
    assert (out / "training_loss.png").read_bytes().startswith(b"\x89PNG") and "(training_loss.png)" in card
    assert (
        json.loads((out / "config.json").read_text())["max_position_embeddings"] == 128
    )  # what was trained, not what would fit
    assert SmolLM2.from_pretrained(out).config.max_position_embeddings == 128


def test_a_folder_without_a_run_gets_a_card_without_figures(checkpoint, tmp_path):
    out = export(checkpoint, tmp_path / "out")
    card = (out / "README.md").read_text()
    assert "## Training" not in card and ".png" not in card and not (out / "training_loss.png").exists()
    assert (
        'TEMPLATE """{{ .Prompt }}"""' in (out / "Modelfile").read_text()
        and "FROM ." in (out / "Modelfile").read_text()
    )


def test_an_instruct_folder_keeps_its_chat_template_and_special_tokens(tmp_path):
    tokenizer_fields = json.loads(tiny_tokenizer(380).raw)
    for offset, word in enumerate(("<|im_start|>", "<|im_end|>")):
        added = dict(tokenizer_fields["added_tokens"][0], id=380 + offset, content=word)
        tokenizer_fields["added_tokens"].append(added)
    tokenizer = Tokenizer(json.dumps(tokenizer_fields).encode())
    source = save_folder(
        tmp_path / "in", tiny_model(bos_token_id=380, eos_token_id=381, pad_token_id=381), tokenizer
    )
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant{{ '\\n' }}"
    (source / "chat_template.jinja").write_text(template)
    out = export(source, tmp_path / "out", gguf="f16")
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast.from_pretrained(out)
    assert (theirs.bos_token, theirs.eos_token, theirs.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    shown = theirs.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert shown == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert ".Messages" in (out / "Modelfile").read_text() and "<|im_end|>" in (out / "Modelfile").read_text()


def test_a_llama_tokenizer_keeps_its_special_tokens_and_its_size(tmp_path):
    """Its normaliser marks blanks, in the names of special tokens too: under those names they would be new entries beyond the embedding."""
    tokenizer = metaspace_tokenizer()
    model = tiny_model(vocab_size=tokenizer.vocab_size, bos_token_id=1, eos_token_id=2)
    out = export(save_folder(tmp_path / "in", model, tokenizer), tmp_path / "out")
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    for reader in (AutoTokenizer, PreTrainedTokenizerFast):
        theirs = reader.from_pretrained(out)
        assert (theirs.bos_token_id, theirs.eos_token_id, len(theirs)) == (1, 2, model.config.vocab_size)
        assert theirs("the king").input_ids == prompt_ids(model, tokenizer, "the king")
    assert 'PARAMETER stop "<end>"' in (out / "Modelfile").read_text()


def test_a_foreign_folder_is_never_overwritten(checkpoint, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"not empty and not an export \(thesis.txt\)"):
        export(checkpoint, out)
    (out / "thesis.txt").unlink()
    export(checkpoint, out)  # empty: fine
    first = (out / "export.json").read_bytes()
    export(checkpoint, out)  # its own earlier export: replaced, with equal bytes
    assert (out / "export.json").read_bytes() == first
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"notes.txt was added"):
        export(checkpoint, out)
    assert (out / "notes.txt").read_text() == "mine"
    with pytest.raises(ConfigError, match="inside the checkpoint"):
        export(checkpoint, checkpoint / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failed_export_leaves_the_earlier_one_and_no_leftovers(checkpoint, tmp_path, monkeypatch):
    out = export(checkpoint, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("smollm2.export.model_card", full_disk)
    with pytest.raises(UserError, match="No space left on device; nothing was changed"):
        export(checkpoint, out, dtype="bf16")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_damaged_checkpoint_is_not_exported(tmp_path):
    source = run_checkpoint(tmp_path / "run")
    raw = bytearray((source / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (source / "model.safetensors").write_bytes(raw)
    with pytest.raises(CheckpointError, match="sha256 differs"):
        export(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_dry_run_says_what_would_be_uploaded_and_needs_no_network(
    checkpoint, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("a dry run opened a connection"))
    assert (
        main(
            [
                "--checkpoint",
                str(checkpoint),
                "--out",
                str(tmp_path / "out"),
                "--push",
                "someone/model",
                "--dry_run",
            ]
        )
        == 0
    )
    assert "would upload" in (said := capsys.readouterr().out) and "someone/model" in said
    with pytest.raises(UserError, match="OWNER/NAME"):
        main(["--checkpoint", str(checkpoint), "--out", str(tmp_path / "out"), "--push", "no-owner"])
    with pytest.raises(ConfigError, match="--dry_run goes with --push"):
        main(["--checkpoint", str(checkpoint), "--out", str(tmp_path / "out"), "--dry_run"])


def test_the_command_line_reports_mistakes_in_one_line(tmp_path):
    command = [
        sys.executable,
        "-m",
        "smollm2.export",
        "--checkpoint",
        str(tmp_path / "nowhere"),
        "--out",
        str(tmp_path / "out"),
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


# --- GGUF -----------------------------------------------------------------------------------------------------------


def gguf_logits(out: Path, kind: str, ids: torch.Tensor) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        out, gguf_file=f"model-{kind}.gguf", dtype=torch.float32
    ).eval()
    with torch.no_grad():
        return model(ids).logits


def wide_folder(tmp_path: Path, theta: float = 1e5) -> Path:
    return save_folder(
        tmp_path / "in",
        tiny_model(rope_theta=theta, hidden_size=128, intermediate_size=160, initializer_range=0.09),
    )


def test_gguf_rows_are_reordered_as_llama_cpp_rotates():
    weight = torch.arange(8.0)[:, None]  # one head of 8: halves (0..3 | 4..7)
    assert halves_to_pairs(weight, 1).squeeze().tolist() == [0, 4, 1, 5, 2, 6, 3, 7]


@pytest.mark.parametrize("theta", [1e4, 1e5])
def test_gguf_f16_continues_a_text_as_we_do(tmp_path, theta):
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    source = wide_folder(tmp_path, theta)
    out = export(source, tmp_path / "out", gguf="f16")
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(out, gguf_file="model-f16.gguf", dtype=torch.float32).eval()
    ours = SmolLM2.from_pretrained(source)
    ids = torch.randint(1, 400, (1, 200), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        difference = (theirs(ids).logits.log_softmax(-1) - ours(ids).log_softmax(-1)).abs().max()
        continued = theirs.generate(
            ids, max_new_tokens=32, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    print(f"\nf16, theta {theta:,.0f}: largest difference of a log-probability {difference:.4f}")
    assert difference < 0.01
    expected = ours.generate(ids, 32, stop_ids=())
    assert len(set(expected[0, 200:].tolist())) > 3  # not one token over and over
    assert torch.equal(continued, expected)


def test_a_gguf_file_that_an_export_replaces_is_named(tmp_path, capsys):
    pytest.importorskip("gguf")
    folder = wide_folder(tmp_path)
    for kind in ("q8_0", "q8_0", "f16"):
        main(["--checkpoint", str(folder), "--out", str(tmp_path / "out"), "--gguf", kind])
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("removed")]
    assert said == [
        "removed with the earlier export: model-q8_0.gguf (an export replaces the whole folder; another --out keeps both)"
    ]
    assert [path.name for path in (tmp_path / "out").glob("*.gguf")] == ["model-f16.gguf"]


def test_gguf_q8_0_stays_within_its_rounding(tmp_path):
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    source = wide_folder(tmp_path)
    out = export(source, tmp_path / "out", gguf="q8_0")
    ids = torch.randint(1, 400, (1, 200), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = SmolLM2.from_pretrained(source)(ids).log_softmax(-1)
    difference = (gguf_logits(out, "q8_0", ids).log_softmax(-1) - ours).abs().max()
    print(f"\nq8_0: largest difference of a log-probability {difference:.4f}")
    assert 0 < difference < 0.15
    assert (out / "model-q8_0.gguf").stat().st_size < 0.5 * (out / "model.safetensors").stat().st_size
    assert "FROM ./model-q8_0.gguf" in (out / "Modelfile").read_text()


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
    vocabulary = tokenizer.vocab_size
    model = tiny_model(
        rope_theta=1e5, hidden_size=128, intermediate_size=160, vocab_size=vocabulary, initializer_range=0.09
    )
    source = save_folder(tmp_path / "in", model, tokenizer)
    out = export(source, tmp_path / "out", gguf=kind)
    params = xllamacpp.CommonParams()
    params.model.path = str(out / f"model-{kind}.gguf")
    params.n_ctx, params.n_parallel, params.cpuparams.n_threads, params.warmup = 512, 1, 1, False
    server = xllamacpp.Server(params)

    def post(path: str, body: dict) -> dict:
        request = urllib.request.Request(
            server.listening_address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)

    for text in HARD_STRINGS:
        assert post("/tokenize", {"content": text, "add_special": False, "parse_special": True})[
            "tokens"
        ] == tokenizer.encode(text), repr(text)
    ids = torch.randint(17, vocabulary, (1, 200), generator=torch.Generator().manual_seed(1))
    settings = {"n_predict": 32, "temperature": 0.0, "n_probs": 5, "ignore_eos": True}
    steps = post("/completion", {"prompt": ids[0].tolist(), **settings})["completion_probabilities"]
    tokens = [step["id"] for step in steps]
    ours = model.generate(ids, 32, stop_ids=())[0, 200:].tolist()
    equal = sum(a == b for a, b in zip(tokens, ours, strict=True))
    assert equal == 32 or kind != "f16"
    with torch.no_grad():  # along llama.cpp's own text
        logprobs = model(torch.cat((ids, torch.tensor([tokens[:-1]])), dim=1)).log_softmax(-1)[0, 199:]
    theirs = torch.tensor([[top["logprob"] for top in step["top_logprobs"]] for step in steps])
    places = torch.tensor([[top["id"] for top in step["top_logprobs"]] for step in steps])
    difference = float((logprobs.gather(1, places) - theirs).abs().max())
    print(
        f"\n{kind}, tokenizer {which}: {equal} of 32 greedy tokens equal, largest difference of a log-probability {difference:.4f}"
    )
    assert difference < tolerance
