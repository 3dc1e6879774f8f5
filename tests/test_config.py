"""A configuration is what was written, or one clear error: nothing is guessed, nothing is dropped."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from pydantic import ValidationError

from smollm2.config import RunConfig, SmolLM2Config
from smollm2.errors import CheckpointError, ConfigError
from smollm2.settings import MAX_YAML_BYTES, load_config, parse_override, preset_names, read_yaml


@pytest.fixture
def config_file(tmp_path):
    def write(text: str | bytes) -> str:
        path = tmp_path / "run.yaml"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return str(path)

    return write


# --- reading ------------------------------------------------------------------------------------------------------------


def test_every_preset_loads_and_says_its_name():
    assert {"nano", "smollm2-135m", "smollm2-360m", "smollm2-1.7b"} <= set(preset_names())
    for name in preset_names():
        assert load_config(name).preset == name


def test_the_135m_preset_is_the_official_pretraining_configuration(test_data):
    official = yaml.safe_load((test_data / "official/config_smollm2_135M.yaml").read_text())
    theirs, ours = official["model"]["model_config"], load_config("smollm2-135m").model
    same = [
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
    ]
    same += ["max_position_embeddings", "rope_theta", "rms_norm_eps", "tie_word_embeddings"]
    assert {name: theirs[name] for name in same} == {name: getattr(ours, name) for name in same}
    assert ours == SmolLM2Config()


def test_the_released_config_json_is_read_and_its_theta_kept(test_data):
    released = json.loads((test_data / "official/smollm2-135m_hf_config_dump.json").read_text())
    released = released.get("config", released)
    config = SmolLM2Config.from_hf_dict(released)
    assert (config.rope_theta, config.max_position_embeddings, config.hidden_size) == (100000.0, 8192, 576)


def test_precedence_is_preset_then_file_then_set_then_flag(config_file):
    path = config_file("train:\n  max_steps: 2\n  seed: 2\n  log_every: 2\n")
    config = load_config(
        "nano", path, ["train.seed=3", "log_every=3"], **{"train.log_every": 4, "train.keep_last": None}
    )
    assert (config.train.max_steps, config.train.seed, config.train.log_every) == (2, 3, 4)
    assert config.train.batch_size == load_config("nano").train.batch_size
    assert config.train.keep_last == load_config("nano").train.keep_last  # None: the flag was not given


def test_a_file_may_name_its_preset(config_file):
    config = load_config(None, config_file("preset: smollm2-135m\n"))
    assert config.preset == "smollm2-135m" and config.model.hidden_size == 576
    config = load_config(
        "nano", config_file("preset: smollm2-135m\n")
    )  # a flag beats the file, as everywhere
    assert config.preset == "nano" and config.model.hidden_size == 192


def test_what_a_run_wrote_gives_the_same_configuration_again(config_file):
    for config in (
        RunConfig(),
        load_config("nano", None, ["train.seed=3"]),
        RunConfig(model=SmolLM2Config(num_hidden_layers=2)),
    ):
        assert load_config(None, config_file(config.to_yaml())) == config


@pytest.mark.parametrize(("preset", "is_refused"), [("smollm2-135m", False), ("nano", True)])
def test_auto_judges_settings_by_the_preset_this_machine_gets(monkeypatch, preset, is_refused):
    """Rows of 1,024 tokens fit the 135M that a GPU gets, not nano."""
    import colab_train
    import smollm2.device
    import smollm2.training

    trained = []
    monkeypatch.setattr(smollm2.device, "choose_preset", lambda asked: (preset, "a stand-in"))
    monkeypatch.setattr(
        smollm2.training,
        "train",
        lambda config: trained.append(config) or SimpleNamespace(table=str, stopped_by=None),
    )
    with (
        pytest.raises(ConfigError, match=r"exceeds model\.max_position_embeddings 256")
        if is_refused
        else contextlib.nullcontext()
    ):
        colab_train.main(["--set", "data.sequence_length=1024"])
    assert [config.preset for config in trained] == ([] if is_refused else [preset])


def test_from_another_folder_the_shipped_text_is_read_and_named_unless_one_was_asked_for(
    monkeypatch, tmp_path, config_file, capsys
):
    import colab_train
    import smollm2.training

    trained, shipped = [], str(Path(colab_train.__file__).with_name("input.txt"))
    monkeypatch.setattr(
        smollm2.training,
        "train",
        lambda config: trained.append(config.data.input_file) or SimpleNamespace(table=str, stopped_by=None),
    )
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a folder").mkdir()
    named = config_file("preset: nano\ndata: {input_file: input.txt}\n")
    for asked in (
        [],
        ["--input_file", "input.txt"],
        ["--set", "data.input_file=input.txt"],
        ["--config", str(named)],
        ["--dataset", "a folder"],
    ):
        colab_train.main(["--preset", "nano", *asked])
    (tmp_path / "input.txt").write_text("a text of one's own")
    colab_train.main(["--preset", "nano"])
    assert trained == [shipped] + 5 * ["input.txt"]
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("text:")] == [
        f"text: {shipped}, which lies beside this program: there is no input.txt in this folder"
    ]


def test_a_preset_is_no_setting():
    with pytest.raises(ConfigError, match="chosen by --preset"):
        load_config("nano", None, ["preset=smollm2-135m"])


def test_what_is_written_is_what_is_read_back(config_file):
    config = load_config(
        "smollm2-135m", None, ["train.learning_rate=3e-4", "model.rope_theta=100000", "data.tokenizer=x/y"]
    )
    assert RunConfig(**read_yaml(config_file(config.to_yaml()))) == config


@pytest.mark.parametrize("text", ["3e-4", "3E-4", "3.0e-4", "0.0003", "3e-04", "+3e-4"])
def test_scientific_notation_is_a_number(config_file, text):
    """PyYAML alone reads 3e-4 as a word."""
    assert load_config(
        "nano", config_file(f"train:\n  learning_rate: {text}\n")
    ).train.learning_rate == pytest.approx(3e-4, rel=1e-12)
    assert load_config("nano", None, [f"train.learning_rate={text}"]).train.learning_rate == pytest.approx(
        3e-4, rel=1e-12
    )


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("learning_rate=1e-3", "train.learning_rate", "1e-3"),
        ("train.seed=7", "train.seed", 7),
        ("model.tie_word_embeddings=false", "model.tie_word_embeddings", False),
        ("prompts=[a, b]", "train.prompts", ["a", "b"]),
        ("data.input_file=a=b.txt", "data.input_file", "a=b.txt"),
        ("micro_batch_size=null", "train.micro_batch_size", None),
    ],
)
def test_set_reads_values_as_yaml_and_finds_the_section(text, key, value):
    assert parse_override(text) == (key, value)


# --- mistakes -----------------------------------------------------------------------------------------------------------


def fails(*args, **kwargs) -> str:
    """The message of the `ConfigError` that loading must end in: one line, not a page."""
    with pytest.raises(ConfigError) as caught:
        load_config(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500
    return message


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.lerning_rate=1", "did you mean 'train.learning_rate'"),
        ("hiden_size=64", "did you mean"),
        ("train.learning_rate", "expected key=value"),
        ("=3", "expected key=value"),
        ("train.learning_rate=fast", "train.learning_rate: "),
        ("train.learning_rate=nan", "train.learning_rate: "),
        ("train.learning_rate=.nan", "train.learning_rate: "),
        ("train.learning_rate=.inf", "train.learning_rate: "),
        ("train.learning_rate=-1", "greater than 0"),
        ("train.learning_rate=true", "not the boolean True"),
        ("train.batch_size=yes", "not the boolean True"),
        ("train.batch_size=1.5", "train.batch_size: "),
        ("train.batch_size=[1]", "train.batch_size: "),
        ("train.batch_size={a: 1}", "train.batch_size: "),
        ("train.batch_size=", "train.batch_size: "),
        ("train.precision=fp8", "'fp32', 'bf16' or 'fp16'"),
        ("model.vocab_size=70000", "65536"),
        ("model.num_key_value_heads=4", "not a multiple of num_key_value_heads 4"),
        ("model.hidden_size=193", "not a multiple of num_attention_heads"),
        ("model.head_dim=31", "head_dim 31 is odd"),
        ("train.micro_batch_size=5", "not a multiple of micro_batch_size 5"),
        ("data.sequence_length=100000", "exceeds model.max_position_embeddings"),
        ("run.devices=7", "not a multiple of 7 workers"),
        ("train.seed=99999999999999999999999", "train.seed: "),
        ("train.seed=-1", "train.seed: "),
        ("data.held_out_fraction=1", "data.held_out_fraction: "),
        ("train.prompts=[]", "train.prompts: "),
        ("train.prompts=3", "train.prompts: "),
    ],
)
def test_a_mistake_in_set_is_one_clear_line(override, expected):
    assert expected in fails("nano", None, [override])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train:\n  lrr: 1\n", "unknown key 'train.lrr'"),
        ("train:\n  learning_rat: 1\n", "did you mean 'learning_rate'"),
        ("trian:\n  seed: 1\n", "did you mean 'train'"),
        ("train:\n  seed: 1\n  seed: 2\n", "'seed' appears twice"),
        ("train: {seed: 1}\ntrain: {seed: 2}\n", "'train' appears twice"),
        ("train: 3\n", "train: "),
        ("train:\n", "train: "),
        ("a: &x [1]\nb: *x\n", "aliases"),
        ("a: &x {b: *x}\n", "aliases"),
        ("train:\n  <<: {seed: 1}\n", "not valid YAML"),
        ("- 1\n- 2\n", "found list"),
        ("", "found NoneType"),
        ("just words\n", "found str"),
        ("1: 2\n", "the key 1 is not a word"),
        ("? [a]\n: 1\n", "not a word"),
        ("[" * 200, "nested deeper than"),
        ("[" * 30 + "]" * 30, "nested deeper than"),
        ("train: {seed: 1\n", "not valid YAML"),
        ("train:\n\tseed: 1\n", "not valid YAML"),
        ("x: !!python/object/apply:os.system ['true']\n", "not valid YAML"),
        ("x: !!timestamp 2001-99-99\n", "not valid YAML"),
        ("train:\n  learning_rate: .nan\n", "train.learning_rate: "),
        ("model:\n  hidden_size: 1_000_000_000_000_000_000_000_000\n", "model"),
        ("preset: gpt\n", "unknown preset 'gpt'"),
        ("preset: [nano]\n", "unknown preset"),
        ("--- 1\n--- 2\n", "not valid YAML"),
        (b"\xff\xfe\x00", "not UTF-8"),
        (b"train:\n  seed: \x00\n", "not valid YAML"),
        ("# " + "x" * MAX_YAML_BYTES, "larger than 64 KiB"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_a_mistake_in_a_file_is_one_clear_line_with_its_name(config_file, text, expected):
    path = config_file(text)
    assert expected in fails("nano", path)


def test_a_broken_file_is_named(config_file):
    path = config_file("a: [\n")
    assert path in fails("nano", path)


def test_missing_files_and_folders_are_named(tmp_path):
    assert "no such file" in fails("nano", str(tmp_path / "absent.yaml"))
    assert "not a regular file" in fails("nano", str(tmp_path))


def test_an_unknown_preset_suggests_the_nearest():
    assert "did you mean 'smollm2-135m'" in fails("smolm2-135m")
    assert "unknown preset" in fails("../../secret")


def test_values_too_long_are_not_parsed():
    assert "too long" in fails("nano", None, ["train.seed=" + "1" * (MAX_YAML_BYTES + 1)])
    assert len(fails("nano", None, ["train.seed=" + "1" * 6000])) < 300  # more digits than Python converts


def test_all_mistakes_are_reported_at_once():
    message = fails("nano", None, ["train.batch_size=-1", "model.rms_norm_eps=0"])
    assert "train.batch_size" in message and "model.rms_norm_eps" in message


def test_a_configuration_cannot_be_changed_in_place():
    with pytest.raises(ValidationError):
        SmolLM2Config().hidden_size = 1


# --- config.json of transformers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("theta", [10000.0, 100000.0, 130000.0])
def test_config_json_keeps_theta_in_both_forms(theta):
    config = SmolLM2Config(rope_theta=theta, tie_word_embeddings=False, pad_token_id=3)
    fields = config.to_hf_dict()
    assert fields["rope_theta"] == fields["rope_parameters"]["rope_theta"] == theta
    assert SmolLM2Config.from_hf_dict(fields) == config
    for absent in ("rope_theta", "rope_parameters"):
        assert (
            SmolLM2Config.from_hf_dict({k: v for k, v in fields.items() if k != absent}).rope_theta == theta
        )


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "gpt2"},
        {"hidden_act": "gelu"},
        {"attention_bias": True},
        {"mlp_bias": True},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4}},
        {"rope_scaling": {"type": "linear", "factor": 2}},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}},
        {"quantization_config": {"bits": 4}},
        {"vocab_size": 100000},
        {"hidden_size": None},
        {"hidden_size": "big"},
        {"rope_parameters": "all"},
        {"rope_scaling": [1]},
        {"bos_token_id": "x"},
        {"num_attention_heads": 0},
        {"rms_norm_eps": float("nan")},
    ],
    ids=str,
)
def test_a_foreign_config_json_is_refused_by_name(change):
    fields = SmolLM2Config().to_hf_dict() | change
    with pytest.raises(CheckpointError, match=r"some/config\.json: ") as caught:
        SmolLM2Config.from_hf_dict(fields, "some/config.json")
    assert next(iter(change)) in str(caught.value)


@pytest.mark.parametrize(("value", "expected"), [(2, 2), ([5, 6], 5), ([], None), (None, None)])
def test_a_list_of_end_tokens_gives_its_first(value, expected):
    assert (
        SmolLM2Config.from_hf_dict(SmolLM2Config().to_hf_dict() | {"eos_token_id": value}).eos_token_id
        == expected
    )


def test_a_config_json_of_something_else_is_refused():
    with pytest.raises(CheckpointError, match="no vocab_size, hidden_size, num_hidden_layers"):
        SmolLM2Config.from_hf_dict({})
