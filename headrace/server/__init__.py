"""Many people at once over HTTP: OpenAI's API, Anthropic's, a chat page. Needs the extra [server]."""
