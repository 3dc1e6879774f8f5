"""The benchmarks' promises: rows beside a peer, and a script for a borrowed GPU that cannot fail there only."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as benchmarks
from benchmarks import beside, gpu, nanogpt, publish
from smollm2.errors import ConfigError

ROOT = Path(__file__).parent.parent


def lines(path: Path) -> dict[tuple[str, str], dict]:
    return {(line["item"], line["case"]): line for line in map(json.loads, path.read_text().splitlines())}


@pytest.fixture(scope="module")
def shown(tmp_path_factory) -> dict[tuple[str, str], dict]:
    """All lines of a tiny rehearsal."""
    out = tmp_path_factory.mktemp("gpu") / "out.jsonl"
    command = [sys.executable, "-m", "benchmarks", "gpu", "--tiny", "--seconds", "2000", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0 and "errors: none" in done.stdout, done.stdout + done.stderr
    return lines(out)


@pytest.mark.slow
def test_every_item_for_a_borrowed_gpu_has_its_lines_and_none_failed(shown):
    assert {item for item, case in shown if case == "whole"} == set(gpu.ITEMS)
    assert {item for item, case in shown if case != "whole"} == set(gpu.ITEMS)
    for key, line in shown.items():
        assert "error" not in line and "skipped" not in line, (key, line)
        assert {"device", "python", "torch", "cuda", "transformers", "pytorch_lightning"} <= set(line), key


@pytest.mark.slow
def test_ours_is_as_exact_as_transformers(shown):
    assert shown["exactness", "fp64"]["logits_beside_theirs"] < 1e-6
    for dtype, bound in (("fp32", 1e-5), ("bf16", 0.02), ("fp16", 0.003)):
        line = shown["exactness", dtype]
        assert line["smollm2_gradients"] < bound
        assert max(line["logits_ratio"], line["gradients_ratio"]) <= 1.1, line
    assert shown["exactness", "greedy, fp32"]["equal"]


@pytest.mark.slow
def test_planted_faults_are_seen_and_survived(shown):
    assert shown["t4", "fp16 beside bf16"]["within_0_02"]
    overflow = shown["t4", "a scale of 2^30"]
    assert overflow["skips"] >= 1 and overflow["steps"] == 8 and overflow["scale_at_the_end"] < 2**30
    assert shown["t4", "more rows than fit"]["steps"] == 3
    for case in ("eager", "compiled", "compiled, after a halving"):
        assert shown["resume", case]["resumed_at"] == 10 and shown["resume", case]["equal"]
    assert shown["long", "whole run"]["steps"] == shown["long", "whole run"]["planned_steps"]


@pytest.mark.slow
def test_every_way_to_decode_gives_the_same_tokens(shown):
    found = {case: line for (item, case), line in shown.items() if item == "decoding" and case != "whole"}
    ways = {case: line["same_tokens"] for case, line in found.items()}
    assert len(ways) >= 5 and set(ways.values()) == {1}, ways


def dies(bench) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hangs(bench) -> None:
    time.sleep(60)


def raises(bench) -> None:
    bench.case("raises", "first", lambda: 1 / 0)
    bench.case("raises", "second", lambda: {"number": float("nan")})
    raise ValueError("and the item itself")


@pytest.mark.parametrize("item", [dies, hangs, raises], ids=lambda item: item.__name__)
def test_an_item_that_fails_is_a_line_and_the_next_one_runs(item, tmp_path, monkeypatch, capsys):
    for name in ("CUDA_VISIBLE_DEVICES", "PYTORCH_NVML_BASED_CUDA_CHECK"):
        monkeypatch.setenv(name, "")  # so that they are put back
    cap = 0.2 if item is hangs else 5  # a busy machine takes its time for a fork
    items = {item.__name__: gpu.Item(item, cap, 0), "fine": gpu.Item(lambda bench: None, 5, 0)}
    monkeypatch.setattr(gpu, "ITEMS", items | {"costly": gpu.Item(None, 9000, 9000)})
    monkeypatch.setattr(gpu, "make_tokenizer", lambda *args: None)
    names = f"{item.__name__},fine,costly"
    assert gpu.main(["--tiny", "--out", str(tmp_path / "out"), "--items", names]) == 0
    found = lines(tmp_path / "out")
    words = {dies: "died with exit code -9", hangs: "no answer after 2 s", raises: "ValueError: and the item"}
    assert found[item.__name__, "whole"]["error"].startswith(words[item])
    assert "error" not in found["fine", "whole"] and "needs 9000 s" in found["costly", "whole"]["skipped"]
    assert f"errors: {item.__name__}" in capsys.readouterr().out
    if item is raises:
        assert found["raises", "first"]["error"] == "ZeroDivisionError: division by zero"
        assert found["raises", "second"]["number"] == "nan"


def test_without_a_gpu_or_with_a_mistake_one_line_says_so_and_nothing_is_written(tmp_path, monkeypatch):
    for words, message in (
        (["--items", "speed,sped"], "--items 'sped': expected some of machine, "),
        (["--text", "absent.txt"], "--text absent.txt: no such file"),
    ):
        with pytest.raises(ConfigError, match=message):
            gpu.main(["--out", str(tmp_path / "out"), *words])
    monkeypatch.setenv("PYTORCH_NVML_BASED_CUDA_CHECK", "")
    monkeypatch.setattr(gpu, "in_child", lambda *args, **options: {"device_type": "cpu"})
    with pytest.raises(ConfigError, match=r"no GPU here: .*--tiny"):
        benchmarks.main(["gpu", "--out", str(tmp_path / "out")])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("task", ["train", "decode"])
def test_every_row_beside_a_peer_has_its_speed_ours_first(task, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(beside, "in_fresh_process", lambda arguments: {"peak_memory_bytes": 1})
    roofs = dict.fromkeys(("gemm_fp32_flops_per_second", "memory_bytes_per_second"), 1e9)
    monkeypatch.setattr(beside, "roofs", lambda job: roofs)
    dtypes = ["fp32"] if task == "train" else ["fp32", "bf16", "int8"]
    small = ["--preset", "nano", "--length", "16", "--new_tokens", "4", "--windows", "2", "--json"]
    monkeypatch.setattr(publish, "ROOT", tmp_path)
    monkeypatch.setattr(publish, "RESULTS", tmp_path)
    (tmp_path / "README.md").write_text("a\n<!-- x: made by a benchmark -->\nold\n<!-- end of x -->\nz")
    if task == "train":
        small += ["--peers", "transformers,nanogpt-model", "--name", "x"]
    assert benchmarks.main([task, *small, "--dtype", ",".join(dtypes)]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    expected = [("smollm2", dtype) for dtype in dtypes] + [("transformers", dtype) for dtype in dtypes[:2]]
    if task == "train":
        expected.append(("nanogpt-model", "fp32"))
        assert json.loads((tmp_path / "x.json").read_text())["rows"] == rows
        text = (tmp_path / "README.md").read_text()
        assert "old" not in text and "| nanogpt-model, fp32 |" in text
        assert text.endswith("<!-- end of x -->\nz")
        assert 'alt="Training nano, ' in text and (tmp_path / "x.png").read_bytes()[1:4] == b"PNG"
    assert [(row["name"], row["dtype"]) for row in rows] == expected
    assert all(row["tokens_per_second"] > 0 for row in rows)


def test_nanogpt_has_the_size_and_the_work_that_its_readme_tells():
    model = nanogpt.NanoGPT()
    matrices = sum(p.numel() for p in model.parameters()) - model.wpe.weight.numel()
    assert round(matrices / 1e6, 2) == 0.80  # "number of parameters: 0.80M"
    assert model.flops_per_token() == pytest.approx(4.97e6, rel=0.01)
    ids = torch.arange(2 * nanogpt.LENGTH).view(2, -1) % nanogpt.VOCAB
    assert model.loss(ids, ids.roll(-1, 1)).item() == pytest.approx(math.log(nanogpt.VOCAB), abs=0.2)
