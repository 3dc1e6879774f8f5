"""A configuration is what was written, or one clear error: nothing is guessed, nothing is dropped."""

import contextlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from smollm2.config import RunConfig, SmolLM2Config
from smollm2.errors import CheckpointError, ConfigError
from smollm2.settings import DOTTED, FIELDS, check_asked_once, load_config, parse_override, read_yaml


@pytest.fixture
def config_file(tmp_path):
    def write(text: str | bytes) -> str:
        path = tmp_path / "run.yaml"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return str(path)

    return write


def test_precedence_is_preset_then_file_then_set_then_flag(config_file):
    path = config_file("preset: smollm2-135m\ntrain:\n  max_steps: 2\n  seed: 2\n  log_every: 2\n")
    flags = {"train.log_every": 4, "train.keep_last": None}  # None: the flag was not given
    for preset in (None, "nano"):  # the file's, and a flag that beats it
        config = load_config(preset, path, ["train.seed=3", "log_every=3"], **flags)
        plain = preset or "smollm2-135m"
        assert (config.train.max_steps, config.train.seed, config.train.log_every) == (2, 3, 4)
        assert config.train.keep_last == load_config(plain).train.keep_last
        assert (config.preset, config.model) == (plain, load_config(plain).model)


def test_a_file_may_leave_the_preset_to_the_machine(config_file, monkeypatch):
    import colab_train
    import smollm2.device

    trained = trained_configs(monkeypatch)
    monkeypatch.setattr(smollm2.device, "choose_preset", lambda asked: ({"auto": "nano"}[asked], asked))
    for flags, named in ([], "auto"), (["--preset", "auto"], "auto"), ([], ""):
        colab_train.main([*flags, "--config", config_file(f"preset: {named}\ntrain: {{max_steps: 5}}\n")])
    assert [(config.preset, config.train.max_steps) for config in trained] == [("nano", 5)] * 3


def test_steps_or_minutes_count_and_it_is_the_last_that_was_asked_for(config_file):
    path = config_file("train: {minutes: 5}\n")
    assert load_config("nano", path).train.minutes == 5
    assert load_config("nano", path, ["max_steps=7"]).train.minutes is None
    assert load_config("nano", path, **{"train.max_steps": 7}).train.minutes is None
    check_asked_once(["minutes=null"], {"train.max_steps": 7})


def test_one_text_is_read_and_it_is_the_last_that_was_asked_for(config_file):
    path = config_file("data: {dataset: texts}\n")
    data = load_config("nano", path, **{"data.input_file": "a.txt"}).data
    assert (data.input_file, data.dataset) == ("a.txt", None)
    assert load_config("nano", path, ["chat_file=a.jsonl"]).data.dataset is None
    assert load_config("nano", path, ["input_file=a", "input_file=b"]).data.input_file == "b"
    both = load_config("nano", None, (), **{"data.input_file": "a.txt", "data.dataset": "texts"})
    assert both.data.dataset == "texts"  # a notebook names both, with None for what is not chosen


def test_what_a_run_wrote_gives_the_same_configuration_again(config_file):
    changed = load_config("smollm2-135m", None, ["learning_rate=3e-4", "data.tokenizer=x/y"])
    for config in (RunConfig(), changed, RunConfig(model=SmolLM2Config(num_hidden_layers=2))):
        path = config_file(config.to_yaml())
        assert load_config(None, path) == config == RunConfig(**read_yaml(path))


@pytest.mark.parametrize(("preset", "is_refused"), [("smollm2-135m", False), ("nano", True)])
def test_auto_judges_settings_by_the_preset_this_machine_gets(monkeypatch, preset, is_refused):
    """Rows of 1,024 tokens fit the 135M that a GPU gets, not nano."""
    import colab_train
    import smollm2.device

    trained = trained_configs(monkeypatch)
    monkeypatch.setattr(smollm2.device, "choose_preset", lambda asked: (preset, "a stand-in"))
    refused = pytest.raises(ConfigError, match=r"exceeds model\.max_position_embeddings 256")
    with refused if is_refused else contextlib.nullcontext():
        colab_train.main(["--set", "data.sequence_length=1024"])
    assert [config.preset for config in trained] == ([] if is_refused else [preset])


def trained_configs(monkeypatch) -> list[RunConfig]:
    """The configurations that `colab_train` would have trained."""
    import smollm2.training

    trained, nothing = [], SimpleNamespace(table=str, stopped_by=None)
    monkeypatch.setattr(smollm2.training, "train", lambda config, **_: trained.append(config) or nothing)
    return trained


def test_elsewhere_the_shipped_text_is_read_unless_one_is_named(monkeypatch, tmp_path, config_file, capsys):
    import colab_train

    trained, shipped = trained_configs(monkeypatch), str(Path(colab_train.__file__).with_name("input.txt"))
    monkeypatch.chdir(tmp_path)
    named = config_file("preset: nano\ndata: {input_file: input.txt}\n")
    by_set = ["--set", "data.input_file=input.txt"]
    for flags in ([], ["--input_file", "input.txt"], by_set, ["--config", named], ["--dataset", "."]):
        colab_train.main(["--preset", "nano", *flags])
    (tmp_path / "input.txt").write_text("a text of one's own")
    colab_train.main(["--preset", "nano"])
    assert [config.data.input_file for config in trained] == [shipped] + 5 * ["input.txt"]
    assert capsys.readouterr().out.count(f"text: {shipped}, which lies beside this program") == 1


AS_TYPED = {
    "learning_rate=1e-3": 1e-3, "train.seed=010": 10, "model.tie_word_embeddings=false": False, "drive_dir=~": str(Path.home()),
    'prompts=["a, b: #c", "no"]': ("a, b: #c", "no"), "data.input_file=a=b.txt": "a=b.txt", "micro_batch_size=null": None,
    "save_every_seconds=None": None,
    **{f"output_dir={name}": name for name in ("runs/exp #2", "no", "2024-05-01", "1:30", "null", "[x]", "'a'", "007", " a ")},
}  # fmt: skip


@pytest.mark.parametrize("text", AS_TYPED)
def test_set_takes_a_value_as_it_is_typed_and_finds_its_section(text):
    assert len(DOTTED) == len(FIELDS)  # no two sections share a name
    section, leaf = parse_override(text)[0].split(".")
    assert getattr(getattr(load_config("nano", None, [text]), section), leaf) == AS_TYPED[text]


def test_a_path_means_what_it_means_in_a_shell_wherever_it_is_written(config_file, monkeypatch):
    monkeypatch.setenv("HOME", "/home/x")
    in_file = load_config("nano", config_file("run: {output_dir: ~/runs}\n"))
    by_set = load_config("nano", None, ["output_dir=~/runs"])
    by_flag = load_config("nano", **{"run.output_dir": "~/runs"})
    assert in_file == by_set == by_flag and by_flag.run.output_dir == "/home/x/runs"
    for key in ("input_file", "dataset", "chat_file", "tokenizer", "init_from", "drive_dir"):
        assert str(load_config("nano", None, [f"{key}=~/x"])).count("'/home/x/x'") == 1


def test_none_is_none_wherever_it_is_written(config_file):
    """`--drive_dir {drive_dir}` in a notebook without Drive: copies went to a folder called None."""
    path = config_file("run: {drive_dir: None}\ntrain: {minutes: None, max_steps: 7}\n")
    for config in load_config("nano", path), load_config("nano", path, **{"run.drive_dir": "None"}):
        assert (config.run.drive_dir, config.train.minutes, config.train.max_steps) == (None, None, 7)
    check_asked_once([], {"data.dataset": "None", "data.input_file": "a.txt"})


def test_the_released_config_json_is_read_and_its_theta_kept(test_data):
    released = json.loads((test_data / "official/smollm2-135m_hf_config_dump.json").read_text())
    config = SmolLM2Config.from_hf_dict(released.get("config", released))
    assert (config.rope_theta, config.max_position_embeddings, config.hidden_size) == (100000.0, 8192, 576)


def test_a_field_that_config_json_lacks_has_the_default_of_transformers():
    from transformers import LlamaConfig

    ours, theirs = SmolLM2Config.from_hf_dict({"model_type": "llama"}).model_dump(), LlamaConfig()
    theta = (getattr(theirs, "rope_parameters", None) or vars(theirs))["rope_theta"]  # transformers 5, 4
    assert ours == {name: theta if name == "rope_theta" else getattr(theirs, name) for name in ours}


DEFAULT = {"rope_type": "default", "rope_theta": 5000.0}


@pytest.mark.parametrize(
    "where", [{"rope_scaling": DEFAULT}, {"rope_parameters": DEFAULT}, {"rope_scaling": {"type": "default"}}]
)
def test_theta_stands_where_transformers_reads_it(where):
    from transformers import LlamaConfig

    fields = {"rope_theta": 7000.0} | where
    ours = SmolLM2Config.from_hf_dict({"model_type": "llama"} | fields)
    assert ours.rope_theta == LlamaConfig(**fields).rope_parameters["rope_theta"]


def test_a_token_id_may_be_one_of_a_list_or_none():
    for value, expected in ((2, 2), ([5, 6], 5), ([], None), (None, None), (-1, None), ([-1], None)):
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            config = SmolLM2Config.from_hf_dict(SmolLM2Config().to_hf_dict() | {key: value})
            assert getattr(config, key) == expected, value


def test_a_padding_token_without_an_embedding_is_none():
    """Models of 32,000 entries came with pad_token_id 32000; nothing is padded here."""
    fields = SmolLM2Config(vocab_size=32000).to_hf_dict()
    assert SmolLM2Config.from_hf_dict(fields | {"pad_token_id": 32000}).pad_token_id is None
    with pytest.raises(CheckpointError, match="bos_token_id is 32000, but vocab_size is 32000"):
        SmolLM2Config.from_hf_dict(fields | {"bos_token_id": 32000})


def test_values_of_a_file_are_what_was_typed(tmp_path):
    """YAML 1.1 reads 010 as 8, 1:30 as 90 and yes as true."""
    path = tmp_path / "c.yaml"
    path.write_text("train: {max_steps: 010, learning_rate: 1e-3, prompts: [yes, 2024], compile: off}\n")
    train = load_config("nano", str(path)).train
    assert (train.max_steps, train.learning_rate, train.prompts) == (10, 1e-3, ("yes", "2024"))
    assert train.compile is False and train.micro_batch_size is None
    path.write_text("train: {batch_size: 1:30}")
    with pytest.raises(ConfigError, match=r"train\.batch_size.*'1:30'"):
        load_config("nano", str(path))
