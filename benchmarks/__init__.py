"""Measured claims: README.md in this folder."""

OURS, LLAMA_CPP = "smollm2", "llama_cpp"
PEERS = {"transformers": "transformers", LLAMA_CPP: "xllamacpp"}  # peer -> package
