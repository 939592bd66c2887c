"""A conversation of two turns; the second computes only what the first has not: python examples/chat.py"""

from headrace import LLM, SamplingParams

llm = LLM("smollm2")
params = SamplingParams(max_tokens=64)
messages = [{"role": "system", "content": "You answer in one short sentence."}]

for question in ("What is the capital of Italy?", "Name a river there."):
    messages.append({"role": "user", "content": question})
    answer = llm.chat(messages, params)
    messages.append({"role": "assistant", "content": answer.text})
    print(f"> {question}\n{answer.text}")
    print(f"  ({len(answer.prompt_token_ids)} tokens of prompt in {answer.timings.prefill_s:.3f} s)")
