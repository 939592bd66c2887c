"""Answers of a given form, several prompts at once: JSON of a schema, then one of two words."""

import json

from headrace import LLM, SamplingParams

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0, "maximum": 120}},
    "required": ["name", "age"],
    "additionalProperties": False,
}

llm = LLM("smollm2")
ask = [[{"role": "user", "content": f"Describe {name} as JSON."}] for name in ("Ada, who is 36", "Bob, who is 7")]
for completion in llm.chat(ask, SamplingParams(json_schema=PERSON)):
    print(json.loads(completion.text))

question = [{"role": "user", "content": "Is the sky blue?"}]
answer = llm.chat(question, SamplingParams(choice=("yes", "no"), logprobs=2))
print(answer.text, f"{answer.logprobs[0].logprob:.2f}")
