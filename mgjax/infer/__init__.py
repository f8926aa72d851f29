"""From a trained model to answers: sampling, the key-value cache, the engine on ids, the chat."""
