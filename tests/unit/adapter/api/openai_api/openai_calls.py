"""Calls to the OpenAI API as tests make them."""

import asyncio
import json
from typing import Any

import httpx

CHAT = "/chat/completions"
TEXT = "/completions"
QUESTION: Any = [{"role": "user", "content": "What is AI?"}]


async def until_healthy(url: str) -> None:
    """Wait for the worker's first look at the engine."""
    async with httpx.AsyncClient() as http, asyncio.timeout(10):
        while (await http.get(f"{url}/v1/health")).status_code != 200:
            await asyncio.sleep(0.005)


async def post(url: str, path: str, body: Any) -> httpx.Response:
    """A call without OpenAI's client."""
    content = body if isinstance(body, str) else json.dumps(body)
    headers = {"Content-Type": "application/json"}
    async with httpx.AsyncClient() as http:
        return await http.post(f"{url}/v1{path}", content=content, headers=headers, timeout=10)
