"""A stand-in for an engine's server, to inject faults: the first token of a prompt is the fault. It streams as vLLM's does.

python -m tests.fake_server PORT
"""

from __future__ import annotations

import asyncio
import functools
import json
import os
import sys
from typing import Any

STATUS_500, ERROR_IN_THE_STREAM, NO_ANSWER, FEW_PLACES, NEVER, FLOOD = 500, 501, 502, 503, 504, 505
PLACES, TOKEN_S = 4, 0.025  # with FEW_PLACES: so many requests at once, and a token of each so often


def token_of(number: int, count: int) -> bytes:
    reason = "length" if number == count - 1 else None
    choice = {"index": 0, "text": f" {number}", "token_ids": [number], "finish_reason": reason}
    return f"data: {json.dumps({'choices': [choice]})}\n\n".encode()


def end_of(count: int, prompt_tokens: int) -> bytes:
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": count}
    return f"data: {json.dumps({'choices': [], 'usage': usage})}\n\ndata: [DONE]\n\n".encode()


@functools.cache
def flood_of(count: int, prompt_tokens: int) -> bytes:
    return b"".join(token_of(number, count) for number in range(count)) + end_of(count, prompt_tokens)


async def serve(port: int) -> None:
    from aiohttp import web

    places = asyncio.Semaphore(PLACES)
    asked_tokens = 0

    async def complete(request: Any) -> Any:
        if request.headers.get("Authorization") != f"Bearer {os.environ['FAKE_SERVER_KEY']}":
            return web.json_response({"error": "no key"}, status=401)
        body = await request.json()
        nonlocal asked_tokens
        asked_tokens += len(body["prompt"])
        fault, count = body["prompt"][0], body["max_tokens"]
        if fault == STATUS_500:
            return web.json_response({"error": {"message": "out of memory"}}, status=500)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        if fault == NO_ANSWER:
            request.transport.close()
        elif fault == ERROR_IN_THE_STREAM:
            await response.write(b'data: {"error": {"message": "engine is dead"}}\n\n')
        elif fault == NEVER:
            await asyncio.Event().wait()
        elif fault == FEW_PLACES:
            async with places:
                await answer(response, body, count, TOKEN_S)
        elif fault == FLOOD:  # all tokens in one piece, made once: the client works longer than the server
            await response.write(flood_of(count, len(body["prompt"])))
        else:
            await answer(response, body, count, 0.0)
        return response

    async def answer(response: Any, body: dict[str, Any], count: int, token_s: float) -> None:
        for number in range(count):
            await asyncio.sleep(token_s)
            await response.write(token_of(number, count))
        await response.write(end_of(count, len(body["prompt"])))

    async def health(request: Any) -> Any:
        return web.Response()

    async def metrics(request: Any) -> Any:
        """As vLLM's of two copies of a model: half of the tokens are found in its cache."""
        found = asked_tokens // 2
        lines = ["# TYPE fake:queries counter", f'fake:queries_total{{engine="0",model="a b"}} {asked_tokens - 1:.1f}',
                 'fake:queries_total{engine="1"} 1.0', f"fake:hits_total {found:e}",
                 'fake:queries_created{engine="0"} 1.7e+09']  # fmt: skip
        return web.Response(text="\n".join(lines))

    app = web.Application(client_max_size=2**30)
    app.add_routes([web.post("/v1/completions", complete), web.get("/health", health), web.get("/metrics", metrics)])
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port, reuse_port=True).start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1])))
