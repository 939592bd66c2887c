"""How surprised a model is by each token of a text, in bits: python examples/logits.py "To be or not to be" """

import sys

import numpy as np

from headrace import LLM

llm = LLM("smollm2")
ids = llm.tokenizer.encode(sys.argv[1] if len(sys.argv) > 1 else "The quick brown fox jumps over the lazy dog.")
logits = llm.logits(ids).astype(np.float64)  # [tokens, vocab]: row i is what the model expects after token i

largest = logits.max(axis=1)
bits = (largest + np.log(np.exp(logits - largest[:, None]).sum(axis=1))) / np.log(2)
for i, token in enumerate(ids[1:]):
    surprise = bits[i] - logits[i, token] / np.log(2)
    print(f"{surprise:7.2f}  {llm.tokenizer.decode([token])!r}")
