"""Notebook 1's Your turn cells: empty, the given answer takes over; the right answer passes; a wrong one is named."""

import json
import re
from pathlib import Path

import pytest

from smollm2.notebook import lesson

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "01_build_the_model.ipynb"
EMPTY = "raise NotImplementedError  # Your turn: replace this line"
# the cell to write -> the answer and the check that follow it
CELLS = {
    "rmsnorm-turn": ("rmsnorm-code", "rmsnorm-check"),
    "rope-turn": ("rope-answer", "rope-check"),
    "attention-turn": ("attention-steps", "attend-check"),
    "swiglu-turn": ("swiglu-answer", "swiglu-check"),
}
NORM = "return self.weight * x / {}"
TURN = "a, b = x.chunk(2, dim=-1); return torch.cat(({}), dim=-1)"
ATTEND = """
    B, H, T, D = q.shape
    k, v = (x.{share} for x in (k, v))
    scores = q @ k.mT{scale}
    future = torch.ones(T, T).triu(1).bool(){mask}
    return scores.masked_fill(future, -torch.inf).softmax({dim}) @ v
"""
REPEAT = {"share": "repeat_interleave(H // k.shape[1], 1)", "scale": " / D ** 0.5", "mask": "", "dim": "-1"}
GATED = "gate, up = self.gate_proj(x), self.up_proj(x); return self.down_proj({})"


def attend(**changes):
    return ATTEND.format(**REPEAT | changes)


RIGHT = {
    "rmsnorm-turn": NORM.format("(x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt()"),
    "rope-turn": TURN.format("a * cos - b * sin, b * cos + a * sin"),
    "attention-turn": attend(),
    "swiglu-turn": GATED.format("F.silu(gate) * up"),
}
WRONG = [
    ("rmsnorm-turn", NORM.format("(x.mean(-1, keepdim=True) + self.eps)"), "the mean in place of"),
    ("rmsnorm-turn", NORM.format("(x.pow(2).mean(-1, keepdim=True) + self.eps)"), "the root is missing"),
    ("rmsnorm-turn", NORM.format("(x.pow(2).mean() + self.eps).sqrt()"), "one mean of all tokens"),
    ("rmsnorm-turn", NORM.format("(x.std(-1, keepdim=True) + self.eps)").replace("x /", "(x - x.mean(-1, keepdim=True)) /"), "the mean was subtracted"),
    ("rmsnorm-turn", NORM.format("(x.pow(2).mean(-1, keepdim=True).sqrt() + self.eps)"), "eps outside"),
    ("rmsnorm-turn", RIGHT["rmsnorm-turn"].replace("self.weight * ", ""), "the gain is missing"),
    ("rmsnorm-turn", "return x.pow(2).mean(-1)", r"found shape \(2, 10\), expected shape \(2, 10, 72\)"),
    ("rmsnorm-turn", "pass", "found None, expected shape"),
    ("rope-turn", "a, b = x[..., ::2], x[..., 1::2]; return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)", "neighbours are paired"),
    ("rope-turn", TURN.format("a * cos + b * sin, b * cos - a * sin"), "turned backwards"),
    ("rope-turn", TURN.format("a * cos + b * sin, b * cos + a * sin"), "the minus sign"),
    ("rope-turn", TURN.format("b * cos + a * sin, a * cos - b * sin"), "the two halves"),
    ("rope-turn", TURN.format("a, b"), "none of: neighbours"),
    ("attention-turn", attend(share="repeat(1, H // k.shape[1], 1, 1)"), "heads repeated"),
    ("attention-turn", attend(scale=""), "the division by √D is missing"),
    ("attention-turn", attend(mask=" & False"), "no mask"),
    ("attention-turn", attend(mask=" & False").replace("softmax(-1)", "softmax(-1).tril()"), "masked after"),
    ("attention-turn", attend(dim="-2"), "softmax over the queries"),
    ("swiglu-turn", GATED.format("gate * F.silu(up)"), "gate and up are swapped"),
    ("swiglu-turn", GATED.format("gate.sigmoid() * up"), "sigmoid in place of SiLU"),
    ("swiglu-turn", GATED.format("F.silu(gate) + up"), "added"),
    ("swiglu-turn", GATED.format("F.silu(gate * up)"), "SiLU of the product"),
]  # fmt: skip


@pytest.fixture(scope="module")
def course():
    """(the notebook's cells in order, their names as they stand before each cell to write)."""
    found = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    cells = {c["id"]: "".join(c["source"]) for c in found if c["cell_type"] == "code"}
    names, before = {}, {}
    for name, text in cells.items():
        before[name] = names.copy()
        if name != "setup" and not name.endswith(("-figure", "-widget")):
            exec(text, names)
        if name == "swiglu-check":
            return cells, before


def work(course, turn, body):
    """What the learner sees who writes `body` into the cell `turn` and runs it, the answer and the check."""
    cells, before = course
    assert EMPTY in cells[turn]
    names = before[turn].copy()
    for name in (turn, *CELLS[turn]):
        exec(cells[name].replace(EMPTY, body), names)


@pytest.mark.parametrize("turn", CELLS)
def test_left_empty_the_given_answer_takes_over_and_the_right_one_is_used(course, turn, capsys):
    work(course, turn, EMPTY)
    assert "still empty: the lesson goes on" in capsys.readouterr().out
    work(course, turn, RIGHT[turn])
    assert "yours is used" in capsys.readouterr().out


def test_what_was_written_stays_in_use_to_the_end(course):
    text = "\n".join(course[0].values())
    for name in ("RMSNorm", "rotate", "attend", "MLP"):
        defined = re.findall(rf"^(?:class|def) {name}\b|^{name} = ", text, re.M)
        assert len(defined) == (1 if name in ("RMSNorm", "MLP") else 2), (
            "once, and where the answer may take over"
        )


@pytest.mark.parametrize(("turn", "body", "likely"), WRONG, ids=[likely for *_, likely in WRONG])
def test_a_typical_mistake_fails_the_check_and_is_named(course, turn, body, likely):
    with pytest.raises(lesson.CheckFailed, match=likely if "found" in likely else f"Likely: {likely}"):
        work(course, turn, body)
