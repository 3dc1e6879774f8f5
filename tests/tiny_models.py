"""Small random models with real tokenizers, for tests that need a folder to load and not a good text."""

import json
import os
from pathlib import Path

import pytest
import torch

from smollm2 import SmolLM2, SmolLM2Config, Tokenizer

TEXT = [
    "Once upon a time there was a small model that learned to write. It read 1,024 lines and then 2,048 more.\n\n",
    "The king said: come hither, my lord, and speak of the year 1599. Why does the sun rise? Because the earth turns.\n",
    "def add(a, b):\n    return a + b  # déjà vu, naïve, 東京, 🙂\n\n1. first\n2. second\n\n\n10. tenth\n",
]


def real_data(*parts: str) -> Path:
    """A path in the folder of real artefacts; skips the test where there is none."""
    root = os.environ.get("SMOLLM2_TEST_DATA")
    if not root or not Path(root, *parts).exists():
        pytest.skip(f"SMOLLM2_TEST_DATA is not set, or has no {'/'.join(parts)}")
    return Path(root, *parts)


def tiny_tokenizer(vocab_size: int = 400) -> Tokenizer:
    return Tokenizer.train(TEXT * 3, vocab_size)


CHAT_TEMPLATE = (  # the form of the official Instruct models
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe brief<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def with_tokens(*words: str, first_id: int = 380) -> Tokenizer:
    """A tiny tokenizer of 380 entries and further special tokens, whose ids in the file begin with `first_id`."""
    fields = json.loads(tiny_tokenizer(380).raw)
    like = fields["added_tokens"][0]
    fields["added_tokens"] += [like | {"id": first_id + i, "content": word} for i, word in enumerate(words)]
    return Tokenizer(json.dumps(fields).encode())


def instruct(folder: Path, template: str = CHAT_TEMPLATE, *tokens: str) -> Path:
    """A model folder that chats; the tokens are those that begin and end a turn."""
    model = tiny_model(bos_token_id=380, eos_token_id=381, pad_token_id=381)
    save_folder(folder, model, with_tokens(*tokens or ("<|im_start|>", "<|im_end|>")))
    (folder / "chat_template.jinja").write_text(template)
    return folder


def metaspace_tokenizer(vocab_size: int = 300) -> Tokenizer:
    """A tokenizer in Llama's manner: a mark for blanks that the decoder strips once, `<unk>`, and a begin token that its file asks for."""
    import tokenizers as hf

    made = hf.Tokenizer(hf.models.BPE(unk_token="<unk>"))
    blanks = [hf.normalizers.Prepend("\u2581"), hf.normalizers.Replace(" ", "\u2581")]
    made.normalizer = hf.normalizers.Sequence(blanks)
    back = [hf.decoders.Replace("\u2581", " "), hf.decoders.Fuse(), hf.decoders.Strip(" ", 1, 0)]
    made.decoder = hf.decoders.Sequence(back)
    words = [hf.AddedToken(word, special=True, normalized=True) for word in ("<unk>", "<begin>", "<end>")]
    made.train_from_iterator(
        TEXT[1].split(".") * 3,
        hf.trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=words, show_progress=False),
    )
    made.post_processor = hf.processors.TemplateProcessing("<begin> $A", special_tokens=[("<begin>", 1)])
    return Tokenizer(made.to_str().encode())


def tiny_model(seed: int = 0, **changes) -> SmolLM2:
    """A random model of two layers, with logits spread widely enough that greedy choices are no coin tosses."""
    settings = {
        "vocab_size": 400, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 512, "initializer_range": 0.12,
    }  # fmt: skip
    torch.manual_seed(seed)
    return SmolLM2(SmolLM2Config(**settings | changes)).eval()


def save_folder(folder: Path, model: SmolLM2, tokenizer: Tokenizer | None = None) -> Path:
    """A model folder as a checkpoint has it, without the state of a run."""
    model.save_pretrained(folder)
    shape, tokenizer = model.config, tokenizer or tiny_tokenizer()
    ids = shape.bos_token_id, shape.eos_token_id, shape.pad_token_id
    for name, data in tokenizer.files(shape.max_position_embeddings, *ids).items():
        (folder / name).write_bytes(data)
    return folder
