"""Compare an exported folder, read by whatever transformers is installed, with this project's own model.

    python tests/check_export_compat.py FOLDER

Prints one line of figures; ends with 1 when logits differ by more than fp32 rounds (1e-5, or a millionth of the largest:
from float64 both differ as much) or any token id differs. It
needs torch, transformers, pydantic and pyyaml only, so it runs in a bare environment of any version of them.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
# What tokenizers get wrong: blank lines before digits, runs of blanks, contractions, several scripts, emoji, controls.
HARD_STRINGS = (
    "\n\n1.", "\n\n\n2\n", "   3  4", "1234567890", "a1b22c333", "it's we'll I'd they've", "  leading", "trailing  ", "\t\ttabs\t1", "",
    "déjà vu — naïve", "東京タワー333m", "🙂👩‍👩‍👧 5", "x=1;y =2", "\r\n7", "<|endoftext|>a<|endoftext|>", " ", "\u00a01", "Ⅷ½²", "ﷺ\u0301",
)  # fmt: skip


@torch.no_grad()
def compare(folder: str | Path, length: int = 256) -> dict[str, object]:
    """{"logits": largest difference in fp32, "scale": largest logit, "tokens": the strings that differ, ...}."""
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

    from smollm2 import SmolLM2, Tokenizer

    ours, tokenizer = SmolLM2.from_pretrained(folder), Tokenizer.from_file(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    length = min(length, ours.config.max_position_embeddings)
    ids = torch.randint(ours.config.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))
    expected, found = ours(ids), theirs(ids).logits
    differing = [
        (type(reader).__name__, text)
        for reader in (PreTrainedTokenizerFast.from_pretrained(folder), AutoTokenizer.from_pretrained(folder))
        for text in HARD_STRINGS
        if reader(text, add_special_tokens=False).input_ids != tokenizer.encode(text)
    ]
    return {
        "transformers": transformers.__version__,
        "length": length,
        "logits": float((expected - found).abs().max()),
        "scale": float(expected.abs().max()),
        "tokens": differing,
    }


if __name__ == "__main__":
    result = compare(sys.argv[1])
    is_equal = result["logits"] <= 1e-6 * max(result["scale"], 10) and not result["tokens"]
    print("equal" if is_equal else "DIFFERENT", *(f"{key}={value}" for key, value in result.items()))
    sys.exit(0 if is_equal else 1)
