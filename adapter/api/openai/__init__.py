"""The API that OpenAI's clients speak: requests, answers and errors in its shapes."""
