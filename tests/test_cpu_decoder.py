"""A model made ready to write says what the plain one says: exactly in fp32, nearly in bf16 and int8."""

import pytest
import torch
import torch.nn.functional as F
from conftest import random_ids, transformers_twin
from tiny_models import real_data, save_folder, tiny_model

from smollm2.cpu_decoder import FastDecoder, product
from smollm2.device import choose_decoding
from smollm2.errors import ConfigError
from smollm2.evaluate import score_file
from smollm2.pretrained import load_model_and_tokenizer, load_to_write

# |error| / |logits|; int8 in rows of 64 rounds each product to 0.6 %, and some ten of them add up
TOLERANCE = {"fp32": 2e-6, "bf16": 0.02, "int8": 0.04}
SHAPES = [
    {},
    {"num_key_value_heads": 1},
    {"tie_word_embeddings": False},
    {"head_dim": 32},
    {"rope_theta": 1e5},
]


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.dtype == torch.float32 and found.shape == expected.shape
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_logits_are_those_of_the_plain_model_whole_and_piece_by_piece(shape, dtype):
    model = tiny_model(**shape)
    fast = FastDecoder(model, dtype)
    for batch in (1, 2):  # one row has a way of its own for one token
        ids = random_ids(model, batch=batch, time=60)
        with torch.no_grad():
            expected = model(ids)
        cache = fast.new_cache(batch, 64)
        pieces = [fast(part, cache) for part in ids.split([20, 1, 1, 7, 1, 30], dim=1)]
        for found in (fast(ids), torch.cat(pieces, dim=1)):
            assert error(found, expected) < TOLERANCE[dtype]
        assert cache.length == 60 and error(fast.next_logits(ids), expected[:, -1]) < TOLERANCE[dtype]


def test_greedy_tokens_in_fp32_are_those_of_transformers_also_beyond_the_context():
    model = tiny_model(tie_word_embeddings=False, initializer_range=0.3, eos_token_id=None)
    ids = random_ids(model, batch=2, time=5)
    settings = {"max_new_tokens": 60, "do_sample": False, "pad_token_id": 0}
    theirs = transformers_twin(model).generate(ids, attention_mask=torch.ones_like(ids), **settings)
    for writer in (model, FastDecoder(model)):
        assert torch.equal(writer.generate(ids, max_new_tokens=60), theirs)
    model = tiny_model(max_position_embeddings=40, initializer_range=0.3, tie_word_embeddings=False)
    ids, fast = random_ids(model, batch=3, time=30), FastDecoder(model)
    assert torch.equal(fast.generate(ids, max_new_tokens=90), model.generate(ids, max_new_tokens=90))


@pytest.mark.parametrize("dtype", ["plain", *TOLERANCE])
def test_every_row_stops_at_its_own_end_of_text(dtype):
    model = tiny_model(tie_word_embeddings=False, initializer_range=0.3)
    writer = model if dtype == "plain" else FastDecoder(model, dtype)
    ids = random_ids(writer, batch=2, time=4)
    free = writer.generate(ids, max_new_tokens=30, stop_ids=())
    stop = int(free[0, 10])
    stopped = writer.generate(ids, 30, stop_ids=(stop,))
    for row, whole in zip(stopped[:, 4:].tolist(), free[:, 4:].tolist(), strict=True):
        end = whole.index(stop) + 1 if stop in whole else len(whole)
        assert row[:end] == whole[:end] and set(row[end:]) <= {stop}
    assert stopped.shape[1] < free.shape[1] or stop not in free[1]


@pytest.mark.parametrize("rows", [1, 2, 33])
@pytest.mark.parametrize("columns", [64, 17])
@pytest.mark.parametrize("size", [1e-20, 1.0, 1e10])
@pytest.mark.parametrize("bits", [8, 7])  # of the inputs: 7 where the CPU has no VNNI
@pytest.mark.parametrize("engine", ["x86", "qnnpack"])  # the latter is what ARM has
def test_int8_is_off_by_half_a_step_of_each_row_at_most(rows, columns, size, bits, engine, monkeypatch):
    """Each row of the weights and of the inputs: a large one takes nothing from a small one; also zeros."""
    if engine not in torch.backends.quantized.supported_engines:
        pytest.skip(f"this PyTorch has no {engine}")
    monkeypatch.setattr(torch.backends.quantized, "engine", engine)
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: bits == 8, raising=False)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(96, columns, generator=generator) * size * torch.logspace(-3, 3, 96)[:, None]
    x = torch.randn(rows, columns, generator=generator) * torch.logspace(3, -3, rows)[:, None]
    weight[5], x[1:2] = 0, 0
    weight_step, x_step = weight.abs().amax(1) / 127, 2 * x.abs().amax(1, keepdim=True) / (2**bits - 1)
    exact = (x.double() @ weight.double().T).float()
    by_weights = x.abs().sum(1)[:, None] * weight_step / 2
    by_inputs = weight.abs().sum(1) * x_step / 2 + columns * weight_step * x_step / 4
    off = (product(weight, torch.int8)(x) - exact).abs()
    assert bool((off <= (by_weights + by_inputs) * 1.01 + exact.abs() * 1e-5).all())


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_autocast_around_it_changes_no_bit(dtype):
    """int8 was a traceback there, and fp32 was rounded to bf16."""
    model = tiny_model()
    fast, ids = FastDecoder(model, dtype), random_ids(model, batch=1, time=9)
    expected = fast(ids), fast.generate(ids, 20)
    with torch.autocast("cpu", torch.bfloat16):
        found = fast(ids), fast.generate(ids, 20)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_model_that_is_no_number_says_so_in_every_dtype(dtype):
    model = tiny_model()
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = torch.nan
    fast = FastDecoder(model, dtype)
    cache = fast.new_cache(1, 8)
    for ids in (torch.tensor([[1, 2, 3]]), torch.tensor([[4]])):
        assert bool(fast.next_logits(ids, cache).isnan().all())


def test_a_real_model_loses_less_than_half_a_percent_in_bits_per_byte():
    folder, text = real_data("stories-656k"), real_data("tinyshakespeare", "input.txt")
    model, tokenizer = load_model_and_tokenizer(folder)
    options = {"split": "val", "block_length": 128, "max_tokens": 4000}
    plain = score_file(model, tokenizer, text, **options).bits_per_byte
    for dtype, limit in (("fp32", 1e-6), ("bf16", 0.001), ("int8", 0.005)):
        fast = FastDecoder(model, dtype)
        model.loss = lambda ids, targets, fast=fast: F.cross_entropy(fast(ids).mT, targets)
        assert abs(score_file(model, tokenizer, text, **options).bits_per_byte / plain - 1) < limit, dtype


def test_a_model_whose_weights_are_taken_says_the_same_and_holds_none(tmp_path):
    model = tiny_model()
    ids = random_ids(model, batch=1, time=9)
    expected = FastDecoder(model, "int8").generate(ids, 20)
    assert torch.equal(FastDecoder(model, "int8", take=True).generate(ids, 20), expected)
    assert all(parameter.is_meta for parameter in model.model.layers.parameters())
    folder = save_folder(tmp_path / "model", tiny_model())
    read, _, why = load_to_write(folder, "int8")
    assert torch.equal(read.generate(ids, 20), expected) and "int8" in why


def test_what_is_compared_is_exact_and_what_is_read_is_fast(monkeypatch):
    cpu = torch.device("cpu")
    assert choose_decoding(None, cpu)[0] == "fp32" and choose_decoding("bf16", cpu)[0] == "bf16"
    monkeypatch.setattr(torch.backends.quantized, "engine", "x86")
    assert choose_decoding("auto", cpu)[0] == "int8"
    monkeypatch.delattr(torch, "quantize_per_channel")  # it is deprecated
    for has_bf16, expected in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr("smollm2.device.cpu_has_bf16", lambda has_bf16=has_bf16: has_bf16)
        assert choose_decoding("auto", cpu)[0] == expected
    with pytest.raises(ConfigError, match="--dtype int8: this PyTorch has no"):
        choose_decoding("int8", cpu)
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    assert choose_decoding("auto", gpu)[0] == choose_decoding(None, gpu)[0] == "fp16"
    for wrong in ("bf16", "int8"):
        with pytest.raises(ConfigError, match=f"--dtype {wrong}: not on Tesla T4; expected fp16 or fp32"):
            choose_decoding(wrong, gpu)
