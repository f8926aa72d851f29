"""Language models behind OpenAI's protocol, asked many things: paced, retried, the cost counted."""
