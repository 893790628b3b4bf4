"""The server of `plug serve`: OpenAI's routes and PLUG's own over HTTP, on FastAPI and uvicorn."""
