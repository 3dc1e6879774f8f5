"""Measured claims: README.md in this folder."""

OURS, LLAMA_CPP = "smollm2", "llama_cpp"
COMPILED, NANOGPT = "transformers-compiled", "nanogpt-model"
# peer -> package
PEERS = {"transformers": "transformers", LLAMA_CPP: "xllamacpp", COMPILED: "transformers", NANOGPT: "torch"}
OF_ONE_TASK = {LLAMA_CPP: "decode", COMPILED: "train", NANOGPT: "train"}
