"""LiteLLM against a server: prints one JSON object of what it got. Runs in an environment of its own."""

import asyncio
import json
import sys

import litellm

litellm.telemetry = False
options = {"api_base": f"{sys.argv[1]}/v1", "api_key": sys.argv[2], "temperature": 0, "num_retries": 0}
prompt = "Once upon a time"
asked = [{"role": "user", "content": "Tell a story."}]


def text(stream) -> str:
    return "".join(part.choices[0].text or "" for part in stream)


def spoken(stream) -> str:
    return "".join(part.choices[0].delta.content or "" for part in stream)


async def later() -> str:
    answer = await litellm.acompletion(model="openai/demo", messages=asked, max_tokens=24, **options)
    return answer.choices[0].message.content


found = {}
for provider in ("text-completion-openai", "hosted_vllm"):
    name = f"{provider}/demo"
    whole = litellm.text_completion(model=name, prompt=prompt, max_tokens=32, **options)
    streamed = litellm.text_completion(model=name, prompt=prompt, max_tokens=32, stream=True, **options)
    found[provider] = {"whole": whole.choices[0].text, "streamed": text(streamed), "usage": whole.usage.model_dump()}
for provider in ("openai", "hosted_vllm"):
    name = f"{provider}/demo"
    whole = litellm.completion(model=name, messages=asked, max_tokens=24, **options)
    streamed = litellm.completion(model=name, messages=asked, max_tokens=24, stream=True, **options)
    found[f"chat {provider}"] = {"whole": whole.choices[0].message.content, "streamed": spoken(streamed)}
found["later"] = asyncio.run(later())
try:
    litellm.completion(model="openai/demo", messages=asked, **{**options, "temperature": 9})
except litellm.BadRequestError as error:
    found["error"] = error.status_code
print(json.dumps(found))
