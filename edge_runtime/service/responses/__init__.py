"""OpenAI's Responses API: another form of chat requests and answers, and the memory of earlier responses."""
