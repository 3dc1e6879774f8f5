"""What the tests share: one thread, tiny configurations, transformers' twin of a model, and real artefacts where they are at hand."""

import contextlib
import gc
import os
import signal
from pathlib import Path

import pytest
import torch
from tiny_models import real_data

from smollm2.config import SmolLM2Config
from smollm2.model import SmolLM2
from smollm2.progress import Reporter

# a shell that runs the tests in the background ignores Ctrl-C for all its children
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

torch.set_num_threads(1)  # of tiny tensors a second thread only waits; and test runs share a machine in peace


EXCUSED = ("SMOLLM2_TEST_DATA", "mount")  # what no CI can install: data, and the rights of root


def unless_run(report):
    """With SMOLLM2_NO_SKIPS, as in CI, a test or a file of tests that does not run has not passed."""
    is_skip = report.skipped and os.environ.get("SMOLLM2_NO_SKIPS") and not hasattr(report, "wasxfail")
    if is_skip and not any(word in str(report.longrepr) for word in EXCUSED):
        report.outcome = "failed"
        report.longrepr = f"skipped where every test is meant to run: {report.longrepr}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    return unless_run((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report():
    return unless_run((yield))


@pytest.fixture(scope="module", autouse=True)
def left_behind_goes_here():
    """Event loops that gradio and jupyter leave open end with their file, not within another test's `ast.parse`, which
    Python 3.11 answers with SystemError: formatting a finalizer's warning parses, too."""
    yield
    gc.collect()


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of real artefacts (tokenizer, trained model, benchmark text); skips where there is none."""
    return real_data().resolve()


def tiny_config(**changes) -> SmolLM2Config:
    """A network of a few thousand parameters with every feature of the real one (3 query heads to a key/value head)."""
    fields = {
        "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 6,
        "num_key_value_heads": 2, "max_position_embeddings": 160, "initializer_range": 0.1,
    }  # fmt: skip
    return SmolLM2Config(**(fields | changes))


def tiny_model(seed: int = 0, **changes) -> SmolLM2:
    """A `SmolLM2` of `tiny_config`, with gains that are not all 1 (a forgotten gain would otherwise go unseen)."""
    torch.manual_seed(seed)
    model = SmolLM2(tiny_config(**changes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
    return model


@contextlib.contextmanager
def earlier_cell(default: str | None):
    """Inside it the default is set that an earlier cell of a notebook may have set: bfloat16, or a device; or a
    `with torch.device` stands around the call."""
    torch.set_default_dtype(torch.bfloat16 if default == "bfloat16" else torch.float32)
    torch.set_default_device("meta" if default == "meta" else None)
    try:
        with torch.device("meta") if default == "with meta" else contextlib.nullcontext():
            yield
        assert torch.get_default_device().type == (
            "meta" if default == "meta" else "cpu"
        )  # it changed for nobody
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


def random_ids(model: SmolLM2, batch: int, time: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, model.config.vocab_size, (batch, time), generator=generator)


def transformers_twin(model: SmolLM2):
    """transformers' `LlamaForCausalLM` with the same configuration and the same weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    twin = LlamaForCausalLM(LlamaConfig(**model.config.to_hf_dict())).eval()
    missing, unexpected = twin.load_state_dict(model.state_dict(), strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    twin.tie_weights()
    return twin


class Heard(Reporter):
    """Keeps what a run says."""

    def __init__(self):
        self.messages: list[str] = []

    def message(self, text: str) -> None:
        self.messages.append(text)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """A text of a few thousand tokens."""
    from tests.soak import small_text

    return small_text(tmp_path_factory.mktemp("text") / "text.txt")
