"""OpenAI's client: a chat, JSON of a schema, a tool. After `headrace serve`: python examples/serve_openai.py"""

import json
import os

from openai import OpenAI

client = OpenAI(base_url=os.environ.get("HEADRACE_URL", "http://127.0.0.1:8000") + "/v1", api_key="none")
model = client.models.list().data[0].id
asked = {"model": model, "temperature": 0, "max_tokens": 60}
question = [{"role": "user", "content": "What is the capital of Italy? One short sentence."}]

for chunk in client.chat.completions.create(messages=question, stream=True, **asked):
    print(chunk.choices[0].delta.content or "", end="", flush=True)
print()

properties = {"city": {"type": "string", "maxLength": 20}, "country": {"enum": ["Italy", "France"]}}
schema = {"type": "object", "properties": properties, "required": ["city", "country"], "additionalProperties": False}
form = {"type": "json_schema", "json_schema": {"name": "place", "schema": schema}}
answer = client.chat.completions.create(messages=question, response_format=form, **asked)
print("country:", json.loads(answer.choices[0].message.content)["country"])

tool = {"type": "function", "function": {"name": "weather", "parameters": schema}}
answer = client.chat.completions.create(messages=question, tools=[tool], tool_choice="required", **asked)
call = answer.choices[0].message.tool_calls[0].function
print("call:", call.name, json.loads(call.arguments))
