#!/bin/sh
# A chat and a text with curl. After `headrace serve`: sh examples/serve_curl.sh
set -eu
url="${HEADRACE_URL:-http://127.0.0.1:8000}"
curl -fsS "$url/v1/chat/completions" -H "Content-Type: application/json" \
  -d '{"model": "'"${MODEL:-smollm2}"'", "messages": [{"role": "user", "content": "Say hi."}], "max_tokens": 8}'
echo
curl -fsSN "$url/v1/completions" -H "Content-Type: application/json" \
  -d '{"model": "'"${MODEL:-smollm2}"'", "prompt": "The capital of France is", "max_tokens": 4, "temperature": 0, "stream": true}'
