"""Bodies that cost a careless server much: as large as may be, of many small parts."""

SIZE = 4 * 2**20  # DLLM_MAX_BODY_BYTES
#: Just below the limit on the number of values.
MANY = 298_000

GENERATE, BATCH, STREAM = "/v1/generate", "/v1/generate_batch", "/v1/generate/stream"
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
MODEL = '{"model":"dllm",'
USER = MODEL + '"messages":[{"role":"user","content":"a"}],'


def items(head: str, item: str, tail: str, count: int = SIZE) -> bytes:
    """A list of `count` equal items, or as many as fit a body."""
    fitting = (SIZE - len(head) - len(tail)) // (len(item) + 1)
    return f"{head}{','.join([item] * min(count, fitting))}{tail}".encode()


def fields(head: str, tail: str, value: str = "1") -> bytes:
    """An object with as many different fields as a body may have."""
    names = ",".join(f'"k{number:x}":{value}' for number in range(MANY))
    return f"{head}{names}{tail}".encode()


def text(head: str, letters: str, tail: str) -> bytes:
    """A body with one long text."""
    count = (SIZE - len(head) - len(tail)) // len(letters.encode())
    return f"{head}{letters * count}{tail}".encode()


BODIES: list[tuple[str, bytes]] = [
    (BATCH, items('{"prompts":[', "1", "]}")),
    (BATCH, items('{"prompts":[', "[]", "]}")),
    (BATCH, items('{"prompts":[', "1", "]}", MANY)),
    (BATCH, items('{"prompts":[', '"a"', "]}", MANY)),
    (BATCH, items('{"prompts":[', "{}", "]}", MANY // 2)),
    (GENERATE, items('{"input_ids":[', "-1", "]}", MANY)),
    (GENERATE, items('{"prompt":"a","canvas_ids":[', "1", "]}", MANY)),
    (GENERATE, items('{"prompt":"a","stop":[', '"a"', "]}", MANY)),
    (GENERATE, items('{"prompt":"a","input_ids":[', "9" * 4000, "]}")),
    (GENERATE, items('{"messages":[', '{"role":"user","content":"a"}', "]}", MANY // 4)),
    (GENERATE, fields('{"prompt":"a",', "}")),
    (GENERATE, text('{"prompt":"a","', "k", '":1}')),
    (GENERATE, text('{"prompt":"a","seed":', "9", "}")),
    (GENERATE, text('{"prompt":"', "\\u0000", '"}')),
    (STREAM, text("", "[", "")),
    (STREAM, text("", '{"a":', "")),
    (CHAT, items(MODEL + '"messages":[', "1", "]}", MANY)),
    (CHAT, items(MODEL + '"messages":[', '{"role":"x","content":5}', "]}", MANY // 4)),
    (CHAT, items(MODEL + '"messages":[', '{"role":"user","content":""}', "]}", MANY // 4)),
    (CHAT, items(USER[:-4] + ',"x":[', '{"type":"text","text":"a"}', "]}]}", MANY // 4)),
    (CHAT, fields(USER, "}")),
    (CHAT, fields(USER[:-3] + ",", "}]}")),
    (CHAT, fields(USER + '"logit_bias":{', "}}")),
    (CHAT, text(USER[:-3] + ',"', "k", '":1}]}')),
    (CHAT, text(USER + '"response_format":"', "é", '"}')),
    (TEXT, items(MODEL + '"prompt":[', '"a"', "]}", MANY)),
    (TEXT, items(MODEL + '"prompt":[', "[1]", "]}", MANY // 2)),
    (TEXT, items(MODEL + '"prompt":["a",', "[1]", "]}", MANY // 2)),
]
