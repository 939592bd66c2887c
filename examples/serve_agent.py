"""An agent's loop: every turn computes only its new tokens. After `headrace serve`: python examples/serve_agent.py"""

import os

from openai import OpenAI

client = OpenAI(base_url=os.environ.get("HEADRACE_URL", "http://127.0.0.1:8000") + "/v1", api_key="none")
model = client.models.list().data[0].id
messages = [{"role": "system", "content": "You keep a list of things to do. " * 20}]

for request in ("Add: buy milk.", "Add: fix the wheel.", "What is on the list?"):
    messages.append({"role": "user", "content": request})
    answer = client.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=24)
    messages.append({"role": "assistant", "content": answer.choices[0].message.content})
    usage = answer.usage
    cached = usage.prompt_tokens_details.cached_tokens
    print(f"turn: {usage.prompt_tokens} tokens of prompt, {cached} of them computed before")
