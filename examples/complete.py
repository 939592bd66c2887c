"""Completes a text, piece by piece as it is made: python examples/complete.py "Once upon a time" """

import sys

from headrace import LLM, SamplingParams

llm = LLM("smollm2")
prompt = sys.argv[1] if len(sys.argv) > 1 else "The capital of France is"
stream = llm.stream(prompt, SamplingParams(max_tokens=24))

print(prompt, end="")
for piece in stream:
    print(piece.text, end="", flush=True)
print()

done = stream.completion
print(f"{done.timings.decode_tokens_per_s:.0f} tokens/s, {done.gb_per_s:.1f} GB/s", file=sys.stderr)
