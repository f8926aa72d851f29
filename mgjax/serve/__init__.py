"""The HTTP server: OpenAI's chat completions for one model, many clients at a time."""
